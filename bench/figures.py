"""What a results file says: its cells and the figures made of their samples. Parts that a file lacks are None or empty."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from .implementations import PEERS

Results = dict[str, Any]
Entry = dict[str, Any]
Cell = dict[str, Any]

STAGES = ("capture", "passes", "codegen", "compile")  # in this order; what else there is follows


def workloads(results: Results) -> list[tuple[str, Entry]]:
    """Names and entries, in the file's order."""
    return list((results.get("workloads") or {}).items())


def cells(results: Results) -> Iterator[tuple[str, str, Cell]]:
    """Every cell with its workload and implementation."""
    for workload, entry in workloads(results):
        for name, cell in entry["cells"].items():
            yield workload, name, cell


def implementations(results: Results) -> list[str]:
    """All that any workload has, in order of appearance."""
    return ordered(name for _, name, _ in cells(results))


def cell_of(entry: Entry, name: str) -> Cell | None:
    """The cell of an implementation, if the workload has one."""
    return entry["cells"].get(name)


def recorded(cell: Cell | None, key: str) -> list[Any]:
    """What an ok cell recorded under a key; nothing for any other cell."""
    return [] if cell is None or cell["status"] != "ok" else cell.get(key) or []


def steady_s(cell: Cell | None) -> float | None:
    """Median seconds a call over every sample."""
    return median(sample for launch in recorded(cell, "steady_s") for turn in launch for sample in turn)


def first_s(cell: Cell | None) -> float | None:
    """Median seconds to the first result."""
    return median(run.get("first_s") for run in recorded(cell, "cold"))


def peak_bytes(cell: Cell | None) -> float | None:
    """Median over launches."""
    return median(recorded(cell, "peak_bytes"))


def best(entry: Entry, names: Iterable[str]) -> tuple[str, float] | None:
    """The fastest of these and its median seconds; None if none of them has any."""
    times = [(steady, name) for name in names if (steady := steady_s(cell_of(entry, name))) is not None]
    return min(times)[::-1] if times else None


def times_faster(entry: Entry, name: str) -> float | None:
    """The best peer's median over this implementation's."""
    ours, peer = steady_s(cell_of(entry, name)), best(entry, PEERS)
    return peer[1] / ours if ours and peer else None


def limit_s(entry: Entry, peaks: dict[str, float]) -> float | None:
    """Seconds that the workload takes at the machine's peaks: the larger of its flops' and its bytes'."""
    pairs = [
        (entry.get(work), peaks.get(peak))
        for work, peak in (("flops", "flops_per_s"), ("bytes", "bytes_per_s"))
    ]
    return max((work / peak for work, peak in pairs if work is not None and peak), default=None)


def stage_names(results: Results) -> list[str]:
    """The stages of first calls that any cell tells, in order of work."""
    runs = [run for _, _, cell in cells(results) for run in recorded(cell, "cold")]
    found = {stage for run in runs for stage in run.get("stages_s") or {}}
    return [*(s for s in STAGES if s in found), *sorted(found - set(STAGES))]


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are not None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ordered(names: Iterable[str]) -> list[str]:
    """Each once, in order of appearance."""
    return list(dict.fromkeys(names))
