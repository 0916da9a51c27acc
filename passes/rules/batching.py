"""Batch rules by class of op. A rule gets `ctx` (batch.Batch) and returns results with the mapped axis at dim 0."""

from __future__ import annotations

import torch

from ..batch import Mapped
from ..graph import Val
from ..record import Value, aten


def shapes_of(args):
    """The tensor arguments among these."""
    return [a for a in args if isinstance(a, (Mapped, Value))]


def pointwise(ctx, op, args, kwargs):
    """Elementwise ops: ranks are aligned so that dim 0 is the axis, and promotion stays that of one example."""
    tensors = shapes_of(args)
    rank = max(t.ndim for t in tensors)
    common = (
        _promoted([t for t in tensors if t.dtype is not torch.bool] or tensors) if len(tensors) > 1 else None
    )
    return ctx.b.emit(
        op, tuple(_align(a, rank, common) if isinstance(a, Mapped) else a for a in args), kwargs
    )


def _promoted(tensors) -> torch.dtype:
    """The dtype ATen computes in for one example, where 0-d tensors count less."""
    metas = [torch.empty([1] * min(t.ndim, 1), dtype=t.dtype, device="meta") for t in tensors]
    out = metas[0]
    for m in metas[1:]:
        out = torch.empty([1] * max(out.ndim, m.ndim), dtype=torch.result_type(out, m), device="meta")
    return out.dtype


def _align(a: Mapped, rank: int, common) -> Value:
    x = a.x
    if common is not None and a.ndim == 0 and a.dtype not in (common, torch.bool):
        x = x.to(common)
    return x if a.ndim == rank else x.reshape([x.shape[0], *[1] * (rank - a.ndim), *a.shape])


def along(*names: str):
    """Ops with dim arguments of these names: all tensors get the axis, dims are moved behind it."""

    def rule(ctx, op, args, kwargs):
        scalar = all(t.ndim == 0 for t in shapes_of(_flat(args)))
        rank = max((t.ndim for t in shapes_of(_flat(args))), default=0)
        lifted = [_lift(ctx, a, scalar) for a in args]
        bound = dict(kwargs)
        for i, a in enumerate(op._schema.arguments):
            if a.name in names:
                given = lifted[i] if i < len(lifted) else kwargs.get(a.name, a.default_value)
                moved = _behind(given, max(rank, 1))
                if i < len(lifted):
                    lifted[i] = moved
                elif i == len(lifted) and not a.kwarg_only:
                    lifted.append(moved)
                else:
                    bound[a.name] = moved
        out = ctx.b.emit(op, tuple(lifted), bound)
        return _restore(ctx, out) if scalar else out

    return rule


def _flat(args):
    return [y for a in args for y in (a if isinstance(a, (list, tuple)) else [a])]


def _lift(ctx, a, scalar):
    if isinstance(a, (list, tuple)) and any(isinstance(y, (Mapped, Value)) for y in a):
        return [_lift(ctx, y, scalar) for y in a]
    if isinstance(a, (Mapped, Value)):
        x = ctx.lift(a)
        return x.reshape([*x.shape, 1]) if scalar else x
    return a


def _behind(dim, rank: int):
    if dim is None:
        return list(range(1, rank + 1))
    if isinstance(dim, (list, tuple)):
        return [_behind(d, rank) for d in dim] or list(range(1, rank + 1))
    if not -rank <= dim < rank:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})"
        )
    return dim % rank + 1


def _restore(ctx, out):
    if isinstance(ctx.out, Val):
        return out.reshape([out.shape[0], *ctx.out.shape])
    return tuple(o.reshape([o.shape[0], *v.shape]) for o, v in zip(out, ctx.out, strict=True))


reduction = along("dim")


def full_reduction(over_dims):
    """A reduction over everything, batched as the same op over all other dims."""

    def rule(ctx, op, args, kwargs):
        x = args[0].x
        return ctx.b.emit(
            over_dims,
            (x.reshape([x.shape[0], -1] if args[0].ndim else [x.shape[0], 1]), [1], *args[1:]),
            kwargs,
        )

    return rule


def reshape(ctx, op, args, kwargs):
    """aten.reshape of one example."""
    return args[0].x.reshape([ctx.length, *ctx.out.shape])


def expand(ctx, op, args, kwargs):
    """aten.expand of one example: the rank may grow."""
    a = args[0]
    x = a.x.reshape([ctx.length, *[1] * (ctx.out.ndim - a.ndim), *a.shape])
    return x.expand([ctx.length, *ctx.out.shape])


def permute(ctx, op, args, kwargs):
    """aten.permute of one example."""
    a, dims = args
    return a.x.permute([0, *(d % a.ndim + 1 for d in dims)])


def matmul(ctx, op, args, kwargs):
    """mm: bmm only if both sides carry the axis, else it is folded into the rows (or columns)."""
    a, b = args
    if not isinstance(b, Mapped):
        n, m, k = ctx.length, a.shape[0], a.shape[1]
        return (a.x.reshape([n * m, k]) @ b).reshape([n, m, b.shape[1]])
    if not isinstance(a, Mapped):
        n, k, m = ctx.length, b.shape[0], b.shape[1]
        folded = b.x.permute([0, 2, 1]).reshape([n * m, k]) @ a.mT
        return folded.reshape([n, m, a.shape[0]]).permute([0, 2, 1])
    return ctx.b.emit(aten.bmm.default, (a.x, b.x))


def batched_matmul(ctx, op, args, kwargs):
    """bmm: the axis joins the batch dim."""
    a, b = (ctx.lift(x) for x in args)
    n, c = ctx.length, args[0].shape[0]
    out = ctx.b.emit(
        aten.bmm.default, (a.reshape([n * c, *args[0].shape[1:]]), b.reshape([n * c, *args[1].shape[1:]]))
    )
    return out.reshape([n, *ctx.out.shape])


def draw(ctx, op, args, kwargs):
    """A random op under randomness="different": one draw for each example."""
    values = [ctx.lift(a) if isinstance(a, (Mapped, Value)) else a for a in args]
    for i, a in enumerate(op._schema.arguments[: len(values)]):
        if a.name == "size":  # a factory grows
            values[i] = [ctx.length, *values[i]]
    return ctx.b.emit(op, tuple(values), kwargs)


def fold_rows():
    """Ops over [rows, ...] whose rows are independent: the axis is folded into dim 0 of argument 0."""

    def rule(ctx, op, args, kwargs):
        x = ctx.lift(args[0])
        n, rows = x.shape[0], x.shape[1]
        out = ctx.b.emit(op, (x.reshape([n * rows, *x.shape[2:]]), *args[1:]), kwargs)
        unfold = lambda o: o.reshape([n, rows, *o.shape[1:]])
        return unfold(out) if isinstance(out, Value) else tuple(unfold(o) for o in out)

    return rule
