"""Derivatives of regions: each rule gives regions again, their bodies differentiated."""

from __future__ import annotations

import dataclasses

from .. import jvp as forward
from .. import transpose as reverse
from ..errors import MissingRule
from ..graph import Graph, Val, cond, custom, extract, linear_call, map_, scan, stop_gradient
from ..jvp import Dual, Jvp, instantiate
from ..linearize import Linearized, linearize
from ..record import Builder, Value
from ..regions import emit_cond, emit_map, emit_scan
from ..simplify import SIMPLIFY
from .table import Undefined


def differentiate(body: Graph, nonzero, *, reverse_mode: bool) -> tuple[Graph, tuple[bool, ...]]:
    """The jvp of a body: inputs, then nonzero tangents -> outputs, then nonzero output tangents."""
    b = Builder(SIMPLIFY)
    primals = [b.input(n.meta["val"], n.name) for n in body.inputs]
    tangents = [
        b.input(n.meta["val"], "t_" + n.name) if z else None
        for n, z in zip(body.inputs, nonzero, strict=True)
    ]
    outs, out_tangents = Jvp(b, reverse=reverse_mode, split=False).graph(body, primals, tangents)
    return b.finish(outs + [t for t in out_tangents if t is not None]), tuple(
        t is not None for t in out_tangents
    )


def _zip(outs, tangents, nonzero):
    tangents = iter(tangents)
    return tuple(Dual(o, next(tangents) if z else None) for o, z in zip(outs, nonzero, strict=True))


# ----- map ------------------------------------------------------------------------------------------------------------


def _map_jvp(jvp: Jvp, args, kwargs):
    body, duals = args
    nonzero = tuple(d.t is not None for d in duals)
    primals, tangents = [d.p for d in duals], [d.t for d in duals if d.t is not None]
    mapped, outs, length, randomness = (kwargs[k] for k in ("mapped", "outs", "length", "randomness"))
    t_mapped = [m for m, z in zip(mapped, nonzero, strict=True) if z]

    cut = linearize(body, nonzero, reverse=jvp.reverse)
    r_mapped, r_outs = [True] * cut.residuals, ["stack"] * cut.residuals
    results = emit_map(jvp.b, cut.primal, primals, mapped, [*outs, *r_outs], length, randomness)
    kinds = [kind for kind, z in zip(outs, cut.nonzero_out, strict=True) if z]
    operands = results[cut.count :] + tangents
    out_tangents = emit_map(jvp.b, cut.linear, operands, r_mapped + t_mapped, kinds, length, randomness)
    return _zip(results[: cut.count], out_tangents, cut.nonzero_out)


def _map_transpose(b: Builder, cts, args, kwargs):
    """A map again: cotangents of stacked outputs are mapped, of sums not; cotangents of unmapped inputs are summed."""
    body, operands = args
    mapped, outs = kwargs["mapped"], kwargs["outs"]
    body, residuals, linear = _linear_last(body, operands)
    kinds = [mapped[i] for i in residuals]
    given = [j for j, ct in enumerate(cts) if ct is not None]
    back = transposed(body, len(residuals), given)
    wanted = [i for i, n in zip(linear, back.outputs, strict=True) if n is not None]
    results = iter(
        emit_map(
            b,
            _without_none(back),
            [*(operands[i] for i in residuals), *(cts[j] for j in given)],
            [*kinds, *(outs[j] == "stack" for j in given)],
            ["stack" if mapped[i] else "sum" for i in wanted],
            kwargs["length"],
            kwargs["randomness"],
        )
    )
    return [next(results) if i in wanted else None for i in linear]


def _linear_last(body: Graph, operands) -> tuple[Graph, list[int], list[int]]:
    """The body with its linear inputs behind the others, and the positions of both."""
    linear = [i for i, x in enumerate(operands) if isinstance(x, Undefined)]
    others = [i for i in range(len(operands)) if i not in linear]
    return extract([body.inputs[i] for i in others + linear], list(body.outputs)), others, linear


def transposed(body: Graph, residuals: int, given: list[int]) -> Graph:
    """The graph residuals + cotangents of the `given` outputs -> cotangents of the linear inputs (None where zero)."""
    b = Builder(SIMPLIFY)
    values = [b.input(n.meta["val"], n.name) for n in body.inputs[:residuals]]
    cts: list[Value | None] = [None] * len(body.outputs)
    for j in given:
        cts[j] = b.input(body.outputs[j].meta["val"], "ct_" + body.outputs[j].name)
    return b.finish(reverse.transpose(b, body, values, cts))


def _without_none(graph: Graph) -> Graph:
    return extract(list(graph.inputs), [n for n in graph.outputs if n is not None])


# ----- scan -----------------------------------------------------------------------------------------------------------


def _carry_fixpoint(body: Graph, n_consts: int, n_carry: int, nonzero: list[bool], flow) -> list[bool]:
    """Grow the nonzero carries until the body adds none: a carry may become nonzero in a later step."""
    nonzero = list(nonzero)
    while True:
        out = flow(tuple(nonzero))[:n_carry]
        grown = [a or z for a, z in zip(nonzero[n_consts : n_consts + n_carry], out, strict=True)]
        if grown == nonzero[n_consts : n_consts + n_carry]:
            return nonzero
        nonzero[n_consts : n_consts + n_carry] = grown


def _scan_jvp(jvp: Jvp, args, kwargs):
    body, consts, carry, xs = args
    duals = [*consts, *carry, *xs]
    nc, nk = len(consts), len(carry)
    start = [d.t is not None for d in duals]
    if not jvp.split:
        return _scan_fused(jvp, body, duals, nc, nk, start, kwargs)
    nonzero = _carry_fixpoint(
        body, nc, nk, start, lambda z: linearize(body, z, reverse=jvp.reverse).nonzero_out
    )
    cut = linearize(body, tuple(nonzero), reverse=jvp.reverse)
    cut = _with_carry_tangents(cut, nonzero[nc : nc + nk], nc, nk)
    primals = [d.p for d in duals]
    parts = primals[:nc], primals[nc : nc + nk], primals[nc + nk :]
    results = emit_scan(jvp.b, cut.primal, *parts, **kwargs)
    tangents = [(instantiate(d.t, d.p), i) for i, (d, z) in enumerate(zip(duals, nonzero, strict=True)) if z]
    values = [*results[cut.count :], *(t for t, _ in tangents)]
    part = [2] * cut.residuals + [0 if i < nc else 1 if i < nc + nk else 2 for _, i in tangents]
    linear, groups = _grouped(cut.linear, values, part)
    return _zip(results[: cut.count], emit_scan(jvp.b, linear, *groups, **kwargs), cut.nonzero_out)


def _grouped(body: Graph, values, part: list[int]) -> tuple[Graph, list[list]]:
    """A scan's body with its inputs reordered as constants (0), carry (1) and xs (2), and the values in these groups."""
    order = sorted(range(len(values)), key=part.__getitem__)
    groups = [[values[i] for i in order if part[i] == p] for p in range(3)]
    return extract([body.inputs[i] for i in order], list(body.outputs), body.draws), groups


def _with_carry_tangents(cut, nonzero_carry, nc, nk):
    """A carry that enters with a tangent leaves with one, zeros if need be."""
    if all(o or not z for o, z in zip(cut.nonzero_out, nonzero_carry, strict=False)):
        return cut
    b = Builder(SIMPLIFY)
    values = [b.input(n.meta["val"], n.name) for n in cut.linear.inputs]
    given = iter(b.inline(cut.linear, values))
    outs, flags = [], []
    for j, (o, node) in enumerate(zip(cut.nonzero_out, cut.primal.outputs[: cut.count], strict=True)):
        need = o or (j < nk and nonzero_carry[j])
        flags.append(need)
        if need:
            outs.append(next(given) if o else b.full(node.meta["val"], 0))
    return dataclasses.replace(cut, linear=b.finish(outs), nonzero_out=tuple(flags))


def _scan_fused(jvp: Jvp, body, duals, nc, nk, start, kwargs):
    nonzero = _carry_fixpoint(
        body, nc, nk, start, lambda z: differentiate(body, z, reverse_mode=jvp.reverse)[1]
    )
    both, flags = differentiate(body, tuple(nonzero), reverse_mode=jvp.reverse)
    count = len(body.outputs)
    b = Builder(SIMPLIFY)
    ins = [b.input(n.meta["val"], n.name) for n in both.inputs]
    outs = b.inline(both, ins)
    t_values = dict(zip([j for j, z in enumerate(flags) if z], outs[count:], strict=True))
    carry_t = [j for j in range(nk) if nonzero[nc + j]]
    ys_t = [j for j in range(nk, count) if flags[j]]
    t_carry = [t_values[j] if j in t_values else b.full(body.outputs[j].meta["val"], 0) for j in carry_t]
    full = b.finish(outs[:nk] + t_carry + outs[nk:count] + [t_values[j] for j in ys_t])
    with_t = [i for i, z in enumerate(nonzero) if z]
    values = [d.p for d in duals] + [instantiate(duals[i].t, duals[i].p) for i in with_t]
    part = [0 if i < nc else 1 if i < nc + nk else 2 for i in [*range(len(duals)), *with_t]]
    ordered, groups = _grouped(full, values, part)
    results = emit_scan(jvp.b, ordered, *groups, **kwargs)
    t_results = dict(zip(carry_t, results[nk:], strict=False))
    ys = results[nk + len(carry_t) :]
    t_results |= dict(zip(ys_t, ys[count - nk :], strict=True))
    return tuple(Dual(o, t_results.get(j)) for j, o in enumerate(results[:nk] + ys[: count - nk]))


def _scan_transpose(b: Builder, cts, args, kwargs):
    """The scan backward: cotangents of constants are accumulated in the carry, those of xs are the new ys."""
    body, consts, carry, xs = args
    c_lin, x_lin = ([x for x in part if isinstance(x, Undefined)] for part in (consts, xs))
    c_res, x_res = ([x for x in part if not isinstance(x, Undefined)] for part in (consts, xs))
    first, nk = len(c_lin), len(carry)
    given = [j for j in range(nk, len(cts)) if cts[j] is not None]

    t = Builder(SIMPLIFY)
    inner, residuals = _carry_linear(body, args[1:])
    res = [t.input(n.meta["val"], n.name) for n in residuals]
    acc = [t.input(x.val, "acc") for x in c_lin]
    inner_cts: list[Value | None] = [t.input(x.val, "ct") for x in carry] + [None] * (len(cts) - nk)
    for j in given:
        inner_cts[j] = t.input(body.outputs[j].meta["val"], "ct_y")
    shares = reverse.transpose(t, inner, res, inner_cts)
    vals = [x.val for x in carry] + [Val(x.shape[1:], x.dtype, x.val.device) for x in x_lin]
    rest = [s if s is not None else t.full(v, 0) for s, v in zip(shares[first:], vals, strict=True)]
    graph = t.finish([forward.add(a, s) for a, s in zip(acc, shares[:first], strict=True)] + rest)

    start = [b.full(x.val, 0) for x in c_lin] + [
        ct if ct is not None else b.full(x.val, 0) for ct, x in zip(cts[:nk], carry, strict=True)
    ]
    values = [*c_res, *x_res, *start, *(cts[j] for j in given)]
    part = [0] * len(c_res) + [2] * len(x_res) + [1] * len(start) + [2] * len(given)
    graph, groups = _grouped(graph, values, part)
    results = emit_scan(b, graph, *groups, length=kwargs["length"], reverse=not kwargs["reverse"])
    to_carry = zip(results[first : first + nk], carry, strict=True)
    return [
        *results[:first],
        *(r for r, x in to_carry if isinstance(x, Undefined)),
        *results[first + nk :],
    ]


def _carry_linear(body: Graph, parts) -> tuple[Graph, list]:
    """A linear scan's body with its residuals first, and these. A carry is linear also where it starts as a constant zero."""
    nc, nk = len(parts[0]), len(parts[1])
    linear = [
        isinstance(x, Undefined) or nc <= i < nc + nk for i, x in enumerate(x for p in parts for x in p)
    ]
    order = sorted(range(len(linear)), key=linear.__getitem__)
    residuals = [n for n, z in zip(body.inputs, linear, strict=True) if not z]
    return extract([body.inputs[i] for i in order], list(body.outputs)), residuals


# ----- cond -----------------------------------------------------------------------------------------------------------


def _cond_jvp(jvp: Jvp, args, kwargs):
    true, false, pred, operands = args
    nonzero = tuple(d.t is not None for d in operands)
    primals, tangents = [d.p for d in operands], [d.t for d in operands if d.t is not None]
    count, vals = len(true.outputs), true.out_vals
    if jvp.split:
        cuts = [linearize(g, nonzero, reverse=jvp.reverse) for g in (true, false)]
        flags = [a or b for a, b in zip(*(cut.nonzero_out for cut in cuts), strict=True)]
        slots, places = _slots(cuts)
        firsts = [_primal_branch(cut, at, slots) for cut, at in zip(cuts, places, strict=True)]
        results = emit_cond(jvp.b, *firsts, pred.p, primals)
        held = [*results[count:], *primals]
        thens = [_linear_branch(cut, at, held, tangents, flags) for cut, at in zip(cuts, places, strict=True)]
        out_tangents = emit_cond(jvp.b, *thens, pred.p, [*held, *tangents])
        return _zip(results[:count], out_tangents, flags)
    both = [differentiate(g, nonzero, reverse_mode=jvp.reverse) for g in (true, false)]
    flags = [a or b for a, b in zip(*(own for _, own in both), strict=True)]
    bodies = [_padded(g, count, own, flags, vals) for g, own in both]
    results = emit_cond(jvp.b, *bodies, pred.p, [*primals, *tangents])
    return _zip(results[:count], results[count:], flags)


def _padded(graph: Graph, first: int, own, wanted, vals) -> Graph:
    """A branch with an output, from `first` on, for each wanted val: zeros where it has none of its `own`."""
    b = Builder(SIMPLIFY)
    outs = b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs])
    return b.finish(outs[:first] + _with_zeros_for(b, outs[first:], own, wanted, vals))


def _with_zeros_for(b: Builder, outs, own, wanted, vals) -> list[Value]:
    given = iter(outs)
    return [next(given) if o else b.full(v, 0) for o, w, v in zip(own, wanted, vals, strict=True) if w]


def _slots(cuts: list[Linearized]) -> tuple[list[Val], list[list[int]]]:
    """What holds the residuals of the branch taken, and where each branch has its own: a slot, or operand i (as -1 - i)."""
    slots: list[Val] = []
    places: list[list[int]] = []
    for cut in cuts:
        free = list(range(len(slots)))
        places.append([])
        for n in cut.primal.outputs[cut.count :]:
            if n in cut.primal.inputs:
                places[-1].append(-1 - cut.primal.inputs.index(n))
                continue
            k = next((k for k in free if slots[k] == n.meta["val"]), len(slots))
            if k == len(slots):
                slots.append(n.meta["val"])
            else:
                free.remove(k)
            places[-1].append(k)
    return slots, places


def _primal_branch(cut: Linearized, places: list[int], slots: list[Val]) -> Graph:
    """A branch that fills the slots, with zeros those that only the other one needs."""
    b = Builder(SIMPLIFY)
    outs = b.inline(cut.primal, [b.input(n.meta["val"], n.name) for n in cut.primal.inputs])
    at = dict(zip(places, outs[cut.count :], strict=True))
    return b.finish(outs[: cut.count] + [at[k] if k in at else b.full(v, 0) for k, v in enumerate(slots)])


def _linear_branch(cut: Linearized, places: list[int], held, tangents, wanted) -> Graph:
    """slots + operands + tangents -> the wanted tangents of the outputs."""
    b = Builder(SIMPLIFY)
    known = [b.input(x.val, "saved") for x in held]
    slots = len(known) - len(cut.primal.inputs)
    ts = [b.input(t.val, "t") for t in tangents]
    outs = b.inline(cut.linear, [known[k] if k >= 0 else known[slots - 1 - k] for k in places] + ts)
    vals = cut.primal.out_vals[: cut.count]
    return b.finish(_with_zeros_for(b, outs, cut.nonzero_out, wanted, vals))


def _cond_transpose(b: Builder, cts, args, kwargs):
    """A cond of the transposed branches."""
    true, false, pred, operands = args
    given = [j for j, ct in enumerate(cts) if ct is not None]
    parts = [_linear_last(g, operands) for g in (true, false)]
    _, residuals, linear = parts[0]
    backs = [transposed(g, len(residuals), given) for g, _, _ in parts]
    own = [[n is not None for n in back.outputs] for back in backs]
    wanted = [x or y for x, y in zip(*own, strict=True)]
    vals = [operands[i].val for i in linear]
    bodies = [_padded(_without_none(g), 0, o, wanted, vals) for g, o in zip(backs, own, strict=True)]
    results = iter(emit_cond(b, *bodies, pred, [*(operands[i] for i in residuals), *(cts[j] for j in given)]))
    return [next(results) if w else None for w in wanted]


# ----- custom and linear_call -----------------------------------------------------------------------------------------


def _linear_call_jvp(jvp: Jvp, args, kwargs):
    """linear_call of the operands' tangents, plus the derivative of the body in its residuals."""
    body, transposed, residuals, operands = args
    primals = [d.p for d in residuals], [d.p for d in operands]
    outs = jvp.b.emit(linear_call, (body, transposed, *map(tuple, primals)), kwargs)
    tangents: list[Value | None] = [None] * len(outs)
    if any(d.t for d in operands):
        ts = tuple(instantiate(d.t, d.p) for d in operands)
        tangents = list(jvp.b.emit(linear_call, (body, transposed, tuple(primals[0]), ts), kwargs))
    if any(d.t for d in residuals):
        ts = [d.t for d in residuals] + [None] * len(operands)
        shares = jvp.graph(_known(body, kwargs, jvp.b, "jvp"), primals[0] + primals[1], ts)[1]
        tangents = [forward.add(t, s) for t, s in zip(tangents, shares, strict=True)]
    return tuple(Dual(o, t) for o, t in zip(outs, tangents, strict=True))


def _linear_call_transpose(b: Builder, cts, args, kwargs):
    """The cotangents of its linear operands; others are tangents known to be zero."""
    body, transposed, residuals, operands = args
    cts = [ct if ct is not None else b.full(v, 0) for ct, v in zip(cts, kwargs["vals"], strict=True)]
    shares = b.inline(_known(transposed, kwargs, b, "transpose"), [*residuals, *cts])
    return [s for s, x in zip(shares, operands, strict=True) if isinstance(x, Undefined)]


def _known(graph: Graph | None, kwargs, b: Builder, rule: str) -> Graph:
    if graph is None:
        raise MissingRule(op=kwargs["name"], rule=rule, source=b.source)
    return graph


def _custom_jvp(jvp: Jvp, args, kwargs):
    """A linear_call over what the call saved, with the user's backward as its transpose."""
    body, backward, push, operands = args
    y = jvp.b.emit(custom, (body, backward, push, tuple(d.p for d in operands)), kwargs)
    given = [k for k, i in enumerate(kwargs["wrt"]) if operands[i].t is not None]
    outs = [Dual(v) for v in y[: kwargs["count"]]]
    if given and kwargs["outs"]:
        pull, push = _restricted(body, backward, push, kwargs, given)
        tangents = tuple(operands[kwargs["wrt"][k]].t for k in given)
        vals = tuple(y[i].val for i in kwargs["outs"])
        ts = jvp.b.emit(
            linear_call, (push, pull, tuple(y[len(outs) :]), tangents), {"vals": vals, "name": kwargs["name"]}
        )
        for i, t in zip(kwargs["outs"], ts, strict=True):
            outs[i] = Dual(y[i], t)
    return (*outs, *_residuals(jvp, body, kwargs["origins"], operands, outs, y[len(outs) :]))


def _restricted(body: Graph, backward: Graph | None, push: Graph | None, kwargs, given):
    """(pullback, pushforward) for the `given` ones among the differentiable operands; None where there is none."""
    residuals = [n.meta["val"] for n in body.outputs[kwargs["count"] :]]
    ins = [body.inputs[i].meta["val"] for i in kwargs["wrt"]]
    pull = backward and _with_zeros(
        backward, residuals, [body.outputs[i].meta["val"] for i in kwargs["outs"]], ins, given
    )
    if push is None:
        return pull, pull and _linear_transpose(pull, len(residuals))
    b = Builder(SIMPLIFY)
    values = [b.input(v, "saved") for v in residuals]
    ts = [b.input(v, "t") if k in given else b.full(v, 0) for k, v in enumerate(ins)]
    return pull or None, b.finish(b.inline(push, values + ts))


def _with_zeros(backward: Graph, residuals, cts, ins, given) -> Graph:
    """The backward for the given operands, in their dtypes and shapes; what it leaves out is zero."""
    b = Builder(SIMPLIFY)
    shares = b.inline(backward, [b.input(v, "saved") for v in residuals] + [b.input(v, "ct") for v in cts])
    return b.finish(
        [b.full(ins[k], 0) if shares[k] is None else reverse.fit(shares[k], ins[k]) for k in given]
    )


def _linear_transpose(pull: Graph, residuals: int) -> Graph | None:
    """The pushforward that a pullback implies, if it is linear and its ops have transposes."""
    try:
        push = transposed(pull, residuals, list(range(len(pull.outputs))))
    except MissingRule:
        return None
    b = Builder(SIMPLIFY)
    outs = b.inline(push, [b.input(n.meta["val"], n.name) for n in push.inputs])
    zeros = [n.meta["val"] for n in pull.inputs[residuals:]]
    return b.finish([b.full(v, 0) if o is None else o for o, v in zip(outs, zeros, strict=True)])


def _residuals(jvp: Jvp, body: Graph, origins, operands, outs, saved):
    """What a call saved, with tangents: an operand's, an output's, or else that of the computation."""
    place = {n: i for i, n in enumerate(body.inputs)}
    nodes = body.outputs[len(outs) :]
    origins = [place.get(n) if o is None else o for n, o in zip(nodes, origins, strict=True)]
    computed = [None] * len(nodes)
    differ = [k for k, o in enumerate(origins) if o is None and nodes[k].target is not stop_gradient]
    if differ:
        part = extract(body.inputs, [nodes[k] for k in differ])
        _, ts = jvp.graph(part, [d.p for d in operands], [d.t for d in operands])
        computed = [ts[differ.index(k)] if k in differ else None for k in range(len(nodes))]
    known = [*operands, *reversed(outs)]  # as -1 - j counts
    return [Dual(v, t if o is None else known[o].t) for v, o, t in zip(saved, origins, computed, strict=True)]


def _custom_transpose(b: Builder, cts, args, kwargs):
    raise MissingRule(op=kwargs["name"], rule="transpose", source=b.source)


forward.SPECIAL.update(
    {
        map_: _map_jvp,
        scan: _scan_jvp,
        cond: _cond_jvp,
        linear_call: _linear_call_jvp,
        custom: _custom_jvp,
    }
)
reverse.SPECIAL.update(
    {
        map_: _map_transpose,
        scan: _scan_transpose,
        cond: _cond_transpose,
        linear_call: _linear_call_transpose,
        custom: _custom_transpose,
    }
)
__all__ = ["differentiate", "transposed"]
