"""The memory of a call of a C++ program that is not its tensors', kept for the calls after it. Entry point: `Frames`."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

KEPT = 64 * 2**20  # bytes of scratch memory kept between calls
_address = torch._C.TensorBase.data_ptr


class Frame:
    """Scratch memory, the addresses of a call's tensors, and the place where the program reports a bad index."""

    __slots__ = ("addresses", "at_addresses", "at_bad", "at_scratch", "bad", "scratch", "size")

    def __init__(self, tensors: int, size: int):
        self.size, self.scratch = size, torch.empty(size, dtype=torch.uint8, device="cpu")
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
