"""Which maps are kernels of a GPU, a program to a task. Entry points: `with_tasks` (the graph with them), `why_batched`.

The model reads shapes alone. CODEGEN.md 4: it pays where examples are many and small, and not much of a block is padding; what
is large is better done by ATen for all examples at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from fxfunc.passes.dims import Dim, Size, numel
from fxfunc.passes.graph import Graph, Op, map_, scan
from fxfunc.passes.record import Builder, Value

from . import tiles
from .cost import named, product_work
from .index import NotFusable
from .loops import kernel
from .lower import DTYPES
from .mapped import Tasks
from .partition import flat, with_whole_maps
from .rows import PRODUCTS

MOST_PROGRAMS = 264  # two for each processor of an H200; fixed, for it decides in which order sums are taken
LARGE_PRODUCT = 2**21  # multiplications of a product in a task from which one for all tasks is better
MOST_LINES = 1200  # of a kernel; it would compile for long
MOST_PADDING = 8  # times the multiplications that there are


def with_tasks(graph: Graph, precision: str, refused: Mapping[str, str], notes: list[str]) -> Graph:
    """The graph with `kernel` nodes for the maps that are worth it; why others are not is added to `notes`.

    `refused` are the texts of kernels that were compiled and cannot be launched, with why."""
    graph = with_whole_maps(graph)
    b, count = Builder(None), 0

    def call(op: Op, args: tuple, kwargs: dict):
        nonlocal count
        if op is not map_:
            return b.emit(op, args, kwargs)
        length, outs = kwargs["length"], tuple(kwargs["outs"])
        programs = min(length, MOST_PROGRAMS) if isinstance(length, int) else MOST_PROGRAMS
        why = why_no_tasks(args[0], length, outs)
        if why is None:
            name = f"tasks_{count + 1}" if count else "tasks"
            tasks = Tasks(flat(args[0]), length, tuple(kwargs["mapped"]), outs, programs, name)
            why = refused.get(str(tasks)) or why_batched(tasks, precision)
        if why is not None:
            notes.append(f"a map of {length} is batched: {why}")
            return b.emit(op, args, kwargs)
        count += 1
        return _summed(b.emit(kernel, (tasks, *args[1]), {}), outs)

    return b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))


def _summed(results: Value | tuple[Value, ...], outs: Sequence[str]) -> tuple[Value, ...]:
    """The results of a map from those of its programs."""
    results = results if isinstance(results, tuple) else (results,)
    return tuple(y.sum([0]) if kind == "sum" else y for y, kind in zip(results, outs, strict=True))


def why_no_tasks(body: Graph, length: Size, outs: Sequence[str]) -> str | None:
    """Why a map cannot be a kernel, or None."""
    if length == 0 or length == 1:
        return f"{length} tasks"
    if body.draws:
        return "it draws random numbers"
    vals = (*body.in_vals, *body.out_vals)
    if any(v is None for v in vals):
        return "an output that is nothing"
    if any(isinstance(s, Dim) for v in vals for s in v.shape):
        return "symbolic sizes of an example"
    if any(numel(v.shape) >= 2**31 for v in vals):
        return "2^31 elements of an example"
    if any(v.dtype not in DTYPES for v in vals):
        return "a dtype that no kernel takes"
    half = [v for v, kind in zip(body.out_vals, outs, strict=True) if kind == "sum" and v.dtype.itemsize < 4]
    return f"a sum over tasks of {half[0].dtype}" if half else None


def why_batched(tasks: Tasks, precision: str) -> str | None:
    """Why a map that may be a kernel is better batched, or cannot be written as one; None if it is a kernel."""
    if (large := _large(tasks.body)) is not None:
        return f"{named(large)}: a large product, better for all tasks at once"
    try:
        made = tiles.source(tasks, precision)
    except NotFusable as e:
        return str(e)
    if made.lines > MOST_LINES:
        return f"a kernel of {made.lines} lines would compile for long"
    return f"{made.padding:.0f} times the work in padding" if made.padding > MOST_PADDING else None


def _large(body: Graph) -> Node | None:
    for n in body.nodes:
        if n.target is scan and (found := _large(n.args[0])) is not None:
            return found
        if n.target in PRODUCTS and product_work(n) >= LARGE_PRODUCT:
            return n
    return None
