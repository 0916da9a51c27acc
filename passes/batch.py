"""Batching: a map turned into ordinary ops with one more axis. Entry points: `Batch` (a map's body), `lower` (a whole graph).

A value either carries the mapped axis at dim 0 (`Mapped`) or not at all; what does not depend on the axis stays as it is.
The dtype of a result is that of the per-example program, whatever promotion would make of the batched operands.
"""

from __future__ import annotations

import dataclasses
import warnings

from . import errors
from .dims import Size
from .graph import (
    Graph,
    Val,
    checkpoint,
    cond,
    custom,
    extract,
    graft,
    is_random,
    linear_call,
    map_,
    reached,
    scan,
    stop_gradient,
    stop_reverse,
)
from .infer import infer
from .record import Builder, Value, aten, vals
from .regions import emit_cond, emit_scan
from .rules.table import ROWS
from .simplify import SIMPLIFY


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
    """A value with the mapped axis at dim 0; `val` is what one example sees."""

    x: Value
    val: Val

    shape = property(lambda self: self.val.shape)
    ndim = property(lambda self: self.val.ndim)
    dtype = property(lambda self: self.val.dtype)


class Batch:
    """Emits the calls of a map's body for all examples at once. Batch rules get it as `ctx`; `ctx.out` is the per-example val."""

    def __init__(self, b: Builder, length: Size, randomness: str):
        self.b, self.length, self.randomness = b, length, randomness
        self.out = None

    def call(self, op, args, kwargs):
        """The Mapped (or Value, or tuple of them) of a call."""
        draws = is_random(op, args)
        if not draws and not any(True for _ in mapped_in([args, list(kwargs.values())])):
            return self.b.emit(op, args, kwargs)
        if op in SPECIAL:
            return SPECIAL[op](self, args, kwargs)
        out = infer(op, vals(args), {k: vals(v) for k, v in kwargs.items()})
        row = ROWS.get(op)
        if row is not None and row.batch is not None:
            before, self.out = self.out, out
            try:
                return self.wrap(row.batch(self, op, args, kwargs), out)
            finally:
                self.out = before
        if draws:
            raise errors.MissingRule(op=op, rule="batch", source=self.b.source)
        return self._expand(op, args, kwargs, out)

    def _expand(self, op, args, kwargs, out):
        from .decompose import decomposition, expand, tensors_in

        tensors = tensors_in([args, list(kwargs.values())], (Value, Mapped))
        graph = expand(op, args, kwargs)
        if graph is None:
            if (found := self._derived(op, args, kwargs, out, tensors)) is not None:
                return found
            graph = decomposition(op, args, kwargs)
        if graph is None:
            return self._loop(op, args, kwargs, out, tensors)
        outs = self.b.inline(graph, tensors, self.call)
        return outs[0] if isinstance(out, Val) else tuple(outs)

    def _derived(self, op, args, kwargs, out, tensors):
        from .rules.derived import batch_of

        mapped = [isinstance(t, Mapped) for t in tensors]
        values = [t.x if m else t for t, m in zip(tensors, mapped, strict=True)]
        outs = batch_of(self.b, op, args, kwargs, values, mapped, self.length)
        return None if outs is None else self.wrap(outs[0] if isinstance(out, Val) else tuple(outs), out)

    def _loop(self, op, args, kwargs, out, tensors):
        """No rule: one example after the other, as a scan; said once per op."""
        from .decompose import single

        warnings.warn(
            f"fxfunc: {op} has no batching rule and runs one example at a time (at {self.b.source}). "
            f"Register one with fxfunc.register_rule({op}, batch=...)",
            stacklevel=2,
        )
        graph = single(op, args, kwargs)
        consts = [(n, t) for n, t in zip(graph.inputs, tensors, strict=True) if not isinstance(t, Mapped)]
        xs = [(n, t.x) for n, t in zip(graph.inputs, tensors, strict=True) if isinstance(t, Mapped)]
        ordered = extract([n for n, _ in consts + xs], list(graph.outputs))
        outs = emit_scan(self.b, ordered, [t for _, t in consts], [], [t for _, t in xs], self.length)
        return self.wrap(outs[0] if isinstance(out, Val) else tuple(outs), out)

    def wrap(self, x, val):
        """Batched results of a rule as Mapped."""
        if x is None:
            return None
        return (
            Mapped(x.to(val.dtype), val)
            if isinstance(val, Val)
            else tuple(self.wrap(y, v) for y, v in zip(x, val, strict=True))
        )

    def lift(self, x) -> Value:
        """A value with the axis at dim 0, expanded if it has none."""
        return x.x if isinstance(x, Mapped) else x.expand([self.length, *x.shape])


def mapped_in(x):
    """The Mapped values in an argument structure."""
    if isinstance(x, Mapped):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from mapped_in(y)


def _batch_scan(ctx: Batch, args, kwargs):
    """A scan whose carries, constants and xs may carry the axis: grown to a fixpoint."""
    body, consts, carry, xs = args
    operands = [*consts, *carry, *xs]
    flags = [isinstance(x, Mapped) for x in operands]
    nc, nk = len(consts), len(carry)
    while True:
        out = _batched_outputs(ctx, body, flags)
        grown = [f or o for f, o in zip(flags[nc : nc + nk], out, strict=False)]
        if grown == flags[nc : nc + nk]:
            break
        flags[nc : nc + nk] = grown
    inner, out_flags = _batched_body(ctx, body, flags, flags[nc : nc + nk])
    ins = [ctx.lift(x) if f else x for x, f in zip(operands, flags, strict=True)]
    xs_in = [x.movedim(0, 1) if f else x for x, f in zip(ins[nc + nk :], flags[nc + nk :], strict=True)]
    results = emit_scan(ctx.b, inner, ins[:nc], ins[nc : nc + nk], xs_in, **kwargs)
    out_vals = infer(scan, tuple(vals(a) for a in args), kwargs)
    return tuple(
        _unscanned(r, f, v, i >= nk)
        for i, (r, f, v) in enumerate(zip(results, out_flags, out_vals, strict=True))
    )


def _unscanned(result: Value, batched: bool, val: Val, stacked: bool):
    if not batched:
        return result
    return Mapped(result.movedim(1, 0) if stacked else result, val)


def _batched_outputs(ctx: Batch, body: Graph, flags) -> list[bool]:
    """Which outputs of a body carry the axis."""
    starts = [n for n, f in zip(body.inputs, flags, strict=True) if f]
    found = reached(body.nodes, [*starts, *body.draws])
    return [n in found for n in body.outputs]


def _batched_body(ctx: Batch, body: Graph, flags, carry) -> tuple[Graph, list[bool]]:
    b = Builder(SIMPLIFY)
    inner = Batch(b, ctx.length, ctx.randomness)
    ins = []
    for n, f in zip(body.inputs, flags, strict=True):
        v = n.meta["val"]
        ins.append(
            Mapped(b.input(Val((ctx.length, *v.shape), v.dtype, v.device), n.name), v)
            if f
            else b.input(v, n.name)
        )
    outs = b.inline(body, ins, inner.call)
    out_flags = [isinstance(o, Mapped) for o in outs]
    out_flags[: len(carry)] = [o or f for o, f in zip(out_flags, carry, strict=False)]
    return b.finish([inner.lift(o) if f else o for o, f in zip(outs, out_flags, strict=True)]), out_flags


def _batch_cond(ctx: Batch, args, kwargs):
    """Where examples differ in the predicate both branches are computed, and each takes its own."""
    true, false, pred, operands = args
    if isinstance(pred, Mapped):
        outs = [ctx.b.inline(g, list(operands), ctx.call) for g in (true, false)]
        return tuple(ctx.call(aten.where.self, (pred, x, y), {}) for x, y in zip(*outs, strict=True))
    flags = [isinstance(x, Mapped) for x in operands]
    each = [_batched_outputs(ctx, g, flags) for g in (true, false)]
    out = [x or y for x, y in zip(*each, strict=True)]
    bodies = [_batched_body(ctx, g, flags, out)[0] for g in (true, false)]
    ins = [ctx.lift(x) if f else x for x, f in zip(operands, flags, strict=True)]
    results = emit_cond(ctx.b, *bodies, pred, ins)
    return tuple(Mapped(r, v) if f else r for r, f, v in zip(results, out, true.out_vals, strict=True))


def lower(graph: Graph) -> Graph:
    """The graph with maps batched and every region opened but scan and cond, whose bodies are lowered too."""
    b = Builder(SIMPLIFY)
    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], _Lower(b).call))


class _Lower:
    def __init__(self, b: Builder):
        self.b = b

    def call(self, op, args, kwargs):
        rule = LOWER.get(op)
        return rule(self.b, args, kwargs) if rule else self.b.emit(op, args, kwargs)


def _lower_map(b: Builder, args, kwargs):
    body, operands = args
    ctx = Batch(b, kwargs["length"], kwargs["randomness"])
    ins = [Mapped(x, v) if m else x for x, v, m in zip(operands, body.in_vals, kwargs["mapped"], strict=True)]
    outs = b.inline(lower(body), ins, ctx.call)
    return tuple(_map_result(ctx, o, kind) for o, kind in zip(outs, kwargs["outs"], strict=True))


def _map_result(ctx: Batch, out, kind: str) -> Value:
    if kind == "stack":
        return ctx.lift(out)
    return out.x.sum([0]).to(out.dtype) if isinstance(out, Mapped) else out.call(aten.mul.Tensor, ctx.length)


def _lower_scan(b: Builder, args, kwargs):
    body, consts, carry, xs = args
    return tuple(emit_scan(b, lower(body), list(consts), list(carry), list(xs), **kwargs))


def _lower_cond(b: Builder, args, kwargs):
    true, false, pred, operands = args
    return tuple(emit_cond(b, lower(true), lower(false), pred, operands))


def _lower_linear_call(b: Builder, args, kwargs):
    body, transposed, residuals, operands = args
    if body is None:
        raise errors.MissingRule(op=kwargs["name"], rule="jvp", source=b.source)
    return tuple(b.inline(body, [*residuals, *operands], _Lower(b).call))


def _lower_custom(b: Builder, args, kwargs):
    return tuple(b.inline(args[0], list(args[-1]), _Lower(b).call))


def _lower_checkpoint(b: Builder, args, kwargs):
    body, operands = args
    return tuple(b.inline(body, list(operands), _Lower(b).call))


SPECIAL = {scan: _batch_scan, cond: _batch_cond}
LOWER = {
    map_: _lower_map,
    scan: _lower_scan,
    cond: _lower_cond,
    linear_call: _lower_linear_call,
    custom: _lower_custom,
    checkpoint: _lower_checkpoint,
    stop_reverse: lambda b, args, kwargs: args[0],
    stop_gradient: lambda b, args, kwargs: args[0],
    graft: lambda b, args, kwargs: args[0],
}
