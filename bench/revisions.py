"""Measuring two git revisions against each other: each in its own worktree and environment, in turns. Entry point: `measure`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BenchError
from .implementations import IMPLEMENTATIONS, OURS, TORCH
from .processes import Host, WorkerFailed
from .progress import Progress
from .registry import Workload
from .run import ROOT, blank, describe, interruptible
from .runner import Hosts, Launch, Options
from .steady import Player

WORKING_TREE = "."
BACKENDS = [IMPLEMENTATIONS[name] for name in OURS]


def commit_of(revision: str) -> str | None:
    """The commit that a revision names; None for the working tree. Raises BenchError if it names none."""
    if revision == WORKING_TREE:
        return None
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if found.returncode:
        raise BenchError(f"{revision!r} is neither a results file nor a git revision of {ROOT}")
    return found.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str | None, folder: Path) -> Iterator[tuple[Path, str]]:
    """A worktree of the commit, and the interpreter of an environment that has it installed."""
    if commit is None:
        yield ROOT, sys.executable
        return
    tree = folder / "tree"
    added = _git("worktree", "add", "--detach", str(tree), commit)
    if added.returncode:
        raise BenchError(f"git worktree add {commit}: {added.stderr.strip()}")
    try:
        yield tree, install(tree, folder / "environment")
    finally:
        _git("worktree", "remove", "--force", str(tree))


def install(tree: Path, environment: Path) -> str:
    """An environment with the tree installed; it borrows our packages if the tree asks for the same ones."""
    _run("-m", "venv", "--without-pip", str(environment))
    python = str(environment / "bin" / "python")
    pip = ("-m", "pip", "--python", python, "install", "--disable-pip-version-check", "-q")
    if requirements(tree) == requirements(ROOT):
        (site,) = environment.glob("lib/python*/site-packages")
        ours = [path for path in sys.path if path.endswith("-packages")]
        (site / "packages_of_the_measuring_process.pth").write_text("\n".join(ours) + "\n")
        _run(*pip, "--no-deps", "-e", str(tree))
    else:
        _run(*pip, "-c", str(tree / "scripts" / "constraints.txt"), "-e", str(tree))
    return python


def requirements(tree: Path) -> tuple[list[str], list[str]]:
    """What a tree needs installed to run, and the versions that it pins of that."""
    needs = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {need.split(">")[0].split("=")[0].strip() for need in needs}
    pins = (tree / "scripts" / "constraints.txt").read_text().split()
    return needs, [pin for pin in pins if pin.split("==")[0] in names]


def measure(
    revisions: dict[str, str], workloads: list[Workload], options: Options, launches: int, command: list[str]
) -> dict[str, dict[str, Any]]:
    """Results by side ("base", "head"), of `launches` processes a side. Ctrl-C raises KeyboardInterrupt and leaves nothing."""
    commits = {side: commit_of(revision) for side, revision in revisions.items()}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxfunc-bench-")))
        stack.enter_context(interruptible())
        pythons = {}
        for side, commit in commits.items():
            print(f"installing {side}, {commit or 'the working tree'}", file=sys.stderr, flush=True)
            (folder / side).mkdir()
            pythons[side] = stack.enter_context(checkout(commit, folder / side))[1]
        sides = {side: describe(command, options) for side in commits}
        for side, results in sides.items():
            results["run"] = sides["base"]["run"]
            results["revision"] = (
                {"commit": commits[side], "dirty": False} if commits[side] else results["revision"]
            )
            results["workloads"] = {w.name: blank(BACKENDS, options.device) for w in workloads}
        own = {w.name: Launch(w, options, folder / w.name) for w in workloads}
        Duel(options, own, pythons, sides).measure(launches)
    return sides


class Duel:
    """Sides that take turns on workloads: interpreters, results to fill (with blank entries) and extra work, by side."""

    def __init__(
        self,
        options: Options,
        workloads: dict[str, Launch],
        pythons: dict[str, str],
        results: dict[str, dict[str, Any]],
        extra_work: dict[str, float] | None = None,
        counters: bool = True,
    ):
        self.options, self.workloads, self.pythons, self.results = options, workloads, pythons, results
        self.extra_work, self.counters = extra_work or {}, counters

    def measure(self, launches: int) -> None:
        """Fills the results of all sides."""
        progress, start = Progress(launches * len(self.workloads)), time.monotonic()
        for number in range(launches):
            hosts = {side: Hosts(self.options, python) for side, python in self.pythons.items()}
            try:
                for side in hosts.values():
                    side.of(TORCH)  # the imports of the sides overlap
                for name, launch in self.workloads.items():
                    progress.say(f"launch {number + 1}, {name}")
                    self._workload(launch, hosts, counters=self.counters and number == 0)
                    progress.advance(1, f"launch {number + 1} of {launches}, {name}")
            finally:
                for side in hosts.values():
                    side.close()
        for side, results in self.results.items():
            results["imports_s"] = hosts[side].imports_s()
            results.update(complete=True, seconds=time.monotonic() - start)
            results["load_average"][1] = os.getloadavg()[0]

    def _workload(self, launch: Launch, hosts: dict[str, Hosts], counters: bool) -> None:
        name = launch.workload.name
        entries = {side: r["workloads"][name] for side, r in self.results.items() if name in r["workloads"]}
        self._reference(launch, entries, hosts["head"].of(TORCH))
        players = [
            Player(side, name, cell)
            for side, entry in entries.items()
            for name, cell in entry["cells"].items()
            if cell["status"] in ("ok", "interrupted")
        ]
        try:
            for player in players:
                extra = self.extra_work.get(player.side, 0.0)
                launch.open(player, hosts[player.side].of(TORCH), extra_work=extra)
            launch.steady(players)
            for player in players if counters else ():
                launch.count(player)
        finally:
            for player in players:
                player.stop()

    def _reference(self, launch: Launch, entries: dict[str, dict[str, Any]], host: Host) -> None:
        """The float64 answer, once for all launches and sides."""
        try:
            reference = launch.make_reference(host)
        except WorkerFailed as problem:
            reference = {"allowed": None, "bytes": None}
            for entry in entries.values():
                for cell in entry["cells"].values():
                    cell.update(status=problem.status, reason=f"the reference: {problem.reason}")
        for entry in entries.values():
            entry["bytes"] = reference["bytes"]
            for cell in entry["cells"].values():
                cell["allowed"] = reference["allowed"]


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(
            f"python {' '.join(arguments)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
        )
