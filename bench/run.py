"""The measurement behind `bench run`: every workload under every implementation of one installation. Entry point: `measure`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import records
from .implementations import IMPLEMENTATIONS, OF_TORCH_FUNC, TORCH, Implementation
from .processes import STARTUP_S, WorkerFailed
from .progress import Progress
from .registry import Workload, find, names
from .runner import Hosts, Launch, Options, absent, empty_cell
from .steady import Player

ROOT = Path(__file__).parent.parent
SHORT_COLD_S = 8.0  # a first call that takes longer is measured once
BUSY = 0.4  # load average a thread; OpenMP's waits are the first to suffer
SLOW_COST_S, USUAL_COST_S = 60.0, 9.0  # a cell, for the estimate of what is left


def describe(command: list[str], options: Options) -> dict[str, Any]:
    """The head of a results file."""
    flags = {k: v for k, v in vars(options).items() if k != "files"}
    return {
        "format": records.FORMAT,
        "schema": records.SCHEMA,
        "run": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "complete": False,
        "command": command,
        "flags": flags,
        "machine": records.describe_machine(),
        "versions": records.describe_versions(),
        "revision": records.describe_revision(ROOT),
        "load_average": [os.getloadavg()[0]] * 2,
        "peaks": {},
        "overhead_s": None,
        "imports_s": {},
        "workloads": {},
    }


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends a measurement as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def blank(chosen: list[Implementation], device: str) -> dict[str, Any]:
    """The entry of a workload before it is measured."""
    cells = {}
    for implementation in chosen:
        reason = implementation.missing(device)
        waiting = empty_cell() | {"status": "interrupted", "reason": "not reached"}
        cells[implementation.name] = absent(reason) if reason else waiting
    return {"flops": None, "bytes": None, "cells": cells}


def measure(
    workloads: list[Workload],
    chosen: list[Implementation],
    options: Options,
    command: list[str],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Results of everything; `save` gets them after each workload. Ctrl-C ends it with what there is (`complete` is false)."""
    results = describe(command, options)
    results["workloads"] = {w.name: blank(chosen, options.device) for w in workloads}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fxfunc-bench-") as folder, interruptible():
        run = Run(options, Path(folder), results)
        try:
            run.machine()
            for workload in workloads:
                run.workload(workload)
                save(results)
            results["complete"] = True
        except KeyboardInterrupt:
            pass
        finally:
            run.hosts.close()
            results["seconds"] = time.monotonic() - start
            results["load_average"][1] = os.getloadavg()[0]
    save(results)
    return results


def cost(name: str) -> float:
    return SLOW_COST_S if IMPLEMENTATIONS[name].slow_to_compile else USUAL_COST_S


class Run:
    """What one measurement shares: hosts, folder, progress and the results that it fills."""

    def __init__(self, options: Options, folder: Path, results: dict[str, Any]):
        self.options, self.folder, self.results = options, folder, results
        self.hosts = Hosts(options, sys.executable)
        everything = [name for entry in results["workloads"].values() for name in pending(entry)]
        self.progress = Progress(sum(map(cost, everything)))

    def machine(self) -> None:
        """What the machine can do, and what measuring costs."""
        busy = os.getloadavg()[0]
        if busy > BUSY * self.options.threads:
            print(f"this machine is busy (load average {busy:.1f}): figures will be poor", file=sys.stderr)
        self.progress.say("imports, and the machine's peaks")
        any_workload = find(names()[0])
        launch = Launch(any_workload, self.options, self.folder / "machine")
        worker = self.hosts.of(TORCH).start(launch.job("torch.func"))
        self.results["peaks"] = worker.ask("measure_peaks", STARTUP_S)
        self.results["overhead_s"] = worker.ask("overhead", STARTUP_S, calls=20_000)
        worker.stop()

    def workload(self, workload: Workload) -> None:
        """Fills the entry of one workload."""
        entry = self.results["workloads"][workload.name]
        chosen = pending(entry)
        launch = Launch(workload, self.options, self.folder / uuid.uuid4().hex)
        say = lambda what: self.progress.say(f"{workload.name}: {what}")
        say("reference")
        try:
            reference = launch.make_reference(self.hosts.of(TORCH))
        except WorkerFailed as problem:
            failure = {"status": problem.status, "reason": f"the reference: {problem.reason}"}
            entry["cells"] |= {name: empty_cell() | failure for name in chosen}
        else:
            entry["bytes"] = reference["bytes"]
            players = [Player("", name, entry["cells"][name]) for name in chosen]
            for player in players:
                player.cell["allowed"] = reference["allowed"]
            self._players(launch, players, say)
        flops = [cell["counters"]["flops"] for cell in entry["cells"].values() if "flops" in cell["counters"]]
        entry["flops"] = min(flops, default=None)
        self.results["imports_s"] = self.hosts.imports_s()
        launch.clean()
        self.progress.advance(sum(map(cost, chosen)), workload.name)

    def _players(self, launch: Launch, players: list[Player], say: Callable[[str], None]) -> None:
        try:
            for player in players:
                if player.implementation in OF_TORCH_FUNC and wrong("torch.func", players):
                    player.fail("absent", "torch.func's answer is wrong, and this is made of it")
                    continue
                say(f"{player.implementation}, first call")
                host = self.hosts.of(IMPLEMENTATIONS[player.implementation].imports)
                launch.open(player, host, caches=launch.folder / f"warm-{player.implementation}")
            say("steady times, in turns")
            launch.steady(players)
            alive = [player for player in players if player.worker is not None]
            for player in alive:
                say(f"{player.implementation}, counters")
                launch.count(player)
                self._save(launch, player)
                player.stop()
            for player in alive:
                say(f"{player.implementation}, first calls in other processes")
                self._first_calls(launch, player)
        finally:
            for player in players:
                player.stop()

    def _save(self, launch: Launch, player: Player) -> None:
        """The artifact, for those that have one."""
        cell, reason = player.cell, IMPLEMENTATIONS[player.implementation].artifact
        if reason is None:
            path = str(launch.folder / player.implementation)
            cell["artifact_bytes"] = launch.ask(player, "load", "save", artifact=path)
        else:
            cell["why"]["load"] = reason

    def _first_calls(self, launch: Launch, player: Player) -> None:
        """Cold, warm-cache and from-artifact times, each in fresh processes; what fails is no fault of the steady times."""
        cell, implementation = player.cell, IMPLEMENTATIONS[player.implementation]
        host = self.hosts.of(implementation.imports)
        short = cell["cold"][0]["first_s"] < SHORT_COLD_S
        cold = launch.first_calls(player, host, self.options.cold_rounds - 1 if short else 0)
        cell["cold"] += [first | {"from_start_s": None} for first in cold]
        if self.options.quick:
            cell["why"]["warm"] = "left out of a quick run"
        elif implementation.cache is None:
            caches = launch.folder / f"warm-{player.implementation}"
            warm = launch.first_calls(player, host, 1, caches=caches)
            cell["warm_s"] = [first["first_s"] for first in warm]
        else:
            cell["why"]["warm"] = implementation.cache
        if cell["artifact_bytes"] is not None:
            path = str(launch.folder / player.implementation)
            cell["load_s"] = launch.loads(player, host, self.options.cold_rounds, path)
        if self.options.from_start:
            self._from_start(launch, player, implementation)

    def _from_start(self, launch: Launch, player: Player, implementation: Implementation) -> None:
        """In a process with the least imports, unless all are needed anyway."""
        first = player.cell["cold"][0]
        if implementation.slow_to_compile or implementation.least_imports == implementation.imports:
            seconds = self.hosts.of(implementation.imports).imports_s
            first["from_start_s"] = first["first_s"] + sum(map(seconds.get, implementation.least_imports))
        else:
            first["from_start_s"] = launch.from_start(player, self.hosts.of(implementation.least_imports))


def wrong(name: str, players: list[Player]) -> bool:
    """Whether an implementation gave a wrong answer."""
    return any(p.implementation == name and p.cell["status"] == "wrong" for p in players)


def pending(entry: dict[str, Any]) -> list[str]:
    """The implementations of an entry that are still to be measured."""
    return [name for name, cell in entry["cells"].items() if cell["status"] == "interrupted"]
