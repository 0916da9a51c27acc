"""Kernels with a product of matrices -> Triton source. Entry point: `source`.

A program computes a block of rows by columns, its terms in a loop: what is fused on the way in is computed for blocks of factors
there, what is fused on the way out once behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxfunc.passes.dims import Dim, Size, numel

from .axes import axes, reads_along, terms_of
from .loops import Dot, Index, Iota, Kernel, Load, Store
from .products import Blocks, is_wide
from .triton import HELPERS, TYPES, Instructions, module, size_name, size_text

GROUP = 8  # blocks of rows that are done before the next block of columns, so that both stay in cache


def source(k: Kernel, b: Blocks, precision: str) -> str:
    """The kernel as a module of Triton source, products of float32 in this precision."""
    return module("\n".join(["@triton.jit", *_Emitter(k, b, precision).lines()]))


# In a factor's block or the result's: which of rows, columns and terms are its dims, in order.
LEFT, RIGHT, RESULT = ("row", "term"), ("term", "col"), ("row", "col")
RESERVED = frozenset(
    "tl triton libdevice pid tile item group height row0 col0 start row col term row_in col_in term_in".split()
).union(f"{c}{i}" for c in "gt" for i in range(8))


class _Emitter(Instructions):
    """Emits one kernel. A value is computed in the blocks where it is read: those of left factors, right factors, the result."""

    unit = [1, 1]

    def __init__(self, k: Kernel, b: Blocks, precision: str):
        super().__init__(k)
        self.b, self.precision, self.axes, self.terms = b, precision, axes(k), terms_of(k)
        self.along = reads_along(k)
        self.taken = {*RESERVED, *HELPERS, *map(size_name, k.sizes)}
        self.args = [self._local(a.name or f"arg{i}") for i, a in enumerate(k.args)]
        # Of each axis of the grid, and -1 less the number of one of the tile: its dim, and the name of its coordinate.
        self.place: dict[int, tuple[str, str]] = {}
        self.known: dict[tuple[str, str], dict[int, str]] = {c: {} for c in (LEFT, RIGHT, RESULT)}
        self.context = RESULT
        self.values = [""] * len(k.body)

    def _local(self, name: str) -> str:
        """A name that nothing has yet."""
        name, count = name if name.isidentifier() else "v", 1
        unique = name
        while unique in self.taken:
            count += 1
            unique = f"{name}_{count}"
        self.taken.add(unique)
        return unique

    def lines(self) -> list[str]:
        """The function, line by line."""
        self.out = [f"def {self.k.name}({', '.join([*self.args, *map(size_name, self.k.sizes)])}):"]
        self._where()
        dots = {i: x for i, x in enumerate(self.k.body) if isinstance(x, Dot)}
        for i, x in dots.items():
            self.known[RESULT][i] = self._local(x.name or f"v{i}")
            self._emit(
                f"{self.known[RESULT][i]} = tl.zeros([{self.b.rows}, {self.b.columns}], tl.{TYPES[x.dtype]})"
            )
        described = {i: self._described(x) for i, x in dots.items()} if self.b.described else {}
        self._emit(f"for start in range(0, {size_text(numel(self.terms))}, {self.b.terms}):")
        self.indent += "    "
        term = self._from("start", self.b.terms)
        self._emit(f"term = ({term}).to(tl.int64)" if is_wide(self.k) else f"term = {term}")
        self._coordinates("term", range(len(self.terms)), self.terms, "t")
        for i, x in dots.items():
            self._dot(i, x, described.get(i, ("", "")))
        self.indent = self.indent[4:]
        self.context = RESULT
        for i, x in enumerate(self.k.body):
            if isinstance(x, Store):
                self._need(i)
        return self.out

    # -- the index space --

    def _where(self) -> None:
        """Which block a program computes: groups of rows first, then columns, then the batch."""
        a, b, grid = self.axes, self.b, self.k.grid
        batch, rows, columns = a.sizes(self.k)
        wide = ".to(tl.int64)" if is_wide(self.k) else ""
        across = size_text((columns + (b.columns - 1)) // b.columns)
        down = size_text((rows + (b.rows - 1)) // b.rows)
        self._emit(f"pid = tl.program_id(0){wide}")
        if batch != 1:
            self._emit(f"tile = pid % ({down} * {across})")
            self._emit(f"item = pid // ({down} * {across})")
        tile = "pid" if batch == 1 else "tile"
        self._emit(f"group = {tile} // ({GROUP} * {across}) * {GROUP}")
        self._emit(f"height = tl.minimum({down} - group, {GROUP})")
        self._emit(f"row0 = (group + {tile} % ({GROUP} * {across}) % height) * {b.rows}")
        self._emit(f"col0 = {tile} % ({GROUP} * {across}) // height * {b.columns}")
        self._emit(f"row = {self._from('row0', b.rows)}")
        self._emit(f"col = {self._from('col0', b.columns)}")
        self._coordinates("item", a.batch, grid, "g")
        self._coordinates("row", a.rows, grid, "g")
        self._coordinates("col", a.columns, grid, "g")

    def _from(self, start: str, n: int) -> str:
        return f"{start} + tl.arange(0, {n})"

    def _coordinates(self, dim: str, numbers: Sequence[int], sizes: Sequence[Size], letter: str) -> None:
        """Where along its axes a dim is, and what is inside; the only axis of a dim is the dim."""
        whole = numel(sizes[i] for i in numbers)
        for j, i in enumerate(numbers):
            name = dim
            if len(numbers) > 1:
                name, inner = f"{letter}{i}", numel(sizes[n] for n in numbers[j + 1 :])
                part = dim if inner == 1 else f"{dim} // {size_text(inner)}"
                self._emit(f"{name} = {part}{f' % {size_text(sizes[i])}' if j else ''}")
            self.place[i if letter == "g" else -1 - i] = (dim, name)
        if dim != "item" and not self._is_exact(dim):
            self._emit(f"{dim}_in = {dim} < {size_text(whole)}")

    def _is_exact(self, dim: str) -> bool:
        """True if blocks of a dim have no padding."""
        n = self._size_of(dim)
        return not isinstance(n, Dim) and n % self._block(dim) == 0

    def _size_of(self, dim: str) -> Size:
        _, rows, columns = self.axes.sizes(self.k)
        return {"row": rows, "col": columns, "term": numel(self.terms)}[dim]

    def _spread(self, name: str, dim: str) -> str:
        """A vector along its dim of the block."""
        return name if dim == "item" else f"{name}{'[:, None]' if dim == self.context[0] else '[None, :]'}"

    def _offset(self, index: Index) -> tuple[str, list[str]]:
        """The text of an index, and the dims of the block that it moves along."""
        strides = {i: s for i, s in enumerate(index.grid)} | {-1 - i: s for i, s in enumerate(index.tile)}
        terms, dims = [], []
        for i, s in strides.items():
            if s == 0:
                continue
            dim, name = self.place[i]
            text = self._spread(name, dim)
            terms.append(text if s == 1 else f"{text} * {size_text(s)}")
            dims += [dim] if dim != "item" else []
        return " + ".join(terms + ([size_text(index.offset)] if index.offset != 0 else [])), dims

    # -- factors --

    def _dot(self, i: int, x: Dot, described: tuple[str, str]) -> None:
        self._comment(x)
        self.context = LEFT
        a = self._factor(x.x, described[0])
        self.context = RIGHT
        b = self._factor(x.y, described[1])
        acc = self.known[RESULT][i]
        precision = f', input_precision="{self.precision}"' if self.k.types[x.x][1] is torch.float32 else ""
        self._emit(f"{acc} = tl.dot({a}, {b}, {acc}{precision}, out_dtype=tl.{TYPES[x.dtype]})")

    def _factor(self, i: int, described: str) -> str:
        """A block of a factor, zero beyond its terms."""
        if described:
            return described
        self._need(i)
        text, shape = self.known[self.context][i], [self._block(d) for d in self.context]
        other = next(d for d in self.context if d != "term")
        numbers = self.axes.rows if other == "row" else self.axes.columns
        if -1 not in self.along[i] or not self.along[i].intersection(numbers):
            text = f"tl.broadcast_to({text}, {shape})"
        x = self.k.body[i]
        is_zero = isinstance(x, Load) and any(s != 0 for s in x.index.tile)
        if not self._is_exact("term") and not is_zero:
            text = f"tl.where({self._spread('term_in', 'term')}, {text}, 0.0)"
        return text

    def _block(self, dim: str) -> int:
        return {"row": self.b.rows, "col": self.b.columns, "term": self.b.terms}[dim]

    def _described(self, x: Dot) -> tuple[str, str]:
        """The factors as loads through descriptors, "" for those that are not read in rows of a matrix."""
        return self._descriptor(x.x, LEFT), self._descriptor(x.y, RIGHT)

    def _descriptor(self, i: int, context: tuple[str, str]) -> str:
        load, numbers = self.k.body[i], self.axes.rows if context is LEFT else self.axes.columns
        if not isinstance(load, Load) or load.inputs or len(numbers) != 1 or len(self.terms) != 1:
            return ""
        steps = {
            "term": load.index.tile[0] if load.index.tile else 0,
            context[context is RIGHT]: load.index.grid[numbers[0]],
        }
        outer, inner = context if steps[context[1]] == 1 else context[::-1]
        wide = [
            steps[outer],
            load.index.offset,
            *(s for n, s in enumerate(load.index.grid) if n not in numbers),
        ]
        size = self.k.types[i][1].itemsize
        aligned = all(not isinstance(s, Dim) and s * size % 16 == 0 for s in wide)
        if steps[inner] != 1 or steps[outer] <= 0 or not aligned:
            return ""
        batch = Index(
            load.index.offset, tuple(0 if n in numbers else s for n, s in enumerate(load.index.grid)), (0,)
        )
        text, _ = self._offset(batch)
        name = self._local(f"{load.name or 'factor'}_rows")
        sizes = [size_text(self._size_of(d)) for d in (outer, inner)]
        shape = [self._block(d) for d in (outer, inner)]
        base = self.args[load.arg] + (f" + {text}" if text else "")
        self._emit(f"{name} = tl.make_tensor_descriptor({base}, shape=[{', '.join(sizes)}], "
                   f"strides=[{size_text(steps[outer])}, 1], block_shape={shape})")  # fmt: skip
        starts = {"term": "start", "row": "row0", "col": "col0"}
        text = f"{name}.load([{starts[outer]}, {starts[inner]}])"
        return text if (outer, inner) == context else f"tl.trans({text})"

    # -- instructions --

    def _need(self, i: int) -> None:
        """Compute a value in the blocks of the context, with what it reads."""
        known = self.known[self.context]
        if i in known or i in self.inline:
            return
        x = self.k.body[i]
        for j in x.inputs:
            self._need(j)
        if not isinstance(x, Store):
            known[i] = self._local(x.name or f"v{i}")
        self.values = [known.get(j, "") for j in range(len(self.k.body))]
        self._instr(i)

    def _mask(self, dims: Sequence[str]) -> list[str]:
        return [self._spread(f"{d}_in", d) for d in dict.fromkeys(dims) if not self._is_exact(d)]

    def _load(self, i: int, x: Load) -> str:
        offset, dims = self._offset(x.index)
        masks = self._mask(dims)
        if x.inputs:
            masks = [*self._mask(self.context), *([] if x.mask is None else [self.values[x.mask]])]
            spread = (f"{self._spread(d, d)} * 0" for d in self.context)
            offset = " + ".join(filter(None, [offset, *self._picked(x, masks), *spread]))
        pointer = self.args[x.arg] + (f" + {offset}" if offset else "")
        return f"tl.load({pointer}, mask={' & '.join(masks)}, other=0)" if masks else f"tl.load({pointer})"

    def _iota(self, i: int, x: Iota) -> str:
        offset, dims = self._offset(x.index)
        return f"({offset or '0'}).to(tl.int64)" if dims else f"tl.zeros([1, 1], tl.int64) + {offset or '0'}"

    def _store(self, i: int, x: Store) -> None:
        offset, _ = self._offset(x.index)
        spread = " + ".join(f"{self._spread(d, d)} * 0" for d in self.context)
        masks = " & ".join(self._mask(self.context))
        text = f"{self.args[x.arg]} + {offset or spread}, {self._operand(x.x, x)}"
        self._emit(f"tl.store({text}, mask={masks})" if masks else f"tl.store({text})")
