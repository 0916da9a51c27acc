"""Normalisation: layer, group and batch norm, by the statistics that the forward call saves.

With xhat = (x - mean) * rstd over the normalised elements: d mean = mean(t), d rstd = -rstd**2 mean(t xhat) and
d xhat = rstd (t - mean(t) - xhat mean(t xhat)).
"""

from __future__ import annotations

from functools import partial

import torch

from ..batch import Mapped
from ..dims import numel
from ..graph import stop_gradient
from ..record import Value, aten
from .composed import through
from .table import composite, rule

HALF = (torch.float16, torch.bfloat16)


def _wide(x):
    """Half precision is computed in float32."""
    return x.to(torch.float32) if isinstance(x, Value) and x.dtype in HALF else x


def _normalised(t, x, mean, rstd, dims):
    """(xhat, d xhat, d mean, d rstd) over `dims`; mean and rstd keep these dims as 1."""
    t, x, mean, rstd = map(_wide, (t, x, mean, rstd))
    xhat = (x - mean) * rstd
    if t is None:
        return xhat, None, None, None
    count = numel(x.shape[d] for d in dims)
    t_mean, along = t.sum(dims, True) / count, (t * xhat).sum(dims, True) / count
    return xhat, rstd * (t - t_mean - xhat * along), t_mean, -rstd * rstd * along


def _affine(xhat, t_xhat, w, tw, tb):
    """The tangent of xhat * w + b; w, tw and tb broadcast to xhat, None is absent."""
    shares = [t_xhat if w is None or t_xhat is None else t_xhat * w, None if tw is None else xhat * tw, tb]
    shares = [s for s in shares if s is not None]
    return sum(shares[1:], start=shares[0])


def _norm_tangent(ts, x, mean, rstd, w, dims, shape, x_shape):
    """Tangents of (y, mean, rstd) for x viewed as `x_shape`, statistics as kept dims, weights viewed as `shape`."""
    t, tw, tb = ts
    view = lambda v: None if v is None else _wide(v.reshape(shape))
    xhat, t_xhat, t_mean, t_rstd = _normalised(
        None if t is None else t.reshape(x_shape), x.reshape(x_shape), mean, rstd, dims
    )
    return _affine(xhat, t_xhat, view(w), view(tw), view(tb)), t_mean, t_rstd


# ----- layer norm -----------------------------------------------------------------------------------------------------


def _layer_norm(ts, y, x, size, w, b, eps):
    dims = list(range(x.ndim - len(size), x.ndim))
    return _norm_tangent((ts[0], ts[2], ts[3]), x, y[1], y[2], w, dims, list(size), list(x.shape))


def _plain_then_affine(normalise):
    """Batch rule: weights without the axis go into the call, others are applied to its result."""

    def rule(ctx, op, args, kwargs):
        x, w, b, call, shape = normalise(ctx, *args)
        mapped = isinstance(w, Mapped) or isinstance(b, Mapped)
        y, *rest = call(None if mapped else w, None if mapped else b)
        y = y.reshape([ctx.length, *ctx.out[0].shape])
        if mapped:
            y = _wide(y)
            y = y if w is None else y * _wide(ctx.lift(w)).reshape([ctx.length, *shape])
            y = y if b is None else y + _wide(ctx.lift(b)).reshape([ctx.length, *shape])
            y = y.to(ctx.out[0].dtype)
        return (
            y,
            *(r.reshape([ctx.length, *v.shape]).to(v.dtype) for r, v in zip(rest, ctx.out[1:], strict=True)),
        )

    return rule


def _layer_call(ctx, x, size, w, b, eps):
    shape = [*[1] * (x.ndim - len(size)), *size]
    lifted = ctx.lift(x)
    return x, w, b, lambda w, b: ctx.b.emit(aten.native_layer_norm.default, (lifted, size, w, b, eps)), shape


rule(aten.native_layer_norm.default, jvp=_layer_norm, batch=_plain_then_affine(_layer_call))


# ----- group norm -----------------------------------------------------------------------------------------------------


def _group_norm(ts, y, x, w, b, n, c, space, groups, eps):
    each = c // groups
    view, stat = [n, groups, each, space], [n, groups, 1, 1]
    t_y, t_mean, t_rstd = _norm_tangent(
        ts[:3], x, y[1].reshape(stat), y[2].reshape(stat), w, [2, 3], [1, groups, each, 1], view
    )
    back = lambda v: None if v is None else v.reshape([n, groups])
    return t_y.expand(view).reshape(list(x.shape)), back(t_mean), back(t_rstd)


def _group_call(ctx, x, w, b, n, c, space, groups, eps):
    rows = ctx.lift(x).reshape([ctx.length * n, *x.shape[1:]])
    call = lambda w, b: ctx.b.emit(
        aten.native_group_norm.default, (rows, w, b, ctx.length * n, c, space, groups, eps)
    )
    return x, w, b, call, [1, c, *[1] * (x.ndim - 2)]


rule(aten.native_group_norm.default, jvp=_group_norm, batch=_plain_then_affine(_group_call))


# ----- batch norm: capture leaves these three (trace.py) --------------------------------------------------------------
FUNCTIONAL, NO_STATS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
)
NO_TRAINING = aten._native_batch_norm_legit_no_training.default


def _batch_norm(ts, y, x, w, mean, rstd):
    """Tangents of (y, mean, rstd) under the statistics of the batch."""
    shape = [1, x.shape[1], *[1] * (x.ndim - 2)]
    dims = [0, *range(2, x.ndim)]
    t_y, t_mean, t_rstd = _norm_tangent(
        ts, x, mean.reshape(shape), rstd.reshape(shape), w, dims, shape, list(x.shape)
    )
    back = lambda v: None if v is None else v.reshape([x.shape[1]])
    return t_y, back(t_mean), back(t_rstd)


def _functional(ts, y, x, w, b, running_mean, running_var, training, momentum, eps):
    """Running statistics are kept outside of every derivative, as torch keeps them."""
    if not training:
        return _eval(ts[:5], y, x, w, b, running_mean, running_var, momentum, eps) + (
            None,
            None,
        )
    return (*_batch_norm(ts[:3], y, x, w, y[1], y[2]), None, None)


def _eval(ts, y, x, w, b, running_mean, running_var, momentum, eps):
    """Fixed statistics: an affine map of x; mean and variance have derivatives like any argument."""
    shape = [1, x.shape[1], *[1] * (x.ndim - 2)]
    view = lambda v: None if v is None else _wide(v.reshape(shape))
    t, tw, tb, tm, tv = ts[:5]
    rstd = (view(running_var) + eps).rsqrt()
    xhat = (_wide(x) - view(running_mean)) * rstd
    shares = [
        None if t is None else _wide(t) * rstd,
        None if tm is None else -view(tm) * rstd,
        None if tv is None else xhat * (rstd * rstd * view(tv) * -0.5),
    ]
    shares = [s for s in shares if s is not None]
    t_xhat = sum(shares[1:], start=shares[0]) if shares else None
    return (_affine(xhat, t_xhat, view(w), view(tw), view(tb)), None, None)


rule(FUNCTIONAL, jvp=_functional, batch=lambda ctx, op, args, kwargs: _in_channels(ctx, op, args, 5))
rule(
    NO_STATS,
    jvp=lambda ts, y, x, w, b, *how: _batch_norm(ts[:3], y, x, w, y[1], y[2]),
    batch=lambda ctx, op, args, kwargs: _in_channels(ctx, op, args, 3),
)
rule(NO_TRAINING, jvp=_eval, batch=lambda ctx, op, args, kwargs: _in_channels(ctx, op, args, 5))


def _in_channels(ctx, op, args, tensors: int):
    """The axis is folded into the channels, whose statistics are separate."""
    x, n = args[0], ctx.length
    rows, c, *space = x.shape
    folded = ctx.lift(x).movedim(0, 1).reshape([rows, n * c, *space])
    vectors = [None if v is None else ctx.lift(v).reshape([n * c]) for v in args[1:tensors]]
    y, *rest = ctx.b.emit(op, (folded, *vectors, *args[tensors:]))
    y = y.reshape([rows, n, c, *space]).movedim(1, 0)
    return (y, *(r.reshape([n, *v.shape]) for r, v in zip(rest, ctx.out[1:], strict=True)))


# ----- backward ops, where a program calls them itself ----------------------------------------------------------------


def _tied(value, x):
    """`value` with the derivatives of `x`, which is the same but for rounding."""
    stop = lambda v: v.builder.emit(stop_gradient, (v,))
    return stop(value) + (x - stop(x))


def _of_input(x, mean, rstd, dims):
    """Saved statistics as functions of x, for which PyTorch's second derivatives take them, also where they are detached."""
    count = numel(x.shape[d] for d in dims)
    m = x.sum(dims, True) / count
    var = ((x - m) * (x - m)).sum(dims, True) / count
    return _tied(mean, m), _tied(rstd.pow(-2), var).pow(-0.5)


def _as_given(x, mean, rstd, dims):
    return mean, rstd


def _norm_backward(statistics, ct, x, mean, rstd, w, dims, over):
    """(of x, of the weight, of the bias), the last two summed over `over`; mean and rstd keep `dims` as 1, w broadcasts.

    Statistics that are not of x (None) are fixed.
    """
    ct, x, mean, rstd, w = map(_wide, (ct, x, mean, rstd, w))
    mean, rstd = (statistics or _as_given)(x, mean, rstd, dims)
    xhat, g = (x - mean) * rstd, ct if w is None else ct * w
    if statistics:
        count = numel(x.shape[d] for d in dims)
        g = g - g.sum(dims, True) / count - xhat * ((g * xhat).sum(dims, True) / count)
    return rstd * g, (ct * xhat).sum(over), ct.sum(over)


def _shaped(parts, shapes, dtypes, mask):
    return tuple(
        p.reshape(list(shape)).to(dtype) if wanted else None
        for p, shape, dtype, wanted in zip(parts, shapes, dtypes, mask, strict=True)
    )


def _dtypes(x, w) -> list[torch.dtype]:
    return [x.dtype, *[(x if w is None else w).dtype] * 2]


def _layer_backward(statistics, ct, x, size, mean, rstd, w, b, mask):
    split = x.ndim - len(size)
    parts = _norm_backward(statistics, ct, x, mean, rstd, w, list(range(split, x.ndim)), list(range(split)))
    mask = [mask[0], mask[1] and w is not None, mask[2] and b is not None]
    return _shaped(parts, [x.shape, size, size], _dtypes(x, w), mask)


def _group_backward(statistics, ct, x, mean, rstd, w, n, c, space, groups, mask):
    each = c // groups
    view, stat = [n, groups, each, space], [n, groups, 1, 1]
    weight = None if w is None else w.reshape([1, groups, each, 1])
    ct, rows, mean, rstd = ct.reshape(view), x.reshape(view), mean.reshape(stat), rstd.reshape(stat)
    parts = _norm_backward(statistics, ct, rows, mean, rstd, weight, [2, 3], [0, 3])
    return _shaped(parts, [x.shape, [c], [c]], _dtypes(x, w), mask)


def _batch_backward(statistics, ct, x, w, running_mean, running_var, mean, rstd, train, eps, mask):
    if not train:
        statistics, mean, rstd = None, running_mean, (_wide(running_var) + eps).rsqrt()
    c, dims = x.shape[1], [0, *range(2, x.ndim)]
    view = lambda v: None if v is None else v.reshape([1, c, *[1] * (x.ndim - 2)])
    parts = _norm_backward(statistics, ct, x, view(mean), view(rstd), view(w), dims, dims)
    return _shaped(parts, [x.shape, [c], [c]], _dtypes(x, w), mask)


for _op, _backward in (
    (aten.native_layer_norm_backward, _layer_backward),
    (aten.native_group_norm_backward, _group_backward),
    (aten.native_batch_norm_backward, _batch_backward),
):
    composite(_op.default, partial(_backward, _as_given), jvp=through(partial(_backward, _of_input)))
