"""Convolutions as products with windows of their input. Entry points: `WAYS`, op -> the calls; `refusal`, `multiplications`.

The windows are a view [N, C, out, kernel] of the padded input, which the left factor of a product may be (prepare.py): its
rows are places and its columns the terms of the sum, or the other way round for the gradient of the weights. The gradient
of the input, which is also what a transposed convolution computes, is a product with windows of the cotangents, spread by
the stride, read backward. Nothing is laid out as columns in memory, unless the weights have few channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fxfunc.passes.dims import Dim, numel
from fxfunc.passes.graph import Val
from fxfunc.passes.record import Value

aten = torch.ops.aten

FEW_COLUMNS = 8  # so few fill no vector: the places are the columns then


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a plane of the larger side of a convolution is read."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _pair(xs: Sequence[int], rank: int, fill: int) -> tuple[int, int]:
    """The numbers of two space dims; one given, or fewer than there are, stands for all."""
    xs = list(xs) if len(xs) == rank else [xs[0]] * rank
    return tuple([fill, *xs] if rank == 1 else xs)


def _geometry(w: Value, stride, padding, dilation, groups: int) -> Geometry:
    rank = w.ndim - 2
    return Geometry(_pair(w.shape[2:], rank, 1), _pair(stride, rank, 1), _pair(padding, rank, 0),
                    _pair(dilation, rank, 1), groups)  # fmt: skip


def _plane(x: Value) -> Value:
    """A vector per channel as a plane of one row."""
    return x if x.ndim == 4 else x.reshape([*x.shape[:2], 1, x.shape[2]])


# ---- windows ----


def windows(x: Value, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Value:
    """The view [N, C, *out, *kernel] of planes [N, C, H, W]."""
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.call(aten.unfold.default, dim, (size - 1) * gap + 1, step)
        x = x if gap == 1 else x.call(aten.slice.Tensor, -1, 0, (size - 1) * gap + 1, gap)
    return x


def padded(x: Value, sides: Sequence[tuple[int, int]], fill: float = 0) -> Value:
    """Planes with as many rows and columns more, or less, (before, behind)."""
    for dim, (before, behind) in enumerate(sides, 2):
        if before < 0 or behind < 0:
            x = x.call(aten.slice.Tensor, dim, max(-before, 0), x.shape[dim] - max(-behind, 0))
    wanted = [max(n, 0) for side in reversed(sides) for n in side]
    return x.call(aten.constant_pad_nd.default, wanted, fill) if any(wanted) else x


def spread(x: Value, stride: Sequence[int]) -> Value:
    """Planes with stride - 1 zeros between neighbours."""
    for dim, step in enumerate(stride, 2):
        if step > 1 and x.shape[dim] > 1:
            shape = [*x.shape[:dim], (x.shape[dim] - 1) * step + 1, *x.shape[dim + 1 :]]
            x = x.full(shape, 0).call(aten.slice_scatter.default, x, dim, 0, shape[dim], step)
    return x


def backward_windows(ct: Value, size: Sequence[int], g: Geometry) -> Value:
    """For each place of planes of this size, and each place in the kernel, the cotangent that met it there, or zero."""
    sides = []
    for n, out, k, s, p, d in zip(size, ct.shape[2:], g.kernel, g.stride, g.padding, g.dilation, strict=True):
        before = d * (k - 1) - p
        sides.append((before, n + d * (k - 1) - before - ((out - 1) * s + 1)))
    found = windows(padded(spread(ct, g.stride), sides), g.kernel, (1, 1), g.dilation)
    return found.call(aten.flip.default, [4, 5])


# ---- the three products ----


def _product(left: Value, right: Value) -> Value:
    """[G, M, K] x [G, K, N]: windows, or what is transposed of them, are the left factor."""
    if right.shape[-1] < FEW_COLUMNS < left.shape[1]:
        return _product(right.mT, left.mT).mT
    if left.shape[0] == 1:
        one, other = (x.reshape(list(x.shape[1:])) for x in (left, right))
        return one.call(aten.mm.default, other).reshape([1, *left.shape[1:2], *right.shape[2:]])
    return left.call(aten.bmm.default, right)


def _places_by_terms(found: Value, groups: int) -> Value:
    """Windows [N, G C, out, kernel] as [G, N out, C kernel]."""
    n, c, *space = found.shape
    split = found.reshape([n, groups, c // groups, *space]).permute([1, 0, 3, 4, 2, 5, 6])
    return split.reshape([groups, n * numel(space[:2]), c // groups * numel(space[2:])])


def _in_planes(y: Value, shape: Sequence[int]) -> Value:
    """A product [G, N out, C] as [N, G C, out]."""
    (groups, _, channels), (n, _, *space) = y.shape, shape
    y = y.reshape([groups * n, numel(space), channels]).permute([0, 2, 1])
    if groups > 1:
        y = y.reshape([groups, n, channels * numel(space)]).permute([1, 0, 2])
    return y.reshape(list(shape))


def correlated(x: Value, w: Value, g: Geometry) -> Value:
    """The convolution [N, O, *out] of [N, C, H, W] with [O, C / groups, *kernel]."""
    found = windows(padded(x, [(p, p) for p in g.padding]), g.kernel, g.stride, g.dilation)
    channels = w.shape[0] // g.groups
    weights = w.reshape([g.groups, channels, numel(w.shape[1:])]).permute([0, 2, 1])
    shape = [x.shape[0], w.shape[0], *found.shape[2:4]]
    return _in_planes(_product(_places_by_terms(found, g.groups), weights), shape)


def to_input(ct: Value, w: Value, size: Sequence[int], g: Geometry) -> Value:
    """The gradient of the input, whose planes have this size."""
    found = backward_windows(ct, size, g)
    rows, channels, kernel = w.shape[0], w.shape[1], numel(g.kernel)
    weights = w.reshape([rows, channels, kernel]).permute([0, 2, 1])
    weights = weights.reshape([g.groups, rows // g.groups * kernel, channels])
    shape = [ct.shape[0], channels * g.groups, *size]
    return _in_planes(_product(_places_by_terms(found, g.groups), weights), shape)


def to_weights(ct: Value, x: Value, g: Geometry) -> Value:
    """The gradient of the weights [O, C / groups, *kernel]."""
    sides = [(p, (out - 1) * s + (k - 1) * d + 1 - n - p) for p, out, s, k, d, n in
             zip(g.padding, ct.shape[2:], g.stride, g.kernel, g.dilation, x.shape[2:], strict=True)]  # fmt: skip
    found = windows(padded(x, sides), g.kernel, g.stride, g.dilation)
    n, rows = ct.shape[:2]
    cts = ct.reshape([n, rows, numel(ct.shape[2:])]).permute([0, 2, 1])
    each = [n * cts.shape[1], rows // g.groups]
    cts = (
        cts.reshape([each[0], g.groups, each[1]]).permute([1, 0, 2])
        if g.groups > 1
        else cts.reshape([1, *each])
    )
    left = _places_by_terms(found, g.groups).mT
    return _product(left, cts).mT.reshape([rows, x.shape[1] // g.groups, *g.kernel])


# ---- the calls ----


def _convolution(
    x: Value, w: Value, bias: Value | None, stride, padding, dilation, transposed: bool, extra, groups: int
) -> Value:
    g, rank = _geometry(w, stride, padding, dilation, groups), w.ndim - 2
    x, w = _plane(x), _plane(w)
    if transposed:
        more = _pair(extra, rank, 0)
        size = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in
                zip(x.shape[2:], g.stride, g.padding, g.dilation, g.kernel, more, strict=True)]  # fmt: skip
        y = to_input(x, w, size, g)
    else:
        y = correlated(x, w, g)
    y = y if rank == 2 else y.reshape([*y.shape[:2], y.shape[3]])
    return y if bias is None else y + bias.reshape([-1, *[1] * rank])


def _backward(
    ct: Value, x: Value, w: Value, bias_sizes, stride, padding, dilation, transposed: bool, extra, groups: int,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:  # fmt: skip
    g, c, y, v = _geometry(w, stride, padding, dilation, groups), _plane(ct), _plane(x), _plane(w)
    parts: list[Value | None] = [None, None, None]
    if mask[0]:
        size = list(y.shape[2:])
        parts[0] = _cut(correlated(c, v, g), size) if transposed else to_input(c, v, size, g)
        parts[0] = parts[0].reshape(list(x.shape))
    if mask[1]:
        parts[1] = (to_weights(y, c, g) if transposed else to_weights(c, y, g)).reshape(list(w.shape))
    if mask[2]:
        parts[2] = ct.sum([0, *range(2, ct.ndim)])
    return tuple(parts)


def _cut(x: Value, size: Sequence[int]) -> Value:
    """Planes without what is beyond this size: output padding of a stride or more is met by windows that no input made."""
    for dim, n in enumerate(size, 2):
        x = x if x.shape[dim] == n else x.call(aten.slice.Tensor, dim, 0, n)
    return x


WAYS = {aten.convolution.default: _convolution, aten.convolution_backward.default: _backward}


def refusal(vals: Sequence[Val]) -> str | None:
    """Why a convolution of these tensors stays ATen's wherever it is, or None."""
    if any(isinstance(s, Dim) for v in vals for s in v.shape):
        return "symbolic sizes"
    if vals[0].ndim not in (3, 4):
        return f"a convolution of {vals[0].ndim - 2} dims"
    if any(v.dtype not in (torch.float32, torch.float64) or v.dtype != vals[0].dtype for v in vals):
        return f"a convolution of {vals[0].dtype}"
    return "an empty convolution" if any(numel(v.shape) == 0 for v in vals) else None


def multiplications(op, args: Sequence[object]) -> int:
    """About how many a convolution costs: each place of what it reads meets all weights of a group."""
    x, w = args[0], args[2 if op is aten.convolution_backward.default else 1]
    return x.shape[0] * numel(x.shape[2:]) * numel(w.shape)
