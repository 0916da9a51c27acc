"""Maps and scans as regions: derivatives in every nesting, residuals, randomness, symbolic lengths; SEMANTICS.md 13-17.

The reference is torch.func over an unrolled Python loop.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc import errors
from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import getitem, map_, reached, scan, subgraphs
from fxfunc.passes.linearize import linearize
from fxfunc.passes.pipeline import lowered, simplify
from fxfunc.passes.rules.region import transposed
from fxfunc.passes.verify import verify

F64 = torch.float64
at_two_sizes = pytest.mark.parametrize("n, m", [(1, 3), (5, 4)])


def unrolled(f, init, xs=None, length=None, reverse=False):
    """jax.lax.scan as a Python loop of at least one step."""
    leaves = [x for x in pytree.tree_leaves(xs) if x is not None]
    n, carry, ys = len(leaves[0]) if leaves else length, init, []
    for i in reversed(range(n)) if reverse else range(n):
        carry, y = f(carry, pytree.tree_map(lambda x, i=i: None if x is None else x[i], xs))
        ys.append(y)
    ys = ys[::-1] if reverse else ys
    return carry, pytree.tree_map(lambda *y: None if y[0] is None else torch.stack(y), *ys)


def looped(lower, upper, body, value):
    """jax.lax.fori_loop as a Python loop."""
    for i in range(lower, upper):
        value = body(torch.tensor(i), value)
    return value


class Reference:
    """torch.func with loops unrolled."""

    grad, vjp, jvp, vmap = torch.func.grad, torch.func.vjp, torch.func.jvp, torch.func.vmap
    jacrev, jacfwd, hessian = torch.func.jacrev, torch.func.jacfwd, torch.func.hessian
    scan, fori_loop = staticmethod(unrolled), staticmethod(looped)


for _name in ("grad", "vjp", "jvp", "vmap", "jacrev", "jacfwd", "hessian"):
    setattr(Reference, _name, staticmethod(getattr(torch.func, _name)))


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, equal_nan=True)


def agree(program, *args):
    """A program over a namespace of transforms gives what torch.func gives, alone and under jit."""
    want = program(Reference, *args)
    same(program(fxfunc, *args), want)
    same(fxfunc.jit(lambda *args: program(fxfunc, *args))(*args), want)


def wave(*shape, shift=0.0):
    """Distinct numbers in (-1, 1)."""
    return (torch.arange(torch.Size(shape).numel(), dtype=F64) * 0.7 + 0.3 + shift).sin().reshape(shape)


def data(n, m):
    """Examples, weights and a vector."""
    return wave(n, m), wave(m, m, shift=0.5), wave(m, shift=0.9)


def layer(x, w):
    return torch.tanh(x @ w)


def loss(x, w):
    return (layer(x, w).pow(2) * x).sum()


# ----- maps in every nesting ------------------------------------------------------------------------------------------


def maml(T, w, xs, ys):
    """The mean loss over tasks after two steps on each."""

    def task(x, y):
        inner = lambda w: ((layer(x, w) - y) ** 2).mean()
        v = w
        for _ in range(2):
            v = v - 0.1 * T.grad(inner)(v)
        return inner(v)

    return T.vmap(task)(xs, ys).mean()


def total_over(T, x, w):
    return T.vmap(loss, (0, None))(x, w).sum()


MAPS = {
    "vmap": lambda T, x, w, v: T.vmap(layer, (0, None))(x, w),
    "vmap of grad": lambda T, x, w, v: T.vmap(T.grad(loss, (0, 1)), (0, None))(x, w),
    "vmap of grad, weights mapped": lambda T, x, w, v: T.vmap(T.grad(loss, 1), (None, 0))(
        v, torch.stack([w, w.sin()])
    ),
    "grad of vmap by the unmapped": lambda T, x, w, v: T.grad(lambda w: total_over(T, x, w))(w),
    "grad of vmap by the mapped": lambda T, x, w, v: T.grad(lambda x: total_over(T, x, w))(x),
    "jvp of grad of vmap": lambda T, x, w, v: T.jvp(T.grad(lambda w: total_over(T, x, w)), (w,), (w.cos(),)),
    "jvp of vmap by the unmapped": lambda T, x, w, v: T.jvp(
        lambda w: T.vmap(layer, (0, None))(x, w), (w,), (w.cos(),)
    ),
    "jvp of vmap by the mapped": lambda T, x, w, v: T.jvp(
        lambda x: T.vmap(layer, (0, None))(x, w), (x,), (x.cos(),)
    ),
    "vmap of jvp by the tangent": lambda T, x, w, v: T.vmap(
        lambda t: T.jvp(lambda a: layer(a, w), (v,), (t,))
    )(x),
    "grad of grad of vmap": lambda T, x, w, v: T.grad(
        lambda w: T.grad(lambda w: total_over(T, x, w))(w).pow(2).sum()
    )(w),
    "hessian over vmap": lambda T, x, w, v: T.hessian(
        lambda v: T.vmap(lambda a: (a * v).sin().prod())(x).sum()
    )(v),
    "vmap of hessian": lambda T, x, w, v: T.vmap(T.hessian(lambda a: loss(a, w)))(x),
    "jacrev of vmap": lambda T, x, w, v: T.jacrev(lambda v: T.vmap(lambda a: a.sin() * v)(x))(v),
    "jacfwd of vmap": lambda T, x, w, v: T.jacfwd(lambda v: T.vmap(lambda a: a.sin() * v)(x))(v),
    "vmap of vjp": lambda T, x, w, v: T.vmap(lambda a: T.vjp(lambda a, w: layer(a, w), a, w)[1](v))(x),
    "one value for all": lambda T, x, w, v: T.vmap(lambda a, b: (a * b, b.sin() * b), (0, None), (0, None))(
        x, v
    ),
    "nested": lambda T, x, w, v: T.vmap(T.vmap(lambda a, b: a.sin() * b))(x, x.cos()),
    "nested on other axes": lambda T, x, w, v: T.vmap(
        lambda c: T.vmap(lambda a: a * c.sum() + c[0], 1, 1)(x), 1, 2
    )(x),
    "nested, inner None": lambda T, x, w, v: T.vmap(
        lambda a: T.vmap(lambda b, a: (a * b).sum(), (0, None))(w, a)
    )(x),
    "nested, outer None": lambda T, x, w, v: T.vmap(
        lambda a, w: T.vmap(lambda r: (a * r).sum())(w), (0, None)
    )(x, w),
    "nested with an outer closure": lambda T, x, w, v: T.vmap(lambda a: T.vmap(lambda b: a * b.sin() * v)(w))(
        x
    ),
    "grad of nested": lambda T, x, w, v: T.grad(
        lambda w: T.vmap(lambda a: T.vmap(lambda r: (a * r).sin().sum() * r[0])(w))(x).sum()
    )(w),
    "vmap of grad of vmap": lambda T, x, w, v: T.vmap(
        lambda a: T.grad(lambda w: T.vmap(lambda r: (a * r).sin().sum())(w).prod())(w)
    )(x),
    "grad of vmap of grad of vmap": lambda T, x, w, v: T.grad(
        lambda v: T.vmap(lambda a: T.grad(lambda a: T.vmap(lambda r: (a * r * v).sin().sum())(w).prod())(a))(
            x
        ).sum()
    )(v),
    "shares that do not vary": lambda T, x, w, v: T.grad(
        lambda x, v: T.vmap(lambda a: a.sin() + v * 3)(x).sum(), (0, 1)
    )(x, v),
    "negative dims and dicts": lambda T, x, w, v: T.vmap(
        lambda p, b: {"y": p["a"] * b}, ({"a": -1}, None), -1
    )({"a": w}, v),
    "maml": lambda T, x, w, v: T.grad(
        lambda w: maml(T, w, torch.stack([x, x.cos()]), torch.stack([x.sin(), x]))
    )(w),
}


@at_two_sizes
@pytest.mark.parametrize("program", MAPS.values(), ids=MAPS)
def test_maps_in_every_nesting(program, n, m):
    same(program(fxfunc, *data(n, m)), program(Reference, *data(n, m)))


INTEGER_INPUTS = {
    "picked": lambda T, i, v: T.grad(lambda v: T.vmap(lambda i: v[i] ** 2)(i).sum())(v),
    "per example": lambda T, i, v: T.vmap(
        T.grad(lambda v, i: v.sin() @ (torch.arange(4) == i).to(F64)), (None, 0)
    )(v, i),
    "multiplied": lambda T, i, v: T.jvp(lambda v: T.vmap(lambda i: v * i)(i), (v,), (v.cos(),)),
    "integer outputs": lambda T, i, v: T.vmap(lambda i, a: (i + 1, a * i))(i, v),
    "loss of classes": lambda T, i, v: T.grad(
        lambda v: T.vmap(lambda i: -torch.log_softmax(v, 0)[i])(i).mean()
    )(v),
}


@pytest.mark.parametrize("program", INTEGER_INPUTS.values(), ids=INTEGER_INPUTS)
def test_integer_inputs_of_a_map(program):
    agree(program, torch.tensor([2, 0, 3, 2]), wave(4))


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "jvp of vmap by the unmapped"])
def test_no_example_or_one(name, length):
    x, w, v = data(3, 4)
    program = lambda x: MAPS[name](fxfunc, x, w, v)
    want = pytree.tree_map(lambda y: y[:length], program(x))
    same(program(x[:length]), want)


@pytest.mark.parametrize("by", ["unmapped", "mapped"])
def test_gradients_of_a_sum_over_no_example_are_zero(by):
    x, w, v = data(3, 4)
    name = f"grad of vmap by the {by}"
    same(MAPS[name](fxfunc, x[:0], w, v), torch.zeros_like(w if by == "unmapped" else x[:0]))
    agree(MAPS[name], x[:1], w, v)


# ----- scans in every nesting -----------------------------------------------------------------------------------------


def rnn(T, h, x, w, reverse=False):
    """All that a recurrent cell gives, as one number."""

    def cell(h, a):
        h = torch.tanh(h @ w + a)
        return h, {"y": h.sin() * a, "sum": h.sum()}

    h, ys = T.scan(cell, h, x, reverse=reverse)
    return (h * h).sum() + (ys["y"] * x.cos()).sum() + (ys["sum"] ** 3).sum()


def shifting(T, x, v, w):
    """Only the last carry starts with a tangent; it reaches the first in step 3."""
    step = lambda c, a: ((c[1], c[2], (c[2] * v).sin() + a), c[0])
    carry, ys = T.scan(step, (w[0], w[1], w[2]), x)
    return (carry[0] * ys.sum(0)).sum()


def swapping(T, x, v, w):
    """Two carries change places in each step; only one of them has a tangent."""
    carry, ys = T.scan(lambda c, a: ((c[1], c[0].sin() + a), c[0] * c[1]), (w[0], v), x)
    return (carry[0] ** 2 * ys.sum(0)).sum()


def from_the_origin(T, x, v, reverse=False):
    """The first step takes a norm of zeros, which do not depend on v: its derivative there is infinite."""

    def step(h, a):
        h = torch.sin(v * a) + 0.1 * h.pow(2).sum().sqrt() * v
        return h, h * a

    h, ys = T.scan(step, torch.zeros_like(x[0]), x, reverse=reverse)
    return (h * ys.sum(0)).sum() + (ys**3).sum()


def to_the_edge(T, x, v, reverse=False):
    """The derivative of the last step's carry is infinite, and nobody uses it."""
    steps = torch.arange(len(x), dtype=F64)
    steps = steps if reverse else steps.flip(0)
    step = lambda h, a: ((h.abs() * a).sqrt() + a[1] * v, (h * v).sin() * a)
    return (T.scan(step, v, x * 0 + steps[:, None], reverse=reverse)[1] * x).pow(2).sum()


def counting(T, x, v):
    """An integer and a boolean in the carry, which the float depends on."""

    def step(carry, a):
        h, i, flip = carry
        h = torch.where(flip, h * v * i, h + v.sin() * a)
        return (h, i + 1, ~flip), (h, i, flip)

    (h, i, flip), (ys, counts, flips) = T.scan(step, (v, torch.tensor(1), torch.tensor(True)), x)
    return (h * i).sum() + (ys.sum(1) * counts * flips).sum()


def attended(T, x, w):
    """A scan whose body is a map over other examples."""
    step = lambda h, a: (T.vmap(lambda r: torch.tanh(r * h).sum() + a[0])(w), (h * a).sum())
    h, ys = T.scan(step, x[0], x)
    return (h * h).sum() + (ys**3).sum()


def nested(T, x, w):
    """A scan in a scan, both with constants."""

    def step(h, a):
        h, ys = T.scan(lambda h, r: (torch.tanh(h * r + a), h.sum()), h, w)
        return h, ys * a

    h, ys = T.scan(step, x[0], x, reverse=True)
    return (h * ys.sum(0)).sum()


def powers(T, v):
    """The loop's index as a number."""
    return T.fori_loop(1, 4, lambda i, p: (p[0] * v * i, p[1] + p[0].sin() ** i), (v, v))


NESTINGS = {
    "grad": lambda T, f, v: T.grad(f)(v),
    "jvp": lambda T, f, v: T.jvp(f, (v,), (v.cos(),)),
    "jvp of grad": lambda T, f, v: T.jvp(T.grad(f), (v,), (v.cos(),)),
    "grad of grad": lambda T, f, v: T.grad(lambda v: T.grad(f)(v).sin().sum())(v),
    "grad of vmap": lambda T, f, v: T.grad(lambda v: T.vmap(f)(torch.stack([v, v.cos()])).prod())(v),
}


SCANS = {
    "by init": lambda T, x, w, v: T.grad(lambda h: rnn(T, h, x, w))(v),
    "by xs": lambda T, x, w, v: T.grad(lambda x: rnn(T, v, x, w))(x),
    "by constants": lambda T, x, w, v: T.grad(lambda w: rnn(T, v, x, w))(w),
    "by all": lambda T, x, w, v: T.grad(lambda *a: rnn(T, *a), (0, 1, 2))(v, x, w),
    "by all, reverse": lambda T, x, w, v: T.grad(lambda *a: rnn(T, *a, reverse=True), (0, 1, 2))(v, x, w),
    "jvp": lambda T, x, w, v: T.jvp(lambda *a: rnn(T, *a), (v, x, w), (v.cos(), x.cos(), w.cos())),
    "jvp by constants, reverse": lambda T, x, w, v: T.jvp(lambda w: rnn(T, v, x, w, True), (w,), (w.cos(),)),
    "vjp of vjp": lambda T, x, w, v: T.vjp(T.grad(lambda *a: rnn(T, *a), (0, 1, 2)), v, x, w)[1]((v, x, w)),
    "jvp of vjp": lambda T, x, w, v: T.jvp(
        T.grad(lambda *a: rnn(T, *a, True), (0, 1, 2)), (v, x, w), (v.cos(), x, w)
    ),
    "vjp of jvp": lambda T, x, w, v: T.grad(lambda w: T.jvp(lambda x: rnn(T, v, x, w), (x,), (x.cos(),))[1])(
        w
    ),
    "hessian": lambda T, x, w, v: T.hessian(lambda v: rnn(T, v, x, w))(v),
    "third order": lambda T, x, w, v: T.jacfwd(T.hessian(lambda s: rnn(T, v * s, x, w)))(v[0]),
    "carries that become nonzero later": lambda T, x, w, v: T.grad(lambda v: shifting(T, x, v, w))(v),
    "carries that become nonzero later, jvp": lambda T, x, w, v: T.jvp(
        lambda v: shifting(T, x, v, w), (v,), (v.cos(),)
    ),
    "carries that become nonzero later, hessian": lambda T, x, w, v: T.hessian(
        lambda v: shifting(T, x, v, w)
    )(v),
    "swapping": lambda T, x, w, v: T.grad(lambda v, w: swapping(T, x, v, w), (0, 1))(v, w),
    "swapping, jvp": lambda T, x, w, v: T.jvp(lambda v: swapping(T, x, v, w), (v,), (v.cos(),)),
    "swapping, hessian": lambda T, x, w, v: T.hessian(lambda v: swapping(T, x, v, w))(v),
    "integer and boolean carries": lambda T, x, w, v: T.grad(lambda *a: counting(T, *a), (0, 1))(x, v),
    "integer and boolean carries, hessian": lambda T, x, w, v: T.hessian(lambda v: counting(T, x, v))(v),
    "map in scan": lambda T, x, w, v: T.grad(lambda *a: attended(T, *a), (0, 1))(x, w),
    "map in scan, jvp of grad": lambda T, x, w, v: T.jvp(
        T.grad(lambda w: attended(T, x, w)), (w,), (w.cos(),)
    ),
    "scan in map": lambda T, x, w, v: T.vmap(T.grad(lambda h: rnn(T, h, x, w)))(w.sin()),
    "scan in map in grad": lambda T, x, w, v: T.grad(
        lambda w: T.vmap(lambda h: rnn(T, h, x, w))(w.sin()).prod()
    )(w),
    "scan in map by its xs, reverse": lambda T, x, w, v: T.vmap(T.grad(lambda x: rnn(T, v, x, w, True)))(
        torch.stack([x, x.cos()])
    ),
    "scan in map, weights mapped": lambda T, x, w, v: T.vmap(T.grad(lambda w: rnn(T, v, x, w)))(
        torch.stack([w, w.cos()])
    ),
    "scan in map, nothing mapped but a carry": lambda T, x, w, v: T.vmap(lambda s: shifting(T, x, v * s, w))(
        v
    ),
    "scan in scan": lambda T, x, w, v: T.grad(lambda *a: nested(T, *a), (0, 1))(x, w),
    "scan in scan, hessian": lambda T, x, w, v: T.hessian(lambda s: nested(T, x * s, w))(v[0]),
    "scan in scan in map": lambda T, x, w, v: T.vmap(T.grad(lambda s: nested(T, x * s, w)))(v),
    "fori_loop": lambda T, x, w, v: T.jacrev(lambda v: powers(T, v))(v),
    "fori_loop in map, jvp": lambda T, x, w, v: T.jvp(T.vmap(lambda v: powers(T, v)), (x,), (x.cos(),)),
    "fori_loop in hessian": lambda T, x, w, v: T.hessian(lambda v: powers(T, v)[1].prod())(v),
}

SINGULAR = {
    f"{f.__name__}{', reverse' * reverse}, {name}": lambda T, x, w, v, f=f, nesting=nesting, reverse=reverse: (
        nesting(T, lambda v: f(T, x, v, reverse), v)
    )
    for f in (from_the_origin, to_the_edge)
    for reverse in (False, True)
    for name, nesting in NESTINGS.items()
    if (f, name) != (to_the_edge, "grad of grad")  # zeros pad the residual that its last step lacks: NaN
}


@at_two_sizes
@pytest.mark.parametrize("program", (SCANS | SINGULAR).values(), ids=SCANS | SINGULAR)
def test_scans_in_every_nesting(program, n, m):
    same(program(fxfunc, *data(n, m)), program(Reference, *data(n, m)))


def test_scan_without_xs_or_without_a_carry():
    agree(lambda T, v: T.grad(lambda v: T.scan(lambda h, _: (h * v, None), v, length=3)[0].sum())(v), wave(3))
    agree(lambda T, x: T.scan(lambda h, a: (None, a.sin()), None, x), wave(3, 2))
    agree(lambda T, x: T.scan(lambda h, a: (h, (a["p"], h, None)), x[0], {"p": x}), wave(3, 2))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_of_no_step_is_the_identity(reverse):
    x, w, v = data(3, 4)
    f = lambda h, x, w: fxfunc.scan(
        lambda h, a: (torch.tanh(h @ w + a), (h * a).sum()), h, x, reverse=reverse
    )
    carry, ys = f(v, x[:0], w)
    same((carry, ys), (v, ys.new_zeros(0)))
    total = lambda *a: (f(*a)[0] * v).sum() + f(*a)[1].sum()
    same(fxfunc.grad(total, (0, 1, 2))(v, x[:0], w), (v, x[:0], torch.zeros_like(w)))
    same(fxfunc.jvp(total, (v, x[:0], w), (w[0], x[:0], w))[1], (w[0] * v).sum())
    same(fxfunc.vmap(lambda h: f(h, x[:0], w)[0])(x), x)


def test_a_carry_and_an_output_may_be_the_same_value_or_unused():
    agree(
        lambda T, x: T.grad(lambda x: sum(y.sum() for y in T.scan(lambda h, a: (h * a, h), x[0], x)))(x),
        wave(3, 2),
    )
    agree(
        lambda T, x: T.grad(lambda x: T.scan(lambda h, a: ((h[1], h[0]), a), (x[0], x[1]), x)[0][0].sum())(x),
        wave(3, 2),
    )
    agree(lambda T, x: T.grad(lambda x: T.scan(lambda h, a: (a, h), x[0], x)[1].prod())(x), wave(3, 2))


WRONG = {
    "a carry of another dtype": lambda x: fxfunc.scan(lambda h, a: (h.float(), None), x[0], x),
    "a carry of another shape": lambda x: fxfunc.scan(lambda h, a: (h.sum(), None), x[0], x),
    "a carry of another structure": lambda x: fxfunc.scan(lambda h, a: ((h, h), None), x[0], x),
    "a carry that is a number": lambda x: fxfunc.scan(lambda h, a: (1.0, None), 0.0, x),
    "no pair": lambda x: fxfunc.scan(lambda h, a: h, x[0], x),
    "a y that is a number": lambda x: fxfunc.scan(lambda h, a: (h, 1.0), x[0], x),
    "no length": lambda x: fxfunc.scan(lambda h, a: (h, None), x[0]),
    "two lengths": lambda x: fxfunc.scan(lambda h, a: (h, None), x[0], (x, x[1:])),
    "another length": lambda x: fxfunc.scan(lambda h, a: (h, None), x[0], x, length=2),
    "nothing to loop over": lambda x: fxfunc.scan(lambda h, a: (h, None), x[0], x.sum()),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_scan_that_cannot_be_is_refused(call):
    with pytest.raises(errors.StructureMismatch, match=r"scan.*test_regions\.py"):
        call(wave(3, 2))


def test_a_body_that_writes_to_its_carry_or_branches_on_it_is_refused():
    with pytest.raises(errors.MutatedCapture):
        fxfunc.scan(lambda h, a: (h.mul_(a), None), wave(2), wave(3, 2))
    with pytest.raises(errors.ValueDependent):
        fxfunc.scan(lambda h, a: (h if h.sum() > 0 else a, None), wave(2), wave(3, 2))


# ----- finite differences ---------------------------------------------------------------------------------------------

CHECKED = {
    "map": lambda x, w: fxfunc.vmap(loss, (0, None))(x, w),
    "map of grad": lambda x, w: fxfunc.vmap(fxfunc.grad(loss), (0, None))(x, w),
    "scan": lambda x, w: rnn(fxfunc, x[0], x, w),
    "scan in map": lambda x, w: fxfunc.vmap(lambda h: rnn(fxfunc, h, x, w))(x),
    "map in scan": lambda x, w: attended(fxfunc, x, w),
}


@pytest.mark.parametrize("f", CHECKED.values(), ids=CHECKED)
def test_finite_differences_of_first_and_second_order(f):
    args = wave(2, 2).requires_grad_(), wave(2, 2, shift=0.5).requires_grad_()
    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


# ----- what a graph holds ---------------------------------------------------------------------------------------------


def regions(graph, target):
    """The nodes of this op, inside other regions too."""
    here = [n for n in graph.nodes if n.target is target]
    return here + [n for node in graph.nodes for g in subgraphs(node) for n in regions(g, target)]


def names(graph):
    return [str(n.target) for n in graph.nodes]


def test_vmap_makes_a_map_and_batches_nothing_before_lowering():
    x, w, _ = data(3, 4)
    graph = fxfunc.make_graph(fxfunc.vmap(layer, (0, None)))(x, w)
    (node,) = [n for n in graph.nodes if n.target is not getitem]
    body, operands = node.args
    assert node.target is map_ and node.kwargs["length"] == 3
    assert dict(zip(operands, node.kwargs["mapped"], strict=True)) == {
        graph.inputs[0]: True,
        graph.inputs[1]: False,
    }
    assert all(3 not in n.meta["val"].shape for n in (*body.inputs, *body.nodes))
    assert not regions(lowered(graph), map_)


@pytest.mark.parametrize(
    "name", ["grad of vmap by the unmapped", "jvp of grad of vmap", "hessian over vmap", "maml"]
)
def test_derivatives_of_a_map_are_maps(name):
    n, (x, w, v) = 7, data(7, 4)
    graph = fxfunc.make_graph(lambda *a: MAPS[name](fxfunc, *a))(x, w, v)
    verify(graph, "capture")
    maps = regions(graph, map_)
    assert maps and all(
        n not in v.meta["val"].shape for m in maps if m.kwargs["length"] == n for v in m.args[0].nodes
    )


def test_what_depends_on_no_mapped_input_is_outside_of_the_map():
    f = lambda a, w: a * (w.sin() @ w).sum() + w.exp().sum()
    graph = fxfunc.make_graph(fxfunc.vmap(f, (0, None)))(wave(3, 2), wave(2, 2))
    (node,) = regions(graph, map_)
    assert names(node.args[0]) == ["aten.mul.Tensor", "aten.add.Tensor"]


def test_what_depends_on_no_carry_or_step_is_outside_of_the_scan():
    f = lambda x, w: fxfunc.scan(lambda h, a: (h * (w.sin() @ w) + a, w.exp()), w, x)
    graph = fxfunc.make_graph(f)(wave(3, 2, 2), wave(2, 2))
    (node,) = regions(graph, scan)
    assert names(node.args[0]) == ["aten.mul.Tensor", "aten.add.Tensor"]


# ----- SEMANTICS 13-17 ------------------------------------------------------------------------------------------------


def test_semantics_13_a_body_is_an_argument_compared_by_structure():
    def graph(f):
        return fxfunc.make_graph(fxfunc.vmap(f))(wave(3, 2))

    double = graph(lambda a: a.sin() * 2)
    again = graph(lambda b: torch.sin(b) * 2)
    assert double == again and hash(double) == hash(again)
    for other in (lambda a: a.sin() * 2.0, lambda a: a.cos() * 2, lambda a: a.sin() + 2):
        assert double != graph(other)
    (node,) = regions(double, map_)
    assert node.args[0] == regions(again, map_)[0].args[0]


@pytest.mark.parametrize("last", [2, 2.0, True, -0.0, 0.0])
def test_semantics_13_regions_with_other_bodies_are_not_merged(last):
    mapped = lambda T, c: lambda x: T.vmap(lambda a: (a > 0) * c)(x)
    agree(lambda T, x: [mapped(T, c)(x) for c in (1, 1.0, False, last)], wave(3, 2))
    loop = lambda T, c, x: T.scan(lambda h, a: (h * a, h * c), x[0], x)
    agree(lambda T, x: [loop(T, c, x) for c in (1, 3, last)], wave(3, 2))


def test_semantics_13_equal_regions_are_merged():
    f = lambda x: (fxfunc.vmap(torch.sin)(x), fxfunc.vmap(torch.sin)(x))
    assert len(regions(simplify(fxfunc.make_graph(f)(wave(3))), map_)) == 1


def test_semantics_13_nothing_of_a_body_is_in_meta():
    x, w, v = data(3, 4)
    for program in (MAPS["maml"], SCANS["scan in map in grad"]):
        graph = fxfunc.make_graph(lambda *a, p=program: p(fxfunc, *a))(x, w, v)
        for n in [*graph.nodes, *(n for node in graph.nodes for g in subgraphs(node) for n in g.nodes)]:
            assert set(n.meta) <= {"val", "source", "origin"}


T, S = Dim("T"), Dim("S")


def depends(graph, dim):
    """The values that depend on an input, or a loop, of this size."""
    loops = [n for n in graph.nodes if n.target is scan and has(n.kwargs["length"], dim)]
    return reached(graph.nodes, [n for n in graph.inputs if has(n.meta["val"].shape, dim)] + loops)


def has(x, dim):
    if isinstance(x, (tuple, list)):
        return any(has(y, dim) for y in x)
    return isinstance(x, Dim) and dim.names() <= x.names()


def check_residuals(graph, dims=(T, S)):
    """No value of a linearized program, in its regions or lowered, has an axis that what it depends on has not."""
    cut = linearize(graph, tuple(v.differentiable for v in graph.in_vals), reverse=True)
    back = transposed(cut.linear, cut.residuals, list(range(len(cut.linear.outputs))))
    for program in (cut.primal, cut.linear, back):
        verify(program, "linearize")
        check_regions(program)
    for dim in dims:
        for program in (cut.primal, lowered(cut.primal)):
            of_size = depends(program, dim)
            residuals = program.outputs[cut.count :]
            assert not [n for n in residuals if has(n.meta["val"].shape, dim) and n not in of_size]
    return cut, back


def check_regions(graph):
    """Every value and output in a map or a scan depends on something that varies there."""
    for n in graph.nodes:
        for body in subgraphs(n):
            check_regions(body)
            if n.target is map_:
                starts = [x for x, m in zip(body.inputs, n.kwargs["mapped"], strict=True) if m]
            elif n.target is scan:
                starts = body.inputs[len(n.args[1]) :]
            else:
                continue
            stacked = body.outputs[len(n.args[2]) :] if n.target is scan else body.outputs
            assert {*body.nodes, *stacked} <= reached(body.nodes, [*starts, *body.draws])


RESIDUALS = {
    "unmapped weights": lambda x, w, s: fxfunc.vmap(loss, (0, None))(x, w).sum(),
    "weights computed on": lambda x, w, s: fxfunc.vmap(lambda a: loss(a, w.sin() @ w) * w.prod())(x).sum(),
    "derivative of invariants": lambda x, w, s: fxfunc.vmap(lambda a: torch.xlogy(a, w[0].exp()))(x).sum(),
    "derivative of invariants of a loop": lambda x, w, s: fxfunc.scan(
        lambda h, a: (torch.xlogy(h, w[0].exp()) + a, None), w[1], x
    )[0].sum(),
    "power": lambda x, w, s: fxfunc.vmap(lambda a: (a.abs() + 1) ** w[0].abs())(x).sum(),
    "lerp": lambda x, w, s: fxfunc.vmap(lambda a: torch.lerp(a, a.sin(), w[0]))(x).sum(),
    "where": lambda x, w, s: fxfunc.vmap(lambda a: torch.where(w[0] > 0.5, a * w[1], w[0].sin()))(x).sum(),
    "norms": lambda x, w, s: fxfunc.vmap(lambda a: torch.nn.functional.layer_norm(a, (4,), w[0], w[1]))(
        x
    ).sum(),
    "softmax of a closure": lambda x, w, s: fxfunc.vmap(lambda a: a @ w.softmax(0) @ w)(x).sum(),
    "atan2": lambda x, w, s: fxfunc.vmap(lambda a: torch.atan2(a, w[0]) + torch.hypot(a, w[1]))(x).sum(),
    "addmm and div": lambda x, w, s: fxfunc.vmap(lambda a: torch.addmm(w, a[:, None] * w, w) / (w * w + 1))(
        x
    ).sum(),
    "nested": lambda x, w, s: fxfunc.vmap(lambda a: fxfunc.vmap(lambda r: loss(r * a, w) * w.sum())(s))(
        x
    ).sum(),
    "nested, parts of one axis": lambda x, w, s: fxfunc.vmap(
        lambda a: fxfunc.vmap(lambda r: (r.sin() * w[0]).sum() ** 2)(s).sum() * (a.sin() * w[1]).sum()
    )(x).sum(),
    "grad in map": lambda x, w, s: fxfunc.vmap(fxfunc.grad(loss, 1), (0, None))(x, w).sum(),
    "scan in map": lambda x, w, s: fxfunc.vmap(lambda a: rnn_of(a, s, w))(x).sum(),
    "scan": lambda x, w, s: rnn_of(w[0], x, w),
    "scan with invariants": lambda x, w, s: fxfunc.scan(lambda h, a: (h.abs() ** w[0].abs() + a, h), w[1], x)[
        1
    ].sum(),
    "map in scan": lambda x, w, s: fxfunc.scan(
        lambda h, a: (fxfunc.vmap(lambda r: loss(r + a, w.sin()))(s).sum() + h * a, None), w[0], x
    )[0].sum(),
    "second order": lambda x, w, s: fxfunc.grad(lambda w: fxfunc.vmap(loss, (0, None))(x, w).sum())(w).sum(),
}


def rnn_of(h, x, w):
    h, ys = fxfunc.scan(lambda h, a: (torch.tanh(h @ w + a * w[0]), h.sin()), h, x)
    return h.sum() + ys.sum()


def symbolic(f, *specs):
    """The graph of a function with symbolic sizes."""
    return fxfunc.jit(f).lower(*specs).graph


def over_tasks():
    x, w, _ = data(3, 4)
    return fxfunc.spec(x, {0: T}), w, fxfunc.spec(wave(2, 4), {0: S})


@pytest.mark.parametrize("f", RESIDUALS.values(), ids=RESIDUALS)
def test_semantics_14_no_residual_of_the_mapped_size_is_made_of_invariants(f):
    check_residuals(symbolic(f, *over_tasks()))


def test_semantics_14_the_linear_program_holds_no_primal_loop():
    f = lambda x, w, s: rnn_of(w[0], x, w) + fxfunc.vmap(lambda a: loss(a, w))(x).sum()
    cut, back = check_residuals(symbolic(f, *over_tasks()))
    assert "aten.tanh.default" in str(cut.primal)
    assert not [op for op in ("tanh", "sin.", "cos.") if f"aten.{op}" in str(cut.linear) + str(back)]


def test_semantics_14_a_value_of_out_dims_none_is_not_multiplied_by_the_length():
    f = lambda T, x, v: T.vmap(lambda a, v: (a * v.sum(), v.sin() * v), (0, None), (0, None))(x, v)
    agree(lambda T, x, v: T.grad(lambda v: f(T, x, v)[1].sum())(v), wave(5, 3), wave(3))
    agree(lambda T, x, v: T.grad(lambda v: f(T, x, v)[0].sum() * f(T, x, v)[1].sum())(v), wave(5, 3), wave(3))
    graph = fxfunc.make_graph(lambda x, v: f(fxfunc, x, v))(wave(5, 3), wave(3))
    assert "aten.sin.default" in names(graph)


def test_semantics_14_cotangents_of_unmapped_inputs_are_summed_inside():
    _, back = check_residuals(symbolic(RESIDUALS["unmapped weights"], *over_tasks()))
    (node,) = regions(back, map_)
    vals = zip(node.args[0].out_vals, node.kwargs["outs"], strict=True)
    assert {(v.shape, kind) for v, kind in vals} == {((4,), "stack"), ((4, 4), "sum")}


def test_semantics_14_cotangents_of_constants_are_accumulated_in_the_carry():
    graph = symbolic(RESIDUALS["scan"], *over_tasks())
    _, back = check_residuals(graph)
    (node,) = regions(back, scan)
    assert node.kwargs["reverse"]
    assert (4, 4) in [x.meta["val"].shape for x in node.args[2]]
    assert (4, 4) not in [v.shape for v in node.args[0].out_vals[len(node.args[2]) :]]


def test_semantics_14_residuals_that_are_inputs_are_not_copied():
    f = lambda x, w: fxfunc.scan(lambda h, a: (h * a * w, None), w, x)[0].sum()
    cut, _ = check_residuals(symbolic(f, fxfunc.spec(wave(3, 4), {0: T}), wave(4)))
    (node,) = regions(cut.primal, scan)
    assert len(node.args[0].outputs) - len(node.args[2]) <= 2  # the carry before, and a product
    assert cut.primal.inputs[0] in cut.primal.outputs


def test_semantics_14_integer_and_boolean_carries_have_no_cotangent():
    x, _, v = data(3, 4)
    graph = fxfunc.make_graph(lambda *a: counting(fxfunc, *a))(x, v)
    cut, back = check_residuals(graph)
    for program in (cut.linear, back):
        (node,) = regions(program, scan)
        assert all(n.meta["val"].differentiable for n in node.args[2])


def draws(f, *args):
    torch.manual_seed(3)
    return f(*args)


def noisy(x, v):
    torch.rand(2)
    mask = torch.rand(x.shape, dtype=F64) > 0.5
    return ((x * v + torch.randn(x.shape, dtype=F64)).sin() * mask).sum()


def wasteful(h, a):
    torch.rand(2)
    return h * a, None


class NoisyBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, ct):
        return ct * ctx.saved_tensors[0] * torch.rand(3, dtype=F64)


RANDOM = {
    "drawn in a backward": lambda T, x, v: T.grad(lambda v: (NoisyBackward.apply(v) * v).sum())(v),
    "drawn in a backward, in a scan in a map": lambda T, x, v: T.vmap(
        T.grad(lambda v: T.scan(lambda h, a: (NoisyBackward.apply(h) * a, None), v, x)[0].sum()),
        randomness="different",
    )(x),
    "vmap": lambda T, x, v: T.vmap(noisy, (0, None), randomness="different")(x, v),
    "vmap of grad": lambda T, x, v: T.vmap(T.grad(noisy), (0, None), randomness="different")(x, v),
    "vmap of grad by the unmapped": lambda T, x, v: T.vmap(
        T.grad(noisy, 1), (0, None), randomness="different"
    )(x, v),
    "grad of vmap": lambda T, x, v: T.grad(lambda v: RANDOM["vmap"](T, x, v).sum())(v),
    "grad": lambda T, x, v: T.grad(lambda x: noisy(x, v))(x),
    "jvp of grad": lambda T, x, v: T.jvp(T.grad(lambda x: noisy(x, v)), (x,), (x.cos(),)),
    "hessian of vmap": lambda T, x, v: T.jacrev(T.grad(lambda v: RANDOM["vmap"](T, x, v).sum()))(v),
    "nested": lambda T, x, v: T.vmap(
        lambda a: T.vmap(lambda b: noisy(a * b, v), randomness="different")(x), randomness="different"
    )(x),
    "drawn for all": lambda T, x, v: T.vmap(lambda a: a + torch.rand(3, dtype=F64), randomness="different")(
        x
    ),
    "of nothing mapped": lambda T, x, v: T.vmap(lambda a: torch.rand(3, dtype=F64), randomness="different")(
        x
    ),
    "two equal draws": lambda T, x, v: torch.rand(3, dtype=F64) - torch.rand(3, dtype=F64) + v,
    "two equal maps": lambda T, x, v: RANDOM["drawn for all"](T, x, v) - RANDOM["drawn for all"](T, x, v),
    "scan": lambda T, x, v: T.scan(lambda h, a: (h * a + torch.rand(3, dtype=F64), torch.randn(2)), v, x),
    "two equal scans": lambda T, x, v: RANDOM["scan"](T, x, v)[0] - RANDOM["scan"](T, x, v)[0],
    "grad of scan": lambda T, x, v: T.grad(lambda v: RANDOM["scan"](T, x, v)[0].prod())(v),
    "unused in map": lambda T, x, v: T.vmap(
        lambda a, v: (torch.rand(2), v.sin())[1], (0, None), None, randomness="different"
    )(x, v),
    "unused in scan": lambda T, x, v: T.scan(wasteful, v, x),
    "jvp of unused in scan": lambda T, x, v: T.jvp(lambda v: T.scan(wasteful, v, x)[0], (v,), (x[0],)),
    "grad of unused in scan": lambda T, x, v: T.grad(lambda v: T.scan(wasteful, v, x)[0].sum())(v),
    "scan in map": lambda T, x, v: T.vmap(lambda a: a * RANDOM["scan"](T, x, v)[0], randomness="different")(
        x
    ),
    "grad of scan in map": lambda T, x, v: T.grad(lambda v: RANDOM["scan in map"](T, x, v).prod())(v),
    "map in scan": lambda T, x, v: T.scan(lambda h, a: (RANDOM["vmap"](T, x, v * a) + h, None), x[:, 0], x)[
        0
    ],
}


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("program", RANDOM.values(), ids=RANDOM)
def test_semantics_15_every_draw_is_made_once_and_in_order(program, n):
    x, v = wave(n, 3), wave(3, shift=0.4)
    want = draws(program, Reference, x, v), torch.rand(4)
    same((draws(program, fxfunc, x, v), torch.rand(4)), want)
    jitted = fxfunc.jit(lambda *a: program(fxfunc, *a))
    same((draws(jitted, x, v), torch.rand(4)), want)


def dropped(x, w):
    return torch.nn.functional.dropout(layer(x, w), 0.4).sum()


def test_semantics_15_gradients_of_dropout_follow_the_drawn_mask():
    x, w, _ = data(6, 4)
    value = lambda w: fxfunc.vmap(dropped, (0, None), randomness="different")(x, w).sum()
    got, here = draws(fxfunc.grad(value), w), w.clone()
    for i, step in enumerate(torch.eye(16, dtype=F64)):
        step = 1e-5 * step.reshape(4, 4)
        slope = (draws(value, here + step) - draws(value, here - step)) / 2e-5
        torch.testing.assert_close(got.flatten()[i], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrap", ["plain", "grad", "jit", "inner vmap", "scan"])
def test_semantics_15_a_draw_under_error_is_refused(wrap):
    f = lambda a: (a * torch.rand(3, dtype=F64)).sum()
    inside = {
        "plain": f,
        "grad": fxfunc.grad(f),
        "jit": fxfunc.jit(f),
        "inner vmap": fxfunc.vmap(lambda b: b * torch.rand(()), randomness="different"),
        "scan": lambda a: fxfunc.scan(lambda h, _: (h + torch.rand((), dtype=F64), None), a.sum(), length=2)[
            0
        ],
    }[wrap]
    inside(wave(3))
    with pytest.raises(errors.RandomInVmap, match="test_regions.py"):
        fxfunc.vmap(inside)(wave(2, 3))


def test_semantics_16_an_unrolled_loop_is_the_scan():
    x, w, v = data(5, 4)
    step = lambda h, a: (torch.tanh(h @ w + a), h.sin())
    same(fxfunc.jit(lambda x: fxfunc.scan(step, v, x))(x), fxfunc.jit(lambda x: unrolled(step, v, x))(x))
    sizes = [len(fxfunc.make_graph(lambda x: fxfunc.scan(step, v, x))(wave(n, 4))) for n in (2, 50)]
    assert sizes[0] == sizes[1]


DYNAMIC = {
    "mean": lambda T, x, w: T.grad(lambda w: T.vmap(loss, (0, None))(x, w).mean())(w),
    "mean inside": lambda T, x, w: T.vmap(lambda r: (x * r).sin().mean())(w),
    "count": lambda T, x, w: T.vmap(lambda a: a / x.shape[0] + x.size(0))(x),
    "expand": lambda T, x, w: w[0].expand(x.shape[0], 4) * x,
    "reshape": lambda T, x, w: T.grad(
        lambda x: (x.reshape(-1, 2).cumsum(1).reshape(x.shape) * x.sin()).sum()
    )(x),
    "flatten in map": lambda T, x, w: T.vmap(lambda r: (x * r).flatten().sin().sum())(w),
    "maml": lambda T, x, w: T.grad(
        lambda w: maml(T, w, torch.stack([x, x.cos()], 1), torch.stack([x.sin(), x], 1))
    )(w),
    "per-example gradients": lambda T, x, w: T.vmap(T.grad(loss, 1), (0, None))(x, w),
    "scan over it": lambda T, x, w: T.grad(
        lambda w: (T.scan(lambda h, a: (torch.tanh(h @ w + a), h * a), w[0], x)[1] ** 3).mean()
    )(w),
    "scan in map": lambda T, x, w: T.vmap(
        lambda a: T.scan(lambda h, r: (torch.tanh(h * r + a), h.sum()), a, w)
    )(x),
    "map in scan": lambda T, x, w: T.scan(
        lambda h, r: (T.vmap(lambda a: (a * r).sum())(x) / x.shape[0] + h, None), x[:, 0], w
    )[0],
    "expand in scan": lambda T, x, w: T.scan(
        lambda h, r: (h + r[0].expand(x.shape[0]).sum(), None), w[0, 0] * 1, w
    )[0],
    "full in scan in map": lambda T, x, w: T.vmap(
        lambda a: T.scan(
            lambda h, r: (h + r.sum() * torch.ones(x.shape[0], dtype=F64).sum(), None), a[0] * 1, w
        )[0]
    )(x),
    "nested with itself": lambda T, x, w: T.vmap(lambda a: T.vmap(lambda b: (a * b).sin().sum())(x))(x),
    "hessian": lambda T, x, w: T.hessian(lambda v: T.vmap(lambda a: (a * v).sin().prod())(x).mean())(w[0]),
    "jvp": lambda T, x, w: T.jvp(lambda x: T.vmap(layer, (0, None))(x, w).mean(0), (x,), (x.cos(),)),
    "statistics": lambda T, x, w: T.grad(
        lambda x: ((x - x.mean(0)) / (x.var(0, correction=0) + 1).sqrt()).pow(3).sum()
    )(x),
    "sum of an unmapped": lambda T, x, w: T.grad(
        lambda w: T.vmap(lambda a: (w * w).sum() + 0 * a.sum())(x).sum()
    )(w),
}


def for_any_length(program):
    """A program of x [T, 4] and w [4, 4] compiled once."""
    f = fxfunc.jit(lambda x, w: program(fxfunc, x, w))
    return f.lower(fxfunc.spec(wave(3, 4), {0: T}), wave(4, 4)).compile()


@pytest.mark.parametrize("program", DYNAMIC.values(), ids=DYNAMIC)
def test_semantics_17_one_program_for_every_size(program):
    w, compiled = wave(4, 4, shift=0.5), for_any_length(program)
    for n in (2, 3, 7, 1):
        same(compiled(wave(n, 4), w), program(Reference, wave(n, 4), w))


@pytest.mark.parametrize("name", [*MAPS, *SCANS])
def test_semantics_17_every_nesting_has_one_program(name):
    program = lambda T, x, w: (MAPS | SCANS)[name](T, x, w, w[0])
    w, compiled = wave(4, 4, shift=0.5), for_any_length(program)
    for n in (1, 3):
        same(compiled(wave(n, 4), w), program(Reference, wave(n, 4), w))


@pytest.mark.parametrize(
    "name", ["count", "expand", "reshape", "per-example gradients", "scan in map", "nested with itself"]
)
def test_semantics_17_the_size_0(name):
    w = wave(4, 4, shift=0.5)
    compiled = for_any_length(DYNAMIC[name])
    got, example = compiled(wave(0, 4), w), compiled(wave(2, 4), w)
    shapes = lambda ys: [
        tuple(0 if s == 2 and i < 2 else s for i, s in enumerate(y.shape)) for y in pytree.tree_leaves(ys)
    ]
    assert [tuple(y.shape) for y in pytree.tree_leaves(got)] == shapes(example)


@pytest.fixture(scope="module")
def maml_artifact(tmp_path_factory):
    """The meta-gradient for any number of tasks, saved and loaded once."""
    path = tmp_path_factory.mktemp("regions") / "maml.zip"
    f = fxfunc.jit(lambda w, x, y: fxfunc.grad(lambda w: maml(fxfunc, w, x, y))(w))
    each = fxfunc.spec(wave(3, 2, 4), {0: fxfunc.Dim("tasks")})
    f.lower(wave(4, 4), each, each).compile().save(path)
    return fxfunc.load(path)


@pytest.mark.parametrize("tasks", [1, 2, 25, 1000])
def test_semantics_17_a_saved_meta_gradient_runs_for_any_number_of_tasks(maml_artifact, tasks):
    w, x, y = wave(4, 4, shift=0.5), wave(tasks, 2, 4), wave(tasks, 2, 4, shift=0.8)
    same(maml_artifact(w, x, y), torch.func.grad(lambda w: maml(torch.func, w, x, y))(w))


# ----- random programs ------------------------------------------------------------------------------------------------

OPS = {
    "sin": lambda a, b: a.sin(),
    "cos": lambda a, b: a.cos(),
    "tanh": lambda a, b: a.tanh(),
    "bell": lambda a, b: (-a * a).exp(),
    "softmax": lambda a, b: torch.softmax(a, 0),
    "cumsum": lambda a, b: a.cumsum(0),
    "flip": lambda a, b: a.flip(0),
    "mean": lambda a, b: a.mean() + b,
    "first": lambda a, b: a[0] * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 1),
    "where": lambda a, b: torch.where(a > b, a, b.sin()),
    "outer": lambda a, b: torch.outer(a, b).sum(1),
    "matvec": lambda a, b: torch.outer(a, b.cos()).tanh() @ a,
    "count": lambda a, b: a * (b > 0).sum(),
}
LAYERS = wave(2, 3, shift=0.2)
NESTED = {
    "grad": lambda T, f, a, b: T.grad(lambda a: f(a, b).sum())(a),
    "jvp": lambda T, f, a, b: T.jvp(lambda a: f(a, b), (a,), (b,))[1],
    "vmap": lambda T, f, a, b: T.vmap(lambda r: f(r * a, b))(LAYERS).sum(0),
    "vmap by b": lambda T, f, a, b: T.vmap(lambda a, b: f(a, b) * b, (None, 0), 1)(a, LAYERS * b).prod(1),
    "vmap by columns": lambda T, f, a, b: T.vmap(lambda r: f(r, b) + r, 1, 1)(torch.outer(b, a)).sum(1),
    "vjp": lambda T, f, a, b: T.vjp(f, a, b)[1](a.cos())[1],
    "jacrev": lambda T, f, a, b: T.jacrev(f)(a, b) @ b,
    "fori": lambda T, f, a, b: T.fori_loop(1, 3, lambda i, h: f(h, b) * i, a),
    "scan": lambda T, f, a, b: sum_of(T.scan(lambda h, r: (f(h, r), f(r, b)), a, LAYERS)),
    "scan back": lambda T, f, a, b: sum_of(
        T.scan(lambda h, r: (f(h + r, b), h), a, LAYERS * b, reverse=True)
    ),
}


def sum_of(result):
    carry, ys = result
    return carry + (ys * LAYERS).sum(0)


def steps(depth):
    plain = st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 4), st.integers(0, 4), st.none())
    if not depth:
        return st.lists(plain, min_size=1, max_size=3)
    inner = st.tuples(st.sampled_from(sorted(NESTED)), st.integers(0, 4), st.integers(0, 4), steps(depth - 1))
    return st.lists(st.one_of(plain, inner), min_size=1, max_size=3)


def perform(T, program, a, b):
    """Run the steps, each on two of the values so far; the last value."""
    values = [a, b]
    for name, i, j, inner in program:
        x, y = values[i % len(values)], values[j % len(values)]
        body = lambda a, b, inner=inner: perform(T, inner, a, b)
        values.append(OPS[name](x, y) if inner is None else NESTED[name](T, body, x, y))
    return values[-1]


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(outer=st.sampled_from(sorted(NESTED)), inner=steps(2))
def test_random_programs_agree_with_unrolled_loops(outer, inner):
    program = [(outer, 0, 1, inner)]
    args = wave(3), wave(3, shift=0.6)
    same(perform(fxfunc, program, *args), perform(Reference, program, *args))
