"""Recording null runs: a commit against itself, and against itself with extra work. Entry point: `record`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from . import nulls
from .registry import Workload
from .revisions import BACKENDS, Duel, checkout, commit_of
from .run import blank, describe, interruptible
from .runner import Launch, Options

SLOWED = ("jac", "hess", "hessb64")  # of those whose launches scatter least: 1% or so
EXTRA_WORK = 0.10  # of a call's time


def record(folder: Path, runs: int, workloads: list[Workload], options: Options, command: list[str]) -> None:
    """Adds `runs` numbered files to the folder; each is one launch of every side in processes of its own.

    Base and head are HEAD in two worktrees and environments, as two revisions would be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        pythons = {}
        for side in ("base", "head"):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxfunc-bench-")))
            pythons[side] = stack.enter_context(checkout(commit_of("HEAD"), place))[1]
        pythons["slow"] = pythons["head"]
        stack.enter_context(interruptible())
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxfunc-bench-")))
        own = {w.name: Launch(w, options, place / w.name) for w in workloads}
        for _ in range(runs):
            taken = [int(path.stem) for path in folder.glob("[0-9]*.json")]
            path = folder / f"{max(taken, default=0) + 1:02}.json"
            print(f"null run {path.stem}", file=sys.stderr, flush=True)
            nulls.write(path, one(pythons, own, options, command))


def one(
    pythons: dict[str, str], workloads: dict[str, Launch], options: Options, command: list[str]
) -> nulls.Run:
    """The sides of one null run."""
    results = {side: describe(command, options) for side in nulls.SIDES}
    for side, each in results.items():
        each["run"] = results["base"]["run"]
        measured = [name for name in workloads if side != "slow" or name in SLOWED]
        each["workloads"] = {name: blank(BACKENDS, options.device) for name in measured}
    Duel(options, workloads, pythons, results, {"slow": EXTRA_WORK}, counters=False).measure(launches=1)
    return results
