"""torch.autograd.grad inside a captured function: the vjp of what was recorded so far. Entry point: `grad`."""

from __future__ import annotations

import torch
from torch.fx import Node

from . import errors
from .functionalize import functionalize
from .graph import Graph, Val, extract, is_random, reached
from .linearize import vjp
from .record import Builder, Value, aten
from .simplify import SIMPLIFY
from .tracer import Tracer, current, tracked


def grad(
    outputs,
    inputs,
    grad_outputs=None,
    retain_graph=None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple:
    """As torch.autograd.grad, for tensors of the capture under way; the pullback is recorded like any other call."""
    if is_grads_batched:
        raise errors.UnsupportedInside(
            what="torch.autograd.grad with is_grads_batched", instead="Use fxfunc.vmap over fxfunc.vjp."
        )
    recorder = current()
    ys, xs = _tensors(outputs), _tensors(inputs)
    given = [None] * len(ys) if grad_outputs is None else list(_tensors(grad_outputs))
    _check(ys, xs, given)
    given = [torch.ones_like(y) if ct is None else ct for y, ct in zip(ys, given, strict=True)]
    builder = recorder.builder
    draws = [n for n in builder.fx.nodes if is_random(n) and isinstance(n.meta["val"], Val)]
    y_nodes, x_nodes = ([recorder.lift(t).node for t in tensors] for tensors in (ys, xs))
    functional = _functional(builder.fx, [*y_nodes, *x_nodes, *draws], x_nodes)
    bound = [Tracer(recorder, Value(n, builder)) for n in builder.fx.nodes if n.op == "placeholder"]
    known = [*bound, *xs, *(Tracer(recorder, Value(n, builder)) for n in draws), *given]
    shares: list = []
    with torch.set_grad_enabled(create_graph):
        for wrt in _together(functional, len(ys), len(xs)):
            graph = _pullback(functional, len(ys), len(xs), wrt)
            shares += recorder.inline(graph, known, tracks=create_graph)
    if any(s is None for s in shares) and not (allow_unused or materialize_grads):
        raise errors.UnusedInput(what=f"input {shares.index(None)}")
    if materialize_grads:
        shares = [torch.zeros_like(x) if s is None else s for x, s in zip(xs, shares, strict=True)]
    return tuple(shares)


def _tensors(x) -> tuple:
    return (x,) if isinstance(x, torch.Tensor) else tuple(x)


def _check(ys, xs, given) -> None:
    for y, ct in zip(ys, given, strict=True):
        if ct is None and y.numel() != 1:
            raise errors.NonScalarOutput(
                transform="torch.autograd.grad", got=f"a tensor of shape {tuple(y.shape)}"
            )
    for what, tensors in (("output", ys), ("input", xs)):
        for i, t in enumerate(tensors):
            if not tracked(t):
                raise errors.UnusedInput(what=f"{what} {i}, which does not require grad,")


def _functional(fx: torch.fx.Graph, outputs: list[Node], xs: list[Node]) -> Graph:
    """What was recorded so far as a functional graph, with these outputs; a clone among the `xs` is not what it is a clone of."""
    copied: dict[Node, Node] = {}
    now = torch.fx.Graph()
    now.graph_copy(fx, copied)
    for n in {copied[x] for x in xs if x.target is aten.clone.default}:
        n.target, n.args, n.kwargs = aten.mul.Scalar, (n.args[0], 1), {}
    now.output(tuple(copied[n] for n in outputs))
    graph = functionalize(Graph(now), writable=lambda i: True)
    if graph.written:
        raise errors.UnsupportedInside(
            what="torch.autograd.grad after an in-place write to an input",
            instead="Use fxfunc.grad, or write to a clone.",
        )
    return graph


def _together(graph: Graph, n_out: int, n_in: int) -> list[list[int]]:
    """The inputs in groups, in order, none of a group depending on another of it: so each may be cut off from what made it."""
    xs = list(graph.outputs[n_out : n_out + n_in])
    dependent = any(y in reached(graph.nodes, [x]) for x in set(xs) for y in set(xs) - {x})
    return [[i] for i in range(n_in)] if dependent else [list(range(n_in))]


def _pullback(graph: Graph, n_out: int, n_in: int, wrt: list[int]) -> Graph:
    """inputs, all xs, draws and cotangents -> the cotangents of the xs `wrt` (None where zero)."""
    ys, rest = graph.outputs[:n_out], graph.outputs[n_out:]
    xs, draws = rest[:n_in], rest[n_in:]
    chosen = [xs[i] for i in wrt]
    cut = list(dict.fromkeys([*graph.inputs, *chosen, *draws]))
    body = extract(cut, list(ys))
    b = Builder(SIMPLIFY)
    values = {}
    order = [*graph.inputs, *xs, *draws]
    placed = [(n, b.input(n.meta["val"], n.name)) for n in order]
    for i, (n, value) in enumerate(placed):
        if i < len(graph.inputs) or n in chosen or n in draws:
            values[n] = value
    cts = [b.input(n.meta["val"], "ct") for n in ys]
    nonzero = tuple(n in chosen for n in cut)
    _, found = vjp(b, body, [values[n] for n in cut], nonzero, lambda outs: cts)
    shares = dict(zip((n for n in cut if n in chosen), found, strict=True))
    return b.finish([shares[n] for n in chosen])
