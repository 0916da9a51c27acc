"""A group of graph nodes -> one loop-IR kernel. Entry points: `lower` (raises `NotFusable`), `is_fusable`, `base`.

From each output the index map is followed backward: a view changes the map, an elementwise op passes it on, a call that moves
values chooses between maps or computes one (reads.py), a value from outside of the group is loaded through it. Views and
constants are free, so no node of the group stands for them.
Each member is computed once: at one map, in one kernel (what is compared with something derived from it keeps its bits).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim, Size, numel
from fxfunc.passes.graph import Op, Val, constant
from fxfunc.passes.infer import OWN

from .axes import axes, is_product, reads_along
from .expr import Body, Expr
from .index import (
    VIEWS,
    Affine,
    Map,
    NotFusable,
    Space,
    Split,
    broadcast_map,
    pull,
    push,
    reshaped,
)
from .loops import Arg, Dot, Index, Instr, Iota, Kernel, Load, Pick, Reduce, Store, broadcast, verify
from .reads import READS
from .rows import EXPENSIVE, POINTWISE, PRODUCTS, REDUCING, Row

aten = torch.ops.aten

# chunked(x, dim, chunk, fill): `dim` as two, the inner of size `chunk`, filled up at the end; exists only inside of kernels.
chunked = Op("chunked")

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
          torch.int8, torch.int16, torch.int32, torch.int64}  # fmt: skip
MAX_SPLITS, MAX_ARGS = 16, 64


def _chunked_val(val: Val, dim: int, chunk: int, fill: float) -> Val:
    return Val(
        (*val.shape[:dim], (val.shape[dim] + (chunk - 1)) // chunk, chunk, *val.shape[dim + 1 :]),
        val.dtype,
        val.device,
    )


OWN[chunked] = _chunked_val


def is_fusable(node: Node) -> bool:
    """True for a pointwise or reducing call on dtypes and devices that a kernel takes."""
    known = node.target in POINTWISE or node.target in REDUCING
    return known and _has_values(node) and (node.target in POINTWISE or reduced_dims(node) != ())


def moves_values(node: Node) -> bool:
    """True for a call that only moves values, on dtypes and devices that a kernel takes."""
    return node.target in READS and _has_values(node)


def may_be_taken(node: Node) -> bool:
    """True for products of matrices and moves, which are in kernels where that is worth it."""
    return node.target in PRODUCTS or moves_values(node)


def _has_values(node: Node) -> bool:
    """True if dtypes and devices are those that a kernel takes."""
    vals = [node.meta["val"], *(x.meta["val"] for x in node.all_input_nodes)]
    return all(isinstance(v, Val) and v.dtype in DTYPES for v in vals) and len({v.device for v in vals}) == 1


def is_free(node: Node) -> bool:
    """True for views and constants: a kernel that reads one computes it where it is read."""
    return node.target is chunked or node.target in VIEWS or is_constant(node)


def is_constant(node: Node) -> bool:
    """True for tensors whose elements follow from their position."""
    if node.target is constant:
        return node.args[0].tensor.numel() == 1 and node.meta["val"].dtype in DTYPES
    return node.target in CONSTANTS and node.meta["val"].dtype in DTYPES


def base(node: Node) -> Node:
    """What a chain of views views."""
    while node.op == "call_function" and (node.target in VIEWS or node.target is chunked):
        node = node.args[0]
    return node


def reduced_dims(node: Node) -> tuple[int, ...]:
    """The dims that a reducing call reduces, sorted; none given means all."""
    ndim = node.args[0].meta["val"].ndim
    dims = node.args[1] if len(node.args) > 1 and not isinstance(node.args[1], torch.dtype) else None
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(sorted({d % ndim for d in dims})) if dims and ndim else tuple(range(ndim))


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ATen computes a result of this dtype."""
    return {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.int32}.get(
        dtype, dtype
    )


def promoted(args: Sequence) -> torch.dtype:
    """What one or two operands promote to."""
    stand_ins = [torch.empty((1,) * min(a.meta["val"].ndim, 1), dtype=a.meta["val"].dtype, device="meta") if isinstance(a, Node)
                 else 1 if isinstance(a, Dim) else a for a in args]  # fmt: skip
    return torch.result_type(stand_ins[0], stand_ins[-1])


# ---- constants: f(lowering, map, *args) -> Expr ----


def _filled(low: _Lowering, node: Node, m: Map, fill: float) -> Expr:
    return low.body.const(fill, node.meta["val"].dtype)


def _arange(low: _Lowering, node: Node, m: Map, start: float, step: float = 1) -> Expr:
    dtype = node.meta["val"].dtype
    if isinstance(start, float) or isinstance(step, float):
        return (low.iota(m[0]).cast(opmath(dtype)) * step + start).cast(dtype)
    return low.iota((m[0] * step).shifted(start)).cast(dtype)


CONSTANTS: dict[object, Callable[..., Expr]] = {
    aten.full.default: lambda low, n, m, size, fill, **_: _filled(low, n, m, fill),
    aten.full_like.default: lambda low, n, m, x, fill, **_: _filled(low, n, m, fill),
    aten.scalar_tensor.default: lambda low, n, m, fill, **_: _filled(low, n, m, fill),
    **{
        op: lambda low, n, m, *_, **__: _filled(low, n, m, 0)
        for op in (aten.zeros.default, aten.zeros_like.default)
    },
    **{
        op: lambda low, n, m, *_, **__: _filled(low, n, m, 1)
        for op in (aten.ones.default, aten.ones_like.default)
    },
    aten.arange.default: lambda low, n, m, end, **_: _arange(low, n, m, 0),
    aten.arange.start: lambda low, n, m, start, end, **_: _arange(low, n, m, start),
    aten.arange.start_step: lambda low, n, m, start, end, step=1, **_: _arange(low, n, m, start, step),
}


# ---- groups ----


def lower(
    members: Sequence[Node], outputs: Sequence[Node], name: str = "kernel", bare: bool = False
) -> tuple[Kernel, tuple[Node, ...]]:
    """The kernel that computes `outputs` of these nodes (in order of the graph), and the nodes it reads: none only if `bare`."""
    space = _root_space(members, outputs)
    for _ in range(MAX_SPLITS):
        try:
            return _Lowering(space, members, outputs).run(name, bare)
        except Split as split:
            space = space.split(split.axis, split.inner)
    raise NotFusable("too many splits")


def _root_space(members: Sequence[Node], outputs: Sequence[Node]) -> Space:
    root = _root(members)
    if root is None:
        return Space.of(outputs[-1].meta["val"].shape)
    if root.target in PRODUCTS:
        shape = root.meta["val"].shape
        return Space.of((*shape, root.args[0].meta["val"].shape[-1]), (len(shape),))
    return Space.of(root.args[0].meta["val"].shape, reduced_dims(root))


def _root(members: Iterable[Node]) -> Node | None:
    """The call that gives a kernel its index space: its first reduction, or product."""
    found = [n for n in members if n.target in REDUCING or n.target in PRODUCTS]
    if len({n.target in PRODUCTS for n in found}) > 1:
        raise NotFusable("a product and a reduction")
    return found[0] if found else None


class _Lowering:
    """Lowers one group over one space."""

    def __init__(self, space: Space, members: Sequence[Node], outputs: Sequence[Node]):
        self.space, self.members, self.outputs = space, dict.fromkeys(members), dict.fromkeys(outputs)
        self.grid, self.tile = space.axes
        self.tile_sizes = tuple(space.sizes[a] for a in self.tile)
        self.body = Body(self.tile_sizes)
        self.root = space.root()
        self.operands: dict[Node, int] = {}
        self.computed: dict[Node, tuple] = {}
        self.memo: dict[tuple, Expr] = {}
        self.shapes: dict[int, tuple[Size, ...]] = {}

    def run(self, name: str, bare: bool) -> tuple[Kernel, tuple[Node, ...]]:
        """The kernel and its operands, or `NotFusable`."""
        maps = _Maps(self).learn()
        if missing := [n for n in self.outputs if n not in maps]:
            if any(n.target in PRODUCTS for n in missing):
                raise NotFusable("a product of other sizes")
            other = any(n.target in REDUCING for n in missing)
            raise NotFusable("a reduction over other axes" if other else f"{missing}: another index space")
        values = {n: self.value(n, maps[n]) for n in self.outputs}
        if not (0 if bare else 1) <= len(self.operands) <= MAX_ARGS - len(values):
            raise NotFusable("the number of arguments")
        args = [_arg(n, f"{n.name}_ptr") for n in self.operands] + [
            _arg(n, f"{n.name}_out", True) for n in values
        ]
        stores = [
            self.store(len(self.operands) + j, n, x, maps[n]) for j, (n, x) in enumerate(values.items())
        ]
        grid = tuple(self.space.sizes[a] for a in self.grid)
        kernel = verify(collapse(Kernel(grid, tuple(args), self.body.finish(stores), name)))
        if is_product(kernel):
            _check_product(kernel)
        return kernel, tuple(self.operands)

    # -- values --

    def value(self, node: Node, m: Map, guard: Expr | None = None) -> Expr:
        """The element of `node` at a map, in the node's dtype; loads happen only where the guard holds."""
        key = (node, m, guard.i if guard else None)
        if key not in self.memo:
            self.memo[key] = self._value(node, m, guard)
        return self.memo[key]

    def _value(self, node: Node, m: Map, guard: Expr | None) -> Expr:
        if node in self.members:
            return self._member(node, m, guard)
        if node.op != "call_function" or not is_free(node):
            return self._load(node, m, guard)
        if node.target is chunked:
            return self._chunk(node, m, guard)
        if node.target is constant:
            return self.body.const(node.args[0].tensor.item(), node.meta["val"].dtype)
        if node.target in CONSTANTS:
            return CONSTANTS[node.target](self, node, m, *node.args, **node.kwargs)
        source = reshaped(node)
        if source not in self.members and (source.op != "call_function" or not is_free(source)):
            return self._load(source, m, guard, node.meta["val"].shape)
        return self.value(node.args[0], pull(self.space, node, m), guard)

    def _member(self, node: Node, m: Map, guard: Expr | None) -> Expr:
        at = (m, guard.i if guard else None)
        if self.computed.setdefault(node, at) != at:
            raise NotFusable(f"{node} would be computed twice")
        if node.target in PRODUCTS:
            return self._product(node, m, guard)
        if node.target in READS:
            with self._line_of(node):
                out = READS[node.target](self, node, m, guard, *node.args, **node.kwargs)
            self.body.name(out, node.name)
            return out
        row = POINTWISE.get(node.target) or REDUCING[node.target]
        compute = self._compute_dtype(row, node)
        args = (
            self._reduced_operand(node, m, guard, compute)
            if node.target in REDUCING
            else self._operands(node, m, guard, row, compute)
        )
        kwargs, before = {} if node.target in REDUCING else node.kwargs, len(self.body.instrs)
        with self._line_of(node):
            out = row.f(*args, **kwargs).cast(node.meta["val"].dtype)
        self._refuse_repeated(node, m, self.body.instrs[before:])
        self.body.name(out, node.name)
        return out

    @contextlib.contextmanager
    def _line_of(self, node: Node) -> Iterator[None]:
        """What is emitted is of the node's line."""
        outer, self.body.source = self.body.source, node.meta.get("source") or ""
        yield
        self.body.source = outer

    def _product(self, node: Node, m: Map, guard: Expr | None) -> Expr:
        """An element of a product of matrices; with one row or column, or one term, it needs no `Dot`."""
        x, y = node.args
        *batch, row, column = m
        n, terms = x.meta["val"].shape[-1], self.root[-1]
        if guard is not None or any(a.uses(self.tile) for a in m) or n != numel(self.tile_sizes):
            raise NotFusable("a product of other sizes")
        a, b = self.value(x, (*batch, row, terms)), self.value(y, (*batch, terms, column))
        dtype = node.meta["val"].dtype
        wide = opmath(dtype)
        with self._line_of(node):
            if n == 1:
                out = a.cast(wide) * b.cast(wide)
            elif 1 in node.meta["val"].shape[-2:]:
                out = (a.cast(wide) * b.cast(wide)).reduce("sum")
            else:
                turned = any(c != 0 and self.root[-2].coefs[i] != 0 for i, c in enumerate(row.coefs))
                out = b.dot(a, wide) if turned else a.dot(b, wide)  # rows are those of the root
            out = out.cast(dtype)
        self.body.name(out, node.name)
        return out

    def _compute_dtype(self, row: Row, node: Node) -> torch.dtype | None:
        dtype = node.meta["val"].dtype
        if row.compute == "operands":
            return opmath(promoted(node.args))
        return {"result": opmath(dtype), "exact": dtype, "bool": torch.bool, "as_is": None}[row.compute]

    def _operands(
        self, node: Node, m: Map, guard: Expr | None, row: Row, compute: torch.dtype | None
    ) -> list:
        out: list = []
        for i, a in enumerate(node.args):
            dtype = torch.bool if i == row.mask else compute
            if isinstance(a, Node):
                x = self.value(a, broadcast_map(self.space, m, node.meta["val"], a.meta["val"]), guard)
                out.append(x.cast(dtype) if dtype else x)
            else:
                number = isinstance(a, (int, float, bool, Dim)) and dtype is not None
                out.append(self.body.const(a, dtype) if number else a)
        return out

    def _reduced_operand(self, node: Node, m: Map, guard: Expr | None, compute: torch.dtype | None) -> list:
        dims, shape = reduced_dims(node), node.args[0].meta["val"].shape
        if any(a.uses(self.tile) for a in m) or [shape[d] for d in dims] != [
            numel(self.space.factors[d]) for d in self.space.reduced
        ]:
            raise NotFusable("a reduction over other axes")
        kept = iter(
            m if node.meta["val"].ndim < len(shape) else [a for d, a in enumerate(m) if d not in dims]
        )
        tiles = iter(self.root[d] for d in self.space.reduced)
        inner = tuple(next(tiles) if d in dims else next(kept) for d in range(len(shape)))
        x = self.value(node.args[0], inner, guard)
        return [x.cast(compute) if compute else x, numel(shape[d] for d in dims)]

    def _refuse_repeated(self, node: Node, m: Map, instrs: list[Instr]) -> None:
        """Costly work is not repeated along a grid axis that the node is broadcast over."""
        missing = any(self.space.sizes[a] != 1 and not any(x.coefs[a] != 0 for x in m) for a in self.grid)
        if (
            missing
            and numel(node.meta["val"].shape) != 1
            and any(getattr(i, "op", None) in EXPENSIVE for i in instrs)
        ):
            raise NotFusable(f"{node} would be computed again for each element it is broadcast to")

    def _chunk(self, node: Node, m: Map, guard: Expr | None) -> Expr:
        x, dim, chunk, fill = node.args
        n, position = x.meta["val"].shape[dim], m[dim] * chunk + m[dim + 1]
        inner = (*m[:dim], position, *m[dim + 2 :])
        if n == node.meta["val"].shape[dim] * chunk:
            return self.value(x, inner, guard)
        inside = self.iota(position) < n
        return inside.where(self.value(x, inner, inside if guard is None else guard & inside), fill)

    # -- accesses --

    def picked(self, node: Node, places: Sequence[Affine | Expr], guard: Expr | None) -> Expr:
        """The element of a value at places, some of which are computed."""
        source, shape = reshaped(node), node.meta["val"].shape
        if source in self.members or (source.op == "call_function" and is_free(source)):
            raise NotFusable(f"{node} is indexed, which the kernel computes or views")
        m = tuple(self.space.zero() if isinstance(a, Expr) else a for a in places)
        picks = tuple(
            Pick(a.i, numel(shape[d + 1 :]), shape[d]) for d, a in enumerate(places) if isinstance(a, Expr)
        )
        return self._load(source, m, guard, shape, picks)

    def _load(
        self,
        node: Node,
        m: Map,
        guard: Expr | None,
        shape: tuple[Size, ...] | None = None,
        picks: tuple[Pick, ...] = (),
    ) -> Expr:
        """The element that a map of the node reads, or of the node in another shape."""
        arg = self.operands.setdefault(node, len(self.operands))
        val = node.meta["val"]
        if val.dtype not in DTYPES:
            raise NotFusable(f"{node} is {val.dtype}")
        index, shape = self.index(self.space.flat(m, val.shape if shape is None else shape))
        others = [*([] if guard is None else [guard.i]), *(p.value for p in picks)]
        shape = broadcast([shape, *map(self._shape, others)])
        out = self.body.emit(Load(arg, index, shape, guard.i if guard else None, picks), val.dtype)
        self.body.name(out, node.name)
        return out

    def _shape(self, i: int) -> tuple[Size, ...]:
        if i not in self.shapes:
            self.shapes[i] = self._shape_of(self.body.instrs[i])
        return self.shapes[i]

    def _shape_of(self, instr: Instr) -> tuple[Size, ...]:
        if isinstance(instr, (Reduce, Dot)):
            return (1,) * len(instr.shape)
        return (
            instr.shape
            if isinstance(instr, (Load, Iota))
            else broadcast([self._shape(j) for j in instr.inputs])
        )

    def iota(self, position: Affine) -> Expr:
        """An index as a value."""
        return self.body.emit(Iota(*self.index(position)), torch.int64)

    def store(self, arg: int, node: Node, x: Expr, m: Map) -> Store:
        """The instruction that writes an output."""
        index, shape = self.index(self.space.flat(m, node.meta["val"].shape))
        return Store(arg, index, x.i, shape)

    def index(self, flat: Affine) -> tuple[Index, tuple[Size, ...]]:
        """An affine map as an index, with the shape of the tile it spans."""
        shape = tuple(self.space.sizes[a] if flat.coefs[a] != 0 else 1 for a in self.tile)
        return Index(
            flat.offset, tuple(flat.coefs[a] for a in self.grid), tuple(flat.coefs[a] for a in self.tile)
        ), shape


def _check_product(k: Kernel) -> None:
    """`NotFusable` if it has no rows or no columns, or computes something for each term behind the product."""
    if not (axes(k).rows and axes(k).columns):
        raise NotFusable("products of other sizes")
    along = reads_along(k)
    if any(-1 in along[i] for i, x in enumerate(k.body) if isinstance(x, Store)):
        raise NotFusable("a result along the terms of a product")


def _arg(node: Node, name: str, output: bool = False) -> Arg:
    val = node.meta["val"]
    return Arg(val.shape, val.dtype, output, name)


class _Maps:
    """Finds a map for each output: from the root outward, to operands and to users, until nothing changes."""

    def __init__(self, low: _Lowering):
        self.low, self.space = low, low.space
        self.order = list(dict.fromkeys(x for n in low.members for x in (*_views_to(n), n)))
        self.known: dict[Node, Map] = {}

    def learn(self) -> dict[Node, Map]:
        """All maps found."""
        root = _root(self.low.members)
        if root is not None and root.target in PRODUCTS:
            self._set(root, self.low.root[:-1])
        else:
            self._set(root.args[0] if root else next(reversed(self.low.outputs)), self.low.root)
        count = -1
        while count != len(self.known):
            count = len(self.known)
            for n in reversed(self.order):
                if n in self.known:
                    self._to_operands(n, self.known[n])
            for n in self.order:
                if n not in self.known:
                    self._set(n, self._from_operands(n))
        return self.known

    def _set(self, node: Node, m: Map | None) -> None:
        if (
            m is not None
            and node not in self.known
            and (node not in self.low.outputs or self._whole(node, m))
        ):
            self.known[node] = m

    def _whole(self, node: Node, m: Map) -> bool:
        """True if the map visits each element once: all grid axes, and all tile axes or none."""
        sizes = self.space.sizes
        used = {a for a in range(len(sizes)) if any(x.coefs[a] != 0 for x in m)}
        tile = {a for a in self.low.tile if sizes[a] != 1}
        needed = {a for a in self.low.grid if sizes[a] != 1}
        return used in (needed, needed | tile) and numel(sizes[a] for a in used) == numel(
            node.meta["val"].shape
        )

    def _to_operands(self, node: Node, m: Map) -> None:
        if node in self.low.members and node.target in POINTWISE:
            for x in node.all_input_nodes:
                self._set(x, broadcast_map(self.space, m, node.meta["val"], x.meta["val"]))
        elif node in self.low.members:
            return
        elif node.target is aten.unfold.default:
            return  # windows overlap, or leave some out
        elif node.target in VIEWS:
            try:
                self._set(node.args[0], pull(self.space, node, m))
            except NotFusable:
                return  # a dense value outside of the group is read all the same

    def _from_operands(self, node: Node) -> Map | None:
        x, shape = node.args[0] if node.args else None, node.meta["val"].shape
        if node not in self.low.members:
            return push(self.space, node, self.known[x]) if node.target in VIEWS and x in self.known else None
        if node.target in REDUCING:
            return self._of_reduction(node, self.known[x]) if x in self.known else None
        if node.target in PRODUCTS:
            same = (*shape, x.meta["val"].shape[-1]) == self._root_shape()
            return self.low.root[:-1] if same and self.space.reduced == (len(shape),) else None
        for operand in node.all_input_nodes:
            if operand in self.known and operand.meta["val"].shape == shape:
                return self.known[operand]
        if (
            self.low.tile
            and any(x in self.known for x in node.all_input_nodes)
            and shape == self._root_shape()
        ):
            return self.low.root
        return None

    def _of_reduction(self, node: Node, m: Map) -> Map | None:
        dims, tiles = reduced_dims(node), [self.low.root[d] for d in self.space.reduced]
        if [m[d] for d in dims] != tiles or any(
            a.uses(self.low.tile) for d, a in enumerate(m) if d not in dims
        ):
            return None
        if node.meta["val"].ndim == len(m):
            return tuple(self.space.zero() if d in dims else a for d, a in enumerate(m))
        return tuple(a for d, a in enumerate(m) if d not in dims)

    def _root_shape(self) -> tuple[Size, ...]:
        return tuple(numel(f) for f in self.space.factors)


def _views_to(node: Node) -> list[Node]:
    """The views between a node and what it reads, first those nearest to the source."""
    out: list[Node] = []
    for x in node.all_input_nodes:
        chain = []
        while x.op == "call_function" and x.target in VIEWS:
            chain.append(x)
            x = x.args[0]
        out += reversed(chain)
    return out


# ---- axes that every access walks as one ----


def collapse(k: Kernel) -> Kernel:
    """The kernel with neighbouring axes merged where each access allows it, and axes of size 1 dropped."""
    indexes = [x.index for x in k.body if isinstance(x, (Load, Iota, Store))]
    tile = next((x.shape for x in k.body if isinstance(x, (Reduce, Dot))), ())
    grid_groups, tile_groups = (
        _runs(k.grid, [x.grid for x in indexes]),
        _runs(tile, [x.tile for x in indexes]),
    )
    body = tuple(_merged(x, grid_groups, tile_groups) for x in k.body)
    return dataclasses.replace(
        k, grid=tuple(numel(k.grid[a] for a in g) for g in grid_groups) or (1,), body=body
    )


def _runs(sizes: tuple[Size, ...], strides: list[tuple[Size, ...]]) -> list[list[int]]:
    groups: list[list[int]] = []
    for a, n in enumerate(sizes):
        if n == 1:
            continue
        if groups and all(s[groups[-1][-1]] == s[a] * n for s in strides):
            groups[-1].append(a)
        else:
            groups.append([a])
    return groups or ([[0]] if sizes else [])


def _merged(instr: Instr, grid: list[list[int]], tile: list[list[int]]) -> Instr:
    change: dict = {}
    if isinstance(instr, (Load, Iota, Store)):
        strides = tuple(instr.index.grid[g[-1]] for g in grid) or (0,)
        change["index"] = Index(instr.index.offset, strides, tuple(instr.index.tile[g[-1]] for g in tile))
    if isinstance(instr, (Load, Iota, Store, Reduce, Dot)):
        change["shape"] = tuple(numel(instr.shape[a] for a in g) for g in tile)
    if isinstance(instr, Reduce):
        change["axes"] = tuple(range(len(tile)))
    return dataclasses.replace(instr, **change) if change else instr
