"""Derivatives of `scan`: scans again.

A missing tangent is zero and takes no part; a zero in a scan's carry is multiplied, and 0 * inf is NaN. So the first steps are
taken out of a scan until the same carries have tangents (backward: cotangents) from one step to the next. What is left: a loop
of symbolic length, two carries that change places, and a residual that only some steps read still meet real zeros.
"""

from __future__ import annotations

import dataclasses
import functools

from .. import jvp as forward
from .. import transpose as reverse
from ..graph import Graph, Val, extract, scan
from ..jvp import Dual, Jvp, instantiate
from ..linearize import Linearized, linearize
from ..record import Builder, Value, aten
from ..regions import emit_scan
from ..simplify import SIMPLIFY
from .region import differentiate, paired, transposed
from .table import Undefined

Flags = tuple[bool, ...]


def _steps_until_settled(start: Flags, flow, length) -> int:
    """How many steps change which carries take part; none if that never ends, as where two carries change places."""
    seen = [start]
    while (after := flow(seen[-1])) not in seen:
        seen.append(after)
    return min(len(seen) - 1, length) if after == seen[-1] and isinstance(length, int) else 0


def _grown(start: Flags, flow) -> Flags:
    """The carries that take part in some step; in the others theirs are zeros."""
    while (more := tuple(a or z for a, z in zip(start, flow(start), strict=True))) != start:
        start = more
    return start


def _at(x: Value | None, step: int) -> Value | None:
    return x if x is None else x.call(aten.select.int, 0, step)


def _without(x: Value | None, steps: int, reverse: bool) -> Value | None:
    """A stack without what the first steps read, the last ones of it if the loop runs backward."""
    if x is None or steps == 0:
        return x
    start, end = (0, x.shape[0] - steps) if reverse else (steps, x.shape[0])
    return x.call(aten.slice.Tensor, 0, start, end)


def _joined(b: Builder, val: Val, taken, rest: Value | None, left: int, reverse: bool) -> Value | None:
    """A stack of `val`s: those of the steps taken out, in their order, then what the scan of the `left` others gave."""
    if not taken or all(x is None for x in [*taken, rest]):
        return rest
    parts = [x if x is not None else b.full(val, 0) for x in taken]
    parts = [x.reshape([1, *val.shape]) for x in parts]
    if left:
        stack = dataclasses.replace(val, shape=(left, *val.shape))
        parts.append(rest if rest is not None else b.full(stack, 0))
    return b.emit(aten.cat.default, (parts[::-1] if reverse else parts, 0))


# ----- jvp ------------------------------------------------------------------------------------------------------------


def _scan_jvp(jvp: Jvp, args, kwargs):
    body, consts, carry, xs = args
    nk, length, backward = len(carry), kwargs["length"], kwargs["reverse"]

    @functools.cache
    def derivative(live: Flags):
        nonzero = (*_nonzero(consts), *live, *_nonzero(xs))
        if jvp.split:
            cut = linearize(body, nonzero, reverse=jvp.reverse)
            return cut, cut.nonzero_out
        return differentiate(body, nonzero, reverse_mode=jvp.reverse)

    def flow(live: Flags) -> Flags:
        return derivative(live)[1][:nk]

    steps, taken = _steps_until_settled(_nonzero(carry), flow, length), []
    for i in range(steps):
        i = length - 1 - i if backward else i
        outs = jvp.b.inline(body, [*consts, *carry, *(Dual(_at(d.p, i), _at(d.t, i)) for d in xs)], jvp.call)
        carry = outs[:nk]
        taken.append(outs[nk:])
    rest = [Dual(None)] * (len(body.outputs) - nk)
    if not steps or steps != length:
        xs = [Dual(_without(d.p, steps, backward), _without(d.t, steps, backward)) for d in xs]
        live = _grown(_nonzero(carry), flow)
        emit = _emit_split if jvp.split else _emit_fused
        outs = emit(jvp.b, *derivative(live), live, (consts, carry, xs), kwargs | {"length": length - steps})
        carry, rest = outs[:nk], outs[nk:]
    if not steps:
        return (*carry, *rest)

    def joined(j: int, part: str) -> Value | None:
        parts = [getattr(step[j], part) for step in taken]
        return _joined(
            jvp.b, body.outputs[nk + j].meta["val"], parts, getattr(rest[j], part), length - steps, backward
        )

    return (*carry, *(Dual(joined(j, "p"), joined(j, "t")) for j in range(len(rest))))


def _nonzero(duals) -> Flags:
    return tuple(d.t is not None for d in duals)


def _emit_split(b: Builder, cut: Linearized, _, live: Flags, parts, kwargs):
    """A scan of the primal that stacks its residuals, and a scan of the linear part."""
    cut = _with_carry_tangents(cut, live)
    results = emit_scan(b, cut.primal, *([d.p for d in part] for part in parts), **kwargs)
    tangents = _tangents(parts, live)
    values = [*results[cut.count :], *(t for t, _ in tangents)]
    linear, groups = _grouped(cut.linear, values, [2] * cut.residuals + [p for _, p in tangents])
    return paired(results[: cut.count], emit_scan(b, linear, *groups, **kwargs), cut.nonzero_out)


def _tangents(parts, live: Flags) -> list[tuple[Value, int]]:
    """The tangents that a scan takes, and the part (constants, carry, xs) each is of."""
    consts, carry, xs = parts
    known = [(d, p, d.t is not None) for p, part in ((0, consts), (2, xs)) for d in part]
    known[len(consts) : len(consts)] = [(d, 1, z) for d, z in zip(carry, live, strict=True)]
    return [(instantiate(d.t, d.p), p) for d, p, z in known if z]


def _grouped(body: Graph, values, part: list[int]) -> tuple[Graph, list[list]]:
    """A scan's body with its inputs reordered as constants (0), carry (1) and xs (2), and the values in these groups."""
    order = sorted(range(len(values)), key=part.__getitem__)
    groups = [[values[i] for i in order if part[i] == p] for p in range(3)]
    return extract([body.inputs[i] for i in order], list(body.outputs), body.draws), groups


def _with_carry_tangents(cut: Linearized, live: Flags) -> Linearized:
    """A carry that enters with a tangent leaves with one, zeros if need be."""
    if all(o or not z for o, z in zip(cut.nonzero_out, live, strict=False)):
        return cut
    b = Builder(SIMPLIFY)
    values = [b.input(n.meta["val"], n.name) for n in cut.linear.inputs]
    given = iter(b.inline(cut.linear, values))
    outs, flags = [], []
    for j, (o, node) in enumerate(zip(cut.nonzero_out, cut.primal.outputs[: cut.count], strict=True)):
        need = o or (j < len(live) and live[j])
        flags.append(need)
        if need:
            outs.append(next(given) if o else b.full(node.meta["val"], 0))
    return dataclasses.replace(cut, linear=b.finish(outs), nonzero_out=tuple(flags))


def _emit_fused(b: Builder, both: Graph, nonzero_out: Flags, live: Flags, parts, kwargs):
    """One scan of values and tangents."""
    nk, count = len(live), len(nonzero_out)
    inner = Builder(SIMPLIFY)
    outs = inner.inline(both, [inner.input(n.meta["val"], n.name) for n in both.inputs])
    t_values = dict(zip([j for j, z in enumerate(nonzero_out) if z], outs[count:], strict=True))
    carry_t = [j for j in range(nk) if live[j]]
    ys_t = [j for j in range(nk, count) if nonzero_out[j]]
    t_carry = [t_values[j] if j in t_values else inner.full(outs[j].val, 0) for j in carry_t]
    full = inner.finish(outs[:nk] + t_carry + outs[nk:count] + [t_values[j] for j in ys_t])
    primals = [(d.p, p) for p, part in enumerate(parts) for d in part]
    values = [*primals, *_tangents(parts, live)]
    ordered, groups = _grouped(full, [v for v, _ in values], [p for _, p in values])
    results = emit_scan(b, ordered, *groups, **kwargs)
    t_results = dict(zip(carry_t, results[nk:], strict=False))
    ys = results[nk + len(carry_t) :]
    t_results |= dict(zip(ys_t, ys[count - nk :], strict=True))
    return [Dual(o, t_results.get(j)) for j, o in enumerate(results[:nk] + ys[: count - nk])]


# ----- transpose ------------------------------------------------------------------------------------------------------


def _scan_transpose(b: Builder, cts, args, kwargs):
    """The scan backward: cotangents of constants are accumulated in the carry, those of xs are the new ys."""
    body, consts, carry, xs = args
    nk, length, backward = len(carry), kwargs["length"], not kwargs["reverse"]
    inner, residuals = _carry_linear(body, args[1:])
    res = [x for x in consts if not isinstance(x, Undefined)], [x for x in xs if not isinstance(x, Undefined)]
    undefined = [x for x in consts if isinstance(x, Undefined)], [x for x in xs if isinstance(x, Undefined)]
    first, ys = len(undefined[0]), [j for j in range(nk, len(cts)) if cts[j] is not None]

    @functools.cache
    def pullback(live: Flags) -> Graph:
        return transposed(inner, residuals, [*(j for j in range(nk) if live[j]), *ys])

    def flow(live: Flags) -> Flags:
        return tuple(n is not None for n in pullback(live).outputs[first : first + nk])

    def present() -> Flags:
        return tuple(ct is not None for ct in ct_carry)

    ct_consts, ct_carry, ct_ys = [None] * first, list(cts[:nk]), [cts[j] for j in ys]
    steps, taken = _steps_until_settled(present(), flow, length), []
    for i in range(steps):
        i = length - 1 - i if backward else i
        given = [ct for ct in ct_carry if ct is not None]
        values = [*res[0], *(_at(x, i) for x in res[1]), *given, *(_at(ct, i) for ct in ct_ys)]
        shares = b.inline(pullback(present()), values)
        ct_consts = [forward.add(ct, s) for ct, s in zip(ct_consts, shares[:first], strict=True)]
        ct_carry = shares[first : first + nk]
        taken.append(shares[first + nk :])
    rest: list[Value | None] = [None] * len(undefined[1])
    if not steps or steps != length:
        live = _grown(present(), flow)
        x_res, ct_ys = ([_without(x, steps, backward) for x in part] for part in (res[1], ct_ys))
        got = [i for i, n in enumerate(pullback(live).outputs[:first]) if n is not None]
        starts = [(ct_consts[i], undefined[0][i].val) for i in got]
        starts += [(ct, x.val) for ct, x, z in zip(ct_carry, carry, live, strict=True) if z]
        starts = [ct if ct is not None else b.full(val, 0) for ct, val in starts]
        graph, got_xs = _accumulating(pullback(live), residuals, got, first, live)
        part = [0] * len(res[0]) + [2] * len(x_res) + [1] * len(starts) + [2] * len(ys)
        graph, groups = _grouped(graph, [*res[0], *x_res, *starts, *ct_ys], part)
        results = iter(emit_scan(b, graph, *groups, length=length - steps, reverse=backward))
        for i in got:
            ct_consts[i] = next(results)
        ct_carry = [next(results) if z else None for z in live]
        rest = [next(results) if z else None for z in got_xs]
    vals = [Val(x.shape[1:], x.dtype, x.val.device) for x in undefined[1]]
    ct_xs = [
        _joined(b, val, [step[j] for step in taken], rest[j], length - steps, backward)
        for j, val in enumerate(vals)
    ]
    return [
        *ct_consts,
        *(ct for ct, x in zip(ct_carry, carry, strict=True) if isinstance(x, Undefined)),
        *ct_xs,
    ]


def _accumulating(pullback: Graph, residuals: int, got: list[int], first: int, live: Flags):
    """A pullback that adds its shares of the constants `got` to what it is given; and which xs have a share."""
    b = Builder(SIMPLIFY)
    res = [b.input(n.meta["val"], n.name) for n in pullback.inputs[:residuals]]
    sums = [b.input(pullback.outputs[i].meta["val"], "acc") for i in got]
    cts = [b.input(n.meta["val"], n.name) for n in pullback.inputs[residuals:]]
    shares = b.inline(pullback, [*res, *cts])
    carry = [s for s, z in zip(shares[first:], live, strict=False) if z]
    carry = [s if s is not None else b.full(ct.val, 0) for s, ct in zip(carry, cts, strict=False)]
    xs = shares[first + len(live) :]
    outs = [
        *(acc + shares[i] for acc, i in zip(sums, got, strict=True)),
        *carry,
        *(s for s in xs if s is not None),
    ]
    return b.finish(outs), [s is not None for s in xs]


def _carry_linear(body: Graph, parts) -> tuple[Graph, int]:
    """A linear scan's body with its residuals first, and how many. A carry is linear also where it starts as a constant zero."""
    nc, nk = len(parts[0]), len(parts[1])
    linear = [
        isinstance(x, Undefined) or nc <= i < nc + nk for i, x in enumerate(x for p in parts for x in p)
    ]
    order = sorted(range(len(linear)), key=linear.__getitem__)
    return extract([body.inputs[i] for i in order], list(body.outputs)), linear.count(False)


forward.SPECIAL[scan] = _scan_jvp
reverse.SPECIAL[scan] = _scan_transpose
