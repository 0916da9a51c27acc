"""`python -m fxfunc bench` and its commands. Exit status: 0 clean, 1 a failure or regression, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import BenchError

INTERRUPTED = 130
LAUNCHES = 5
SMALLER = {  # where a few minutes have to do: quick runs, and comparisons, which repeat everything
    "maml1000": "maml1000[tasks=250]",
    "psg28": "psg28[batch=16]",
    "omniglot": "omniglot[tasks=1,steps=1]",
}
COMPARING = {"steady_s": 0.5}
QUICK = {"steady_s": 0.1, "least_rounds": 2, "cold_rounds": 1, "from_start": False}


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: a number above zero."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"needs a number above 0, not {text!r}")
        return value

    return number


def add_measuring(parser: argparse.ArgumentParser, threads: int) -> None:
    """Options that say what to measure, and how."""
    parser.add_argument(
        "--workload", action="append", metavar="NAME[key=value,...]", help="repeatable; default: all"
    )
    parser.add_argument(
        "--file", action="append", type=Path, default=[], help="a Python file that registers workloads"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=positive(int), default=threads, help="default: %(default)s")
    parser.add_argument(
        "--limit", type=positive(float), default=300.0, help="seconds that one answer of a cell may take"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 minutes: short times, less of the largest; no compilers, no make_fx",
    )


def make_parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure workloads under implementations and print tables")
    add_measuring(run, threads=len(os.sched_getaffinity(0)))
    run.add_argument("--impl", action="append", metavar="NAME", help="repeatable; default: all")
    run.add_argument(
        "--no-compilers", action="store_true", help="without torch.compile and Inductor (10 minutes, not 50)"
    )
    run.add_argument(
        "--scaling", action="store_true", help="MAML with 1 to 10,000 tasks and 1 to 500 inner steps instead"
    )
    run.add_argument(
        "--list", action="store_true", help="print workloads and implementations, and do nothing"
    )
    run.add_argument("--out", type=Path, help="write every sample to this JSON file")
    run.add_argument("--format", choices=["plain", "github"], default="plain")
    compare = commands.add_parser("compare", help="two results files, or two git revisions")
    compare.add_argument("base", help="a results file or a git revision")
    compare.add_argument("head", help="a results file or a git revision")
    metrics = ["all", "steady", "cold", "memory", "counters"]
    compare.add_argument(
        "--metrics", choices=metrics, default="all", help="counters compare across machines too"
    )
    compare.add_argument(
        "--launches", type=positive(int), default=LAUNCHES, help="processes a side (default %(default)s)"
    )
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="keep base.json and head.json of two revisions here"
    )
    compare.add_argument("--format", choices=["plain", "github"], default="plain")
    add_measuring(compare, threads=1)  # two wait for each other, which is most of the noise
    plot = commands.add_parser("plot", help="draw a results file: PNG and SVG")
    plot.add_argument("results", type=Path)
    plot.add_argument("--out", type=Path, default=Path("bench-plots"), metavar="DIR")
    record = commands.add_parser("nulls", help="record null runs: this installation against itself")
    record.add_argument("folder", type=Path, metavar="DIR")
    record.add_argument("--runs", type=positive(int), default=1)
    add_measuring(record, threads=1)
    simulate = commands.add_parser(
        "simulate", help="false alarms and power of compare, from recorded null runs"
    )
    simulate.add_argument("folder", type=Path, metavar="DIR")
    simulate.add_argument("slowed", type=Path, metavar="SLOWED", help="runs of the slowed workloads alone")
    simulate.add_argument("--tables", type=positive(int), default=100)
    simulate.add_argument("--launches", type=positive(int), default=LAUNCHES)
    readme = commands.add_parser("readme", help="write README's table from a committed results file")
    readme.add_argument("results", type=Path)
    return parser


def main(arguments: list[str]) -> int:
    """The exit status."""
    options = make_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options, arguments)
    except BenchError as problem:
        print(f"fxfunc bench: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measures, writes after each workload, prints; 1 if a cell failed or was wrong."""
    from . import records, tables
    from .run import measure

    workloads, implementations = chosen_workloads(options), chosen_implementations(options)
    if options.list:
        return print_names(workloads, implementations)
    check_writable(options.out)
    save = (lambda results: records.write(options.out, results)) if options.out else (lambda results: None)
    results = measure(workloads, implementations, measuring(options), arguments, save)
    print(tables.report(results, options.format))
    if not results["complete"]:
        return INTERRUPTED
    cells = [cell for entry in results["workloads"].values() for cell in entry["cells"].values()]
    return int(any(cell["status"] not in ("ok", "absent") for cell in cells))


def compare(options: argparse.Namespace, arguments: list[str]) -> int:
    """Holds head against base; 1 if something got worse."""
    from . import compare, records, revisions

    if all(Path(name).suffix == ".json" or Path(name).is_file() for name in (options.base, options.head)):
        base, head = records.read(options.base), records.read(options.head)
    else:
        names = {"base": options.base, "head": options.head}
        workloads = chosen_workloads(options)
        sides = revisions.measure(names, workloads, measuring(options), options.launches, arguments)
        base, head = sides["base"], sides["head"]
        for side in sides if options.out else ():
            records.write(options.out / f"{side}.json", sides[side])
    rows = compare.compare(base, head, metrics=options.metrics)
    print(compare.table(rows, options.format))
    for note in compare.notes(base, head):
        print(note)
    return compare.exit_status(rows)


def record_nulls(options: argparse.Namespace, arguments: list[str]) -> int:
    """Adds null runs to a folder; without --workload, writes the margins that all its runs give."""
    from . import nulls
    from .record_nulls import record

    record(options.folder, options.runs, chosen_workloads(options), measuring(options), arguments)
    if not options.workload:  # of all rows
        nulls.write_margins(nulls.read_folder(options.folder), options.folder.parent / nulls.MARGINS.name)
    return 0


def simulate(options: argparse.Namespace, arguments: list[str]) -> int:
    """Prints false alarms and power; 1 if there are more of those, or less of this, than promised."""
    from . import nulls

    runs, slow_runs = map(nulls.read_folder, (options.folder, options.slowed))
    simulation = nulls.simulate(runs, slow_runs, options.tables, options.launches)
    print(nulls.report(simulation))
    kept = simulation.failing <= simulation.tables / 100 and simulation.all_found >= 0.95 * simulation.tables
    return 0 if kept else 1


def readme(options: argparse.Namespace, arguments: list[str]) -> int:
    """Rewrites README's table."""
    from .run import ROOT
    from .tables import update_readme

    update_readme(ROOT / "README.md", options.results)
    return 0


def plot(options: argparse.Namespace, arguments: list[str]) -> int:
    """Writes the pictures and says where."""
    from . import records
    from .plot import plot

    for path in plot(records.read(options.results), options.out):
        print(path)
    return 0


def measuring(options: argparse.Namespace):
    """The options of a measurement."""
    from .runner import Options

    shorter = QUICK if options.quick else {} if options.command == "run" else COMPARING
    return Options(
        device=options.device,
        threads=options.threads,
        limit_s=options.limit,
        quick=options.quick,
        fixed_heap=options.command != "run",
        files=tuple(options.file),
        **shorter,
    )


def chosen_workloads(options: argparse.Namespace) -> list:
    """Those named, or all."""
    from .registry import find, names, register_file

    for file in options.file:
        register_file(file)
    scaling = SCALING if getattr(options, "scaling", False) else ()
    smaller = options.quick or options.command != "run"
    default = [SMALLER.get(name, name) if smaller else name for name in names()]
    return [find(name) for name in options.workload or scaling or default]


def chosen_implementations(options: argparse.Namespace) -> list:
    """Those named, or all."""
    from .implementations import IMPLEMENTATIONS, find

    chosen = [find(name) for name in options.impl or IMPLEMENTATIONS]
    brief = options.quick and not options.impl
    skip = options.no_compilers or brief
    return [
        each for each in chosen if not (skip and each.slow_to_compile or brief and each.name == "make_fx")
    ]


def check_writable(path: Path | None) -> None:
    """Raises BenchError now rather than after half an hour."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as problem:
        raise BenchError(f"--out {path}: {problem.strerror}; name a file in a folder of yours") from problem
    if path.is_dir():
        raise BenchError(f"--out {path}: a folder; name a file")


def print_names(workloads: list, implementations: list) -> int:
    """What a run would measure."""
    print("workloads:", *(w.name for w in workloads))
    print("implementations:", *(i.name for i in implementations))
    return 0


COMMANDS = {
    "run": run,
    "compare": compare,
    "plot": plot,
    "nulls": record_nulls,
    "simulate": simulate,
    "readme": readme,
}
SCALING = [
    *(f"maml25[tasks={n}]" for n in (1, 10, 100, 1000, 10_000)),
    *(f"maml25[steps={n}]" for n in (1, 5, 50, 500)),
]
