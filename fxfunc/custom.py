"""Functions with derivatives of their own: torch.autograd.Function inside captures, and `register_rule`.

A call of an autograd.Function under a capture becomes one `custom` node: its forward as the body, its backward (and jvp)
captured on their own over what it saved. Batching opens the body, so a `vmap` staticmethod is not needed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable

import torch
from torch.autograd.function import Function, FunctionCtx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from fxfunc.passes import errors
from fxfunc.passes.concrete import Concrete
from fxfunc.passes.graph import Graph, Val, custom
from fxfunc.passes.infer import forget
from fxfunc.passes.intercept import OF_LIBRARY
from fxfunc.passes.record import Builder
from fxfunc.passes.rules import ROWS, Row
from fxfunc.passes.simplify import SIMPLIFY
from fxfunc.passes.trace import Recorder
from fxfunc.passes.tracer import Tracer, current, tracked, val_of

_lock = threading.Lock()
_depth = 0
_torch_active = torch._C._are_functorch_transforms_active
_torch_call = torch.autograd.function.custom_function_call


@contextlib.contextmanager
def hooks():
    """While a capture is under way, `PATCHES` are in place of what torch has there.

    Function.apply so takes the path that it takes under torch.func, which ends in `_call`, also for functions bound earlier
    (`f = F.apply`). Other threads, and code outside a capture, see no change.
    """
    global _depth
    with _lock:
        _depth += 1
        for (owner, name), (_, ours) in PATCHES.items():
            setattr(owner, name, ours)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for (owner, name), (theirs, _) in PATCHES.items():
                    setattr(owner, name, theirs)


def _active() -> bool:
    if _in_user_code() and sys._getframe(1).f_code is torch.autograd.backward.__code__:
        raise errors.UnsupportedInside(
            what="torch.autograd", instead="Use fxfunc.grad or fxfunc.vjp, which nest."
        )
    return _in_user_code() or _torch_active()


def _in_user_code() -> bool:
    return current() is not None and current().user_code


def _dispatch(function: type[Function], *args, **kwargs):
    return _call(function, args, kwargs) if _in_user_code() else _torch_call(function, *args, **kwargs)


class _Checkpoint:
    """torch.utils.checkpoint under a capture is the function itself: what is kept and what is computed again is decided on
    the finished graph. So it draws once, whatever `preserve_rng_state`.

    Stands for CheckpointFunction (use_reentrant=True). Without it nothing is needed: torch's hooks on what autograd saves
    are never called, since tracers save nothing.
    """

    @staticmethod
    def apply(run, preserve_rng_state: bool, *args):
        return run(*args) if _in_user_code() else CheckpointFunction.apply(run, preserve_rng_state, *args)


# Operators of torch that take functions, as torch calls them -> what records one; fxfunc/control.py fills it.
CONTROL: dict[str, Callable] = {}
_torch_compile_and_call = torch._higher_order_ops.utils._hop_compile_and_call


def _control(function, args, kwargs=None):
    """What torch.cond and its kin call in eager code: they would have Dynamo trace their functions."""
    if not _in_user_code():
        return _torch_compile_and_call(function, args, kwargs)
    name = getattr(function, "__qualname__", function.__name__).split(".")[0]
    if name not in CONTROL:
        raise errors.UnsupportedInside(
            what=f"torch's {name}", instead="Use fxfunc.vmap, fxfunc.scan, fxfunc.fori_loop or fxfunc.cond."
        )
    return CONTROL[name](*args, **(kwargs or {}))


# (owner, name) -> what torch has there, what stands in for it during a capture.
PATCHES = {
    (torch._C, "_are_functorch_transforms_active"): (_torch_active, _active),
    (torch.autograd.function, "custom_function_call"): (_torch_call, _dispatch),
    (torch.utils.checkpoint, "CheckpointFunction"): (CheckpointFunction, _Checkpoint),
    (torch._higher_order_ops.utils, "_hop_compile_and_call"): (_torch_compile_and_call, _control),
}


def _registered(op):
    """The handler of an op that torch.library.custom_op gave an autograd formula."""
    definition = torch._library.custom_ops.OPDEFS.get(op._schema.name)
    if definition is None or definition._backward_fn is None:
        return None

    class Registered(Function):
        forward = staticmethod(op)
        backward = staticmethod(definition._backward_fn)

        @staticmethod
        def setup_context(ctx, inputs, output):
            if definition._setup_context_fn is not None:
                definition._setup_context_fn(ctx=ctx, inputs=inputs, output=output)

    Registered.__name__ = str(op)
    return lambda recorder, op, *args, **kwargs: _call(Registered, args, kwargs, opaque=op)


OF_LIBRARY.append(_registered)


def _call(function: type[Function], args, kwargs, opaque=None):
    """Record a call as a `custom` node, and return its outputs."""
    outer, ctx = current(), FunctionCtx()
    forward = Recorder(concrete=outer.concrete and Concrete(outer.concrete.run, outer.concrete.draws))
    forward.opaque = opaque
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    with forward:
        inner = [forward.input(val_of(x), "x", known=True, like=x) for x in tensors]
        inputs, keywords = pytree.tree_unflatten(_replaced(leaves, inner), spec)
        output = function.forward(*inputs, **keywords)
        function.setup_context(ctx, inputs, output)
    outs, out_spec = pytree.tree_flatten(output)
    own = _Derivatives(function, ctx, inputs, outs, forward)
    body = forward.finish([x for x in outs if isinstance(x, torch.Tensor)] + own.residuals)
    operands = [*tensors, *(t for t, _, _ in forward.captures.values())]
    wrt = [next(i for i, t in enumerate(inner) if t is x) for _, x in own.wrt]
    results = outer.emit(
        custom,
        (body, own.backward, own.jvp, tuple(map(outer.lift, operands))),
        {
            "wrt": wrt,
            "outs": own.places,
            "count": own.count,
            "origins": own.origins(inner),
            "name": function.__name__,
        },
        torch.is_grad_enabled() and any(map(tracked, tensors)),
    )
    return pytree.tree_unflatten(_replaced(outs, results), out_spec)


def _replaced(leaves, tensors) -> list:
    """The leaves with their tensors replaced in order."""
    rest = iter(tensors)
    return [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]


class _Derivatives:
    """The backward and jvp of one call as graphs: residuals, then (co)tangents -> (co)tangents.

    wrt: (position, tensor) of the arguments that have a gradient; places: the outputs, among the `count` tensors, that do.
    """

    def __init__(self, function: type[Function], ctx: FunctionCtx, inputs, outs, forward: Recorder):
        self.function, self.ctx, self.inputs, self.outs = function, ctx, inputs, outs
        self.wrt = [
            (i, x) for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and val_of(x).differentiable
        ]
        fixed = getattr(ctx, "non_differentiable", ())
        self.results = results = [x for x in outs if isinstance(x, torch.Tensor)]
        self.count = len(results)
        self.places = [
            i for i, x in enumerate(results) if val_of(x).differentiable and not any(x is y for y in fixed)
        ]
        state = [x for x in pytree.tree_leaves(vars(ctx)) if isinstance(x, Tracer) and x.recorder is forward]
        self.saved = list({id(x): x for x in state}.values())
        in_vals, out_vals = [val_of(x) for _, x in self.wrt], [val_of(results[i]) for i in self.places]
        back, push = self._backward(out_vals), self._jvp(in_vals)
        closed = [t for part in (back, push) if part for t in part.closed]
        self.residuals = [*self.saved, *(Tracer(forward, forward.lift(t)) for t in closed)]
        self.backward = back and back.over([val_of(t) for t in closed], 0, self._once(back.function))
        self.jvp = push and push.over([val_of(t) for t in closed], len(back.closed) if back else 0, None)

    def origins(self, inner) -> list[int | None]:
        """For each residual the argument i (as i) or output j (as -1 - j) that it is."""
        place = {id(x): -1 - j for j, x in enumerate(self.results)} | {id(x): i for i, x in enumerate(inner)}
        return [place.get(id(x)) for x in self.residuals]

    def _context(self, saved, name: str) -> FunctionCtx:
        """The ctx that a derivative gets: `ctx` with its tensors replaced; `name` is the list that saved_tensors reads."""
        to = {id(x): y for x, y in zip(self.saved, saved, strict=True)}
        ctx = _SavedCtx()
        ctx.__dict__.update(pytree.tree_map(lambda x: to.get(id(x), x), vars(self.ctx)))
        ctx.saved_tensors = tuple(getattr(ctx, name, ()))
        ctx.needs_input_grad = tuple(any(i == j for j, _ in self.wrt) for i in range(len(self.inputs)))
        return ctx

    def _backward(self, vals: list[Val]) -> _Part | None:
        own = self.function.vjp if self.function.vjp is not Function.vjp else self.function.backward
        if own is Function.backward:
            return None

        def run(saved, cts):
            given = iter(cts)
            cts = [next(given) if i in self.places else x for i, x in enumerate(_zeros(self.results))]
            grads = _unwrapped(own)(self._context(saved, "to_save"), *_spread(self.outs, cts))
            grads = grads if isinstance(grads, tuple) else (grads,)
            return [grads[i] for i, _ in self.wrt]

        return _Part(own, [val_of(x) for x in self.saved], vals, run)

    def _jvp(self, vals: list[Val]) -> _Part | None:
        if self.function.jvp is Function.jvp:
            return None

        def run(saved, ts):
            by_position = dict(zip([i for i, _ in self.wrt], ts, strict=True))
            given = [by_position.get(i) for i in range(len(self.inputs))]
            out = self.function.jvp(self._context(saved, "saved_for_forward"), *given)
            out = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            return [out[i] for i in self.places]

        return _Part(self.function.jvp, [val_of(x) for x in self.saved], vals, run)

    def _once(self, backward) -> str | None:
        return (
            f"{self.function.__name__}.backward (@once_differentiable)"
            if _unwrapped(backward) is not backward
            else None
        )


class _SavedCtx(FunctionCtx):
    """What backward and jvp get as ctx."""

    saved_tensors: tuple
    needs_input_grad: tuple[bool, ...]


def _zeros(tensors) -> list:
    """Zeros of the same shapes in the capture under way."""
    return [torch.zeros(val_of(t).shape, dtype=t.dtype, device=t.device) for t in tensors]


def _spread(outs, cts) -> list:
    """One cotangent per output; None for those that are no tensors."""
    rest = iter(cts)
    return [next(rest) if isinstance(x, torch.Tensor) else None for x in outs]


def _unwrapped(backward: Callable) -> Callable:
    """A backward without @once_differentiable, whose no_grad would make its derivative zero."""
    code = getattr(backward, "__code__", None)
    return backward.__wrapped__ if code and code.co_filename == torch.autograd.function.__file__ else backward


class _Part:
    """One derivative under capture; `closed` are the tensors it closes over."""

    def __init__(self, function: Callable, saved: list[Val], vals: list[Val], run: Callable):
        self.function, recorder = function, Recorder()
        with recorder:
            residuals, given = (
                [recorder.input(v, "saved") for v in saved],
                [recorder.input(v, "t") for v in vals],
            )
            results = run(residuals, given)
            self.graph = recorder.finish(results)
        self.closed = [t for t, _, _ in recorder.captures.values()]
        self.saved, self.given = len(saved), len(vals)

    def over(self, closed: list[Val], first: int, once: str | None) -> Graph:
        """The graph with all `closed` tensors among its residuals, its own from `first`; `once` forbids a derivative of it."""
        b = Builder(SIMPLIFY)
        saved = [b.input(n.meta["val"], "saved") for n in self.graph.inputs[: self.saved]]
        shared = [b.input(v, "closed") for v in closed]
        given = [b.input(n.meta["val"], "t") for n in self.graph.inputs[self.saved :][: self.given]]
        inputs = [*saved, *given, *shared[first : first + len(self.closed)]]
        if once is None:
            return b.finish(b.inline(self.graph, inputs))
        wrt = [i for i, x in enumerate(inputs) if x.val.differentiable]
        present = [i for i, n in enumerate(self.graph.outputs) if n is not None]
        rule = {
            "wrt": wrt,
            "outs": list(range(len(present))),
            "count": len(present),
            "origins": [],
            "name": once,
        }
        body = Builder(SIMPLIFY)
        outs = body.inline(self.graph, [body.input(x.val, "a") for x in inputs])
        results = dict(
            zip(
                present,
                b.emit(custom, (body.finish([outs[i] for i in present]), None, None, tuple(inputs)), rule),
                strict=True,
            )
        )
        return b.finish([results.get(i) for i in range(len(self.graph.outputs))])


def register_rule(op, *, jvp=None, transpose=None, batch=None) -> None:
    """Give an op of your own (an OpOverload, or what torch.library.custom_op returns) rules that it lacks.

    jvp: a sequence with one function a tensor argument, `f(t, y, *args, **kwargs)` -> that argument's share of the tangent
    (t: its tangent, y: the output), or one function `f(ts, y, *args, **kwargs)` of all tangents (None where zero).
    transpose: for an op that is linear in some arguments, one function a tensor argument, `f(ct, *args, **kwargs)` -> its
    cotangent, the adjoint. batch: `f(ctx, op, args, kwargs)` -> results with the mapped axis at dim 0; `ctx.lift(x)` gives an
    argument with the axis at dim 0. All of them compute with values that have torch's operators and methods; they may have
    no effects. Raises TypeOfArgument for something that is no op, and for a rule that the op has already.
    """
    op = getattr(op, "_opoverload", op)
    op = op.default if isinstance(op, torch._ops.OpOverloadPacket) else op
    if not isinstance(op, torch._ops.OpOverload):
        raise errors.TypeOfArgument(
            what=f"register_rule: {op!r} is no operator",
            instead="Pass torch.ops.<library>.<name>.<overload>, or the result of torch.library.custom_op.",
        )
    row = ROWS.get(op, Row())
    given = {"jvp": _row(jvp), "transpose": _row(transpose), "batch": batch}
    for name, rule in given.items():
        if rule is not None and getattr(row, name) is not None:
            raise errors.TypeOfArgument(
                what=f"register_rule: {op} has a {name} rule already", instead="Leave it out."
            )
    for name, rule in given.items():
        setattr(row, name, getattr(row, name) if rule is None else rule)
    ROWS[op] = row
    forget()


def _row(rule):
    return tuple(rule) if isinstance(rule, (list, tuple)) else rule
