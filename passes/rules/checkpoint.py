"""Derivatives of `checkpoint`: regions again, the primal one with the residuals that the policy keeps, the linear one with what
it computes again from them. So second order keeps no more than the policy says either.
"""

from __future__ import annotations

from .. import jvp as forward
from .. import transpose as reverse
from ..graph import Graph, barrier, checkpoint, cond, extract, map_, scan
from ..jvp import Jvp
from ..linearize import linearize
from ..record import Builder, Value
from ..regions import reads
from ..remat import Policy, late, rematerialize
from ..simplify import SIMPLIFY
from .batching import pointwise
from .region import differentiate, linear_last, paired, transposed
from .table import rule


def emit_checkpoint(b: Builder, body: Graph, operands: list[Value], policy: Policy) -> list[Value | None]:
    """The results of a body as a region; one that is an operand is passed by, so that it depends on nothing else."""
    given = dict(zip(body.inputs, operands, strict=True))
    inside = list(dict.fromkeys(n for n in body.outputs if n is not None and n not in given))
    if inside or body.draws:
        read = reads(body, [*inside, *body.draws])
        used = [n for n in body.inputs if n in read]
        inner = extract(used, inside, body.draws)
        values = b.emit(checkpoint, (inner, tuple(given[n] for n in used)), {"policy": policy})
        given |= zip(inside, values, strict=True)
    return [None if n is None else given[n] for n in body.outputs]


def region(body: Graph, policy: Policy) -> Graph:
    """A graph as one call of it, and the bodies of its loops, maps and branches too: each step keeps what the policy says."""
    b, inner = Builder(SIMPLIFY), Builder(SIMPLIFY)

    def call(op, args, kwargs):
        if op in (map_, scan, cond):
            args = tuple(region(x, policy) if isinstance(x, Graph) else x for x in args)
        return inner.emit(op, args, kwargs)

    outs = inner.inline(body, [inner.input(n.meta["val"], n.name) for n in body.inputs], call)
    inputs = [b.input(n.meta["val"], n.name) for n in body.inputs]
    return b.finish(emit_checkpoint(b, inner.finish(outs), inputs, policy))


def opened(graph: Graph) -> Graph:
    """The graph without checkpoints: what they hold is computed once."""
    b = Builder(SIMPLIFY)

    def call(op, args, kwargs):
        args = tuple(opened(x) if isinstance(x, Graph) else x for x in args)
        return tuple(b.inline(*args)) if op is checkpoint else b.emit(op, args, kwargs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _checkpoint_jvp(jvp: Jvp, args, kwargs):
    """In forward mode nothing is kept, so nothing is computed again."""
    (body, operands), policy = args, kwargs["policy"]
    nonzero = tuple(d.t is not None for d in operands)
    primals, tangents = [d.p for d in operands], [d.t for d in operands if d.t is not None]
    count = len(body.outputs)
    if not jvp.split:
        both, flags = differentiate(body, nonzero, reverse_mode=jvp.reverse)
        results = emit_checkpoint(jvp.b, both, [*primals, *tangents], policy)
        return paired(results[:count], results[count:], flags)
    cut = linearize(body, nonzero, reverse=jvp.reverse)
    cut = rematerialize(cut, policy) if jvp.reverse else cut
    results = emit_checkpoint(jvp.b, cut.primal, primals, policy)
    out_tangents = emit_checkpoint(jvp.b, cut.linear, [*results[count:], *tangents], policy)
    return paired(results[:count], out_tangents, cut.nonzero_out)


def _checkpoint_transpose(b: Builder, cts, args, kwargs):
    """A region again: what it computes again comes right before the step back that needs it."""
    body, residuals, linear = linear_last(*args)
    given = [j for j, ct in enumerate(cts) if ct is not None]
    back = late(transposed(body, len(residuals), given), len(residuals))
    operands = [*(args[1][i] for i in residuals), *(cts[j] for j in given)]
    return emit_checkpoint(b, back, operands, kwargs["policy"])


forward.SPECIAL[checkpoint] = _checkpoint_jvp
reverse.SPECIAL[checkpoint] = _checkpoint_transpose
rule(barrier, jvp=(lambda t, y, x: t,), batch=pointwise)
