"""What each pointwise and reducing ATen op computes, one row an op: overload -> `Row(expression, compute dtype)`.

An expression is over `Expr`s already cast to the row's compute dtype; the result is cast to the node's. Kinds of compute:
  result    the node's dtype, half and bfloat16 as float32, bool as int32 (ATen's `opmath`)
  exact     the node's dtype as it is (bitwise)
  operands  what the operands promote to (comparisons)
  bool      operands as truth values
  as_is     each operand in its own dtype (casts)
Numbers in tensor slots are constants; keyword arguments and None arrive as they stand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from fxfunc.passes.dims import Size

from .expr import Expr
from .index import NotFusable

aten, prims = torch.ops.aten, torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Row:
    """How to compute an op; `mask` is the position of an operand that is a condition."""

    f: Callable[..., Expr]
    compute: str = "result"
    mask: int | None = None


def _unary(name: str) -> Row:
    return Row(lambda x: x.op(name))


def _rounded(name: str) -> Row:
    return Row(lambda x: x.op(name) if x.dtype.is_floating_point else x)


def _isinf(x: Expr) -> Expr:
    return x.op("abs").op("eq", math.inf) if x.dtype.is_floating_point else x.op("ne", x)


def _isfinite(x: Expr) -> Expr:
    return x.op("abs") < math.inf if x.dtype.is_floating_point else x.op("eq", x)


def _maybe_scaled(b: Expr, alpha: float) -> Expr:
    return b if alpha == 1 else b * alpha


def _clamp(x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    x = x if low is None else x.op("maximum", low)
    return x if high is None else x.op("minimum", high)


def _divide(a: Expr, b: Expr, *, rounding_mode: str | None = None) -> Expr:
    return a.op({None: "div", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode], b) if not (
        rounding_mode == "trunc" and a.dtype.is_floating_point) else (a / b).op("trunc")  # fmt: skip


def _pow(x: Expr, y: Expr) -> Expr:
    n = y.number
    if isinstance(n, (int, float)) and n in _POWERS and (x.dtype.is_floating_point or 0 <= n):
        return _POWERS[n](x)
    if x.dtype.is_floating_point:
        return x.op("pow", y)
    if isinstance(n, (int, float)) and 0 < n == int(n) <= 64:
        return _int_power(x, int(n))
    raise NotFusable("an integer power whose exponent is not a small constant")


def _int_power(x: Expr, n: int) -> Expr:
    if n == 1:
        return x
    half = _int_power(x, n // 2)
    return half * half * x if n % 2 else half * half


# As ATen's kernels: exact products, correctly rounded roots.
_POWERS: dict[float, Callable[[Expr], Expr]] = {
    0: lambda x: x.coerce(1), 1: lambda x: x, 2: lambda x: x * x, 3: lambda x: x * x * x, -1: lambda x: 1.0 / x,
    -2: lambda x: 1.0 / (x * x), 0.5: lambda x: x.op("sqrt"), -0.5: lambda x: x.op("rsqrt"),
}  # fmt: skip


def _sign(x: Expr) -> Expr:
    return (x > 0).cast(x.dtype) - (x < 0).cast(x.dtype)


def _sigmoid(x: Expr) -> Expr:
    return 1.0 / (1.0 + (-x).op("exp"))


def _softplus(x: Expr, beta: Expr | float = 1.0, threshold: Expr | float = 20.0) -> Expr:
    scaled = x * beta
    return (scaled > x.coerce(threshold)).where(x, scaled.op("exp").op("log1p") / x.coerce(beta))


def _elu(
    x: Expr, alpha: Expr | float = 1.0, scale: Expr | float = 1.0, input_scale: Expr | float = 1.0
) -> Expr:
    return (x > 0).where(x * scale, (x * input_scale).op("expm1") * (x.coerce(alpha) * scale))


def _gelu(x: Expr, *, approximate: str = "none") -> Expr:
    if approximate == "none":
        return x * 0.5 * (1.0 + (x * math.sqrt(0.5)).op("erf"))
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + inner.op("tanh"))


def _lerp(a: Expr, b: Expr, w: Expr) -> Expr:
    return (w.op("abs") < 0.5).where(a + w * (b - a), b - (b - a) * (1.0 - w))


def _logaddexp(a: Expr, b: Expr) -> Expr:
    big, same_infinity = a.op("maximum", b), a.op("eq", b) & (a.op("abs").op("eq", math.inf))
    return same_infinity.where(a, big + (-(a - b).op("abs")).op("exp").op("log1p"))


def _select(m: Expr, a: Expr, b: Expr) -> Expr:
    return m.where(a, b)


def _xlogy(x: Expr, y: Expr) -> Expr:
    return y.op("ne", y).where(y, x.op("eq", 0).where(x.coerce(0), x * y.op("log")))


def _bool_of(x: Expr) -> Expr:
    return x.cast(torch.bool)


def _addcmul(x: Expr, a: Expr, b: Expr, *, value: float = 1) -> Expr:
    return x + _maybe_scaled(a, value) * b


def _addcdiv(x: Expr, a: Expr, b: Expr, *, value: float = 1) -> Expr:
    return x + _maybe_scaled(a, value) / b


def _threshold_backward(g: Expr, x: Expr, threshold: Expr) -> Expr:
    return (x <= threshold).where(g.coerce(0), g)


_SAME_NAME = (
    "neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh "
    "atanh erf erfc floor ceil trunc round lgamma"
).split()
_add = Row(lambda a, b, *, alpha=1: a + _maybe_scaled(b, alpha))
_sub = Row(lambda a, b, *, alpha=1: a - _maybe_scaled(b, alpha))
_rsub = Row(lambda a, b, alpha=1: b - (a if alpha == 1 else a * alpha))
_mul, _div = Row(lambda a, b: a * b), Row(_divide)
_cast = Row(lambda x, *_, **__: x, compute="as_is")
_choose = Row(_select, mask=0)
_fill = Row(lambda x, m, value: m.where(value, x), mask=1)

POINTWISE: dict[object, Row] = {
    **{getattr(aten, name).default: _unary(name) for name in _SAME_NAME},
    **{getattr(aten, name).default: _rounded(name) for name in ("floor", "ceil", "trunc", "round")},
    aten.add.Tensor: _add, aten.add.Scalar: _add, aten.sub.Tensor: _sub, aten.sub.Scalar: _sub,
    aten.rsub.Tensor: _rsub, aten.rsub.Scalar: _rsub,
    aten.mul.Tensor: _mul, aten.mul.Scalar: _mul,
    aten.div.Tensor: _div, aten.div.Scalar: _div, aten.div.Tensor_mode: _div, aten.div.Scalar_mode: _div,
    aten.floor_divide.default: Row(lambda a, b: a.op("floordiv", b)),
    aten.remainder.Tensor: Row(lambda a, b: a.op("rem", b)), aten.remainder.Scalar: Row(lambda a, b: a.op("rem", b)),
    aten.remainder.Scalar_Tensor: Row(lambda a, b: a.op("rem", b)),
    aten.fmod.Tensor: Row(lambda a, b: a.op("fmod", b)), aten.fmod.Scalar: Row(lambda a, b: a.op("fmod", b)),
    aten.pow.Tensor_Scalar: Row(_pow), aten.pow.Tensor_Tensor: Row(_pow), aten.pow.Scalar: Row(_pow),
    aten.square.default: Row(lambda x: x * x),
    aten.reciprocal.default: Row(lambda x: 1.0 / x),
    aten.atan2.default: Row(lambda a, b: a.op("atan2", b)),
    aten.sign.default: Row(_sign), aten.sgn.default: Row(_sign),
    aten.maximum.default: Row(lambda a, b: a.op("maximum", b)), aten.minimum.default: Row(lambda a, b: a.op("minimum", b)),
    aten.clamp.default: Row(_clamp), aten.clamp.Tensor: Row(_clamp),
    aten.clamp_min.default: Row(_clamp), aten.clamp_min.Tensor: Row(_clamp),
    aten.clamp_max.default: Row(lambda x, high: _clamp(x, None, high)),
    aten.clamp_max.Tensor: Row(lambda x, high: _clamp(x, None, high)),
    aten.hardtanh.default: Row(lambda x, low=-1.0, high=1.0: _clamp(x, x.coerce(low), x.coerce(high))),
    # ---- activations ----
    aten.relu.default: Row(lambda x: (x <= 0).where(x.coerce(0), x)),
    aten.sigmoid.default: Row(_sigmoid),
    aten.silu.default: Row(lambda x: x / (1.0 + (-x).op("exp"))),
    aten.gelu.default: Row(_gelu),
    aten.softplus.default: Row(_softplus),
    aten.elu.default: Row(_elu),
    aten.leaky_relu.default: Row(lambda x, slope=0.01: (x > 0).where(x, x * slope)),
    aten.threshold_backward.default: Row(_threshold_backward),
    aten.sigmoid_backward.default: Row(lambda g, y: g * ((1.0 - y) * y)),
    aten.tanh_backward.default: Row(lambda g, y: g * (1.0 - y * y)),
    # ---- of several operands ----
    aten.addcmul.default: Row(_addcmul),
    aten.addcdiv.default: Row(_addcdiv),
    aten.lerp.Scalar: Row(_lerp), aten.lerp.Tensor: Row(_lerp),
    aten.logaddexp.default: Row(_logaddexp),
    aten.xlogy.Tensor: Row(_xlogy),
    aten.where.self: _choose, aten.where.ScalarSelf: _choose, aten.where.ScalarOther: _choose, aten.where.Scalar: _choose,
    aten.masked_fill.Scalar: _fill, aten.masked_fill.Tensor: _fill,
    # ---- casts, comparisons, truth ----
    aten._to_copy.default: _cast, prims.convert_element_type.default: _cast,
    **{getattr(getattr(aten, name), kind): Row(lambda a, b, name=name: a.op(name, b), compute="operands")
       for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")},
    aten.isnan.default: Row(lambda x: x.op("ne", x), compute="operands"),
    aten.isinf.default: Row(_isinf, compute="operands"),
    aten.isfinite.default: Row(_isfinite, compute="operands"),
    aten.logical_and.default: Row(lambda a, b: a & b, compute="bool"),
    aten.logical_or.default: Row(lambda a, b: a | b, compute="bool"),
    aten.logical_xor.default: Row(lambda a, b: a ^ b, compute="bool"),
    aten.logical_not.default: Row(lambda a: a.op("not"), compute="bool"),
    aten.bitwise_and.Tensor: Row(lambda a, b: a & b, compute="exact"),
    aten.bitwise_and.Scalar: Row(lambda a, b: a & b, compute="exact"),
    aten.bitwise_or.Tensor: Row(lambda a, b: a | b, compute="exact"),
    aten.bitwise_or.Scalar: Row(lambda a, b: a | b, compute="exact"),
    aten.bitwise_xor.Tensor: Row(lambda a, b: a ^ b, compute="exact"),
    aten.bitwise_xor.Scalar: Row(lambda a, b: a ^ b, compute="exact"),
    aten.bitwise_not.default: Row(lambda a: a.op("not"), compute="exact"),
}  # fmt: skip


# ---- reductions: f(x, count) over the tile; the argument arrives in the compute dtype ----


def _mean(x: Expr, count: Size) -> Expr:
    return x.reduce("sum") / x.coerce(count)


def _reduction(op: str, compute: str = "result") -> Row:
    return Row(lambda x, count: x.reduce(op), compute)


REDUCING: dict[object, Row] = {
    aten.sum.dim_IntList: _reduction("sum"), aten.sum.default: _reduction("sum"),
    aten.mean.dim: Row(_mean), aten.mean.default: Row(_mean),
    aten.amax.default: _reduction("amax"), aten.amin.default: _reduction("amin"),
    aten.max.default: _reduction("amax"), aten.min.default: _reduction("amin"),
    aten.prod.default: _reduction("prod"), aten.prod.dim_int: _reduction("prod"),
    aten.any.default: _reduction("any", "bool"), aten.any.dim: _reduction("any", "bool"),
    aten.any.dims: _reduction("any", "bool"),
    aten.all.default: _reduction("all", "bool"), aten.all.dim: _reduction("all", "bool"),
    aten.all.dims: _reduction("all", "bool"),
}  # fmt: skip
# How a large one is done in two phases: the reduction of both phases, and what is divided by the count at the end.
TWO_PHASE: dict[object, str] = {
    aten.sum.dim_IntList: "sum", aten.sum.default: "sum", aten.mean.dim: "sum", aten.mean.default: "sum",
    aten.amax.default: "amax", aten.amin.default: "amin", aten.max.default: "amax", aten.min.default: "amin",
}  # fmt: skip
PRODUCTS = (aten.mm.default, aten.bmm.default)  # of matrices: no kernel computes them
EXPENSIVE = frozenset(_SAME_NAME) - {"neg", "abs", "floor", "ceil", "trunc", "round"} | {
    "pow",
    "atan2",
    "div",
    "fmod",
    "rem",
}
