"""Random draws: primal values without derivatives, one draw per example under randomness="different"."""

from __future__ import annotations

from ..record import aten
from .batching import draw
from .table import composite, rule, zero

for _op in (
    aten.rand,
    aten.randn,
    aten.randint,
    aten.rand_like,
    aten.randn_like,
    aten.randint_like,
    aten.normal,
    aten.bernoulli,
    aten.poisson,
    aten.exponential,
    aten.cauchy,
    aten.geometric,
    aten.log_normal,
    aten.uniform,
    aten.random,
):
    for _name in _op.overloads():
        tensor_bound = (
            _op is aten.randint_like and "Tensor" in _name
        )  # a bound read from a tensor's value: cannot be captured
        if not getattr(_op, _name)._schema.is_mutable and not tensor_bound:
            zero(getattr(_op, _name), batch=draw)


def _permutations(ctx, op, args, kwargs):
    """One permutation per example: the order of uniform draws."""
    device = ctx.out.device
    keys = ctx.b.emit(aten.rand.default, ([ctx.length, *ctx.out.shape],), {"device": device})
    return keys.call(aten.argsort.default, -1).to(ctx.out.dtype)


def _multinomial(ctx, op, args, kwargs):
    p = args[0]
    x = ctx.lift(p)
    rows = x.reshape([ctx.length * p.shape[0], p.shape[1]]) if p.ndim == 2 else x
    return ctx.b.emit(op, (rows, *args[1:]), kwargs).reshape([ctx.length, *ctx.out.shape])


zero(aten.randperm.default, batch=_permutations)
zero(aten.multinomial.default, batch=_multinomial)


def _dropped(t, y, x, p, train=None):
    """The tangent under the mask that was drawn."""
    if train is False:
        return t, None
    return t * y[1].to(t.dtype) * (0.0 if p == 1 else 1 / (1 - p)), None


rule(
    aten.native_dropout.default,
    jvp=[_dropped],
    batch=lambda ctx, op, args, kwargs: ctx.b.emit(op, (ctx.lift(args[0]), *args[1:]), kwargs),
)
composite(aten.native_dropout_backward.default, lambda ct, mask, scale: ct * mask.to(ct.dtype) * scale)
