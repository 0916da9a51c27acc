"""Kernels that wait for none of each other as one launch. Entry points: `together` (the pass), `together_source`.

A program of the launch does a block of one of the parts, which it finds by its number. What joins is small: a large kernel takes
longer than a launch does, and has the registers of all parts. Calls that would be alone join as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx
from torch.fx import Node

from fxfunc.passes.dims import Size, estimate, numel
from fxfunc.passes.graph import Graph, copied, getitem, vals_of

from .axes import is_product
from .explain import row
from .index import NotFusable
from .loops import Kernel, kernel, value_names
from .lower import MAX_ARGS, is_free, is_fusable, lower
from .mapped import Together
from .products import programs
from .triton import HELPERS, module, part_lines, schedule, size_name, size_text, tile_of

MOST_PARTS = 16
SMALL = 2**20  # elements that a part may read: 4 MiB take about as long as a launch


# ---- which ----


def together(graph: Graph) -> Graph:
    """The graph with small kernels and small calls that wait for none of each other as one `kernel` node."""
    return _Joined(graph).graph()


class _Joined:
    """Walks the graph; calls wait in `pending` until one needs them, or they are many."""

    def __init__(self, graph: Graph):
        self.old = graph
        self.fx = torch.fx.Graph()
        self.env: dict[Node, Node] = {}
        self.pending: list[tuple[Node, Kernel, tuple[Node, ...]]] = []
        self.waits: set[Node] = set()
        self.count = 0

    def graph(self) -> Graph:
        """The new graph."""
        for n in self.old.inputs:
            self._get(n)
        for n in self.old.nodes:
            if is_free(n) or n.target is getitem:
                if any(x in self.waits for x in n.all_input_nodes):
                    self.waits.add(n)
                continue  # copied where it is read
            found = _part(n)
            if any(x in self.waits for x in n.all_input_nodes) or (found and not self._has_room(found[0])):
                self._flush()
            if found:
                self.pending.append((n, *found))
                self.waits.add(n)
            else:
                self._get(n)
        self._flush()
        self.fx.output(tuple(None if n is None else self._get(n) for n in self.old.outputs))
        return Graph(self.fx)

    def _has_room(self, k: Kernel) -> bool:
        if not self.pending:
            return True
        args = sum(len(x.args) for _, x, _ in self.pending) + len(k.args)
        alike = schedule(self.pending[0][1]).warps == schedule(k).warps
        return len(self.pending) < MOST_PARTS and args <= MAX_ARGS and alike

    def _flush(self) -> None:
        pending, self.pending, self.waits = self.pending, [], set()
        if len(pending) < 2:
            for n, *_ in pending:
                self._get(n)
            return
        self.count += 1
        name = f"together_{self.count}" if self.count > 1 else "together"
        k = Together(tuple(p for _, p, _ in pending), name)
        nodes = [n for n, *_ in pending]
        node = self.fx.create_node(
            "call_function", kernel, (k, *(self._get(x) for *_, xs in pending for x in xs)), {}, name
        )
        vals = [v for n in nodes for v in vals_of(n)]
        node.meta.update(val=tuple(vals), source=nodes[-1].meta.get("source"),
                         origin=f"together({', '.join(n.name for n in nodes)})",
                         members=tuple(r for n in nodes for r in n.meta.get("members") or (row(n),)))  # fmt: skip
        at = 0
        for n, p, _ in pending:
            outs = [self._item(node, at + i, n, v) for i, v in enumerate(vals[at : at + len(p.outputs)])]
            at += len(p.outputs)
            if isinstance(n.meta["val"], tuple):
                self.env.update({u: outs[u.args[1]] for u in n.users})
            else:
                self.env[n] = outs[0]

    def _item(self, node: Node, i: int, n: Node, val: object) -> Node:
        new = self.fx.create_node("call_function", getitem, (node, i), {}, n.name)
        new.meta.update({**n.meta, "val": val})
        return new

    def _get(self, n: Node) -> Node:
        if n not in self.env:
            self.env[n] = copied(self.fx, n, self._get)
        return self.env[n]


def _part(n: Node) -> tuple[Kernel, tuple[Node, ...]] | None:
    """A call as a small kernel, with its operands; None if it is none."""
    if n.target is kernel:
        k = n.args[0]
        fits = isinstance(k, Kernel) and not is_product(k)
        return (k, n.args[1:]) if fits and _is_small(k) else None
    if not is_fusable(n):
        return None
    try:
        k, operands = lower([n], [n], n.target._schema.name.split("::")[1].strip("_"))
    except NotFusable:
        return None
    return (k, operands) if _is_small(k) else None


def _is_small(k: Kernel) -> bool:
    return estimate(numel([*k.grid, *tile_of(k)])) <= SMALL


# ---- source ----


def together_source(k: Together) -> str:
    """The parts as functions, and a function that calls one of them."""
    names = _names(k)
    text, start, lines = [], 0, []
    inputs, outputs = sum(len(p.inputs) for p in k.parts), 0
    first: Size = 0
    for i, p in enumerate(k.parts):
        text += ["@triton.jit", *part_lines(p, f"part{i}"), "", ""]
        given = iter(names[start : start + len(p.inputs)])
        made = iter(names[inputs + outputs :])
        args = [next(made if a.output else given) for a in p.args]
        start, outputs = start + len(p.inputs), outputs + len(p.outputs)
        end = first + programs(p, (schedule(p).rows,))
        word = "if" if i == 0 else "elif"
        lines.append(f"    {word} pid < {size_text(end)}:" if i + 1 < len(k.parts) else "    else:")
        offset = "pid" if first == 0 else f"pid - {size_text(first)}"
        lines.append(f"        part{i}({', '.join([offset, *args, *map(size_name, p.sizes)])})")
        first = end
    head = f"def {k.name}({', '.join([*names, *map(size_name, k.sizes)])}):"
    return module("\n".join([*text, "@triton.jit", head, "    pid = tl.program_id(0)", *lines]))


def _names(k: Together) -> Sequence[str]:
    taken = (
        "tl",
        "triton",
        "libdevice",
        "pid",
        *HELPERS,
        *map(size_name, k.sizes),
        *(f"part{i}" for i in range(len(k.parts))),
    )
    return value_names(Kernel((), k.args, ()), taken)
