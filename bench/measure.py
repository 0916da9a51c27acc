"""Timing several functions of one process against each other."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Seconds of every call, in order."""

    samples: list[float]

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.samples)

    @property
    def min_ms(self) -> float:
        return 1e3 * min(self.samples)


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, to its result on the device."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(names: Iterable[str], rounds: tuple[int, int], seconds: float) -> Iterator[str]:
    """The names in one order and the other: at least and at most so many `rounds`, for about so many seconds in between."""
    names, start, (least, most) = list(names), time.perf_counter(), rounds
    for i in range(most):
        if i >= least and time.perf_counter() - start > seconds:
            return
        yield from names if i % 2 else reversed(names)


def interleave(calls: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, Times]:
    """Times of each call, one of each a round: what disturbs the machine disturbs them all alike."""
    for call in calls.values():
        for _ in range(warmup):
            timed(call)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(timed(call))
    return {name: Times(s) for name, s in samples.items()}
