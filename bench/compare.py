"""Two results held against each other: ratio, interval and verdict a row. Entry points: `compare`, `table`, `exit_status`.

Noisy metrics (steady, cold, memory) have one estimate a row: the mean over launches of the median over turn pairs of
log(head / base). Its standard error is the largest of three: the row's noise between processes over the root of the launches,
as null runs showed it (see `nulls`; a stated default without them); the spread between the launches of this run; a bootstrap
over turns. Half the interval is that times Student's t at tail ALPHA / (2 m), m being the number of noisy rows of the table:
Bonferroni's correction, so ALPHA is the share of *tables* of equal programs with any false alarm (family-wise), not of rows.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from . import records, stats
from .errors import BenchError

ALPHA = 0.01  # of tables
LEAST_EFFECT = 0.02  # a smaller change of a noisy figure is no verdict
LEAST_BYTES = 2 * 2**20  # nor is a smaller difference of peaks; peaks below count as this
LEAST_NOISE = 0.003
LEAST_NULLS = 5  # with fewer null runs a row has the default margin
PASS, REGRESSION, WIN, MISSING, UNSURE = VERDICTS = ("PASS", "REGRESSION", "WIN", "MISSING", "UNSURE")
ORDER = (REGRESSION, MISSING, UNSURE, WIN, PASS)
MARGINS = Path(__file__).parent / "results" / "margins.json"
MARGINS_FORMAT, MARGINS_SCHEMA = "fxfunc-bench-margins", 1


class Metric(NamedTuple):
    """A noisy figure: the slowdown that PASS excludes, and the noise of log ratios between processes without null runs."""

    excludes: float
    paired: float
    unpaired: float


NOISY = {
    "steady": Metric(excludes=0.10, paired=0.03, unpaired=0.06),
    "cold": Metric(excludes=0.50, paired=0.15, unpaired=0.30),
    "memory": Metric(excludes=0.20, paired=0.05, unpaired=0.10),
}
METRICS = ("all", *NOISY, "counters")


class Row(NamedTuple):
    """One line of a comparison. `base` and `head` are seconds, bytes or counts; `ratio` is head / base."""

    workload: str
    implementation: str
    metric: str
    base: float | None
    head: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str
    note: str = ""


class Estimate(NamedTuple):
    """A noisy row before judgement: `log` is the estimate of log(head / base), `error` its standard error."""

    workload: str
    implementation: str
    metric: str
    base: float
    head: float
    log: float
    error: float
    freedom: float
    note: str


def compare(
    base: dict[str, Any], head: dict[str, Any], margins: dict[str, Any] | None = None, metrics: str = "all"
) -> list[Row]:
    """A row for each figure that base has, in base's order, and for each cell that only head has.

    `margins` is what `nulls.margins` gives; None looks for the recorded ones of this machine, and {} uses the defaults.
    `metrics` is one of METRICS. Raises BenchError if the results are of different machines, devices or threads, unless only
    the exact counters are asked for.
    """
    if metrics != "counters":
        _refuse_other_machine(base, head)
    margins = recorded_margins(base) if margins is None else margins
    rows = [
        row
        for cells in _pairs(base, head)
        for row in _cell_rows(*cells, metrics, margins, is_paired(base, head))
    ]
    count = sum(isinstance(row, Estimate) for row in rows)
    return [_judge(row, count) if isinstance(row, Estimate) else row for row in rows]


def _refuse_other_machine(base: dict[str, Any], head: dict[str, Any]) -> None:
    if differences := records.machine_differences(base, head):
        raise BenchError(
            f"results of different machines or settings ({'; '.join(differences)}): measure both on one, "
            "or compare the exact counters alone"
        )


def is_paired(base: dict[str, Any], head: dict[str, Any]) -> bool:
    """Whether the turns of both were taken next to each other, in one run."""
    return base["run"] == head["run"]


def recorded_margins(results: dict[str, Any], path: Path = MARGINS) -> dict[str, Any]:
    """The margins recorded on the machine of these results; {} if there are none."""
    if not path.exists():
        return {}
    margins = records.load(path, MARGINS_FORMAT, MARGINS_SCHEMA)
    return margins if records.same_machine(margins, results) else {}


def _pairs(base: dict[str, Any], head: dict[str, Any]) -> Iterator[tuple[str, str, dict | None, dict | None]]:
    """(workload, implementation, cell of base, cell of head), base's first."""
    for workload in base["workloads"] | head["workloads"]:
        left = base["workloads"].get(workload, {"cells": {}})["cells"]
        right = head["workloads"].get(workload, {"cells": {}})["cells"]
        for implementation in left | right:
            yield workload, implementation, left.get(implementation), right.get(implementation)


def _cell_rows(
    workload: str,
    implementation: str,
    base: dict | None,
    head: dict | None,
    metrics: str,
    margins: dict[str, Any],
    paired: bool,
) -> Iterator[Row | Estimate]:
    cell = (workload, implementation)
    if not _is_ok(base):
        if _is_ok(head):
            yield Row(
                *cell, "answer", None, None, None, None, None, PASS, f"only in head; base: {_status(base)}"
            )
        return
    if not _is_ok(head):
        yield Row(
            *cell,
            "answer",
            None,
            None,
            None,
            None,
            None,
            MISSING,
            f"counts as a regression; head: {_status(head)}",
        )
        return
    recorded = margins.get("rows", {}).get(workload, {}).get(implementation, {})
    for metric in NOISY:
        if metrics in ("all", metric):
            yield from _noisy_rows(cell, metric, base, head, recorded.get(metric), paired)
    if metrics in ("all", "counters"):
        yield from _counter_rows(cell, base["counters"], head["counters"])


def _is_ok(cell: dict | None) -> bool:
    return cell is not None and cell["status"] == "ok"


def _status(cell: dict | None) -> str:
    if cell is None:
        return "not measured"
    return f"{cell['status']}: {cell['reason']}" if cell.get("reason") else cell["status"]


def _counter_rows(cell: tuple[str, str], base: dict[str, int], head: dict[str, int]) -> Iterator[Row]:
    """Exact: no noise, no margin."""
    for name, before in base.items():
        if name not in head:
            yield Row(*cell, name, before, None, None, None, None, MISSING, "head does not count it")
            continue
        after = head[name]
        ratio = after / before if before else 1.0 if after == before else math.inf
        verdict = REGRESSION if after > before else WIN if after < before else PASS
        yield Row(*cell, name, before, after, ratio, ratio, ratio, verdict)


def launches_of(cell: dict[str, Any], metric: str) -> list[list[float]]:
    """What a noisy metric compares, by launch: the medians of turns, or the one figure of a process."""
    if metric == "steady":
        return [[statistics.median(turn) for turn in launch] for launch in cell["steady_s"]]
    if metric == "cold":
        return [[first["first_s"]] for first in cell["cold"]]
    return [[peak] for peak in cell["peak_bytes"]]


def logs(launches: list[list[float]], metric: str) -> list[list[float]]:
    """Their logarithms; a peak too small to matter counts as the least that does."""
    least = LEAST_BYTES if metric == "memory" else 0
    return [[math.log(max(value, least)) for value in launch] for launch in launches]


def log_ratios(base: list[list[float]], head: list[list[float]]) -> list[list[float]]:
    """log(head / base) of turns taken next to each other; an interrupted side ends the other, and empty launches are left out."""
    launches = zip(base, head, strict=False)
    ratios = [[after - before for before, after in zip(b, h, strict=False)] for b, h in launches]
    return [launch for launch in ratios if launch]


def _noisy_rows(
    cell: tuple[str, str], metric: str, base: dict, head: dict, recorded: dict[str, Any] | None, paired: bool
) -> Iterator[Row | Estimate]:
    before, after = launches_of(base, metric), launches_of(head, metric)
    if not any(before):
        return
    figures = [statistics.median(itertools.chain(*side)) if any(side) else None for side in (before, after)]
    if not any(after):
        yield Row(*cell, metric, *figures, None, None, None, MISSING, "head has no figure")
        return
    before, after = logs(before, metric), logs(after, metric)
    ratios = log_ratios(before, after) if paired else []
    noise, freedom, note = _noise(metric, recorded, paired=bool(ratios))
    log, error = _estimate_paired(ratios, noise) if ratios else _estimate_unpaired(before, after, noise)
    yield Estimate(*cell, metric, *figures, log, error, freedom, note)


def _noise(metric: str, recorded: dict[str, Any] | None, paired: bool) -> tuple[float, float, str]:
    """Noise of one launch's log ratio, its degrees of freedom, and a note if it is the default."""
    kind = "paired" if paired else "unpaired"
    if recorded is None or recorded["n"] < LEAST_NULLS:
        return getattr(NOISY[metric], kind), math.inf, "default margin"
    return max(recorded[kind], LEAST_NOISE), recorded["n"] - 1, ""


def _estimate_paired(ratios: list[list[float]], noise: float) -> tuple[float, float]:
    log, seen = stats.centre(ratios)
    return log, max(noise / math.sqrt(len(ratios)), seen)


def _estimate_unpaired(base: list[list[float]], head: list[list[float]], noise: float) -> tuple[float, float]:
    """Launches of one run share its hour, so the noise between runs is not divided by their number."""
    (before, error_before), (after, error_after) = (
        stats.centre([x for x in side if x]) for side in (base, head)
    )
    return after - before, max(noise, math.hypot(error_before, error_after))


def _judge(row: Estimate, count: int) -> Row:
    """The verdict of a row among `count` noisy ones."""
    half = stats.t_quantile(ALPHA / (2 * count), row.freedom) * row.error
    ratio, low, high = math.exp(row.log), math.exp(row.log - half), math.exp(row.log + half)
    bound = 1 + NOISY[row.metric].excludes
    small = row.metric == "memory" and abs(row.head - row.base) < LEAST_BYTES
    notes = [row.note] if row.note else []
    verdict = PASS
    if not small and low > 1 and ratio > 1 + LEAST_EFFECT:
        verdict = REGRESSION
    elif not small and high < 1 and ratio < 1 / (1 + LEAST_EFFECT):
        verdict = WIN
    elif not small and high > bound:
        verdict = UNSURE
        notes.insert(0, f"up to {high - 1:+.0%} is not excluded")
    return Row(*row[:5], ratio, low, high, verdict, "; ".join(notes))


def notes(base: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know of the two files."""
    lines = []
    if not is_paired(base, head):
        lines.append(
            "The files are of different runs: intervals are those of unpaired figures, which are wider."
        )
    lines += [
        f"{name} was interrupted." for name, each in (("Base", base), ("Head", head)) if not each["complete"]
    ]
    for kind in ("versions", "flags"):
        left, right = base[kind], head[kind]
        differ = [
            f"{key} {left.get(key)} / {right.get(key)}"
            for key in left | right
            if left.get(key) != right.get(key)
        ]
        if differ:
            lines.append(f"Different {kind} (base / head): {', '.join(differ)}.")
    return lines


def exit_status(rows: list[Row]) -> int:
    """1 if anything regressed or is missing, else 0."""
    return int(any(row.verdict in (REGRESSION, MISSING) for row in rows))


def table(rows: list[Row], format: str = "plain") -> str:
    """The rows by tabulate, what is not PASS first, and a line that sums them up. `format` is "plain" or "github"."""
    ordered = sorted(rows, key=lambda row: ORDER.index(row.verdict))
    header = ("workload", "implementation", "metric", "base", "head", "ratio", "interval", "verdict", "note")
    lines = [_cells(row, format) for row in ordered]
    return f"{tabulate(lines, header, tablefmt=format, disable_numparse=True)}\n\n{summary(rows)}"


def _cells(row: Row, format: str) -> tuple[str, ...]:
    show = UNITS.get(row.metric, lambda value: f"{value:,}")
    figures = ["-" if value is None else show(value) for value in (row.base, row.head)]
    exact = row.metric not in NOISY
    interval = "-" if row.low is None or exact else f"{row.low:.3f} .. {row.high:.3f}"
    note = row.note.replace("\n", " ").replace("|", r"\|" if format == "github" else "|")
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    return row.workload, row.implementation, row.metric, *figures, ratio, interval, row.verdict, note


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e-6:.4g} us"


UNITS: dict[str, Callable[[float], str]] = {
    "steady": _seconds,
    "cold": _seconds,
    "memory": lambda value: f"{value / 2**20:.1f} MiB",
}


def summary(rows: list[Row]) -> str:
    """How many rows have each verdict, and what the verdicts mean."""
    counts = Counter(row.verdict for row in rows)
    noisy = [row for row in rows if row.metric in NOISY and row.ratio is not None]
    defaults = sum("default margin" in row.note for row in noisy)
    bounds = ", ".join(f"{name} {metric.excludes:+.0%}" for name, metric in NOISY.items())
    return (
        f"{len(rows)} rows: {', '.join(f'{counts[verdict]} {verdict}' for verdict in ORDER)}. "
        f"Intervals at {1 - ALPHA:.0%} a table (Bonferroni over {len(noisy)} noisy rows, {defaults} with default margins); "
        f"PASS excludes {bounds}; counters are exact."
    )
