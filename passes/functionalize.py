"""From what was recorded to a functional graph. Entry point: `functionalize`.

In one walk: writes become new values (views of a written tensor are read again from it), grad modes become `stop_reverse`
on the edges from no_grad to grad, and ops with many spellings get one (view -> reshape, zeros_like -> full ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import Node

from . import errors
from .dims import Dim, numel
from .graph import Graph, Val, getitem, graft, root, stop_gradient, stop_reverse, substitute
from .infer import hermetic
from .record import Builder, Value

aten = torch.ops.aten


def functionalize(raw: Graph, *, writable: Callable[[int], bool] = lambda i: False) -> Graph:
    """The functional graph. Writes to input i raise, unless `writable(i)`: then the new values of all written
    inputs are appended to the outputs, and `graph.written` says which inputs they are."""
    walk = _Walk(raw)
    for n in raw.nodes:
        walk.step(n)
    outputs = [None if n is None else walk.read(n, True) for n in raw.outputs]
    written = [i for i, n in enumerate(raw.inputs) if walk.version.get(n)]
    for i in (i for i in written if not writable(i)):
        node = walk.writer[raw.inputs[i]]
        raise errors.MutatedCapture(op=node.target, source=node.meta.get("source"))
    graph = walk.b.finish(outputs + [walk.read(raw.inputs[i], True) for i in written])
    graph.written = tuple(written)
    graph.fresh = tuple(i for i, n in enumerate(raw.outputs) if n is not None and root(n) not in raw.inputs)
    return graph


@dataclasses.dataclass
class _View:
    """A value that is a window on `base`: read by `forward(b, base)`, written back by `backward(b, base, new)`."""

    base: Node
    forward: object
    backward: object


class _Walk:
    def __init__(self, raw: Graph):
        self.b = Builder(None)
        self.env: dict[Node, object] = {n: self.b.input(n.meta["val"], n.name) for n in raw.inputs}
        self.views: dict[Node, _View] = {}
        self.version: dict[Node, int] = {}
        self.seen: dict[Node, int] = {}
        self.writer: dict[Node, Node] = {}
        self.no_grad: set[Node] = set()
        self.stopped: dict[Value, Value] = {}
        self.track = any(_is_write(n) for n in raw.nodes)
        self.scattered = {
            n for n in raw.inputs if n.meta.get("scattered")
        }  # not laid out in order, as far as is known
        self.parted: dict[
            Node, Node
        ] = {}  # base -> a write that reached it or not, as its layout would have it

    def step(self, n: Node) -> None:
        """Emit one recorded call."""
        grad = n.meta.get("grad_mode", True)
        if not grad:
            self.no_grad.add(n)
        with self.b.at(n):
            if n.target is getitem:
                self._item(n)
                return
            if _is_write(n):
                self._write(n, grad)
                return
            self.env[n] = self._call(n, *self._arguments(n, grad))
            if self.track:
                self._lay_out(n)
            if self.track and n.target in VIEWS:
                self._view(n)

    def _arguments(self, n: Node, grad: bool):
        def get(m):
            return self.read(m, grad)

        return substitute(n.args, get), {k: substitute(v, get) for k, v in n.kwargs.items()}

    def _call(self, n: Node, args, kwargs):
        val, canonical = n.meta["val"], CANONICAL.get(n.target)
        if canonical:
            return canonical(self.b, val, *args, **kwargs)
        if isinstance(val, Val):
            args, kwargs = _explicit(n.target, val, args, kwargs)
        return self.b.emit(n.target, args, kwargs)

    def _item(self, n: Node) -> None:
        source, i = n.args
        if source in self.no_grad:
            self.no_grad.add(n)
        self.env[n] = self.env[source][i]
        if self.track and source.target in VIEWS:
            view = VIEWS[source.target](
                *source.args[1:], **source.kwargs, index=i, val=source.args[0].meta["val"]
            )
            self._register(n, source.args[0], view)
            place = 1 if source.target is aten.unbind.int else 2
            if source.args[0] in self.scattered or source.args[place:] not in ((), (0,)):
                self.scattered.add(n)

    def _lay_out(self, n: Node) -> None:
        """Note a value whose elements may lie in another order, or with gaps: torch then copies in reshape and contiguous."""
        if any(m in self.scattered for m in n.all_input_nodes):
            kept = n.target not in _ORDERED and n.target is not aten.alias.default
        else:
            dim = n.args[1] if len(n.args) > 1 and n.target in (aten.select.int, aten.slice.Tensor) else None
            kept = n.target in _SCATTERING and dim != 0
        if kept:
            self.scattered.add(n)

    def _may_copy(self, n: Node) -> bool:
        """True for a reshape of a scattered value, which is a view or a copy as its layout will have it."""
        return n.target in _RESHAPES and n.args[0] in self.scattered and not n.meta.get("view")

    def _view(self, n: Node) -> None:
        if isinstance(n.meta["val"], Val):
            self._register(n, n.args[0], VIEWS[n.target](*n.args[1:], **n.kwargs, val=n.args[0].meta["val"]))

    def _register(self, n: Node, base: Node, view) -> None:
        self.views[n] = _View(base, *view)
        self.seen[n] = self._version(base)

    def _version(self, n: Node) -> int:
        return self.version.get(self._base(n), 0)

    def _base(self, n: Node) -> Node:
        return self._base(self.views[n].base) if n in self.views else n

    def read(self, n: Node, grad: bool) -> Value:
        """The present value of a recorded one, as code in this grad mode sees it."""
        value = self._current(n)
        if grad and n in self.no_grad and isinstance(value, Value):
            key = value.node
            if key not in self.stopped:
                self.stopped[key] = self.b.emit(stop_reverse, (value,))
            return self.stopped[key]
        return value

    def _current(self, n: Node):
        if (writer := self.parted.get(self._base(n))) is not None:
            raise _unknown_layout(writer)
        if n in self.views and self.seen[n] != self._version(n):
            view = self.views[n]
            if self._may_copy(n):
                raise _unknown_layout(self.writer[self._base(n)])
            self.env[n] = view.forward(self.b, self.read(view.base, n not in self.no_grad))
            self.seen[n] = self._version(n)
        return self.env[n]

    def _write(self, n: Node, grad: bool) -> None:
        args, kwargs = self._arguments(n, grad)
        targets, new = _functional(self.b, n, args, kwargs)
        for target, value in zip(targets, new, strict=True):
            if grad:
                self._leave_no_grad(target)
            old = self._current(target)
            if value.dtype != old.dtype:
                value = value.to(old.dtype)
            if value.shape != old.shape:
                value = value.expand(old.shape)
            if not grad and self._base(target) not in self.no_grad:
                value = self.b.emit(graft, (value, old))
            self._store(target, value, n)
        self.env[n] = (
            self._current(targets[0])
            if len(targets) == 1 and isinstance(n.meta["val"], Val)
            else self.env.get(n)
        )

    def _leave_no_grad(self, n: Node) -> None:
        """A tensor made under no_grad is written to under grad: what it held is constant, what is written is not."""
        base = self._base(n)
        self.env[base] = self.read(base, True)
        self.no_grad -= {base, n}

    def _store(self, n: Node, value: Value, writer: Node) -> None:
        if n in self.views and self._may_copy(n):
            base = self._base(n)
            if base.op == "placeholder":
                raise _unknown_layout(writer)
            self.parted[base] = writer  # reading it from here on raises
            del self.views[n]
        if n in self.views:
            view = self.views[n]
            self._store(view.base, view.backward(self.b, self._current(view.base), value), writer)
            self.seen[n] = self._version(n)
        else:
            self.version[n] = self.version.get(n, 0) + 1
            self.writer[n] = writer
        self.env[n] = value


_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.alias.default}
_SCATTERING = {
    *(
        aten.t.default,
        aten.permute.default,
        aten.transpose.int,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
    ),
    *(aten.diagonal.default, aten.unfold.default, aten.as_strided.default),
}
# Their results are laid out in order whatever their operands are.
_ORDERED = {
    *(
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.mv.default,
        aten.dot.default,
    ),
    *(aten.convolution.default, aten.embedding.default, aten.cat.default, aten.native_layer_norm.default),
}


def _unknown_layout(writer: Node) -> errors.NotSupported:
    return errors.NotSupported(
        what="writing in place where reshape or contiguous may have copied (the layout of the tensor is not known)",
        instead="Clone the tensor before it is reshaped and written to.",
        source=writer.meta.get("source"),
    )


def _explicit(op, val: Val, args, kwargs):
    """A call whose result does not depend on the default dtype and device of whoever runs it."""
    arguments = {a.name for a in op._schema.arguments} if isinstance(op, torch._ops.OpOverload) else ()
    given = [x for x in args if isinstance(x, Value)]
    if not given and "dtype" in arguments and not any(map(_holds_values, args)):
        return args, {**kwargs, "dtype": val.dtype, "device": val.device}
    if op in _FROM_INTEGERS and val.dtype.is_floating_point and not any(x.val.differentiable for x in given):
        return tuple(x.to(val.dtype) if isinstance(x, Value) else x for x in args), kwargs
    return args, kwargs


def _holds_values(x) -> bool:
    return isinstance(x, Value) or (isinstance(x, (list, tuple)) and any(map(_holds_values, x)))


# Elementwise ops that take integers and answer in the default dtype.
_FROM_INTEGERS = {
    getattr(getattr(aten, name), overload)
    for name, overload in (
        *((name, "Tensor") for name in "add sub mul div".split()),
        *(
            (name, "default")
            for name in "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp exp2 expm1".split()
        ),
        *(
            (name, "default")
            for name in "log log2 log10 log1p sqrt rsqrt sigmoid erf erfc erfinv lgamma digamma".split()
        ),
        *((name, "default") for name in "reciprocal atan2".split()),
        ("pow", "Tensor_Scalar"),
        ("pow", "Scalar"),
    )
}


def _is_write(n: Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable


def _functional(b: Builder, n: Node, args, kwargs):
    """The written nodes and their new values."""
    op = n.target
    if op in WRITES:
        return [n.args[0]], [WRITES[op](b, *args, **kwargs)]
    name, overload = op._schema.name.split("::")[1], op._overloadname
    targets = [
        n.args[i] if i < len(n.args) else n.kwargs[a.name]
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info and a.alias_info.is_write and (i < len(n.args) or a.name in n.kwargs)
    ]
    kwargs = {
        k: v for k, v in kwargs.items() if not any(a.name == k and a.is_out for a in op._schema.arguments)
    }
    functional = _functional_overload(
        getattr(aten, name[:-1] if name.endswith("_") else name, None), overload, op
    )
    if functional is None:
        raise errors.MissingRule(op=op, rule="functional form", source=n.meta.get("source"))
    out = b.emit(functional, args, kwargs)
    return targets, [out] if isinstance(out, Value) else list(out)


def _first(op) -> str:
    """The type of the first argument: mul.default, for one, takes numbers."""
    return str(op._schema.arguments[0].type)


def _functional_overload(packet, overload: str, op):
    if packet is None:
        return None
    for name in (overload, overload.removesuffix("_out"), overload.removesuffix("out"), "default", "Tensor"):
        candidate = getattr(packet, name, None) if name else None
        if candidate is not None and not candidate._schema.is_mutable and _first(candidate) == _first(op):
            return candidate
    return None


def _put(b: Builder, x, indices, values, accumulate=False):
    """index_put; under a mask, a choice."""
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return b.emit(aten.index_put.default, (x, indices, values, accumulate))
    mask = masks[0]
    if len(indices) > 1 or values.ndim > x.ndim - mask.ndim:
        raise errors.ValueDependent(op="writing to a mask as many elements as it selects")
    mask = mask.reshape([*mask.shape, *[1] * (x.ndim - mask.ndim)])
    return x + mask.where(values, 0.0) if accumulate else mask.where(values, x)


WRITES = {
    aten.index_put_.default: _put,
    aten.copy_.default: lambda b, x, src, non_blocking=False: src,
    aten.fill_.Scalar: lambda b, x, value: b.full(x.val, value),
    aten.fill_.Tensor: lambda b, x, value: value,
    aten.zero_.default: lambda b, x: b.full(x.val, 0),
    aten.normal_.default: lambda b, x, mean=0.0, std=1.0, generator=None: (
        b.emit(aten.randn.default, (list(x.shape),), {"dtype": x.dtype, "device": x.device}) * std + mean
    ),
    aten.uniform_.default: lambda b, x, low=0.0, high=1.0, generator=None: (
        b.emit(aten.rand.default, (list(x.shape),), {"dtype": x.dtype, "device": x.device}) * (high - low)
        + low
    ),
    aten.bernoulli_.float: lambda b, x, p=0.5, generator=None: b.emit(aten.bernoulli.p, (x, p)),
}


# ----- views: how to read one from its base and how to write the base through it ------------------------------------


def _like(op):
    """A view whose inverse is a reshape to the base's shape."""

    def view(*args, val, **kwargs):
        return (
            lambda b, base: _canonical(b, op, base, *args, **kwargs),
            lambda b, base, new: new.reshape(list(val.shape)),
        )

    return view


def _canonical(b: Builder, op, base, *args, **kwargs):
    from .infer import infer

    val = infer(op, (base.val, *args), kwargs)
    return (
        CANONICAL[op](b, val, base, *args, **kwargs) if op in CANONICAL else b.emit(op, (base, *args), kwargs)
    )


def _permuting(op, order):
    def view(*args, val, **kwargs):
        dims = order(val.ndim, *args, **kwargs)
        inverse = [dims.index(i) for i in range(len(dims))]
        return (lambda b, base: base.permute(dims), lambda b, base, new: new.permute(inverse))

    return view


def _scattered(op, scatter):
    def view(*args, val, **kwargs):
        return (
            lambda b, base: b.emit(op, (base, *args), kwargs),
            lambda b, base, new: b.emit(scatter, (base, new, *args), kwargs),
        )

    return view


def _unbound(dim=0, *, index, val):
    return (
        lambda b, base: b.emit(aten.select.int, (base, dim, index)),
        lambda b, base, new: b.emit(aten.select_scatter.default, (base, new, dim, index)),
    )


def _split(size, dim=0, *, index, val):
    sizes = list(size) if isinstance(size, (list, tuple)) else None
    start = sum(sizes[:index]) if sizes else size * index
    length = sizes[index] if sizes else size
    end = start + length
    return (
        lambda b, base: b.emit(aten.slice.Tensor, (base, dim, start, end)),
        lambda b, base, new: b.emit(aten.slice_scatter.default, (base, new, dim, start, end)),
    )


def _inverse(op, inverse):
    """A view of the same elements that another op takes back."""
    return lambda *, val: (lambda b, base: base.call(op), lambda b, base, new: new.call(inverse))


def _unwritable(op):
    def view(*args, val, index=None, **kwargs):
        def refuse(b, base, new):
            raise errors.NotSupported(
                what=f"writing in place through {op}", instead="Clone the tensor before writing to it."
            )

        return (lambda b, base: _canonical(b, op, base, *args, **kwargs), refuse)

    return view


def _detached(*, val):
    return (lambda b, base: b.emit(stop_gradient, (base,)), lambda b, base, new: b.emit(graft, (new, base)))


def _conjugated(*, val):
    return (lambda b, base: base.conj(), lambda b, base, new: new.conj())


VIEWS = {
    aten._conj.default: _conjugated,
    aten._neg_view.default: _unwritable(aten._neg_view.default),
    aten._reshape_alias.default: _like(aten._reshape_alias.default),
    aten.view.default: _like(aten.view.default),
    aten._unsafe_view.default: _like(aten._unsafe_view.default),
    aten.alias.default: _like(aten.alias.default),
    aten.unsqueeze.default: _like(aten.unsqueeze.default),
    aten.squeeze.default: _like(aten.squeeze.default),
    aten.squeeze.dim: _like(aten.squeeze.dim),
    aten.squeeze.dims: _like(aten.squeeze.dims),
    aten.t.default: _permuting(aten.t.default, lambda n: [1, 0][:n] if n == 2 else list(range(n))),
    aten.permute.default: _permuting(aten.permute.default, lambda n, dims: [d % n for d in dims]),
    aten.transpose.int: _permuting(aten.transpose.int, lambda n, i, j: _swapped(n, i, j)),
    aten.select.int: _scattered(aten.select.int, aten.select_scatter.default),
    aten.slice.Tensor: _scattered(aten.slice.Tensor, aten.slice_scatter.default),
    aten.diagonal.default: _scattered(aten.diagonal.default, aten.diagonal_scatter.default),
    aten.unbind.int: _unbound,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.expand.default: _unwritable(aten.expand.default),
    aten.as_strided.default: _unwritable(aten.as_strided.default),
    aten.unfold.default: _unwritable(aten.unfold.default),
    aten.view.dtype: _unwritable(aten.view.dtype),
    aten.view_as_real.default: _inverse(aten.view_as_real.default, aten.view_as_complex.default),
    aten.view_as_complex.default: _inverse(aten.view_as_complex.default, aten.view_as_real.default),
    stop_gradient: _detached,
}


def _swapped(n: int, i: int, j: int) -> list[int]:
    order = list(range(n))
    if n:
        order[i % n], order[j % n] = order[j % n], order[i % n]
    return order


# ----- one spelling each ----------------------------------------------------------------------------------------------


def _reshape(b: Builder, val: Val, x, *args, **kwargs):
    return x.reshape(list(val.shape))


def _identity(b: Builder, val: Val, x, *args, **kwargs):
    return x


def _filled(fill):
    return lambda b, val, *args, **kwargs: b.full(val, fill)


def _copy(b: Builder, val: Val, x, **kwargs):
    if val.device != x.device:
        return b.emit(aten._to_copy.default, (x,), {"dtype": val.dtype, "device": val.device})
    return b.emit(aten._to_copy.default, (x,), {"dtype": val.dtype}) if val.dtype != x.dtype else x


def _places(x: Value, size, stride, storage_offset=None) -> Value:
    """The elements that as_strided names, by their places in the dense tensor: values have no strides."""
    if any(isinstance(s, Dim) for s in (*x.shape, *size, *stride)):
        raise errors.DynamicShape(what="the strides given to as_strided")
    with hermetic():
        places = torch.arange(numel(x.shape)).as_strided(size, stride, storage_offset or 0)
        return x.builder.constant(places.to(x.device))


def _strided(b: Builder, val: Val, x, *where):
    return x.reshape([-1]).call(aten.index.Tensor, [_places(x, *where)])


def _strided_scatter(b: Builder, val: Val, x, src, *where):
    return x.reshape([-1]).call(aten.index_put.default, [_places(x, *where)], src).reshape(list(x.shape))


CANONICAL = {
    aten.index_put.default: lambda b, val, *args, **kwargs: _put(b, *args, **kwargs),
    **dict.fromkeys(
        [
            aten.view.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.reshape.default,
        ],
        _reshape,
    ),
    **dict.fromkeys(
        [aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default], _identity
    ),
    **dict.fromkeys(
        [
            aten.zeros.default,
            aten.zeros_like.default,
            aten.new_zeros.default,
            aten.empty.memory_format,
            aten.empty_like.default,
            aten.new_empty.default,
            aten.empty_strided.default,
            aten.new_empty_strided.default,
        ],
        _filled(0),
    ),
    **dict.fromkeys([aten.ones.default, aten.ones_like.default, aten.new_ones.default], _filled(1)),
    aten.full.default: lambda b, val, size, fill, **kwargs: b.full(val, fill),
    aten.full_like.default: lambda b, val, x, fill, **kwargs: b.full(val, fill),
    aten.new_full.default: lambda b, val, x, size, fill, **kwargs: b.full(val, fill),
    aten.scalar_tensor.default: lambda b, val, fill, **kwargs: b.full(val, fill),
    aten._conj.default: lambda b, val, x: x.conj(),
    aten._neg_view.default: lambda b, val, x: -x,
    aten.t.default: lambda b, val, x: x.permute([1, 0]) if x.ndim == 2 else x,
    aten.transpose.int: lambda b, val, x, i, j: x.permute(_swapped(x.ndim, i, j)),
    aten._to_copy.default: _copy,
    aten.expand.default: lambda b, val, x, *args, **kwargs: x.expand(list(val.shape)),
    aten.as_strided.default: _strided,
    aten.as_strided_scatter.default: _strided_scatter,
    aten.rsub.Scalar: lambda b, val, x, other, alpha=1: b.emit(aten.neg.default, (x * alpha,)) + other,
}
