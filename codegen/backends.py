"""Choosing and running a backend. Entry point: `compile`, from a captured graph to a `Program`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from fxfunc.passes import errors
from fxfunc.passes.graph import Graph
from fxfunc.passes.pipeline import for_aten, lowered

from . import eager

BACKENDS = ("eager", "triton")


@dataclasses.dataclass
class Program:
    """A compiled graph: `call` takes flat tensors and gives flat results; `graph` is what an artifact stores."""

    graph: Graph
    backend: str
    target: str
    call: Callable | None  # None: made for a device this machine has not
    kernels: list = dataclasses.field(default_factory=list)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)


def compile(graph: Graph, backend: str | None, target: str | None, device: str) -> Program:
    """Lower and compile a captured graph; backend None is "triton" for CUDA tensors or targets, else "eager"."""
    backend = backend or ("triton" if (target or device).startswith("cuda") else "eager")
    if backend not in BACKENDS:
        raise errors.BackendError(
            backend=backend, what="no such backend", instead=f"Use one of {', '.join(BACKENDS)}."
        )
    start = time.perf_counter()
    low = lowered(graph)
    middle = time.perf_counter()
    program = _eager(low, target) if backend == "eager" else _triton(low, target or default_target())
    program.timings = {"passes": middle - start, "codegen": time.perf_counter() - middle}
    return program


def _eager(graph: Graph, target: str | None) -> Program:
    target = target or "cpu"
    graph = for_aten(graph)
    return Program(graph, "eager", target, eager.emit(graph))


def default_target() -> str:
    """The target of this machine's GPU."""
    import torch

    if not torch.cuda.is_available():
        raise errors.BackendError(
            backend="triton", what="no GPU here to compile for", instead='Give target="cuda:80" or "cuda:90".'
        )
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def _triton(graph: Graph, target: str) -> Program:
    from . import triton

    fused, kernels = triton.compile_graph(graph, target)
    return Program(fused, "triton", target, None, kernels)
