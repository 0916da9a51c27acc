"""Derived rules: PyTorch's own formula for one op, traced once per signature. Entry points: `jvp_of`, `transpose_of`, `batch_of`.

The net under our rows and decompositions. A derivative enters the tangent program as a `linear_call`, whose pushforward is
the trace of `torch.func.jvp` of the op alone and whose pullback that of `torch.func.vjp`; one that is missing is the
transpose of the other.
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch

from .. import errors
from ..decompose import tensors_in
from ..dims import to_torch
from ..graph import Graph, Val, extract, getitem, linear_call, typed
from ..infer import forget, infer, on_forget
from ..jvp import Dual
from ..record import Value, vals
from ..trace import trace_torch
from .region import transposed
from .table import Undefined

aten = torch.ops.aten
_cache: dict = {}
on_forget(_cache.clear)
_enabled = True


@contextlib.contextmanager
def disabled():
    """Without derived rules: what has no other raises MissingRule, or is batched by a loop."""
    global _enabled
    before, _enabled = _enabled, False
    forget()
    try:
        yield
    finally:
        _enabled = before
        forget()


class _Signature:
    """A call of an op without its tensors: `run(tensors)` makes the call, `out` are the flat Vals of its results."""

    def __init__(self, op, args, kwargs):
        self.op, self.args, self.kwargs = op, vals(args), {k: vals(v) for k, v in kwargs.items()}
        self.ins: list[Val] = tensors_in([self.args, list(self.kwargs.values())], Val)
        self.single = isinstance(out := infer(op, self.args, self.kwargs), Val)
        self.out = [out] if self.single else list(out)
        self.places = [i for i, v in enumerate(self.out) if v is not None and v.differentiable]
        self.key = (op, typed(self.args, None), typed(self.kwargs, None), torch.get_default_dtype())

    def run(self, tensors) -> list:
        """The results at these tensors, flat."""
        args, kwargs = self.filled(tensors, to_torch)
        out = self.op(*args, **kwargs)
        return [out] if self.single else list(out)

    def filled(self, tensors, plain=lambda x: x):
        """(args, kwargs) of the call at these tensors; `plain` is applied to anything else."""
        rest = iter(tensors)
        return _filled(self.args, rest, plain), {k: _filled(v, rest, plain) for k, v in self.kwargs.items()}

    def function(self, tensors, wrt):
        """The differentiable results as a function of the tensors at the places `wrt`."""

        def f(*xs):
            full = list(tensors)
            for i, x in zip(wrt, xs, strict=True):
                full[i] = x
            outs = self.run(full)
            return tuple(outs[i] for i in self.places)

        return f


def _filled(x, tensors, plain):
    if isinstance(x, Val):
        return next(tensors)
    return [_filled(y, tensors, plain) for y in x] if isinstance(x, (list, tuple)) else plain(x)


def _memoised(function):
    def cached(signature: _Signature, *rest):
        key = (function, signature.key, rest)
        if key not in _cache:
            _cache[key] = function(signature, *rest)
        return _cache[key]

    return cached


def _traced(function, in_vals) -> Graph | str:
    """The graph of a torch function, or why there is none."""
    try:
        return trace_torch(function, in_vals, {})
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {e}"


@_memoised
def _push(s: _Signature, wrt: tuple[int, ...]) -> Graph | str:
    """tensors, then the tangents of `wrt` -> the tangents of the differentiable results."""
    if s.op.namespace != "aten":
        return "torch.func.jvp calls the tangent of an op of a library zero"
    if s.op is aten.cholesky_inverse.default:
        return "torch.func.jvp of it is wrong"  # seen in 2.13; its vjp is right

    def push(*inputs):
        tensors, ts = inputs[: len(s.ins)], inputs[len(s.ins) :]
        return torch.func.jvp(s.function(tensors, wrt), tuple(tensors[i] for i in wrt), ts)[1]

    return _with_results(s, _traced(push, [*s.ins, *(s.ins[i] for i in wrt)]))


@_memoised
def _pull(s: _Signature, wrt: tuple[int, ...]) -> Graph | str:
    """tensors, then the cotangents of the differentiable results -> the cotangents of `wrt`."""

    def pull(*inputs):
        tensors, cts = inputs[: len(s.ins)], inputs[len(s.ins) :]
        return torch.func.vjp(s.function(tensors, wrt), *(tensors[i] for i in wrt))[1](cts)

    return _with_results(s, _traced(pull, [*s.ins, *(s.out[i] for i in s.places)]))


def _with_results(s: _Signature, graph: Graph | str) -> Graph | str:
    """The same graph with the op's results as inputs behind its tensors, in place of a second call of the op."""
    if isinstance(graph, str):
        return graph
    fx, given = torch.fx.Graph(), graph.inputs[: len(s.ins)]
    env = {n: _placeholder(fx, n.name, n.meta["val"]) for n in given}
    results = [None if v is None else _placeholder(fx, f"y{i}", v) for i, v in enumerate(s.out)]
    env |= {n: _placeholder(fx, n.name, n.meta["val"]) for n in graph.inputs[len(s.ins) :]}
    number = {n: i for i, n in enumerate(graph.fx.nodes)}
    call = typed(s.filled(given), number.__getitem__)
    again = {
        n for n in graph.nodes if n.target is s.op and typed((n.args, n.kwargs), number.__getitem__) == call
    }
    for n in graph.nodes:
        if n.target is getitem and n.args[0] in again:
            env[n] = results[n.args[1]]
        elif n in again and s.single:
            env[n] = results[0]
        elif n not in again:
            env[n] = fx.node_copy(n, env.__getitem__)
    fx.output(tuple(None if n is None else env[n] for n in graph.outputs))
    return Graph(fx)


def _placeholder(fx, name: str, val: Val):
    node = fx.create_node("placeholder", name, (), {}, name)
    node.meta["val"] = val
    return node


@dataclasses.dataclass(frozen=True)
class _Linear:
    """push and pull of an op over one list of residuals: the `used` ones of its tensors and results."""

    push: Graph | None
    pull: Graph | None
    used: tuple[int, ...]


@_memoised
def _linear(s: _Signature, wrt: tuple[int, ...]) -> _Linear | str:
    push, pull = _push(s, wrt), _pull(s, wrt)
    if isinstance(push, str) and isinstance(pull, str):
        return pull
    n = len(s.ins) + sum(v is not None for v in s.out)
    push = _other(pull, n) if isinstance(push, str) else push
    pull = _other(push, n) if isinstance(pull, str) else pull
    graphs = [g for g in (push, pull) if g is not None]
    used = tuple(i for i in range(n) if any(g.inputs[i].users for g in graphs))
    push, pull = (
        g and extract([*(g.inputs[i] for i in used), *g.inputs[n:]], list(g.outputs)) for g in (push, pull)
    )
    return _Linear(push, pull, used)


def _other(graph: Graph, residuals: int) -> Graph | None:
    """The transpose of a pushforward or pullback, if its ops have one."""
    try:
        back = transposed(graph, residuals, list(range(len(graph.outputs))))
    except errors.MissingRule:
        return None
    return None if any(n is None for n in back.outputs) else back


def jvp_of(jvp, op, args, kwargs, duals: list[Dual]):
    """The Dual (or tuple of Duals) of a call on Duals; None if there is no formula."""
    from ..jvp import unzip

    if not _has_formula(op):
        return None
    s = _Signature(op, args, kwargs)
    wrt = tuple(i for i, d in enumerate(duals) if d.t is not None)
    rule = _linear(s, wrt) if s.places else None
    if isinstance(rule, str):
        return None
    y = jvp.b.emit(op, unzip(args, []), {k: unzip(v, []) for k, v in kwargs.items()})
    ys = [y] if s.single else list(y)
    tangents: list[Value | None] = [None] * len(ys)
    if rule is not None:
        known = [*(d.p for d in duals), *(r for r in ys if r is not None)]
        found = jvp.b.emit(
            linear_call,
            (rule.push, rule.pull, tuple(known[i] for i in rule.used), tuple(duals[i].t for i in wrt)),
            {"vals": tuple(s.out[i] for i in s.places), "name": str(op)},
        )
        for i, t in zip(s.places, found, strict=True):
            tangents[i] = t
        if op in FACTORS and duals[0].t is not None:
            place, of_transpose = FACTORS[op]
            tangents[place] = _factor_tangent(jvp, duals[0], ys[place], of_transpose)
    outs = tuple(None if r is None else Dual(r, t) for r, t in zip(ys, tangents, strict=True))
    return outs[0] if s.single else outs


# Ops that return an LU factorisation whose derivative torch calls zero; its formulas for the other results read it, so
# theirs would be wrong from the second on. Which result it is, and whether it is of the transpose (where A is real).
FACTORS = {
    aten._linalg_solve_ex.default: (1, False),
    aten._linalg_det.default: (1, True),
    aten._linalg_slogdet.default: (2, True),
}


def _factor_tangent(jvp, a: Dual, factor: Value, of_transpose: bool) -> Value:
    """The tangent of the factorisation; nothing is computed where nobody reads it."""
    if of_transpose and not a.p.dtype.is_complex:
        a = Dual(a.p.mT, a.t.mT)
    lu = jvp.call(aten.linalg_lu_factor_ex.default, (a,), {})[0].t
    return lu.expand(factor.shape)


def _has_formula(op) -> bool:
    """Not a prim, nor an op of a library that registered no autograd formula: torch would call its derivative zero."""
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    known = any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), k) for k in keys)
    return _enabled and (op.namespace == "aten" or (op.namespace != "prims" and known))


def transpose_of(b, op, cts: list[Value | None], args, kwargs) -> list[Value] | None:
    """The cotangents of the linear (`Undefined`) tensors of a call, by the pullback of the op; None if there is no formula."""
    if not _has_formula(op):
        return None
    s = _Signature(op, args, kwargs)
    tensors = tensors_in([args, list(kwargs.values())], (Value, Undefined))
    wrt = tuple(i for i, t in enumerate(tensors) if isinstance(t, Undefined))
    pull = _pull(s, wrt)
    known = [None if isinstance(t, Undefined) else t for t in tensors] + [
        None for v in s.out if v is not None
    ]
    if isinstance(pull, str) or any(k is None and n.users for k, n in zip(known, pull.inputs, strict=False)):
        return None  # or it is not linear
    given = [cts[i] if cts[i] is not None else b.full(s.out[i], 0) for i in s.places]
    return b.inline(pull, [*known, *given])


@_memoised
def _mapped(s: _Signature, mapped: tuple[bool, ...], length) -> Graph | str:
    def call(*tensors):
        dims = tuple(0 if m else None for m in mapped)
        return torch.func.vmap(lambda *xs: tuple(s.run(xs)), in_dims=dims)(*tensors)

    full = [
        Val((length, *v.shape), v.dtype, v.device) if m else v for v, m in zip(s.ins, mapped, strict=True)
    ]
    with _no_fallback():
        return _traced(call, full)


@contextlib.contextmanager
def _no_fallback():
    """torch's vmap falls back to an unrolled loop where it has no rule; ours is a scan."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(before)


def batch_of(b, op, args, kwargs, tensors, mapped: list[bool], length) -> list[Value] | None:
    """The batched results of a call, from torch's batching rule; None if it has none."""
    s = _Signature(op, args, kwargs)
    if not _enabled or any(v is None for v in s.out):
        return None
    graph = _mapped(s, tuple(mapped), length)
    return None if isinstance(graph, str) else b.inline(graph, tensors)
