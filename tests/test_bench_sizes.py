"""Measurements over sizes, on a CPU with tiny ones: what is right is timed, what is not is named, and the rest stays."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc.bench import answers, chains, counters, implementations, peaks, sides, sizes, turns
from fxfunc.bench.chains import Case, Chain
from fxfunc.bench.errors import BenchError
from fxfunc.bench.sizes import Point, Row
from fxfunc.bench.turns import Measured, Run
from fxfunc.bench.workloads import maml
from fxfunc.bench.workloads.meta import meta_gradient
from fxfunc.codegen import cost, cxx

PEAK = {"flops_per_s": 1e9, "bytes_per_s": 1e9}
RUN = Run("cpu", 0.01, 7, PEAK)
ON_GPU = Run("cuda", 0.01, 7, PEAK)
SOFTMAX = Case(chains.softmax, 0, 4.0, False, (8, 16), torch.float32)
RESIDUAL_GRADIENT = Case(chains.residual, 2, 1.0, True, (8, 16), torch.bfloat16)

pytestmark = [
    pytest.mark.usefixtures("cache_of_this_file", "small"),
    pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler"),
]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(peaks, "measure", lambda device, threads: PEAK)
    monkeypatch.setattr(peaks, "array_bytes", lambda device: 2**16)
    monkeypatch.setattr(sizes, "TABLE", tmp_path / "sizes.md")
    monkeypatch.setattr(sizes, "AXES", {"steps": [Point(64, 40, n) for n in (1, 2, 3)]})
    monkeypatch.setattr(chains, "CASES", [SOFTMAX, RESIDUAL_GRADIENT])


def table(text: str) -> list[dict[str, str]]:
    """All rows of all tables, by column."""
    rows, head = [], None
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if found is None or line.startswith("|--"):
            head = head if found else None
        elif head is None:
            head = found
        else:
            rows.append(dict(zip(head, found, strict=True)))
    return rows


# ---- the command ----


def planted(api, loss, steps, lr):
    """fxfunc's answer is wrong after two steps, and there is none after three."""
    right = meta_gradient(api, loss, steps, lr)

    def f(*inputs):
        if api is fxfunc and steps == 3:
            raise RuntimeError("planted, of three steps")
        grads, value = right(*inputs)
        return grads, value + (0.25 if api is fxfunc and steps == 2 else 0)

    return f


def test_rows_that_fail_are_named_and_the_others_measured(monkeypatch, capsys):
    monkeypatch.setattr(sizes, "meta_gradient", planted)
    assert sizes.main(["--device", "cpu", "--update", "--seconds", "0.01", "--seed", "7"]) == 1
    text = sizes.TABLE.read_text()
    assert text in capsys.readouterr().out and text.endswith("\n") and "seed 7;" in text
    one, two, three, softmax, gradient = table(text)
    assert 0 < float(one["error"]) < 1e-5 and one["chose"] == "kernel" and one["graph, ms"] == "-"
    assert all(float(one[f"{way}, ms"]) > 0 for way in ("torch.func", "model", "batched"))
    assert two["model, ms"] == two["batched, ms"] == "failed" and float(two["torch.func, ms"]) > 0
    assert three["model, ms"] == three["torch.func, ms"] == "failed" and three["error"] == "-"
    inputs = maml.draw(64, 40, torch.Generator().manual_seed(7))
    value = float(meta_gradient(torch.func, maml.loss, 2, sizes.inner_lr(Point(64, 40, 2)))(*inputs)[1])
    assert (
        f"- maml tasks=64 width=40 steps=2: model: BenchError: error {0.25 / max(value, 1):.1e}, allowed"
        in text
    )
    assert two["error"] == f"{0.25 / max(value, 1):.1e}"
    assert "- maml tasks=64 width=40 steps=3: row: RuntimeError: planted, of three steps" in text
    assert "- steps: batched ATen is faster" in text and "(not known at 2, 3)" in text
    assert "no CUDA graph: its programs are no kernels" in text and " /" not in text.partition("## MAML")[2]
    assert float(softmax["error"]) < 1e-5 and float(gradient["error"]) < 2**-6
    assert all(float(row["model, ms"]) > 0 and float(row["share"]) >= 0 for row in (softmax, gradient))


def test_rows_that_are_all_right_give_status_0_and_only_update_writes():
    assert sizes.main(["--device", "cpu", "--rows", "softmax", "--seconds", "0.01"]) == 0
    assert not sizes.TABLE.exists()


def test_an_interrupted_run_leaves_the_file_as_it_was(monkeypatch):
    def interrupted(what, run):
        raise KeyboardInterrupt

    sizes.TABLE.write_text("before")
    monkeypatch.setattr(sizes, "measured_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sizes.main(["--device", "cpu", "--update"])
    assert [p.read_text() for p in sizes.TABLE.parent.iterdir()] == ["before"]


@pytest.mark.parametrize(
    "arguments, says",
    [(["--rows", "nothing"], "softmax 8x16 float32"), (["--rows", "maml", "--update"], "leave out --rows")],
)
def test_bad_input_is_status_2_and_says_what_to_do(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        sizes.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_without_a_gpu_a_run_on_one_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        sizes.main([])
    assert stop.value.code == 2 and "--device cpu" in capsys.readouterr().err


# ---- crossovers and goals ----


def row(tasks: int, model: float | None, batched: float | None, batches: bool | None, **more: float) -> Row:
    ms = {"model": model, "batched": batched, "torch.func": 0.001} | more
    return Row(Point(tasks=tasks), Measured({k: v for k, v in ms.items() if v is not None}), batches)


def test_a_crossover_is_where_batched_begins_to_win_and_where_the_model_batches():
    rows = [row(100, 2, 1, True), row(1, 1, 3, False), row(10, 1, 2, False), row(1000, 9, 1, True)]
    assert sizes.crossover("tasks", rows) == (
        "tasks: batched ATen is faster from 100 on, not yet at 10; the model batches from 100 on, not yet at 10."
    )


def test_a_crossover_that_is_none_or_two_says_where():
    rows = [row(1, 3, 1, True), row(10, 1, 2, False), row(100, 3, 1, False), row(1000, None, 1, None)]
    assert sizes.crossover("tasks", rows) == (
        "tasks: batched ATen is faster at 1, 100 (not known at 1000); the model batches at 1 (not known at 1000)."
    )
    never = [row(1, 1, 2, True), row(10, 1, 2, True)]
    assert sizes.crossover("tasks", never) == (
        "tasks: batched ATen is faster nowhere; the model batches everywhere."
    )


def test_a_graph_counts_as_the_model():
    assert not row(25, 3, 2, False, graph=1).batched_wins and row(25, 3, 2, False, graph=2.5).batched_wins


@pytest.mark.parametrize(
    "ms, said", [(0.05, "met"), (0.06, "met"), (0.061, "missed"), (None, "not measured")]
)
def test_goals_are_judged_at_their_own_sizes_on_a_gpu_alone(ms, said):
    assert row(25, ms, 1, False).cells(ON_GPU)["goal, ms"] == f"0.06: {said}"
    assert row(25, ms, 1, False).cells(RUN)["goal, ms"] == "0.06: not measured"
    other = [Row(Point(25, 40, 20), Measured()), Row(Point(100), Measured())]
    assert all(r.cells(ON_GPU)["goal, ms"] == "-" for r in other)


def test_shares_are_of_the_copy_and_of_sgemm():
    chain = Chain(SOFTMAX, Measured({"model": 2.0, "copy": 1.0}), bytes=1800, copied=1000)
    assert chain.share == 0.9 and chain.cells(ON_GPU)["goal"] == "0.9: met"
    slow = Chain(SOFTMAX, Measured({"model": 2.0, "copy": 1.0}), bytes=1799, copied=1000)
    assert slow.cells(ON_GPU)["goal"] == "0.9: missed"
    found = Row(Point(), Measured({"model": 4.0, "graph": 2.0}), False, flops=10**6)
    assert found.cells(ON_GPU)["flops"] == "50.0%" and found.cells(ON_GPU)["faster"] == "graph"


# ---- what is counted ----


def test_bytes_are_of_inputs_once_and_results_once():
    by_hand = {SOFTMAX: 2 * 8 * 16 * 4, RESIDUAL_GRADIENT: (3 * 8 * 16 + 4 * 16) * 2}
    for case, count in by_hand.items():
        inputs = case.inputs(torch.Generator().manual_seed(0))
        assert chains.compulsory_bytes(case.over(torch.func), inputs) == count


def test_flops_are_those_that_torch_func_does_and_the_choice_is_the_models():
    point = Point(64, 40, 1)
    found = sizes.measured_row(point, RUN)
    step = meta_gradient(torch.func, maml.loss, point.steps, 0.01)
    inputs = maml.draw(point.tasks, point.width, torch.Generator())
    assert found.found.failed == {} and found.batches is False
    assert found.flops == counters.count(step, *inputs)["flops"]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("backend, target", [("cpp", "cpu"), ("triton", "cuda:90")])
def test_what_became_of_a_map_is_read_of_either_backend(tasks, backend, target):
    if backend == "triton":
        pytest.importorskip("triton")
    lowered = fxfunc.jit(fxfunc.vmap(lambda x: x.sin().sum())).lower(torch.ones(tasks, 5))
    with cost.forced(**({"maps": "loops"} if tasks > 1 else {})):
        model = lowered.compile(backend=backend, target=target)
    assert sizes.is_batched(model) == (tasks == 1)


# ---- turns ----


def leaves(tree) -> list:
    return answers.leaves(pytree.tree_map(lambda t: t.double().numpy(), tree))


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_the_error_is_that_of_the_bench(scale):
    expected = [scale * torch.randn(5, 3, dtype=torch.float64), torch.tensor([math.inf, 1.0]), torch.ones(0)]
    found = [t.float() + 1e-3 for t in expected]
    assert turns.error(found, expected) == answers.error(leaves(found), leaves(expected)) > 0
    with pytest.raises(BenchError, match="NaN or inf"):
        turns.error([expected[0], torch.ones(2), expected[2]], expected)
    with pytest.raises(BenchError, match=r"shapes \[\[5, 3\]\], expected \[\[5, 3\], \[2\], \[0\]\]"):
        turns.error(expected[:1], expected)


def test_more_is_allowed_beside_a_kink_alone():
    step = lambda x: (x > 0.7).to(x.dtype)
    assert turns.reference(step, (torch.full((64,), 0.5),))[1] == 1e-5
    assert turns.reference(step, (torch.full((64,), 0.7),))[1] == 3


def test_what_is_wrong_or_raises_is_not_timed_and_what_precedes_is_not_counted():
    calls = []
    ways = {
        "right": lambda x: 2 * x,
        "wrong": lambda x: 2 * x + 1e-3,
        "nan": lambda x: 2 * x + math.nan,
        "raises": lambda x: calls.append("raises") or 1 / 0,
    }
    before = lambda: calls.append("before")
    beside = {"beside": lambda: calls.append("beside")}
    found = turns.measure(
        ways, ways["right"], (torch.ones(3),), seconds=0.0, reference_on="cpu", beside=beside, before=before
    )
    assert list(found.ms) == ["right", "beside"] and found.errors["right"] == 0
    assert found.errors["wrong"] == pytest.approx(5e-4, rel=1e-3)
    assert found.failed["wrong"].startswith("BenchError: error 5.0e-04, allowed 1.0e-05")
    assert "NaN" in found.failed["nan"] and found.failed["raises"].startswith("ZeroDivisionError")
    rounds = turns.WARM + turns.ROUNDS[0]
    assert (calls.count("raises"), calls.count("beside"), calls.count("before")) == (1, rounds, 2 * rounds)


def test_events_are_around_the_call_alone(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing: bool):
            self.record = lambda: calls.append(self)
            self.synchronize = lambda: calls.append("waited")

        def elapsed_time(self, end) -> float:
            start, stop = calls.index(self), calls.index(end)
            assert calls[:start] == ["idle", "before"] and calls[start + 1 : stop] == ["call"]
            assert calls[stop + 1 :] == ["waited"]
            calls.clear()
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("idle"))
    timed = {"one": lambda: calls.append("call")}
    assert turns.medians(timed, "cuda", 0.0, lambda: calls.append("before")) == {"one": 2.0}


# ---- JAX on a GPU ----


def test_jax_without_a_gpu_is_missing_there_and_says_why(monkeypatch):
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: name)
    run = types.SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: Unknown backend cuda\n")
    monkeypatch.setattr(implementations.subprocess, "run", lambda *args, **options: run)
    implementations._no_jax_on_cuda.cache_clear()
    assert implementations.no_jax("cuda").endswith("no CUDA device: RuntimeError: Unknown backend cuda")
    assert implementations.no_jax("cpu") is None
    run.returncode = 0
    implementations._no_jax_on_cuda.cache_clear()
    assert implementations.no_jax("cuda") is None
    implementations._no_jax_on_cuda.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_jax_is_on_the_device_that_is_asked_for(device, monkeypatch):
    settings = {}
    gpu = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5})
    config = types.SimpleNamespace(update=settings.__setitem__)
    fake = types.SimpleNamespace(config=config, devices=lambda: [gpu])
    monkeypatch.setitem(sys.modules, "jax", fake)
    monkeypatch.setitem(sys.modules, "in_fake_jax", types.SimpleNamespace(f=lambda jax, **parameters: abs))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    side = sides.JaxSide("w", "jax", "in_fake_jax:f", {}, device, 1)
    assert settings["jax_platforms"] == device
    assert settings.get("jax_default_matmul_precision") == ("highest" if device == "cuda" else None)
    assert side.device_peak() == (5 if device == "cuda" else None)
    assert sides.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
