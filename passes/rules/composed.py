"""Derivatives of an op by a composition that has the same derivatives, while ATen's kernels compute the op and its adjoint.

Entry points: `through`, a jvp for a row, and `paired`, a linear map given with its adjoint.
"""

from __future__ import annotations

from ..decompose import build, tensors_in
from ..graph import extract, linear_call
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


def paired(name: str, t: Value, push, pull, *residuals: Value) -> Value:
    """push(*residuals, t), a linear map of t whose adjoint is pull(*residuals, ct)."""
    forward = build(push, (*(r.val for r in residuals), t.val), {})
    (out,) = forward.out_vals
    back = build(lambda *given: fit(pull(*given), t.val), (*(r.val for r in residuals), out), {})
    return t.builder.emit(linear_call, (forward, back, residuals, (t,)), {"vals": (out,), "name": name})[0]
