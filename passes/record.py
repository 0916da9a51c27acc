"""Making graphs. Entry points: `Builder` (emit calls, with hash-consing and algebra) and `Value` (what rules compute with).

A rule is torch-like code over Values: `t * a.cos()` emits two nodes into the builder that made `t`.
Methods of a Value are ATen ops by name; the overload is chosen by the types of the arguments.
"""

from __future__ import annotations

import contextlib
import keyword

import torch
from torch.fx import Node

from . import errors
from .dims import Dim, numel
from .graph import (
    Graph,
    Literal,
    Op,
    Val,
    add_call,
    constant,
    getitem,
    is_random,
    substitute,
    typed,
)
from .infer import infer

aten = torch.ops.aten


def _comparison(packet):
    return lambda self, other: self.call(packet.Tensor if isinstance(other, Value) else packet.Scalar, other)


class Value:
    """A node under construction, with torch's operators and methods."""

    __slots__ = ("node", "builder")

    def __init__(self, node: Node, builder: Builder):
        self.node, self.builder = node, builder

    val = property(lambda self: self.node.meta["val"])
    shape = property(lambda self: self.node.meta["val"].shape)
    ndim = property(lambda self: len(self.node.meta["val"].shape))
    dtype = property(lambda self: self.node.meta["val"].dtype)
    device = property(lambda self: self.node.meta["val"].device)

    def call(self, op, *args, **kwargs):
        """Emit op(self, *args)."""
        return self.builder.emit(op, (self, *args), kwargs)

    def __getattr__(self, name: str):
        packet = getattr(aten, name, None)
        if packet is None or name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.builder.emit(
            resolve(packet, (self, *args), kwargs), (self, *args), kwargs
        )

    __add__ = __radd__ = lambda self, other: self.call(aten.add.Tensor, other)
    __mul__ = __rmul__ = lambda self, other: self.call(aten.mul.Tensor, other)
    __sub__ = lambda self, other: self.call(aten.sub.Tensor, other)
    __rsub__ = lambda self, other: (-self).call(aten.add.Tensor, other)
    __truediv__ = lambda self, other: self.call(aten.div.Tensor, other)
    __rtruediv__ = lambda self, other: self.call(aten.reciprocal.default) * other
    __neg__ = lambda self: self.call(aten.neg.default)
    __pow__ = lambda self, other: self.call(
        aten.pow.Tensor_Tensor if isinstance(other, Value) else aten.pow.Tensor_Scalar, other
    )
    __matmul__ = lambda self, other: self.call(aten.mm.default, other)
    __and__ = lambda self, other: self.call(aten.bitwise_and.Tensor, other)
    __or__ = lambda self, other: self.call(aten.bitwise_or.Tensor, other)
    __invert__ = lambda self: self.call(aten.bitwise_not.default)

    __lt__, __le__ = _comparison(aten.lt), _comparison(aten.le)
    __gt__, __ge__ = _comparison(aten.gt), _comparison(aten.ge)
    eq, ne = _comparison(aten.eq), _comparison(aten.ne)

    def reshape(self, *shape):
        """A view or copy with this shape; a -1 is worked out here."""
        shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else list(shape)
        if -1 in [s for s in shape if isinstance(s, int)]:
            shape[shape.index(-1)] = _missing_size(numel(self.shape), numel(s for s in shape if s != -1))
        return self.call(aten.reshape.default, shape)

    def expand(self, *shape):
        """Broadcast to this shape."""
        shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else list(shape)
        return self.call(aten.expand.default, shape)

    def permute(self, dims):
        """The axes in this order."""
        return self.call(aten.permute.default, [int(d) for d in dims])

    def movedim(self, source: int, destination: int):
        """One axis moved."""
        order = list(range(self.ndim))
        order.insert(destination % self.ndim, order.pop(source % self.ndim))
        return self.permute(order)

    mT = property(lambda self: self.permute([*range(self.ndim - 2), self.ndim - 1, self.ndim - 2]))
    mH = property(lambda self: self.mT.conj())

    def sum(self, dims=None, keepdim=False):
        """The sum over these dims (all if None), in this dtype."""
        dims = list(range(self.ndim)) if dims is None else dims
        return self.call(aten.sum.dim_IntList, dims, keepdim) if dims else self

    def conj(self):
        """The complex conjugate; itself if real."""
        return self.call(aten._conj_physical.default) if self.dtype.is_complex else self

    def to(self, dtype: torch.dtype):
        """Cast; a real result of a complex value is its real part."""
        if dtype == self.dtype:
            return self
        if self.dtype.is_complex and not dtype.is_complex:
            return self.call(aten.view_as_real.default).call(aten.select.int, -1, 0).to(dtype)
        return self.call(aten._to_copy.default, dtype=dtype)

    def full(self, shape, fill, dtype=None):
        """A constant tensor on this value's device."""
        return self.builder.emit(
            aten.full.default, (list(shape), fill), {"dtype": dtype or self.dtype, "device": self.device}
        )

    def where(self, a, b):
        """Elementwise choice, self being the condition; a or b may be a number."""
        like = a if isinstance(a, Value) else b
        a, b = (x if isinstance(x, Value) else like.full([], x) for x in (a, b))
        return self.call(aten.where.self, a, b)


def _missing_size(total, known):
    if total == known:
        return 1
    if not isinstance(known, Dim):
        return total // known
    if len(known.terms) > 1:
        raise errors.DynamicShape(what=f"the size {total} / {known}")
    return Dim._make({tuple(_without(m, known)): c for m, c in total.terms})


def _without(monomial, known):
    (atoms, coefficient), out = known.terms[0], list(monomial)
    assert coefficient == 1, f"size {known} does not divide"
    for atom in atoms:
        out.remove(atom)
    return out


_resolved: dict = {}


def resolve(packet, args, kwargs):
    """The overload of an ATen op that these arguments select: the first that takes tensors where Values stand."""
    key = (packet, tuple(map(_kind, args)), tuple((k, _kind(v)) for k, v in kwargs.items()))
    if key not in _resolved:
        _resolved[key] = _resolve(packet, key[1], dict(key[2]))
    return _resolved[key]


def _kind(x) -> str:
    if isinstance(x, (list, tuple)):
        return "values" if any(isinstance(y, Value) for y in x) else "list"
    return "value" if isinstance(x, Value) else "none" if x is None else type(x).__name__


def _resolve(packet, kinds, kwargs):
    names = sorted(packet.overloads(), key=lambda n: (n != "default", n))
    for name in names:
        op = getattr(packet, name)
        arguments = op._schema.arguments
        if not any(a.is_out for a in arguments) and _accepts(arguments, kinds, kwargs):
            return op
    raise TypeError(f"no overload of {packet} takes {kinds} {kwargs}")


def _accepts(arguments, kinds, kwargs) -> bool:
    by_name = {a.name: a for a in arguments}
    if len(kinds) > len(arguments) or not kwargs.keys() <= by_name.keys():
        return False
    given = [*zip(arguments, kinds, strict=False), *((by_name[k], kind) for k, kind in kwargs.items())]
    missing = [a for a in arguments[len(kinds) :] if a.name not in kwargs and not a.has_default_value()]
    return not missing and all(_fits(str(a.type), kind) for a, kind in given)


def _fits(declared: str, kind: str) -> bool:
    optional, declared = (
        declared.startswith("Optional"),
        declared.removeprefix("Optional[").rstrip("]") if declared.startswith("Optional") else declared,
    )
    if kind == "none":
        return optional
    if "Tensor" in declared:
        return kind == ("values" if "List" in declared else "value")
    if "List" in declared:
        return kind == "list"
    return kind not in ("value", "values", "list")


# a op b and b op a are one call where both are tensors.
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def _two_tensors(args) -> bool:
    return len(args) == 2 and isinstance(args[0], Node) and isinstance(args[1], Node)


class Builder:
    """Grows a graph. With `rewrites`, each call is first offered to the algebra (simplify.py) and equal calls are shared."""

    def __init__(self, rewrites: dict | None = None):
        self.fx = torch.fx.Graph()
        self.rewrites = rewrites
        self.shared: dict = {}
        self.counts: dict[str, int] = {}
        self.source: str | None = None
        self.origin: str | None = None

    def input(self, val: Val, name: str = "x") -> Value:
        """A new placeholder."""
        node = self.fx.create_node("placeholder", name := self._name(name), (), {}, name)
        node.meta["val"] = val
        return Value(node, self)

    def emit(self, op, args=(), kwargs=None):
        """The result of a call: a Value, or a tuple of Values and Nones."""
        val = infer(op, vals(args), {k: vals(v) for k, v in kwargs.items()} if kwargs else {})
        args, kwargs = _nodes(args), {k: _nodes(v) for k, v in kwargs.items()} if kwargs else {}
        key = None
        if self.rewrites is not None and not is_random(op, args):
            order = sorted(args, key=id) if op in COMMUTATIVE and _two_tensors(args) else args
            key = (op, typed(tuple(order), _itself), typed(kwargs, _itself) if kwargs else ())
            if (found := self.shared.get(key)) is not None:
                return found
        out = self._rewrite(op, args, kwargs, val) if self.rewrites is not None else None
        if out is None:
            out = self._results(self._create(op, args, kwargs, val))
        if key is not None:
            self.shared[key] = out
        return out

    def _rewrite(self, op, args, kwargs, val):
        row = self.rewrites.get(op)
        if row is None:
            return None
        out = row(
            *substitute(args, self._value), **{k: substitute(v, self._value) for k, v in kwargs.items()}
        )
        return out if isinstance(out, Value) and out.val == val else None

    def _value(self, node: Node) -> Value:
        return Value(node, self)

    def _create(self, op, args, kwargs, val) -> Node:
        name = self._name(
            op.name
            if isinstance(op, Op)
            else "item"
            if op is getitem
            else op._schema.name.split("::")[1].strip("_")
        )
        node = add_call(self.fx, op, args, kwargs, name)
        node.meta.update(val=val, source=self.source, origin=self.origin)
        return node

    def _name(self, base: str) -> str:
        base = base.strip("_0123456789") or "v"
        base = f"v{base}" if keyword.iskeyword(base) or base in ("torch", "range", "inf", "nan") else base
        count = self.counts[base] = self.counts.get(base, 0) + 1
        return base if count == 1 else f"{base}_{count}"

    def _results(self, node: Node):
        val = node.meta["val"]
        if isinstance(val, Val):
            return Value(node, self)
        return tuple(
            None if v is None else Value(self._create(getitem, (node, i), {}, v), self)
            for i, v in enumerate(val)
        )

    def constant(self, tensor: torch.Tensor) -> Value:
        """A literal."""
        return self.emit(constant, (Literal(tensor),))

    def full(self, val: Val, fill) -> Value:
        """A constant of this shape, dtype and device."""
        return self.emit(
            aten.full.default, (list(val.shape), fill), {"dtype": val.dtype, "device": val.device}
        )

    @contextlib.contextmanager
    def at(self, node: Node, how: str | None = None):
        """Calls emitted inside are put down to `node` (its user line, and `how` it was changed)."""
        before = self.source, self.origin
        self.source = node.meta.get("source") or self.source
        self.origin = f"{how}({node.name})" if how else node.meta.get("origin")
        try:
            yield
        finally:
            self.source, self.origin = before

    def inline(self, graph: Graph, inputs: list[Value | None], call=None) -> list[Value | None]:
        """Copy a graph in, its inputs bound; `call(op, args, kwargs)` in place of `emit` if given."""
        env: dict[Node, object] = dict(zip(graph.inputs, inputs, strict=True))
        self.run(graph.nodes, env, call)
        return [None if n is None else env[n] for n in graph.outputs]

    def run(self, nodes, env: dict, call=None) -> None:
        """Emit these calls, reading and writing `env`."""
        call = call or self.emit
        for node in nodes:
            args = substitute(node.args, env.__getitem__)
            if node.target is getitem:
                env[node] = args[0][args[1]]
                continue
            kwargs = (
                {k: substitute(v, env.__getitem__) for k, v in node.kwargs.items()} if node.kwargs else {}
            )
            with self.at(node):
                env[node] = call(node.target, args, kwargs)

    def finish_raw(self, outputs) -> Graph:
        """Close the graph as it is."""
        self.fx.output(tuple(None if v is None else v.node for v in outputs))
        return Graph(self.fx)

    def finish(self, outputs) -> Graph:
        """Close the graph; calls that no output needs are dropped unless they draw random numbers."""
        self.fx.output(tuple(None if v is None else v.node for v in outputs))
        for node in reversed(self.fx.nodes):
            if node.op == "call_function" and not node.users and not is_random(node):
                self.fx.erase_node(node)
        return Graph(self.fx)


def _itself(node: Node) -> Node:
    return node


def vals(x):
    """An argument with everything that has a `val` (Values, Undefined, Mapped, Duals) replaced by it."""
    kind = type(x)
    if kind in (tuple, list):
        return kind([vals(y) for y in x])
    return x if kind in _PLAIN else getattr(x, "val", x)


_PLAIN = {int, float, bool, str, type(None), complex, Dim, torch.dtype, torch.device, Graph}


def _nodes(x):
    if isinstance(x, Value):
        return x.node
    if type(x) in (tuple, list):
        return type(x)([_nodes(y) for y in x])
    return x


def rebuild(graph: Graph, rewrites: dict | None, call=None) -> Graph:
    """The graph emitted again from its inputs, through the algebra."""
    b = Builder(rewrites)
    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))
