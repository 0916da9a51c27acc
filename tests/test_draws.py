"""Maps that draw random numbers in the C++ backend: the numbers are the eager backend's, and the map is a loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import dropout

import fxfunc
from fxfunc.codegen import cost, cxx
from fxfunc.passes.draws import draws_first
from fxfunc.passes.graph import map_

pytestmark = pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")
X = torch.randn(24, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
W = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

DRAWN = {
    "dropout": lambda w, x: dropout(torch.tanh(x @ w), 0.3).sin().sum(),
    "two dropouts": lambda w, x: dropout(dropout(x, 0.5) @ w, 0.3).sin().sum(),
    "noise of a shape": lambda w, x: (x @ w + torch.randn(5, 3, dtype=x.dtype)).sin().sum(),
    "noise like a result": lambda w, x: (x @ w).sin().add(torch.rand_like(x @ w)).square().sum(),
    "of an input's probabilities": lambda w, x: (x @ (w * torch.bernoulli(w.sigmoid()))).sin().sum(),
}
LATE = {
    "probabilities that are computed": lambda w, x: (torch.bernoulli((x @ w).sigmoid()) * (x @ w)).sum(),
    "in a loop": lambda w, x: fxfunc.scan(
        lambda c, row: (c.sin() + torch.randn(8, dtype=x.dtype) * row, None), x[0], x
    )[0].sum(),
}
TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: fxfunc.grad(f),
    "grad of grad": lambda f: fxfunc.grad(lambda w, x: (fxfunc.grad(f)(w, x) ** 2).sum()),
    "jvp": lambda f: lambda w, x: fxfunc.jvp(lambda w: f(w, x), (w,), (w.cos(),)),
}


def both(f):
    """(results of cpp, of eager, the graph as cpp took it), from one seed."""
    lowered = fxfunc.jit(fxfunc.vmap(f, (None, 0), randomness="different")).lower(W, X)
    with cost.forced(maps="loops"):
        made = [lowered.compile(backend=name) for name in ("cpp", "eager")]
    results = [torch.manual_seed(7) and torch.utils._pytree.tree_leaves(c(W, X)) for c in made]
    return *results, made[0].explain()


@pytest.mark.parametrize(
    "transform",
    [*list(TRANSFORMS)[:2], *(pytest.param(t, marks=pytest.mark.slow) for t in list(TRANSFORMS)[2:])],
)
@pytest.mark.parametrize("name", DRAWN)
def test_examples_read_numbers_that_were_drawn_before_them(name, transform):
    found, wanted, said = both(TRANSFORMS[transform](DRAWN[name]))
    assert "a loop over 24 tasks" in said
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LATE)
def test_a_map_whose_draws_cannot_come_first_is_batched(name):
    found, wanted, said = both(LATE[name])
    assert "draws random numbers" in said
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_draws_are_made_in_the_order_of_the_calls():
    def f(x):
        return torch.rand(()) + 2 * torch.randn(3).sum() + 4 * torch.rand(()) + x.sum()

    graph = fxfunc.jit(fxfunc.vmap(f, randomness="different")).lower(X).graph
    first, second = (n for n in draws_first(graph).nodes if n.target is map_)
    assert [n.target for n in first.args[0].nodes] == [n.target for n in graph.nodes[0].args[0].draws]
    assert not second.args[0].draws
