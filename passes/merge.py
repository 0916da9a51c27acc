"""Neighbouring maps as one. Entry point: `merge_maps`.

A map whose examples read the same example of an earlier map needs nothing else of it: one body computes both, and what
was stacked only to be read there stays inside of the task. Reverse mode makes such pairs: the primal map and the linear one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from .dce import dce
from .graph import Graph, getitem, map_, reached, substitute
from .record import Builder, Value
from .simplify import SIMPLIFY


def merge_maps(graph: Graph) -> Graph:
    """The graph with every pair of maps of one length as one map, where no other call lies between them."""
    while (pair := _mergeable(graph)) is not None:
        graph = dce(_merged(graph, *pair))
    return graph


def _mergeable(graph: Graph) -> tuple[Node, Node] | None:
    maps = [n for n in graph.nodes if n.target is map_ and not n.args[0].draws]
    for i, first in enumerate(maps):
        after = None
        for second in maps[i + 1 :]:
            if second.kwargs["length"] == first.kwargs["length"]:
                after = after or _after(graph, first)
                if _reads_examples(first, second, after):
                    return first, second
    return None


def _after(graph: Graph, n: Node) -> set[Node]:
    return reached(graph.nodes, [n])


def _reads_examples(first: Node, second: Node, after: set[Node]) -> bool:
    """True if all that `second` takes from what follows `first` are results of it that both have along the mapped axis."""
    return all(
        x not in after or mapped and _stacked(first, x)
        for x, mapped in zip(second.args[1], second.kwargs["mapped"], strict=True)
    )


def _stacked(first: Node, x: Node) -> bool:
    return x.target is getitem and x.args[0] is first and first.kwargs["outs"][x.args[1]] == "stack"


def _merged(graph: Graph, first: Node, second: Node) -> Graph:
    """The graph with both as one node, which stands after all that they need and before all that needs them."""
    after = reached(graph.nodes, [first, second])
    b = Builder(None)
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    b.run([n for n in graph.nodes if n not in after], env)
    with b.at(second):
        _emit(b, env, first, second)
    b.run([n for n in graph.nodes if n in after and n is not first and n is not second], env)
    return b.finish_raw([None if n is None else env[n] for n in graph.outputs])


def _emit(b: Builder, env: dict[Node, object], first: Node, second: Node) -> None:
    inner, inputs = Builder(SIMPLIFY), {}
    bodies, results = (first.args[0], second.args[0]), []
    for n, body in zip((first, second), bodies, strict=True):
        given = []
        for x, mapped, bound in zip(n.args[1], n.kwargs["mapped"], body.inputs, strict=True):
            if n is second and _stacked(first, x):
                given.append(results[0][x.args[1]])
            else:
                if (x, mapped) not in inputs:
                    inputs[x, mapped] = inner.input(bound.meta["val"], bound.name)
                given.append(inputs[x, mapped])
        results.append(inner.inline(body, given))
    flags = tuple(mapped for _, mapped in inputs)
    operands: tuple[Value, ...] = substitute(tuple(x for x, _ in inputs), env.__getitem__)
    body = inner.finish(_flat(results))
    kwargs = first.kwargs | {"mapped": flags, "outs": (*first.kwargs["outs"], *second.kwargs["outs"])}
    values = b.emit(map_, (body, operands), kwargs)
    count = len(results[0])
    env[first], env[second] = values[:count], values[count:]


def _flat(results: Sequence[list[Value]]) -> list[Value]:
    return [x for part in results for x in part]
