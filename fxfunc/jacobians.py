"""Jacobians and Hessians: maps of a vjp or jvp over a basis. Signatures and results follow torch.func."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Val, extract, stop_reverse, subgraphs
from fxfunc.passes.infer import rewriting
from fxfunc.passes.linearize import linearize
from fxfunc.passes.record import Builder, aten
from fxfunc.passes.regions import emit_chunks
from fxfunc.passes.rules.region import transposed
from fxfunc.passes.simplify import SIMPLIFY

from .arguments import Call, check_chunk_size, check_randomness, count_outputs, split_aux
from .capture import execute, own_memory, write_back
from .reuse import transform


def _basis(b: Builder, val: Val):
    """The standard basis of a tensor's space: [numel, *shape]."""
    n = numel(val.shape)
    return b.emit(aten.eye.default, (n,), {"dtype": val.dtype, "device": val.device}).reshape([n, *val.shape])


@rewriting
def _jacrev_graph(graph: Graph, nonzero, count: int, chunk: int | None) -> Graph:
    """inputs -> jacobians [*out, *in] of the first `count` outputs (outer) by the nonzero inputs (inner), then all outputs."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    cut = linearize(graph, nonzero, reverse=True)
    results = b.inline(cut.primal, inputs)
    outs, residuals = results[: cut.count], results[cut.count :]
    in_vals = [n.meta["val"] for n, z in zip(graph.inputs, nonzero, strict=True) if z]
    blocks, k = [], 0
    for j in range(count):
        found = [None] * len(in_vals)
        if cut.nonzero_out[j]:
            found = _rows(b, transposed(cut.linear, cut.residuals, [k]), residuals, outs[j].val, chunk)
            k += 1
        blocks += [
            x.reshape([*outs[j].shape, *v.shape])
            if x is not None
            else b.full(Val((*outs[j].shape, *v.shape), v.dtype, v.device), 0)
            for x, v in zip(found, in_vals, strict=True)
        ]
    return b.finish(blocks + outs)


def _rows(b: Builder, back: Graph, residuals, out: Val, chunk: int | None) -> list:
    """A transposed graph mapped over the basis of one output; None where zero."""
    given = [i for i, n in enumerate(back.outputs) if n is not None]
    body = extract(list(back.inputs), [back.outputs[i] for i in given])
    flags = [False] * len(residuals) + [True]
    kinds = ["stack"] * len(given)
    found = emit_chunks(b, body, [*residuals, _basis(b, out)], flags, kinds, numel(out.shape), "error", chunk)
    rows: list = [None] * len(back.outputs)
    for i, x in zip(given, found, strict=True):
        rows[i] = x
    return rows


@rewriting
def _jacfwd_graph(graph: Graph, nonzero, count: int, chunk: int | None) -> Graph:
    """As _jacrev_graph, by forward mode: a map of the jvp over the basis of each input."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    outs: list = []
    columns = []
    for i in (i for i, z in enumerate(nonzero) if z):
        cut = linearize(graph, tuple(j == i for j in range(len(nonzero))), reverse=False)
        results = b.inline(cut.primal, inputs)
        outs, residuals = results[: cut.count], results[cut.count :]
        v = inputs[i].val
        flags = [False] * cut.residuals + [True]
        kinds = ["stack"] * sum(cut.nonzero_out)
        tangents = iter(
            emit_chunks(
                b, cut.linear, [*residuals, _basis(b, v)], flags, kinds, numel(v.shape), "error", chunk
            )
        )
        columns.append(
            [
                _column(next(tangents), o, v)
                if z
                else b.full(Val((*o.shape, *v.shape), o.dtype, o.device), 0)
                for z, o in zip(cut.nonzero_out, outs, strict=True)
            ]
        )
    return b.finish([column[j] for j in range(count) for column in columns] + outs)


def _column(t, out, val: Val):
    """[n, *out] tangents over the basis of an input as [*out, *in]."""
    return t.movedim(0, -1).reshape([*out.shape, *val.shape])


GRAPHS = {"reverse": _jacrev_graph, "forward": _jacfwd_graph}


def _jacobian(transform: str, mode: str, f, argnums, args, kwargs, chunk_size, randomness=None):
    """(jacobian, value, aux); `mode` is "reverse", "forward" or "auto"."""
    call = Call(transform, f, args, kwargs, argnums, reverse=mode != "forward", randomness=randomness)
    marks, split = split_aux(transform, call.captured, has_aux=True)
    count = count_outputs(transform, marks)
    width = sum(call.marked)
    graph_of = GRAPHS[_cheaper(call, count) if mode == "auto" else mode]
    results = execute(graph_of(call.graph, call.nonzero, count, chunk_size), call.inputs)
    results = write_back(call.graph, call.inputs, results, count * width)
    entries = own_memory(results[: count * width], call.inputs)
    rows = [call.unflatten(entries[j * width : (j + 1) * width]) for j in range(count)]
    value, aux = split(results[count * width :])
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten(rows, spec), value, aux


def _cheaper(call: Call, count: int) -> str:
    """The mode with fewer rows or columns to compute; reverse where the two would differ, or sizes are not known."""
    rows = sum(numel(v.shape) for v in call.graph.out_vals[:count])
    columns = sum(
        numel(n.meta["val"].shape) for n, z in zip(call.graph.inputs, call.nonzero, strict=True) if z
    )
    known = isinstance(rows, int) and isinstance(columns, int)
    return "forward" if known and columns < rows and not _stops_reverse(call.graph) else "reverse"


def _stops_reverse(graph: Graph) -> bool:
    return any(n.target is stop_reverse or any(map(_stops_reverse, subgraphs(n))) for n in graph.nodes)


def _with_aux(f: Callable, has_aux: bool) -> Callable:
    """`f`, returning (output, aux) in any case."""
    return f if has_aux else lambda *args, **kwargs: (f(*args, **kwargs), None)


def _transformed(name: str, mode: str, func, argnums, has_aux: bool, chunk_size, randomness=None) -> Callable:
    """A function returning the jacobian of `func`, or (jacobian, aux) with has_aux."""
    check_chunk_size(name, chunk_size)

    @transform(func, name, argnums, mode, has_aux, chunk_size, randomness)
    def wrapper(*args, **kwargs):
        f = _with_aux(func, has_aux)
        found, _, aux = _jacobian(name, mode, f, argnums, args, kwargs, chunk_size, randomness)
        return (found, aux) if has_aux else found

    return wrapper


def jacrev(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """The Jacobian of `func` by reverse mode: for output shape O and input shape I a tensor [*O, *I], in the structure of
    the output with that of the selected arguments inside; `(jacobian, aux)` with has_aux.

    chunk_size: rows computed at a time; None is all of them. Errors as for vjp; TypeOfArgument for a chunk_size below 1.
    Follows torch.func.jacrev.
    """
    return _transformed("jacrev", "reverse", func, argnums, has_aux, chunk_size)


def value_and_jacrev(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """As jacrev, and the value from the same run: `(value, jacobian)`, or `((value, aux), jacobian)` with has_aux.

    Follows jax.value_and_grad in its order.
    """
    check_chunk_size("value_and_jacrev", chunk_size)

    @transform(func, "value_and_jacrev", argnums, has_aux, chunk_size)
    def wrapper(*args, **kwargs):
        f = _with_aux(func, has_aux)
        jacobian, value, aux = _jacobian("value_and_jacrev", "reverse", f, argnums, args, kwargs, chunk_size)
        return ((value, aux) if has_aux else value), jacobian

    return wrapper


def jacfwd(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable:
    """As jacrev, by forward mode. Follows torch.func.jacfwd.

    randomness: "error" raises RandomInVmap for a function that draws; with "same" and "different" it draws once, for all
    columns. chunk_size: columns computed at a time.
    """
    check_randomness("jacfwd", randomness)
    return _transformed("jacfwd", "forward", func, argnums, has_aux, chunk_size, randomness)


def jacobian(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    mode: str = "auto",
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """The Jacobian by the mode named: "reverse" (jacrev), "forward" (jacfwd) or "auto".

    "auto" takes forward mode where the selected arguments have fewer elements than the outputs, unless the function holds
    what only reverse mode stops at (no_grad), so it always gives jacrev's answer. Raises TypeOfArgument for another mode.
    """
    if mode not in ("auto", *GRAPHS):
        raise errors.TypeOfArgument(
            what=f"jacobian: mode is {mode!r}", instead='Use "auto", "reverse" or "forward".'
        )
    return _transformed("jacobian", mode, func, argnums, has_aux, chunk_size)


def hessian(
    func: Callable,
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable:
    """The Hessian, forward over reverse: jacfwd(jacrev(f)); `(hessian, aux)` with has_aux. Follows torch.func.hessian.

    chunk_size: columns (and rows of the gradient) computed at a time.
    """
    inner = jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size)
    return jacfwd(inner, argnums, has_aux=has_aux, chunk_size=chunk_size)
