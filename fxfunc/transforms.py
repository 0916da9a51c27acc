"""Derivatives in both modes. Each transform captures the function, rewrites its graph and executes the result, so that
they nest in any order.

Signatures and results follow torch.func (value_and_grad and linear_transpose: JAX).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dce import dce
from fxfunc.passes.graph import Graph, Val, extract, reached
from fxfunc.passes.graph import stop_gradient as _stop_gradient
from fxfunc.passes.infer import rewriting
from fxfunc.passes.linearize import linearize as _linearize
from fxfunc.passes.linearize import vjp as _emit_vjp
from fxfunc.passes.record import Builder, Value
from fxfunc.passes.rules.region import differentiate, transposed
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.tracer import val_of

from .arguments import Call, Mark, count_outputs, matching, primal_call, split_aux
from .capture import Captured, capture, check_tensors, execute, is_tensor, own_memory, vals_of, write_back
from .entry import entry
from .reuse import transform

# ----- reverse mode ---------------------------------------------------------------------------------------------------


@rewriting
def _grad_graph(graph: Graph, nonzero: tuple[bool, ...]) -> Graph:
    """inputs -> the gradients of output 0 for the nonzero inputs, then all outputs."""
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    outs, cts = _emit_vjp(
        b, graph, inputs, nonzero, lambda outs: [b.full(outs[0].val, 1)] + [None] * (len(outs) - 1)
    )
    return b.finish(_real(b, graph, nonzero, cts) + outs)


def _real(b: Builder, graph: Graph, nonzero, cts) -> list[Value]:
    """The cotangents of the nonzero inputs of a graph, zeros made real."""
    vals = [n.meta["val"] for n, z in zip(graph.inputs, nonzero, strict=True) if z]
    return [ct if ct is not None else b.full(v, 0) for ct, v in zip(cts, vals, strict=True)]


def _scalar(transform: str, captured: Captured, has_aux: bool):
    """Check that the differentiated output is one real scalar tensor."""
    value, split = split_aux(transform, captured, has_aux)
    if not isinstance(value, Mark):
        raise errors.NonScalarOutput(transform=transform, got=f"a {type(value).__name__}")
    val = captured.graph.outputs[value.index].meta["val"]
    if val.shape != ():
        raise errors.NonScalarOutput(transform=transform, got=f"a tensor of shape {val.shape}")
    if not val.dtype.is_floating_point:
        raise errors.NonScalarOutput(transform=transform, got=f"a tensor of dtype {val.dtype}")
    return split


def _grad_and_value(transform: str, f, argnums, has_aux, args, kwargs):
    call = Call(transform, f, args, kwargs, argnums)
    split = _scalar(transform, call.captured, has_aux)
    results = execute(_grad_graph(call.graph, call.nonzero), call.inputs)
    count = sum(call.marked)
    results = write_back(call.graph, call.inputs, results, count)
    value, aux = split(results[count:])
    return call.unflatten(own_memory(results[:count], call.inputs)), value, aux


def grad_and_value(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function returning `(gradient, value)`, or `(gradient, (value, aux))` with has_aux.

    `func` returns a 0-d floating point tensor; the gradient has the structure, shapes and dtypes of the arguments that
    `argnums` names. Raises BadArgnums, NonScalarOutput, NotDifferentiable, NoTensorInputs. Follows torch.func.grad_and_value.
    """

    @transform(func, "grad_and_value", argnums, has_aux)
    def wrapper(*args, **kwargs):
        g, value, aux = _grad_and_value("grad_and_value", func, argnums, has_aux, args, kwargs)
        return (g, (value, aux)) if has_aux else (g, value)

    return wrapper


def value_and_grad(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """As grad_and_value, in JAX's order: `(value, gradient)`, or `((value, aux), gradient)`. Follows jax.value_and_grad."""

    @transform(func, "value_and_grad", argnums, has_aux)
    def wrapper(*args, **kwargs):
        g, value, aux = _grad_and_value("value_and_grad", func, argnums, has_aux, args, kwargs)
        return ((value, aux), g) if has_aux else (value, g)

    return wrapper


def grad(func: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function returning the gradient of `func`, or `(gradient, aux)` with has_aux. Follows torch.func.grad.

    Shapes, dtypes and errors as for grad_and_value.
    """

    @transform(func, "grad", argnums, has_aux)
    def wrapper(*args, **kwargs):
        g, _, aux = _grad_and_value("grad", func, argnums, has_aux, args, kwargs)
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
    return b.finish(_real(b, graph, nonzero, outs))


@entry
def vjp(func: Callable, *primals, has_aux: bool = False):
    """`(output, vjp_fn)`, or `(output, vjp_fn, aux)`: vjp_fn(cotangents) gives one cotangent per primal.

    Cotangents have the structure, shapes and dtypes of the output; vjp_fn may be called any number of times, whatever
    `retain_graph` says, and `create_graph=False` gives constants. With has_aux, `func` returns `(output, aux)`.
    Raises NotDifferentiable, NoTensorInputs, StructureMismatch. Follows torch.func.vjp.
    """
    call = Call("vjp", func, primals, {}, tuple(range(len(primals))) if primals else 0)
    marks, split = split_aux("vjp", call.captured, has_aux)
    count = count_outputs("vjp", marks)
    cut = _cut(call.graph, call.nonzero, True)
    results = execute(cut.primal, call.inputs)
    results = write_back(call.graph, call.inputs, results)
    outs, residuals = results[: cut.count], results[cut.count :]
    value, aux = split(outs)
    out_spec = pytree.tree_structure(value)
    vals = [call.graph.outputs[i].meta["val"] for i in range(count)]
    given = tuple(j for j in range(count) if cut.nonzero_out[j])
    place = {j: k for k, j in enumerate(j for j, z in enumerate(cut.nonzero_out) if z)}

    def vjp_fn(cotangents, retain_graph: bool = True, create_graph: bool | None = None):
        cts = matching("vjp_fn", "cotangent", cotangents, out_spec, vals)
        graph = _transposed(call.graph, call.nonzero, tuple(place[j] for j in given))
        given_cts = [cts[j] for j in given]
        create_graph = torch.is_grad_enabled() if create_graph is None else create_graph
        with torch.set_grad_enabled(create_graph):
            shares = execute(graph, [*residuals, *given_cts])
            return call.unflatten(own_memory(shares, [*call.inputs, *residuals, *given_cts]))

    return (value, vjp_fn, aux) if has_aux else (value, vjp_fn)


# ----- forward mode ---------------------------------------------------------------------------------------------------


@rewriting
def _jvp_graph(graph: Graph, nonzero, count: int) -> tuple[Graph, tuple[bool, ...]]:
    """(inputs + nonzero tangents -> all outputs, then the tangents of the first `count`, zeros made real; which are none)."""
    both, flags = differentiate(graph, nonzero, reverse_mode=False)
    b = Builder(SIMPLIFY)
    outs = b.inline(both, [b.input(n.meta["val"], n.name) for n in both.inputs])
    n = len(graph.outputs)
    given = iter(outs[n:])
    tangents = [next(given) if z else None for z in flags][:count]
    full = [t if t is not None else b.full(o.val, 0) for t, o in zip(tangents, outs, strict=False)]
    return b.finish(outs[:n] + full), tuple(flags[:count])


@entry
def jvp(func: Callable, primals: tuple, tangents: tuple, *, strict: bool = False, has_aux: bool = False):
    """`(output, output tangent)`, or `(output, output tangent, aux)`.

    Tangents have the structure, shapes and dtypes of the primals. strict: an output that does not depend on the primals
    raises IndependentOutput and has no tangent of zeros. Raises StructureMismatch, NotDifferentiable. Follows torch.func.jvp.
    """
    if not isinstance(tangents, tuple):
        raise errors.StructureMismatch(
            what="jvp: tangents must be a tuple like primals", expected="a tuple of tangents"
        )
    call = primal_call("jvp", func, primals)
    vals = [val_of(t) for t in call.tensors]
    given = matching("jvp", "tangent", tangents, pytree.tree_structure(primals), vals)
    marks, split = split_aux("jvp", call.captured, has_aux)
    count = count_outputs("jvp", marks)
    graph, dependent = _jvp_graph(call.graph, call.nonzero, count)
    if strict and not all(dependent):
        raise errors.IndependentOutput(transform="jvp(strict=True)", index=dependent.index(False))
    results = execute(graph, [*call.inputs, *given])
    results = write_back(call.graph, call.inputs, results)
    n = len(call.graph.outputs)
    value, aux = split(results[:n])
    tangent, _ = split(own_memory(results[n:], [*call.inputs, *given]) + results[count:n])
    return (value, tangent, aux) if has_aux else (value, tangent)


@entry
def linearize(func: Callable, *primals):
    """`(output, jvp_fn)`: jvp_fn(*tangents) gives the output tangent without running `func`. Follows torch.func.linearize."""
    call = primal_call("linearize", func, primals)
    cut = _cut(call.graph, call.nonzero, False)
    count_outputs("linearize", split_aux("linearize", call.captured, False)[0])
    results = execute(cut.primal, call.inputs)
    results = write_back(call.graph, call.inputs, results)
    outs, residuals = results[: cut.count], results[cut.count :]
    spec = pytree.tree_structure(primals)
    vals = [val_of(t) for t in call.tensors]
    out_vals = call.graph.out_vals
    linear = _instantiated(cut, tuple(out_vals))

    def jvp_fn(*tangents):
        given = matching("jvp_fn", "tangent", tangents, spec, vals)
        return call.captured.outputs(own_memory(execute(linear, [*residuals, *given]), [*residuals, *given]))

    return call.captured.outputs(outs), jvp_fn


def _instantiated(cut, out_vals) -> Graph:
    """The linear graph of a cut with zero tangents made real."""
    b = Builder(SIMPLIFY)
    given = iter(b.inline(cut.linear, [b.input(n.meta["val"], n.name) for n in cut.linear.inputs]))
    return b.finish(
        [next(given) if z else b.full(v, 0) for z, v in zip(cut.nonzero_out, out_vals, strict=True)]
    )


@entry
def hvp(func: Callable, primals: tuple, tangents: tuple):
    """Hessian-vector product of a function with a scalar output: a tuple with one entry per primal, forward over reverse.

    Tangents have the structure, shapes and dtypes of the primals. Errors as for grad and jvp. Follows
    torch.autograd.functional.hvp without the function's value, and JAX's cookbook: jvp(grad(f), primals, tangents)[1].
    """
    if not isinstance(primals, tuple) or not primals:
        raise errors.NoTensorInputs(transform="hvp", what="primals: expected a non-empty tuple")
    return jvp(grad(func, tuple(range(len(primals)))), primals, tangents)[1]


@rewriting
def _linear_graph(graph: Graph, nonzero) -> Graph:
    """captures + cotangents of all outputs -> cotangents of the nonzero inputs, zeros made real; raises if not linear."""
    cut = _linearize(graph, nonzero, reverse=True)
    known = dce(extract(list(cut.primal.inputs), list(cut.primal.outputs[cut.count :])))
    starts = [n for n, z in zip(known.inputs, nonzero, strict=True) if z]
    if reached(known.nodes, starts) & set(known.outputs):
        raise errors.NotLinear(transform="linear_transpose")
    b = Builder(SIMPLIFY)
    inputs = [b.input(n.meta["val"], n.name) for n in graph.inputs]
    residuals = b.inline(known, inputs)
    cts = [b.input(v, "ct") for v in graph.out_vals]
    given = [j for j, z in enumerate(cut.nonzero_out) if z]
    back = transposed(cut.linear, cut.residuals, list(range(len(given))))
    outs = b.inline(back, [*residuals, *(cts[j] for j in given)])
    return b.finish(_real(b, graph, nonzero, outs))


@entry
def linear_transpose(func: Callable, *primals) -> Callable:
    """The transpose of a linear function: a function of one cotangent, with the structure of the output, that gives a tuple
    with one entry per primal.

    Of the primals only shapes and dtypes matter. It is the plain transpose, without conjugation, also for complex dtypes.
    Raises NotLinear where the derivative depends on the primals; of an affine function the constant has no part in it.
    Follows jax.linear_transpose.
    """
    call = Call("linear_transpose", func, primals, {}, tuple(range(len(primals))) if primals else 0)
    count_outputs("linear_transpose", split_aux("linear_transpose", call.captured, False)[0])
    graph = _linear_graph(call.graph, call.nonzero)
    out_vals = list(call.graph.out_vals)
    out_spec = call.captured.out_spec

    def transpose_fn(cotangents):
        cts = matching("linear_transpose", "cotangent", cotangents, out_spec, out_vals)
        shares = execute(graph, [*call.inputs, *map(torch.conj_physical, cts)])
        return call.unflatten(own_memory([torch.conj_physical(s) for s in shares], [*call.inputs, *cts]))

    return transpose_fn


# ----- neither --------------------------------------------------------------------------------------------------------


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
