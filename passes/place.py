"""The same program on another device. Entry point: `place`."""

from __future__ import annotations

import torch
from torch.fx import Node

from .graph import Graph, Val, constant

aten = torch.ops.aten


def place(graph: Graph, device: torch.device) -> Graph:
    """The graph with every value on `device`; literals stay where they are and are copied there."""
    fx = torch.fx.Graph()
    env: dict[Node, Node] = {}

    def moved(x):
        if isinstance(x, Node):
            return env[x]
        if isinstance(x, (list, tuple)):
            return type(x)(map(moved, x))
        if isinstance(x, torch.device):
            return device
        if isinstance(x, Val):
            return Val(x.shape, x.dtype, device)
        return place(x, device) if isinstance(x, Graph) else x

    for n in (*graph.inputs, *graph.nodes):
        kwargs = {k: moved(v) for k, v in n.kwargs.items()}
        if _makes_a_tensor(n):
            kwargs["device"] = device
        new = fx.create_node(n.op, n.target, moved(tuple(n.args)), kwargs, n.name)
        new.meta.update(n.meta)
        if n.target is constant:
            new = fx.create_node("call_function", aten._to_copy.default, (new,), {"device": device})
            new.meta.update(n.meta)
        new.meta["val"] = moved(n.meta["val"])
        env[n] = new
    fx.output(tuple(None if n is None else env[n] for n in graph.outputs))
    out = Graph(fx)
    out.written = graph.written
    return out


def _makes_a_tensor(n: Node) -> bool:
    """True for `full`, `arange` and the like: without a device they would be on the default one."""
    takes = isinstance(n.target, torch._ops.OpOverload) and any(
        a.name == "device" for a in n.target._schema.arguments
    )
    return takes and not n.all_input_nodes
