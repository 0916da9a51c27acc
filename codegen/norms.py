"""Norms as reductions and pointwise calls. Entry point: `WAYS`, op -> the calls, or None where it is not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxfunc.passes.dims import Dim, numel
from fxfunc.passes.record import Value

from .lower import opmath

aten = torch.ops.aten


def _moments(x: Value, dims: Sequence[int]) -> tuple[Value, Value]:
    """Mean and variance over these dims, which stay as 1."""
    wide = x.to(opmath(x.dtype))
    mean = wide.call(aten.mean.dim, list(dims), True)
    centred = wide - mean
    return mean, (centred * centred).call(aten.mean.dim, list(dims), True)


def _scaled(x: Value, mean: Value, scale: Value, w: Value | None, b: Value | None) -> Value:
    """(x - mean) * scale * w + b."""
    y = (x.to(mean.dtype) - mean) * scale
    y = y if w is None else y * w.to(y.dtype)
    y = y if b is None else y + b.to(y.dtype)
    return y.to(x.dtype)


def _layer_norm(
    x: Value, shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, ...]:
    mean, var = _moments(x, range(x.ndim - len(shape), x.ndim))
    scale = (var + eps).rsqrt()
    return _scaled(x, mean, scale, weight, bias), mean, scale


def _group_norm(
    x: Value, weight: Value | None, bias: Value | None, n: int, channels: int, space: int, groups: int, eps: float
) -> tuple[Value, ...]:  # fmt: skip
    each = channels // groups
    grouped = x.reshape([n, groups, each, space])
    mean, var = _moments(grouped, (2, 3))
    scale = (var + eps).rsqrt()
    w, b = (None if v is None else v.reshape([groups, each, 1]) for v in (weight, bias))
    y = _scaled(grouped, mean, scale, w, b)
    return y.reshape(list(x.shape)), mean.reshape([n, groups]), scale.reshape([n, groups])


# ---- batch norm: each channel for itself ----


def _along_channels(v: Value | None, x: Value) -> Value | None:
    return v if v is None else v.reshape([1, x.shape[1], *[1] * (x.ndim - 2)])


def _of_batch(x: Value, w: Value | None, b: Value | None, eps: float) -> tuple[Value, Value, Value, Value]:
    """The result, and mean, 1 / deviation and variance of each channel."""
    mean, var = _moments(x, [0, *range(2, x.ndim)])
    scale = (var + eps).rsqrt()
    y = _scaled(x, mean, scale, _along_channels(w, x), _along_channels(b, x))
    return y, *(v.reshape([x.shape[1]]) for v in (mean, scale, var))


def _batch_norm(
    x: Value, w: Value | None, b: Value | None, training: bool, momentum: float, eps: float
) -> tuple[Value, ...]:
    return _of_batch(x, w, b, eps)[:3]


def _running_batch_norm(
    x: Value, w: Value | None, b: Value | None, mean: Value, var: Value, training: bool, momentum: float, eps: float
) -> tuple[Value, ...] | None:  # fmt: skip
    count = numel(x.shape[d] for d in range(x.ndim) if d != 1)
    if not training or isinstance(count, Dim):
        return None
    y, now, scale, spread = _of_batch(x, w, b, eps)
    spread = spread * (count / max(count - 1, 1))
    means, spreads = (
        (old.to(new.dtype) * (1 - momentum) + new * momentum).to(old.dtype)
        for old, new in ((mean, now), (var, spread))
    )
    return y, now, scale, means, spreads


def _fixed_batch_norm(
    x: Value, w: Value | None, b: Value | None, mean: Value, var: Value, momentum: float, eps: float
) -> tuple[Value, ...]:
    mean, var, w, b = (_along_channels(v, x) for v in (mean, var, w, b))
    mean, var = (v.to(opmath(x.dtype)) for v in (mean, var))
    empty = x.full([0], 0, mean.dtype)
    return _scaled(x, mean, (var + eps).rsqrt(), w, b), empty, empty


WAYS: dict[object, Callable] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm,
    aten._native_batch_norm_legit_functional.default: _running_batch_norm,
    aten._native_batch_norm_legit_no_training.default: _fixed_batch_norm,
}
