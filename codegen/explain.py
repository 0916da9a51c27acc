"""Where each call of a compiled graph went, and why it ends there: `Row`, made where that is decided, and `table`."""

from __future__ import annotations

import dataclasses
import linecache
import os
from collections.abc import Iterable, Sequence

from torch.fx import Node

from fxfunc.passes.graph import Graph, getitem, map_, scan
from fxfunc.passes.printer import op_name

from .loops import kernel
from .lower import is_free, is_fusable, may_be_taken, moves_values
from .rows import PRODUCTS


@dataclasses.dataclass(frozen=True)
class Row:
    """A call: what computes it, and why that does not hold the calls before it too."""

    name: str
    op: str
    source: str
    place: str
    why: str = ""


def row(n: Node, place: str = "", why: str = "") -> Row:
    """The row of a call."""
    return Row(n.name, op_name(n.target), n.meta.get("source") or "", place, why)


def placed(n: Node, place: str) -> Iterable[Row]:
    """The rows of what a kernel was made of, or of a call that is none."""
    return [dataclasses.replace(r, place=place) for r in n.meta.get("members") or (row(n),)]


def kind(n: Node) -> str:
    """Why no kernel takes such a call in."""
    if n.target in PRODUCTS:
        return "a product"
    if moves_values(n):
        return "values are moved"
    return "a loop" if n.target in (getitem, map_, scan) else f"{op_name(n.target)} is no kernel"


def rows_of(graph: Graph, with_kernels: bool = False) -> list[Row]:
    """Those of a graph of ATen calls; if there are kernels in it, with why the others are none."""
    rows: list[Row] = []
    for n in graph.nodes:
        if n.target is kernel:
            rows += placed(n, f"kernel {n.args[0].name}")
        elif n.target is scan:
            rows += [row(n, "a loop in Python"), *rows_of(n.args[0], with_kernels)]
        elif n.target is not getitem and not is_free(n):
            rows.append(row(n, "ATen", _why_aten(n) if with_kernels else ""))
    return rows


def _why_aten(n: Node) -> str:
    """Why a call is in no kernel."""
    if said := n.meta.get("why"):
        return said
    return "alone" if is_fusable(n) or may_be_taken(n) else kind(n)


def table(rows: Sequence[Row]) -> list[str]:
    """A line a call, in columns: name, operation, what computes it, why it is cut from what it reads, and the user's line."""
    cells = [(r.name, r.op, r.place, r.why, source_line(r.source) if r.source else "") for r in rows]
    widths = [max(map(len, column), default=0) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    ]


def source_line(where: str) -> str:
    """`file:line` as `name:line  text of the line`, the text where the file can be read."""
    file, _, line = where.rpartition(":")
    text = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
    return f"{os.path.basename(file)}:{line}  {text}".rstrip()
