"""One op written as others. Entry point: `expand`, the graph of an op's composition, cached per signature.

First our own composites (rules), then PyTorch's decompositions, recorded on tracers. `single` is the op alone as a graph.
"""

from __future__ import annotations

import torch

from .graph import Graph, Val, typed
from .infer import on_forget
from .record import Builder, vals
from .rules.table import ROWS

_cache: dict = {}
on_forget(_cache.clear)


def expand(op, args, kwargs) -> Graph | None:
    """The graph of a decomposition, one input per tensor argument; None if there is none."""
    args, kwargs = vals(args), {k: vals(v) for k, v in kwargs.items()}
    key = (op, typed(args, None), typed(kwargs, None), torch.get_default_dtype())
    if key not in _cache:
        _cache[key] = _expand(op, args, kwargs)
    return _cache[key]


def _expand(op, args, kwargs) -> Graph | None:
    row = ROWS.get(op)
    if row is not None and row.composite is not None:
        return build(row.composite, args, kwargs)
    from torch._decomp import core_aten_decompositions

    from .trace import trace_torch

    function = core_aten_decompositions().get(op)
    if function is None and not (isinstance(op, torch._ops.OpOverload) and op._can_decompose()):
        return None
    graph = trace_torch(function or op.decompose, args, kwargs)
    return graph if all(_simpler(n.target, op) for n in graph.nodes) else None


def _simpler(target, op) -> bool:
    """False for the op itself, and for prims, whose derivatives are zero in the eyes of autograd."""
    return target is not op and not (
        isinstance(target, torch._ops.OpOverload) and target.namespace == "prims"
    )


def build(function, args, kwargs) -> Graph:
    """A rule-like function as a graph, one input per Val among its arguments."""
    b = Builder({})
    inputs = _inputs(b)
    out = function(*inputs(args), **{k: inputs(v) for k, v in kwargs.items()})
    return b.finish(out if isinstance(out, tuple) else (out,))


def single(op, args, kwargs) -> Graph:
    """The graph of one call."""
    args, kwargs = vals(args), {k: vals(v) for k, v in kwargs.items()}
    b = Builder(None)
    inputs = _inputs(b)
    out = b.emit(op, inputs(args), {k: inputs(v) for k, v in kwargs.items()})
    return b.finish(out if isinstance(out, tuple) else (out,))


def _inputs(b: Builder):
    def bind(x):
        if isinstance(x, Val):
            return b.input(x, "a")
        return type(x)([bind(y) for y in x]) if type(x) in (list, tuple) else x

    return bind


def tensors_in(x, kinds) -> list:
    """The values of these classes in an argument structure, in order."""
    if isinstance(x, kinds):
        return [x]
    return [y for item in x for y in tensors_in(item, kinds)] if isinstance(x, (list, tuple)) else []
