"""Which part of a graph is C++. Entry point: `build`: the graph with a few `native` nodes, the rest ATen calls.

Maps of enough work whose bodies are all C++ stay loops over tasks; the others are batched. Scans stay loops. Then as many calls
as possible are one program. What is possible is decided here, what is worth it in cost.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fxfunc.passes.batch import lower as batched
from fxfunc.passes.dce import dce
from fxfunc.passes.decompose import tensors_in
from fxfunc.passes.dims import Dim
from fxfunc.passes.draws import draws_first
from fxfunc.passes.dump import saw, saw_source
from fxfunc.passes.ghost import ghost
from fxfunc.passes.graph import (
    Graph,
    Op,
    Val,
    barrier,
    constant,
    copied,
    extract,
    getitem,
    is_random,
    map_,
    scan,
)
from fxfunc.passes.merge import merge_maps
from fxfunc.passes.orient import orient
from fxfunc.passes.pipeline import for_aten, inside, simplify
from fxfunc.passes.record import Builder, Value
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.unstack import unstacked

from . import cost
from .cost import bytes_of, named
from .expand import expand
from .explain import Row, row
from .loops import native
from .lower import DTYPES, base, is_constant, is_free
from .memory import results
from .native import Native
from .prepare import affine, refusal
from .tasks import program as to_cpp

aten = torch.ops.aten
log = logging.getLogger("fxfunc")

FOLDED = 2**20  # bytes of a constant that is computed once


@dataclasses.dataclass
class Built:
    """A graph with `native` nodes, why maps were batched, and each call outside of the programs with why it is there."""

    graph: Graph
    programs: list[Native]
    notes: list[str]
    outside: list[Row]

    def compile(self, target: str) -> None:
        """Compile the programs for a target, or find them in the cache."""
        for p in self.programs:
            saw_source(p.name, p.source)
            p.compile(target)
        for note in (*self.notes, *(f"{r.op} ({r.name}) {r.place}: {r.why}" for r in self.outside)):
            log.info("cpp: %s", note)


def build(graph: Graph) -> Built:
    """The graph with all that can be C++ in `native` nodes; nothing is compiled yet.

    Of a graph with symbolic sizes that is nothing: the few calls that have none would not be worth spelling the others as C++
    has them.
    """
    if names := sorted({x for v in graph.in_vals for s in v.shape if isinstance(s, Dim) for x in s.names()}):
        return Built(graph, [], [f"all of it runs in ATen: symbolic sizes ({', '.join(names)})"], [])
    notes: list[str] = []
    graph = _opened(with_whole_maps(graph), notes)
    graph = saw("tasks", dce(_folded(graph)))
    return _Partition(graph, notes).built()


def with_whole_maps(graph: Graph) -> Graph:
    """The graph with neighbouring maps as one, none of which draws or makes stacks that are only reduced."""
    return merge_maps(unstacked(merge_maps(dce(draws_first(graph)))))


def _opened(graph: Graph, notes: list[str]) -> Graph:
    """The graph with each map as a loop over a flat body where that is possible and worth it, batched elsewhere."""
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        if op is scan:
            body = flat(args[0])
            if _why_no_loop(body, kwargs["length"]) is not None:
                body = flat(
                    args[0], inside=False
                )  # ATen's convolutions are better than what they are taken apart to
            return b.emit(op, (body, *args[1:]), kwargs)
        if op is not map_:
            return b.emit(op, args, kwargs)
        body = flat(args[0])
        why = _why_no_loop(body, kwargs["length"]) or cost.why_batched(
            body, kwargs["length"], kwargs["mapped"]
        )
        if why is None:
            return _in_blocks(b, body, args[1], kwargs)
        notes.append(f"a map of {kwargs['length']} is batched: {why}")
        return tuple(b.inline(_one_map(args, kwargs), list(args[1]), None))

    out = b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))
    whole = _simpler(
        dce(_lower_rest(out))
    )  # products with `eye` leave their loops, and go before it is taken apart
    return affine(oriented(_simpler(inside(ghost, _simpler(expand(whole))))))


def _in_blocks(b: Builder, body: Graph, operands: Sequence[Value], kwargs: dict) -> tuple[Value, ...]:
    """A map whose tasks are blocks of examples, batched: as many as make its calls worth their overhead."""
    length = kwargs["length"]
    block = cost.block(body, length)
    if block == 1:
        return b.emit(map_, (body, tuple(operands)), kwargs)
    inner, mapped, count = Builder(SIMPLIFY), kwargs["mapped"], length // block
    ins = [
        inner.input(Val((block, *v.shape), v.dtype, v.device) if m else v, n.name)
        for n, v, m in zip(body.inputs, body.in_vals, mapped, strict=True)
    ]
    outs = inner.emit(map_, (body, tuple(ins)), kwargs | {"length": block})
    xs = [x.reshape([count, block, *x.shape[1:]]) if m else x for x, m in zip(operands, mapped, strict=True)]
    given = b.emit(map_, (flat(inner.finish(list(outs))), tuple(xs)), kwargs | {"length": count})
    return tuple(
        y if kind == "sum" else y.reshape([length, *y.shape[2:]])
        for y, kind in zip(given, kwargs["outs"], strict=True)
    )


def _one_map(args: tuple, kwargs: dict) -> Graph:
    """The map alone, batched."""
    body, operands = args
    b = Builder(None)
    ins = [b.input(x.val, n.name) for x, n in zip(operands, body.inputs, strict=True)]
    return batched(b.finish(list(b.emit(map_, (body, tuple(ins)), kwargs))))


def _lower_rest(graph: Graph) -> Graph:
    """Conds and the like opened as for every backend; maps and scans stay."""
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        if isinstance(op, Op) and op not in (map_, scan, constant):
            inner = Builder(None)
            flat: list[Value] = []

            def bind(x):
                if isinstance(x, Value):
                    flat.append(x)
                    return inner.input(x.val, "x")
                return type(x)(map(bind, x)) if type(x) in (list, tuple) else x

            out = inner.emit(op, tuple(map(bind, args)), {k: bind(v) for k, v in kwargs.items()})
            outs = b.inline(batched(inner.finish(list(out) if isinstance(out, tuple) else [out])), flat)
            return tuple(outs) if isinstance(out, tuple) else outs[0]
        return b.emit(op, args, kwargs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _simpler(graph: Graph) -> Graph:
    while len(smaller := simplify(graph)) < len(graph):
        graph = smaller
    return graph


def flat(body: Graph, inside: bool = True) -> Graph:
    """A body with its own maps batched; not `inside` of a loop that is compiled large convolutions stay."""
    return affine(oriented(_simpler(expand(dce(batched(body)), inside))))


def oriented(graph: Graph) -> Graph:
    """The graph and the bodies of its loops with products in the layout they are read in."""
    b = Builder(None)

    def call(op: Op, args: tuple, kwargs: dict):
        return b.emit(op, (oriented(args[0]), *args[1:]) if op in (map_, scan) else args, kwargs)

    return b.finish(b.inline(orient(graph), [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _why_no_loop(body: Graph, length: object) -> str | None:
    """Why a body cannot be run so many times in C++, or None."""
    if not isinstance(length, int) or length == 0:
        return "its length"
    if body.draws:
        return "it draws random numbers"
    for n in body.nodes:
        if (why := _task_refusal(n)) is not None:
            return f"{named(n)}: {why}"
    vals = (*body.in_vals, *body.out_vals)
    if any(isinstance(s, Dim) or v.dtype not in DTYPES for v in vals for s in (*v.shape, 0)):
        return "symbolic sizes or a dtype that is not supported"
    return None


def _task_refusal(n: Node) -> str | None:
    if n.target is getitem:
        return None
    if n.target is scan:
        return _why_no_loop(n.args[0], n.kwargs["length"])
    if isinstance(n.target, Op) and n.target not in (barrier, constant):
        return "a region inside of a task"
    if n.target is constant and not is_constant(n):
        return "a constant tensor inside of a task"
    return refusal(n) or cost.why_aten(n, inside=True)


def _folded(graph: Graph) -> Graph:
    """The graph with what depends on nothing, `eye` and the like, computed once."""
    b, known = Builder(None), {}

    def call(op: Op, args: tuple, kwargs: dict):
        out = b.emit(op, args, kwargs)
        if not isinstance(out, Value) or isinstance(op, Op) or is_random(op) or not _foldable(out.val):
            return out
        given = tensors_in(args, Value)
        if not all(x.node in known for x in given) or tensors_in(list(kwargs.values()), Value):
            return out
        known[out.node] = op(*_with_tensors(args, known), **kwargs)
        if is_free(out.node):
            return out  # computed where it is read, which costs nothing
        made = b.constant(known[out.node])
        known[made.node] = known[out.node]
        return made

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _with_tensors(x, known: dict[Node, Tensor]):
    """An argument structure with tensors for values."""
    if isinstance(x, Value):
        return known[x.node]
    return type(x)(_with_tensors(y, known) for y in x) if isinstance(x, (list, tuple)) else x


def _foldable(val: Val) -> bool:
    return (
        val.device.type == "cpu"
        and not any(isinstance(s, Dim) for s in val.shape)
        and bytes_of(val) <= FOLDED
    )


class _Partition:
    """Groups of calls that become one `native` node each: as long as no ATen call between them needs one of them."""

    def __init__(self, graph: Graph, notes: list[str]):
        self.graph, self.notes = graph, notes
        self.fx = torch.fx.Graph()
        self.env: dict[Node, Node] = {}
        self.programs: list[Native] = []
        self.outside: list[Row] = []
        self.pending: list[Node] = []
        self.waits: set[Node] = set()  # what the pending calls compute, views of it too
        self.late: list[Node] = []

    def built(self) -> Built:
        """The new graph."""
        for n in self.graph.inputs:
            self._copy(n)
        refusals = {n: self._refusal(n) for n in self.graph.nodes if not _is_part(n)}
        for n in _in_phases(self.graph, refusals):
            if _is_part(n):
                if any(x in self.waits for x in n.all_input_nodes):
                    self.waits.add(n)
                continue  # copied where it is read
            if (why := refusals[n]) is None:
                self.pending.append(n)
                self.waits.add(n)
                continue
            if n.target is not constant:
                self._outside(n, why)
            if any(x in self.waits for x in n.all_input_nodes):
                self._flush()
            self._get(n)
        self._flush()
        outputs = tuple(None if n is None else self._get(n) for n in self.graph.outputs)
        self.fx.output(outputs)
        return Built(for_aten(Graph(self.fx)), self.programs, self.notes, self.outside)

    def _outside(self, n: Node, why: str) -> None:
        self.outside.append(row(n, "runs in ATen", why))

    def _refusal(self, n: Node) -> str | None:
        if n.target is map_:
            return None
        if n.target is constant:
            return "a constant"
        if n.target is scan:
            return _why_no_loop(n.args[0], n.kwargs["length"])
        if isinstance(n.target, Op) and n.target is not barrier:
            return "a region outside of a map"
        return refusal(n) or cost.why_aten(n)

    def _flush(self) -> None:
        """The pending calls as a program, if they are worth one."""
        inside, self.pending, self.waits = self.pending, [], set()
        if not inside:
            return
        if cost.is_little(inside):
            for n in inside:
                self._outside(n, "too little for a program")
                self._get(n)
            return
        made = [r for n in inside for r in results(n)]
        members = set(inside)
        wanted = [r for r in made if self._read_outside(r, members)]
        bound = dict.fromkeys(
            x
            for n in inside
            for x in _sources(n)
            if x not in members and x not in made and not is_constant(x)
        )
        graph = extract(list(bound), wanted)
        program = to_cpp(f"program_{len(self.programs) + 1}" if self.programs else "program", graph)
        self.programs.append(program)
        node = self.fx.create_node(
            "call_function", native, (program, *(self._get(x) for x in bound)), {}, program.name
        )
        node.meta.update(val=program.vals, source=inside[-1].meta.get("source"), origin="native")
        for i, r in enumerate(wanted):
            self.env[r] = self.fx.create_node("call_function", getitem, (node, i), {}, r.name)
            self.env[r].meta.update(r.meta)

    def _read_outside(self, n: Node, members: set[Node]) -> bool:
        """True if an output, or a call that is no member, reads a value, through views too."""
        if n in self.graph.outputs:
            return True
        return any(
            self._read_outside(u, members) if is_free(u) else u not in members
            for u in n.users
            if u.op != "output"
        )

    def _get(self, n: Node) -> Node:
        return self.env[n] if n in self.env else self._copy(n)

    def _copy(self, n: Node) -> Node:
        new = self.env[n] = copied(self.fx, n, self._get)
        return new


def _is_part(n: Node) -> bool:
    """True for what takes no call: views, and results of a call that has several."""
    return is_free(n) or n.target is getitem


def _in_phases(graph: Graph, refusals: dict[Node, str | None]) -> list[Node]:
    """The calls in an order with the fewest programs: in each phase first all that can be C++, then what ATen does.

    Random calls stay in order.
    """
    native_at = dict.fromkeys(graph.inputs, 0)  # the phase from which a call in C++ can read it
    aten_at = dict(native_at)
    drawn: Node | None = None
    key: dict[Node, tuple[int, bool]] = {}
    for n in graph.nodes:
        given = [*n.all_input_nodes, *([drawn] if drawn and is_random(n) else [])]
        native_at[n], aten_at[n] = (max((at[x] for x in given), default=0) for at in (native_at, aten_at))
        key[n] = (native_at[n], False)
        if _is_part(n) or n.target is constant:
            key[n] = (aten_at[n], native_at[n] > aten_at[n])
        elif refusals[n] is None:
            aten_at[n] = native_at[n]
        else:
            key[n] = (aten_at[n], True)
            native_at[n] = aten_at[n] + 1
        drawn = n if is_random(n) else drawn
    return sorted(graph.nodes, key=key.__getitem__)


def _sources(n: Node) -> list[Node]:
    """The values that a call reads, with no view between."""
    return [base(x) for x in n.all_input_nodes]
