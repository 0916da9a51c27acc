"""A C++ program that is compiled, called, and kept in artifacts. Entry points: `Native`, `read` (one of an artifact)."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Val
from fxfunc.passes.infer import OWN

from . import cxx
from .explain import Row
from .frames import LARGE, Frames, in_huge_pages
from .loops import native

_META = ("operands", "bytes", "task_bytes", "summary")
_new = torch._C._dynamo.guards._empty_strided_cpu  # past the dispatcher and all modes


class Native:
    """A program: operands -> outputs, with `bytes` of scratch memory and `task_bytes` for each thread.

    `vals` are its outputs, `rows` each call it holds (none in an artifact: they are the user's lines).
    """

    def __init__(
        self,
        name: str,
        source: str,
        vals: Sequence[Val],
        *,
        operands: int,
        bytes: int,
        task_bytes: int,
        summary: str,
        rows: Sequence[Row] = (),
    ):
        self.name, self.source, self.vals, self.operands = name, source, tuple(vals), operands
        self.bytes, self.task_bytes, self.summary, self.rows = bytes, task_bytes, summary, rows
        self.entry: Callable | None = None  # None: not compiled
        self._frames = Frames(operands + len(self.vals))
        self._made = [
            (tuple(v.shape), torch.empty(v.shape, device="meta").stride(), v.dtype) for v in self.vals
        ]
        self._large = [i for i, v in enumerate(self.vals) if numel(v.shape) * v.dtype.itemsize >= LARGE]

    def compile(self, target: str) -> None:
        """Compile it, or find it in the cache."""
        self.entry = _entry(cxx.load(self.source, target))

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return self.run(
            [x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous() for x in operands]
        )

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, for operands that lie in memory as their shapes say."""
        outputs = list(itertools.starmap(_new, self._made))
        for i in self._large:
            in_huge_pages(outputs[i])
        threads = _threads()
        frame = self._frames.take(self.bytes + threads * self.task_bytes + 64, operands, outputs)
        self.entry(frame.at_addresses, frame.at_scratch, threads, frame.at_bad)
        if frame.bad[2]:
            index, axis, size = frame.bad
            raise RuntimeError(f"index {index} is out of bounds for dimension {axis} with size {size}")
        self._frames.give_back(frame)
        return outputs

    def describe(self) -> str:
        """One line on what it holds."""
        return f"{self.name}: {self.summary} in C++"

    def files(self, target: str) -> dict[str, bytes]:
        """What an artifact keeps of it; `read` is the inverse."""
        meta = {name: getattr(self, name) for name in _META}
        meta["outputs"] = [[list(v.shape), str(v.dtype).removeprefix("torch.")] for v in self.vals]
        return {"program.cpp": self.source.encode(), "program.so": cxx.compiled(self.source, target),
                "program.json": json.dumps(meta, indent=1).encode()}  # fmt: skip

    def __repr__(self) -> str:
        return self.name


def read(name: str, files: dict[str, bytes]) -> Native:
    """The program of these files, its object loaded into this process. Raises BackendError if it cannot be."""
    meta = json.loads(files["program.json"])
    outputs = meta.pop("outputs")
    vals = [Val(tuple(shape), getattr(torch, dtype), torch.device("cpu")) for shape, dtype in outputs]
    program = Native(name, files["program.cpp"].decode(), vals, **meta)
    program.entry = _entry(cxx.loaded(files["program.so"]))
    return program


def _entry(library: ctypes.CDLL) -> Callable:
    entry = library.program
    entry.argtypes, entry.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p), None
    return entry


_left: int | None = None  # the thread that a fork made this process of; its pool of threads was left behind


def _after_fork() -> None:
    global _left
    _left = threading.get_ident()


os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    """How many threads a program uses: one where a fork has left those of libgomp behind. A thread started since has its own."""
    return 1 if threading.get_ident() == _left else torch.get_num_threads()


def _vals(program: Native, *operands: Val) -> tuple[Val, ...]:
    return program.vals


OWN[native] = _vals
