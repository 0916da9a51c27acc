"""What becomes one kernel. Entry point: `fuse(graph)` -> the graph with each group as one `kernel` node.

A group is pointwise calls (views and constants are free) and reductions of one shape with what comes before and after them.
It is legal if it lowers (`lower`) and if the graph of groups stays acyclic. Every call is computed in exactly one place.
Groups of one call, convolutions and everything else stay ATen nodes. What is decided depends on shapes alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.fx import Node

from fxfunc.passes import errors
from fxfunc.passes.dims import Size, estimate, numel
from fxfunc.passes.graph import Graph, Op, Val, copied, getitem, subgraphs
from fxfunc.passes.infer import OWN
from fxfunc.passes.record import Builder, Value

from .explain import Row, kind, row
from .index import NotFusable
from .loops import Kernel, kernel, neutral
from .lower import base, chunked, is_free, is_fusable, lower, may_be_taken, opmath, reduced_dims
from .rows import TWO_PHASE

aten = torch.ops.aten

MAX_MEMBERS = 64
# A reduction is done in two phases if it has much to read and too few programs to read it with.
LARGE, LONG, FEW_PROGRAMS, WIDTH = 2**16, 512, 128, 64


def _kernel_vals(k: Kernel, *operands: Val) -> Val | tuple[Val, ...]:
    vals = tuple(Val(a.shape, a.dtype, operands[0].device) for a in k.outputs)
    return vals[0] if len(vals) == 1 else vals


OWN[kernel] = _kernel_vals


def fuse(
    graph: Graph,
    alone: bool = False,
    takes: Callable[[Node], bool] = lambda n: False,
    complete: bool = False,
) -> Graph:
    """The same program with groups of pointwise and reducing calls as `kernel` nodes; equal kernels are one object.

    A group of one call stays that call, unless `alone`, or `complete` where nothing but such calls is left: a program of kernels
    can be a CUDA graph. Products of matrices and moves that it `takes` are in groups too."""
    graph = split_large(graph)
    return _Fused(_Groups(graph, alone, takes, complete)).graph()


# ---- two-phase reductions ----


def split_large(graph: Graph) -> Graph:
    """The graph with each large reduction over few results as partial results over fixed chunks, then those reduced."""
    if not any(_is_large(n) for n in graph.nodes):
        return graph
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        x = args[0] if args and isinstance(args[0], Value) else None
        if x is None or op not in TWO_PHASE:
            return b.emit(op, args, kwargs)
        out = b.emit(op, args, kwargs)
        return _two_phase(b, out.node, x) if _is_large(out.node) else out

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _is_large(node: Node) -> bool:
    if node.target not in TWO_PHASE or not is_fusable(node):
        return False
    shape, dims = node.args[0].meta["val"].shape, reduced_dims(node)
    reduced = estimate(numel(shape[d] for d in dims))
    return reduced >= LONG and reduced * _rows(shape, dims) >= LARGE and _programs(shape, dims) < FEW_PROGRAMS


def _rows(shape: tuple[Size, ...], dims: tuple[int, ...]) -> int:
    return estimate(numel(s for d, s in enumerate(shape) if d not in dims))


def _programs(shape: tuple[Size, ...], dims: tuple[int, ...]) -> int:
    """About how many programs reduce it: one a row, or one for each `WIDTH` neighbouring columns."""
    rows = _rows(shape, dims)
    return rows if len(shape) - 1 in dims else -(-rows // WIDTH)


def _two_phase(b: Builder, node: Node, x: Value) -> Value:
    shape, dims, op = x.shape, reduced_dims(node), TWO_PHASE[node.target]
    dim = max(dims, key=lambda d: estimate(shape[d]))
    want = max(1, 2 * FEW_PROGRAMS // max(1, _programs(shape, dims)))
    chunk = min(8192, max(16, 2 ** (-(-estimate(shape[dim]) // want) - 1).bit_length()))
    acc = opmath(x.dtype) if x.dtype.is_floating_point else node.meta["val"].dtype
    count = (shape[dim] + (chunk - 1)) // chunk
    split = Val((*shape[:dim], count, chunk, *shape[dim + 1 :]), x.dtype, x.device)
    parts = _call(b, chunked, (x, dim, chunk, neutral(op, x.dtype)), {}, split)
    partial = _reduce(b, op, parts, [d + (d > dim) for d in dims if d != dim] + [dim + 1], acc)
    if not _lowers(partial.node):  # the chunks cut across a view
        return Value(node, b)
    total = _reduce(b, op, partial, [dim - sum(d < dim for d in dims)], acc)
    if node.target in (aten.mean.dim, aten.mean.default):
        total = b.emit(aten.div.Tensor, (total, numel(shape[d] for d in dims)))
    if node.meta["val"].ndim != total.ndim:
        total = b.emit(aten.reshape.default, (total, list(node.meta["val"].shape)))
        return b.emit(
            aten._to_copy.default, (total,), {"dtype": node.meta["val"].dtype}
        )  # a result is no view
    return total.to(node.meta["val"].dtype)


def _lowers(node: Node) -> bool:
    try:
        return bool(lower([node], [node]))
    except NotFusable:
        return False


def _reduce(b: Builder, op: str, x: Value, dims: list[int], acc: torch.dtype) -> Value:
    val = Val(
        tuple(s for d, s in enumerate(x.shape) if d not in dims), acc if op == "sum" else x.dtype, x.device
    )
    if op == "sum":
        return _call(b, aten.sum.dim_IntList, (x, sorted(dims), False), {"dtype": acc}, val)
    return _call(b, getattr(aten, op).default, (x, sorted(dims), False), {}, val)


def _call(b: Builder, op: object, args: tuple, kwargs: dict, val: Val) -> Value:
    """A call whose Val is given: the number of chunks is a size that `infer` does not fit."""
    name = "chunked" if op is chunked else "partial"
    node = b.fx.create_node("call_function", op, (args[0].node, *args[1:]), kwargs, name)
    node.meta.update(val=val, source=b.source, origin=b.origin)
    return Value(node, b)


# ---- groups ----


class _Groups:
    """The real calls of a graph (not views, not constants), partitioned; starts with groups of one and merges greedily."""

    def __init__(self, graph: Graph, alone: bool, takes: Callable[[Node], bool], complete: bool):
        self.graph = graph
        self.real = [n for n in (*graph.inputs, *graph.nodes) if n.op == "placeholder" or not is_free(n)]
        self.order = {n: i for i, n in enumerate(self.real)}
        self.deps = {n: _deps(n, self.order) for n in self.real}
        self.users: dict[Node, list[Node]] = {n: [] for n in self.real}
        for n, deps in self.deps.items():
            for d in deps:
                self.users[d].append(n)
        self.returned = {base(n) for n in graph.outputs if n is not None}
        self.group: dict[Node, tuple[Node, ...]] = {n: (n,) for n in self.real}
        self.fusable = {
            n
            for n in self.real
            if n.op == "call_function" and (is_fusable(n) or (may_be_taken(n) and takes(n)))
        }
        self.cuts: dict[tuple[Node, Node], str] = {}  # why a call is not in the kernel of one that it reads
        self.lowered: dict[Node, tuple[Kernel, tuple[Node, ...], list[Node]]] = {}
        for n in self.real:
            if n in self.fusable:
                self._grow(n)
        self._lower_rest(alone or (complete and self._could_be_complete()))

    def _grow(self, n: Node) -> None:
        for d in sorted(self.deps[n], key=self.order.__getitem__, reverse=True):
            if d not in self.fusable and d.op == "call_function":
                self.cuts[d, n] = kind(d)
            elif (
                d in self.fusable
                and self.group[d] is not self.group[n]
                and (why := self._merge(self.group[d], self.group[n]))
            ):
                self.cuts[d, n] = why

    def _merge(self, a: tuple[Node, ...], b: tuple[Node, ...]) -> str | None:
        """Make one group of `a` and `b`, which reads from `a`, or say why that is not legal."""
        if len(a) + len(b) > MAX_MEMBERS:
            return f"more than {MAX_MEMBERS} calls"
        if self._path_outside(a, b):
            return "a call between them is in another kernel"
        members = tuple(sorted(a + b, key=self.order.__getitem__))
        outputs = self._outputs(members)
        try:
            found = lower(members, outputs, _name(members))
        except NotFusable as e:
            return str(e)
        for n in members:
            self.group[n] = members
        self.lowered[members[0]] = (*found, outputs)
        return None

    def rows(self, group: Sequence[Node]) -> tuple[Row, ...]:
        """What a kernel is made of, each call with why it is cut from those that it reads elsewhere."""
        return tuple(
            row(n, why="; ".join(f"{d}: {self.cuts[d, n]}" for d in self.deps[n] if (d, n) in self.cuts))
            for n in group
        )

    def _outputs(self, members: Sequence[Node]) -> list[Node]:
        inside = set(members)
        return [n for n in members if n in self.returned or any(u not in inside for u in self.users[n])]

    def _path_outside(self, a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
        """True if a value of `a` reaches `b` through another group, so that merging them would make a cycle."""
        last, targets, seen = self.order[b[-1]], set(b), set(a)
        todo = [u for n in a for u in self.users[n] if u not in targets and u not in seen]
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            whole = self.group[n]
            if targets.intersection(whole):
                return True
            seen.update(whole)
            if self.order[whole[0]] <= last:
                todo += [u for m in whole for u in self.users[m] if u not in seen]
        return False

    def _could_be_complete(self) -> bool:
        """True if all calls that are in no group could be kernels alone."""
        rest = [n for n in self.real if n.op == "call_function" and len(self.group[n]) == 1]
        return all(n.target in (kernel, getitem) or (is_fusable(n) and _lowers(n)) for n in rest)

    def _lower_rest(self, alone: bool) -> None:
        """Groups of one stay ATen, but for those that read a chunked view, or all are to be kernels."""
        for n in self.fusable:
            if not is_fusable(n):
                continue
            if len(self.group[n]) == 1 and (alone or any(x.target is chunked for x in n.all_input_nodes)):
                self.lowered[n] = (*lower([n], [n], _name([n]), bare=alone), [n])

    def kernels(self) -> dict[tuple[Node, ...], tuple[Kernel, tuple[Node, ...], list[Node]]]:
        """What each group that became a kernel lowers to."""
        groups = dict.fromkeys(self.group.values())
        return {g: self.lowered[g[0]] for g in groups if len(g) > 1 or g[0] in self.lowered}


def _deps(n: Node, order: dict[Node, int]) -> list[Node]:
    return [b for b in dict.fromkeys(base(x) for x in n.all_input_nodes) if b in order]


def _name(members: Sequence[Node]) -> str:
    """The kinds of the first calls and the last, as `mul_add_sum`."""
    words = list(dict.fromkeys(n.target._schema.name.split("::")[1].strip("_") for n in members))
    return "_".join(words if len(words) <= 5 else [*words[:4], words[-1]])


# ---- the new graph ----


class _Fused:
    """Emits the groups in an order that their dependences allow, views where they are still read."""

    def __init__(self, groups: _Groups):
        self.groups, self.old = groups, groups.graph
        self.fx = torch.fx.Graph()
        self.env: dict[Node, Node] = {}
        self.kernels: dict[Kernel, Kernel] = {}
        self.names: dict[str, int] = {}
        self.found = groups.kernels()

    def graph(self) -> Graph:
        """The new graph."""
        for group in self._ordered():
            if group in self.found:
                self._kernel(group, *self.found[group])
            else:
                self._copy(group[0])
        self.fx.output(tuple(None if n is None else self._get(n) for n in self.old.outputs))
        return Graph(self.fx)

    def _ordered(self) -> Iterable[tuple[Node, ...]]:
        """The groups, each after those it reads, otherwise in order of the graph."""
        g = self.groups
        waiting = {
            w: {d for n in w for d in g.deps[n] if g.group[d] is not w}
            for w in dict.fromkeys(g.group.values())
        }
        ready = [(g.order[w[0]], w) for w, deps in waiting.items() if not deps]
        heapq.heapify(ready)
        done = 0
        while ready:
            _, group = heapq.heappop(ready)
            done += 1
            yield group
            for w in dict.fromkeys(g.group[u] for n in group for u in g.users[n] if g.group[u] is not group):
                waiting[w] -= set(group)
                if not waiting[w]:
                    heapq.heappush(ready, (g.order[w[0]], w))
        if done != len(waiting):
            raise errors.InvalidGraph(after="fuse", what="the groups depend on each other in a cycle")

    def _get(self, node: Node) -> Node:
        return self.env[node] if node in self.env else self._copy(node)

    def _copy(self, node: Node) -> Node:
        new = self.env[node] = copied(self.fx, node, self._get)
        return new

    def _create(self, kind: str, target, args: tuple, kwargs: dict, name: str, meta: dict) -> Node:
        new = self.fx.create_node(kind, target, args, kwargs, name)
        new.meta.update(meta)
        return new

    def _kernel(
        self, group: tuple[Node, ...], k: Kernel, operands: tuple[Node, ...], outputs: list[Node]
    ) -> None:
        if k not in self.kernels:
            self.kernels[k] = self._named(k)
        k = self.kernels[k]
        meta = {"val": tuple(n.meta["val"] for n in outputs), "source": group[-1].meta.get("source"),
                "origin": f"fuse({', '.join(n.name for n in group)})", "members": self.groups.rows(group)}  # fmt: skip
        args = (k, *(self._get(x) for x in operands))
        if len(outputs) == 1:
            self.env[outputs[0]] = self._create(
                "call_function", kernel, args, {}, outputs[0].name, {**meta, "val": meta["val"][0]}
            )
            return
        node = self._create("call_function", kernel, args, {}, k.name, meta)
        for i, n in enumerate(outputs):
            self.env[n] = self._create("call_function", getitem, (node, i), {}, n.name, dict(n.meta))

    def _named(self, k: Kernel) -> Kernel:
        count = self.names[k.name] = self.names.get(k.name, 0) + 1
        object.__setattr__(k, "name", k.name if count == 1 else f"{k.name}_{count}")
        return k


def kernels_of(graph: Graph) -> list[Kernel]:
    """The distinct kernels of a fused graph and of the bodies of its loops and branches, in order of first use."""
    return list(dict.fromkeys(n.args[0] for n in kernel_nodes(graph)))


def kernel_nodes(graph: Graph) -> Iterator[Node]:
    """The `kernel` nodes of a graph and of the bodies of its loops and branches."""
    for n in graph.nodes:
        if n.target is kernel:
            yield n
        for g in subgraphs(n):
            yield from kernel_nodes(g)
