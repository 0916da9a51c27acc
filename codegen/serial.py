"""Graphs as JSON and back. Entry points: `dump` and `load`. Only registered operators and plain data pass, in both directions.

Every name that could reach generated source (nodes, sizes) must be an identifier of a restricted form.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
from collections.abc import Mapping

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import Graph, Literal, Op, Val, getitem

from . import loops, mapped
from .native import Native

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}\Z")
_OPERATOR = re.compile(r"[a-z_][a-z0-9_]*\.[A-Za-z_][A-Za-z0-9_]*\.[A-Za-z_][A-Za-z0-9_]*\Z")


class SerialError(ValueError):
    """What cannot be written or read, in words."""


def dump(graph: Graph, literals: list[torch.Tensor]) -> dict:
    """A graph as JSON data; the tensors of its literals are appended to `literals`."""
    number = {n: i for i, n in enumerate([*graph.inputs, *graph.nodes])}
    return {
        "inputs": [[n.name, _dump_val(n.meta["val"])] for n in graph.inputs],
        "nodes": [
            [
                n.name,
                _target_name(n.target),
                [_dump(a, number, literals) for a in n.args],
                {k: _dump(v, number, literals) for k, v in n.kwargs.items()},
                _dump_val(n.meta["val"]),
            ]
            for n in graph.nodes
        ],
        "outputs": [None if n is None else number[n] for n in graph.outputs],
    }


def load(data: dict, literals: list[torch.Tensor], programs: Mapping[str, Native] | None = None) -> Graph:
    """The graph of JSON data, in which `programs` are named. Raises SerialError for anything that `dump` does not write."""
    try:
        return _load_graph(data, literals, programs or {})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise (
            e if isinstance(e, SerialError) else SerialError(f"malformed graph ({type(e).__name__}: {e})")
        ) from e


def _target_name(target) -> str:
    if target is getitem:
        return "getitem"
    if isinstance(target, Op):
        return f"fxfunc.{target.name}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    raise SerialError(f"a graph with a call of {target} cannot be stored")


def _dump_val(val):
    if isinstance(val, Val):
        return [[_dump_size(s) for s in val.shape], str(val.dtype).removeprefix("torch."), str(val.device)]
    return {"many": [None if v is None else _dump_val(v) for v in val]}


def _dump_size(s):
    return s if isinstance(s, int) else {"D": _dump_dim(s)}


def _dump_dim(d: Dim):
    return [[c, [a if isinstance(a, str) else [a[0], _dump_dim(a[1]), a[2]] for a in m]] for m, c in d.terms]


def _dump(x, number, literals):
    if x is None or isinstance(x, (bool, int)):
        return x
    for kind, tag, encode in _ENCODERS:
        if isinstance(x, kind):
            return {tag: encode(x)}
    if isinstance(x, Node):
        return {"n": number[x]}
    if isinstance(x, (list, tuple)):
        return {"u" if isinstance(x, tuple) else "l": [_dump(y, number, literals) for y in x]}
    if isinstance(x, Literal):
        literals.append(x.tensor)
        return {"L": len(literals) - 1}
    if isinstance(x, Graph):
        return {"g": dump(x, literals)}
    if isinstance(x, Native):
        return {"P": x.name}
    if type(x).__name__ in _RECORDS:
        return {"r": [type(x).__name__, *(_dump(getattr(x, f), number, literals) for f in _fields(type(x)))]}
    raise SerialError(f"an argument of type {type(x).__name__} cannot be stored")


# The parts of a kernel. The user's lines stay behind: they are paths of this machine.
_RECORDS = {
    r.__name__: r
    for r in (
        loops.Kernel,
        loops.Arg,
        loops.Index,
        loops.Load,
        loops.Pick,
        loops.Const,
        loops.Iota,
        loops.Apply,
        loops.Reduce,
        loops.Dot,
        loops.Store,
        mapped.Tasks,
        mapped.Together,
    )
}


def _fields(record: type) -> list[str]:
    return [f.name for f in dataclasses.fields(record) if f.init and f.name != "source"]


_ENCODERS = (
    (float, "f", lambda x: x.hex() if math.isfinite(x) else repr(x)),
    (
        complex,
        "c",
        lambda x: [
            x.real.hex() if math.isfinite(x.real) else repr(x.real),
            x.imag.hex() if math.isfinite(x.imag) else repr(x.imag),
        ],
    ),
    (str, "s", str),
    (torch.dtype, "t", lambda x: str(x).removeprefix("torch.")),
    (torch.device, "d", str),
    (torch.memory_format, "m", lambda x: str(x).removeprefix("torch.")),
    (torch.layout, "y", lambda x: str(x).removeprefix("torch.")),
    (Dim, "D", _dump_dim),
)


def _identifier(name) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.match(name) or keyword.iskeyword(name):
        raise SerialError(f"{name!r} is no name of a value or size")
    return name


def _load_target(name: str):
    if name == "getitem":
        return getitem
    if name.startswith("fxfunc."):
        op = Op.registry.get(name.removeprefix("fxfunc."))
    elif _OPERATOR.match(name):
        op = torch.ops
        for part in name.split("."):
            op = getattr(op, part, None)
    else:
        op = None
    if op is None or not isinstance(op, (Op, torch._ops.OpOverload)):
        raise SerialError(f"unknown operator {name!r}")
    if isinstance(op, torch._ops.OpOverload) and (op._schema.is_mutable or op in _REACHES_OUT):
        raise SerialError(f"{name!r} does more than compute a value")
    return op


_REACHES_OUT = {torch.ops.aten.from_file.default, torch.ops.aten._print.default}


def _load_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, _identifier(name), None)
    if not isinstance(dtype, torch.dtype):
        raise SerialError(f"unknown dtype {name!r}")
    return dtype


def load_val(data) -> Val:
    """A Val from its JSON."""
    shape, dtype, device = data
    return Val(tuple(_load_size(s) for s in shape), _load_dtype(dtype), torch.device(device))


def dump_val(val: Val):
    """A Val as JSON."""
    return _dump_val(val)


def _load_vals(data, known: dict):
    """A Val or a tuple of them; `known` holds those read before, since most values of a graph are alike."""
    if isinstance(data, dict):
        return tuple(None if v is None else _load_vals(v, known) for v in data["many"])
    text = repr(data)
    if text not in known:
        known[text] = load_val(data)
    return known[text]


def _load_size(s):
    return _load_dim(s["D"]) if isinstance(s, dict) else _int(s)


def _int(x) -> int:
    if type(x) is not int:
        raise SerialError(f"{x!r} is no integer")
    return x


def _load_dim(terms):
    out = 0
    for c, atoms in terms:
        product = _int(c)
        for a in atoms:
            product = (Dim(_identifier(a)) if isinstance(a, str) else _load_atom(*a)) * product
        out = product + out
    return out


def _load_atom(op, inner, d):
    return _load_dim(inner) // _int(d) if op == "//" else _load_dim(inner) % _int(d)


def _float(x: str) -> float:
    return float(x) if x in ("inf", "-inf", "nan") else float.fromhex(x)


def _load(x, nodes, literals, programs):
    if x is None or isinstance(x, (bool, int)):
        return x
    ((tag, value),) = x.items()
    if tag in ("l", "u"):
        out = [_load(y, nodes, literals, programs) for y in value]
        return out if tag == "l" else tuple(out)
    if tag == "n":
        return nodes[_index(value, nodes)]
    if tag == "L":
        return Literal(literals[_index(value, literals)])
    if tag == "r":
        return _load_record(*(_string(value[0]), *(_load(y, nodes, literals, programs) for y in value[1:])))
    if tag == "P":
        return programs[_string(value)]
    return _load_graph(value, literals, programs) if tag == "g" else _DECODERS[tag](value)


def _load_record(kind: str, *values):
    if kind not in _RECORDS:
        raise SerialError(f"unknown part of a kernel {kind!r}")
    record = _RECORDS[kind](**dict(zip(_fields(_RECORDS[kind]), values, strict=True)))
    return loops.verify(record) if kind == "Kernel" else record


def _index(i, sequence) -> int:
    if type(i) is not int or not 0 <= i < len(sequence):
        raise SerialError(f"{i!r} refers to nothing")
    return i


def _named(kind):
    def decode(name):
        found = getattr(torch, _identifier(name), None)
        if not isinstance(found, kind):
            raise SerialError(f"unknown {kind.__name__} {name!r}")
        return found

    return decode


def _string(x) -> str:
    if not isinstance(x, str):
        raise SerialError(f"{x!r} is no string")
    return x


_DECODERS = {
    "f": _float,
    "c": lambda x: complex(_float(x[0]), _float(x[1])),
    "s": _string,
    "t": _load_dtype,
    "d": lambda x: torch.device(_string(x)),
    "m": _named(torch.memory_format),
    "y": _named(torch.layout),
    "D": _load_dim,
}


def _load_graph(data: dict, literals, programs) -> Graph:
    fx = torch.fx.Graph()
    nodes: list[Node] = []
    names: set[str] = set()
    known: dict[str, Val] = {}
    for name, val in data["inputs"]:
        nodes.append(_node(fx, names, "placeholder", name, _identifier(name), (), {}, load_val(val)))
    for name, target, args, kwargs, val in data["nodes"]:
        arguments = tuple(_load(a, nodes, literals, programs) for a in args)
        keywords = {_identifier(k): _load(v, nodes, literals, programs) for k, v in kwargs.items()}
        nodes.append(
            _node(
                fx,
                names,
                "call_function",
                name,
                _load_target(target),
                arguments,
                keywords,
                _load_vals(val, known),
            )
        )
    fx.output(tuple(None if i is None else nodes[_index(i, nodes)] for i in data["outputs"]))
    return Graph(fx)


def _node(fx, names: set[str], kind: str, name: str, target, args, kwargs, val) -> Node:
    if _identifier(name) in names:
        raise SerialError(f"two values are named {name!r}")
    names.add(name)
    node = fx.create_node(kind, target, name=name)  # without its walk over the arguments for SymInts
    node.args, node.kwargs = args, kwargs
    node.meta["val"] = val
    return node
