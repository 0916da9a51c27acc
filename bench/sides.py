"""The two worlds that workers live in: how inputs get in, what is called, and how answers get out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from .implementations import JAX_SHARES, OURS, WITH_FXFUNC

RUN_BY_ATEN = ("torch.func", "make_fx", "eager")
COMPILED_BY_INDUCTOR = ("torch.compile", "inductor", "inductor-fxfunc")

Call = Callable[..., Any]


def map_arrays(f: Callable[[Any], Any], tree: Any) -> Any:
    """`f` on every leaf of dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: map_arrays(f, each) for key, each in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_arrays(f, each) for each in tree)
    return None if tree is None else f(tree)


class TorchSide:
    """torch and fxfunc."""

    def __init__(
        self, workload: str, implementation: str, jax: str | None, parameters: dict, device: str, threads: int
    ):
        import torch

        from .registry import find

        torch.set_num_threads(threads)
        self.device, self.threads, self.workload = device, threads, find(workload)
        self.api = importlib.import_module("fxfunc" if implementation in WITH_FXFUNC else "torch.func")
        self.function = self.workload.function(self.api)

    def make_inputs(self) -> tuple:
        """The workload's inputs as numpy arrays."""
        return map_arrays(lambda t: t.detach().numpy(), self.workload.inputs(**self.workload.parameters))

    def exact(self, arrays: tuple) -> tuple[Any, Any]:
        """The reference's answer in float64, and in float32, to the same inputs."""
        wide = map_arrays(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, arrays)
        call = self.workload.exact()
        return self.to_numpy(call(*self.inputs(wide))), self.to_numpy(call(*self.inputs(arrays)))

    def inputs(self, arrays: tuple) -> tuple:
        """Tensors on the device."""
        import torch

        return map_arrays(lambda a: torch.tensor(a, device=self.device), arrays)

    def around(self, call: Call) -> Call:
        return self.workload.around(call)

    def finish(self, answer: Any) -> Any:
        """The answer, once it is there."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return answer

    def to_numpy(self, answer: Any) -> Any:
        return map_arrays(lambda t: t.detach().cpu().numpy(), answer)

    def device_peak(self) -> int | None:
        """Bytes allocated on the GPU at the highest point."""
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def count(self, implementation: str, built: Any, call: Call, inputs: tuple) -> dict[str, int]:
        """Nodes of graphs, kernels, and what one call executes where ATen executes it."""
        from . import counters

        counts = {}
        if implementation == "make_fx":
            counts["nodes traced"] = sum(n.op == "call_function" for n in built.graph.nodes)
        if implementation in OURS:
            counts["nodes captured"] = len(self.api.jit(self.function).lower(*inputs).graph)
            counts["nodes compiled"] = len(built.graph)
            counts["kernels"] = len(built.kernels)
        if implementation in COMPILED_BY_INDUCTOR:
            counts["kernels"] = importlib.import_module("torch._inductor.metrics").generated_kernel_count
        if implementation in RUN_BY_ATEN:
            counts |= counters.count(call)
        elif implementation in OURS:
            counts["flops"] = counters.graph_flops(built.graph)
        return counts


class JaxSide:
    """JAX, with no torch in the process."""

    def __init__(
        self, workload: str, implementation: str, jax: str | None, parameters: dict, device: str, threads: int
    ):
        import jax as package

        if jax is None:
            raise NotImplementedError(f"the workload {workload} has no JAX version")
        module, _, name = jax.partition(":")
        self.jax, self.device = package, device
        os.environ |= JAX_SHARES
        package.config.update("jax_platforms", device)  # no other in its place
        if device == "cuda":
            package.config.update("jax_default_matmul_precision", "highest")  # float32, not TF32: as torch's
        package.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        package.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        package.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        self.function = getattr(importlib.import_module(module), name)(package, **parameters)

    def inputs(self, arrays: tuple) -> tuple:
        """Arrays on the device."""
        return map_arrays(self.jax.numpy.asarray, arrays)

    def around(self, call: Call) -> Call:
        return call

    def finish(self, answer: Any) -> Any:
        """The answer, once it is there."""
        return self.jax.block_until_ready(answer)

    def to_numpy(self, answer: Any) -> Any:
        return map_arrays(np.asarray, answer)

    def device_peak(self) -> int | None:
        """Bytes allocated on the GPU at the highest point."""
        return self.jax.devices()[0].memory_stats()["peak_bytes_in_use"] if self.device == "cuda" else None

    def count(self, implementation: str, built: Any, call: Call, inputs: tuple) -> dict[str, int]:
        """Equations of the jaxpr, those within calls too."""
        return {"nodes traced": _equations(self.jax.make_jaxpr(self.function)(*inputs).jaxpr)}


def _equations(jaxpr: Any) -> int:
    inner = [p for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "jaxpr")]
    return len(jaxpr.eqns) + sum(_equations(closed.jaxpr) for closed in inner)
