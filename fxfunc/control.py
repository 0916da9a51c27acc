"""Control flow as regions: `scan`, `fori_loop` and `cond`, with JAX's signatures. A body is captured once, whatever the length.

torch.cond and torch's scan become these inside a capture; a torch.while_loop is the Python loop that it says.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.concrete import value_of
from fxfunc.passes.dims import from_torch
from fxfunc.passes.graph import Graph, Val, extract
from fxfunc.passes.infer import rewriting
from fxfunc.passes.record import Builder, aten
from fxfunc.passes.regions import emit_cond, emit_scan
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.tracer import tracked, val_of

from .capture import Captured, capture, check_tensors, execute, is_tensor, vals_of
from .custom import CONTROL
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


@entry
def cond(pred, true_fun, false_fun, *operands):
    """`true_fun(*operands)` if `pred`, else `false_fun(*operands)`. Follows jax.lax.cond.

    pred: a bool, or a tensor with one element. Both functions are captured and must return the same structure, shapes and
    dtypes. Only the branch taken is computed, unless a vmap maps pred: then both are, and each example takes its own, also
    of the derivatives. Of a bool, or a tensor whose value is known, only that branch is called, as it is.
    Raises StructureMismatch (branches differ), TypeOfArgument (pred), UnsupportedInside (a branch draws), MutatedCapture.
    """
    if not is_tensor(pred) or (known := value_of(pred)) is not None:
        return (true_fun if (known if is_tensor(pred) else pred) else false_fun)(*operands)
    leaves, spec = pytree.tree_flatten((operands, {}))
    check_tensors("cond", [pred, *leaves])
    if from_torch(pred.numel()) != 1:
        raise errors.TypeOfArgument(
            what=f"cond: pred has the shape {tuple(pred.shape)}", instead="Give a tensor with one element."
        )
    tensors = [x for x in leaves if is_tensor(x)]
    tracks, vals = [tracked(t) for t in tensors], vals_of(leaves)
    branches = [capture(f, leaves, spec, vals, tracks=tracks) for f in (true_fun, false_fun)]
    _check_branches(*branches)
    closed = list({id(t): t for branch in branches for t in branch.captures}.values())
    order = {id(t): len(tensors) + i for i, t in enumerate(closed)}
    places = [(*range(len(tensors)), *(order[id(t)] for t in branch.captures)) for branch in branches]
    graphs = [branch.graph for branch in branches]
    graph = _cond_graph(*graphs, val_of(pred), tuple(map(val_of, [*tensors, *closed])), *places)
    return branches[0].outputs(execute(graph, [pred, *tensors, *closed]))


def _check_branches(true: Captured, false: Captured) -> None:
    """Refuse branches that cannot stand for one another, or draw."""
    for branch in (true, false):
        if branch.graph.draws:
            draw = branch.graph.draws[0]
            raise errors.UnsupportedInside(
                what=f"{draw.target} in a branch of cond",
                instead="Draw the numbers before it, and pass them to the branches.",
                source=draw.meta.get("source"),
            )
    if true.out_spec != false.out_spec:
        raise errors.StructureMismatch(
            what=f"cond: one branch returns {true.out_spec}, the other {false.out_spec}",
            expected="the same structure from both",
        )
    left, right = (branch.outputs(branch.graph.out_vals) for branch in (true, false))
    for x, y in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        if type(x) is not type(y) or x != y:
            raise errors.StructureMismatch(
                what=f"cond: one branch returns {x} where the other returns {y}",
                expected="the same shapes and dtypes from both",
            )


@rewriting
def _cond_graph(true: Graph, false: Graph, pred: Val, vals: tuple[Val, ...], *places) -> Graph:
    """pred + operands and captures -> the outputs; `places` says which of them each branch takes."""
    b = Builder(SIMPLIFY)
    choice = b.input(pred, "pred").reshape([])
    if choice.dtype != torch.bool:
        choice = choice.call(aten.ne.Scalar, 0)
    inputs = [b.input(v, "x") for v in vals]
    bodies = [_over(g, vals, where) for g, where in zip((true, false), places, strict=True)]
    return b.finish(emit_cond(b, *bodies, choice, inputs))


def _over(graph: Graph, vals: tuple[Val, ...], where: tuple[int, ...]) -> Graph:
    """A graph as one of all these values, of which it takes those at `where`."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(v, "x") for v in vals]
    return b.finish(b.inline(graph, [inputs[i] for i in where]))


def _torch_scan(combine, init, xs):
    """torch's scan, of flat carry and xs; `combine` takes them flat and returns (carry, y) as the user has them."""
    specs = []

    def step(carry, x):
        new, y = combine(*carry, *x)
        leaves, spec = pytree.tree_flatten(new)
        specs.append(spec)
        return leaves, y

    carry, ys = scan(step, list(init), list(xs))
    return pytree.tree_unflatten(carry, specs[0]), ys


def _torch_while_loop(condition, body, carried, additional):
    """torch.while_loop as a loop of Python: how often it runs has to be known."""
    while True:
        again = condition(*carried, *additional)
        known = value_of(again) if is_tensor(again) else again
        if known is None:
            raise errors.ValueDependent(op="torch.while_loop; fxfunc.fori_loop takes a number of steps")
        if not known:
            return tuple(carried)
        carried = body(*carried, *additional)


CONTROL.update(
    {
        "cond": lambda pred, true, false, operands: cond(pred, true, false, *operands),
        "scan": _torch_scan,
        "while_loop": _torch_while_loop,
    }
)


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
