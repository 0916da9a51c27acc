"""A kernel of any kind as Triton source with what it is compiled and launched with. Entry points: `write`, `model`, `ways`.

A way is what can be chosen of a kernel: blocks of a `Schedule` or of `Blocks`, or only the warps of a map. `model` is the choice
from shapes alone; `ways` are others worth measuring (tune.py).
"""

from __future__ import annotations

import dataclasses
import functools

from . import dots, products, tiles, triton
from .axes import is_product
from .mapped import AnyKernel, Tasks, Together
from .products import Blocks
from .tile_program import WARPS
from .together import together_source
from .triton import Schedule


@dataclasses.dataclass(frozen=True)
class Written:
    """A module of Triton source and the name of its function, which equal kernels share whatever theirs are.

    `block` is how much of a grid a program does (`products.programs`), `workspace` the bytes of scratch memory that a program of
    tasks takes, `checks` whether it has assertions, `stages` how far loads are ahead."""

    name: str
    text: str
    warps: int
    block: tuple[int, ...]
    workspace: int | None = None
    checks: bool = False
    stages: int = 3


Way = Schedule | Blocks | int  # an int: warps


@functools.lru_cache(maxsize=256)
def write(k: AnyKernel, capability: int, precision: str, way: Way | None = None) -> Written:
    """The source of a kernel for a compute capability, products of float32 in this precision, done as the model has it or so."""
    way = model(k, capability, precision) if way is None else way
    if isinstance(k, Tasks):
        made = tiles.source(k, precision)
        return Written(made.name, made.text, way, (1,), made.workspace, made.checks)
    if isinstance(k, Together):
        rows = tuple(triton.schedule(p).rows for p in k.parts)
        return Written(k.name, together_source(k), way, rows, checks=any(p.checks for p in k.parts))
    if is_product(k):
        return Written(
            k.name,
            dots.source(k, way, precision),
            way.warps,
            (way.rows, way.columns),
            checks=k.checks,
            stages=way.stages,
        )
    return Written(k.name, triton.source(k, way), way.warps, (way.rows,), checks=k.checks)


def model(k: AnyKernel, capability: int, precision: str) -> Way:
    """How a kernel is done if nothing is measured."""
    if isinstance(k, Tasks):
        return WARPS
    if isinstance(k, Together):
        return triton.schedule(k.parts[0]).warps
    return products.blocks(k, capability, precision) if is_product(k) else triton.schedule(k)


def ways(k: AnyKernel, capability: int, precision: str) -> list[Way]:
    """The model's choice, then others: half and twice its blocks, other warps."""
    first = model(k, capability, precision)
    if isinstance(first, int):
        return list(dict.fromkeys((first, 4, 8)))
    if isinstance(first, Blocks):
        near = lambda n: [x for x in (n // 2, n, n * 2) if 16 <= x <= 128]  # noqa: E731
        found = [dataclasses.replace(first, rows=r, columns=c, warps=w)
                 for r in near(first.rows) for c in near(first.columns) for w in (4, 8)]  # fmt: skip
        return list(dict.fromkeys((first, *found)))
    rows = [n for n in (first.rows // 2, first.rows, first.rows * 2, first.rows * 4) if n >= 1]
    found = [dataclasses.replace(first, rows=n, warps=w) for n in rows for w in (1, 2, 4, 8, 16)
             if n * max(first.cols, 1) <= 64 * 32 * w]  # fmt: skip
    return list(dict.fromkeys((first, *found)))
