"""Derivatives of an op by a composition that has the same derivatives, while ATen's kernels compute the op and its adjoint.

Entry points: `through`, a jvp for a row, and `paired`, a linear map given with its adjoint.
"""

from __future__ import annotations

from ..decompose import build, tensors_in
from ..graph import Val, extract, linear_call
from ..jvp import fit as widen
from ..record import Value, vals
from ..transpose import fit
from .region import differentiate


def through(composition):
    """A jvp that is the composition's."""

    def jvp(ts, y, *args, **kwargs):
        given, flags = tensors_in(list(args), Value), _flags(list(args), list(ts))
        graph, nonzero = differentiate(build(composition, vals(args), kwargs), flags, reverse_mode=False)
        alone = extract(list(graph.inputs), list(graph.outputs[len(nonzero) :]))
        found = iter(given[0].builder.inline(alone, [*given, *_tangents(list(ts))]))
        out = tuple(next(found) if z else None for z in nonzero)
        return out if isinstance(y, tuple) else out[0]

    return jvp


def _flags(args, ts) -> tuple[bool, ...]:
    """Which of the tensors among nested arguments have a tangent."""
    if isinstance(args, Value):
        return (ts is not None,)
    if not isinstance(args, (list, tuple)):
        return ()
    return tuple(f for a, t in zip(args, ts or [None] * len(args), strict=True) for f in _flags(a, t))


def _tangents(ts) -> list[Value]:
    return tensors_in(ts, Value)


def paired(name: str, t: Value, out: Val, push, pull, *residuals: Value) -> Value:
    """push(*residuals, t), a linear map of t to a value like `out`, whose adjoint is pull(*residuals, ct); None is missing."""
    known = tuple(r.val for r in residuals)
    forward = push and build(lambda *given: widen(push(*given), out), (*known, t.val), {})
    back = build(lambda *given: fit(pull(*given), t.val), (*known, out), {})
    return t.builder.emit(linear_call, (forward, back, residuals, (t,)), {"vals": (out,), "name": name})[0]
