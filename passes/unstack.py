"""Per-sample products that a map stacks only to have them reduced, made outside of it. Entry point: `unstacked`.

Loops over samples hide from `ghost` what it looks for: the product is in the body, its reductions are after the loop. Here the
body gives the factors in its place, and the product of the stacked factors is what `ghost` finds and removes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch.fx import Node

from .ghost import ghost, reduced
from .graph import Graph, extract, map_
from .orient import is_transpose
from .record import Builder, Value, aten
from .regions import emit_map
from .simplify import SIMPLIFY


@dataclasses.dataclass(frozen=True)
class Product:
    """What a map stacks as result `index`: the product of two values of its body, `turned` if that is transposed."""

    map: Node
    index: int
    left: Node
    right: Node
    turned: bool


def unstacked(graph: Graph) -> Graph:
    """The graph without those stacks of products that are only reduced, where that saves work."""
    products = [p for n in graph.nodes if n.target is map_ for p in _products(n)]
    if not products:
        return graph
    exposed, stacks = _exposed(graph, products)
    gone = reduced(exposed)
    chosen = [p for p in products if stacks[p] in gone]
    return ghost(_exposed(graph, chosen)[0]) if chosen else graph


def _products(n: Node) -> Iterator[Product]:
    body = n.args[0]
    for i, (out, kind) in enumerate(zip(body.outputs, n.kwargs["outs"], strict=True)):
        if kind == "stack" and out is not None and not body.draws:
            x, turned = _untransposed(out)
            if x.target is aten.mm.default and _only_stacked(x, out):
                yield Product(n, i, *x.args, turned)


def _untransposed(x: Node) -> tuple[Node, bool]:
    """The value, or what it is the transpose of."""
    return (x.args[0], True) if is_transpose(x) else (x, False)


def _only_stacked(x: Node, out: Node) -> bool:
    return all(user.op == "output" or user is out for user in x.users) and all(
        user.op == "output" for user in out.users
    )


def _exposed(graph: Graph, products: list[Product]) -> tuple[Graph, dict[Product, Node]]:
    """The graph with these products after their maps, and the call that makes each stack."""
    b = Builder(SIMPLIFY)
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    stacks: dict[Product, Node] = {}
    for n in graph.nodes:
        if of_map := [p for p in products if p.map is n]:
            with b.at(n, "unstack"):
                env[n] = _emit(b, n, of_map, env, stacks)
        else:
            b.run([n], env)
    return b.finish([None if n is None else env[n] for n in graph.outputs]), stacks


def _emit(
    b: Builder, n: Node, products: list[Product], env: dict[Node, object], stacks: dict[Product, Node]
) -> list[Value]:
    """The results of a map, those products from factors that it stacks."""
    body, operands = n.args
    indices = {p.index for p in products}
    rest = [i for i in range(len(body.outputs)) if i not in indices]
    factors = [_untransposed(x) for p in products for x in (p.left, p.right)]
    outs = [n.kwargs["outs"][i] for i in rest] + ["stack"] * len(factors)
    inner = extract(list(body.inputs), [*(body.outputs[i] for i in rest), *(x for x, _ in factors)])
    given = [env[x] for x in operands]
    values = emit_map(b, inner, given, n.kwargs["mapped"], outs, n.kwargs["length"], n.kwargs["randomness"])
    results = dict(zip(rest, values[: len(rest)], strict=True))
    stacked = [v.mT if turned else v for v, (_, turned) in zip(values[len(rest) :], factors, strict=True)]
    for p, left, right in zip(products, stacked[::2], stacked[1::2], strict=True):
        product = left.call(aten.bmm.default, right)
        stacks[p] = product.node
        results[p.index] = product.mT if p.turned else product
    return [results[i] for i in range(len(body.outputs))]
