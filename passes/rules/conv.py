"""Convolution and pooling.

Convolution is one trilinear form <ct, conv(x, w)>: its two adjoints are the two parts of aten.convolution_backward, and
each of the three is differentiated by the other two. A mapped axis is folded into the batch where the weight does not
carry it, into the groups where it does.
"""

from __future__ import annotations

from ..batch import Mapped
from ..dims import numel
from ..record import Value, aten
from .shape import zeros_like
from .table import composite, linear, rule

CONV, BACKWARD = aten.convolution.default, aten.convolution_backward.default


def _input_part(ct, shape, w, *how) -> Value:
    """The adjoint of x -> conv(x, w): x is read for its shape only."""
    return ct.call(BACKWARD, ct.full(shape, 0), w, None, *how, [True, False, False])[0]


def _weight_part(ct, x, shape, *how) -> Value:
    """The adjoint of w -> conv(x, w): w is read for its shape only."""
    return ct.call(BACKWARD, x, ct.full(shape, 0), None, *how, [False, True, False])[1]


def _channels(bias, like):
    return bias.reshape([-1, *[1] * (like.ndim - 2)])


def _all_but_channels(x) -> Value:
    return x.sum([0, *range(2, x.ndim)])


rule(
    CONV,
    jvp=[
        lambda t, y, x, w, b, *how: t.call(CONV, w, None, *how),
        lambda t, y, x, w, b, *how: x.call(CONV, t, None, *how),
        lambda t, y, x, w, b, *how: _channels(t, y),
    ],
    transpose=[
        lambda ct, x, w, b, *how: _input_part(ct, x.shape, w, *how),
        lambda ct, x, w, b, *how: _weight_part(ct, x, w.shape, *how),
        lambda ct, x, w, b, *how: _all_but_channels(ct),
    ],
    batch=lambda ctx, op, args, kwargs: _convolution(ctx, *args),
)


# ----- the adjoints ---------------------------------------------------------------------------------------------------


def _backward_jvp(ts, y, ct, x, w, bias_sizes, *how):
    """Each part is bilinear: the input part in (ct, w), the weight part in (ct, x)."""
    *how, mask = how
    c, tx, tw = ts[:3]
    on_input = [
        c is not None and _input_part(c, x.shape, w, *how),
        tw is not None and _input_part(ct, x.shape, tw, *how),
    ]
    on_weight = [
        c is not None and _weight_part(c, x, w.shape, *how),
        tx is not None and _weight_part(ct, tx, w.shape, *how),
    ]
    bias = _all_but_channels(c) if c is not None and mask[2] else None
    return (_sum(on_input) if mask[0] else None, _sum(on_weight) if mask[1] else None, bias)


def _sum(shares):
    shares = [s for s in shares if s]
    return shares[0] if len(shares) == 1 else shares[0] + shares[1] if shares else None


def _backward_to_ct(cts, ct, x, w, bias_sizes, *how):
    *how, _ = how
    gx, gw, gb = cts
    shares = [
        gx is not None and gx.call(CONV, w, None, *how),
        gw is not None and x.call(CONV, gw, None, *how),
    ]
    out = _sum(shares)
    return (
        out
        if gb is None
        else _channels(gb, ct).expand(list(ct.shape))
        if out is None
        else out + _channels(gb, ct)
    )


rule(
    BACKWARD,
    jvp=_backward_jvp,
    transpose=[
        _backward_to_ct,
        lambda cts, ct, x, w, bias_sizes, *how: (
            _input_part(ct, x.shape, cts[1], *how[:-1]) if cts[1] is not None else None
        ),
        lambda cts, ct, x, w, bias_sizes, *how: (
            _weight_part(ct, cts[0], w.shape, *how[:-1]) if cts[0] is not None else None
        ),
    ],
    batch=lambda ctx, op, args, kwargs: _convolution_backward(ctx, *args),
)


# ----- batching -------------------------------------------------------------------------------------------------------


def _in_rows(x) -> Value:
    """[B, N, C, ...] -> [B N, C, ...]"""
    return x.reshape([x.shape[0] * x.shape[1], *x.shape[2:]])


def _in_channels(x) -> Value:
    """[B, N, C, ...] -> [N, B C, ...]"""
    x = x.movedim(0, 1)
    return x.reshape([x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]])


def _from_channels(x, n, channels) -> Value:
    """[N, B C, ...] -> [B, N, C, ...]"""
    return x.reshape([x.shape[0], n, channels, *x.shape[2:]]).movedim(1, 0)


def _convolution(ctx, x, w, b, *how):
    if isinstance(b, Mapped):
        bias = b.x.reshape([ctx.length, 1, b.shape[0], *[1] * (ctx.out.ndim - 2)])
        return (
            _unbiased(ctx, x, w, None, *how) + bias
            if _any(x, w)
            else ctx.b.emit(CONV, (x, w, None, *how)) + bias
        )
    return _unbiased(ctx, x, w, b, *how)


def _any(*xs) -> bool:
    return any(isinstance(x, Mapped) for x in xs)


def _unbiased(ctx, x, w, b, *how):
    n, groups = ctx.length, how[-1]
    if not isinstance(w, Mapped):
        return ctx.b.emit(CONV, (_in_rows(x.x), w, b, *how)).reshape([n, *ctx.out.shape])
    if isinstance(x, Mapped):
        out = ctx.b.emit(CONV, (_in_channels(x.x), _in_rows(w.x), None, *how[:-1], groups * n))
        out = _from_channels(out, n, ctx.out.shape[1])
    else:
        out = _shared_input(ctx, x, w, *how)
    return out if b is None else out + _channels(b, out.call(aten.select.int, 0, 0))


def _shared_input(ctx, x, w, *how):
    """One input under many weights: the axis joins the output channels of each group."""
    transposed, groups = how[3], how[-1]
    out = ctx.out.shape[1] // groups
    if transposed:  # [B, C, O/g, ...] -> [C, B O/g, ...]
        weight = _in_channels(w.x)
    else:  # [B, g O/g, C/g, ...] -> [g B O/g, C/g, ...]
        weight = (
            w.x.reshape([ctx.length, groups, out, *w.shape[1:]])
            .movedim(0, 1)
            .reshape([groups * ctx.length * out, *w.shape[1:]])
        )
    y = ctx.b.emit(CONV, (x, weight, None, *how))
    rows, _, *space = ctx.out.shape
    return (
        y.reshape([rows, groups, ctx.length, out, *space]).movedim(2, 0).reshape([ctx.length, *ctx.out.shape])
    )


def _convolution_backward(ctx, ct, x, w, bias_sizes, *how):
    *how, mask = how
    parts = [None, None, None]
    if mask[0]:
        parts[0] = _batched_input_part(ctx, ct, x, w, *how)
    if mask[1]:
        parts[1] = _batched_weight_part(ctx, ct, x, w, *how)
    if mask[2]:
        parts[2] = ctx.lift(ct).sum([1, *range(3, ct.ndim + 1)])
    return tuple(parts)


def _batched_input_part(ctx, ct, x, w, *how):
    n = ctx.length
    if isinstance(w, Mapped):
        rows, channels, *space = x.shape
        out = _input_part(
            _in_channels(ctx.lift(ct)), [rows, n * channels, *space], _in_rows(w.x), *how[:-1], how[-1] * n
        )
        return _from_channels(out, n, channels)
    if not isinstance(ct, Mapped):
        return ctx.lift(_input_part(ct, x.shape, w, *how))
    return _input_part(_in_rows(ct.x), [n * x.shape[0], *x.shape[1:]], w, *how).reshape([n, *x.shape])


def _batched_weight_part(ctx, ct, x, w, *how):
    n = ctx.length
    if not _any(ct, x):
        return ctx.lift(_weight_part(ct, x, w.shape, *how))
    out = _weight_part(
        _in_channels(ctx.lift(ct)),
        _in_channels(ctx.lift(x)),
        [n * w.shape[0], *w.shape[1:]],
        *how[:-1],
        how[-1] * n,
    )
    return out.reshape([n, *w.shape])


# ----- pooling --------------------------------------------------------------------------------------------------------


def planes(rank: int):
    """Batch rule of ops over planes [..., *space] with `rank` space dims: the axis is folded into the leading dims."""

    def rule(ctx, op, args, kwargs):
        args = [ctx.lift(a) if isinstance(a, (Mapped, Value)) else a for a in args]
        fold = lambda x: x.reshape([numel(x.shape[: -rank - 1]), *x.shape[-rank - 1 :]])
        unfold = lambda o, v: o.reshape([ctx.length, *v.shape])
        out = ctx.b.emit(op, tuple(fold(a) if isinstance(a, Value) else a for a in args), kwargs)
        return tuple(map(unfold, out, ctx.out)) if isinstance(out, tuple) else unfold(out, ctx.out)

    return rule


def _maxima(rank: int):
    """The tangent of a max pool: read at the saved places of each plane."""

    def jvp(t, y, a, *args, **kwargs):
        index = y[1]
        flat = lambda x: x.reshape([*x.shape[:-rank], numel(x.shape[-rank:])])
        return (flat(t).call(aten.gather.default, -1, flat(index)).reshape(list(index.shape)), None)

    return jvp


for _op, _rank in (
    (aten.max_pool2d_with_indices, 2),
    (aten.max_pool3d_with_indices, 3),
    (aten.adaptive_max_pool2d, 2),
    (aten.adaptive_max_pool3d, 3),
):
    rule(_op.default, jvp=[_maxima(_rank)], batch=planes(_rank))


def _averages(forward, backward, rank: int, defaults):
    """A linear pool and its adjoint, which reads its second argument for its shape only."""

    def full(a, args):
        given = [*args, *defaults[len(args) :]]
        return (
            given if not given or given[1] else [given[0], given[0], *given[2:]]
        )  # no stride: that of the kernel

    linear(
        forward, lambda ct, a, *args: ct.call(backward, zeros_like(ct, a), *full(a, args)), batch=planes(rank)
    )
    rule(
        backward,
        jvp=lambda ts, y, ct, a, *args: None if ts[0] is None else ts[0].call(backward, a, *args),
        transpose=[lambda ct, g, a, *args: ct.call(forward, *args), None],
        batch=planes(rank),
    )


_averages(aten.avg_pool2d.default, aten.avg_pool2d_backward.default, 2, [None, [], 0, False, True, None])
_averages(aten.avg_pool3d.default, aten.avg_pool3d_backward.default, 3, [None, [], 0, False, True, None])


def _adaptive(forward, backward, rank: int):
    linear(forward, lambda ct, a, size: ct.call(backward, zeros_like(ct, a)), batch=planes(rank))
    rule(
        backward,
        jvp=lambda ts, y, ct, a: None if ts[0] is None else ts[0].call(backward, a),
        transpose=[lambda ct, g, a: ct.call(forward, list(g.shape[-rank:])), None],
        batch=planes(rank),
    )


_adaptive(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default, 2)
_adaptive(aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default, 3)


def _in_plane(pool):
    """A pool of vectors as a pool of planes of one row."""

    def pooled(a, *sizes_and_how):
        y = pool(a.reshape([*a.shape[:-1], 1, a.shape[-1]]), *sizes_and_how)
        return y.reshape([*y.shape[:-2], y.shape[-1]])

    return pooled


def _avg_pool1d(a, kernel, stride=(), padding=(0,), *how):
    stride = stride or kernel
    return a.call(aten.avg_pool2d.default, [1, *kernel], [1, *stride], [0, *padding], *how)


composite(aten.avg_pool1d.default, _in_plane(_avg_pool1d))
composite(
    aten.adaptive_avg_pool1d.default,
    _in_plane(lambda a, size: a.call(aten._adaptive_avg_pool2d.default, [1, *size])),
)


def _to_maxima(rank: int):
    """The adjoint of a max pool: each plane's cotangents added at the saved places. Indices are the last argument."""

    def scattered(ct, a, *how):
        flat = lambda x: x.reshape([*x.shape[:-rank], numel(x.shape[-rank:])])
        added = flat(zeros_like(ct, a)).call(aten.scatter_add.default, -1, flat(how[-1]), flat(ct))
        return added.reshape(list(a.shape))

    return scattered


composite(aten.max_pool2d_with_indices_backward.default, _to_maxima(2))
composite(aten.max_pool3d_with_indices_backward.default, _to_maxima(3))
composite(aten.adaptive_max_pool2d_backward.default, _to_maxima(2))
composite(aten.adaptive_max_pool3d_backward.default, _to_maxima(3))
