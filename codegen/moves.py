"""Calls that move values, as C++ statements over dense buffers: `MOVES`, op -> `Move`; `refusal` says what is not taken.

`{0}`, `{1}`, ... stand for the sources, `{out}` for the result (of several: `{outs[0]}`, ...) and `{T}` for the type of the
first source; the templates are in the prelude.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Val

from . import pool
from .cpp import literal

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Move:
    """What is read, and the statements."""

    sources: list[Node]
    lines: list[str]


def around(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """The numbers of elements before, along and behind a dim."""
    dim = dim % max(1, len(shape))
    return numel(shape[:dim]), shape[dim] if shape else 1, numel(shape[dim + 1 :])


def _shape(n: Node) -> tuple[int, ...]:
    return n.meta["val"].shape


def _joined(xs: Sequence[Node], outer: int, widths: Sequence[int]) -> Move:
    total, at, lines = sum(widths), 0, []
    for i, width in enumerate(widths):
        lines.append(f"put<{{T}}, {outer}, {width}, {total}>({{out}} + {at}, {{{i}}});")
        at += width
    return Move(list(xs), lines)


def _cat(xs: Sequence[Node], dim: int = 0) -> Move:
    xs = [x for x in xs if _shape(x) != (0,)]
    parts = [around(_shape(x), dim) for x in xs]
    return _joined(xs, parts[0][0], [along * inner for _, along, inner in parts])


def _stack(xs: Sequence[Node], dim: int = 0) -> Move:
    shape = _shape(xs[0])
    outer = numel(shape[: dim % (len(shape) + 1)])
    return _joined(xs, outer, [numel(shape) // max(1, outer)] * len(xs))


def steps_of(shape: Sequence[int]) -> list[int]:
    """The strides of a dense tensor."""
    return [numel(shape[d + 1 :]) for d in range(len(shape))]


def _from_start(i: int | None, n: int, default: int = 0) -> int:
    """A Python index as one that is in range."""
    i = default if i is None else i
    return min(max(i + n if i < 0 else i, 0), n)


def _written(
    first: Sequence[str], src: int, shape: Sequence[int], offset: int, steps: Sequence[int]
) -> list[str]:
    """`first`, then source `src`, of this shape, to places of the result."""
    names = [f"i{d}" for d in range(len(shape))]
    loops = [f"for (int64_t {i} = 0; {i} < {n}; {i}++)" for i, n in zip(names, shape, strict=True)]
    to, at = ([f"{i} * {s}" for i, s in zip(names, steps, strict=True)] for steps in (steps, steps_of(shape)))
    return [
        *first,
        f"{' '.join(loops)} {{out}}[{' + '.join([str(offset), *to])}] = ({{{src}}})[{' + '.join(at) or 0}];",
    ]


def _scattered(place: Callable[..., tuple[int, list[int]]]) -> Callable[..., Move]:
    """`x` with `src` in place of a view of it."""

    def move(x: Node, src: Node, *args: int, **kwargs: int) -> Move:
        offset, steps = place(_shape(x), *args, **kwargs)
        first = [f"put<{{T}}, 1, {numel(_shape(x))}, 0>({{out}}, {{0}});"]
        return Move([x, src], _written(first, 1, _shape(src), offset, steps))

    return move


def place_of_slice(
    shape: Sequence[int], dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> tuple[int, list[int]]:
    """Offset and strides of a slice of a dense tensor."""
    steps, dim = steps_of(shape), dim % len(shape)
    offset = _from_start(start, shape[dim]) * steps[dim]
    return offset, [s * step if d == dim else s for d, s in enumerate(steps)]


def place_of_select(shape: Sequence[int], dim: int, index: int) -> tuple[int, list[int]]:
    """Offset and strides of what one index of a dim selects."""
    steps, dim = steps_of(shape), dim % len(shape)
    return index % shape[dim] * steps[dim], [*steps[:dim], *steps[dim + 1 :]]


def place_of_diagonal(
    shape: Sequence[int], offset: int = 0, dim1: int = 0, dim2: int = 1
) -> tuple[int, list[int]]:
    """Offset and strides of a diagonal."""
    steps, ends = steps_of(shape), [d % len(shape) for d in (dim1, dim2)]
    (a, b), rest = (steps[d] for d in ends), [s for d, s in enumerate(steps) if d not in ends]
    return max(-offset, 0) * a + max(offset, 0) * b, [*rest, a + b]


def sides(pad: Sequence[int], ndim: int) -> tuple[list[int], list[int]]:
    """How much is before and behind each dim; `pad` has the last dim first."""
    pad = [*pad, *[0] * (2 * ndim - len(pad))]
    return list(pad[-2::-2]), list(pad[::-2])


def _pad(x: Node, pad: Sequence[int], value: float = 0) -> Move:
    shape = _shape(x)
    before, after = sides(pad, len(shape))
    out = [a + n + b for a, n, b in zip(before, shape, after, strict=True)]
    fill = f"for (int64_t i = 0; i < {numel(out)}; i++) {{out}}[i] = {literal(value, x.meta['val'].dtype)};"
    steps = steps_of(out)
    return Move(
        [x], _written([fill], 0, shape, sum(a * s for a, s in zip(before, steps, strict=True)), steps)
    )


def _gather(x: Node, dim: int, index: Node, *, sparse_grad: bool = False) -> Move:
    (outer, along, inner), count = around(_shape(x), dim), around(_shape(index), dim)[1]
    at = dim % max(1, len(_shape(x)))
    return Move(
        [x, index], [f"gather<{{T}}, {outer}, {along}, {count}, {inner}, {at}>({{out}}, {{0}}, {{1}}, bad);"]
    )


def _scatter_add(x: Node, dim: int, index: Node, src: Node) -> Move:
    (outer, along, inner), count = around(_shape(x), dim), around(_shape(index), dim)[1]
    at = dim % max(1, len(_shape(x)))
    return Move([x, index, src], [f"put<{{T}}, 1, {outer * along * inner}, 0>({{out}}, {{0}});",
                f"scatter_add<{{T}}, {outer}, {along}, {count}, {inner}, {at}>({{out}}, {{1}}, {{2}}, bad);"])  # fmt: skip


def _max_pool(
    x: Node, kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Move:  # fmt: skip
    *planes, h, w = _shape(x)
    g = pool.geometry(kernel, stride, padding, dilation)
    sizes = [numel(planes), h, w, *pool.windows_of((h, w), g, ceil_mode)]
    sizes += [*g.kernel, *g.stride, *g.padding, *g.dilation]
    return Move([x], [f"max_pool<{{T}}, {', '.join(map(str, sizes))}>({{outs[0]}}, {{outs[1]}}, {{0}});"])


MOVES: dict[object, Callable[..., Move]] = {
    aten.cat.default: _cat, aten.stack.default: _stack, aten.slice_scatter.default: _scattered(place_of_slice),
    aten.select_scatter.default: _scattered(place_of_select), aten.diagonal_scatter.default: _scattered(place_of_diagonal),
    aten.constant_pad_nd.default: _pad, aten.gather.default: _gather, aten.scatter_add.default: _scatter_add,
    aten.max_pool2d_with_indices.default: _max_pool,
}  # fmt: skip


def refusal(n: Node) -> str | None:
    """Why a move, whose sizes are all numbers, is not taken, or None."""
    tensors = n.all_input_nodes
    vals: list[Val] = [x.meta["val"] for x in tensors]
    if n.target is aten.max_pool2d_with_indices.default:
        vals += n.meta["val"]
        if vals[0].dtype not in pool.DTYPES:
            return f"a pool of {vals[0].dtype}"
        return "an empty value" if any(numel(v.shape) == 0 for v in vals) else None
    if numel(_shape(n)) == 0 or any(numel(v.shape) == 0 for v in vals):
        return "an empty value"
    if n.target in (aten.cat.default, aten.stack.default):
        return None if all(v.dtype == vals[0].dtype for v in vals) else "several dtypes"
    if n.target is aten.constant_pad_nd.default and min(n.args[1], default=0) < 0:
        return "a negative pad"
    if n.target in (aten.gather.default, aten.scatter_add.default):
        return _indexing(n)
    return None


def _indexing(n: Node) -> str | None:
    x, dim, index, *src = n.args
    if index.meta["val"].dtype != torch.int64:
        return f"an index of {index.meta['val'].dtype}"
    if n.meta["val"].dtype in (torch.float16, torch.bfloat16, torch.bool) and src:
        return f"a sum of {n.meta['val'].dtype}"
    sides = [around(_shape(y), dim) for y in (x, index)]
    if (
        sides[0][0] != sides[1][0]
        or sides[0][2] != sides[1][2]
        or any(_shape(y) != _shape(index) for y in src)
    ):
        return "an index smaller than what it indexes"
    return None
