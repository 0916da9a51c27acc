"""Maps that draw random numbers as two, for backends whose loops draw none. Entry point: `draws_first`.

What an example draws depends on nothing that it computes, as a rule. So a first map draws, in the order of the calls, and the
second one's examples take each their own numbers.
"""

from __future__ import annotations

from torch.fx import Node

from .graph import Graph, Val, extract, map_, subgraphs
from .record import Builder, Value
from .regions import OF_SHAPE


def draws_first(graph: Graph) -> Graph:
    """The graph with such maps as two; one whose draws need what it computes, or are made in an inner loop, stays."""
    if not any(n.target is map_ and n.args[0].draws for n in graph.nodes):
        return graph
    b = Builder(None)

    def call(op, args: tuple, kwargs: dict):
        parts = _parts(args[0]) if op is map_ and args[0].draws else None
        if parts is None:
            return b.emit(op, args, kwargs)
        draws, rest = parts
        count = len(draws.outputs)
        drawn = b.emit(map_, (draws, args[1]), kwargs | {"outs": ("stack",) * count})
        mapped = (*kwargs["mapped"], *[True] * count)
        return b.emit(map_, (rest, (*args[1], *drawn)), kwargs | {"mapped": mapped})

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _parts(body: Graph) -> tuple[Graph, Graph] | None:
    """(the draws of a body, the rest with what was drawn as further inputs); None where they cannot be told apart."""
    if any(any(subgraphs(n)) or not isinstance(n.meta["val"], Val) for n in body.draws):
        return None
    b = Builder(None)
    env: dict[Node, Value] = {n: b.input(n.meta["val"], n.name) for n in body.inputs}
    for n in body.draws:
        known = dict(env)
        if n.target in OF_SHAPE:
            known[n.args[0]] = b.full(n.args[0].meta["val"], 0)
        if any(x not in known for x in n.all_input_nodes):
            return None
        b.run([n], known)
        env[n] = known[n]
    rest = extract([*body.inputs, *body.draws], list(body.outputs))
    return b.finish([env[n] for n in body.draws]), rest
