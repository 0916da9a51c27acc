"""From a Python function and example arguments to a graph. Entry points: `capture`, and `execute` to run a graph.

Executed inside a capture, a graph is copied into it; otherwise it is lowered and run, and ordinary autograd around it
sees one differentiable call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import zip_longest

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxfunc.codegen import backends
from fxfunc.passes import errors
from fxfunc.passes.concrete import Concrete
from fxfunc.passes.dump import saw
from fxfunc.passes.graph import Graph, Val, root
from fxfunc.passes.infer import rewriting
from fxfunc.passes.linearize import linearize
from fxfunc.passes.linearize import vjp as emit_vjp
from fxfunc.passes.record import Builder
from fxfunc.passes.reroll import reroll
from fxfunc.passes.rules.region import transposed
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.trace import Recorder
from fxfunc.passes.tracer import Tracer, current, recorders, refuse_tensor, tracked, val_of

from . import custom
from .signature import resolved


@dataclasses.dataclass
class Captured:
    """A captured function: the graph's inputs are the tensor leaves of the arguments, then `captures`."""

    graph: Graph
    captures: list[torch.Tensor]
    sources: list[str | None]
    out_leaves: list  # what the function returned, flat: tensors replaced by None
    out_spec: pytree.TreeSpec

    @property
    def tensor_flags(self) -> list[bool]:
        """For each output leaf, whether it is a tensor."""
        return [x is _TENSOR for x in self.out_leaves]

    @property
    def others(self) -> list:
        """The output leaves that are no tensors."""
        return [x for x in self.out_leaves if x is not _TENSOR]

    def outputs(self, tensors: list):
        """The function's result, its tensors being these in order."""
        tensors = iter(tensors)
        return pytree.tree_unflatten(
            [next(tensors) if x is _TENSOR else x for x in self.out_leaves], self.out_spec
        )


_TENSOR = object()


def is_tensor(x) -> bool:
    """True for what becomes an input or output of a graph."""
    return isinstance(x, torch.Tensor)


def check_tensors(transform: str, leaves) -> None:
    """Refuse tensors whose meaning a capture cannot keep, and calls inside an active torch.func transform."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise errors.NestedTorchFunc(transform=transform)
    for t in leaves:
        if is_tensor(t):
            refuse_tensor(t, f"{transform} of")


def capture(
    function, leaves, spec, in_vals: list[Val], *, by_value: tuple[bool, ...] | None = None, **how
) -> Captured:
    """Record `function(*args, **kwargs)` for arguments given flat; `in_vals` are the Vals of the tensor leaves, in order.

    by_value: a function that asks for the value of a tensor is captured again with the values of what it closes over, and of
    those of these leaves that are named, at hand; draws are known if all are.
    tracks: for each of them, whether the code sees `requires_grad == True`. grad: the grad mode it starts under.
    randomness: that of an enclosing vmap. dense: for each of them, whether it is known to lie in memory as its shape says.
    writable=predicate: which inputs of the graph the function may write to; see `functionalize` and `write_back`.
    """
    outer = current()
    if outer is not None:
        concrete = outer.concrete and Concrete(
            outer.concrete.run, outer.concrete.draws and all(by_value or (False,))
        )
        return _capture(function, leaves, spec, in_vals, Recorder(concrete=concrete), by_value or (), **how)
    try:
        return _capture(function, leaves, spec, in_vals, Recorder(), **how)
    except errors.ValueDependent:
        if by_value is None:
            raise
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):  # the graph will draw the same numbers again
        return _capture(
            function,
            leaves,
            spec,
            in_vals,
            Recorder(concrete=Concrete(_values, all(by_value))),
            by_value,
            **how,
        )


def _values(graph: Graph, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return compiled(graph)(list(tensors))


def _capture(
    function,
    leaves,
    spec,
    in_vals: list[Val],
    recorder: Recorder,
    known=(),
    *,
    tracks=(),
    grad=True,
    randomness: str | None = None,
    dense=(),
    **writable,
) -> Captured:
    recorder.randomness = randomness
    with custom.hooks(), foreign_modes_off(), recorder, torch.set_grad_enabled(grad):
        flags = iter(zip_longest(tracks, known, fillvalue=False))
        tensors = [x for x in leaves if is_tensor(x)]
        inputs = [
            recorder.input(v, "x", *next(flags, ()), like=t) for v, t in zip(in_vals, tensors, strict=True)
        ]
        for x, lies in zip(inputs, dense, strict=False):
            x.dense = lies
        tracers = iter(inputs)
        args, kwargs = pytree.tree_unflatten([next(tracers) if is_tensor(x) else x for x in leaves], spec)
        out_leaves, out_spec = pytree.tree_flatten(function(*args, **kwargs))
        graph = saw("capture", recorder.finish([x for x in out_leaves if is_tensor(x)], **writable))
    same = any(r.randomness == "same" for r in (recorder, *recorders()))
    graph = reroll(graph, draws=not same)
    captures = [(t, source) for t, _, source in recorder.captures.values()]
    return Captured(
        graph,
        [t for t, _ in captures],
        [s for _, s in captures],
        [_TENSOR if is_tensor(x) else x for x in out_leaves],
        out_spec,
    )


def foreign_modes_off():
    """Dispatch modes of others (make_fx, export, fake tensors) see what is executed, not what is captured."""
    return contextlib.nullcontext() if current() is not None else _disable_current_modes()


def execute(graph: Graph, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """The outputs of a graph at these tensors: recorded if a capture is under way, else computed."""
    recorder = current()
    if recorder is not None:
        tracks = torch.is_grad_enabled() and any(map(tracked, tensors))
        return recorder.inline(graph, tensors, tracks)
    return run(graph, compiled, tensors)


@rewriting
def compiled(graph: Graph, backend: str = "eager", target: str = "cpu"):
    """A graph as a callable on flat tensors; equal graphs share it."""
    return backends.compile(graph, backend, target).call


def run(graph: Graph, compile_, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Compute, as one call in the eyes of autograd if an input requires grad; `compile_(graph)` gives the callable."""
    tensors = resolved(tensors)
    if forward_ad._current_level >= 0 and any(map(_is_dual, tensors)):
        raise errors.NotSupported(
            what="a dual tensor of torch.autograd.forward_ad (its tangent would be lost)",
            instead="Use fxfunc.jvp for forward-mode derivatives.",
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        tensors = [
            t.clone() if i in graph.written else t for i, t in enumerate(tensors)
        ]  # saved for backward
        return list(_Differentiable.apply(graph, compile_, *tensors))
    with torch.no_grad():
        return compile_(graph)(list(tensors))


def _is_dual(t: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


@rewriting
def _cut(graph: Graph, nonzero: tuple[bool, ...]):
    return linearize(graph, nonzero, reverse=True)


@rewriting
def _backward(graph: Graph, nonzero: tuple[bool, ...], given: tuple[int, ...]) -> Graph:
    """residuals + the given cotangents -> cotangents of the nonzero inputs (None where zero)."""
    cut = _cut(graph, nonzero)
    return transposed(cut.linear, cut.residuals, list(given))


@rewriting
def _vjp_graph(graph: Graph, nonzero: tuple[bool, ...], given: tuple[int, ...]) -> Graph:
    """inputs + the given cotangents -> cotangents of the nonzero inputs; itself differentiable again."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    cts: list = [None] * len(graph.outputs)
    for j in given:
        cts[j] = b.input(graph.outputs[j].meta["val"], "ct")
    _, shares = emit_vjp(b, graph, inputs, nonzero, lambda outs: cts)
    return b.finish(shares)


class _Differentiable(torch.autograd.Function):
    """A graph as one node of ordinary autograd, whose backward is our own vjp (and again for double backward)."""

    @staticmethod
    def forward(ctx, graph: Graph, compile_, *tensors):
        nonzero = tuple(t.requires_grad and t.dtype.is_floating_point | t.dtype.is_complex for t in tensors)
        cut = _cut(graph, nonzero)
        results = compile_(cut.primal)(list(tensors))
        outs, residuals = results[: cut.count], results[cut.count :]
        ctx.graph, ctx.compile, ctx.nonzero, ctx.count = graph, compile_, nonzero, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, z in zip(outs, cut.nonzero_out, strict=True) if o is not None and not z)
        )
        ctx.save_for_backward(*tensors, *residuals)
        return tuple(o.view_as(o) if any(o is t for t in tensors) and o is not None else o for o in outs)

    @staticmethod
    def backward(ctx, *cts):
        tensors, residuals = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        cut = _cut(ctx.graph, ctx.nonzero)
        given = [j for j, ct in enumerate(cts) if ct is not None and cut.nonzero_out[j]]
        if torch.is_grad_enabled():
            graph = _vjp_graph(ctx.graph, ctx.nonzero, tuple(given))
            shares = run(graph, ctx.compile, [*tensors, *(cts[j] for j in given)])
        else:
            position = {j: k for k, j in enumerate(j for j, z in enumerate(cut.nonzero_out) if z)}
            graph = _backward(ctx.graph, ctx.nonzero, tuple(position[j] for j in given))
            shares = ctx.compile(graph)([*residuals, *(cts[j] for j in given)])
        shares = iter(shares)
        return (None, None, *(next(shares) if z else None for z in ctx.nonzero))


def write_back(graph: Graph, inputs: list[torch.Tensor], results: list, first: int = 0) -> list:
    """Store the new values of written inputs; the results, safe from these writes, new tensors with memory of their own.

    The outputs of `graph`, of which the new values are the last, are in `results` from `first` on. Autograd sees the writes
    as it would see those of the function.
    """
    results = list(results)
    fresh = [first + i for i in graph.fresh]
    for i, owned in zip(fresh, own_memory([results[i] for i in fresh], inputs), strict=True):
        results[i] = owned
    if not graph.written:
        return results
    written = [inputs[i] for i in graph.written]
    for w in written:
        if sum(t is w or torch._C._is_alias_of(t, w) for t in inputs) > 1:
            raise errors.NotSupported(
                what="writing in place to a tensor that shares memory with another input",
                instead="Pass a clone of one of them.",
            )
    results = [r.clone() if r is not None and _shares(r, written) else r for r in results]
    end = first + len(graph.outputs)
    new = results[end - len(written) : end]
    for w, value in zip(written, new, strict=True):
        leaf = current() is None and w.requires_grad and w.is_leaf  # then the function wrote under no_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not leaf):
            w.copy_(value)
    return results


def own_memory(results: list, inputs: list[torch.Tensor]) -> list:
    """Results that the user made or asked for as new tensors, copied where the algebra left an input or a view of one."""
    if current() is not None:
        return [
            r.clone()
            if isinstance(r, Tracer) and getattr(root(r.value.node), "op", None) == "placeholder"
            else r
            for r in results
        ]
    given = {t.untyped_storage()._cdata for t in inputs}
    return [r.clone() if r is not None and r.untyped_storage()._cdata in given else r for r in results]


def _shares(t: torch.Tensor, others) -> bool:
    """Whether writing to one of the others may change t; a tracer does not tell."""
    return current() is not None or any(torch._C._is_alias_of(t, other) for other in others)


def vals_of(leaves) -> list[Val]:
    """The Vals of the tensor leaves."""
    return [val_of(t) for t in leaves if is_tensor(t)]
