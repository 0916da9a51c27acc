"""Linearize: the jvp graph cut at what the tangents reach. Entry points: `linearize` and `vjp`.

The primal graph returns its outputs and the residuals; the linear graph maps (residuals, tangents) to output tangents.
"""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from .graph import Graph, cone, extract, is_random, reached
from .jvp import Jvp
from .record import Builder, Value, aten
from .simplify import SIMPLIFY
from .transpose import transpose


@dataclasses.dataclass(frozen=True)
class Linearized:
    """primal: inputs -> outputs + residuals. linear: residuals + nonzero tangents -> the nonzero output tangents."""

    primal: Graph
    linear: Graph
    count: int  # outputs of the function; the other outputs of `primal` are residuals
    nonzero_out: tuple[bool, ...]

    @property
    def residuals(self) -> int:
        return len(self.primal.outputs) - self.count


def linearize(graph: Graph, nonzero: tuple[bool, ...], *, reverse: bool) -> Linearized:
    """Cut the function of a graph at its tangents; `nonzero` says which inputs have one."""
    b = Builder(SIMPLIFY)
    primals = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    tangents = [
        b.input(n.meta["val"], "t_" + n.name) if z else None
        for n, z in zip(graph.inputs, nonzero, strict=True)
    ]
    outs, out_tangents = Jvp(b, reverse=reverse, split=True).graph(graph, primals, tangents)
    given = [t.node for t in tangents if t is not None]
    linear_nodes = reached(b.fx.nodes, given)
    live_tangents = [t for t in out_tangents if t is not None]
    needed = cone([t.node for t in live_tangents], set(b.fx.nodes) - linear_nodes)
    residuals = _residuals(needed, linear_nodes)
    draws = [n for n in b.fx.nodes if n not in linear_nodes and is_random(n)]
    primal = extract([p.node for p in primals], [o and o.node for o in outs] + residuals, draws)
    linear = extract(residuals + given, [t.node for t in live_tangents])
    return Linearized(primal, linear, len(outs), tuple(t is not None for t in out_tangents))


def _residuals(needed, linear_nodes) -> list[Node]:
    """Primal nodes that the linear program is given, each once, in a fixed order: what it reads, or what that is a view of.

    Views and calls without inputs (constants) are repeated in the linear graph: a matrix and its transpose are one residual.
    """
    read = {owner(m) for n in needed for m in n.all_input_nodes if m not in linear_nodes}
    return sorted(m for m in read if m.op == "placeholder" or m.all_input_nodes or is_random(m))


def owner(n: Node) -> Node:
    """What has all elements of a value; a reshape of a view may be a copy, and is no view."""
    while n.target in _VIEWS or (n.target in _RESHAPES and n.args[0].target not in _VIEWS):
        n = n.args[0]
    return n


_VIEWS = {aten.permute.default, aten.t.default, aten.transpose.int, aten.expand.default}
_RESHAPES = {aten.reshape.default, aten.view.default, aten.unsqueeze.default,
             aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}  # fmt: skip


def vjp(
    b: Builder, graph: Graph, inputs: list[Value], nonzero: tuple[bool, ...], cotangents
) -> tuple[list, list]:
    """Emit a function and its vjp: (outputs, cotangents of the nonzero inputs, None where zero).

    `cotangents(outputs)` gives the cotangent of each output, or None.
    """
    cut = linearize(graph, nonzero, reverse=True)
    results = b.inline(cut.primal, inputs)
    outs, residuals = results[: cut.count], results[cut.count :]
    cts = [ct for ct, z in zip(cotangents(outs), cut.nonzero_out, strict=True) if z]
    return outs, transpose(b, cut.linear, residuals, cts)
