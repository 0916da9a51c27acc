"""The transforms. Each captures the function, rewrites its graph and executes the result, so that they nest in any order.

Signatures and results follow torch.func (value_and_grad, scan and linearize's name: JAX).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dims import from_torch, numel
from fxfunc.passes.graph import Graph, Val, extract
from fxfunc.passes.graph import stop_gradient as _stop_gradient
from fxfunc.passes.infer import rewriting
from fxfunc.passes.linearize import linearize as _linearize
from fxfunc.passes.linearize import vjp as _emit_vjp
from fxfunc.passes.record import Builder, aten
from fxfunc.passes.regions import emit_map
from fxfunc.passes.rules.region import differentiate, transposed
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.tracer import val_of

from .capture import Captured, capture, check_tensors, execute, is_tensor, own_memory, vals_of, write_back
from .entry import entry

# ----- arguments ------------------------------------------------------------------------------------------------------


def _argnums(transform: str, argnums, count: int) -> tuple[int, ...]:
    """argnums as non-negative ints, each once."""
    if not count:
        raise errors.NoTensorInputs(
            transform=transform, what="among its positional arguments: there are none"
        )
    given = (argnums,) if isinstance(argnums, int) and not isinstance(argnums, bool) else argnums
    ok = (
        isinstance(given, tuple)
        and given
        and all(isinstance(i, int) and not isinstance(i, bool) and -count <= i < count for i in given)
    )
    if not ok or len({i % count for i in given}) < len(given):
        raise errors.BadArgnums(transform=transform, argnums=argnums, count=count, low=-count, high=count - 1)
    return tuple(i % count for i in given)


class _Call:
    """One call of a transformed function: its arguments flat, and which tensor leaves are differentiated."""

    def __init__(
        self, transform: str, function, args, kwargs, argnums, *, reverse: bool = True, randomness=None
    ):
        self.transform = transform
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        check_tensors(transform, self.leaves)
        self.single = isinstance(argnums, int)
        positions = _argnums(transform, argnums, len(args))
        marked = [i in positions for i, a in enumerate(args) for _ in pytree.tree_leaves(a)]
        marked += [False] * (len(self.leaves) - len(marked))  # keyword arguments come last
        selected = args[positions[0]] if self.single else tuple(args[i] for i in positions)
        self.selected, self.selected_spec = pytree.tree_flatten(selected)
        self.order = _order(args, positions)
        self.tensors = [x for x in self.leaves if is_tensor(x)]
        self.marked = tuple(m for m, x in zip(marked, self.leaves, strict=True) if is_tensor(x))
        self._check()
        self.captured: Captured = capture(
            function,
            self.leaves,
            self.spec,
            vals_of(self.leaves),
            tracks=self.marked if reverse else (),
            randomness=randomness,
            writable=lambda i: i < len(self.marked) and not self.marked[i],
        )
        self.graph = self.captured.graph
        self.nonzero = self.marked + (False,) * len(self.captured.captures)
        self.inputs = [*self.tensors, *self.captured.captures]

    def _check(self) -> None:
        if not any(is_tensor(x) for x in self.selected):
            raise errors.NoTensorInputs(transform=self.transform, what="among the arguments to differentiate")
        for x in self.selected:
            if not is_tensor(x):
                raise errors.TypeOfArgument(
                    what=f"{self.transform}: an argument to differentiate holds a {type(x).__name__}, not a tensor",
                    instead="Leave it out of argnums, or let the function close over it.",
                )
            if not val_of(x).differentiable:
                raise errors.NotDifferentiable(transform=self.transform, what="an argument", dtype=x.dtype)

    def unflatten(self, tensors: list):
        """Results for the marked leaves in graph order, in the structure of the selected arguments."""
        return pytree.tree_unflatten([tensors[i] for i in self.order], self.selected_spec)


def _order(args, positions) -> list[int]:
    """For each leaf of the selected arguments in argnums order, its place among marked leaves in call order."""
    start, places = 0, {}
    for i in sorted(positions):
        count = sum(is_tensor(x) for x in pytree.tree_leaves(args[i]))
        places[i] = list(range(start, start + count))
        start += count
    return [place for i in positions for place in places[i]]


class _Mark:
    """Stands for output tensor `index`."""

    def __init__(self, index: int):
        self.index = index


def _split_aux(transform: str, captured: Captured, has_aux: bool):
    """(the result to differentiate, marks for its tensors; function from all output tensors to (value, aux))."""
    marks = captured.outputs([_Mark(i) for i in range(len(captured.graph.outputs))])
    if not has_aux:
        return marks, lambda tensors: (captured.outputs(tensors), None)
    if not (isinstance(marks, tuple) and len(marks) == 2):
        raise errors.TypeOfArgument(
            what=f"{transform} with has_aux=True expects the function to return a tuple (output, aux)",
            instead="Return exactly two values, or drop has_aux.",
        )
    return marks[0], captured.outputs


def _count_outputs(transform: str, value) -> int:
    """The number of tensors to differentiate; there is at least one, and nothing else."""
    leaves = pytree.tree_leaves(value)
    others = [type(x).__name__ for x in leaves if not isinstance(x, _Mark)]
    if others or not leaves:
        raise errors.TypeOfArgument(
            what=f"{transform} expects the function to return only tensors, got {', '.join(others) or 'nothing'}",
            instead="Return a tensor or a structure of tensors; with has_aux=True, other values beside it.",
        )
    return len(leaves)


# ----- reverse mode ---------------------------------------------------------------------------------------------------


@rewriting
def _grad_graph(graph: Graph, nonzero: tuple[bool, ...]) -> Graph:
    """inputs -> the gradients of output 0 for the nonzero inputs, then all outputs."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    outs, cts = _emit_vjp(
        b, graph, inputs, nonzero, lambda outs: [b.full(outs[0].val, 1)] + [None] * (len(outs) - 1)
    )
    vals = [n.meta["val"] for n, z in zip(graph.inputs, nonzero, strict=True) if z]
    return b.finish([ct if ct is not None else b.full(v, 0) for ct, v in zip(cts, vals, strict=True)] + outs)


def _scalar(transform: str, captured: Captured, has_aux: bool):
    """Check that the differentiated output is one real scalar tensor."""
    value, split = _split_aux(transform, captured, has_aux)
    if not isinstance(value, _Mark):
        raise errors.NonScalarOutput(transform=transform, got=f"a {type(value).__name__}")
    val = captured.graph.outputs[value.index].meta["val"]
    if val.shape != ():
        raise errors.NonScalarOutput(transform=transform, got=f"a tensor of shape {val.shape}")
    if not val.dtype.is_floating_point:
        raise errors.NonScalarOutput(transform=transform, got=f"a tensor of dtype {val.dtype}")
    return split


def _grad_and_value(transform: str, f, argnums, has_aux, args, kwargs):
    call = _Call(transform, f, args, kwargs, argnums)
    split = _scalar(transform, call.captured, has_aux)
    results = execute(_grad_graph(call.graph, call.nonzero), call.inputs)
    count = sum(call.marked)
    results = write_back(call.graph, call.inputs, results, count)
    value, aux = split(results[count:])
    return call.unflatten(own_memory(results[:count], call.inputs)), value, aux


def grad_and_value(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function returning `(gradient, value)`, or `(gradient, (value, aux))` with has_aux.

    `f` returns a 0-d floating point tensor; the gradient has the structure, shapes and dtypes of the arguments that
    `argnums` names. Raises BadArgnums, NonScalarOutput, NotDifferentiable, NoTensorInputs. Follows torch.func.grad_and_value.
    """

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        g, value, aux = _grad_and_value("grad_and_value", f, argnums, has_aux, args, kwargs)
        return (g, (value, aux)) if has_aux else (g, value)

    return wrapper


def value_and_grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """As grad_and_value, in JAX's order: `(value, gradient)`, or `((value, aux), gradient)`. Follows jax.value_and_grad."""

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        g, value, aux = _grad_and_value("value_and_grad", f, argnums, has_aux, args, kwargs)
        return ((value, aux), g) if has_aux else (value, g)

    return wrapper


def grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function returning the gradient of `f`, or `(gradient, aux)` with has_aux. Follows torch.func.grad.

    Shapes, dtypes and errors as for grad_and_value.
    """

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        g, _, aux = _grad_and_value("grad", f, argnums, has_aux, args, kwargs)
        return (g, aux) if has_aux else g

    return wrapper


@rewriting
def _cut(graph: Graph, nonzero, reverse: bool):
    return _linearize(graph, nonzero, reverse=reverse)


@rewriting
def _transposed(graph: Graph, nonzero, given: tuple[int, ...]) -> Graph:
    """residuals + the given cotangents -> cotangents of the nonzero inputs, zeros made real."""
    cut = _cut(graph, nonzero, True)
    back = transposed(cut.linear, cut.residuals, list(given))
    b = Builder(SIMPLIFY)
    outs = b.inline(back, [b.input(n.meta["val"], n.name) for n in back.inputs])
    vals = [n.meta["val"] for n, z in zip(graph.inputs, nonzero, strict=True) if z]
    return b.finish([o if o is not None else b.full(v, 0) for o, v in zip(outs, vals, strict=True)])


@entry
def vjp(f: Callable, *primals, has_aux: bool = False):
    """`(output, vjp_fn)`, or `(output, vjp_fn, aux)`: vjp_fn(cotangents) gives one cotangent per primal.

    Cotangents have the structure, shapes and dtypes of the output; vjp_fn may be called any number of times.
    Raises NotDifferentiable, NoTensorInputs, StructureMismatch. Follows torch.func.vjp.
    """
    call = _Call("vjp", f, primals, {}, tuple(range(len(primals))) if primals else 0)
    marks, split = _split_aux("vjp", call.captured, has_aux)
    count = _count_outputs("vjp", marks)
    cut = _cut(call.graph, call.nonzero, True)
    results = execute(cut.primal, call.inputs)
    results = write_back(call.graph, call.inputs, results)
    outs, residuals = results[: cut.count], results[cut.count :]
    value, aux = split(outs)
    out_leaves, out_spec = pytree.tree_flatten(value)
    vals = [call.graph.outputs[i].meta["val"] for i in range(count)]
    given = tuple(j for j in range(count) if cut.nonzero_out[j])
    place = {j: k for k, j in enumerate(j for j, z in enumerate(cut.nonzero_out) if z)}

    def vjp_fn(*cotangents, **ignored):
        tree = cotangents[0] if len(cotangents) == 1 else cotangents
        cts = _matching("vjp_fn", "cotangent", tree, out_leaves, out_spec, vals)
        graph = _transposed(call.graph, call.nonzero, tuple(place[j] for j in given))
        given_cts = [cts[j] for j in given]
        shares = execute(graph, [*residuals, *given_cts])
        return call.unflatten(own_memory(shares, [*call.inputs, *residuals, *given_cts]))

    return (value, vjp_fn, aux) if has_aux else (value, vjp_fn)


def _matching(where: str, what: str, tree, leaves, spec, vals) -> list[torch.Tensor]:
    """The tensor leaves of `tree`, which must match a structure of tensors."""
    given, given_spec = pytree.tree_flatten(tree)
    if given_spec != spec:
        raise errors.StructureMismatch(
            what=f"{where}: the {what} has another structure than the {'output' if what == 'cotangent' else 'primals'}",
            expected=str(spec),
        )
    tensors = [x for x, like in zip(given, leaves, strict=True) if is_tensor(like)]
    for x, v in zip(tensors, vals, strict=True):
        if not is_tensor(x) or val_of(x).shape != v.shape or x.dtype != v.dtype:
            got = val_of(x) if is_tensor(x) else type(x).__name__
            raise errors.StructureMismatch(
                what=f"{where}: a {what} is {got} where {v} belongs", expected=", ".join(map(str, vals))
            )
    return tensors


# ----- forward mode ---------------------------------------------------------------------------------------------------


@rewriting
def _jvp_graph(graph: Graph, nonzero, count: int) -> Graph:
    """inputs + nonzero tangents -> all outputs, then the tangents of the first `count`, zeros made real."""
    both, flags = differentiate(graph, nonzero, reverse_mode=False)
    b = Builder(SIMPLIFY)
    outs = b.inline(both, [b.input(n.meta["val"], n.name) for n in both.inputs])
    n = len(graph.outputs)
    given = iter(outs[n:])
    tangents = [next(given) if z else None for z in flags][:count]
    return b.finish(
        outs[:n] + [t if t is not None else b.full(o.val, 0) for t, o in zip(tangents, outs, strict=False)]
    )


def _primal_call(transform: str, f, primals) -> _Call:
    if not isinstance(primals, tuple) or not primals:
        raise errors.NoTensorInputs(transform=transform, what="primals: expected a non-empty tuple")
    return _Call(transform, f, primals, {}, tuple(range(len(primals))), reverse=False)


@entry
def jvp(f: Callable, primals: tuple, tangents: tuple, *, strict: bool = False, has_aux: bool = False):
    """`(output, output tangent)`, or `(output, output tangent, aux)`.

    Tangents have the structure, shapes and dtypes of the primals. Raises StructureMismatch, NotDifferentiable.
    Follows torch.func.jvp.
    """
    if strict:
        raise errors.NotSupported(what="jvp(strict=True)", instead="Call it with strict=False.")
    if not isinstance(tangents, tuple):
        raise errors.StructureMismatch(
            what="jvp: tangents must be a tuple like primals", expected="a tuple of tangents"
        )
    call = _primal_call("jvp", f, primals)
    vals = [val_of(t) for t in call.tensors]
    given = _matching("jvp", "tangent", tangents, *pytree.tree_flatten(primals), vals)
    marks, split = _split_aux("jvp", call.captured, has_aux)
    count = _count_outputs("jvp", marks)
    results = execute(_jvp_graph(call.graph, call.nonzero, count), [*call.inputs, *given])
    results = write_back(call.graph, call.inputs, results)
    n = len(call.graph.outputs)
    value, aux = split(results[:n])
    tangent, _ = split(own_memory(results[n:], [*call.inputs, *given]) + results[count:n])
    return (value, tangent, aux) if has_aux else (value, tangent)


@entry
def linearize(f: Callable, *primals):
    """`(output, jvp_fn)`: jvp_fn(*tangents) gives the output tangent without running `f` again. Follows torch.func.linearize."""
    call = _primal_call("linearize", f, primals)
    cut = _cut(call.graph, call.nonzero, False)
    _count_outputs("linearize", _split_aux("linearize", call.captured, False)[0])
    results = execute(cut.primal, call.inputs)
    results = write_back(call.graph, call.inputs, results)
    outs, residuals = results[: cut.count], results[cut.count :]
    leaves, spec = pytree.tree_flatten(primals)
    vals = [val_of(t) for t in call.tensors]
    out_vals = call.graph.out_vals
    linear = _instantiated(cut, tuple(out_vals))

    def jvp_fn(*tangents):
        given = _matching("jvp_fn", "tangent", tangents, leaves, spec, vals)
        return call.captured.outputs(own_memory(execute(linear, [*residuals, *given]), [*residuals, *given]))

    return call.captured.outputs(outs), jvp_fn


def _instantiated(cut, out_vals) -> Graph:
    """The linear graph of a cut with zero tangents made real."""
    b = Builder(SIMPLIFY)
    given = iter(b.inline(cut.linear, [b.input(n.meta["val"], n.name) for n in cut.linear.inputs]))
    return b.finish(
        [next(given) if z else b.full(v, 0) for z, v in zip(cut.nonzero_out, out_vals, strict=True)]
    )


# ----- jacobians ------------------------------------------------------------------------------------------------------


def _basis(b: Builder, val: Val):
    """The standard basis of a tensor's space: [numel, *shape]."""
    n = numel(val.shape)
    return b.emit(aten.eye.default, (n,), {"dtype": val.dtype, "device": val.device}).reshape([n, *val.shape])


@rewriting
def _jacrev_graph(graph: Graph, nonzero, count: int) -> Graph:
    """inputs -> jacobians [*out, *in] of the first `count` outputs (outer) by the nonzero inputs (inner), then all outputs."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    cut = _cut(graph, nonzero, True)
    results = b.inline(cut.primal, inputs)
    outs, residuals = results[: cut.count], results[cut.count :]
    in_vals = [n.meta["val"] for n, z in zip(graph.inputs, nonzero, strict=True) if z]
    blocks, k = [], 0
    for j in range(count):
        found = [None] * len(in_vals)
        if cut.nonzero_out[j]:
            found = _rows(b, transposed(cut.linear, cut.residuals, [k]), residuals, outs[j].val)
            k += 1
        blocks += [
            x.reshape([*outs[j].shape, *v.shape])
            if x is not None
            else b.full(Val((*outs[j].shape, *v.shape), v.dtype, v.device), 0)
            for x, v in zip(found, in_vals, strict=True)
        ]
    return b.finish(blocks + outs)


def _rows(b: Builder, back: Graph, residuals, out: Val) -> list:
    """A transposed graph mapped over the basis of one output; None where zero."""
    given = [i for i, n in enumerate(back.outputs) if n is not None]
    body = extract(list(back.inputs), [back.outputs[i] for i in given])
    flags = [False] * len(residuals) + [True]
    found = emit_map(b, body, [*residuals, _basis(b, out)], flags, ["stack"] * len(given), numel(out.shape))
    rows: list = [None] * len(back.outputs)
    for i, x in zip(given, found, strict=True):
        rows[i] = x
    return rows


@rewriting
def _jacfwd_graph(graph: Graph, nonzero, count: int) -> Graph:
    """As _jacrev_graph, by forward mode: a map of the jvp over the basis of each input."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    outs: list = []
    columns = []
    for i in (i for i, z in enumerate(nonzero) if z):
        cut = _cut(graph, tuple(j == i for j in range(len(nonzero))), False)
        results = b.inline(cut.primal, inputs)
        outs, residuals = results[: cut.count], results[cut.count :]
        v = inputs[i].val
        flags = [False] * cut.residuals + [True]
        tangents = iter(
            emit_map(
                b,
                cut.linear,
                [*residuals, _basis(b, v)],
                flags,
                ["stack"] * sum(cut.nonzero_out),
                numel(v.shape),
            )
        )
        columns.append(
            [
                _column(next(tangents), o, v)
                if z
                else b.full(Val((*o.shape, *v.shape), o.dtype, o.device), 0)
                for z, o in zip(cut.nonzero_out, outs, strict=True)
            ]
        )
    return b.finish([column[j] for j in range(count) for column in columns] + outs)


def _column(t, out, val: Val):
    """[n, *out] tangents over the basis of an input as [*out, *in]."""
    return t.movedim(0, -1).reshape([*out.shape, *val.shape])


def _jacobian(transform: str, graph_of, f, argnums, has_aux, args, kwargs, randomness=None):
    call = _Call(transform, f, args, kwargs, argnums, reverse=transform == "jacrev", randomness=randomness)
    marks, split = _split_aux(transform, call.captured, has_aux)
    count = _count_outputs(transform, marks)
    width = sum(call.marked)
    results = execute(graph_of(call.graph, call.nonzero, count), call.inputs)
    results = write_back(call.graph, call.inputs, results, count * width)
    entries = own_memory(results[: count * width], call.inputs)
    rows = [call.unflatten(entries[j * width : (j + 1) * width]) for j in range(count)]
    value, aux = split(results[count * width :])
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten(rows, spec), aux


def jacrev(
    f: Callable, argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False, chunk_size: int | None = None
) -> Callable:
    """The Jacobian of `f` by reverse mode: for output shape O and input shape I a tensor [*O, *I], in the structure of the
    output with that of the selected arguments inside. Errors as for vjp. Follows torch.func.jacrev."""
    _no_chunks("jacrev", chunk_size)

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        jacobian, aux = _jacobian("jacrev", _jacrev_graph, f, argnums, has_aux, args, kwargs)
        return (jacobian, aux) if has_aux else jacobian

    return wrapper


def jacfwd(
    f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, randomness: str = "error"
) -> Callable:
    """As jacrev, by forward mode. Follows torch.func.jacfwd.

    randomness: "error" raises RandomInVmap for a function that draws; with "different" it draws once, for all columns.
    """
    _check_randomness(randomness)

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        jacobian, aux = _jacobian("jacfwd", _jacfwd_graph, f, argnums, has_aux, args, kwargs, randomness)
        return (jacobian, aux) if has_aux else jacobian

    return wrapper


def hessian(f: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """The Hessian, forward over reverse: jacfwd(jacrev(f)). Follows torch.func.hessian."""
    return jacfwd(jacrev(f, argnums), argnums)


def _no_chunks(transform: str, chunk_size) -> None:
    if chunk_size is not None and chunk_size <= 0:
        raise errors.TypeOfArgument(
            what=f"{transform}: chunk_size is {chunk_size}", instead="Leave chunk_size out."
        )
    if chunk_size is not None:
        raise errors.NotSupported(what=f"{transform}(chunk_size=...)", instead="Leave chunk_size out.")


# ----- vmap -----------------------------------------------------------------------------------------------------------


def _check_randomness(randomness: str) -> None:
    if randomness == "same":
        raise errors.NotSupported(
            what='randomness="same"', instead='Use randomness="different", or draw outside vmap.'
        )
    if randomness not in ("error", "different"):
        raise errors.TypeOfArgument(
            what=f"vmap: randomness is {randomness!r}", instead='Use "error" or "different".'
        )


def vmap(
    func: Callable, in_dims=0, out_dims=0, randomness: str = "error", *, chunk_size: int | None = None
) -> Callable:
    """Map `func` over an axis of its arguments. Follows torch.func.vmap.

    in_dims: an int (may be negative), None, or a structure of these matching the arguments; out_dims likewise for the
    outputs. Raises BadInDims, BadOutDims, NotSupported (chunk_size, randomness="same"), ValueDependent.
    """
    _check_randomness(randomness)
    _no_chunks("vmap", chunk_size)

    @entry
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        return _vmap(func, in_dims, out_dims, randomness, args, kwargs)

    return wrapper


def _vmap(func, in_dims, out_dims, randomness, args, kwargs):
    leaves, spec = pytree.tree_flatten((args, kwargs))
    check_tensors("vmap", leaves)
    dims = _in_dims(in_dims, args, kwargs, leaves)
    length = _length(leaves, dims)
    vals = []
    for x, d in zip(leaves, dims, strict=True):
        if is_tensor(x):
            v = val_of(x)
            vals.append(v if d is None else Val(v.shape[:d] + v.shape[d + 1 :], v.dtype, v.device))
    tensors = [x for x in leaves if is_tensor(x)]
    tensor_dims = [d for x, d in zip(leaves, dims, strict=True) if is_tensor(x)]
    mapped = [d is not None for d in tensor_dims]
    captured = capture(
        func, leaves, spec, vals, randomness=randomness, writable=lambda i: i < len(mapped) and mapped[i]
    )
    out = _out_dims(out_dims, captured) + [tensor_dims[i] for i in captured.graph.written]
    graph = _map_graph(
        captured.graph, tuple(tensor_dims), tuple(out), length, randomness, tuple(vals_of(leaves))
    )
    results = execute(graph, tensors + captured.captures)
    return captured.outputs(write_back(captured.graph, tensors + captured.captures, results))


@rewriting
def _map_graph(body: Graph, dims, out_dims, length, randomness, vals) -> Graph:
    """inputs with their mapped axes anywhere -> the outputs of the map, axes moved where they belong."""
    b = Builder(SIMPLIFY)
    full = [*vals, *body.in_vals[len(vals) :]]
    inputs = [b.input(v, n.name) for v, n in zip(full, body.inputs, strict=True)]
    dims = [*dims, *[None] * (len(inputs) - len(dims))]
    operands = [x.movedim(d, 0) if d else x for x, d in zip(inputs, dims, strict=True)]
    kinds = ["once" if d is None else "stack" for d in out_dims]
    outs = emit_map(b, body, operands, [d is not None for d in dims], kinds, length, randomness)
    return b.finish([o.movedim(0, d) if d else o for o, d in zip(outs, out_dims, strict=True)])


def _in_dims(in_dims, args, kwargs, leaves) -> list[int | None]:
    """One dim (non-negative) or None per leaf."""
    if not args:
        raise errors.BadInDims(what="the mapped function was called without positional arguments")
    if not isinstance(in_dims, (int, tuple, list)):
        raise errors.BadInDims(what=f"in_dims is {in_dims!r}, of type {type(in_dims).__name__}")
    spec = pytree.tree_flatten(args)[1]
    given = tuple(in_dims) if isinstance(in_dims, list) else in_dims
    flat = pytree._broadcast_to_and_flatten(given, spec)
    if flat is None:
        raise errors.BadInDims(
            what=f"in_dims {in_dims!r} does not match the structure of the {len(args)} arguments"
        )
    flat = [*flat, *(None for _ in pytree.tree_leaves(kwargs))]
    return [_checked_dim(d, x, in_dims) for d, x in zip(flat, leaves, strict=True)]


def _checked_dim(d, x, in_dims):
    if d is None:
        return None
    if isinstance(d, bool) or not isinstance(d, int):
        raise errors.BadInDims(what=f"in_dims {in_dims!r} holds {d!r}, which is neither an int nor None")
    if not is_tensor(x):
        raise errors.BadInDims(
            what=f"in_dims {in_dims!r} names dim {d} of an input of type {type(x).__name__}, which is no tensor"
        )
    if not -x.ndim <= d < x.ndim:
        raise errors.BadInDims(what=f"in_dims {in_dims!r} names dim {d} of a tensor with {x.ndim} dimensions")
    return d % x.ndim


def _length(leaves, dims):
    sizes = {from_torch(x.shape[d]) for x, d in zip(leaves, dims, strict=True) if d is not None}
    if not sizes:
        raise errors.BadInDims(what="no argument is mapped: in_dims is None everywhere")
    if len(sizes) > 1:
        raise errors.BadInDims(
            what=f"the mapped axes have different sizes: {', '.join(sorted(map(str, sizes)))}"
        )
    return sizes.pop()


def _out_dims(out_dims, captured: Captured) -> list[int | None]:
    """One dim (non-negative) or None per output tensor."""
    outputs = captured.graph.outputs[: len(captured.graph.outputs) - len(captured.graph.written)]
    if any(not is_tensor_mark for is_tensor_mark in captured.tensor_flags):
        raise errors.TypeOfArgument(
            what="vmap: the mapped function must return only tensors",
            instead="Return tensors, or return other values from outside vmap.",
        )
    if captured.out_spec.is_leaf() and isinstance(out_dims, tuple) and len(out_dims) == 1:
        (out_dims,) = out_dims  # torch.func lets (d,) stand for one output
    flat = pytree._broadcast_to_and_flatten(out_dims, captured.out_spec)
    if flat is None:
        raise errors.BadOutDims(
            what=f"out_dims {out_dims!r} does not match the structure of the outputs ({captured.out_spec})"
        )
    for d, node in zip(flat, outputs, strict=True):
        ndim = node.meta["val"].ndim + 1
        if d is not None and (not isinstance(d, int) or not -ndim <= d < ndim):
            raise errors.BadOutDims(what=f"out_dims holds {d!r} for an output with {ndim} dimensions")
    return [d if d is None else d % (n.meta["val"].ndim + 1) for d, n in zip(flat, outputs, strict=True)]


@entry
def stop_gradient(x):
    """The tensors of a structure as constants for every derivative, forward and reverse. Follows jax.lax.stop_gradient."""

    def graph(val: Val) -> Graph:
        b = Builder(None)
        return b.finish([b.emit(_stop_gradient, (b.input(val),))])

    check_tensors("stop_gradient", pytree.tree_leaves(x))
    return pytree.tree_map(lambda t: execute(graph(val_of(t)), [t])[0] if is_tensor(t) else t, x)


def make_graph(f: Callable) -> Callable:
    """A function returning the `Graph` of `f` at these arguments: typed text when printed; `.inputs`, `.nodes`, `.outputs`."""

    @entry
    @functools.wraps(f)
    def wrapper(*args, **kwargs) -> Graph:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        check_tensors("make_graph", leaves)
        return capture(f, leaves, spec, vals_of(leaves)).graph

    return wrapper
