"""The rule table: one row an op. A row is added by the verb that names the op's class; a second row for an op is refused.

In rows `t` is a tangent, `ct` a cotangent, `y` the output, `a b` the inputs; everything is a `record.Value`.
    jvp        one function per tensor argument, f(t, y, *args, **kwargs) -> that argument's share of the tangent;
               or a single function f(ts, y, *args, **kwargs) over all tangents (None where zero).
    transpose  one function per tensor argument, f(ct, *args, **kwargs) -> its cotangent; linear arguments are `Undefined`.
    batch      f(ctx, op, args, kwargs) -> results with the mapped axis at dim 0; see batch.py.
    composite  f(*args, **kwargs) -> the op written with ops that have rows.
The walkers broadcast, sum and cast what rows return to the shape and dtype it must have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..errors import MissingRule
from ..graph import Val


@dataclasses.dataclass
class Row:
    """All rules of one op; None where there is none."""

    jvp: tuple | Callable | None = None
    transpose: tuple | None = None
    batch: Callable | None = None
    composite: Callable | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Undefined:
    """Stands for a linear argument in a transpose rule: only its shape and dtype are known."""

    val: Val

    shape = property(lambda self: self.val.shape)
    ndim = property(lambda self: self.val.ndim)
    dtype = property(lambda self: self.val.dtype)


ROWS: dict[object, Row] = {}


def _add(op, row: Row) -> None:
    if op in ROWS:
        raise ValueError(f"{op} has a row already")
    ROWS[op] = row


def ZERO(t, *args, **kwargs):
    """Said, not left out: no derivative for this argument."""
    return None


def rule(op, *, jvp=None, transpose=None, batch=None) -> None:
    """An op of no special class."""
    _add(
        op,
        Row(
            tuple(jvp) if isinstance(jvp, (list, tuple)) else jvp,
            tuple(transpose) if transpose else None,
            batch,
        ),
    )


def elementwise(op, *jvp) -> None:
    """Acts on each element alone, arguments broadcast: one jvp function per tensor argument."""
    from .batching import pointwise

    _add(op, Row(jvp, None, pointwise))


def linear(op, transpose, *, batch) -> None:
    """Linear in its one tensor argument: the tangent is the op of the tangent."""
    _add(op, Row((lambda t, y, a, *args, **kwargs: t.call(op, *args, **kwargs),), (transpose,), batch))


def bilinear(op, transpose_a, transpose_b, *, batch) -> None:
    """Linear in each of its first two tensor arguments."""
    jvp = (
        lambda t, y, a, b, *args, **kwargs: t.call(op, b, *args, **kwargs),
        lambda t, y, a, b, *args, **kwargs: t.builder.emit(op, (a, t, *args), kwargs),
    )
    _add(op, Row(jvp, (_linear_alone(op, transpose_a, 1), _linear_alone(op, transpose_b, 0)), batch))


def _linear_alone(op, transpose, other: int):
    """A transpose that refuses a call with two linear arguments, which is not linear."""

    def checked(ct, *args, **kwargs):
        if isinstance(args[other], Undefined):
            raise MissingRule(op=op, rule="transpose (both arguments at once)")
        return transpose(ct, *args, **kwargs)

    return checked


def zero(op, *, batch) -> None:
    """No derivative at all (comparisons, integer results, shapes)."""
    _add(
        op,
        Row(
            lambda ts, y, *args, **kwargs: None if not isinstance(y, tuple) else (None,) * len(y), None, batch
        ),
    )


def composite(op, function, *, jvp=None, transpose=None, batch=None) -> None:
    """The op as a composition of ops that have rows; other rules only where the composition's own would be bad or not torch's."""
    _add(op, Row(jvp, transpose, batch, function))
