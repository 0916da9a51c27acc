"""Reductions by index: scatter_reduce, index_reduce and bags of embeddings."""

from __future__ import annotations

import torch

from ..batch import Mapped
from ..errors import DynamicShape
from ..record import Value, aten
from .composed import through
from .indexing import _all_lifted, _vector, arange
from .table import composite, rule

GATHER, ADD = aten.gather.default, aten.scatter_add.default
REDUCE = aten.scatter_reduce.two


# ----- scatter_reduce -------------------------------------------------------------------------------------------------


def _cut(src, index) -> Value:
    """What of a source the index names."""
    for d in range(index.ndim):
        if src.shape[d] != index.shape[d]:
            src = src.call(aten.slice.Tensor, d, 0, index.shape[d])
    return src


def _added(like, dim, index, src) -> Value:
    return like.full(like.shape, 0, src.dtype).call(ADD, dim, index, src)


def _kept(a, dim, index, include_self, fill=0) -> Value:
    """`a`, without the places that are written if they do not count."""
    return a if include_self else a.call(aten.scatter.value, dim, index, fill)


def _sum_tangent(t, s, a, dim, index, include_self):
    share = None if t is None else _kept(t, dim, index, include_self)
    if s is None:
        return share
    return _added(a, dim, index, s) if share is None else share.call(ADD, dim, index, s)


def _count(a, dim, index, include_self) -> Value:
    """How many numbers meet at each place; 1 where there are none."""
    ones = a.full(index.shape, 1)
    count = a.full(a.shape, 1 if include_self else 0).call(ADD, dim, index, ones)
    return count if include_self else count.clamp_min(1)


def _extreme_tangent(t, s, y, a, dim, index, src, include_self):
    """Ties share. As in torch, an equal `a` takes its share also where it does not count."""
    of_a, of_src = a.eq(y).to(a.dtype), src.eq(y.call(GATHER, dim, index)).to(a.dtype)
    share = 1 / of_a.call(ADD, dim, index, of_src)
    s = None if s is None else s * of_src * share.call(GATHER, dim, index)
    return _sum_tangent(None if t is None else t * (of_a * share), s, a, dim, index, include_self)


def _product_tangent(t, s, y, a, dim, index, src, include_self):
    """Each factor's tangent times the product of the others, without a division: exact at zeros, to any order."""
    base = _kept(a, dim, index, include_self, 1)
    if t is not None:
        t = t * a.full(a.shape, 1).call(REDUCE, dim, index, src, "prod")
    if s is not None:
        s = s * base.call(GATHER, dim, index) * _others(src, dim, index)
    return _sum_tangent(t, s, a, dim, index, include_self)


def _others(src, dim, index) -> Value:
    """For each element the product of all others with its index: prefixes times suffixes, sorted by index."""
    if not src.ndim:
        return src.full([], 1)
    order = index.call(aten.sort.stable, stable=True, dim=dim, descending=False)[1]
    index, x = index.call(GATHER, dim, order), src.call(GATHER, dim, order)
    product = _before(x, dim, index) * _before(x.flip([dim]), dim, index.flip([dim])).flip([dim])
    return product.full(product.shape, 0).call(aten.scatter.src, dim, order, product)


def _before(x, dim, index) -> Value:
    """For each element the product of those before it with its index, equal indices being neighbours: by doubling."""
    x, by = _moved(x, dim, index, 1), 1
    while by < _static(x.shape[dim]):
        x, by = x * _moved(x, dim, index, by), 2 * by
    return x


def _moved(x, dim, index, by: int) -> Value:
    """Each element's `by`-th neighbour before it, 1 where that has another index."""
    pad = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [by, -by]
    there = index.eq(index.call(aten.constant_pad_nd.default, pad, -1))
    return there.where(x.call(aten.constant_pad_nd.default, pad, 1), 1.0)


def _static(size) -> int:
    if not isinstance(size, int):
        raise DynamicShape(what="a product by index along a symbolic axis")
    return size


def _reduce_jvp(ts, y, a, dim, index, src, reduce, *, include_self=True):
    t, s = ts[0], ts[3]
    src, s = _cut(src, index), None if s is None else _cut(s, index)
    if reduce in ("sum", "mean"):
        out = _sum_tangent(t, s, a, dim, index, include_self)
        return out if reduce == "sum" else out / _count(a, dim, index, include_self)
    tangent = _product_tangent if reduce == "prod" else _extreme_tangent
    return tangent(t, s, y, a, dim, index, src, include_self)


rule(REDUCE, jvp=_reduce_jvp, batch=_all_lifted)


def _index_reduce(a, dim, index, src, reduce, *, include_self=True):
    """One index for each slice."""
    v, source = _vector(a), src if a.ndim else src.reshape([-1])
    dim = dim % v.ndim
    index = _vector(index).reshape([*[1] * dim, -1, *[1] * (v.ndim - 1 - dim)]).expand(list(source.shape))
    return v.call(REDUCE, dim, index, source, reduce, include_self=include_self).reshape(list(a.shape))


composite(aten.index_reduce.default, _index_reduce)


# ----- bags of embeddings -----------------------------------------------------------------------------------------------
BAG, PUT = aten._embedding_bag.default, aten.index_put.default
SUM, MEAN, MAX = 0, 1, 2


def _bags(offsets, count, last) -> tuple[Value, int]:
    """The bag of each of `count` indices, and how many bags there are; the `last` offset starts none."""
    offsets = offsets.call(aten.slice.Tensor, 0, 0, offsets.shape[0] - 1) if last else offsets
    starts = offsets.full([count + 1], 0, torch.int64).call(
        PUT, [offsets], offsets.full([], 1, torch.int64), True
    )
    return starts.call(aten.cumsum.default, 0).call(aten.slice.Tensor, 0, 0, count) - 1, offsets.shape[0]


def _totals(x, bags, count: int) -> Value:
    return x.full([count, *x.shape[1:]], 0).call(PUT, [bags], x, True)


def _sizes(indices, bags, count, padding, dtype) -> Value:
    """How many indices each bag has, padding apart."""
    return _totals(indices.ne(padding).to(dtype), bags, count)


def _linear_bag(w, indices, offsets, by_frequency, mode, sparse, weights, last, padding) -> Value:
    """Rows by index, added up by bag; an empty one is 0."""
    bags, count = _bags(offsets, indices.shape[0], last)
    rows = w.call(aten.embedding.default, indices, -1, by_frequency)
    rows = rows if weights is None else rows * weights.reshape([-1, 1])
    if padding >= 0:
        rows = indices.eq(padding).reshape([-1, 1]).where(0.0, rows)
    out = _totals(rows, bags, count)
    if mode == SUM:
        return out
    return out / _sizes(indices, bags, count, padding, w.dtype).clamp_min(1).reshape([-1, 1])


def _bag_arguments(by_frequency=False, mode=SUM, sparse=False, weights=None, last=False, padding=-1):
    return by_frequency, mode, sparse, weights, last, padding


def _bag_jvp(ts, y, w, indices, offsets, *how):
    how = _bag_arguments(*how)
    _, mode, _, _, last, padding = how
    if mode != MAX:
        ts = [*ts, *[None] * (9 - len(ts))]
        return (through(_linear_bag)(ts, None, w, indices, offsets, *how), None, None, None)
    bags, count = _bags(offsets, indices.shape[0], last)
    full = _sizes(indices, bags, count, padding, w.dtype).gt(0).reshape([-1, 1])
    return full.where(ts[0].call(aten.gather.default, 0, y[3]), 0.0), None, None, None


def _bag_batch(ctx, op, args, kwargs):
    """Bags of all examples end to end; weights that carry the axis are laid end to end, too, padding behind them."""
    w, indices, offsets, *how = args
    by_frequency, mode, sparse, weights, last, padding = _bag_arguments(*how)
    n, rows, count, bags = ctx.length, w.shape[0], indices.shape[0], ctx.out[0].shape[0]
    index, start = ctx.lift(indices), ctx.lift(offsets).call(aten.slice.Tensor, 1, 0, bags)
    shift = lambda x, by: arange(x, n, x.dtype).reshape([n, 1]) * by
    start = (start + shift(start, count)).reshape([-1])
    if isinstance(w, Mapped):
        moved, table = index + shift(index, rows), w.x.reshape([n * rows, w.shape[1]])
        if padding >= 0:
            moved, table = index.eq(padding).where(n * rows, moved), _one_more(table)
            padding = n * rows
    else:
        moved, table = index, w
    weights = None if weights is None else ctx.lift(weights).reshape([-1])
    call = (table, moved.reshape([-1]), start, by_frequency, mode, sparse, weights, False, padding)
    y, *saved = (o.reshape([n, -1, *o.shape[1:]]) for o in ctx.b.emit(op, call, kwargs))
    if saved[0].shape[1]:
        saved[0] = saved[0] - shift(saved[0], bags)
    if mode == MAX and isinstance(w, Mapped):
        saved[2] = (saved[2] - shift(saved[2], rows).reshape([n, 1, 1])).clamp_min(0)
    return (y, *saved)


def _one_more(table) -> Value:
    return table.call(aten.constant_pad_nd.default, [0, 0, 0, 1], 0)


rule(BAG, jvp=_bag_jvp, batch=_bag_batch)
