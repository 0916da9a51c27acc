"""Making region nodes in normal form. Entry points: `emit_map` and `emit_scan`.

Whatever in a body depends on no mapped (or looped) input is computed outside, and an operand that repeats one value along
the axis is not mapped. So every value inside a map depends on the mapped axis: a residual of a map is always stacked for a
reason, and cotangents of invariants are never broadcast.
"""

from __future__ import annotations

from torch.fx import Node

from . import errors
from .dims import Size
from .graph import Graph, cone, extract, map_, reached, scan
from .record import Builder, Value, aten
from .simplify import made_by, number


def emit_map(
    b: Builder, body: Graph, operands, mapped, outs, length: Size, randomness: str = "error"
) -> list[Value]:
    """The results of mapping a body, in order."""
    operands, starts = _differing(body.inputs, operands, mapped)
    varying = _varying(body, starts)
    given = dict(zip(body.inputs, operands, strict=True)) | _invariants(b, body, operands, varying)
    if any(n in varying and kind == "once" for n, kind in zip(body.outputs, outs, strict=True)):
        raise errors.BadOutDims(what="out_dims is None for an output that depends on a mapped input")
    wanted = list(zip(body.outputs, outs, strict=True))
    inside = _distinct(w for w in wanted if w[0] in varying and not (w[0] in starts and w[1] == "stack"))
    values = {}
    if inside or body.draws:
        inner, inputs = _inner(body, varying, starts, [n for n, _ in inside])
        flags = tuple(n in varying for n in inputs)
        values = b.emit(
            map_,
            (inner, tuple(given[n] for n in inputs)),
            {
                "length": length,
                "mapped": flags,
                "outs": tuple(kind for _, kind in inside),
                "randomness": randomness,
            },
        )
        values = dict(zip(inside, values, strict=True))
    return [
        values[n, kind]
        if (n, kind) in values
        else given[n]
        if n in starts
        else _repeated(given[n], kind, length)
        for n, kind in wanted
    ]


def _differing(inputs, operands, mapped) -> tuple[list[Value], list[Node]]:
    """The operands, one value in place of each that repeats it, and the inputs whose operands are still mapped."""
    repeated = [_repeats(x) if m else None for x, m in zip(operands, mapped, strict=True)]
    starts = [n for n, m, r in zip(inputs, mapped, repeated, strict=True) if m and r is None]
    return [x if r is None else r for x, r in zip(operands, repeated, strict=True)], starts


def _repeats(x: Value) -> Value | None:
    """What a value repeats along axis 0, if it is known to."""
    if (n := number(x)) is not None:
        return x.full(x.shape[1:], n)
    made = made_by(x, aten.expand.default)
    if made and made[0].ndim < x.ndim:
        return made[0].expand(x.shape[1:])
    if made and made[0].shape[0] == 1:
        return made[0].reshape(made[0].shape[1:]).expand(x.shape[1:])
    return None


def _repeated(value: Value, kind: str, length: Size) -> Value:
    """An invariant output of a map: itself, stacked, or summed over the axis."""
    if kind == "once":
        return value
    return value.expand([length, *value.shape]) if kind == "stack" else value.call(aten.mul.Tensor, length)


def emit_scan(b: Builder, body: Graph, consts, carry, xs, length: Size, reverse: bool = False) -> list[Value]:
    """The results of a scan: carry, then stacked ys."""
    n, m = len(consts), len(carry)
    xs, steps = _differing(body.inputs[n + m :], xs, [True] * len(xs))
    varying = _varying(body, [*body.inputs[n : n + m], *steps])
    operands = [*consts, *carry, *xs]
    given = dict(zip(body.inputs, operands, strict=True)) | _invariants(b, body, operands, varying)
    ys = _distinct(y for y in body.outputs[m:] if y in varying and y not in steps)
    inner, inputs = _inner(body, varying, steps, [*body.outputs[:m], *ys], always=body.inputs[n : n + m])
    split = [
        [given[i] for i in inputs if i not in varying],
        carry,
        [given[i] for i in inputs if i in steps],
    ]
    results = b.emit(scan, (inner, *map(tuple, split)), {"length": length, "reverse": reverse})
    stacked = dict(zip(ys, results[m:], strict=True)) | {x: given[x] for x in steps}
    return [
        *results[:m],
        *(stacked[y] if y in stacked else _repeated(given[y], "stack", length) for y in body.outputs[m:]),
    ]


def _distinct(xs) -> list:
    return list(dict.fromkeys(xs))


def _varying(body: Graph, starts) -> set[Node]:
    """What differs from one step or example to another: all that depends on the starts or on a draw."""
    return reached(body.nodes, [*starts, *body.draws])


def _invariants(b: Builder, body: Graph, operands, varying) -> dict[Node, Value]:
    """Emit what does not vary; the values by node."""
    env = dict(zip(body.inputs, operands, strict=True))
    calls = [n for n in body.nodes if n not in varying]
    b.run(calls, env)
    return {n: env[n] for n in [*body.inputs, *calls] if n not in varying}


def _inner(body: Graph, varying, starts, outputs, always=()) -> tuple[Graph, list[Node]]:
    """The varying part of a body and the nodes its inputs stand for: invariants, `always`, then the used starts."""
    bound = {n for n in [*body.inputs, *body.nodes] if n not in varying} | set(body.inputs)
    copied = cone([*outputs, *body.draws], bound)
    used = {m for n in copied for m in n.all_input_nodes} | set(outputs)
    frontier = [n for n in [*body.inputs, *body.nodes] if n in used and n not in varying]
    inputs = [*frontier, *always, *(n for n in starts if n in used)]
    return extract(inputs, outputs, body.draws), inputs
