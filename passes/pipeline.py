"""What runs, in which order."""

from __future__ import annotations

from .batch import lower
from .dce import dce
from .dump import saw
from .graph import Graph
from .orient import orient
from .peephole import peephole
from .record import rebuild
from .simplify import SIMPLIFY


def lowered(graph: Graph) -> Graph:
    """A graph as the backends take it: maps batched, then algebra until nothing changes."""
    graph = saw("dce", dce(graph))
    graph = saw(
        "lower", dce(lower(graph))
    )  # a loop that stands for a missing batching rule stacks all results
    while len(smaller := simplify(graph)) < len(graph):
        graph = saw("simplify", smaller)
    return graph


def for_aten(graph: Graph) -> Graph:
    """A lowered graph for a backend that calls ATen op by op: no copies of products, neighbours joined into ops that do both."""
    return saw("peephole", peephole(saw("orient", orient(graph))))


def simplify(graph: Graph) -> Graph:
    """The graph emitted again through the algebra; equal calls are shared, dead ones dropped."""
    return rebuild(graph, SIMPLIFY)
