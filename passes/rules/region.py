"""Derivatives of regions: each rule gives regions again, their bodies differentiated. Those of `scan` are in loop.py."""

from __future__ import annotations

from .. import jvp as forward
from .. import transpose as reverse
from ..errors import MissingRule
from ..graph import Graph, Val, cond, custom, extract, linear_call, map_, stop_gradient
from ..jvp import Dual, Jvp, instantiate
from ..linearize import Linearized, linearize
from ..record import Builder, Value
from ..regions import emit_cond, emit_map
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


def paired(outs, tangents, nonzero):
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
    return paired(results[: cut.count], out_tangents, cut.nonzero_out)


def _map_transpose(b: Builder, cts, args, kwargs):
    """A map again: cotangents of stacked outputs are mapped, of sums not; cotangents of unmapped inputs are summed."""
    body, operands = args
    mapped, outs = kwargs["mapped"], kwargs["outs"]
    body, residuals, linear = linear_last(body, operands)
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


def linear_last(body: Graph, operands) -> tuple[Graph, list[int], list[int]]:
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
        return paired(results[:count], out_tangents, flags)
    both = [differentiate(g, nonzero, reverse_mode=jvp.reverse) for g in (true, false)]
    flags = [a or b for a, b in zip(*(own for _, own in both), strict=True)]
    bodies = [_padded(g, count, own, flags, vals) for g, own in both]
    results = emit_cond(jvp.b, *bodies, pred.p, [*primals, *tangents])
    return paired(results[:count], results[count:], flags)


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
    parts = [linear_last(g, operands) for g in (true, false)]
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
        cond: _cond_jvp,
        linear_call: _linear_call_jvp,
        custom: _custom_jvp,
    }
)
reverse.SPECIAL.update(
    {
        map_: _map_transpose,
        cond: _cond_transpose,
        linear_call: _linear_call_transpose,
        custom: _custom_transpose,
    }
)
__all__ = ["differentiate", "transposed"]
