"""What is worth being C++, and in which form. Entry points: `why_batched`, `why_aten`, `block`, `has_epilogue`, `is_shared`.
`forced` overrides.

The model reads shapes alone, so a choice never depends on the machine's load. `python -m fxfunc.bench.choices` measures each
choice against what it would be otherwise, and keeps the table that these limits answer to.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import numel
from fxfunc.passes.graph import Graph, Val, getitem, map_, scan, vals_of
from fxfunc.passes.orient import reads_windows

from .cxx import VECTORS
from .loops import Apply, Arg, Const, Instr, Iota, Kernel
from .lower import base, is_free
from .rows import PRODUCTS
from .triton import tile_of

aten = torch.ops.aten
ANY, NEVER = 0, sys.maxsize
FUNCTION, DIVISION = 32, 16  # in additions
DIVISIONS = ("div", "rsqrt", "sqrt", "fmod", "rem", "floordiv", "truncdiv")
GROUPS = 32  # rows of a product from which there are several groups of them


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where one form begins to be cheaper than another."""

    # Multiplications below which a map is batched: its threads cost more than they save.
    small_map: int = 2**20
    # Multiplications from which a product is ATen's, whose blocking pays there; in a task the whole map would be batched for it.
    large_product: int = 2**20
    large_task_product: int = 2**24
    # The same of a convolution in a task, which ATen does no better for many tasks at once.
    large_task_windows: int = 2**30
    # A matrix of so many bytes that all tasks read, each for so few rows, is read once by a batched product.
    shared_bytes: int = 2**17
    few_rows: int = 16
    # Multiplications that cost as much as one with an element that is read from memory.
    streamed: int = 8
    # Multiplications of a single task, which threads cannot share, from which it is batched.
    lone_task: int = 2**24
    # Elements of a value of a task: a block of examples with fewer makes up for the overhead of its calls by so many ...
    small_task: int = 256
    block_elements: int = 1536
    # ... and tasks that blocks leave, to share among threads.
    least_tasks: int = 16
    # Bytes from which what reads a product element by element follows each group of its rows, which are still in cache then.
    cached_bytes: int = 2**15
    # Operations from which threads share a kernel: fewer are done before the threads have started.
    shared_work: int = 2**20
    # A program without loops costs as much as two to three ATen calls on small values, and half a second to compile.
    least_calls: int = 3
    small_value: int = 2**14


# What can be forced, and the limits that force it. What is impossible stays as it is.
CHOICES: dict[str, dict[str, dict[str, int]]] = {
    "maps": {
        "loops": {"small_map": ANY, "shared_bytes": NEVER, "lone_task": NEVER},
        "batched": {"small_map": NEVER},
    },
    "products": {
        "native": {"large_product": NEVER, "large_task_product": NEVER, "large_task_windows": NEVER},
        "aten": {"large_product": ANY, "large_task_product": ANY, "large_task_windows": ANY},
    },
    "blocks": {"one": {"block_elements": ANY}, "most": {"small_task": NEVER, "block_elements": NEVER}},
    "calls": {
        "native": {"least_calls": 1},
        "pairs": {"least_calls": 2},
        "aten": {"least_calls": NEVER, "small_value": NEVER},
    },
    "epilogues": {"all": {"cached_bytes": ANY}, "none": {"cached_bytes": NEVER}},
    "threads": {"one": {"shared_work": NEVER}, "all": {"shared_work": 2**14}},
}

MODEL = Limits()
_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=MODEL)


def limits() -> Limits:
    """Those in force."""
    return _limits.get()


@contextlib.contextmanager
def forced(**choices: str) -> Iterator[Limits]:
    """Compile inside with these choices made, as in `forced(maps="batched", products="aten")`, and the others the model's."""
    fields = {
        field: value for kind, choice in choices.items() for field, value in CHOICES[kind][choice].items()
    }
    token = _limits.set(dataclasses.replace(limits(), **fields))
    try:
        yield limits()
    finally:
        _limits.reset(token)


# ---- how much there is to do ----


def bytes_of(val: Val | Arg) -> int:
    """What a dense value takes."""
    return numel(val.shape) * val.dtype.itemsize


def product_work(n: Node) -> int:
    """The multiplications of a matrix product."""
    return numel(n.meta["val"].shape) * n.args[0].meta["val"].shape[-1]


def work(graph: Graph) -> int:
    """About how many multiplications a graph costs."""
    total = 0
    for n in graph.nodes:
        if n.target is scan:
            total += n.kwargs["length"] * work(n.args[0])
        elif isinstance(n.meta["val"], Val) and not is_free(n) and n.target is not getitem:
            total += product_work(n) if n.target in PRODUCTS else numel(n.meta["val"].shape)
    return total


# ---- maps ----


def why_batched(body: Graph, length: int, mapped: Sequence[bool]) -> str | None:
    """Why a map that could be a loop over tasks is better batched, or None."""
    if work(body) * length < limits().small_map:
        return "little work"
    if length == 1 and work(body) >= limits().lone_task:
        return "a single task of much work"
    shared = {n for n, m in zip(body.inputs, mapped, strict=True) if not m}
    large = [n for n in body.nodes if n.target in PRODUCTS and _streams(n, shared)]
    if sum(map(product_work, large)) * limits().streamed <= work(body):
        return None
    return f"{named(large[0])}: every task would read all of a large matrix"


def _streams(n: Node, shared: set[Node]) -> bool:
    """True for a product of few rows with a matrix that is no task's own and does not stay in cache."""
    x, y = n.args
    rows, columns = n.meta["val"].shape[-2:]
    return any(
        base(m) in shared and count < limits().few_rows and bytes_of(m.meta["val"]) > limits().shared_bytes
        for m, count in ((x, columns), (y, rows))
    )


def block(body: Graph, length: int) -> int:
    """How many examples a task is: a divisor that leaves enough tasks, and values of `block_elements` on average."""
    sizes = list(_sizes(body))
    if sum(sizes) > limits().small_task * len(sizes):
        return 1
    most = min(limits().block_elements * len(sizes) // max(1, sum(sizes)), length // limits().least_tasks)
    return next((d for d in range(most, 1, -1) if length % d == 0), 1)


def _sizes(body: Graph) -> Iterator[int]:
    """The number of elements of each value that is computed, in loops once."""
    for n in body.nodes:
        if n.target is scan:
            yield from _sizes(n.args[0])
        elif not is_free(n) and n.target is not getitem:
            yield from (numel(v.shape) for v in vals_of(n))


# ---- calls ----


def why_aten(n: Node, inside: bool = False) -> str | None:
    """Why a call that could be C++ is better ATen's, or None; `inside` of a task."""
    return "a large product" if n.target in PRODUCTS and product_work(n) >= _large(n, inside) else None


def _large(n: Node, inside: bool) -> int:
    if not inside:
        return limits().large_product
    return limits().large_task_windows if any(map(reads_windows, n.args)) else limits().large_task_product


def has_epilogue(n: Node) -> bool:
    """True for a product whose rows would have left the cache before a kernel reads them all; one column is done as one row."""
    val = n.meta["val"]
    has_groups = n.target is aten.mm.default and val.shape[0] >= GROUPS and val.shape[1] > 1
    return has_groups and bytes_of(val) >= limits().cached_bytes


def is_little(calls: Sequence[Node]) -> bool:
    """True for calls that are no faster as a program: a single one, or so few on small values."""
    if len(calls) >= limits().least_calls or any(n.target in (map_, scan) for n in calls):
        return False
    vals = [v for n in calls for v in vals_of(n)]
    return len(calls) == 1 or all(numel(v.shape) < limits().small_value for v in vals)


def is_shared(k: Kernel) -> bool:
    """True for a kernel that threads share."""
    n = numel([*k.grid, *tile_of(k)])
    return isinstance(n, int) and n * sum(map(_operations, k.body)) >= limits().shared_work


def _operations(x: Instr) -> int:
    """What an instruction costs for an element, in additions."""
    if isinstance(x, (Const, Iota)):
        return 0
    op = x.op if isinstance(x, Apply) else ""
    return FUNCTION if op in VECTORS else DIVISION if op in DIVISIONS else 1


def named(n: Node) -> str:
    """A call, for a message."""
    return f"{n.target} ({n.name}{' at ' + n.meta['source'] if n.meta.get('source') else ''})"
