"""Tracers: tensors without data that stand for the values of a capture. `current` is the innermost capture under way."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from . import errors
from .dims import from_torch, to_torch
from .graph import Val, is_random
from .record import Value

if TYPE_CHECKING:
    from .trace import Recorder


class Tracer(torch.Tensor):
    """A tensor standing for `value` in the graph of `recorder`; `tracks` is what `requires_grad` answers."""

    recorder: Recorder
    value: Value
    tracks: bool
    dense = False  # known to lie in memory as its shape says

    @staticmethod
    def __new__(cls, recorder: Recorder, value: Value, tracks: bool = False):
        v = value.val
        self = torch.Tensor._make_wrapper_subclass(
            cls, [to_torch(s) for s in v.shape], dtype=v.dtype, device=v.device
        )
        self.recorder, self.value, self.tracks = recorder, value, tracks and v.differentiable
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise errors.UnsupportedInside(
            what=f"a tensor that left its capture, in {func}",
            instead="Return the tensor from the function instead of keeping it elsewhere.",
        )

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Tracer({self.value.val})"


class _Stack(threading.local):
    def __init__(self):
        self.recorders: list[Recorder] = []


_stack = _Stack()


def recorders() -> list[Recorder]:
    """The captures under way in this thread, the innermost last."""
    return _stack.recorders


def current() -> Recorder | None:
    """The innermost capture under way in this thread."""
    return _stack.recorders[-1] if _stack.recorders else None


def tracked(t: torch.Tensor) -> bool:
    """What `t.requires_grad` answers."""
    return t.tracks if isinstance(t, Tracer) else t.requires_grad


def val_of(t: torch.Tensor) -> Val:
    """What a capture may know of a tensor."""
    if isinstance(t, Tracer):
        return t.value.val
    return Val(tuple(from_torch(s) for s in t.shape), t.dtype, t.device)


def refuse_draw(call) -> None:
    """Random draws need a vmap that says what they mean."""
    if is_random(call) and any(r.randomness == "error" for r in recorders()):
        raise errors.RandomInVmap(op=getattr(call, "target", call), randomness="error", why="")
