"""Which backend answers when none is named, compiling in the background, and artifacts of C++ programs."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings

import pytest
import torch
from test_artifact import rewrite
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fxfunc
from fxfunc import errors
from fxfunc.codegen import backends, cost, cxx

pytestmark = [
    pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("cache_of_this_file"),
]
X = torch.linspace(-1, 2, 7, dtype=torch.float64)


@pytest.fixture(autouse=True)
def as_for_users(monkeypatch):
    """Without what conftest.py sets for the other tests."""
    monkeypatch.delenv("FXFUNC_BACKEND")
    monkeypatch.setattr(cost, "limits", lambda: cost.MODEL)


@pytest.fixture
def built(monkeypatch):
    """The names of the programs that were built, one by one."""
    names, load = [], cxx.load

    def counted(source, target):
        names.append(source)
        return load(source, target)

    monkeypatch.setattr(cxx, "load", counted)
    return names


def chain(number: float):
    """A function of three calls, which differs by a number from those of other tests: equal graphs share a callable."""
    return lambda x: (x * number).sin().exp() * x


# ---- the default ----


def test_a_compiler_makes_cpp_the_default(built):
    compiled = fxfunc.jit(chain(1.5)).lower(X).compile()
    assert (compiled.backend, compiled.target, len(built)) == ("cpp", "cpu", 1)
    torch.testing.assert_close(compiled(X), chain(1.5)(X), rtol=1e-12, atol=0)


def test_calls_of_jit_are_compiled_too(built):
    f = fxfunc.jit(chain(2.5))
    torch.testing.assert_close(f(X), chain(2.5)(X), rtol=1e-12, atol=0)
    assert len(built) == 1
    f(X + 1)
    assert len(built) == 1


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_eager_can_be_asked_for(how, built, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("FXFUNC_BACKEND", "eager")
    f = fxfunc.jit(chain(3.5), backend=None if how == "environment" else "eager")
    f(X)
    assert f.lower(X).compile().backend == "eager" and not built


def test_an_argument_goes_before_the_environment(built, monkeypatch):
    monkeypatch.setenv("FXFUNC_BACKEND", "eager")
    fxfunc.jit(chain(4.5), backend="cpp")(X)
    assert len(built) == 1


def test_a_backend_that_there_is_not_is_named(monkeypatch):
    with pytest.raises(errors.BackendError, match="'jax': no such backend.*eager, triton, cpp"):
        fxfunc.jit(torch.sin, backend="jax")(X)
    monkeypatch.setenv("FXFUNC_BACKEND", "jax")
    for call in (fxfunc.jit(torch.sin), lambda x: fxfunc.jit(torch.sin).lower(x).compile()):
        with pytest.raises(errors.BackendError, match="FXFUNC_BACKEND: no such backend"):
            call(X)


def test_arguments_elsewhere_than_the_backend_are_refused():
    with pytest.raises(errors.BackendError, match="the arguments are on meta"):
        fxfunc.jit(torch.sin, backend="cpp")(X.to("meta"))
    assert fxfunc.jit(torch.sin)(X.to("meta")).device.type == "meta"


def test_no_compiler_is_said_once(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    backends._say_no_compiler.cache_clear()
    with pytest.warns(errors.BackendWarning, match="no C\\+\\+ compiler .*/nowhere/g"):
        assert fxfunc.jit(chain(5.5)).lower(X).compile().backend == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxfunc.jit(chain(6.5))(X)


def test_uncompiled_transforms_stay_eager(built):
    f = chain(7.5)
    fxfunc.grad(lambda x: f(x).sum())(X)
    fxfunc.vmap(f)(X)
    fxfunc.grad(lambda x: fxfunc.jit(f)(x).sum())(X)
    assert not built


@pytest.mark.parametrize(
    "f",
    [
        torch.sin,
        lambda x: x.sin() * 2,
        lambda x: x,
        lambda x: x.reshape(7, 1).expand(7, 2),
        lambda x: x.cumsum(0).sort().values,
        lambda x: x @ x,
    ],
    ids=["one call", "two calls", "nothing", "views", "not C++", "a product"],
)
def test_what_has_nothing_to_gain_is_not_compiled(f, built):
    compiled = fxfunc.jit(f).lower(X).compile()
    assert not built and compiled.backend == "cpp"
    torch.testing.assert_close(compiled(X), f(X), rtol=0, atol=0)


def test_two_calls_on_large_values_are_compiled(built):
    fxfunc.jit(lambda x: x.sin() * 2.25)(torch.zeros(cost.MODEL.small_value))
    assert len(built) == 1


def test_symbolic_sizes_run_as_the_eager_backend_has_them(built):
    spec = fxfunc.spec(X, {0: fxfunc.Dim("n")})
    f = lambda x: torch.softmax(x * 8.5, 0)  # expanded for C++, a single call of ATen
    lowered = fxfunc.jit(f).lower(spec)
    compiled, eager = lowered.compile(), lowered.compile(backend="eager")
    assert not built and "symbolic sizes" in compiled.explain()
    assert compiled.graph == eager.graph
    for x in (X, X[:0], X.repeat(3)):
        assert torch.equal(compiled(x), eager(x))


def test_the_graph_of_aten_calls_is_made_when_it_is_asked_for(built, monkeypatch):
    lowered = fxfunc.jit(chain(21.5)).lower(X)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "lowered", lambda graph: pytest.fail("made"))
        compiled = lowered.compile()
    assert built and compiled.graph == lowered.compile(backend="eager").graph


# ---- what others do around a call ----


def test_a_default_device_is_not_where_results_lie(built):
    f = fxfunc.jit(chain(22.5))
    f(X)
    with torch.device("meta"):
        found = f(X)
    torch.testing.assert_close(found, chain(22.5)(X), rtol=1e-12, atol=0)
    assert built


@pytest.mark.parametrize("how", ["jit", "compiled"])
def test_other_tracers_see_aten_calls(how):
    f = fxfunc.jit(chain(23.5))
    f = f if how == "jit" else f.lower(X).compile()
    traced = make_fx(f)(X)
    assert torch.ops.aten.exp.default in {n.target for n in traced.graph.nodes}
    torch.testing.assert_close(traced(X + 1), chain(23.5)(X + 1), rtol=1e-12, atol=0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = mode.from_tensor(X)
    with mode:
        found = [f(X), f(fake)]
    assert [(type(y), y.shape) for y in [*found, f(fake)]] == [(FakeTensor, X.shape)] * 3
    torch.testing.assert_close(f(X), chain(23.5)(X), rtol=1e-12, atol=0)


def test_a_program_compiled_under_a_mode_is_that_of_no_mode(built):
    f = fxfunc.jit(lambda x: chain(24.5)(x) @ torch.eye(7, dtype=x.dtype) + 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        compiled = f.lower(X).compile()
    torch.testing.assert_close(compiled(X), chain(24.5)(X) + 1, rtol=1e-12, atol=0)


# ---- derivatives ----


@pytest.mark.parametrize("how", ["jit", "compiled"])
def test_a_derivative_by_ordinary_autograd_is_compiled_too(how, built):
    f = chain(9.5 if how == "jit" else 10.5)
    x = X.clone().requires_grad_()
    call = fxfunc.jit(f) if how == "jit" else fxfunc.jit(f).lower(X).compile()
    (g,) = torch.autograd.grad(call(x).sum(), x)
    before = len(built)
    torch.testing.assert_close(g, torch.autograd.grad(f(x).sum(), x)[0], rtol=1e-12, atol=1e-12)
    assert before == (2 if how == "jit" else 3)  # with residuals and backward; ahead of time, without too
    (g,) = torch.autograd.grad(call(x).sum(), x)
    assert len(built) == before


def test_second_order_by_ordinary_autograd():
    x = X.clone().requires_grad_()

    def second(f):
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    torch.testing.assert_close(second(fxfunc.jit(chain(11.5))), second(chain(11.5)), rtol=1e-10, atol=1e-10)


def test_a_jit_of_nested_transforms(built):
    f = chain(12.5)
    hessians = lambda api: api.vmap(api.hessian(lambda v: f(v).sum()))
    xs = torch.stack([X, X + 1, X - 1])
    torch.testing.assert_close(
        fxfunc.jit(hessians(fxfunc))(xs), hessians(torch.func)(xs), rtol=1e-10, atol=1e-10
    )
    assert built


# ---- in the background ----


@pytest.fixture
def gate(monkeypatch):
    """Compiling waits until it is set; after `built`, which so counts what has passed."""
    opened, load = threading.Event(), cxx.load

    def gated(source, target):
        assert opened.wait(60)
        return load(source, target)

    monkeypatch.setattr(cxx, "load", gated)
    yield opened
    opened.set()


def test_the_eager_backend_answers_until_the_program_is_there(built, gate):
    f = fxfunc.jit(chain(13.5), background=True)
    assert torch.equal(f(X), chain(13.5)(X))
    assert not built
    gate.set()
    f.wait()
    assert len(built) == 1
    pending = next(iter(f._entries.values())).call
    assert pending._call is not pending._eager
    torch.testing.assert_close(f(X), chain(13.5)(X), rtol=1e-12, atol=0)


def test_derivatives_are_compiled_in_the_background_too(built, gate):
    f, x = fxfunc.jit(chain(14.5), background=True), X.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(chain(14.5)(x).sum(), x)
    for _ in range(2):
        (found,) = torch.autograd.grad(f(x).sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        gate.set()
        f.wait()
    assert len(built) == 2  # with residuals, and backward


def test_many_threads_call_while_it_compiles(built):
    f, found = fxfunc.jit(chain(15.5), background=True), []

    def work():
        for i in range(20):
            found.append((i, f(X + i)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    f.wait()
    assert len(found) == 160
    for i, y in found:
        torch.testing.assert_close(y, chain(15.5)(X + i), rtol=1e-12, atol=0)


def test_a_failure_in_the_background_is_said_once(monkeypatch):
    def fail(source, target):
        raise errors.BackendError(backend="cpp", what="no luck", instead="Try again.")

    monkeypatch.setattr(cxx, "load", fail)
    f = fxfunc.jit(chain(16.5), background=True)
    f(X)
    with pytest.raises(errors.BackendError, match="no luck"):
        f.wait()
    with pytest.warns(errors.BackendWarning, match="eager backend goes on: .*no luck"):
        f(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(f(X), chain(16.5)(X))


def test_without_the_background_a_failure_is_raised(monkeypatch):
    def fail(source, target):
        raise errors.BackendError(backend="cpp", what="no luck", instead="Try again.")

    with monkeypatch.context() as patch:
        patch.setattr(cxx, "load", fail)
        f = fxfunc.jit(chain(17.5))
        with pytest.raises(errors.BackendError, match="no luck"):
            f(X)
    torch.testing.assert_close(f(X), chain(17.5)(X), rtol=1e-12, atol=0)


def test_a_forked_child_compiles_what_no_thread_did(gate):
    waiting = [fxfunc.jit(chain(n), background=True) for n in (18.5, 25.5, 26.5)]
    for f in waiting:
        f(X)
    threading.Timer(0.3, gate.set).start()  # the fork waits for the first
    child = os.fork()
    if not child:  # pragma: no cover
        for f in waiting:
            f.wait()
        calls = [next(iter(f._entries.values())).call for f in waiting]
        os._exit(0 if all(c._call is not c._eager for c in calls) else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the child waits for a thread that it has not")
    assert os.waitstatus_to_exitcode(status) == 0
    for f in waiting:
        f.wait()


def test_waiting_without_a_background_returns():
    f = fxfunc.jit(chain(19.5), backend="eager", background=True)
    f.wait()
    f(X)
    f.wait()


# ---- artifacts ----


@pytest.fixture
def mapped(monkeypatch):
    """A map that stays a loop in C++, with what it is called on."""
    monkeypatch.setattr(cost, "limits", lambda: dataclasses.replace(cost.MODEL, small_map=0))
    xs = torch.stack([X, X + 1, X - 1])
    return fxfunc.vmap(fxfunc.grad(lambda v: chain(20.5)(v).sum())), xs


def calls(compiled):
    """What computes each call; which line it comes from is not stored."""
    return [(r.op, r.place) for p in compiled.programs for r in p.rows]


def test_a_stored_program_is_compiled_again_from_its_loops(mapped, tmp_path):
    f, xs = mapped
    compiled = fxfunc.jit(f).lower(xs).compile()
    assert "a loop over 3 tasks" in compiled.explain()
    compiled.save(tmp_path / "f.zip")
    loaded = fxfunc.load(tmp_path / "f.zip")
    assert (loaded.backend, loaded.loaded_as) == ("cpp", "rebuilt")
    assert calls(loaded) == calls(compiled)
    with torch.no_grad():
        assert torch.equal(loaded(xs), compiled(xs))
    loaded.save(tmp_path / "again.zip")
    assert calls(fxfunc.load(tmp_path / "again.zip")) == calls(compiled)


@pytest.mark.parametrize("target", ["cpu", "cpu:x86-64-v3"])
@pytest.mark.parametrize(
    "allowed", [{"trust": True}, pytest.param({"key": b"secret"}, marks=pytest.mark.slow)]
)
def test_a_trusted_program_runs_as_it_was_compiled(target, allowed, mapped, tmp_path, monkeypatch):
    if cxx.missing(cxx.features(target)):
        pytest.skip(f"this machine is no {target}")
    f, xs = mapped

    def g(xs, ys):  # a product that is ATen's between two programs
        y = f(xs)
        return y, ((ys * y.mean()) @ ys.T).sin().exp().sum(0) + 1

    ys = torch.randn(600, 700, dtype=torch.float64)
    compiled = fxfunc.jit(g).lower(xs, ys).compile(backend="cpp", target=target)
    compiled.save(tmp_path / "f.zip", key=b"secret")
    monkeypatch.setenv("CXX", "/nowhere/g++")
    for _ in range(2):  # the second is the save of what was loaded, which needs the compiler's cache
        loaded = fxfunc.load(tmp_path / "f.zip", **allowed)
        assert (loaded.backend, loaded.target, loaded.loaded_as) == ("cpp", target, "native")
        assert [p.source for p in loaded.programs] == [p.source for p in compiled.programs]
        assert len(loaded.programs) == 2 and loaded.graph == compiled.graph
        for _ in range(3):
            assert all(map(torch.equal, loaded(xs, ys), compiled(xs, ys)))
        assert "a loop over 3 tasks" in loaded.explain()
        monkeypatch.delenv("CXX", raising=False)
        loaded.save(tmp_path / "f.zip", key=b"secret")
        monkeypatch.setenv("CXX", "/nowhere/g++")


def test_a_graph_that_a_trusted_program_does_not_need_is_read_when_asked_for(mapped, tmp_path):
    f, xs = mapped
    compiled = fxfunc.jit(f).lower(xs).compile()
    compiled.save(tmp_path / "f.zip")
    rewrite(tmp_path / "f.zip", lambda members: members.update({"graph.json": b"{}"}))
    loaded = fxfunc.load(tmp_path / "f.zip", trust=True)
    assert torch.equal(loaded(xs), compiled(xs))
    with pytest.raises(errors.ArtifactError, match="malformed graph"):
        loaded.save(tmp_path / "again.zip")
    assert not (tmp_path / "again.zip").exists()


def test_a_trusted_program_needs_what_the_cpu_has(mapped, tmp_path, monkeypatch):
    f, xs = mapped
    fxfunc.jit(f).lower(xs).compile().save(tmp_path / "f.zip")
    here = cxx._cpu()
    monkeypatch.setattr(cxx, "_cpu", lambda: here.replace(" fma ", " ").replace(" asimd ", " "))
    with pytest.raises(errors.ArtifactError, match="its programs use (fma|asimd), which this CPU has not"):
        fxfunc.load(tmp_path / "f.zip", trust=True)
    assert fxfunc.load(tmp_path / "f.zip", trust=True, backend="eager").loaded_as == "eager"
    assert fxfunc.load(tmp_path / "f.zip").loaded_as == "rebuilt"


def test_what_is_compiled_for_more_than_this_cpu_has_says_so(mapped, tmp_path, monkeypatch):
    f, xs = mapped
    monkeypatch.setitem(cxx.LEVELS, "cpu:x86-64-v3", [*cxx.LEVELS["cpu:x86-64-v3"], "avx1024"])
    compiled = fxfunc.jit(f).lower(xs).compile(target="cpu:x86-64-v3")
    compiled.save(tmp_path / "f.zip")
    with pytest.raises(errors.BackendError, match="cpu:x86-64-v3, which this machine has not"):
        compiled(xs)
    with pytest.raises(errors.ArtifactError, match="avx1024"):
        fxfunc.load(tmp_path / "f.zip", trust=True)
    anywhere = fxfunc.load(tmp_path / "f.zip", backend="eager")
    assert anywhere.target == "cpu" and anywhere(xs).shape == xs.shape


def test_an_object_that_cannot_be_opened_is_named(mapped, tmp_path):
    f, xs = mapped
    fxfunc.jit(f).lower(xs).compile().save(tmp_path / "f.zip")
    rewrite(tmp_path / "f.zip", lambda members: members.update({"programs/program/program.so": b"no object"}))
    with pytest.raises(errors.ArtifactError, match='object of a program cannot be opened.*backend="cpp"'):
        fxfunc.load(tmp_path / "f.zip", trust=True)
    assert fxfunc.load(tmp_path / "f.zip").loaded_as == "rebuilt"


def test_no_object_is_opened_untrusted(mapped, tmp_path, monkeypatch):
    f, xs = mapped
    fxfunc.jit(f).lower(xs).compile().save(tmp_path / "f.zip")
    monkeypatch.setattr(
        cxx, "loaded", lambda data: pytest.fail("native code of an untrusted file was opened")
    )
    for options in ({}, {"backend": "eager"}, {"backend": "cpp"}, {"backend": "cpp", "trust": True}):
        found = fxfunc.load(tmp_path / "f.zip", **options)(xs)
        torch.testing.assert_close(found, f(xs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["argument", "environment", "no compiler"])
def test_a_stored_program_runs_on_the_eager_backend_elsewhere(how, mapped, tmp_path, monkeypatch):
    f, xs = mapped
    fxfunc.jit(f).lower(xs).compile().save(tmp_path / "f.zip")
    if how == "environment":
        monkeypatch.setenv("FXFUNC_BACKEND", "eager")
    if how == "no compiler":
        monkeypatch.setenv("CXX", "/nowhere/g++")
        backends._say_no_compiler.cache_clear()
        with pytest.warns(errors.BackendWarning):
            loaded = fxfunc.load(tmp_path / "f.zip")
    else:
        loaded = fxfunc.load(tmp_path / "f.zip", backend="eager" if how == "argument" else None)
    assert (loaded.backend, loaded.loaded_as) == ("eager", "eager")
    torch.testing.assert_close(loaded(xs), f(xs), rtol=1e-12, atol=1e-12)


def test_an_artifact_with_no_program_loads_at_once(tmp_path):
    fxfunc.jit(torch.sin).lower(X).compile().save(tmp_path / "f.zip")
    assert fxfunc.load(tmp_path / "f.zip").loaded_as == "eager"
