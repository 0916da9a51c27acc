"""Products in the layout they are read in, for backends that call ATen. Entry point: `orient`.

A transposed product costs nothing until something needs it dense, and then a copy of all of it; transposed operands are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.fx import Node

from .dims import Dim
from .graph import Graph, Val
from .record import Builder, Value, aten

PRODUCTS = (aten.mm.default, aten.bmm.default)
SMALL = 4  # of an operand that costs nothing: how often it goes into the product
MANY = 2**10  # what a symbolic size is taken to be
LARGE = 2**18  # multiplications from which a product of a batch is no slower by itself

Env = dict[Node, object]


def orient(graph: Graph) -> Graph:
    """The graph with (a @ b)^T as b^T @ a^T, where nobody reads a @ b itself, products of one matrix with many as a batch, and
    -(a @ b) as a @ -b."""
    return _turned(_apart(_signed(graph)))


def _signed(graph: Graph) -> Graph:
    """A product that is read negated has its sign from a factor, if one is small beside it; a sum of 0 may be one of -0."""
    negated: dict[Node, Node] = {}
    for n in graph.nodes:
        if n.target is aten.neg.default and (product := _viewed(n.args[0], graph)) is not None:
            if _is_small(min(product.args, key=_size), product):
                negated[product] = n
    negs = set(negated.values())

    def row(n: Node, env: Env, b: Builder) -> Value | None:
        if n in negs:
            return env[n.args[0]]
        if n not in negated:
            return None
        small = min(n.args, key=_size)
        left, right = (-env[x] if x is small else env[x] for x in n.args)
        return b.emit(n.target, (left, right), {})

    return _with(graph, row, set())


def _viewed(n: Node, graph: Graph) -> Node | None:
    """The product that a value is but for its layout, if it is read nowhere else."""
    while n.op == "call_function" and len(n.users) == 1 and n not in graph.outputs:
        if n.target in PRODUCTS:
            return None if n.args[0] is n.args[1] else n
        if n.target not in (aten.reshape.default, aten.permute.default):
            return None
        n = n.args[0]
    return None


def _size(n: Node) -> int:
    """The number of elements; a symbol counts as many."""
    return math.prod(MANY if isinstance(s, Dim) else s for s in _val(n).shape)


def _is_small(n: Node, product: Node) -> bool:
    return SMALL * _size(n) <= _size(product)


def _turned(graph: Graph) -> Graph:
    turned = {n.args[0] for n in graph.nodes if is_transpose(n) and _only_for(n, graph)}

    def row(n: Node, env: Env, b: Builder) -> Value | None:
        if not is_transpose(n) or n.args[0] not in turned:
            return None
        left, right = n.args[0].args
        return b.emit(n.args[0].target, (_transposed(right, env), _transposed(left, env)), {})

    return _with(graph, row, turned)


def _apart(graph: Graph) -> Graph:
    """One product of all matrices of a batch, read by matrix, as a batched product where that saves a transposed copy."""
    found = {n: many for n in graph.nodes if (many := _many(n, graph)) is not None}

    def row(n: Node, env: Env, b: Builder) -> Value | None:
        if n not in found:
            return None
        many, one = found[n]
        count = _val(many).shape[0]
        if is_transpose(n):
            left = _transposed(one, env)
            return b.emit(aten.bmm.default, (left.expand(count, *left.shape), _transposed(many, env)), {})
        right = env[one]
        return b.emit(aten.bmm.default, (env[many], right.expand(count, *right.shape)), {})

    return _with(graph, row, set())


def _with(graph: Graph, row: Callable[[Node, Env, Builder], Value | None], without: set[Node]) -> Graph:
    """The graph with a call as `row` has it, where it is not None, and without some calls."""
    b = Builder({})
    env: Env = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    for n in graph.nodes:
        with b.at(n, "orient"):
            out = row(n, env, b)
        if out is not None:
            env[n] = out
        elif n not in without:
            b.run([n], env)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def _many(n: Node, graph: Graph) -> tuple[Node, Node] | None:
    """[count, rows, inner] and [inner, columns] if `n` is their product or its transpose, written as one product."""
    by_matrix = n.args[0] if is_transpose(n) else n
    if by_matrix.op != "call_function" or by_matrix.target is not aten.reshape.default:
        return None
    product = by_matrix.args[0]
    if product.target is not aten.mm.default or product.args[0].target is not aten.reshape.default:
        return None
    many, one = product.args[0].args[0], product.args[1]
    shape = *_val(many).shape[:2], _val(one).shape[1]
    between = [product] if by_matrix is n else [product, by_matrix]
    if _val(many).ndim != 3 or _val(by_matrix).shape != shape or not _is_large(many, shape):
        return None
    if any(len(x.users) != 1 or x in graph.outputs for x in between):
        return None
    return (many, one) if by_matrix is not n or is_transpose(many) else None


def _is_large(many: Node, shape: tuple) -> bool:
    rows, columns, inner = *shape[1:], _val(many).shape[2]
    return not any(isinstance(s, Dim) for s in (rows, columns, inner)) and rows * columns * inner >= LARGE


def is_transpose(n: Node) -> bool:
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


def _transposed(x: Node, env: Env) -> Value:
    if is_transpose(x) and x.args[0] in env:
        return env[x.args[0]]
    return env[x].permute([1, 0] if env[x].ndim == 2 else [0, 2, 1])


def _val(n: Node) -> Val:
    return n.meta["val"]
