"""Reading and writing by index: gather and scatter, advanced indexing, embeddings, sorting."""

from __future__ import annotations

import torch

from ..batch import Mapped
from ..infer import broadcast
from ..record import Value, aten
from .batching import along
from .shape import zeros_like
from .table import composite, linear, rule, zero

GATHER, SCATTER, SCATTER_ADD = aten.gather.default, aten.scatter.src, aten.scatter_add.default
INDEX, PUT = aten.index.Tensor, aten.index_put.default


def arange(like: Value, n, dtype=torch.int64) -> Value:
    """0, 1, ... n - 1 on the device of a value."""
    return like.builder.emit(aten.arange.default, (n,), {"dtype": dtype, "device": like.device})


# ----- gather and scatter ---------------------------------------------------------------------------------------------


def _all_lifted(ctx, op, args, kwargs):
    """gather, scatter ...: every tensor gets the axis, 0-d ones a dim of size 1 behind it."""
    tensors = [a for a in args if isinstance(a, (Mapped, Value))]
    rank = max(max(t.ndim for t in tensors), 1)
    args = list(args)
    args[1] = args[1] % rank + 1
    for i, a in enumerate(args):
        if isinstance(a, (Mapped, Value)):
            x = ctx.lift(a)
            args[i] = x if a.ndim else x.reshape([*x.shape, 1])
    return ctx.b.emit(op, tuple(args), kwargs).reshape([ctx.length, *ctx.out.shape])


def _to_source(ct, src, dim, index):
    """The cotangent of what was scattered: read at the index; elements beyond the index were not used."""
    out = ct.call(GATHER, dim, index)
    missing = (
        [int(s) - int(i) for s, i in zip(src.shape, out.shape, strict=True)] if out.shape != src.shape else []
    )
    return (
        out.call(aten.constant_pad_nd.default, [x for m in reversed(missing) for x in (0, m)], 0)
        if missing
        else out
    )


linear(
    GATHER,
    lambda ct, a, dim, index, **kw: zeros_like(ct, a).call(SCATTER_ADD, dim, index, ct),
    batch=_all_lifted,
)


def _scatter_add_jvp(ts, y, a, dim, index, src):
    t, s = ts[0], ts[3]
    return t if s is None else (t if t is not None else y.full(y.shape, 0)).call(SCATTER_ADD, dim, index, s)


def _scatter_jvp(ts, y, a, dim, index, src):
    t, s = ts[0], ts[3]
    return (t if t is not None else y.full(y.shape, 0)).call(
        SCATTER, dim, index, s if s is not None else src.full(src.shape, 0)
    )


rule(
    SCATTER_ADD,
    jvp=_scatter_add_jvp,
    transpose=[
        lambda ct, a, dim, index, src: ct,
        None,
        lambda ct, a, dim, index, src: _to_source(ct, src, dim, index),
    ],
    batch=_all_lifted,
)
rule(
    SCATTER,
    jvp=_scatter_jvp,
    transpose=[
        lambda ct, a, dim, index, src: ct.call(aten.scatter.value, dim, index, 0),
        None,
        lambda ct, a, dim, index, src: _to_source(ct, src, dim, index),
    ],
    batch=_all_lifted,
)
rule(
    aten.scatter.value,
    jvp=lambda ts, y, a, dim, index, value: ts[0].call(aten.scatter.value, dim, index, 0),
    transpose=[lambda ct, a, dim, index, value: ct.call(aten.scatter.value, dim, index, 0), None],
    batch=_all_lifted,
)

# ----- advanced indexing ----------------------------------------------------------------------------------------------


class _Places:
    """Where an index list reads: `dims` are indexed, the result has the index's shape at `at` and `rest` around it."""

    def __init__(self, ndim: int, indices):
        indices = list(indices) + [None] * (ndim - len(indices))
        self.dims = [d for d, i in enumerate(indices) if i is not None]
        self.rest = [d for d, i in enumerate(indices) if i is None]
        self.given = [i for i in indices if i is not None]
        self.width = max(i.ndim for i in self.given)
        self.at = self.dims[0] if self.dims == list(range(self.dims[0], self.dims[-1] + 1)) else 0

    def front(self, offset: int) -> list[int]:
        """The permutation of the source that brings the indexed dims first."""
        return [*range(offset), *(d + offset for d in self.dims + self.rest)]

    def back(self, offset: int) -> list[int]:
        """The permutation of [index shape, rest] into the result's order."""
        w, n = self.width, self.width + len(self.rest)
        return [
            *range(offset),
            *(d + offset for d in [*range(w, w + self.at), *range(w), *range(w + self.at, n)]),
        ]

    def forth(self, offset: int) -> list[int]:
        """The inverse of `back`."""
        order = self.back(offset)
        return [order.index(i) for i in range(len(order))]


def _with_axis(ctx, places: _Places, source_mapped: bool) -> list:
    """The index list for a source [axis?, indexed dims, rest] so that results are [axis, index shape, rest]."""
    given, width = places.given, places.width
    if not any(isinstance(i, Mapped) for i in given):
        return [None, *given]
    lifted = [
        i.x.reshape([ctx.length, *[1] * (width - i.ndim), *i.shape]) if isinstance(i, Mapped) else i
        for i in given
    ]
    if not source_mapped:
        return lifted
    return [arange(lifted[0], ctx.length).reshape([ctx.length, *[1] * width]), *lifted]


def _index_batch(ctx, op, args, kwargs):
    a, indices = args
    places = _Places(a.ndim, indices)
    mapped = isinstance(a, Mapped)
    x = (a.x if mapped else a).permute(places.front(1 if mapped else 0))
    return x.call(op, _with_axis(ctx, places, mapped)).permute(places.back(1))


def _put_batch(ctx, op, args, kwargs):
    a, indices, values, *accumulate = args
    places = _Places(a.ndim, indices)
    x = ctx.lift(a).permute(places.front(1))
    index = _with_axis(ctx, places, True)
    rank = places.width + len(places.rest)
    v = ctx.lift(values)
    v = v.reshape([ctx.length, *[1] * (rank - values.ndim), *values.shape]).permute(places.forth(1))
    out = x.call(op, index, v, *accumulate, **kwargs)
    order = places.front(1)
    return out.permute([order.index(i) for i in range(len(order))])


def _put_jvp(op):
    def jvp(ts, y, a, indices, values, accumulate=False):
        t, v = ts[0], ts[2]
        if accumulate and v is None:
            return t
        return (t if t is not None else y.full(y.shape, 0)).call(
            op, indices, v if v is not None else values.full(values.shape, 0), accumulate
        )

    return jvp


def _put_rows(read, put):
    linear(read, lambda ct, a, indices: zeros_like(ct, a).call(put, indices, ct, True), batch=_index_batch)

    def to_old(ct, a, indices, values, accumulate=False):
        return ct if accumulate else ct.call(put, indices, ct.full([], 0))

    rule(
        put,
        jvp=_put_jvp(put),
        transpose=[to_old, None, lambda ct, a, indices, values, accumulate=False: ct.call(read, indices)],
        batch=_put_batch,
    )


_put_rows(INDEX, PUT)
_put_rows(aten._unsafe_index.Tensor, aten._unsafe_index_put.default)


def _at(a, dim, index):
    """An index list that reads `index` along one dim."""
    return [None] * (dim % a.ndim) + [index]


def _vector(a) -> Value:
    return a if a.ndim else a.reshape(1)


def _select(a, dim, index):
    out = _vector(a).call(INDEX, _at(_vector(a), dim, _vector(index)))
    return out if a.ndim else out.reshape([])


def _add(a, dim, index, source, alpha=1):
    source = source if alpha == 1 else source * alpha
    v = _vector(a)
    return v.call(PUT, _at(v, dim, _vector(index)), _placed(v, source, dim, index), True).reshape(
        list(a.shape)
    )


def _placed(v, source, dim, index):
    """A source as index_put wants it: one slice per index."""
    shape = list(v.shape)
    shape[dim % v.ndim] = _vector(index).shape[0]
    return source.reshape(shape) if source.shape != tuple(shape) and source.ndim < v.ndim else source


def _copy(a, dim, index, source):
    v = _vector(a)
    return v.call(PUT, _at(v, dim, _vector(index)), _placed(v, source, dim, index)).reshape(list(a.shape))


def _fill(a, dim, index, value):
    value = value if isinstance(value, Value) else a.full([], value)
    return _vector(a).call(PUT, _at(_vector(a), dim, _vector(index)), value).reshape(list(a.shape))


composite(aten.index_select.default, _select)
composite(aten.index_add.default, _add)
composite(aten.index_copy.default, _copy)
composite(aten.index_fill.int_Scalar, _fill)
composite(aten.index_fill.int_Tensor, _fill)
composite(aten.take.default, lambda a, index: a.reshape(-1).call(INDEX, [index]))
composite(
    aten.put.default,
    lambda a, index, source, accumulate=False: (
        a.reshape(-1).call(PUT, [index.reshape(-1)], source.reshape(-1), accumulate).reshape(list(a.shape))
    ),
)


def _masked_scatter(a, mask, source):
    """The k-th true place takes the k-th element of the source."""
    shape = list(broadcast([a.shape, mask.shape]))
    a, mask = a.expand(shape), mask.expand(shape)
    rank = mask.reshape(-1).to(torch.int64).call(aten.cumsum.default, 0) - 1
    return mask.where(source.reshape(-1).call(INDEX, [rank.clamp_min(0)]).reshape(shape), a)


composite(aten.masked_scatter.default, _masked_scatter)


def _unfold(a, dim, size, step):
    v = _vector(a)
    dim = dim % v.ndim
    count = (v.shape[dim] - size) // step + 1
    windows = (arange(v, count) * step).reshape([count, 1]) + arange(v, size).reshape([1, size])
    out = v.call(INDEX, _at(v, dim, windows)).movedim(dim + 1, -1)
    return out if a.ndim else out.reshape([size])


def _unfold_batch(ctx, op, args, kwargs):
    a, dim, size, step = args
    x, ndim = ctx.lift(a), max(a.ndim, 1)
    x = x if a.ndim else x.reshape([ctx.length, 1])
    return x.call(op, dim % ndim + 1, size, step).reshape([ctx.length, *ctx.out.shape])


composite(aten.unfold.default, _unfold, batch=_unfold_batch)

# ----- embeddings -----------------------------------------------------------------------------------------------------


def _embedding_batch(ctx, op, args, kwargs):
    weight, indices, *rest = args
    if not isinstance(weight, Mapped):
        return ctx.b.emit(op, (weight, indices.x, *rest), kwargs)
    rows, width = weight.shape
    flat, moved = weight.x.reshape([ctx.length * rows, width]), _shifted(ctx, indices, rows)
    return ctx.b.emit(op, (flat, moved, -1, False, False))


def _shifted(ctx, indices, rows) -> Value:
    """Indices into the rows of all examples, laid end to end."""
    x = ctx.lift(indices)
    return x + (arange(x, ctx.length, x.dtype) * rows).reshape([ctx.length, *[1] * indices.ndim])


def _embedding_backward_batch(ctx, op, args, kwargs):
    ct, indices, rows, padding, by_frequency = args
    x = ctx.lift(ct)
    if padding >= 0:
        x = _unpadded(x, ctx.lift(indices), padding)
    out = ctx.b.emit(op, (x, _shifted(ctx, indices, rows), ctx.length * rows, -1, by_frequency))
    return out.reshape([ctx.length, *ctx.out.shape])


def _unpadded(x, indices, padding):
    return indices.eq(padding).reshape([*indices.shape, 1]).where(0.0, x)


def _embedding_transpose(ct, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return ct.call(
        aten.embedding_dense_backward.default, indices, weight.shape[0], padding_idx, scale_grad_by_freq
    )


def _embedding_backward_transpose(ct, t, indices, rows, padding, by_frequency):
    if by_frequency:
        from ..errors import NotSupported

        raise NotSupported(
            what="a second derivative of an embedding with scale_grad_by_freq",
            instead="Use scale_grad_by_freq=False.",
        )
    out = ct.call(aten.embedding.default, indices)
    return out if padding < 0 else _unpadded(out, indices, padding)


linear(aten.embedding.default, _embedding_transpose, batch=_embedding_batch)
rule(
    aten.embedding_dense_backward.default,
    jvp=lambda ts, y, ct, *args: ts[0].call(aten.embedding_dense_backward.default, *args),
    transpose=[_embedding_backward_transpose, None],
    batch=_embedding_backward_batch,
)

# ----- sorting --------------------------------------------------------------------------------------------------------


def _taken(t, y, a, dim=-1):
    """The tangent at the indices that were taken."""
    return (t.call(GATHER, dim, y[1]) if a.ndim else t.reshape(list(y[0].shape)), None)


rule(
    aten.sort.default,
    jvp=[lambda t, y, a, dim=-1, descending=False: _taken(t, y, a, dim)],
    batch=along("dim"),
)
rule(
    aten.sort.stable,
    jvp=[lambda t, y, a, *, stable=None, dim=-1, descending=False: _taken(t, y, a, dim)],
    batch=along("dim"),
)
rule(
    aten.topk.default,
    jvp=[lambda t, y, a, k, dim=-1, largest=True, sorted=True: _taken(t, y, a, dim)],
    batch=along("dim"),
)
rule(aten.cummax.default, jvp=[lambda t, y, a, dim: _taken(t, y, a, dim)], batch=along("dim"))
rule(aten.cummin.default, jvp=[lambda t, y, a, dim: _taken(t, y, a, dim)], batch=along("dim"))
zero(aten.argsort.default, batch=along("dim"))
zero(aten.bucketize.Tensor, batch=None)
zero(aten.searchsorted.Tensor, batch=None)
