"""A graph as the C++ emitter takes it. Entry points: `refusal` (why a call is no C++), `prepare`, `affine`, `strides`.

Calls become kernels of the loop IR, products and moves; what they read is a dense value or an affine view of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import (
    Graph,
    Op,
    Val,
    map_,
    scan,
)
from fxfunc.passes.infer import OWN
from fxfunc.passes.record import Builder, Value

from . import conv, moves
from .cost import product_work
from .fuse import fuse
from .index import VIEWS, Affine, NotFusable, Space, Split, pull, reshaped
from .loops import Apply, Const, Kernel
from .lower import DTYPES, base, is_constant, is_free, is_fusable, lower
from .moves import MOVES
from .rows import POINTWISE, PRODUCTS, REDUCING

aten = torch.ops.aten

# ---- what can be lowered ----


def refusal(n: Node) -> str | None:
    """Why a call cannot be C++, or None."""
    if n.target in conv.WAYS:
        return conv.refusal([x.meta["val"] for x in n.all_input_nodes]) or "a large convolution"
    outs = n.meta["val"] if n.target in MOVES and isinstance(n.meta["val"], tuple) else [n.meta["val"]]
    vals = [*outs, *(x.meta["val"] for x in n.all_input_nodes)]
    for v in vals:
        if not isinstance(v, Val):
            return "several outputs"
        if v.dtype not in DTYPES:
            return f"{v.dtype} is not supported"
        if v.device.type != "cpu":
            return f"on {v.device}"
        if any(isinstance(s, Dim) for s in v.shape):
            return "symbolic sizes"
    if is_free(n):
        return None
    if n.target in PRODUCTS:
        if not product_work(n):
            return "an empty product"
        return None if vals[0].dtype in (torch.float32, torch.float64) else f"products of {vals[0].dtype}"
    if n.target in MOVES:
        return moves.refusal(n)
    if not is_fusable(n):
        return "no loop-IR rule"
    return lowers(n)


def lowers(n: Node) -> str | None:
    """Why a pointwise or reducing call is no kernel, or None."""
    try:
        k, _ = lower([n], [n], bare=True)
    except NotFusable as e:
        return str(e)
    return _may_raise(k)


def is_known(n: Node) -> bool:
    """True if all sizes are numbers."""
    vals = [n.meta["val"], *(x.meta["val"] for x in n.all_input_nodes)]
    return all(isinstance(v, Val) and not any(isinstance(s, Dim) for s in v.shape) for v in vals)


def _may_raise(k: Kernel) -> str | None:
    """Integer division: ATen raises for a zero."""
    for i, x in enumerate(k.body):
        if (
            isinstance(x, Apply)
            and x.op in ("floordiv", "rem", "truncdiv", "fmod")
            and not k.types[i][1].is_floating_point
        ):
            divisor = k.body[x.args[1]]
            if not isinstance(divisor, Const) or divisor.value == 0:
                return "an integer division, whose divisor may be zero"
    return None


# ---- preparing a graph ----

MAX_SPLITS = 16
MAX_FACTORS = 3  # of an axis of the left factor of a product, in the prelude
LANES = 8
TURNED = 32  # rows, columns and terms of a product from which blocks of a transposed right factor are turned one by one

# turned(x, shape): a copy of transposed matrices in their own order, in this shape.
turned = Op("turned")
OWN[turned] = lambda val, shape: dataclasses.replace(val, shape=tuple(shape))


def prepare(
    graph: Graph, takes: Callable[[Node, Node], object] | None = None, moves: Collection = MOVES
) -> Graph:
    """The graph with each output a value of its own, products of factors that an emitter `takes`, and the rest as kernels.

    That emitter is the prelude's if it is None, which has its own copies of transposed matrices."""
    b = Builder(None)
    turn, takes = takes is None, takes or form
    copy = Copies(b, turn)

    def in_order(x):
        if isinstance(x, Value):
            return x if dense(x.node) else copy(x)
        return type(x)(map(in_order, x)) if isinstance(x, (list, tuple)) else x

    def call(op: Op, args: tuple, kwargs: dict):
        if op in (map_, scan):
            return b.emit(op, (args[0], *map(in_order, args[1:])), kwargs)
        if op in moves:
            return b.emit(op, tuple(map(in_order, args)), kwargs)
        if turn and (op in POINTWISE or op in REDUCING):
            args = tuple(copy(x) if isinstance(x, Value) and _is_turned_product(x.node) else x for x in args)
        if op not in PRODUCTS:
            return b.emit(op, args, kwargs)
        x, y = args
        if x.shape[-1] == 1:
            return b.emit(aten.mul.Tensor, (x, y))
        if turn and _is_by_columns(x.node, y.node):
            return b.emit(op, (y.mT, x.mT)).mT
        ways = ((x, y), (x, copy(y)), (copy(x), y), (copy(x), copy(y)))
        found = next(((v, w) for v, w in ways if takes(v.node, w.node)), None)
        if found is None:
            raise NotFusable("a product whose factors are read in no order, as one of no terms")
        return b.emit(op, found)

    outs = b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call)
    final: list[Value] = []
    for x in outs:
        own = (
            x.node.op == "call_function" and not is_free(x.node) and all(x.node is not y.node for y in final)
        )
        final.append(x if own else copy(x, again=True))
    return fuse(b.finish(final), alone=True)


class Copies:
    """Copies of views in their own order; a chain of views that is no affine map of one value is copied on the way.

    With `turn` transposed matrices are copied by an op of ours, in a graph that is surely C++."""

    def __init__(self, b: Builder, turn: bool):
        self.b, self.turn = b, turn
        self.made: dict[Node, Value] = {}

    def __call__(self, x: Value, again: bool = False) -> Value:
        """A copy, the same as before unless `again`."""
        if again or x.node not in self.made:
            self.made[x.node] = self._copy(x)
        return self.made[x.node]

    def _copy(self, x: Value) -> Value:
        source = reshaped(x.node)
        if self.turn and is_turned(source):
            return self.b.emit(turned, (Value(source, self.b), list(x.shape)))
        out = self.b.emit(aten._to_copy.default, (x,), {"dtype": x.dtype})
        if x.node.target not in VIEWS or lowers(out.node) is None:
            return out
        source = self(Value(x.node.args[0], self.b))
        return self(self.b.emit(x.node.target, (source, *x.node.args[1:]), dict(x.node.kwargs)))


def affine(graph: Graph) -> Graph:
    """The graph with copies of views that calls cannot read in place."""
    b = Builder(None)
    copy = Copies(b, turn=False)

    def call(op: Op, args: tuple, kwargs: dict):
        if op is scan:
            return b.emit(op, (affine(args[0]), *args[1:]), kwargs)
        out = b.emit(op, args, kwargs)
        if (
            isinstance(out, Value)
            and is_known(out.node)
            and is_fusable(out.node)
            and lowers(out.node) is not None
        ):
            args = tuple(copy(x) if isinstance(x, Value) and x.node.target in VIEWS else x for x in args)
            return b.emit(op, args, kwargs)
        return out

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def strides(node: Node) -> tuple[Node, int, tuple[int, ...]] | None:
    """What a chain of views reads, as an offset and strides into a dense value; None if they are not affine."""
    try:
        source, flat = _followed(node, Space.of(node.meta["val"].shape))
    except (NotFusable, Split):
        return None
    if _is_computed(source) or any(c < 0 for c in flat.coefs):
        return None
    return source, flat.offset, flat.coefs


Factors = tuple[tuple[int, int], ...]  # (size, step) of each part of an axis, the last innermost


def factors(node: Node) -> tuple[Node, int, tuple[Factors, ...]] | None:
    """`strides`, also where it takes several steps to walk an axis, or steps backward."""
    space = Space.of(node.meta["val"].shape)
    for _ in range(MAX_SPLITS):
        try:
            source, flat = _followed(node, space)
        except NotFusable:
            return None
        except Split as split:
            space = space.split(split.axis, split.inner)
            continue
        steps = iter(flat.coefs)
        parts = tuple(_merged([(n, next(steps)) for n in f]) for f in space.factors)
        return None if _is_computed(source) else (source, flat.offset, parts)
    return None


def _followed(node: Node, space: Space) -> tuple[Node, Affine]:
    """What a chain of views reads, and where."""
    m = space.root()
    while (source := reshaped(node)).target in VIEWS:
        m, node = pull(space, node, m), node.args[0]
    return source, space.flat(m, node.meta["val"].shape)


def _is_computed(node: Node) -> bool:
    """True for a constant, which lies nowhere."""
    return node.op == "call_function" and is_constant(node)


def _merged(parts: list[tuple[int, int]]) -> Factors:
    """The parts of an axis, those that one step walks as one."""
    out: list[tuple[int, int]] = []
    for n, step in parts:
        if n == 1:
            continue
        if out and out[-1][1] == step * n:
            out[-1] = (out[-1][0] * n, step)
        else:
            out.append((n, step))
    return tuple(out or [(1, 0)])


def is_turned(node: Node) -> bool:
    """True for matrices that lie in memory as their transposes do."""
    val, found = node.meta["val"], strides(node)
    if found is None or val.ndim not in (2, 3) or val.dtype not in (torch.float32, torch.float64):
        return False
    return min(val.shape[-2:]) > 1 and found[2][-2] == 1 and found[2][-1] >= val.shape[-2]


def _is_turned_product(node: Node) -> bool:
    """True for a transposed product that fills vectors: a copy costs less than reads in steps."""
    turned_ = reshaped(node)
    product = base(turned_).target in PRODUCTS and turned_.op == "call_function"
    return product and is_turned(turned_) and min(turned_.meta["val"].shape[-2:]) >= LANES


def dense(node: Node) -> bool:
    """True for a value that lies in memory in its own order."""
    found, step = strides(node), 1
    if found is None:
        return False
    for n, s in zip(reversed(node.meta["val"].shape), reversed(found[2]), strict=True):
        if n != 1 and s != step:
            return False
        step *= n
    return True


def form(x: Node, y: Node) -> str | None:
    """How a product is computed: "mm" (the right factor in order, or turned on the way if many rows read it) or "dots", of the
    transposed ones if it has one column, "windows"; None: it is not."""
    a, b = strides(x), strides(y)
    if a is None or b is None:
        return _windowed(x, y)
    rows, columns = x.meta["val"].shape[-2], y.meta["val"].shape[-1]
    (a_row, a_k), (b_k, b_column) = a[2][-2:], b[2][-2:]
    if columns == 1:  # (y' x')'
        rows, columns, a_k, b_k, b_column = 1, rows, b_k, a_k, a_row
    if columns == 1 or b_column == 1:
        return "mm"
    if b_k == 1 and min(rows, columns, x.meta["val"].shape[-1]) >= TURNED:
        return "mm"
    return "dots" if b_k == 1 and a_k == 1 and rows <= 2 else None


def _is_by_columns(x: Node, y: Node) -> bool:
    """True for x y that is better (y' x')': turning x and the result is less than turning y."""
    a, b = strides(x), strides(y)
    if a is None or b is None or form(x, y) != "mm":
        return False
    rows, terms = x.meta["val"].shape[-2:]
    columns = y.meta["val"].shape[-1]
    is_transposed = b[2][-1] != 1 and b[2][-2] == 1 and a[2][-1] == 1
    return is_transposed and TURNED <= rows and 2 * rows <= columns and 4 * rows <= terms


def _windowed(x: Node, y: Node) -> str | None:
    """How a product is computed whose left factor no two strides describe."""
    a, b = factors(x), strides(y)
    if (
        a is None
        or b is None
        or any(len(f) > MAX_FACTORS for f in a[2])
        or any(len(f) > 1 for f in a[2][:-2])
    ):
        return None
    return "windows" if b[2][-1] == 1 or y.meta["val"].shape[-1] == 1 else None
