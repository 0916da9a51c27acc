"""What runs, in which order."""

from __future__ import annotations

from collections.abc import Callable

from .batch import lower
from .dce import dce
from .dump import saw
from .ghost import ghost
from .graph import Graph, subgraphs
from .grouped import grouped
from .orient import orient
from .peephole import peephole
from .record import Builder, rebuild
from .simplify import SIMPLIFY


def lowered(graph: Graph) -> Graph:
    """A graph as the backends take it: maps batched, then algebra until nothing changes."""
    graph = saw("dce", dce(graph))
    graph = saw(
        "lower", dce(lower(graph))
    )  # a loop that stands for a missing batching rule stacks all results
    graph = _settled(graph)
    return _settled(saw("ghost", inside(ghost, graph)))  # what is left of stacks that nobody makes now


def _settled(graph: Graph) -> Graph:
    while len(smaller := simplify(graph)) < len(graph):
        graph = saw("simplify", smaller)
    return graph


def for_aten(graph: Graph) -> Graph:
    """A lowered graph for a backend that calls ATen op by op: no copies of products, neighbours joined into ops that do both."""
    return inside(lambda g: saw("peephole", peephole(saw("orient", orient(grouped(g))))), graph)


def inside(step: Callable[[Graph], Graph], graph: Graph) -> Graph:
    """The graph and the bodies of its loops and branches after a step."""
    graph = step(graph)
    if not any(True for n in graph.nodes for _ in subgraphs(n)):
        return graph
    b = Builder(None)

    def call(op, args, kwargs):
        return b.emit(op, tuple(inside(step, x) if isinstance(x, Graph) else x for x in args), kwargs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def simplify(graph: Graph) -> Graph:
    """The graph emitted again through the algebra; equal calls are shared, dead ones dropped."""
    return rebuild(graph, SIMPLIFY)
