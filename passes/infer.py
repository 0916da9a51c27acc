"""Shapes, dtypes and devices of calls: `infer(op, args, kwargs)` with Vals for tensors, memoised.

ATen ops are asked once per signature by running them on meta tensors. A symbolic size is handled by running at several
sizes and fitting a polynomial, checked at one more; what does not fit raises `DynamicShape`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from fractions import Fraction

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import errors
from .dims import Dim, at, numel
from .graph import Graph, Val, constant, custom, graft, linear_call, map_, scan, stop_gradient, stop_reverse, typed

aten = torch.ops.aten
_memo: dict = {}
_STAND_INS = (97, 193, 389, 769, 1543, 3079, 6151, 53, 211, 421, 853, 1709, 3413)


def infer(op, args, kwargs):
    """The `Val` (or tuple of `Val | None`) of a call; `Val`s stand for its tensor arguments."""
    key = (op, typed(args, None), typed(kwargs, None) if kwargs else (), torch.get_default_dtype())
    found = _memo.get(key)
    if found is None:
        _memo[key] = found = OWN[op](*args, **kwargs) if op in OWN else _infer_aten(op, args, kwargs)
    return found


def _infer_aten(op, args, kwargs):
    device = result_device(op, args, kwargs)
    names = sorted(_dim_names([args, kwargs]))
    with hermetic():
        if not names:
            return _as_val(_run_meta(op, args, kwargs, {}), device)
        monomials = [m for d in range(3) for m in itertools.combinations_with_replacement(names, d)]
        points = [{n: _STAND_INS[(i * (j + 1) + j) % len(_STAND_INS)] for j, n in enumerate(names)}
                  for i in range(len(monomials) + 1)]
        runs = [_as_val(_run_meta(op, args, kwargs, p), device) for p in points]
    return _fit(op, runs, points, monomials)


@contextlib.contextmanager
def hermetic():
    """Neutralise the caller's modes: nothing the passes compute depends on them."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), torch._C._DisableAutocast():
        yield


def rewriting(function):
    """A function from graphs (and static values) to graphs: cached, and run with the caller's modes neutralised."""
    name = function.__name__.strip("_").removesuffix("_graph")

    @functools.lru_cache(maxsize=512)
    @functools.wraps(function)
    def cached(*args):
        with hermetic():
            out = function(*args)
        if isinstance(out, Graph):
            from .dump import saw

            saw(name, out)
        return out

    return cached


def meta_result(op, args, kwargs):
    """What a call that returns no tensor gives on meta tensors of these Vals."""
    with hermetic():
        return _run_meta(op, args, kwargs, {})


def _run_meta(op, args, kwargs, sizes):
    def to_meta(x):
        if isinstance(x, Val):
            return torch.empty([at(s, sizes) for s in x.shape], dtype=x.dtype, device="meta")
        if isinstance(x, (list, tuple)):
            return [to_meta(y) for y in x]
        return at(x, sizes)

    kwargs = {k: torch.device("meta") if k == "device" and v is not None else to_meta(v) for k, v in kwargs.items()}
    return op(*[to_meta(a) for a in args], **kwargs)


def _as_val(x, device):
    if isinstance(x, torch.Tensor):
        return Val(tuple(x.shape), x.dtype, device)
    return tuple(None if y is None else _as_val(y, device) for y in x) if isinstance(x, (list, tuple)) else None


def result_device(op, args, kwargs) -> torch.device:
    """The device of a call's result: asked for, or that of its tensors with dimensions, which must agree."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    vals = list(_vals_in([args, list(kwargs.values())]))
    devices = {v.device for v in vals if v.ndim or v.device.type != "cpu"} or {v.device for v in vals}
    if len(devices) > 1:
        raise errors.MixedDevices(op=op, devices=", ".join(sorted(map(str, devices))))
    return next(iter(devices), torch.device("cpu"))


def _vals_in(x):
    if isinstance(x, Val):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _vals_in(y)


def _dim_names(x) -> set[str]:
    if isinstance(x, Dim):
        return x.names()
    if isinstance(x, Val):
        return _dim_names(x.shape)
    if isinstance(x, (list, tuple, dict)):
        return set().union(*map(_dim_names, x.values() if isinstance(x, dict) else x))
    return set()


def _fit(op, runs, points, monomials):
    if isinstance(runs[0], tuple):
        return tuple(None if r[0] is None else _fit(op, r, points, monomials) for r in zip(*runs, strict=True))
    if len({r.ndim for r in runs}) > 1:
        raise errors.DynamicShape(what=f"the rank of the result of {op}")
    shape = tuple(_fit_size(op, sizes, points, monomials) for sizes in zip(*(r.shape for r in runs), strict=True))
    return Val(shape, runs[0].dtype, runs[0].device)


def _fit_size(op, sizes, points, monomials):
    if len(set(sizes)) == 1:
        return sizes[0]
    rows = [[Fraction(numel(p[n] for n in m)) for m in monomials] for p in points]
    coefficients = _solve(rows[:-1], [Fraction(s) for s in sizes[:-1]])
    if coefficients is None or any(c.denominator != 1 for c in coefficients):
        raise errors.DynamicShape(op=op, what=f"how a size of the result of {op} follows from a symbolic one")
    if sum(c * x for c, x in zip(coefficients, rows[-1], strict=True)) != sizes[-1]:
        raise errors.DynamicShape(op=op, what=f"how a size of the result of {op} follows from a symbolic one")
    return sum((numel([Dim(n) for n in m]) * int(c) for c, m in zip(coefficients, monomials, strict=True)), 0)


def _solve(rows, right):
    """The solution of a square linear system over the rationals, or None."""
    rows = [[*row, y] for row, y in zip(rows, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = next((j for j in range(i, n) if rows[j][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(n):
            if j != i and rows[j][i]:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[n] for row in rows]


def _map_vals(body, operands, *, length, mapped, outs, randomness):
    return tuple(Val((length, *v.shape), v.dtype, v.device) if kind == "stack" else v
                 for v, kind in zip(body.out_vals, outs, strict=True))


def _scan_vals(body, consts, carry, xs, *, length, reverse):
    vals = body.out_vals
    return tuple(vals[: len(carry)]) + tuple(Val((length, *v.shape), v.dtype, v.device) for v in vals[len(carry):])


def _linear_call_vals(body, transposed, residuals, operands, *, vals):
    return vals


OWN = {
    constant: lambda literal: Val(tuple(literal.tensor.shape), literal.tensor.dtype, literal.tensor.device),
    stop_reverse: lambda x: x,
    stop_gradient: lambda x: x,
    graft: lambda new, old: new,
    map_: _map_vals,
    scan: _scan_vals,
    custom: lambda body, *rest, **kwargs: tuple(body.out_vals),
    linear_call: _linear_call_vals,
}
