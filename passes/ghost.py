"""Per-sample gradients that are only reduced, reduced without being made. Entry point: `ghost`.

The gradient of a linear layer's weight at sample i is x_i^T d_i, so a stack of them is a product of small factors. Where all that
reads it are squared norms and sums over samples, weighted by sample, neither needs it (Goodfellow 2015; Li et al. 2021):
||x_i^T d_i||^2 = sum of (x_i x_i^T) * (d_i d_i^T), and sum over i of c_i x_i^T d_i is one product over all samples and positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import Node

from .dims import Dim, Size, numel
from .graph import Graph, Val, getitem, map_
from .record import Builder, Value, aten
from .regions import emit_map
from .simplify import SIMPLIFY

# Squares of products of two such numbers neither overflow nor vanish in float64, whose errors are below theirs.
NARROW = (torch.float32, torch.float16, torch.bfloat16)
SMALL_STACK = 2**14
DOUBLE = 2  # what a multiplication in float64 costs, in multiplications of the stack's dtype

Env = dict[Node, object]


def ghost(graph: Graph) -> Graph:
    """The graph without the stacks of per-sample products that are only reduced, where that saves work."""
    steps = reduced(graph)
    if not steps:
        return graph
    b = Builder(SIMPLIFY)
    env: Env = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    for n in graph.nodes:
        if n not in steps:
            b.run([n], env)
        elif isinstance(step := steps[n], Reduction):
            with b.at(n, "ghost"):
                env[n] = step.emit(n, step, env)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def reduced(graph: Graph) -> dict[Node, Step]:
    """Those stacks and what reads them, with what becomes of each."""
    steps: dict[Node, Step] = {}
    for n in graph.nodes:
        if n not in steps and (stack := _stack(n)) is not None:
            steps |= _plan(stack) or {}
    return steps


# ----- stacks ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """A call whose result at each index of `axis` is a product over `rank` of rows of one operand with columns of the other."""

    node: Node
    axis: int
    count: Size
    rank: Size
    rows: Size
    columns: Size

    def factors(self, env: Env) -> tuple[Value, Value]:
        """The operands as [count, rank, rows] and [count, rank, columns]."""
        left, right = (env[x] for x in self.node.args)
        if self.node.target is aten.bmm.default:
            return left.mT, right
        return tuple(
            x.movedim(self.axis, 0).reshape([self.count, 1, size])
            for x, size in ((left, self.rows), (right, self.columns))
        )

    def placed(self, product: Value) -> Value:
        """[rows, columns] in the shape of the stack's samples."""
        if self.node.target is aten.bmm.default:
            return product
        left, right = _own_axes(self.node, self.axis)
        order, shape = [*left, *right], _val(self.node).shape
        return product.reshape([shape[i] for i in order]).permute(
            [order.index(i) for i in range(len(shape)) if i != self.axis]
        )


def _stack(n: Node) -> Stack | None:
    """A batched product, or an outer product written as a broadcast multiplication."""
    if n.target not in (aten.bmm.default, aten.mul.Tensor) or not _val(n).dtype.is_floating_point:
        return None
    if n.target is aten.bmm.default:
        (count, rows, rank), columns = _val(n.args[0]).shape, _val(n.args[1]).shape[2]
        return Stack(n, 0, count, rank, rows, columns)
    return _outer(n) if all(isinstance(x, Node) for x in n.args) else None


def _outer(n: Node) -> Stack | None:
    shapes, shape = [_val(x).shape for x in n.args], _val(n).shape
    if any(
        len(s) != len(shape) or _val(x).dtype != _val(n).dtype for s, x in zip(shapes, n.args, strict=True)
    ):
        return None
    shared = [i for i, (s, t) in enumerate(zip(*shapes, strict=True)) if not _is_one(s) and not _is_one(t)]
    if len(shared) != 1:
        return None
    rows, columns = (numel(shape[i] for i in axes) for axes in _own_axes(n, shared[0]))
    return (
        None if _is_one(rows) or _is_one(columns) else Stack(n, shared[0], shape[shared[0]], 1, rows, columns)
    )


def _own_axes(n: Node, shared: int) -> tuple[list[int], list[int]]:
    """The axes that an outer product has from its first operand, and the others."""
    left = [i for i, s in enumerate(_val(n.args[0]).shape) if i != shared and not _is_one(s)]
    return left, [i for i in range(_val(n).ndim) if i != shared and i not in left]


def _saves(stack: Stack, norms: bool) -> bool:
    """Norms cost rank^2 (rows + columns) in place of rank * rows * columns; a sum over samples costs what the stack did."""
    sizes = stack.rank, stack.rows, stack.columns
    if any(isinstance(s, Dim) for s in sizes) or _is_one(stack.count):
        return False
    rank, rows, columns = sizes
    small = not isinstance(stack.count, Dim) and stack.count * rows * columns < SMALL_STACK
    return not small and (not norms or DOUBLE * rank * (rows + columns) <= rows * columns)


# ----- readers --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A value that is a stack but for its layout and a factor for each sample, or its square, maybe summed over some axes."""

    stack: Stack
    axis: int  # of the samples
    views: tuple[
        tuple[Node, int, int], ...
    ] = ()  # from the stack to here: the view, and the axis before and after it
    scales: tuple[tuple[Callable, object], ...] = ()  # (mul or div, what by)
    square: bool = False

    def viewed(self, n: Node, axis: int) -> Part:
        return dataclasses.replace(self, axis=axis, views=(*self.views, (n, self.axis, axis)))

    def scaled(self, op: Callable, by: object) -> Part:
        return dataclasses.replace(self, scales=(*self.scales, (op, by)))


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A value that takes no stack: what it reduces, and how to say it with the factors."""

    part: Part
    emit: Callable[[Node, Reduction, Env], Value]


Step = Part | Reduction


def _plan(stack: Stack) -> dict[Node, Step] | None:
    """What becomes of the stack and all that reads it; None if something needs it, or if making it is cheaper."""
    steps: dict[Node, Step] = {stack.node: Part(stack, stack.axis)}
    pending = [stack.node]
    while pending:
        part = steps[x := pending.pop()]
        for n in x.users:
            row = READERS.get(n.target)
            step = row(n, x, part) if row and n.op == "call_function" else None
            if step is None:
                return None
            steps[n] = step
            if isinstance(step, Part):
                pending.append(n)
    norms = any(isinstance(s, Reduction) and s.emit is not _total for s in steps.values())
    return steps if _saves(stack, norms) and (not norms or _val(stack.node).dtype in NARROW) else None


def _reshape(n: Node, x: Node, part: Part) -> Part | None:
    """The samples keep an axis of their own."""
    before, shape = _val(x).shape, _val(n).shape
    ahead = numel(before[: part.axis])
    for i, size in enumerate(shape):
        if size == part.stack.count and numel(shape[:i]) == ahead:
            return part.viewed(n, i)
    return None


def _permute(n: Node, x: Node, part: Part) -> Part:
    return part.viewed(n, [d % _val(x).ndim for d in n.args[1]].index(part.axis))


def _neg(n: Node, x: Node, part: Part) -> Part | None:
    return None if part.square else part.scaled(aten.mul.Tensor, -1)


def _mul(n: Node, x: Node, part: Part) -> Part | None:
    if part.square:
        return None
    if n.args == (x, x):
        return dataclasses.replace(part, square=True)
    by = n.args[1] if n.args[0] is x else n.args[0]
    return part.scaled(n.target, by) if _per_sample(by, n, x, part) else None


def _div(n: Node, x: Node, part: Part) -> Part | None:
    if part.square or n.args[0] is not x or not _per_sample(n.args[1], n, x, part):
        return None
    return part.scaled(n.target, n.args[1])


def _per_sample(by: object, n: Node, x: Node, part: Part) -> bool:
    """True for a number, or a tensor that broadcasts along all axes but that of the samples."""
    if _val(n) != _val(x) or not isinstance(by, Node):
        return _val(n) == _val(x) and isinstance(by, (int, float))
    shape = _val(by).shape
    axis = part.axis - (_val(x).ndim - len(shape))
    return _val(by).dtype == _val(x).dtype and all(_is_one(s) for i, s in enumerate(shape) if i != axis)


def _sum(n: Node, x: Node, part: Part) -> Step | None:
    if n.kwargs:
        return None
    summed = _summed(n.args[1] if len(n.args) > 1 else None, x)
    if not part.square:
        return Reduction(part, _total) if summed == {part.axis} else None
    if _is_whole(summed, x, part):
        return Reduction(part, _squared_norms)
    return None if part.axis in summed else _partly_summed(n, x, part)


def _partly_summed(n: Node, x: Node, part: Part) -> Part:
    """A step to the squared norms, which sums some axes; only another sum can follow."""
    keep, dims = len(n.args) > 2 and n.args[2], {d % _val(x).ndim for d in n.args[1]}
    return dataclasses.replace(part, axis=part.axis - (0 if keep else sum(d < part.axis for d in dims)))


def _mean(n: Node, x: Node, part: Part) -> Reduction | None:
    if part.square or n.kwargs or _summed(n.args[1], x) != {part.axis}:
        return None
    return Reduction(part.scaled(aten.div.Tensor, part.stack.count), _total)


def _vector_norm(n: Node, x: Node, part: Part) -> Reduction | None:
    order, dims = (*n.args[1:], None, None)[:2]
    if part.square or n.kwargs or order != 2 or not _is_whole(_summed(dims, x), x, part):
        return None
    return Reduction(part, _norms)


def _product(n: Node, x: Node, part: Part) -> Reduction | None:
    """A row of weights times the stack, or the stack times a column."""
    left, right = n.args
    weights, axis, single = (left, -2, -2) if right is x else (right, -1, -1)
    batch = _val(n).shape[:-2]
    if part.square or left is right or part.axis != _val(x).ndim + axis:
        return None
    if not _is_one(_val(weights).shape[single]) or not all(map(_is_one, batch)):
        return None
    return Reduction(part.scaled(aten.mul.Tensor, weights), _total)


READERS: dict[Callable, Callable[[Node, Node, Part], Step | None]] = {
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.mm.default: _product,
    aten.bmm.default: _product,
}


def _summed(dims: list[int] | None, x: Node) -> set[int]:
    """The axes that a reduction takes away, those of size 1 left out."""
    given = [d % _val(x).ndim for d in dims or range(_val(x).ndim)]
    return {d for d in given if not _is_one(_val(x).shape[d])}


def _is_whole(summed: set[int], x: Node, part: Part) -> bool:
    """True if no axis is left but that of the samples."""
    return all(i in summed or i == part.axis or _is_one(s) for i, s in enumerate(_val(x).shape))


# ----- reductions -----------------------------------------------------------------------------------------------------


def _total(n: Node, reduction: Reduction, env: Env) -> Value:
    """The sum over samples: one product, of the factors with samples and positions in one axis."""
    part = reduction.part
    stack = part.stack
    x, d = stack.factors(env)
    x, d = (_scaled(x, part, env), d) if stack.rows <= stack.columns else (x, _scaled(d, part, env))
    inner = stack.count * stack.rank
    out = stack.placed(x.reshape([inner, stack.rows]).mT @ d.reshape([inner, stack.columns]))
    for view, before, after in part.views:
        if view.target is aten.reshape.default:
            out = out.reshape([s for i, s in enumerate(_val(view).shape) if i != after])
        else:
            dims = [d % _val(view).ndim for d in view.args[1]]
            out = out.permute([d - (d > before) for d in dims if d != before])
    return out.reshape(list(_val(n).shape))


def _squared_norms(n: Node, reduction: Reduction, env: Env) -> Value:
    out = _squares(n, reduction.part, env)
    return out.to(_val(n).dtype)


def _norms(n: Node, reduction: Reduction, env: Env) -> Value:
    return _squares(n, reduction.part, env).sqrt().to(_val(n).dtype)


def _squares(n: Node, part: Part, env: Env) -> Value:
    """The sums of squares in float64, in the shape of the call that asks for them."""
    is_rank_one = _is_one(part.stack.rank)

    def squares(x: Value, d: Value) -> Value:
        x, d = _scaled(x.to(torch.float64), part, env), d.to(torch.float64)
        return _rank_one(x, d) if is_rank_one else _gram(x, d)

    x, d = part.stack.factors(env)
    by_task = _of_a_map(x) and _of_a_map(d) and not any(isinstance(by, Node) for _, by in part.scales)
    out = _in_tasks(squares, x, d) if by_task and not is_rank_one else squares(x, d)
    shape = _val(n).shape
    return (out if numel(shape) == part.stack.count else out.sum([0])).reshape(list(shape))


def _of_a_map(x: Value) -> bool:
    return x.node.target is getitem and x.node.args[0].target is map_


def _in_tasks(f: Callable[[Value, Value], Value], *operands: Value) -> Value:
    """`f` of one sample after another as a map, which can be one with the map that has made them."""
    inner = Builder(SIMPLIFY)
    inputs = [inner.input(Val(x.shape[1:], x.dtype, x.device)) for x in operands]
    out = f(*(x.reshape([1, *x.shape]) for x in inputs)).reshape([])
    mapped, count = [True] * len(operands), operands[0].shape[0]
    return emit_map(operands[0].builder, inner.finish([out]), operands, mapped, ["stack"], count)[0]


def _rank_one(x: Value, d: Value) -> Value:
    """||x||^2 ||d||^2. The other two products are never larger, and NaN where inf in one factor meets a zero of the other."""
    squares = [(v * v).reshape([v.shape[0], v.shape[2]]) for v in (x, d)]
    total, least = [v.sum([1]) for v in squares], [v.call(aten.amin.default, [1]) for v in squares]
    out = total[0] * total[1]
    for bound in (total[0] * least[1], least[0] * total[1]):
        out = out.call(aten.maximum.default, bound)
    return out


def _gram(x: Value, d: Value) -> Value:
    """sum of (x x^T) * (d d^T), which rounding may take below zero; NaN where a factor is not finite."""
    out = (x.call(aten.bmm.default, x.mT) * d.call(aten.bmm.default, d.mT)).sum([1, 2])
    return out.call(aten.clamp.default, 0) + out * 0


def _scaled(x: Value, part: Part, env: Env) -> Value:
    """A factor with what its samples are multiplied with."""
    for op, by in part.scales:
        if isinstance(by, Node):
            by = env[by].to(x.dtype)
            by = by.reshape([numel(by.shape), *[1] * (x.ndim - 1)])
        x = x.call(op, by)
    return x


def _val(n: Node) -> Val:
    return n.meta["val"]


def _is_one(size: Size) -> bool:
    return not isinstance(size, Dim) and size == 1
