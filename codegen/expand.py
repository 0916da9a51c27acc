"""Calls that no kernel computes, written with calls that kernels compute. Entry point: `expand(graph)`.

By PyTorch's decompositions, where nothing is left that has no place in a kernel: softmax, norms, losses. Bodies of loops too.
"""

from __future__ import annotations

import torch

from fxfunc.passes.decompose import taken_apart, tensors_in
from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Op, Val, map_, scan
from fxfunc.passes.record import Builder, Value, vals

from . import conv, norms, pool
from .index import VIEWS
from .lower import CONSTANTS, is_free, is_fusable, opmath
from .moves import MOVES
from .reads import READS
from .rows import POINTWISE, PRODUCTS, REDUCING

aten = torch.ops.aten


LARGE_CONVOLUTION = 2**20  # multiplications from which a convolution outside of loops is ATen's


def expand(graph: Graph, inside: bool = False, gpu: bool = False) -> Graph:
    """The graph with such calls taken apart; `inside` of a C++ loop also large convolutions, for a `gpu` no windows nor moves."""
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        if op in (map_, scan):
            return b.emit(op, (expand(args[0], inside, gpu), *args[1:]), kwargs)
        if gpu and (op in READS or op in conv.WAYS or op in pool.WAYS):
            return b.emit(op, args, kwargs)
        if op in conv.WAYS:
            return conv.WAYS[op](*args) if _is_taken(op, vals(args), inside) else b.emit(op, args, kwargs)
        if op in pool.WAYS and pool.is_taken(args[0]):
            out = pool.WAYS[op](*args, **kwargs)
            return b.emit(op, args, kwargs) if out is None else out
        if op in WAYS and (out := WAYS[op](*args, **kwargs)) is not None:
            return out
        parts = _parts(op, args, kwargs)
        if parts is None:
            return b.emit(op, args, kwargs)
        outs = b.inline(parts, tensors_in([args, list(kwargs.values())], Value), call)
        return outs[0] if len(op._schema.returns) == 1 else tuple(outs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _is_taken(op: Op, args: tuple, inside: bool) -> bool:
    why = conv.refusal([x for x in args if isinstance(x, Val)])
    return why is None and (inside or conv.multiplications(op, args) < LARGE_CONVOLUTION)


def _unbound(x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(x.call(aten.select.int, dim, i) for i in range(x.shape[dim]))


def _nll_loss(
    x: Value, target: Value, weight: Value | None, reduction: int, ignored: int
) -> tuple[Value, Value] | None:
    """The loss of log-probabilities [N, C] or [C], and by what a mean is divided."""
    if weight is not None or target.ndim + 1 != x.ndim:
        return None
    shape = list(target.shape)
    out = target.eq(ignored)
    index = out.where(0, target).reshape([*shape, 1])
    wide = x.to(opmath(x.dtype))
    losses = out.where(0, -wide.call(aten.gather.default, x.ndim - 1, index).reshape(shape))
    count = out.where(wide.full([], 0), wide.full([], 1)).sum()
    if reduction == 0:
        return losses.to(x.dtype), x.full([], 0)
    return (losses.sum() / count if reduction == 1 else losses.sum()).to(x.dtype), count.to(x.dtype)


def _var(
    x: Value, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> Value:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _var_mean(
    x: Value, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Value, Value]:
    dims, wide = list(dim or range(x.ndim)), x.to(opmath(x.dtype))
    count, less = numel(x.shape[d] for d in dims), 1 if correction is None else correction
    mean = wide.call(aten.mean.dim, dims, True)
    centred = wide - mean
    divisor = (
        max(count - less, 0)
        if isinstance(count, int)
        else (wide.full([], count) - less).call(aten.clamp.default, 0)
    )
    var = (centred * centred).sum(dims, keepdim) / divisor
    return var.to(x.dtype), (mean if keepdim else mean.reshape(var.shape)).to(x.dtype)


WAYS = {
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.std.correction: lambda x, *dim, **how: _var(x, *dim, **how).sqrt(),
    aten.unbind.int: _unbound,
    aten.trace.default: lambda x: x.call(aten.diagonal.default).sum(),
    aten.nll_loss_forward.default: _nll_loss,
    **norms.WAYS,
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
