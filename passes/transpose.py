"""Reverse mode: a linear graph walked backward. Entry point: `transpose`.

Accumulation, unbroadcasting and casting to the primal's dtype happen here, once; rows return what is natural.
Inner products are <a, b> = Re sum conj(a) b, so rows are adjoints.
"""

from __future__ import annotations

from torch.fx import Node

from . import errors
from .dims import Dim
from .graph import Graph, Val, extract, getitem, substitute
from .record import Builder, Value
from .rules.table import ROWS, Undefined


def transpose(
    b: Builder, graph: Graph, residuals: list[Value | None], cotangents: list[Value | None]
) -> list[Value | None]:
    """Cotangents of the inputs after the residuals, given those of the outputs; None is zero."""
    linear = set(graph.inputs[len(residuals) :])
    env: dict[Node, Value] = dict(zip(graph.inputs, residuals, strict=False))
    order = []
    for n in graph.nodes:
        if any(m in linear for m in n.all_input_nodes):
            linear.add(n)
            order.append(n)
        else:
            env[n] = _primal(b, n, env)
    cts: dict[Node, Value] = {}
    for out, ct in zip(graph.outputs, cotangents, strict=True):
        if out in linear:
            accumulate(cts, out, ct)
    for n in reversed(order):
        _step(b, n, env, linear, cts)
    return [cts.get(n) for n in graph.inputs[len(residuals) :]]


def _primal(b, n, env):
    if n.target is getitem:
        return env[n.args[0]][n.args[1]]
    with b.at(n):
        return b.emit(
            n.target,
            substitute(n.args, env.__getitem__),
            {k: substitute(v, env.__getitem__) for k, v in n.kwargs.items()},
        )


def accumulate(cts: dict, node: Node, ct: Value | None) -> None:
    """Add a share to a node's cotangent."""
    if ct is not None:
        before = cts.get(node)
        cts[node] = ct if before is None else before + ct


def _step(b: Builder, n: Node, env, linear, cts) -> None:
    if n.target is getitem:
        whole = cts.setdefault(n.args[0], [None] * len(n.args[0].meta["val"]))
        ct = cts.pop(n, None)
        if ct is not None:
            whole[n.args[1]] = ct
        return
    ct = cts.pop(n, None)
    if ct is None or (isinstance(ct, list) and all(c is None for c in ct)):
        return

    def bind(m):
        return Undefined(m.meta["val"]) if m in linear else env[m]

    args, kwargs = substitute(n.args, bind), {k: substitute(v, bind) for k, v in n.kwargs.items()}
    with b.at(n, "transpose"):
        shares = cotangents_of(b, n.target, ct, args, kwargs)
        nodes: list[Node] = []
        substitute([n.args, list(n.kwargs.values())], nodes.append)
        for m, share in zip([m for m in nodes if m in linear], shares, strict=True):
            if share is not None:
                accumulate(cts, m, fit(share, m.meta["val"]) if isinstance(m.meta["val"], Val) else share)


def cotangents_of(b: Builder, op, ct, args, kwargs) -> list[Value | None]:
    """The cotangents of the linear (`Undefined`) arguments of a call, in order."""
    if op in SPECIAL:
        return SPECIAL[op](b, ct, args, kwargs)
    row = ROWS.get(op)
    if row is not None and row.transpose is not None:
        return _by_row(op, row, ct, args, kwargs)
    from .decompose import decomposition, expand, tensors_in
    from .rules.derived import transpose_of

    cts = ct if isinstance(ct, list) else [ct]
    graph = expand(op, args, kwargs)
    if graph is None:
        if (found := transpose_of(b, op, cts, args, kwargs)) is not None:
            return found
        graph = decomposition(op, args, kwargs)
    if graph is None:
        raise errors.MissingRule(op=op, rule="transpose", source=b.source)
    tensors = tensors_in([args, list(kwargs.values())], (Value, Undefined))
    return _through(b, graph, tensors, cts)


def _through(b, graph, tensors, cts):
    """Transpose a decomposition: its linear inputs are reordered behind the others."""
    linear = [i for i, t in enumerate(tensors) if isinstance(t, Undefined)]
    others = [i for i in range(len(tensors)) if i not in linear]
    reordered = extract([graph.inputs[i] for i in others + linear], list(graph.outputs))
    return transpose(b, reordered, [tensors[i] for i in others], cts)


def _by_row(op, row, ct, args, kwargs):
    flat = []
    for i, a in enumerate(op._schema.arguments):
        if "Tensor" in str(a.type):
            flat.append(args[i] if i < len(args) else kwargs.get(a.name))
    rules = row.transpose
    if (
        len(rules) == 1 and flat and isinstance(flat[0], list)
    ):  # a tensor list: the row gives one cotangent per element
        shares = rules[0](ct, *args, **kwargs)
        return [s for s, x in zip(shares, flat[0], strict=True) if isinstance(x, Undefined)]
    out = []
    for i, x in enumerate(flat):
        if isinstance(x, Undefined):
            if i >= len(rules) or rules[i] is None:
                raise errors.MissingRule(op=op, rule=f"transpose (argument {i})")
            out.append(rules[i](ct, *args, **kwargs))
    return out


def fit(ct: Value, val: Val) -> Value:
    """A cotangent summed over what was broadcast and cast to the primal's dtype."""
    ct = unbroadcast(ct, val.shape) if ct.shape != val.shape else ct
    return ct.to(val.dtype) if ct.dtype != val.dtype else ct


def unbroadcast(ct: Value, shape) -> Value:
    """Sum over leading axes and axes of size 1 that broadcasting had enlarged."""
    extra = ct.ndim - len(shape)
    dims = list(range(extra)) + [
        i + extra for i, s in enumerate(shape) if _is_one(s) and not _is_one(ct.shape[i + extra])
    ]
    if extra < 0 or [s for i, s in enumerate(ct.shape) if i >= extra and i not in dims] != [
        s for i, s in enumerate(shape) if i + extra not in dims
    ]:
        raise AssertionError(f"cotangent of shape {ct.shape} for a value of shape {shape}")
    return ct.sum(dims).reshape(list(shape)) if dims else ct


def _is_one(size) -> bool:
    return not isinstance(size, Dim) and size == 1


# Regions add theirs in rules/region.py and rules/loop.py.
SPECIAL: dict = {}
