"""Calls that no kernel computes, written with calls that kernels compute. Entry point: `expand(graph)`.

By PyTorch's decompositions, where nothing is left that has no place in a kernel: softmax, norms, losses. Bodies of loops too.
"""

from __future__ import annotations

import torch

from fxfunc.passes.decompose import taken_apart, tensors_in
from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Op, map_, scan
from fxfunc.passes.record import Builder, Value

from .index import VIEWS
from .lower import CONSTANTS, is_free, is_fusable, opmath
from .moves import MOVES
from .rows import POINTWISE, REDUCING

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default)


def expand(graph: Graph) -> Graph:
    """The graph with such calls taken apart."""
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        if op in (map_, scan):
            return b.emit(op, (expand(args[0]), *args[1:]), kwargs)
        if op in WAYS:
            return WAYS[op](*args, **kwargs)
        parts = _parts(op, args, kwargs)
        if parts is None:
            return b.emit(op, args, kwargs)
        outs = b.inline(parts, tensors_in([args, list(kwargs.values())], Value), call)
        return outs[0] if len(op._schema.returns) == 1 else tuple(outs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _unbound(x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(x.call(aten.select.int, dim, i) for i in range(x.shape[dim]))


def _layer_norm(
    x: Value, shape: list[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, ...]:
    dims, wide = list(range(x.ndim - len(shape), x.ndim)), opmath(x.dtype)
    mean = x.to(wide).call(aten.mean.dim, dims, True)
    centred = x.to(wide) - mean
    scale = ((centred * centred).call(aten.mean.dim, dims, True) + eps).rsqrt()
    y = centred * scale
    y = y if weight is None else y * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return y.to(x.dtype), mean, scale


def _var(
    x: Value, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Value:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _var_mean(
    x: Value, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Value, Value]:
    dims, wide = list(dim or range(x.ndim)), x.to(opmath(x.dtype))
    count = numel(x.shape[d] for d in dims)
    mean = wide.call(aten.mean.dim, dims, True)
    centred = wide - mean
    var = (centred * centred).sum(dims, keepdim) / max(count - (1 if correction is None else correction), 0)
    return var.to(x.dtype), (mean if keepdim else mean.reshape(var.shape)).to(x.dtype)


WAYS = {
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.std.correction: lambda x, *dim, **how: _var(x, *dim, **how).sqrt(),
    aten.unbind.int: _unbound,
    aten.trace.default: lambda x: x.call(aten.diagonal.default).sum(),
    aten.native_layer_norm.default: _layer_norm,
}


def _parts(op: Op, args: tuple, kwargs: dict) -> Graph | None:
    """A call as calls of kernels, or None."""
    if (
        isinstance(op, Op)
        or op in MOVES
        or any(op in known for known in (VIEWS, POINTWISE, REDUCING, PRODUCTS, CONSTANTS))
    ):
        return None
    graph = taken_apart(op, args, kwargs)
    known = graph is not None and all(
        is_free(n) or n.target in PRODUCTS or is_fusable(n) for n in graph.nodes
    )
    return graph if known else None
