"""Graphs as typed text, like a jaxpr: `mul_1: f32[T,5] = aten.mul.Tensor(sin, 2.0)   # model.py:12`; regions indented."""

from __future__ import annotations

import os

import torch
from torch.fx import Node

from .graph import Graph, Op, Val, getitem


def text(graph: Graph, sources: bool = True) -> str:
    """The whole graph, one line a node."""
    return "\n".join(_lines(graph, "graph", sources))


def _lines(graph: Graph, name: str, sources: bool) -> list[str]:
    inputs = ", ".join(f"{n.name}: {n.meta['val']}" for n in graph.inputs)
    lines = [f"{name}({inputs}):"]
    for n in graph.nodes:
        lines += _node(n, sources)
    return [*lines, "  return " + (", ".join(_arg(n) for n in graph.outputs) or "nothing")]


def _node(n: Node, sources: bool) -> list[str]:
    args = [_arg(a) for a in n.args if not isinstance(a, Graph)] + [
        f"{k}={_arg(v)}" for k, v in n.kwargs.items()
    ]
    call = f"{args[0]}[{args[1]}]" if n.target is getitem else f"{op_name(n.target)}({', '.join(args)})"
    where = n.meta.get("source")
    tail = f"   # {os.path.basename(where)}" if sources and where else ""
    lines = [f"  {n.name}: {_type(n.meta['val'])} = {call}{tail}"]
    if isinstance(n.target, Op):
        for a in n.args:
            if isinstance(a, Graph):
                lines += ["    " + line for line in _lines(a, "body", sources)]
    return lines


def op_name(target) -> str:
    """`aten.mul.Tensor`, `fxfunc.map`."""
    return repr(target) if isinstance(target, Op) else str(target)


def _type(val) -> str:
    return str(val) if isinstance(val, Val) or val is None else "(" + ", ".join(map(_type, val)) + ")"


def _arg(x) -> str:
    if isinstance(x, Node):
        return x.name
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(_arg, x)) + "]"
    return str(x) if isinstance(x, torch.device) else repr(x)
