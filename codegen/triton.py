"""Loop IR -> Triton source. Entry points: `source` (a module), `schedule` (its blocks), `load` (as a function).

Programs cover the grid in blocks of `rows`, a kernel with reductions also its tile in blocks of `cols` (in a loop if it is
large or symbolic). Blocks follow from shapes alone, so sums have one order. Padding, masks and offset widths exist only
here. Nothing of Triton is imported; offline.py compiles the text, and it runs as it is under TRITON_INTERPRET=1 (interpret.py).
"""

from __future__ import annotations

import dataclasses
import keyword
import linecache
import math
import os
import re
from collections.abc import Callable, Sequence

import torch

from fxfunc.passes import errors
from fxfunc.passes.dims import Dim, Size, estimate, numel

from .explain import source_line
from .loops import Apply, Const, Index, Instr, Iota, Kernel, Load, Reduce, Store, neutral, value_names

TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64",
         torch.bool: "int1", torch.uint8: "uint8", torch.int8: "int8", torch.int16: "int16", torch.int32: "int32",
         torch.int64: "int64"}  # fmt: skip
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
            torch.int64: "*i64"}  # fmt: skip


# ---- the elementwise operations: a template, or one chosen by the dtype of the operands ----


def _by_kind(floating: str, integer: str) -> Callable[[torch.dtype], str]:
    return lambda dtype: floating if dtype.is_floating_point else integer


def _f32(single: str, double: str) -> Callable[[torch.dtype], str]:
    return lambda dtype: single if dtype is torch.float32 else double


_LIBDEVICE = ("exp exp2 expm1 log log2 log10 log1p rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
              "floor ceil trunc lgamma").split()  # fmt: skip
_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^",
          "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # fmt: skip
TEMPLATES: dict[str, str | Callable[[torch.dtype], str]] = {
    **{name: f"libdevice.{name}({{0}})" for name in _LIBDEVICE},
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _INFIX.items()},
    "neg": _by_kind("{0} * -1.0", "-{0}"),  # Triton's -x is 0 - x, which loses -0.0
    "abs": "tl.abs({0})",
    "round": "libdevice.rint({0})",
    "sqrt": _f32("tl.sqrt_rn({0})", "libdevice.sqrt({0})"),
    "div": _f32("tl.div_rn({0}, {1})", "{0} / {1}"),
    "pow": "libdevice.pow({0}, {1})",
    "atan2": "libdevice.atan2({0}, {1})",
    "fmod": _by_kind("libdevice.fmod({0}, {1})", "{0} % {1}"),
    "rem": _by_kind("rem_float({0}, {1})", "rem_int({0}, {1})"),
    "floordiv": _by_kind("floordiv_float({0}, {1})", "floordiv_int({0}, {1})"),
    "truncdiv": "{0} // {1}",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "not": lambda dtype: "{0} == 0" if dtype is torch.bool else "~{0}",
    "where": "tl.where({0}, {1}, {2})",
}
_ACCUMULATE = {"sum": "{0} + {1}", "prod": "{0} * {1}", "amax": "maximum({0}, {1})", "amin": "minimum({0}, {1})",
               "any": "{0} | {1}", "all": "{0} & {1}"}  # fmt: skip
_COMBINE = {"prod": "product", "amax": "maximum", "amin": "minimum", "any": "either", "all": "both"}

# As ATen: a NaN wins; // rounds down and % has the sign of the divisor.
HELPERS = {
    "maximum": "(a, b):\n    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "(a, b):\n    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "product": "(a, b):\n    return a * b",
    "either": "(a, b):\n    return a | b",
    "both": "(a, b):\n    return a & b",
    "rem_int": "(a, b):\n    r = a % b\n    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)",
    "floordiv_int": "(a, b):\n    q = a // b\n    r = a % b\n"
                    "    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)",
    "rem_float": "(a, b):\n    r = libdevice.fmod(a, b)\n    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)",
    "floordiv_float": "(a, b):\n    r = libdevice.fmod(a, b)\n    e = libdevice.div_rn(a, b)\n"
                      "    q = libdevice.div_rn(a - r, b)\n    q = tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)\n"
                      "    f = libdevice.floor(q)\n    f = tl.where(q - f > 0.5, f + 1, f)\n"
                      "    f = tl.where(q == 0, libdevice.copysign(q * 0, e), f)\n"
                      "    return tl.where(b == 0, e, f)",
}  # fmt: skip


# ---- blocks ----

MANY_PROGRAMS = 128
LOOP_COLS = 4096  # of a tile that a program holds whatever its values
MOST_COLS = 2**14  # of one that it holds if registers do
REGISTERS = 0.75  # of those that a thread has, for the values of a tile that are alive at once
FEW_WARPS = 1024  # programs from which each has as few warps as it can: what warps share costs instructions


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Rows of the grid and columns of the tile that a program holds, and whether it loops over the tile.

    Row numbers are int64 if `wide`, column numbers if `wide_cols`.
    """

    rows: int
    cols: int
    looped: bool
    warps: int
    wide: bool
    wide_cols: bool = False


def schedule(k: Kernel) -> Schedule:
    """The blocks of a kernel: a function of its shapes, symbolic ones estimated."""
    rows, tile = estimate(numel(k.grid)), tile_of(k)
    accesses = [x for x in k.body if isinstance(x, (Load, Iota, Store))]
    down = max((span(x.index.grid, k.grid) for x in accesses), default=0)
    across = max((span(x.index.tile, x.shape) for x in accesses), default=0)
    wide = any(
        isinstance(n, Dim) or n >= 2**31
        for n in (numel(k.grid) * numel(tile), *(numel(a.shape) for a in k.args), down + across)
    )
    if not tile:
        return Schedule(1024 if rows >= 2**18 else 256 if rows > 128 else 128, 0, False, 4, wide)
    n = numel(tile)
    width, fixed = power(estimate(n)), not isinstance(n, Dim)
    if any(isinstance(x, Load) and x.index.tile[-1] == 1 for x in k.body):
        cols = width if fixed and _fits(k, width) else min(width, LOOP_COLS if fixed else 1024)
        block = _enough_programs(rows, min(power(rows), 64, max(1, 1024 // cols)), 256 // cols)
    else:
        block = _enough_programs(rows, min(power(rows), 64), 16)
        cols = min(width, 1024 // block)
    looped = not fixed or cols < n
    warps = 16 if block * cols > LOOP_COLS else 8 if block * cols == LOOP_COLS else 4
    if not looped and rows >= block * FEW_WARPS:
        held = [w for w in (1, 2, 4, 8) if block * cols <= 32 * 32 * w and _hold(k, block * cols, w)]
        warps = min([*held, warps])
    return Schedule(block, cols, looped, warps, wide, across >= 2**31)


def _fits(k: Kernel, width: int) -> bool:
    """True if a program can hold a tile of so many columns, and read memory once."""
    return width <= LOOP_COLS or (width <= MOST_COLS and _hold(k, width, 16))


def _hold(k: Kernel, elements: int, warps: int) -> bool:
    """True if registers hold all values of a tile of so many elements that are alive at once."""
    sizes = [max(1, dtype.itemsize // 4) * any(s != 1 for s in shape) for shape, dtype in k.types]
    last = {j: i for i, x in enumerate(k.body) for j in x.inputs}
    most = now = 0
    for i, x in enumerate(k.body):
        now += 0 if isinstance(x, Store) else sizes[i]
        most = max(most, now)
        now -= sum(sizes[j] for j in set(x.inputs) if last[j] == i)
    return most * elements <= REGISTERS * min(255 * 32 * warps, 65536)


def span(strides: tuple[Size, ...], sizes: tuple[Size, ...]) -> int:
    """How far an access moves along these axes; symbolic terms are left out, being int64 as they are."""
    terms = zip(strides, sizes, strict=True)
    return sum(abs(s) * (n - 1) for s, n in terms if not isinstance(s, Dim) and not isinstance(n, Dim))


def _enough_programs(rows: int, block: int, least: int) -> int:
    """The block, halved while there are fewer programs than a large device has processors."""
    while block > max(1, least) and rows < block * MANY_PROGRAMS:
        block //= 2
    return block


def tile_of(k: Kernel) -> tuple[Size, ...]:
    """The tile that the reductions of a kernel reduce, () if it has none."""
    tiles = {(x.shape, x.axes) for x in k.body if isinstance(x, Reduce)}
    if len(tiles) > 1 or any(len(axes) != len(shape) for shape, axes in tiles):
        raise errors.BackendError(
            backend="triton", what=f"{k.name} reduces several tiles", instead="Report it."
        )
    return next(iter(tiles))[0] if tiles else ()


def power(n: int) -> int:
    """The least power of two that is as large."""
    return 1 << max(0, n - 1).bit_length()


# ---- source ----


def source(k: Kernel, s: Schedule | None = None) -> str:
    """The kernel as a module of Triton source, in its blocks or these."""
    return module("\n".join(["@triton.jit", *_Emitter(k, s or schedule(k)).lines()]))


def part_lines(k: Kernel, name: str) -> list[str]:
    """The kernel as a function of its name that takes the number of a program as its first argument."""
    return _Emitter(dataclasses.replace(k, name=name), schedule(k), "pid").lines()


def module(function: str) -> str:
    """A function with what it needs before it."""
    needed = [name for name in HELPERS if re.search(rf"(?<!tl\.)\b{name}\b", function)]
    helpers = "".join(f"\n\n@triton.jit\ndef {name}{HELPERS[name]}\n" for name in needed)
    head = "import triton\nimport triton.language as tl\n"
    if "libdevice." in function + helpers:
        head += "from triton.language.extra import libdevice\n"
    return f"{head}{helpers}\n\n{function}\n"


def reduced(op: str, value: str, axis: int) -> str:
    """A block without a dim, which stays as one of size 1; truth values are int32 in and out."""
    if op == "sum":
        return f"tl.sum({value}, axis={axis}, keep_dims=True)"
    return f"tl.reduce({value}, {axis}, {_COMBINE[op]}, keep_dims=True)"


class Instructions:
    """The instructions of a kernel as text. Subclasses say how memory is reached: `_load`, `_iota`, `_reduce`, `_store`.

    `unit` is the shape of a block of one element, `args` and `values` are the names of arguments and values."""

    unit: list[int]
    args: list[str]
    values: list[str]

    def __init__(self, k: Kernel):
        self.k = k
        self.out: list[str] = []
        self.indent = "    "
        self.source = ""
        self.consts = {i for i, x in enumerate(k.body) if isinstance(x, Const)}
        self.inline = {
            i for i in self.consts if all(self._is_literal(i, use) for use in k.body if i in use.inputs)
        }

    def _emit(self, line: str) -> None:
        self.out.append(self.indent + line)

    def _instr(self, i: int) -> None:
        x = self.k.body[i]
        if i in self.inline:
            return
        self._comment(x)
        if isinstance(x, Store):
            self._store(i, x)
        else:
            text = getattr(self, f"_{type(x).__name__.lower()}")(i, x)
            self._emit(f"{self.values[i]} = {text}")

    def _comment(self, x: Instr) -> None:
        if x.source and x.source != self.source:
            self.source = x.source
            self._emit(f"# {source_line(x.source)}")

    def _const(self, i: int, x: Const) -> str:
        if isinstance(x.value, Dim):
            return f"{size_text(x.value)}.to(tl.{TYPES[x.dtype]})"
        return _full(self.unit, x.value, x.dtype)

    def _apply(self, i: int, x: Apply) -> str:
        args = [self._operand(j, x) for j in x.args]
        operand = self.k.types[x.args[-1]][1]
        if x.op == "cast":
            return _cast(operand, x.dtype).format(*args)
        template = TEMPLATES[x.op]
        return (template if isinstance(template, str) else template(operand)).format(*args)

    def _picked(self, x: Load, masks: Sequence[str]) -> list[str]:
        """The computed terms of an address; as in ATen, the device stops at an index that is out of range."""
        terms, masked = [], f", mask={' & '.join(masks)}" if masks else ""
        for p in x.picks:
            value, where = self.values[p.value], f", {os.path.basename(x.source)}" if x.source else ""
            inside = f"(0 <= {value}) & ({value} < {size_text(p.size)})"
            self._emit(f"tl.device_assert({inside}, {f'index out of bounds{where}'!r}{masked})")
            terms.append(value if p.stride == 1 else f"{value} * {size_text(p.stride)}")
        return terms

    def _neutral(self, i: int, shape: Sequence[int] | None = None) -> str:
        dtype = self.k.types[i][1]
        return _full(list(shape or self.unit), neutral(self.k.body[i].op, dtype), dtype)

    def _operand(self, i: int, use: Instr) -> str:
        x = self.k.body[i]
        return _literal(x.value) if isinstance(x, Const) and self._is_literal(i, use) else self.values[i]

    def _is_literal(self, i: int, use: Instr) -> bool:
        """True if the constant can stand as a number there: Triton then gives it the dtype of the other operand."""
        x = self.k.body[i]
        plain = x.dtype in (torch.float32, torch.int64, torch.int32) and not isinstance(x.value, Dim)
        plain = plain and not _is_negative_zero(x.value)
        beside = isinstance(use, Apply) and use.op in _INFIX and any(j not in self.consts for j in use.args)
        return plain and beside and abs(x.value) < 2**31


class _Emitter(Instructions):
    """Emits one kernel. In a looped kernel, `depth` counts the reductions before a value: one loop over the tile a depth."""

    def __init__(self, k: Kernel, s: Schedule, pid: str = ""):
        super().__init__(k)
        self.pid = pid  # the argument that is the number of the program, "" if it is the launch's
        self.schedule, self.tile = s, tile_of(k)
        self.unit = [1, 1] if self.tile else [1]
        own = "tl triton libdevice pid row col block row_in col_in".split() + [
            f"{c}{i}" for c in "gt" for i in range(8)
        ]
        names = value_names(k, (*own, *HELPERS, *map(size_name, k.sizes)))
        self.args, self.values = names[: len(k.args)], names[len(k.args) :]
        self.depth = self._depths()

    def lines(self) -> list[str]:
        """The function, line by line."""
        given = [self.pid] if self.pid else []
        self.out = [f"def {self.k.name}({', '.join([*given, *self.args, *map(size_name, self.k.sizes)])}):"]
        self._rows()
        if self.schedule.looped:
            self._stages()
        else:
            if self.tile:
                self._columns(f"tl.arange(0, {self.schedule.cols})[None, :]")
            for i in range(len(self.k.body)):
                self._instr(i)
        return self.out

    # -- the index space --

    def _rows(self) -> None:
        s, n = self.schedule, numel(self.k.grid)
        pid = (self.pid or "tl.program_id(0)") + ".to(tl.int64)" * s.wide
        self._emit(f"row = {pid} * {s.rows} + tl.arange(0, {s.rows}){'[:, None]' if self.tile else ''}")
        self._emit(f"row_in = row < {size_text(n)}")
        self._axes("g", "row", self.k.grid)

    def _columns(self, text: str) -> None:
        self._emit(f"col = ({text}).to(tl.int64)" if self.schedule.wide_cols else f"col = {text}")
        self._emit(f"col_in = col < {size_text(numel(self.tile))}")
        self._axes("t", "col", self.tile)

    def _axes(self, letter: str, name: str, sizes: tuple[Size, ...]) -> None:
        """The coordinates of the axes from the number of a row or column; a single axis is the number itself."""
        for i in range(len(sizes) if len(sizes) > 1 else 0):
            inner = numel(sizes[i + 1 :])
            text = name if inner == 1 else f"{name} // {size_text(inner)}"
            self._emit(f"{letter}{i} = {text}{f' % {size_text(sizes[i])}' if i else ''}")

    def _offset(self, index: Index) -> str:
        """The text of an index; '' if it is 0."""
        terms = []
        for letter, name, strides in (("g", "row", index.grid), ("t", "col", index.tile)):
            for i, s in enumerate(strides):
                axis = name if len(strides) == 1 else f"{letter}{i}"
                terms += [] if s == 0 else [axis if s == 1 else f"{axis} * {size_text(s)}"]
        return " + ".join(terms + ([size_text(index.offset)] if index.offset != 0 else []))

    # -- loops --

    def _depths(self) -> list[int]:
        out: list[int] = []
        for x in self.k.body:
            out.append(max((out[j] + isinstance(self.k.body[j], Reduce) for j in x.inputs), default=0))
        return out

    def _stages(self) -> None:
        """For each depth: the loop over the tile, then what follows from its reductions at row level."""
        body = self.k.body
        self._run([i for i in range(len(body)) if self.depth[i] == 0 and self._at_row(i)])
        for depth in range(max(self.depth) + 1):
            roots = [i for i, x in enumerate(body) if self.depth[i] == depth and self._ends_loop(i, x)]
            if not roots:
                continue
            reduces = [i for i in roots if isinstance(body[i], Reduce)]
            for i in reduces:
                self._emit(f"{self.values[i]} = {self._neutral(i, [self.schedule.rows, self.schedule.cols])}")
            self._loop(roots)
            for i in reduces:
                self._emit(f"{self.values[i]} = {self._reduced(i, self.values[i])}")
            self._run([i for i in range(len(body)) if self.depth[i] == depth + 1 and self._at_row(i)])

    def _at_row(self, i: int) -> bool:
        """True for what a looped kernel computes outside of its loops."""
        return all(s == 1 for s in self.k.types[i][0]) and not isinstance(self.k.body[i], Reduce)

    def _ends_loop(self, i: int, x: Instr) -> bool:
        return isinstance(x, Reduce) or (isinstance(x, Store) and not self._at_row(i))

    def _loop(self, roots: list[int]) -> None:
        cols = self.schedule.cols
        self._emit(f"for block in range(0, {size_text(numel(self.tile))}, {cols}):")
        self.indent += "    "
        self._columns(f"block + tl.arange(0, {cols})[None, :]")
        needed, todo = set(roots), list(roots)
        while todo:
            inner = [
                j
                for j in self.k.body[todo.pop()].inputs
                if not self._at_row(j) and not isinstance(self.k.body[j], Reduce)
            ]
            todo += [j for j in inner if j not in needed]
            needed.update(inner)
        for i in sorted(needed):
            self._accumulate(i) if isinstance(self.k.body[i], Reduce) else self._instr(i)
        self.indent = self.indent[4:]

    def _run(self, instrs: list[int]) -> None:
        for i in instrs:
            self._instr(i)

    def _accumulate(self, i: int) -> None:
        x, acc = self.k.body[i], self.values[i]
        self._comment(x)
        value = f"tl.where(col_in, {self._operand(x.x, x)}, {self._neutral(i)})"
        self._emit(f"{acc} = {_ACCUMULATE[x.op].format(acc, value)}")

    # -- instructions --

    def _load(self, i: int, x: Load) -> str:
        offset, mask = self._offset(x.index), self._mask(x.index)
        if x.inputs:
            tiled = any(s != 1 for s in x.shape)
            mask = ["row_in", *["col_in"] * tiled, *([] if x.mask is None else [self.values[x.mask]])]
            spread = ["row * 0", "col * 0" if tiled else ""]
            offset = " + ".join(filter(None, [offset, *self._picked(x, mask), *spread]))
        pointer = self.args[x.arg] + (f" + {offset}" if offset else "")
        return f"tl.load({pointer}, mask={' & '.join(mask)}, other=0)" if mask else f"tl.load({pointer})"

    def _mask(self, index: Index) -> list[str]:
        """What must hold for an access to be inside; an address that no axis moves is always inside."""
        return ["row_in"] * any(s != 0 for s in index.grid) + ["col_in"] * any(s != 0 for s in index.tile)

    def _store(self, i: int, x: Store) -> None:
        tiled = any(s != 1 for s in x.shape)
        offset = " + ".join(
            filter(None, [self._offset(x.index), "" if any(s != 0 for s in x.index.grid) else "row * 0"])
        )
        mask = " & ".join(["row_in"] + ["col_in"] * tiled)
        self._emit(f"tl.store({self.args[x.arg]} + {offset}, {self._operand(x.x, x)}, mask={mask})")

    def _iota(self, i: int, x: Iota) -> str:
        moves = any(s != 0 for s in (*x.index.grid, *x.index.tile))
        offset = " + ".join(filter(None, [self._offset(x.index), "" if moves else "row * 0"]))
        return f"({offset}).to(tl.int64)"

    def _reduce(self, i: int, x: Reduce) -> str:
        whole = self.schedule.cols == numel(x.shape) != 1 and self.k.types[x.x][0] == x.shape
        value = self._operand(x.x, x)
        return self._reduced(i, value if whole else f"tl.where(col_in, {value}, {self._neutral(i)})")

    def _reduced(self, i: int, value: str) -> str:
        op = self.k.body[i].op
        return (
            f"{reduced(op, f'({value}).to(tl.int32)', 1)} != 0"
            if op in ("any", "all")
            else reduced(op, value, 1)
        )


def size_text(x: Size) -> str:
    """A size as source text."""
    text = x.python(size_name) if isinstance(x, Dim) else str(x)
    return text[1:-1] if text[1:-1].isidentifier() else text


# What the emitters call their own.
_OWN = re.compile(r"tl|triton|libdevice|program|task|tasks|scratch\w*|pid|part\d+|row\w*|col\w*|block|tile|item|group|height|"
                  r"start|term\w*|[gt]\d+|size_of_\w*")  # fmt: skip


def size_name(name: str) -> str:
    """The parameter of a symbolic size, which may have any name."""
    taken = _OWN.fullmatch(name) or name in HELPERS or keyword.iskeyword(name)
    return f"size_of_{name}" if taken else name


def function_name(name: str) -> str:
    """The function of a kernel, which may have the name of one call."""
    taken = name in HELPERS or name in ("tl", "triton", "libdevice") or keyword.iskeyword(name)
    return f"{name}_kernel" if taken else name


def _literal(x: float) -> str:
    """A number as source text; negative ones in parentheses."""
    text = (
        f'float("{x}")'
        if isinstance(x, float) and (x != x or x in (float("inf"), float("-inf")))
        else repr(x)
    )
    return f"({text})" if text.startswith("-") else text


def _full(shape: list[int], value: float, dtype: torch.dtype) -> str:
    if _is_negative_zero(value):  # Triton takes -0.0 for 0
        return f"({_full(shape, 0.0, dtype)} * -1.0)"
    return f"tl.full({shape}, {_literal(value)}, tl.{TYPES[dtype]})"


def _is_negative_zero(x: float) -> bool:
    return x == 0 and math.copysign(1, x) < 0


def _cast(old: torch.dtype, new: torch.dtype) -> str:
    """A cast with ATen's meaning: to bool by `!= 0`, float to small integers and all to half through a wider type."""
    if new is torch.bool:
        return "{0} != 0"
    steps = []
    if old.is_floating_point and new is torch.uint8:
        steps = ["int64"]
    elif old.is_floating_point and new in (torch.int8, torch.int16):
        steps = ["int32"]
    elif new in (torch.float16, torch.bfloat16) and old not in (torch.float32, new):
        steps = ["float32"]
    return "{0}" + "".join(f".to(tl.{t})" for t in [*steps, TYPES[new]])


# ---- as a function ----


def load(name: str, text: str) -> Callable:
    """The jitted function of a name in a module's source, which stays readable by tracebacks and by Triton."""
    file = f"<fxfunc kernel {name} {hash(text) & 0xFFFFFFFF:x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict = {"__name__": "fxfunc_kernel"}
    exec(compile(text, file, "exec"), scope)
    return scope[name]
