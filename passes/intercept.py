"""Calls that a capture does not record as they come. Tables: `DISPATCH` by ATen overload, `FUNCTIONS` by torch function.

A handler of DISPATCH gets the recorder and the call and gives what the call returns. One of FUNCTIONS stands in for a torch
function whose meaning is lost below it: requires_grad, reading a value, indexing with tracers.
"""

from __future__ import annotations

import functools
import math

import torch

from . import errors
from .concrete import is_mask, value_of
from .graph import Literal, constant, stop_gradient
from .infer import hermetic
from .tracer import Tracer, current, lies_dense, tracked

aten = torch.ops.aten


def _item(recorder, func, x):
    if (value := value_of(x)) is None:
        raise errors.ValueDependent(op="Tensor.item() or bool(tensor)")
    return value.item()


def _lift_fresh(recorder, func, x):
    if isinstance(x, Tracer):
        return x
    with hermetic():
        return recorder.emit(constant, (Literal(x),))


def _detach(recorder, func, x):
    """Tracers get no detach from autograd, but torch's own formulas of derivatives (no user's code) have some."""
    value = recorder.lift(x)
    return recorder.emit(stop_gradient, (value,)) if recorder.user_code else Tracer(recorder, value)


def _batch_norm(recorder, func, x, w, b, mean, var, training, momentum, eps):
    """Batch norm writes to its running statistics without saying so: the functional form and two writes."""

    def call(op, *args):
        return recorder.__torch_dispatch__(op, (), args)

    if not training:
        return call(aten._native_batch_norm_legit_no_training.default, x, w, b, mean, var, momentum, eps)
    if mean is None:
        return call(aten._native_batch_norm_legit.no_stats, x, w, b, True, momentum, eps)
    *out, new_mean, new_var = call(
        aten._native_batch_norm_legit_functional.default, x, w, b, mean, var, True, momentum, eps
    )
    for statistics, new in ((mean, new_mean), (var, new_var)):
        call(aten.copy_.default, statistics, recorder.emit(stop_gradient, (new.value,)))
    return tuple(out)


def _cudnn_batch_norm(recorder, func, *args):
    return (
        *_batch_norm(recorder, func, *args),
        recorder.__torch_dispatch__(aten.new_empty.default, (), (args[0], [0])),
    )


def _batch_norm_with_update(recorder, func, x, w, b, mean, var, momentum, eps):
    found = _batch_norm(recorder, func, x, w, b, mean, var, True, momentum, eps)
    reserve = {"dtype": torch.uint8}
    return (*found, recorder.__torch_dispatch__(aten.new_empty.default, (), (x, [0]), reserve))


def _rrelu(recorder, func, x, noise, lower=1 / 8, upper=1 / 3, training=False, generator=None):
    """Slopes below zero are drawn, and kept in `noise`."""
    with torch.overrides.enable_reentrant_dispatch(), recorder:
        if not training:
            return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
        drawn = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        slope = torch.where(x <= 0, drawn * (upper - lower) + lower, 1.0)
        noise.copy_(slope)
        return x * slope


def _rrelu_(recorder, func, x, *args, **kwargs):
    y = _rrelu(recorder, func, x, *args, **kwargs)
    return recorder.__torch_dispatch__(aten.copy_.default, (), (x, y))


def _weight_norm(recorder, func, v, g, dim=0):
    """The fused kernel, which has the first derivative only: (weight, norms)."""
    with torch.overrides.enable_reentrant_dispatch(), recorder:
        norms = torch.norm_except_dim(v, 2, dim)
        return v * (g / norms), norms


def _packed_sequence(recorder, func, *args):
    raise errors.NotSupported(
        what="torch.nn.utils.rnn.pack_padded_sequence, whose result has sizes that depend on values,",
        instead="Run the padded sequences, and mask what comes after their ends.",
    )


def _linalg_check(recorder, func, info, api_name, *, is_matrix):
    """torch.linalg raises where a matrix is singular or not positive definite; a graph has NaN there, as in JAX."""
    if (value := value_of(info)) is not None:
        func(value, api_name, is_matrix=is_matrix)
        return
    if not any(t is info for t in recorder.results):
        raise errors.ValueDependent(op=func)
    failed = recorder.builder.emit(aten.ne.Scalar, (info.value, 0))
    for t in recorder.results:
        if t is not None and t.value.val.differentiable:
            shape = [*info.value.shape, *[1] * (t.ndim - info.ndim)]
            t.value = failed.reshape(shape).where(math.nan, t.value)


def _fused_attention(recorder, func, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """The kernel for CPUs, where torch's own Python functions lead to it: (output, logsumexp)."""
    with torch.overrides.enable_reentrant_dispatch(), recorder:
        out = _attention(q, k, v, attn_mask, dropout_p, is_causal, scale)
        scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(
                torch.ones_like(scores, dtype=torch.bool).tril().logical_not(), -math.inf
            )
        if attn_mask is not None:
            scores = (
                scores.masked_fill(attn_mask.logical_not(), -math.inf)
                if is_mask(attn_mask)
                else scores + attn_mask
            )
        return out, scores.logsumexp(-1)


# Functions from an op of a library to its handler, or None; fxfunc/custom.py adds one.
OF_LIBRARY: list = []
DISPATCH = {
    aten._linalg_check_errors.default: _linalg_check,
    aten._weight_norm_interface.default: _weight_norm,
    aten._pack_padded_sequence.default: _packed_sequence,
    aten._embedding_bag_forward_only.default: lambda recorder, func, *args: recorder._record(
        aten._embedding_bag.default, *args
    ),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _fused_attention,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten._batch_norm_with_update.default: _batch_norm_with_update,
    aten.rrelu_with_noise.default: _rrelu,
    aten.rrelu_with_noise_.default: _rrelu_,
    aten._local_scalar_dense.default: _item,
    aten.lift_fresh.default: _lift_fresh,
    aten.lift_fresh_copy.default: _lift_fresh,
    aten.lift.default: _lift_fresh,
    aten.detach.default: _detach,
}


def _detach_in_place(x):
    x.value, x.tracks = _own(x, "detach_()").recorder.emit(stop_gradient, (x.value,)).value, False
    return x


def _requires_grad_(x, requires_grad=True):
    _own(x, "requires_grad_()").tracks = requires_grad
    return x


def _own(x, what: str) -> Tracer:
    """A tensor of the innermost capture; changing the state of another one would outlive it."""
    if not (isinstance(x, Tracer) and x.recorder is current()):
        raise errors.UnsupportedInside(
            what=f"{what} of a tensor made outside of it", instead="Call it on a tensor made inside."
        )
    return x


def _contiguous(x, memory_format=torch.contiguous_format):
    y = x.contiguous(memory_format=memory_format)
    if isinstance(y, Tracer) and memory_format is torch.contiguous_format:
        y = aten.alias.default(y)
        y.dense = True
    return y


def _view(x, *args, **kwargs):
    """A view by the user's word: unlike reshape, torch would raise rather than copy."""
    y = x.view(*args, **kwargs)
    if isinstance(y, Tracer):
        y.value.node.meta["view"] = True
    return y


def _strides(function, x, *args, **kwargs):
    if not lies_dense(x):
        raise errors.NotSupported(
            what="as_strided of a tensor whose strides are not known",
            instead="Call .contiguous() first, or use unfold, diagonal or indexing.",
        )
    return function(x, *args, **kwargs)


def _lstsq(a, b, rcond=None, *, driver=None):
    """By the pseudo-inverse; of a tall matrix that has full rank, as torch's drivers assume or find."""
    vector = b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]
    columns = b.unsqueeze(-1) if vector else b
    x = torch.linalg.pinv(a, rtol=rcond) @ columns
    tall = a.shape[-2] > a.shape[-1]
    residuals = (a @ x - columns).abs().square().sum(-2) if tall else a.real.new_zeros([0])
    ranks = driver != "gels"
    rank = (
        torch.linalg.matrix_rank(a, rtol=rcond)
        if ranks
        else torch.zeros([0], dtype=torch.int64, device=a.device)
    )
    values = torch.linalg.svdvals(a) if driver in ("gelsd", "gelss") else a.real.new_zeros([0])
    return torch.return_types.linalg_lstsq((x.squeeze(-1) if vector else x, residuals, rank, values))


def _one_hot(x, num_classes=-1):
    if num_classes < 0:
        if value_of(x) is None:
            raise errors.ValueDependent(op="torch.nn.functional.one_hot without num_classes")
        num_classes = int(value_of(x).max()) + 1
    return torch.eq(x.unsqueeze(-1), torch.arange(num_classes, device=x.device)).to(torch.int64)


def _ctc_loss(x, targets, input_lengths, target_lengths, blank=0, reduction=1, zero_infinity=False):
    """torch's own makes a tensor of the lengths where no mode sees it."""
    batched, lengths = x.ndim == 3, (_lengths(input_lengths), _lengths(target_lengths))
    rows = (x, targets) if batched else (x.unsqueeze(1), targets.unsqueeze(0))
    loss = aten._ctc_loss.default(*rows, *lengths, blank, zero_infinity)[0]
    if zero_infinity:
        loss = torch.where(loss == math.inf, 0.0, loss)
    if reduction == 1:
        return (loss / torch.tensor(lengths[1], dtype=x.dtype, device=x.device).clamp_min(1)).mean()
    return loss.sum() if reduction == 2 else loss if batched else loss.squeeze(0)


def _named_ctc_loss(
    log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False
):
    """torch.nn.functional's, whose reduction has a name."""
    how = ("none", "mean", "sum").index(reduction)
    return _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, how, zero_infinity)


def _lengths(x) -> list[int]:
    found = _tolist(x) if isinstance(x, torch.Tensor) else x
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Written with matmul and softmax, which have every derivative; the fused kernels have the first only."""
    if is_mask(attn_mask):  # torch makes it one of numbers before it calls the op below
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
    how = {"scale": scale, "enable_gqa": enable_gqa}
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, **how
    )[0]


def _getitem(x, index):
    """x[index]; a 0-d integer tensor, whose value torch would ask for, picks by a list of one."""
    items = list(index) if isinstance(index, tuple) else [index]
    places = [k for k, i in enumerate(items) if _is_element(i)]
    for k in places:
        axis = sum(map(_axes, items[:k]))
        if any(i is Ellipsis for i in items[:k]):
            axis = x.ndim - sum(map(_axes, items[k:]))
        x, items[k] = x[(slice(None),) * axis + (items[k].unsqueeze(0),)], 0
    return x[tuple(items)] if places else x[index]


def _setitem(x, index, value):
    """x[index] = value; 0-d integer tensors as in _getitem, if the index is nothing else."""
    items = index if isinstance(index, tuple) else (index,)
    if items and all(map(_is_element, items)):
        x.index_put_(items, torch.as_tensor(value, dtype=x.dtype, device=x.device))
    else:
        x[index] = value


def _is_element(index) -> bool:
    return isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype in _INTEGERS


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _axes(index) -> int:
    """How many axes one item of an index takes."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    return index.ndim if isinstance(index, torch.Tensor) and is_mask(index) else 1


def _from_data(make, copies: bool):
    """torch.tensor and its kin: a list of tensors would be read by value; a copy is a constant to every derivative."""

    def call(*args, **kwargs):
        given = [*args, *kwargs.values()]
        if any(map(_lists_unknown, given)):
            raise errors.ValueDependent(op=f"{make.__name__} of a list of tensors; torch.stack takes one")
        out = make(*map(_known, args), **kwargs)
        return out.detach() if copies and any(isinstance(x, Tracer) for x in given) else out

    return call


def _lists_unknown(x) -> bool:
    """Tensors within lists, the values of some not being known."""
    return isinstance(x, (list, tuple)) and any(
        value_of(y) is None if isinstance(y, torch.Tensor) else _lists_unknown(y) for y in x
    )


def _known(x):
    """An argument with the tensors within its lists as what they hold."""
    if not isinstance(x, (list, tuple)):
        return x
    return [value_of(y) if isinstance(y, torch.Tensor) else _known(y) for y in x]


def _format(x, spec):
    if not spec:
        return repr(x)
    if value_of(x) is None:
        raise errors.ValueDependent(op="format(tensor)")
    return format(value_of(x), spec)


def _tolist(x):
    if value_of(x) is None:
        raise errors.ValueDependent(op="Tensor.tolist()")
    return value_of(x).tolist()


def _data_ptr(x):
    if isinstance(x, Tracer):
        raise errors.UnsupportedInside(what="Tensor.data_ptr()", instead="Compare tensors with `is`.")
    return x.data_ptr()


def _refuse_function(what: str, instead: str):
    def refuse(*args, **kwargs):
        raise errors.UnsupportedInside(what=what, instead=instead)

    return refuse


def _refuse_value(what: str):
    def refuse(*args, **kwargs):
        raise errors.ValueDependent(op=what)

    return refuse


def _autograd_grad(*args, **kwargs):
    from .autograd import grad

    return grad(*args, **kwargs)


_backward = _refuse_function(
    "Tensor.backward(), which leaves gradients in .grad,",
    "Use torch.autograd.grad, or fxfunc.grad, which nests.",
)
FUNCTIONS = {
    torch.Tensor.data.__get__: torch.Tensor.detach,
    torch.Tensor.detach_: _detach_in_place,
    torch.detach_: _detach_in_place,
    torch.Tensor.requires_grad.__get__: tracked,
    torch.Tensor.requires_grad.__set__: _requires_grad_,
    torch.Tensor.requires_grad_: _requires_grad_,
    torch.autograd.grad: _autograd_grad,
    torch.autograd.backward: _backward,
    torch.Tensor.backward: _backward,
    torch.Tensor.data.__set__: _refuse_function("assigning to .data", "Use copy_ or return the new value."),
    torch.Tensor.numpy: _refuse_value("Tensor.numpy()"),
    torch.Tensor.tolist: _tolist,
    torch.Tensor.__array__: _refuse_value("numpy.asarray(tensor)"),
    torch.Tensor.__format__: _format,
    torch.Tensor.data_ptr: _data_ptr,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.__setitem__: _setitem,
    torch.tensor: _from_data(torch.tensor, copies=True),
    torch.Tensor.new_tensor: _from_data(torch.Tensor.new_tensor, copies=True),
    torch.as_tensor: _from_data(torch.as_tensor, copies=False),
    torch.asarray: _from_data(torch.asarray, copies=False),
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.view: _view,
    torch.linalg.lstsq: _lstsq,
    torch.Tensor.as_strided: functools.partial(_strides, torch.as_strided),
    torch.as_strided: functools.partial(_strides, torch.as_strided),
    torch.as_strided_copy: lambda x, *args, **kwargs: _strides(torch.as_strided, x, *args, **kwargs).clone(),
    torch.as_strided_scatter: functools.partial(_strides, torch.as_strided_scatter),
    torch.ctc_loss: _ctc_loss,
    torch.nn.functional.ctc_loss: _named_ctc_loss,
    torch.nn.functional.one_hot: _one_hot,
    # No: nn.TransformerEncoder then keeps to dense tensors.
    torch._nested_tensor_from_mask_left_aligned: lambda x, mask: False,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
