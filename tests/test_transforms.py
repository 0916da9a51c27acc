"""The public transforms against torch.func: signatures, structures, modules and nestings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxfunc

F64 = torch.float64
MODES = {"uncompiled": lambda f: f, "jit": fxfunc.jit}
every_mode = pytest.mark.parametrize("mode", MODES)


class Point(namedtuple("Point", "x y")):
    """A namedtuple of the user's own."""


@dataclasses.dataclass
class State:
    """A pytree registered by the user."""

    weight: object
    name: str


pytree.register_pytree_node(
    State,
    lambda s: ([s.weight], s.name),
    lambda leaves, name: State(*leaves, name),
    serialized_type_name="State",
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def same(got, want):
    """Equal structures, numbers, dtypes and shapes."""
    got, want = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert got[1] == want[1]
    for a, b in zip(got[0], want[0], strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
        else:
            assert type(a) is type(b) and a == b


def agree(modes, program, *args, **kwargs):
    """A program over a namespace of transforms gives the same with fxfunc, in these modes, as with torch.func."""
    wanted = program(torch.func, *args, **kwargs)
    for mode in [modes] if isinstance(modes, str) else modes:
        same(MODES[mode](lambda *a, **k: program(fxfunc, *a, **k))(*args, **kwargs), wanted)


X, Y, Z = draw(3), draw(3, seed=1), draw(3, 3, seed=2)
TREE = {"a": X, "b": [Y, (Z,)], "c": Point(X * 2, {"d": Y})}


def total(tree):
    """A scalar in which every tensor of a structure takes part."""
    return sum((x.sin() * x).sum() for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor))


def mixed(x, y, z):
    return (x.sin() @ z @ y.exp()).cos() + (x * y).sum()


# ----- argnums, has_aux, keyword arguments, structures of arguments and results ---------------------------------------

REVERSE = {
    "grad": lambda T, f, **k: T.grad(f, **k),
    "grad_and_value": lambda T, f, **k: T.grad_and_value(f, **k),
    "jacrev": lambda T, f, **k: T.jacrev(f, **k),
    "jacfwd": lambda T, f, **k: T.jacfwd(f, **k),
}


@every_mode
@pytest.mark.parametrize("argnums", [0, 1, 2, -1, -3, (0,), (2, 0), (0, 1, 2), (-1, 0)], ids=str)
@pytest.mark.parametrize("transform", [*REVERSE, "hessian"])
def test_argnums(transform, argnums, mode):
    """torch.func.jacfwd mistakes negative ones (of (-1, 0) it gives the first twice), so it gets them from 0 up."""
    positive = tuple(i % 3 for i in argnums) if isinstance(argnums, tuple) else argnums % 3
    got = MODES[mode](getattr(fxfunc, transform)(mixed, argnums=argnums))(X, Y, Z)
    same(got, getattr(torch.func, transform)(mixed, argnums=positive)(X, Y, Z))


@every_mode
@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.parametrize("argnums", [0, 1, (1, 0), (1,)], ids=str)
@pytest.mark.parametrize(
    "tree",
    [TREE, [X, Z], (X,), OrderedDict(b=X, a=Y), Point(X, Y), {"s": State(X, "n")}, X],
    ids=["nested", "list", "tuple", "OrderedDict", "namedtuple", "registered", "tensor"],
)
def test_structures_of_arguments(transform, argnums, tree, mode):
    f = lambda tree, x: total(tree) * x.sum()
    agree(mode, lambda T, *a: REVERSE[transform](T, f, argnums=argnums)(*a), tree, Y)


AUX = {
    "tensor": lambda x: x * 3,
    "integer tensor": lambda x: (x > 0).sum(),
    "structure": lambda x: {"a": (x.exp(), x.argmax()), "b": [x]},
    "empty": lambda x: (),
}


@every_mode
@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("transform", REVERSE)
def test_has_aux(transform, aux, mode):
    f = lambda x, y: ((x * y).sin().sum(), AUX[aux](x))
    agree(mode, lambda T, *a: REVERSE[transform](T, f, argnums=(0, 1), has_aux=True)(*a), X, Y)


@every_mode
@pytest.mark.parametrize("aux", AUX)
def test_has_aux_of_vjp_and_jvp(aux, mode):
    f = lambda x, y: ({"out": x * y}, AUX[aux](x))

    def vjp(T, x, y):
        out, pullback, extra = T.vjp(f, x, y, has_aux=True)
        return out, pullback({"out": x.cos()}), extra

    agree(mode, vjp, X, Y)
    agree(mode, lambda T, x, y: T.jvp(f, (x, y), (y, x), has_aux=True), X, Y)


def test_plain_values_beside_the_result():
    value, (gradient, aux) = (
        None,
        fxfunc.grad(lambda x: (x.sum(), {"n": 3, "s": "text", "none": None}), has_aux=True)(X),
    )
    same((value, gradient, aux), (None, torch.ones(3, dtype=F64), {"n": 3, "s": "text", "none": None}))


@every_mode
@pytest.mark.parametrize("has_aux", [False, True])
def test_value_and_grad_is_grad_and_value_in_the_order_of_jax(has_aux, mode):
    f = lambda x, y: (mixed(x, y, Z), y * 2) if has_aux else mixed(x, y, Z)
    value, gradient = MODES[mode](lambda *a: fxfunc.value_and_grad(f, (0, 1), has_aux)(*a))(X, Y)
    same((gradient, value), torch.func.grad_and_value(f, (0, 1), has_aux)(X, Y))


@every_mode
@pytest.mark.parametrize("transform", REVERSE)
def test_keyword_arguments(transform, mode):
    """They are passed on and not differentiated; torch.func.jacrev and jacfwd take none."""
    f = lambda x, *, w, tree, flag=False: (x * w).sin().sum() * (2 if flag else 1) * tree["w"].sum()
    keywords = {"w": Y, "tree": {"w": Z}, "flag": True}
    got = MODES[mode](getattr(fxfunc, transform)(f))(X, **keywords)
    same(got, getattr(torch.func, transform)(functools.partial(f, **keywords))(X))


OUTPUTS = {
    "dict": lambda x: {"b": x.sin(), "a": x.sum()},
    "tuple": lambda x: (x.sin(), x.cos()),
    "one in a tuple": lambda x: (x.sin(),),
    "list": lambda x: [x * 2],
    "namedtuple": lambda x: Point(x.exp(), {"n": x.sum()}),
    "registered": lambda x: State(x * x, "kept"),
    "constant": lambda x: Y.clone(),
    "constant beside a result": lambda x: (Y.clone(), x * 2),
    "zero": lambda x: torch.zeros(2, dtype=F64),
    "the input": lambda x: x,
    "the input twice": lambda x: (x, x),
    "a view of the input": lambda x: (x[1:], x.reshape(3, 1)),
    "the same tensor twice": lambda x: [x.sin()] * 2,
    "a closed-over tensor": lambda x: (Y, x.sin()),
    "empty tensor": lambda x: x[:0].sin(),
    "0-d": lambda x: x.sum() ** 2,
}
OF_FUNCTIONS = {
    "vjp": lambda T, f, x: pullbacks(T, f, x),
    "jvp": lambda T, f, x: T.jvp(f, (x,), (x.cos(),)),
    "linearize": lambda T, f, x: pushforwards(T, f, x),
    "jacrev": lambda T, f, x: T.jacrev(f)(x),
    "jacfwd": lambda T, f, x: T.jacfwd(f)(x),
    "vmap": lambda T, f, x: T.vmap(f)(torch.stack([x, x * 2])),
}


def pullbacks(T, f, x):
    """The result of vjp, and of its function called three times."""
    out, pullback = T.vjp(f, x)
    cts = pytree.tree_map(lambda o: torch.ones_like(o), out)
    return out, pullback(cts), pullback(pytree.tree_map(lambda c: c * 2, cts)), pullback(cts)


def pushforwards(T, f, x):
    """The result of linearize, and of its function called twice."""
    out, pushforward = T.linearize(f, x)
    return out, pushforward(x.cos()), pushforward(x)


@every_mode
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("transform", OF_FUNCTIONS)
def test_structures_of_results(transform, output, mode):
    if (transform, output) == ("linearize", "empty tensor"):
        pytest.skip("torch.func.linearize fails")
    agree(mode, lambda T, x: OF_FUNCTIONS[transform](T, OUTPUTS[output], x), X)


@every_mode
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian"])
def test_results_independent_of_an_argument_have_zero_derivatives(transform, mode):
    call = lambda T, f, *a: getattr(T, transform)(f, argnums=(0, 1))(*a)
    agree(mode, lambda T, *a: call(T, lambda x, y: y.sum(), *a), X, Y)
    agree(mode, lambda T, *a: call(T, lambda x, y: Z.sum(), *a), X, Y)


@every_mode
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=str)
def test_one_tensor_in_two_places(argnums, mode):
    f = lambda x, y: (x.sin() * y).sum()
    agree(mode, lambda T, x: T.grad(f, argnums)(x, x), X)
    agree(mode, lambda T, x: T.jacfwd(f, argnums)(x, x), X)
    agree(mode, lambda T, x: T.grad(lambda tree: f(*tree))([x, x]), X)
    agree(mode, lambda T, x: T.jvp(f, (x, x), (x, x)), X)


@every_mode
def test_unused_primals(mode):
    f = lambda x, y: {"a": x * 2, "b": Z.sum()}
    agree(mode, lambda T, x, y: T.jvp(f, (x, y), (y, x)), X, Y)
    agree(mode, lambda T, x, y: T.linearize(f, x, y)[1](y, x), X, Y)
    agree(mode, lambda T, x, y: T.vjp(f, x, y)[1]({"a": y, "b": y.sum()}), X, Y)


@every_mode
def test_none_and_plain_leaves_where_nothing_is_differentiated(mode):
    f = lambda x, other: (x * (1 if other["n"] is None else 2)).sum() * other["k"] * other["t"].sum()
    agree(mode, lambda T, x, t: T.grad(f)(x, {"n": None, "k": 3, "t": t}), X, Y)
    agree(mode, lambda T, x, t: T.vmap(f, (0, None))(x, {"n": None, "k": 3.5, "t": t}), Z, Y)


@every_mode
def test_integer_arguments_beside_differentiated_ones(mode):
    index = torch.tensor([2, 0])
    f = lambda x, i, mask: ((x * x)[i] * mask).sum()
    mask = torch.tensor([True, False])
    agree(mode, lambda T, *a: T.grad(f)(*a), X, index, mask)
    agree(mode, lambda T, *a: T.hessian(f)(*a), X, index, mask)
    agree(mode, lambda T, *a: T.vmap(T.grad(f), (0, None, None))(*a), Z, index, mask)


@every_mode
def test_cotangents_in_the_structure_of_the_result(mode):
    f = lambda x: {"a": (x.sin(), [x.exp()]), "b": x.sum()}

    def program(T, x):
        out, pullback = T.vjp(f, x)
        return [pullback({"a": (x * k, [x + k]), "b": x.sum() * k}) for k in range(3)]

    agree(mode, program, X)


def test_complex_arguments():
    z = torch.complex(X, Y)
    for program in (
        lambda T, z: T.grad(lambda z: (z * z).abs().sum())(z),
        lambda T, z: T.vjp(lambda z: z.sin() * z, z)[1](z),
        lambda T, z: T.jvp(lambda z: z.sin() * z, (z,), (z.conj().resolve_conj(),)),
        lambda T, z: T.vmap(T.grad(lambda z: (z.exp() * z).real))(z),
    ):
        agree("uncompiled", program, z)


# ----- in_dims, out_dims ----------------------------------------------------------------------------------------------

A, B = draw(2, 3, 4), draw(4, 2, 3, seed=3)
IN_DIMS = [  # in_dims, function, arguments
    (0, lambda x, y: x + y, (A, A)),
    (-1, lambda x, y: x * y, (A, A)),
    ((0, -2), lambda x, y: x @ y.mT, (A, draw(3, 2, 4))),
    ((1, None), lambda x, y: x.sum() * y, (A, 2.5)),
    ((2, 0), lambda x, y: x + y, (A, B)),
    (
        ({"p": 0, "q": None}, 1),
        lambda t, y: t["p"] * t["q"] + y,
        ({"p": A, "q": draw(3, 4)}, draw(3, 2, 4)),
    ),
    ((0, [0, (None, -1)]), lambda x, t: x + t[0] * t[1][1].sum() * t[1][0], (A, [A, (3, draw(5, 2))])),
    ((Point(0, None), 0), lambda p, y: p.x * p.y + y, (Point(A, draw(3, 4)), A)),
    ((0, None), lambda x, t: x * t["w"] + t["n"], (A, {"w": draw(4), "n": 1})),
]


@every_mode
@pytest.mark.parametrize("in_dims, f, args", IN_DIMS, ids=[repr(case[0]) for case in IN_DIMS])
def test_in_dims(in_dims, f, args, mode):
    agree(mode, lambda T, *a: T.vmap(f, in_dims)(*a), *args)
    if all(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(args)):
        gradient = lambda T: lambda *a: T.grad(lambda a: total(f(*a)))(a)
        agree(mode, lambda T, *a: T.vmap(gradient(T), in_dims)(*a), *args)


def test_in_dims_may_be_a_list():
    same(fxfunc.vmap(torch.mul, [0, None])(A, A[0]), fxfunc.vmap(torch.mul, (0, None))(A, A[0]))


OUT_DIMS = [
    (0, lambda x: x),
    (1, lambda x: x),
    (-1, lambda x: x),
    (-3, lambda x: x),
    ((0,), lambda x: x.sin()),
    ((1,), lambda x: (x,)),
    ((0, 2), lambda x: (x, x * 2)),
    ([0, 2], lambda x: [x, x * 2]),
    ({"a": 1, "b": (0, -1)}, lambda x: {"a": x, "b": (x, x.sin())}),
    (1, lambda x: {"a": x, "b": (x, x.sin())}),
    (None, lambda x: Y),
    ((0, None), lambda x: (x, Y)),
    (Point(1, 0), lambda x: Point(x, x)),
    (0, lambda x: Y),
    (2, lambda x: x.mT),
]


@every_mode
@pytest.mark.parametrize("out_dims, f", OUT_DIMS, ids=[f"{k} {case[0]!r}" for k, case in enumerate(OUT_DIMS)])
def test_out_dims(out_dims, f, mode):
    agree(mode, lambda T, a: T.vmap(f, out_dims=out_dims)(a), A)
    agree(mode, lambda T, a: T.vmap(f, in_dims=-1, out_dims=out_dims)(a), B)


@every_mode
def test_keyword_arguments_of_vmap_are_not_mapped(mode):
    f = lambda a, b, c: a * b + c["d"] * c["n"]
    agree(mode, lambda T, a, **k: T.vmap(f, 1)(a, **k), Z, b=Z * 2, c={"d": Z.cos(), "n": 2})


@every_mode
def test_nested_maps_over_different_axes(mode):
    f = lambda x, y: x * y.sum()
    agree(mode, lambda T, *a: T.vmap(T.vmap(f, (0, None)), (None, 1), out_dims=1)(*a), A, draw(5, 6))
    agree(mode, lambda T, *a: T.vmap(T.vmap(T.vmap(f, (-1, 0)), (1, None)), (0, None), -1)(*a), A, draw(3, 2))


@every_mode
@pytest.mark.parametrize("n", [0, 1, 2])
def test_lengths_of_a_map(n, mode):
    f = lambda x, w: (x * w).sin().sum()
    agree(mode, lambda T, x, w: T.vmap(T.grad(f), (0, None))(x, w), draw(n, 3), Y)
    agree(mode, lambda T, x, w: T.grad(lambda w: T.vmap(f, (0, None))(x, w).sum())(w), draw(n, 3), Y)


INDEXES = {
    "x[i]": lambda x, i: x[i],
    "x[-i]": lambda x, i: x[-i],
    "x[i, j]": lambda x, i: x[i, i],
    "x[i, :, i]": lambda x, i: x[i, :, i],
    "x[:, i]": lambda x, i: x[:, i],
    "x[..., i]": lambda x, i: x[..., i],
    "x[..., i, None]": lambda x, i: x[..., i, None],
    "x[None, i, 1:]": lambda x, i: x[None, i, 1:],
    "x[1, i]": lambda x, i: x[1, i],
    "x[[0, 2], i]": lambda x, i: x[[0, 2], i],
    "x[i, [0, 2]]": lambda x, i: x[i, [0, 2]],
    "x[[0, 2], i, i]": lambda x, i: x[torch.tensor([0, 2]), i, i],
    "x[i] = 0": lambda x, i: stored(x, i, 0.0),
    "x[i] = tensor": lambda x, i: stored(x, i, x.sum((0, 1))),
    "x[i, i] = tensor": lambda x, i: stored(x, (i, i), x.sum()),
}


def stored(x, index, value):
    y = x.clone()
    y[index] = value
    return y


@every_mode
@pytest.mark.parametrize("index", INDEXES)
def test_0d_integer_tensors_as_indexes(index, mode):
    """The reference is one example at a time: torch.func.vmap has no rule for some."""
    f, xs, i = INDEXES[index], draw(3, 3, 3, 3), torch.tensor([0, 2, 1])
    g = lambda T: lambda x, i: T.grad(lambda x: total(f(x, i)))(x)
    wrap = MODES[mode]
    for mine, theirs in ((f, f), (g(fxfunc), g(torch.func))):
        same(wrap(fxfunc.vmap(mine))(xs, i), torch.stack(list(map(theirs, xs, i))))
        same(wrap(fxfunc.vmap(mine, (None, 0)))(xs[0], i), torch.stack([theirs(xs[0], k) for k in i]))
        same(wrap(fxfunc.vmap(mine, (0, None)))(xs, i[1]), torch.stack([theirs(x, i[1]) for x in xs]))
    agree(mode, lambda T, x, i: T.jacfwd(f)(x, i), xs[0], i[1])
    agree(mode, lambda T, x: g(T)(x, i[1]), xs[0])


@every_mode
@pytest.mark.parametrize(
    "copy", [torch.tensor, torch.ones(1, dtype=F64).new_tensor, lambda x: x.new_tensor(x)]
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_tensor_made_of_a_tensor_is_a_constant(copy, mode):
    """torch 2.11 refuses these inside torch.func, so the reference is written with what they mean."""
    same(MODES[mode](fxfunc.grad(lambda x: (copy(x) * x).sum()))(X), X)
    kept = lambda x: (torch.as_tensor(x) * x + torch.asarray(x) * x).sum()
    same(MODES[mode](fxfunc.grad(kept))(X), 4 * X)


# ----- what may be transformed ----------------------------------------------------------------------------------------


class Callable:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x, y):
        return (x.sin() * y * self.weight).sum()

    def method(self, x, y):
        return self(x, y) ** 2

    @classmethod
    def of_class(cls, x, y):
        return cls(X)(x, y)

    @staticmethod
    def static(x, y):
        return (x * y).sum()


FUNCTIONS = {
    "function": lambda x, y: (x * y).sin().sum(),
    "partial": functools.partial(lambda a, x, y, *, b: (a * x * y * b).sum(), X, b=Y),
    "object": Callable(Y),
    "method": Callable(Y).method,
    "class method": Callable.of_class,
    "static method": Callable.static,
    "builtin": torch.dot,
    "partial of an object": functools.partial(Callable(Z[0])),
    "default argument": lambda x, y, s=Z: (x @ s * y).sum(),
    "nested function": lambda x, y: (lambda z: (z * x).sum())(y.sin()),
}


@every_mode
@pytest.mark.parametrize("name", FUNCTIONS)
def test_kinds_of_functions(name, mode):
    f = FUNCTIONS[name]
    for program in (
        lambda T, x, y: T.grad(f, (0, 1))(x, y),
        lambda T, x, y: T.vmap(f)(torch.stack([x, y]), torch.stack([y, x])),
        lambda T, x, y: T.jvp(f, (x, y), (y, x)),
        lambda T, x, y: T.hessian(f)(x, y),
    ):
        agree(mode, program, X, Y)


def test_a_transformed_function_keeps_its_name():
    def loss(x):
        """Doc."""
        return x.sum()

    for transform in (
        fxfunc.grad,
        fxfunc.vmap,
        fxfunc.jacrev,
        fxfunc.jacfwd,
        fxfunc.hessian,
        fxfunc.jit,
        fxfunc.make_graph,
    ):
        assert (transform(loss).__name__, transform(loss).__doc__) == ("loss", "Doc.")


# ----- modules --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share a weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.linspace(0.1, 0.3, 3, dtype=F64))

    def forward(self, x):
        return self.second(self.first(x).tanh() + self.shift)


def module(name, seed=0):
    torch.manual_seed(seed)
    make = {
        "linear": lambda: nn.Linear(3, 3),
        "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)),
        "tied": Tied,
        "layer norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GELU()),
        "batch norm": lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU()
        ),
        "batch norm in eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
        "dropout in eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).eval(),
    }[name]
    return make().to(F64)


MODULES = ["linear", "mlp", "tied", "layer norm", "batch norm", "batch norm in eval", "dropout in eval"]
DATA = draw(4, 3, seed=7)


@every_mode
@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name, mode):
    net = module(name)
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    params = {k: v.detach() * 1.5 for k, v in params.items()}
    loss = lambda T, p, x: T.functional_call(net, (p, buffers), (x,)).square().sum()
    agree(mode, lambda T, p, x: T.functional_call(net, p, x), params, DATA)
    agree(mode, lambda T, p, x: T.grad(lambda p: loss(T, p, x))(p), params, DATA)
    agree(mode, lambda T, p, x: T.jacfwd(lambda x: loss(T, p, x))(x), params, DATA)
    if name != "batch norm":
        agree(
            mode,
            lambda T, p, x: T.vmap(T.grad(lambda p, x: loss(T, p, x[None])), (None, 0))(p, x),
            params,
            DATA,
        )


@every_mode
@pytest.mark.parametrize("name", ["mlp", "tied", "layer norm", "batch norm in eval"])
def test_stack_module_state(name, mode):
    nets = [module(name, seed) for seed in range(3)]
    base = module(name)
    run = lambda T, p, b, x: T.functional_call(base, (p, b), (x,))
    got, want = fxfunc.stack_module_state(nets), torch.func.stack_module_state(nets)
    same(got, want)
    params, buffers = ({k: v.detach() for k, v in part.items()} for part in got)
    agree(
        mode, lambda T, p, b, x: T.vmap(lambda *a: run(T, *a), (0, 0, None))(p, b, x), params, buffers, DATA
    )
    agree(
        mode,
        lambda T, p, b, x: T.vmap(T.grad(lambda *a: run(T, *a).square().sum()), (0, 0, None))(p, b, x),
        params,
        buffers,
        DATA,
    )


WRITING = {
    "grad": lambda T, f, a, b: T.grad(f)(a, b),
    "grad_and_value": lambda T, f, a, b: T.grad_and_value(f)(a, b),
    "jacrev": lambda T, f, a, b: T.jacrev(f)(a, b),
    "jacfwd": lambda T, f, a, b: T.jacfwd(f)(a, b),
    "grad of grad": lambda T, f, a, b: T.grad(lambda a, b: scalar([T.grad(f)(a, b), b]))(a, b),
    "jacfwd of grad": lambda T, f, a, b: T.jacfwd(T.grad(f))(a, b),
}


@every_mode
@pytest.mark.parametrize("transform", WRITING)
def test_writes_to_arguments_that_are_not_differentiated(transform, mode):
    """Such as running statistics: they happen, once, and the results hold the old values where the function used these."""

    def f(a, b):
        out = (a * b.clone() * a).sum()
        b.mul_(2).add_(a)
        return out + (b * a).sum()

    def program(T, wrap):
        b = Y.clone()
        return wrap(lambda a, b: WRITING[transform](T, f, a, b))(X, b), b

    same(program(fxfunc, MODES[mode]), program(torch.func, lambda f: f))


@every_mode
def test_running_statistics(mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3)).to(F64)
    params = {k: v.detach() for k, v in net.named_parameters()}

    def program(T, wrap):
        buffers = {k: v.clone() for k, v in net.named_buffers()}
        step = wrap(T.grad(lambda p, b, x: (T.functional_call(net, (p, b), (x,)) ** 3).sum()))
        return step(params, buffers, DATA), step(params, buffers, DATA * 2), buffers

    same(program(fxfunc, MODES[mode]), program(torch.func, lambda f: f))


@every_mode
def test_dropout_in_a_map(mode):
    """Each example draws its own mask, and the gradient goes through that mask."""
    drop = nn.Dropout(0.5)
    f = fxfunc.vmap(fxfunc.value_and_grad(lambda x: drop(x).sum()), randomness="different")
    value, gradient = MODES[mode](f)(torch.ones(64, 50, dtype=F64))
    assert set(gradient.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in gradient.tolist()}) > 32
    same(value, gradient.sum(1))


def test_ordinary_parameters_that_require_grad():
    net = module("mlp")
    params = dict(net.named_parameters())
    agree("uncompiled", lambda T, x: T.grad(lambda p: T.functional_call(net, p, x).sum())(params), DATA)


# ----- nestings -------------------------------------------------------------------------------------------------------

W = draw(2, 2, seed=11)


def vector_function(x):
    return (W @ x).sin() * x + x.prod() * x.exp()


def scalar(y):
    """A number of whatever a derivative returns, of which no derivative vanishes."""
    return sum((k + 1) * (t.sin() * t).sum() for k, t in enumerate(pytree.tree_leaves(y)))


LAYERS = {
    "grad": lambda T, f: T.grad(lambda x: scalar(f(x))),
    "vjp": lambda T, f: lambda x: T.vjp(lambda x: scalar(f(x)) * x, x)[1](x.cos())[0],
    "jvp": lambda T, f: lambda x: T.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda T, f: lambda x: T.vmap(f)(torch.stack([x, x.sin(), 2 * x])),
    "jacrev": lambda T, f: T.jacrev(f),
    "jacfwd": lambda T, f: T.jacfwd(f),
    "hessian": lambda T, f: T.hessian(lambda x: scalar(f(x))),
}


def nested(T, layers, f=vector_function):
    """layers[0](layers[1](... f)): the last one is applied first."""
    for name in reversed(layers):
        f = LAYERS[name](T, f)
    return f


@every_mode
@pytest.mark.parametrize("layers", list(itertools.product(LAYERS, repeat=2)), ids=" of ".join)
def test_nestings_of_depth_2(layers, mode):
    agree(mode, lambda T, x: nested(T, layers)(x), draw(2))


def triples():
    """All nestings of depth 3. Of those not marked slow, each two layers meet once in each two places."""
    names = list(LAYERS)
    for layers in itertools.product(names, repeat=3):
        if layers.count("hessian") < 2:  # else of order 5 and 6: nothing new, and minutes in torch.func
            latin = sum(map(names.index, layers)) % len(names) == 0
            yield pytest.param(layers, marks=[] if latin else [pytest.mark.slow], id=" of ".join(layers))


@pytest.mark.parametrize("layers", list(triples()))
def test_nestings_of_depth_3(layers):
    agree(MODES, lambda T, x: nested(T, layers)(x), draw(2))


@pytest.mark.parametrize(
    "layers", list(itertools.product(["grad", "jvp", "vmap"], repeat=3)), ids=" of ".join
)
def test_jit_between_the_layers(layers):
    """A compiled function is an ordinary function to the transforms around it."""
    f = vector_function
    for name in reversed(layers):
        f = fxfunc.jit(LAYERS[name](fxfunc, f))
    same(f(draw(2)), nested(torch.func, layers)(draw(2)))


@every_mode
@pytest.mark.parametrize(
    "second", ["jacfwd of jacrev", "jacrev of jacfwd", "jacrev of jacrev", "jacfwd of jacfwd"]
)
def test_second_order_jacobians_with_argnums(second, mode):
    outer, inner = second.split(" of ")
    f = lambda x, y: {"a": (x * y).sin(), "b": (x @ Z @ y)}

    def program(T, x, y):
        return getattr(T, outer)(getattr(T, inner)(f, argnums=(0, 1)), argnums=(1, 0))(x, y)

    agree(mode, program, X, Y)


def mlp(params, x):
    for w, b in params[:-1]:
        x = (w @ x + b).tanh()
    w, b = params[-1]
    return (w @ x + b).sum()


PARAMS = [(draw(4, 3, seed=1), draw(4, seed=2)), (draw(1, 4, seed=3), draw(1, seed=4))]


@every_mode
def test_hessian_of_an_mlp(mode):
    agree(mode, lambda T, p, x: T.hessian(mlp)(p, x), PARAMS, X)
    agree(mode, lambda T, p, x: T.hessian(mlp, argnums=1)(p, x), PARAMS, X)
    agree(mode, lambda T, p, x: T.vmap(T.hessian(mlp, argnums=1), (None, 0))(p, x), PARAMS, DATA)
    agree(
        mode,
        lambda T, p, x: T.grad(lambda p: scalar(T.vmap(T.hessian(mlp, 1), (None, 0))(p, x)))(p),
        PARAMS,
        DATA,
    )


CHECKED = {
    "grad": lambda x, y: fxfunc.grad(lambda x: mixed(x, y, Z))(x),
    "vmap of grad": lambda x, y: fxfunc.vmap(fxfunc.grad(lambda x, y: (x * y).sin().exp()))(x, y),
    "jvp": lambda x, y: fxfunc.jvp(lambda x: vector_function(x[:2]), (x,), (y,))[1],
    "hessian": lambda x, y: fxfunc.hessian(lambda x: mixed(x, y, Z))(x),
    "inner step": lambda x, y: mixed(x - 0.1 * fxfunc.grad(lambda x: mixed(x, y, Z))(x), y, Z),
}


@every_mode
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck_and_gradgradcheck(name, mode):
    f = MODES[mode](CHECKED[name])
    inputs = (X.clone().requires_grad_(), Y.clone().requires_grad_())
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


# ----- linearize, make_graph, stop_gradient, what is for later --------------------------------------------------------


def test_linearize_does_not_run_the_function_again():
    runs = []

    def f(x):
        runs.append(None)
        return x.sin()

    out, pushforward = fxfunc.linearize(f, X)
    same((out, [pushforward(X), pushforward(Y)]), (X.sin(), [X.cos() * X, X.cos() * Y]))
    assert len(runs) == 1


def test_functions_of_vjp_and_linearize_are_transformed_in_turn():
    agree("uncompiled", lambda T, x: T.vmap(T.vjp(vector_function, x)[1])(Z[:, :2]), draw(2))
    agree("uncompiled", lambda T, x: T.jacrev(lambda c: T.vjp(vector_function, x)[1](c)[0])(x), draw(2))
    agree("uncompiled", lambda T, x: T.vmap(T.linearize(vector_function, x)[1])(Z[:, :2]), draw(2))


def test_make_graph():
    graph = fxfunc.make_graph(fxfunc.grad(lambda x: (x.sin() * Y).sum()))(X)
    assert [n.meta["val"].shape for n in graph.inputs] == [(3,), (3,)]
    assert [n.meta["val"].shape for n in graph.outputs] == [(3,)]
    assert "cos" in str(graph) and "sum" not in str(graph)


@every_mode
def test_stop_gradient(mode):
    f = lambda x: {"a": (x.sin() * fxfunc.stop_gradient({"x": x, "n": 2})["x"]).sum()}["a"]
    detached = lambda x: (x.sin() * x.detach()).sum()
    for transform in ("grad", "jacfwd", "hessian"):
        got = MODES[mode](getattr(fxfunc, transform)(f))(X)
        same(got, getattr(torch.func, transform)(detached)(X))


def test_a_gradient_shares_no_memory_with_what_the_function_reads():
    """Scaling a gradient in place must not change a closure, an argument, a residual or a cotangent."""
    x, c = torch.randn(3), torch.randn(3)
    before = x.clone(), c.clone()
    for g in (
        *fxfunc.grad(lambda x, y: (x * c + y * x).sum(), (0, 1))(x, x),
        fxfunc.grad(lambda x: (x * c).sum())(x),
    ):
        g.mul_(0)
    ones = torch.ones(3)
    _, pull = fxfunc.vjp(lambda x: (x + 1, x * c), x)
    for _ in range(2):
        (g,) = pull((ones, ones * 0))
        torch.testing.assert_close(g, torch.ones(3))
        g.mul_(5)
    torch.testing.assert_close((x, c), before)
