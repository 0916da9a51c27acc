"""A prepared graph as a C++ program over buffers. Entry point: `program`.

The unit is a program, not a launch a kernel: inside of a map's body all values are small, and a task that keeps them in one
piece of scratch memory in cache is worth more than any fusion across launches. So a `map` is a parallel loop over its
examples (`task`s), each of which runs the body from beginning to end, and a `scan` a loop of steps. What a body is made of comes
from the loop IR: the calls are fused into kernels (fuse.py), equal ones are one C++ function, and small matrix products call
a template of the prelude with sizes and strides as constants.

Scratch memory is laid out here, reused after the last reader. Sums over examples are done in blocks fixed by the length: each
block in order by one thread, then the blocks in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Val, getitem, map_, scan

from . import cost
from .cost import bytes_of, is_shared
from .cpp import TYPES, comment, function, name_of
from .explain import Row, placed, row, source_line
from .loops import Index, Kernel, Load
from .loops import kernel as kernel_op
from .lower import is_free
from .memory import Memory, fresh, last_reads, results
from .moves import MOVES
from .native import Native
from .prelude import prelude
from .prepare import Factors, factors, form, prepare, strides, turned
from .rows import PRODUCTS
from .triton import tile_of

aten = torch.ops.aten

BLOCKS, BLOCKS_BYTES = 64, 16 * 2**20  # of partial sums over examples


# ---- C++ of a graph ----


class _Unit:
    """A translation unit: the functions of kernels and tasks, equal ones once."""

    def __init__(self) -> None:
        self.functions: dict[str, str] = {}  # body -> name
        self.parts: list[str] = []
        self.names: set[str] = set()
        self.rows: list[Row] = []  # each call, by what computes it

    def kernel(self, k: Kernel, parallel: bool = False, part: bool = False) -> str:
        """The name of a kernel's function."""
        text = function(k, "@", parallel, part)
        if text not in self.functions:
            self.functions[text] = self.fresh(name_of(k) + "_shared" * parallel + "_part" * part)
            self.parts.append(text.replace("@", self.functions[text]))
        return self.functions[text]

    def fresh(self, wanted: str) -> str:
        """A name that no function has."""
        return fresh(wanted, self.names)

    def text(self) -> str:
        """The whole source."""
        return "\n".join([prelude(self.parts), *self.parts])


class _Body:
    """The statements of a prepared graph. `places` are pointers by node; `scratch` is where its buffers begin."""

    def __init__(
        self,
        unit: _Unit,
        graph: Graph,
        inputs: Sequence[str],
        outputs: Sequence[str | None],
        parallel: bool,
        indent: str,
        name: str = "program",
    ):
        self.unit, self.graph, self.parallel, self.indent, self.name = unit, graph, parallel, indent, name
        self.places: dict[Node, str] = dict(zip(graph.inputs, inputs, strict=True))
        self.given = {n: p for n, p in zip(graph.outputs, outputs, strict=True) if p is not None}
        self.memory, self.held = Memory(), {}
        self.unread: list[int] = []
        self.early: set[Node] = set()  # kernels that follow the rows of a product
        self.lines: list[str] = []
        self.taken: set[str] = set()
        self.source = ""
        self.task_bytes = 0

    def emit(self, line: str) -> None:
        self.lines.append(self.indent + line)

    def run(self) -> None:
        """Write all calls."""
        last = last_reads(self.graph)
        for n in self.graph.nodes:
            self._comment(n)
            if n.target is not kernel_op and n.target is not getitem and not is_free(n):
                self.unit.rows.append(row(n, f"{self.name}: {_how(n)}"))
            if n.target is kernel_op:
                if n not in self.early:
                    self._kernel(n)
            elif n.target in PRODUCTS:
                self._product(n)
            elif n.target in MOVES:
                self._move(n)
            elif n.target is turned:
                self._turned(n)
            elif n.target is map_:
                _Map(self, n).write()
            elif n.target is scan:
                _Scan(self, n).write()
            for m in last.get(n, ()):
                if m in self.held:
                    self.memory.free(self.held.pop(m))
            while self.unread:
                self.memory.free(self.unread.pop())

    def pointer(self, n: Node) -> str:
        """Where a dense value or view begins."""
        node, offset, _ = strides(n)
        return self.places[node] + (f" + {offset}" if offset else "")

    def _comment(self, n: Node) -> None:
        where = n.meta.get("source")
        if where and where != self.source and not is_free(n) and n.target is not getitem:
            self.source = where
            self.emit(f"// {comment(source_line(where))}")

    def place(self, n: Node) -> str:
        """The pointer to a new value: an output, or a buffer."""
        val = n.meta["val"]
        name = self.local(n.name)
        if n in self.given:
            where = self.given[n]
        else:
            self.held[n] = self.memory.take(bytes_of(val))
            where = _part(val, self.held[n])
        self.emit(f"{TYPES[val.dtype]}* const {name} = {where};  // {list(val.shape)}")
        self.places[n] = name
        return name

    def local(self, wanted: str) -> str:
        """A name of its own."""
        return fresh(wanted, self.taken, end="_")

    def _kernel(self, n: Node) -> None:
        shared = self.parallel and is_shared(n.args[0])
        name = self.unit.kernel(n.args[0], shared)
        self.unit.rows += placed(n, f"{self.name}: {name}")
        self.emit(f"{name}({', '.join(self._arguments(n) + ['threads'] * shared)});")

    def _arguments(self, n: Node) -> list[str]:
        """The arguments of a kernel's function, its outputs placed."""
        k, *operands = n.args
        ins = [self.places[x] for x in operands]
        given, made = iter(ins), iter(self.outputs(n))
        return [next(made if a.output else given) for a in k.args]

    def _epilogue(self, product: Node) -> str:
        """A kernel that can follow the rows of a product as an argument of it, or nothing."""
        if not cost.has_epilogue(product):
            return ""
        for n in product.users:
            if n.target is kernel_op and n not in self.early and all(x in self.places for x in n.args[1:]):
                steps = _steps_a_row(n, product)
                if steps and not (self.parallel and is_shared(n.args[0])):
                    self.early.add(n)
                    name = self.unit.kernel(n.args[0], part=True)
                    self.unit.rows += placed(n, f"{self.name}: {name}, in the rows of {product.name}")
                    args = ", ".join([*self._arguments(n), f"begin * {steps}", f"end * {steps}"])
                    return f", [=](int64_t begin, int64_t end) {{ {name}({args}); }}"
        return ""

    def outputs(self, n: Node) -> list[str]:
        """Pointers for all results of a call, read or not."""
        if isinstance(n.meta["val"], Val):
            return [self.place(n)]
        found = {m.args[1]: m for m in results(n)}
        return [self.place(found[i]) if i in found else self._unread(v) for i, v in enumerate(n.meta["val"])]

    def _unread(self, val: Val) -> str:
        at = self.memory.take(bytes_of(val))
        self.unread.append(at)
        return _part(val, at)

    def _product(self, n: Node) -> None:
        x, y = n.args
        if form(x, y) != "windows" and n.meta["val"].shape[-1] == 1:  # (y' x')'
            rows, columns, x, y = 1, n.meta["val"].shape[-2], y, x
            (a, a_at, (*a_batch, a_k, _)), (b, b_at, (*b_batch, b_column, b_k)) = factors(x), strides(y)
            a_row = ((1, 0),)
        else:
            rows, columns = n.meta["val"].shape[-2:]
            (a, a_at, (*a_batch, a_row, a_k)), (b, b_at, (*b_batch, b_k, b_column)) = factors(x), strides(y)
        t, c = TYPES[n.meta["val"].dtype], self.place(n)
        left, right = f"{self.places[a]} + {a_at}", f"{self.places[b]} + {b_at}"
        left_step = a_batch[0][0][1] if a_batch else 0
        right_step = b_batch[0] if b_batch else 0
        turned_b = f", {b_column}" if b_column != 1 and columns > 1 else ""
        kind = f"mm<{t}, {columns}, {b_k}, {_axis(a_row, True)}, {_axis(a_k, False)}{turned_b}>"
        if form(*n.args) == "dots":
            kind = f"dots<{t}, {rows}, {columns}, {numel(s for s, _ in a_k)}, {a_row[0][1]}, {b_column}>"
        if n.target is aten.bmm.default:
            count, size = n.meta["val"].shape[0], rows * columns
            self.emit(f"for (int64_t i = 0; i < {count}; i++)")
            self.emit(f"  {kind}({c} + i * {size}, {left} + i * {left_step}, {right} + i * {right_step});")
        else:
            after = self._epilogue(n)
            self.emit(f"{kind}({c}, {left.removesuffix(' + 0')}, {right.removesuffix(' + 0')}{after});")

    def _turned(self, n: Node) -> None:
        node, offset, (*batch, _, step) = strides(n.args[0])
        *counts, rows, columns = n.args[0].meta["val"].shape
        out, source = self.place(n), f"{self.places[node]} + {offset}"
        for count, size in zip(counts, batch, strict=True):
            self.emit(f"for (int64_t i = 0; i < {count}; i++)")
            out, source = f"  {out} + i * {rows * columns}", f"{source} + i * {size}"
        self.emit(f"turn_into({out}, {columns}, {rows}, {columns}, {source}, {step});")

    def _move(self, n: Node) -> None:
        call = MOVES[n.target](*n.args, **n.kwargs)
        sources = [self.pointer(x) for x in call.sources]
        outs, t = self.outputs(n), TYPES[call.sources[0].meta["val"].dtype]
        for line in call.lines:
            self.emit(line.format(*sources, out=outs[0], outs=outs, T=t))


def _steps_a_row(n: Node, product: Node) -> int:
    """How many steps of its first axis a kernel takes for a row of the product, if it is elementwise in that; else 0."""
    k, *operands = n.args
    args = [i for i, a in enumerate(k.args) if not a.output]
    read = {args[i] for i, x in enumerate(operands) if x is product}
    loads = [x.index for x in k.body if isinstance(x, Load) and x.arg in read]
    rows, columns = product.meta["val"].shape
    if tile_of(k) or numel(k.grid) != rows * columns or not all(_is_in_order(k, index) for index in loads):
        return 0
    return k.grid[0] // rows if k.grid[0] % rows == 0 else 0


def _is_in_order(k: Kernel, index: Index) -> bool:
    """True where a kernel reads a dense value element by element."""
    wanted = (numel(k.grid[i + 1 :]) for i in range(len(k.grid)))
    return index.offset == 0 and all(
        n == 1 or s == w for n, s, w in zip(k.grid, index.grid, wanted, strict=True)
    )


class _Map:
    """A map as a function that runs its body once, and a loop that calls it."""

    def __init__(self, outer: _Body, n: Node):
        self.outer, self.unit, self.n = outer, outer.unit, n
        self.body: Graph = n.args[0]
        self.length: int = n.kwargs["length"]
        self.sums = [kind == "sum" for kind in n.kwargs["outs"]]
        bytes_ = sum(bytes_of(v) for v, s in zip(self.body.out_vals, self.sums, strict=True) if s)
        self.blocks = min(self.length, max(1, min(BLOCKS, BLOCKS_BYTES // max(1, bytes_))))

    def write(self) -> None:
        """The function, and the loop."""
        name, scratch = self._function()
        outer, vals = self.outer, self.body.out_vals
        outs = outer.outputs(self.n)
        parts = [
            outer.memory.take(self.blocks * bytes_of(v)) if s else None
            for v, s in zip(vals, self.sums, strict=True)
        ]
        args = []
        for x, mapped, inner in zip(self.n.args[1], self.n.kwargs["mapped"], self.body.in_vals, strict=True):
            args.append(outer.pointer(x) + (f" + i * {numel(inner.shape)}" if mapped else ""))
        for v, out, at in zip(vals, outs, parts, strict=True):
            args.append(
                f"{out} + i * {numel(v.shape)}" if at is None else _part(v, at, f"block * {numel(v.shape)}")
            )
        outer.task_bytes = max(outer.task_bytes, scratch)
        count = self.length
        outer.emit("#pragma omp parallel for num_threads(threads) schedule(dynamic)")
        outer.emit(f"for (int64_t block = 0; block < {self.blocks}; block++)")
        outer.emit(
            f"  for (int64_t first = block * {count} / {self.blocks}, i = first; i < (block + 1) * {count} / {self.blocks}; i++)"
        )
        outer.emit(
            f"    {name}({', '.join(args)}, i == first, bad, tasks + omp_get_thread_num() * task_bytes);"
        )
        for v, out, at in zip(vals, outs, parts, strict=True):
            if at is not None:
                outer.emit(f"sum_blocks({out}, {_part(v, at)}, {self.blocks}, {numel(v.shape)});")
                outer.memory.free(at)

    def _function(self) -> tuple[str, int]:
        graph = prepare(self.body)
        name = self.unit.fresh(f"task_{self.n.name}")
        inputs = [f"x{i}_{n.name}" for i, n in enumerate(graph.inputs)]
        vals = graph.out_vals
        outputs = [f"out{i}" for i in range(len(vals))]
        given = [None if s else o for s, o in zip(self.sums, outputs, strict=True)]
        body = _Body(self.unit, graph, inputs, given, False, "  ", name)
        body.run()
        for n, v, s, o in zip(graph.outputs, vals, self.sums, outputs, strict=True):
            if s:
                body.emit(f"add_to({o}, {body.places[n]}, {numel(v.shape)}, first);")
        params = [f"const {TYPES[v.dtype]}* {x}" for v, x in zip(graph.in_vals, inputs, strict=True)]
        params += [f"{TYPES[v.dtype]}* {o}" for v, o in zip(vals, outputs, strict=True)]
        head = f"static void {name}({', '.join(params)}, bool first, int64_t* bad, char* scratch) {{"
        self.unit.parts.append("\n".join([head, *body.lines, "}"]) + "\n")
        return name, -(-body.memory.size // 4096) * 4096 + 64


class _Scan:
    """A loop over steps. A carry is read in one buffer and written to another, the last one to where the result belongs."""

    def __init__(self, outer: _Body, n: Node):
        self.outer, self.n = outer, n
        self.body, self.consts, self.carry, self.xs = n.args
        self.length: int = n.kwargs["length"]

    def write(self) -> None:
        """The loop."""
        outer, vals, count = self.outer, self.body.out_vals, len(self.carry)
        outs = outer.outputs(self.n)
        spare = [outer.memory.take(bytes_of(v)) for v in vals[:count]]
        now, new, old = ([outer.local(f"{word}{i}") for i in range(count)] for word in ("now", "new", "old"))
        for i, (x, v, out) in enumerate(zip(self.carry, vals, outs, strict=False)):
            ways = (out, _part(v, spare[i]))
            last, other = ways if self.length % 2 else reversed(ways)
            t = TYPES[v.dtype]
            outer.emit(f"const {t}* {now[i]} = {outer.pointer(x)};")
            outer.emit(f"{t} *{new[i]} = {last}, *{old[i]} = {other};")
        step = outer.local("step")
        length, reverse = self.length, self.n.kwargs["reverse"]
        way = f"{step} = {length}; {step}--;" if reverse else f"{step} = 0; {step} < {length}; {step}++"
        outer.emit(f"for (int64_t {way}) {{")
        self._step(step, now, new, outs[count:])
        for i in range(count):
            outer.emit(
                f"  {now[i]} = {new[i]}, {new[i]} = {old[i]}, {old[i]} = ({TYPES[vals[i].dtype]}*){now[i]};"
            )
        outer.emit("}")
        for at in spare:
            outer.memory.free(at)

    def _step(self, step: str, now: list[str], new: list[str], ys: list[str]) -> None:
        """The body, with buffers in the same scratch memory."""
        outer, count = self.outer, len(self.carry)
        ins, outs = self.body.in_vals[len(self.consts) + count :], self.body.out_vals[count:]
        inputs = [*map(outer.pointer, self.consts), *now]
        inputs += [
            f"{outer.pointer(x)} + {step} * {numel(v.shape)}" for x, v in zip(self.xs, ins, strict=True)
        ]
        outputs = [*new, *(f"{y} + {step} * {numel(v.shape)}" for y, v in zip(ys, outs, strict=True))]
        name, indent = f"{outer.name}, {self.n.name}", outer.indent + "  "
        inner = _Body(outer.unit, prepare(self.body), inputs, outputs, outer.parallel, indent, name)
        inner.memory, inner.taken, inner.lines = outer.memory, outer.taken, outer.lines
        inner.run()


def _how(n: Node) -> str:
    """What computes a call that no kernel holds."""
    if n.target in (map_, scan):
        return f"a loop over {n.kwargs['length']} {'tasks' if n.target is map_ else 'steps'}"
    return (
        "a product"
        if n.target in PRODUCTS
        else "a transposition"
        if n.target is turned
        else "a move of memory"
    )


def _axis(parts: Factors, inner: bool) -> str:
    """An axis of the left factor of a product; one that a single step walks is the inner or the outer loop."""
    first, *rest = [*parts] if len(parts) > 1 else [(1, 0), *parts] if inner else [*parts, (1, 0)]
    middle = rest[0] if len(rest) > 1 else (1, 0)
    return f"Axis<{', '.join(str(x) for part in (first, middle, rest[-1]) for x in part)}>"


def _part(v: Val, at: int, offset: str = "") -> str:
    text = f"({TYPES[v.dtype]}*)(scratch + {at})"
    return f"{text} + {offset}" if offset else text


# ---- a program ----


def program(name: str, graph: Graph) -> Native:
    """A graph as a program, to be compiled."""
    unit = _Unit()
    source, size, task_bytes = _source(unit, graph)
    loops = [_how(n) for n in graph.nodes if n.target in (map_, scan)]
    calls = sum(not is_free(n) and n.target is not getitem for n in graph.nodes) - len(loops)
    summary = ", ".join([*loops, f"{calls} calls outside of loops"])
    return Native(name, source, graph.out_vals, operands=len(graph.inputs), bytes=size, task_bytes=task_bytes,
                  summary=summary, rows=unit.rows)  # fmt: skip


def _source(unit: _Unit, graph: Graph) -> tuple[str, int, int]:
    """The translation unit of a graph, the bytes of its scratch memory, and those of each thread."""
    prepared = prepare(graph)
    inputs = [f"in{i}_{n.name}" for i, n in enumerate(prepared.inputs)]
    outputs = [f"out{i}" for i in range(len(prepared.outputs))]
    body = _Body(unit, prepared, inputs, outputs, True, "  ")
    body.run()
    head = []
    for i, (v, name) in enumerate(
        zip([*prepared.in_vals, *prepared.out_vals], [*inputs, *outputs], strict=True)
    ):
        const = "const " if i < len(inputs) else ""
        head.append(
            f"  {const}{TYPES[v.dtype]}* const {name} = ({TYPES[v.dtype]}*)args[{i}];  // {list(v.shape)}"
        )
    task_bytes, size = body.task_bytes, -(-body.memory.size // 64) * 64
    start = ["  scratch = (char*)((uintptr_t(scratch) + 63) & ~uintptr_t(63));", f"  char* const tasks = scratch + {size};",
             f"  const int64_t task_bytes = {task_bytes};"]  # fmt: skip
    text = [
        'extern "C" void program(void** args, char* scratch, int threads, int64_t* bad) {',
        *start,
        *head,
        *body.lines,
        "}",
    ]
    return unit.text() + "\n" + "\n".join(text) + "\n", size, task_bytes
