"""Values beside tracers, for functions whose Python code or sizes depend on them. Entry points: `Concrete`, `value_of`.

A capture that is concrete computes every call it records, on tensors of its own. So it can say what a tensor holds; its graph
is that of these inputs alone, and whoever asked for it uses it once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import errors
from .decompose import single, tensors_in
from .graph import Graph, Literal, constant, graft, is_random, stop_gradient, stop_reverse
from .record import Value
from .tracer import Tracer, recorders

aten = torch.ops.aten


class Concrete:
    """The tensors that the nodes of a capture stand for; `run(graph, tensors)` computes a graph.

    draws: whether random numbers are known; they are not in the body of a map or loop.
    """

    def __init__(self, run: Callable[[Graph, list[torch.Tensor]], list[torch.Tensor | None]], draws: bool):
        self.run, self.draws = run, draws
        self.data: dict = {}

    def bind(self, value: Value, like: torch.Tensor) -> None:
        """An input: a copy, since the capture may write to it."""
        known = value_of(like)
        if known is not None:
            with _Quiet():
                self.data[value.node] = known.detach().clone()

    def compute(self, op, args, kwargs, out) -> None:
        """A call that was recorded; nothing is known of what depends on an unknown value."""
        if any(v.node not in self.data for v in tensors_in([args, list(kwargs.values())], Value)):
            return
        if not self.draws and is_random(op, args):
            return
        with _Quiet():
            if op in (stop_gradient, stop_reverse, graft):
                found = self._bound(args[0])
            elif op is constant:
                found = args[0].tensor.clone()
            elif op in (
                aten.view.default,
                aten._unsafe_view.default,
            ):  # of tensors that lie otherwise than tracers do
                found = self._bound(args[0]).reshape(args[1])
            elif isinstance(op, torch._ops.OpOverload):
                found = op(*self._bound(args), **{k: self._bound(v) for k, v in kwargs.items()})
            else:
                operands = tensors_in([args, list(kwargs.values())], Value)
                found = self.run(single(op, args, kwargs), self._bound(operands))
                found = found[0] if isinstance(out, Value) else found
        self.keep(out, found)

    def inline(self, graph: Graph, values: list[Value], outs: list[Value | None]) -> None:
        """A graph that was copied in."""
        if all(v.node in self.data for v in values) and (self.draws or not graph.draws):
            with _Quiet():
                self.keep(outs, self.run(graph, self._bound(values)))

    def keep(self, out, found) -> None:
        """What a Value, or a list of them, stands for."""
        if isinstance(out, Value):
            self.data[out.node] = found
        elif out is not None:
            for o, f in zip(out, found, strict=True):
                self.keep(o, f)

    def _bound(self, x):
        if isinstance(x, Value):
            return self.data[x.node]
        return type(x)([self._bound(y) for y in x]) if type(x) in (list, tuple) else x


class _Quiet:
    """No mode, no autograd, no autocast: what the caller set up was applied to the recorded call."""

    def __enter__(self):
        self._contexts = (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch._C._DisableAutocast(),
            torch.no_grad(),
        )
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exc):
        for context in reversed(self._contexts):
            context.__exit__(*exc)


def value_of(t: torch.Tensor) -> torch.Tensor | None:
    """What a tensor holds while it is captured; None where that is not known, or the graph is to be used again."""
    if not isinstance(t, Tracer):
        return t if recorders() and recorders()[0].concrete else None
    concrete = t.recorder.concrete
    return concrete.data.get(t.value.node) if concrete else None


def known(x) -> bool:
    """Whether the values of all tensors of an argument structure are."""
    return all(value_of(t) is not None for t in tensors_in(x, torch.Tensor))


def call_by_value(recorder, func, args, kwargs):
    """A call whose result, or whose result's size, depends on values: integers and truth values become literals."""
    written_out = BY_VALUE.get(func)
    if written_out is not None:
        with torch.overrides.enable_reentrant_dispatch(), recorder:
            return written_out(*args, **kwargs)
    operands = torch.utils._pytree.tree_map_only(torch.Tensor, value_of, (args, kwargs))
    with _Quiet():
        found = func(*operands[0], **operands[1])
    outs = found if isinstance(found, (tuple, list)) else [found]
    if any(isinstance(o, torch.Tensor) and (o.is_floating_point() or o.is_complex()) for o in outs):
        raise errors.ValueDependent(op=func)
    tracers = [_literal(recorder, o) if isinstance(o, torch.Tensor) else o for o in outs]
    return type(found)(tracers) if isinstance(found, (tuple, list)) else tracers[0]


def _literal(recorder, tensor: torch.Tensor) -> Tracer:
    with _Quiet():
        literal = Literal(tensor)
    return recorder.emit(constant, (literal,))


def _masked_select(x, mask):
    x, mask = torch.broadcast_tensors(x, mask)
    return x.reshape(-1)[mask.reshape(-1).nonzero().squeeze(1)]


def asked_for(func, args, kwargs) -> list:
    """What must be known of the arguments of a call whose result depends on values."""
    if func is aten.masked_select.default:
        return [args[1]]
    return list(filter(is_mask, args[1])) if func in BY_VALUE else [args, list(kwargs.values())]


def is_mask(index) -> bool:
    """True for an index by truth values, whose result has a size that depends on them."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _places(indices) -> list:
    """Indices with each mask written as the places where it is true."""
    return [each for i in indices for each in (i.nonzero().unbind(1) if is_mask(i) else [i])]


# Calls with a float result of a size that depends on values, written with others; those with indices, if one is a mask.
BY_VALUE = {
    aten.masked_select.default: _masked_select,
    aten.index.Tensor: lambda x, indices: aten.index.Tensor(x, _places(indices)),
    aten.index_put.default: lambda x, indices, *rest: aten.index_put.default(x, _places(indices), *rest),
    aten.index_put_.default: lambda x, indices, *rest: aten.index_put_.default(x, _places(indices), *rest),
}
