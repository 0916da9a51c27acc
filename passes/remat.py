"""Rematerialisation: which residuals of a linearized function are kept, and which computed again. Entry point: `rematerialize`.

Policies: "nothing" keeps the inputs alone, "dots" products too, a function what it says True of, and "min_cut" the values of
least bytes that the rest follows from at little cost. Under any of them draws of random numbers are kept, and choices (which
elements are equal or largest): made again in another kernel, they might not be the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch.fx import Node

from .dims import Dim, at, numel
from .flow import Network
from .graph import (
    Graph,
    Op,
    Val,
    barrier,
    cone,
    constant,
    extract,
    getitem,
    graft,
    is_random,
    reached,
    stop_gradient,
    stop_reverse,
    subgraphs,
    vals_of,
)
from .linearize import Linearized, owner
from .record import Builder, aten
from .simplify import SIMPLIFY

Policy = str | Callable[[Node], bool]
POLICIES = ("min_cut", "dots", "nothing")
_UNCUT = 1 << 62  # bytes that no graph has
_SIZE = 64  # what a symbolic size is taken for


def rematerialize(cut: Linearized, policy: Policy) -> Linearized:
    """The same function cut elsewhere: fewer residuals, from which the linear graph computes the others again."""
    needed = list(cut.primal.outputs[cut.count :])
    saved = kept(cut, policy)
    outputs = [*cut.primal.outputs[: cut.count], *saved]
    primal = extract(list(cut.primal.inputs), outputs, cut.primal.draws)
    return dataclasses.replace(cut, primal=primal, linear=_linear(cut, needed, saved))


def _linear(cut: Linearized, needed: list[Node], saved: list[Node]) -> Graph:
    """saved + tangents -> tangents. What is computed again starts from barriers: it would else be merged with the first time."""
    b = Builder(SIMPLIFY)
    given = {n: b.input(n.meta["val"], n.name) for n in saved}
    tangents = [b.input(n.meta["val"], n.name) for n in cut.linear.inputs[cut.residuals :]]
    again = cone(needed, given.keys())
    read = {m for n in again for m in n.all_input_nodes}
    env = {n: b.emit(barrier, (x,)) if n in read else x for n, x in given.items()}
    b.run(again, env)
    outs = b.inline(cut.linear, [given.get(n, env[n]) for n in needed] + tangents)
    return late(b.finish(outs), len(saved))


def late(graph: Graph, known: int) -> Graph:
    """The graph with what follows from its first `known` inputs alone computed just before it is needed."""
    given = reached(graph.nodes, [*graph.inputs[known:], *graph.draws])
    b = Builder(None)
    env = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    for n in [*(n for n in graph.nodes if n in given), *graph.outputs]:
        b.run(cone([n], env.keys()), env)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


# ----- what is kept ---------------------------------------------------------------------------------------------------


def kept(cut: Linearized, policy: Policy) -> list[Node]:
    """The values that a policy keeps of a function, inputs among them, in the order in which they are computed."""
    needed = list(cut.primal.outputs[cut.count :])
    fixed = set(compared(cut))
    if policy == "min_cut":
        return sorted(_least(needed, fixed))
    saveable = _SAVEABLE[policy] if isinstance(policy, str) else policy
    return sorted(_first(needed, fixed, lambda call: _holds(call, saveable)))


def _holds(call: Node, saveable: Callable[[Node], bool]) -> bool:
    """Whether a call may be saved: it itself, or one inside of a loop, whose steps are kept and not repeated then."""
    return saveable(call) or any(_holds(m, saveable) for body in subgraphs(call) for m in body.nodes)


_SAVEABLE: dict[str, Callable[[Node], bool]] = {
    "nothing": lambda call: False,
    "dots": lambda call: call.target in PRODUCTS,
}
PRODUCTS = {
    op
    for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.mv, aten.dot)
    for op in (getattr(packet, name) for name in packet.overloads())
}


def compared(cut: Linearized) -> Iterable[Node]:
    """Residuals that a region of the linear graph compares for equality with something."""
    place = dict(zip(cut.linear.inputs, cut.primal.outputs[cut.count :], strict=False))
    for n in cut.linear.nodes:
        if any(is_choice(m) for body in subgraphs(n) for m in body.nodes):
            yield from (place[m] for m in n.all_input_nodes if m in place)


def _first(needed: Iterable[Node], fixed: set[Node], saveable: Callable[[Node], bool]) -> set[Node]:
    """The first values on each way back from what is needed that may be saved, or must be."""
    found: set[Node] = set()
    seen, stack = set(), list(needed)
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if (
            n.op == "placeholder"
            or n in fixed
            or is_fixed(call_of(n))
            or _is_whole(n)
            and saveable(call_of(n))
        ):
            found.add(n)
        else:
            stack.extend(n.all_input_nodes)
    return found


def _least(needed: list[Node], fixed: set[Node]) -> set[Node]:
    """The values of least bytes that all that is needed follows from, at little cost; of several sets the latest.

    Each value is an edge, of as much capacity as it has bytes, from its being there in the first place to its being there in
    the end. The source is what only the first computation has, the sink what is needed.
    """
    nodes = cone(needed, ())
    source, sink = 2 * len(nodes), 2 * len(nodes) + 1
    network, number = Network(sink + 1), {n: 2 * i for i, n in enumerate(nodes)}
    once = fixed | joins(nodes)
    for n, i in number.items():
        network.edge(i, i + 1, nbytes(n.meta["val"]) if n in fixed else capacity(n))
        if n.op == "placeholder" or n in once or not is_cheap(call_of(n)):
            network.edge(source, i, _UNCUT)
        for m in n.all_input_nodes:
            network.edge(number[m] + 1, i, _UNCUT)
    for n in needed:
        network.edge(number[n] + 1, sink, _UNCUT)
    least, behind = network.least_cut(source, sink)
    assert least < _UNCUT, "a residual that can be neither kept nor computed again"
    return {n for n, i in number.items() if i + 1 in behind and i not in behind}


def joins(nodes: list[Node]) -> set[Node]:
    """Cheap calls that read another cheap one from before a costly call, and something from after it, as where a block adds
    its input to its result.

    Computed again they would keep all that leads to them, from one costly call to the next, while the backward passes these.
    """
    depth: dict[Node, int] = {}
    found: set[Node] = set()
    for n in nodes:
        light = _is_light(n)
        top = max((depth[m] for m in n.all_input_nodes), default=0)
        depth[n] = top + (n.op == "call_function" and n.target is not getitem and not light)
        behind = [m for m in map(owner, n.all_input_nodes) if 0 < depth[m] < top]
        if light and not is_view(n) and any(m not in found and _is_light(m) for m in behind):
            found.add(n)
    return found


def _is_light(n: Node) -> bool:
    return n.op == "call_function" and is_cheap(call_of(n))


def capacity(n: Node) -> int:
    """What it takes to keep a value: its bytes. Inputs are there anyway; a view keeps all that it views."""
    if n.op == "placeholder":
        return 0
    return nbytes(n.meta["val"]) if _is_whole(n) else _UNCUT


def nbytes(val: Val) -> int:
    """The bytes of a value, a symbolic size being taken for some number."""
    sizes = {name: _SIZE for s in val.shape if isinstance(s, Dim) for name in s.names()}
    return int(numel(at(s, sizes) for s in val.shape)) * val.dtype.itemsize


def _is_whole(n: Node) -> bool:
    """Whether a node is a tensor that is no view of another."""
    return isinstance(n.meta["val"], Val) and owner(n) is n and not (is_view(call_of(n)) and not _may_copy(n))


def _may_copy(n: Node) -> bool:
    return n.target in (aten.reshape.default, aten.view.default)


# ----- what a call costs ----------------------------------------------------------------------------------------------


def call_of(n: Node) -> Node:
    """The call that makes a value, one of several results perhaps."""
    return n.args[0] if n.target is getitem else n


def is_fixed(call: Node) -> bool:
    """Whether a call must not be repeated: it draws, or it chooses."""
    return call.op == "call_function" and (is_random(call) or is_choice(call))


def is_choice(call: Node) -> bool:
    """Whether a call says which floating point numbers are equal, or where one lies: == and !=, argmax, sort, max pooling."""
    if call.target is getitem or not any(v.differentiable for m in call.all_input_nodes for v in vals_of(m)):
        return False
    if call.target in _EQUALITY:
        return True
    return any(not v.differentiable and v.dtype is not torch.bool for v in vals_of(call))


_EQUALITY = {op for packet in (aten.eq, aten.ne) for op in (packet.Tensor, packet.Scalar)}


def is_view(call: Node) -> bool:
    """Whether a call gives what its argument holds, by its schema."""
    schema = getattr(call.target, "_schema", None)
    return bool(schema and schema.returns and schema.returns[0].alias_info) or call.target in _SAME


_SAME = {barrier, stop_gradient, stop_reverse, graft}


def is_cheap(call: Node) -> bool:
    """Whether repeating a call costs little beside keeping its result: no product, no loop, no result that is small."""
    if is_fixed(call):
        return False
    if is_view(call) or not call.all_input_nodes:
        return True
    if isinstance(call.target, Op):
        return call.target is constant
    before = max(nbytes(v) for m in call.all_input_nodes for v in vals_of(m))
    light = torch.Tag.pointwise in call.target.tags or call.target in _LIGHT
    return light and 4 * sum(map(nbytes, vals_of(call))) >= before


_LIGHT = {
    op
    for packet in (aten._to_copy, aten._softmax, aten._log_softmax, aten.native_layer_norm, aten.cat, aten.constant_pad_nd,
                   aten.flip, aten.roll, aten.tril, aten.triu, aten.stack, aten.index_select, aten.embedding)
    for op in (getattr(packet, name) for name in packet.overloads())
}  # fmt: skip
