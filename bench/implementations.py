"""What is compared: each way to run a workload's function. Entry points: `names`, `find`.

`build(function, inputs)` is what a user's first call does before anything runs: it gives the callable for the calls after
it and the seconds of its own stages. It runs in a worker; `missing` runs in the process that measures.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .errors import BenchError

# Torch's first FakeTensor imports torch._dynamo, whoever asks for it.
TORCH = ("torch", "torch._dynamo", "fxfunc")
JAX = ("jax", "jax.numpy")
# The GPU is other workers', too; read at the first use.
JAX_SHARES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

Call = Callable[..., Any]
Built = tuple[Call, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run a workload: `missing(device)` says why it cannot be had here, or nothing."""

    name: str
    build: Callable[[Call, tuple], Built]
    missing: Callable[[str], str | None]
    imports: tuple[str, ...] = TORCH  # before its cold time
    least_imports: tuple[str, ...] = ("torch",)  # from the start of a process; what else it needs it imports
    slow_to_compile: bool = False
    cache: str | None = None  # why there is no warm time; None: there is one
    artifact: str | None = "it saves no artifact"  # why there is no load time; None: there is one


def here(device: str) -> str | None:
    """Nothing is missing."""
    return None


# ----- peers ----------------------------------------------------------------------------------------------------------


def call_eagerly(function: Call, inputs: tuple) -> Built:
    return function, {}


def trace(function: Call, inputs: tuple) -> Built:
    """make_fx of the function, run node by node as torch.fx generates it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*inputs), {}


def torch_compile(function: Call, inputs: tuple) -> Built:
    import torch

    return torch.compile(function), {}


def torch_compile_with_graphs(function: Call, inputs: tuple) -> Built:
    """torch.compile that replays CUDA graphs where it can."""
    import torch

    return torch.compile(function, mode="reduce-overhead"), {}


def no_cuda(device: str) -> str | None:
    """CUDA graphs are for CUDA devices."""
    return "CUDA graphs need a CUDA device" if device == "cpu" else None


def inductor(function: Call, inputs: tuple) -> Built:
    """Inductor on the make_fx graph of the function, with no pass of ours."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    leaves, tree = pytree.tree_flatten(inputs)
    spec = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal spec
        outputs, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(list(leaves), tree)))
        return outputs

    graph = make_fx(flat)(*leaves)
    return with_trees(torch._inductor.compile(graph, leaves), spec), {}


def with_trees(compiled: Call, out_spec: Any) -> Call:
    """A function of flat leaves as one of pytrees."""
    from torch.utils import _pytree as pytree

    return lambda *inputs: pytree.tree_unflatten(compiled(*pytree.tree_leaves(inputs)), out_spec)


def jax_jit(function: Call, inputs: tuple) -> Built:
    import jax

    return jax.jit(function), {}


def no_compiler(device: str) -> str | None:
    """Inductor needs a C++ compiler for the CPU."""
    compiler = os.environ.get("CXX", "g++")
    return (
        None if device != "cpu" or shutil.which(compiler) else f"no C++ compiler ({compiler}) on this machine"
    )


def no_jax(device: str) -> str | None:
    if importlib.util.find_spec("jax") is None:
        return "jax is not installed (pip install jax)"
    return None if device == "cpu" else _no_jax_on_cuda()


@functools.cache
def _no_jax_on_cuda() -> str | None:
    """Asked in a process of its own: one that has JAX on a GPU keeps a part of its memory."""
    command = [sys.executable, "-P", "-c", "import jax; jax.devices('cuda')"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | JAX_SHARES)
    words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return None if done.returncode == 0 else f"the jax that is installed has no CUDA device: {words[-1]}"


# ----- fxfunc ---------------------------------------------------------------------------------------------------------


def fxfunc_backend(backend: str) -> Callable[[Call, tuple], Built]:
    """Ahead-of-time compilation by one of fxfunc's backends."""

    def build(function: Call, inputs: tuple) -> Built:
        import fxfunc

        compiled = fxfunc.jit(function).lower(*inputs).compile(backend=backend)
        return compiled, dict(compiled.timings)

    return build


def triton_with_graph(function: Call, inputs: tuple) -> Built:
    """The triton backend, all kernels of a call launched at once."""
    import fxfunc

    compiled = fxfunc.jit(function).lower(*inputs).compile(backend="triton")
    return compiled.with_cuda_graph(), dict(compiled.timings)


def inductor_on_ours(function: Call, inputs: tuple) -> Built:
    """Inductor on the graph that fxfunc's eager backend runs."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import _pytree as pytree

    import fxfunc
    from fxfunc.codegen import eager

    leaves = pytree.tree_leaves(inputs)
    if any(x.requires_grad for x in leaves):
        raise NotImplementedError("ordinary autograd around it would differentiate the emitted calls")
    compiled = fxfunc.jit(function).lower(*inputs).compile(backend="eager")
    program = eager.emit(compiled.graph)
    start = time.perf_counter()
    graph = make_fx(lambda *leaves: program(list(leaves)))(*leaves)
    run = torch._inductor.compile(graph, leaves)
    timings = compiled.timings | {"compile": time.perf_counter() - start}
    return lambda *inputs: compiled.signature.outputs(run(*pytree.tree_leaves(inputs))), timings


def no_backend(backend: str, device: str) -> str | None:
    """Backends that fxfunc has not, and triton where nothing runs its kernels."""
    from fxfunc.codegen.backends import BACKENDS

    if backend not in BACKENDS:
        return f"fxfunc has no backend {backend!r} yet"
    if backend == "cpp":
        return no_compiler(device) if device == "cpu" else "C++ programs are for the CPU"
    return "triton kernels need a CUDA device" if backend == "triton" and device == "cpu" else None


def ours(backend: str, cache: str | None) -> Implementation:
    return Implementation(
        backend,
        fxfunc_backend(backend),
        lambda device: no_backend(backend, device),
        least_imports=("torch", "fxfunc"),
        cache=cache,
        artifact=None,
    )


OF_TORCH_FUNC = (
    "make_fx",
    "torch.compile",
    "torch.compile-graphs",
    "inductor",
)  # programs made of torch.func's
PEERS = ("torch.func", "make_fx", "torch.compile", "torch.compile-graphs", "inductor", "jax")
OURS = ("eager", "cpp", "triton", "triton-graph")
WITH_FXFUNC = ("uncompiled", "inductor-fxfunc", *OURS)
_NO_CACHE = "it keeps no cache on disk"

IMPLEMENTATIONS = {
    i.name: i
    for i in (
        Implementation("torch.func", call_eagerly, here, cache=_NO_CACHE),
        Implementation("make_fx", trace, here, cache=_NO_CACHE),
        Implementation(
            "torch.compile", torch_compile, no_compiler, least_imports=TORCH[:2], slow_to_compile=True
        ),
        Implementation(
            "torch.compile-graphs",
            torch_compile_with_graphs,
            no_cuda,
            least_imports=TORCH[:2],
            slow_to_compile=True,
        ),
        Implementation("inductor", inductor, no_compiler, least_imports=TORCH[:2], slow_to_compile=True),
        Implementation(
            "inductor-fxfunc", inductor_on_ours, no_compiler, least_imports=TORCH, slow_to_compile=True
        ),
        Implementation("jax", jax_jit, no_jax, imports=JAX, least_imports=JAX),
        Implementation("uncompiled", call_eagerly, here, least_imports=("torch", "fxfunc"), cache=_NO_CACHE),
        ours("eager", _NO_CACHE),
        ours("cpp", None),
        ours("triton", None),
        Implementation(
            "triton-graph",
            triton_with_graph,
            no_cuda,
            least_imports=("torch", "fxfunc"),
            artifact="as triton",
        ),
    )
}


def find(name: str) -> Implementation:
    """The implementation of that name; raises BenchError for one that is not known."""
    if name not in IMPLEMENTATIONS:
        raise BenchError(f"no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]
