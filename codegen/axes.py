"""The axes of a kernel with a product of matrices (`loops.Dot`). Entry points: `axes`, `is_product`.

Rows are the grid axes that no right factor is read along, columns those of right factors alone; the others are a batch.
"""

from __future__ import annotations

import dataclasses

from fxfunc.passes.dims import Size, numel

from .loops import Dot, Iota, Kernel, Load, Store


def is_product(k: object) -> bool:
    """True for a kernel with a product."""
    return isinstance(k, Kernel) and any(isinstance(x, Dot) for x in k.body)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The grid axes of a product, by number."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def sizes(self, k: Kernel) -> tuple[Size, Size, Size]:
        """How many items, rows and columns its kernel has."""
        batch, rows, columns = (
            numel(k.grid[i] for i in part) for part in (self.batch, self.rows, self.columns)
        )
        return batch, rows, columns


def axes(k: Kernel) -> Axes:
    """Which are rows, columns and batch: an axis that no factor is read along counts as rows."""
    along = reads_along(k)
    dots = [x for x in k.body if isinstance(x, Dot)]
    left, right = (
        frozenset().union(*(along[i] for i in side)) for side in ([d.x for d in dots], [d.y for d in dots])
    )
    every = range(len(k.grid))
    return Axes(
        tuple(a for a in every if a in left and a in right),
        tuple(a for a in every if a not in right),
        tuple(a for a in every if a in right and a not in left),
    )


def reads_along(k: Kernel) -> list[frozenset[int]]:
    """Of each value, the grid axes that it changes along; -1 stands for the tile."""
    out: list[frozenset[int]] = []
    for x in k.body:
        own = set().union(*(out[i] for i in x.inputs)) if x.inputs else set()
        if isinstance(x, (Load, Iota, Store)):
            own |= {a for a, s in enumerate(x.index.grid) if s != 0}
            own |= {-1} if any(s != 0 for s in x.index.tile) else set()
        out.append(frozenset(own - {-1} if isinstance(x, Dot) else own))
    return out


def terms_of(k: Kernel) -> tuple[Size, ...]:
    """The tile that its products sum over."""
    return next(x.shape for x in k.body if isinstance(x, Dot))
