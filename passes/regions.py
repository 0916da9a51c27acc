"""Making region nodes in normal form. Entry points: `emit_map`, `emit_chunks`, `emit_scan` and `emit_cond`.

Whatever in a body depends on no mapped (or looped) input is computed outside, and an operand that repeats one value along
the axis is not mapped. So every value inside a map depends on the mapped axis: a residual of a map is always stacked for a
reason, and cotangents of invariants are never broadcast.
"""

from __future__ import annotations

from torch.fx import Node

from . import errors
from .dims import Size
from .graph import (
    Graph,
    Val,
    cond,
    cone,
    constant,
    extract,
    getitem,
    is_random,
    map_,
    reached,
    scan,
    substitute,
)
from .record import Builder, Value, aten
from .simplify import SIMPLIFY, made_by, number


def emit_map(
    b: Builder, body: Graph, operands, mapped, outs, length: Size, randomness: str = "error"
) -> list[Value]:
    """The results of mapping a body, in order; `outs` says of each output "stack", "sum" or "once" (invariant, as it is)."""
    if randomness == "same":
        body, operands, mapped = _draw_once(b, body, operands, mapped)
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


def emit_chunks(
    b: Builder, body: Graph, operands, mapped, outs, length: Size, randomness: str, chunk: int | None
) -> list[Value]:
    """As emit_map without "sum", but `chunk` examples at a time: a scan whose steps are maps, and a map of the rest."""
    if chunk is None or isinstance(length, int) and length <= chunk:
        return emit_map(b, body, operands, mapped, outs, length, randomness)
    if not isinstance(length, int):
        raise errors.NotSupported(
            what=f"chunk_size for an axis of symbolic size {length}", instead="Give that axis a fixed size."
        )
    if randomness == "same":
        body, operands, mapped = _draw_once(b, body, operands, mapped)
    stacked = [k for k, kind in enumerate(outs) if kind == "stack"]
    each = extract(list(body.inputs), [body.outputs[k] for k in stacked], body.draws)
    found = dict(zip(stacked, _chunked(b, each, operands, mapped, length, randomness, chunk), strict=True))
    once = [k for k in range(len(outs)) if k not in found]
    rest = extract(list(body.inputs), [body.outputs[k] for k in once])
    found |= zip(once, emit_map(b, rest, operands, mapped, ["once"] * len(once), length), strict=True)
    return [found[k] for k in range(len(outs))]


def _chunked(b: Builder, body: Graph, operands, mapped, length: int, randomness: str, chunk: int):
    kinds, steps = ["stack"] * len(body.outputs), length // chunk
    whole = steps * chunk
    inner = Builder(SIMPLIFY)
    shapes = [
        x.val if not m else Val((chunk, *x.shape[1:]), x.dtype, x.device)
        for x, m in zip(operands, mapped, strict=True)
    ]
    order = sorted(
        range(len(operands)), key=lambda i: mapped[i]
    )  # what is the same in every step comes first
    bound = {i: inner.input(shapes[i], body.inputs[i].name) for i in order}
    inputs = [bound[i] for i in range(len(operands))]
    step = inner.finish(emit_map(inner, body, inputs, mapped, kinds, chunk, randomness))
    consts = [operands[i] for i in order if not mapped[i]]
    xs = [
        _part(operands[i], 0, whole).reshape([steps, chunk, *operands[i].shape[1:]])
        for i in order
        if mapped[i]
    ]
    found = [y.reshape([whole, *y.shape[2:]]) for y in emit_scan(b, step, consts, [], xs, steps)]
    if whole == length:
        return found
    tail = [_part(x, whole, length) if m else x for x, m in zip(operands, mapped, strict=True)]
    ends = emit_map(b, body, tail, mapped, kinds, length - whole, randomness)
    return [b.emit(aten.cat.default, ([y, end], 0)) for y, end in zip(found, ends, strict=True)]


def _part(x: Value, start: int, end: int) -> Value:
    return x.call(aten.slice.Tensor, 0, start, end)


def _draw_once(b: Builder, body: Graph, operands, mapped) -> tuple[Graph, list[Value], list[bool]]:
    """A body whose draws are inputs that are not mapped, and its operands: each number is drawn here, once for all examples."""
    env = dict(zip(body.inputs, operands, strict=True))
    varying = {n for n, m in zip(body.inputs, mapped, strict=True) if m}
    drawn = []
    for n in body.nodes:
        whole = n.args[0] if n.target is getitem else n
        if is_random(whole) and isinstance(n.meta["val"], Val):
            drawn.append(n)
        if not any(m in varying for m in n.all_input_nodes):
            b.run([n], env)
        elif is_random(n):
            env[n] = _drawn_for_all(b, n, varying, env)
        else:
            varying.add(n)
    values = [*operands, *(env[n] for n in drawn)]
    return extract([*body.inputs, *drawn], list(body.outputs)), values, [*mapped, *[False] * len(drawn)]


def _drawn_for_all(b: Builder, draw: Node, varying, env) -> Value:
    """A draw that needs of a mapped tensor no more than its shape."""
    like, *rest = draw.args
    if draw.target not in OF_SHAPE or any(m in varying for m in draw.all_input_nodes if m is not like):
        raise errors.RandomInVmap(
            op=draw.target,
            randomness="same",
            why=": what it draws from differs by example",
            source=draw.meta.get("source"),
        )
    with b.at(draw):
        return b.emit(
            draw.target, (b.full(like.meta["val"], 0), *substitute(rest, env.__getitem__)), dict(draw.kwargs)
        )


# Draws that need the shape and dtype of their first argument alone.
OF_SHAPE = {
    op
    for packet in (
        aten.rand_like,
        aten.randn_like,
        aten.randint_like,
        aten.normal_functional,
        aten.uniform,
        aten.random,
        aten.exponential,
        aten.cauchy,
        aten.geometric,
        aten.log_normal,
    )
    for op in (getattr(packet, name) for name in packet.overloads())
    if not op._schema.is_mutable
} | {aten.bernoulli.p}


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


def emit_cond(b: Builder, true: Graph, false: Graph, pred: Value, operands) -> list[Value]:
    """The results of one of two bodies without draws. One that both have alike, an operand or a constant, is made outside."""
    taken = _truth(pred)
    if taken is not None or true == false:
        return b.inline(false if taken is False else true, list(operands))
    wanted = list(zip(true.outputs, false.outputs, strict=True))
    given = {pair: _alike(b, (true, false), pair, operands) for pair in wanted}
    inside = [pair for pair, value in given.items() if value is None]
    if inside:
        outs = [list(side) for side in zip(*inside, strict=True)]
        sides = list(zip((true, false), outs, strict=True))
        used = [i for i in range(len(operands)) if any(g.inputs[i] in reads(g, o) for g, o in sides)]
        bodies = [extract([g.inputs[i] for i in used], o) for g, o in sides]
        values = b.emit(cond, (*bodies, pred, tuple(operands[i] for i in used)))
        given |= zip(inside, values, strict=True)
    return [given[pair] for pair in wanted]


def _truth(pred: Value) -> bool | None:
    """What a predicate is known to be."""
    if made := made_by(pred, constant):
        return bool(made[0].tensor)
    return None if (n := number(pred)) is None else bool(n)


def _alike(b: Builder, bodies, pair, operands) -> Value | None:
    """The value of a result that is the same operand, or the same constant, in both bodies."""
    places = [g.inputs.index(n) if n in g.inputs else None for g, n in zip(bodies, pair, strict=True)]
    if places[0] is not None or places[1] is not None:
        return operands[places[0]] if places[0] == places[1] else None
    if any(reads(g, [n]).intersection(g.inputs) for g, n in zip(bodies, pair, strict=True)):
        return None
    true, false = (extract([], [n]) for n in pair)
    return b.inline(true, [])[0] if true == false else None


def reads(body: Graph, outputs) -> set[Node]:
    """What these outputs of a body, and the calls behind them, read."""
    return {m for n in cone(outputs, set(body.inputs)) for m in n.all_input_nodes} | set(outputs)


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
