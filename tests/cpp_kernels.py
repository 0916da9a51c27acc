"""Loop-IR kernels compiled to C++ one by one, for the tests: `compiled(kernels)` -> a launcher for each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfunc.codegen import cxx
from fxfunc.codegen.cpp import TYPES, function
from fxfunc.codegen.loops import Kernel
from fxfunc.codegen.prelude import prelude
from fxfunc.passes.dims import at


def source_of(kernels: Sequence[Kernel], parallel: bool = False) -> str:
    """One translation unit with an entry point for each kernel."""
    parts = []
    for i, k in enumerate(kernels):
        args = [f"({TYPES[a.dtype]}*)args[{j}]" for j, a in enumerate(k.args)]
        args += [f"sizes[{j}]" for j in range(len(k.sizes))] + ["threads"] * parallel
        parts.append(function(k, f"k_{i}", parallel))
        head = f'extern "C" void entry_{i}(void** args, int64_t* sizes, int threads)'
        parts.append(f"{head} {{ k_{i}({', '.join(args)}); }}\n")
    return "\n".join([prelude(parts), *parts])


def compiled(kernels: Sequence[Kernel], parallel: bool = False) -> list[Callable]:
    """For each kernel: (operands, sizes, threads) -> outputs."""
    library = cxx.load(source_of(kernels, parallel))
    return [_launcher(k, getattr(library, f"entry_{i}")) for i, k in enumerate(kernels)]


def _launcher(k: Kernel, entry: Callable) -> Callable:
    def launch(inputs: Sequence[Tensor], sizes: dict[str, int], threads: int = 1) -> tuple[Tensor, ...]:
        inputs = [x.contiguous() for x in inputs]
        outputs = [torch.empty([at(s, sizes) for s in a.shape], dtype=a.dtype) for a in k.outputs]
        given, made = iter(inputs), iter(outputs)
        tensors = [next(made if a.output else given) for a in k.args]
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        entry(pointers, (ctypes.c_int64 * max(1, len(k.sizes)))(*(sizes[s] for s in k.sizes)), threads)
        return tuple(outputs)

    return launch
