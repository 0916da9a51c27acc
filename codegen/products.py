"""Which products of matrices are in kernels, and their blocks. Entry points: `why_aten`, `blocks`, `programs`.

Blocks follow from shapes, dtype, target and precision alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from fxfunc.passes.dims import Dim, Size, estimate, numel

from .axes import axes, is_product, terms_of
from .loops import Dot, Iota, Kernel, Load, Store
from .mapped import AnyKernel, Together
from .triton import power, span

PROCESSORS = 128  # about as many as a large device has


# ---- blocks ----


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows, columns and terms of a block, and how it is compiled; `described` factors are read through tensor descriptors."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    described: bool


def blocks(k: Kernel, capability: int, precision: str) -> Blocks:
    """The blocks of a product for a compute capability."""
    batch, rows, columns = map(estimate, axes(k).sizes(k))
    terms = estimate(numel(terms_of(k)))
    dots = [x for x in k.body if isinstance(x, Dot)]
    half = all(k.types[d.x][1].itemsize == 2 for d in dots)
    most = 128 if half and len(dots) == 1 else 64
    block = [min(most, max(16, power(n))) for n in (rows, columns)]
    while max(block) > 32 and batch * -(-rows // block[0]) * -(-columns // block[1]) < PROCESSORS:
        block[block.index(max(block))] //= 2
    deep = 64 if half else 32 if precision != "ieee" else 16
    step = min(deep, max(16, power(terms)))
    warps = 8 if block[0] * block[1] >= 128 * 128 else 4
    gains = min(block) >= 64 if half else precision != "ieee"  # in instructions: bench/results/factors.md
    described = capability >= 90 and gains and terms >= 4 * step and not is_wide(k)
    return Blocks(*block, step, warps, 3 if terms > step else 1, described)


def is_wide(k: Kernel) -> bool:
    """True if an argument may have 2^31 elements or an index reach so far, so that offsets are int64."""
    reach = [
        span(x.index.grid, k.grid) + span(x.index.tile, x.shape)
        for x in k.body
        if isinstance(x, (Load, Iota, Store))
    ]
    return any(isinstance(n, Dim) or n >= 2**31 for n in (*(numel(a.shape) for a in k.args), *reach))


def programs(k: AnyKernel, block: tuple[int, ...]) -> Size:
    """How many programs cover a kernel in blocks: of its grid; of a product, of rows and columns; of several, of each."""
    if isinstance(k, Together):
        return sum((programs(p, (n,)) for p, n in zip(k.parts, block, strict=True)), 0)
    if not is_product(k):
        return (numel(k.grid) + (block[0] - 1)) // block[0]
    batch, rows, columns = axes(k).sizes(k)
    return batch * ((rows + (block[0] - 1)) // block[0]) * ((columns + (block[1] - 1)) // block[1])


# ---- which products are worth being in a kernel ----

# Of an H200, from its data sheet and the share of it that such kernels are known to reach; not measured here.
LAUNCH = 4e-6  # seconds that a launch costs
BANDWIDTH = 4e12  # bytes a second
RATES = {
    "ieee": 25e12,
    "tf32x3": 80e12,
    "bf16x6": 45e12,
    "tf32": 250e12,
}  # operations a second of float32 in kernels here
HALF = 450e12
ATEN = {torch.float32: 50e12, torch.float16: 700e12, torch.bfloat16: 700e12}  # and in those that ATen calls
LONGEST_SUM = 8192  # terms of a product of one row or column in one program


def why_aten(n: Node, precision: str) -> str | None:
    """Why a product is better ATen's than in a kernel with what is around it, or None.

    What a kernel saves is a launch and writing and reading the result once; what it costs is what ATen multiplies faster.
    """
    val, terms = n.meta["val"], estimate(n.args[0].meta["val"].shape[-1])
    if val.dtype not in ATEN or any(x.meta["val"].dtype != val.dtype for x in n.all_input_nodes):
        return f"a product of {val.dtype}"
    shape = [estimate(s) for s in val.shape]
    if 0 in shape or terms == 0:
        return "an empty product"
    if 1 in shape[-2:]:
        return "a long sum" if terms > LONGEST_SUM else None
    ours = RATES[precision] if val.dtype is torch.float32 else HALF
    longer = 2 * math.prod(shape) * terms * (1 / ours - 1 / ATEN[val.dtype])
    saved = LAUNCH + 2 * math.prod(shape) * val.dtype.itemsize / BANDWIDTH
    if few_blocks(shape, terms):
        return "few blocks of many terms, which ATen splits"
    return None if longer < saved else "a large product, which ATen multiplies faster"


def few_blocks(shape: Sequence[int], terms: int) -> bool:
    """True for a product that too few programs would do, each a long loop."""
    *batch, rows, columns = shape
    return math.prod(batch) * -(-rows // 32) * -(-columns // 32) < PROCESSORS // 4 and terms > 1024
