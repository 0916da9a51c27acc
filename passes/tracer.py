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


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, Tracer)
_DISPATCH = torch._C._disabled_torch_dispatch_impl
_FUNCTIONS = (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)


def refuse_tensor(t: torch.Tensor, whose: str) -> None:
    """Raise for a tensor whose meaning a capture cannot keep: it sees shapes and ATen calls. `whose` says where it is."""
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested tensor" if t.is_nested else f"a tensor of layout {t.layout}"
        to = ".to_padded_tensor(0.0)" if t.is_nested else ".to_dense()"
        raise errors.NotSupported(what=f"{whose} {kind}", instead=f"Convert it with {to}.")
    if t.is_quantized:
        raise errors.NotSupported(
            what=f"{whose} a quantized tensor", instead="Convert it with .dequantize()."
        )
    kind = type(t)
    if kind in _PLAIN or kind.__module__.startswith("torch._subclasses."):  # the tracers of others
        return
    functions = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    if kind.__torch_dispatch__ is not _DISPATCH or functions not in _FUNCTIONS:
        raise errors.NotSupported(
            what=f"{whose} a tensor of the subclass {kind.__module__}.{kind.__qualname__}, which has operators of its own,",
            instead="Pass the ordinary tensors that it holds (for a DTensor, .to_local() or .full_tensor()).",
        )


def lies_dense(t: torch.Tensor, dim: int | None = None) -> bool:
    """Whether a tensor, or each slice of it along `dim`, is known to lie in memory as its shape says."""
    if isinstance(t, Tracer):
        return t.dense and dim in (None, 0)
    example = t if dim is None or not t.shape[dim] else t.select(dim, 0)
    return example.is_contiguous() and not t.storage_offset()


def refuse_draw(call) -> None:
    """Random draws need a vmap that says what they mean."""
    if is_random(call) and any(r.randomness == "error" for r in recorders()):
        raise errors.RandomInVmap(op=getattr(call, "target", call), randomness="error", why="")
