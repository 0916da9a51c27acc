"""Reductions, cumulative ops and softmax."""

from __future__ import annotations

import math

from ..dims import numel
from ..record import aten
from .batching import along, full_reduction, reduction
from .pointwise import ratio
from .table import composite, linear, rule, zero


def dims_of(a, dims) -> list[int]:
    """Reduced dims as positive ints; none given means all."""
    if isinstance(dims, int):
        dims = [dims]
    return sorted(d % a.ndim for d in dims) if dims and a.ndim else list(range(a.ndim))


def kept(x, a, dims, keepdim: bool):
    """`x`, reduced over dims of `a`, with these dims back as size 1."""
    dims = dims_of(a, dims)
    return x if keepdim else x.reshape([1 if i in dims else s for i, s in enumerate(a.shape)])


def _unreduce(ct, a, dims=None, keepdim=False, dtype=None):
    return kept(ct, a, dims, keepdim).expand(a.shape)


linear(aten.sum.dim_IntList, _unreduce, batch=reduction)
composite(aten.sum.default, lambda a, **dtype: a.call(aten.sum.dim_IntList, list(range(a.ndim)), **dtype))


def _count(a, dims):
    return numel(a.shape[d] for d in dims_of(a, dims))


def _mean(a, dims=None, keepdim=False, dtype=None):
    a = a.to(dtype) if dtype else a
    return a.sum(dims_of(a, dims), keepdim) / _count(a, dims)


composite(aten.mean.dim, _mean)
composite(aten.mean.default, lambda a, dtype=None: _mean(a, None, False, dtype))


def _at_least_zero(count, correction):
    return max(count - correction, 0) if isinstance(count, int) else count - correction


def _std(t, y, a, dim=None, *, correction=None, keepdim=False):
    """Zero where the deviation is zero."""
    centred = a - _mean(a, dim, True)
    along = (t * centred.conj()).to(y.dtype).sum(dims_of(a, dim), keepdim)
    return ratio(along, y * _at_least_zero(_count(a, dim), 1 if correction is None else correction))


def _var(t, y, a, dim=None, *, correction=None, keepdim=False):
    count = _count(a, dim)
    freedom = _at_least_zero(count, 1 if correction is None else correction) if count != 0 else 1
    weight = (a - _mean(a, dim, True)).conj() * 2 / freedom
    return (t * weight).to(y.dtype.to_real()).sum(dims_of(a, dim), keepdim)


rule(aten.std.correction, jvp=[_std], batch=along("dim"))
rule(aten.var.correction, jvp=[_var], batch=along("dim"))
rule(
    aten.var_mean.correction,
    jvp=[
        lambda t, y, a, dim=None, **how: (
            _var(t, y[0], a, dim, **how),
            _mean(t, dim, how.get("keepdim", False)),
        )
    ],
    batch=along("dim"),
)


def _spread(op):
    """var or std with `unbiased` in place of a correction."""
    return lambda a, dim=None, unbiased=True, keepdim=False: a.call(
        op.correction, dim, correction=int(unbiased), keepdim=keepdim
    )


for _op in (aten.var, aten.std):
    composite(_op.dim, _spread(_op))
    composite(_op.default, (lambda spread: lambda a, unbiased=True: spread(a, None, unbiased))(_spread(_op)))


# ----- extrema: ties share, as in torch -------------------------------------------------------------------------------


def _extremum(t, y, a, dims=(), keepdim=False):
    hit = a.eq(kept(y, a, dims, keepdim))
    weight = hit.to(a.dtype)
    weight = weight / weight.sum(dims_of(a, dims), True)
    return (t * weight).sum(dims_of(a, dims), keepdim)


rule(aten.amax.default, jvp=[_extremum], batch=reduction)
rule(aten.amin.default, jvp=[_extremum], batch=reduction)
rule(aten.max.default, jvp=[lambda t, y, a: _extremum(t, y, a)], batch=full_reduction(aten.amax.default))
rule(aten.min.default, jvp=[lambda t, y, a: _extremum(t, y, a)], batch=full_reduction(aten.amin.default))


def _picked(t, y, a, dim=-1, keepdim=False, **kwargs):
    """The tangent at the index that was taken."""
    index = y[1] if keepdim or not a.ndim else y[1].unsqueeze(dim)
    picked = t.builder.emit(aten.gather.default, (t, dim, index))
    return (picked if keepdim or not a.ndim else picked.reshape(y[0].shape), None)


for _op in (aten.max.dim, aten.min.dim, aten.median.dim, aten.nanmedian.dim, aten.mode.default):
    rule(_op, jvp=[_picked], batch=along("dim"))
rule(
    aten.kthvalue.default,
    jvp=[lambda t, y, a, k, dim=-1, keepdim=False: _picked(t, y, a, dim, keepdim)],
    batch=along("dim"),
)
zero(aten.argmax.default, batch=lambda ctx, op, args, kwargs: _arg(ctx, op, args, kwargs))
zero(aten.argmin.default, batch=lambda ctx, op, args, kwargs: _arg(ctx, op, args, kwargs))
zero(aten.any.default, batch=full_reduction(aten.any.dims))
zero(aten.all.default, batch=full_reduction(aten.all.dims))
zero(aten.any.dim, batch=along("dim"))
zero(aten.all.dim, batch=along("dim"))
zero(aten.any.dims, batch=along("dim"))
zero(aten.all.dims, batch=along("dim"))


def _arg(ctx, op, args, kwargs):
    x, dim = args[0].x, args[1] if len(args) > 1 else None
    if dim is None:
        flat = x.reshape([x.shape[0], -1] if args[0].ndim else [x.shape[0], 1])
        return ctx.b.emit(op, (flat, 1)).reshape([ctx.length, *ctx.out.shape])
    return along("dim")(ctx, op, args, kwargs)


# ----- softmax --------------------------------------------------------------------------------------------------------
def _softmax(t, y, a, dim, half=False, *, dtype=None):
    t = t.to(y.dtype)
    return y * (t - (y * t).sum([dim], True))


rule(aten._softmax.default, jvp=[_softmax], batch=along("dim"))
rule(aten._safe_softmax.default, jvp=[_softmax], batch=along("dim"))  # zeros in a row of -inf
rule(
    aten._log_softmax.default,
    jvp=[lambda t, y, a, dim, half: t - (y.exp() * t).sum([dim], True)],
    batch=along("dim"),
)


def _logsumexp(t, y, a, dims, keepdim=False):
    weight = (a - kept(y, a, dims, keepdim)).exp()
    return (t * weight).sum(dims_of(a, dims), keepdim)


rule(aten.logsumexp.default, jvp=[_logsumexp], batch=along("dim"))


# ----- cumulative and products ----------------------------------------------------------------------------------------


def _uncumsum(ct, a, dim, dtype=None):
    return ct.flip([dim]).cumsum(dim).flip([dim]) if a.ndim else ct


linear(aten.cumsum.default, _uncumsum, batch=along("dim"))


def _shifted(x, dim: int, by: int, fill):
    """`x` moved up along a dim, `fill` coming in."""
    padded = x.call(aten.constant_pad_nd.default, [0, 0] * (x.ndim - 1 - dim) + [by, 0], fill)
    return padded.call(aten.slice.Tensor, dim, 0, x.shape[dim])


def _prefixes(xs: tuple, dim: int, combine, units: tuple) -> tuple:
    """Prefix results of an associative operation by doubling: exact at zeros, differentiable any number of times."""
    if not xs[0].ndim:
        return xs
    dim, by = dim % xs[0].ndim, 1
    while by < _static(xs[0].shape[dim]):
        xs = combine(xs, [_shifted(x, dim, by, unit) for x, unit in zip(xs, units, strict=True)])
        by *= 2
    return xs


def _static(size) -> int:
    if not isinstance(size, int):
        from ..errors import DynamicShape

        raise DynamicShape(what="a product or a cumulative operation along a symbolic axis")
    return size


def _product(x, dim: int, keepdim=False):
    """Halves multiplied until one is left."""
    if not x.ndim:
        return x
    dim = dim % x.ndim
    n = _static(x.shape[dim])
    x = x if n else x.full([*x.shape[:dim], 1, *x.shape[dim + 1 :]], 1)
    while (n := x.shape[dim]) > 1:
        half = (n + 1) // 2
        low, high = x.call(aten.slice.Tensor, dim, 0, half), x.call(aten.slice.Tensor, dim, half, n)
        high = (
            high
            if n % 2 == 0
            else high.call(aten.constant_pad_nd.default, [0, 0] * (x.ndim - 1 - dim) + [0, 1], 1)
        )
        x = low * high
    return x if keepdim else x.reshape([*x.shape[:dim], *x.shape[dim + 1 :]])


def _cast(a, dtype):
    return a if dtype is None else a.to(dtype)


composite(
    aten.cumprod.default,
    lambda a, dim, *, dtype=None: _prefixes(
        (_cast(a, dtype),), dim, lambda low, high: (low[0] * high[0],), (1,)
    )[0],
    batch=along("dim"),
)


def _logcumsumexp(t, y, a, dim):
    """By prefixes of (largest element, sum of exp(a - largest), that sum with tangents): nothing is rounded at the size of y."""
    real = lambda x: x.to(a.dtype.to_real())

    def combine(p, q):
        first = real(p[0]).ge(real(q[0]))
        large, small = ([first.where(x, y) for x, y in zip(*pair, strict=True)] for pair in ((p, q), (q, p)))
        weight = real(small[0]).eq(-math.inf).where(-math.inf, small[0] - large[0]).exp()
        return (large[0], *(x + weight * y for x, y in zip(large[1:], small[1:], strict=True)))

    leaves = (a, a.full(a.shape, 1), real(a).eq(-math.inf).where(0, t))
    _, total, weighted = _prefixes(leaves, dim, combine, (-math.inf, 0, 0))
    return weighted / total


rule(aten.logcumsumexp.default, jvp=[_logcumsumexp], batch=along("dim"))
composite(
    aten.prod.dim_int,
    lambda a, dim, keepdim=False, *, dtype=None: _product(_cast(a, dtype), dim, keepdim),
    batch=along("dim"),
)
composite(
    aten.prod.default,
    lambda a, *, dtype=None: _product(_cast(a, dtype).reshape([-1]), 0),
    batch=lambda ctx, op, args, kwargs: ctx.b.emit(
        aten.prod.dim_int, (args[0].x.reshape([ctx.length, numel(args[0].shape)]), 1), kwargs
    ),
)

# ----- norms ----------------------------------------------------------------------------------------------------------
composite(aten.norm.Scalar, lambda a, p=2: a.call(aten.linalg_vector_norm.default, p))
composite(aten.dist.default, lambda a, b, p=2: (a - b).call(aten.linalg_vector_norm.default, p))
composite(aten.trace.default, lambda a: a.call(aten.diagonal.default).sum())
composite(
    aten.norm.ScalarOpt_dim,
    lambda a, p, dim, keepdim=False: a.call(
        aten.linalg_vector_norm.default, 2 if p is None else p, dim, keepdim
    ),
)


def _vector_norm(ts, y, a, p=2, dim=None, keepdim=False, *, dtype=None):
    """Zero at zero for p >= 1, as torch: the subgradient of least norm."""
    t, yk = ts[0], kept(y, a, dim, keepdim)
    if p == 0:
        return None
    if p == 2:
        weight = yk.eq(0).where(0.0, a / yk)
    else:
        weight = a.sgn() * _norm_weight(a.abs(), yk, p, dim)
    return (t * weight.conj()).to(y.dtype).sum(dims_of(a, dim), keepdim)


def _norm_weight(size, yk, p, dim):
    """d norm / d |a|."""
    if math.isinf(p):
        hit = size.eq(yk).to(size.dtype)
        return hit / hit.sum(dims_of(size, dim), True)
    if p == 1:
        return size.full([], 1)
    return size.eq(0).where(0.0, ratio(size, yk).pow(p - 1))


rule(aten.linalg_vector_norm.default, jvp=_vector_norm, batch=along("dim"))
