"""The cost model's choices beside all others: `python -m fxfunc.bench.choices [--update]`. Entry point: `measure`.

Each workload and drawn program is compiled as the model has it, and as each combination of forced choices has it that makes a
difference. All are timed in turns in one process; the least of many times stands for each, since what else the machine does only
adds to it. With one thread it is the time of the processor, which leaves out when others have it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate

import fxfunc
from fxfunc.codegen import cost, eager, native, partition

from . import records
from .cli import SMALLER
from .drawn import draw
from .errors import BenchError
from .measure import in_turns
from .registry import find, names
from .run import ROOT

DRAWN = 30
WITHIN, ENOUGH, NEVER_OVER = 1.25, 0.9, 2.0
SAMPLE_S = 0.001  # a sample repeats its call for as long
ROUNDS = (7, 200)  # at least and at most
TOLERANCE = 2e-3  # of the largest number of an answer: sums in another order
RESULTS = ROOT / "bench" / "results" / "choices.json"
TABLE = RESULTS.with_suffix(".md")
MODEL = "model"

Call = Callable[..., Any]


def cases(wanted: str = "") -> Iterator[tuple[str, Call, tuple]]:
    """A name, a function and its inputs for each workload and drawn program whose name has these letters in it."""
    for name in (SMALLER.get(n, n) for n in names()):
        if wanted in name:
            w = find(name)
            yield name, w.function(fxfunc), w.inputs(**w.parameters)
    for drawn in (draw(fxfunc, seed) for seed in range(DRAWN)):
        if wanted in drawn.name:
            yield drawn


# ---- all choices ----

TOGETHER = (
    "maps",
    "products",
    "blocks",
)  # choices that change what the others are worth; the rest one at a time


def programs(lowered: fxfunc.Lowered) -> dict[str, partition.Built]:
    """The model's program, and by what forces it, each other one that choices can force."""
    model = _built(lowered, {})
    found = {_text(model): (MODEL, model)}
    for choices in _combinations():
        built = _built(lowered, choices)
        found.setdefault(_text(built), (" ".join(f"{kind}={way}" for kind, way in choices.items()), built))
    return dict(found.values())


def _combinations() -> Iterator[dict[str, str]]:
    for ways in itertools.product(*([None, *cost.CHOICES[kind]] for kind in TOGETHER)):
        yield {kind: way for kind, way in zip(TOGETHER, ways, strict=True) if way}
    yield from ({kind: way} for kind in cost.CHOICES if kind not in TOGETHER for way in cost.CHOICES[kind])


def _built(lowered: fxfunc.Lowered, choices: dict[str, str]) -> partition.Built:
    with cost.forced(**choices):
        return partition.build(lowered.graph)


def _text(built: partition.Built) -> str:
    return "\n".join([str(built.graph), *(p.source for p in built.programs)])


# ---- times ----


def measure_case(name: str, function: Call, inputs: tuple, seconds: float) -> dict[str, dict[str, float]]:
    """The least and the median time of each choice, by its name."""
    lowered = fxfunc.jit(function).lower(*inputs)
    tensors = [*lowered.signature.tensors(inputs, {}), *(c.tensor for c in lowered.captures)]
    found = programs(lowered)
    _compile([p for built in found.values() for p in built.programs])
    calls = {choice: eager.emit(built.graph) for choice, built in found.items()}
    _check(name, {choice: call(list(tensors)) for choice, call in calls.items()})
    return _timed(calls, tensors, seconds)


def _compile(programs: list[native.Native]) -> None:
    """Each compiler is a process of its own."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda p: p.compile("cpu"), programs))


def _check(name: str, answers: dict[str, list[torch.Tensor | None]]) -> None:
    """Raises BenchError where a choice has another answer than the model's."""
    for choice, answer in answers.items():
        for a, b in zip(answer, answers[MODEL], strict=True):
            if a is not None and not torch.allclose(
                a, b, TOLERANCE, TOLERANCE * float(b.abs().max()), equal_nan=True
            ):
                raise BenchError(f"{name}: {choice} and the model differ by {float((a - b).abs().max())}")


def _timed(
    calls: dict[str, Call], tensors: list[torch.Tensor], seconds: float
) -> dict[str, dict[str, float]]:
    """In turns, in one order and the other, for about so many seconds in all."""
    repeats = {choice: _repeats(call, tensors) for choice, call in calls.items()}
    times: dict[str, list[float]] = {choice: [] for choice in calls}
    for choice in in_turns(calls, ROUNDS, seconds):
        times[choice].append(_sample(calls[choice], tensors, repeats[choice]))
    return {c: {"least_s": min(t), "median_s": statistics.median(t)} for c, t in times.items()}


def _repeats(call: Call, tensors: list[torch.Tensor]) -> int:
    once = min(_sample(call, tensors, 1) for _ in range(3))
    return max(1, round(SAMPLE_S / max(once, 1e-9)))


def _sample(call: Call, tensors: list[torch.Tensor], repeats: int) -> float:
    """Seconds a call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call(list(tensors))
    return (clock() - start) / repeats


# ---- the table ----


def ratio(times: dict[str, dict[str, float]]) -> float:
    """How many times the best choice's time the model's takes."""
    return times[MODEL]["least_s"] / min(t["least_s"] for t in times.values())


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a case, the worst first."""
    rows = []
    for name, times in sorted(measured.items(), key=lambda item: -ratio(item[1])):
        others = {choice: t["least_s"] for choice, t in times.items() if choice != MODEL}
        best = min(others, key=others.__getitem__, default=None)
        rows.append(
            [name, len(times), f"{times[MODEL]['least_s'] * 1e3:.3f}", best and f"{others[best] * 1e3:.3f}",
             f"{ratio(times):.2f}", best if ratio(times) > 1 else MODEL]
        )  # fmt: skip
    head = ["case", "programs", "model, ms", "best forced, ms", "model / best", "best"]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def summary(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line: how often the model is near the best, and how far it is at most."""
    ratios = [ratio(times) for times in measured.values()]
    near = sum(r <= WITHIN for r in ratios)
    return f"{near} of {len(ratios)} cases within {WITHIN}x of the best choice; the worst {max(ratios):.2f}x"


def record(measured: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write the results and the page that shows them, each whole; cases that were not measured now stay as they were."""
    head = {
        "machine": records.describe_machine(),
        "versions": records.describe_versions(),
        "revision": records.describe_revision(ROOT),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    before = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    measured = before | measured
    records.write(RESULTS, head | {"cases": measured})
    records.write_text(TABLE, page(head, measured))


def page(head: dict[str, Any], measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as Markdown."""
    machine = f"{head['machine']['cpu']}, {head['threads']} threads, torch {head['versions']['torch']}"
    return (
        "\n\n".join(
            ["# The cost model's choices", f"{summary(measured)}. {machine}. {EXPLAINED}", table(measured)]
        )
        + "\n"
    )


EXPLAINED = (
    "Least of interleaved times of the program alone, in one process (`python -m fxfunc.bench.choices --update`). "
    "`programs` is how many different ones the choices of `codegen/cost.py` give."
)


def main() -> int:
    """Measure, print, and say by the status whether the model is as good as promised."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.choices", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {RESULTS.name} and {TABLE.name}")
    parser.add_argument("--case", default="", metavar="LETTERS", help="only names that have these letters")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of timing for each case (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = {}
    with torch.no_grad():
        for name, function, inputs in cases(options.case):
            times = measured[name] = measure_case(name, function, inputs, options.seconds)
            print(
                f"{ratio(times):5.2f}  {name}",
                {c: f"{t['least_s'] * 1e3:.3f}" for c, t in times.items()},
                file=sys.stderr,
                flush=True,
            )
            if options.update:
                record(measured)
    print(table(measured), summary(measured), sep="\n\n")
    ratios = [ratio(times) for times in measured.values()]
    return int(max(ratios) > NEVER_OVER or sum(r <= WITHIN for r in ratios) < ENOUGH * len(ratios))


if __name__ == "__main__":
    sys.exit(main())
