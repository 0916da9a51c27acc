"""Loops as regions: `scan` and `fori_loop`, with JAX's signatures. The body is captured once, whatever the length."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dims import from_torch
from fxfunc.passes.graph import Graph, Val, extract
from fxfunc.passes.infer import rewriting
from fxfunc.passes.record import Builder
from fxfunc.passes.regions import emit_scan
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.tracer import tracked, val_of

from .capture import capture, check_tensors, execute, is_tensor
from .entry import entry


@entry
def scan(f, init, xs=None, length: int | None = None, reverse: bool = False):
    """`(carry, ys)` of looping `carry, y = f(carry, x)` over axis 0 of the leaves of `xs`. Follows jax.lax.scan.

    init: structure of tensors (numbers become 0-d tensors); f returns a carry of the same structure, shapes and dtypes.
    ys: the structure of y with a new axis 0 of the loop's length, in the order of xs also when `reverse`.
    Raises StructureMismatch (carry changes, lengths differ), ValueDependent. One capture, no unrolling.
    """
    carry, carry_spec = pytree.tree_flatten(init)
    carry = [c if c is None or is_tensor(c) else torch.tensor(c) for c in carry]
    xs_leaves, xs_spec = pytree.tree_flatten(xs)
    check_tensors("scan", [*carry, *xs_leaves])
    length = _length([x for x in xs_leaves if is_tensor(x)], length)
    carry_vals = [None if c is None else val_of(c) for c in carry]
    vals = [v for v in carry_vals if v is not None]
    n_carry = len(vals)
    vals += [_item(val_of(x)) for x in xs_leaves if is_tensor(x)]
    leaves, spec = pytree.tree_flatten(((pytree.tree_unflatten(carry, carry_spec), xs), {}))
    tensors = [x for x in [*carry, *xs_leaves] if is_tensor(x)]
    captured = capture(f, leaves, spec, vals, tracks=[tracked(t) for t in tensors])
    _check_body(captured, carry_spec, carry_vals)
    graph = _scan_graph(captured.graph, n_carry, len(vals), length, reverse)
    return captured.outputs(execute(graph, [*tensors, *captured.captures]))


@entry
def fori_loop(lower: int, upper: int, body_fun, init_val):
    """`init_val` after `val = body_fun(i, val)` for i in range(lower, upper); i is a 0-d int64 tensor. Follows jax.lax.fori_loop.

    Differentiable in both modes (the number of steps is known). Errors as for scan.
    """
    device = next((x.device for x in pytree.tree_leaves(init_val) if is_tensor(x)), None)
    steps = torch.arange(lower, max(lower, upper), device=device)
    return scan(lambda val, i: (body_fun(i, val), None), init_val, steps)[0]


def _item(val: Val) -> Val:
    return Val(val.shape[1:], val.dtype, val.device)


def _length(xs, length):
    if any(x.ndim == 0 for x in xs):
        raise errors.StructureMismatch(
            what="scan: a leaf of xs has no axis to loop over", expected="leaves with a leading axis"
        )
    sizes = {from_torch(x.shape[0]) for x in xs} | ({length} if length is not None else set())
    if len(sizes) != 1:
        what = (
            "needs xs or length" if not sizes else f"was given different lengths: {sorted(map(str, sizes))}"
        )
        raise errors.StructureMismatch(what=f"scan {what}", expected="one length")
    return sizes.pop()


def _check_body(captured, carry_spec, vals) -> None:
    """Refuse a body that does not keep its carry, or returns a y that cannot be stacked."""
    out = captured.outputs(list(captured.graph.outputs))
    if not (isinstance(out, tuple) and len(out) == 2):
        raise errors.StructureMismatch(
            what="scan: the body must return a pair (carry, y)", expected="(carry, y)"
        )
    carry, spec = pytree.tree_flatten(out[0])
    got = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in carry]
    if spec != carry_spec or got != vals:
        raise errors.StructureMismatch(
            what=f"scan: the body turns a carry of {_text(vals)} into {_text(got)}",
            expected="a carry that stays as it is",
        )
    if not all(y is None or isinstance(y, torch.fx.Node) for y in pytree.tree_leaves(out[1])):
        raise errors.StructureMismatch(
            what="scan: the body returns a y that is not made of tensors", expected="tensors or None"
        )


def _text(vals) -> str:
    return "[" + ", ".join(map(str, vals)) + "]"


@rewriting
def _scan_graph(body: Graph, n_carry: int, n_args: int, length, reverse: bool) -> Graph:
    """carry + xs + captures -> carry + ys."""
    b = Builder(SIMPLIFY)
    vals = body.in_vals
    stacked = [Val((length, *v.shape), v.dtype, v.device) for v in vals[n_carry:n_args]]
    inputs = [
        b.input(v, n.name)
        for v, n in zip([*vals[:n_carry], *stacked, *vals[n_args:]], body.inputs, strict=True)
    ]
    ordered = extract([*body.inputs[n_args:], *body.inputs[:n_args]], list(body.outputs), body.draws)
    return b.finish(
        emit_scan(b, ordered, inputs[n_args:], inputs[:n_carry], inputs[n_carry:n_args], length, reverse)
    )
