"""Where a value is read: each axis of it as an affine map of the axes of a kernel's index space. Views only change the map.

Entry points: `Space` (the axes of a kernel), `VIEWS` (op -> how a map of its result becomes one of its argument), `push`
(the other way, for views that lose nothing). A view that needs a finer axis raises `Split`; one that has no map, `NotFusable`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim, Size, numel, terms_of
from fxfunc.passes.graph import Val, barrier, stop_gradient, stop_reverse

aten = torch.ops.aten


class NotFusable(Exception):
    """A group of nodes is not one kernel."""


class Split(Exception):
    """A view falls inside `axis`: it must become two axes, the inner of size `inner`."""

    def __init__(self, axis: int, inner: Size):
        self.axis, self.inner = axis, inner


@dataclasses.dataclass(frozen=True, slots=True)
class Affine:
    """offset + sum of coefs[i] * axis i of a space."""

    offset: Size
    coefs: tuple[Size, ...]

    def __add__(self, other: Affine) -> Affine:
        return Affine(
            self.offset + other.offset, tuple(a + b for a, b in zip(self.coefs, other.coefs, strict=True))
        )

    def __mul__(self, k: Size) -> Affine:
        return Affine(self.offset * k, tuple(c * k for c in self.coefs))

    def shifted(self, k: Size) -> Affine:
        """This plus a constant."""
        return Affine(self.offset + k, self.coefs)

    def uses(self, axes: tuple[int, ...]) -> bool:
        """True if it depends on one of these axes."""
        return any(self.coefs[a] != 0 for a in axes)


Map = tuple[Affine, ...]


@dataclasses.dataclass(frozen=True)
class Space:
    """The index space of a kernel: the axes of a root shape, each split into factors; axes of reduced dims are the tile."""

    factors: tuple[tuple[Size, ...], ...]
    reduced: tuple[int, ...] = ()

    @staticmethod
    def of(shape: tuple[Size, ...], reduced: tuple[int, ...] = ()) -> Space:
        """One axis a dimension."""
        return Space(tuple((s,) for s in shape), reduced)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return tuple(s for f in self.factors for s in f)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of the grid axes and of the tile axes."""
        dims = [d for d, f in enumerate(self.factors) for _ in f]
        tile = tuple(i for i, d in enumerate(dims) if d in self.reduced)
        return tuple(i for i in range(len(dims)) if i not in tile), tile

    def split(self, axis: int, inner: Size) -> Space:
        """This space with `axis` as two, or `NotFusable`."""
        outer = divide(self.sizes[axis], inner)
        if outer is None:
            raise NotFusable(f"{inner} does not divide an axis of {self.sizes[axis]}")
        factors, start = [], 0
        for f in self.factors:
            at = axis - start
            factors.append((*f[:at], outer, inner, *f[at + 1 :]) if 0 <= at < len(f) else f)
            start += len(f)
        return Space(tuple(factors), self.reduced)

    def root(self) -> Map:
        """The map of the root shape."""
        out, axis, width = [], 0, len(self.sizes)
        for f in self.factors:
            coefs: list[Size] = [0] * width
            for j in range(len(f)):
                coefs[axis + j] = numel(f[j + 1 :]) if f[j] != 1 else 0
            out.append(Affine(0, tuple(coefs)))
            axis += len(f)
        return tuple(out)

    def zero(self, offset: Size = 0) -> Affine:
        """A constant."""
        return Affine(offset, (0,) * len(self.sizes))

    def flat(self, m: Map, shape: tuple[Size, ...]) -> Affine:
        """The element number, in a dense tensor of this shape, that a map reads."""
        out, stride = self.zero(), 1
        for affine, n in zip(reversed(m), reversed(shape), strict=True):
            out, stride = out + affine * stride, stride * n
        return out


def divide(a: Size, b: Size) -> Size | None:
    """a / b if that is exact and decidable, else None."""
    if a == b:
        return 1
    divisor = terms_of(b)
    if b == 0 or len(divisor) != 1:
        return None
    (atoms, coefficient), out = divisor[0], {}
    for monomial, c in terms_of(a):
        rest = _without(monomial, atoms)
        if rest is None or c % coefficient:
            return None
        out[rest] = c // coefficient
    return Dim._make(out)


def _without(monomial: tuple, atoms: tuple) -> tuple | None:
    rest = list(monomial)
    for atom in atoms:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def _surely_positive(x: Size) -> bool:
    """True if x >= 1 at every size >= 0."""
    terms = dict(terms_of(x))
    return terms.get((), 0) >= 1 and all(c >= 0 for c in terms.values())


def reshape(space: Space, m: Map, shape: tuple[Size, ...], to: tuple[Size, ...]) -> Map:
    """The map of a `to`-shaped tensor that reads the element which `m` reads in a tensor of `shape`."""
    lead = 0
    while lead < min(len(shape), len(to)) and shape[lead] == to[lead]:
        lead += 1
    out, rest = [], space.flat(m[lead:], shape[lead:])
    for n in reversed(to[lead:]):
        rest, digit = _divmod(space, rest, n)
        out.append(digit)
    return (*m[:lead], *reversed(out))


def _divmod(space: Space, x: Affine, n: Size) -> tuple[Affine, Affine]:
    """x // n and x % n, term by term; of nothing, anything."""
    if n == 1 or n == 0:
        return x, space.zero()
    quotients = [divide(c, n) if c != 0 else 0 for c in x.coefs]
    small = tuple(c if q is None else 0 for c, q in zip(x.coefs, quotients, strict=True))
    numbers = isinstance(x.offset, int) and isinstance(n, int)
    if not numbers and not _surely_positive(x.offset + 1):
        raise NotFusable("a reshape of what begins before it, by a symbolic size")
    carried = divmod(x.offset, n) if numbers else (0, x.offset)
    digit = Affine(carried[1], small)
    largest = sum((c * (s - 1) for c, s in zip(small, space.sizes, strict=True)), digit.offset)
    if not _surely_positive(n - largest) or not all(_surely_positive(c + 1) for c in small):
        raise _finer(space, small, n)
    return Affine(carried[0], tuple(0 if q is None else q for q in quotients)), digit


def _finer(space: Space, coefs: tuple[Size, ...], n: Size) -> Exception:
    """The split after which the terms of one axis no longer cross n."""
    for axis, c in enumerate(coefs):
        inner = divide(n, c) if _surely_positive(c) else None
        if inner is not None and inner != space.sizes[axis] and divide(space.sizes[axis], inner) is not None:
            return Split(axis, inner)
    return NotFusable("a reshape that no split of an axis resolves")


# ---- views: f(space, map of the result, result Val, argument Val, *other arguments) -> map of the argument ----


def _reshape(space: Space, m: Map, out: Val, x: Val, *_: object, **__: object) -> Map:
    return reshape(space, m, out.shape, x.shape)


def _permute(space: Space, m: Map, out: Val, x: Val, dims: list[int]) -> Map:
    where = [d % x.ndim for d in dims]
    return tuple(m[where.index(d)] for d in range(x.ndim))


def _transpose(space: Space, m: Map, out: Val, x: Val, a: int, b: int) -> Map:
    order = list(range(x.ndim))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permute(space, m, out, x, order)


def broadcast_map(space: Space, m: Map, out: Val, x: Val, *_: object, **__: object) -> Map:
    """Of an operand that is broadcast to the result, right-aligned."""
    tail = range(out.ndim - x.ndim, out.ndim)
    return tuple(
        space.zero() if n == 1 and out.shape[d] != 1 else m[d] for d, n in zip(tail, x.shape, strict=True)
    )


def _slice(space: Space, m: Map, out: Val, x: Val, dim: int = 0, start: Size | None = None, end: Size | None = None,
           step: int = 1) -> Map:  # fmt: skip
    dim, n = dim % x.ndim, x.shape[dim % x.ndim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        start = max(start + n, 0) if isinstance(n, int) else start + n
    if isinstance(start, int) and isinstance(n, int):
        start = min(start, n)
    return tuple((a * step).shifted(start) if d == dim else a for d, a in enumerate(m))


def _select(space: Space, m: Map, out: Val, x: Val, dim: int, i: Size) -> Map:
    dim = dim % x.ndim
    i = i + x.shape[dim] if isinstance(i, int) and i < 0 else i
    return (*m[:dim], space.zero(i), *m[dim:])


def _flip(space: Space, m: Map, out: Val, x: Val, dims: list[int]) -> Map:
    flipped = {d % x.ndim for d in dims}
    return tuple((a * -1).shifted(x.shape[d] - 1) if d in flipped else a for d, a in enumerate(m))


def _diagonal(space: Space, m: Map, out: Val, x: Val, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Map:
    *rest, along = m
    a, b = dim1 % x.ndim, dim2 % x.ndim
    ends = {a: along.shifted(max(-offset, 0)), b: along.shifted(max(offset, 0))}
    others = iter(rest)
    return tuple(ends[d] if d in ends else next(others) for d in range(x.ndim))


def _unfold(space: Space, m: Map, out: Val, x: Val, dim: int, size: int, step: int) -> Map:
    *places, inside = m
    return tuple(a * step + inside if d == dim % x.ndim else a for d, a in enumerate(places[: x.ndim]))


def _same(space: Space, m: Map, *_: object, **__: object) -> Map:
    return m


VIEWS: dict[object, Callable[..., Map]] = {
    aten.reshape.default: _reshape, aten.view.default: _reshape, aten._unsafe_view.default: _reshape,
    aten.unsqueeze.default: _reshape, aten.squeeze.default: _reshape, aten.squeeze.dim: _reshape, aten.squeeze.dims: _reshape,
    aten.permute.default: _permute, aten.transpose.int: _transpose,
    aten.t.default: lambda space, m, out, x: _transpose(space, m, out, x, 0, -1) if x.ndim == 2 else m,
    aten.expand.default: broadcast_map, aten.slice.Tensor: _slice, aten.select.int: _select, aten.flip.default: _flip,
    aten.diagonal.default: _diagonal, aten.unfold.default: _unfold,
    aten.alias.default: _same, aten.detach.default: _same, aten.clone.default: _same,
    stop_reverse: _same, stop_gradient: _same, barrier: _same,
}  # fmt: skip


def pull(space: Space, node: Node, m: Map) -> Map:
    """The map of a view's argument, given that of its result."""
    x, *rest = node.args
    kwargs = {} if node.target is aten.clone.default else node.kwargs
    return VIEWS[node.target](space, m, node.meta["val"], x.meta["val"], *rest, **kwargs)


def reshaped(node: Node) -> Node:
    """What a value is in another shape, element by element in the same order."""
    while node.op == "call_function" and VIEWS.get(node.target) in (_reshape, _same):
        node = node.args[0]
    return node


def push(space: Space, node: Node, m: Map) -> Map | None:
    """The map of a view's result, given that of its argument; None if the view drops or repeats elements."""
    x, out = node.args[0].meta["val"], node.meta["val"]
    rule = VIEWS[node.target]
    if rule is _same:
        return m
    if rule is _reshape:
        return reshape(space, m, x.shape, out.shape)
    if node.target is aten.permute.default:
        return tuple(m[d] for d in node.args[1])
    if node.target in (aten.transpose.int, aten.t.default):
        return pull(space, node, m)
    return None
