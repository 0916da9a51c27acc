"""The loop IR. Entry points: `Kernel` (with `str`), `verify`, `kernel` (the graph node of one); its meaning is in evaluate.py.

    size   = int | Dim                                         a Dim is an argument of the compiled kernel
    kernel = Kernel(grid: size*, args: arg*, body: instr*)     the body runs at every point of the grid, in any order
    arg    = Arg(shape, dtype, output)                         a dense tensor, row-major
    index  = Index(offset: size, grid: size*, tile: size*)     offset + grid . g + tile . t: an affine map of the logical
                                                               index space, so views of an argument cost nothing
    instr  = Load(arg, index, shape, mask, picks)              arg[index] as a tile of this shape, 0 where not mask; a pick
                                                               adds value * stride, the value in [0, size) or an error
           | Const(value: number | Dim, dtype)                 a tile of shape ()
           | Iota(index, shape)                                the index itself, int64
           | Apply(op, x*, dtype)                              elementwise, `ELEMENTWISE` by name; tiles broadcast
           | Reduce(op, x, shape, axes)                        of x broadcast to shape; the axes are kept as size 1
           | Dot(x, y, shape, dtype)                           the sum over a tile of this shape of x * y, in this dtype: an
                                                               element of a product of matrices, rows and columns in the grid
           | Store(arg, index, x, shape)                       x broadcast to shape; each output is stored once, whole

A value is an instruction, named by its position in the body: a tile with a shape and a dtype at each grid point.
A pointwise kernel has a grid point an element and tiles of shape (); a row sum has a grid point a row and tiles of
shape (columns,). Arithmetic is strictly typed: all operands and the result have one dtype, casts are written.
Blocks, padding, layouts and offset widths are the emitter's. Names and source lines are for people: equality ignores them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fxfunc.passes import errors
from fxfunc.passes.dims import Dim, Size, at, numel
from fxfunc.passes.graph import Op

# kernel(Kernel, *operands): the outputs of a Kernel, in order of its output arguments; one output is not a tuple.
kernel = Op("kernel")
# native(program, *operands): the outputs of a compiled program over many calls, always a tuple.
native = Op("native")

Number = int | float | bool


@dataclasses.dataclass(frozen=True)
class Arg:
    """A dense tensor; `name` is for people."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    output: bool = False
    name: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Index:
    """An affine map of the index space: offset + grid . g + tile . t, right-aligned to a tile's axes."""

    offset: Size = 0
    grid: tuple[Size, ...] = ()
    tile: tuple[Size, ...] = ()

    def at(self, sizes: dict[str, int]) -> Index:
        """The map for given sizes."""
        return Index(
            at(self.offset, sizes), *(tuple(at(s, sizes) for s in part) for part in (self.grid, self.tile))
        )


@dataclasses.dataclass(frozen=True)
class Instr:
    """One instruction; `name` and `source` (the user's line) are for people."""

    name: str = dataclasses.field(default="", compare=False, kw_only=True)
    source: str = dataclasses.field(default="", compare=False, kw_only=True)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values it reads."""
        return ()


@dataclasses.dataclass(frozen=True)
class Pick:
    """A term of an address that is computed: an int64 `value` of [0, size), times a stride."""

    value: int
    stride: Size
    size: Size

    def at(self, sizes: dict[str, int]) -> Pick:
        """The term for given sizes."""
        return Pick(self.value, at(self.stride, sizes), at(self.size, sizes))


@dataclasses.dataclass(frozen=True)
class Load(Instr):
    arg: int
    index: Index
    shape: tuple[Size, ...] = ()
    mask: int | None = None
    picks: tuple[Pick, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        return (*(() if self.mask is None else (self.mask,)), *(p.value for p in self.picks))


@dataclasses.dataclass(frozen=True)
class Const(Instr):
    value: Number | Dim = dataclasses.field(compare=False)
    dtype: torch.dtype
    kind: type = dataclasses.field(
        init=False, repr=False
    )  # 1, 1.0, True and -0.0 differ from what equals them
    text: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", type(self.value))
        object.__setattr__(self, "text", repr(self.value))


@dataclasses.dataclass(frozen=True)
class Iota(Instr):
    index: Index
    shape: tuple[Size, ...] = ()


@dataclasses.dataclass(frozen=True)
class Apply(Instr):
    op: str
    args: tuple[int, ...]
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.args


@dataclasses.dataclass(frozen=True)
class Reduce(Instr):
    op: str
    x: int
    shape: tuple[Size, ...]
    axes: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x,)


@dataclasses.dataclass(frozen=True)
class Dot(Instr):
    x: int
    y: int
    shape: tuple[Size, ...]
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Store(Instr):
    arg: int
    index: Index
    x: int
    shape: tuple[Size, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.x,)


@dataclasses.dataclass(frozen=True, repr=False)
class Kernel:
    """A program over an index space. Structurally equal kernels are equal, whatever their names."""

    grid: tuple[Size, ...]
    args: tuple[Arg, ...]
    body: tuple[Instr, ...]
    name: str = dataclasses.field(default="kernel", compare=False)

    @cached_property
    def types(self) -> tuple[tuple[tuple[Size, ...], torch.dtype], ...]:
        """Shape and dtype of each value (for a store, of what it stores)."""
        out: list = []
        for instr in self.body:
            out.append(_type(instr, self.args, out))
        return tuple(out)

    @cached_property
    def outputs(self) -> tuple[Arg, ...]:
        return tuple(a for a in self.args if a.output)

    @cached_property
    def inputs(self) -> tuple[Arg, ...]:
        return tuple(a for a in self.args if not a.output)

    @cached_property
    def checks(self) -> bool:
        """True if it can stop at an index that is out of range."""
        return any(isinstance(x, Load) and x.picks for x in self.body)

    @cached_property
    def rank(self) -> int:
        """The largest tile rank."""
        return max(
            (len(x.shape) for x in self.body if isinstance(x, (Load, Iota, Reduce, Dot, Store))), default=0
        )

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The names of its symbolic sizes, sorted: the trailing arguments of the compiled kernel."""
        return tuple(sorted(set().union(*(s.names() for s in self._all_sizes() if isinstance(s, Dim)))))

    def _all_sizes(self) -> list[Size]:
        found: list = [*self.grid, *(s for a in self.args for s in a.shape)]
        for instr, (shape, _) in zip(self.body, self.types, strict=True):
            found += [*shape, instr.value] if isinstance(instr, Const) else shape
            if isinstance(instr, (Load, Iota, Store)):
                found += [instr.index.offset, *instr.index.grid, *instr.index.tile]
            if isinstance(instr, Load):
                found += [s for p in instr.picks for s in (p.stride, p.size)]
        return found

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        return self.name


# ---- the elementwise operations and reductions, with their meaning in torch ----

_UNARY = (
    "neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "erf erfc floor ceil trunc round lgamma"
).split()
_COMPARE: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _UNARY},
    **_COMPARE,
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "pow": torch.pow, "atan2": torch.atan2, "fmod": torch.fmod,
    "div": torch.true_divide,                                          # floats only, correctly rounded
    "floordiv": torch.floor_divide, "rem": torch.remainder,            # round down, sign of the divisor: as Python
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "maximum": torch.maximum, "minimum": torch.minimum,                # a NaN operand gives NaN
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor, "not": torch.bitwise_not,
    "where": torch.where,
}  # fmt: skip
FLOAT_ONLY = frozenset(_UNARY) - {"neg", "abs"} | {"div", "pow", "atan2"}
REDUCTIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "sum": lambda x, dims: x.sum(dims, True, dtype=x.dtype),
    "prod": lambda x, dims: _fold(lambda y, d: y.prod(d, True, dtype=y.dtype), x, dims),
    "amax": lambda x, dims: x.amax(dims, True),                        # a NaN gives NaN
    "amin": lambda x, dims: x.amin(dims, True),
    "any": lambda x, dims: _fold(lambda y, d: y.any(d, True), x, dims),
    "all": lambda x, dims: _fold(lambda y, d: y.all(d, True), x, dims),
}  # fmt: skip


def _fold(f: Callable[[Tensor, int], Tensor], x: Tensor, dims: list[int]) -> Tensor:
    for d in dims:
        x = f(x, d)
    return x


def neutral(op: str, dtype: torch.dtype) -> Number:
    """The value that a reduction over nothing gives."""
    if op in ("sum", "any", "prod", "all"):
        value = op in ("prod", "all")
        return float(value) if dtype.is_floating_point else value if dtype is torch.bool else int(value)
    if dtype.is_floating_point:
        return float("-inf") if op == "amax" else float("inf")
    return torch.iinfo(dtype).min if op == "amax" else torch.iinfo(dtype).max


# ---- types ----


def _type(instr: Instr, args: Sequence[Arg], types: list) -> tuple[tuple[Size, ...], torch.dtype]:
    """Shape and dtype of what `instr` computes, given those of the values before it."""
    match instr:
        case Load():
            return instr.shape, args[instr.arg].dtype
        case Const():
            return (), instr.dtype
        case Iota():
            return instr.shape, torch.int64
        case Apply():
            return broadcast([types[i][0] for i in instr.args]), instr.dtype
        case Reduce():
            return tuple(1 if axis in instr.axes else s for axis, s in enumerate(instr.shape)), types[
                instr.x
            ][1]
        case Dot():
            return (1,) * len(instr.shape), instr.dtype
        case Store():
            return instr.shape, types[instr.x][1]
    raise TypeError(f"not an instruction: {instr}")


def broadcast(shapes: Sequence[tuple[Size, ...]]) -> tuple[Size, ...]:
    """The shape of an elementwise result: right-aligned, a static 1 stretches."""
    out: list[Size] = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for i, s in enumerate(shape, len(out) - len(shape)):
            if s != 1 and out[i] != 1 and s != out[i]:
                raise errors.InvalidGraph(after="loops", what=f"tiles {shapes} do not broadcast")
            out[i] = s if out[i] == 1 else out[i]
    return tuple(out)


# ---- text ----


def text(k: Kernel) -> str:
    """The kernel, one line an instruction."""
    names = value_names(k)
    head = ", ".join(
        f"{a.name or f'arg{i}'}: {_short(a.dtype)}{_list(a.shape)}{' out' * a.output}"
        for i, a in enumerate(k.args)
    )
    lines = [f"{k.name}({head}) for {_list(k.grid)}:"]
    for i, instr in enumerate(k.body):
        lines.append("  " + _line(k, i, instr, names))
    return "\n".join(lines)


def value_names(k: Kernel, reserved: Sequence[str] = ()) -> list[str]:
    """A distinct identifier for each argument, then each value; none of them reserved."""
    wanted = [a.name or f"arg{i}" for i, a in enumerate(k.args)] + [
        x.name or f"v{i}" for i, x in enumerate(k.body)
    ]
    seen = dict.fromkeys(reserved, 1)
    for i, name in enumerate(wanted):
        name = name if name.isidentifier() else "v"
        unique = name
        while unique in seen:
            seen[name] += 1
            unique = f"{name}_{seen[name]}"
        seen[unique] = 1
        wanted[i] = unique
    return wanted


def _line(k: Kernel, i: int, instr: Instr, names: list[str]) -> str:
    value = names[len(k.args) :]
    if isinstance(instr, Store):
        return f"{names[instr.arg]}[{_affine(instr.index)}] = {value[instr.x]}"
    match instr:
        case Load():
            picks = "".join(f" + {p.stride}*{value[p.value]}" for p in instr.picks)
            what = f"{names[instr.arg]}[{_affine(instr.index)}{picks}]" + (
                f" if {value[instr.mask]}" if instr.mask is not None else ""
            )
        case Const():
            what = str(instr.value)
        case Iota():
            what = _affine(instr.index)
        case Apply():
            what = f"{instr.op}({', '.join(value[j] for j in instr.args)})"
        case Reduce():
            what = f"{instr.op}({value[instr.x]}, axes={_list(instr.axes)})"
        case Dot():
            what = f"dot({value[instr.x]}, {value[instr.y]}, over={_list(instr.shape)})"
    shape, dtype = k.types[i]
    return f"{value[i]}: {_short(dtype)}{_list(shape)} = {what}"


def _affine(index: Index) -> str:
    terms = [
        (s, f"{kind}{i}")
        for kind, part in (("g", index.grid), ("t", index.tile))
        for i, s in enumerate(part)
        if s != 0
    ]
    parts = [v if s == 1 else f"{s}*{v}" for s, v in terms]
    return " + ".join([str(index.offset)] * (index.offset != 0 or not parts) + parts)


def _list(xs: Sequence) -> str:
    return "[" + ",".join(map(str, xs)) + "]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- verify ----


def verify(k: Kernel) -> Kernel:
    """The kernel, or `InvalidGraph`: order, types, ranks, bounds, and that each output is stored once and whole."""
    for i, instr in enumerate(k.body):
        if any(not 0 <= j < i or isinstance(k.body[j], Store) for j in instr.inputs):
            _fail(k, i, "reads a value that is not there")
    for i, instr in enumerate(k.body):
        _VERIFY.get(type(instr), lambda *_: None)(k, i, instr)
    stored = [x.arg for x in k.body if isinstance(x, Store)]
    if sorted(stored) != [i for i, a in enumerate(k.args) if a.output]:
        _fail(k, len(k.body) - 1, "each output must be stored exactly once")
    return k


def _fail(k: Kernel, i: int, what: str) -> None:
    raise errors.InvalidGraph(
        after="loops", what=f"{k.name}, instruction {i}: {what}\n{k.body[i] if k.body else k}"
    )


def _verify_access(k: Kernel, i: int, instr: Load | Store | Iota) -> None:
    shape = k.types[i][0]
    if len(instr.index.grid) != len(k.grid) or len(instr.index.tile) != len(shape):
        _fail(
            k,
            i,
            f"an index of rank {len(instr.index.grid)}+{len(instr.index.tile)} over {len(k.grid)}+{len(shape)} axes",
        )
    if isinstance(instr, Iota):
        return
    arg = k.args[instr.arg]
    if arg.output != isinstance(instr, Store):
        _fail(k, i, "loads read inputs, stores write outputs")
    if isinstance(instr, Store) and k.types[i][1] != arg.dtype:
        _fail(k, i, f"stores {k.types[i][1]} to {arg.dtype}")
    if isinstance(instr, Store) and broadcast([k.types[instr.x][0], shape]) != shape:
        _fail(k, i, f"{_list(k.types[instr.x][0])} does not broadcast to {_list(shape)}")
    if isinstance(instr, Store) and numel(k.grid) * numel(shape) != numel(arg.shape):
        _fail(k, i, f"does not cover {_list(arg.shape)}")
    picks = getattr(instr, "picks", ())
    if any(k.types[p.value][1] is not torch.int64 for p in picks):
        _fail(k, i, "picks by a value that is not int64")
    if getattr(instr, "mask", None) is None and _leaves(
        instr.index, (*k.grid, *shape), numel(arg.shape), picks
    ):
        _fail(k, i, f"reaches outside of {numel(arg.shape)} elements")


def _leaves(index: Index, sizes: tuple[Size, ...], limit: Size, picks: Sequence[Pick] = ()) -> bool:
    """True if an access over axes of these sizes surely reaches outside of `limit` elements."""
    strides = (*index.grid, *index.tile, *(p.stride for p in picks))
    sizes = (*sizes, *(p.size for p in picks))
    if any(isinstance(x, Dim) for x in (index.offset, limit, *strides, *sizes)) or 0 in sizes:
        return False
    reach = [s * (n - 1) for s, n in zip(strides, sizes, strict=True)]
    least, most = (index.offset + sum(f(r, 0) for r in reach) for f in (min, max))
    return least < 0 or most >= limit


def verify_sizes(k: Kernel, sizes: dict[str, int]) -> None:
    """`DynamicShape` for sizes that the graph does not hold for: a slice longer than its axis, the largest of nothing."""

    def static(shape: tuple[Size, ...]) -> tuple[int, ...]:
        return tuple(at(s, sizes) for s in shape)

    grid, shapes = static(k.grid), [static(a.shape) for a in k.args]
    wrong = any(s < 0 for shape in shapes for s in shape)
    for instr in k.body:
        if isinstance(instr, Load) and instr.mask is None:
            picks = [p.at(sizes) for p in instr.picks]
            wrong |= _leaves(
                instr.index.at(sizes), grid + static(instr.shape), numel(shapes[instr.arg]), picks
            )
        if isinstance(instr, Reduce) and instr.op in ("amax", "amin"):
            wrong |= 0 in static(instr.shape)
    if wrong:
        raise errors.DynamicShape(what=f"a slice or an extremum ({k.name}) that does not exist for {sizes}")


def _verify_apply(k: Kernel, i: int, instr: Apply) -> None:
    dtypes = [k.types[j][1] for j in instr.args]
    if instr.op == "cast":
        return
    if instr.op not in ELEMENTWISE:
        _fail(k, i, "no such operation")
    if instr.op == "where" and dtypes.pop(0) is not torch.bool:
        _fail(k, i, "the condition is not bool")
    result = [] if instr.op in _COMPARE else [instr.dtype]
    if len({*dtypes, *result}) != 1 or (instr.op in _COMPARE and instr.dtype is not torch.bool):
        _fail(k, i, f"mixes dtypes {dtypes} -> {instr.dtype}")
    if instr.op in FLOAT_ONLY and not dtypes[0].is_floating_point:
        _fail(k, i, "is for floating point")


def _verify_reduce(k: Kernel, i: int, instr: Reduce) -> None:
    shape, dtype = k.types[instr.x]
    if broadcast([shape, instr.shape]) != instr.shape:
        _fail(k, i, f"{_list(shape)} does not broadcast to {_list(instr.shape)}")
    if instr.op not in REDUCTIONS or not all(0 <= axis < len(instr.shape) for axis in instr.axes):
        _fail(k, i, "no such reduction or axis")
    if (instr.op in ("any", "all")) != (dtype is torch.bool):
        _fail(k, i, f"reduces {dtype}")


def _verify_dot(k: Kernel, i: int, instr: Dot) -> None:
    (a, left), (b, right) = k.types[instr.x], k.types[instr.y]
    if left != right or not left.is_floating_point:
        _fail(k, i, f"multiplies {left} by {right}")
    if any(broadcast([shape, instr.shape]) != instr.shape for shape in (a, b)):
        _fail(k, i, f"{_list(a)} and {_list(b)} do not broadcast to {_list(instr.shape)}")


_VERIFY: dict[type, Callable] = {Load: _verify_access, Store: _verify_access, Iota: _verify_access,
                                 Apply: _verify_apply, Reduce: _verify_reduce, Dot: _verify_dot}  # fmt: skip
