"""Running torch code on tracers. Entry points: `Recorder` (a capture under way) and `trace_torch` (one function, Vals in).

A `Tracer` is a tensor without data that stands for a value of the graph its recorder grows. Calls are recorded as they
come, writes included, with the grad mode they ran under; `functionalize.py` then gives the functional graph.
Tensors of other recorders and real tensors become inputs (`captures`), bound by whoever asked for the capture.
"""

from __future__ import annotations

import math
import threading

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import errors
from .dims import from_torch, to_torch
from .functionalize import functionalize
from .graph import Graph, Val, is_random, stop_gradient
from .infer import hermetic, infer, meta_result
from .record import Builder, Value, vals

aten = torch.ops.aten


class Tracer(torch.Tensor):
    """A tensor standing for `value` in the graph of `recorder`; `tracks` is what `requires_grad` answers."""

    recorder: Recorder
    value: Value
    tracks: bool
    dense = False  # known to lie in memory as its shape says

    @staticmethod
    def __new__(cls, recorder: Recorder, value: Value, tracks: bool = False):
        v = value.val
        self = torch.Tensor._make_wrapper_subclass(
            cls, [to_torch(s) for s in v.shape], dtype=v.dtype, device=v.device
        )
        self.recorder, self.value, self.tracks = recorder, value, tracks and v.differentiable
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise errors.UnsupportedInside(
            what=f"a tensor that left its capture, in {func}",
            instead="Return the tensor from the function instead of keeping it elsewhere.",
        )

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Tracer({self.value.val})"


class _Functions(TorchFunctionMode):
    """Calls whose meaning is lost below the level of torch functions (`FUNCTIONS`), on tracers and real tensors alike."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


class _Stack(threading.local):
    def __init__(self):
        self.recorders: list[Recorder] = []


_stack = _Stack()


def current() -> Recorder | None:
    """The innermost capture under way in this thread."""
    return _stack.recorders[-1] if _stack.recorders else None


class Recorder(TorchDispatchMode):
    """Records every ATen call made while it is entered."""

    def __init__(self, user_code: bool = True):
        super().__init__()
        self.builder = Builder(None)
        self.captures: dict[int, tuple[torch.Tensor, Value, str | None]] = {}
        self.mutates = False
        self.randomness: str | None = None  # that of the vmap this capture is the body of
        self.user_code = user_code
        self.opaque = None  # a library's op that is recorded as it is
        self.functions = _Functions()
        self.results: list[Tracer | None] = []  # of the last call that had several

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo to keep it away from this class

    def __enter__(self):
        _stack.recorders.append(self)
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        _stack.recorders.remove(self)
        super().__exit__(*exc)
        self.functions.__exit__(*exc)

    def input(self, val: Val, name: str, tracks: bool = False) -> Tracer:
        """A tracer for a new input."""
        return Tracer(self, self.builder.input(val, name), tracks)

    def lift(self, t: torch.Tensor) -> Value:
        """The value of a tensor met in captured code; one that is not ours becomes a capture."""
        if isinstance(t, Tracer) and t.recorder is self:
            return t.value
        found = self.captures.get(id(t))
        if found is None:
            value = self.builder.input(val_of(t), "closed")
            found = self.captures[id(t)] = (t, value, errors.user_line())
        return found[1]

    def emit(self, op, args, kwargs=None, tracks: bool = False):
        """Record a call on Values; the results as tracers."""
        self.builder.source = errors.user_line() if self.user_code else None
        out = self.builder.emit(op, args, kwargs or {})
        self._mark(out)
        return self.wrap(out, tracks)

    def _mark(self, out) -> None:
        first = out if isinstance(out, Value) else next((o for o in out if o is not None), None)
        if first is not None:
            node = first.node if isinstance(out, Value) else first.node.args[0]
            node.meta["grad_mode"] = torch.is_grad_enabled()

    def wrap(self, out, tracks: bool = False):
        """Values as tracers."""
        if isinstance(out, Value):
            return Tracer(self, out, tracks)
        self.results = [None if o is None else Tracer(self, o, tracks) for o in out]
        return self.results

    def inline(self, graph: Graph, tensors, tracks: bool = False) -> list[Tracer | None]:
        """Copy a finished graph in, its inputs bound to tensors; under no_grad its results stop reverse mode."""
        for n in graph.nodes:
            _refuse_draw(n)
        outs = self.builder.inline(graph, [self.lift(t) for t in tensors])
        if not torch.is_grad_enabled():
            from .graph import stop_reverse

            outs = [o and self.builder.emit(stop_reverse, (o,)) for o in outs]
        return [None if o is None else Tracer(self, o, tracks) for o in outs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (handler := self._of_library(func)) is not None:
            return handler(self, func, *args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return DISPATCH.get(func, Recorder._record)(self, func, *args, **(kwargs or {}))

    def _of_library(self, func):
        """What records an op with a derivative of its own, unless it is being asked for its plain call."""
        wanted = self.user_code and func.namespace != "aten" and func is not self.opaque
        return next((h for find in OF_LIBRARY if (h := find(func))), None) if wanted else None

    def _record(self, func, *args, **kwargs):
        if torch.Tag.inplace_view in func.tags:
            return self._reshaped(func, args, kwargs)
        _refuse(func, args)
        tracers: list[torch.Tensor] = []
        values = tuple(self._values(args, tracers))
        keywords = {k: self._values(v, tracers) for k, v in kwargs.items()}
        if not _returns_tensors(func):
            return meta_result(func, vals(values), {k: vals(v) for k, v in keywords.items()})
        tracks = torch.is_grad_enabled() and any(map(tracked, tracers))
        out = self.emit(func, values, keywords, tracks)
        return (
            self._written(func, args, kwargs, out, tracks)
            if func._schema.is_mutable
            else _as_torch(func, out)
        )

    def _reshaped(self, func, args, kwargs):
        """squeeze_, t_ ...: the tracer becomes the view, its own sizes change with it."""
        x = args[0]
        op = getattr(getattr(aten, func._schema.name.split("::")[1].removesuffix("_")), func._overloadname)
        x.value = self.emit(op, (self.lift(x), *args[1:]), kwargs).value
        with no_dispatch():
            func(*args, **kwargs)
        return x

    def _values(self, x, tensors: list):
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            return self.lift(x)
        if isinstance(x, (list, tuple)):
            return [self._values(y, tensors) for y in x]
        return from_torch(x)

    def _written(self, func, args, kwargs, out, tracks):
        """What a mutating call returns: the written arguments themselves."""
        self.mutates = True
        given = [*args, *([None] * (len(func._schema.arguments) - len(args)))]
        for i, a in enumerate(func._schema.arguments):
            given[i] = kwargs.get(a.name, given[i])
        written = [
            x
            for a, x in zip(func._schema.arguments, given, strict=True)
            if a.alias_info and a.alias_info.is_write
        ]
        for x in written:
            if isinstance(x, Tracer):
                x.tracks = x.tracks or tracks
        returned = [r for r in func._schema.returns if r.alias_info and r.alias_info.is_write]
        if returned and len(returned) == len(func._schema.returns):
            return written[0] if len(returned) == 1 else tuple(written)
        return _as_torch(func, out)

    def finish(self, outputs, **kwargs) -> Graph:
        """The functional graph of what was recorded; captures are its last inputs."""
        values = [None if o is None else self.lift(o) for o in outputs]
        return functionalize(self.builder.finish_raw(values), **kwargs)


def tracked(t: torch.Tensor) -> bool:
    """What `t.requires_grad` answers."""
    return t.tracks if isinstance(t, Tracer) else t.requires_grad


def val_of(t: torch.Tensor) -> Val:
    """What a capture may know of a tensor."""
    if isinstance(t, Tracer):
        return t.value.val
    return Val(tuple(from_torch(s) for s in t.shape), t.dtype, t.device)


def _returns_tensors(func) -> bool:
    return not func._schema.returns or any("Tensor" in str(r.type) for r in func._schema.returns)


def _as_torch(func, out):
    if isinstance(out, list):
        return (
            out
            if "List" in str(func._schema.returns[0].type) and len(func._schema.returns) == 1
            else tuple(out)
        )
    return out


def _refuse(func, args) -> None:
    _refuse_draw(func)
    if func is aten.index.Tensor and not any(_is_mask(i) for i in args[1]):
        return
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        raise errors.ValueDependent(op=func)


def _is_mask(index) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _refuse_draw(call) -> None:
    """Random draws need a vmap that says what they mean."""
    if is_random(call) and any(r.randomness == "error" for r in _stack.recorders):
        raise errors.RandomInVmap(op=getattr(call, "target", call))


def _value_dependent(recorder, func, *args, **kwargs):
    raise errors.ValueDependent(op="Tensor.item() or bool(tensor)")


def _lift_fresh(recorder, func, x):
    if isinstance(x, Tracer):
        return x
    with hermetic():
        return Tracer(recorder, recorder.builder.constant(x))


def _same(recorder, func, x):
    return Tracer(recorder, recorder.lift(x), tracked(x))


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


def _linalg_check(recorder, func, info, api_name, *, is_matrix):
    """torch.linalg raises where a matrix is singular or not positive definite; a graph has NaN there, as in JAX."""
    if not any(t is info for t in recorder.results):
        raise errors.ValueDependent(op=func)
    failed = recorder.builder.emit(aten.ne.Scalar, (info.value, 0))
    for t in recorder.results:
        if t is not None and t.value.val.differentiable:
            shape = [*info.value.shape, *[1] * (t.ndim - info.ndim)]
            t.value = failed.reshape(shape).where(math.nan, t.value)


# Functions from an op of a library to its handler, or None; fxfunc/custom.py adds one.
OF_LIBRARY: list = []
DISPATCH = {
    aten._linalg_check_errors.default: _linalg_check,
    aten._embedding_bag_forward_only.default: lambda recorder, func, *args: recorder._record(
        aten._embedding_bag.default, *args
    ),
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    aten._local_scalar_dense.default: _value_dependent,
    aten.lift_fresh.default: _lift_fresh,
    aten.lift_fresh_copy.default: _lift_fresh,
    aten.lift.default: _lift_fresh,
    aten.detach.default: _same,  # autograd's own; a user's detach is caught in FUNCTIONS
}


def _detach(x):
    recorder = current()
    return recorder.emit(stop_gradient, (recorder.lift(x),))


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


def _as_strided(x, *args, **kwargs):
    if isinstance(x, Tracer) and not x.dense:
        raise errors.NotSupported(
            what="as_strided of a tensor whose strides are not known",
            instead="Call .contiguous() first, or use unfold, diagonal or indexing.",
        )
    return torch.as_strided(x, *args, **kwargs)


def _one_hot(x, num_classes=-1):
    if num_classes < 0:
        raise errors.ValueDependent(op="torch.nn.functional.one_hot without num_classes")
    return torch.eq(x.unsqueeze(-1), torch.arange(num_classes, device=x.device)).to(torch.int64)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Written with matmul and softmax, which have every derivative; the fused kernels have the first only."""
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
    return index.ndim if isinstance(index, torch.Tensor) and _is_mask(index) else 1


def _from_data(make, copies: bool):
    """torch.tensor and its kin: a list of tensors would be read by value; a copy is a constant to every derivative."""

    def call(*args, **kwargs):
        given = [*args, *kwargs.values()]
        if any(map(_lists_tensors, given)):
            raise errors.ValueDependent(op=f"{make.__name__} of a list of tensors; torch.stack takes one")
        out = make(*args, **kwargs)
        return _detach(out) if copies and any(isinstance(x, Tracer) for x in given) else out

    return call


def _lists_tensors(x) -> bool:
    return isinstance(x, (list, tuple)) and any(isinstance(y, torch.Tensor) or _lists_tensors(y) for y in x)


def _format(x, spec):
    if spec:
        raise errors.ValueDependent(op="format(tensor)")
    return repr(x)


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


_autograd = _refuse_function("torch.autograd", "Use fxfunc.grad or fxfunc.vjp, which nest.")
FUNCTIONS = {
    torch.Tensor.detach: _detach,
    torch.detach: _detach,
    torch.Tensor.data.__get__: _detach,
    torch.Tensor.detach_: _detach_in_place,
    torch.detach_: _detach_in_place,
    torch.Tensor.requires_grad.__get__: tracked,
    torch.Tensor.requires_grad.__set__: _requires_grad_,
    torch.Tensor.requires_grad_: _requires_grad_,
    torch.autograd.grad: _autograd,
    torch.autograd.backward: _autograd,
    torch.Tensor.backward: _autograd,
    torch.Tensor.data.__set__: _refuse_function("assigning to .data", "Use copy_ or return the new value."),
    torch.Tensor.numpy: _refuse_value("Tensor.numpy()"),
    torch.Tensor.tolist: _refuse_value("Tensor.tolist()"),
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
    torch.Tensor.as_strided: _as_strided,
    torch.as_strided: _as_strided,
    torch.nn.functional.one_hot: _one_hot,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}


def trace_torch(function, args, kwargs) -> Graph:
    """A torch function as a graph, one input per Val among its arguments; the caller's modes are neutralised."""
    recorder = Recorder(user_code=False)

    def bind(x):
        if isinstance(x, Val):
            return recorder.input(x, "a")
        if isinstance(x, (list, tuple)):
            return [bind(y) for y in x]
        return to_torch(x)

    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch._C._DisableAutocast(),
        torch.enable_grad(),
        torch.autograd.set_detect_anomaly(False),
        recorder,
    ):
        out = function(*[bind(a) for a in args], **{k: bind(v) for k, v in kwargs.items()})
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        graph = recorder.finish([o if isinstance(o, torch.Tensor) else None for o in outs])
    if recorder.captures:
        raise errors.UnsupportedInside(
            what=f"a tensor made outside {function}", instead="Register a rule for it."
        )
    return graph


__all__ = ["Recorder", "Tracer", "current", "infer", "trace_torch", "tracked", "val_of"]
