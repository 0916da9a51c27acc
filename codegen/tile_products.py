"""Products of matrices in a Triton function (tile_program.py). Entry point: `Product`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from .index import NotFusable
from .lower import opmath
from .prepare import Factors, factors
from .tile_program import BLOCK, Buffer, Dimension, Held, Space, walk
from .triton import TYPES, power

if TYPE_CHECKING:
    from .tiles import Body

TERMS = 32  # of a product, at a time: 64 take twice as long to compile
THIN_TERMS = 256  # of a product with one row or column
LEAST_TERMS = 16  # that tl.dot takes


class Product:
    """A product of matrices: as one block where it fits, else over blocks of rows, columns and terms."""

    def __init__(self, body: Body, n: Node):
        if not n.meta["val"].dtype.is_floating_point:
            raise NotFusable(f"a product of {n.meta['val'].dtype}")
        self.program, self.n = body.program, n
        x, y = n.args
        (a, self.a_at, (*self.a_batch, row_, a_terms)), (b, self.b_at, (*self.b_batch, b_terms, column)) = (
            factors(x),
            factors(y),
        )
        self.a, self.b, self.val = body.places[a], body.places[b], n.meta["val"]
        self.a_parts, self.b_parts = (row_, a_terms), (b_terms, column)
        self.rows, self.columns = self.val.shape[-2:]
        self.terms = x.meta["val"].shape[-1]
        self.out = body.place(n)

    def write(self) -> None:
        """The product, or a loop over a batch of them."""
        if self.val.ndim == 2:
            return self._matrix()
        p, size = self.program, self.rows * self.columns
        i = p.local("batch")
        p.loop(f"for {i} in range({self.val.shape[0]}):", fenced=False)
        self.a, self.b = (
            self._of(x, parts[0], i) for x, parts in ((self.a, self.a_batch), (self.b, self.b_batch))
        )
        self.out = p.part(self.out, f"{i} * {size}", "product")
        self._matrix()
        p.end(fenced=False)

    def _of(self, x: Buffer, parts: Factors, i: str) -> Buffer:
        return self.program.part(x, " + ".join(walk(i, parts)) or "0", "factor")

    def _matrix(self) -> None:
        p = self.program
        rows, columns, terms = power(self.rows), power(self.columns), power(self.terms)
        dot = max(rows, columns) > 1
        thin = min(rows, columns) == 1
        block_rows, block_columns = rows, columns
        while block_rows * block_columns > BLOCK:
            if block_rows >= block_columns:
                block_rows //= 2
            else:
                block_columns //= 2
        most = BLOCK if not dot else TERMS
        if dot and thin:  # all of the matrix's block is in shared memory
            most = max(TERMS, min(THIN_TERMS, BLOCK // max(block_rows, block_columns)))
        block_terms = min(max(terms, LEAST_TERMS if dot else 1), most)
        r, c, k = (self._dimension(n, b, name) for n, b, name in (
            (self.rows, block_rows, "r"), (self.columns, block_columns, "c"), (self.terms, block_terms, "k")))  # fmt: skip
        p.work += self.rows * self.columns * self.terms
        p.padded += rows * columns * max(terms, block_terms)
        for d in (r, c):
            if d.start:
                p.loop(f"for {d.start} in range(0, {d.size}, {d.block}):", fenced=False)
        acc = p.local(self.n.name)
        compute = opmath(self.val.dtype)
        if k.start:
            shape = [block_rows, block_columns]
            p.emit(f"{acc} = tl.zeros({shape}, tl.{TYPES[compute]})")
            p.loop(f"for {k.start} in range(0, {k.size}, {k.block}):", fenced=False)
        p.emit(f"{acc} = {self._block(r, c, k, acc if k.start else '', dot)}")
        if k.start:
            p.end(fenced=False)
        value = acc if compute == self.val.dtype else f"{acc}.to(tl.{TYPES[self.val.dtype]})"
        p.store(self.out, 0, (r, c), (((self.rows, self.columns),), ((self.columns, 1),)), value)
        if not (r.start or c.start) and compute == self.val.dtype:
            steps = [s if d.size > 1 else 0 for d, s in ((r, self.columns), (c, 1))]
            p.hold(self.out, Held.of(acc, (r, c), steps))
        for d in (r, c):
            if d.start:
                p.end(fenced=False)

    def _dimension(self, size: int, block: int, name: str) -> Dimension:
        return Dimension(size, block, self.program.local(f"{name}0") if block < size else "")

    def _block(self, r: Dimension, c: Dimension, k: Dimension, acc: str, dot: bool) -> str:
        """A block of the result, on top of `acc`."""
        a = self._factor(self.a, self.a_at, (r, k), self.a_parts, 1)
        if not dot:  # a single element
            b = self._factor(self.b, self.b_at, (c, k), self.b_parts[::-1], 1)
            wide = f".to(tl.{TYPES[opmath(self.val.dtype)]})"
            return f"{f'{acc} + ' if acc else ''}tl.sum({a}{wide} * {b}{wide}, axis=1, keep_dims=True)"
        b = self._factor(self.b, self.b_at, (k, c), self.b_parts, 0)
        kind = self.program.precision if min(self.rows, self.columns) > 1 else "ieee"
        precision = f', input_precision="{kind}"' if self.val.dtype is torch.float32 else ""
        wide = f", out_dtype=tl.{TYPES[opmath(self.val.dtype)]}"
        return f"tl.dot({a}, {b}{', ' + acc if acc else ''}{precision}{wide})"

    def _factor(self, x: Buffer, at: int, space: Space, parts: Sequence[Factors], terms: int) -> str:
        """A factor, with zeros beyond its terms."""
        space = tuple(dataclasses.replace(d, size=1, block=1, start="") if all(s == 0 for _, s in f) and i != terms else d
                      for i, (d, f) in enumerate(zip(space, parts, strict=True)))  # fmt: skip
        held = self.program.load(x, at, space, parts, "f")
        d, text = space[terms], held.name
        if not held.zeros and not d.is_exact:
            text = f"tl.where({self.program.arange(terms, 2, d)} < {d.size}, {text}, 0.0)"
        return text
