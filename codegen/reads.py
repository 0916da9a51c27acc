"""Calls that move values, as what an element of the result reads. Entry points: `READS`, op -> f(lowering, node, map, guard,
*args) -> Expr; `why_aten`.

A piece of a result is read where the element lies in it, by a guard; an index is a value that the address follows from.
What writes to places that an index gives (index_put, index_add, scatter) is not among them: no element knows who writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxfunc.passes.dims import Size
from fxfunc.passes.graph import Val

from .expr import Expr
from .index import Map, NotFusable, broadcast_map

if TYPE_CHECKING:
    from .lower import _Lowering

aten = torch.ops.aten

# Each element asks of all pieces whether it lies in them: of more, that takes longer than writing and reading the result.
MOST_PIECES = 4


def why_aten(n: Node) -> str | None:
    """Why a call that moves values is better ATen's, or None."""
    pieces = len(n.args[0]) if n.target in (aten.cat.default, aten.stack.default) else 1
    return f"more than {MOST_PIECES} pieces" if pieces > MOST_PIECES else None


def _shape(n: Node) -> tuple[Size, ...]:
    return n.meta["val"].shape


def _both(a: Expr | None, b: Expr) -> Expr:
    return b if a is None else a & b


# ---- by position ----


def _choose(
    low: _Lowering, n: Node, guard: Expr | None, inside: Expr, a: tuple[Node, Map], b: tuple[Node, Map]
) -> Expr:
    """The element of `a` inside, that of `b` elsewhere, neither read where it is not chosen."""
    return _pieces(low, guard, [(*a, inside), (*b, inside)], n.meta["val"].dtype)


def _pieces(
    low: _Lowering, guard: Expr | None, pieces: Sequence[tuple[Node, Map, Expr]], dtype: torch.dtype
) -> Expr:
    """The element of the first piece that it lies in, else of the last."""
    (x, m, inside), *rest = pieces
    if not rest:
        return low.value(x, m, guard).cast(dtype)
    first = low.value(x, m, _both(guard, inside)).cast(dtype)
    return inside.where(first, _pieces(low, _both(guard, inside.op("not")), rest, dtype))


def _cat(low: _Lowering, n: Node, m: Map, guard: Expr | None, xs: Sequence[Node], dim: int = 0) -> Expr:
    dim, start, pieces = dim % len(m), 0, []
    for x in (x for x in xs if _shape(x) != (0,)):
        end = start + _shape(x)[dim]
        inner = (*m[:dim], m[dim].shifted(-1 * start), *m[dim + 1 :])
        pieces.append((x, inner, low.iota(m[dim]) < end))
        start = end
    if not pieces:
        raise NotFusable("nothing is joined")
    return _pieces(low, guard, pieces, n.meta["val"].dtype)


def _stack(low: _Lowering, n: Node, m: Map, guard: Expr | None, xs: Sequence[Node], dim: int = 0) -> Expr:
    dim = dim % len(m)
    inner = (*m[:dim], *m[dim + 1 :])
    pieces = [(x, inner, low.iota(m[dim]).op("eq", i)) for i, x in enumerate(xs)]
    return _pieces(low, guard, pieces, n.meta["val"].dtype)


def _pad(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, pad: Sequence[Size], value: float = 0
) -> Expr:
    pad = [*pad, *[0] * (2 * len(m) - len(pad))]
    inside, inner = None, []
    for a, size, before, after in zip(m, _shape(x), pad[-2::-2], pad[::-2], strict=True):
        a = a.shifted(-1 * before)
        inner.append(a)
        if before != 0:
            inside = _both(inside, low.iota(a) >= 0)
        if after != 0:
            inside = _both(inside, low.iota(a) < size)
    if inside is None:
        return low.value(x, tuple(inner), guard)
    return inside.where(low.value(x, tuple(inner), _both(guard, inside)), value)


def _slice_scatter(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, src: Node, dim: int = 0,
    start: Size | None = None, end: Size | None = None, step: int = 1,
) -> Expr:  # fmt: skip
    if step != 1:
        raise NotFusable("a slice with steps is written to")
    dim = dim % len(m)
    size = _shape(x)[dim]
    if not all(isinstance(i, (int, type(None))) for i in (size, start, end)):
        raise NotFusable("a slice of symbolic size is written to")
    first, last, _ = slice(start, end).indices(size)
    _expect(src, (*_shape(x)[:dim], max(last - first, 0), *_shape(x)[dim + 1 :]))
    a = m[dim].shifted(-first)
    inside = (low.iota(a) >= 0) & (low.iota(a) < _shape(src)[dim])
    return _choose(low, n, guard, inside, (src, (*m[:dim], a, *m[dim + 1 :])), (x, m))


def _select_scatter(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, src: Node, dim: int, index: Size
) -> Expr:
    dim = dim % len(m)
    size = _shape(x)[dim]
    if not (isinstance(index, int) and isinstance(size, int) and -size <= index < size):
        raise NotFusable("a place that is not surely there is written to")
    index = index % size
    _expect(src, (*_shape(x)[:dim], *_shape(x)[dim + 1 :]))
    return _choose(low, n, guard, low.iota(m[dim]).op("eq", index), (src, (*m[:dim], *m[dim + 1 :])), (x, m))


def _diagonal_scatter(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, src: Node, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Expr:  # fmt: skip
    a, b = dim1 % len(m), dim2 % len(m)
    sizes = _shape(x)
    if not all(isinstance(s, int) for s in sizes):
        raise NotFusable("a diagonal of symbolic size is written to")
    along = max(0, min(sizes[a] + min(offset, 0), sizes[b] - max(offset, 0)))
    _expect(src, (*(s for d, s in enumerate(sizes) if d not in (a, b)), along))
    inside = low.iota((m[b] + m[a] * -1).shifted(-offset)).op("eq", 0)
    rest = tuple(e for d, e in enumerate(m) if d not in (a, b))
    return _choose(low, n, guard, inside, (src, (*rest, m[a] if offset >= 0 else m[b])), (x, m))


def _expect(src: Node, shape: tuple[Size, ...]) -> None:
    """ATen says what is wrong with a value that does not fit where it is written."""
    if _shape(src) != shape:
        raise NotFusable("a value of another shape than where it is written")


# ---- by index ----


def _gather(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, dim: int, index: Node, *, sparse_grad: bool = False
) -> Expr:  # fmt: skip
    if not len(m) == len(_shape(x)) == len(_shape(index)) > 0:
        raise NotFusable("a number is indexed, or an index")
    at = _index_value(low, index, m, guard)
    return low.picked(x, [at if d == dim % len(m) else a for d, a in enumerate(m)], guard)


def _index_select(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, dim: int, index: Node
) -> Expr:
    if not _shape(x):
        raise NotFusable("a number is indexed")
    dim = dim % len(m)
    at = _index_value(low, index, (m[dim],) if _shape(index) else (), guard)
    return low.picked(x, [*m[:dim], at, *m[dim + 1 :]], guard)


def _embedding(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, weight: Node, index: Node, *how: object
) -> Expr:
    return low.picked(weight, [_index_value(low, index, m[:-1], guard), m[-1]], guard)


def _index(
    low: _Lowering, n: Node, m: Map, guard: Expr | None, x: Node, indices: Sequence[Node | None]
) -> Expr:
    """Indices beside each other are broadcast where the first of them is, others in front; negative ones are from the end."""
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if not given or any(i.meta["val"].dtype not in (torch.int64, torch.int32) for i in given.values()):
        raise NotFusable("a mask as an index, or none")
    first, last = min(given), max(given)
    at = first if last - first + 1 == len(given) else 0
    count = max(len(_shape(i)) for i in given.values())
    shared = Val(_shape(n)[at : at + count], torch.int64, n.meta["val"].device)
    rest = iter((*m[:at], *m[at + count :]))

    def place(d: int, size: Size) -> Expr | object:
        if d not in given:
            return next(rest)
        inner = broadcast_map(low.space, m[at : at + count], shared, given[d].meta["val"])
        i = _index_value(low, given[d], inner, guard)
        return (i < 0).where(i + size, i)

    return low.picked(x, [place(d, size) for d, size in enumerate(_shape(x))], guard)


def _index_value(low: _Lowering, index: Node, m: Map, guard: Expr | None) -> Expr:
    return low.value(index, m, guard).cast(torch.int64)


READS: dict[object, Callable[..., Expr]] = {
    aten.cat.default: _cat, aten.stack.default: _stack, aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter, aten.select_scatter.default: _select_scatter,
    aten.diagonal_scatter.default: _diagonal_scatter, aten.gather.default: _gather,
    aten.index_select.default: _index_select, aten.embedding.default: _embedding, aten.index.Tensor: _index,
}  # fmt: skip
