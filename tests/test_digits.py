"""The main job's parts: honest data, torch.func's loss curve, one artifact for any task count, options."""

import subprocess
import sys

import pytest
import torch

import fxfunc
from fxfunc.bench import digits, digits_eval, digits_main


@pytest.fixture(scope="module")
def images():
    return digits.load_images()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "maml.zip"
    digits_main.compile_meta_step(digits_main.parse([]))[1].save(path)
    return path


def test_held_out_images_are_never_trained_on(images):
    train, held_out = (set(each.rows.flatten().tolist()) for each in images)
    assert len(train) == 10 * digits.TRAIN_PER_CLASS and len(held_out) >= 10 * 50
    assert not train & held_out


def test_no_two_splits_share_a_picture(images):
    train, held_out = ({tuple(p.tolist()) for p in each.pixels.flatten(0, 1)} for each in images)
    assert not train & held_out


def test_images_are_filed_under_their_class(images):
    from sklearn.datasets import load_digits

    target = torch.tensor(load_digits().target)
    for each in images:
        assert (target[each.rows] == torch.arange(10)[:, None]).all()
        assert each.pixels.min() == 0 and each.pixels.max() == 1


def test_tasks_hold_distinct_classes_and_images(images):
    classes, picks = digits.sample_rows(images[0], 100, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == digits.WAYS for row in classes.tolist())
    assert all(len(set(row)) == digits.SHOTS + digits.QUERIES for row in picks.flatten(0, 1).tolist())
    assert len({tuple(row) for row in classes.tolist()}) > 90  # the order of the classes is drawn too


def test_tasks_label_support_and_query_alike(images):
    generator = torch.Generator().manual_seed(0)
    tasks = digits.sample_tasks(images[0], 8, generator)
    classes, _ = digits.sample_rows(images[0], 8, torch.Generator().manual_seed(0))
    class_of = {tuple(p.tolist()): c for c, group in enumerate(images[0].pixels) for p in group}
    for t in range(8):
        for x, y in ((tasks.xs[t], tasks.ys[t]), (tasks.xq[t], tasks.yq[t])):
            assert [class_of[tuple(p.tolist())] for p in x] == classes[t][y].tolist()


@pytest.mark.slow
def test_loss_curve_is_that_of_torch_func():
    ours = digits.loss_curve(fxfunc.jit(digits.make_meta_step(fxfunc)), seed=3, steps=50)
    theirs = digits.loss_curve(digits.make_meta_step(torch.func), seed=3, steps=50)
    assert theirs[-1] < 0.95 * theirs[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 25, 1000])
def test_one_artifact_runs_for_any_number_of_tasks(artifact, images, count):
    tasks = digits.sample_tasks(images[0], count, torch.Generator().manual_seed(count))
    params = digits.init_params(1)
    torch.testing.assert_close(
        fxfunc.load(artifact)(params, *tasks),
        digits.make_meta_step(torch.func)(params, *tasks),
        rtol=1e-4,
        atol=1e-5,
    )


def test_loss_curve_from_the_artifact_is_that_of_jit(artifact):
    loaded = digits.loss_curve(fxfunc.load(artifact), seed=3, steps=5)
    jitted = digits.loss_curve(fxfunc.jit(digits.make_meta_step(fxfunc)), seed=3, steps=5)
    assert loaded == pytest.approx(jitted, rel=1e-5)


def test_accuracy_counts_and_its_interval_shrinks(images):
    params = {name: p.zero_() for name, p in digits.init_params(0).items()}
    tasks = digits_eval.eval_tasks(images[1], 0)
    constant = digits_eval.accuracy(params, tasks)  # always label 0, which is 1 in 5
    assert constant.mean == pytest.approx(0.2) and constant.interval == pytest.approx(0)
    random = digits.init_params(0)
    few = digits.Tasks(*(t[:50] for t in tasks))
    ratio = digits_eval.accuracy(random, few).interval / digits_eval.accuracy(random, tasks).interval
    assert 1.4 < ratio < 2.8


@pytest.mark.parametrize(
    "bad",
    [
        "--steps 0",
        "--steps x",
        "--tasks -1",
        "--seed 1.5",
        "--target gpu",
        "--backend jax",
        "--backend triton",
        "--backend cpp --target cuda:90",
        "--x",
    ],
)
def test_bad_options_are_one_clear_line(bad, capsys):
    with pytest.raises(SystemExit) as exit:
        digits_main.parse(bad.split())
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("scripts/maml: error:") and bad.split()[0] in message


def run_main(folder, *options):
    command = [sys.executable, "-m", "fxfunc.bench.digits_main", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_main_job_trains_from_the_artifact(tmp_path):
    done = run_main(tmp_path, "--steps", "300", "--tasks", "16", "--seed", "1", "--dump", "graphs")
    assert done.returncode == 0, done.stderr
    assert "meta-step 300/300" in done.stderr
    rows = dict(line.rsplit("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    accuracy = {name.strip(): float(value.split()[0]) for name, value in rows.items() if "±" in value}
    assert accuracy["meta-trained: after 3 steps, lr 0.1"] > 0.75
    assert accuracy["meta-trained: before adaptation"] < 0.3
    assert list((tmp_path / "graphs").rglob("*.*"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_main_job_without_a_gpu_compiles_for_one(tmp_path):
    done = run_main(tmp_path, "--target", "cuda:90")
    assert done.returncode == 0, done.stderr
    assert "training is skipped" in done.stdout and "registers" in done.stdout
    assert (tmp_path / "artifacts" / "maml-digits-cuda90.zip").stat().st_size > 0
