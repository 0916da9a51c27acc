"""One workload under some implementations, each in a fresh worker. Entry points: `Hosts`, `Launch`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from .processes import Host, WorkerFailed
from .registry import Workload
from .steady import Player, take_turns


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure: seconds of steady calls a cell, processes for cold times, seconds a worker may take to answer."""

    device: str = "cpu"
    threads: int = 1
    steady_s: float = 1.2
    least_rounds: int = 5
    cold_rounds: int = 3
    limit_s: float = 300.0
    from_start: bool = True
    quick: bool = False
    fixed_heap: bool = False  # less noise, and slower than what users have
    files: tuple[Path, ...] = ()


class Hosts:
    """The host processes of one installation of fxfunc, by what they have imported, started when first needed."""

    def __init__(self, options: Options, python: str):
        self._options, self._python = options, python
        self._hosts: dict[tuple[str, ...], Host] = {}

    def of(self, modules: tuple[str, ...]) -> Host:
        if modules not in self._hosts:
            options = self._options
            self._hosts[modules] = Host(modules, self._python, options.files, options.fixed_heap)
        return self._hosts[modules]

    def imports_s(self) -> dict[str, float]:
        """Seconds of the imports that the hosts have made, each as the host with most imports made it."""
        hosts = sorted(self._hosts.values(), key=lambda host: len(host.imports_s or ()))
        return {name: s for host in hosts for name, s in (host.imports_s or {}).items()}

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()


def empty_cell() -> dict[str, Any]:
    """A cell with nothing in it yet."""
    return {
        "status": "ok",
        "reason": "",
        "error": None,
        "allowed": None,
        "cold": [],
        "steady_s": [],
        "warm_s": [],
        "load_s": [],
        "artifact_bytes": None,
        "peak_bytes": [],
        "counters": {},
        "why": {},
    }


def absent(reason: str) -> dict[str, Any]:
    """A cell that cannot be had here."""
    return empty_cell() | {"status": "absent", "reason": reason}


class Launch:
    """One workload in fresh workers: its inputs and reference, and the jobs that start its workers."""

    def __init__(self, workload: Workload, options: Options, folder: Path):
        self.workload, self.options, self.folder = workload, options, folder
        folder.mkdir()
        self._caches, self._reference = 0, None

    def job(self, implementation: str, caches: Path | None = None, **changes: Any) -> dict[str, Any]:
        """What a worker prepares; caches are empty unless given."""
        self._caches += 1
        return {
            "workload": self.workload.name,
            "implementation": implementation,
            "jax": self.workload.jax,
            "parameters": self.workload.parameters,
            "inputs": str(self.folder / "inputs"),
            "device": self.options.device,
            "threads": self.options.threads,
            "caches": str(caches or self.folder / f"caches-{self._caches}"),
        } | changes

    def make_reference(self, host: Host) -> dict[str, Any]:
        """Inputs and the exact answer, on disk, once; gives the allowed error and the bytes nobody can avoid."""
        if self._reference is None:
            worker = host.start(self.job("torch.func", device="cpu"))
            try:
                files = {"inputs": str(self.folder / "inputs"), "answer": str(self.folder / "answer")}
                self._reference = worker.ask("make_reference", self.options.limit_s, **files)
            finally:
                worker.stop()
        return self._reference

    def open(self, player: Player, host: Host, **changes: Any) -> None:
        """Starts the player's worker, makes the first call and checks its answer."""
        try:
            player.worker = host.start(self.job(player.implementation, **changes))
            self._first(player)
        except WorkerFailed as problem:
            absent_here = problem.reason.startswith("NotImplementedError: ")
            status = "absent" if absent_here else problem.status
            player.fail(status, problem.reason.removeprefix("NotImplementedError: "))

    def _first(self, player: Player) -> None:
        cell, limit_s = player.cell, self.options.limit_s
        first = player.worker.ask("first", limit_s)
        cell["error"] = player.worker.ask("check", limit_s, answer=str(self.folder / "answer"))
        if not cell["error"] <= cell["allowed"]:
            player.fail("wrong", f"error {cell['error']:.1e}, allowed {cell['allowed']:.1e}")
        else:
            cell["cold"].append(first | {"from_start_s": None})

    def steady(self, players: list[Player]) -> None:
        """Steady times and peak memory of all go into their cells, also what was measured before an interruption."""
        options = self.options
        try:
            take_turns(players, options.steady_s, options.least_rounds, options.limit_s)
            for player in players:
                player.attempt(lambda p=player: self._peak(p))
        finally:
            for player in players:
                if player.turns:
                    player.cell["steady_s"].append(player.turns)
                    player.cell.update(status="ok", reason="")

    def _peak(self, player: Player) -> None:
        player.cell["peak_bytes"].append(player.worker.ask("peak", self.options.limit_s))

    def count(self, player: Player) -> None:
        """Exact counters of the steady calls' program."""
        player.cell["counters"] = self.ask(player, "counters", "count") or {}

    def ask(self, player: Player, what: str, command: str, **arguments: Any) -> Any:
        """What is asked after the steady times, which stand whatever goes wrong: the cell notes why `what` is missing."""
        if player.worker is None:
            player.cell["why"][what] = "its process had ended before"
            return None
        try:
            return player.worker.ask(command, self.options.limit_s, **arguments)
        except WorkerFailed as problem:
            player.cell["why"][what] = problem.reason
            if problem.status != "failed":  # a late answer would be taken for the next one
                player.stop()
            return None

    def first_calls(self, player: Player, host: Host, processes: int, **changes: Any) -> list[dict[str, Any]]:
        """Seconds of first calls, each in a fresh process; what goes wrong is noted in the cell."""
        return self._ask_afresh(player, host, processes, "cold", "first", changes, {})

    def loads(self, player: Player, host: Host, processes: int, artifact: str) -> list[float]:
        """Seconds to first results from an artifact, each in a fresh process."""
        return self._ask_afresh(player, host, processes, "load", "load", {}, {"artifact": artifact})

    def _ask_afresh(self, player, host, processes, what, command, changes, arguments) -> list[Any]:
        answers = []
        try:
            for _ in range(processes):
                worker = host.start(self.job(player.implementation, **changes))
                try:
                    answers.append(worker.ask(command, self.options.limit_s, **arguments))
                finally:
                    worker.stop()
        except WorkerFailed as problem:
            player.cell["why"][what] = problem.reason
        return answers

    def from_start(self, player: Player, host: Host) -> float | None:
        """Seconds from the start of a process that imports no more than it needs to the first result."""
        first = self.first_calls(player, host, 1)
        return sum(host.imports_s.values()) + first[0]["first_s"] if first else None

    def clean(self) -> None:
        """Removes inputs, answers, artifacts and caches."""
        shutil.rmtree(self.folder)
