"""A kernel of any kind as Triton source with what it is compiled and launched with. Entry point: `write`."""

from __future__ import annotations

import dataclasses
import functools

from . import dots, products, tiles, triton
from .axes import is_product
from .loops import Kernel
from .mapped import Tasks, Together
from .tile_program import WARPS
from .together import together_source


@dataclasses.dataclass(frozen=True)
class Written:
    """A module of Triton source. `block` is how much of a grid a program does (`products.programs`), `workspace` the bytes of
    scratch memory that a program of tasks takes, `checks` whether it has assertions, `stages` how far loads are ahead."""

    text: str
    warps: int
    block: tuple[int, ...]
    workspace: int | None = None
    checks: bool = False
    stages: int = 3


@functools.lru_cache(maxsize=256)
def write(k: Kernel | Tasks | Together, capability: int, precision: str) -> Written:
    """The source of a kernel for a compute capability, products of float32 in this precision."""
    if isinstance(k, Tasks):
        made = tiles.source(k, precision)
        return Written(made.text, WARPS, (1,), made.workspace, made.checks)
    if isinstance(k, Together):
        parts = [triton.schedule(p) for p in k.parts]
        return Written(together_source(k), parts[0].warps, tuple(s.rows for s in parts))
    if is_product(k):
        b = products.blocks(k, capability, precision)
        return Written(dots.source(k, b, precision), b.warps, (b.rows, b.columns), stages=b.stages)
    s = triton.schedule(k)
    return Written(triton.source(k), s.warps, (s.rows,))
