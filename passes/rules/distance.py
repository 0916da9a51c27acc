"""Distances between rows. ATen's kernels keep memory at one number a pair; only forward mode and second derivatives write out
the differences of all pairs.
"""

from __future__ import annotations

import math

from ..record import Value, aten
from .composed import paired
from .pointwise import ratio
from .table import composite, rule

CDIST, TO_ROWS = aten._cdist_forward.default, aten._cdist_backward.default
PDIST, TO_POINTS = aten._pdist_forward.default, aten._pdist_backward.default


def _slope(d, y, p):
    """d y / d d of the p-norm y of differences d: 0 at distance 0, ties of p = inf count in full, as in torch."""
    if p == 1:
        return d.sgn()
    if p == 2:
        return ratio(d, y)
    if math.isinf(p):
        return d.sgn() * d.abs().eq(y).to(d.dtype)
    none = d.eq(0) | y.eq(0)
    safe = none.where(1.0, d.abs()) / none.where(1.0, y)
    return none.where(0.0, d.sgn() * safe.pow(p - 1))


def _last(x) -> Value:
    return x.reshape([*x.shape, 1])


# ----- of two sets ----------------------------------------------------------------------------------------------------


def _down(x) -> Value:
    return x.reshape([*x.shape[:-1], 1, x.shape[-1]])


def _across(x) -> Value:
    return x.reshape([*x.shape[:-2], 1, *x.shape[-2:]])


def _cross_slope(a, b, y, p):
    return _slope(_down(a) - _across(b), _last(y), p)


def _of_first(t, y, a, b, p, mode):
    if p == 0:
        return None
    return paired(
        str(CDIST),
        t,
        y.val,
        lambda a, b, y, t: (_down(t) * _cross_slope(a, b, y, p)).sum([y.ndim]),
        lambda a, b, y, ct: _to_rows(ct, a, b, p, y),
        a,
        b,
        y,
    )


def _of_second(t, y, a, b, p, mode):
    return _of_first(t, y.mT, b, a, p, mode) if p == 0 else _of_first(t, y.mT, b, a, p, mode).mT


def _to_rows(ct, a, b, p, y):
    """Rows of a set that all batches share count once for each."""
    a, b = (x.expand([*ct.shape[:-2], *x.shape[-2:]]) for x in (a, b))
    return ct.call(TO_ROWS, a, b, p, y)


def _rows(ct, a, b, p, y):
    return a.full(a.shape, 0) if p == 0 else (_last(ct) * _cross_slope(a, b, y, p)).sum([ct.ndim - 1])


def _all_lifted(ctx, op, args, kwargs):
    """Batch dims of one rank for all."""
    rank = max(x.ndim for x in args if hasattr(x, "ndim"))
    return ctx.b.emit(op, tuple(_aligned(ctx, x, rank) if hasattr(x, "ndim") else x for x in args), kwargs)


def _aligned(ctx, x, rank: int) -> Value:
    lifted = ctx.lift(x)
    return lifted.reshape([ctx.length, *[1] * (rank - x.ndim), *x.shape])


rule(CDIST, jvp=[_of_first, _of_second], batch=_all_lifted)
composite(TO_ROWS, _rows, batch=_all_lifted)

# ----- within one set -------------------------------------------------------------------------------------------------


def _pairs(x) -> tuple[Value, Value]:
    """Row numbers i < j."""
    n = x.shape[0]
    both = x.builder.emit(aten.triu_indices.default, (n, n, 1), {"device": x.device})
    return both.call(aten.select.int, 0, 0), both.call(aten.select.int, 0, 1)


def _between(x) -> Value:
    i, j = _pairs(x)
    return x.call(aten.index.Tensor, [i]) - x.call(aten.index.Tensor, [j])


def _point_tangent(t, y, a, p=2):
    if p == 0:
        return None
    return paired(
        str(PDIST),
        t,
        y.val,
        lambda a, y, t: (_between(t) * _slope(_between(a), _last(y), p)).sum([1]),
        lambda a, y, ct: ct.call(TO_POINTS, a, p, y),
        a,
        y,
    )


def _to_points(ct, a, p, y):
    if p == 0:
        return a.full(a.shape, 0)
    i, j = _pairs(a)
    share = _last(ct) * _slope(_between(a), _last(y), p)
    put = aten.index_put.default
    return a.full(a.shape, 0).call(put, [i], share, True).call(put, [j], -share, True)


composite(
    PDIST,
    lambda a, p=2: a.call(CDIST, a, p, 2).call(aten.index.Tensor, list(_pairs(a))),
    jvp=(_point_tangent,),
)
composite(TO_POINTS, _to_points)
