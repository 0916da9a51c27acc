"""The body of a map as one Triton function (map = grid). Entry points: `source`, `NotFusable` where it cannot be.

A program of the grid takes its tasks one after another, each from beginning to end, as tasks.py has it in C++. Every value has a
buffer in the program's own scratch memory; a call reads buffers, computes a block of a few dims, and writes a buffer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch.fx import Node

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Val, getitem, scan, vals_of

from .cost import bytes_of
from .explain import Row, placed, row, source_line
from .index import NotFusable
from .loops import kernel
from .lower import is_free
from .mapped import Tasks
from .memory import last_reads, results
from .prepare import factors, prepare, strides
from .rows import PRODUCTS
from .tile_blocks import added, filled, write
from .tile_moves import MOVES, move
from .tile_products import Product
from .tile_program import Buffer, Program
from .triton import TYPES, module, size_name, size_text


@dataclasses.dataclass(frozen=True)
class Source:
    """What `source` gives: the function's name and the module's text, bytes of scratch memory a program, whether it checks
    indices, what each call became, and how often the multiplications of its products are done, for padding."""

    name: str
    text: str
    workspace: int
    checks: bool
    rows: tuple[Row, ...]
    padding: float

    @property
    def lines(self) -> int:
        """Of its text."""
        return self.text.count("\n")


@functools.lru_cache(maxsize=64)
def source(tasks: Tasks, precision: str = "bf16x6") -> Source:
    """The kernel as a module of Triton source, products of float32 in this precision, or `NotFusable`."""
    program = None
    for _ in range(2):
        program = Program(precision, (tasks.name, *map(size_name, tasks.sizes)), program)
        head = _write(program, tasks)
    padding = program.padded / program.work if program.work else 1.0
    return Source(
        tasks.name,
        module("\n".join(["@triton.jit", head, *program.lines()])),
        program.workspace,
        program.checks,
        tuple(program.rows),
        padding,
    )


def _write(p: Program, t: Tasks) -> str:
    """The function; its head is returned."""
    one_each = t.programs == t.length
    graph = prepare_tiles(t.body)
    ins = [p.local(a.name) for a in t.args if not a.output]
    outs = [p.local(a.name) for a in t.outputs]
    p.emit("program = tl.program_id(0).to(tl.int64)")
    totals: list[Buffer | None] = []
    for i, (name, v, kind) in enumerate(zip(outs, graph.out_vals, t.outs, strict=True)):
        is_total = kind == "sum" and not one_each
        part = f"{name} + program * {numel(v.shape)}"
        totals.append(Buffer(p.pointer(f"total{i}", part), (name,), True) if is_total else None)
    if one_each:
        p.emit("task = program")
    else:
        for total, v in zip(totals, graph.out_vals, strict=True):
            if total:
                write(p, filled(v, 0), [total])
        count = size_text(t.length)
        p.loop(
            f"for task in range(program * {count} // {t.programs}, (program + 1) * {count} // {t.programs}):"
        )
    inputs = []
    for name, v, mapped in zip(ins, graph.in_vals, t.mapped, strict=True):
        pointer = (
            p.pointer(name.removesuffix("_ptr"), f"{name} + task * {numel(v.shape)}") if mapped else name
        )
        inputs.append(Buffer(pointer, (name,), True))
    given = [None if total else Buffer(p.pointer(f"out{i}", f"{o} + task * {numel(v.shape)}"), (o,), True)
             for i, (total, o, v) in enumerate(zip(totals, outs, graph.out_vals, strict=True))]  # fmt: skip
    body = Body(p, graph, inputs, given, t.name)
    body.run()
    for n, v, total in zip(graph.outputs, graph.out_vals, totals, strict=True):
        if total:
            write(p, added(v), [body.places[n], total, total])
    if not one_each:
        p.end()
    return f"def {t.name}({', '.join([*ins, *outs, 'scratch_ptr', *map(size_name, t.sizes)])}):"


def prepare_tiles(graph: Graph) -> Graph:
    """A body as it is written here."""
    return prepare(graph, _takes, MOVES)


def _takes(x: Node, y: Node) -> bool:
    """True for factors that a product reads where they lie: terms that are one element are copied first."""
    a, b = factors(x), factors(y)
    return a is not None and b is not None and all(any(s for _, s in f) for f in (a[2][-1], b[2][-2]))


class Body:
    """The calls of a prepared graph. `places` has the buffer of each value."""

    def __init__(
        self,
        program: Program,
        graph: Graph,
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer | None],
        name: str,
    ):
        self.program, self.graph, self.name = program, graph, name
        self.places: dict[Node, Buffer] = dict(zip(graph.inputs, inputs, strict=True))
        self.given = {n: p for n, p in zip(graph.outputs, outputs, strict=True) if p is not None}
        self.taken: dict[Node, int] = {}
        self.unread: list[int] = []
        self.source = ""

    def run(self) -> None:
        """Write all calls."""
        last, program = last_reads(self.graph), self.program
        for n in self.graph.nodes:
            if n.target is getitem or is_free(n):
                continue
            if any(0 in v.shape for v in vals_of(n)):
                raise NotFusable(f"{n.target}: an empty value")
            self._comment(n)
            if n.target is kernel:
                program.rows += placed(n, self.name)
                self._kernel(n)
            elif n.target in PRODUCTS:
                program.rows.append(row(n, f"{self.name}: a product"))
                Product(self, n).write()
            elif n.target is scan:
                program.rows.append(row(n, f"{self.name}: a loop over {n.kwargs['length']} steps"))
                _Scan(self, n).write()
            elif n.target in MOVES:
                program.rows.append(row(n, f"{self.name}: a move of memory"))
                move(self, n)
            else:
                raise NotFusable(f"{n.target} has no place in a kernel")
            for m in last.get(n, ()):
                if m in self.taken:
                    program.memory.free(self.taken.pop(m))
            while self.unread:
                program.memory.free(self.unread.pop())

    def _comment(self, n: Node) -> None:
        where = n.meta.get("source")
        if where and where != self.source:
            self.source = where
            self.program.emit(f"# {source_line(where)}")

    def place(self, n: Node) -> Buffer:
        """The buffer of a new value: an output, or scratch memory."""
        if n in self.given:
            self.places[n] = self.given[n]
        else:
            self.places[n] = self._new(n.meta["val"], f"{n.name}_at", n)
        return self.places[n]

    def at(self, n: Node) -> Buffer:
        """Where a dense value or view lies."""
        node, offset, _ = strides(n)
        whole = self.places[node]
        if not offset:
            return whole
        return self.program.part(whole, str(offset), f"{node.name}_part")

    def outputs(self, n: Node) -> list[Buffer]:
        """Buffers for all results of a call, read or not."""
        if isinstance(n.meta["val"], Val):
            return [self.place(n)]
        found = {m.args[1]: m for m in results(n)}
        return [
            self.place(found[i]) if i in found else self._new(v, "unread")
            for i, v in enumerate(n.meta["val"])
        ]

    def _new(self, val: Val, name: str, n: Node | None = None) -> Buffer:
        """Scratch memory until the last reader of `n`, or if there is none until the end of the call."""
        buffer, at = self.program.buffer(name, TYPES[val.dtype], bytes_of(val))
        if at is not None and n is not None:
            self.taken[n] = at
        elif at is not None:
            self.unread.append(at)
        return buffer

    def _kernel(self, n: Node) -> None:
        k, *operands = n.args
        given, made = iter([self.places[x] for x in operands]), iter(self.outputs(n))
        write(self.program, k, [next(made if a.output else given) for a in k.args])


class _Scan:
    """A loop over steps. A carry is read in one buffer and written to another, the last one to where the result belongs."""

    def __init__(self, outer: Body, n: Node):
        self.outer, self.program, self.n = outer, outer.program, n
        self.body, self.consts, self.carry, self.xs = n.args
        self.length: int = n.kwargs["length"]

    def write(self) -> None:
        """The loop."""
        program, outer, vals, count = self.program, self.outer, self.body.out_vals, len(self.carry)
        outs = outer.outputs(self.n)
        spare = [program.memory.take(bytes_of(v)) for v in vals[:count]]
        now, new = [], []
        turns: list[str] = []
        for i, (x, v, out) in enumerate(zip(self.carry, vals, outs, strict=False)):
            first, other = outer.at(x), program.scratch(f"spare{i}", TYPES[v.dtype], bytes_of(v), spare[i])
            first.read = out.read = other.read = True
            last, before = (out, other) if self.length % 2 else (other, out)
            names = [program.pointer(f"{word}{i}", b.pointer) for word, b in
                     (("now", first), ("new", last), ("old", before))]  # fmt: skip
            turns.append("{0}, {1}, {2} = {1}, {2}, {1}".format(*names))
            now.append(Buffer(names[0], (*first.parts, *out.parts, *other.parts), True))
            new.append(Buffer(names[1], (*out.parts, *other.parts), True))
        step, reverse = program.local("step"), self.n.kwargs["reverse"]
        program.fence()
        program.loop(f"for {step} in range({self.length}):")
        if reverse:
            at = program.pointer("at", f"{self.length - 1} - {step}")
        self._step(at if reverse else step, now, new, outs[count:])
        program.fence()
        for line in turns:
            program.emit(line)
        program.end()
        for at in spare:
            program.memory.free(at)

    def _step(self, step: str, now: list[Buffer], new: list[Buffer], ys: list[Buffer]) -> None:
        outer, program, count = self.outer, self.program, len(self.carry)
        ins, outs = self.body.in_vals[len(self.consts) + count :], self.body.out_vals[count:]
        graph = prepare_tiles(self.body)
        inputs = [outer.at(x) for x in self.consts] + now
        for x, v, n in zip(self.xs, ins, graph.inputs[len(self.consts) + count :], strict=True):
            inputs.append(self._element(outer.at(x), n.name, step, v))
        outputs = new + [
            self._element(y, f"y{i}", step, v) for i, (y, v) in enumerate(zip(ys, outs, strict=True))
        ]
        for b in (*inputs, *outputs):
            b.read = True
        inner = Body(program, graph, inputs, outputs, f"{outer.name}, {self.n.name}")
        inner.run()

    def _element(self, whole: Buffer, name: str, step: str, v: Val) -> Buffer:
        return self.program.part(whole, f"{step} * {numel(v.shape)}", name)
