"""Stacks of per-sample gradients that are only reduced: gone, and no answer moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear

import fxfunc
from fxfunc.bench import registry
from fxfunc.bench.workloads.dpsgd import clipped
from fxfunc.codegen import cost, partition
from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, subgraphs
from fxfunc.passes.pipeline import lowered

SAMPLES, IN, OUT = 16, 48, 40


def largest(f, *args) -> int:
    """The most elements that a call of the lowered graph makes."""
    return _largest(lowered(fxfunc.make_graph(f)(*args)))


def _largest(graph: Graph) -> int:
    sizes = [numel(n.meta["val"].shape) for n in graph.nodes if hasattr(n.meta["val"], "shape")]
    return max([*sizes, *(_largest(g) for n in graph.nodes for g in subgraphs(n))])


def factors(rank: int | None = None, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Inputs and cotangents of a layer, and a weight for each sample."""
    torch.manual_seed(0)
    sizes = [(SAMPLES, IN), (SAMPLES, OUT)] if rank is None else [(SAMPLES, rank, IN), (SAMPLES, rank, OUT)]
    return *(torch.randn(s, dtype=dtype) for s in sizes), torch.rand(SAMPLES, dtype=dtype)


def stack(x, d):
    """x_i^T d_i for each sample."""
    return x.mT @ d if x.ndim == 3 else x[:, :, None] @ d[:, None]


def error(ours, exact) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1))


# Reductions of a stack, as people write them: f(stack, weights).
REDUCTIONS = {
    "squares": lambda g, c: (g * g).sum((1, 2)),
    "flat squares": lambda g, c: g.flatten(1).square().sum(1),
    "transposed": lambda g, c: g.mT.flatten(1).pow(2).sum(-1, keepdim=True),
    "one axis after the other": lambda g, c: (g * g).sum(2).sum(1),
    "norm": lambda g, c: g.flatten(1).norm(dim=1),
    "norm over axes": lambda g, c: torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True),
    "all of it": lambda g, c: (g * g).sum(),
    "scaled norms": lambda g, c: (-g * 0.5 / c[:, None, None]).square().sum((1, 2)),
    "einsum": lambda g, c: torch.einsum("n,n...->...", c, g),
    "einsum of the transpose": lambda g, c: torch.einsum("n,nij->ji", c, g),
    "row of weights": lambda g, c: c[None] @ g.flatten(1),
    "column of weights": lambda g, c: g.flatten(1).t() @ c[:, None],
    "scaled sum": lambda g, c: (g * c[:, None, None]).sum(0),
    "scaled mean": lambda g, c: (c.reshape(-1, 1, 1) * g / 3.0).mean(0, keepdim=True),
    "clipped": lambda g, c: (g * (1 / g.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]).sum(0),
    "transposed sum": lambda g, c: (g.mT * c[:, None, None]).sum(0),
}


@pytest.mark.parametrize("rank", [None, 3], ids=["rank one", "rank three"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_stack_that_is_only_reduced_is_not_made(name, rank):
    f = lambda x, d, c: REDUCTIONS[name](stack(x, d), c)
    args = factors(rank)
    assert largest(f, *args) < SAMPLES * IN * OUT
    ours, theirs, exact = fxfunc.jit(f)(*args), f(*args), f(*(a.double() for a in args))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert error(ours, exact) <= max(1.5 * error(theirs, exact), 1e-6)


@pytest.mark.parametrize("name", ["squares", "norm", "einsum", "scaled sum", "clipped"])
def test_an_outer_product_written_as_a_multiplication_is_a_stack_too(name):
    f = lambda x, d, c: REDUCTIONS[name](x[:, None, :] * d[:, :, None], c)
    args = factors()
    assert largest(f, *args) < SAMPLES * IN * OUT
    assert error(fxfunc.jit(f)(*args), f(*(a.double() for a in args))) < 1e-6


@pytest.mark.parametrize(
    "f",
    [
        lambda g, c: (g, (g * g).sum((1, 2))),
        lambda g, c: (g.sin().sum(0), (g * g).sum((1, 2))),
        lambda g, c: (g * g).sum(1),
        lambda g, c: (g * g * c[:, None, None]).sum((1, 2)),
        lambda g, c: (g * c[0] * torch.ones(OUT)).sum((1, 2)),
        lambda g, c: (g * g).mean((1, 2)),
        lambda g, c: torch.stack([c, c]) @ g.flatten(1),
        lambda g, c: torch.linalg.vector_norm(g, 1, dim=(1, 2)),
    ],
)
def test_a_stack_that_something_else_reads_stays(f):
    args = factors()
    g = lambda x, d, c: f(stack(x, d), c)
    assert largest(g, *args) >= SAMPLES * IN * OUT
    torch.testing.assert_close(fxfunc.jit(g)(*args), g(*args))


@pytest.mark.parametrize(
    "rank, dtype",
    [(20, torch.float32), (None, torch.float64)],
    ids=["norms cost more than the stack", "float64 has no wider type"],
)
def test_a_stack_stays_where_norms_of_its_factors_are_no_better(rank, dtype):
    args = factors(rank, dtype)
    norms, total = (lambda x, d, c, name=n: REDUCTIONS[name](stack(x, d), c) for n in ("squares", "einsum"))
    assert largest(norms, *args) >= SAMPLES * IN * OUT > largest(total, *args)


# ----- loops over samples -----------------------------------------------------------------------------------------


def looped(f, *args) -> tuple[int, bool, list[torch.Tensor]]:
    """The most elements that a program gives or keeps aside, whether samples are tasks of a loop in one, and the answer."""
    with cost.forced(maps="loops"):
        lowered = fxfunc.jit(f).lower(*args)
        built = partition.build(lowered.graph)
        answer = lowered.compile(backend="cpp")(*args)
    return (
        max(_largest(built.graph), *(p.bytes // 4 for p in built.programs)),
        any("loop over" in p.describe() for p in built.programs),
        torch.utils._pytree.tree_leaves(answer),
    )


def stacks(x, d, turned):
    one = lambda x, d: d.sin().mT @ x.tanh() if turned else x.tanh().mT @ d.sin()
    return fxfunc.vmap(one)(x, d)


def map_sums(f, *args):
    return [r.sum(0) for r in fxfunc.vmap(f)(*args)]


@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_loop_makes_no_stack_that_is_only_reduced(name, turned):
    f = lambda x, d, c: REDUCTIONS[name](stacks(x, d, turned), c)
    args = factors(3)
    size, is_loop, (answer,) = looped(f, *args)
    assert is_loop and size < SAMPLES * IN * OUT
    theirs, exact = f(*args), f(*(a.double() for a in args))
    assert answer.shape == theirs.shape and answer.dtype == theirs.dtype
    assert error(answer, exact) <= max(1.5 * error(theirs, exact), 1e-6)


@pytest.mark.parametrize(
    "f, rank",
    [
        (lambda x, d, c: (g := stacks(x, d, False), (g * g).sum((1, 2))), 3),
        (lambda x, d, c: map_sums(lambda x, d: (g := x.mT @ d, g.sin().sum()), x, d), 3),
        (lambda x, d, c: stacks(x, d, False).square().sum((1, 2)), 20),
    ],
    ids=["read as a whole", "read in the loop", "cheaper than norms of its factors"],
)
def test_a_loop_makes_a_stack_that_is_needed_or_cheaper(f, rank):
    args = factors(rank)
    size, is_loop, answer = looped(f, *args)
    assert is_loop and size >= SAMPLES * IN * OUT
    exact = torch.utils._pytree.tree_leaves(f(*(a.double() for a in args)))
    assert all(error(x, y) < 1e-5 for x, y in zip(answer, exact, strict=True))


# ----- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squares", "norm"])
def test_norms_of_terms_that_cancel_are_no_less_exact_than_those_of_the_stack(name):
    """The second half of the positions takes away the first but for 1e-4 of it."""
    x, d, c = factors(2)
    x = torch.cat([x[:, :1], x[:, :1]], 1)
    d = torch.cat([d[:, :1], -d[:, :1] * (1 + 1e-4)], 1)
    f = lambda x, d, c: REDUCTIONS[name](stack(x, d), c)
    exact = f(x.double(), d.double(), c.double())
    relative = lambda y: ((y.double() - exact) / exact).abs().max()
    assert largest(f, x, d, c) < SAMPLES * IN * OUT
    assert relative(fxfunc.jit(f)(x, d, c)) <= max(relative(f(x, d, c)), 1e-6)


def test_a_norm_is_not_the_root_of_a_rounding_error_below_zero():
    x, d, c = factors(2)
    x, d = torch.cat([x[:, :1], x[:, :1]], 1), torch.cat([d[:, :1], -d[:, :1]], 1)
    f = lambda x, d, c: REDUCTIONS["norm"](stack(x, d), c)
    assert (fxfunc.jit(f)(x, d, c) <= 1e-6).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_factors_whose_squares_leave_float32_have_the_norm_of_their_product(scale):
    x, d, c = factors()
    f = lambda x, d: REDUCTIONS["squares"](stack(x * scale, d / scale), c)
    torch.testing.assert_close(fxfunc.jit(f)(x, d), f(x, d))


@pytest.mark.parametrize("name", ["squares", "norm", "scaled norms", "einsum", "scaled sum"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_special_values_of_one_sample_are_where_the_stack_has_them(name, zero, special):
    """inf times the zero of a dead unit is NaN, and sum and norm say so."""
    x, d, c = factors()
    x[1, 3] = special
    d[2, 5] = special
    if zero:
        d[1, 2] = x[2, 4] = 0
    f = lambda x, d, c: REDUCTIONS[name](stack(x, d), c)
    ours, theirs = fxfunc.jit(f)(x, d, c), f(x, d, c)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_a_norm_over_positions_of_which_one_is_not_finite_is_not_finite(special):
    x, d, c = factors(3)
    x[1, 2, 3] = special
    f = lambda x, d, c: REDUCTIONS["squares"](stack(x, d), c)
    assert torch.equal(fxfunc.jit(f)(x, d, c).isfinite(), f(x, d, c).isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_no_less_exact(dtype):
    x, d, c = (a.to(dtype) for a in factors())
    f = lambda x, d, c: REDUCTIONS["norm"](stack(x, d), c)
    exact = f(x.double(), d.double(), c.double())
    assert error(fxfunc.jit(f)(x, d, c), exact) <= error(f(x, d, c), exact)


# ----- with the transforms --------------------------------------------------------------------------------------------


def net(params, x, y):
    """The squared error of two layers at a sample."""
    hidden = torch.tanh(linear(x, params["w"], params["b"]))
    return (linear(hidden, params["v"]) - y).square().sum()


def private(api):
    """Clipped gradients over a batch, and the norms."""
    return clipped(api, net)


def sample_args(dtype=torch.float32):
    torch.manual_seed(1)
    shapes = {"w": (OUT, IN), "b": (OUT,), "v": (32, OUT)}
    params = {k: (torch.randn(s) / 6).to(dtype) for k, s in shapes.items()}
    return params, torch.randn(SAMPLES, IN).to(dtype), torch.randn(SAMPLES, 32).to(dtype)


def weighed(api):
    """A number that depends on all of `private`."""
    step = private(api)

    def f(params, x, y):
        grads, norms = step(params, x, y)
        return sum(g.sin().sum() for g in grads.values()) + norms.square().sum()

    return f


TRANSFORMED = {
    "as it is": lambda api: private(api),
    "grad": lambda api: api.grad(weighed(api)),
    "jvp": lambda api: lambda p, x, y: api.jvp(lambda x: private(api)(p, x, y), (x,), (y @ y.mT @ x,)),
    "vmap": lambda api: (
        lambda p, x, y: api.vmap(private(api), (None, 0, None))(p, torch.stack([x, x.sin()]), y)
    ),
    "vmap of grad": lambda api: (
        lambda p, x, y: api.vmap(api.grad(weighed(api), argnums=1), (None, 0, None))(
            p, torch.stack([x, x.sin()]), y
        )
    ),
    "grad of grad": lambda api: api.grad(
        lambda p, x, y: api.grad(weighed(api), argnums=1)(p, x, y).square().sum(), argnums=2
    ),
}


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_clipped_gradients_under_transforms_agree_with_float64(name, backend):
    make, args = TRANSFORMED[name], sample_args()
    ours = fxfunc.jit(make(fxfunc)).lower(*args).compile(backend=backend)(*args)
    exact = make(torch.func)(*sample_args(torch.float64))
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (ours, exact)), strict=True):
        assert error(x, y) < 3e-5


def test_steps_in_a_loop_make_no_stack():
    step = private(fxfunc)

    def train(params, x, y):
        def body(params, _):
            grads, norms = step(params, x, y)
            return {k: p - 0.1 * grads[k] for k, p in params.items()}, norms

        return fxfunc.scan(body, params, None, length=3)

    args = sample_args()
    assert largest(train, *args) < SAMPLES * IN * OUT
    found, norms = fxfunc.jit(train)(*args)
    params, x, y = sample_args(torch.float64)
    for i in range(3):
        grads, exact = private(torch.func)(params, x, y)
        assert error(norms[i], exact) < 1e-5
        params = {k: p - 0.1 * grads[k] for k, p in params.items()}
    assert all(error(found[k], params[k]) < 1e-5 for k in params)


@pytest.mark.parametrize(
    "workload", ["dpsgd-mlp", pytest.param("dpsgd-block[batch=4]", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_the_workloads_have_their_float64_answer(workload, backend):
    w = registry.find(workload)
    args = w.inputs(**w.parameters)
    ours = fxfunc.jit(w.function(fxfunc)).lower(*args).compile(backend=backend)(*args)
    wide = [
        torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, a) for a in args
    ]
    for x, y in zip(*map(torch.utils._pytree.tree_leaves, (ours, w.exact()(*wide))), strict=True):
        assert error(x, y) < 1e-6


def test_the_number_of_samples_may_be_a_symbol():
    f = lambda x, d, c: [REDUCTIONS[n](stack(x, d), c) for n in ("norm", "einsum")]
    n, args = fxfunc.Dim("n"), factors()
    compiled = fxfunc.jit(f).lower(*(fxfunc.spec(a, {0: n}) for a in args)).compile()
    for count in (2, SAMPLES):
        given = [a[:count] for a in args]
        torch.testing.assert_close(compiled(*given), f(*given))
    ops = [str(m.target) for m in compiled.graph.nodes]
    assert "aten.bmm.default" not in ops
