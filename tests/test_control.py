"""Control flow inside transforms: fxfunc.cond and torch.cond, torch's scan and while_loop, in every nesting.

The reference is torch.func over Python's own `if`, one example at a time; a cond never computes with the branch not taken.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc import errors
from fxfunc.passes.graph import cond as cond_op
from fxfunc.passes.graph import map_, subgraphs
from fxfunc.passes.pipeline import lowered

F64 = torch.float64


def wave(*shape, shift=0.0):
    """Distinct numbers in (-1, 1)."""
    return (torch.arange(math.prod(shape), dtype=F64) * 0.7 + 0.3 + shift).sin().reshape(shape)


X, W = wave(4), wave(4, 4, shift=0.5)
ROWS = torch.stack([X, -X, X.sin() + 0.2, -X.abs()])


def python_cond(pred, true, false, *operands):
    """What a cond means."""
    return true(*operands) if bool(pred) else false(*operands)


def torch_cond(pred, true, false, *operands):
    return torch.cond(pred, true, false, operands)


# ----- programs -------------------------------------------------------------------------------------------------------


def two_shapes(cond, x):
    """Branches of different ops, which close over a matrix."""
    return cond(x.sum() > 0, lambda x: (W @ x).tanh() * x, lambda x: x.exp() + W[0], x).pow(2).sum()


def guarded(cond, x):
    """The branch not taken has no finite value or derivative."""
    safe = lambda x: x.sqrt() + x.log()
    return cond((x > 0).all(), safe, lambda x: x * 3, x).sum() * x.sum()


def constant_branch(cond, x):
    """One branch has a zero derivative."""
    return (cond(x[0] > 0, lambda x: x.sin(), lambda x: torch.ones_like(x), x) * x).sum()


def passes_through(cond, x):
    """A branch that returns its operand, and one output that both have alike."""
    y, z = cond(x.sum() > 0, lambda x, y: (x, y), lambda x, y: (x * y, y), x, x.cos())
    return (y * z).sum()


def structured(cond, x):
    """Operands and results in dicts and lists, an integer among them."""
    out = cond(
        x[1] > x[0],
        lambda d, k: {"a": [d["x"] ** 2, d["n"]], "b": None, "c": k * d["x"]},
        lambda d, k: {"a": [d["x"].sin(), d["n"] + 1], "b": None, "c": d["x"] / k},
        {"x": x, "n": torch.arange(4)},
        x.cosh(),
    )
    return (out["a"][0] * out["a"][1] + out["c"]).sum()


def nested(cond, x):
    """A cond within a branch."""

    def outer(x):
        return cond(x[0] > 0.5, lambda x: x**3, lambda x: W @ x.sin(), x)

    return cond(x.sum() > 0, outer, lambda x: x * x.cos(), x).pow(2).sum()


def on_a_number(cond, x):
    """A float predicate of shape [1]."""
    return cond((x[:1] > 0).to(F64), lambda x: x.sin(), lambda x: x * x, x).sum()


def under_no_grad(cond, x):
    """A cond whose results are constants to reverse mode."""
    with torch.no_grad():
        scale = cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.exp(), x)
    return (scale * x * x).sum()


def no_grad_inside(cond, x):
    """A part of a branch that is a constant to reverse mode."""

    def true(x):
        with torch.no_grad():
            scale = x.exp()
        return scale * x.sin()

    return cond(x.sum() > 0, true, lambda x: x.detach() * x, x).sum()


def differentiated_inside(cond, x, api=fxfunc):
    """A gradient within a branch."""
    return cond(x.sum() > 0, lambda x: api.grad(lambda y: (y.sin() * x).sum())(x), lambda x: x.cos(), x).sum()


def writes(cond, x):
    """Branches that write to tensors of their own."""

    def true(x):
        y = x.clone()
        y[1:] *= 2
        return y.exp_()

    return cond(x.sum() > 0, true, lambda x: x.clone().mul_(x), x).sum()


PROGRAMS = [
    two_shapes,
    constant_branch,
    passes_through,
    structured,
    nested,
    on_a_number,
    under_no_grad,
    no_grad_inside,
    writes,
    guarded,
]


def second(api, f):
    return lambda x: api.grad(lambda x: api.grad(f)(x).sin().sum())(x)


def no_grad(api, f):
    def call(x):
        with torch.no_grad():
            return api.grad(f)(x)

    return call


SINGLE = {
    "value": lambda api, f: f,
    "grad": lambda api, f: api.grad(f),
    "vjp": lambda api, f: lambda x: api.vjp(f, x)[1](torch.tensor(2.0, dtype=F64)),
    "jvp": lambda api, f: lambda x: api.jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda api, f: api.jacrev(lambda x: f(x) * x),
    "jacfwd": lambda api, f: api.jacfwd(lambda x: f(x) * x),
    "hessian": lambda api, f: api.hessian(f),
    "second": second,
    "third": lambda api, f: lambda x: api.grad(lambda x: second(api, f)(x).pow(2).sum())(x),
    "jvp of grad": lambda api, f: lambda x: api.jvp(api.grad(f), (x,), (x.cos(),)),
    "grad of jvp": lambda api, f: api.grad(lambda x: api.jvp(f, (x,), (x.cos(),))[1]),
    "no_grad": no_grad,
}


@pytest.mark.parametrize("transform", SINGLE)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_cond_is_an_if(program, transform):
    compiled = fxfunc.jit(SINGLE[transform](fxfunc, lambda x: program(fxfunc.cond, x)))
    for x in ROWS:
        torch.testing.assert_close(compiled(x), by_branch(program, transform, x), equal_nan=False)


@pytest.mark.parametrize("transform", ["value", "grad", "second", "jvp", "hessian", "no_grad"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_torch_cond_is_a_cond(program, transform):
    f = SINGLE[transform](fxfunc, lambda x: program(torch_cond, x))
    for x in ROWS[:2] if transform != "value" else ():
        torch.testing.assert_close(f(x), by_branch(program, transform, x), equal_nan=False)
    want = pytree.tree_map(lambda *rows: torch.stack(rows), *(by_branch(program, transform, x) for x in ROWS))
    torch.testing.assert_close(fxfunc.vmap(f)(ROWS), want, equal_nan=False)


def by_branch(program, transform, x):
    """The transform of the program with the branches that it takes at `x`."""
    taken = []

    def noting(pred, true, false, *operands):
        taken.append(bool(pred))
        return python_cond(pred, true, false, *operands)

    program(noting, x)

    def replayed(x):
        choices = iter(taken)
        return program(lambda pred, true, false, *ops: (true if next(choices) else false)(*ops), x)

    return SINGLE[transform](torch.func, replayed)(x)


@pytest.mark.parametrize("transform", SINGLE)
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_example_of_a_vmap_takes_its_own_branch(program, transform):
    f = SINGLE[transform](fxfunc, lambda x: program(fxfunc.cond, x))
    want = [by_branch(program, transform, x) for x in ROWS]
    want = pytree.tree_map(lambda *rows: torch.stack(rows), *want)
    for mapped in (fxfunc.jit(fxfunc.vmap(f)), fxfunc.vmap(f, chunk_size=3)):
        torch.testing.assert_close(mapped(ROWS), want, equal_nan=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_derivative_of_a_vmap_of_conds(program):
    total = lambda xs: fxfunc.vmap(lambda x: program(fxfunc.cond, x))(xs).sin().sum()
    grads = torch.stack(
        [fxfunc.grad(lambda x: program(fxfunc.cond, x).sin())(x) for x in ROWS]
    )  # checked above
    torch.testing.assert_close(fxfunc.grad(total)(ROWS), grads, equal_nan=False)
    _, tangent = fxfunc.jvp(total, (ROWS,), (ROWS.cos(),))
    forward = sum(fxfunc.jvp(lambda x: program(fxfunc.cond, x).sin(), (x,), (x.cos(),))[1] for x in ROWS)
    torch.testing.assert_close(tangent, forward, equal_nan=False)
    hessian = fxfunc.hessian(total)(ROWS)
    for i, x in enumerate(ROWS):
        own = fxfunc.hessian(lambda x: program(fxfunc.cond, x).sin())(x)
        torch.testing.assert_close(hessian[i, :, i], own, equal_nan=False)


@pytest.mark.parametrize("pred", [torch.tensor(True), torch.tensor(False)])
@pytest.mark.parametrize("transform", ["grad", "second", "jvp", "hessian"])
def test_a_predicate_that_no_example_maps_stays_a_branch(transform, pred):
    def f(x, pred, w):
        return fxfunc.cond(pred, lambda x: (w @ x).tanh() * x, lambda x: x.exp() + w[0], x).pow(2).sum()

    g = fxfunc.vmap(
        lambda x, pred, w: SINGLE[transform](fxfunc, lambda x: f(x, pred, w))(x), in_dims=(0, None, None)
    )
    plain = lambda x: (((W @ x).tanh() * x) if pred else x.exp() + W[0]).pow(2).sum()
    want = torch.func.vmap(SINGLE[transform](torch.func, plain))(ROWS)
    torch.testing.assert_close(g(ROWS, pred, W), want)
    torch.testing.assert_close(fxfunc.jit(g)(ROWS, pred, W), want)
    graph = lowered(fxfunc.jit(g).lower(ROWS, pred, W).graph)
    assert cond_op in {n.target for n in graph.nodes} and not any(n.target is map_ for n in graph.nodes)


def test_gradients_of_what_a_branch_closes_over():
    def loss(params, x):
        w, v = params
        return fxfunc.cond(x.sum() > 0, lambda: w @ x, lambda: x * v).sum()

    params = (W, X.exp())
    for x in ROWS:
        zero = tuple(map(torch.zeros_like, params))
        want = (torch.ones(4, 1, dtype=F64) * x, zero[1]) if x.sum() > 0 else (zero[0], x)
        torch.testing.assert_close(fxfunc.grad(loss)(params, x), want)
    each = fxfunc.vmap(fxfunc.grad(loss), (None, 0))(params, ROWS)
    total = fxfunc.grad(lambda p: fxfunc.vmap(loss, (None, 0))(p, ROWS).sum())(params)
    torch.testing.assert_close(total, tuple(g.sum(0) for g in each))


@pytest.mark.parametrize("transform", ["value", "grad", "second", "jvp", "jvp of grad", "hessian"])
def test_a_cond_in_the_body_of_a_scan(transform):
    def program(scan, cond, x):
        step = lambda c, r: (
            cond(c.sum() > r[0], lambda c: (c * r).tanh(), lambda c: c.sin() + r, c),
            c.sum(),
        )
        c, ys = scan(step, x, W)
        return c.pow(2).sum() + ys.sin().sum()

    def unrolled(step, c, xs):
        ys = []
        for x in xs:
            c, y = step(c, x)
            ys.append(y)
        return c, torch.stack(ys)

    ours = SINGLE[transform](fxfunc, lambda x: program(fxfunc.scan, fxfunc.cond, x))
    for x in ROWS:
        want = by_branch(lambda cond, x: program(unrolled, cond, x), transform, x)
        torch.testing.assert_close(ours(x), want)
        torch.testing.assert_close(fxfunc.jit(ours)(x), want)
    want = [by_branch(lambda cond, x: program(unrolled, cond, x), transform, x) for x in ROWS]
    torch.testing.assert_close(
        fxfunc.vmap(ours)(ROWS), pytree.tree_map(lambda *rows: torch.stack(rows), *want)
    )


def test_a_gradient_within_a_branch():
    for x in ROWS:
        want = torch.func.grad(lambda x: differentiated_inside(python_cond, x, torch.func))(x)
        torch.testing.assert_close(fxfunc.grad(lambda x: differentiated_inside(fxfunc.cond, x))(x), want)


def test_ordinary_autograd_around_a_cond():
    for x in ROWS:
        own, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        f = lambda cond, x: cond(x.sum() > 0, lambda x: (W @ x).tanh() * x, lambda x: x.exp(), x).sum()
        (g,) = torch.autograd.grad(f(fxfunc.cond, own), own, create_graph=True)
        (h,) = torch.autograd.grad(f(python_cond, plain), plain, create_graph=True)
        torch.testing.assert_close(g, h)
        torch.testing.assert_close(
            torch.autograd.grad(g.sin().sum(), own), torch.autograd.grad(h.sin().sum(), plain)
        )


# ----- what runs ------------------------------------------------------------------------------------------------------


def conds(graph):
    return [n for n in graph.nodes if n.target is cond_op] + [
        m for n in graph.nodes for g in subgraphs(n) for m in conds(g)
    ]


def test_only_the_taken_branch_runs():
    seen = []

    @torch.library.custom_op("fxfunc_test::noted", mutates_args=())
    def noted(x: torch.Tensor, which: int) -> torch.Tensor:
        seen.append(which)
        return x * which

    noted.register_fake(lambda x, which: torch.empty_like(x))
    f = fxfunc.jit(lambda x: fxfunc.cond(x.sum() > 0, lambda x: noted(x, 1), lambda x: noted(x, 2), x))
    for x in (X.abs(), -X.abs()):
        seen.clear()
        torch.testing.assert_close(f(x), x * (1 if x.sum() > 0 else 2))
        assert seen == [1 if x.sum() > 0 else 2]


def test_a_derivative_keeps_the_residuals_of_one_branch_in_slots_both_share():
    f = lambda x: fxfunc.cond(x.sum() > 0, lambda x: x.sin().exp(), lambda x: x.tanh().cosh(), x).sum()
    primal = fxfunc.jit(fxfunc.grad(f)).lower(X).graph
    first = conds(primal)[0]
    assert len(first.args[0].outputs) <= 3  # slots of cos(x) and exp, or of two of the other branch


def test_a_known_predicate_leaves_no_cond():
    constant = lambda x: fxfunc.cond(torch.tensor(True), torch.sin, torch.cos, x)
    python = lambda x: fxfunc.cond(False, torch.sin, torch.cos, x)
    equal = lambda x: fxfunc.cond(x.sum() > 0, torch.sin, torch.sin, x)
    for f, want in ((constant, X.sin()), (python, X.cos()), (equal, X.sin())):
        assert not conds(lowered(fxfunc.jit(f).lower(X).graph))
        torch.testing.assert_close(fxfunc.jit(f)(X), want)


def test_results_of_branches_that_nobody_reads_are_not_computed():
    f = lambda x: fxfunc.cond(x.sum() > 0, lambda x: (x.sin(), W @ x), lambda x: (x.cos(), x), x)[0]
    (only,) = conds(lowered(fxfunc.jit(f).lower(X).graph))
    assert all(len(g.outputs) == 1 and "mv" not in str(g) and "mm" not in str(g) for g in only.args[:2])


def test_results_share_no_memory_with_operands_constants_and_one_another():
    def f(x):
        y = x.sin()
        return fxfunc.cond(
            x.sum() > 0,
            lambda y: (y, y, y.view(2, 2)),
            lambda y: (torch.zeros(4, dtype=F64), y * 2, W[:2, :2] * 1),
            y,
        ) + (y,)

    compiled = fxfunc.jit(f)
    for x in (X.abs(), -X.abs(), X.abs()):
        want = [t.clone() for t in compiled(x)]
        outs = compiled(x)
        for t in outs:
            t.zero_()
        again = compiled(x)
        torch.testing.assert_close(list(again), want)
        again[0].fill_(7)
        torch.testing.assert_close(list(again[1:]), want[1:])


def test_a_cond_is_written_to_a_file_and_read(tmp_path):
    g = fxfunc.grad(lambda x: two_shapes(fxfunc.cond, x))
    fxfunc.jit(fxfunc.vmap(g)).lower(fxfunc.spec(ROWS, {0: fxfunc.Dim("B")})).compile().save(
        tmp_path / "a.fx", captures="store"
    )
    fxfunc.jit(g).lower(X).compile().save(tmp_path / "b.fx", captures="store")
    mapped, single = (fxfunc.load(tmp_path / name) for name in ("a.fx", "b.fx"))
    want = torch.stack([by_branch(two_shapes, "grad", x) for x in ROWS])
    torch.testing.assert_close(mapped(ROWS), want)
    torch.testing.assert_close(mapped(ROWS[:3]), want[:3])
    torch.testing.assert_close(torch.stack([single(x) for x in ROWS]), want)


def test_a_cond_is_printed_with_its_branches():
    text = str(fxfunc.make_graph(lambda x: two_shapes(fxfunc.cond, x))(X))
    assert "fxfunc.cond" in text and "tanh" in text and "exp" in text


# ----- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "shapes": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda x: x, lambda x: x[:2], x).sum(),
        errors.StructureMismatch,
    ),
    "dtypes": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda x: x, lambda x: x.float(), x).sum(),
        errors.StructureMismatch,
    ),
    "structures": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda x: (x, x), lambda x: [x, x], x)[0].sum(),
        errors.StructureMismatch,
    ),
    "numbers": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda x: 1, lambda x: 2, x) * x.sum(),
        errors.StructureMismatch,
    ),
    "draws": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda x: x * torch.rand(4), lambda x: x * 1, x).sum(),
        errors.UnsupportedInside,
    ),
    "many": (lambda x: fxfunc.cond(x > 0, torch.sin, torch.cos, x).sum(), errors.TypeOfArgument),
    "writes": (
        lambda x: fxfunc.cond(x.sum() > 0, lambda y: y.mul_(2), torch.cos, x * 1).sum(),
        errors.MutatedCapture,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_branches_that_are_refused(case):
    f, error = REFUSED[case]
    for call in (lambda: fxfunc.vmap(fxfunc.grad(f), randomness="different")(ROWS), lambda: fxfunc.jit(f)(X)):
        with pytest.raises(error) as caught:
            call()
        assert __file__ in str(caught.value)


# ----- torch's own control flow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("transform", ["value", "grad", "second", "jvp", "hessian"])
def test_torchs_scan_is_a_scan(transform, dim, reverse):
    from torch._higher_order_ops import scan

    def f(x):
        c, ys = scan(lambda c, r: ((c * r).tanh(), c + r), x, W * x, dim=dim, reverse=reverse)
        return c.sum() + ys.sin().sum()

    def unrolled(x):
        rows = list((W * x).unbind(dim))
        c, ys = x, []
        for r in rows[::-1] if reverse else rows:
            ys.append(c + r)
            c = (c * r).tanh()
        return c.sum() + torch.stack(ys).sin().sum()

    want = SINGLE[transform](torch.func, unrolled)(X)
    torch.testing.assert_close(fxfunc.jit(SINGLE[transform](fxfunc, f))(X), want)
    each = torch.func.vmap(SINGLE[transform](torch.func, unrolled))(ROWS)
    torch.testing.assert_close(fxfunc.vmap(SINGLE[transform](fxfunc, f))(ROWS), each)


def halved(x):
    (y,) = torch.while_loop(lambda y: y.abs().sum() > 0.3, lambda y: (y * y.cos() * 0.5,), (x,))
    return y.sum()


def halved_in_python(x):
    while x.abs().sum() > 0.3:
        x = x * x.cos() * 0.5
    return x.sum()


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "second", "jvp of grad"])
def test_a_while_loop_of_known_values_is_pythons(transform):
    for x in ROWS:
        want = SINGLE[transform](torch.func, halved_in_python)(x)
        torch.testing.assert_close(SINGLE[transform](fxfunc, halved)(x), want)


def mapped(x):
    from torch._higher_order_ops import map as torch_map

    return torch_map(lambda r: r.sin(), x * W).sum()


def direct(x):
    return torch.ops.higher_order.cond(x.sum() > 0, torch.sin, torch.cos, (x,)).sum()


@pytest.mark.parametrize(
    "f, error",
    [
        (halved, errors.ValueDependent),
        (mapped, errors.UnsupportedInside),
        (direct, errors.UnsupportedInside),
    ],
)
def test_control_flow_of_torch_that_is_refused_by_name(f, error):
    for call in (
        lambda: fxfunc.vmap(f)(ROWS),
        lambda: fxfunc.jit(f)(X),
        lambda: fxfunc.vmap(fxfunc.grad(f))(ROWS),
    ):
        with pytest.raises(error) as caught:
            call()
        assert __file__ in str(caught.value)


def test_torchs_control_flow_is_its_own_outside_of_a_capture():
    fxfunc.grad(lambda x: two_shapes(torch_cond, x))(X)
    assert torch.cond(True, torch.sin, torch.cos, (X,)).equal(X.sin())
    assert torch._higher_order_ops.utils._hop_compile_and_call.__module__ == "torch._higher_order_ops.utils"
