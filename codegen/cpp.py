"""Loop IR -> C++. Entry points: `function` (a kernel as a C++ function), `prelude` (what such functions use), `TYPES`.

A kernel is a nest of loops over its grid, the innermost a row of SIMD lanes. With reductions, a loop over the tile for each
depth of reductions (what two loops need is computed in both, to the same bits), whose lanes run along the tile where that is
contiguous in memory (row sums) or else along the last axis of the grid (column sums). Sums have one order, given by shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch

from fxfunc.passes.dims import Dim, Size, numel

from . import cxx
from .explain import source_line
from .loops import Apply, Const, Index, Iota, Kernel, Load, Reduce, Store, neutral, value_names
from .triton import tile_of

TYPES = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double",
         torch.bool: "bool", torch.uint8: "uint8_t", torch.int8: "int8_t", torch.int16: "int16_t",
         torch.int32: "int32_t", torch.int64: "int64_t"}  # fmt: skip

LANES = 16  # of a reduction along the tile
COLUMNS = 64  # of the grid that are reduced side by side
NARROW, NARROW_BLOCK = 7, 512  # lanes run along another axis than one of so few elements, in such blocks
BLOCK = (
    4096  # elements of one axis that a thread does at once: the same blocks whatever the number of threads
)

_KEYWORDS = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t class compl const "
    "const_cast constexpr continue decltype default delete do double dynamic_cast else enum explicit export extern false "
    "float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr operator or or_eq private "
    "protected public register reinterpret_cast return short signed sizeof static static_assert static_cast struct switch "
    "template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t "
    "while xor xor_eq linux unix M_PI INFINITY NAN main errno int8_t int16_t int32_t int64_t uint8_t"
).split()
_OURS = (
    "half bfloat16 maximum minimum rem_int rem_float floordiv_int floordiv_float truncdiv_int fmod_int fold mm bmm add_to "
    "sum_blocks threads scratch args block lane lanes load splat fma_ dots tile rows width VECTOR SUMS at_least at_most "
    "Lanes part joined HIDDEN choose total put gather scatter_add indexed in_range bad Ints swap_halves turn_into turn_block "
    "BLOCKS begin end Nothing"
).split()
_LIBM = (
    "exp exp2 expm1 log log2 log10 log1p sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc floor "
    "ceil trunc lgamma fabs rint pow atan2 fmod copysign gamma y0 y1 yn j0 j1 jn index time div signgam"
).split()
_LOOPS = [f"{c}{i}" for c in "gt" for i in range(8)]
RESERVED = (*_KEYWORDS, *_OURS, *_LIBM, *(f"{f}f" for f in _LIBM), *_LOOPS,
            *(f"{kind}_{name}{f}" for kind in ("lanes", "alone") for name in cxx.VECTORS for f in ("", "f")))  # fmt: skip


# ---- the elementwise operations: a template, or one chosen by the dtype of the operands ----


def _by_kind(floating: str, integer: str) -> Callable[[torch.dtype], str]:
    return lambda dtype: (
        floating.replace("@", "f" if dtype is torch.float32 else "") if dtype.is_floating_point else integer
    )


def _libm(call: str) -> Callable[[torch.dtype], str]:
    return _by_kind(call, call)


_CALLS = ("exp exp2 expm1 log log2 log10 log1p sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
          "floor ceil trunc lgamma").split()  # fmt: skip
_INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^",
          "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # fmt: skip
TEMPLATES: dict[str, str | Callable[[torch.dtype], str]] = {
    **{name: _libm(f"{'lanes_' * (name in cxx.VECTORS)}{name}@({{0}})") for name in _CALLS},
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _INFIX.items()},
    "neg": "-{0}",
    "abs": _by_kind("fabs@({0})", "{0} < 0 ? -{0} : {0}"),
    "round": _libm("rint@({0})"),
    "rsqrt": _libm("1 / sqrt@({0})"),
    "div": "{0} / {1}",
    "pow": _libm("lanes_pow@({0}, {1})"),
    "atan2": _libm("lanes_atan2@({0}, {1})"),
    "fmod": _by_kind("fmod@({0}, {1})", "fmod_int({0}, {1})"),
    "rem": _by_kind("rem_float({0}, {1})", "rem_int({0}, {1})"),
    "floordiv": _by_kind("floordiv_float({0}, {1})", "floordiv_int({0}, {1})"),
    "truncdiv": _by_kind("trunc@({0} / {1})", "truncdiv_int({0}, {1})"),
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "not": lambda dtype: "!{0}" if dtype is torch.bool else "~{0}",
    "where": lambda dtype: (
        "choose({0}, {1}, {2})" if dtype in (torch.float32, torch.float64) else "{0} ? {1} : {2}"
    ),
}
_ACCUMULATE = {"sum": "{0} + {1}", "prod": "{0} * {1}", "amax": "maximum({0}, {1})", "amin": "minimum({0}, {1})",
               "any": "{0} | {1}", "all": "{0} & {1}"}  # fmt: skip


# ---- one kernel ----


def name_of(k: Kernel, name: str | None = None) -> str:
    """The C++ name of a kernel's function: never one that means something there."""
    return "k_" + re.sub(r"\W", "_", name or k.name, flags=re.ASCII)


def function(k: Kernel, name: str, parallel: bool = False, part: bool = False) -> str:
    """The kernel as a function of its arguments, its sizes, if `parallel` the number of threads, and if it does only a `part`
    of the grid, where that begins and ends on the first axis."""
    return _Function(k, name, parallel, part).text()


class _Function:
    """Writes one kernel."""

    def __init__(self, k: Kernel, name: str, parallel: bool, part: bool):
        self.k, self.name, self.parallel, self.part, self.tile = k, name, parallel, part, tile_of(k)
        names = [
            n if n.isascii() else "v" for n in value_names(k, (*RESERVED, *map(_size_name, k.sizes), name))
        ]
        names = names if len(set(names)) == len(names) else [f"v{i}" for i in range(len(names))]
        self.args, self.values = names[: len(k.args)], names[len(k.args) :]
        self.out: list[str] = []
        self.depth = 1
        self.source = ""
        self.stage = self._stages()

    def text(self) -> str:
        """The function."""
        params = [
            f"{TYPES[a.dtype]}* __restrict {n}" if a.output else f"const {TYPES[a.dtype]}* __restrict {n}"
            for a, n in zip(self.k.args, self.args, strict=True)
        ]
        params += [f"int64_t {_size_name(s)}" for s in self.k.sizes] + ["int threads"] * self.parallel
        params += ["int64_t begin", "int64_t end"] * self.part
        if not self.tile:
            self._pointwise()
        elif self._by_columns():
            self._columns()
        else:
            self._rows()
        head = f"static {'__attribute__((noinline)) '}void {self.name}({', '.join(params)}) {{"
        return "\n".join([head, *self.out, "}"]) + "\n"

    # -- lines and loops --

    def _emit(self, line: str) -> None:
        self.out.append("  " * self.depth + line)

    def _open(self, line: str) -> None:
        self._emit(line + " {")
        self.depth += 1

    def _close(self, count: int = 1) -> None:
        for _ in range(count):
            self.depth -= 1
            self._emit("}")

    def _for(self, var: str, n: Size) -> None:
        start, stop = ("begin", "end") if self.part and var == "g0" else (0, _size(n))
        self._open(f"for (int64_t {var} = {start}; {var} < {stop}; {var}++)")

    def _grid(self, axes: Sequence[int]) -> None:
        """Loops over these axes of the grid, the first one shared by the threads."""
        for i in axes:
            if i == 0 and self.parallel:
                self._emit("#pragma omp parallel for num_threads(threads) schedule(static)")
            self._for(f"g{i}", self.k.grid[i])

    # -- forms --

    def _pointwise(self) -> None:
        last, all_ = len(self.k.grid) - 1, range(len(self.k.body))
        if self.parallel and last == 0:  # blocks of one axis: the same lanes whatever the number of threads
            n = _size(self.k.grid[0])
            self._emit("#pragma omp parallel for num_threads(threads) schedule(static)")
            self._open(f"for (int64_t block = 0; block < {n}; block += {BLOCK})")
            self._emit("#pragma omp simd")
            self._open(f"for (int64_t g0 = block; g0 < minimum<int64_t>({n}, block + {BLOCK}); g0++)")
            self._run(all_)
            self._close(2)
            return
        if last and not self.part and self._is_narrow(self.k.grid[last], self.k.grid[last - 1]):
            self._across(last - 1)
            return
        self._grid(range(last))
        self._emit("#pragma omp simd")
        self._for(f"g{last}", self.k.grid[last])
        self._run(all_)
        self._close(len(self.k.grid))

    def _is_narrow(self, inner: Size, outer: Size) -> bool:
        """True for an axis with too little for lanes beside one with enough, if what vectors save is more than strides cost."""
        if not (isinstance(inner, int) and isinstance(outer, int)) or inner > NARROW or outer < COLUMNS:
            return False
        return any(isinstance(x, Apply) and x.op in cxx.VECTORS for x in self.k.body)

    def _across(self, axis: int) -> None:
        """Lanes along the axis before the last, in blocks that stay in cache while the last is gone through."""
        n = self.k.grid[axis]
        self._grid(range(axis))
        if self.parallel and axis == 0:
            self._emit("#pragma omp parallel for num_threads(threads) schedule(static)")
        self._open(f"for (int64_t block = 0; block < {n}; block += {NARROW_BLOCK})")
        self._for(f"g{axis + 1}", self.k.grid[axis + 1])
        self._emit("#pragma omp simd")
        stop = f"minimum<int64_t>({n}, block + {NARROW_BLOCK})"
        self._open(f"for (int64_t g{axis} = block; g{axis} < {stop}; g{axis}++)")
        self._run(range(len(self.k.body)))
        self._close(len(self.k.grid) + 1)

    def _rows(self) -> None:
        """Lanes along the tile."""
        self._grid(range(len(self.k.grid)))
        self._run(self._row_level(0))
        for stage in range(max(self.stage) + 1):
            roots = self._roots(stage)
            reduces = [i for i in roots if isinstance(self.k.body[i], Reduce)]
            if roots:
                lanes = self._lanes() if reduces else 0
                for i in reduces:
                    self._lane_array(i, f"{self.values[i]}_lanes", lanes)
                self._tile_loop(roots, lanes)
                for i in reduces:
                    op = _ACCUMULATE[self.k.body[i].op].format("a", "b")
                    t = TYPES[self.k.types[i][1]]
                    fold = (
                        f"fold<{lanes}>({self.values[i]}_lanes, []({t} a, {t} b) -> {t} {{ return {op}; }})"
                    )
                    self._emit(f"const {t} {self.values[i]} = {fold};")
            self._run(self._row_level(stage + 1))
        self._close(len(self.k.grid))

    def _lanes(self) -> int:
        n = self.tile[-1]
        return LANES if isinstance(n, Dim) else min(LANES, 1 << max(0, n - 1).bit_length())

    def _tile_loop(self, roots: list[int], lanes: int) -> None:
        *outer, last = range(len(self.tile))
        for i in outer:
            self._for(f"t{i}", self.tile[i])
        n, t = self.tile[last], f"t{last}"
        cone = self._cone(roots)
        if not lanes:
            self._emit("#pragma omp simd")
            self._for(t, n)
            self._run(cone)
            self._close()
        else:
            whole = n // lanes * lanes if isinstance(n, int) else f"{_size(n)} / {lanes} * {lanes}"
            if whole != 0:
                self._open(f"for (int64_t block = 0; block < {whole}; block += {lanes})")
                self._lane_loop(cone, t, "block", lanes)
                self._close()
            if not isinstance(n, int) or n % lanes:
                rest = n % lanes if isinstance(n, int) else f"{_size(n)} % {lanes}"
                self._lane_loop(cone, t, whole, rest)
        self._close(len(outer))

    def _lane_loop(self, cone: list[int], var: str, start: object, count: object) -> None:
        self._emit("#pragma omp simd")
        self._open(f"for (int64_t lane = 0; lane < {count}; lane++)")
        self._emit(f"const int64_t {var} = {start} + lane;")
        self._run(cone)
        self._close()

    def _columns(self) -> None:
        """Lanes along the last axis of the grid."""
        last = len(self.k.grid) - 1
        n, g = self.k.grid[last], f"g{last}"
        width = _width(n)
        self._grid(range(last))
        if self.parallel and last == 0:
            self._emit("#pragma omp parallel for num_threads(threads) schedule(static)")
        self._open(f"for (int64_t block = 0; block < {_size(n)}; block += {width})")
        whole = isinstance(n, int) and n % width == 0
        count: object = width if whole else "lanes"
        if not whole:
            self._emit(f"const int64_t lanes = minimum<int64_t>({width}, {_size(n)} - block);")
        for stage in range(max(self.stage) + 1):
            roots = self._roots(stage)
            for i in roots:
                if isinstance(self.k.body[i], Reduce):
                    self._lane_array(i, self.values[i], width)
            if roots:
                for i, size in enumerate(self.tile):
                    self._for(f"t{i}", size)
                self._lane_loop(self._cone(roots, True), g, "block", count)
                self._close(len(self.tile))
        stores = [i for i, x in enumerate(self.k.body) if isinstance(x, Store) and self._at_row(i)]
        if stores:
            self._lane_loop(self._cone(stores, True), g, "block", count)
        self._close(len(self.k.grid))

    def _lane_array(self, i: int, name: str, lanes: int) -> None:
        t, value = (
            TYPES[self.k.types[i][1]],
            self._literal(neutral(self.k.body[i].op, self.k.types[i][1]), self.k.types[i][1]),
        )
        self._emit(f"{t} {name}[{lanes}];")
        self._emit(f"for (int64_t lane = 0; lane < {lanes}; lane++) {name}[lane] = {value};")

    # -- which instruction where --

    def _stages(self) -> list[int]:
        """The number of reductions that come before each value."""
        out: list[int] = []
        for x in self.k.body:
            out.append(max((out[j] + isinstance(self.k.body[j], Reduce) for j in x.inputs), default=0))
        return out

    def _at_row(self, i: int) -> bool:
        """True for what is one value at each point of the grid, reductions aside."""
        return all(s == 1 for s in self.k.types[i][0]) and not isinstance(self.k.body[i], Reduce)

    def _row_level(self, stage: int) -> list[int]:
        return [i for i in range(len(self.k.body)) if self.stage[i] == stage and self._at_row(i)]

    def _roots(self, stage: int) -> list[int]:
        """What a loop over the tile is for."""
        return [
            i
            for i, x in enumerate(self.k.body)
            if self.stage[i] == stage
            and (isinstance(x, Reduce) or (isinstance(x, Store) and not self._at_row(i)))
        ]

    def _cone(self, roots: Sequence[int], rows: bool = False) -> list[int]:
        """What the roots need, in order: all down to reductions, and without `rows` no values of rows."""
        needed, todo = set(roots), list(roots)
        while todo:
            for j in self.k.body[todo.pop()].inputs:
                if (
                    j not in needed
                    and not isinstance(self.k.body[j], Reduce)
                    and (rows or not self._at_row(j))
                ):
                    needed.add(j)
                    todo.append(j)
        return sorted(needed)

    def _by_columns(self) -> bool:
        """True if lanes along the grid move memory in order and lanes along the tile would not, or have too little to do."""
        moved = [
            x.index for x in self.k.body if isinstance(x, (Load, Store)) and any(s != 0 for s in x.index.tile)
        ]
        whole = [x for x in moved if x.grid[-1] != 0]  # the others are read again at each point of the grid
        grid = sum(x.grid[-1] == 1 for x in whole or moved)
        tile = sum(x.tile[-1] == 1 for x in whole or moved)
        if self._is_narrow(numel(self.tile), self.k.grid[-1]):
            return True
        return self.k.grid[-1] != 1 and grid > tile

    # -- instructions --

    def _run(self, instrs: Sequence[int]) -> None:
        for i in instrs:
            self._instr(i)

    def _instr(self, i: int) -> None:
        x, (_, dtype) = self.k.body[i], self.k.types[i]
        if isinstance(x, Const):
            return  # written where it is read
        if x.source and x.source != self.source:
            self.source = x.source
            self._emit(f"// {comment(source_line(x.source))}")
        if isinstance(x, Store):
            self._emit(f"{self.args[x.arg]}[{self._offset(x.index)}] = {self._value(x.x)};")
        elif isinstance(x, Reduce):
            array = f"{self.values[i]}{'' if self._by_columns() else '_lanes'}[lane]"
            self._emit(f"{array} = {_ACCUMULATE[x.op].format(array, self._value(x.x))};")
        else:
            text = {Load: self._load, Iota: self._iota, Apply: self._apply}[type(x)](x)
            self._emit(f"const {TYPES[dtype]} {self.values[i]} = {text};")

    def _value(self, i: int) -> str:
        x = self.k.body[i]
        if isinstance(x, Const):
            return self._literal(x.value, x.dtype)
        return self.values[i] + "[lane]" * (isinstance(x, Reduce) and self._by_columns())

    def _load(self, x: Load) -> str:
        text = f"{self.args[x.arg]}[{self._offset(x.index)}]"
        return (
            text
            if x.mask is None
            else f"{self._value(x.mask)} ? {text} : {TYPES[self.k.args[x.arg].dtype]}(0)"
        )

    def _iota(self, x: Iota) -> str:
        return self._offset(x.index)

    def _apply(self, x: Apply) -> str:
        operand = self.k.types[x.args[-1]][1]
        args = [self._value(j) for j in x.args]
        if x.op == "cast":
            return _cast(operand, x.dtype).format(*args)
        template = TEMPLATES[x.op]
        text = (template if isinstance(template, str) else template(operand)).format(*args)
        narrow = x.dtype in (torch.int8, torch.uint8, torch.int16)  # C++ computes these as int
        return f"{TYPES[x.dtype]}({text})" if narrow else text

    def _offset(self, index: Index) -> str:
        terms = []
        for letter, strides, first in (
            ("g", index.grid, 0),
            ("t", index.tile, len(self.tile) - len(index.tile)),
        ):
            for i, s in enumerate(strides, first):
                terms += [] if s == 0 else [f"{letter}{i}" if s == 1 else f"{letter}{i} * {_size(s)}"]
        return " + ".join(terms + ([_size(index.offset)] if index.offset != 0 else [])) or "0"

    def _literal(self, x: object, dtype: torch.dtype) -> str:
        if isinstance(x, Dim):
            return f"{TYPES[dtype]}({_size(x)})"
        return literal(x, dtype)


def _width(n: Size) -> int:
    """How many columns of so many are reduced side by side: a divisor, if there is a good one."""
    if isinstance(n, Dim):
        return COLUMNS
    if n <= COLUMNS:
        return max(1, n)
    return next((w for w in range(COLUMNS, 23, -8) if n % w == 0), COLUMNS)


def literal(x: float, dtype: torch.dtype) -> str:
    """A number of a dtype as C++."""
    if dtype is torch.bool:
        return "true" if x else "false"
    if not dtype.is_floating_point:
        x = int(x)
        text = f"{x}" if -(2**31) < x < 2**31 else "INT64_MIN" if x == -(2**63) else f"{x}LL"
        return f"{TYPES[dtype]}({text})"
    if x != x:
        return f"{TYPES[dtype]}(NAN)"
    if x in (math.inf, -math.inf):
        return f"{TYPES[dtype]}({'-' * (x < 0)}INFINITY)"
    return (
        repr(float(x))
        if dtype is torch.float64 and math.copysign(1, x) > 0
        else f"{TYPES[dtype]}({float(x)!r})"
    )


def _cast(old: torch.dtype, new: torch.dtype) -> str:
    """A cast with ATen's meaning: to bool by `!= 0`, floats to small integers and all to half through a wider type."""
    if new is torch.bool:
        return "({0}) != 0"
    if old.is_floating_point and new in (torch.uint8, torch.int8, torch.int16):
        return f"{TYPES[new]}(int64_t({{0}}))"
    if new in (torch.float16, torch.bfloat16) and old is not new:
        return f"{TYPES[new]}(float({{0}}))"
    if old in (torch.float16, torch.bfloat16) and new is not old:
        return f"{TYPES[new]}(float({{0}}))"
    return f"{TYPES[new]}({{0}})"


def _size(x: Size) -> str:
    """A size as C++; sizes are not negative, so that / rounds down."""
    text = x.python(_size_name).replace("//", "/") if isinstance(x, Dim) else str(x)
    return text[1:-1] if text[1:-1].isidentifier() else text


def _size_name(name: str) -> str:
    """The parameter of a symbolic size, which may have any name."""
    if name.isascii() and name not in RESERVED and not name.startswith("size_of_"):
        return name
    return f"size_of_{name if name.isascii() else name.encode().hex()}"


def comment(text: str) -> str:
    """Text with nothing that could end a comment's line or continue it on the next."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:160].rstrip("\\ ")
