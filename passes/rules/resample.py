"""Planes read at other places: padding from inside, windows, interpolation, sampling at a grid."""

from __future__ import annotations

from ..record import aten
from .conv import planes
from .shape import zeros_like
from .table import composite, linear, rule

# ----- padding by what is inside --------------------------------------------------------------------------------------


def _padding(forward, backward, rank: int):
    """A linear pad and its adjoint, which reads its second argument for its shape only."""
    linear(forward, lambda ct, a, pad: ct.call(backward, zeros_like(ct, a), pad), batch=planes(rank))
    rule(
        backward,
        jvp=lambda ts, y, ct, a, pad: None if ts[0] is None else ts[0].call(backward, a, pad),
        transpose=[lambda ct, g, a, pad: ct.call(forward, pad), None],
        batch=planes(rank),
    )


for _name in ("reflection_pad", "replication_pad"):
    for _rank in (1, 2, 3):
        _padding(
            getattr(aten, f"{_name}{_rank}d").default,
            getattr(aten, f"{_name}{_rank}d_backward").default,
            _rank,
        )

# ----- windows --------------------------------------------------------------------------------------------------------
linear(
    aten.im2col.default,
    lambda ct, a, *how: ct.call(aten.col2im.default, list(a.shape[-2:]), *how),
    batch=planes(2),
)
linear(
    aten.col2im.default,
    lambda ct, a, size, *how: ct.call(aten.im2col.default, *how),
    batch=planes(1),
)

# ----- interpolation --------------------------------------------------------------------------------------------------


def _upsampling(forward, backward, rank: int):
    """Interpolation by size: its adjoint takes the input's size."""
    linear(
        forward.default,
        lambda ct, a, size, *how: ct.call(backward.default, size, list(a.shape), *how),
        batch=planes(rank),
    )
    linear(
        backward.default,
        lambda ct, g, size, input_size, *how: ct.call(forward.default, size, *how),
        batch=lambda ctx, op, args, kwargs: _upsampled(ctx, op, *args),
    )
    composite(
        forward.vec, lambda a, size, *how: a.call(forward.default, *_explicit_size(a, size, rank, *how))
    )


def _upsampled(ctx, op, ct, size, input_size, *how):
    x = ct.x.reshape([ctx.length * ct.shape[0], *ct.shape[1:]])
    out = ctx.b.emit(op, (x, size, [ctx.length * input_size[0], *input_size[1:]], *how))
    return out.reshape([ctx.length, *ctx.out.shape])


def _explicit_size(a, size, rank: int, *how):
    """Size, corners and one scale an axis: sizes are rounded down, and scales that were given are used as they are."""
    *corners, factors = how
    if size is not None:
        return [list(size), *corners, *[None] * rank]
    return [
        [int(s * f) for s, f in zip(a.shape[-rank:], factors, strict=True)],
        *corners,
        *factors,
    ]


for _name, _rank in (
    ("upsample_nearest1d", 1),
    ("upsample_nearest2d", 2),
    ("upsample_nearest3d", 3),
    ("_upsample_nearest_exact1d", 1),
    ("_upsample_nearest_exact2d", 2),
    ("_upsample_nearest_exact3d", 3),
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
    ("upsample_trilinear3d", 3),
):
    _upsampling(getattr(aten, _name), getattr(aten, _name + "_backward"), _rank)
