"""What runs, in which order."""

from __future__ import annotations

from .batch import lower
from .graph import Graph
from .record import rebuild
from .simplify import SIMPLIFY


def lowered(graph: Graph) -> Graph:
    """A graph as the backends take it: maps batched, algebra applied until nothing changes."""
    graph = lower(graph)
    while True:
        smaller = rebuild(graph, SIMPLIFY)
        if len(smaller) >= len(graph):
            return smaller
        graph = smaller
