"""Pools over planes. Entry point: `WAYS`, op -> the calls, or None where windows are irregular; a max pool is a move.

An average is a sum over a view of windows, and its adjoint one over the windows that meet a place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxfunc.passes.dims import Dim, numel
from fxfunc.passes.record import Value

from .conv import Geometry, backward_windows, padded, windows

aten = torch.ops.aten

DTYPES = (torch.float32, torch.float64)


def _pair(xs: Sequence[int]) -> tuple[int, int]:
    xs = [xs] if isinstance(xs, int) else list(xs)
    return (xs[0], xs[-1])


def _planes(x: Value) -> Value:
    """As [N, C, H, W]."""
    return x if x.ndim == 4 else x.reshape([1, *x.shape])


def geometry(kernel, stride=(), padding=0, dilation=1) -> Geometry:
    """How the planes are read; no stride is that of the kernel."""
    return Geometry(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), 1)


def windows_of(size: Sequence[int], g: Geometry, ceil: bool) -> list[int]:
    """The numbers of windows: with `ceil` also the last that begins inside of the input or the padding before it."""
    out = []
    for n, k, s, p, d in zip(size, g.kernel, g.stride, g.padding, g.dilation, strict=True):
        count = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)) // s + 1
        out.append(count - (ceil and (count - 1) * s >= n + p))
    return out


def _counts(like: Value, g: Geometry, size: Sequence[int], out: Sequence[int], include: bool) -> Value:
    """By how much the sum of each window [*out] is divided."""
    sides = []
    for n, count, k, s, p in zip(size, out, g.kernel, g.stride, g.padding, strict=True):
        starts = [i * s - p for i in range(count)]
        ends = [min(i + k, n + p) for i in starts]
        sides.append([e - i if include else min(e, n) - max(i, 0) for i, e in zip(starts, ends, strict=True)])
    return _separable(like, sides)


def _separable(like: Value, sides: Sequence[Sequence[int]]) -> Value | int:
    """The products of the numbers of two sides; one number if all are the same."""
    if all(len(set(side)) == 1 for side in sides):
        return sides[0][0] * sides[1][0]
    rows, columns = (_numbers(like, side) for side in sides)
    return rows.reshape([len(sides[0]), 1]) * columns.reshape([1, len(sides[1])])


def _numbers(like: Value, xs: Sequence[int]) -> Value:
    """These numbers, as calls that need no tensor: one number, but for some at the ends."""
    usual = max(set(xs), key=xs.count)
    at = like.builder.emit(aten.arange.default, (len(xs),), {"device": like.device})
    out = like.full([len(xs)], usual)
    for i, x in enumerate(xs):
        out = out if x == usual else at.eq(i).where(like.full([], x), out)
    return out


def _avg_pool(x: Value, kernel, stride=(), padding=0, ceil=False, include=True, divisor=None) -> Value:
    planes, g = _planes(x), geometry(kernel, stride, padding)
    size, out = planes.shape[2:], windows_of(planes.shape[2:], g, ceil)
    sums = windows(padded(planes, _sides(size, out, g)), g.kernel, g.stride, (1, 1)).sum([4, 5])
    y = sums / (divisor or _counts(sums, g, size, out, include))
    return y.reshape([*x.shape[:-2], *out])


def _sides(size: Sequence[int], out: Sequence[int], g: Geometry) -> list[tuple[int, int]]:
    """What is added to each side, so that there are so many windows."""
    return [(p, (o - 1) * s + k - n - p)
            for n, o, k, s, p in zip(size, out, g.kernel, g.stride, g.padding, strict=True)]  # fmt: skip


def _avg_pool_backward(ct: Value, x: Value, kernel, stride, padding, ceil, include, divisor) -> Value:
    planes, g = _planes(ct), geometry(kernel, stride, padding)
    size, out = list(x.shape[-2:]), list(ct.shape[-2:])
    shares = planes / (divisor or _counts(planes, g, size, out, include))
    return backward_windows(shares, size, g).sum([4, 5]).reshape(list(x.shape))


def _regular(size: Sequence[int], out: Sequence[int]) -> list[int] | None:
    """The kernel of an adaptive pool, if all windows are alike."""
    if any(isinstance(n, Dim) or not m or n % m for n, m in zip(size, out, strict=True)):
        return None
    return [n // m for n, m in zip(size, out, strict=True)]


def _adaptive_avg_pool(x: Value, size) -> Value | None:
    kernel = _regular(x.shape[-2:], size)
    return kernel and _avg_pool(x, kernel)


def _adaptive_backward(ct: Value, x: Value) -> Value | None:
    kernel = _regular(x.shape[-2:], ct.shape[-2:])
    return kernel and _avg_pool_backward(ct, x, kernel, kernel, 0, False, True, None)


def _adaptive_max_pool(x: Value, size) -> tuple[Value, Value] | None:
    kernel = _regular(x.shape[-2:], size)
    return kernel and x.call(aten.max_pool2d_with_indices.default, kernel)


WAYS: dict[object, Callable] = {
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_backward,
    aten.adaptive_max_pool2d.default: _adaptive_max_pool,
}


def is_taken(x: Value) -> bool:
    """True for planes that a kernel or a move reads."""
    known = not any(isinstance(s, Dim) for s in x.shape) and numel(x.shape) > 0
    return known and x.dtype in DTYPES
