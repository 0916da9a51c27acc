"""Reductions by index: scatter_reduce, index_reduce and bags of embeddings."""

from __future__ import annotations

from ..errors import DynamicShape
from ..record import Value, aten
from .indexing import _all_lifted, _vector
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
