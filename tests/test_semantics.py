"""Items of SEMANTICS.md, each in tests named after it. torch.func's answer is the reference unless a test says otherwise."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxfunc
from fxfunc import errors

F64 = torch.float64
MODES = {
    "uncompiled": lambda f, *xs: f(*xs),
    "jit": lambda f, *xs: fxfunc.jit(f)(*xs),
    "jit closing over": lambda f, *xs: fxfunc.jit(lambda: f(*xs))(),
}
every_mode = pytest.mark.parametrize("mode", MODES)
both_modes = pytest.mark.parametrize("mode", ["uncompiled", "jit"])


def vector(n=3, dtype=F64):
    """Distinct positive numbers below 1."""
    return torch.linspace(0.2, 0.9, n, dtype=dtype)


def matrix(n=3, m=3):
    return torch.linspace(-1.0, 1.3, n * m, dtype=F64).reshape(n, m).sin()


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, equal_nan=True)


def agree(mode, program, *xs):
    """A program written against a namespace of transforms gives the same with fxfunc, in this mode, as with torch.func."""
    same(MODES[mode](lambda *xs: program(fxfunc, *xs), *xs), program(torch.func, *xs))


def derivatives(f):
    """Programs over a namespace T: f's derivatives of first and second order, alone and mapped."""
    total = lambda x: f(x).sum()
    return {
        "grad": lambda T, x: T.grad(total)(x),
        "jacfwd": lambda T, x: T.jacfwd(f)(x),
        "jacrev": lambda T, x: T.jacrev(f)(x),
        "hessian": lambda T, x: T.hessian(total)(x),
        "reverse over reverse": lambda T, x: T.jacrev(T.grad(total))(x),
        "reverse over forward": lambda T, x: T.grad(lambda x: (T.jvp(f, (x,), (x.sin(),))[1] * x).sum())(x),
        "vmap of grad": lambda T, x: T.vmap(T.grad(total))(torch.stack([x, x.cos()])),
        "grad of vmap": lambda T, x: T.grad(lambda xs: T.vmap(f)(xs).sum())(torch.stack([x, x.cos()])),
        "vmap of hessian": lambda T, x: T.vmap(T.hessian(total))(torch.stack([x, x.cos()])),
    }


DERIVATIVES = list(derivatives(torch.sin))


def agree_on(mode, derivative, f, x):
    agree(mode, derivatives(f)[derivative], x)


every_derivative = pytest.mark.parametrize("derivative", DERIVATIVES)


# ----- identity and closures ------------------------------------------------------------------------------------------

FRESH = {
    "closed over itself": lambda T, x: T.grad(lambda y: (y * x).sum())(x),
    "passed twice": lambda T, x: T.grad(lambda a, b: (a * b * b).sum(), (0, 1))(x, x),
    "in one structure": lambda T, x: T.grad(lambda p: (p["a"] * p["b"] ** 2).sum())({"a": x, "b": x}),
    "primal and tangent": lambda T, x: T.jvp(lambda y: y * y * x, (x,), (x,)),
    "primal and cotangent": lambda T, x: T.vjp(lambda y: y * y * x, x)[1](x),
    "mapped and closed over": lambda T, x: T.vmap(lambda y: y * x)(x),
    "mapped and whole": lambda T, x: T.vmap(lambda a, b: a * b, (0, None))(x, x),
    "at two levels": lambda T, x: T.grad(lambda z: T.grad(lambda y: (y * z * z).sum())(z).sum())(x),
    "at two levels, closed over": lambda T, x: T.grad(lambda z: T.grad(lambda y: (y * z * x).sum())(x).sum())(
        x
    ),
    "vmap of grad": lambda T, x: T.vmap(lambda z: T.grad(lambda y: y * z * x.sum())(z))(x),
}


@every_mode
@pytest.mark.parametrize("program", FRESH.values(), ids=FRESH)
def test_semantics_01_an_input_is_not_the_same_tensor_closed_over(program, mode):
    agree(mode, program, vector())


@every_mode
@pytest.mark.parametrize("alias", [lambda x: x.view(-1), lambda x: x.detach(), lambda x: x[:]])
def test_semantics_01_an_alias_of_an_input_is_another_tensor(alias, mode):
    x = vector()
    agree(mode, lambda T, x: T.grad(lambda y: (y * alias(x)).sum())(x), x)


OUTER = {
    "value": lambda x: x * x,
    "itself": lambda x: x,
    "view": lambda x: x.view(3, 1)[:, 0],
    "element": lambda x: x[1],
    "expanded": lambda x: x.sum().expand(3),
    "transposed": lambda x: torch.outer(x, x).t()[0],
    "detached": lambda x: x.detach(),
    "of a list": lambda x: torch.stack([x, x * x]).unbind()[1],
}
INNER = {
    "grad": lambda T, c, x: T.grad(lambda y: (y.sin() * c).sum())(x),
    "vmap": lambda T, c, x: T.vmap(lambda y: y * c)(x),
    "jvp": lambda T, c, x: T.jvp(lambda y: y * c, (x,), (x,))[1],
    "vjp called later": lambda T, c, x: T.vjp(lambda y: y.sin() * c, x)[1](x.cos())[0],
    "two levels": lambda T, c, x: T.vmap(lambda z: T.grad(lambda y: (y * y * c).sum() * z)(z))(x),
}


@every_mode
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
def test_semantics_02_values_of_an_outer_transform_stay_variables_inside(outer, inner, mode):
    program = lambda T, x: inner(T, outer(x), x).sum()
    agree(mode, lambda T, x: T.grad(lambda x: program(T, x))(x), vector())
    agree(mode, lambda T, x: T.jacfwd(lambda x: program(T, x))(x), vector())
    agree(mode, lambda T, x: T.vmap(lambda x: program(T, x))(x), matrix())


@every_mode
def test_semantics_02_a_parameter_made_of_nothing_outer_is_a_closure(mode):
    w = torch.nn.Parameter(vector())
    agree(mode, lambda T, x: T.vmap(T.grad(lambda y: (y * y * w).sum()))(x), matrix())
    same(
        torch.autograd.grad(
            MODES[mode](fxfunc.vmap(fxfunc.grad(lambda y: (y * y * w).sum())), matrix()).sum(), w
        )[0],
        2 * matrix().sum(0),
    )


@every_mode
def test_semantics_03_literals_are_baked_by_value(mode):
    for value in (0.0, -0.0, 3.0, float("inf")):
        f = lambda x, value=value: x / torch.tensor(value, dtype=F64)
        same(MODES[mode](f, vector()), f(vector()))
        agree(mode, lambda T, x, f=f: T.grad(lambda x: f(x).sum())(x), vector())


def test_semantics_03_literals_are_equal_by_dtype_and_bytes():
    graph = lambda literal: fxfunc.make_graph(lambda x: x * literal())(vector())
    three = graph(lambda: torch.tensor(3.0))
    assert three == graph(lambda: torch.tensor(3.0))
    assert three != graph(lambda: torch.tensor(3.0, dtype=F64))
    assert three != graph(lambda: torch.tensor([3.0]))
    assert graph(lambda: torch.tensor(0.0)) != graph(lambda: torch.tensor(-0.0))


def test_semantics_03_other_tensors_are_captured_by_reference():
    w = vector()
    f = lambda x: x * w * torch.tensor(2.0, dtype=F64)
    lowered = fxfunc.jit(f).lower(vector())
    (capture,) = lowered.captures
    assert capture.tensor is w and capture.shape == (3,) and capture.dtype == F64
    assert capture.source.startswith(__file__)
    compiled, jitted = lowered.compile(), fxfunc.jit(f)
    jitted(vector())
    w.add_(1)
    same(compiled(vector()), f(vector()))
    same(jitted(vector()), f(vector()))
    assert jitted.cache_info().misses == 1


SEEN = {
    "grad": (lambda T, f, x: T.grad(f)(x), True),
    "vjp": (lambda T, f, x: T.vjp(f, x)[0], True),
    "jacrev": (lambda T, f, x: T.jacrev(f)(x), True),
    "hessian": (lambda T, f, x: T.hessian(f)(x), True),
    "jvp": (lambda T, f, x: T.jvp(f, (x,), (x,))[0], False),
    "jacfwd": (lambda T, f, x: T.jacfwd(f)(x), False),
    "vmap": (lambda T, f, x: T.vmap(f)(x), False),
    "vmap of grad": (lambda T, f, x: T.vmap(T.grad(f))(x), True),
    "grad of vmap": (lambda T, f, x: T.grad(lambda x: T.vmap(f)(x).sum())(x), False),
    "grad of jvp": (lambda T, f, x: T.grad(lambda x: T.jvp(f, (x,), (x,))[1])(x), False),
}


@every_mode
@pytest.mark.parametrize("name", SEEN)
def test_semantics_05_code_branches_on_requires_grad(name, mode):
    transform, expected = SEEN[name]
    seen = []

    def f(x):
        seen.append((x.requires_grad, (x * 2).requires_grad))
        return ((x**3 if x.requires_grad else x**2) * (2 if (x + 1).requires_grad else 1)).sum()

    program = lambda T, x: transform(T, f, x)
    agree(mode, program, vector())
    assert seen and set(seen) == {(expected, expected)}


@every_mode
def test_semantics_05_what_is_not_differentiated_requires_no_grad(mode):
    def f(x, y, c):
        with torch.no_grad():
            z = x * 2
        flags = (x, y, c, z, x.detach(), x * c, torch.ones(3), x > 0)
        return (x * y * c).sum() * torch.tensor([1.0 + t.requires_grad for t in flags], dtype=F64).cumprod(
            0
        ).sum()

    agree(mode, lambda T, x: T.grad(f)(x, x.cos(), x.sin()), vector())
    agree(mode, lambda T, x: T.grad(f, 1)(x, x.cos(), x.sin()), vector())
    agree(mode, lambda T, x: T.grad(lambda y: T.grad(f)(x, y, x).sum())(x), vector())


# ----- stopping gradients ---------------------------------------------------------------------------------------------


def squared_under_no_grad(x):
    with torch.no_grad():
        c = x**2
    return c * x


def merged_first(x):
    with torch.no_grad():
        a = x.sin()
    return a * x.sin()


def merged_last(x):
    a = x.sin()
    with torch.no_grad():
        b = x.sin()
    return a * b


def grad_within_no_grad(x):
    with torch.no_grad():
        a = x.sin()
        with torch.enable_grad():
            b = a * x.cos()
        c = b * x
    return c * x + b


def switched(x):
    torch.set_grad_enabled(False)
    a = x.sin()
    torch.set_grad_enabled(True)
    return a * x


def a_chain_under_no_grad(x):
    with torch.no_grad():
        a = x.sin()
        b = (a * x).exp()
    return a * b * x


def only_no_grad(x):
    with torch.no_grad():
        return x.sin()


@torch.no_grad()
def decorated(x):
    return x.exp()


def several_outputs(x):
    with torch.no_grad():
        a, b = torch.stack([x, x * x]).unbind()
        m, i = x.max(0)
    return a * b * x * m


NO_GRAD = [
    squared_under_no_grad,
    merged_first,
    merged_last,
    grad_within_no_grad,
    switched,
    a_chain_under_no_grad,
    only_no_grad,
    lambda x: decorated(x) * x,
    several_outputs,
]
no_grad_case = pytest.mark.parametrize("f", NO_GRAD, ids=lambda f: f.__name__)


@both_modes
@every_derivative
@no_grad_case
def test_semantics_06_no_grad_stops_reverse_mode_only(f, derivative, mode):
    agree_on(mode, derivative, f, vector())


def test_semantics_06_the_numbers_of_the_item():
    x = vector()
    f = lambda x: squared_under_no_grad(x).sum()
    same(fxfunc.grad(f)(x), x**2)
    same(fxfunc.jacfwd(f)(x), 3 * x**2)
    same(fxfunc.hessian(f)(x), torch.diag(2 * x))
    same(fxfunc.grad(lambda x: merged_first(x).sum())(x), x.sin() * x.cos())


@both_modes
def test_semantics_06_no_grad_around_a_map_and_a_loop(mode):
    def mapped(T, x):
        with torch.no_grad():
            c = T.vmap(lambda a: a * a)(x)
        return (T.vmap(lambda a, c: a * c)(x, c)).sum()

    agree(mode, lambda T, x: T.grad(lambda x: mapped(T, x))(x), vector())
    agree(mode, lambda T, x: T.jacfwd(lambda x: mapped(T, x))(x), vector())

    def step(carry, a):
        with torch.no_grad():
            c = carry * a
        return carry * c + a, c

    def looped(x):
        carry, ys = fxfunc.scan(step, x[0], x)
        return carry + ys.sum()

    def unrolled(x):
        carry, ys = x[0], []
        for a in x:
            carry, c = step(carry, a)
            ys.append(c)
        return carry + torch.stack(ys).sum()

    for transform in ("grad", "jacfwd", "hessian"):
        want = getattr(torch.func, transform)(unrolled)(vector())
        same(MODES[mode](getattr(fxfunc, transform)(looped), vector()), want)


def scaled(x):
    y = x * 1
    with torch.no_grad():
        y.mul_(2)
    return y


def scaled_in_part(x):
    y = x * x
    with torch.no_grad():
        y[1:].mul_(2)
        y[0] = x[2]
    return y * x


def overwritten(x):
    y = x.sin()
    with torch.no_grad():
        y.copy_(x.cos())
        y += x
    y = y * x
    return y.exp_()


def scaled_through_a_view(x):
    y = x * x
    v = y.view(3, 1)
    with torch.no_grad():
        v.mul_(x.unsqueeze(1))
    return v[:, 0] * y


def scaled_in_both_modes(x):
    y = x * x
    with torch.no_grad():
        y.mul_(3)
    y.mul_(x)
    with torch.no_grad():
        y.add_(x)
    return y * y


def made_and_written_under_no_grad(x):
    with torch.no_grad():
        y = x * x
        y.mul_(x)
    return y * x


def filled_after_no_grad(x):
    with torch.no_grad():
        y, z = x * 2, torch.zeros_like(x)
    y[0] = x[1] * x[2]
    z[:2].add_(x[1:] * x[0])
    return y * y * x + z * z


def view_taken_before_a_write_under_no_grad(x):
    with torch.no_grad():
        y = x * x
    v = y.flip(0)[:], y[:]
    with torch.no_grad():
        y.mul_(x)
    return v[0] * v[1] * x


WRITTEN = [
    scaled,
    scaled_in_part,
    overwritten,
    scaled_through_a_view,
    scaled_in_both_modes,
    made_and_written_under_no_grad,
    filled_after_no_grad,
    view_taken_before_a_write_under_no_grad,
]


@both_modes
@every_derivative
@pytest.mark.parametrize("f", WRITTEN, ids=lambda f: f.__name__)
def test_semantics_07_writing_under_no_grad_keeps_the_old_derivative(f, derivative, mode):
    agree_on(mode, derivative, f, vector())


def test_semantics_07_a_write_through_a_conjugate_reaches_its_base():
    def f(x):
        y = x * 1
        y.conj().mul_(2 + 1j)
        return y

    x = torch.complex(vector(), vector().cos())
    same(fxfunc.jit(f)(x), f(x))
    same(fxfunc.grad(lambda x: f(x).abs().sum())(x), torch.func.grad(lambda x: f(x).abs().sum())(x))


@both_modes
def test_semantics_07_the_numbers_of_the_item(mode):
    same(MODES[mode](fxfunc.grad(lambda x: scaled(x).sum()), vector()), torch.ones(3, dtype=F64))


TRANSFORMED = {
    "grad": lambda T, x: T.grad(lambda y: (y**3).sum())(x),
    "jvp": lambda T, x: T.jvp(torch.exp, (x,), (x,))[1],
    "vjp": lambda T, x: T.vjp(torch.exp, x)[1](x)[0],
    "vmap": lambda T, x: T.vmap(torch.exp)(x),
    "hessian": lambda T, x: T.hessian(lambda y: (y**3).sum())(x).sum(0),
    "grad closing over": lambda T, x: T.grad(lambda y: (x * y**2).sum())(x.sin()),
    "grad of vmap": lambda T, x: T.grad(lambda y: T.vmap(lambda z: z**3)(y).sum())(x),
}


@both_modes
@every_derivative
@pytest.mark.parametrize("inner", TRANSFORMED.values(), ids=TRANSFORMED)
def test_semantics_08_a_transform_under_no_grad_is_a_constant_to_reverse_mode(inner, derivative, mode):
    def program(T, x):
        def f(x):
            with torch.no_grad():
                g = inner(T, x)
            return g * x

        return derivatives(f)[derivative](T, x)

    agree(mode, program, vector())


@both_modes
@pytest.mark.parametrize("guard", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("inner", TRANSFORMED.values(), ids=TRANSFORMED)
def test_semantics_08_a_transform_called_under_no_grad_differentiates_inside(inner, guard, mode):
    x = vector().requires_grad_()
    with guard():
        got = MODES[mode](lambda x: inner(fxfunc, x), x)
        want = inner(torch.func, x)
    assert not got.requires_grad
    same(got, want)


@both_modes
def test_semantics_08_the_function_is_captured_with_grad_enabled(mode):
    modes = []

    def f(x):
        modes.append(torch.is_grad_enabled())
        return (x * x).sum()

    for transform in (fxfunc.grad, fxfunc.vmap, fxfunc.jacfwd):
        with torch.no_grad():
            MODES[mode](transform(f), vector())
    assert modes == [True] * 3


SAVED = {
    "tanh": lambda x: torch.tanh(x) * x,
    "sigmoid": lambda x: torch.sigmoid(x) * x,
    "exp": lambda x: torch.exp(x) * x,
    "sqrt": lambda x: torch.sqrt(x) * x,
    "softmax": lambda x: torch.softmax(x, 0) * x,
    "log_softmax": lambda x: torch.log_softmax(x, 0) * x,
    "elu": lambda x: torch.nn.functional.elu(-x) * x,
    "reciprocal": lambda x: torch.reciprocal(x) * x**2,
    "rsqrt": lambda x: torch.rsqrt(x) * x**2,
    "erfinv": lambda x: torch.erfinv(x / 2) * x,
    "cumprod": lambda x: torch.cumprod(x, 0) * x,
    "prod": lambda x: x.prod() * x,
}


@both_modes
@every_derivative
@pytest.mark.parametrize("f", SAVED.values(), ids=SAVED)
def test_semantics_09_saved_outputs_do_not_stop_the_second_derivative(f, derivative, mode):
    agree_on(mode, derivative, f, vector())


def test_semantics_09_the_numbers_of_the_item():
    x = torch.tensor([0.5, 1.0, 1.5], dtype=F64)
    second = fxfunc.grad(lambda x: fxfunc.grad(lambda x: (torch.tanh(x) * x).sum())(x).sum())(x)
    torch.testing.assert_close(second, torch.tensor([1.2096, 0.2002, -0.1294], dtype=F64), rtol=0, atol=2e-2)


DETACH_ALL_LEVELS = {
    "data": lambda y: y.data,
    "Tensor.detach_": lambda y: y.detach_(),
    "torch.detach_": lambda y: torch.detach_(y),
    "requires grad again": lambda y: y.detach().requires_grad_(),
    "set requires_grad": lambda y: setattr(y := y.detach(), "requires_grad", True) or y,
}
DETACH = {
    "Tensor.detach": lambda x: (x * x).detach() * x,
    "torch.detach": lambda x: torch.detach(x * x) * x,
    "detach of a view": lambda x: torch.outer(x, x)[0].detach() * x,
    "everything": lambda x: x.detach(),
    "shared with an undetached one": lambda x: x.sin().detach() * x.sin(),
    "inside a function of torch": lambda x: straight_through(x) * x,
}


def straight_through(x):
    """A Python function of torch as gumbel_softmax is one, without the draw."""
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(straight_through, (x,), x)
    soft = x.softmax(-1)
    return soft.round() - soft.detach() + soft


@both_modes
@every_derivative
@pytest.mark.parametrize("f", DETACH.values(), ids=DETACH)
def test_semantics_09_a_users_detach_stops_both_modes(f, derivative, mode):
    agree_on(mode, derivative, f, vector())


@both_modes
@every_derivative
@pytest.mark.parametrize("detach", DETACH_ALL_LEVELS.values(), ids=DETACH_ALL_LEVELS)
def test_semantics_09_every_spelling_stops_every_level(detach, derivative, mode):
    """Tensor.detach is the reference: torch.func stops one level of these, or refuses them."""
    x = vector()
    got = MODES[mode](lambda x: derivatives(lambda x: detach(x * x) * x)[derivative](fxfunc, x), x)
    same(got, derivatives(lambda x: (x * x).detach() * x)[derivative](torch.func, x))


@both_modes
def test_semantics_09_fxfunc_stop_gradient_is_detach(mode):
    for transform in ("grad", "jacfwd", "hessian"):
        got = MODES[mode](
            getattr(fxfunc, transform)(lambda x: (fxfunc.stop_gradient(x * x) * x).sum()), vector()
        )
        same(got, getattr(torch.func, transform)(lambda x: ((x * x).detach() * x).sum())(vector()))


@both_modes
def test_semantics_09_backward_inside_is_refused_by_name(mode):
    def f(x):
        return ((x**2).sum().backward() * x).sum()

    for transform in (fxfunc.grad, fxfunc.vmap, fxfunc.jacfwd):
        w = matrix().requires_grad_()
        with pytest.raises(
            errors.UnsupportedInside, match=r"backward.*Use torch.autograd.grad, or fxfunc\.grad"
        ) as raised:
            MODES[mode](transform(f), w)
        assert raised.value.source == f"{__file__}:{f.__code__.co_firstlineno + 1}"
        assert w.grad is None


@both_modes
@pytest.mark.parametrize("saved", [torch.tanh, torch.sigmoid, torch.exp, torch.sqrt, lambda x: x.softmax(0)])
def test_semantics_09_what_autograd_detaches_is_differentiated(saved, mode):
    """torch.autograd.grad detaches the outputs it saves; the derivative of its result goes through them all the same."""

    def first(x):
        return torch.autograd.grad((saved(x) * x).sum(), x, create_graph=True)[0]

    got = MODES[mode](fxfunc.jacrev(first), vector())
    same(got, torch.func.jacrev(torch.func.grad(lambda x: (saved(x) * x).sum()))(vector()))


# ----- ordinary autograd around us ------------------------------------------------------------------------------------

AROUND = {
    "grad": lambda T, x, w: T.grad(lambda y: (y**3 * w).sum())(x),
    "vjp": lambda T, x, w: T.vjp(lambda y: y.sin() * w, x)[1](w)[0],
    "jvp": lambda T, x, w: T.jvp(lambda y: y.sin() * w, (x,), (w,))[1],
    "jacrev": lambda T, x, w: T.jacrev(lambda y: y**3 * w)(x),
    "hessian": lambda T, x, w: T.hessian(lambda y: (y**3 * w.exp()).sum())(x),
    "vmap": lambda T, x, w: T.vmap(lambda y: y.sin() * w)(x),
    "vmap of grad": lambda T, x, w: T.vmap(T.grad(lambda y: (y**3 * w).sum()))(torch.stack([x, x * x])),
    "no_grad inside": lambda T, x, w: T.grad(lambda y: (squared_under_no_grad(y) * w.sin()).sum())(x),
    "detach inside": lambda T, x, w: T.grad(lambda y: ((y * w).detach() * y * w).sum())(x),
    "integer output": lambda T, x, w: T.vmap(lambda y: (y * w, (y * w > 0.3).sum()))(x)[0],
    "auxiliary output": lambda T, x, w: sum(T.grad(lambda y: ((y * w).sum() ** 2, y * w), has_aux=True)(x)),
}
around = pytest.mark.parametrize("program", AROUND.values(), ids=AROUND)
AUTOGRAD_MODES = {
    "uncompiled": lambda f, x, w: f(fxfunc, x, w),
    "jit": lambda f, x, w: fxfunc.jit(lambda x, w: f(fxfunc, x, w))(x, w),
    "jit closing over": lambda f, x, w: fxfunc.jit(lambda x: f(fxfunc, x, w))(x),
    "jit inside": lambda f, x, w: f(
        type(
            "T",
            (),
            {k: staticmethod(_jitted(getattr(fxfunc, k))) for k in ("grad", "vmap", "jacrev", "hessian")}
            | {"vjp": fxfunc.vjp, "jvp": fxfunc.jvp},
        ),
        x,
        w,
    ),
    "compiled": lambda f, x, w: fxfunc.jit(lambda x, w: f(fxfunc, x, w)).lower(x, w).compile()(x, w),
}
every_autograd_mode = pytest.mark.parametrize("mode", AUTOGRAD_MODES)


def _jitted(transform):
    return lambda f, **kwargs: fxfunc.jit(transform(f, **kwargs))


def leaves(n=2):
    return [(vector() * (i + 1)).requires_grad_() for i in range(n)]


@every_autograd_mode
@around
def test_semantics_12_first_and_double_backward(program, mode):
    """With respect to an input and a closed-over parameter, double backward through `create_graph`."""
    x, w = leaves()
    results = []
    for call in (AUTOGRAD_MODES[mode], lambda f, x, w: f(torch.func, x, w)):
        out = call(program, x, w)
        how = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad((out * out).sum(), (x, w), **how)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (x, w), **how)
        third = torch.autograd.grad(sum((g * g).sum() for g in second), (x, w), **how)
        results.append([out, *first, *second, *third])
    same(*results)


@every_autograd_mode
@around
def test_semantics_12_gradcheck(program, mode):
    if program is AROUND["no_grad inside"] or program is AROUND["detach inside"]:
        program = AROUND["grad"]  # finite differences see through what stops gradients
    f = lambda x, w: AUTOGRAD_MODES[mode](program, x, w)
    assert torch.autograd.gradcheck(f, leaves())


@every_autograd_mode
def test_semantics_12_the_numbers_of_the_item(mode):
    """Autograd must not differentiate the emitted calls: under no_grad they would count again."""
    x, w = leaves()
    f = lambda T, x, w: T.vmap(lambda y: (squared_under_no_grad(y) * w).sum())(x)
    out = AUTOGRAD_MODES[mode](f, x, w)
    same(torch.autograd.grad(out.sum(), x)[0], (x**2 * w.sum()).detach())


@every_autograd_mode
def test_semantics_12_backward_accumulates(mode):
    x, w = leaves()
    for _ in range(2):
        AUTOGRAD_MODES[mode](AROUND["grad"], x, w).sum().backward()
    same(x.grad, (2 * 6 * x * w).detach())
    same(w.grad, (2 * 3 * x**2).detach())


@every_autograd_mode
def test_semantics_12_retain_graph_and_freed_buffers(mode):
    x, w = leaves()
    loss = AUTOGRAD_MODES[mode](AROUND["grad"], x, w).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    same(torch.autograd.grad(loss, x), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@every_autograd_mode
def test_semantics_12_a_value_changed_after_the_call_is_refused(mode):
    x, w = leaves()
    loss = AUTOGRAD_MODES[mode](AROUND["grad"], x, w).sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_autograd_mode
def test_semantics_12_what_needs_no_gradient_has_none(mode):
    x, w = leaves()
    f = lambda T, x, w: T.vmap(lambda y, z: (y * w, y > 0, z + 1, (y * w).detach()))(x, torch.arange(3))
    out = AUTOGRAD_MODES[mode](f, x, w)
    assert [o.requires_grad for o in out] == [True, False, False, False]
    for o in AUTOGRAD_MODES[mode](f, x.detach(), w.detach()):
        assert not o.requires_grad and o.is_leaf
    with torch.no_grad():
        assert not any(o.requires_grad for o in AUTOGRAD_MODES[mode](f, x, w))


@every_autograd_mode
def test_semantics_12_outputs_are_never_inference_tensors(mode):
    x, w = (t.detach() for t in leaves())
    for context in (contextlib.nullcontext, torch.no_grad):
        with context():
            out = AUTOGRAD_MODES[mode](AROUND["vmap of grad"], x, w)
        assert not out.is_inference()
        v = torch.ones(3, dtype=F64, requires_grad=True)
        (v * out).sum().backward()  # an inference tensor cannot be saved for backward
        same(v.grad, out.sum(0))


@every_autograd_mode
def test_semantics_12_outputs_that_are_inputs(mode):
    x, w = leaves()
    f = lambda T, x, w: (x, T.vmap(lambda y: y)(x), w, x, x * w)
    a, b, c, d, e = AUTOGRAD_MODES[mode](f, x, w)
    loss = (a + 2 * b + 3 * c + 4 * d + e).sum()
    gx, gw = torch.autograd.grad(loss, (x, w))
    same((gx, gw), (7 + w.detach(), 3 + x.detach()))
    same([t.detach() for t in (a, b, c, d)], [t.detach() for t in (x, x, w, x)])


def test_semantics_12_outputs_of_an_uncompiled_call_do_not_share_memory_with_each_other():
    x = vector().requires_grad_()
    a, b = fxfunc.vmap(lambda y: (y * 2, y * 2))(x)
    with torch.no_grad():
        a.add_(1)
    same(b.detach(), 2 * x.detach())


@every_mode
def test_semantics_12_a_module_trains(mode):
    """Per-sample gradient norms as a loss: gradients of the weights through vmap(grad), as with torch.func."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    def loss(T, x):
        return T.vmap(T.grad(lambda y: model(y).sum()))(x).square().sum()

    grads = []
    for call in (
        lambda: MODES[mode](lambda x: loss(fxfunc, x), matrix()),
        lambda: loss(torch.func, matrix()),
    ):
        model.zero_grad()
        call().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same(*grads)


def test_semantics_12_a_rebound_parameter_gets_the_gradient():
    w = vector().requires_grad_()
    f = fxfunc.jit(lambda x: fxfunc.grad(lambda y: (y * y * w).sum())(x))
    f(vector()).sum().backward()
    first, w = w, (2 * vector()).requires_grad_()
    f(vector()).sum().backward()
    same(first.grad, 2 * vector())
    same(w.grad, 2 * vector())
    assert f.cache_info().misses == 1


def test_semantics_12_differentiating_through_a_loaded_object_is_refused(tmp_path):
    x, w = leaves()
    fxfunc.jit(lambda x, w: AROUND["grad"](fxfunc, x, w)).lower(x, w).compile().save(tmp_path / "f.fxfunc")
    loaded = fxfunc.load(tmp_path / "f.fxfunc")
    with pytest.raises(errors.NotSupported, match=r"loaded artifact.*torch\.no_grad\(\)"):
        loaded(x, w)
    with torch.no_grad():
        out = loaded(x, w)
    assert not out.requires_grad and not out.is_inference()
    same(out, (3 * x**2 * w).detach())
    same(loaded(x.detach(), w.detach()), out)


@every_autograd_mode
def test_semantics_12_hooks_and_views_of_leaves(mode):
    """Inputs that are not leaves: a view and a computed value, with a hook on the way."""
    results = []
    for call in (AUTOGRAD_MODES[mode], lambda f, x, w: f(torch.func, x, w)):
        x, w = leaves()
        seen = []
        y = (x * x).view(3, 1)[:, 0]
        y.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        call(AROUND["grad"], y, w).square().sum().backward()
        results.append([x.grad, w.grad, *seen])
    same(*results)


@every_mode
def test_semantics_12_a_dual_tensor_is_refused(mode):
    """Its tangent would be lost, also that of a closure."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(vector(), torch.ones(3, dtype=F64))
        for f, args in ((torch.sin, x), (lambda y: y * x, vector())):
            with pytest.raises(errors.NotSupported, match=r"forward_ad.*fxfunc\.jvp"):
                MODES[mode](fxfunc.vmap(f), args)
        same(MODES[mode](fxfunc.vmap(torch.sin), vector()), vector().sin())


# ----- numbers --------------------------------------------------------------------------------------------------------

C128 = torch.complex128


def complex_vector(n=3):
    return torch.complex(vector(n), vector(n).cos() - 0.5)


def complex_matrix(n=3, m=3):
    return torch.complex(matrix(n, m), matrix(n, m).cos())


COMPLEX = {
    "mul": (lambda a, b: a * b, complex_vector, complex_vector),
    "mul real": (lambda a, b: a * b, vector, complex_vector),
    "mul broadcast": (lambda a, b: a * b, complex_vector, lambda: complex_matrix()),
    "div": (lambda a, b: a / b, complex_vector, lambda: complex_vector() + 1),
    "div real": (lambda a, b: b / a, vector, complex_vector),
    "mul imaginary number": (lambda a, b: a * 2j + b * (1 + 3j), complex_vector, complex_vector),
    "mm": (lambda a, b: a @ b, complex_matrix, complex_matrix),
    "mm scaled": (lambda a, b: torch.addmm(a, a, b, alpha=2, beta=3), complex_matrix, complex_matrix),
    "bmm": (lambda a, b: torch.bmm(a[None], b[None]), complex_matrix, complex_matrix),
    "mv": (lambda a, b: a @ b, complex_matrix, complex_vector),
    "conj": (lambda a, b: a.conj() * b, complex_vector, complex_vector),
    "transposed": (lambda a, b: a.mH @ b.mT, complex_matrix, complex_matrix),
    "sum": (lambda a, b: a.sum() * b.mean(), complex_vector, complex_vector),
    "real": (lambda a, b: torch.view_as_real(a) * torch.view_as_real(b), complex_vector, complex_vector),
    "exp": (lambda a, b: a.exp() * b, complex_vector, complex_vector),
    "from real": (lambda a, b: a.to(C128) * b, vector, complex_vector),
}


@both_modes
@pytest.mark.parametrize("name", COMPLEX)
def test_semantics_18_transposes_of_complex_ops_are_adjoints(name, mode):
    f, *makes = COMPLEX[name]
    a, b = (make() for make in makes)
    weight = f(a, b).detach().conj() + 0.5
    real = lambda a, b: (f(a, b) * weight).sum().real if weight.is_complex() else (f(a, b) * weight).sum()
    agree(mode, lambda T, a, b: T.vjp(f, a, b)[1](weight), a, b)
    agree(
        mode, lambda T, a, b: T.vmap(lambda w: T.vjp(f, a, b)[1](w))(torch.stack([weight, weight * 2])), a, b
    )
    if real(a, b).dtype == F64:
        agree(mode, lambda T, a, b: T.grad(lambda a, b: real(a, b) ** 2, (0, 1))(a, b), a, b)


@both_modes
@pytest.mark.parametrize("name", COMPLEX)
def test_semantics_18_inner_products_agree(name, mode):
    """Re <ct, J t> = Re <J* ct, t>."""
    f, *makes = COMPLEX[name]
    xs = tuple(make() for make in makes)
    ts = tuple(x * (1 + i) + 0.3 for i, x in enumerate(xs))
    out, pushed = MODES[mode](lambda *xs: fxfunc.jvp(f, xs, ts), *xs)
    ct = out.conj() * (0.3 + 1j) if out.is_complex() else out
    pulled = MODES[mode](lambda *xs: fxfunc.vjp(f, *xs)[1](ct), *xs)
    left = (ct.conj() * pushed).sum().real
    right = sum((p.conj() * t).sum().real for p, t in zip(pulled, ts, strict=True))
    same(left, right)


MIXED = {
    "bf16 * f32": (lambda a, b: a * b, torch.bfloat16, torch.float32),
    "f16 + f64": (lambda a, b: a + b, torch.float16, F64),
    "f32 / f64": (lambda a, b: a / b, torch.float32, F64),
    "f32 ** f64": (lambda a, b: a**b, torch.float32, F64),
    "cat": (lambda a, b: torch.cat([a, b]), torch.float32, F64),
    "stack": (lambda a, b: torch.stack([a, b]), torch.bfloat16, torch.float32),
    "where": (lambda a, b: torch.where(a > 0.5, a, b), torch.float32, F64),
    "maximum": (lambda a, b: torch.maximum(a, b.flip(0)), torch.float32, F64),
    "to": (lambda a, b: a.to(b.dtype) * b, torch.bfloat16, F64),
    "real and complex": (lambda a, b: a * b, F64, C128),
}


@both_modes
@pytest.mark.parametrize("name", MIXED)
def test_semantics_18_cotangents_have_the_primals_dtype_and_shape(name, mode):
    f, *dtypes = MIXED[name]
    a, b = (vector().to(d) for d in dtypes)
    for x, y in (
        (a, b),
        (a[:1], b) if name not in ("stack",) else (a, b),
        (a.reshape(3, 1), b.reshape(3, 1)),
    ):
        ct = torch.ones_like(f(x, y))
        got = MODES[mode](lambda x, y, ct=ct: fxfunc.vjp(f, x, y)[1](ct), x, y)
        want = torch.func.vjp(f, x, y)[1](ct)
        assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in (x, y)]
        torch.testing.assert_close(got, want)


PROMOTED = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: b - a,
    "rsub": lambda a, b: torch.rsub(a, b),
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "pow of the 0-d": lambda a, b: b**a,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda a, b: torch.clamp(a, min=b - 0.3, max=b),
    "where": lambda a, b: torch.where(a > 0.5, a, b),
    "where number": lambda a, b: torch.where(b > 0.5, a, 2.0),
    "atan2": torch.atan2,
    "fmod": torch.fmod,
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a),
    "lerp": lambda a, b: a + b * (a - b),
    "copysign": torch.copysign,
    "comparison": lambda a, b: (a < b, a == b),
    "cat": lambda a, b: torch.cat([a, b.reshape(1)]),
    "stack": lambda a, b: torch.stack([a, b.expand(3)]),
    "to": lambda a, b: a.to(b.dtype) + b,
    "number": lambda a, b: a * 2.5 + b.sum() * 2,
    "a chain": lambda a, b: ((a * b).sqrt() + b) * (b * 2),
    "in place": lambda a, b: a.clone().mul_(b).add_(b),
}
DTYPES = {
    "half, f64": (torch.float16, F64),
    "f64, half": (F64, torch.float16),
    "bf16, f32": (torch.bfloat16, torch.float32),
    "f32, f64": (torch.float32, F64),
    "f32, i64": (torch.float32, torch.int64),
    "i32, i64": (torch.int32, torch.int64),
    "i64, f64": (torch.int64, F64),
}


def rounding(dtypes):
    """A 0-d operand of a half tensor is rounded to half where torch may compute with all its digits."""
    low = next((d for d in dtypes if d in (torch.float16, torch.bfloat16)), None)
    return {} if low is None else {"rtol": 8 * torch.finfo(low).eps, "atol": 8 * torch.finfo(low).eps}


@both_modes
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("f", PROMOTED.values(), ids=PROMOTED)
def test_semantics_19_a_mapped_0d_operand_promotes_as_one_example_does(f, dtypes, mode):
    """The reference is a Python loop over the examples."""
    a = (matrix().abs() * 4 + 1).to(dtypes[0])
    b = (vector() * 3 + 1).to(dtypes[1])
    for mapped in ((0, 0), (0, None), (None, 0)):
        examples = [[x[i] if m == 0 else x[0] for x, m in zip((a, b), mapped, strict=True)] for i in range(3)]
        try:
            each = [f(*xs) for xs in examples]
        except (RuntimeError, TypeError):  # not defined for these dtypes
            with pytest.raises((RuntimeError, TypeError)):
                fxfunc.vmap(f, mapped)(*(x if m == 0 else x[0] for x, m in zip((a, b), mapped, strict=True)))
            continue
        want = (
            tuple(map(torch.stack, zip(*each, strict=True)))
            if isinstance(each[0], tuple)
            else torch.stack(each)
        )
        args = [x if m == 0 else x[0] for x, m in zip((a, b), mapped, strict=True)]
        got = MODES[mode](fxfunc.vmap(f, mapped), *args)
        torch.testing.assert_close(got, want, **rounding(dtypes))


@both_modes
@pytest.mark.parametrize(
    "dtypes", [d for d in DTYPES.values() if d[0].is_floating_point and d[1].is_floating_point]
)
def test_semantics_19_derivatives_keep_the_promoted_dtypes(dtypes, mode):
    a, b = matrix().abs().to(dtypes[0]), vector().to(dtypes[1])
    for f in (
        lambda a, b: (a * b).sum(),
        lambda a, b: torch.maximum(a, b).exp().sum(),
        lambda a, b: (a**b).sum(),
    ):
        got = MODES[mode](fxfunc.vmap(fxfunc.grad(f, (0, 1))), a, b)
        each = [torch.func.grad(f, (0, 1))(*xs) for xs in zip(a, b, strict=True)]
        torch.testing.assert_close(got, tuple(map(torch.stack, zip(*each, strict=True))), **rounding(dtypes))
        assert [t.dtype for t in got] == list(dtypes)


@both_modes
def test_semantics_19_nested_maps_promote_by_the_innermost_example(mode):
    a, b = matrix().abs().half(), matrix().abs()
    f = lambda a, b: a * b + b
    got = MODES[mode](fxfunc.vmap(fxfunc.vmap(f, (None, 0))), a, b)
    want = torch.stack([torch.stack([f(x, z) for z in y]) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(got, want)


VIEWS = {
    "view": lambda x: x.contiguous().view(2, 6),
    "view -1": lambda x: x.contiguous().view(-1),
    "flatten": lambda x: x.flatten(),
    "transposed": lambda x: x.t().reshape(2, 6),
    "expand": lambda x: x[:, None].expand(3, 2, 4),
    "unfold": lambda x: x.unfold(0, 2, 1),
    "narrow": lambda x: x.narrow(1, 1, 2).reshape(-1),
    "diagonal": lambda x: x.diagonal(),
    "squeeze": lambda x: x[:1].squeeze() + x.unsqueeze(0).squeeze(0)[1],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "as_strided": lambda x: x.contiguous().as_strided((2, 3), (4, 1)),
    "as_strided_copy": lambda x: torch.as_strided_copy(x.contiguous(), (2, 3), (4, 1), 1),
    "as_strided, overlapping": lambda x: x.contiguous().as_strided((3, 3), (1, 1), 2),
}


@both_modes
@pytest.mark.parametrize("f", VIEWS.values(), ids=VIEWS)
def test_semantics_19_views_are_by_the_sizes_of_one_example(f, mode):
    x = matrix(3, 4)
    xs = torch.stack([x, x.cos(), x.sin()])
    for dim in (0, 1, 2):
        agree(mode, lambda T, xs, dim=dim: T.vmap(f, dim, 1)(xs.movedim(0, dim).contiguous()), xs)
    agree(mode, lambda T, xs: T.vmap(T.grad(lambda x: (f(x) ** 2).sum()))(xs), xs)
    agree(mode, lambda T, xs: T.vmap(T.vmap(f))(xs[:, None]), xs)


@both_modes
@pytest.mark.parametrize("derivative", [d for d in DERIVATIVES if "vmap" not in d])
def test_semantics_19_as_strided_of_an_argument_goes_by_its_layout(derivative, mode):
    agree_on(mode, derivative, lambda x: x.as_strided((2, 2), (1, 1), 1).sin().reshape(-1), vector(4))


@both_modes
def test_semantics_19_as_strided_of_a_closure_that_does_not_lie_in_order_is_refused(mode):
    w = matrix(3, 4).t()
    with pytest.raises(errors.NotSupported, match=r"as_strided.*\.contiguous\(\) first"):
        MODES[mode](fxfunc.vmap(lambda x: x * w.as_strided((2, 2), (1, 2))), matrix())


@both_modes
def test_semantics_19_as_strided_of_an_unknown_layout_is_refused(mode):
    f = lambda x: x.as_strided((2, 2), (1, 2))
    for g in (
        lambda x: f(x.t()),
        lambda x: f(x.contiguous().t_()),
        lambda x: f(x * 1),
        lambda x: torch.as_strided((x * 1).t() * 1, (2, 2), (1, 2)),
        lambda x: torch.as_strided_copy(x[1:], (2, 2), (1, 1), 0),
        lambda x: torch.as_strided_scatter(x.t() * 1, torch.ones(2, 2), (2, 2), (1, 2)),
    ):
        for transform in (fxfunc.vmap, lambda f: fxfunc.grad(lambda x: f(x).sum()), fxfunc.jacfwd):
            with pytest.raises(errors.NotSupported, match=r"as_strided.*\.contiguous\(\) first"):
                MODES[mode](
                    transform(g),
                    torch.ones(2, 3, 4).transpose(1, 2) if transform is fxfunc.vmap else matrix(),
                )


NAN = float("nan")
CHOICES = {
    "relu at 0": (torch.relu, [-1.0, 0.0, 2.0]),
    "leaky_relu at 0": (torch.nn.functional.leaky_relu, [-1.0, 0.0, 2.0]),
    "relu6 at its bounds": (torch.nn.functional.relu6, [0.0, 6.0, 3.0]),
    "hardtanh at its bounds": (torch.nn.functional.hardtanh, [-1.0, 1.0, 0.5]),
    "elu at 0": (torch.nn.functional.elu, [-1.0, 0.0, 2.0]),
    "abs at 0": (torch.abs, [-1.0, 0.0, 2.0]),
    "sign at 0": (torch.sign, [-1.0, 0.0, 2.0]),
    "clamp at its bounds": (lambda x: x.clamp(-1, 2), [-1.0, 2.0, 0.5]),
    "clamp with min above max": (lambda x: x.clamp(2, -1), [-1.0, 2.0, 0.5]),
    "clamp with tensors": (lambda x: x.clamp(x.new_tensor(-1), x.new_tensor(2)), [-1.0, 2.0, 0.5]),
    "clamp by itself": (lambda x: x.clamp(x * 1, x * 2), [-1.0, 0.0, 0.5]),
    "clamp of nan": (lambda x: x.clamp(-1, 2), [NAN, 2.0, 0.5]),
    "clamp_min at its bound": (lambda x: x.clamp_min(0.0), [-1.0, 0.0, 2.0]),
    "maximum tie": (lambda x: torch.maximum(x, x.flip(0)), [1.0, 3.0, 1.0]),
    "minimum tie": (lambda x: torch.minimum(x, x.new_tensor(1.0)), [1.0, 3.0, 1.0]),
    "maximum of the same": (lambda x: torch.maximum(x, x), [1.0, 3.0, 1.0]),
    "fmax tie": (lambda x: torch.fmax(x, x.new_tensor(1.0)), [1.0, 3.0, 1.0]),
    "amax ties": (lambda x: x.amax(0), [3.0, 1.0, 3.0]),
    "amin ties": (lambda x: x.amin(), [1.0, 1.0, 3.0]),
    "max.dim takes an index": (lambda x: x.max(0).values, [3.0, 1.0, 3.0]),
    "min.dim takes an index": (lambda x: x.min(0).values, [1.0, 1.0, 3.0]),
    "max ties": (lambda x: x.max(), [3.0, 1.0, 3.0]),
    "median": (lambda x: x.median(), [3.0, 1.0, 3.0]),
    "sort ties": (lambda x: x.sort(stable=True).values, [3.0, 1.0, 3.0]),
    "topk ties": (lambda x: x.topk(2).values, [3.0, 3.0, 1.0]),
    "cummax ties": (lambda x: x.cummax(0).values, [3.0, 1.0, 3.0]),
    "sqrt at 0": (torch.sqrt, [0.0, 1.0, 2.0]),
    "rsqrt at 0": (torch.rsqrt, [0.0, 1.0, 2.0]),
    "square root by pow at 0": (lambda x: x**0.5, [0.0, 1.0, 2.0]),
    "pow 0 at 0": (lambda x: x**0, [0.0, 1.0, 2.0]),
    "pow 1 at 0": (lambda x: x**1, [0.0, 1.0, 2.0]),
    "pow 2 at 0": (lambda x: x**2, [0.0, 1.0, -2.0]),
    "pow 3 at 0": (lambda x: x**3, [0.0, 1.0, -2.0]),
    "pow -1 at 0": (lambda x: x**-1, [0.0, 1.0, -2.0]),
    "pow 1.5 at 0": (lambda x: x**1.5, [0.0, 1.0, 2.0]),
    "pow of tensors at 0": (lambda x: x ** x.new_tensor([2.0, 0.0, 1.0]), [0.0, 0.0, 0.0]),
    "pow with an exponent of 0": (lambda x: x.new_tensor([0.0, 0.0, 2.0]) ** x, [0.0, 1.0, 0.0]),
    "pow of itself at 0": (lambda x: x**x, [0.0, 1.0, 2.0]),
    "number to a power": (lambda x: 0.0**x, [0.0, 1.0, 2.0]),
    "log at 0": (torch.log, [0.0, 1.0, 2.0]),
    "xlogy at 0": (lambda x: torch.xlogy(x, x), [0.0, 1.0, 2.0]),
    "reciprocal at 0": (torch.reciprocal, [0.0, 1.0, 2.0]),
    "atan2 at 0": (lambda x: torch.atan2(x, x), [0.0, 1.0, -2.0]),
    "norm at 0": (torch.linalg.vector_norm, [0.0, 0.0, 0.0]),
    "norm": (torch.linalg.vector_norm, [0.0, 3.0, 4.0]),
    "1-norm at 0": (lambda x: torch.linalg.vector_norm(x, 1), [0.0, 3.0, -4.0]),
    "3-norm at 0": (lambda x: torch.linalg.vector_norm(x, 3), [0.0, 0.0, 0.0]),
    "infinity norm ties": (lambda x: torch.linalg.vector_norm(x, float("inf")), [-4.0, 3.0, 4.0]),
    "Tensor.norm at 0": (lambda x: x.norm(), [0.0, 0.0, 0.0]),
    "Tensor.norm along a dim": (lambda x: x.norm(dim=0, keepdim=True), [0.0, 3.0, 4.0]),
    "normalize at 0": (lambda x: torch.nn.functional.normalize(x, dim=0), [0.0, 0.0, 0.0]),
    "std of equal numbers": (lambda x: x.std(), [1.0, 1.0, 1.0]),
    "var": (lambda x: x.var(), [1.0, 1.0, 1.0]),
    "prod without zeros": (torch.prod, [1.0, 2.0, 3.0]),
    "prod with a zero": (torch.prod, [0.0, 2.0, 3.0]),
    "prod with two zeros": (torch.prod, [0.0, 2.0, 0.0]),
    "prod with three zeros": (torch.prod, [0.0, 0.0, 0.0]),
    "prod along a dim": (lambda x: torch.outer(x, x).prod(0), [0.0, 2.0, 3.0]),
    "cumprod with a zero": (lambda x: x.cumprod(0), [2.0, 0.0, 3.0]),
    "cumprod with two zeros": (lambda x: x.cumprod(0), [0.0, 2.0, 0.0]),
    "cumsum": (lambda x: x.cumsum(0), [0.0, 2.0, 0.0]),
    "where with nan untaken": (lambda x: torch.where(x > 0, x.log(), x), [-1.0, 0.0, 2.0]),
    "where with an infinite derivative untaken": (
        lambda x: torch.where(x > 0, x.sqrt(), 0.0),
        [0.0, 1.0, 2.0],
    ),
    "where, guarded twice": (
        lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), x),
        [-1.0, 0.0, 2.0],
    ),
    "nan_to_num": (lambda x: x.nan_to_num(), [NAN, float("inf"), 1.0]),
    "zero times infinity": (lambda x: x * 0, [float("inf"), NAN, 1.0]),
    "zero times the infinite derivative": (lambda x: x.sqrt() * 0, [0.0, 1.0, 2.0]),
    "masked_fill": (lambda x: x.log().masked_fill(x <= 0, 0.0), [-1.0, 0.0, 2.0]),
    "logsumexp of -inf": (lambda x: torch.logsumexp(x, 0), [-float("inf"), 1.0, 2.0]),
    "softmax with -inf": (lambda x: torch.softmax(x, 0), [-float("inf"), 1.0, 2.0]),
    "huber at its bound": (lambda x: torch.nn.functional.huber_loss(x, x * 0), [1.0, -1.0, 0.0]),
    "smooth l1 at its bound": (lambda x: torch.nn.functional.smooth_l1_loss(x, x * 0), [1.0, -1.0, 0.0]),
    "l1 loss at 0": (lambda x: torch.nn.functional.l1_loss(x, torch.zeros_like(x)), [1.0, -1.0, 0.0]),
    "max pool ties": (lambda x: torch.nn.functional.max_pool1d(x[None, None], 2, 1), [3.0, 3.0, 1.0]),
    "round": (lambda x: x.round() * x, [0.5, 1.5, 2.0]),
    "floor": (lambda x: x.floor() * x, [0.5, 1.0, 2.0]),
    "remainder": (lambda x: torch.remainder(x, 1.0), [0.5, 1.0, -2.5]),
    "trunc and frac": (lambda x: x.trunc() * x + x.frac(), [0.5, 1.0, -2.5]),
    "elu far out": (torch.nn.functional.elu, [-800.0, 0.0, 800.0]),
    "selu and celu at 0": (lambda x: torch.selu(x) + torch.celu(x, 0.5), [-1.0, 0.0, 800.0]),
    "sinc at 0": (torch.sinc, [0.0, 1.0, 0.5]),
    "hypot at 0": (lambda x: torch.hypot(x, x), [0.0, 1.0, 0.5]),
    "logaddexp of equal numbers": (lambda x: torch.logaddexp(x, x * 1), [0.0, 1.0, -float("inf")]),
    "softplus far out": (torch.nn.functional.softplus, [-50.0, 0.0, 50.0]),
    "sigmoid far out": (torch.sigmoid, [-800.0, 0.0, 800.0]),
    "logsigmoid far out": (torch.nn.functional.logsigmoid, [-800.0, 0.0, 800.0]),
}


ORDERS = {"first": ("jacrev", "jacfwd"), "second": ("hessian", "reverse over reverse")}


@both_modes
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHOICES)
def test_semantics_22_pytorchs_choices(name, order, mode):
    """Where torch's own modes differ, each element is the answer of one of them; vmap is a loop."""
    f, x = CHOICES[name]
    x = torch.tensor(x, dtype=F64)
    programs = [derivatives(f)[name] for name in ORDERS[order]]
    answers = [p(torch.func, x) for p in programs]
    for p in programs:
        for got in (
            MODES[mode](lambda x, p=p: p(fxfunc, x), x),
            MODES[mode](lambda x, p=p: fxfunc.vmap(lambda x: p(fxfunc, x))(x), torch.stack([x, x.flip(0)]))[
                0
            ],
        ):
            fits = [torch.isclose(got, a, rtol=1e-10, atol=1e-12, equal_nan=True) for a in answers]
            assert torch.stack(fits).any(0).all(), (got, answers)


@both_modes
def test_semantics_22_complex_choices_at_0(mode):
    z = torch.tensor([0.0, 1 + 1j, -2.0], dtype=C128)
    for f in (torch.sgn, torch.angle, torch.abs, lambda z: z / z.abs(), lambda z: z**2, torch.sqrt):
        agree(mode, lambda T, z, f=f: T.grad(lambda z: f(z).sum().real)(z), z)
        agree(mode, lambda T, z, f=f: T.vmap(T.grad(lambda z: f(z).sum().real))(torch.stack([z, z])), z)


TYPED = {
    "int times 1, 1.0, True": lambda i: (i * 1, i * 1.0, i * True),
    "bool times 1, 1.0, True": lambda i: ((i > 1) * 1, (i > 1) * 1.0, (i > 1) * True),
    "full of 1, 1.0, True": lambda i: tuple(torch.full((2,), v) for v in (1, 1.0, True)),
    "where with 1, 1.0": lambda i: (torch.where(i > 1, 1, i), torch.where(i > 1, 1.0, i)),
    "pow 2, 2.0": lambda i: (i**2, i**2.0),
    "add 0, 0.0, False": lambda i: (i + 0, i + 0.0, i + False),
    "literals": lambda i: (torch.tensor(1), torch.tensor(1.0), torch.tensor(True)),
    "clamp 1, 1.0": lambda i: (i.clamp(1, 2), i.clamp(1.0, 2.0)),
    "signed zeros": lambda i: (
        1 / (i * 0 + torch.full((), 0.0)),
        1 / torch.full((), -0.0),
        1 / torch.full((), 0.0),
    ),
    "signed zero numbers": lambda i: (
        torch.atan2(i * 0.0, i * 0.0 - 1),
        torch.copysign(i, 0.0),
        torch.copysign(i, -0.0),
    ),
    "keepdim": lambda i: (i.sum(0), i.sum(0, True), i.sum(0, keepdim=False)),
    "dtypes": lambda i: (
        i.to(torch.float32),
        i.to(F64),
        i.to(torch.int32),
        i.sum(dtype=torch.int32),
        i.sum(),
    ),
    "nan": lambda i: (i * NAN, i * NAN, i * float("inf")),
}


@both_modes
@pytest.mark.parametrize("f", TYPED.values(), ids=TYPED)
def test_semantics_23_equal_numbers_of_other_types_are_not_merged(f, mode):
    i = torch.tensor([0, 1, 2])
    same(MODES[mode](f, i), f(i))
    xs = torch.stack([i, i + 1])
    same(MODES[mode](fxfunc.vmap(f), xs), torch.func.vmap(f)(xs))


@both_modes
def test_semantics_23_derivatives_of_equal_numbers(mode):
    f = lambda x, i: (x * (i * 1) + x * (i * 1.0) + x**2 + x**2.0 + x * True).sum()
    agree(mode, lambda T, x: T.grad(f)(x, torch.arange(3)), vector())
    g = lambda x: (torch.copysign(x, torch.tensor(0.0)) - torch.copysign(x, torch.tensor(-0.0))).sum()
    agree(mode, lambda T, x: T.grad(g)(x), vector())


def test_semantics_23_graphs_and_signatures_differ_by_type():
    graphs = [fxfunc.make_graph(lambda i, v=v: i * v)(torch.arange(3)) for v in (1, 1.0, True)]
    assert len(set(graphs)) == 3
    f = fxfunc.jit(lambda i, v: i * v)
    same([f(torch.arange(3), v) for v in (1, 1.0, True)], [torch.arange(3) * v for v in (1, 1.0, True)])
    assert f.cache_info().misses == 3
    static = fxfunc.jit(lambda i, v: i * v, static_argnums=1)
    same([static(torch.arange(3), v) for v in (1, 1.0, True)], [torch.arange(3) * v for v in (1, 1.0, True)])


@pytest.mark.parametrize("values", [(1, 1.0, True, 1), (0.0, -0.0, 0.0), (0, False, 0.0, -0.0)])
def test_semantics_23_a_closed_over_number_of_another_type_is_not_stale(values):
    box = {}
    f = fxfunc.jit(lambda i: 1 / torch.full((), box["v"]) + i * box["v"])
    for box["v"] in values:
        same(f(torch.arange(3)), 1 / torch.full((), box["v"]) + torch.arange(3) * box["v"])


@pytest.mark.parametrize(
    "values", [(0.0, -0.0), ((1, 2), (1.0, 2), (True, 2)), (((0.0,),), ((-0.0,),))], ids=str
)
def test_semantics_23_signatures_differ_by_type_and_sign_inside_tuples(values):
    flat = lambda v: torch.utils._pytree.tree_leaves(v)
    f = lambda i, v: sum(torch.copysign(i + 1.0, x) * x + i * x for x in flat(v))
    for jitted in (fxfunc.jit(f), fxfunc.jit(f, static_argnums=1)):
        for v in values:
            same(jitted(torch.arange(3), v), f(torch.arange(3), v))


# ----- surroundings ---------------------------------------------------------------------------------------------------


def written_between(T, x):
    y = x * 1
    v = y.view(-1)[1:]
    y.add_(x)
    g = T.grad(lambda z: (y * 1 * z * z).sum() + (v * 1 * z[1:]).sum())(x)
    v.mul_(3)
    return (g * y).sum() + T.vmap(lambda a, b: a * b)(y, g).sum()


def written_inside(T, x):
    def inner(z):
        a = z * 1
        a[1:].mul_(2)
        a += x
        a[0] = x[1]
        return (a * a).sum()

    return (T.grad(inner)(x) * x).sum()


def filled(T, x):
    out = torch.zeros_like(x)
    for i in range(3):
        out[i] = x[i] * x.sum()
    return T.grad(lambda z: (out * z**2).sum())(x).sum()


def relu_in_place(T, x):
    y = torch.nn.functional.relu(x - 0.5, inplace=True).sigmoid()
    return T.vmap(lambda a: (y * a.clone().mul_(2)).sum())(y).sum()


def swapped(T, x):
    y = x * x
    a, b = y[0].clone(), y[1]
    y[0] = b
    y[1] = a
    return T.grad(lambda z: (z * y * a * b).sum())(x).sum()


def copied_out(T, x):
    y = torch.empty(3, dtype=F64)
    torch.mul(x, x, out=y)
    return T.grad(lambda z: (z * y).sum())(x).sum()


MUTATING = [written_between, written_inside, filled, relu_in_place, swapped]


@every_mode
@pytest.mark.parametrize("program", MUTATING, ids=lambda f: f.__name__)
def test_semantics_24_writes_between_and_inside_captures(program, mode):
    for outer in ("grad", "jacfwd", "hessian"):
        agree(mode, lambda T, x, outer=outer: getattr(T, outer)(lambda x: program(T, x))(x), vector())
    agree(mode, lambda T, x: T.vmap(lambda x: program(T, x))(x), matrix().abs())
    same(MODES[mode](lambda x: program(fxfunc, x), vector()), program(torch.func, vector()))


@both_modes
def test_semantics_24_an_out_argument_is_written(mode):
    """Torch refuses out= under vmap and grad; the functional program is the reference."""
    got = MODES[mode](fxfunc.vmap(lambda x: copied_out(fxfunc, x)), matrix())
    same(got, (matrix() ** 2).sum(1))
    got = MODES[mode](fxfunc.grad(lambda x: copied_out(fxfunc, x)), vector())
    same(got, 2 * vector())


WRITES_OUT = {
    "add_": lambda c, x: c.add_(x),
    "through a view": lambda c, x: c.view(-1).mul_(x),
    "an element": lambda c, x: c.__setitem__(0, x.sum()),
    "under no_grad": lambda c, x: torch.no_grad()(lambda: c.mul_(2))(),
    "out": lambda c, x: torch.mul(x, x, out=c),
}
WITHIN = {
    "grad": lambda T, f, x: T.grad(lambda x: f(x).sum())(x),
    "jvp": lambda T, f, x: T.jvp(f, (x,), (x,)),
    "vmap": lambda T, f, x: T.vmap(f)(torch.stack([x, x])),
    "vmap of grad": lambda T, f, x: T.vmap(T.grad(lambda x: f(x).sum()))(torch.stack([x, x])),
}


@both_modes
@pytest.mark.parametrize("transform", WITHIN.values(), ids=WITHIN)
@pytest.mark.parametrize("write", WRITES_OUT.values(), ids=WRITES_OUT)
def test_semantics_24_writing_to_a_closure_inside_a_transform_is_refused(write, transform, mode):
    """torch.func raises RuntimeError; the closed-over tensor is untouched and the line named."""
    c = torch.ones(3, dtype=F64)

    def f(x):
        write(c, x)
        return x * c

    with pytest.raises(errors.MutatedCapture, match="clone") as raised:
        MODES[mode](lambda x: transform(fxfunc, f, x), vector())
    assert isinstance(raised.value, RuntimeError) and raised.value.source.startswith(__file__)
    same(c, torch.ones(3, dtype=F64))


@both_modes
@pytest.mark.parametrize("write", WRITES_OUT.values(), ids=WRITES_OUT)
def test_semantics_24_writing_to_an_outer_transforms_value_is_refused(write, mode):
    def program(T, x):
        c = x * 1

        def inner(z):
            write(c, z)
            return (z * c).sum()

        return T.grad(inner)(x).sum()

    for outer in (fxfunc.grad, fxfunc.vmap, lambda f: f):
        if outer is fxfunc.vmap or mode == "jit" or outer is fxfunc.grad:
            with pytest.raises(RuntimeError):
                MODES[mode](
                    outer(lambda x: program(fxfunc, x)), matrix() if outer is fxfunc.vmap else vector()
                )


@pytest.mark.parametrize("write", WRITES_OUT.values(), ids=WRITES_OUT)
def test_semantics_24_writes_under_jit_happen_after_the_run(write):
    """To a closure, to an argument, and to a buffer, at every call."""
    expected, c = (torch.ones(3, dtype=F64) for _ in range(2))
    buffers = torch.nn.Module()
    buffers.register_buffer("count", torch.ones(3, dtype=F64))

    def f(x, a):
        for t in (c, a, buffers.count):
            write(t, x)
        return x * c + a

    jitted, a = fxfunc.jit(f), torch.ones(3, dtype=F64)
    for _ in range(3):
        write(expected, vector())
        same(jitted(vector(), a), vector() * expected + expected)
        same([c, a, buffers.count], [expected] * 3)
    assert jitted.cache_info().misses == 1


def test_semantics_24_batch_norm_statistics_are_written_back_under_jit():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.BatchNorm1d(3).double() for _ in range(2))
    x = torch.randn(5, 3, dtype=F64)
    jitted = fxfunc.jit(lambda x: ours(x))
    for _ in range(2):
        same(jitted(x), theirs(x))
        same(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@both_modes
def test_semantics_24_a_mapped_argument_is_written_as_by_torch(mode):
    for f in (lambda a: a.add_(1), lambda a: a[1:].mul_(2).sum(), lambda a: a.copy_(a.flip(0)) * a):
        ours, theirs = matrix(), matrix()
        same(MODES[mode](fxfunc.vmap(f), ours), torch.func.vmap(f)(theirs))
        same(ours, theirs)


VALUES = {
    "if": lambda x: x * 2 if x.sum() > 0 else x,
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x[0]),
    "int": lambda x: x * int(x[0]),
    "bool": lambda x: x * bool(x[0]),
    "tolist": lambda x: x * x.tolist()[0],
    "while": lambda x: [x for _ in iter(lambda: bool((x > 5).all()), True)][-1],
    "mask": lambda x: x[x > 0.5],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0.5),
    "numpy": lambda x: x * torch.from_numpy(x.numpy()),
    "range": lambda x: sum(x for _ in range(x.long()[0])),
    "equal": lambda x: x * torch.equal(x, x),
    "allclose": lambda x: x * torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
}
TRANSFORMS = {  # of one example alone: test_inside.py
    "vmap": lambda f: lambda x: fxfunc.vmap(f)(torch.stack([x, x])),
    "jit": fxfunc.jit,
    "jit of vmap of grad": lambda f: fxfunc.jit(
        lambda x: fxfunc.vmap(fxfunc.grad(lambda x: f(x).sum()))(torch.stack([x, x]))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("f", VALUES.values(), ids=VALUES)
def test_semantics_25_code_that_needs_values_is_refused_by_name(f, transform):
    """Nothing has happened then: no draw of random numbers, no write, no entry in a cache."""
    buffer, x = torch.ones(3, dtype=F64), vector()

    def draws_first(x):
        y = x * torch.rand(3, dtype=F64)
        return f(y)

    def writes_first(x):
        buffer.add_(1)
        return f(x)

    for function in (f, draws_first, writes_first):
        before = torch.get_rng_state()
        g = transform(function)
        randomness = function is draws_first and transform in (
            TRANSFORMS["vmap"],
            TRANSFORMS["jit of vmap of grad"],
        )
        kind = errors.RandomInVmap if randomness else errors.ValueDependent
        with pytest.raises(kind) as raised:
            g(x)
        assert isinstance(raised.value, RuntimeError)
        assert raised.value.source.startswith(__file__ + ":")
        if kind is errors.ValueDependent:
            assert raised.value.source == f"{__file__}:{f.__code__.co_firstlineno}"
            assert "torch.where" in str(raised.value)
        assert torch.equal(torch.get_rng_state(), before)
        same([buffer, x], [torch.ones(3, dtype=F64), vector()])
        assert not hasattr(g, "cache_info") or g.cache_info().currsize == 0


def test_semantics_25_a_refused_call_leaves_no_capture_behind():
    with pytest.raises(errors.ValueDependent):
        fxfunc.grad(lambda x: fxfunc.vmap(VALUES["if"])(x).sum())(vector())
    x = vector().requires_grad_()
    (x * 2).sum().backward()
    same(x.grad, torch.full((3,), 2.0, dtype=F64))
    assert bool(x.sum() > 0) and fxfunc.jit(lambda x: x * 2)(x).requires_grad


class CountedFunctions(TorchFunctionMode):
    def __init__(self):
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class CountedCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "float64 by default": lambda: default_dtype(F64),
    "half by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "function mode": CountedFunctions,
    "dispatch mode": CountedCalls,
    "deterministic": deterministic,
    "no multithreading of autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
}
PROGRAMS = {
    "activations": lambda x: (x.tanh() * x.sigmoid() + torch.nn.functional.gelu(x) + x.softmax(0)).sum(),
    "products": lambda x: (torch.outer(x, x) @ x + x.cumprod(0) + x.prod()).sum(),
    "choices": lambda x: (x.relu() * 0.5 + x.clamp(0.3, 0.6) + torch.maximum(x, x.flip(0)) ** 1.5).sum(),
    "statistics": lambda x: x.std() + x.var(unbiased=False) + x.logsumexp(0) + torch.linalg.vector_norm(x),
    "derived": lambda x: (
        torch.special.i0(x) + torch.lgamma(x) + torch.linalg.inv(torch.outer(x, x) + x.diag())
    ).sum(),
    "layer norm": lambda x: (torch.nn.functional.layer_norm(x[None], (3,)) * x).sum(),
    "convolution": lambda x: torch.nn.functional.conv1d(x.view(1, 1, 3), x[:2].view(1, 1, 2)).square().sum(),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_semantics_26_rules_do_not_depend_on_the_surroundings(name, surroundings):
    """Every pass and memo runs for the first time inside; what was made there serves outside too."""
    f, x = PROGRAMS[name], vector().float()
    programs = [lambda T: T.grad(f)(x), lambda T: T.vmap(T.grad(f))(torch.stack([x, x * x]))]
    want = [p(torch.func) for p in programs]
    infer_forget()
    with SURROUNDINGS[surroundings]():
        inside = [p(fxfunc) for p in programs]
    outside = [p(fxfunc) for p in programs]
    for got in (inside, outside):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert all(g.dtype == torch.float32 and g.device.type == "cpu" for g in got)


def infer_forget():
    """Forget what was inferred, traced and rewritten so far."""
    from fxfunc.passes.infer import forget

    forget()


@both_modes
def test_semantics_26_user_modes_do_not_see_our_passes(mode):
    x = vector()
    f = lambda x: (x.tanh() * torch.special.i0(x)).sum()
    infer_forget()
    with CountedFunctions() as functions:
        MODES[mode](fxfunc.hessian(f), x)
    infer_forget()
    with CountedCalls() as calls:
        MODES[mode](fxfunc.hessian(f), x)
    graph = fxfunc.make_graph(fxfunc.hessian(f))(x)
    assert functions.calls.count(torch.Tensor.tanh) <= 1 and functions.calls.count(torch.special.i0) <= 1
    assert calls.calls.count(torch.ops.aten.tanh.default) <= 1
    assert len(calls.calls) <= 3 * len(graph) + 20 and not any("meta" in str(c) for c in calls.calls)


def test_semantics_26_a_function_mode_sees_the_users_calls_as_under_torch_func():
    seen = []
    for T in (fxfunc, torch.func):
        with CountedFunctions() as functions:
            T.grad(lambda x: (x.tanh() * x.sin()).sum())(vector())
        methods = (torch.Tensor.tanh, torch.Tensor.sin, torch.Tensor.mul, torch.Tensor.sum)
        seen.append([c for c in functions.calls if c in methods])
    assert seen[0] == seen[1] == list(methods)


@both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_semantics_26_autocast_is_applied_at_capture(dtype, mode):
    """The casts are torch's, for results and derivatives, and belong to the program: also when it runs outside."""
    w = torch.linspace(-1, 1, 9).reshape(3, 3)
    f = lambda x: torch.nn.functional.linear(x, w)
    programs = {
        "value": lambda T, x: T.vmap(f)(x),
        "grad": lambda T, x: T.grad(lambda x: f(x).exp().sum().float())(x),
        "vmap of grad": lambda T, x: T.vmap(T.grad(lambda x: f(x).sin().sum().float()))(x),
        "jvp": lambda T, x: T.jvp(f, (x,), (x,)),
        "softmax": lambda T, x: T.vmap(lambda x: f(x).softmax(-1))(x),
        "autocast inside": lambda T, x: T.grad(lambda x: casting(f, dtype)(x).float().sum())(x),
    }
    x = matrix().float()
    for name, p in programs.items():
        with contextlib.nullcontext() if name == "autocast inside" else torch.autocast("cpu", dtype):
            got, want = MODES[mode](lambda x, p=p: p(fxfunc, x), x), p(torch.func, x)
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def casting(f, dtype):
    def g(x):
        with torch.autocast("cpu", dtype):
            return f(x)

    return g


def test_semantics_26_a_compiled_call_keeps_the_casts_of_its_capture():
    x, w = matrix().float(), matrix().float()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = fxfunc.jit(lambda x: x @ w).lower(x).compile()
    assert compiled(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        plain = fxfunc.jit(lambda x: x * 1).lower(x).compile()
        assert plain(x).dtype == torch.float32
    jitted = fxfunc.jit(lambda x: x @ w)
    assert jitted(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert jitted(x).dtype == torch.bfloat16
    assert jitted(x).dtype == torch.float32


@both_modes
@pytest.mark.parametrize("dtype", [F64, torch.float16], ids=str)
def test_semantics_26_the_default_dtype_is_that_of_the_capture(dtype, mode):
    f = lambda x: x * torch.ones(3) + torch.full((3,), 0.5) + torch.tensor(2.0) + torch.arange(3) / 2
    for _ in range(2):
        with default_dtype(dtype):
            agree(mode, lambda T, x: T.vmap(f)(x), matrix().float())
            agree(
                mode,
                lambda T, i: T.vmap(lambda i: i / 2 + i.float().mean())(i),
                torch.arange(6).reshape(2, 3),
            )
        agree(mode, lambda T, x: T.vmap(f)(x), matrix().float())


FOREIGN = {
    "grad": lambda T, x: T.grad(lambda x: (x.tanh() * x).sum())(x),
    "vmap": lambda T, x: T.vmap(lambda a: a.sin() * x)(x),
    "vmap of grad": lambda T, x: T.vmap(T.grad(lambda a: a**3 * x.sum()))(x),
    "hessian": lambda T, x: T.hessian(lambda x: (x**3).sum())(x),
    "jvp": lambda T, x: T.jvp(torch.sin, (x,), (x,))[1],
}
foreign = pytest.mark.parametrize("program", FOREIGN.values(), ids=FOREIGN)


@both_modes
@foreign
def test_semantics_28_make_fx_sees_plain_aten(program, mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    f = lambda x: MODES[mode](lambda x: program(fxfunc, x), x) + x
    for tracing in ("real", "fake"):
        graph = make_fx(f, tracing_mode=tracing)(vector())
        calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        assert calls and all(isinstance(c, torch._ops.OpOverload) and c.namespace == "aten" for c in calls)
        for x in (vector(), vector() * 0.5):  # the values of the trace are not baked
            same(graph(x), program(torch.func, x) + x)


@both_modes
@foreign
def test_semantics_28_export_sees_plain_aten(program, mode):
    class M(torch.nn.Module):
        def forward(self, x):
            return MODES[mode](lambda x: program(fxfunc, x), x) + x

    exported = torch.export.export(M(), (vector(),), strict=False)
    for x in (vector(), vector() * 0.5):
        same(exported.module()(x), program(torch.func, x) + x)


@both_modes
@foreign
def test_semantics_28_fake_tensors_give_fake_tensors(program, mode):
    from torch._subclasses import FakeTensor, FakeTensorMode

    want = program(torch.func, vector())
    with FakeTensorMode() as fakes:
        out = MODES[mode](lambda x: program(fxfunc, x), fakes.from_tensor(vector()))
    assert isinstance(out, FakeTensor) and out.fake_mode is fakes
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    same(MODES[mode](lambda x: program(fxfunc, x), vector()), want)  # nothing fake was kept


@both_modes
@foreign
def test_semantics_28_torch_compile_runs_us_as_we_are(program, mode):
    def f(x):
        return MODES[mode](lambda x: program(fxfunc, x), x * 2) + x.sin()

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager")
    for x in (vector(), vector() * 0.5):
        same(compiled(x), program(torch.func, x * 2) + x.sin())
    x = vector().requires_grad_()
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    (want,) = torch.autograd.grad((program(torch.func, x * 2) + x.sin()).sum(), x)
    same(got, want)


INSIDE = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}
CALLED = {
    "grad": fxfunc.grad(lambda x: (x * x).sum()),
    "grad_and_value": lambda x: fxfunc.grad_and_value(lambda x: (x * x).sum())(x)[0],
    "value_and_grad": lambda x: fxfunc.value_and_grad(lambda x: (x * x).sum())(x)[1],
    "vjp": lambda x: fxfunc.vjp(torch.sin, x)[0],
    "jvp": lambda x: fxfunc.jvp(torch.sin, (x,), (x,))[1],
    "linearize": lambda x: fxfunc.linearize(torch.sin, x)[0],
    "vmap": fxfunc.vmap(torch.sin),
    "jacrev": fxfunc.jacrev(torch.sin),
    "jacfwd": fxfunc.jacfwd(torch.sin),
    "hessian": fxfunc.hessian(lambda x: (x**3).sum()),
    "jit": fxfunc.jit(torch.sin),
    "scan": lambda x: fxfunc.scan(lambda c, a: (c + a, c), x[0], x)[1],
    "make_graph": lambda x: fxfunc.make_graph(torch.sin)(x) and x,
    "stop_gradient": fxfunc.stop_gradient,
    "closing over": lambda x: fxfunc.vmap(lambda y: y * x.sum())(torch.ones(3)),
    "compiled": fxfunc.jit(torch.sin).lower(torch.ones(3, dtype=F64)).compile(),
    "lower": lambda x: fxfunc.jit(torch.sin).lower(x) and x,
}


@pytest.mark.parametrize("called", CALLED.values(), ids=CALLED)
@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
def test_semantics_28_inside_a_torch_func_transform_we_refuse(inside, called):
    with pytest.raises(errors.NestedTorchFunc, match="Use fxfunc for the outer transform too") as raised:
        inside(called, vector())
    assert isinstance(raised.value, RuntimeError)
    assert raised.value.source.startswith(__file__)


def test_semantics_28_torch_func_inside_ours_is_refused_or_right():
    """Either torch.func's own result or a named error; never a constant."""
    f = lambda x: torch.func.grad(lambda y: (y**3 * x).sum())(x).sum()
    want = torch.func.grad(f)(vector())
    try:
        same(fxfunc.grad(f)(vector()), want)
    except errors.FxfuncError as e:
        assert e.source.startswith(__file__)


@pytest.mark.parametrize("package", ["passes", "codegen", "bench"])
def test_semantics_30_a_bare_import_is_refused(package):
    root = Path(fxfunc.__file__).parents[1]
    for line in (f"import {package}", f"import fxfunc, {package}", f"from {package} import *"):
        done = subprocess.run([sys.executable, "-c", line], cwd=root, capture_output=True, text=True)
        assert done.returncode == 1 and f"ImportError: import fxfunc.{package}, not {package}" in done.stderr
    assert __import__(f"fxfunc.{package}", fromlist=["_"]).__name__ == f"fxfunc.{package}"


SCATTERED = {
    "t().reshape": lambda z: z.t().reshape(-1),
    "t().contiguous": lambda z: z.t().contiguous(),
    "t().flatten": lambda z: z.t().flatten(),
    "[:, :2].reshape": lambda z: z[:, :2].reshape(-1),
}
IN_ORDER = {
    "reshape": lambda z: z.reshape(-1),
    "contiguous": lambda z: z.contiguous(),
    "[0].view": lambda z: z[0].view(-1),
    "t().unsqueeze": lambda z: z.t().unsqueeze(0),
    "t().view": lambda z: z.t().view(3, 1, 2),
    "matmul": lambda z: (torch.ones(2, 2).t() @ z).reshape(-1),
}


def written(view, read):
    """Write to a view of z, or to z, and read it or the other."""

    def f(x):
        z = x * 1
        y = view(z)
        (z if read == "view of written" else y).mul_(3)
        return ((y if "view" in read else z) ** 2).sum()

    return f


@pytest.mark.parametrize("read", ["base", "written view", "view of written"])
@pytest.mark.parametrize("name", [*SCATTERED, *IN_ORDER])
def test_semantics_24_a_reshape_may_copy(name, read):
    """torch copies in reshape where the elements are not in order: then a write to one side is not one to the other."""
    x = torch.arange(1.0, 7).reshape(2, 3)
    f = written((SCATTERED | IN_ORDER)[name], read)
    if name in SCATTERED and read != "written view":
        with pytest.raises(fxfunc.errors.NotSupported, match=r"copied.*test_semantics.py.*Clone"):
            fxfunc.grad(f)(x)
    else:
        assert torch.equal(fxfunc.grad(f)(x), torch.func.grad(f)(x))
        assert torch.equal(fxfunc.jit(fxfunc.vmap(f))(x[None]), torch.func.vmap(f)(x[None]))


def test_semantics_24_a_reshape_of_an_argument_may_copy():
    for f, x in (
        (lambda a: a.t().reshape(-1).mul_(2), torch.ones(2, 3)),
        (lambda a: a.reshape(-1).mul_(2), torch.ones(2, 3).t()),
    ):
        with pytest.raises(fxfunc.errors.NotSupported, match="copied"):
            fxfunc.jit(f)(x)
        assert torch.equal(x, torch.ones_like(x))
