"""Choosing and running a backend. Entry point: `compile`, from a captured graph to a `Program`."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fxfunc.passes import errors
from fxfunc.passes.dump import saw, saw_source
from fxfunc.passes.graph import Graph
from fxfunc.passes.pipeline import for_aten, lowered
from fxfunc.passes.place import place

from . import eager
from .explain import Row, rows_of, table

if TYPE_CHECKING:
    from .launch import Binary
    from .tasks import Native

BACKENDS = ("eager", "triton", "cpp")


@dataclasses.dataclass
class Program:
    """A compiled graph: `call` takes flat tensors and gives flat results. `graph` is what the eager backend runs anywhere,
    `native` the same with `kernels` in it, if there are any."""

    graph: Graph
    backend: str
    target: str
    call: Callable | None  # None: made for a device this machine has not
    native: Graph | None = None
    kernels: list[Binary] = dataclasses.field(default_factory=list)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    programs: list[Native] = dataclasses.field(default_factory=list)  # of the cpp backend
    notes: list[str] = dataclasses.field(default_factory=list)  # which maps are batched, and why
    outside: list[Row] = dataclasses.field(default_factory=list)  # calls that stay ATen's there

    def explain(self) -> str:
        """Each call of the program that runs, by what computes it and why that ends there; views and constants are no calls."""
        lines = [f"backend {self.backend}", *self.notes]
        for p in self.programs:
            lines += [p.describe(), *table(p.rows)]
        rows = self.outside if self.backend == "cpp" else rows_of(self.native or self.graph)
        return "\n".join(
            [*lines, *([f"outside: {len(rows)} calls"] if self.programs and rows else []), *table(rows)]
        )


def choose(graph: Graph, backend: str | None, target: str | None) -> tuple[Graph, str, str]:
    """The graph on the target's kind of device, and the backend and target that None stands for."""
    device = next((v.device.type for v in graph.in_vals), "cpu")
    backend = backend or ("triton" if (target or device).startswith("cuda") else "eager")
    if backend not in BACKENDS:
        raise errors.BackendError(
            backend=backend, what="no such backend", instead=f"Use one of {', '.join(BACKENDS)}."
        )
    target = target or {"triton": default_target, "cpp": lambda: "cpu"}.get(backend, lambda: device)()
    check_target(backend, target)
    if device != target.partition(":")[0]:
        graph = saw("place", place(graph, torch.device("cpu" if target == "cpu" else "cuda:0")))
    return graph, backend, target


def check_target(backend: str, target: str) -> None:
    """Raise BackendError for a target that a backend does not know."""
    known = {"eager": r"cpu|cuda(:\d{2,3})?", "triton": r"cuda:\d{2,3}", "cpp": "cpu"}[backend]
    if not re.fullmatch(known, str(target)):
        raise errors.BackendError(
            backend=backend,
            what=f"no such target: {target!r}",
            instead='Use "cuda:80", "cuda:90" or another compute capability.'
            if backend == "triton"
            else 'Use "cpu" or "cuda".'
            if backend == "eager"
            else 'Use "cpu".',
        )


def compile(graph: Graph, backend: str, target: str) -> Program:
    """Lower and compile a captured graph for what `choose` gave."""
    start = time.perf_counter()
    low = lowered(graph)
    middle = time.perf_counter()
    program = (
        _cpp(graph, low) if backend == "cpp" else (_triton if backend == "triton" else _eager)(low, target)
    )
    program.timings = {"passes": middle - start, "codegen": time.perf_counter() - middle}
    return program


def _eager(graph: Graph, target: str) -> Program:
    return eager_program(for_aten(graph), target)


def eager_program(graph: Graph, target: str) -> Program:
    """A program of ATen calls alone."""
    return Program(graph, "eager", target, eager.emit(graph) if _is_here(target) else None)


def _is_here(target: str) -> bool:
    return target == "cpu" or torch.cuda.is_available()


def default_target() -> str:
    """The target of this machine's GPU."""
    if not torch.cuda.is_available():
        raise errors.BackendError(
            backend="triton", what="no GPU here to compile for", instead='Give target="cuda:80" or "cuda:90".'
        )
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def _triton(graph: Graph, target: str) -> Program:
    from . import triton

    native, kernels = triton.compile_graph(graph, target)
    saw("fuse", native)
    for name, binary in kernels.items():
        saw_source(f"kernel-{name}", binary.source)
    return with_kernels(for_aten(graph), native, list(kernels.values()), target)


def _cpp(graph: Graph, low: Graph) -> Program:
    """Maps are loops there, so it takes the graph before they are batched."""
    from .partition import compile_graph

    built = compile_graph(graph)
    return Program(
        for_aten(low),
        "cpp",
        "cpu",
        eager.emit(built.graph),
        programs=built.programs,
        notes=built.notes,
        outside=built.outside,
    )


def with_kernels(graph: Graph, native: Graph, kernels: list[Binary], target: str) -> Program:
    """A program of compiled kernels, which runs where there is a GPU."""
    from .launch import launch

    launchers = {b.kernel: functools.partial(launch, b) for b in kernels}
    call = eager.emit(native, launchers) if _is_here(target) else None
    return Program(graph, "triton", target, call, native, kernels)
