"""autograd.Function inside captures (SEMANTICS 10), custom ops and register_rule."""

from __future__ import annotations

import pytest
import torch
from rule_harness import error
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import fxfunc
from fxfunc import errors

torch.manual_seed(0)
W = torch.randn(4, dtype=torch.float64)


class StraightThrough(Function):
    """round() whose gradient is that of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 1.0


straight_through = StraightThrough.apply  # bound before any capture


class Cube(Function):
    """x**3, with its derivative as a second output so that it may be saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g, g_derivative):
        x, derivative = ctx.saved_tensors
        return g * derivative + 6 * x * g_derivative


class Scaled(Function):
    """exp(x) * n, with a jvp, a plain argument and a tensor hung on ctx."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, n):
        return x.exp() * n

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, g):
        assert ctx.needs_input_grad == (True, False)
        return g * ctx.saved_tensors[0], None

    @staticmethod
    def jvp(ctx, t, _):
        return t * ctx.saved_tensors[0]


class Reversed(Function):
    """The identity with a gradient of its own, which reads a saved input and a closed-over tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return -g * w * x * W, g * x


PROGRAMS = {
    "straight_through": lambda x: (straight_through(x) * x).sum(),
    "cube": lambda x: (Cube.apply(x)[0] * Cube.apply(x)[1].sin()).sum(),
    "scaled": lambda x: (Scaled.apply(x, 2.0) * x).sum(),
    "reversed": lambda x: (Reversed.apply(x, x.sin()) * x).sum(),
    "reversed_closure": lambda x: (Reversed.apply(x, W) * x).sum(),
}
USES = {
    "value": lambda T, f: f,
    "grad": lambda T, f: T.grad(f),
    "grad_grad": lambda T, f: T.grad(lambda x: T.grad(f)(x).sin().sum()),
    "hessian": lambda T, f: T.jacrev(T.jacrev(f)),
    "vmap_grad": lambda T, f: lambda x: T.vmap(T.grad(f))(torch.stack([x, x + 1])),
    "grad_vmap": lambda T, f: T.grad(lambda x: T.vmap(f)(torch.stack([x, x + 1])).sum()),
}


def x() -> torch.Tensor:
    return torch.linspace(-1.3, 1.9, 4, dtype=torch.float64)


@pytest.mark.parametrize("wrap", [lambda f: f, fxfunc.jit], ids=["plain", "jit"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_semantics_10_function_keeps_its_own_derivative(name, use, wrap):
    f = PROGRAMS[name]
    assert error(wrap(USES[use](fxfunc, f))(x()), USES[use](torch.func, f)(x())) <= 1e-12


@pytest.mark.parametrize("name", PROGRAMS)
def test_semantics_10_ordinary_autograd_around_a_jitted_function(name):
    ours, theirs = x().requires_grad_(), x().requires_grad_()
    g = torch.autograd.grad(fxfunc.jit(PROGRAMS[name])(ours), ours, create_graph=True)[0]
    e = torch.autograd.grad(PROGRAMS[name](theirs), theirs, create_graph=True)[0]
    assert error(g, e) <= 1e-12
    if e.requires_grad:
        second = torch.autograd.grad(g.sin().sum(), ours)[0]
        assert error(second, torch.autograd.grad(e.sin().sum(), theirs)[0]) <= 1e-12


@pytest.mark.parametrize("name", ["cube", "scaled", "reversed"])
def test_forward_mode_is_the_transpose_of_a_backward_without_jvp(name):
    f = PROGRAMS[name]
    gradient = torch.func.grad(f)(x())
    assert error(fxfunc.jvp(f, (x(),), (W,))[1], gradient @ W) <= 1e-12


class Nonlinear(StraightThrough):
    @staticmethod
    def backward(ctx, g):
        return g * g


def test_forward_mode_through_a_nonlinear_backward_raises():
    f = lambda v: Nonlinear.apply(v).sum()
    assert error(fxfunc.grad(lambda v: f(v) * 3)(x()), torch.full((4,), 9.0)) == 0
    with pytest.raises(fxfunc.errors.MissingRule, match="Nonlinear"):
        fxfunc.jvp(f, (x(),), (W,))


class Once(StraightThrough):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_once_differentiable_has_a_first_derivative_and_refuses_a_second():
    f = lambda v: Once.apply(v).sum()
    assert error(fxfunc.grad(f)(x()), x().cos()) == 0
    assert error(fxfunc.vmap(fxfunc.grad(f))(torch.stack([x(), W])), torch.stack([x(), W]).cos()) == 0
    with pytest.raises(fxfunc.errors.MissingRule, match="once_differentiable"):
        fxfunc.grad(lambda v: fxfunc.grad(f)(v).sum())(x())


class Fixed(Cube):
    @staticmethod
    def setup_context(ctx, inputs, output):
        Cube.setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])


def test_outputs_marked_non_differentiable_have_no_derivative():
    f = lambda v: (Fixed.apply(v)[0] * Fixed.apply(v)[1]).sum()
    assert error(fxfunc.grad(f)(x()), torch.func.grad(f)(x())) <= 1e-12


class Combined(Function):
    @staticmethod
    def forward(ctx, v):
        return v.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_semantics_10_the_combined_form_raises_the_message_of_torch():
    f = lambda v: Combined.apply(v).sum()
    with pytest.raises(RuntimeError) as ours:
        fxfunc.grad(f)(x())
    with pytest.raises(RuntimeError) as theirs:
        torch.func.grad(f)(x())
    assert str(ours.value) == str(theirs.value)


def test_functions_outside_a_capture_are_torch_s_own():
    fxfunc.grad(PROGRAMS["cube"])(x())
    v = x().requires_grad_()
    assert error(torch.autograd.grad(Combined.apply(v).sum(), v)[0], torch.ones(4)) == 0


# ----- custom ops -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("fxfunc_tests::sine", mutates_args=())
def sine(v: torch.Tensor) -> torch.Tensor:
    return v.sin()


@sine.register_fake
def _(v):
    return torch.empty_like(v)


sine.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("fxfunc_tests::twice", mutates_args=())
def twice(v: torch.Tensor) -> torch.Tensor:
    return v * 2


@twice.register_fake
def _(v):
    return torch.empty_like(v)


@pytest.mark.parametrize("use", USES)
def test_custom_op_has_the_derivative_it_registered(use):
    ours = USES[use](fxfunc, lambda v: (sine(v) * v).sum())
    theirs = USES[use](torch.func, lambda v: (v.sin() * v).sum())
    with pytest.warns(UserWarning, match="sine") if "vmap" in use else torch.enable_grad():
        found = ours(x())
    assert error(found, theirs(x())) <= 1e-12


def test_custom_op_without_a_formula_raises_until_it_is_given_rules():
    f = lambda v: (twice(v) * v).sum()
    with pytest.raises(fxfunc.errors.MissingRule, match=r"fxfunc_tests.twice.*test_custom.py.*register_rule"):
        fxfunc.grad(f)(x())
    call = lambda v: v.builder.emit(torch.ops.fxfunc_tests.twice.default, (v,))
    fxfunc.register_rule(
        twice,
        jvp=[lambda t, y, v: call(t)],
        transpose=[lambda ct, v: ct * 2],
        batch=lambda ctx, op, args, kwargs: call(ctx.lift(args[0])),
    )
    for use in USES.values():
        assert error(use(fxfunc, f)(x()), use(torch.func, lambda v: (v * 2 * v).sum())(x())) <= 1e-12
    with pytest.raises(fxfunc.errors.TypeOfArgument, match="already"):
        fxfunc.register_rule(twice, jvp=[lambda t, y, v: t])


@pytest.mark.parametrize("op", [torch.sin, "sin", None])
def test_register_rule_refuses_what_is_no_operator(op):
    with pytest.raises(fxfunc.errors.TypeOfArgument, match="no operator"):
        fxfunc.register_rule(op, jvp=[])


def test_torch_autograd_backward_inside_is_refused_by_name():
    with pytest.raises(fxfunc.errors.UnsupportedInside, match=r"torch.autograd.*test_custom.py"):
        fxfunc.grad(lambda v: torch.autograd.backward(v.sum()) or v.sum())(x())


@torch.library.custom_op("fxfunc_inside::double_", mutates_args={"x"})
def double_(x: torch.Tensor) -> None:
    x.mul_(2)


double_.register_fake(lambda x: None)


@torch.library.custom_op("fxfunc_inside::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


def _doubled_in_place(x):
    y = x * 1
    double_(y)
    return y.sum()


@pytest.mark.parametrize(
    "f, refusal", [(_doubled_in_place, errors.NotSupported), (lambda x: doubled(x).sum(), errors.MissingRule)]
)
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: fxfunc.grad(f)(x),
        lambda f, x: fxfunc.hessian(f)(x),
        lambda f, x: fxfunc.vmap(fxfunc.grad(f))(x[None]),
        lambda f, x: fxfunc.jvp(f, (x,), (x,)),
        lambda f, x: torch.no_grad()(fxfunc.jit(fxfunc.grad(f)))(x),
    ],
)
def test_ops_of_a_library_without_a_derivative_are_refused_by_name(call, f, refusal):
    with pytest.raises(refusal, match="fxfunc_inside.double") as caught:
        call(f, torch.ones(3))
    assert "test_custom.py" in str(caught.value)
