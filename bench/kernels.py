"""What the workloads' kernels compile to, without a device: `python -m fxfunc.bench.kernels [--update]`. Entry point: `measure`.

Each workload is compiled for each target in this process, Triton's cache empty: seconds of all of it, and of each kernel the
registers and the stack a thread (spills), the shared memory and the scratch memory a program, and the code. Nothing is timed on a
GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from unittest import mock

import torch
from tabulate import tabulate

import fxfunc
from fxfunc.codegen import launch, offline, tiles
from fxfunc.codegen.cost import bytes_of

from . import chains, cycles, records
from .registry import find, names
from .run import ROOT

TARGETS = ("cuda:80", "cuda:90")
TABLE = ROOT / "bench" / "results" / "kernels.md"
HEADERS = (
    "workload",
    "target",
    "seconds",
    "kernel",
    "registers",
    "stack, B",
    "shared, B",
    "scratch, B",
    "code, KiB",
    "warps",
)
TASKS = (25, 1000, 10000)
GOALS = {25: 0.06, 1000: 0.25, 10000: 2.5}  # ms on an H200, by tasks
GUESSED = ("workload", "kernel", "instructions", "barriers", *(f"{n} tasks, ms" for n in TASKS))
GUESSES = (
    "Guesses for an H200, from instructions counted in the code for cuda:90 (`bench/cycles.py` has the assumptions), of a kernel "
    "of tasks alone. They are here to be held against measurements."
)
CHAINS = ("chain", "kernels", "registers", "memory, ms", "instructions, ms", "share at most")
OF_CHAINS = (
    "Guesses for the chains of `bench/chains.py`: what they must read and write, at an H200's 4.3 TB/s (`memory`), and the "
    "instructions of their kernels, issued as above. `share at most`: of that bandwidth, kernels taking the longer of these."
)
BANDWIDTH = 4.3e12  # bytes a second of a copy
EXPLAINED = (
    "What `python -m fxfunc.bench.kernels --update` compiled on a machine without a GPU: registers and stack a thread, shared "
    "and scratch memory a program. `seconds` is passes and Triton for all kernels of a workload, its cache empty. **Times on a "
    "GPU: not measured.**"
)


def measure(name: str, target: str) -> tuple[list[tuple], list[tuple], list[str]]:
    """The rows of a workload, guesses for its kernels of tasks, and why maps of it are batched."""
    w = find(name)
    lowered = fxfunc.jit(w.function(fxfunc)).lower(*w.inputs(**w.parameters))
    offline.compile.cache_clear()
    tiles.source.cache_clear()
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", TRITON_CACHE_DIR=cache):
        start = time.perf_counter()
        compiled = lowered.compile(backend="triton", target=target)
        seconds = time.perf_counter() - start
    rows = [_row(b) for b in compiled.kernels] or [("none",)]
    first = (name, target, f"{seconds:.1f}")
    guesses = [_guess(name, b) for b in compiled.kernels if b.workspace is not None and target == TARGETS[-1]]
    rows = [(first if i == 0 else ("", "", "")) + r for i, r in enumerate(rows)]
    return rows, guesses, compiled._program.notes


def _row(b: launch.Binary) -> tuple:
    return (b.kernel.name, b.regs, b.spills, b.smem, b.workspace or 0, round(b.size / 1024), b.warps)


def _guess(name: str, b: launch.Binary) -> tuple:
    found = [cycles.predict(b, n) for n in TASKS]
    if found[0] is None:
        return (name, b.kernel.name, "a loop was unrolled")
    times = (f"{p.seconds * 1e3:.3f}" for p in found)
    return (name, b.kernel.name, found[0].instructions, found[0].barriers, *times)


def guess_chain(case: chains.Case) -> tuple:
    """What memory and instructions allow a chain on an H200, by its kernels for cuda:90."""
    x = torch.empty(case.shape, dtype=case.dtype)
    inputs = [*[x] * (1 + case.gradient), *[torch.empty(case.shape[1], dtype=case.dtype)] * case.vectors]
    lowered = fxfunc.jit(case.over(fxfunc)).lower(*inputs)
    kernels = lowered.compile(backend="triton", target=TARGETS[-1]).kernels
    least = sum(map(bytes_of, (*lowered.graph.in_vals, *lowered.graph.out_vals))) / BANDWIDTH
    guesses = [cycles.predict(b, b.programs) for b in kernels]
    issued = [0.0 if g is None else g.seconds for g in guesses]
    moved = [sum(map(bytes_of, b.kernel.args)) / BANDWIDTH for b in kernels]
    total = sum(map(max, issued, moved))
    most = max(b.regs for b in kernels)
    return (
        str(case),
        len(kernels),
        most,
        f"{least * 1e3:.3f}",
        ">= " * (None in guesses) + f"{sum(issued) * 1e3:.3f}",  # a loop was unrolled: not all is known
        f"{least / total:.2f}",
    )


def _goals(rows: list[tuple], guesses: list[tuple]) -> list[tuple]:
    """GOALS for an H200: each beside what can be said without one."""
    guess = next((dict(zip(GUESSED, g, strict=False)) for g in guesses if g[0] == "maml25"), {})
    found = [
        (f"maml25 with {n} tasks, ms", goal, guess.get(f"{n} tasks, ms", ""), "not measured")
        for n, goal in GOALS.items()
    ]
    compiled = next((r[2] for r in rows if r[:2] == ("maml25", TARGETS[-1])), "")
    return [
        *found,
        ("layer norm, gelu, residual and softmax, share of copy bandwidth", 0.9, "", "not measured"),
        ("maml25 compiled for cuda:90 on this CPU, s", 10, "", compiled),
    ]


def _without_folders(text: str) -> str:
    """Lines are named by their file alone: a table is of no machine."""
    return re.sub(r" at \S*/(\S+:\d+)", r" at \1", text)


def main() -> int:
    """Compile, print, and keep the table if asked."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.kernels", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--workload", action="append", metavar="NAME", help="default: all")
    options = parser.parse_args()
    rows: list[tuple] = []
    guesses: list[tuple] = []
    notes: list[str] = []
    for name in options.workload or names():
        for target in TARGETS:
            found, guessed, why = measure(name, target)
            rows += found
            guesses += guessed
            notes += [f"- {name}: {_without_folders(text)}" for text in why if target == TARGETS[-1]]
            print(tabulate(found), file=sys.stderr, flush=True)
    table = tabulate(rows, HEADERS, tablefmt="github")
    guess = tabulate(guesses, GUESSED, tablefmt="github")
    of_chains = tabulate(map(guess_chain, chains.CASES), CHAINS, tablefmt="github")
    print(table, guess, of_chains, *notes, sep="\n\n")
    if options.update:
        version = records.describe_versions()["triton"]
        parts = [
            "# Kernels of the workloads",
            f"{EXPLAINED} triton {version}.",
            table,
            GUESSES,
            guess,
            OF_CHAINS,
            of_chains,
            "Goals for an H200:",
            tabulate(_goals(rows, guesses), ("what", "goal", "guess", "measured"), tablefmt="github"),
            "Batched maps:",
            "\n".join(notes),
        ]
        records.write_text(TABLE, "\n\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
