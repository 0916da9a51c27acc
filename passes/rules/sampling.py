"""Sampling at a grid: grid_sampler_2d and 3d.

ATen's kernels sample and pull back. The composition here, which reads a few taps an axis with their weights, gives forward
mode in the grid and whatever comes after the first pullback.
"""

from __future__ import annotations

import itertools

import torch

from ..decompose import build
from ..dims import numel
from ..linearize import vjp
from ..record import Value, aten
from .composed import paired, through
from .shape import zeros_like
from .table import composite, rule

BILINEAR, NEAREST, BICUBIC = 0, 1, 2
ZEROS, BORDER, REFLECTION = 0, 1, 2


# ----- coordinates: derivatives stop where ATen's stop ------------------------------------------------------------------


def _place(g, size, align) -> Value:
    """A number in [-1, 1] as a place among `size` elements: of their centres, or of their borders."""
    return (g + 1) * ((size - 1) / 2) if align else ((g + 1) * size - 1) * 0.5


def _clipped(u, size) -> Value:
    inside = u.gt(0) & u.lt(size - 1)
    return inside.where(u, u.le(0).where(u.full([], 0), size - 1))


def _reflected(u, size, align) -> Value:
    """Folded at the centres of the outermost elements, or at their borders."""
    low, span = (0, size - 1) if align else (-0.5, size)
    if span == 0:
        return u.full(u.shape, 0)
    from_low = u - low
    from_low = from_low.lt(0).where(-from_low, from_low)
    rest, even = from_low.fmod(span), (from_low / span).floor().remainder(2).eq(0)
    return even.where(rest + low, span - rest + low)


def _padded(u, size, padding, align) -> Value:
    if padding == ZEROS:
        return u
    return _clipped(u if padding == BORDER else _reflected(u, size, align), size)


# ----- taps: (place, weight) along one axis -----------------------------------------------------------------------------


def _taps(g, size, mode, padding, align) -> list:
    u = _place(g, size, align)
    if mode == BICUBIC:
        low = u.floor()
        weights = _cubic(u - low)
        return [(_padded(low + (i - 1), size, padding, align), w) for i, w in enumerate(weights)]
    u = _padded(u, size, padding, align)
    if mode == NEAREST:
        return [(u.round(), None)]
    low = u.floor()
    return [(low, 1 - (u - low)), (low + 1, u - low)]


def _cubic(f) -> list[Value]:
    """Keys' convolution with a = -3/4 at distances 1 + f, f, 1 - f, 2 - f."""
    a = -0.75
    near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1
    far = lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return [far(f + 1), near(f), near(1 - f), far(2 - f)]


def sampled(x, grid, mode, padding, align) -> Value:
    """The sampler: a sum over the taps of all axes."""
    n, c, *space = x.shape
    at = [grid.call(aten.select.int, -1, len(space) - 1 - d).reshape([n, 1, -1]) for d in range(len(space))]
    taps = [_taps(g, s, mode, padding, align) for g, s in zip(at, space, strict=True)]
    rows, total = x.reshape([n, c, numel(space)]), None
    for corner in itertools.product(*taps):
        share = _read(rows, [place for place, _ in corner], space)
        for _, weight in corner:
            share = share if weight is None else share * weight
        total = share if total is None else total + share
    return total.reshape([n, c, *grid.shape[1:-1]])


def _read(rows, places, space) -> Value:
    """The elements at these places, 0 outside."""
    inside = flat = None
    for place, size in zip(places, space, strict=True):
        here = place.ge(0) & place.lt(size)
        inside = here if inside is None else inside & here
        index = here.where(place, 0.0).to(torch.int64)
        flat = index if flat is None else flat * size + index
    values = rows.call(aten.gather.default, 2, flat.expand([*rows.shape[:2], flat.shape[2]]))
    return inside.where(values, 0.0)


# ----- rows -------------------------------------------------------------------------------------------------------------


def _in_rows(ctx, op, args, kwargs):
    """The axis joins that of the examples."""
    folded = [_folded(ctx.lift(a)) if hasattr(a, "val") else a for a in args]
    out, unfold = ctx.b.emit(op, tuple(folded), kwargs), lambda o: o.reshape([ctx.length, -1, *o.shape[1:]])
    return unfold(out) if isinstance(out, Value) else tuple(o and unfold(o) for o in out)


def _folded(x) -> Value:
    return x.reshape([x.shape[0] * x.shape[1], *x.shape[2:]])


def _sampler(forward, backward):
    def on_grid(t, y, x, grid, mode, *how):
        """Nearest elements stay where they are."""
        if mode == NEAREST:
            return None
        how = mode, *how
        push = lambda x, grid, t: through(sampled)((None, t, *[None] * 3), None, x, grid, *how)
        pull = lambda x, grid, ct: ct.call(backward, x, grid, *how, [False, True])[1]
        return paired(str(forward), t, y.val, push, pull, x, grid)

    rule(
        forward,
        jvp=[lambda t, y, x, grid, *how: t.call(forward, grid, *how), on_grid],
        transpose=[
            lambda ct, x, grid, *how: ct.call(backward, zeros_like(ct, x), grid, *how, [True, False])[0],
            None,
        ],
        batch=_in_rows,
    )

    def pulled(ct, x, grid, *how):
        """The grid's part is there whatever the mask says, as in ATen."""
        *how, (wanted, _) = how
        graph = build(lambda x, grid: sampled(x, grid, *how), (x.val, grid.val), {})
        to_x, to_grid = vjp(ct.builder, graph, [x, grid], (True, True), lambda outs: [ct])[1]
        return to_x if wanted else None, grid.full(grid.shape, 0) if to_grid is None else to_grid

    composite(backward, pulled, batch=_in_rows)


_sampler(aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default)
_sampler(aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default)
