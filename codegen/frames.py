"""The memory of a call of a C++ program. Entry points: `Frames` (what is not its tensors', kept for the calls after it),
`in_huge_pages` (large tensors that are written for the first time)."""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

KEPT = 64 * 2**20  # bytes of scratch memory kept between calls
_address = torch._C.TensorBase.data_ptr
_PAGE, _MADV_HUGEPAGE = 2**21, 14
LARGE = 2 * _PAGE  # bytes from which memory is worth asking for huge pages
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def in_huge_pages(x: Tensor) -> Tensor:
    """The same tensor; the system may give its memory 2 MiB at a time as it is written, where a page at a time costs as much as
    the writing."""
    first, last = -(-x.data_ptr() // _PAGE), (x.data_ptr() + x.nbytes) // _PAGE
    if _madvise is not None and first < last:  # advice: a system that does not know it refuses
        _madvise(ctypes.c_void_p(first * _PAGE), ctypes.c_size_t((last - first) * _PAGE), _MADV_HUGEPAGE)
    return x


class Frame:
    """Scratch memory, the addresses of a call's tensors, and the place where the program reports a bad index."""

    __slots__ = ("addresses", "at_addresses", "at_bad", "at_scratch", "bad", "scratch", "size")

    def __init__(self, tensors: int, size: int):
        self.size, self.scratch = size, torch.empty(size, dtype=torch.uint8, device="cpu")
        if size >= LARGE:
            in_huge_pages(self.scratch)
        self.addresses, self.bad = (ctypes.c_void_p * tensors)(), (ctypes.c_int64 * 3)()
        self.at_addresses, self.at_bad = ctypes.addressof(self.addresses), ctypes.addressof(self.bad)
        self.at_scratch = self.scratch.data_ptr()


class Frames:
    """Frames for a number of tensors; two calls under way never have the same."""

    def __init__(self, tensors: int):
        self.tensors = tensors
        self._pack = struct.Struct(f"{tensors}P").pack_into
        self._free: list[Frame] = []

    def take(self, size: int, operands: Iterable[Tensor], outputs: Iterable[Tensor]) -> Frame:
        """A frame with at least `size` bytes of scratch memory, and the addresses of these tensors."""
        try:
            frame = self._free.pop()
        except IndexError:
            frame = None
        if frame is None or frame.size < size:
            frame = Frame(self.tensors, size)
        self._pack(frame.addresses, 0, *map(_address, itertools.chain(operands, outputs)))
        return frame

    def give_back(self, frame: Frame) -> None:
        """Keep a frame whose call is over, unless it is too large."""
        if frame.size <= KEPT:
            self._free.append(frame)
