"""The eager backend: what it calls, what it frees, what its results may share memory with."""

from __future__ import annotations

import functools
import traceback
import weakref

import pytest
import torch
from rule_cases import CASES
from rule_harness import SIZES, Problem
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fxfunc
from fxfunc.codegen import calls, eager
from fxfunc.passes.pipeline import for_aten, lowered


class Calls(TorchDispatchMode):
    """Notes the overloads that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def graph_of(f, *args):
    return for_aten(lowered(fxfunc.make_graph(f)(*args)))


def called(graph, inputs) -> list:
    program, mode = eager.emit(graph), Calls()
    torch.manual_seed(0)
    with mode:
        program([x.clone() for x in inputs])
    return mode.seen


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_builtin_makes_the_very_calls_of_the_overload(case, monkeypatch):
    """Through torch's own functions and through the overloads, a program dispatches to the same ops."""
    p = Problem(case, SIZES[0])
    programs = [(p.f, p.args)]
    if not p.empty:
        programs.append((lambda xs, cts: fxfunc.vjp(p.g, *xs)[1](cts), (p.xs, p.cts)))
    for f, args in programs:
        graph = graph_of(f, *args)
        inputs = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        captures = fxfunc.jit(f).lower(*args).captures
        inputs += [c.tensor for c in captures]
        fast = called(graph, inputs)
        with monkeypatch.context() as m:
            m.setattr(calls, "BUILTINS", {})
            assert fast == called(graph, inputs)
        assert fast or not graph.nodes


def x(*shape) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_values_are_freed_after_their_last_use():
    """The peak of a chain is three tensors: a value, its successor and the input."""
    live, peak = 0, 0

    def made(out):
        nonlocal live, peak
        live += 1
        peak = max(peak, live)

        def gone():
            nonlocal live
            live -= 1

        weakref.finalize(out, gone)
        return out

    def chain(v):
        for _ in range(10):
            v = v.sin()
        return v.sum()

    program = eager.emit(graph_of(chain, x(4)))
    scope = program.__globals__
    (name,) = [k for k in scope if "sin" in k]
    sin = scope[name]
    scope[name] = lambda v: made(sin(v))
    program([x(4)])
    assert peak == 2


@pytest.mark.parametrize(
    "f",
    [
        lambda v: (v, v),
        lambda v: (v.sin(),) * 2,
        lambda v: (v.sin(), v.sin().reshape(-1)),
        lambda v: (torch.ones(3), torch.ones(3)),
        lambda v: (v.exp()[0], v.exp()[1]),
    ],
)
def test_outputs_share_memory_with_inputs_alone(f):
    v = x(2, 3)
    outs = fxfunc.jit(f)(v)
    own = [o for o in outs if o is not v and o.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()]
    storages = [o.untyped_storage().data_ptr() for o in own]
    assert len(set(storages)) == len(storages)
    for o in own:
        o.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(fxfunc.jit(f)(v), f(v), strict=True))


def test_an_output_that_is_an_input_is_that_tensor_and_views_share_its_memory():
    v = x(2, 3)
    same, view = fxfunc.jit(lambda v: (v, v.reshape(-1)))(v)
    assert same is v and view.data_ptr() == v.data_ptr()


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_and_autocast_are_left_as_they_were(enabled):
    f = fxfunc.jit(lambda v: torch.linalg.cholesky_ex(v, check_errors=False)[0] @ v)
    with torch.set_grad_enabled(enabled), torch.autocast("cpu", dtype=torch.bfloat16):
        f(torch.eye(2))
        assert torch.is_grad_enabled() is enabled and torch.is_autocast_enabled("cpu")


def test_a_failing_program_restores_grad_mode_and_shows_its_line():
    program = eager.emit(graph_of(lambda a, b: (a @ b).sin(), x(2, 3), x(3, 2)))
    with pytest.raises(RuntimeError) as e:
        program([x(2, 3), x(4, 2)])
    assert torch.is_grad_enabled()
    assert "torch_mm(" in "".join(traceback.format_exception(e.value))


def test_results_are_ordinary_tensors():
    with torch.inference_mode(False):
        out = fxfunc.jit(lambda v: v * 2)(x(3))
    assert not out.is_inference() and not out.requires_grad and out.grad_fn is None


def test_symbolic_sizes_are_read_off_the_inputs():
    n = fxfunc.Dim("n")
    spec = fxfunc.spec(x(4, 3), {0: n})
    compiled = (
        fxfunc.jit(lambda v: (v.mean(0), v.reshape(-1), torch.ones(v.shape[0]))).lower(spec).compile("eager")
    )
    for size in (0, 1, 2, 7):
        v = x(size, 3)
        for ours, theirs in zip(compiled(v), (v.mean(0), v.reshape(-1), torch.ones(size)), strict=True):
            assert torch.allclose(ours, theirs, equal_nan=True)


def test_a_scan_is_a_loop_and_not_unrolled():
    f = lambda v: fxfunc.scan(lambda c, s: (c * s, c), v[0], v)
    lines = [len(eager.source(graph_of(f, x(n, 3))).splitlines()) for n in (3, 30)]
    assert lines[0] == lines[1] < 30


@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_loop_saves_for_another_is_listed_and_not_copied(reverse):
    """Residuals of a scan go to the scan backward, one tensor a step; what is read whole is stacked."""
    step = lambda c, s: ((c * s).tanh().sin(), c.exp())
    f = lambda v: (lambda c, ys: c.sum() + ys.prod())(*fxfunc.scan(step, v[0], v[1:], reverse=reverse))
    text = eager.source(graph_of(fxfunc.grad(f), x(5, 3)))
    assert text.count(".append(") >= 2 and text.count(".copy_(") == 2  # ys, and the cotangents of v

    def loop(v):
        c, ys = v[0], []
        for s in reversed(v[1:]) if reverse else v[1:]:
            c, y = step(c, s)
            ys.append(y)
        return c.sum() + torch.stack(ys).prod()

    assert torch.allclose(fxfunc.grad(f)(x(5, 3)), torch.func.grad(loop)(x(5, 3)))
    second = lambda api, f: api.grad(lambda v: (api.grad(f)(v) ** 2).sum())(x(5, 3))
    assert torch.allclose(second(fxfunc, f), second(torch.func, loop))
    each = lambda api, f: api.vmap(api.grad(f))(x(2, 5, 3))
    assert torch.allclose(each(fxfunc, f), each(torch.func, loop))


def test_neighbours_in_a_loop_are_joined_as_outside():
    step = lambda c, s: (torch.tanh(c @ v_ + s) - c * 0.5, None)
    v_ = x(3, 3)
    text = eager.source(graph_of(lambda v: fxfunc.scan(step, v[0], v)[0], x(5, 3, 3)))
    assert "addmm" in text and "alpha=0.5" in text


W = x(3)
NEW = {
    "clone": lambda v: v.clone(),
    "* 1": lambda v: v * 1,
    "neg neg": lambda v: v.neg().neg(),
    "** 1": lambda v: v**1,
    "copying cast": lambda v: v.to(v.dtype, copy=True),
    "view of a clone": lambda v: v.clone().reshape(-1),
}
USES = {
    "jit": lambda f: fxfunc.jit(f),
    "vmap": lambda f: fxfunc.vmap(f),
    "jit of vmap": lambda f: fxfunc.jit(fxfunc.vmap(f)),
    "compiled": lambda f: lambda v: fxfunc.jit(f).lower(v).compile("eager")(v),
    "vjp": lambda f: lambda v: fxfunc.vjp(f, v)[0],
    "jvp": lambda f: lambda v: fxfunc.jvp(f, (v,), (v,))[1],
    "aux": lambda f: lambda v: fxfunc.grad(lambda u: (u.sum(), f(u)), has_aux=True)(v)[1],
    "linearize": lambda f: lambda v: fxfunc.linearize(f, v)[1](v),
    "jit of jit": lambda f: fxfunc.jit(lambda v: fxfunc.jit(f)(v)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", NEW)
def test_a_new_tensor_is_new_whatever_the_algebra_makes_of_it(name, use):
    """Changing a result in place changes no argument, though the program may have nothing left to compute."""
    v = x(2, 3)
    out = USES[use](NEW[name])(v)
    out.add_(1)
    assert torch.equal(v, x(2, 3))


@pytest.mark.parametrize(
    "f",
    [
        fxfunc.jit(fxfunc.grad(lambda v: (v * W).sum())),
        fxfunc.grad(lambda v: (v * W).sum()),
        lambda v: fxfunc.jacrev(lambda u: W[None] @ u[:, None])(v),
        fxfunc.jit(fxfunc.jacfwd(lambda v: W[None] @ v[:, None])),
    ],
)
def test_derivatives_share_no_memory_with_closures(f):
    f(x(3)).add_(1)
    assert torch.equal(W, x(3))


# ----- weight gradients of a batch of images --------------------------------------------------------------------------


def _image_loss(w, x, stride=1, padding=0, dilation=1, groups=1):
    return F.conv2d(x[None], w, None, stride, padding, dilation, groups).sin().sum()


def _weight_gradients(graph) -> list[str]:
    """How each is computed."""
    calls = [n for n in graph.nodes if n.target is torch.ops.aten.convolution_backward.default]
    return ["convolution" for n in calls if n.args[10][1]] + [
        "product" for n in graph.nodes if n.target is torch.ops.aten.unfold.default
    ][::2]


PER_IMAGE = {
    "grad": lambda api, f: api.vmap(api.grad(f), (None, 0)),
    "grad of each weight": lambda api, f: lambda w, x: api.vmap(api.grad(f))(torch.stack([w] * len(x)), x),
    "jvp of grad": lambda api, f: (
        lambda w, x: api.jvp(lambda x: api.vmap(api.grad(f), (None, 0))(w, x), (x,), (x.cos(),))
    ),
    "grad of grad": lambda api, f: api.grad(
        lambda w, x: api.vmap(lambda x: api.grad(f)(w, x).square().sum())(x).sum(), argnums=1
    ),
    "vmap": lambda api, f: (
        lambda w, x: api.vmap(api.vmap(api.grad(f), (None, 0)), (None, 0))(w, torch.stack([x, x.sin()]))
    ),
}


@pytest.mark.parametrize("how", PER_IMAGE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"stride": (2, 1)}, marks=pytest.mark.slow),
        pytest.param({"padding": (1, 2)}, marks=pytest.mark.slow),
        {"stride": 3, "padding": 2},
    ],
    ids=str,
)
def test_small_weight_gradients_of_a_batch_are_products(how, options):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 3, 3, 2, generator=g, dtype=torch.float64)
    x = torch.randn(5, 3, 9, 8, generator=g, dtype=torch.float64)
    f = functools.partial(_image_loss, **options)
    call = fxfunc.jit(PER_IMAGE[how](fxfunc, f)).lower(w, x).compile(backend="eager")
    assert "product" in _weight_gradients(call.graph)
    assert "convolution" not in _weight_gradients(call.graph)
    for guard in (torch.enable_grad, torch.no_grad):
        with guard():
            ours, theirs = call(w, x), PER_IMAGE[how](torch.func, f)(w, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options, size, how",
    [({}, 80, "convolution"), ({"dilation": 2}, 9, "convolution"), ({"groups": 3}, 9, "product")],
    ids=["large", "dilated", "groups"],
)
def test_how_a_weight_gradient_is_computed(options, size, how):
    w = torch.randn(6, 3 // options.get("groups", 1), 3, 3, dtype=torch.float64)
    x = torch.randn(64, 3, size, size, dtype=torch.float64)
    f = functools.partial(_image_loss, **options)
    call = fxfunc.jit(fxfunc.vmap(fxfunc.grad(f), (None, 0))).lower(w, x).compile(backend="eager")
    assert _weight_gradients(call.graph) == [how]
    torch.testing.assert_close(call(w, x), torch.func.vmap(torch.func.grad(f), (None, 0))(w, x))
