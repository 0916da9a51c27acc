"""A graph as the C++ emitter takes it. Entry points: `refusal` (why a call is no C++), `prepare`, `affine`, `strides`.

Calls become kernels of the loop IR, products and moves; what they read is a dense value or an affine view of one.
"""

from __future__ import annotations

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

from . import moves
from .cost import product_work
from .fuse import fuse
from .index import VIEWS, NotFusable, Space, Split, pull, reshaped
from .loops import Apply, Const, Kernel
from .lower import DTYPES, is_constant, is_free, is_fusable, lower
from .moves import MOVES
from .rows import PRODUCTS

aten = torch.ops.aten

# ---- what can be lowered ----


def refusal(n: Node) -> str | None:
    """Why a call cannot be C++, or None."""
    vals = [n.meta["val"], *(x.meta["val"] for x in n.all_input_nodes)]
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

# turned(x): a copy of transposed matrices in their own order.
turned = Op("turned")
OWN[turned] = lambda val: val


def prepare(graph: Graph) -> Graph:
    """The graph with products as the prelude takes them, each output a value of its own, and the rest as kernels."""
    b = Builder(None)
    copy = Copies(b)

    def in_order(x):
        if isinstance(x, Value):
            return x if dense(x.node) else copy(x)
        return type(x)(map(in_order, x)) if isinstance(x, (list, tuple)) else x

    def call(op: Op, args: tuple, kwargs: dict):
        if op in (map_, scan):
            return b.emit(op, (args[0], *map(in_order, args[1:])), kwargs)
        if op in MOVES:
            return b.emit(op, tuple(map(in_order, args)), kwargs)
        if op not in PRODUCTS:
            return b.emit(op, args, kwargs)
        x, y = args
        if x.shape[-1] == 1:
            return b.emit(aten.mul.Tensor, (x, y))
        ways = ((x, y), (x, copy(y)), (copy(x), y), (copy(x), copy(y)))
        return b.emit(op, next((v, w) for v, w in ways if form(v.node, w.node)))

    outs = b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call)
    final: list[Value] = []
    for x in outs:
        own = (
            x.node.op == "call_function" and not is_free(x.node) and all(x.node is not y.node for y in final)
        )
        final.append(x if own else copy(x, again=True))
    return fuse(b.finish(final), alone=True)


class Copies:
    """Copies of views in their own order; a chain of views that is no affine map of one value is copied on the way."""

    def __init__(self, b: Builder):
        self.b = b
        self.made: dict[Node, Value] = {}

    def __call__(self, x: Value, again: bool = False) -> Value:
        """A copy, the same as before unless `again`."""
        if again or x.node not in self.made:
            self.made[x.node] = self._copy(x)
        return self.made[x.node]

    def _copy(self, x: Value) -> Value:
        if is_turned(x.node):
            return self.b.emit(turned, (x,))
        out = self.b.emit(aten._to_copy.default, (x,), {"dtype": x.dtype})
        if x.node.target not in VIEWS or lowers(out.node) is None:
            return out
        source = self(Value(x.node.args[0], self.b))
        return self(self.b.emit(x.node.target, (source, *x.node.args[1:]), dict(x.node.kwargs)))


def affine(graph: Graph) -> Graph:
    """The graph with copies of views that calls cannot read in place."""
    b = Builder(None)
    copy = Copies(b)

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
    space = Space.of(node.meta["val"].shape)
    m = space.root()
    try:
        while (source := reshaped(node)).target in VIEWS:
            m, node = pull(space, node, m), node.args[0]
    except (NotFusable, Split):
        return None
    flat, node = space.flat(m, node.meta["val"].shape), source
    if node.op == "call_function" and is_constant(node) or any(c < 0 for c in flat.coefs):
        return None
    return node, flat.offset, flat.coefs


def is_turned(node: Node) -> bool:
    """True for matrices that lie in memory as their transposes do."""
    val, found = node.meta["val"], strides(node)
    if found is None or val.ndim not in (2, 3) or val.dtype not in (torch.float32, torch.float64):
        return False
    return min(val.shape[-2:]) > 1 and found[2][-2] == 1 and found[2][-1] >= val.shape[-2]


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
    """How a product is computed: "mm" or "dots", of the transposed ones if it has one column; None: not as they are."""
    a, b = strides(x), strides(y)
    if a is None or b is None:
        return None
    rows, columns = x.meta["val"].shape[-2], y.meta["val"].shape[-1]
    (a_row, a_k), (b_k, b_column) = a[2][-2:], b[2][-2:]
    if columns == 1:  # (y' x')'
        rows, columns, a_k, b_k, b_column = 1, rows, b_k, a_k, a_row
    if columns == 1 or b_column == 1:
        return "mm"
    return "dots" if b_k == 1 and a_k == 1 and rows <= 2 else None
