"""Products in the layout they are read in, for backends that call ATen. Entry point: `orient`.

A transposed product costs nothing until something needs it dense, and then a copy of all of it; transposed operands are free.
"""

from __future__ import annotations

from torch.fx import Node

from .graph import Graph
from .record import Builder, aten

PRODUCTS = (aten.mm.default, aten.bmm.default)


def orient(graph: Graph) -> Graph:
    """The graph with (a @ b)^T as b^T @ a^T, where nobody reads a @ b itself."""
    b = Builder({})
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    turned = {n.args[0] for n in graph.nodes if _is_transpose(n) and _only_for(n, graph)}
    for n in graph.nodes:
        if _is_transpose(n) and n.args[0] in turned:
            left, right = n.args[0].args
            with b.at(n, "orient"):
                env[n] = b.emit(n.args[0].target, (_transposed(right, env), _transposed(left, env)), {})
        elif n not in turned:
            b.run([n], env)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def _is_transpose(n: Node) -> bool:
    """A permutation that swaps the last two of two or three axes."""
    return n.target is aten.permute.default and list(n.args[1]) in ([1, 0], [0, 2, 1])


def _only_for(n: Node, graph: Graph) -> bool:
    """`n` alone reads its operand, a product that is as good the other way round."""
    product = n.args[0]
    alone = product.target in PRODUCTS and len(product.users) == 1 and product not in graph.outputs
    return alone and not reads_windows(product.args[0])


def reads_windows(x: Node) -> bool:
    """True for windows of a value, in another shape or order; they overlap, so that they are no matrix in memory."""
    while x.target in (aten.reshape.default, aten.permute.default, aten.flip.default, aten.slice.Tensor):
        x = x.args[0]
    return x.target is aten.unfold.default


def _transposed(x: Node, env: dict[Node, object]):
    if _is_transpose(x) and x.args[0] in env:
        return env[x.args[0]]
    return env[x].permute([1, 0] if env[x].ndim == 2 else [0, 2, 1])
