"""What this machine can do at most, measured: multiply-adds by sgemm, memory traffic by stream. Entry point: `measure`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
GEMM_S, STREAM_S = 1.4, 0.4  # budgets of the timed repeats
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
LARGEST = 512 * 2**20  # bytes an array, where 4 times the cache would be more


def measure(device: str, threads: int) -> dict[str, float]:
    """`flops_per_s` (float32, two a multiply-add) and `bytes_per_s` of `threads` threads or a GPU: the best repeat each.

    torch.mm of square matrices, and the triad c = a + 2 b over arrays of at least four times the last-level cache, counted as
    three arrays' bytes (McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance Computers", 1995; like
    there, the read of c that a write may cost a CPU is not counted). Takes
    under 3 s on an idle machine, which it wants; the thread count is as before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return {"flops_per_s": _flops_per_s(device), "bytes_per_s": _bytes_per_s(device)}
    finally:
        torch.set_num_threads(before)


def array_bytes(device: str) -> int:
    """The size of each array of the triad: four last-level caches and at least 64 MiB."""
    caches = [_size(p.read_text()) for p in CACHE.glob("index*/size")]
    wanted = 4 * max(caches, default=32 * 2**20) if device == "cpu" else LARGEST
    return min(max(wanted, 64 * 2**20), LARGEST)


def _flops_per_s(device: str) -> float:
    sizes = GEMM_SIZES[device]
    return max(_gemm(device, size, GEMM_S / len(sizes)) for size in sizes)


def _gemm(device: str, size: int, budget_s: float) -> float:
    a, b = torch.rand(2, size, size, device=device)
    out = torch.empty(size, size, device=device)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device, budget_s)


def _bytes_per_s(device: str) -> float:
    a, b, c = torch.ones(3, array_bytes(device) // 4, device=device)
    return 3 * a.nbytes / _best(lambda: torch.add(a, b, alpha=2, out=c), device, STREAM_S)


def _best(call: Callable[[], object], device: str, budget_s: float) -> float:
    """Seconds of the fastest of at least three calls, after one that is not timed."""
    _timed(call, device)
    start, best = time.perf_counter(), float("inf")
    for repeat in range(1000):
        if repeat >= 3 and time.perf_counter() - start > budget_s:
            break
        best = min(best, _timed(call, device))
    return best


def _timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _size(text: str) -> int:
    """Bytes, of Linux's `512K` or `32M`."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    return int(text.rstrip("KMG")) * units.get(text[-1:], 1)
