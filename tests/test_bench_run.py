"""`bench run`: what a worker does wrong stays in its cell, figures are what they are called, an interruption loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fxfunc.bench import cli, host, processes, records, run, runner, steady, worker
from fxfunc.bench import implementations as impl
from fxfunc.bench.errors import BenchError
from fxfunc.bench.registry import find, register_file

MIB = 2**20
WORKLOADS = """
    import os
    import signal
    import time

    import torch

    import fxfunc
    from fxfunc.bench import workload

    ONLY_OURS = {}


    def inputs():
        return {"x": torch.arange(6.0).reshape(2, 3)}, (torch.tensor([1, 0]),)


    def register(name, **options):
        return workload(f"test-{name}", inputs=inputs, reference=lambda: double, **options)


    def double(params, labels):
        return {"z": 2 * params["x"], "a": [params["x"][labels[0]]]}


    def of_ours(act):
        def make(api):
            def f(params, labels):
                if api is fxfunc:
                    act()
                return double(params, labels)

            return f

        return make


    register("fine", jax="test_workloads_in_jax:double")(lambda api: double)
    register("crash")(of_ours(lambda: os.kill(os.getpid(), signal.SIGSEGV)))
    register("killed")(of_ours(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    register("hang")(of_ours(lambda: time.sleep(1000)))
    register("raise")(of_ours(lambda: 1 / 0))
    register("structure")(lambda api: lambda params, labels: (api is fxfunc or double(params, labels)) and params["x"])


    @register("wrong")
    def wrong(api):
        return lambda params, labels: double({"x": params["x"] + (1e-3 if api is fxfunc else 0)}, labels)


    def unless_counted(act):
        def make(api):
            def f(params, labels):
                if api is not fxfunc and torch._C._len_torch_dispatch_stack():
                    act()
                return double(params, labels)

            return f

        return make


    register("uncounted")(unless_counted(lambda: 1 / 0))
    register("lost-in-count")(unless_counted(lambda: time.sleep(1000)))


    @register("nan")
    def nan(api):
        return lambda params, labels: double({"x": params["x"] / (params["x"] != 3 if api is fxfunc else 1)}, labels)


    def forwards(call, w, x):
        w = w.detach().requires_grad_()
        call(w, x).sum().backward()
        return w.grad


    @workload("test-backward", inputs=lambda: (torch.ones(3), torch.arange(12.0).reshape(4, 3)), drive=forwards)
    def backward(api):
        return lambda w, x: api.vmap(lambda w, x: (w * x).sin().sum(), (None, 0))(w, x)


    @workload("test-memory", inputs=lambda n: (torch.ones(n),), reference=lambda n: lambda x: x.sum(), n=100)
    def memory(api, *, n):
        return lambda x: (x[None] + torch.zeros(16 * 2**20 // n, 1)).sum() * 0 + x.sum()  # 64 MiB between


    @workload("test-sleep", inputs=inputs, reference=lambda: double)
    def sleep(api):
        def f(params, labels):
            time.sleep(0.002)
            return double(params, labels)

        return f
"""
STATUSES = {
    "test-fine": "ok",
    "test-crash": "crashed",
    "test-killed": "crashed",
    "test-hang": "timeout",
    "test-raise": "failed",
    "test-structure": "failed",
    "test-wrong": "wrong",
    "test-nan": "failed",
    "test-uncounted": "ok",
    "test-lost-in-count": "ok",
    "test-backward": "ok",
    "test-memory": "ok",
    "test-sleep": "ok",
}
REASONS = {
    "test-crash": "Segmentation fault",
    "test-killed": "killed",
    "test-hang": "within 3 s",
    "test-raise": "ZeroDivisionError",
    "test-structure": "answer of shapes",
    "test-wrong": "allowed 1.0e-05",
    "test-nan": "NaN",
}
QUICK = dict(steady_s=0.05, least_rounds=2, cold_rounds=2, limit_s=3.0, threads=1)


@pytest.fixture(scope="module")
def user_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "test_workloads_in_jax.py").write_text(
        'def double(jax):\n    return lambda params, labels: {"a": [params["x"][labels[0]]], "z": 2 * params["x"]}\n'
    )
    path = folder / "users.py"
    path.write_text(textwrap.dedent(WORKLOADS))
    register_file(path)
    return path


@pytest.fixture(scope="module")
def results(user_file):
    """Every workload of the file under torch.func, our eager backend, a backend that there is not, and JAX."""
    options = runner.Options(files=(user_file,), **QUICK)
    chosen = [impl.find(name) for name in ("torch.func", "jax", "eager", "triton")]
    return run.measure([find(name) for name in STATUSES], chosen, options, ["test"], lambda results: None)


def cell(results, workload, name="eager"):
    return results["workloads"][workload]["cells"][name]


@pytest.mark.slow
@pytest.mark.parametrize("workload, status", STATUSES.items())
def test_what_a_worker_does_is_the_status_of_its_cell(results, workload, status):
    assert cell(results, workload)["status"] == status
    assert REASONS.get(workload, "") in cell(results, workload)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("workload", STATUSES)
def test_the_rest_of_the_row_is_measured_all_the_same(results, workload):
    if workload != "test-structure":
        assert cell(results, workload, "torch.func")["status"] == "ok"
        assert cell(results, workload, "torch.func")["steady_s"][0]


@pytest.mark.slow
@pytest.mark.parametrize("workload", [w for w, status in STATUSES.items() if status != "ok"])
def test_a_cell_that_is_not_ok_has_no_times(results, workload):
    bad = cell(results, workload)
    assert not bad["steady_s"] and not bad["cold"] and not bad["peak_bytes"]


@pytest.mark.slow
def test_what_does_not_exist_is_absent_with_a_reason(results):
    assert cell(results, "test-fine", "triton")["status"] == "absent"
    assert "triton" in cell(results, "test-fine", "triton")["reason"]
    assert cell(results, "test-raise", "jax")["status"] == "absent"


@pytest.mark.slow
def test_results_can_be_written_and_read_back(results, tmp_path):
    records.write(tmp_path / "r.json", results)
    read = records.read(tmp_path / "r.json")
    assert read["workloads"].keys() == results["workloads"].keys() and read["complete"]


@pytest.mark.slow
def test_jax_gives_the_same_answer_in_its_own_process(results):
    pytest.importorskip("jax")
    assert cell(results, "test-fine", "jax")["status"] == "ok"
    assert results["imports_s"]["jax"] > 0


@pytest.mark.slow
def test_every_launch_and_every_first_call_is_kept(results):
    ok = cell(results, "test-fine")
    assert len(ok["steady_s"]) == 1 and len(ok["steady_s"][0]) >= 2
    assert len(ok["cold"]) == 2 and len(ok["load_s"]) == 2 and ok["artifact_bytes"] > 0
    assert {"capture", "passes", "codegen"} <= ok["cold"][0]["stages_s"].keys()
    assert sum(ok["cold"][0]["stages_s"].values()) < ok["cold"][0]["first_s"]
    assert ok["cold"][0]["from_start_s"] > ok["cold"][0]["first_s"] + results["imports_s"]["torch"] / 2


@pytest.mark.slow
def test_a_sample_is_one_call(results):
    samples = [s for turn in cell(results, "test-sleep", "torch.func")["steady_s"][0] for s in turn]
    assert min(samples) >= 0.002


@pytest.mark.slow
def test_peak_memory_is_that_of_the_calls(results):
    (peak,) = cell(results, "test-memory", "torch.func")["peak_bytes"]
    assert 60 * MIB <= peak < 90 * MIB
    assert cell(results, "test-fine", "torch.func")["peak_bytes"][0] < 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload, reason", [("uncounted", "ZeroDivisionError"), ("lost-in-count", "within 3 s")]
)
def test_a_counter_that_fails_leaves_the_times(results, workload, reason):
    uncounted = cell(results, f"test-{workload}", "torch.func")
    assert uncounted["status"] == "ok" and uncounted["steady_s"] and uncounted["cold"]
    assert reason in uncounted["why"]["counters"] and not uncounted["counters"]


@pytest.mark.slow
def test_a_loaded_artifact_without_a_backward_says_so(results):
    assert "artifact" in cell(results, "test-backward")["why"]["load"]


@pytest.mark.slow
def test_harness_overhead_is_that_of_a_call_that_does_nothing(results):
    assert 0 < results["overhead_s"] < 1e-5


def test_a_missing_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in impl.find("torch.compile").missing("cpu")
    assert impl.find("torch.compile").missing("cuda") is None


@pytest.mark.parametrize("name", ["inductor2", "", "EAGER"])
def test_an_unknown_implementation_names_those_there_are(name):
    with pytest.raises(BenchError, match="torch.compile"):
        impl.find(name)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "--workload", "nope"], "no workload 'nope'"),
        (["run", "--impl", "nope"], "no implementation 'nope'"),
        (["run", "--file", "nope.py"], "nope.py"),
        (["run", "--out", "/proc/nope/x.json", "--workload", "jac"], "/proc/nope/x.json"),
        (["compare", "nope", "HEAD"], "neither a results file nor a git revision"),
        (["compare", "nope.json", "nope.json"], "nope.json"),
        (["plot", "nope.json"], "nope.json"),
        (["simulate", "nope", "nope"], "nope"),
    ],
)
def test_bad_input_is_a_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nope"], ["run", "--threads", "0"], ["run", "--limit", "nan"]])
def test_a_bad_command_line_is_status_2(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_measured(user_file, tmp_path, stop):
    out = tmp_path / "r.json"
    names = ["--workload", "test-fine", "--workload", "test-hang"]
    command = [sys.executable, "-m", "fxfunc", "bench", "run", "--quick", "--file", str(user_file), *names]
    process = subprocess.Popen(
        [*command, "--impl", "eager", "--out", str(out)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    while process.poll() is None and not out.exists():
        time.sleep(0.1)
    process.send_signal(stop)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    kept = records.read(out)
    assert not kept["complete"] and "test-fine" in printed
    assert cell(kept, "test-fine")["steady_s"] and cell(kept, "test-hang")["status"] == "interrupted"


def test_turns_alternate_and_a_player_that_fails_leaves_the_others():
    played = []

    class Fake:
        def __init__(self, name, fails_at=None):
            self.name, self.fails_at, self.asked = name, fails_at, 0

        def ask(self, command, limit_s, calls, discard):
            self.asked += 1
            played.append(self.name)
            if self.asked == self.fails_at:
                raise processes.WorkerFailed("crashed", "it died")
            return [0.05] * calls

        def stop(self):
            pass

    players = [
        steady.Player("", name, {}, Fake(name, fails)) for name, fails in (("a", None), ("b", 4), ("c", None))
    ]
    steady.take_turns(players, budget_s=0.0, least_rounds=2, limit_s=1.0)
    assert "".join(played) == "aaabbbccc" + "abc" + "ca"
    assert [len(p.turns) for p in players] == [2, 0, 2]
    assert players[1].cell == {"status": "crashed", "reason": "it died"}


def test_extra_work_takes_its_share(monkeypatch):
    clock = [0.0]
    products = []

    def product(a, b, out):
        clock[0] += 0.001
        products.append(a)

    def call():
        clock[0] += 2.0

    monkeypatch.setattr("torch.mm", product)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
    slowed = worker.with_extra_work(call, 0.1)
    products.clear()
    slowed()
    assert len(products) == 200


def test_a_host_that_cannot_import_says_what(tmp_path):
    host_process = processes.Host(("no_such_module",), sys.executable)
    try:
        with pytest.raises(BenchError, match="no_such_module"):
            host_process.start({})
    finally:
        host_process.close()


def test_the_bench_measures_an_installation_that_has_no_bench():
    code = f"import runpy, sys; sys.path.pop(0); m = runpy.run_path({host.__file__!r}, run_name='host'); m['adopt_bench']()"
    code += "; from fxfunc.bench import errors; print('fxfunc' in sys.modules, sys.modules['fxfunc.bench'].__path__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f"False ['{os.path.dirname(host.__file__)}']\n"
