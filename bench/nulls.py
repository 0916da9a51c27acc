"""Evidence from null runs: both sides the same program. Entry points: `read_folder`, `margins`, `write_margins`, `simulate`.

A null run holds one launch of each side, taken in turns: "base" and "head" are equal, "slow" does 10% extra real work in a few
workloads. `simulate` draws whole runs as the launches of a table, so what is correlated within a run stays together, and gives
`compare` the margins of the runs that were not drawn, so no run judges itself.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from . import records, stats
from .compare import (
    LEAST_NOISE,
    LEAST_NULLS,
    MARGINS,
    MARGINS_FORMAT,
    MARGINS_SCHEMA,
    MISSING,
    NOISY,
    REGRESSION,
    UNSURE,
    WIN,
    Row,
    compare,
    launches_of,
    log_ratios,
    logs,
)
from .errors import BenchError

FORMAT, SCHEMA = "fxfunc-bench-null", 1
SIDES = ("base", "head", "slow")
FOLDER, SLOWED_FOLDER = MARGINS.parent / "null", MARGINS.parent / "slowed"

Run = dict[str, dict[str, Any]]  # side -> results
Key = tuple[str, str, str]  # workload, implementation, metric


class Seen(NamedTuple):
    """What one null run says of a row: log(head / base) by launch or process, and the level of log(base)."""

    ratios: list[float]
    level: float


def read(path: Path) -> Run:
    """The sides of a null run's file; raises BenchError as `records.read` does."""
    sides = records.load(path, FORMAT, SCHEMA).get("sides")
    if not isinstance(sides, dict) or any(not isinstance(sides.get(side), dict) for side in SIDES):
        raise BenchError(f"{path}: a null run has the sides {', '.join(SIDES)}: record it again")
    for side in SIDES:
        records.check(sides[side], f"{path}: side {side}")
    return {side: sides[side] for side in SIDES}


def write(path: Path, sides: Run) -> None:
    """Writes a null run's file."""
    records.write(path, {"format": FORMAT, "schema": SCHEMA, "sides": sides})


def read_folder(folder: Path = FOLDER) -> list[Run]:
    """All null runs of a folder, by name; raises BenchError if there are none or they are of different machines."""
    runs = [read(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise BenchError(f"{folder}: no null runs: record some first")
    for run, side in itertools.product(runs, SIDES):
        if differences := records.machine_differences(runs[0]["base"], run[side]):
            raise BenchError(
                f"{folder}: null runs of different machines ({'; '.join(differences)}): keep those of one"
            )
    return runs


def margins(runs: list[Run]) -> dict[str, Any]:
    """The noise of every row, as `compare` takes it; `rows` is {workload: {implementation: {metric: noise}}}.

    `paired` is that of one launch's log ratio, `unpaired` that of log ratios between runs, `largest` the largest log ratio seen
    within a run, and `n` the number of runs. Rows seen in fewer than LEAST_NULLS runs are left out.
    """
    base = runs[0]["base"]
    head = {
        "format": MARGINS_FORMAT,
        "schema": MARGINS_SCHEMA,
        "machine": base["machine"],
        "flags": base["flags"],
    }
    return head | {"rows": _combine([observe(run) for run in runs])}


def write_margins(runs: list[Run], path: Path = MARGINS) -> None:
    """Writes the margins where `compare` looks for them."""
    records.write(path, margins(runs))


def observe(run: Run) -> dict[Key, Seen]:
    """Every noisy row that both equal sides have."""
    found = {}
    for workload, entry in run["base"]["workloads"].items():
        for implementation, base in entry["cells"].items():
            head = run["head"]["workloads"].get(workload, {"cells": {}})["cells"].get(implementation)
            if base["status"] == "ok" and head is not None and head["status"] == "ok":
                rows = {(workload, implementation, metric): _seen(base, head, metric) for metric in NOISY}
                found |= {key: seen for key, seen in rows.items() if seen is not None}
    return found


def _seen(base: dict[str, Any], head: dict[str, Any], metric: str) -> Seen | None:
    before, after = (logs(launches_of(cell, metric), metric) for cell in (base, head))
    ratios = [statistics.median(launch) for launch in log_ratios(before, after)]
    return Seen(ratios, stats.centre([launch for launch in before if launch])[0]) if ratios else None


def _combine(observed: list[dict[Key, Seen]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key in dict.fromkeys(itertools.chain(*observed)):
        seen = [run[key] for run in observed if key in run]
        if len(seen) >= LEAST_NULLS:
            workload, implementation, metric = key
            rows.setdefault(workload, {}).setdefault(implementation, {})[metric] = _noise(seen)
    return rows


def _noise(seen: list[Seen]) -> dict[str, Any]:
    """If a run's processes agree with each other, each of them is given the noise that makes their mean as noisy as it was."""
    ratios = [ratio for run in seen for ratio in run.ratios]
    means = [statistics.fmean(run.ratios) * math.sqrt(len(run.ratios)) for run in seen]
    paired = max(stats.root_mean_square(ratios), stats.root_mean_square(means))
    unpaired = math.sqrt(2) * statistics.stdev(run.level for run in seen)
    largest = max(map(abs, ratios))
    return {
        "paired": _keep(paired),
        "unpaired": _keep(max(unpaired, paired)),
        "largest": _keep(largest),
        "n": len(seen),
    }


def _keep(value: float) -> float:
    return round(max(value, LEAST_NOISE), 6)


class Simulation(NamedTuple):
    """Counts over simulated tables: by metric, tables with such a row; `alarms` and `unsure` by row."""

    tables: int
    launches: int
    runs: int
    rows: dict[str, int]  # noisy rows a table, by metric
    regressions: dict[str, int]
    wins: dict[str, int]
    alarms: Counter[Key]
    unsure: Counter[Key]
    failing: int  # tables with any row that `exit_status` takes for a failure
    winning: int
    slowed: list[tuple[str, str]]  # what the slow side slows
    found: Counter[tuple[str, str]]
    all_found: int


def simulate(
    runs: list[Run], slow_runs: list[Run], tables: int = 100, launches: int = 3, seed: int = 0
) -> Simulation:
    """Compares equal programs, and slow ones with their base, `tables` times over drawn null runs.

    `slow_runs` are drawn for the slow rows and their base; the other rows of the table, and so its size, are those of `runs`.
    A slow workload counts as found if `compare` says REGRESSION of its steady time for every implementation that was slowed.
    Raises BenchError if there are too few runs to draw from.
    """
    for what, some, least in (("null", runs, launches + LEAST_NULLS), ("slowed", slow_runs, launches)):
        if len(some) < least:
            raise BenchError(
                f"{len(some)} {what} runs: a simulation of {launches} launches needs {least} or more"
            )
    observed, generator = [observe(run) for run in runs], random.Random(seed)
    runs, slow_runs = [_compact(run) for run in runs], [_compact(run) for run in slow_runs]
    equal, slow = [], []
    for _ in range(tables):
        drawn = sorted(generator.sample(range(len(runs)), launches))
        others = {"rows": _combine([seen for index, seen in enumerate(observed) if index not in drawn])}
        sides = {side: _merge([runs[index][side] for index in drawn]) for side in ("base", "head")}
        equal.append(compare(sides["base"], sides["head"], others))
        drawn = sorted(generator.sample(range(len(slow_runs)), launches))
        worse = {side: _merge([slow_runs[index][side] for index in drawn]) for side in ("base", "slow")}
        before = _overlay(
            sides["base"], {w: worse["base"]["workloads"][w] for w in worse["slow"]["workloads"]}
        )
        slow.append(compare(before, _overlay(sides["head"], worse["slow"]["workloads"]), others))
    return _count(equal, slow, slowed(slow_runs), launches, len(runs))


def slowed(runs: list[Run]) -> list[tuple[str, str]]:
    """The cells that the slow side slows: of the workloads in its flag "slow", or else of all that it has."""
    slow = runs[0]["slow"]
    chosen = slow["flags"].get("slow", list(slow["workloads"]))
    cells = [(workload, name) for workload in chosen for name in slow["workloads"][workload]["cells"]]
    return [(w, name) for w, name in cells if slow["workloads"][w]["cells"][name]["status"] == "ok"]


def _compact(run: Run) -> Run:
    """The run with each turn as its median, which is all that `compare` looks at."""
    return {side: _map_cells(results, lambda *_, cell: _compact_cell(cell)) for side, results in run.items()}


def _compact_cell(cell: dict[str, Any]) -> dict[str, Any]:
    if cell["status"] != "ok":
        return cell
    return cell | {"steady_s": [[[median] for median in launch] for launch in launches_of(cell, "steady")]}


def _map_cells(results: dict[str, Any], change: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The results with `change(workload, implementation, cell=cell)` as each cell."""
    workloads = {
        workload: entry
        | {"cells": {name: change(workload, name, cell=cell) for name, cell in entry["cells"].items()}}
        for workload, entry in results["workloads"].items()
    }
    return results | {"workloads": workloads}


def _merge(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """One result whose launches are those of several; a cell that is not ok in one of them is not ok."""

    def merged(workload: str, name: str, *, cell: dict[str, Any]) -> dict[str, Any]:
        cells = [results["workloads"].get(workload, {"cells": {}})["cells"].get(name) for results in launches]
        bad = [
            each or {"status": "absent", "reason": "not in all runs"}
            for each in cells
            if not each or each["status"] != "ok"
        ]
        joined = (
            {key: [x for each in cells for x in each[key]] for key in ("steady_s", "cold", "peak_bytes")}
            if not bad
            else {}
        )
        return bad[0] if bad else cell | joined

    return _map_cells(launches[0], merged) | {"run": "simulated"}


def _overlay(results: dict[str, Any], workloads: dict[str, Any]) -> dict[str, Any]:
    """The results with the cells of these workloads in place of their own."""
    replace = lambda w, name, *, cell: workloads.get(w, {"cells": {}})["cells"].get(name, cell)
    return _map_cells(results, replace)


def _count(
    equal: list[list[Row]], slow: list[list[Row]], targets: list[tuple[str, str]], launches: int, runs: int
) -> Simulation:
    hits = [
        {
            row[:2]
            for row in rows
            if row.metric == "steady" and row.verdict == REGRESSION and row[:2] in targets
        }
        for rows in slow
    ]
    return Simulation(
        tables=len(equal),
        launches=launches,
        runs=runs,
        rows={metric: sum(row.metric == metric for row in equal[0]) for metric in NOISY},
        regressions=_tables_with(equal, (REGRESSION,)),
        wins=_tables_with(equal, (WIN,)),
        alarms=Counter(
            row[:3] for rows in equal for row in rows if row.verdict in (REGRESSION, MISSING, WIN)
        ),
        unsure=Counter(row[:3] for rows in equal for row in rows if row.verdict == UNSURE),
        failing=_any(equal, (REGRESSION, MISSING)),
        winning=_any(equal, (WIN,)),
        slowed=targets,
        found=Counter(itertools.chain(*hits)),
        all_found=sum(len(hit) == len(targets) for hit in hits) if targets else 0,
    )


def _any(tables: Iterable[list[Row]], verdicts: tuple[str, ...]) -> int:
    return sum(any(row.verdict in verdicts for row in rows) for rows in tables)


def _tables_with(tables: list[list[Row]], verdicts: tuple[str, ...]) -> dict[str, int]:
    """By metric, how many tables have such a row."""
    return {
        metric: _any([[r for r in rows if r.metric == metric] for rows in tables], verdicts)
        for metric in NOISY
    }


def report(simulation: Simulation, format: str = "plain") -> str:
    """What was counted, as text: a table by metric, what was slowed and found, and the rows that gave alarms."""
    s = simulation
    unsure = {metric: sum(n for key, n in s.unsure.items() if key[2] == metric) for metric in NOISY}
    lines = [
        (metric, s.rows[metric], s.regressions[metric], s.wins[metric], f"{unsure[metric] / s.tables:.1f}")
        for metric in NOISY
    ]
    lines.append(
        ("all", sum(s.rows.values()), s.failing, s.winning, f"{sum(unsure.values()) / s.tables:.1f}")
    )
    header = ("metric", "rows a table", "tables with REGRESSION", "tables with WIN", "UNSURE rows a table")
    found = [(*cell, s.found[cell]) for cell in s.slowed]
    parts = [
        f"{s.tables} tables of equal programs, {s.launches} launches each, drawn from {s.runs} null runs:",
        tabulate(lines, header, tablefmt=format),
        f"10% slower: all {len(s.slowed)} rows found in {s.all_found} of {s.tables} tables.",
        tabulate(found, ("workload", "implementation", "tables where found"), tablefmt=format),
    ]
    if s.alarms:
        worst = ", ".join(f"{' '.join(key)} {n}" for key, n in s.alarms.most_common(5))
        parts.append(f"False alarms, most first: {worst}.")
    return "\n\n".join(parts)
