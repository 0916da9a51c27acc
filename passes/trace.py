"""Running torch code on tracers. Entry points: `Recorder` (a capture under way) and `trace_torch` (one function, Vals in).

A `Tracer` is a tensor without data that stands for a value of the graph its recorder grows. Calls are recorded as they
come, writes included, with the grad mode they ran under; `functionalize.py` then gives the functional graph.
Tensors of other recorders and real tensors become inputs (`captures`), bound by whoever asked for the capture.
"""

from __future__ import annotations

import functools
from types import FunctionType

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import errors
from .concrete import Concrete, asked_for, call_by_value, is_mask, known
from .dims import from_torch, to_torch
from .functionalize import functionalize
from .graph import Graph, Val
from .infer import meta_result
from .intercept import DISPATCH, FUNCTIONS, OF_LIBRARY
from .record import Builder, Value, resolve, vals
from .tracer import Tracer, lies_dense, recorders, refuse_draw, refuse_tensor, tracked, val_of

aten = torch.ops.aten


class _Functions(TorchFunctionMode):
    """Calls whose meaning is lost below the level of torch functions (`FUNCTIONS`), on tracers and real tensors alike."""

    def __init__(self):
        super().__init__()
        self.running: list = []  # torch's Python functions whose bodies this mode sees

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (meaning := FUNCTIONS.get(func)) is not None:
            return meaning(*args, **(kwargs or {}))
        python = isinstance(func, FunctionType) and "handle_torch_function" in func.__globals__
        if not python or func in self.running:
            return func(*args, **(kwargs or {}))
        self.running.append(func)
        try:
            with self:
                return _body(func)(*args, **(kwargs or {}))
        finally:
            self.running.remove(func)


_ASKS_NOBODY = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *args: False
)


def _body(func: FunctionType) -> FunctionType:
    """One of torch's Python functions, that does not ask for a mode again: the mode stays on for the calls that it makes."""
    names = {**func.__globals__, **_ASKS_NOBODY}
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


class Recorder(TorchDispatchMode):
    """Records every ATen call made while it is entered."""

    def __init__(self, user_code: bool = True, concrete: Concrete | None = None):
        super().__init__()
        self.builder = Builder(None)
        self.captures: dict[int, tuple[torch.Tensor, Value, str | None]] = {}
        self.mutates = False
        self.randomness: str | None = None  # that of the vmap this capture is the body of
        self.user_code = user_code
        self.concrete = concrete
        self.opaque = None  # a library's op that is recorded as it is
        self.functions = _Functions()
        self.results: list[Tracer | None] = []  # of the last call that had several

    supports_higher_order_operators = True  # so that they come here, to be refused

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import torch._dynamo to keep it away from this class

    def __enter__(self):
        recorders().append(self)
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        recorders().remove(self)
        super().__exit__(*exc)
        self.functions.__exit__(*exc)

    def input(
        self,
        val: Val,
        name: str,
        tracks: bool = False,
        known: bool = False,
        *,
        like: torch.Tensor | None = None,
    ) -> Tracer:
        """A tracer for a new input, which stands for the tensor `like` if there is one; known: with its value."""
        value = self.builder.input(val, name)
        value.node.meta["scattered"] = like is not None and not like.is_contiguous()
        if self.concrete is not None and known:
            self.concrete.bind(value, like)
        tracer = Tracer(self, value, tracks)
        tracer.dense = like is not None and val_of(like).shape == val.shape and lies_dense(like)
        return tracer

    def lift(self, t: torch.Tensor) -> Value:
        """The value of a tensor met in captured code; one that is not ours becomes a capture."""
        if isinstance(t, Tracer) and t.recorder is self:
            return t.value
        found = self.captures.get(id(t))
        if found is None:
            refuse_tensor(t, "closing over")
            value = self.input(val_of(t), "closed", known=True, like=t).value
            found = self.captures[id(t)] = (t, value, errors.user_line())
        return found[1]

    def emit(self, op, args, kwargs=None, tracks: bool = False):
        """Record a call on Values; the results as tracers."""
        self.builder.source = errors.user_line() if self.user_code else None
        out = self.builder.emit(op, args, kwargs or {})
        self._mark(out)
        if self.concrete is not None:
            self.concrete.compute(op, args, kwargs or {}, out)
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
            refuse_draw(n)
        values = [self.lift(t) for t in tensors]
        outs = self.builder.inline(graph, values)
        if self.concrete is not None:
            self.concrete.inline(graph, values, outs)
        if not torch.is_grad_enabled():
            from .graph import stop_reverse

            return [o and self.emit(stop_reverse, (o,)) for o in outs]
        return [None if o is None else Tracer(self, o, tracks) for o in outs]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise errors.UnsupportedInside(
                what=f"the higher-order operator {func}",
                instead="Use fxfunc.cond, fxfunc.scan, fxfunc.fori_loop or fxfunc.vmap.",
            )
        if (handler := self._of_library(func)) is not None:
            return handler(self, func, *args, **(kwargs or {}))
        if func not in DISPATCH and _decomposes(func):
            with torch.overrides.enable_reentrant_dispatch(), self:
                return func.decompose(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return DISPATCH.get(func, Recorder._record)(self, func, *args, **(kwargs or {}))

    def _of_library(self, func):
        """What records an op with a derivative of its own, unless it is being asked for its plain call."""
        wanted = self.user_code and func.namespace != "aten" and func is not self.opaque
        return next((h for find in OF_LIBRARY if (h := find(func))), None) if wanted else None

    def _record(self, func, *args, **kwargs):
        if torch.Tag.inplace_view in func.tags:
            return self._reshaped(func, args, kwargs)
        refuse_draw(func)
        if func._schema.is_mutable and func.namespace != "aten":
            raise errors.NotSupported(
                what=f"{func}, which writes to its arguments,",
                instead="Write to clones of them inside the op, and return these.",
            )
        if self._asks_for_values(func, args):
            if self.concrete is None or not known(asked_for(func, args, kwargs)):
                raise errors.ValueDependent(op=func)
            return call_by_value(self, func, args, kwargs)
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

    def _asks_for_values(self, func, args) -> bool:
        if func in (aten.index_put.default, aten.index_put_.default):
            return self.concrete is not None and any(map(is_mask, args[1]))
        if func is aten.index.Tensor:
            return any(map(is_mask, args[1]))
        if func is aten._ctc_loss.default:
            return False  # its sizes depend on lengths, which are numbers here
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags

    def _reshaped(self, func, args, kwargs):
        """squeeze_, t_ ...: the tracer becomes the view, its own sizes change with it."""
        x = args[0]
        packet = getattr(aten, func._schema.name.split("::")[1].removesuffix("_"))
        value = self.lift(x)
        x.value = self.emit(resolve(packet, (value, *args[1:]), kwargs), (value, *args[1:]), kwargs).value
        with no_dispatch():
            func(*args, **kwargs)
        x.dense = False
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


@functools.cache
def _decomposes(func) -> bool:
    """True for an op that ATen writes with others, which has not happened yet where it is called below autograd."""
    return func.namespace == "aten" and func._can_decompose()


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
