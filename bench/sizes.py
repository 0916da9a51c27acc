"""Times over sizes on a GPU: `python -m fxfunc.bench.sizes [--device cpu] [--update] [--rows LETTERS]`. Entry point: `main`.

MAML's meta-gradient over tasks, hidden width and inner steps, a size at a time: as the model has it, as a CUDA graph, with its
map batched in ATen, and by torch.func; then the chains of chains.py. A row that fails, or whose answer is wrong, is named at the
end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import torch
from tabulate import tabulate

import fxfunc

from . import chains, counters, peaks, records
from .chains import Chain
from .cli import positive
from .errors import BenchError
from .kernels import GOALS
from .run import ROOT
from .turns import ALL, NONE, Measured, Run, in_words, measure, moved
from .workloads import maml
from .workloads.meta import meta_gradient

NO_GRAPH = "no CUDA graph"  # begins what is said of a program that is none
TABLE = ROOT / "bench" / "results" / "sizes.md"
EXPLAINED = (
    "Written by `python -m fxfunc.bench.sizes --update`. Answers to inputs drawn anew were first held against float64 (error: "
    "max|d| / max(|ref|max, 1), the worst of ours); ms are medians of single calls in turns, on a GPU by CUDA events. Goals are "
    "those for an H200."
)
OF_MAML = (
    "Second-order meta-gradients, data in cache, launches included. `model`: what the model makes of it; `graph`: that as a CUDA "
    "graph; `batched`: the map batched, all of it ATen's. `chose`: what the model made of the map; `faster`: which of these is. "
    "`flops`: of products, in the time of `model` or `graph`, as a share of sgemm's."
)


class Point(NamedTuple):
    """Sizes of MAML."""

    tasks: int = 25
    width: int = maml.WIDTH
    steps: int = 5

    def __str__(self) -> str:
        return "maml " + " ".join(f"{k}={v}" for k, v in self._asdict().items())


AXES = {
    "tasks": [Point(tasks=n) for n in (1, 10, 25, 100, 1000, 10_000)],
    "width": [Point(tasks=100, width=n) for n in (16, 40, 64, 128, 256)],
    "steps": [Point(steps=n) for n in (1, 5, 20, 50)],
}


@dataclasses.dataclass
class Row:
    """What was measured at a point; `batches`: the model has the map batched; `no_graph`: why there is no CUDA graph."""

    name: Point
    found: Measured
    batches: bool | None = None
    flops: int = 0
    no_graph: str | None = None

    @property
    def ms(self) -> float | None:
        """Of the model's program, launched either way."""
        return min((self.found.ms[way] for way in ("model", "graph") if way in self.found.ms), default=None)

    @property
    def batched_wins(self) -> bool | None:
        """Whether ATen is faster; None where that is not known."""
        batched = self.found.ms.get("batched")
        return None if batched is None or self.ms is None else batched < self.ms

    def cells(self, run: Run) -> dict[str, object]:
        """A row of the table."""
        found, ms, ours = self.found, self.ms, ("model", "graph", "batched")
        goal = GOALS.get(self.name.tasks) if self.name == Point(self.name.tasks) else None
        share = self.flops / (ms / 1e3) / run.peak["flops_per_s"] if ms else None
        return {
            **self.name._asdict(),
            "error": found.worst(ours),
            **{f"{way}, ms": found.cell(way) for way in ("torch.func", *ours)},
            "chose": NONE if self.batches is None else "batched" if self.batches else "kernel",
            "faster": min((w for w in ours if w in found.ms), key=found.ms.__getitem__, default=NONE),
            "flops": NONE if share is None else f"{share:.1%}",
            "goal, ms": NONE if goal is None else run.judged(goal, ms and ms <= goal),
        }


def measure_maml(point: Point, run: Run) -> Row:
    """All ways at one point, against torch.func in float64 on the CPU."""
    step = functools.partial(meta_gradient, loss=maml.loss, steps=point.steps, lr=inner_lr(point))
    inputs = moved(run.device, maml.draw(point.tasks, point.width, run.generator()))
    lowered = fxfunc.jit(step(fxfunc)).lower(*inputs)
    model = lowered.compile(backend=run.backend)
    graph = functools.cache(model.with_cuda_graph)
    ways = {
        "torch.func": step(torch.func),
        "model": model,
        "graph": lambda *inputs: graph()(*inputs),
        "batched": lowered.compile(backend="eager"),
    }
    found = measure(ways, step(torch.func), inputs, seconds=run.seconds, reference_on="cpu")
    refused = NO_GRAPH in found.failed.get("graph", "")
    no_graph = found.failed.pop("graph") if refused else None
    return Row(point, found, is_batched(model), counters.graph_flops(model.graph), no_graph)


def inner_lr(point: Point) -> float:
    """maml25's, and less for a wider net or more steps, which would diverge or leave float32's digits to chance."""
    return maml.INNER_LR * min(1, Point().width / point.width) * min(1, Point().steps / point.steps)


def is_batched(model: fxfunc.Compiled) -> bool:
    """Whether the model has a map batched, as `explain` says of it."""
    return re.search(r"^a map of .* is batched: ", model.explain(), re.M) is not None


# ---- the page ----


def crossover(axis: str, rows: Sequence[Row]) -> str:
    """One line: where along an axis batched ATen is faster as measured, and where the model has the map batched."""
    rows = sorted(rows, key=lambda row: getattr(row.name, axis))
    sizes = [getattr(row.name, axis) for row in rows]
    faster, batches = _where(sizes, [r.batched_wins for r in rows]), _where(sizes, [r.batches for r in rows])
    return f"{axis}: batched ATen is faster {faster}; the model batches {batches}."


def _where(sizes: list[int], known: list[bool | None]) -> str:
    """`from 1000 on`: at which of the sizes, which ascend, it is so; None: it is not known there."""
    of = {so: [n for n, found in zip(sizes, known, strict=True) if found is so] for so in (True, False, None)}
    if not of[True]:
        text = "nowhere"
    elif of[False] and of[False][-1] < of[True][0]:
        text = f"from {of[True][0]} on, not yet at {of[False][-1]}"
    else:
        text = f"at {', '.join(map(str, of[True]))}" if of[False] else "everywhere"
    return f"{text} (not known at {', '.join(map(str, of[None]))})" if of[None] else text


def page(run: Run, measured: Sequence[Row | Chain]) -> str:
    """All of it as Markdown."""
    rows = {row.name: row for row in measured if isinstance(row, Row)}
    parts = ["# Sizes", EXPLAINED, provenance(run)]
    if rows:
        axes = {axis: [rows[p] for p in points if p in rows] for axis, points in AXES.items()}
        lines = [crossover(axis, some) for axis, some in axes.items() if some]
        lines += dict.fromkeys(row.no_graph for row in rows.values() if row.no_graph)
        parts += ["## MAML", OF_MAML, _table(run, rows.values()), _list(lines)]
    if found := [row for row in measured if isinstance(row, Chain)]:
        parts += ["## Chains", chains.EXPLAINED, _table(run, found)]
    if bad := [f"{r.name}: {way}: {why}" for r in measured for way, why in r.found.failed.items()]:
        parts += ["## Failed", _list(bad)]
    return "\n\n".join(parts) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(run: Run, rows: Iterable[Row | Chain]) -> str:
    return tabulate([r.cells(run) for r in rows], headers="keys", tablefmt="github", disable_numparse=True)


def provenance(run: Run) -> str:
    """When, where and with what."""
    machine, versions = records.describe_machine(), records.describe_versions()
    where = machine["gpu"] if run.device == "cuda" else f"{machine['cpu']}, {torch.get_num_threads()} threads"
    flops, stream = (run.peak[k] / 1e9 for k in ("flops_per_s", "bytes_per_s"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, torch {versions['torch']}, triton {versions['triton']}, seed {run.seed}; "
        f"sgemm {flops:.0f} Gflop/s, stream {stream:.0f} GB/s."
    )


def measured_row(what: Point | chains.Case, run: Run) -> Row | Chain:
    """A row, whatever happens: what goes wrong is in it."""
    kind, measuring = (Row, measure_maml) if isinstance(what, Point) else (Chain, chains.measure_chain)
    try:
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()
        return measuring(what, run)
    except Exception as problem:
        return kind(what, Measured(failed={ALL: in_words(problem)}))


def chosen(letters: str) -> list[Point | chains.Case]:
    """The rows whose names have these letters in them, each once. Raises BenchError if there are none."""
    found = dict.fromkeys([*(p for points in AXES.values() for p in points), *chains.CASES])
    if not (named := [row for row in found if letters in str(row)]):
        raise BenchError(f"no row has {letters!r} in its name; there are {', '.join(map(str, found))}")
    return named


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the page if asked; 1 if a row failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.sizes", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}, of all rows")
    parser.add_argument("--rows", default="", metavar="LETTERS", help="only those with these in their names")
    parser.add_argument("--seconds", type=positive(float), default=1.5, help="of timing a row (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="default: a new one")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU on this machine: give --device cpu")
    if options.update and options.rows:
        parser.error("--update writes a page of all rows: leave out --rows")
    try:
        rows = chosen(options.rows)
    except BenchError as problem:
        parser.error(str(problem))
    peak = peaks.measure(options.device, torch.get_num_threads())
    run = Run(options.device, options.seconds, options.seed, peak)
    measured = []
    for what in rows:
        measured.append(measured_row(what, run))
        print(what, measured[-1].found.ms, measured[-1].found.failed, file=sys.stderr, flush=True)
    text = page(run, measured)
    print(text)
    if options.update:
        records.write_text(TABLE, text)
    return int(any(row.found.failed for row in measured))


if __name__ == "__main__":
    sys.exit(main())
