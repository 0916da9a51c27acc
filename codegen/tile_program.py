"""A Triton function over memory of its own, line by line. Entry points: `Program`, `Buffer` (a value in memory), `Dimension`.

Blocks are padded to powers of two, and padding is never trusted: a load gives 0 there, a sum and the terms of a product
are masked. What an earlier call left in registers is taken from there, and a buffer that nobody reads from memory is not
written. Between a store and a load by other threads there is a barrier, around loops too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from .explain import Row
from .memory import Memory, fresh
from .prepare import Factors
from .triton import HELPERS, power

BLOCK = 4096  # elements of a block; more are computed in a loop over blocks
WARPS = 4  # 8 do a task no faster: more of them wait at barriers and exchange values (bench/cycles.py)
REGISTERS = 4096  # elements that are kept in registers between calls: ptxas spills more than that beside what a product needs


@dataclasses.dataclass(eq=False)
class Buffer:
    """Where a value lies: a pointer, and what is behind it, parts of scratch memory or arguments by name.

    It is written only if it is `read` from memory, by a call or by whoever launches the kernel."""

    pointer: str
    parts: tuple[tuple[int, int] | str, ...]
    read: bool = False


@dataclasses.dataclass(frozen=True)
class Held:
    """A block in registers: the size, stride in its buffer and padded size of each dim (stride 0: size 1 in the block)."""

    name: str
    axes: tuple[tuple[int, int, int], ...]
    zeros: bool  # in the padding

    @staticmethod
    def of(name: str, space: Space, steps: Sequence[int], zeros: bool = False) -> Held:
        """A block of these dims."""
        axes = ((d.size, s, d.block if s else 1) for d, s in zip(space, steps, strict=True))
        return Held(name, tuple(axes), zeros)

    @property
    def elements(self) -> int:
        return math.prod(block for *_, block in self.axes)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A dim of a block: its size, that of the block (a power of two), and where the block begins, "" if it is all of it."""

    size: int
    block: int
    start: str = ""

    @property
    def is_exact(self) -> bool:
        """True without padding."""
        return self.size % self.block == 0 if self.start else self.size == self.block


Space = tuple[Dimension, ...]


def _place(position: int, rank: int) -> str:
    return "[" + ", ".join(":" if i == position else "None" for i in range(rank)) + "]"


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the function: text, or a fence, with what it reads from or writes to memory."""

    indent: str
    text: str
    loads: tuple[Buffer, ...] = ()
    stores: Buffer | None = None
    fence: bool = False


class Program:
    """The lines of a function, memory and registers of a program. `taken` are names that mean something in it.

    Which values are read from memory is known when all is written, so it is written twice: then `before` is the first one."""

    def __init__(self, precision: str, taken: Iterable[str], before: Program | None = None):
        self.precision, self.before = precision, before
        self.buffers: list[Buffer] = []  # of values, in order
        self.out: list[_Line] = []
        self.indent = "    "
        self.taken = {"tl", "triton", "libdevice", "program", "task", "scratch", *HELPERS, *taken}
        self.hoisted: dict[str, str] = {}
        self.memory = Memory()
        self.rows: list[Row] = []
        self.held: dict[Buffer, Held] = {}
        self.checks = False  # has it assertions
        self.work = self.padded = 0  # multiplications of products

    @property
    def workspace(self) -> int:
        """Bytes of scratch memory a program."""
        return -(-self.memory.size // 128) * 128

    # -- text --

    def emit(self, text: str, loads: Sequence[Buffer] = (), stores: Buffer | None = None) -> None:
        self.out.append(_Line(self.indent, text, tuple(loads), stores))

    def fence(self) -> None:
        """What is before it is over: the begin or end of a loop."""
        self.held.clear()
        self.out.append(_Line(self.indent, "", fence=True))

    def loop(self, head: str, fenced: bool = True) -> None:
        """Begin a loop; `fenced` if one step reads what another wrote."""
        self.emit(head)
        self.indent += "    "
        if fenced:
            self.fence()

    def end(self, fenced: bool = True) -> None:
        """End a loop."""
        self.held.clear()
        if fenced:
            self.fence()
        self.indent = self.indent[4:]

    @contextlib.contextmanager
    def blocks(self, sizes: Sequence[int], whole: Sequence[bool] = ()) -> Iterator[Space]:
        """A block of these dims, in a loop over blocks if it would be large; those that are `whole` are not cut."""
        blocks = [power(n) for n in sizes]
        for i, b in enumerate(blocks):
            while not (whole and whole[i]) and math.prod(blocks) > BLOCK and b > 1:
                b = blocks[i] = b // 2
        space = tuple(
            Dimension(n, b, self.local("b0") if b < n else "") for n, b in zip(sizes, blocks, strict=True)
        )
        for d in space:
            if d.start:
                self.loop(f"for {d.start} in range(0, {d.size}, {d.block}):", fenced=False)
        yield space
        for d in space:
            if d.start:
                self.end(fenced=False)

    def masks(self, space: Space, at: Sequence[int] = (), rank: int = 0) -> list[str]:
        """What holds inside of the padding of a block; of some dims of a larger block, `at` these positions."""
        places = zip(at or range(len(space)), space, strict=True)
        return [f"({self.arange(i, rank or len(space), d)} < {d.size})" for i, d in places if not d.is_exact]

    def part(self, whole: Buffer, offset: str, name: str) -> Buffer:
        """What begins at an offset of a buffer."""
        whole.read = True
        return Buffer(self.pointer(name, f"{whole.pointer} + {offset}"), whole.parts, True)

    def local(self, wanted: str) -> str:
        """A name of its own."""
        return fresh(wanted if wanted.isidentifier() else "v", self.taken)

    def arange(self, position: int, rank: int, d: Dimension) -> str:
        """The indices of a dim, of which those of whole blocks are written once."""
        text = f"tl.arange(0, {d.block})" + _place(position, rank)
        if text not in self.hoisted:
            letter = "ijklmnop"[position] + (str(rank) if rank != 2 else "")
            self.hoisted[text] = self.local(f"{letter}_{d.block}")
        return f"({d.start} + {self.hoisted[text]})" if d.start else self.hoisted[text]

    def buffer(self, name: str, dtype: str, size: int) -> tuple[Buffer, int | None]:
        """Scratch memory for a value, and where it is to give it back; none if nobody reads it from memory."""
        unread = self.before is not None and not self.before.buffers[len(self.buffers)].read
        at = None if unread else self.memory.take(size)
        self.buffers.append(Buffer("nowhere", ()) if at is None else self.scratch(name, dtype, size, at))
        return self.buffers[-1], at

    def scratch(self, name: str, dtype: str, size: int, at: int) -> Buffer:
        """A buffer at a place of scratch memory."""
        pointer = self.pointer(name, f"(scratch + {at}).to(tl.pointer_type(tl.{dtype}), bitcast=True)")
        return Buffer(pointer, ((at, at + max(1, size)),))

    def pointer(self, wanted: str, text: str) -> str:
        """A name for a place in memory."""
        name = self.local(wanted)
        self.emit(f"{name} = {text}")
        return name

    def lines(self) -> Iterator[str]:
        """All lines, without stores that nobody reads, with barriers and with what is written once at the start."""
        written: list[Buffer] = []
        loaded: list[Buffer] = []
        hoisted = [f"    {name} = {text}" for text, name in self.hoisted.items()]
        scratch = f"    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * {self.workspace}"
        yield from [*hoisted, *([scratch] if self.memory.size else [])]
        for line in self.out:
            if line.stores and not line.stores.read:
                continue
            after = any(_meet(x, y) for x in line.loads for y in written)
            over = line.stores and any(_meet(line.stores, y) for y in (*loaded, *written))
            if after or over or line.fence:
                if written or loaded or line.fence:
                    yield f"{line.indent}tl.debug_barrier()"
                written, loaded = [], []
            if not line.fence:
                loaded += line.loads
                written += [line.stores] if line.stores else []
                yield line.indent + line.text

    # -- registers --

    def hold(self, buffer: Buffer, held: Held) -> None:
        """Remember what is in registers; of more than they have room for, what was put there first goes."""
        self.held.pop(buffer, None)
        self.held[buffer] = held
        while sum(h.elements for h in self.held.values()) > REGISTERS:
            del self.held[next(iter(self.held))]

    def from_registers(self, buffer: Buffer, offset: int, space: Space, steps: Sequence[int]) -> Held | None:
        """A value as a block of these dims, if it is in registers."""
        held = self.held.get(buffer)
        if held is None or offset or any(d.start for d in space):
            return None
        wanted = [(d.size, s, d.block) for d, s in zip(space, steps, strict=True) if d.size > 1 and s]
        have = [axis for axis in held.axes if axis[0] > 1 and axis[1]]
        if sorted(wanted) != sorted(have) or len(set(have)) < len(have):
            return None
        text = held.name
        shape = [block for *_, block in have]
        if len(have) != len(held.axes):
            text = f"tl.reshape({text}, {shape or [1]})"
        if wanted != have:
            order = [have.index(x) for x in wanted]
            text, shape = f"tl.permute({text}, {order})", [shape[i] for i in order]
        if len(wanted) != len(space):
            sizes = iter(shape)
            text = f"tl.reshape({text}, {[next(sizes) if d.size > 1 and s else 1 for d, s in zip(space, steps, strict=True)]})"
        return Held.of(text, space, steps, held.zeros)

    # -- memory --

    def offset(self, space: Space, parts: Sequence[Factors], offset: int) -> tuple[str, list[str]]:
        """The text of an offset, for the steps of each dim, and what masks the padding."""
        terms, masks = [], []
        for p, (d, f) in enumerate(zip(space, parts, strict=True)):
            if all(step == 0 for _, step in f):
                continue
            index = self.arange(p, len(space), d)
            terms += list(walk(index, f))
            masks += [] if d.is_exact else [f"({index} < {d.size})"]
        if not terms:
            terms = [f"tl.zeros({[1] * len(space)}, tl.int32)"]
        return " + ".join([*terms, *([str(offset)] if offset else [])]), masks

    def load(self, buffer: Buffer, offset: int, space: Space, parts: Sequence[Factors], name: str) -> Held:
        """A block of a value, from registers or from memory."""
        steps = [f[0][1] if len(f) == 1 else 0 for f in parts]
        if all(len(f) == 1 for f in parts) and (found := self.from_registers(buffer, offset, space, steps)):
            return found
        text, masks = self.offset(space, parts, offset)
        mask = f", mask={' & '.join(masks)}, other=0" if masks else ""
        name = self.local(name)
        buffer.read = True
        self.emit(f"{name} = tl.load({buffer.pointer} + {text}{mask})", [buffer])
        held = Held.of(name, space, steps, zeros=True)
        if not any(d.start for d in space) and all(len(f) == 1 for f in parts) and not offset:
            self.hold(buffer, held)
        return held

    def store(self, buffer: Buffer, offset: int, space: Space, parts: Sequence[Factors], value: str) -> None:
        """Write a block."""
        text, masks = self.offset(space, parts, offset)
        mask = f", mask={' & '.join(masks)}" if masks else ""
        self.held.pop(buffer, None)
        self.emit(f"tl.store({buffer.pointer} + {text}, {value}{mask})", stores=buffer)


def walk(index: str, parts: Factors) -> Iterator[str]:
    """The terms of an offset along a dim that takes several steps to walk."""
    inner = 1
    for i, (n, step) in reversed(list(enumerate(parts))):
        digit = index if inner == 1 else f"({index} // {inner})"
        digit = f"({digit} % {n})" if i else digit
        if step:
            yield digit if step == 1 else f"{digit} * {step}"
        inner *= n


def _meet(a: Buffer, b: Buffer) -> bool:
    """True if two buffers may have memory in common."""
    return any(_overlap(x, y) for x in a.parts for y in b.parts)


def _overlap(x: tuple[int, int] | str, y: tuple[int, int] | str) -> bool:
    if isinstance(x, str) or isinstance(y, str):
        return x == y
    return x[0] < y[1] and y[0] < x[1]
