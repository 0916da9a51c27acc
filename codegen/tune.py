"""How a kernel is done, chosen by measuring on this machine's GPU. Entry point: `tuned`, in place of `offline.compile`.

What was chosen is kept in the cache, a file for a kernel, device and version of Triton; one that cannot be read is made anew.
Kernels of other blocks take sums in another order, so numbers may differ within rounding from those of the model's choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from fxfunc.passes import errors
from fxfunc.passes.dims import at

from . import cxx, offline, written
from .launch import Binary, Launcher
from .mapped import AnyKernel

log = logging.getLogger("fxfunc")
SIZE = 1024  # of a symbolic size
REPEATS = 20


def tuned(
    k: AnyKernel, target: str, precision: str | None = None, measure: Callable[[Binary], float] | None = None
) -> Binary:
    """The kernel for a target, done in the way that took least seconds; `measure` gives those of a binary.

    Raises BackendError where no GPU of the target is here to measure on.
    """
    capability, precision = offline.capability_of(target), offline.precision_for(target, precision)
    device = _device(target) if measure is None else "given"
    choices = written.ways(k, capability, precision)
    path = _path(k, capability, precision, device, choices)
    chosen = _read(path, len(choices))
    if chosen is None:
        try:
            chosen = _fastest(k, target, precision, choices, measure or seconds)
        except (errors.DynamicShape, torch.OutOfMemoryError) as e:  # at the size that stands for all
            log.warning("%s is not tuned: %s", k.name, e)
            chosen = 0
        _keep(path, chosen)
    return offline.compile(k, target, precision, choices[chosen] if chosen else None)


def _fastest(
    k: AnyKernel, target: str, precision: str, choices: list, measure: Callable[[Binary], float]
) -> int:
    """Which of the choices is fastest: the first, unless another is so beyond noise; what spills or does not fit is not tried."""
    limit = offline.SHARED[offline.capability_of(target)]
    first = offline.compile(k, target, precision)
    if first.shared > limit:
        return 0
    best, least = 0, measure(first) * 0.97
    for i, way in enumerate(choices[1:], 1):
        b = offline.compile(k, target, precision, way)
        if b.shared <= limit and b.spills <= first.spills and (took := measure(b)) < least:
            best, least = i, took
    return best


def seconds(b: Binary) -> float:
    """The median of some launches on random operands, by CUDA events; the first ones load the code and the caches."""
    sizes = dict.fromkeys(b.kernel.sizes, SIZE)
    generator = torch.Generator(device="cuda")
    operands = [
        _random([at(s, sizes) for s in a.shape], a.dtype, generator) for a in b.kernel.args if not a.output
    ]
    launcher, took = Launcher(b), []
    for i in range(REPEATS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launcher(operands, sizes)
        end.record()
        end.synchronize()
        took += [start.elapsed_time(end) / 1e3] if i >= 3 else []
    return statistics.median(took)


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Operands, by a generator of our own; integers are 0, which are indices of anything."""
    if dtype.is_floating_point:
        return torch.rand(shape, device="cuda", generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype, device="cuda")


def _device(target: str) -> str:
    """The name of the GPU here, which is of the target."""
    here = torch.cuda.is_available() and "cuda:{}{}".format(*torch.cuda.get_device_capability())
    if here != target:
        what = f"to tune for {target} takes such a GPU; here is {here or 'none'}"
        raise errors.BackendError(backend="triton", what=what, instead="Leave tune out, or compile there.")
    return torch.cuda.get_device_name()


# ---- what is kept ----


def _path(k: AnyKernel, capability: int, precision: str, device: str, choices: list) -> Path:
    """The file of a kernel: its name is all that the choice depends on."""
    import triton

    text = written.write(k, capability, precision).text
    parts = (str(k), text, str(capability), precision, device, triton.__version__, repr(choices))
    return cxx.cache() / "tuned" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"


def _read(path: Path, count: int) -> int | None:
    """The choice that is kept, None if there is none that can be one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        chosen = json.loads(path.read_text())["chosen"]
        if type(chosen) is int and 0 <= chosen < count:
            return chosen
    return None


def _keep(path: Path, chosen: int) -> None:
    """Write a file whole or not at all; a cache that cannot be written is none."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({"chosen": chosen}, file)
        os.replace(file.name, path)
