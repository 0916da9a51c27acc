"""Compiling functions. Entry points: `jit` (per signature, cached) and `jit(f).lower(...)` -> `Lowered` -> `Compiled`."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from fxfunc.codegen import backends
from fxfunc.codegen.backends import Program
from fxfunc.passes import errors
from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import Graph, Val, typed
from fxfunc.passes.tracer import current, val_of

from .background import Background
from .capture import (
    Captured,
    capture,
    check_tensors,
    compiled,
    execute,
    is_tensor,
    own_memory,
    run,
    vals_of,
    write_back,
)
from .dispatch import LESSONS, MISS, Dispatch, miss, repeated
from .entry import bare_entry, no_collection
from .guards import Guards, signature
from .signature import TENSOR, Signature

CacheInfo = namedtuple("CacheInfo", "hits misses maxsize currsize")
Capture = namedtuple("Capture", "name shape dtype source tensor")


@dataclasses.dataclass(frozen=True)
class Spec:
    """An example tensor whose axes in `dims` have symbolic sizes; made by `spec`."""

    tensor: torch.Tensor
    dims: tuple[tuple[int, Dim], ...]

    @property
    def val(self) -> Val:
        v = val_of(self.tensor)
        sizes = dict(self.dims)
        return Val(tuple(sizes.get(i, s) for i, s in enumerate(v.shape)), v.dtype, v.device)


def spec(example: torch.Tensor, dims: dict[int, Dim]) -> Spec:
    """An argument for `lower`: as `example`, but axis i has the symbolic size dims[i]. The result serves every size >= 0.

    The example's own sizes there do not matter. Raises TypeOfArgument for an axis it has not.
    """
    for axis, dim in dims.items():
        if not -example.ndim <= axis < example.ndim or not isinstance(dim, Dim):
            raise errors.TypeOfArgument(
                what=f"spec: axis {axis} with size {dim!r} for a tensor of shape {tuple(example.shape)}",
                instead="Map axes of the tensor to fxfunc.Dim objects.",
            )
    return Spec(example, tuple(sorted((axis % example.ndim, dim) for axis, dim in dims.items())))


class _Entry:
    """One compiled signature: its graph, what it closes over, and what must not have changed."""

    def __init__(self, captured: Captured, guards: Guards, compile_: Callable):
        self.captured, self.guards, self.compile = captured, guards, compile_
        self._call: Callable | None = None
        self.called = False
        places = {id(t): first for _, _, t, _, first in guards.tensors}
        self.places = [places.get(id(t)) for t in captured.captures]

    @property
    def call(self) -> Callable:
        """The function without derivatives: a training loop never asks for it."""
        if self._call is None:
            self._call = self.compile(self.captured.graph)
        return self._call

    def closures(self) -> list[torch.Tensor] | None:
        """The tensors now closed over, or None if the capture no longer holds."""
        found = None if None in self.places else self.guards.current()
        return None if found is None else [found[i] for i in self.places]


def jit(
    f: Callable,
    *,
    static_argnums=(),
    static_argnames=(),
    cache_size: int | None = 128,
    backend: str | None = None,
    background: bool = False,
) -> Callable:
    """`f` compiled per signature: structure, shapes, strides, dtypes, devices, plain values and global modes.

    Plain (non-tensor) leaves are part of the signature; static arguments are whole values, hashed. Tensors and values that
    `f` closes over are read again at every call: a rebound tensor of the same signature is used, any other change captures
    again. Writes to arguments and closures happen. Inside another transform `f` becomes part of that capture.
    `.lower(*args)` gives a `Lowered`, `.cache_info()` hits and misses, `.clear_cache()` forgets.

    backend: "eager", "cpp" or "triton", for `f` and for what ordinary autograd takes of it. None: FXFUNC_BACKEND, else cpp on
    a CPU with a C++ compiler, else eager. The first call of a signature compiles, and raises BackendError if that fails.
    background: a thread compiles, and calls are answered by the eager backend until it is done; a failure is a BackendWarning at
    the next call. `.wait()` returns when all is compiled, or raises.
    """
    return _Jit(f, static_argnums, static_argnames, cache_size, backend=backend, background=background)


class _Jit:
    def __init__(
        self,
        f,
        static_argnums=(),
        static_argnames=(),
        cache_size=None,
        strict=False,
        backend=None,
        background=False,
    ):
        self.strict, self.backend, self.background = strict, backend, background
        functools.update_wrapper(self, f, updated=())
        self.function = f
        self.static_argnums = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
        self.static_argnames = (
            (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        )
        self.cache_size = cache_size
        self._lock = threading.RLock()
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget every compiled signature."""
        with self._lock:
            self._entries: OrderedDict = OrderedDict()
            self._hits = self._misses = 0
            self._short, self._short_key, self._short_hits, self._lessons = miss, None, 0, LESSONS

    def cache_info(self) -> CacheInfo:
        """Hits, misses (captures made), bound and number of signatures."""
        return CacheInfo(self._hits, self._misses, self.cache_size, len(self._entries))

    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)

    @bare_entry
    def __call__(self, *args, **kwargs):
        result = self._short(args, kwargs)
        return self._checked_call(args, kwargs) if result is MISS else result

    def _checked_call(self, args: tuple, kwargs: dict):
        if current() is not None:
            return self.function(*args, **kwargs)
        f, args, kwargs, static = self._static(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        check_tensors("jit", leaves)
        names = tuple((k, type(x), typed(x, None)) for k, x in static.items())
        key = (tree, names, tuple(map(_leaf_key, leaves)), _modes())
        entry, closures = self._entry(key, f, leaves, tree, static.values())
        inputs = [x for x in leaves if is_tensor(x)] + closures
        results = run(entry.captured.graph, _compile_with(entry), inputs)
        results = write_back(entry.captured.graph, inputs, results)
        if entry.called and not static:
            self._learn(key, entry, leaves, tree, inputs)
        entry.called = True
        return entry.captured.outputs(results)

    def _learn(self, key, entry, leaves, tree, inputs) -> None:
        """Take the short way at the next call like this one."""
        if not self._lessons:
            return
        captured = entry.captured
        outs = zip(captured.tensor_flags, captured.out_leaves, strict=True)
        signature = Signature(
            tree, _template(leaves), (), captured.out_spec, tuple(TENSOR if t else x for t, x in outs)
        )
        short = repeated(signature, entry, inputs, key[-1], _modes, self._hit)
        with self._lock:
            self._lessons -= 1
            self._settle()
            if self._entries.get(key) is entry:
                self._short, self._short_key = short, key

    def _hit(self) -> None:
        with self._lock:
            self._hits += 1
            self._short_hits += 1

    def _settle(self) -> None:
        """What the calls that went the short way have left to do: their entry was used last before this."""
        if self._short_hits and self._short_key in self._entries:
            self._entries.move_to_end(self._short_key)
        self._short_hits = 0

    def _entry(self, key, f, leaves, tree, static):
        """The entry of a signature, made if there is none that holds, and the tensors it closes over."""
        with self._lock:
            self._settle()
            entry = self._entries.get(key)
        closures = entry and entry.closures()
        hit = closures is not None
        if not hit:
            plain = (x for x in leaves if not is_tensor(x))
            guards = Guards.of(self.function, *static, *plain, strict=self.strict)
            tracks = [x.requires_grad for x in leaves if is_tensor(x)]
            captured = capture(
                f,
                leaves,
                tree,
                vals_of(leaves),
                tracks=tracks,
                grad=torch.is_grad_enabled(),
                writable=lambda i: True,
            )
            entry, closures = _Entry(captured, guards, self._compiler(captured.graph)), captured.captures
        with self._lock:
            self._hits, self._misses = self._hits + hit, self._misses + (not hit)
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while self.cache_size is not None and len(self._entries) > self.cache_size:
                oldest, _ = self._entries.popitem(last=False)
                if oldest == self._short_key:
                    self._short = miss
        return entry, closures

    def _compiler(self, graph: Graph) -> Callable:
        """What makes callables of a graph and of the derivatives of it that ordinary autograd asks for."""
        backend, target = backends.choose_here(graph, self.backend)
        if self.background and backend != "eager":
            return Background(backend, target)
        return lambda g: compiled(g, backend, target)

    def wait(self) -> None:
        """Return when all that was called so far is compiled, or raise what failed; see `background`."""
        with self._lock:
            found = [entry.compile for entry in self._entries.values()]
        for compile_ in found:
            if isinstance(compile_, Background):
                compile_.wait()

    def _static(self, args, kwargs):
        """(function of the other arguments, these, the static ones by position or name)."""
        if not self.static_argnums and not self.static_argnames:
            return self.function, args, kwargs, {}
        positions = sorted({i % len(args) for i in self.static_argnums if -len(args) <= i < len(args)})
        fixed = {i: args[i] for i in positions}
        named = {k: kwargs[k] for k in self.static_argnames if k in kwargs}
        _check_hashable(fixed | named)

        def f(*rest, **keywords):
            rest = iter(rest)
            return self.function(
                *(fixed[i] if i in positions else next(rest) for i in range(len(args))), **named, **keywords
            )

        rest = tuple(a for i, a in enumerate(args) if i not in positions)
        return f, rest, {k: v for k, v in kwargs.items() if k not in named}, fixed | named

    @no_collection()
    def lower(self, *args, **kwargs) -> Lowered:
        """Capture for these arguments (tensors, `spec`s for symbolic sizes, plain values) without running."""
        f, args, kwargs, _ = self._static(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        examples = [x.tensor if isinstance(x, Spec) else x for x in leaves]
        check_tensors("jit.lower", examples)
        vals = [
            x.val if isinstance(x, Spec) else val_of(x) for x in leaves if isinstance(x, (Spec, torch.Tensor))
        ]
        start = time.perf_counter()
        captured = capture(
            f, examples, tree, vals, tracks=[x.requires_grad for x in examples if is_tensor(x)]
        )
        signature = Signature(
            tree,
            _template(examples),
            tuple(vals),
            captured.out_spec,
            tuple(
                TENSOR if t else x for t, x in zip(captured.tensor_flags, captured.out_leaves, strict=True)
            ),
        )
        return Lowered(captured, signature, {"capture": time.perf_counter() - start}, self.backend)


def _template(leaves) -> tuple:
    return tuple(TENSOR if is_tensor(x) else x for x in leaves)


def _compile_with(entry: _Entry):
    graph = entry.captured.graph
    return lambda g: entry.call if g is graph else entry.compile(g)


def _leaf_key(x):
    if is_tensor(x):
        return signature(x)
    return (type(x), typed(x, None)) if _hashable(x) else _Same(x)


class _Same:
    """Equal for one and the same object, which it keeps alive."""

    def __init__(self, x):
        self.x = x

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and other.x is self.x

    def __hash__(self) -> int:
        return id(self.x)


def _hashable(x) -> bool:
    try:
        hash(x)
        return True
    except TypeError:
        return False


def _check_hashable(static) -> None:
    for name, value in static.items():
        if not _hashable(value) or any(map(is_tensor, pytree.tree_leaves(value))):
            raise errors.TypeOfArgument(
                what=f"jit: the static argument {name!r} of type {type(value).__name__} cannot be hashed by value",
                instead="Pass a hashable value, or let it be an ordinary argument.",
            )


def _modes() -> tuple:
    """The global state a capture may depend on."""
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (
        autocast,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
    )


class Lowered:
    """A captured function: `.graph` (after the transforms, before any backend), `.compile(...)` and `.captures`, the tensors it
    closes over (name, shape, dtype, the user's line, the tensor)."""

    def __init__(
        self,
        captured: Captured,
        signature: Signature,
        timings: dict[str, float],
        backend: str | None = None,
    ):
        self._backend = backend
        self.graph: Graph = captured.graph
        self.signature, self.timings = signature, timings
        nodes = self.graph.inputs[len(signature.in_vals) :]
        self.captures = [
            Capture(n.name, tuple(t.shape), t.dtype, source, t)
            for n, t, source in zip(nodes, captured.captures, captured.sources, strict=True)
        ]

    def as_text(self) -> str:
        """The graph as typed text."""
        return str(self.graph)

    @no_collection()
    def compile(
        self,
        backend: str | None = None,
        target: str | None = None,
        *,
        precision: str | None = None,
        tune: bool = False,
    ) -> Compiled:
        """Compile for a backend ("eager", "cpp", "triton") and target ("cpu", "cpu:x86-64-v3", "cuda:90").

        backend None: that of the function, else triton for a GPU, and for a CPU what FXFUNC_BACKEND names, else cpp if there is a
        compiler, else eager. Target None: this machine's. C++ for "cpu" uses all that this CPU has, "cpu:x86-64-v3" what each CPU
        of that level has. `precision`: of products of float32 in Triton's kernels, "ieee", "bf16x6", "tf32x3" or "tf32"; None: as
        accurate as float32, unless torch.set_float32_matmul_precision allows less. `tune`: measure on this machine's GPU how each
        of Triton's kernels is done best; the choice stays in the cache. Raises BackendError naming what the backend cannot take.
        """
        graph, backend, target = backends.choose(self.graph, backend or self._backend, target)
        program = backends.compile(graph, backend, target, precision, tune)
        vals = tuple(graph.in_vals)
        signature = dataclasses.replace(self.signature, in_vals=vals[: len(self.signature.in_vals)])
        return Compiled(program, signature, self.captures, graph, self.timings | program.timings)


class Compiled:
    """A compiled function: callable with the structure it was lowered for; `.save(path)`, `.kernels`, `.backend`, `.target`.

    `loaded_as` says how a loaded one runs ("eager", "rebuilt", "native"); None for one compiled here.
    """

    def __init__(
        self,
        program: Program,
        signature: Signature,
        captures: list[Capture],
        graph: Graph | None,
        timings,
        loaded_as=None,
    ):
        self._program, self.signature, self.captures, self._graph = program, signature, captures, graph
        self.timings, self.loaded_as = timings, loaded_as
        self.backend, self.target = program.backend, program.target
        self.native = program.native
        vals = program.in_vals[len(signature.in_vals) :]
        self._closed = program.call and [c.tensor.to(v.device) for c, v in zip(captures, vals, strict=True)]
        self._dispatch = Dispatch(signature, self._closed or ())

    @property
    def graph(self) -> Graph:
        """The graph as ATen calls, which the eager backend runs anywhere."""
        return self._program.graph

    @property
    def source(self) -> Graph | None:
        """The graph that C++ programs were compiled from; None if there are none."""
        return self._program.source if self._program.programs else None

    @property
    def programs(self) -> list:
        """The compiled C++ programs, each with .name .source .rows; none on other backends."""
        return self._program.programs

    @property
    def kernels(self) -> list:
        """The compiled kernels, each with .name .regs .spills .smem .size; none on the eager backend."""
        return self._program.kernels

    @bare_entry
    def __call__(self, *args, **kwargs):
        result = self._dispatch.call(args, kwargs)
        return self._checked_call(args, kwargs) if result is MISS else result

    def _checked_call(self, args: tuple, kwargs: dict):
        check_tensors("a compiled function", ())
        if self._program.call is None:
            raise errors.BackendError(
                backend=self.backend,
                what=f"compiled for {self.target}, which this machine has not",
                instead="Save it and load it on a machine with that device.",
            )
        inputs = [*self.signature.tensors(args, kwargs), *self._closed]
        results = own_memory(self._run(inputs), inputs)
        self._dispatch.learn(self._program, inputs)
        return self.signature.outputs(results)

    def _run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
        if self._graph is not None and current() is not None:
            return execute(self._graph, inputs)
        if self._graph is not None:
            return run(self._graph, self._compile, inputs)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            raise errors.NotSupported(
                what="differentiating through a loaded artifact",
                instead="Call it under torch.no_grad(), or compile the derivative into the artifact.",
            )
        return self._program.call(inputs)

    def explain(self) -> str:
        """A line a call of the program that runs: name, operation, what computes it (a kernel of a C++ program, a loop, ATen),
        why it is cut from what it reads or why it is ATen's, your line. Views and constants are read where they lie: no line."""
        return self._program.explain()

    def with_cuda_graph(self) -> Compiled:
        """The same function, which launches all its kernels at once as a CUDA graph, made at the first call of given sizes.

        No input is copied and each call gives new tensors, unlike torch.cuda.make_graphed_callables; up to 16 sizes keep
        the memory between their kernels. Raises BackendError naming the call, with its line, that is no kernel of Triton's.
        """
        program = backends.replayed(self._program)
        return Compiled(program, self.signature, self.captures, self._graph, self.timings, self.loaded_as)

    def _compile(self, graph: Graph):
        return self._program.call if graph is self._graph else compiled(graph, self.backend, self.target)

    def save(self, path, *, captures: str = "error", key: bytes | None = None) -> None:
        """Write an artifact, atomically. See `fxfunc.artifact.save`."""
        from . import artifact

        artifact.save(self, path, captures=captures, key=key)
