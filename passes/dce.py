"""Dropping what nobody reads: dead calls, and outputs, operands and carries of regions. Entry point: `dce`."""

from __future__ import annotations

from torch.fx import Node

from .graph import Graph, cond, cone, extract, getitem, is_random, map_, scan
from .record import Builder
from .regions import emit_cond, emit_map, emit_scan, reads


def dce(graph: Graph) -> Graph:
    """The graph without dead code, inside regions too; draws of random numbers stay."""
    live = _live(graph)
    b = Builder(None)
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    for n in graph.nodes:
        if n not in live:
            continue
        if n.target in INSIDE and not is_random(n):
            with b.at(n):
                env[n] = INSIDE[n.target](b, n, env, live)
        else:
            b.run([n], env)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def _live(graph: Graph) -> set[Node]:
    return set(cone([*graph.outputs, *(n for n in graph.nodes if is_random(n))], set(graph.inputs)))


def _used(n: Node, live) -> list[int]:
    return sorted(m.args[1] for m in n.users if m.target is getitem and m in live)


def _map(b: Builder, n: Node, env, live) -> list:
    """The results of a map, None where unused."""
    (body, operands), used = n.args, _used(n, live)
    body = dce(extract(list(body.inputs), [body.outputs[i] for i in used]))
    outs = [n.kwargs["outs"][i] for i in used]
    values = emit_map(
        b,
        body,
        [env[x] for x in operands],
        n.kwargs["mapped"],
        outs,
        n.kwargs["length"],
        n.kwargs["randomness"],
    )
    results: list = [None] * len(n.meta["val"])
    for i, value in zip(used, values, strict=True):
        results[i] = value
    return results


def _scan(b: Builder, n: Node, env, live) -> list:
    """The results of a scan, None where unused; a carry lives if a live output or carry depends on it."""
    body, consts, carry, xs = n.args
    kept = _live_outputs(body, len(consts), len(carry), _used(n, live))
    k_carry, k_ys = [i for i in kept if i < len(carry)], [i for i in kept if i >= len(carry)]
    inputs = [
        *body.inputs[: len(consts)],
        *(body.inputs[len(consts) + i] for i in k_carry),
        *body.inputs[len(consts) + len(carry) :],
    ]
    inner = dce(extract(inputs, [body.outputs[i] for i in k_carry + k_ys]))
    values = emit_scan(
        b, inner, [env[x] for x in consts], [env[carry[i]] for i in k_carry], [env[x] for x in xs], **n.kwargs
    )
    results: list = [None] * len(n.meta["val"])
    for i, value in zip(k_carry + k_ys, values, strict=True):
        results[i] = value
    return results


def _live_outputs(body: Graph, n_consts: int, n_carry: int, used: list[int]) -> list[int]:
    carries = {n: i for i, n in enumerate(body.inputs[n_consts : n_consts + n_carry])}
    kept, before = set(used), None
    while kept != before:
        before = set(kept)
        read = reads(body, [body.outputs[i] for i in kept])
        kept |= {carries[m] for m in read if m in carries}
    return sorted(kept)


def _cond(b: Builder, n: Node, env, live) -> list:
    """The results of a cond, None where unused."""
    (true, false, pred, operands), used = n.args, _used(n, live)
    bodies = [dce(extract(list(g.inputs), [g.outputs[i] for i in used])) for g in (true, false)]
    results: list = [None] * len(n.meta["val"])
    for i, value in zip(used, emit_cond(b, *bodies, env[pred], [env[x] for x in operands]), strict=True):
        results[i] = value
    return results


INSIDE = {map_: _map, scan: _scan, cond: _cond}
