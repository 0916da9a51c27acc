"""Results of calls whose formulas on meta tensors are Python: asking torch would import torch._dynamo or sympy, 0.5-1.5 s of a
first call. A row gives None for what it does not know; `infer` then asks, and any error message is torch's. Entry point: `ROWS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .dims import Dim
from .graph import Val

aten = torch.ops.aten
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def eye(n: int | Dim, *, dtype: torch.dtype | None = None, device=None, **how: object) -> Val | None:
    """A square of a known size; `how` it lies in memory is no part of a value."""
    known = isinstance(device, torch.device) and not any(how.values())
    return Val((n, n), dtype or torch.get_default_dtype(), device) if known and _is_size(n) else None


def _is_size(n: object) -> bool:
    return isinstance(n, Dim) or type(n) is int and n >= 0


def convolution(
    x: Val,
    w: Val,
    b: Val | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Val | None:
    """The forward convolution of a batch."""
    count = x.ndim - 2
    tensors = [t for t in (x, w, b) if t is not None]
    if (
        transposed
        or count < 1
        or w.ndim != x.ndim
        or any(len(p) != count for p in (stride, padding, dilation))
    ):
        return None
    if len({(t.dtype, t.device) for t in tensors}) > 1 or any(
        isinstance(s, Dim) for t in tensors for s in t.shape
    ):
        return None
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups or (b is not None and b.shape != w.shape[:1]):
        return None
    steps = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for s, k, step, p, d in steps if step > 0]
    plain = len(sizes) == count and min(*sizes, *x.shape, *w.shape) > 0
    return Val((x.shape[0], w.shape[0], *sizes), x.dtype, x.device) if plain else None


def convolution_backward(ct: Val, x: Val, w: Val, bias_sizes, *how) -> tuple[Val | None, ...] | None:
    """The cotangents that the mask, the last argument, asks for."""
    alike = len({(t.dtype, t.device) for t in (ct, x, w)}) == 1 and x.ndim == w.ndim == ct.ndim > 2
    if not alike or how[3] or how[-1][2] and list(bias_sizes or ()) != [w.shape[0]]:
        return None
    found = x, w, Val((w.shape[0],), w.dtype, w.device)
    return tuple(v if wanted else None for v, wanted in zip(found, how[-1], strict=True))


def trace(x: Val) -> Val | None:
    return Val((), x.dtype, x.device) if x.ndim == 2 and x.dtype.is_floating_point else None


def reduced(x: Val, dims: Sequence[int] | None, keepdim: bool) -> Val | None:
    """Of a floating dtype, over some of its dims or all, none of them empty."""
    dims = range(x.ndim) if dims is None or len(dims) == 0 else dims
    inside = {d % x.ndim for d in dims if -x.ndim <= d < x.ndim}
    if not x.dtype.is_floating_point or len(inside) < len(dims) or any(x.shape[d] == 0 for d in inside):
        return None
    shape = (1 if i in inside else s for i, s in enumerate(x.shape) if keepdim or i not in inside)
    return Val(tuple(shape), x.dtype, x.device)


def var_mean(x: Val, dim=None, *, correction=None, keepdim: bool = False) -> tuple[Val, Val] | None:
    found = reduced(x, dim, keepdim)
    return found and (found, found)


def extreme(x: Val, dim: Sequence[int] = (), keepdim: bool = False) -> Val | None:
    return reduced(x, dim, keepdim)


def vector_norm(x: Val, order=2, dim=None, keepdim: bool = False, *, dtype=None) -> Val | None:
    return None if dtype is not None or isinstance(dim, int) else reduced(x, dim, keepdim)


def max_pool(
    x: Val, kernel, stride=(), padding=0, dilation=1, ceil_mode: bool = False
) -> tuple[Val, Val] | None:
    """Pooling with no padding, and the positions of the maxima."""
    size = (list(kernel) * 2)[:2]
    step = (list(stride or size) * 2)[:2]
    default = ceil_mode is False and padding in (0, [0], [0, 0]) and dilation in (1, [1], [1, 1])
    if (
        not default
        or x.ndim not in (3, 4)
        or not all(type(s) is int and s > 0 for s in (*x.shape, *size, *step))
    ):
        return None
    found = [(s - k) // t + 1 for s, k, t in zip(x.shape[-2:], size, step, strict=True)]
    shape = (*x.shape[:-2], *found)
    return (Val(shape, x.dtype, x.device), Val(shape, torch.int64, x.device)) if min(found) > 0 else None


ROWS = {
    aten.eye.default: eye,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.trace.default: trace,
    aten.var_mean.correction: var_mean,
    aten.amax.default: extreme,
    aten.amin.default: extreme,
    aten.linalg_vector_norm.default: vector_norm,
    aten.max_pool2d_with_indices.default: max_pool,
}
