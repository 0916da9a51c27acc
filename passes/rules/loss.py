"""Losses, as compositions: PyTorch's choices at ties and bounds are those of the ops they are written with."""

from __future__ import annotations

import torch

from ..dims import numel
from ..record import Value, aten
from .composed import paired
from .indexing import arange
from .table import composite, rule

NONE, MEAN, SUM = 0, 1, 2


def _reduced(x, reduction):
    """reduction: 0 none, 1 mean, 2 sum."""
    return x if reduction == NONE else x.sum() if reduction == SUM else x.sum() / numel(x.shape)


def _square(x):
    return x * x


def _smooth(a, b, reduction=MEAN, beta=1.0):
    d = a - b
    return _reduced(
        d.abs() if beta == 0 else d.abs().lt(beta).where(d * d * (0.5 / beta), d.abs() - 0.5 * beta),
        reduction,
    )


def _huber(a, b, reduction=MEAN, delta=1.0):
    d = a - b
    return _reduced(d.abs().le(delta).where(d * d * 0.5, (d.abs() - 0.5 * delta) * delta), reduction)


def _cross(p, target, weight=None, reduction=MEAN):
    """Logarithms are cut at -100, as in torch."""
    loss = (target - 1) * (1 - p).log().clamp_min(-100) - target * p.log().clamp_min(-100)
    return _reduced(loss if weight is None else loss * weight, reduction)


def _cross_with_logits(x, target, weight=None, pos_weight=None, reduction=MEAN):
    log = x.call(aten.log_sigmoid_forward.default)[0]
    scale = log if pos_weight is None else log * ((pos_weight - 1) * target + 1)
    loss = (1 - target) * x - scale
    return _reduced(loss if weight is None else loss * weight, reduction)


composite(aten.mse_loss.default, lambda a, b, reduction=MEAN: _reduced(_square(a - b), reduction))
composite(aten.smooth_l1_loss.default, _smooth)
composite(aten.huber_loss.default, _huber)
composite(aten.binary_cross_entropy.default, _cross)
composite(aten.binary_cross_entropy_with_logits.default, _cross_with_logits)
composite(
    aten.soft_margin_loss.default, lambda a, y, reduction=MEAN: _reduced((-y * a).exp().log1p(), reduction)
)


def _nll(x, target, weight, reduction, ignore_index):
    """Negative log likelihood, classes at axis 1 (axis 0 of a vector): (loss, total weight)."""
    dim = min(x.ndim - 1, 1)
    ignored = target.eq(ignore_index)
    index = (
        ignored.where(0, target) if target.dtype == torch.int64 else ignored.where(0, target.to(torch.int64))
    )
    unit = [*index.shape[:dim], 1, *index.shape[dim:]]
    picked = x.call(aten.gather.default, dim, index.reshape(unit)).reshape(list(index.shape))
    w = x.full(index.shape, 1) if weight is None else _weights(weight, index)
    w = ignored.where(0.0, w)
    loss = ignored.where(0.0, -picked) * w
    if reduction == NONE:
        return loss, x.full([], 0)
    return (loss.sum() / w.sum() if reduction == MEAN else loss.sum()), w.sum()


def _weights(weight: Value, index: Value):
    return weight.call(aten.index.Tensor, [index])


composite(aten.nll_loss_forward.default, _nll)
composite(aten.nll_loss2d_forward.default, _nll)


# ----- margins: nothing flows at the margin itself, as in torch ---------------------------------------------------------


def _positive(x):
    return x.gt(0).where(x, 0.0)


def _rows(x):
    return x if x.ndim == 2 else x.reshape([1, -1])


def _multi_margin(x, target, p=1, margin=1, weight=None, reduction=MEAN):
    """How far each other class comes within the margin of the target's."""
    rows, index = _rows(x), target.reshape([-1, 1])
    gap = _positive(rows - rows.call(aten.gather.default, 1, index) + margin)
    gap = gap if p == 1 else _square(gap)
    gap = gap if weight is None else gap * _weights(weight, index)
    others = arange(index, rows.shape[1]).ne(index)
    loss = others.where(gap, 0.0).sum([1]) / rows.shape[1]
    return _reduced(loss if x.ndim == 2 else loss.reshape(list(target.shape)), reduction)


def _multilabel_margin(x, target, reduction):
    """(loss, which classes are targets): how far each other class comes within 1 of each target, up to the first -1."""
    rows, index = _rows(x), _rows(target)
    given = index.lt(0).to(torch.int64).call(aten.cumsum.default, 1).eq(0)
    index = given.where(index, 0)
    hits = rows.full(rows.shape, 0).call(aten.scatter_add.default, 1, index, given.to(x.dtype)).gt(0)
    n, c = rows.shape
    gap = _positive(1 - rows.call(aten.gather.default, 1, index).reshape([n, c, 1]) + rows.reshape([n, 1, c]))
    counts = given.reshape([n, c, 1]) & ~hits.reshape([n, 1, c])
    loss = counts.where(gap, 0.0).sum([1, 2]) / c
    loss = _reduced(loss if x.ndim == 2 else loss.reshape([]), reduction)
    return loss, hits.to(x.dtype).reshape(list(x.shape))


composite(aten.multi_margin_loss.default, _multi_margin)
composite(aten.multilabel_margin_loss_forward.default, _multilabel_margin)


# ----- connectionist temporal classification: the first derivative by ATen's kernel, no others --------------------------
CTC, CTC_BACKWARD = aten._ctc_loss.default, aten._ctc_loss_backward.default


def _ctc_tangent(ts, y, x, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    lengths, how = (list(input_lengths), list(target_lengths)), (blank, zero_infinity)
    pull = lambda x, targets, loss, alpha, ct: ct.call(CTC_BACKWARD, x, targets, *lengths, loss, alpha, *how)
    return paired(str(CTC), ts[0], y[0].val, None, pull, x, targets, *y), None


def _ctc_rows(ctx, x, targets, *lengths):
    """Sequences of all examples side by side: [n, T, N, C] -> [T, n N, C]."""
    n, (steps, rows, classes) = ctx.length, x.shape
    moved = ctx.lift(x).movedim(0, 1).reshape([steps, n * rows, classes])
    aims = ctx.lift(targets)
    return moved, aims.reshape([n * aims.shape[1], *aims.shape[2:]]), *(list(sizes) * n for sizes in lengths)


def _ctc_batch(ctx, op, args, kwargs):
    found = ctx.b.emit(op, (*_ctc_rows(ctx, *args[:4]), *args[4:]), kwargs)
    return tuple(o.reshape([ctx.length, *v.shape]) for o, v in zip(found, ctx.out, strict=True))


def _ctc_backward_batch(ctx, op, args, kwargs):
    ct, x, targets, input_lengths, target_lengths, *saved, blank, zero_infinity = args
    flat = lambda v: ctx.lift(v).reshape([ctx.length * v.shape[0], *v.shape[1:]])
    rows = _ctc_rows(ctx, x, targets, input_lengths, target_lengths)
    out = ctx.b.emit(op, (flat(ct), *rows, *map(flat, saved), blank, zero_infinity), kwargs)
    return out.reshape([x.shape[0], ctx.length, *x.shape[1:]]).movedim(1, 0)


rule(CTC, jvp=_ctc_tangent, batch=_ctc_batch)
rule(CTC_BACKWARD, batch=_ctc_backward_batch)
