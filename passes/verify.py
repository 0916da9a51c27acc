"""The specification of a graph. Entry point: `verify`, which raises `InvalidGraph` naming the pass that broke it."""

from __future__ import annotations

import torch
from torch.fx import Node

from . import errors
from .graph import Graph, Op, Val, cond, getitem, map_, scan, subgraphs
from .infer import infer


def verify(graph: Graph, after: str) -> None:
    """Check that calls are functional and known, that arguments come before uses, and that every val is what infer says."""
    seen = set(graph.inputs)
    for n in graph.inputs:
        _require(isinstance(n.meta.get("val"), Val), after, f"input {n.name} has no val")
    for n in graph.nodes:
        _require(
            all(m in seen for m in n.all_input_nodes),
            after,
            f"{n.name} uses a value of another graph or a later one",
        )
        _target(n, after)
        _val(n, after)
        for body in subgraphs(n):
            verify(body, after)
        _region(n, after)
        seen.add(n)
    _require(
        all(n is None or n in seen for n in graph.outputs), after, "an output is not a value of the graph"
    )


def _require(condition: bool, after: str, what: str) -> None:
    if not condition:
        raise errors.InvalidGraph(after=after, what=what, source="-")


def _target(n: Node, after: str) -> None:
    if n.target is getitem or isinstance(n.target, Op):
        return
    _require(
        isinstance(n.target, torch._ops.OpOverload),
        after,
        f"{n.name} calls {n.target}, no operator of a graph",
    )
    _require(not n.target._schema.is_mutable, after, f"{n.name} calls {n.target}, which writes in place")


def _vals(x):
    if isinstance(x, Node):
        return x.meta["val"]
    return (
        type(x)(map(_vals, x))
        if type(x) in (list, tuple)
        else [_vals(y) for y in x]
        if isinstance(x, (list, tuple))
        else x
    )


def _val(n: Node, after: str) -> None:
    if n.target is getitem:
        expected = n.args[0].meta["val"][n.args[1]]
    else:
        expected = infer(
            n.target, tuple(_vals(a) for a in n.args), {k: _vals(v) for k, v in n.kwargs.items()}
        )
    _require(n.meta.get("val") == expected, after, f"{n.name} has val {n.meta.get('val')}, not {expected}")


def _region(n: Node, after: str) -> None:
    if n.target is map_:
        body, operands = n.args
        _require(
            len(body.inputs) == len(operands) == len(n.kwargs["mapped"]),
            after,
            f"{n.name}: operands do not match its body",
        )
        for x, inner, mapped in zip(operands, body.in_vals, n.kwargs["mapped"], strict=True):
            v = x.meta["val"]
            shape = (n.kwargs["length"], *inner.shape) if mapped else inner.shape
            _require(
                v.shape == shape and v.dtype == inner.dtype,
                after,
                f"{n.name}: operand {x.name} is {v}, body takes {inner}",
            )
    if n.target is scan:
        body, consts, carry, xs = n.args
        _require(
            len(body.inputs) == len(consts) + len(carry) + len(xs),
            after,
            f"{n.name}: operands do not match its body",
        )
        _require(
            body.out_vals[: len(carry)] == body.in_vals[len(consts) : len(consts) + len(carry)],
            after,
            f"{n.name}: carry changes type",
        )
    if n.target is cond:
        true, false, pred, operands = n.args
        given, condition = [x.meta["val"] for x in operands], pred.meta["val"]
        _require(
            true.in_vals == false.in_vals == given, after, f"{n.name}: operands do not match its branches"
        )
        _require(true.out_vals == false.out_vals, after, f"{n.name}: its branches give different types")
        _require(
            condition.shape == () and condition.dtype == torch.bool, after, f"{n.name}: pred is {condition}"
        )
        _require(not (true.draws or false.draws), after, f"{n.name}: a branch draws random numbers")
