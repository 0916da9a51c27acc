"""Compiling functions. Entry points: `jit` (per signature, cached) and `jit(f).lower(...)` -> `Lowered` -> `Compiled`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from fxfunc.codegen import backends
from fxfunc.passes import errors
from fxfunc.passes.dims import Dim
from fxfunc.passes.dump import saw
from fxfunc.passes.graph import Graph, Val
from fxfunc.passes.trace import current, val_of

from .capture import Captured, capture, check_tensors, compiled, is_tensor, run, vals_of
from .guards import Guards, signature

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
            raise errors.TypeOfArgument(what=f"spec: axis {axis} with size {dim!r} for a tensor of shape {tuple(example.shape)}",
                                        instead="Map axes of the tensor to fxfunc.Dim objects.")
    return Spec(example, tuple(sorted((axis % example.ndim, dim) for axis, dim in dims.items())))


class _Entry:
    """One compiled signature: its graph, what it closes over, and what must not have changed."""

    def __init__(self, captured: Captured, guards: Guards):
        self.captured, self.guards = captured, guards
        self.call = compiled(captured.graph)
        places = {id(t): i for i, (_, _, t) in reversed(list(enumerate(guards.tensors)))}
        self.places = [places.get(id(t)) for t in captured.captures]
        self.stale = None in self.places

    def closures(self) -> list[torch.Tensor] | None:
        """The tensors now closed over, or None if the capture no longer holds."""
        found = None if self.stale else self.guards.current()
        return found and [found[i] for i in self.places] if found != [] else []


def jit(f: Callable, *, static_argnums=(), static_argnames=(), cache_size: int | None = 128) -> Callable:
    """`f` compiled per signature: structure, shapes, strides, dtypes, devices, plain values and global modes.

    Plain (non-tensor) leaves are part of the signature; static arguments are whole values, hashed. Tensors and values that
    `f` closes over are read again at every call: a rebound tensor of the same signature is used, any other change captures
    again. Writes to arguments and closures happen. Inside another transform `f` becomes part of that capture.
    `.lower(*args)` gives a `Lowered`, `.cache_info()` hits and misses, `.clear_cache()` forgets.
    """
    return _Jit(f, static_argnums, static_argnames, cache_size)


class _Jit:
    def __init__(self, f, static_argnums, static_argnames, cache_size):
        functools.update_wrapper(self, f, updated=())
        self.function = f
        self.static_argnums = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
        self.static_argnames = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
        self.cache_size = cache_size
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget every compiled signature."""
        self._entries: OrderedDict = OrderedDict()
        self._hits = self._misses = 0

    def cache_info(self) -> CacheInfo:
        """Hits, misses (captures made), bound and number of signatures."""
        return CacheInfo(self._hits, self._misses, self.cache_size, len(self._entries))

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args, **kwargs):
        if current() is not None:
            return self.function(*args, **kwargs)
        f, args, kwargs, static = self._static(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        check_tensors("jit", leaves)
        tensors = [x for x in leaves if is_tensor(x)]
        key = (tree, static, tuple(map(_leaf_key, leaves)), _modes())
        entry, closures = self._entry(key, f, leaves, tree, tensors)
        results = run(entry.captured.graph, _compile_with(entry), [*tensors, *closures])
        return self._written_back(entry, tensors + closures, results)

    def _entry(self, key, f, leaves, tree, tensors):
        entry = self._entries.get(key)
        closures = entry.closures() if entry is not None else None
        if closures is not None:
            self._hits += 1
            self._entries.move_to_end(key)
            return entry, closures
        self._misses += 1
        guards = Guards.of(f)
        captured = capture(f, leaves, tree, vals_of(leaves), tracks=[t.requires_grad for t in tensors], refuse=False)
        entry = self._entries[key] = _Entry(captured, guards)
        while self.cache_size is not None and len(self._entries) > self.cache_size:
            self._entries.popitem(last=False)
        return entry, captured.captures

    def _static(self, args, kwargs):
        """(function of the other arguments, these, a key of the static ones)."""
        if not self.static_argnums and not self.static_argnames:
            return self.function, args, kwargs, ()
        positions = {i % len(args) for i in self.static_argnums if -len(args) <= i < len(args)}
        fixed = {i: args[i] for i in positions}
        named = {k: kwargs[k] for k in self.static_argnames if k in kwargs}
        _check_hashable(fixed, named)

        def f(*rest, **keywords):
            rest = iter(rest)
            return self.function(*(fixed[i] if i in positions else next(rest) for i in range(len(args))), **named, **keywords)

        rest = tuple(a for i, a in enumerate(args) if i not in positions)
        key = (tuple(sorted((i, type(v), v) for i, v in fixed.items())), tuple(sorted((k, type(v), v) for k, v in named.items())))
        return f, rest, {k: v for k, v in kwargs.items() if k not in named}, key

    def _written_back(self, entry: _Entry, inputs, results):
        written = entry.captured.graph.written
        if written:
            results, new = results[: -len(written)], results[-len(written):]
            with torch.no_grad():
                for i, value in zip(written, new, strict=True):
                    inputs[i].copy_(value)
        return entry.captured.outputs(results)

    def lower(self, *args, **kwargs) -> Lowered:
        """Capture for these arguments (tensors, `spec`s for symbolic sizes, plain values) without running."""
        f, args, kwargs, _ = self._static(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        examples = [x.tensor if isinstance(x, Spec) else x for x in leaves]
        check_tensors("jit.lower", examples)
        vals = [x.val if isinstance(x, Spec) else val_of(x) for x in leaves if isinstance(x, (Spec, torch.Tensor))]
        start = time.perf_counter()
        captured = capture(f, examples, tree, vals, tracks=[x.requires_grad for x in examples if is_tensor(x)])
        return Lowered(captured, tree, [is_tensor(x) or x for x in examples], vals, {"capture": time.perf_counter() - start})


def _compile_with(entry: _Entry):
    graph, call = entry.captured.graph, entry.call
    return lambda g: call if g is graph else compiled(g)


def _leaf_key(x):
    if is_tensor(x):
        return signature(x)
    return (type(x), x) if _hashable(x) else (type(x), id(x))


def _hashable(x) -> bool:
    try:
        hash(x)
        return True
    except TypeError:
        return False


def _check_hashable(fixed, named) -> None:
    for name, value in [*fixed.items(), *named.items()]:
        if not _hashable(value):
            raise errors.TypeOfArgument(what=f"jit: the static argument {name!r} of type {type(value).__name__} cannot be hashed",
                                        instead="Pass a hashable value, or let it be an ordinary argument.")


def _modes() -> tuple:
    """The global state a capture may depend on."""
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (autocast, torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled())


class Lowered:
    """A captured function: `.graph` (after the transforms, before any backend), `.captures`, `.compile(...)`."""

    def __init__(self, captured: Captured, in_spec, template, in_vals, timings):
        self._captured, self.in_spec, self.template, self.in_vals, self.timings = captured, in_spec, template, in_vals, timings
        self.graph: Graph = saw("captured", captured.graph)

    @property
    def captures(self) -> list[Capture]:
        """Tensors the function closes over: name, shape, dtype, the user's line, and the tensor."""
        nodes = self.graph.inputs[len(self.in_vals):]
        return [Capture(n.name, tuple(t.shape), t.dtype, source, t)
                for n, t, source in zip(nodes, self._captured.captures, self._captured.sources, strict=True)]

    def as_text(self) -> str:
        """The graph as typed text."""
        return str(self.graph)

    def compile(self, backend: str | None = None, target: str | None = None) -> Compiled:
        """Compile for a backend ("eager", "triton"; None picks by device) and target ("cpu", "cuda:80", "cuda:90").

        Raises BackendError naming what the backend cannot take.
        """
        device = next((v.device.type for v in self.graph.in_vals), "cpu")
        program = backends.compile(self.graph, backend, target, device)
        return Compiled(program, self, self.timings | program.timings)


class Compiled:
    """A compiled function: callable with the structure it was lowered for; `.save(path)`, `.kernels`, `.backend`, `.target`."""

    loaded_as = None

    def __init__(self, program, lowered: Lowered, timings: dict[str, float]):
        self._program, self._lowered, self.timings = program, lowered, timings
        self.backend, self.target, self.graph = program.backend, program.target, program.graph

    @property
    def kernels(self) -> list:
        """The kernels, each with .name .regs .spills .smem .size."""
        return self._program.kernels

    def __call__(self, *args, **kwargs):
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = check_call(leaves, tree, self._lowered.in_spec, self._lowered.template, self._lowered.in_vals)
        inputs = [*tensors, *self._lowered._captured.captures]
        results = run(self._lowered.graph, self._compile, inputs)
        return self._lowered._captured.outputs(results)

    def _compile(self, graph: Graph):
        return self._program.call if graph is self._lowered.graph else compiled(graph)


def check_call(leaves, tree, expected_tree, template, vals) -> list[torch.Tensor]:
    """The tensors of a call that must have a given structure; symbolic sizes must agree among themselves."""
    expected = ", ".join(map(str, vals))
    if tree != expected_tree:
        raise errors.StructureMismatch(what=f"the arguments have the structure {tree}, not {expected_tree}", expected=expected)
    for x, t in zip(leaves, template, strict=True):
        if t is not True and (type(x) is not type(t) or x != t):
            raise errors.StructureMismatch(what=f"a plain argument is {x!r}, the function was compiled for {t!r}", expected=expected)
    tensors = [x for x, t in zip(leaves, template, strict=True) if t is True]
    sizes: dict[str, int] = {}
    for i, (x, v) in enumerate(zip(tensors, vals, strict=True)):
        if not (is_tensor(x) and x.dtype == v.dtype and x.device == v.device and _fits(x.shape, v.shape, sizes)):
            raise errors.StructureMismatch(what=f"tensor argument {i} is {val_of(x) if is_tensor(x) else type(x).__name__}, not {v}", expected=expected)
    return tensors


def _fits(shape, expected, sizes: dict[str, int]) -> bool:
    """Match a shape, binding the names of symbolic sizes; expressions must hold for the bound ones."""
    if len(shape) != len(expected):
        return False
    for s, e in zip(shape, expected, strict=True):
        if isinstance(e, Dim):
            names = e.names()
            if e == Dim(next(iter(names))) if len(names) == 1 else False:
                e = sizes.setdefault(next(iter(names)), s)
            elif names <= sizes.keys():
                e = e.at(sizes)
            else:
                continue
        if s != e:
            return False
    return True
