"""The derived tier (SEMANTICS 11): PyTorch's own formula for one op, against finite differences and torch.func."""

from __future__ import annotations

import functools
import types
import warnings

import pytest
import torch
from rule_harness import error
from sweep import difference, pulled
from torch.autograd import gradcheck, gradgradcheck

import fxfunc
from fxfunc.passes.graph import Op
from fxfunc.passes.rules import ROWS, derived

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
aten = torch.ops.aten


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def square(seed=0) -> torch.Tensor:
    """A matrix that is far from singular."""
    return draw(3, 3, seed=seed) + 3 * torch.eye(3, dtype=torch.float64)


def spd() -> torch.Tensor:
    return square() @ square().mT


SQUARE = square()
# name -> (function, arguments, whether torch has a second derivative)
CASES = {
    "solve": (torch.linalg.solve, (square(), draw(3, 2)), True),
    "solve_transposed": (lambda a, b: torch.linalg.solve(a.mT, b), (square(), draw(3, 2)), True),
    "solve from the right": (
        lambda a, b: torch.linalg.solve(a, b, left=False),
        (square(), draw(2, 3)),
        True,
    ),
    "solve for a vector": (torch.linalg.solve, (square(), draw(3)), True),
    "solve of a constant": (lambda b: torch.linalg.solve(SQUARE, b), (draw(3, 2),), True),
    "solve of a batch": (torch.linalg.solve, (square().expand(2, 3, 3) * draw(2, 1, 1), draw(2, 3, 2)), True),
    "lu_solve": (
        lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
        (square(), draw(3, 2)),
        True,
    ),
    "cholesky_solve": (
        lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a @ a.mT)),
        (square(), draw(3, 2)),
        True,
    ),
    "cholesky_inverse": (
        lambda a: torch.cholesky_inverse(torch.linalg.cholesky(a @ a.mT)),
        (square(),),
        True,
    ),
    "householder": (torch.linalg.householder_product, (draw(3, 3), draw(3)), True),
    "det of a batch": (torch.linalg.det, (square().expand(2, 3, 3) * draw(2, 1, 1),), True),
    "complex det": (lambda a: torch.linalg.det(torch.complex(a, a.sin() / 2)).abs(), (square(),), True),
    "complex solve": (
        lambda a, b: torch.linalg.solve(torch.complex(a, a.sin() / 2), b + 0j).abs(),
        (square(), draw(3, 2)),
        True,
    ),
    "inv": (torch.linalg.inv, (square(),), True),
    "det": (torch.linalg.det, (square(),), True),
    "det_transposed": (lambda a: torch.linalg.det(a.mT), (square(),), True),
    "logdet": (lambda a: torch.linalg.slogdet(a)[1], (square(),), True),
    "cholesky": (lambda a: torch.linalg.cholesky(a @ a.mT), (square(),), True),
    "eigh": (lambda a: torch.linalg.eigh(a + a.mT)[0], (square(),), True),
    "svdvals": (torch.linalg.svdvals, (square(),), True),
    "qr": (lambda a: torch.linalg.qr(a)[1].diagonal().abs(), (square(),), True),
    "triangular": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
        (square(), draw(3, 2)),
        True,
    ),
    "matrix_exp": (torch.matrix_exp, (draw(3, 3),), True),
    "erfinv": (torch.erfinv, (draw(4).tanh() / 2,), True),
    "i0": (torch.special.i0, (draw(4),), True),
    "renorm": (lambda a: torch.renorm(a, 2, 0, 1.0), (draw(3, 2),), True),
}


def native(f, args) -> bool:
    """True if every op of a function has a row, which would leave nothing to derive."""
    graph = fxfunc.make_graph(f)(*args)
    return all(
        isinstance(n.target, Op) or n.target in ROWS or "getitem" in str(n.target) for n in graph.nodes
    )


@pytest.mark.parametrize("name", CASES)
def test_semantics_11_first_derivative_by_finite_differences(name):
    f, args, _ = CASES[name]
    if name != "renorm":
        assert not native(f, args), "no derived rule is tested by this case"
    assert gradcheck(fxfunc.jit(f), [a.clone().requires_grad_() for a in args])


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2]])
def test_semantics_11_second_derivative_by_finite_differences(name):
    f, args, _ = CASES[name]
    assert gradgradcheck(fxfunc.jit(f), [a.clone().requires_grad_() for a in args])


NUMERIC = types.SimpleNamespace(jvp=functools.partial(difference, 1e-6), vjp=functools.partial(pulled, 1e-6))


def programs(T, f, args, twice: bool, outer):
    """The transforms of one function, alone and nested; those of a tangent by `outer`."""
    ts = tuple(draw(*a.shape, seed=7 + i) for i, a in enumerate(args))
    out = f(*args)
    ct = draw(*out.shape, seed=5)
    pull = lambda xs, ct: T.vjp(f, *xs)[1](ct)
    stacked = tuple(torch.stack([a, a * 0.9]) for a in args)
    yield "vjp", lambda: pull(args, ct)
    yield "vmap", lambda: T.vmap(f)(*stacked)
    yield "vmap_vjp", lambda: T.vmap(lambda *xs: pull(xs, ct))(*stacked)
    if twice:
        yield "jvp", lambda: T.jvp(f, args, ts)[1]
        yield "jvp_vjp", lambda: T.jvp(pull, (args, ct), (ts, ct))[1]
        yield "vjp_vjp", lambda: T.vjp(pull, args, ct)[1](ts if len(ts) > 1 else (ts[0],))
        yield "vjp_jvp", lambda: T.vjp(lambda *ts: T.jvp(f, args, ts)[1], *ts)[1](ct)
        yield "jvp_jvp", lambda: outer.jvp(lambda *xs: T.jvp(f, xs, ts)[1], args, ts)[1]
        yield "vjp_jvp_residuals", lambda: outer.vjp(lambda *xs: T.jvp(f, xs, ts)[1], *args)[1](ct)


@pytest.mark.parametrize(
    "name", [n for n in CASES if n != "cholesky_inverse"]
)  # torch.func.jvp of it is wrong
def test_semantics_11_agrees_with_torch_func(name):
    f, args, twice = CASES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fxfunc")
        for (use, ours), (_, theirs) in zip(
            programs(fxfunc, f, args, twice, fxfunc),
            programs(torch.func, f, args, twice, NUMERIC),
            strict=True,
        ):
            pairs = zip(*map(torch.utils._pytree.tree_leaves, (ours(), theirs())), strict=True)
            tolerance = 1e-5 if use in ("jvp_jvp", "vjp_jvp_residuals") else 1e-10
            assert max(error(a, b) for a, b in pairs) <= tolerance, use


@pytest.mark.parametrize("name", ["solve", "det", "erfinv", "svdvals"])
def test_semantics_11_forward_and_reverse_are_one_linear_map(name):
    """<ct, J t> = <J* ct, t>, also where torch has the reverse formula alone."""
    f, args, _ = CASES[name]
    ts = tuple(draw(*a.shape, seed=7 + i) for i, a in enumerate(args))
    out, pull = fxfunc.vjp(f, *args)
    ct = draw(*out.shape, seed=5)
    pulled = pull(ct)
    pulled = pulled if isinstance(pulled, tuple) else (pulled,)
    left = (ct * fxfunc.jvp(f, args, ts)[1]).sum()
    assert error(left, sum((g * t).sum() for g, t in zip(pulled, ts, strict=True))) <= 1e-10


def ctc(x, zero_infinity=False):
    """Two sequences, the second of them shorter than it must be if infinities are to be met."""
    steps = (4, 1 if zero_infinity else 3)
    how = {"reduction": "sum", "zero_infinity": zero_infinity}
    aims = torch.tensor([[1, 2], [2, 1]])
    return torch.nn.functional.ctc_loss(x.log_softmax(2), aims, steps, (2, 2), **how)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_has_a_first_derivative_also_per_example(zero_infinity):
    f, xs = lambda x: ctc(x, zero_infinity), draw(5, 4, 2, 3)
    each = torch.stack([torch.func.grad(f)(x) for x in xs])
    assert error(fxfunc.vmap(fxfunc.grad(f))(xs), each) <= 1e-12
    assert error(fxfunc.vmap(f)(xs), torch.stack([f(x) for x in xs])) <= 1e-12


def gradient(f, x):
    """By ordinary autograd: torch.func cannot make the tensor of lengths."""
    return torch.autograd.grad(f(x := x.clone().requires_grad_()), x)[0]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_ctc_loss_takes_lengths_as_numbers_and_as_tensors(reduction, as_tensors):
    lengths = [torch.tensor([4, 3]), torch.tensor([2, 1])] if as_tensors else [(4, 3), (2, 1)]
    aims, how = torch.tensor([[1, 2], [2, 1]]), {"reduction": reduction}
    loss = lambda x: torch.nn.functional.ctc_loss(x.log_softmax(2), aims, *lengths, **how).sum()
    one = lambda x: torch.nn.functional.ctc_loss(x.log_softmax(1), aims[0], (4,), (2,), **how).sum()
    x = draw(4, 2, 3)
    for f, at in ((loss, x), (one, x[:, 0])):
        assert error(fxfunc.grad(f)(at), gradient(f, at)) <= 1e-12
    if as_tensors:
        lengths[0].fill_(2)
        assert error(fxfunc.grad(loss)(x), gradient(loss, x)) <= 1e-12


@pytest.mark.parametrize(
    "twice",
    [
        lambda x: fxfunc.grad(lambda a: fxfunc.grad(ctc)(a).sum())(x),
        lambda x: fxfunc.jvp(fxfunc.grad(ctc), (x,), (x,)),
        lambda x: fxfunc.jvp(ctc, (x,), (x,)),
    ],
)
def test_semantics_11_an_order_without_a_formula_raises(twice):
    """ctc_loss has a pullback only: forward mode and second derivatives are refused by name, never zero."""
    with pytest.raises(fxfunc.errors.MissingRule, match=r"_ctc_loss.*test_derived.py"):
        twice(draw(4, 2, 3))


def test_failed_factorisations_are_nan_where_torch_raises():
    bad = torch.stack([spd(), -spd()])
    found = fxfunc.vmap(torch.linalg.cholesky)(bad)
    assert error(found[0], torch.linalg.cholesky(spd())) <= 1e-12
    assert found[1].isnan().all()
    assert fxfunc.jit(torch.linalg.inv)(torch.zeros(3, 3)).isnan().all()


@pytest.mark.parametrize("op", ["erf_inv", "bessel_i0"])
def test_prims_have_no_derivative_rather_than_a_zero_one(op):
    f = lambda a: getattr(torch.ops.prims, op).default(a).sum()
    for transform in (fxfunc.grad(f), lambda a: fxfunc.jvp(f, (a,), (a,))):
        with pytest.raises(fxfunc.errors.MissingRule, match="prims"):
            transform(draw(3).tanh())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2]])
def test_second_derivatives_are_the_same_in_every_order_of_modes(name):
    """torch.func's own are not: its forward formulas read factorisations whose derivative it calls zero."""
    f, args, _ = CASES[name]
    ts, us = ([draw(*a.shape, seed=s + i) for i, a in enumerate(args)] for s in (7, 17))
    ct, each = draw(*f(*args).shape, seed=5), tuple(range(len(args)))
    s = lambda *xs: (f(*xs) * ct).sum()
    along = lambda xs, vs: sum((x * v).sum() for x, v in zip(xs, vs, strict=True))
    moved = lambda h: [a + h * u for a, u in zip(args, us, strict=True)]
    slope = lambda xs: along(fxfunc.grad(s, each)(*xs), ts)
    want = (slope(moved(1e-5)) - slope(moved(-1e-5))) / 2e-5
    forward = lambda *xs: fxfunc.jvp(s, xs, tuple(ts))[1]
    ways = {
        "reverse over forward": lambda *xs: along(fxfunc.grad(forward, each)(*xs), us),
        "forward over forward": lambda *xs: fxfunc.jvp(forward, xs, tuple(us))[1],
        "forward over reverse": lambda *xs: along(fxfunc.jvp(fxfunc.grad(s, each), xs, tuple(us))[1], ts),
    }
    for way in ways.values():
        torch.testing.assert_close(way(*args), want, rtol=1e-6, atol=1e-6)
        mapped = fxfunc.vmap(way)(*(torch.stack([a, a * 0.9]) for a in args))
        torch.testing.assert_close(mapped[0], want, rtol=1e-6, atol=1e-6)


TABLED = {  # by a word in the names of their ops, which have no rows
    "rsub": lambda x: torch.rsub(x, x * x),
    "sinc": torch.sinc,
    "xlogy": lambda x: torch.xlogy(x, x.cosh()),
    "pixel_shuffle": lambda x: torch.pixel_shuffle((x * x).reshape(4, 1, 2), 2),
    "renorm": lambda x: (x * x).reshape(4, 2).renorm(2, 0, 0.5),
    "std_mean": lambda x: torch.std_mean(x),
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x.exp(), (3, 5)),
    "celu": torch.celu,
}


@pytest.mark.parametrize("name", TABLED)
def test_without_a_formula_the_decomposition_answers(name):
    f, x, t = TABLED[name], draw(8), draw(8, seed=1)
    twice = lambda T: T.jvp(lambda x: T.jvp(f, (x,), (t,)), (x,), (t,))
    mapped = lambda T: T.vmap(lambda x: T.vjp(f, x)[1](f(x)))(torch.stack([x, t]))
    with derived.disabled():
        assert not any(name in str(op) for op in ROWS)
        torch.testing.assert_close(twice(fxfunc), twice(torch.func), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mapped(fxfunc), mapped(torch.func), rtol=1e-10, atol=1e-10)


def test_a_formula_goes_before_a_decomposition():
    """Whose `where` guards the singular point of sinc, and has a NaN as its derivative there."""
    x = torch.zeros(2, dtype=torch.float64)
    _, pull = fxfunc.vjp(torch.sinc, x)
    assert pull(x + 1)[0].tolist() == [0, 0]
