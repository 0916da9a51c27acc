"""Elementwise ops."""

from __future__ import annotations

import cmath
import math

from ..record import Value, aten
from .batching import pointwise
from .table import ZERO, bilinear, composite, elementwise, linear, rule, zero

# ----- arithmetic -----------------------------------------------------------------------------------------------------
rule(
    aten.add.Tensor,
    jvp=[lambda t, y, a, b, alpha=1: t, lambda t, y, a, b, alpha=1: t * alpha],
    transpose=[lambda ct, a, b, alpha=1: ct, lambda ct, a, b, alpha=1: ct * _conj(alpha)],
    batch=pointwise,
)
rule(
    aten.sub.Tensor,
    jvp=[lambda t, y, a, b, alpha=1: t, lambda t, y, a, b, alpha=1: -t * alpha],
    transpose=[lambda ct, a, b, alpha=1: ct, lambda ct, a, b, alpha=1: -ct * _conj(alpha)],
    batch=pointwise,
)
bilinear(aten.mul.Tensor, lambda ct, a, b: ct * _conj(b), lambda ct, a, b: ct * _conj(a), batch=pointwise)
rule(
    aten.div.Tensor,
    jvp=[lambda t, y, a, b: t / b, lambda t, y, a, b: t * (-y / b)],
    transpose=[lambda ct, a, b: ct / _conj(b), None],
    batch=pointwise,
)
linear(aten.neg.default, lambda ct, a: -ct, batch=pointwise)
linear(aten._conj_physical.default, lambda ct, a: ct.conj(), batch=pointwise)
linear(aten._to_copy.default, lambda ct, a, **kwargs: ct, batch=pointwise)
composite(aten.add.Scalar, lambda a, b, alpha=1: a + b * alpha)
composite(aten.sub.Scalar, lambda a, b, alpha=1: a - b * alpha)
composite(aten.mul.Scalar, lambda a, b: a * b)
composite(aten.div.Scalar, lambda a, b: a / b)
composite(aten.addcmul.default, lambda a, b, c, value=1: a + b * c * value)
composite(aten.addcdiv.default, lambda a, b, c, value=1: a + b / c * value)
composite(aten.lerp.Scalar, lambda a, b, weight: a + (b - a) * weight)
composite(aten.lerp.Tensor, lambda a, b, weight: a + (b - a) * weight)
elementwise(aten.remainder.Tensor, lambda t, y, a, b: t, lambda t, y, a, b: -t * (a / b).floor())
elementwise(aten.remainder.Scalar, lambda t, y, a, b: t)
elementwise(aten.fmod.Tensor, lambda t, y, a, b: t, lambda t, y, a, b: -t * (a / b).trunc())
elementwise(aten.fmod.Scalar, lambda t, y, a, b: t)
elementwise(
    aten.div.Tensor_mode,
    lambda t, y, a, b, *, rounding_mode: None if rounding_mode else t / b,
    lambda t, y, a, b, *, rounding_mode: None if rounding_mode else t * (-y / b),
)
elementwise(aten.div.Scalar_mode, lambda t, y, a, b, *, rounding_mode: None if rounding_mode else t / b)
composite(aten.copy.default, lambda a, b, non_blocking=False: b.to(a.dtype).expand(a.shape))
composite(aten.fill.Scalar, lambda a, value: a.full(a.shape, value))
composite(aten.fill.Tensor, lambda a, value: value.to(a.dtype).expand(a.shape))


def _conj(x):
    """The conjugate of a Value or number."""
    return x.conjugate() if isinstance(x, complex) else x.conj() if hasattr(x, "conj") else x


def ratio(a, b):
    """a / b, and 0 with all its derivatives where b is 0: a choice after the division would leave 0 / 0 in reverse mode."""
    none = b.eq(0)
    return none.where(0.0, a / none.where(1.0, b))


# ----- powers, exponentials, logarithms -------------------------------------------------------------------------------
elementwise(aten.exp.default, lambda t, y, a: t * y)
elementwise(aten.exp2.default, lambda t, y, a: t * y * math.log(2))
elementwise(aten.expm1.default, lambda t, y, a: t * (y + 1))
elementwise(aten.log.default, lambda t, y, a: t / a)
elementwise(aten.log2.default, lambda t, y, a: t / (a * math.log(2)))
elementwise(aten.log10.default, lambda t, y, a: t / (a * math.log(10)))
elementwise(aten.log1p.default, lambda t, y, a: t / (a + 1))
elementwise(aten.special_entr.default, lambda t, y, a: -t * (a.log() + 1))
elementwise(aten.sqrt.default, lambda t, y, a: t / (y * 2))
elementwise(aten.rsqrt.default, lambda t, y, a: t * (-0.5 * y * y * y))
elementwise(aten.reciprocal.default, lambda t, y, a: t * (-y * y))


def _pow_scalar(t, y, a, n):
    return t * 0 if n == 0 else t * (a.pow(n - 1) * n)


def _pow_exponent(t, y, a, b):
    """d a**b / db = y log a, with 0 where a = 0 and b >= 0 (also for a number a)."""
    if isinstance(a, Value):
        return t * (a.eq(0) & _not_negative(b)).where(0.0, y * a.to(y.dtype).log())
    if a != 0:
        return t * (y * (cmath.log(a) if y.dtype.is_complex else math.log(a) if a > 0 else math.nan))
    return t * _not_negative(b).where(0.0, y * -math.inf)


def _not_negative(b):
    """Where b >= 0; a complex number is if it is real."""
    real = b.to(b.dtype.to_real())
    return real.ge(0) & b.eq(real) if b.dtype.is_complex else real.ge(0)


elementwise(aten.pow.Tensor_Scalar, _pow_scalar)
elementwise(
    aten.pow.Tensor_Tensor, lambda t, y, a, b: t * b.eq(0).where(0.0, b * a.pow(b - 1)), _pow_exponent
)
elementwise(aten.pow.Scalar, lambda t, y, a, b: _pow_exponent(t, y, a, b))
elementwise(
    aten.logaddexp.default,
    lambda t, y, a, b: t * _part_of_sum(a, b, y),
    lambda t, y, a, b: t * _part_of_sum(b, a, y),
)


def _part_of_sum(a, b, y):
    """exp(a - y) with y = log(exp(a) + exp(b)), for real numbers without the rounding of y."""
    return (a - y).exp() if y.dtype.is_complex else (a - b).sigmoid()


# ----- trigonometric and hyperbolic -----------------------------------------------------------------------------------
elementwise(aten.sin.default, lambda t, y, a: t * a.cos())
elementwise(aten.cos.default, lambda t, y, a: t * -a.sin())
elementwise(aten.tan.default, lambda t, y, a: t * (y * y + 1))
elementwise(aten.asin.default, lambda t, y, a: t * (1 - a * a).rsqrt())
elementwise(aten.acos.default, lambda t, y, a: t * -(1 - a * a).rsqrt())
elementwise(aten.atan.default, lambda t, y, a: t / (a * a + 1))
elementwise(aten.sinh.default, lambda t, y, a: t * a.cosh())
elementwise(aten.cosh.default, lambda t, y, a: t * a.sinh())
elementwise(aten.tanh.default, lambda t, y, a: t * (1 - y * y))
elementwise(aten.asinh.default, lambda t, y, a: t * (a * a + 1).rsqrt())
elementwise(aten.acosh.default, lambda t, y, a: t * ((a - 1).rsqrt() * (a + 1).rsqrt()))
elementwise(aten.atanh.default, lambda t, y, a: t / (1 - a * a))
elementwise(
    aten.atan2.default,
    lambda t, y, a, b: t * ratio(b, a * a + b * b),
    lambda t, y, a, b: t * ratio(-a, a * a + b * b),
)
elementwise(aten.hypot.default, lambda t, y, a, b: t * (a / y), lambda t, y, a, b: t * (b / y))
elementwise(aten.erf.default, lambda t, y, a: t * ((-a * a).exp() * (2 / math.sqrt(math.pi))))
elementwise(aten.erfc.default, lambda t, y, a: t * ((-a * a).exp() * (-2 / math.sqrt(math.pi))))
elementwise(aten.lgamma.default, lambda t, y, a: t * a.digamma())
elementwise(aten.digamma.default, lambda t, y, a: t * a.builder.emit(aten.polygamma.default, (1, a)))
elementwise(aten.polygamma.default, lambda t, y, n, a: t * a.builder.emit(aten.polygamma.default, (n + 1, a)))

# ----- activations ----------------------------------------------------------------------------------------------------
elementwise(aten.relu.default, lambda t, y, a: t.call(aten.threshold_backward.default, y, 0))
rule(
    aten.threshold_backward.default,
    jvp=[lambda t, y, ct, a, at: t.call(aten.threshold_backward.default, a, at), ZERO],
    transpose=[lambda ct, t, a, at: ct.call(aten.threshold_backward.default, a, at), None],
    batch=pointwise,
)
elementwise(aten.sigmoid.default, lambda t, y, a: t * (y * (1 - y)))
elementwise(aten.leaky_relu.default, lambda t, y, a, slope=0.01: a.gt(0).where(t, t * slope))
elementwise(aten.hardtanh.default, lambda t, y, a, lo=-1.0, hi=1.0: (a.gt(lo) & a.lt(hi)).where(t, 0.0))
composite(aten.silu.default, lambda a: a * a.sigmoid())
composite(aten.hardswish.default, lambda a: a * (a + 3).clamp(0, 6) / 6)
elementwise(aten.hardsigmoid.default, lambda t, y, a: (a.gt(-3) & a.lt(3)).where(t / 6, 0.0))


def _elu(t, y, a, alpha=1.0, scale=1.0, input_scale=1.0):
    """exp is kept from large numbers, where it would overflow; torch's second derivative at 0 is 0."""
    below = a.lt(0).where(a * input_scale, 0.0)
    return a.gt(0).where(t * scale, t * (below.exp() * (alpha * scale * input_scale)))


elementwise(aten.elu.default, _elu)


def _gelu(a, approximate="none"):
    if approximate == "tanh":
        inner = (a + a * a * a * 0.044715) * math.sqrt(2 / math.pi)
        return a * (inner.tanh() + 1) * 0.5
    return a * ((a * math.sqrt(0.5)).erf() + 1) * 0.5


composite(aten.gelu.default, _gelu, batch=pointwise)
elementwise(
    aten.softplus.default,
    lambda t, y, a, beta=1, threshold=20: (a * beta).gt(threshold).where(t, t * (a * beta).sigmoid()),
)
elementwise(aten.log_sigmoid_forward.default, lambda t, y, a: (t * (-a).sigmoid(), None))
composite(aten._prelu_kernel.default, lambda a, w: a.gt(0).where(a, a * w), batch=pointwise)
composite(aten.mish.default, lambda a: a * a.softplus().tanh(), batch=pointwise)

# ----- choices --------------------------------------------------------------------------------------------------------
elementwise(
    aten.abs.default,
    lambda t, y, a: t * a.sgn() if not a.dtype.is_complex else (t * a.sgn().conj()).to(y.dtype),
)
rule(
    aten.where.self,
    jvp=[
        ZERO,
        lambda t, y, c, a, b: c.where(_as(t, a, y), 0.0),
        lambda t, y, c, a, b: c.where(0.0, _as(t, b, y)),
    ],
    transpose=[None, lambda ct, c, a, b: c.where(ct, 0.0), lambda ct, c, a, b: c.where(0.0, ct)],
    batch=pointwise,
)


def _as(t, a, y):
    return t.to(y.dtype)


def _share(t, y, a, b):
    """The part of a tie: 1/2 each where a == b."""
    return a.eq(b).where(t * 0.5, y.eq(a).where(t, 0.0))


elementwise(
    aten.maximum.default, lambda t, y, a, b: _share(t, y, a, b), lambda t, y, a, b: _share(t, y, b, a)
)
elementwise(
    aten.minimum.default, lambda t, y, a, b: _share(t, y, a, b), lambda t, y, a, b: _share(t, y, b, a)
)
elementwise(
    aten.fmax.default,
    lambda t, y, a, b: (a.ge(b) | b.ne(b)).where(t, 0.0),
    lambda t, y, a, b: (a.ge(b) | b.ne(b)).where(0.0, t),
)
elementwise(
    aten.fmin.default,
    lambda t, y, a, b: (a.le(b) | b.ne(b)).where(t, 0.0),
    lambda t, y, a, b: (a.le(b) | b.ne(b)).where(0.0, t),
)


def _inside(a, lo, hi):
    """Where clamp lets the gradient through: bounds included."""
    if lo is None:
        return a.le(hi)
    return a.ge(lo) if hi is None else a.ge(lo) & a.le(hi)


elementwise(aten.clamp.default, lambda t, y, a, lo=None, hi=None: _inside(a, lo, hi).where(t, 0.0))
elementwise(
    aten.clamp.Tensor,
    lambda t, y, a, lo=None, hi=None: _inside(a, lo, hi).where(t, 0.0),
    lambda t, y, a, lo, hi=None: (a.lt(lo) if hi is None else a.lt(lo) & lo.lt(hi)).where(t, 0.0),
    lambda t, y, a, lo, hi: (a.gt(hi) if lo is None else a.gt(hi) | lo.gt(hi)).where(t, 0.0),
)
elementwise(aten.clamp_min.default, lambda t, y, a, lo: a.ge(lo).where(t, 0.0))
elementwise(aten.clamp_max.default, lambda t, y, a, hi: a.le(hi).where(t, 0.0))
elementwise(
    aten.clamp_min.Tensor,
    lambda t, y, a, lo: a.ge(lo).where(t, 0.0),
    lambda t, y, a, lo: a.lt(lo).where(t, 0.0),
)
elementwise(
    aten.clamp_max.Tensor,
    lambda t, y, a, hi: a.le(hi).where(t, 0.0),
    lambda t, y, a, hi: a.gt(hi).where(t, 0.0),
)
rule(
    aten.masked_fill.Scalar,
    jvp=[lambda t, y, a, m, v: m.where(0.0, t), ZERO],
    transpose=[lambda ct, a, m, v: m.where(0.0, ct), None],
    batch=pointwise,
)
rule(
    aten.masked_fill.Tensor,
    jvp=[lambda t, y, a, m, v: m.where(0.0, t), ZERO, lambda t, y, a, m, v: m.where(t, 0.0)],
    transpose=[lambda ct, a, m, v: m.where(0.0, ct), None, lambda ct, a, m, v: m.where(ct, 0.0)],
    batch=lambda ctx, op, args, kwargs: _masked_fill(ctx, *args),
)


def _masked_fill(ctx, a, m, v):
    """The fill may carry the axis, which only `where` allows."""
    if v.dtype != a.dtype:
        v = ctx.call(aten._to_copy.default, (v,), {"dtype": a.dtype})
    return pointwise(ctx, aten.where.self, (m, v, a), {})


# ----- complex numbers ------------------------------------------------------------------------------------------------


def _sgn(t, y, a):
    """z / |z|; zero at zero."""
    if not a.dtype.is_complex:
        return None
    size = a.abs()
    along = (t * y.conj()).to(size.dtype)
    return ratio(t - y * along, size)


def _angle(t, y, a):
    """Im(t / z); zero at zero and for real numbers."""
    if not a.dtype.is_complex:
        return None
    size = a.abs()
    return ratio((t * (a.conj() * -1j)).to(y.dtype), size * size)


elementwise(aten.sgn.default, _sgn)
elementwise(aten.angle.default, _angle)
rule(
    aten.complex.default,
    jvp=[lambda t, y, a, b: t.to(y.dtype), lambda t, y, a, b: t.to(y.dtype) * 1j],
    transpose=[lambda ct, a, b: ct.to(a.dtype), lambda ct, a, b: (ct * -1j).to(b.dtype)],
    batch=pointwise,
)
composite(
    aten.polar.default, lambda a, b: (a * b.cos()).call(aten.complex.default, a * b.sin()), batch=pointwise
)

# ----- no derivative --------------------------------------------------------------------------------------------------
for _op in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge):
    zero(_op.Tensor, batch=pointwise)
    zero(_op.Scalar, batch=pointwise)
for _op in (
    aten.sign,
    aten.floor,
    aten.ceil,
    aten.round,
    aten.trunc,
    aten.logical_not,
    aten.bitwise_not,
    aten.isnan,
    aten.isinf,
    aten.logical_and,
    aten.logical_or,
    aten.logical_xor,
    aten.signbit,
):
    zero(_op.default, batch=pointwise)
for _op in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor, aten.floor_divide):
    zero(_op.Tensor if hasattr(_op, "Tensor") else _op.default, batch=pointwise)
for _op in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor):
    zero(_op.Scalar, batch=pointwise)
    zero(_op.Scalar_Tensor, batch=pointwise)
zero(aten.heaviside.default, batch=pointwise)
