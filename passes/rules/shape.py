"""Views, joins and splits."""

from __future__ import annotations

import torch

from ..record import Value, aten
from .batching import along, expand, permute, reshape
from .table import Undefined, composite, linear, rule

linear(aten.reshape.default, lambda ct, a, shape: ct.reshape(list(a.shape)), batch=reshape)
linear(aten.permute.default, lambda ct, a, dims: ct.permute(_inverse(a, dims)), batch=permute)
linear(aten.expand.default, lambda ct, a, shape, **kwargs: ct, batch=expand)
linear(
    aten.flip.default,
    lambda ct, a, dims: ct.flip(dims),
    batch=lambda ctx, op, args, kwargs: along("dims")(ctx, op, args, kwargs) if args[1] else args[0].x,
)
linear(
    aten.roll.default,
    lambda ct, a, shifts, dims=(): ct.roll([-s for s in _list(shifts)], list(dims)),
    batch=lambda ctx, op, args, kwargs: _roll(ctx, op, args, kwargs),
)
linear(
    aten.view_as_real.default,
    lambda ct, a: ct.call(aten.view_as_complex.default),
    batch=lambda ctx, op, args, kwargs: args[0].x.call(op),
)
linear(
    aten.view_as_complex.default,
    lambda ct, a: ct.call(aten.view_as_real.default),
    batch=lambda ctx, op, args, kwargs: args[0].x.call(op),
)


def _list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _inverse(a, dims) -> list[int]:
    dims = [d % a.ndim for d in dims]
    return [dims.index(i) for i in range(len(dims))]


def _roll(ctx, op, args, kwargs):
    a, shifts, dims = (*args, ())[:3]
    if dims:
        return along("dims")(ctx, op, args, kwargs)
    flat = a.x.reshape([a.x.shape[0], -1])
    return flat.call(op, _list(shifts), [1]).reshape(list(a.x.shape))


def zeros_like(ct, a):
    """Zeros of the shape of an argument."""
    return ct.full(a.shape, 0)


# ----- windows --------------------------------------------------------------------------------------------------------
linear(
    aten.select.int,
    lambda ct, a, dim, i: zeros_like(ct, a).call(aten.select_scatter.default, ct, dim, i),
    batch=along("dim"),
)
linear(
    aten.slice.Tensor,
    lambda ct, a, dim=0, start=None, end=None, step=1: zeros_like(ct, a).call(
        aten.slice_scatter.default, ct, dim, start, end, step
    ),
    batch=along("dim"),
)
linear(
    aten.diagonal.default,
    lambda ct, a, offset=0, dim1=0, dim2=1: zeros_like(ct, a).call(
        aten.diagonal_scatter.default, ct, offset, dim1, dim2
    ),
    batch=along("dim1", "dim2"),
)


def _scatter_rule(scatter, read):
    """x with a window replaced: linear in both."""

    def into(ct, a, src, *window, **kw):
        return ct.call(scatter, ct.full(src.shape, 0), *window, **kw)

    def of(ct, a, src, *window, **kw):
        return ct.call(read, *window, **kw)

    def jvp(ts, y, a, src, *window, **kw):
        t, s = ts[0], ts[1]
        return (t if t is not None else a.full(a.shape, 0)).call(
            scatter, s if s is not None else a.full(src.shape, 0), *window, **kw
        )

    names = ("dim1", "dim2") if scatter is aten.diagonal_scatter.default else ("dim",)
    rule(scatter, jvp=jvp, transpose=[into, of], batch=_both_along(*names))


def _both_along(*names):
    """`along` with dims counted on the first argument."""

    def batch(ctx, op, args, kwargs):
        first, second, *window = args
        rank = first.ndim
        given = {a.name: i - 2 for i, a in enumerate(op._schema.arguments) if i >= 2}
        window = [
            w if next(k for k, i in given.items() if i == j) not in names else w % rank + 1
            for j, w in enumerate(window)
        ]
        for name in names:
            if given[name] >= len(window):
                default = op._schema.arguments[given[name] + 2].default_value
                kwargs = {**kwargs, name: kwargs.get(name, default) % rank + 1}
        return ctx.b.emit(op, (ctx.lift(first), ctx.lift(second), *window), kwargs)

    return batch


_scatter_rule(aten.select_scatter.default, aten.select.int)
_scatter_rule(aten.slice_scatter.default, aten.slice.Tensor)
_scatter_rule(aten.diagonal_scatter.default, aten.diagonal.default)


# ----- joining and splitting ------------------------------------------------------------------------------------------


def _cat_jvp(ts, y, xs, dim=0):
    parts = [t if t is not None else x.full(x.shape, 0, y.dtype) for t, x in zip(ts[0], xs, strict=True)]
    return y.builder.emit(aten.cat.default, (parts, dim))


def _cat_transpose(ct, xs, dim=0):
    out, start = [], 0
    for x in xs:
        if x.shape == (0,) and ct.ndim != 1:  # torch's legacy empty tensor joins anything
            out.append(ct.full((0,), 0))
            continue
        size = x.shape[dim]
        out.append(ct.call(aten.slice.Tensor, dim, start, start + size) if isinstance(x, Undefined) else None)
        start = start + size
    return out


rule(aten.cat.default, jvp=_cat_jvp, transpose=[_cat_transpose], batch=along("dim"))


def _stack(xs, dim=0):
    dim = dim % (xs[0].ndim + 1)
    parts = [x.reshape([*x.shape[:dim], 1, *x.shape[dim:]]) for x in xs]
    return xs[0].builder.emit(aten.cat.default, (parts, dim))


composite(aten.stack.default, _stack)


def _split_with_sizes(a, sizes, dim=0):
    out, start = [], 0
    for size in sizes:
        out.append(a.call(aten.slice.Tensor, dim, start, start + size))
        start += size
    return tuple(out)


def _split(a, size, dim=0):
    total = a.shape[dim]
    return _split_with_sizes(a, [min(size, total - i) for i in range(0, total, size)] or [0], dim)


composite(aten.split_with_sizes.default, _split_with_sizes)
composite(aten.split.Tensor, _split)
composite(
    aten.unbind.int, lambda a, dim=0: tuple(a.call(aten.select.int, dim, i) for i in range(a.shape[dim]))
)


def _constant_pad(ct, a, pad, value=0):
    """Crop; negative pads cropped the input."""
    for i in range(0, len(pad), 2):
        dim = a.ndim - 1 - i // 2
        lo, hi, size = pad[i], pad[i + 1], a.shape[dim]
        ct = ct.call(aten.slice.Tensor, dim, max(lo, 0), max(lo, 0) + size + min(lo, 0) + min(hi, 0))
        if lo < 0 or hi < 0:
            ct = ct.call(aten.constant_pad_nd.default, [0, 0] * (i // 2) + [max(-lo, 0), max(-hi, 0)], 0)
    return ct


def _pad_batch(ctx, op, args, kwargs):
    return ctx.b.emit(op, (args[0].x, *args[1:]), kwargs)


rule(
    aten.constant_pad_nd.default,
    jvp=[lambda t, y, a, pad, value=0: t.call(aten.constant_pad_nd.default, pad, 0)],
    transpose=[_constant_pad],
    batch=_pad_batch,
)
composite(aten.repeat.default, lambda a, repeats: _repeat(a, list(repeats)))


def _repeat(a: Value, repeats):
    shape = [1] * (len(repeats) - a.ndim) + list(a.shape)
    grown = a.reshape([x for s in shape for x in (1, s)]).expand(
        [x for r, s in zip(repeats, shape, strict=True) for x in (r, s)]
    )
    return grown.reshape([r * s for r, s in zip(repeats, shape, strict=True)])


for _op in (aten.tril, aten.triu):
    linear(
        _op.default,
        (lambda op: lambda ct, a, diagonal=0: ct.call(op, diagonal))(_op.default),
        batch=_pad_batch,
    )


def _linspace(start, end, steps, dtype=None, **how):
    """Between bounds that are tensors, as ATen writes it: each half from its own end, integers between bounds cut to integers."""
    like = start if isinstance(start, Value) else end
    dtype = dtype or torch.get_default_dtype()
    exact = not (dtype.is_floating_point or dtype.is_complex)
    wide = torch.float64 if exact else dtype
    cast = lambda x: x.to(dtype).to(wide) if isinstance(x, Value) else int(x) if exact else x
    start, end = cast(start), cast(end)
    index = like.builder.emit(aten.arange.default, (steps,), {"dtype": wide.to_real(), "device": like.device})
    step = (end - start) / max(steps - 1, 1)
    from_start, from_end = start + step * index, end - step * (steps - 1 - index)
    return index.lt(max(steps // 2, 1)).where(from_start, from_end).to(dtype)


for _op in (aten.linspace.Tensor_Tensor, aten.linspace.Tensor_Scalar, aten.linspace.Scalar_Tensor):
    composite(_op, _linspace)
