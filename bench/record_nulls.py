"""Recording null runs: this installation against itself, and against itself with extra work. Entry point: `record`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from . import nulls
from .revisions import BACKENDS, Duel
from .run import blank, describe, interruptible
from .runner import Options
from .workload import Workload

SLOWED = ("maml25", "psg8", "lap")
EXTRA_WORK = 0.10  # of a call's time


def record(folder: Path, runs: int, workloads: list[Workload], options: Options, command: list[str]) -> None:
    """Adds `runs` numbered files to the folder; each is one launch of every side in processes of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(runs):
        taken = [int(path.stem) for path in folder.glob("[0-9]*.json")]
        path = folder / f"{max(taken, default=0) + 1:02}.json"
        print(f"null run {path.stem}", file=sys.stderr, flush=True)
        nulls.write(path, one(workloads, options, command))


def one(workloads: list[Workload], options: Options, command: list[str]) -> nulls.Run:
    """The three sides of one null run."""
    results = {side: describe(command, options) for side in nulls.SIDES}
    for side, each in results.items():
        each["run"] = results["base"]["run"]
        measured = [w for w in workloads if side != "slow" or w.name in SLOWED]
        each["workloads"] = {w.name: blank(w, BACKENDS, options.device) for w in measured}
    with tempfile.TemporaryDirectory(prefix="fxfunc-bench-") as folder, interruptible():
        pythons = dict.fromkeys(results, sys.executable)
        Duel(options, Path(folder), pythons, results, {"slow": EXTRA_WORK}).measure(launches=1)
    return results
