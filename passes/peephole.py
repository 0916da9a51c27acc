"""Joining neighbours into one ATen op, for backends that pay per call. Entry point: `peephole`.

Each row sees a call and may answer with another that also does the work of an argument nobody else reads.
"""

from __future__ import annotations

from torch.fx import Node

from .dims import Dim
from .graph import Graph, Val, substitute
from .record import Builder, aten


def peephole(graph: Graph) -> Graph:
    """The graph with products and additions joined."""
    b = Builder({})
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    outputs = set(graph.outputs)
    for n in graph.nodes:
        joined = ROWS[n.target](n, outputs) if n.target in ROWS else None
        if joined is None:
            b.run([n], env)
            continue
        op, args, kwargs = joined
        with b.at(n, "join"):
            env[n] = b.emit(op, substitute(args, env.__getitem__), kwargs)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def _only_use(x, op, outputs) -> bool:
    return isinstance(x, Node) and x.target is op and len(x.users) == 1 and x not in outputs and not x.kwargs


def _same(*nodes) -> bool:
    return len({n.meta["val"].dtype for n in nodes}) == 1


def _scaled(x, outputs):
    """(y, c) if x = y * c is read only here."""
    if (
        _only_use(x, aten.mul.Tensor, outputs)
        and isinstance(x.args[1], (int, float))
        and isinstance(x.args[0], Node)
    ):
        return x.args if x.meta["val"].dtype == x.args[0].meta["val"].dtype else None
    return None


def _sub(n: Node, outputs):
    """a - y * c -> sub(a, y, alpha=c)"""
    if (
        len(n.args) == 2
        and not n.kwargs
        and isinstance(n.args[0], Node)
        and (found := _scaled(n.args[1], outputs))
    ):
        if _same(n, n.args[0], found[0]) and n.meta["val"].dtype.is_floating_point:
            return aten.sub.Tensor, (n.args[0], found[0]), {"alpha": found[1]}
    return None


def _add(n: Node, outputs):
    """c + a @ b -> addmm or baddbmm; a + y * c -> add(a, y, alpha=c)"""
    if len(n.args) != 2 or n.kwargs or not all(isinstance(a, Node) for a in n.args):
        return None
    for product, c in (n.args, n.args[::-1]):
        for matmul, joined in (
            (aten.mm.default, aten.addmm.default),
            (aten.bmm.default, aten.baddbmm.default),
        ):
            if _only_use(product, matmul, outputs) and _addable(n, product, c):
                return joined, (c, *product.args), {}
    for scaled, other in (n.args, n.args[::-1]):
        if (
            (found := _scaled(scaled, outputs))
            and _same(n, other, found[0])
            and n.meta["val"].dtype.is_floating_point
        ):
            return aten.add.Tensor, (other, found[0]), {"alpha": found[1]}
    return None


def _addable(n: Node, product: Node, c: Node) -> bool:
    """The product has the result's type, and c broadcasts to it within its rank."""
    val: Val = n.meta["val"]
    small = c.meta["val"]
    fits = all(
        s == t or (not isinstance(s, Dim) and s == 1)
        for s, t in zip(small.shape[::-1], val.shape[::-1], strict=False)
    )
    return product.meta["val"] == val and small.dtype == val.dtype and small.ndim <= val.ndim and fits


ROWS = {aten.sub.Tensor: _sub, aten.add.Tensor: _add}
