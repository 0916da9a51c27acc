"""What to call for an ATen overload. Entry point: `best(op, args)`.

torch's own Python functions are C, an OpOverload is a Python object around a slower parser: 0.5-1 us a call. A row here says
that the function of that name, given the same arguments, dispatches to exactly this overload (tests/test_eager.py asks it
for every row); calls whose arguments could select another overload go to the OpOverload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim

aten = torch.ops.aten

# Overloads that torch exposes by their own name, by where it does. `default` is not written.
_ROWS: tuple[tuple[object, str], ...] = (
    (torch._C._VariableFunctions, """
        abs acos acosh asin asinh atan atan2 atanh ceil cos cosh erf erfc exp exp2 expm1 floor frac isinf isnan lgamma log
        log10 log1p log2 neg reciprocal relu round rsqrt sgn sigmoid sign sin sinh sqrt square tan tanh trunc signbit
        logaddexp logical_and logical_not logical_or logical_xor maximum minimum
        bitwise_and.Tensor bitwise_and.Scalar bitwise_not bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor
        bitwise_xor.Scalar add.Tensor sub.Tensor mul.Tensor div.Tensor fmod.Scalar fmod.Tensor remainder.Scalar
        remainder.Tensor pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor addcmul addcdiv lerp.Scalar lerp.Tensor
        eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor ge.Scalar
        ge.Tensor clamp clamp.Tensor clamp_min clamp_max where.self masked_fill.Scalar masked_fill.Tensor
        mm bmm addmm baddbmm mv dot
        sum sum.dim_IntList mean mean.dim prod prod.dim_int amax amin any any.dim any.dims all all.dim argmax argmin
        max.dim min.dim var.correction std.correction logsumexp cumsum sort topk
        reshape permute transpose.int t unsqueeze squeeze.dim squeeze.dims select.int diagonal flip unbind.int split.Tensor
        split_with_sizes cat stack roll tril triu clone constant_pad_nd
        gather index_select index_add scatter.src scatter.value scatter_add select_scatter slice_scatter
        _softmax _log_softmax native_layer_norm native_group_norm convolution embedding
    """),
    (torch._C._nn, """
        avg_pool2d col2im im2col elu gelu hardtanh leaky_relu max_pool2d_with_indices silu softplus
    """),
    (torch.Tensor, "expand view repeat"),
)  # fmt: skip
# Among them, those where a number in place of a tensor (not the first) is the same call.
_NUMBERS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def _table() -> dict[torch._ops.OpOverload, Callable]:
    found = {}
    for module, names in _ROWS:
        for full in names.split():
            name, _, overload = full.partition(".")
            found[getattr(getattr(aten, name), overload or "default")] = getattr(module, name)
    return found


BUILTINS = _table()
# Ops that need dense operands: embedding bags and complex views refuse others, and whether a factorisation is that of A or of
# its transpose depends on A's strides, while the graph reads the factors as those of a dense A.
_NEED_DENSE = """
    _linalg_det _linalg_slogdet _linalg_solve_ex _embedding_bag _embedding_bag_dense_backward
    _embedding_bag_per_sample_weights_backward view_as_complex
""".split()
_DENSE: dict[torch._ops.OpOverload, Callable] = {}
for _op in (getattr(aten, name).default for name in _NEED_DENSE):
    _DENSE[_op] = lambda *args, op=_op, **kwargs: op(*map(_dense, args), **kwargs)


def _dense(x: object) -> object:
    return x.contiguous() if isinstance(x, torch.Tensor) else x


_types: dict[torch._ops.OpOverload, tuple[str, ...]] = {}


def best(op: torch._ops.OpOverload, args: Sequence[object]) -> Callable:
    """The fastest callable that takes these arguments (`Node`s for tensors) to mean a call of `op`."""
    if op in _DENSE:
        return _DENSE[op]
    if op in BUILTINS and _plain(op, args):
        return BUILTINS[op]
    return getattr(op, "_op", op)


def _plain(op: torch._ops.OpOverload, args: Sequence[object]) -> bool:
    """True if tensors stand where the schema has them, and nowhere else."""
    if op not in _types:
        _types[op] = tuple(str(a.type) for a in op._schema.arguments)
    for i, (x, declared) in enumerate(zip(args, _types[op], strict=False)):
        if isinstance(x, Node) != (declared == "Tensor"):
            optional = declared == "Optional[Tensor]" and isinstance(x, (Node, type(None)))
            number = i > 0 and op in _NUMBERS and isinstance(x, (int, float, Dim))
            if not optional and not number:
                return False
    return True
