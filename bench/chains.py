"""Chains of pointwise calls and reductions over the last dim, beside a copy. Entry points: `CASES`, `measure_chain`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.utils import _pytree as pytree

import fxfunc

from . import peaks
from .turns import NONE, Measured, Run, measure, moved

GOAL = 0.9  # of a copy's bytes a second
EXPLAINED = (
    "`residual`: x + gelu(layer_norm(x)); gradients are vjps, to all inputs. Each call follows a copy of a large array, which "
    "leaves nothing of it in cache and which a GPU still does while the call is launched: launches are not in the times. GB/s: "
    "inputs read once and results written once; share: of that copy's, timed in the same turns."
)


def residual(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm, gelu and what came in."""
    return x + gelu(layer_norm(x, x.shape[-1:], scale, shift))


def softmax(x: Tensor) -> Tensor:
    """Over the last dim."""
    return x.softmax(-1)


def pullback(api: Any, f: Callable) -> Callable:
    """(cotangent, *inputs) -> the cotangents of the inputs."""
    return lambda ct, *inputs: api.vjp(f, *inputs)[1](ct)


class Case(NamedTuple):
    """A chain on an array [rows, columns], of standard deviation `spread`; `vectors` further inputs are [columns]."""

    f: Callable
    vectors: int
    spread: float
    gradient: bool
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def chain(self) -> str:
        return self.f.__name__ + " gradient" * self.gradient

    def __str__(self) -> str:
        return f"{self.chain} {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]}"

    def over(self, api: Any) -> Callable:
        """The function, by torch.func or fxfunc."""
        return pullback(api, self.f) if self.gradient else self.f

    def inputs(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Normal numbers: the cotangent of a gradient, the array, the vectors."""
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        cotangents = [draw(*self.shape)] if self.gradient else []
        vectors = [draw(self.shape[1]) for _ in range(self.vectors)]
        return tuple(t.to(self.dtype) for t in (*cotangents, self.spread * draw(*self.shape), *vectors))


SHAPES = ((8192, 1024), (16384, 4096), (65536, 512))
DTYPES = (torch.float32, torch.bfloat16)
# A softmax of numbers that lie apart is not small everywhere.
CHAINS = ((residual, 2, 1.0), (softmax, 0, 4.0))
CASES = [
    Case(*chain, gradient, shape, dtype)
    for chain, gradient, shape, dtype in itertools.product(CHAINS, (False, True), SHAPES, DTYPES)
]


@dataclasses.dataclass
class Chain:
    """What was measured of a case; `bytes` are those that nobody can avoid, `copied` those of the copy."""

    name: Case
    found: Measured
    bytes: int = 0
    copied: int = 0

    @property
    def share(self) -> float | None:
        """Bytes a second, as a share of the copy's."""
        ms = self.found.ms
        return self.bytes / ms["model"] / (self.copied / ms["copy"]) if "model" in ms else None

    def cells(self, run: Run) -> dict[str, str]:
        """A row of the table."""
        ms, share = self.found.ms, self.share
        return {
            "chain": self.name.chain,
            "shape": "x".join(map(str, self.name.shape)),
            "dtype": str(self.name.dtype)[6:],
            "error": self.found.worst(("model",)),
            "torch, ms": self.found.cell("torch"),
            "model, ms": self.found.cell("model"),
            "GB/s": NONE if share is None else f"{self.bytes / ms['model'] / 1e6:.0f}",
            "copy, GB/s": f"{self.copied / ms['copy'] / 1e6:.0f}" if "copy" in ms else NONE,
            "share": NONE if share is None else f"{share:.2f}",
            "goal": run.judged(GOAL, None if share is None else share >= GOAL),
        }


def measure_chain(case: Case, run: Run) -> Chain:
    """ATen's calls and ours in turns with a copy, against torch in float64 on the same device."""
    inputs = moved(run.device, case.inputs(run.generator()))
    exact = case.over(torch.func)
    model = fxfunc.jit(case.over(fxfunc)).lower(*inputs).compile(backend=run.backend)
    source = torch.ones(peaks.array_bytes(run.device), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)
    ways = {"torch": exact, "model": model}
    found = measure(
        ways, exact, inputs, seconds=run.seconds, reference_on=run.device, beside={"copy": copy}, before=copy
    )
    return Chain(case, found, compulsory_bytes(exact, inputs), 2 * source.nbytes)


def compulsory_bytes(f: Callable, inputs: tuple) -> int:
    """Each input read once, each result written once."""
    return sum(t.nbytes for t in pytree.tree_leaves((inputs, f(*inputs))))
