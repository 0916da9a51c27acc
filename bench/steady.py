"""Steady times of several workers, in turns: what disturbs the machine disturbs them all alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from .processes import Worker, WorkerFailed

TURN_S = 0.03  # long enough that a switch of processes does not matter
MOST_CALLS = 500
SLOW_S = 0.25  # one call is warming up enough
SPIN_S = 0.01  # shorter calls than this notice the threads of the process before, which spin for a while


@dataclasses.dataclass
class Player:
    """A cell of the results and, while it can be measured, the worker that gives its figures."""

    side: str
    implementation: str
    cell: dict[str, Any]
    worker: Worker | None = None
    turns: list[list[float]] = dataclasses.field(default_factory=list)
    calls: int = 1
    discard: int = 0

    def attempt(self, act: Callable[[], None]) -> None:
        """Does it if there is a worker; a worker that fails is stopped, and its cell says why."""
        if self.worker is None:
            return
        try:
            act()
        except WorkerFailed as problem:
            self.fail(problem.status, problem.reason)

    def fail(self, status: str, reason: str) -> None:
        """Ends the cell with no figures of this launch."""
        self.cell.update(status=status, reason=reason)
        self.turns.clear()
        self.stop()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.worker = None


def calibrate(player: Player, limit_s: float) -> None:
    """Chooses the calls of a turn, after warming up."""
    ask = lambda calls: statistics.median(player.worker.ask("turn", limit_s, calls=calls, discard=0))
    seconds = ask(1)
    if seconds < SLOW_S:
        seconds = ask(max(2, min(MOST_CALLS, int(TURN_S / ask(2)))))
    player.calls = max(1, min(MOST_CALLS, round(TURN_S / seconds)))
    player.discard = int(seconds < SPIN_S)


def take_turns(players: list[Player], budget_s: float, least_rounds: int, limit_s: float) -> None:
    """Rounds of one turn each, in alternating order, for `budget_s` seconds a player.

    There are at least `least_rounds`, or two where these would take longer than five times the budget.
    """
    for player in players:
        player.attempt(lambda p=player: calibrate(p, limit_s))
    start = time.perf_counter()
    rounds = 0
    while playing := [p for p in players if p.worker is not None]:
        spent = (time.perf_counter() - start) / len(playing)
        if rounds >= least_rounds and spent > budget_s or rounds >= 2 and spent > 5 * budget_s:
            return
        for player in playing if rounds % 2 == 0 else reversed(playing):
            player.attempt(lambda p=player: p.turns.append(_turn(p, limit_s)))
        rounds += 1


def _turn(player: Player, limit_s: float) -> list[float]:
    return player.worker.ask("turn", limit_s, calls=player.calls, discard=player.discard)
