"""What launching a kernel costs beside the driver: `python -m fxfunc.bench.launches [--update]`. Entry point: `measure`.

Chains of kernels run on CPU memory with a driver that does nothing, one launch after another and as a CUDA graph: what is left is
Python, allocation and packing parameters, in microseconds a kernel. Nothing is timed on a GPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import statistics
from collections.abc import Callable

import torch

import fxfunc
from fxfunc.codegen import eager, launch
from fxfunc.codegen.replay import Replay

from .overhead import least_us
from .run import ROOT
from .tables import evidence

TABLE = ROOT / "bench" / "results" / "launches.md"
KERNELS = (1, 4, 16, 64)
ROUNDS, RUNS = 40, 5
EXPLAINED = (
    "What `python -m fxfunc.bench.launches --update` measured: microseconds a kernel of Python, allocation and parameters, with "
    "a driver that does nothing. `launches`: one after another; `graph`: as a CUDA graph, inputs where they were; `moved`: "
    "inputs elsewhere at each call, so that parameters are set. **The driver's own share and a GPU's: not measured.**"
)


class _Nothing:
    """libcuda whose calls do nothing, at the cost of a call."""

    def __init__(self):
        self._call = ctypes.CDLL(ctypes.util.find_library("m")).feclearexcept

    def __getattr__(self, name: str) -> Callable:
        return _given if name == "cuModuleGetFunction" else self._call


def _given(function, *rest) -> int:
    function._obj.value = 1
    return 0


class _Here(launch.Launcher):
    """A launcher on the CPU."""

    def __call__(self, operands, sizes):
        return self.start(operands, sizes, 0, 0)


def chain(count: int) -> tuple[fxfunc.Compiled, torch.Tensor]:
    """A program of so many kernels, no loop, each of which reads what the one before wrote, and its input."""

    def f(x):
        for i in range(count):
            x = [torch.exp, torch.sin, torch.tanh, torch.erf][i % 3 if i % 5 else 3](
                x - x.sum(i % 2, keepdim=True)
            )
        return x

    x = torch.zeros(8, 8)
    compiled = fxfunc.jit(f).lower(x).compile(backend="triton", target="cuda:90")
    return compiled, x


def measure(count: int) -> dict[str, float]:
    """Microseconds a kernel of a chain: the median of several runs, each the least of many windows."""
    compiled, x = chain(count)
    made = {b.kernel: _Here(b, launch.Driver(_Nothing())) for b in compiled.kernels}
    plain, replay = eager.emit(compiled.native, made), Replay(compiled.native, made)
    places = [[x.clone()] for _ in range(2)]
    turn = 0

    def moved() -> None:
        nonlocal turn
        turn ^= 1
        replay.start(places[turn], 0, 1)

    calls = {"launches": lambda: plain([x]), "graph": lambda: replay.start([x], 0, 0), "moved": moved}
    runs = [least_us(calls, ROUNDS) for _ in range(RUNS)]
    return {name: statistics.median(r[name] for r in runs) / count for name in calls}


def main() -> int:
    """Measure, print, and keep the table if asked."""
    return evidence(f"fxfunc.bench.{TABLE.stem}", __doc__, TABLE, EXPLAINED, _rows)


def _rows() -> list[dict[str, object]]:
    return [{"kernels": n, **{name: f"{us:.2f}" for name, us in measure(n).items()}} for n in KERNELS]


if __name__ == "__main__":
    raise SystemExit(main())
