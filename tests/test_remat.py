"""Rematerialisation: `checkpoint` keeps less and changes nothing, `saved_residuals` says what is kept, and cuts are least."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.nn import functional as F

import fxfunc
from fxfunc.bench import residuals
from fxfunc.codegen import serial
from fxfunc.passes import remat
from fxfunc.passes.flow import Network
from fxfunc.passes.graph import barrier, checkpoint, is_random
from fxfunc.passes.pipeline import lowered

aten = torch.ops.aten


def keeps_gelu(call) -> bool:
    return call.target in (aten.gelu.default, aten.erf.default)


POLICIES = ["min_cut", "dots", "nothing", keeps_gelu]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: getattr(p, "__name__", p))


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(w, x):
    for i in range(3):
        x = F.gelu(x @ w[i]) + x.tanh()
    return x.square().sum()


def attention(w, x):
    q, k, v = (F.layer_norm(x, (6,)) @ w[0].reshape(6, 6)).tanh(), x @ w[1], x @ w[2]
    return (F.scaled_dot_product_attention(q, k, v) + x).exp().mean()


def looped(w, x):
    """A loop, whose steps are a region, between other calls."""
    last, ys = fxfunc.scan(lambda h, m: ((h @ m).tanh(), h.sin()), x.exp(), w)
    return (last * ys.sum(0)).sin().sum()


def largest(w, x):
    """Ties of a maximum share its derivative, so equality is found on the same numbers."""
    y = (x @ w[0]).round(decimals=1).exp()
    return (y.amax(1) * y.max(0).values.sum()).sum() + F.max_pool1d(y @ w[1], 2).sin().sum()


CASES = [mlp, attention, looped, largest]
ARGS = (randn(3, 6, 6) / 2, randn(5, 6, seed=1))
cases = pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)


def twice(f):
    return fxfunc.grad(lambda w, x: fxfunc.grad(f, 1)(w, x).sin().sum(), (0, 1))


def per_example(f):
    return lambda w, x: fxfunc.vmap(fxfunc.grad(f, (0, 1)), (None, 0))(w, torch.stack([x, x * 0.7]))


def of_a_map(f):
    return fxfunc.grad(lambda w, x: fxfunc.vmap(f, (None, 0))(w, torch.stack([x, x * 0.7])).sum(), (0, 1))


def in_steps(f):
    """The gradient of a loop whose steps are the function."""
    return fxfunc.grad(
        lambda w, x: fxfunc.fori_loop(0, 3, lambda i, h: h + 0.1 * f(w, h).sin(), x).sum(), (0, 1)
    )


USES = {
    "value": lambda f: f,
    "grad": lambda f: fxfunc.grad(f, (0, 1)),
    "jvp": lambda f: lambda w, x: fxfunc.jvp(f, (w, x), (w.cos(), x.cos())),
    "vjp": lambda f: lambda w, x: fxfunc.vjp(f, w, x)[1](x.new_tensor(2.0)),
    "grad_grad": twice,
    "hvp": lambda f: lambda w, x: fxfunc.hvp(f, (w, x), (w.cos(), x.cos())),
    "vmap_grad": per_example,
    "grad_vmap": of_a_map,
    "jit_grad": lambda f: fxfunc.jit(fxfunc.grad(f, (0, 1))),
    "grad_scan": in_steps,
}


def combinations():
    """The first case under every policy, the others under two; their longer uses are in the slow suite."""
    for f, use in itertools.product(CASES, USES):
        for policy in POLICIES if f is mlp else ("min_cut", "nothing"):
            slow = f is not mlp and use not in ("grad", "grad_grad", "vmap_grad")
            name = f"{use}-{f.__name__}-{getattr(policy, '__name__', policy)}"
            yield pytest.param(use, f, policy, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("use,f,policy", list(combinations()))
def test_a_checkpoint_changes_no_number(use, f, policy):
    ours = USES[use](fxfunc.checkpoint(f, policy=policy))(*ARGS)
    torch.testing.assert_close(ours, USES[use](f)(*ARGS), rtol=1e-12, atol=1e-12)


@policies
def test_derivatives_agree_with_torch_func(policy):
    f = fxfunc.checkpoint(mlp, policy=policy)
    torch.testing.assert_close(fxfunc.grad(f, (0, 1))(*ARGS), torch.func.grad(mlp, (0, 1))(*ARGS))
    torch.testing.assert_close(fxfunc.hessian(f, 1)(*ARGS), torch.func.hessian(mlp, 1)(*ARGS))


@policies
def test_ordinary_autograd_around_it(policy):
    w, x = (t.clone().requires_grad_() for t in ARGS)
    grads = torch.autograd.grad(fxfunc.checkpoint(mlp, policy=policy)(w, x), (w, x), create_graph=True)
    second = torch.autograd.grad(grads[1].sin().sum(), (w, x))
    torch.testing.assert_close(grads, fxfunc.grad(mlp, (0, 1))(*ARGS))
    torch.testing.assert_close(second, twice(mlp)(*ARGS))


@pytest.mark.parametrize("policy", ["min_cut", "nothing"])
@pytest.mark.parametrize("use", ["grad", "grad_scan"])
def test_cpp_computes_the_same(use, policy):
    program = fxfunc.jit(USES[use](fxfunc.checkpoint(mlp, policy=policy))).lower(*ARGS).compile(backend="cpp")
    torch.testing.assert_close(program(*ARGS), USES[use](mlp)(*ARGS), rtol=1e-12, atol=1e-12)


@policies
def test_a_cotangent_that_is_zero_is_not_made(policy):
    """0 * inf would be NaN in the gradient of the other output."""
    f = fxfunc.checkpoint(lambda x: (x.sin().sum(), x.sqrt().sum()), policy=policy)
    torch.testing.assert_close(fxfunc.grad(lambda x: f(x)[0])(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("policy", ["min_cut", keeps_gelu])
def test_artifact(policy, tmp_path):
    program = fxfunc.jit(fxfunc.grad(fxfunc.checkpoint(mlp, policy=policy))).lower(*ARGS).compile()
    program.save(tmp_path / "a.fxf")
    torch.testing.assert_close(fxfunc.load(tmp_path / "a.fxf")(*ARGS), fxfunc.grad(mlp)(*ARGS))


def test_a_region_is_written_and_read():
    graph = fxfunc.jit(fxfunc.grad(fxfunc.checkpoint(mlp))).lower(*ARGS).graph
    assert any(n.target is checkpoint for n in graph.nodes)
    assert serial.load(serial.dump(graph, []), []) == graph


# ----- draws ----------------------------------------------------------------------------------------------------------


def dropped(w, x):
    return F.dropout(F.gelu(x @ w[0]), 0.5).sin().sum() + torch.rand_like(x).mul(x).sum()


@pytest.mark.parametrize("policy", ["min_cut", "nothing"])
@pytest.mark.parametrize("use", ["value", "grad", "grad_grad", "jvp"])
def test_random_numbers_are_drawn_once(use, policy):
    """The gradient is that of the mask that the value has, and the stream moves on as without a checkpoint."""

    def run(f):
        torch.manual_seed(3)
        return USES[use](f)(*ARGS), torch.rand(2)

    torch.testing.assert_close(run(fxfunc.checkpoint(dropped, policy=policy)), run(dropped))


@policies
def test_semantics_15_no_draw_comes_twice_in_a_backward(policy):
    def draws(f):
        graph = lowered(fxfunc.jit(fxfunc.grad(f)).lower(*ARGS).graph)
        return [n.target for n in graph.nodes if is_random(n)]

    assert draws(fxfunc.checkpoint(dropped, policy=policy)) == draws(dropped)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_of_examples(randomness):
    f, xs = fxfunc.checkpoint(dropped, policy="nothing"), torch.stack([ARGS[1], ARGS[1]])

    def run(f):
        torch.manual_seed(3)
        return fxfunc.vmap(fxfunc.grad(f, 1), (None, 0), randomness=randomness)(ARGS[0], xs)

    torch.testing.assert_close(run(f), run(dropped))
    with pytest.raises(fxfunc.errors.RandomInVmap):
        fxfunc.vmap(f, (None, 0))(ARGS[0], xs)


# ----- what is kept ---------------------------------------------------------------------------------------------------


def kept(f, policy) -> list[str]:
    """The calls whose results are kept, arguments aside."""
    found = fxfunc.saved_residuals(fxfunc.checkpoint(f, policy=policy), *ARGS)
    return [r.why.split(",")[0] for r in found if r.why != "an argument"]


@cases
def test_min_cut_keeps_less(f):
    found = fxfunc.saved_residuals(fxfunc.checkpoint(f), *ARGS)
    assert found.total < found.plain_total == fxfunc.saved_residuals(f, *ARGS).total


def test_each_policy_keeps_what_it_says():
    assert kept(mlp, "nothing") == []
    assert kept(mlp, "dots") == ["aten.mm.default"] * 3
    assert "aten.mm.default" in kept(looped, "dots") and kept(looped, "nothing") == []
    assert kept(mlp, lambda call: call.target is aten.tanh.default) == ["aten.tanh.default"] * 3


def test_semantics_20_what_compares_is_kept_under_every_policy():
    """SEMANTICS 20: equality of a value computed again with one that was kept may not hold."""
    assert "aten.eq.Tensor" in kept(lambda w, x: (x @ w[0]).amax(1).sum(), "nothing")
    assert [w for w in kept(largest, "nothing") if "max" in w or "eq" in w]


@pytest.mark.parametrize("policy", ["min_cut", "nothing"])
def test_what_a_derivative_compares_inside_of_a_call_is_kept(policy):
    """Views too: the distances are compared with differences of what they were computed from."""

    def farthest(w, x):
        return torch.cdist(x.exp()[:, :3], x.sin()[:, :3], p=float("inf")).sum()

    assert [w for w in kept(farthest, policy) if "cdist" in w or "slice" in w] != []
    checkpointed = fxfunc.checkpoint(farthest, policy=policy)
    torch.testing.assert_close(fxfunc.grad(checkpointed, 1)(*ARGS), fxfunc.grad(farthest, 1)(*ARGS))


def test_residuals_have_names_lines_and_bytes():
    found = fxfunc.saved_residuals(fxfunc.checkpoint(mlp), *ARGS)
    products = [r for r in found if "mm" in r.why]
    assert len(products) == 3 and all("test_remat.py" in r.source for r in products)
    assert all((r.shape, r.dtype, r.bytes) == ((5, 6), torch.float64, 240) for r in products)
    assert found.total == sum(r.bytes for r in found if r.why != "an argument")
    assert 'kept by "min_cut"' in str(found) and "bytes at most" in str(found)


def test_nothing_computed_again_is_merged_with_the_first_time():
    """In the program as run, a product that is not kept is there twice."""

    def products(policy):
        graph = lowered(
            fxfunc.jit(fxfunc.value_and_grad(fxfunc.checkpoint(mlp, policy=policy))).lower(*ARGS).graph
        )
        return sum(n.target is aten.mm.default for n in graph.nodes), sum(
            n.target is barrier for n in graph.nodes
        )

    (dots, _), (nothing, barriers) = products("dots"), products("nothing")
    assert nothing == dots + 3 and barriers


def test_what_is_computed_again_is_computed_late():
    """A block's values live only while the backward is in that block."""

    def blocks(w, x):
        for i in range(3):
            x = fxfunc.checkpoint(lambda x, m: F.gelu(x @ m).exp().sin() @ m, policy="nothing")(x, w[i])
        return x.sum()

    found = fxfunc.saved_residuals(blocks, *ARGS)
    assert found.peak < 0.7 * found.plain_peak and found.total < 0.3 * found.plain_total


def test_a_chain_of_sums_is_not_computed_again_in_one_piece():
    """It would hold every block's result while the backward is in the last one."""

    def blocks(w, x):
        for i, m in enumerate(w):
            x = F.gelu(x @ m) + x if i % 2 else F.silu(x @ m) + x  # so that it is no loop
        return x.square().sum()

    found = fxfunc.saved_residuals(fxfunc.checkpoint(blocks), list(randn(8, 6, 6)), randn(50, 6))
    assert found.peak < 0.6 * found.plain_peak and found.total < 0.5 * found.plain_total


def test_second_order_keeps_less_too():
    ratio = [
        fxfunc.saved_residuals(lambda w, x, f=f: fxfunc.grad(f)(w, x).sin().sum(), *ARGS).total
        for f in (fxfunc.checkpoint(mlp, policy="nothing"), mlp)
    ]
    assert ratio[0] < ratio[1]


def test_writes_happen_once():
    def f(x, state):
        state.add_(x.sum().detach())
        return (x.sin() * state).sum()

    def run(f):
        state = torch.zeros(())
        return fxfunc.grad(f)(torch.ones(3), state), state

    torch.testing.assert_close(run(fxfunc.checkpoint(f)), run(f))


@pytest.mark.parametrize("policy", ["everything", None, 3])
def test_a_policy_that_is_none_is_refused(policy):
    with pytest.raises(fxfunc.errors.TypeOfArgument, match="min_cut"):
        fxfunc.checkpoint(mlp, policy=policy)


def test_the_ways_of_the_benchmark_have_one_gradient():
    example = ([{k: v.double() for k, v in p.items()} for p in residuals.parameters(2, 8)], randn(2, 3, 8))
    expected = fxfunc.grad(residuals.loss)(*example)
    for way in residuals.WAYS:
        torch.testing.assert_close(residuals.gradient(way, example)(), expected)


# ----- cuts -----------------------------------------------------------------------------------------------------------


def network(seed: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Nodes, and edges with their capacities: several between the same two, loops, both directions, no capacity."""
    draw = random.Random(seed)
    n = draw.randint(2, 7)
    return n, [
        (draw.randrange(n), draw.randrange(n), draw.randint(0, 9)) for _ in range(draw.randint(0, 3 * n))
    ]


def brute_force(n, edges) -> tuple[int, set[int]]:
    """The least capacity, and the common part of the sink's sides of all cuts that have it."""
    inner, found = range(1, n - 1), {}
    for size in range(n - 1):
        for some in itertools.combinations(inner, size):
            side = {n - 1, *some}
            cost = sum(c for a, b, c in edges if a not in side and b in side)
            found.setdefault(cost, []).append(side)
    return min(found), set.intersection(*found[min(found)])


@pytest.mark.parametrize("seed", range(0, 400, 100))
def test_a_cut_is_least_and_nearest_to_the_sink(seed):
    for n, edges in map(network, range(seed, seed + 100)):
        net = Network(n)
        for a, b, c in edges:
            net.edge(a, b, c)
        assert net.least_cut(0, n - 1) == brute_force(n, edges)


def test_a_long_chain_needs_no_recursion():
    net = Network(5000)
    for i in range(4999):
        net.edge(i, i + 1, 1 + (i != 4000))
    assert net.least_cut(0, 4999) == (1, set(range(4001, 5000)))


def test_symbolic_sizes_have_some_bytes():
    program = fxfunc.jit(fxfunc.grad(fxfunc.checkpoint(lambda x: (x.sin().exp() @ x.T).sum()))).lower(
        fxfunc.spec(ARGS[1], {0: fxfunc.Dim("N")})
    )
    for rows in (2, 9):
        x = randn(rows, 6)
        expected = torch.func.grad(lambda x: (x.sin().exp() @ x.T).sum())(x)
        torch.testing.assert_close(program.compile()(x), expected)
    assert remat.nbytes(program.graph.inputs[0].meta["val"]) > 0
