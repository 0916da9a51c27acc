"""A results file as text. Entry points: `report` (all of it), `readme_table` and `update_readme`.

Each table is a function from results to text, plain or GitHub Markdown. Parts that a file lacks (an interrupted run, a
workload of a single cell) are `-`; `notes` says why of each.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from . import records
from .errors import BenchError
from .figures import (
    Cell,
    Entry,
    Results,
    best,
    cell_of,
    cells,
    first_s,
    implementations,
    limit_s,
    median,
    ordered,
    peak_bytes,
    recorded,
    stage_names,
    steady_s,
    times_faster,
    workloads,
)
from .implementations import OURS, PEERS
from .stats import median_interval

NONE = "-"
WHY = {"warm": "first result with a warm cache", "load": "first result from an artifact"}
COMPILERS = ("torch.compile", "inductor")
START, END = "<!-- bench: from {} -->", "<!-- /bench -->"
BLOCK = r"<!-- bench: from (\S+) -->.*?<!-- /bench -->"


def report(results: Results, format: str = "plain") -> str:
    """Every table under its title, then the notes. `format` is "plain" or "github"."""
    parts = [part for title, table in TABLES for part in (_title(title, format), table(results, format))]
    return "\n\n".join([*parts, _title("Notes", format), notes(results, format)])


# ----- tables ---------------------------------------------------------------------------------------------------------


def steady_table(results: Results, format: str = "plain") -> str:
    """A row a workload: median ms of each implementation, how ours compare with the row's best peer and with the limit."""
    columns = implementations(results)
    ours = [name for name in columns if name in OURS and any(map(steady_s, _column(results, name)))]
    header = ["workload", *columns, "best peer", *(f"{name} x" for name in ours), "% of limit"]
    peaks = results.get("peaks") or {}
    rows = [
        [
            workload,
            *(steady_ms(cell_of(entry, name)) for name in columns),
            _name(best(entry, PEERS)),
            *(_number(times_faster(entry, name)) for name in ours),
            _number(_percent(limit_s(entry, peaks), best(entry, OURS))),
        ]
        for workload, entry in workloads(results)
    ]
    legend = (
        "Median ms a call. x: times faster than the row's best peer (its median / ours). % of limit: the least time that this"
        " machine's peaks allow for the workload's flops and compulsory bytes, over the time of our fastest."
    )
    return _table(header, rows, format, legend)


def detail_table(results: Results, format: str = "plain") -> str:
    """A row a cell with steady samples: median, 95% interval, range and how many."""
    header = ("workload", "implementation", "median ms", "95% interval", "min", "max", "samples", "launches")
    rows = [
        [workload, name, *_spread(cell["steady_s"])]
        for workload, name, cell in cells(results)
        if steady_s(cell) is not None
    ]
    return _table(header, rows, format, "Interval of the median: bootstrap over whole turns.", left=2)


def cold_table(results: Results, format: str = "plain") -> str:
    """A row a cell: seconds to the first result in a fresh process, its stages, and from caches and artifacts."""
    stages = stage_names(results)
    header = ("workload", "implementation", "first result", *stages, "from start", "warm cache", "artifact")
    rows = [
        [workload, name, *_cold(cell, stages)]
        for workload, name, cell in cells(results)
        if cell["status"] != "absent"
    ]
    legend = (
        "Median s over fresh processes with empty caches, from just before the first call, after the imports; its stages where"
        " the implementation tells; from the start of the process; with the caches of an earlier process; from a saved artifact."
    )
    return _table(header, rows, format, legend, left=2)


def memory_table(results: Results, format: str = "plain") -> str:
    """A row a workload: peak MiB of each implementation."""
    columns = implementations(results)
    rows = [
        [workload, *(peak_mib(cell_of(entry, name)) for name in columns)]
        for workload, entry in workloads(results)
    ]
    legend = "MiB at the highest point of the first and the steady calls, above what imports and inputs take."
    return _table(["workload", *columns], rows, format, legend)


def counter_table(results: Results, format: str = "plain") -> str:
    """A row a cell that was counted or checked: the exact counters, and the error against float64."""
    counted = [item for item in cells(results) if item[2].get("counters") or item[2].get("error") is not None]
    names = ordered(name for _, _, cell in counted for name in cell.get("counters") or {})
    rows = [
        [workload, name, *_counters(cell, names), _error(cell.get("error")), _error(cell.get("allowed"))]
        for workload, name, cell in counted
    ]
    header = ("workload", "implementation", *names, "error", "allowed")
    legend = "Exact. flops: products and convolutions; bytes: read and written by each op; - where nothing counts it."
    return _table(header, rows, format, legend, left=2)


TABLES: tuple[tuple[str, Callable[[Results, str], str]], ...] = (
    ("Steady state", steady_table),
    ("First result", cold_table),
    ("Peak memory", memory_table),
    ("Counters and errors", counter_table),
    ("Steady state in detail", detail_table),
)


# ----- README ---------------------------------------------------------------------------------------------------------


def readme_table(results: Results, source: str) -> str:
    """The block of README.md between its markers; `source` is the file that `results` came from, as the first marker names it."""
    header = ("ms a call", "torch.func", "best compiler", "JAX", "fxfunc", "times faster than the best peer",
              "first result, s: fxfunc", "torch.compile", "Inductor", "JAX")  # fmt: skip
    rows = [_readme_row(workload, entry) for workload, entry in workloads(results)]
    table = _table(header, rows, "github")
    return "\n".join([START.format(source), table, "", _provenance(results), END])


def update_readme(readme: Path, file: Path) -> None:
    """Rewrites the block of a README from a results file below its folder. Raises BenchError if either is not there."""
    text = readme.read_text(encoding="utf-8")
    begin, end = block(text, str(readme))
    source = Path(os.path.relpath(file, readme.parent)).as_posix()
    if source.startswith(".."):
        raise BenchError(f"{file}: not below {readme.parent}: commit it there, so that readers find it")
    text = text[:begin] + readme_table(records.read(file), source) + text[end:]
    readme.write_text(text, encoding="utf-8")


def block(text: str, where: str) -> tuple[int, int]:
    """Where a README's block begins and ends, markers included; raises BenchError unless there is exactly one."""
    found = [match.span() for match in re.finditer(BLOCK, text, re.S)]
    if len(found) != 1:
        raise BenchError(
            f"{where}: {len(found)} blocks: write the lines {START.format('FILE')} and {END} where the table belongs, once"
        )
    return found[0]


def _readme_row(workload: str, entry: Entry) -> list[str]:
    ours, compiler = best(entry, OURS), best(entry, COMPILERS)
    first = [cell_of(entry, name) for name in (ours[0] if ours else "eager", *COMPILERS, "jax")]
    return [
        workload,
        steady_ms(cell_of(entry, "torch.func")),
        _with_name(compiler) or _words(entry, COMPILERS),
        steady_ms(cell_of(entry, "jax")),
        _with_name(ours) or _words(entry, OURS),
        _against_best(entry, ours),
        *(_shown(cell, _seconds(first_s(cell))) for cell in first),
    ]


def _against_best(entry: Entry, ours: tuple[str, float] | None) -> str:
    """`2.3 (inductor)`: how many times faster ours is, and than which."""
    ratio, peer = times_faster(entry, ours[0] if ours else ""), best(entry, PEERS)
    return f"{_number(ratio)} ({peer[0]})" if ratio and peer else NONE


def _with_name(found: tuple[str, float] | None) -> str:
    return f"{_number(1e3 * found[1])} ({found[0]})" if found else ""


def _words(entry: Entry, names: Iterable[str]) -> str:
    """What became of implementations of which none has a figure."""
    states = ordered(_shown(cell_of(entry, name), None) for name in names)
    return ", ".join(state for state in states if state != NONE) or NONE


def _provenance(results: Results) -> str:
    flags, machine = results.get("flags") or {}, results.get("machine") or {}
    device = machine.get("gpu") if flags.get("device") == "cuda" else machine.get("cpu")
    versions = ", ".join(f"{k} {v}" for k, v in (results.get("versions") or {}).items() if v)
    return (
        f"Measured {str(results.get('started'))[:10]} on {device}, {flags.get('threads')} threads; {versions}. "
        "Median of interleaved calls; first results in fresh processes with empty caches, after the imports."
    )


# ----- notes ----------------------------------------------------------------------------------------------------------


def notes(results: Results, format: str = "plain") -> str:
    """A line a reason of every figure that is not there, with the cells that it holds for; then what the figures depend on."""
    lines = [*_missing(results), *_conditions(results)]
    return "\n".join(f"- {_escape(line)}" if format == "github" else line for line in lines)


def _missing(results: Results) -> Iterator[str]:
    grouped: dict[str, list[tuple[str, str]]] = {}
    for what, workload, name in _gaps(results):
        grouped.setdefault(what, []).append((workload, name))
    every = [workload for workload, _ in workloads(results)]
    yield from (f"{what}: {_where(places, every)}" for what, places in grouped.items())


def _gaps(results: Results) -> Iterator[tuple[str, str, str]]:
    """What is missing and why, with workload and implementation (none, if it is of the row)."""
    peaks, columns = results.get("peaks") or {}, implementations(results)
    for workload, entry in workloads(results):
        for name in columns:
            yield from ((what, workload, name) for what in _cell_gaps(cell_of(entry, name)))
        if any(best(entry, [name]) for name in OURS) and not best(entry, PEERS):
            yield "- no ratio: no peer has a figure", workload, ""
        if limit_s(entry, peaks) is None:
            yield (
                "- no limit: the workload's flops and bytes or the machine's peaks are not known",
                workload,
                "",
            )


def _cell_gaps(cell: Cell | None) -> Iterator[str]:
    if cell is None:
        yield "- not part of this run"
    elif cell["status"] != "ok":
        word = NONE if cell["status"] == "absent" else cell["status"]
        yield f"{word} {cell.get('reason') or 'no reason was recorded'}"
    else:
        yield from (
            f"- no {WHY.get(what, what)}: {reason}" for what, reason in (cell.get("why") or {}).items()
        )
        if steady_s(cell) is None:
            yield "- no steady state: not reached"


def _where(places: list[tuple[str, str]], every: list[str]) -> str:
    """`jax (maml25, lap); cpp, triton (all workloads)`."""
    by_name: dict[str, list[str]] = {}
    for workload, name in places:
        by_name.setdefault(name, []).append(workload)
    names: dict[str, list[str]] = {}
    for name, found in by_name.items():
        names.setdefault(_among(found, every), []).append(name)
    return "; ".join(f"{', '.join(some)} ({where})" if all(some) else where for where, some in names.items())


def _among(found: list[str], every: list[str]) -> str:
    """The workloads, or those that are left out where these are fewer."""
    rest = [workload for workload in every if workload not in found]
    if not rest:
        return "all workloads"
    return f"all but {', '.join(rest)}" if len(rest) < len(found) else ", ".join(found)


def _conditions(results: Results) -> Iterator[str]:
    """Machine, versions, revision, peaks and overhead, a line each; what the file lacks is left out."""
    if not results.get("complete", True):
        yield "interrupted: this run did not reach its end"
    yield from (f"{name}: {text}" for name, describe in CONDITIONS if (text := describe(results)))


def _machine(results: Results) -> str:
    machine, flags = results.get("machine") or {}, results.get("flags") or {}
    loads = [f"{load:.2f}" for load in results.get("load_average") or []]
    parts = [
        machine.get("cpu"),
        _unit(machine.get("cores"), "cores"),
        _unit(machine.get("memory_gib"), "GiB"),
        machine.get("gpu"),
        machine.get("system"),
        flags.get("device") and f"measured on {flags['device']}",
        _unit(flags.get("threads"), "threads"),
        loads and f"load average {' before and '.join(loads)}{' after' if len(loads) > 1 else ''}",
    ]
    return ", ".join(str(part) for part in parts if part)


def _versions(results: Results) -> str:
    return ", ".join(
        f"{name} {version or 'none'}" for name, version in (results.get("versions") or {}).items()
    )


def _run(results: Results) -> str:
    revision = results.get("revision") or {}
    commit = revision.get("commit")
    parts = [
        results.get("started"),
        f"{results.get('seconds') or 0:.0f} s",
        commit and f"revision {commit[:12]}{' with uncommitted changes' if revision.get('dirty') else ''}",
        results.get("command") and f"bench {' '.join(results['command'])}",
    ]
    return ", ".join(part for part in parts if part)


def _peaks(results: Results) -> str:
    peaks = results.get("peaks") or {}
    flops, traffic = peaks.get("flops_per_s"), peaks.get("bytes_per_s")
    parts = [
        flops and f"{_number(flops / 1e9)} Gflop/s (sgemm)",
        traffic and f"{_number(traffic / 1e9)} GB/s (stream)",
    ]
    return ", ".join(part for part in parts if part)


def _overhead(results: Results) -> str:
    medians = [
        (steady, workload, name)
        for workload, name, cell in cells(results)
        if (steady := steady_s(cell)) is not None
    ]
    overhead = results.get("overhead_s")
    if not overhead or not medians:
        return ""
    shortest, workload, name = min(medians)
    share = f"{_number(100 * overhead / shortest, 2)}% of the shortest median ({workload}, {name}: "
    return f"{_number(1e9 * overhead)} ns a sample, {share}{_number(1e6 * shortest)} us)"


def _imports(results: Results) -> str:
    return ", ".join(f"{name} {_number(s)} s" for name, s in (results.get("imports_s") or {}).items())


CONDITIONS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("machine", _machine),
    ("versions", _versions),
    ("run", _run),
    ("peaks", _peaks),
    ("harness", _overhead),
    ("imports", _imports),
)


# ----- cells as text ---------------------------------------------------------------------------------------------------


def steady_ms(cell: Cell | None) -> str:
    """The median as text, or what the cell is instead."""
    return _shown(cell, _scaled(steady_s(cell), 1e3))


def peak_mib(cell: Cell | None) -> str:
    """The peak as text, or what the cell is instead."""
    return _shown(cell, _scaled(peak_bytes(cell), 2**-20))


def _shown(cell: Cell | None, text: str | None) -> str:
    """The text of an ok cell's figure, the word for one that is not ok, `-` for what is not there."""
    if cell is None or cell["status"] == "absent":
        return NONE
    return (text or NONE) if cell["status"] == "ok" else cell["status"]


def _cold(cell: Cell, stages: Sequence[str]) -> list[str]:
    runs = recorded(cell, "cold")
    in_stage = [median((run.get("stages_s") or {}).get(stage) for run in runs) for stage in stages]
    start = median(run.get("from_start_s") for run in runs)
    stored = [median(recorded(cell, key)) for key in ("warm_s", "load_s")]
    return [_shown(cell, _seconds(first_s(cell))), *map(_seconds, [*in_stage, start, *stored])]


def _spread(launches: list[list[list[float]]]) -> list[str]:
    turns = [turn for launch in launches for turn in launch]
    samples = [sample for turn in turns for sample in turn]
    low, high = median_interval(turns)
    middle, least, most = (_number(1e3 * s) for s in (statistics.median(samples), min(samples), max(samples)))
    interval = f"{_number(1e3 * low)} .. {_number(1e3 * high)}"
    return [middle, interval, least, most, str(len(samples)), str(len(launches))]


def _counters(cell: Cell, names: Sequence[str]) -> list[str]:
    counters = cell.get("counters") or {}
    return [f"{counters[name]:,}" if name in counters else NONE for name in names]


# ----- text -----------------------------------------------------------------------------------------------------------


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], format: str, legend: str = "", left: int = 1
) -> str:
    """By tabulate: the first `left` columns to the left, figures to the right, then the legend."""
    sides = ["left" if i < left else "right" for i in range(len(header))]
    if format == "github":
        rows = [[_escape(text) for text in row] for row in rows]
    table = tabulate(rows, header, tablefmt=format, disable_numparse=True, colalign=sides if rows else None)
    return f"{table}\n\n{legend}" if legend else table


def _title(text: str, format: str) -> str:
    return f"### {text}" if format == "github" else f"== {text} =="


def _escape(text: str) -> str:
    """One line that GitHub's Markdown takes as it is within a table."""
    return text.replace("\n", " ").replace("|", r"\|")


def _number(value: float | None, digits: int = 3) -> str:
    """That many significant digits, never an exponent; `-` for None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def _scaled(value: float | None, scale: float) -> str | None:
    return None if value is None else _number(value * scale)


def _seconds(value: float | None) -> str:
    """Seconds, no finer than a millisecond."""
    return f"{value:.3f}" if value is not None and value < 1 else _number(value)


def _percent(part: float | None, whole: tuple[str, float] | None) -> float | None:
    return None if part is None or whole is None else 100 * part / whole[1]


def _error(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def _name(found: tuple[str, float] | None) -> str:
    return found[0] if found else NONE


def _unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:g} {unit}"


def _column(results: Results, name: str) -> list[Cell | None]:
    return [cell_of(entry, name) for _, entry in workloads(results)]


def evidence(
    prog: str, doc: str, path: Path, explained: str, rows: Callable[[], list[dict[str, object]]]
) -> int:
    """A whole command: make a table, print it under the title of its file, and keep it there if asked."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=doc)
    parser.add_argument("--update", action="store_true", help=f"write {path.name}")
    update = parser.parse_args().update
    text = f"# {path.stem.title()}\n\n{explained}\n\n{tabulate(rows(), headers='keys', tablefmt='github')}\n"
    print(text)
    if update:
        records.write_text(path, text)
    return 0
