"""Rewrites as pairs (before, after) of which the answer is the same, and the verifier."""

from __future__ import annotations

import math

import pytest
import torch

import fxfunc
from fxfunc.passes import dims, errors
from fxfunc.passes.graph import Graph
from fxfunc.passes.linearize import linearize
from fxfunc.passes.pipeline import for_aten, lowered
from fxfunc.passes.verify import verify

A = torch.tensor([[1.5, -0.0, math.inf], [math.nan, -2.0, 0.0]], dtype=torch.float64)
S = torch.tensor([[0.5, -1.0], [2.0, 3.0]], dtype=torch.float64)


def ops(f, *args, backend=lambda g: g) -> list[str]:
    """The calls left of a function, in order, without their namespace."""
    graph = backend(lowered(fxfunc.make_graph(f)(*args)))
    return [str(n.target).split("aten.")[-1] for n in graph.nodes]


def same(f, *args) -> None:
    """The compiled answer is that of torch, special values and signs of zero included."""
    ours, theirs = fxfunc.jit(f)(*args), f(*args)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(ours.isnan(), theirs.isnan())
    kept = ~theirs.isnan()
    assert torch.equal(ours[kept], theirs[kept])
    assert torch.equal(torch.signbit(ours)[kept], torch.signbit(theirs)[kept])


def filled(like, number: float, *shape):
    """A tensor of one number."""
    return torch.full(shape, number, dtype=like.dtype)


# before -> what is left of it
SIMPLER = {
    "x*1": (lambda a: (a * 1).sin(), ["sin.default"]),
    "x/1": (lambda a: (a / 1).sin(), ["sin.default"]),
    "x**1": (lambda a: (a**1).sin(), ["sin.default"]),
    "x**2": (lambda a: a**2, ["mul.Tensor"]),
    "--x": (lambda a: a.neg().neg().sin(), ["sin.default"]),
    "x*-1": (lambda a: a * -1, ["neg.default"]),
    "x*c*d": (lambda a: a * 2.0 * 4.0, ["mul.Tensor"]),
    "-x*c": (lambda a: -a * 2.0, ["mul.Tensor"]),
    "a+-b": (lambda a: a.sin() + -a, ["sin.default", "sub.Tensor"]),
    "-a+b": (lambda a: -a + a.sin(), ["sin.default", "sub.Tensor"]),
    "x*full": (lambda a: a * torch.full((2, 3), 2.0, dtype=a.dtype), ["mul.Tensor"]),
    "full+full": (lambda a: a * (filled(a, 2.0, 2, 3) + filled(a, 3.0, 3)), ["mul.Tensor"]),
    "views": (lambda a: a.reshape(6).reshape(3, 2).t().t().reshape(2, 3).sin(), ["sin.default"]),
    "expand": (lambda a: a.sin()[None].expand(4, 2, 3) * 2.0 + 0.0, None),
    "cse": (lambda a: a.sin() * a.sin(), ["sin.default", "mul.Tensor"]),
    "dead": (lambda a: (a.cos(), a.sin())[1], ["sin.default"]),
    "cast": (lambda a: a.to(torch.float64).double().sin(), ["sin.default"]),
    "sum of one": (lambda a: a[1:].sum(0).sin(), ["slice.Tensor", "reshape.default", "sin.default"]),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_rewrite_leaves_less_and_the_same_answer(name):
    f, left = SIMPLER[name]
    same(f, A)
    if left is not None:
        assert ops(f, A) == left


@pytest.mark.parametrize(
    "f",
    [
        lambda a: a * 0,  # inf * 0 is nan
        lambda a: a + 0.0,  # -0.0 + 0.0 is 0.0
        lambda a: a - a,
        lambda a: a / a,
        lambda a: 0 / a,
        lambda a: a * 0.0 + 1,
        lambda a: a**0,
        lambda a: torch.where(a > 0, a, a),
        lambda a: (a * 1e200) * 1e-200,
        lambda a: (a * 1e300) * 1e300,
        lambda a: a.to(torch.float32).to(torch.float64),
        lambda a: -(a - a.sin()),
        lambda a: 0.0 - a,
        lambda a: a * (filled(a, -0.0, 3) + filled(a, -0.0, 3)),
        lambda a: a + (filled(a, 1e308, 3) + filled(a, 1e308, 3)),
        lambda a: a + torch.add(filled(a, 1.0, 3), filled(a, 2.0, 3), alpha=0.5),
        lambda a: a.bfloat16() + (filled(a.bfloat16(), 0.1, 3) + filled(a.bfloat16(), 0.2, 3)),
    ],
)
def test_no_rewrite_changes_special_values(f):
    same(f, A)


@pytest.mark.parametrize(
    "other", [torch.tensor([4, 5]), torch.tensor([0.5, -3.0]), torch.tensor([True, False])]
)
def test_a_sign_moves_only_within_one_dtype(other):
    """-x of uint8 is 256 - x in a wider dtype, and bool tensors cannot be subtracted."""
    x = torch.tensor([1, 2], dtype=torch.uint8)
    f = lambda x, y: (-x * y, y * -x, y + -x, -x + y, -x * 2.5, -x * 3, y + -x.to(torch.float32))
    for ours, theirs in zip(fxfunc.jit(f)(x, other), f(x, other), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_semantics_23_numbers_of_different_types_are_different_calls():
    """1, 1.0 and True are equal in Python and are not in ATen."""
    f = lambda i: (i * 1, i * 1.0, i * True, i + 2, i + 2.0)
    i = torch.arange(3)
    for ours, theirs in zip(fxfunc.jit(f)(i), f(i), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_call_with_its_operands_exchanged_is_the_same_call_where_that_commutes():
    f = lambda a, b: (a * b + b * a, a + b, b + a, a - b, b - a)
    a, b = torch.randn(3, dtype=torch.float64), torch.randn(2, 3)
    left = ["mul.Tensor", *["add.Tensor"] * 2, *["sub.Tensor"] * 2]
    assert sorted(ops(f, a, b)) == sorted(left)
    for ours, theirs in zip(fxfunc.jit(f)(a, b), f(a, b), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "f,left",
    [
        (lambda a: a @ a + a, ["addmm.default"]),
        (lambda a: a.sin() - a * 0.5, ["sin.default", "sub.Tensor"]),
        (lambda a: a.sin() + a * 0.5, ["sin.default", "add.Tensor"]),
    ],
)
def test_peephole_joins_neighbours(f, left):
    assert ops(f, S, backend=for_aten) == left
    torch.testing.assert_close(fxfunc.jit(f)(S), f(S), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    "f, left",
    [
        (lambda a: (a.mT @ a.sin()).mT, ["sin.default", "permute.default", "mm.default"]),
        (lambda a: (a @ a.sin()).mT, ["sin.default", *["permute.default"] * 2, "mm.default"]),
        (lambda a: ((p := a @ a).mT, p), ["mm.default", "permute.default"]),
        (lambda a: ((p := a @ a).mT, p.sin()), ["mm.default", "permute.default", "sin.default"]),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_product_that_is_read_transposed_is_made_so(f, left, batched):
    f, x = (fxfunc.vmap(f), torch.randn(3, 4, 4, dtype=torch.float64)) if batched else (f, S)
    assert sorted(ops(f, x, backend=for_aten)) == sorted(
        op.replace("mm", "bmm") if batched else op for op in left
    )
    torch.testing.assert_close(fxfunc.jit(f)(x), f(x))


SQUARE, SIDES, BATCH = (5, 5), ((5, 3), (3, 5)), ((4, 5, 3), (4, 3, 5))


@pytest.mark.parametrize(
    "f, shapes, left",
    [
        (lambda a, b: (a @ b).diagonal(), SIDES, ["mul", "sum"]),
        (lambda a, b: (a @ b).trace(), SIDES, ["mul", "sum", "sum"]),
        (lambda a, b: (a @ b).mT.diagonal().sin(), SIDES, ["mul", "sum", "sin"]),
        (fxfunc.vmap(lambda a, b: (a @ b).trace()), BATCH, ["mul", "sum", "sum"]),
        (fxfunc.vmap(lambda a, b: (a @ b).trace(), (0, None)), (BATCH[0], SIDES[1]), ["mul", "sum", "sum"]),
        (fxfunc.vmap(lambda a, b: (b @ a).trace(), (0, None)), (BATCH[1], SIDES[0]), ["mul", "sum", "sum"]),
        (lambda a, b: (a @ b).diagonal(1), SIDES, ["mm", "diagonal"]),
        (lambda a, b: (b @ a.mT).diagonal(), ((4, 3), (5, 3)), ["mm", "diagonal"]),  # not square
        (lambda a, b: (a + b).diagonal(), (SQUARE, SQUARE), ["add", "diagonal"]),
        (lambda a, b: (a @ b).diagonal(dim1=0, dim2=1), BATCH, ["bmm", "diagonal"]),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_the_diagonal_of_a_product_needs_no_product(f, shapes, left, backend):
    torch.manual_seed(0)
    args = [torch.randn(s, dtype=torch.float64) for s in shapes]
    found = [op.split(".")[0] for op in ops(f, *args)]
    assert [op for op in found if op not in ("reshape", "permute")] == left
    torch.testing.assert_close(fxfunc.jit(f).lower(*args).compile(backend=backend)(*args), f(*args))


MANY, ONE = (3, 64, 96), (96, 48)  # matrices [3, 64, 96], of which each has a large product with one [96, 48]


@pytest.mark.parametrize(
    "f, shapes, left",
    [
        (lambda a, b: (a @ b).relu(), (MANY, ONE), ["mm", "relu"]),  # rows of all matrices together: no copy
        (lambda a, b: (a.mT @ b).relu(), ((3, 96, 64), ONE), ["bmm", "relu"]),
        (lambda a, b: (b.mT @ a.mT).relu(), (MANY, ONE), ["bmm", "relu"]),
        (lambda a, b: (b @ a).relu(), ((3, 96, 64), (48, 96)), ["bmm", "relu"]),
        (lambda a, b: b.mT @ a.mT + a[:1, :1], (MANY, ONE), ["baddbmm"]),
        (lambda a, b: (b.mT @ a.mT).relu(), ((3, 8, 96), ONE), ["mm", "relu"]),  # small products
        (lambda a, b: ((p := a @ b).mT.relu(), p.sin()), (MANY, ONE), ["mm", "relu", "sin"]),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_large_product_of_one_matrix_with_many_copies_none_of_them(f, shapes, left, backend):
    f, args = fxfunc.vmap(f, (0, None)), [torch.randn(s, dtype=torch.float64) for s in shapes]
    found = [op.split(".")[0] for op in ops(f, *args, backend=for_aten)]
    assert [op for op in found if op not in ("reshape", "permute", "expand", "slice")] == left
    ours = fxfunc.jit(f).lower(*args).compile(backend=backend)(*args)
    torch.testing.assert_close(ours, f(*args))


@pytest.mark.parametrize(
    "f, shapes, left",
    [
        (lambda a, b: -(a @ b), ((32, 4), (4, 8)), ["neg", "mm"]),
        (lambda a, b: (-(a @ b).mT).sin(), ((8, 4), (4, 32)), ["neg", "mm", "sin"]),
        (lambda a, b: -(a @ b), ((8, 4), (4, 8)), ["mm", "neg"]),  # no operand is small
        (lambda a, b: (-(p := a @ b), p.sin()), ((32, 4), (4, 8)), ["mm", "neg", "sin"]),
        (fxfunc.vmap(lambda a, b: -(a @ b).reshape(-1), (0, None)), ((9, 8, 4), (4, 8)), ["neg", "mm"]),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_product_has_its_sign_from_a_small_factor(f, shapes, left, backend):
    """No number moves: each product and sum of them is rounded as before."""
    torch.manual_seed(0)
    args = [torch.randn(s) for s in shapes]
    found = [op.split(".")[0] for op in ops(f, *args, backend=for_aten)]
    assert [op for op in found if op not in ("reshape", "permute")] == left
    ours = fxfunc.jit(f).lower(*args).compile(backend=backend)(*args)
    torch.testing.assert_close(ours, f(*args), rtol=1e-6, atol=1e-6)


def test_special_values_of_a_negated_product_stay():
    a, b = torch.tensor([[math.inf], [1.0], [math.nan], *[[2.0]] * 5]), torch.tensor([[1.0, -1.0, 3.0, 0.5]])
    assert ops(lambda a, b: -(a @ b), a, b, backend=for_aten) == ["neg.default", "mm.default"]
    same(lambda a, b: -(a @ b), a, b)


def test_derivatives_of_one_matrix_with_many_are_those_of_torch():
    def loss(api):
        one = lambda a, b: torch.tanh(b.mT @ a.mT).square().sum()
        total = lambda a, b: api.vmap(one, (0, None))(a, b).sum()
        first = api.grad(total, argnums=(0, 1))
        second = api.grad(lambda a, b: sum(g.sin().sum() for g in first(a, b)), argnums=(0, 1))
        return lambda a, b: (first(a, b), second(a, b), api.jvp(first, (a, b), (a.sin(), b.cos())))

    args = [torch.randn(s, dtype=torch.float64) / 5 for s in (MANY, ONE)]
    torch.testing.assert_close(fxfunc.jit(loss(fxfunc))(*args), loss(torch.func)(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_diagonal_of_a_product_is_no_less_exact(dtype):
    torch.manual_seed(0)
    f, a, b = lambda a, b: (a @ b).diagonal(), *(torch.randn(64, 64).to(dtype) for _ in range(2))
    exact = f(a.double(), b.double())
    error = lambda y: (y.double() - exact).abs().max()
    assert error(fxfunc.jit(f)(a, b)) <= 2 * error(f(a, b))


def test_special_values_stay_on_the_diagonal_of_a_product():
    a = torch.tensor([[math.inf, 0.0], [1.0, math.nan]], dtype=torch.float64)
    for b in (S, S * 0, -S):
        same(lambda a, b: (a @ b).diagonal(), a, b)


def test_derivatives_of_a_trace_are_those_of_torch():
    def all_of(api):
        f = lambda a, b: (torch.tanh(a) @ b.sin()).trace()
        laplacian = lambda a, b: api.hessian(lambda r: (r @ a).sin().prod())(b[0]).trace()
        mapped = api.vmap(laplacian, (None, 0))
        return lambda a, b: (
            api.grad(f, argnums=(0, 1))(a, b),
            api.hessian(f)(a, b),
            api.jvp(f, (a, b), (b.mT.cos(), a.mT.cos())),
            mapped(a, torch.stack([b, b.cos()])),
            api.grad(lambda b: laplacian(a, b))(b),
        )

    torch.manual_seed(0)
    a, b = (torch.randn(s, dtype=torch.float64) for s in SIDES)
    torch.testing.assert_close(fxfunc.jit(all_of(fxfunc))(a, b.mT.mT), all_of(torch.func)(a, b))


def test_peephole_keeps_a_product_that_somebody_else_reads():
    f = lambda a: ((p := a @ a) + a, p.sin())
    assert ops(f, S, backend=for_aten).count("mm.default") == 1
    for ours, theirs in zip(fxfunc.jit(f)(S), f(S), strict=True):
        torch.testing.assert_close(ours, theirs)


def broken(change) -> Graph:
    """A graph of two calls, changed by hand."""
    graph = fxfunc.make_graph(lambda a: a.sin().cos())(S)
    change(graph, *graph.nodes)
    return Graph(graph.fx)


def _swap(graph, sin, cos):
    sin.args = (cos,)


def _in_place(graph, sin, cos):
    cos.target = torch.ops.aten.cos_.default


def _python(graph, sin, cos):
    cos.target = torch.cos


def _val(graph, sin, cos):
    cos.meta["val"] = fxfunc.make_graph(lambda a: a.float())(S).nodes[-1].meta["val"]


def _no_val(graph, sin, cos):
    del cos.meta["val"]


@pytest.mark.parametrize("change", [_swap, _in_place, _python, _val, _no_val])
def test_verifier_names_the_pass_that_broke_a_graph(change):
    with pytest.raises(errors.InvalidGraph, match="after my_pass"):
        verify(broken(change), after="my_pass")


@pytest.mark.parametrize("sizes", [{"n": 2, "m": 3}, {"n": 7, "m": 0}])
def test_dims_compute_as_their_sizes_do(sizes):
    n, m = fxfunc.Dim("n"), fxfunc.Dim("m")
    for f in (
        lambda n, m: n * 3 + m - 1,
        lambda n, m: (n + m) * (n - m),
        lambda n, m: (n * 4 + 2) // 2,
        lambda n, m: (n * 6 + 5) // 4,
        lambda n, m: (n * 4 + m) % 3,
        lambda n, m: 5 - n,
    ):
        assert dims.at(f(n, m), sizes) == f(**sizes)


def test_a_question_about_a_size_is_answered_for_all_sizes_or_not_at_all():
    n = fxfunc.Dim("n")
    spec = fxfunc.spec(torch.randn(4, 3), {0: n})
    always = lambda v: v.sum() if v.shape[0] + 1 > 0 else v.mean()
    assert fxfunc.jit(always).lower(spec)
    with pytest.raises(errors.DynamicShape, match=r"test_passes.py"):
        fxfunc.jit(lambda v: v.sum() if v.shape[0] > 3 else v.mean()).lower(spec)


def test_a_slice_of_a_symbolic_axis_has_the_size_it_has_in_torch_or_is_refused():
    spec = fxfunc.spec(torch.randn(5, 3), {0: fxfunc.Dim("n")})
    for f in (lambda x: x[1:] - x[:-1], lambda x: x[-1:] / x[:1].shape[0]):
        compiled = fxfunc.jit(f).lower(spec).compile()
        for x in (torch.randn(1, 3), torch.randn(2, 3), torch.randn(4, 3)):
            torch.testing.assert_close(compiled(x), f(x))
    for f in (lambda x: x[-2:].sum(0) / x[-2:].shape[0], lambda x: x[:3].sum(0), lambda x: x[2:].sum(0)):
        with pytest.raises(errors.DynamicShape, match=r"slice.*test_passes.py"):
            fxfunc.jit(f).lower(spec)


@pytest.mark.parametrize(
    "f",
    [
        lambda i: i / 2,
        lambda i: i * 0.5,
        lambda i: i.sin() + i.sqrt(),
        lambda i: i**0.5,
        lambda i: torch.arange(0.0, 3) + i,
        lambda i: torch.eye(3)[0] * i,
        lambda i: torch.linspace(0, 1, 3) * i,
        lambda i: i.float().mean() / 3,
    ],
)
def test_a_compiled_function_does_not_depend_on_the_default_dtype_of_its_caller(f):
    i = torch.arange(3)
    compiled, expected = fxfunc.jit(f).lower(i).compile("eager"), f(i)
    torch.set_default_dtype(torch.float64)
    try:
        found = compiled(i)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x.sin().exp() * x.sin().exp().t()).sum() * x.sin().exp().sum(),
        lambda x: x.sin().exp() * x.sin().exp().reshape(9)[:, None, None].expand(9, 3, 3),
        lambda x: x.sin().exp()[None] @ x.sin().exp().unsqueeze(0).mT,
    ],
    ids=["transpose", "expand", "unsqueeze"],
)
def test_a_view_is_no_residual_beside_what_it_views(f):
    cut = linearize(fxfunc.make_graph(f)(torch.rand(3, 3)), (True,), reverse=True)
    shapes = [n.meta["val"].shape for n in cut.primal.outputs[cut.count :]]
    assert shapes.count((3, 3)) <= 2 and set(shapes) <= {(3, 3), ()}


def test_a_reshape_that_copies_is_kept():
    """Of a transposed value: it would be copied once more."""
    graph = fxfunc.make_graph(lambda x: x.exp().t().reshape(9) * x.sin().reshape(9))(torch.rand(3, 3))
    cut = linearize(graph, (True,), reverse=True)
    assert [n.meta["val"].shape for n in cut.primal.outputs[cut.count :]].count((9,)) >= 1
