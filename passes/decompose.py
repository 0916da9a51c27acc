"""One op written as others. Entry points: `expand` and `decomposition`, graphs of an op's composition, cached per signature.

`expand` is what an op means: our own composites (rules), then ATen's. `decomposition` is PyTorch's table, made for values:
the derivative of a `where` that guards a singular point is NaN there (xlogy and sinc at 0), so a formula goes before it.
`single` is the op alone as a graph.
"""

from __future__ import annotations

import functools

import torch

from .graph import Graph, Val, typed
from .infer import on_forget
from .place import place
from .record import Builder, vals
from .rules.table import ROWS

_cache: dict = {}
on_forget(_cache.clear)


def expand(op, args, kwargs) -> Graph | None:
    """The graph of an op's composition, one input per tensor argument; None if it is not made of others."""
    return _cached(_composition, op, args, kwargs)


def decomposition(op, args, kwargs) -> Graph | None:
    """The graph of PyTorch's decomposition, one input per tensor argument; None if there is none."""
    return _cached(_tabled, op, args, kwargs)


def taken_apart(op, args, kwargs) -> Graph | None:
    """The graph of PyTorch's decomposition of any op, those of its core too."""
    return _cached(_taken_apart, op, args, kwargs)


@functools.cache
def table() -> dict:
    """PyTorch's decompositions into its core, by op. (`get` of what torch returns finds nothing.)"""
    from torch._decomp import core_aten_decompositions

    return dict(core_aten_decompositions().items())


def _cached(find, op, args, kwargs) -> Graph | None:
    args, kwargs = vals(args), {k: vals(v) for k, v in kwargs.items()}
    key = (find, op, typed(args, None), typed(kwargs, None), torch.get_default_dtype())
    if key not in _cache:
        _cache[key] = find(op, args, kwargs)
    return _cache[key]


def _composition(op, args, kwargs) -> Graph | None:
    row = ROWS.get(op)
    if row is not None and row.composite is not None:
        return build(row.composite, args, kwargs)
    composed = isinstance(op, torch._ops.OpOverload) and op._can_decompose()
    return _recorded(op, op.decompose, args, kwargs) if composed else None


def _tabled(op, args, kwargs) -> Graph | None:
    return _if_it_can(op, table().get(op), args, kwargs)


def _taken_apart(op, args, kwargs) -> Graph | None:
    from torch._decomp import decomposition_table

    return _if_it_can(op, decomposition_table.get(op), args, kwargs)


def _if_it_can(op, function, args, kwargs) -> Graph | None:
    # A formula cannot be taken that writes, reads a tensor of its own, or refuses what the op takes, as a number beside a tensor.
    try:
        return function and _recorded(op, function, args, kwargs)
    except RuntimeError:
        return None


def _recorded(op, function, args, kwargs) -> Graph | None:
    from .trace import trace_torch

    given = tensors_in([args, list(kwargs.values())], (Val, torch.device))
    device = next((x.device if isinstance(x, Val) else x for x in given), torch.device("cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():  # indexing and new tensors ask for the driver
        graph = place(trace_torch(function, _on_cpu(args), _on_cpu(kwargs)), device)
    else:
        graph = trace_torch(function, args, kwargs)
    return graph if all(_simpler(n.target, op) for n in graph.nodes) else None


def _on_cpu(x):
    """An argument structure with its values and devices on the CPU."""
    if isinstance(x, dict):
        return {k: _on_cpu(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_on_cpu, x))
    if isinstance(x, Val):
        return Val(x.shape, x.dtype, torch.device("cpu"))
    return torch.device("cpu") if isinstance(x, torch.device) else x


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
