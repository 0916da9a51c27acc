"""Forward mode. Entry point: `Jvp`, which emits a graph with a tangent beside every value that has one.

A zero tangent is None. Regions are entered, not opened: the jvp of a map is a map of the jvp of its body.
In `split` mode (linearize) a region emits its primal and its linear part as two regions, the first with residual outputs.
"""

from __future__ import annotations

import dataclasses

from . import errors
from .graph import Graph, Val, graft, is_random, stop_gradient, stop_reverse
from .infer import infer
from .record import Builder, Value, vals
from .rules.table import ROWS


@dataclasses.dataclass(slots=True)
class Dual:
    """A value and its tangent (None: zero)."""

    p: Value
    t: Value | None = None

    val = property(lambda self: self.p.val)


class Jvp:
    """Pushes tangents through calls into one builder.

    reverse: stop_reverse blocks, and grafts follow the old value. split: regions are emitted as primal and linear parts.
    """

    def __init__(self, b: Builder, *, reverse: bool, split: bool):
        self.b, self.reverse, self.split = b, reverse, split

    def graph(self, graph: Graph, primals, tangents):
        """(outputs, output tangents) of a graph at these values."""
        duals = [Dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        outs = self.b.inline(graph, duals, self.call)
        return [d and d.p for d in outs], [d and d.t for d in outs]

    def call(self, op, args, kwargs):
        """The Dual (or tuple of Duals) of a call on Duals."""
        duals: list[Dual] = []
        primal, keywords = unzip(args, duals), {k: unzip(v, duals) for k, v in kwargs.items()}
        if not any(d.t for d in duals):
            return _dual(self.b.emit(op, primal, keywords), None)
        if op in SPECIAL:
            return SPECIAL[op](self, args, kwargs)
        row = ROWS.get(op)
        if row is None or row.jvp is None:
            return self._expand(op, args, kwargs, duals)
        y = self.b.emit(op, primal, keywords)
        if callable(row.jvp):
            return _dual(y, row.jvp(tangents_of(args), y, *primal, **keywords))
        return _dual(y, _each(op, row, y, duals, primal, keywords))

    def _expand(self, op, args, kwargs, duals):
        """Through the op's composition, else through PyTorch's own formula for it, else through its decomposition."""
        from .decompose import decomposition, expand
        from .rules.derived import jvp_of

        if is_random(op):
            raise errors.MissingRule(op=op, rule="jvp", source=self.b.source)
        graph = expand(op, args, kwargs)
        if graph is None:
            if (found := jvp_of(self, op, args, kwargs, duals)) is not None:
                return found
            graph = decomposition(op, args, kwargs)
        if graph is None:
            raise errors.MissingRule(op=op, rule="jvp", source=self.b.source)
        outs = self.b.inline(graph, duals, self.call)
        return (
            outs[0]
            if isinstance(infer(op, vals(args), {k: vals(v) for k, v in kwargs.items()}), Val)
            else tuple(outs)
        )


def unzip(x, duals: list[Dual]):
    """`x` with Duals replaced by their primals; the Duals are collected in order."""
    if isinstance(x, Dual):
        duals.append(x)
        return x.p
    return type(x)([unzip(y, duals) for y in x]) if type(x) in (tuple, list) else x


def tangents_of(x):
    """`x` with Duals replaced by their tangents, anything else by None."""
    if isinstance(x, Dual):
        return x.t
    return [tangents_of(y) for y in x] if isinstance(x, (tuple, list)) else None


def _each(op, row, y, duals, primal, kwargs):
    """The sum of the shares of the arguments that have a tangent."""
    total = None
    for f, d in zip(row.jvp, _slots(op, row, duals, primal), strict=True):
        share = None if d is None or d.t is None else f(d.t, y, *primal, **kwargs)
        if share is not None and isinstance(y, Value):
            total = add(total, share)
        elif share is not None:
            total = tuple(add(s, t) for s, t in zip(total or (None,) * len(y), share, strict=True))
    return total


def _slots(op, row, duals, primal):
    """The Duals by tensor argument of the row: None where a number or nothing stands in the slot."""
    if len(duals) == len(row.jvp):
        return duals
    from_args = iter(duals)
    tensor_args = [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]
    out = [next(from_args) if i < len(primal) and isinstance(primal[i], Value) else None for i in tensor_args]
    return (out + [None] * len(row.jvp))[: len(row.jvp)]


def add(a: Value | None, b: Value | None) -> Value | None:
    """The sum of two tangents or cotangents, None being zero."""
    return b if a is None else a if b is None else a + b


def _dual(y, t):
    if y is None:
        return None
    if isinstance(y, tuple):
        return tuple(
            _dual(yi, ti) for yi, ti in zip(y, t if t is not None else (None,) * len(y), strict=True)
        )
    return Dual(y, None if t is None or not y.val.differentiable else fit(t, y.val))


def fit(t: Value, val: Val) -> Value:
    """A tangent cast and broadcast to what it must be."""
    t = t.to(val.dtype) if t.dtype != val.dtype else t
    return t.expand(val.shape) if t.shape != val.shape else t


def instantiate(t: Value | None, like: Value) -> Value:
    """A tangent, zeros being made real."""
    return t if t is not None else zeros(like)


def zeros(like) -> Value:
    """Zeros of a value's shape and dtype."""
    return like.builder.full(like.val, 0)


def _stop_reverse(jvp: Jvp, args, kwargs):
    """A tangent that passes was made under no_grad too: reverse mode around this one stops there."""
    return Dual(_stopped(jvp, args[0].p), None if jvp.reverse else _stopped(jvp, args[0].t))


def _stop_gradient(jvp: Jvp, args, kwargs):
    return Dual(jvp.b.emit(stop_gradient, (args[0].p,)), None)


def _graft(jvp: Jvp, args, kwargs):
    new, old = args
    y = jvp.b.emit(graft, (new.p, old.p))
    if jvp.reverse:
        return Dual(y, old.t)
    if old.t is None:
        return Dual(y, _stopped(jvp, new.t))
    return Dual(y, jvp.b.emit(graft, (instantiate(new.t, new.p), old.t)))


def _stopped(jvp: Jvp, t: Value | None) -> Value | None:
    return None if t is None else jvp.b.emit(stop_reverse, (t,))


# Ops whose tangent rule needs the engine; regions add theirs in rules/region.py and rules/loop.py.
SPECIAL = {stop_reverse: _stop_reverse, stop_gradient: _stop_gradient, graft: _graft}
