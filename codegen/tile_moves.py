"""Calls that move values, in Triton: `MOVES`, op -> what writes it into the function of a map (tiles.py).

What goes from place to place by fixed steps is a kernel of the loop IR; indices that are values are loads and comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxfunc.passes.dims import numel

from . import moves, pool
from .index import NotFusable
from .loops import Arg, Index, Kernel, Load, Store
from .lower import opmath
from .prepare import Factors
from .tile_blocks import LONGEST_REDUCTION, filled, write
from .triton import TYPES

if TYPE_CHECKING:
    from .tile_program import Program
    from .tiles import Body

aten = torch.ops.aten

MOST_SCATTERED = 2**20  # comparisons of a scatter_add, which takes one for each pair of a place and an index


def move(body: Body, n: Node) -> None:
    """The call, or `NotFusable`."""
    vals = [x.meta["val"] for x in n.all_input_nodes]
    if any(isinstance(s, int) and s == 0 for v in vals for s in v.shape):
        raise NotFusable(f"{n.target} of an empty value")
    MOVES[n.target](body, n, *n.args, **n.kwargs)


# ---- by fixed steps ----


def _copied(src: Node, out: Node, offset: int, steps: Sequence[int]) -> Kernel:
    """All of `src` to places of `out`."""
    val, to = src.meta["val"], out.meta["val"]
    to = to if not isinstance(to, tuple) else to[0]
    shape = tuple(val.shape) or (1,)
    steps = tuple(steps) or (0,)
    at = Index(0, tuple(moves.steps_of(shape)))
    args = (Arg(shape, val.dtype), Arg(tuple(to.shape), to.dtype, True))
    return Kernel(shape, args, (Load(0, at, name="x"), Store(1, Index(offset, steps), 0)))


def _cat(body: Body, n: Node, xs: Sequence[Node], dim: int = 0) -> None:
    xs = [x for x in xs if tuple(x.meta["val"].shape) != (0,)]
    dim, at, steps = dim % n.meta["val"].ndim, 0, moves.steps_of(n.meta["val"].shape)
    sources, out = [body.at(x) for x in xs], body.place(n)
    for x, source in zip(xs, sources, strict=True):
        write(body.program, _copied(x, n, at * steps[dim], steps), [source, out])
        at += x.meta["val"].shape[dim]


def _stack(body: Body, n: Node, xs: Sequence[Node], dim: int = 0) -> None:
    steps = moves.steps_of(n.meta["val"].shape)
    dim = dim % n.meta["val"].ndim
    sources, out = [body.at(x) for x in xs], body.place(n)
    for i, (x, source) in enumerate(zip(xs, sources, strict=True)):
        write(body.program, _copied(x, n, i * steps[dim], [*steps[:dim], *steps[dim + 1 :]]), [source, out])


def _scattered(place: Callable[..., tuple[int, list[int]]]) -> Callable[..., None]:
    """`x` with `src` in place of a view of it."""

    def scattered(body: Body, n: Node, x: Node, src: Node, *args: int, **kwargs: int) -> None:
        offset, steps = place(x.meta["val"].shape, *args, **kwargs)
        sources, out = [body.at(x), body.at(src)], body.place(n)
        write(body.program, _copied(x, n, 0, moves.steps_of(x.meta["val"].shape)), [sources[0], out])
        write(body.program, _copied(src, n, offset, steps), [sources[1], out])

    return scattered


def _pad(body: Body, n: Node, x: Node, pad: Sequence[int], value: float = 0) -> None:
    if min(pad, default=0) < 0:
        raise NotFusable("a negative pad")
    val, source = n.meta["val"], body.at(x)
    out = body.place(n)
    write(body.program, filled(val, value), [out])
    steps = moves.steps_of(val.shape)
    offset = sum(a * s for a, s in zip(moves.sides(pad, val.ndim)[0], steps, strict=True))
    write(body.program, _copied(x, n, offset, steps), [source, out])


# ---- by indices ----


def _checked(program: Program, index: str, along: int, masks: Sequence[str]) -> None:
    """As ATen: the device stops at an index that is out of range."""
    inside = f"(0 <= {index}) & ({index} < {along})"
    outside = " | ".join(f"~{m}" for m in masks)
    program.checks = True
    program.emit(f'tl.device_assert({inside}{" | " + outside if outside else ""}, "index out of bounds")')


def _gather(body: Body, n: Node, x: Node, dim: int, index: Node, *, sparse_grad: bool = False) -> None:
    around, count = _sizes(n, x, dim, index)
    _taken(body, n, x, index, around, count, _dense(around[0], count, around[2]))


def _index_select(body: Body, n: Node, x: Node, dim: int, index: Node) -> None:
    count = numel(index.meta["val"].shape)
    _taken(
        body,
        n,
        x,
        index,
        moves.around(x.meta["val"].shape, dim),
        count,
        (((1, 0),), ((count, 1),), ((1, 0),)),
    )


def _embedding(body: Body, n: Node, weight: Node, index: Node, *how: object) -> None:
    _index_select(body, n, weight, 0, index)


def _index(body: Body, n: Node, x: Node, indices: Sequence[Node | None]) -> None:
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise NotFusable(f"{len(given)} indices at once")
    _index_select(body, n, x, given[0], indices[given[0]])


def _taken(
    body: Body,
    n: Node,
    x: Node,
    index: Node,
    around: tuple[int, int, int],
    count: int,
    parts: Sequence[Factors],
) -> None:
    """The elements of `x` [outer, along, inner] at indices along its middle: [outer, count, inner]."""
    outer, along, inner = around
    if index.meta["val"].dtype != torch.int64:
        raise NotFusable(f"an index of {index.meta['val'].dtype}")
    p, source, indices = body.program, body.at(x), body.at(index)
    out, dtype = body.place(n), n.meta["val"].dtype
    with p.blocks((outer, count, inner)) as space:
        at, masks = p.load(indices, 0, space, parts, "index").name, p.masks(space)
        if n.target is aten.index.Tensor:
            wrapped = p.local("index")
            p.emit(f"{wrapped} = tl.where({at} < 0, {at} + {along}, {at})")
            at = wrapped
        _checked(p, at, along, masks)
        text, _ = p.offset(space, (((outer, along * inner),), ((1, 0),), ((inner, 1),)), 0)
        source.read, name = True, p.local(n.name)
        other = f", mask={' & '.join(masks)}, other=0" if masks else ""
        p.emit(f"{name} = tl.load({source.pointer} + {text} + {at} * {inner}{other})", [source])
        p.store(out, 0, space, _dense(outer, count, inner), f"{name} != 0" if dtype is torch.bool else name)


def _cumsum(body: Body, n: Node, x: Node, dim: int, *, dtype: torch.dtype | None = None) -> None:
    outer, along, inner = moves.around(x.meta["val"].shape, dim)
    if along > LONGEST_REDUCTION:
        raise NotFusable(f"a running sum of {along} elements in a task")
    p, source, val = body.program, body.at(x), n.meta["val"]
    out, name = body.place(n), p.local(n.name)
    with p.blocks((outer, along, inner), (False, True, False)) as space:
        given = p.load(source, 0, space, _dense(outer, along, inner), "x").name
        p.emit(f"{name} = tl.cumsum({given}.to(tl.{TYPES[opmath(val.dtype)]}), axis=1)")
        p.store(out, 0, space, _dense(outer, along, inner), f"{name}.to(tl.{TYPES[val.dtype]})")


def _scatter_add(body: Body, n: Node, x: Node, dim: int, index: Node, src: Node) -> None:
    (outer, along, inner), count = _sizes(n, x, dim, index)
    val = n.meta["val"]
    if val.dtype.itemsize < 4:
        raise NotFusable(f"a sum of {val.dtype}")
    if src.meta["val"].shape != index.meta["val"].shape or outer * along * inner * count > MOST_SCATTERED:
        raise NotFusable(f"a scatter of {numel(index.meta['val'].shape)} values to {numel(val.shape)} places")
    p, given, indices, sources = body.program, body.at(x), body.at(index), body.at(src)
    out = body.place(n)
    with p.blocks((outer, along, inner)) as space:
        steps = _dense(outer, along, inner)
        acc = p.local(n.name)
        start = p.load(given, 0, space, steps, "x").name
        p.emit(f"{acc} = {start} + tl.zeros({[d.block for d in space]}, tl.{TYPES[val.dtype]})")
        k = p.local("k")
        p.loop(f"for {k} in range({count}):", fenced=False)
        one = (((outer, count * inner),), ((1, 0),), ((inner, 1),))
        at, add = (p.load(p.part(b, f"{k} * {inner}", word), 0, space, one, word).name
                   for b, word in ((indices, "index"), (sources, "src")))  # fmt: skip
        _checked(p, at, along, p.masks((space[0], space[2]), (0, 2), 3))
        place = p.arange(1, 3, space[1])
        p.emit(f"{acc} = {acc} + tl.where({at} == {place}, {add}, 0)")
        p.end(fenced=False)
        p.store(out, 0, space, steps, acc)


def _dense(*sizes: int) -> tuple[Factors, ...]:
    return tuple(((n, s),) for n, s in zip(sizes, moves.steps_of(sizes), strict=True))


def _sizes(n: Node, x: Node, dim: int, index: Node) -> tuple[tuple[int, int, int], int]:
    """The numbers of elements before, along and behind the dim, and of indices along it."""
    if index.meta["val"].dtype != torch.int64:
        raise NotFusable(f"an index of {index.meta['val'].dtype}")
    around, of_index = (moves.around(y.meta["val"].shape, dim) for y in (x, index))
    if (around[0], around[2]) != (of_index[0], of_index[2]):
        raise NotFusable("an index smaller than what it indexes")
    return around, of_index[1]


# ---- pools ----


def _max_pool(body: Body, n: Node, x: Node, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
              dilation: Sequence[int] = (1,), ceil_mode: bool = False) -> None:  # fmt: skip
    *planes, h, w = x.meta["val"].shape
    g, dtype = pool.geometry(kernel, stride, padding, dilation), x.meta["val"].dtype
    if dtype not in pool.DTYPES:
        raise NotFusable(f"a pool of {dtype}")
    (rows, columns), count = pool.windows_of((h, w), g, ceil_mode), numel(planes)
    p, source = body.program, body.at(x)
    most_at, place_at = body.outputs(n)
    source.read = True
    with p.blocks((count, rows, columns)) as space:
        plane, row, column = (p.arange(i, 3, d) for i, d in enumerate(space))
        top, left, most, at = (p.local(word) for word in ("top", "left", "most", "at"))
        p.emit(f"{top} = {row} * {g.stride[0]} - {g.padding[0]}")
        p.emit(f"{left} = {column} * {g.stride[1]} - {g.padding[1]}")
        p.emit(f"{most} = tl.full({[d.block for d in space]}, float('-inf'), tl.{TYPES[dtype]})")
        first = [f"({side} + tl.maximum(0, (-{side} + {d - 1}) // {d}) * {d})"
                 for side, d in zip((top, left), g.dilation, strict=True)]  # fmt: skip
        p.emit(f"{at} = {first[0]} * {w} + {first[1]} + tl.zeros({[d.block for d in space]}, tl.int32)")
        for i in range(g.kernel[0]):
            for j in range(g.kernel[1]):
                r, c, y = (p.local(word) for word in "rcy")
                p.emit(f"{r} = {top} + {i * g.dilation[0]}")
                p.emit(f"{c} = {left} + {j * g.dilation[1]}")
                inside = " & ".join(
                    [f"(0 <= {r})", f"({r} < {h})", f"(0 <= {c})", f"({c} < {w})", *p.masks(space)]
                )
                pointer = f"{source.pointer} + {plane} * {h * w} + {r} * {w} + {c}"
                p.emit(f"{y} = tl.load({pointer}, mask={inside}, other=float('-inf'))", [source])
                more = p.local("more")
                p.emit(f"{more} = ({y} > {most}) | ({y} != {y})")
                p.emit(f"{most} = tl.where({more}, {y}, {most})")
                p.emit(f"{at} = tl.where({more}, {r} * {w} + {c}, {at})")
        steps = _dense(count, rows, columns)
        p.store(most_at, 0, space, steps, most)
        p.store(place_at, 0, space, steps, f"{at}.to(tl.int64)")


MOVES: dict[object, Callable[..., None]] = {
    aten.cat.default: _cat, aten.stack.default: _stack, aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _scattered(moves.place_of_slice),
    aten.select_scatter.default: _scattered(moves.place_of_select),
    aten.diagonal_scatter.default: _scattered(moves.place_of_diagonal),
    aten.gather.default: _gather, aten.scatter_add.default: _scatter_add, aten.index_select.default: _index_select,
    aten.index.Tensor: _index, aten.embedding.default: _embedding, aten.cumsum.default: _cumsum,
    aten.max_pool2d_with_indices.default: _max_pool,
}  # fmt: skip
