"""The program representation: `Graph`, an immutable torch.fx graph of functional ATen overloads and our own `Op`s.

Every node has `meta["val"]` (a `Val`, or a tuple of `Val | None` for several outputs), and for people
`meta["source"]` (the user's file:line) and `meta["origin"]` (what made it). Nothing a result depends on is in meta.
Sizes in vals and arguments are ints or `Dim`s. Values are logically dense: no node's meaning depends on strides.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from functools import cached_property

import torch
from torch.fx import Node

from .dims import Dim, Size

getitem = operator.getitem


@dataclasses.dataclass(frozen=True, slots=True)
class Val:
    """What is known of a tensor before it exists: shape (ints or Dims), dtype, device."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def differentiable(self) -> bool:
        return self.dtype.is_floating_point or self.dtype.is_complex

    def __str__(self) -> str:
        short = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        device = "" if self.device.type == "cpu" else f"@{self.device}"
        return f"{short}[{','.join(map(str, self.shape))}]{device}"


_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.bool: "bool",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


class Op:
    """An operator of ours beside ATen: regions, constants and gradient stops. Named `fxfunc.<name>`."""

    registry: dict[str, Op] = {}

    def __init__(self, name: str):
        self.__name__ = self.name = name
        self.__module__ = "fxfunc"
        Op.registry[name] = self

    def __call__(self, *args, **kwargs):
        raise TypeError(f"{self} is a node of a graph; it is lowered before anything runs")

    def __repr__(self) -> str:
        return f"fxfunc.{self.name}"


class Literal:
    """A tensor value baked into a graph, equal by dtype, shape and bytes."""

    __slots__ = ("tensor", "key")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        raw = (
            self.tensor.cpu().reshape(-1).view(torch.uint8)
            if tensor.numel()
            else self.tensor.new_empty(0, dtype=torch.uint8)
        )
        self.key = (tensor.dtype, tuple(tensor.shape), str(tensor.device), bytes(raw.tolist()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other) -> bool:
        return isinstance(other, Literal) and self.key == other.key

    def __repr__(self) -> str:
        return (
            f"Literal({self.tensor.tolist()})"
            if self.tensor.numel() <= 8
            else f"Literal({tuple(self.tensor.shape)})"
        )


# constant(literal) -> tensor
constant = Op("constant")
# The identity; blocks reverse mode only (a value made under no_grad), or both modes (a user's detach).
stop_reverse, stop_gradient = Op("stop_reverse"), Op("stop_gradient")
# graft(new, old) -> new; in reverse mode its derivative is that of `old` (an in-place write under no_grad).
graft = Op("graft")
# The identity; equal calls on both sides of it are not merged (what is computed again would be taken from the first time).
barrier = Op("barrier")
# map(body, operands; length, mapped, outs, randomness): the body once per index of the mapped axis.
#   operands[i] carries the axis at dim 0 iff mapped[i]; outs[j] is "stack" (axis 0 of the result) or "sum" (over the axis).
map_ = Op("map")
# scan(body, consts, carry, xs; length, reverse): body(*consts, *carry, *x) -> (*carry, *y); results are carry and stacked ys.
scan = Op("scan")
# cond(true, false, pred, operands): true(*operands) if pred (a bool of no dims) else false(*operands), whose results are alike.
cond = Op("cond")
# custom(body, backward, jvp, operands; wrt, outs, count, origins, name): body(*operands) -> `count` outputs, then residuals;
#   backward(*residuals, *cotangents of the `outs`) -> cotangents of the operands `wrt`, jvp(*residuals, *tangents of these) ->
#   tangents of the `outs`; either may be None. origins: which operand i (as i) or output j (as -1 - j) a residual is, or None.
custom = Op("custom")
# linear_call(body, transposed, residuals, operands): a linear map given as two graphs, either may be None:
#   body(*residuals, *operands) and its transpose transposed(*residuals, *cotangents).
linear_call = Op("linear_call")
# checkpoint(body, operands; policy): body(*operands), of which reverse mode keeps what the policy says (remat.py).
checkpoint = Op("checkpoint")
REGIONS = (map_, scan, cond, custom, linear_call, checkpoint)


class Graph:
    """An immutable program: `inputs` (placeholder nodes), `nodes` (calls in order), `outputs` (a node or None each)."""

    def __init__(self, fx: torch.fx.Graph):
        self.fx = fx
        self.inputs: tuple[Node, ...] = tuple(n for n in fx.nodes if n.op == "placeholder")
        output = next(iter(reversed(fx.nodes)))
        self.outputs: tuple[Node | None, ...] = tuple(output.args[0])
        # Of a capture that writes in place: the inputs whose new values are the last outputs.
        self.written: tuple[int, ...] = ()
        # Of a capture: the outputs that are new tensors in the captured code, whatever the algebra makes of them.
        self.fresh: tuple[int, ...] = ()

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The calls, in order of execution."""
        return tuple(n for n in self.fx.nodes if n.op == "call_function")

    @cached_property
    def draws(self) -> tuple[Node, ...]:
        """The calls that draw random numbers."""
        return tuple(n for n in self.nodes if is_random(n))

    @cached_property
    def key(self) -> tuple:
        """Equal for graphs of the same structure, whatever their node names: typed calls over numbered values."""
        number = {n: i for i, n in enumerate(self.inputs)}
        calls = []
        for n in self.nodes:
            calls.append(
                (
                    n.target,
                    typed(n.args, number.__getitem__),
                    typed(tuple(n.kwargs.items()), number.__getitem__),
                )
            )
            number[n] = len(number)
        outputs = tuple(None if n is None else number[n] for n in self.outputs)
        return (tuple(n.meta["val"] for n in self.inputs), tuple(calls), outputs)

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return self is other or (
            isinstance(other, Graph) and hash(self) == hash(other) and self.key == other.key
        )

    def __len__(self) -> int:
        return sum(1 + sum(len(g) for g in subgraphs(n)) for n in self.nodes)

    def __bool__(self) -> bool:
        return True  # also without calls

    @property
    def in_vals(self) -> list[Val]:
        return [n.meta["val"] for n in self.inputs]

    @property
    def out_vals(self) -> list[Val | None]:
        return [None if n is None else n.meta["val"] for n in self.outputs]

    def dims(self) -> list[str]:
        """Names of the symbolic sizes of the inputs, each readable off some input's shape."""
        return sorted(
            {name for v in self.in_vals for s in v.shape if isinstance(s, Dim) for name in s.names()}
        )

    def __str__(self) -> str:
        from .printer import text

        return text(self)


def typed(x, of_node):
    """A hashable key of an argument in which 1, 1.0 and True differ; `of_node` gives the key of a node."""
    if isinstance(x, Node):
        return of_node(x)
    kind = type(x)
    if kind is int or kind is bool or x is None or kind is str:
        return (kind, x)
    if kind is float or kind is complex:
        return (kind, repr(x))
    if isinstance(x, (list, tuple)):
        return tuple([typed(y, of_node) for y in x])
    if isinstance(x, dict):
        return tuple((k, typed(y, of_node)) for k, y in sorted(x.items()))
    return x


def vals_of(node: Node) -> list[Val]:
    """What the results of a call are, those left out that it has not."""
    val = node.meta["val"]
    return [val] if isinstance(val, Val) else [v for v in val if v is not None]


def subgraphs(node: Node) -> Iterator[Graph]:
    """The bodies a region node holds."""
    if isinstance(node.target, Op):
        for x in node.args:
            if isinstance(x, Graph):
                yield x


def is_random(node_or_op, args=()) -> bool:
    """True for calls that draw random numbers: never merged, recomputed, reordered or dropped. A region draws if a body does."""
    if isinstance(node_or_op, Node):
        return is_random(node_or_op.target, node_or_op.args)
    if isinstance(node_or_op, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node_or_op.tags
    return isinstance(node_or_op, Op) and any(isinstance(x, Graph) and x.draws for x in args)


def substitute(x, of_node):
    """An argument with every node passed through `of_node`."""
    if isinstance(x, Node):
        return of_node(x)
    if isinstance(x, (list, tuple)):
        out = [substitute(y, of_node) for y in x]
        return tuple(out) if isinstance(x, tuple) else out
    return x


def reached(nodes, starts) -> set[Node]:
    """The start nodes and everything among `nodes` (in order) that depends on them."""
    found = set(starts)
    for n in nodes:
        if any(m in found for m in n.all_input_nodes):
            found.add(n)
    return found


def root(n: Node) -> object:
    """What owns the memory of a value, as far as schemas tell: the value that it views, or itself."""
    while n.op == "call_function":
        source = n.args[0] if n.target is getitem else n
        schema = getattr(source.target, "_schema", None)
        if source.target in (stop_reverse, stop_gradient, graft, barrier) or (
            schema and schema.returns[0].alias_info is not None
        ):
            n = source.args[0]
        elif n.target is getitem:
            return (source, n.args[1])
        else:
            return n
    return n


def copied(fx: torch.fx.Graph, n: Node, get) -> Node:
    """A call in another graph, with what `get` gives for the nodes that it reads."""
    kwargs = {k: substitute(v, get) for k, v in n.kwargs.items()}
    new = fx.create_node(n.op, n.target, substitute(n.args, get), kwargs, n.name)
    new.meta.update(n.meta)
    return new


def cone(outputs, bound) -> list[Node]:
    """The calls between the bound nodes and the outputs, in order."""
    seen: set[Node] = set()
    stack = [n for n in outputs if n is not None]
    while stack:
        n = stack.pop()
        if n not in seen and n not in bound:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return sorted(seen)


def add_call(fx: torch.fx.Graph, op, args: tuple, kwargs: dict, name: str) -> Node:
    """A new call, past create_node's walk over the arguments for SymInts, of which our graphs have none."""
    node = fx.create_node("call_function", op, name=name)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def extract(inputs: list[Node], outputs: list[Node | None], keep=()) -> Graph:
    """The part of a graph that computes `outputs` from `inputs` (and from nothing) as a graph; the calls `keep` stay in it."""
    fx = torch.fx.Graph()
    env: dict[Node, Node] = {}
    for n in inputs:
        env[n] = fx.create_node("placeholder", n.name, (), {}, n.name)
        env[n].meta = {"val": n.meta["val"]}
    for n in cone([*outputs, *keep], env.keys()):
        kwargs = {k: substitute(v, env.__getitem__) for k, v in n.kwargs.items()}
        env[n] = add_call(fx, n.target, substitute(n.args, env.__getitem__), kwargs, n.name)
        env[n].meta = n.meta
    fx.output(tuple(None if n is None else env[n] for n in outputs))
    return Graph(fx)
