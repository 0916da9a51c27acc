"""Ops with many spellings, as functional calls of one: `CANONICAL` (view -> reshape, zeros_like -> full ...), `explicit` (no
default dtype), `new_values` (of what a call writes to), `VIEWS` (how to read one from its base and write the base through it).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from . import errors
from .dims import Dim, numel
from .graph import Val, graft, stop_gradient
from .infer import hermetic, infer
from .record import Builder, Value

aten = torch.ops.aten


# ----- one spelling each ----------------------------------------------------------------------------------------------


def _swapped(n: int, i: int, j: int) -> list[int]:
    order = list(range(n))
    if n:
        order[i % n], order[j % n] = order[j % n], order[i % n]
    return order


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


def explicit(op, val: Val, args, kwargs):
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


# ----- writes --------------------------------------------------------------------------------------------------------


def is_write(n: Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable


def new_values(b: Builder, n: Node, args, kwargs):
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
