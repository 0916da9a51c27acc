"""Fourier transforms. All are linear; the adjoint of a transform is the one of the other sign under the same factor."""

from __future__ import annotations

from ..record import aten
from .batching import along
from .table import linear

C2C, R2C, C2R = aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default


def _from_half(ct, a, dim, normalization, onesided):
    """The half that was left out had no cotangent; of the result the real part is meant."""
    last = dim[-1] % a.ndim
    missing = a.shape[last] - ct.shape[last]
    if missing:
        ct = ct.call(aten.constant_pad_nd.default, [0, 0] * (a.ndim - 1 - last) + [0, missing], 0)
    return ct.call(C2C, dim, normalization, False).to(a.dtype)


def _to_half(ct, a, dim, normalization, size):
    """Each element but those that are their own mirror image was read twice."""
    last = dim[-1] % a.ndim
    half = ct.call(R2C, dim, normalization, True)
    twice = size - half.shape[last]
    if not twice:
        return half
    window = last, 1, 1 + twice
    return half.call(aten.slice_scatter.default, half.call(aten.slice.Tensor, *window) * 2, *window)


linear(
    C2C,
    lambda ct, a, dim, normalization, forward: ct.call(C2C, dim, normalization, not forward),
    batch=along("dim"),
)
linear(R2C, _from_half, batch=along("dim"))
linear(C2R, _to_half, batch=along("dim"))
