"""Local algebra, offered each call as it is emitted: op -> row(*args) -> a simpler Value, or None for no match.

A row's answer is taken only if it has the call's shape and dtype. Rows keep IEEE special values: no `x * 0 -> 0`, no
`x + 0 -> x` (it would lose the sign of zero). Numbers are folded in the dtype they have in the graph.
"""

from __future__ import annotations

import math

import torch

from .dims import Dim, numel
from .infer import broadcast
from .record import Value, aten

SIMPLIFY: dict = {}


def rewrites(*ops):
    """Add a row for these ops, after the rows they have."""

    def add(row):
        for op in ops:
            before = SIMPLIFY.get(op)
            SIMPLIFY[op] = row if before is None else _either(before, row)
        return row

    return add


def _either(first, second):
    def row(*args, **kwargs):
        out = first(*args, **kwargs)
        return second(*args, **kwargs) if out is None else out

    return row


def made_by(x, op):
    """The arguments of the call that made `x` if it is of this op, else None."""
    if isinstance(x, Value) and x.node.target is op:
        return [x.builder._value(a) if isinstance(a, torch.fx.Node) else a for a in x.node.args]
    return None


def number(x):
    """The number a value is filled with, or the number itself; None for other values."""
    if isinstance(x, Value):
        made = made_by(x, aten.full.default)
        return made[1] if made and not isinstance(made[1], Dim) else None
    return x if isinstance(x, (int, float, complex)) and not isinstance(x, bool) else None


def _filled(like: Value, shape, fill) -> Value:
    return like.full(shape, fill)


def _folded(op, dtype, *numbers):
    """A scalar op at numbers in a graph dtype; None if the result is no ordinary number."""
    tensors = [torch.full((), n, dtype=dtype) if i == 0 else n for i, n in enumerate(numbers)]
    out = op(*tensors)
    return (
        out.item()
        if out.dtype == dtype and (not out.is_floating_point() or math.isfinite(out.item()))
        else None
    )


# ----- numbers --------------------------------------------------------------------------------------------------------


@rewrites(aten.mul.Tensor)
def _mul_number(a, b):
    if (
        number(a) is not None
        and isinstance(b, Value)
        and number(b) is None
        and (not isinstance(a, Value) or a.dtype == b.dtype)
    ):
        a, b = b, number(a)  # c * x -> x * c
        return a if b == 1 else a * b
    if isinstance(a, Value) and isinstance(b, Value) and number(b) is not None and a.dtype == b.dtype:
        return a * number(b)  # x * full(c) -> x * c
    if not isinstance(a, Value) or isinstance(b, (Value, Dim)):
        return None
    if b == 1:  # x * 1 -> x
        return a
    if b == -1:  # x * -1 -> -x
        return -a
    x = _negated(a)
    if x is not None and (a.val.differentiable or isinstance(b, int)):  # -x * c -> x * -c
        return x * -b
    made = made_by(a, aten.mul.Tensor)  # (x * c) * d -> x * (c * d)
    if made and isinstance(b, float) and isinstance(made[1], float) and _normal(made[1] * b):
        return made[0] * (made[1] * b)
    return None


def _normal(x) -> bool:
    return math.isfinite(x) and 1e-30 < abs(x) < 1e30


@rewrites(aten.mul.Tensor)
def _mul_folded(a, b):
    if isinstance(a, Value) and (n := number(a)) is not None and isinstance(b, (int, float)):
        out = _folded(torch.mul, a.dtype, n, b)
        return None if out is None else _filled(a, a.shape, out)
    return None


@rewrites(aten.add.Tensor)
def _add_folded(a, b, alpha=1):
    if number(a) is None or number(b) is None or not isinstance(a, Value) or not isinstance(b, Value):
        return None
    if alpha != 1 or a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        return None
    out = _folded(torch.add, a.dtype, number(a), number(b))
    return None if out is None else _filled(a, broadcast([a.shape, b.shape]), out)


@rewrites(aten.div.Tensor)
def _div(a, b):
    if isinstance(b, Value) and number(b) is not None and a.dtype == b.dtype:
        return a / number(b)
    if isinstance(b, Value) or isinstance(b, Dim):
        return None
    if b == 1 and a.dtype.is_floating_point:  # x / 1 -> x
        return a
    if (n := number(a)) is not None and b and a.dtype.is_floating_point:
        out = _folded(torch.div, a.dtype, n, b)
        return None if out is None else _filled(a, a.shape, out)
    return None


@rewrites(aten.pow.Tensor_Scalar)
def _pow(a, n):
    if isinstance(n, bool) or not a.dtype.is_floating_point:
        return None
    return a if n == 1 else a * a if n == 2 else None  # x ** 2 -> x * x


@rewrites(aten._to_copy.default)
def _to_copy(a, *, dtype=None, device=None, **kwargs):
    return a if not kwargs and dtype in (None, a.dtype) and device in (None, a.device) else None


# ----- signs ----------------------------------------------------------------------------------------------------------


def _negated(x, *others):
    """y if `x` is -y and the result of a call with the others has its dtype: in a wider one -y of uint8 is 256 - y."""
    made = made_by(x, aten.neg.default)
    return made[0] if made and all(isinstance(o, Value) and o.dtype == x.dtype for o in others) else None


@rewrites(aten.neg.default)
def _neg(a):
    if made := made_by(a, aten.neg.default):  # --x -> x
        return made[0]
    if (made := made_by(a, aten.mul.Tensor)) and isinstance(made[1], (int, float)):  # -(x * c) -> x * -c
        return made[0] * (
            -float(made[1]) if a.dtype.is_floating_point else -made[1]
        )  # of an integer 0 it is -0.0
    if (n := number(a)) is not None and a.dtype.is_floating_point:
        return _filled(a, a.shape, -float(n))
    return None


def _signs_out(op):
    """(-a) op b -> -(a op b): signs move out until an addition takes them."""

    @rewrites(op)
    def row(a, b):
        if not (isinstance(a, Value) and isinstance(b, Value)):
            return None
        left, right = _negated(a, b), _negated(b, a)
        if left is None and right is None:
            return None
        out = a.builder.emit(op, (a if left is None else left, b if right is None else right))
        return -out if left is None or right is None else out

    return row


for _op in (aten.mul.Tensor, aten.mm.default, aten.bmm.default):
    _signs_out(_op)


@rewrites(aten.add.Tensor)
def _add_negative(a, b, alpha=1):
    if alpha != 1:
        return None
    if (x := _negated(b, a)) is not None:  # a + -x -> a - x
        return a - x
    return b - x if (x := _negated(a, b)) is not None else None  # -x + b -> b - x


@rewrites(aten.sub.Tensor)
def _sub_negative(a, b, alpha=1):
    x = _negated(b, a)
    return a + x if alpha == 1 and x is not None else None  # a - -x -> a + x


# ----- views ----------------------------------------------------------------------------------------------------------


@rewrites(aten.reshape.default)
def _reshape(a, shape):
    shape = tuple(shape)
    if shape == a.shape:
        return a
    if made := made_by(a, aten.reshape.default):  # reshape(reshape x) -> reshape x
        return made[0].reshape(list(shape))
    if (n := number(a)) is not None:
        return _filled(a, shape, n)
    return None


@rewrites(aten.permute.default)
def _permute(a, dims):
    dims = [d % a.ndim for d in dims]
    if dims == list(range(a.ndim)):
        return a
    if made := made_by(a, aten.permute.default):  # permute(permute x) -> permute x
        inner = [d % a.ndim for d in made[1]]
        return made[0].permute([inner[d] for d in dims])
    if (n := number(a)) is not None:
        return _filled(a, [a.shape[d] for d in dims], n)
    large = [d for d in dims if a.shape[d] != 1]
    if large == sorted(large):  # only axes of size 1 move
        return a.reshape([a.shape[d] for d in dims])
    return None


@rewrites(aten.expand.default)
def _expand(a, shape, **kwargs):
    shape = tuple(shape)
    if shape == a.shape:
        return a
    if made := made_by(a, aten.expand.default):  # expand(expand x) -> expand x
        return made[0].expand(list(shape))
    if (n := number(a)) is not None:
        return _filled(a, shape, n)
    if (made := made_by(a, aten.reshape.default)) and _adds_ones(
        made[0].shape, a.shape
    ):  # leading ones are implied
        return made[0].expand(list(shape))
    return None


def _adds_ones(before, after) -> bool:
    extra = len(after) - len(before)
    return (
        extra > 0
        and tuple(after[extra:]) == tuple(before)
        and all(not isinstance(s, Dim) and s == 1 for s in after[:extra])
    )


# ----- broadcasting is implicit in elementwise ops --------------------------------------------------------------------


def _peeled(x):
    """What broadcasts to `x` by itself in an elementwise op."""
    while isinstance(x, Value) and x.ndim > 0:
        if made := made_by(x, aten.expand.default):
            x = made[0]
        elif (
            (made := made_by(x, aten.reshape.default)) and made[0].ndim and _adds_ones(made[0].shape, x.shape)
        ):
            x = made[0]
        else:
            break
    return x


def _implicit(op, tensors: int):
    @rewrites(op)
    def row(*args, **kwargs):
        given = [a for a in args[:tensors] if isinstance(a, Value)]
        if len(given) < 2:
            return None
        shape = broadcast([x.shape for x in given])
        peeled = list(args)
        for i, a in enumerate(args[:tensors]):
            if isinstance(a, Value) and (p := _peeled(a)) is not a and (p.ndim > 0 or a.ndim == 0):
                trial = [*peeled[:i], p, *peeled[i + 1 :]]
                if broadcast([x.shape for x in trial[:tensors] if isinstance(x, Value)]) == shape:
                    peeled = trial
        if all(p is a for p, a in zip(peeled, args, strict=True)):
            return None
        return given[0].builder.emit(op, tuple(peeled), kwargs)

    return row


for _op in (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.threshold_backward.default,
):
    _implicit(_op, 2)
_implicit(aten.where.self, 3)


# ----- reductions and products ----------------------------------------------------------------------------------------


@rewrites(aten.sum.dim_IntList)
def _sum(a, dims, keepdim=False, *, dtype=None):
    if dtype is not None or not dims or not a.ndim or not (a.dtype.is_floating_point or a.dtype.is_complex):
        return None
    dims = sorted(d % a.ndim for d in dims)
    real = [d for d in dims if isinstance(a.shape[d], Dim) or a.shape[d] != 1]
    if len(real) < len(dims) and keepdim:  # axes of size 1 need no sum
        return a.sum(real, True)
    if len(real) < len(dims):
        out = a.sum(real, True)
        return out.reshape([s for i, s in enumerate(a.shape) if i not in dims])
    if (
        (made := made_by(a, aten.sum.dim_IntList))
        and len(made) > 2
        and made[2]
        and keepdim
        and not a.node.kwargs
    ):
        return made[0].sum(sorted({d % a.ndim for d in made[1]} | set(dims)), True)  # sum(sum x) -> sum x
    if (made := made_by(a, aten.expand.default)) and made[0].ndim == a.ndim:
        return _sum_of_expanded(a, made[0], dims, keepdim)
    if (made := made_by(a, aten.bmm.default)) and dims == [0] and not keepdim:
        return _sum_of_bmm(*made)
    return None


def _sum_of_expanded(a, x, dims, keepdim):
    """sum(expand x) -> x * n over the expanded axes."""
    repeated = [d for d in dims if x.shape[d] != a.shape[d]]
    if not repeated:
        return None
    n = numel(a.shape[d] for d in repeated)
    rest = [d for d in dims if d not in repeated]
    shape = [s if i not in repeated else 1 for i, s in enumerate(a.shape)]
    out = (x * n).expand(shape).sum(rest, True)
    return out if keepdim else out.reshape([s for i, s in enumerate(a.shape) if i not in dims])


def _sum_of_bmm(a, b):
    """sum over the batch of a @ b -> one matmul over batch and inner axis together."""
    n, m, k = a.shape
    return a.permute([1, 0, 2]).reshape([m, n * k]) @ b.reshape([n * k, b.shape[2]])


@rewrites(aten.diagonal.default)
def _diagonal(a, offset=0, dim1=0, dim2=1):
    if offset != 0:
        return None
    i, j = sorted((dim1 % a.ndim, dim2 % a.ndim))
    if made := made_by(a, aten.permute.default):  # diagonal(permute x) -> permute(diagonal x)
        axes = [d % a.ndim for d in made[1]]
        out = made[0].call(aten.diagonal.default, 0, axes[i], axes[j])
        rest = [d for d in range(a.ndim) if d not in (axes[i], axes[j])]
        order = [rest.index(axes[d]) for d in range(a.ndim) if d not in (i, j)]
        return out.permute([*order, len(order)])
    if (i, j) != (a.ndim - 2, a.ndim - 1) or a.shape[i] != a.shape[j] or a.dtype not in ACCUMULATED:
        return None
    factors = _factors(a)
    return (
        None if factors is None else (factors[0] * factors[1].mT).sum([j])
    )  # diag(a @ b) -> rows of a * b^T


# Elementwise products of these are rounded as those of a matrix product are.
ACCUMULATED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def _factors(a: Value) -> list | None:
    """x [..., n, k] and y [..., k, m] if `a` is x @ y, or that with the rows of all x in one matrix."""
    made = made_by(a, aten.mm.default) or made_by(a, aten.bmm.default)
    if made or not (reshaped := made_by(a, aten.reshape.default)):
        return made
    made = made_by(reshaped[0], aten.mm.default)
    if not made or a.shape[-1] != made[1].shape[1]:
        return None
    return [made[0].reshape([*a.shape[:-1], made[0].shape[1]]), made[1]]


@rewrites(aten.trace.default)
def _trace(a):
    out = _diagonal(a) if a.shape[0] == a.shape[1] else None  # trace(a @ b) -> sum of a * b^T
    return None if out is None else out.sum([0])


@rewrites(aten.mm.default)
def _mm_eye(a, b):
    if a.node.target is aten.eye.default and a.dtype == b.dtype:  # 1 @ b -> b
        return b
    return a if b.node.target is aten.eye.default and a.dtype == b.dtype else None
