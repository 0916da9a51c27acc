"""What a call costs beside its arithmetic: `python -m fxfunc.bench.overhead`, microseconds a call for each number of tensors."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ARGUMENTS = (1, 4, 16, 64)
WINDOW_S = 5e-4  # shorter than a turn of the scheduler: the least of many is of one that nothing cut short

Call = Callable[[], object]


def add_up(*xs: Tensor) -> Tensor:
    """One elementwise function of all arguments: one result, next to nothing to compute."""
    total = xs[0] * 2 + 1
    for x in xs[1:]:
        total = total + x
    return total


def calls_for(count: int) -> dict[str, Call]:
    """What is timed: one call of ATen for scale, the compiled functions, and `jit`."""
    import fxfunc

    xs = [torch.ones(8) for _ in range(count)]
    jitted = fxfunc.jit(add_up)
    found: dict[str, Call] = {"torch.add": lambda: torch.add(xs[0], xs[0])}
    for backend in ("eager", "cpp"):
        compiled = jitted.lower(*xs).compile(backend=backend)
        found[backend] = lambda compiled=compiled: compiled(*xs)
    return found | {"jit": lambda: jitted(*xs)}


def least_us(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each: the least mean of a window, the windows of all in turns."""
    counts = {name: _calls_in_window(call) for name, call in calls.items()}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            least[name] = min(least[name], _mean_s(call, counts[name]))
    return {name: 1e6 * seconds for name, seconds in least.items()}


def _calls_in_window(call: Call) -> int:
    for _ in range(3):
        call()
    return max(1, int(WINDOW_S / _mean_s(call, 3)))


def _mean_s(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def table(rows: dict[int, dict[str, float]]) -> str:
    """The figures as text, a line for each number of arguments."""
    names = list(next(iter(rows.values())))
    lines = [["arguments", *names], *([str(n), *(f"{row[k]:.1f}" for k in names)] for n, row in rows.items())]
    return "\n".join("".join(cell.rjust(11) for cell in line) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="windows of each call (default: %(default)s)")
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    print("us a call, one thread")
    print(table({n: least_us(calls_for(n), rounds) for n in ARGUMENTS}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
