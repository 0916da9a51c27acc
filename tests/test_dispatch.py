"""Calls of compiled functions that are like one before: they take the short way, and nothing else does."""

from __future__ import annotations

import threading
from collections import namedtuple

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fxfunc
from fxfunc.bench import overhead
from fxfunc.codegen import cxx
from fxfunc.dispatch import LESSONS, MISS
from fxfunc.passes import errors

BACKENDS = [
    "eager",
    pytest.param("cpp", marks=pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")),
]
Pair = namedtuple("Pair", "a b")
X, Y = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 2, 12).view(3, 4)


def f(x, y):
    return (x * y + 1).sin()


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FXFUNC_CACHE", str(tmp_path_factory.getbasetemp() / "dispatch"))
    return request.param


def made(function, *args, backend, **kwargs):
    """The compiled function, called once."""
    compiled = fxfunc.jit(function).lower(*args, **kwargs).compile(backend=backend)
    compiled(*args, **kwargs)
    return compiled


def is_short(compiled, *args, **kwargs) -> bool:
    return compiled._dispatch.call(args, kwargs) is not MISS


STRUCTURES = {
    "tensors": (f, (X, Y), {}),
    "nested": (lambda p, y: {"a": [f(p["w"][0], y)], "b": (p["w"][1], 3)}, ({"w": (X, Y), 5: []}, Y), {}),
    "keywords": (lambda x, *, y, n: f(x, y) * n, (X,), {"y": Y, "n": 2}),
    "plain": (lambda x, how, n: f(x, x) * n if how == "n" else x, (X, "n", 2.5), {}),
    "another node": (lambda x, y: Pair(f(x, y), {"y": y + 1}), (X, Y), {}),
    "twice": (f, (X, X), {}),
    "nothing": (lambda x, y: None, (X, Y), {}),
    "no dims": (lambda x: x * 2 + 1, (torch.tensor(3.0),), {}),
    "empty": (lambda x: x * 2 + 1, (torch.empty(0, 4),), {}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_second_call_is_short_and_gives_the_same(name, backend):
    function, args, kwargs = STRUCTURES[name]
    compiled = made(function, *args, backend=backend, **kwargs)
    assert is_short(compiled, *args, **kwargs)
    found, wanted = compiled(*args, **kwargs), function(*args, **kwargs)
    assert type(found) is type(wanted)
    leaves = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(leaves(found), leaves(wanted))
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(wanted)


WRONG = {
    "shape": ((X.view(4, 3), Y, 2), {}),
    "dtype": ((X, Y.double(), 2), {}),
    "device": ((X, Y.to("meta"), 2), {}),
    "a number for a tensor": ((X, 1.0, 2), {}),
    "one less": ((X, Y), {}),
    "by name": ((X, Y), {"n": 2}),
    "another value": ((X, Y, 3), {}),
    "another type": ((X, Y, 2.0), {}),
    "a list for a tensor": ((X, [Y], 2), {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_does_not_fit_is_refused_after_one_that_did(name, backend):
    args, kwargs = WRONG[name]
    compiled = made(lambda x, y, n: f(x, y) * n, X, Y, 2, backend=backend)
    with pytest.raises(errors.StructureMismatch):
        compiled(*args, **kwargs)
    assert is_short(compiled, X, Y, 2)


def test_keys_that_do_not_fit_are_refused(backend):
    compiled = made(lambda p: f(p["a"], p["b"]), {"a": X, "b": Y}, backend=backend)
    with pytest.raises(errors.StructureMismatch):
        compiled({"a": X, "c": Y})


class Own(torch.Tensor):
    """A subclass with nothing of its own."""


UNLIKE = {
    "transposed": lambda: torch.rand(4, 3).t(),
    "expanded": lambda: torch.rand(3, 1).expand(3, 4),
    "overlapping": lambda: torch.rand(6).as_strided((3, 4), (1, 1)),
    "negative bits": lambda: torch._neg_view(torch.rand(3, 4)),
    "imaginary": lambda: torch.rand(3, 4, dtype=torch.complex64).conj().imag,
    "a parameter": lambda: torch.nn.Parameter(torch.rand(3, 4)),
    "a subclass": lambda: torch.rand(3, 4).as_subclass(Own),
    "requires grad": lambda: torch.rand(3, 4, requires_grad=True),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_tensors_of_another_kind_are_taken_too(name, backend):
    compiled, x = made(f, X, Y, backend=backend), UNLIKE[name]()
    for _ in range(3):
        torch.testing.assert_close(compiled(x, Y), f(x, Y))
    torch.testing.assert_close(compiled(X, Y), f(X, Y))


def test_an_odd_address_is_no_matter(backend):
    compiled = made(f, X, Y, backend=backend)
    x = torch.rand(13)[1:].view(3, 4)
    assert is_short(compiled, x, Y)
    torch.testing.assert_close(compiled(x, Y), f(x, Y))


def test_gradients_are_seen_whatever_was_called_before(backend):
    compiled, w = made(f, X, Y, backend=backend), torch.rand(3, 4, requires_grad=True)
    wanted = torch.autograd.grad(f(w, Y).sum(), w)[0]
    with torch.no_grad():
        compiled(w, Y)
        assert is_short(compiled, w, Y) and not compiled(w, Y).requires_grad
    assert not is_short(compiled, w, Y)
    torch.testing.assert_close(torch.autograd.grad(compiled(w, Y).sum(), w)[0], wanted)


def test_calls_that_autograd_sees_teach_nothing(backend):
    compiled, w = made(f, X, Y, backend=backend), torch.rand(3, 4, requires_grad=True)
    for _ in range(2 * LESSONS):
        compiled(w, Y)
    assert is_short(compiled, X, Y)


def test_a_dual_tensor_is_refused(backend):
    compiled = made(f, X, Y, backend=backend)
    with forward_ad.dual_level(), pytest.raises(errors.NotSupported, match="dual"):
        compiled(forward_ad.make_dual(X, Y), Y)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.vjp, torch.func.functionalize])
def test_a_call_inside_torch_func_is_refused(transform, backend):
    compiled = made(f, X, Y, backend=backend)
    inside = lambda z: z + compiled(X, Y).sum()
    with pytest.raises(errors.NestedTorchFunc):
        transform(inside, X) if transform is torch.func.vjp else transform(inside)(X)


def test_a_call_inside_a_transform_is_part_of_it(backend):
    compiled = made(f, X[0], Y[0], backend=backend)
    torch.testing.assert_close(fxfunc.vmap(compiled)(X, Y), f(X, Y))
    torch.testing.assert_close(fxfunc.vmap(lambda x: x * compiled(X[0], Y[0]))(Y), Y * f(X[0], Y[0]))
    g = lambda call: lambda x: (call(x, Y[0]) * call(X[0], Y[0])).sum()
    torch.testing.assert_close(fxfunc.hessian(g(compiled))(X[0]), torch.func.hessian(g(f))(X[0]))


def test_dispatch_modes_see_the_calls():
    compiled = made(f, X, Y, backend="eager")
    graph = make_fx(lambda x: compiled(x, Y))(X).graph
    assert torch.ops.aten.sin.default in {n.target for n in graph.nodes}


def test_in_inference_mode_the_results_are_its_own(backend):
    compiled = made(f, X, Y, backend=backend)
    with torch.inference_mode():
        assert compiled(X, Y).is_inference() and compiled(X, Y).is_inference()
    assert not compiled(X, Y).is_inference()


def test_results_have_memory_of_their_own_at_every_call(backend):
    compiled, x = made(lambda x: (x, x.view(-1), x.t(), x * 2), X.clone(), backend=backend), X.clone()
    for _ in range(3):
        first, second = compiled(x), compiled(x)
        for t in (*first, *second):
            t.zero_()
    torch.testing.assert_close(x, X)


def test_results_that_are_plain_are_there(backend):
    assert made(lambda x: (x + 1, {"n": 3}, [None, "s"]), X, backend=backend)(X)[1:] == (
        {"n": 3},
        [None, "s"],
    )


def test_a_closed_over_tensor_is_read_at_every_call(backend):
    w = torch.ones(3, 4)
    compiled = made(lambda x: f(x, w), X, backend=backend)
    w.mul_(2)
    torch.testing.assert_close(compiled(X), f(X, w))
    w.data = torch.full((3, 4), 5.0)
    torch.testing.assert_close(compiled(X), f(X, w))
    w.requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), w)[0] for y in (compiled(X), f(X, w))))


def test_a_function_whose_calls_keep_changing_is_taught_no_more(backend):
    compiled = made(f, X, Y, backend=backend)
    for n in range(1, 2 * LESSONS):
        x = torch.rand(3, 4 * n)[:, ::n]
        torch.testing.assert_close(compiled(x, Y), f(x, Y))
    assert compiled._dispatch._lessons == 0


def test_sizes_that_change_are_checked_each_time(backend):
    if backend == "cpp":
        pytest.skip("no symbolic sizes")
    n = fxfunc.Dim("n")
    args = [fxfunc.spec(t, {0: n}) for t in (X, Y)]
    compiled = fxfunc.jit(f).lower(*args).compile(backend=backend)
    for rows in (3, 3, 2, 5, 5):
        x, y = torch.rand(2, rows, 4)
        torch.testing.assert_close(compiled(x, y), f(x, y))
    with pytest.raises(errors.StructureMismatch):
        compiled(torch.rand(5, 4), torch.rand(4, 4))


def test_a_program_put_in_place_of_another_is_used(backend):
    compiled = made(f, X, Y, backend=backend)
    compiled._program.call = lambda tensors: [tensors[0] - 7]
    torch.testing.assert_close(compiled(X, Y), X - 7)


def test_a_default_device_is_no_matter(backend):
    compiled = made(f, X, Y, backend=backend)
    with torch.device("meta"):
        assert compiled(X, Y).device.type == "cpu"


def test_threads_do_not_share_memory(backend):
    compiled = made(lambda x, y: f(x, y).cumsum(1) @ y.t(), X, Y, backend=backend)
    wrong = []

    def work(seed):
        x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        wanted = compiled(x, Y)
        wrong.extend(seed for _ in range(200) if not torch.equal(compiled(x, Y), wanted))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ----- jit -----


def jitted(function, *args, **how):
    """A jitted function, called until it takes the short way."""
    j = fxfunc.jit(function, **how)
    for _ in range(2):
        j(*args)
    return j


def is_repeated(j, *args, **kwargs) -> bool:
    return j._short(args, kwargs) is not MISS


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_third_call_of_a_jitted_function_is_short_and_gives_the_same(name):
    function, args, kwargs = STRUCTURES[name]
    j = fxfunc.jit(function)
    for _ in range(2):
        j(*args, **kwargs)
    assert is_repeated(j, *args, **kwargs)
    leaves = torch.utils._pytree.tree_leaves
    torch.testing.assert_close(leaves(j(*args, **kwargs)), leaves(function(*args, **kwargs)))
    assert j.cache_info()[:2] == (3, 1)


@pytest.mark.parametrize("name", UNLIKE)
def test_a_jitted_function_takes_tensors_of_another_kind_too(name):
    j, x = jitted(f, X, Y), UNLIKE[name]()
    assert not is_repeated(j, x, Y)
    for _ in range(3):
        torch.testing.assert_close(j(x, Y), f(x, Y))
        torch.testing.assert_close(j(X, Y), f(X, Y))


@pytest.mark.parametrize(
    "values", [(1, True), (1, 1.0), (0.0, -0.0), (float("nan"), 1.0), (1.5, 2.5), ("a", "b")]
)
def test_plain_values_are_told_apart(values):
    function = lambda x, v: x * 2 if isinstance(v, str) else torch.copysign(x, torch.tensor(v)) * v
    j = fxfunc.jit(function)
    for value in values * 4:
        found, wanted = j(X, value), function(X, value)
        torch.testing.assert_close(found, wanted, equal_nan=True)
        assert torch.equal(found.signbit(), wanted.signbit()) and found.dtype == wanted.dtype


def test_what_a_jitted_function_closes_over_is_read_at_every_call():
    state = {"w": torch.ones(4), "n": 2}
    g = lambda x: x * state["w"] * state["n"]
    j = jitted(g, X)
    for change in (
        {"w": torch.rand(4)},
        {"n": 3},
        {"w": torch.rand(4, requires_grad=True)},
        {"w": torch.rand(1)},
    ):
        state.update(change)
        torch.testing.assert_close(j(X), g(X))
        assert j(X).requires_grad == state["w"].requires_grad


def test_a_global_mode_is_seen_after_a_short_call():
    j = jitted(lambda x: x + torch.ones(4).sum(), X)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert not is_repeated(j, X) and j.cache_info().misses == 1
    finally:
        torch.set_default_dtype(before)


def test_an_address_of_another_kind_is_another_signature():
    j = jitted(f, X, Y)
    assert not is_repeated(j, torch.rand(13)[1:].view(3, 4), Y) and is_repeated(
        j, torch.rand(28)[16:].view(3, 4), Y
    )


def test_writes_happen_at_every_call():
    j, x = fxfunc.jit(lambda x: x.add_(1)), torch.zeros(3)
    for n in range(1, 6):
        j(x)
        assert torch.equal(x, torch.full((3,), float(n)))


def test_what_a_jitted_function_makes_is_the_callers():
    j = jitted(lambda x: x.clone().view(-1), X)
    assert is_repeated(j, X)
    j(X).zero_()
    assert X.any()


def test_short_calls_count_as_uses():
    j = jitted(lambda x: x + 1, X, cache_size=2)
    j(X[0])  # the older of two, but for the calls that follow
    for _ in range(3):
        assert is_repeated(j, X)
    j(X[0, 0])
    misses = j.cache_info().misses
    j(X)
    assert j.cache_info() == (5, misses, 2, 2)


def test_a_signature_that_is_forgotten_is_captured_again():
    j = jitted(lambda x: x + 1, X, cache_size=1)
    j(X[0])
    assert not is_repeated(j, X)
    j.clear_cache()
    assert not is_repeated(j, X[0])


def test_a_jitted_function_is_refused_in_torch_func_and_part_of_a_transform():
    j = jitted(f, X[0], Y[0])
    with pytest.raises(errors.NestedTorchFunc):
        torch.func.vmap(lambda x: x * j(X[0], Y[0]))(X)
    torch.testing.assert_close(fxfunc.vmap(j)(X, Y), f(X, Y))
    torch.testing.assert_close(fxfunc.grad(lambda x: j(x, Y[0]).sum())(X[0]), Y[0] * (X[0] * Y[0] + 1).cos())


# ----- cost -----


@pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")
def test_an_index_out_of_bounds_raises_and_leaves_no_trace():
    compiled = made(lambda x, i: (x * 2)[i] + 1, X, torch.tensor([0, 1]), backend="cpp")
    for _ in range(2):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            compiled(X, torch.tensor([0, 9]))
        torch.testing.assert_close(compiled(X, torch.tensor([2, 1])), (X * 2)[[2, 1]] + 1)


@pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")
def test_a_short_call_of_one_program_calls_nothing_of_aten_and_keeps_its_scratch_memory():
    compiled = made(lambda x, y: (f(x, y) @ y.t(), x.exp() + 1), X, Y, backend="cpp")
    with torch.profiler.profile() as profile:
        kept = [compiled(X, Y) for _ in range(5)]
    assert not [e.name for e in profile.events() if e.name.startswith("aten::")]
    assert len({t.data_ptr() for pair in kept for t in pair}) == 10
    assert len(compiled._program.programs[0]._frames._free) == 1


@pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")
def test_the_overhead_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "ARGUMENTS", (1, 2))
    assert overhead.main(["--rounds", "1"]) == 0
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["arguments", "torch.add", "eager", "cpp", "jit"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
