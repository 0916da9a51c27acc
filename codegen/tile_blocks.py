"""Kernels of the loop IR as blocks of a Triton function (tile_program.py). Entry points: `write`, `filled`, `added`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Val

from .index import NotFusable
from .loops import Apply, Arg, Const, Index, Instr, Iota, Kernel, Load, Reduce, Store
from .prepare import Factors
from .tile_program import Buffer, Held, Program, Space
from .triton import Instructions, power, reduced

LONGEST_REDUCTION = 8192


def write(program: Program, k: Kernel, buffers: Sequence[Buffer]) -> None:
    """A kernel on buffers, in order of its arguments."""
    _Block(program, k, buffers).write()


def filled(v: Val, value: float) -> Kernel:
    """A kernel that writes one number everywhere."""
    number = (
        float(value) if v.dtype.is_floating_point else bool(value) if v.dtype is torch.bool else int(value)
    )
    body = (Const(number, v.dtype, name="fill"), Store(0, Index(0, (1,)), 0))
    return Kernel((numel(v.shape),), (Arg(v.shape, v.dtype, True),), body)


def added(v: Val) -> Kernel:
    """A kernel that adds a value to a total."""
    n, at = numel(v.shape), Index(0, (1,))
    args = (Arg(v.shape, v.dtype), Arg(v.shape, v.dtype), Arg(v.shape, v.dtype, True))
    body = (
        Load(0, at, name="x"),
        Load(1, at, name="total"),
        Apply("add", (1, 0), v.dtype),
        Store(2, at, 2),
    )
    return Kernel((n,), args, body)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A dim of a kernel's block: `size` steps of `inner` along an axis of its grid or its tile."""

    tile: bool
    axis: int
    size: int
    inner: int

    def step(self, index: Index, tile: int) -> int:
        """How far an access moves a step; `tile` is the rank of the kernel's."""
        strides = index.tile if self.tile else index.grid
        at = self.axis - (tile - len(strides)) if self.tile else self.axis
        return strides[at] * self.inner if at >= 0 else 0


class _Block(Instructions):
    """A kernel of the loop IR on buffers, as one block or over blocks of the axes that it does not reduce."""

    def __init__(self, program: Program, k: Kernel, buffers: Sequence[Buffer]):
        super().__init__(k)
        self.program, self.buffers = program, buffers
        self.tile = next((x.shape for x in k.body if isinstance(x, Reduce)), ())
        self.axes = _axes(k, self.tile)
        self.space: Space = ()
        self.unit = [1] * len(self.axes)
        self.values = [""] * len(k.body)
        self.full: list[tuple[bool, ...]] = []  # of each value, in which dims it is more than 1

    def write(self) -> None:
        """All instructions."""
        whole = [a.tile for a in self.axes]
        if math.prod(power(a.size) for a in self.axes if a.tile) > LONGEST_REDUCTION:
            raise NotFusable(f"a reduction of {numel(self.tile)} elements in a task")
        with self.program.blocks([a.size for a in self.axes], whole) as self.space:
            for i, x in enumerate(self.k.body):
                self.full.append(self._dims(x))
                if not isinstance(x, Store) and i not in self.inline:
                    self.values[i] = self.program.local(x.name or f"v{i}")
                self._instr(i)

    def _emit(self, line: str) -> None:
        self.program.emit(line)

    def _dims(self, x: Instr) -> tuple[bool, ...]:
        if isinstance(x, (Load, Iota, Store)):
            moves = [s != 0 for s in self._steps(x.index)]
            return tuple(m or f for m, f in zip(moves, self._mask_of(x), strict=True))
        inputs = [self.full[j] for j in x.inputs]
        if isinstance(x, Reduce):
            return tuple(f and not a.tile for f, a in zip(inputs[0], self.axes, strict=True))
        return tuple(map(any, zip(*inputs, strict=True))) if inputs else (False,) * len(self.axes)

    def _mask_of(self, x: Instr) -> tuple[bool, ...]:
        mask = getattr(x, "mask", None)
        return (False,) * len(self.axes) if mask is None else self.full[mask]

    def _steps(self, index: Index) -> list[int]:
        return [a.step(index, len(self.tile)) for a in self.axes]

    def _parts(self, index: Index) -> list[Factors]:
        return [((d.size, s),) for d, s in zip(self.space, self._steps(index), strict=True)]

    def _instr(self, i: int) -> None:
        x = self.k.body[i]
        if not isinstance(x, Load):
            return super()._instr(i)
        self._comment(x)
        buffer, parts = self.buffers[x.arg], self._parts(x.index)
        if x.mask is None:
            text = self.program.load(buffer, x.index.offset, self.space, parts, self.values[i] + "_").name
            if text.isidentifier():
                self.values[i] = text
            else:
                self._emit(f"{self.values[i]} = {text}")
            return
        buffer.read = True
        text, masks = self.program.offset(self.space, parts, x.index.offset)
        spread = [f"{self.program.arange(p, len(self.space), d)} * 0"
                  for p, (d, f) in enumerate(zip(self.space, self.full[x.mask], strict=True)) if f]  # fmt: skip
        pointer, mask = " + ".join([buffer.pointer, text, *spread]), " & ".join([*masks, self.values[x.mask]])
        self.program.emit(f"{self.values[i]} = tl.load({pointer}, mask={mask}, other=0)", [buffer])

    def _iota(self, i: int, x: Iota) -> str:
        return f"({self.program.offset(self.space, self._parts(x.index), x.index.offset)[0]}).to(tl.int64)"

    def _reduce(self, i: int, x: Reduce) -> str:
        value, shape, masks = self._operand(x.x, x), [], []
        for p, (a, d, full) in enumerate(zip(self.axes, self.space, self.full[x.x], strict=True)):
            shape.append(d.block if a.tile or full else 1)
            if a.tile and not d.is_exact:
                masks.append(f"({self.program.arange(p, len(self.space), d)} < {d.size})")
        if any(a.tile and a.size > 1 and not full for a, full in zip(self.axes, self.full[x.x], strict=True)):
            value = f"tl.broadcast_to({value}, {shape})"
        if masks:
            value = f"tl.where({' & '.join(masks)}, {value}, {self._neutral(i)})"
        if x.op in ("any", "all"):
            value = f"({value}).to(tl.int32)"
        for p, a in enumerate(self.axes):
            if a.tile:
                value = reduced(x.op, value, p)
        return f"{value} != 0" if x.op in ("any", "all") else value

    def _store(self, i: int, x: Store) -> None:
        buffer, parts, value = self.buffers[x.arg], self._parts(x.index), self._operand(x.x, x)
        self.program.store(buffer, x.index.offset, self.space, parts, value)
        steps = self._steps(x.index)
        is_whole = self.full[x.x] == tuple(s != 0 for s in steps) and not x.index.offset
        if is_whole and not any(d.start for d in self.space) and value.isidentifier():
            self.program.hold(buffer, Held.of(value, self.space, steps))


def _axes(k: Kernel, tile: tuple[int, ...]) -> list[_Axis]:
    """The dims of a kernel's block: its axes, each as the dims of what it reads and writes, the farthest steps first."""
    axes = [_Axis(False, i, n, 1) for i, n in enumerate(k.grid)] + [
        _Axis(True, i, n, 1) for i, n in enumerate(tile)
    ]
    accesses = [x for x in k.body if isinstance(x, (Load, Store))]
    done = False
    while not done:
        done = True
        for i, a in enumerate(axes):
            if inner := next(
                filter(None, (_split(a, x, k.args[x.arg].shape, len(tile)) for x in accesses)), 0
            ):
                axes[i : i + 1] = [
                    _Axis(a.tile, a.axis, a.size // inner, a.inner * inner),
                    _Axis(a.tile, a.axis, inner, a.inner),
                ]
                done = False
                break
    axes = [a for a in axes if a.size > 1] or axes[:1]
    covered = lambda x: (math.prod(a.size for a in axes if a.step(x.index, len(tile))), isinstance(x, Store))
    if accesses:
        main = max(accesses, key=covered)
        others = [max((abs(a.step(x.index, len(tile))) for x in accesses), default=0) for a in axes]
        far = {a: abs(a.step(main.index, len(tile))) or o for a, o in zip(axes, others, strict=True)}
        axes.sort(key=lambda a: -far[a])
    while len(axes) < 2:
        axes.insert(0, _Axis(False, 0, 1, 0))
    return axes


def _split(a: _Axis, x: Load | Store, shape: tuple[int, ...], tile: int) -> int:
    """Where an access along an axis goes on to the next row, or column ... of a tensor: after so many steps; 0: nowhere."""
    step, far = abs(a.step(x.index, tile)), 1
    for n in reversed(shape):
        far *= n
        if step and far % step == 0 and 1 < far // step < a.size and a.size % (far // step) == 0:
            return far // step
    return 0
