"""The whole of torch.func's API under its own signatures, and what fxfunc adds to it, held against torch.func."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxfunc
from fxfunc import errors

ADDED = {  # parameters that torch.func does not have
    "hessian": {"has_aux", "chunk_size"},
    "jacfwd": {"chunk_size"},
}


def random(*shape, dtype=torch.float64):
    return torch.randn(
        *shape, dtype=dtype, generator=torch.Generator().manual_seed(math.prod(shape) + len(shape))
    )


X, Y = random(7, 3), random(7, 3)
W = random(3, 5)


def f(x, w=W):
    return {"a": (x.sin() @ w).tanh(), "b": x.sum()}


@pytest.mark.parametrize("name", torch.func.__all__)
def test_every_name_of_torch_func_takes_its_parameters(name):
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (torch.func, fxfunc))
    public = {k: p for k, p in theirs.items() if not k.startswith("_")}
    assert set(ours) - set(public) <= ADDED.get(name, set())
    for key, parameter in public.items():
        mine = ours[key]
        assert (mine.kind, mine.default) == (parameter.kind, parameter.default), key


# ----- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "transform",
    [
        lambda api, c: api.vmap(f, chunk_size=c)(X),
        lambda api, c: api.vmap(lambda x, y, w: ((x * y) @ w, w), (0, 1, None), (1, None), chunk_size=c)(
            X, Y.t(), W
        ),
        lambda api, c: api.vmap(api.grad(lambda x: f(x)["a"].sum()), chunk_size=c)(X),
        lambda api, c: api.grad(lambda w: api.vmap(lambda x: f(x, w)["a"], chunk_size=c)(X).sin().sum())(W),
        lambda api, c: api.jvp(api.vmap(lambda x: f(x)["a"], chunk_size=c), (X,), (Y,)),
        lambda api, c: api.vmap(api.vmap(lambda x, y: x * y.sin(), chunk_size=c), (1, 1))(X, Y),
        lambda api, c: api.jacrev(f, chunk_size=c)(X[0]),
        lambda api, c: api.jacrev(lambda x, w: f(x, w)["a"], (0, 1), chunk_size=c)(X[0], W),
        lambda api, c: api.vmap(api.jacrev(f, chunk_size=c))(X),
        lambda api, c: api.jacrev(lambda x: (f(x), x.cos()), has_aux=True, chunk_size=c)(X[0]),
    ],
)
def test_chunks_change_nothing_but_memory(transform, chunk):
    with torch.no_grad():
        torch.testing.assert_close(transform(fxfunc, chunk), transform(torch.func, None))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_columns_and_of_hessians(chunk):
    scalar = lambda x, w: (x @ w).tanh().prod()
    torch.testing.assert_close(fxfunc.jacfwd(f, chunk_size=chunk)(X[0]), torch.func.jacfwd(f)(X[0]))
    torch.testing.assert_close(
        fxfunc.hessian(scalar, (0, 1), chunk_size=chunk)(X[0], W), torch.func.hessian(scalar, (0, 1))(X[0], W)
    )


def test_chunks_are_what_bounds_the_memory():
    big = lambda x: torch.zeros(1000, dtype=x.dtype).add(x).sin().sum()
    graph = fxfunc.make_graph(fxfunc.vmap(big, chunk_size=2))(random(9))
    assert "scan" in str(graph) and "length=4" in str(graph)


@pytest.mark.parametrize(
    "transform", [fxfunc.vmap, fxfunc.jacrev, fxfunc.jacfwd, fxfunc.hessian, fxfunc.jacobian]
)
@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_chunk_size_is_a_number_above_zero(transform, chunk):
    with pytest.raises(ValueError, match="chunk_size"):
        transform(f, chunk_size=chunk)


# ----- randomness="same" ------------------------------------------------------------------------------------------------

DRAWS = {
    "rand": lambda x: x + torch.rand(3, dtype=x.dtype),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(),
    "normal_": lambda x: x + torch.empty_like(x).normal_(),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "two": lambda x: torch.rand(3, dtype=x.dtype) * x + torch.randn_like(x),
    "of a draw": lambda x: x + torch.bernoulli(torch.rand(3, dtype=x.dtype)),
    "randperm": lambda x: x + torch.randperm(3),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_same_draws_once_for_all_examples(draw, chunk):
    ones = torch.ones(7, 3, dtype=torch.float64)
    out = fxfunc.vmap(DRAWS[draw], randomness="same", chunk_size=chunk)(ones)
    assert (out == out[0]).all()
    torch.manual_seed(1)
    out = fxfunc.vmap(DRAWS[draw], randomness="same", chunk_size=chunk)(X)
    torch.manual_seed(1)
    torch.testing.assert_close(out, torch.func.vmap(DRAWS[draw], randomness="same")(X))


@pytest.mark.parametrize("draw", DRAWS)
def test_same_draws_give_the_derivative_at_what_was_drawn(draw):
    def loss(api, x):
        return api.vmap(DRAWS[draw], randomness="same")(x).sin().sum()

    torch.manual_seed(3)
    ours = fxfunc.grad(lambda x: loss(fxfunc, x))(X)
    torch.manual_seed(3)
    theirs = torch.func.grad(lambda x: loss(torch.func, x))(X)
    torch.testing.assert_close(ours, theirs)


def test_same_inside_different_is_the_same_within_each():
    ones = torch.ones(4, 7, 3, dtype=torch.float64)
    inner = lambda x: fxfunc.vmap(DRAWS["rand"], randomness="same")(x)
    out = fxfunc.vmap(inner, randomness="different")(ones)
    assert (out == out[:, :1]).all() and not (out[1:] == out[:-1]).any()


def test_same_refuses_a_distribution_that_differs_by_example():
    with pytest.raises(errors.RandomInVmap, match="differs by example"):
        fxfunc.vmap(torch.bernoulli, randomness="same")(X.sigmoid())


def test_jacfwd_draws_once_for_all_columns():
    columns = fxfunc.jacfwd(lambda x: x * torch.rand(3, dtype=x.dtype), randomness="same")(X[0])
    assert (columns - torch.diag(columns.diagonal())).abs().max() == 0


# ----- jvp, vjp, linearize --------------------------------------------------------------------------------------------


def test_strict_jvp_refuses_an_output_without_a_tangent():
    g = lambda x: (x.sin(), torch.ones(2))
    with pytest.raises(RuntimeError, match="output 1 does not depend"):
        fxfunc.jvp(g, (X,), (Y,), strict=True)
    torch.testing.assert_close(
        fxfunc.jvp(torch.sin, (X,), (Y,), strict=True), torch.func.jvp(torch.sin, (X,), (Y,), strict=True)
    )


def test_a_vjp_can_be_used_again_with_and_without_its_keywords():
    out, pull = fxfunc.vjp(f, X[0])
    ct = {"a": torch.ones(5, dtype=X.dtype), "b": torch.tensor(2.0, dtype=X.dtype)}
    first = pull(ct)
    for again in (pull(ct, True, None), pull(ct, retain_graph=False), pull(cotangents=ct, create_graph=True)):
        torch.testing.assert_close(again, first)
    with pytest.raises(TypeError):
        pull(ct, unknown=1)


def test_create_graph_false_gives_constants():
    x = X[0].clone().requires_grad_()
    _, pull = fxfunc.vjp(torch.sin, x)
    assert pull(torch.ones_like(x))[0].requires_grad
    assert not pull(torch.ones_like(x), create_graph=False)[0].requires_grad


@pytest.mark.parametrize("n", [1, 2])
def test_hvp_is_the_hessian_times_a_vector(n):
    scalar = lambda x, w=W: (x @ w).tanh().prod()
    primals, tangents = (X[0], W)[:n], (Y[0], random(3, 5))[:n]
    ours = fxfunc.hvp(scalar, primals, tangents)
    theirs = torch.func.jvp(torch.func.grad(scalar, tuple(range(n))), primals, tangents)[1]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        fxfunc.vmap(lambda x: fxfunc.hvp(scalar, (x,), (Y[0],))[0])(X),
        torch.stack([torch.func.hessian(scalar)(x) @ Y[0] for x in X]),
    )


def _steps(x):
    for _ in range(5):
        x = x.cumsum(1).sin()
    return x


LINEAR = {
    "product": (lambda x: x @ W, (X,)),
    "views": (lambda x: x.t().flip(0).cumsum(1)[1:], (X,)),
    "two": (lambda x, y: {"s": 2 * x - y.roll(1), "t": y.sum(0)}, (X, Y)),
    "complex": (lambda x: x * (1 + 2j), (torch.complex(X, Y),)),
    "mapped": (lambda x: fxfunc.vmap(lambda r: r @ W)(x), (X,)),
    "tangent of a loop": (lambda t: fxfunc.jvp(_steps, (Y,), (t,))[1], (X,)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_transpose_is_the_transpose(case):
    function, primals = LINEAR[case]
    out = function(*primals)
    ct = torch.utils._pytree.tree_map(torch.randn_like, out)
    shares = fxfunc.linear_transpose(function, *primals)(ct)
    assert isinstance(shares, tuple) and len(shares) == len(primals)
    leaves = torch.utils._pytree.tree_leaves
    ahead = sum((c * o).sum() for c, o in zip(leaves(ct), leaves(out), strict=True))
    back = sum((s * p).sum() for s, p in zip(shares, primals, strict=True))
    torch.testing.assert_close(ahead, back)


def test_a_transpose_composes():
    square = lambda w: (
        fxfunc.linear_transpose(lambda x: x @ w, X)(torch.ones(7, 5, dtype=X.dtype))[0].pow(2).sum()
    )
    torch.testing.assert_close(
        fxfunc.grad(square)(W),
        torch.func.grad(lambda w: (torch.ones(7, 5, dtype=X.dtype) @ w.t()).pow(2).sum())(W),
    )
    doubled = fxfunc.vmap(lambda ct: fxfunc.linear_transpose(lambda x: 2 * x, X[0])(ct)[0])(X)
    torch.testing.assert_close(doubled, 2 * X)


@pytest.mark.parametrize("function", [torch.sin, lambda x: x * x, lambda x: x.abs()])
def test_only_a_linear_function_has_a_transpose(function):
    with pytest.raises(errors.NotLinear, match="not linear"):
        fxfunc.linear_transpose(function, X)


# ----- jacobians ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("shapes", [((3,), (3, 5)), ((2, 3), (3, 40)), ((40, 3), (3, 2))])
def test_every_mode_gives_the_jacobian(mode, shapes):
    x, w = (random(*shape) for shape in shapes)
    g = lambda x, w: ((x @ w).tanh(), x.sum())
    torch.testing.assert_close(
        fxfunc.jacobian(g, (0, 1), mode=mode)(x, w), torch.func.jacrev(g, (0, 1))(x, w)
    )


@pytest.mark.parametrize("size, transposes", [((1, 50), False), ((50, 1), True)])
def test_auto_takes_the_shorter_way(size, transposes):
    w = random(*size)
    graph = fxfunc.make_graph(fxfunc.jacobian(lambda x: (x.sin() @ w).tanh()))(random(size[0]))
    reverse = fxfunc.make_graph(fxfunc.jacrev(lambda x: (x.sin() @ w).tanh()))(random(size[0]))
    assert (str(graph) == str(reverse)) == transposes


def test_auto_means_what_jacrev_means_under_no_grad():
    def g(x):
        with torch.no_grad():
            c = x.sum()
        return x.sum() * c * torch.ones(5, dtype=x.dtype)

    torch.testing.assert_close(fxfunc.jacobian(g)(X[0]), torch.func.jacrev(g)(X[0]))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian", "jacobian"])
def test_jacobians_have_aux(transform):
    g = lambda x: ((x.sin() @ W).tanh().sum(), {"x": x, "n": 3})
    found, aux = getattr(fxfunc, transform)(g, has_aux=True)(X[0])
    expected = getattr(fxfunc, transform)(lambda x: g(x)[0])(X[0])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(aux, {"x": X[0], "n": 3})


def test_value_and_jacrev():
    value, jacobian = fxfunc.value_and_jacrev(f)(X[0])
    torch.testing.assert_close(value, f(X[0]))
    torch.testing.assert_close(jacobian, torch.func.jacrev(f)(X[0]))
    (value, aux), jacobian = fxfunc.value_and_jacrev(lambda x: (x.sin(), x.cos()), has_aux=True)(X[0])
    torch.testing.assert_close((value, aux), (X[0].sin(), X[0].cos()))


@pytest.mark.parametrize("mode", ["fwd", None, 1])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match="mode"):
        fxfunc.jacobian(f, mode=mode)


# ----- functionalize --------------------------------------------------------------------------------------------------


def writes(x):
    y = x.sin()
    y[0].add_(1)
    x.mul_(2)
    return y.view(-1)[1:], x.t().sum()


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalize_keeps_what_a_function_does(remove):
    ours, theirs = X.clone(), X.clone()
    torch.testing.assert_close(
        fxfunc.functionalize(writes, remove=remove)(ours),
        torch.func.functionalize(writes, remove=remove)(theirs),
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_a_functionalized_function_writes_to_nothing_but_its_inputs(remove):
    graph = make_fx(fxfunc.functionalize(writes, remove=remove))(X.clone()).graph
    calls = [n.target for n in graph.nodes if n.op == "call_function"]
    assert {op for op in calls if op._schema.is_mutable} == {torch.ops.aten.copy_.default}
    if remove == "mutations_and_views":
        assert not [op for op in calls if op.is_view]


def test_functionalize_nests():
    g = lambda x: fxfunc.functionalize(lambda x: x.clone().mul_(x).sum())(x)
    torch.testing.assert_close(fxfunc.grad(g)(X), 2 * X)
    torch.testing.assert_close(fxfunc.vmap(g)(X), (X * X).sum(1))


def test_functionalize_refuses_what_it_cannot_remove():
    with pytest.raises(RuntimeError, match="remove"):
        fxfunc.functionalize(f, remove="views")


# ----- the rest of torch.func -----------------------------------------------------------------------------------------


def test_rearrange_in_transforms():
    g = lambda api: lambda x: api.rearrange(x.sin(), "(a b) c -> c b a", a=2).cumsum(0).prod(0).sum()
    x = random(6, 3)
    torch.testing.assert_close(fxfunc.rearrange(x, "a b -> b a"), x.t())
    torch.testing.assert_close(fxfunc.grad(g(fxfunc))(x), torch.func.grad(g(torch.func))(x))
    xs = random(4, 6, 3)
    torch.testing.assert_close(fxfunc.vmap(g(fxfunc))(xs), torch.func.vmap(g(torch.func))(xs))


def test_debug_unwrap():
    assert fxfunc.debug_unwrap(X) is X
    with pytest.raises(errors.ValueDependent, match="debug_unwrap"):
        fxfunc.vmap(fxfunc.debug_unwrap)(X)


def test_batch_norms_without_running_statistics_can_be_mapped():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    assert fxfunc.replace_all_batch_norm_modules_(net) is net
    params = dict(net.named_parameters())
    loss = lambda api: lambda p, x: api.functional_call(net, p, (x,)).sin().sum()
    xs = random(4, 7, 3)
    torch.testing.assert_close(
        fxfunc.vmap(fxfunc.grad(loss(fxfunc)), (None, 0))(params, xs),
        torch.func.vmap(torch.func.grad(loss(torch.func)), (None, 0))(params, xs),
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x, *, scale=1.0):
        return self.second(self.first(x).tanh()) * scale


@pytest.mark.parametrize("tie", [True, False])
def test_functional_call_ties_weights_or_does_not(tie):
    net, x = Tied(), random(3, dtype=torch.float32)
    loss = lambda api: (
        lambda w: api.functional_call(
            net, ({"first.weight": w}, {"first.bias": torch.ones(3)}), (x,), {"scale": 2.0}, tie_weights=tie
        ).sum()
    )
    w = random(3, 3, dtype=torch.float32)
    torch.testing.assert_close(fxfunc.grad(loss(fxfunc))(w), torch.func.grad(loss(torch.func))(w))
    with pytest.raises(RuntimeError):
        fxfunc.functional_call(net, {"first.weight": w}, (x,), strict=True)
