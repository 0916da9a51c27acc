"""Small programs drawn from a seed, to hold the cost model against: `draw(seed) -> Drawn`.

Sizes go from a few elements to 2^22, evenly in their logarithm. A program is a few layers (products, pointwise calls, norms,
softmax, sums), perhaps a loop of steps, under no transform, grad, vmap or both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_ELEMENTS, MOST_MULTIPLICATIONS = 2**22, 2**28


class Drawn(NamedTuple):
    """A program and the arguments to call it with."""

    name: str
    function: Callable[..., Any]
    inputs: tuple


Layer = Callable[[Tensor, dict[str, Tensor]], Tensor]
WITHOUT_WEIGHTS: dict[str, Layer] = {
    "waves": lambda x, w: (x.sin() * x).cos() + 1,
    "relu": lambda x, w: (x - 0.1).relu(),
    "scaled": lambda x, w: x * 0.5 + x.square() / 3,
    "softmax": lambda x, w: x.softmax(-1),
    "centred": lambda x, w: x - x.mean(-2, keepdim=True),
    "unit": lambda x, w: x / (x.square().sum(-1, keepdim=True) + 1).sqrt(),
}


def draw(api: Any, seed: int) -> Drawn:
    """The same program and numbers for the same seed, over `torch.func` or `fxfunc`."""
    r, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    transform = r.choice(["plain", "grad", "vmap", "vmap(grad)", "grad(vmap)"])
    examples = 1 if transform in ("plain", "grad") else _size(r, 4, 2**12)
    rows = _size(r, 1, max(1, MOST_ELEMENTS // examples))
    columns = _size(r, 1, max(1, min(2**10, MOST_ELEMENTS // (examples * rows))))
    layers, weights, kinds = _layers(r, numbers, examples * rows, columns)
    steps = r.choice([1, 1, 1, 3, 20]) if _keeps_shape(kinds) else 1

    def value(w: dict[str, Tensor], x: Tensor) -> Tensor:
        for _ in range(steps):
            for layer in layers:
                x = layer(x, w)
        return x

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return value(w, x).square().mean()

    each = (None, 0)
    function = {
        "plain": lambda: value,
        "grad": lambda: api.grad(loss, (0, 1)),
        "vmap": lambda: api.vmap(value, each),
        "vmap(grad)": lambda: api.vmap(api.grad(loss), each),
        "grad(vmap)": lambda: api.grad(lambda w, x: api.vmap(loss, each)(w, x).sum()),
    }[transform]()
    shape = (rows, columns) if transform in ("plain", "grad") else (examples, rows, columns)
    words = f"{transform} of {' '.join(kinds)} on {list(shape)}" + (f", {steps} steps" if steps > 1 else "")
    return Drawn(f"drawn{seed}: {words}", function, (weights, torch.randn(shape, generator=numbers)))


def _size(r: random.Random, least: int, most: int) -> int:
    return round(math.exp(r.uniform(math.log(least), math.log(max(least, most)))))


def _layers(
    r: random.Random, numbers: torch.Generator, rows: int, columns: int
) -> tuple[list[Layer], dict[str, Tensor], list[str]]:
    """Layers, their weights, and their names."""
    layers, weights, kinds = [], {}, []
    for i in range(r.randint(2, 5)):
        kind = r.choice([*WITHOUT_WEIGHTS, "product", "product", "product", "bias"])
        if kind == "product":
            out = _size(
                r, 1, max(1, min(2**9, MOST_MULTIPLICATIONS // (rows * columns), MOST_ELEMENTS // rows))
            )
            weights[f"w{i}"] = torch.randn(columns, out, generator=numbers) / math.sqrt(columns)
            kinds.append(f"product[{columns}, {out}]")
            columns = out
            layers.append(lambda x, w, i=i: x @ w[f"w{i}"])
        elif kind == "bias":
            weights[f"b{i}"] = torch.randn(columns, generator=numbers)
            kinds.append(kind)
            layers.append(lambda x, w, i=i: (x + w[f"b{i}"]).tanh())
        else:
            kinds.append(kind)
            layers.append(WITHOUT_WEIGHTS[kind])
    weights["scale"] = torch.randn((), generator=numbers)
    layers.append(lambda x, w: x * w["scale"])
    return layers, weights, kinds


def _keeps_shape(kinds: list[str]) -> bool:
    return not any(k.startswith("product") for k in kinds)
