"""Building the body of a kernel. Entry points: `Body` (instructions, equal ones shared), `Expr` (what the rows compute with)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fxfunc.passes.dims import Dim, Size

from .loops import REDUCTIONS, Apply, Const, Dot, Instr, Load, Number, Reduce, Store


class Body:
    """The instructions of a kernel under construction; `tile` are the sizes of its tile axes."""

    def __init__(self, tile: tuple[Size, ...] = ()):
        self.tile = tile
        self.instrs: list[Instr] = []
        self.dtypes: list[torch.dtype] = []
        self.source = ""
        self._shared: dict[Instr, int] = {}

    def emit(self, instr: Instr, dtype: torch.dtype) -> Expr:
        """The value of an instruction, an equal earlier one if there is one."""
        found = self._shared.setdefault(instr, len(self.instrs))
        if found == len(self.instrs):
            self.instrs.append(dataclasses.replace(instr, source=self.source) if self.source else instr)
            self.dtypes.append(dtype)
        return Expr(self, found)

    def const(self, value: Number | Dim, dtype: torch.dtype) -> Expr:
        """A number of this dtype."""
        if not isinstance(value, Dim):
            kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int
            value = kind(value)
        return self.emit(Const(value, dtype), dtype)

    def name(self, x: Expr, name: str) -> None:
        """Call the value `name`, unless it has a name."""
        if not self.instrs[x.i].name:
            self.instrs[x.i] = dataclasses.replace(self.instrs[x.i], name=name)

    def finish(self, stores: list[Store]) -> tuple[Instr, ...]:
        """The instructions that the stores need, renumbered, then the stores."""
        needed, todo = set(), [s.x for s in stores]
        while todo:
            if (i := todo.pop()) not in needed:
                needed.add(i)
                todo += self.instrs[i].inputs
        new = {i: position for position, i in enumerate(sorted(needed))}
        return tuple([_renumber(self.instrs[i], new) for i in new] + [_renumber(s, new) for s in stores])


def _renumber(instr: Instr, new: dict[int, int]) -> Instr:
    change: dict = {}
    for field in ("mask", "x", "y"):
        if getattr(instr, field, None) is not None:
            change[field] = new[getattr(instr, field)]
    if isinstance(instr, Apply):
        change["args"] = tuple(new[i] for i in instr.args)
    if isinstance(instr, Load) and instr.picks:
        change["picks"] = tuple(dataclasses.replace(p, value=new[p.value]) for p in instr.picks)
    return dataclasses.replace(instr, **change) if change else instr


def _arithmetic(op: str, reverse: bool = False) -> Callable:
    return (lambda x, y: x.coerce(y).op(op, x)) if reverse else (lambda x, y: x.op(op, y))


class Expr:
    """A value of a body, with operators; numbers take the dtype of what they meet."""

    __slots__ = ("body", "i")

    def __init__(self, body: Body, i: int):
        self.body, self.i = body, i

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtypes[self.i]

    @property
    def number(self) -> Number | Dim | None:
        """Its value if it is a constant."""
        instr = self.body.instrs[self.i]
        return instr.value if isinstance(instr, Const) else None

    def coerce(self, other: Expr | Number | Dim) -> Expr:
        """`other` as a value of this dtype."""
        return other if isinstance(other, Expr) else self.body.const(other, self.dtype)

    def op(self, name: str, *others: Expr | Number | Dim) -> Expr:
        """An elementwise operation on this and others, in this dtype."""
        args = (self.i, *(self.coerce(o).i for o in others))
        dtype = torch.bool if name in ("eq", "ne", "lt", "le", "gt", "ge") else self.dtype
        return self.body.emit(Apply(name, args, dtype), dtype)

    def cast(self, dtype: torch.dtype) -> Expr:
        """In this dtype; to bool is `!= 0`."""
        if self.number is not None and not isinstance(self.number, Dim) and _same_kind(self.dtype, dtype):
            return self.body.const(self.number, dtype)
        return self if dtype == self.dtype else self.body.emit(Apply("cast", (self.i,), dtype), dtype)

    def where(self, a: Expr, b: Expr | Number) -> Expr:
        """`a` where this holds, else `b`."""
        return self.body.emit(Apply("where", (self.i, a.i, a.coerce(b).i), a.dtype), a.dtype)

    def reduce(self, op: str) -> Expr:
        """Over all tile axes."""
        tile = self.body.tile
        assert op in REDUCTIONS
        return self.body.emit(Reduce(op, self.i, tile, tuple(range(len(tile)))), self.dtype)

    def dot(self, other: Expr, dtype: torch.dtype) -> Expr:
        """The sum over all tile axes of the products with `other`, in this dtype."""
        return self.body.emit(Dot(self.i, other.i, self.body.tile, dtype), dtype)

    __add__, __radd__ = _arithmetic("add"), _arithmetic("add", reverse=True)
    __sub__, __rsub__ = _arithmetic("sub"), _arithmetic("sub", reverse=True)
    __mul__, __rmul__ = _arithmetic("mul"), _arithmetic("mul", reverse=True)
    __truediv__, __rtruediv__ = _arithmetic("div"), _arithmetic("div", reverse=True)
    __and__, __or__, __xor__ = _arithmetic("and"), _arithmetic("or"), _arithmetic("xor")
    __lt__, __le__, __gt__, __ge__ = (_arithmetic(op) for op in ("lt", "le", "gt", "ge"))

    def __neg__(self) -> Expr:
        return self.op("neg")


def _same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    """True if a constant of dtype `a` may be written in dtype `b`: both exact as Python numbers."""
    return (
        a == b
        or (a in (torch.int64, torch.int32) and b in (torch.float64, torch.float32))
        or (a, b) == (torch.bool, torch.float32)
    )
