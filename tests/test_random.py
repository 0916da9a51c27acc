"""Random draws under vmap and in derivatives: one draw an example, moments, exact gradients given what was drawn."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fxfunc
from fxfunc.passes.graph import is_random
from fxfunc.passes.rules import ROWS

N = 100_000
HALF = torch.full((N,), 0.5)
ONES = torch.ones(N)
# name -> (draw like x of shape [N], mean, variance)
DRAWS = {
    "rand": (lambda x: torch.rand(N), 0.5, 1 / 12),
    "rand_like": (torch.rand_like, 0.5, 1 / 12),
    "randn": (lambda x: torch.randn(N), 0, 1),
    "randn_like": (torch.randn_like, 0, 1),
    "randint": (lambda x: torch.randint(10, (N,)).float(), 4.5, 99 / 12),
    "randint_low": (lambda x: torch.randint(2, 6, (N,)).float(), 3.5, 15 / 12),
    "randint_like": (lambda x: torch.randint_like(x, 10), 4.5, 99 / 12),
    "normal": (lambda x: torch.normal(x + 2, 3.0), 2, 9),
    "normal_std": (lambda x: torch.normal(2.0, x + 3), 2, 9),
    "normal_both": (lambda x: torch.normal(x + 2, x + 3), 2, 9),
    "normal_size": (lambda x: torch.normal(2.0, 3.0, (N,)), 2, 9),
    "normal_": (lambda x: x.clone().normal_(2, 3), 2, 9),
    "uniform_": (lambda x: x.clone().uniform_(2, 4), 3, 4 / 12),
    "exponential_": (lambda x: x.clone().exponential_(2), 0.5, 0.25),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.3), 0.3, 0.21),
    "bernoulli_p": (lambda x: torch.bernoulli(x, 0.3), 0.3, 0.21),
    "bernoulli_": (lambda x: x.clone().bernoulli_(0.3), 0.3, 0.21),
    "poisson": (lambda x: torch.poisson(x + 3), 3, 3),
    "multinomial": (lambda x: torch.multinomial(x[:2] + 1, N, replacement=True).float(), 0.5, 0.25),
    "randperm": (lambda x: torch.randperm(N).float() / N, 0.5, 1 / 12),
    "dropout": (lambda x: F.dropout(x + 1, 0.25), 1, 1 / 3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_semantics_15_each_example_draws_its_own_numbers(name):
    draw, mean, variance = DRAWS[name]
    torch.manual_seed(0)
    x = torch.zeros(3, N)
    found = fxfunc.vmap(draw, randomness="different")(x)
    expected = torch.func.vmap(draw, randomness="different")(x)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    for row in found.double():
        assert abs(row.mean() - mean) <= 5 * math.sqrt(variance / N)
        spread = row.var() - variance
        assert abs(spread) <= 5 * ((row - row.mean()) ** 2).std() / math.sqrt(N) + 1e-4
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert abs(torch.corrcoef(found.double())[0, 1]) <= 5 / math.sqrt(N)


ROW_ARGUMENTS = {
    **{"size": [N // 5], "n": N // 5, "num_samples": N // 5, "replacement": True, "p": 0.3, "train": True},
    **{
        "low": 2,
        "high": 900,
        "from": 2,
        "to": 900,
        "median": 1.0,
        "sigma": 2.0,
        "lambd": 1.5,
        "mean": 2.0,
        "std": 0.1,
    },
}


def _one_draw(op, x):
    """A random op at a vector: of its tensor arguments, each is `x`; other arguments by their names."""

    def value(a):
        return x if str(a.type) == "Tensor" else ROW_ARGUMENTS[a.name]

    given = [a for a in op._schema.arguments if not a.has_default_value() or a.name in ROW_ARGUMENTS]
    keywords = {a.name: None for a in given if a.kwarg_only}  # generators
    out = op(*(value(a) for a in given if not a.kwarg_only), **keywords)
    return out[0] if isinstance(out, tuple) else out


def _distance(a, b) -> float:
    """Of two empirical distributions: the largest difference of their distribution functions (Kolmogorov, Smirnov)."""
    both = torch.cat([a, b]).unique()
    below = [torch.searchsorted(v.sort()[0], both, right=True) / len(v) for v in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("op", [op for op in ROWS if is_random(op)], ids=str)
def test_semantics_15_a_row_draws_for_each_example(op):
    torch.manual_seed(0)
    x = torch.linspace(0.01, 0.99, N // 5) ** torch.tensor([[1.0], [3.0], [9.0]])
    found = fxfunc.vmap(lambda x: _one_draw(op, x), randomness="different")(x)
    for i in range(3):
        alone = _one_draw(op, x[i])
        assert found[i].shape == alone.shape and found.dtype == alone.dtype
        assert _distance(found[i].double(), alone.double()) <= 2.5 * math.sqrt(2 / alone.numel())
        assert not torch.equal(found[i], found[i - 1])


@pytest.mark.parametrize("name", DRAWS)
def test_semantics_15_a_draw_needs_a_vmap_that_says_what_it_means(name):
    with pytest.raises(fxfunc.errors.RandomInVmap, match=r"test_random.py.*randomness"):
        fxfunc.vmap(DRAWS[name][0])(torch.zeros(3, N))


@pytest.mark.parametrize("name", ["randn_like", "randperm", "multinomial", "dropout", "bernoulli"])
def test_semantics_15_nested_vmaps_draw_for_each_pair(name):
    draw = DRAWS[name][0]
    torch.manual_seed(0)
    found = fxfunc.vmap(fxfunc.vmap(draw, randomness="different"), randomness="different")(
        torch.zeros(2, 2, N)
    )
    rows = found.reshape(4, N)
    assert all(not torch.equal(rows[i], rows[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("dropout", [F.dropout, lambda v, p: torch.ops.aten.native_dropout(v, p, True)[0]])
def test_semantics_15_gradients_are_exact_given_what_was_drawn(dropout):
    """The mask of the value is the mask of the gradient, for each example, at first and second order."""
    x = torch.linspace(1, 2, 40, dtype=torch.float64).reshape(4, 10)

    def f(v):
        y = dropout(v, 0.5)
        return (y**3).sum(), y

    torch.manual_seed(0)
    g, y = fxfunc.vmap(fxfunc.grad(f, has_aux=True), randomness="different")(x)
    assert torch.allclose(g, 3 * y**2 * (y / x), rtol=1e-12)
    second = lambda v: fxfunc.grad(lambda u: (fxfunc.grad(f, has_aux=True)(u)[0]).sum())(v)
    assert set(torch.unique((second(x[0]) / x[0]).round(decimals=6)).tolist()) == {0.0, 48.0}


def test_semantics_15_draws_follow_the_generator_and_move_it():
    f = fxfunc.jit(lambda v: F.dropout(v, 0.5) + torch.randn_like(v))
    x = torch.ones(50)
    torch.manual_seed(3)
    first, second = f(x), f(x)
    torch.manual_seed(3)
    assert torch.equal(f(x), first) and torch.equal(f(x), second) and not torch.equal(first, second)


def test_semantics_15_an_unused_draw_still_moves_the_stream():
    def f(v):
        torch.randn(7)
        return v + torch.randn(3)

    torch.manual_seed(0)
    found = fxfunc.jit(f)(torch.zeros(3))
    torch.manual_seed(0)
    assert torch.equal(found, f(torch.zeros(3)))


def test_semantics_15_a_jacobian_is_that_of_one_draw():
    f = lambda v: v * torch.rand(3)
    for transform in (fxfunc.jacfwd, fxfunc.hessian):
        with pytest.raises(fxfunc.errors.RandomInVmap):
            transform(f if transform is fxfunc.jacfwd else lambda v: (f(v) ** 2).sum())(torch.ones(3))
    torch.manual_seed(0)
    found = fxfunc.jacfwd(f, randomness="different")(torch.ones(3))
    torch.manual_seed(0)
    assert torch.equal(found, torch.diag(torch.rand(3)))
