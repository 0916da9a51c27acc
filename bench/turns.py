"""Several ways to compute one thing, in one process: checked against float64, then timed in turns. Entry point: `measure`.

On a GPU a time is that between two CUDA events around a single call, on a CPU that of the clock.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import BenchError
from .measure import in_turns

FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # of the error that is allowed
NEAR = 2**-22  # what rounding to float32 does to an input, or to what is made of it by a few operations
WARM = 3
ROUNDS = (5, 200)  # at least and at most
ALL, NONE = "row", "-"

Call = Callable[..., Any]


@dataclasses.dataclass
class Measured:
    """What is known of each way, by its name: a wrong answer is not timed."""

    ms: dict[str, float] = dataclasses.field(default_factory=dict)  # medians
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def cell(self, way: str) -> str:
        """Its time as text, or what there is instead."""
        failed = "failed" if way in self.failed or ALL in self.failed else NONE
        return f"{self.ms[way]:.4f}" if way in self.ms else failed

    def worst(self, ways: Sequence[str]) -> str:
        """The largest error of these ways as text."""
        known = [self.errors[way] for way in ways if way in self.errors]
        return f"{max(known):.1e}" if known else NONE


@dataclasses.dataclass(frozen=True)
class Run:
    """What the rows of a table share: where, how many seconds of timing a row, and what the device can do (`peaks.measure`)."""

    device: str
    seconds: float
    seed: int
    peak: dict[str, float]

    @property
    def backend(self) -> str:
        """Ours for the device."""
        return "triton" if self.device == "cuda" else "cpp"

    def generator(self) -> torch.Generator:
        """The same for each row, so that one can be repeated alone."""
        return torch.Generator().manual_seed(self.seed)

    def judged(self, goal: float, met: bool | None) -> str:
        """`0.06: met`. Goals are for a GPU."""
        return f"{goal}: {'not measured' if met is None or self.device != 'cuda' else 'met' if met else 'missed'}"


def measure(
    ways: dict[str, Call],
    exact: Call,
    inputs: tuple,
    *,
    seconds: float,
    reference_on: str,
    beside: dict[str, Call] | None = None,
    before: Call | None = None,
) -> Measured:
    """Check all `ways` on `inputs`, then time those that are right, about so many `seconds` in all.

    `exact` is trusted in float64, on the device `reference_on`. `beside` are calls without arguments that are timed in the same
    turns, `before` one that precedes each timed call: it decides what is in caches, and on a GPU hides what launching costs.
    """
    found = Measured()
    expected, allowed = reference(exact, moved(reference_on, inputs))
    for name, way in ways.items():
        try:
            found.errors[name] = error(pytree.tree_leaves(moved(reference_on, way(*inputs))), expected)
            if found.errors[name] > allowed:
                raise BenchError(f"error {found.errors[name]:.1e}, allowed {allowed:.1e}")
        except Exception as problem:
            found.failed[name] = in_words(problem)
    right = {name: lambda way=way: way(*inputs) for name, way in ways.items() if name not in found.failed}
    device = pytree.tree_leaves(inputs)[0].device.type
    found.ms = medians(right | (beside or {}), device, seconds, before)
    return found


def in_words(problem: Exception) -> str:
    """An exception as a part of a line, files by their names alone."""
    first = next(iter(str(problem).strip().splitlines()), "")
    return re.sub(r"\bat \S*/", "at ", f"{type(problem).__name__}: {first}")[:300]


def moved(where: Any, tree: Any) -> Any:
    """Every tensor on a device, or as a dtype."""
    return pytree.tree_map(lambda t: t.to(where), tree)


# ---- answers ----


def reference(function: Call, inputs: tuple) -> tuple[list[Tensor], float]:
    """The answer in float64, and the error that is allowed to others: three times what rounding does to the function itself.

    That is its own error in the dtype of the inputs, or what inputs within `NEAR` of these give in float64: beside a relu's kink
    another order of a sum is another slope.
    """
    wide = moved(torch.float64, inputs)
    generator = torch.Generator(device=pytree.tree_leaves(wide)[0].device).manual_seed(0)
    near = pytree.tree_map(lambda t: t * (1 + NEAR * (2 * _rand_like(t, generator) - 1)), wide)
    expected = pytree.tree_leaves(function(*wide))
    own = max(error(pytree.tree_leaves(function(*given)), expected) for given in (inputs, near))
    return expected, max(FLOOR[pytree.tree_leaves(inputs)[0].dtype], 3 * own)


def _rand_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(t.shape, dtype=t.dtype, device=t.device, generator=generator)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """`answers.error`, where the tensors are. Raises BenchError for other shapes or other places of NaN and inf."""
    if [a.shape for a in found] != [r.shape for r in expected]:
        raise BenchError(
            f"answer of shapes {[list(a.shape) for a in found]}, expected {[list(r.shape) for r in expected]}"
        )
    return max(map(_leaf_error, found, expected), default=0.0)


def _leaf_error(a: Tensor, r: Tensor) -> float:
    if not torch.equal(a.isfinite(), r.isfinite()):
        raise BenchError("NaN or inf where the reference has none, or none where it has")
    if not a.numel():
        return 0.0
    a, r = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (a, r))
    return float((a - r).abs().max() / r.abs().max().clamp(min=1))


# ---- times ----


def medians(
    calls: dict[str, Call], device: str, seconds: float, before: Call | None = None
) -> dict[str, float]:
    """Milliseconds of a call of each: the median over rounds, in one order and the other, for about so many seconds in all."""
    one = _between_events if device == "cuda" else _by_the_clock
    for call in list(calls.values()) * WARM:
        one(call, before)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in in_turns(calls, ROUNDS, seconds):
        samples[name].append(one(calls[name], before))
    return {name: statistics.median(s) for name, s in samples.items()}


def _between_events(call: Call, before: Call | None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if before is not None:
        before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _by_the_clock(call: Call, before: Call | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
