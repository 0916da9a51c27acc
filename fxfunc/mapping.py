"""vmap: a function's graph as the body of a map. Signature and results follow torch.func."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dims import from_torch
from fxfunc.passes.graph import Graph, Val
from fxfunc.passes.infer import rewriting
from fxfunc.passes.record import Builder
from fxfunc.passes.regions import emit_chunks
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.tracer import lies_dense, val_of

from .arguments import check_chunk_size, check_randomness
from .capture import Captured, capture, check_tensors, execute, is_tensor, vals_of, write_back
from .reuse import transform


def vmap(
    func: Callable, in_dims=0, out_dims=0, randomness: str = "error", *, chunk_size: int | None = None
) -> Callable:
    """Map `func` over an axis of its arguments. Follows torch.func.vmap.

    in_dims: an int (may be negative), None, or a structure of these matching the arguments; out_dims likewise for the
    outputs. randomness: "error" raises RandomInVmap for a function that draws, "different" draws for each example, "same"
    once for all. chunk_size: examples computed at a time; None is all of them. Raises BadInDims, BadOutDims,
    TypeOfArgument, RandomInVmap, ValueDependent; NotSupported for chunks of an axis whose size is symbolic.
    """
    check_randomness("vmap", randomness)
    check_chunk_size("vmap", chunk_size)

    @transform(func, "vmap", in_dims, out_dims, randomness, chunk_size)
    def wrapper(*args, **kwargs):
        return _vmap(func, in_dims, out_dims, randomness, chunk_size, args, kwargs)

    return wrapper


def _vmap(func, in_dims, out_dims, randomness, chunk_size, args, kwargs):
    leaves, spec = pytree.tree_flatten((args, kwargs))
    check_tensors("vmap", leaves)
    dims = _in_dims(in_dims, args, kwargs, leaves)
    length = _length(leaves, dims)
    vals = []
    for x, d in zip(leaves, dims, strict=True):
        if is_tensor(x):
            v = val_of(x)
            vals.append(v if d is None else Val(v.shape[:d] + v.shape[d + 1 :], v.dtype, v.device))
    tensors = [x for x in leaves if is_tensor(x)]
    tensor_dims = [d for x, d in zip(leaves, dims, strict=True) if is_tensor(x)]
    mapped = [d is not None for d in tensor_dims]
    captured = capture(
        func,
        leaves,
        spec,
        vals,
        by_value=tuple(not m for m in mapped),
        randomness=randomness,
        dense=[lies_dense(x, d) for x, d in zip(tensors, tensor_dims, strict=True)],
        writable=lambda i: i < len(mapped) and mapped[i],
    )
    out = _out_dims(out_dims, captured) + [tensor_dims[i] for i in captured.graph.written]
    vals = tuple(vals_of(leaves))
    graph = _map_graph(captured.graph, tuple(tensor_dims), tuple(out), length, randomness, chunk_size, vals)
    results = execute(graph, tensors + captured.captures)
    return captured.outputs(write_back(captured.graph, tensors + captured.captures, results))


@rewriting
def _map_graph(body: Graph, dims, out_dims, length, randomness, chunk_size, vals) -> Graph:
    """inputs with their mapped axes anywhere -> the outputs of the map, axes moved where they belong."""
    b = Builder(SIMPLIFY)
    full = [*vals, *body.in_vals[len(vals) :]]
    inputs = [b.input(v, n.name) for v, n in zip(full, body.inputs, strict=True)]
    dims = [*dims, *[None] * (len(inputs) - len(dims))]
    operands = [x.movedim(d, 0) if d else x for x, d in zip(inputs, dims, strict=True)]
    kinds = ["once" if d is None else "stack" for d in out_dims]
    mapped = [d is not None for d in dims]
    outs = emit_chunks(b, body, operands, mapped, kinds, length, randomness, chunk_size)
    return b.finish([o.movedim(0, d) if d else o for o, d in zip(outs, out_dims, strict=True)])


def _in_dims(in_dims, args, kwargs, leaves) -> list[int | None]:
    """One dim (non-negative) or None per leaf."""
    if not args:
        raise errors.BadInDims(what="the mapped function was called without positional arguments")
    if not isinstance(in_dims, (int, tuple, list)):
        raise errors.BadInDims(what=f"in_dims is {in_dims!r}, of type {type(in_dims).__name__}")
    spec = pytree.tree_flatten(args)[1]
    given = tuple(in_dims) if isinstance(in_dims, list) else in_dims
    flat = pytree._broadcast_to_and_flatten(given, spec)
    if flat is None:
        raise errors.BadInDims(
            what=f"in_dims {in_dims!r} does not match the structure of the {len(args)} arguments"
        )
    flat = [*flat, *(None for _ in pytree.tree_leaves(kwargs))]
    return [_checked_dim(d, x, in_dims) for d, x in zip(flat, leaves, strict=True)]


def _checked_dim(d, x, in_dims):
    if d is None:
        return None
    if isinstance(d, bool) or not isinstance(d, int):
        raise errors.BadInDims(what=f"in_dims {in_dims!r} holds {d!r}, which is neither an int nor None")
    if not is_tensor(x):
        raise errors.BadInDims(
            what=f"in_dims {in_dims!r} names dim {d} of an input of type {type(x).__name__}, which is no tensor"
        )
    if not -x.ndim <= d < x.ndim:
        raise errors.BadInDims(what=f"in_dims {in_dims!r} names dim {d} of a tensor with {x.ndim} dimensions")
    return d % x.ndim


def _length(leaves, dims):
    sizes = {from_torch(x.shape[d]) for x, d in zip(leaves, dims, strict=True) if d is not None}
    if not sizes:
        raise errors.BadInDims(what="no argument is mapped: in_dims is None everywhere")
    if len(sizes) > 1:
        raise errors.BadInDims(
            what=f"the mapped axes have different sizes: {', '.join(sorted(map(str, sizes)))}"
        )
    return sizes.pop()


def _out_dims(out_dims, captured: Captured) -> list[int | None]:
    """One dim (non-negative) or None per output tensor."""
    outputs = captured.graph.outputs[: len(captured.graph.outputs) - len(captured.graph.written)]
    if any(not is_tensor_mark for is_tensor_mark in captured.tensor_flags):
        raise errors.TypeOfArgument(
            what="vmap: the mapped function must return only tensors",
            instead="Return tensors, or return other values from outside vmap.",
        )
    if captured.out_spec.is_leaf() and isinstance(out_dims, tuple) and len(out_dims) == 1:
        (out_dims,) = out_dims  # torch.func lets (d,) stand for one output
    flat = pytree._broadcast_to_and_flatten(out_dims, captured.out_spec)
    if flat is None:
        raise errors.BadOutDims(
            what=f"out_dims {out_dims!r} does not match the structure of the outputs ({captured.out_spec})"
        )
    for d, node in zip(flat, outputs, strict=True):
        ndim = node.meta["val"].ndim + 1
        if d is not None and (not isinstance(d, int) or not -ndim <= d < ndim):
            raise errors.BadOutDims(what=f"out_dims holds {d!r} for an output with {ndim} dimensions")
    return [d if d is None else d % (n.meta["val"].ndim + 1) for d, n in zip(flat, outputs, strict=True)]
