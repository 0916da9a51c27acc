"""How products are done for Hopper, without a device: `python -m fxfunc.bench.factors [--update]`. Entry point: `measure`.

A product with a sum and a relu behind it is compiled for cuda:90 in several ways: factors read through pointers or through tensor
descriptors, and by a warp of their own (Triton's warp specialisation). Counted are the instructions of a warp for a step of the
loop over terms. Nothing is timed on a GPU.
"""

from __future__ import annotations

import dataclasses
import re
from unittest import mock

import torch

import fxfunc
from fxfunc.codegen import offline, products, written
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.launch import Binary
from fxfunc.codegen.loops import Kernel
from fxfunc.passes.pipeline import lowered

from . import cycles
from .run import ROOT
from .tables import evidence

TABLE = ROOT / "bench" / "results" / "factors.md"
SHAPES = ((4096, 4096, 4096), (4096, 4096, 512), (8192, 1024, 1024), (512, 4096, 512))
DTYPES = (torch.bfloat16, torch.float32)
EXPLAINED = (
    "What `python -m fxfunc.bench.factors --update` compiled for cuda:90 without a GPU: `relu(x @ w + b)`, rows x terms x "
    "columns. `instructions`: of a warp in a step of the loop over terms, its loads included; `whose`: why the model keeps a "
    "product out of kernels, if it does; `chosen`: how it does it else. A warp of their own is not chosen: Triton 3.7 leaves the "
    "code as it is or adds to it, and fails to compile it where float32 is multiplied in parts. **Not timed on a GPU.**"
)


def kernel_of(rows: int, terms: int, columns: int, dtype: torch.dtype) -> tuple[Kernel, str | None]:
    """The kernel of a product and what follows it, and why it is better ATen's."""
    shapes = ((rows, terms), (terms, columns), (columns,))
    specs = [torch.empty(s, dtype=dtype, device="meta") for s in shapes]
    with torch.device("meta"):
        graph = lowered(fxfunc.jit(lambda x, w, b: torch.relu(x @ w + b)).lower(*specs).graph)
    (product,) = [n for n in graph.nodes if n.target is torch.ops.aten.mm.default]
    (k,) = kernels_of(fuse(graph, takes=lambda n: True))
    return k, products.why_aten(product, "bf16x6")


def measure(k: Kernel) -> list[dict[str, object]]:
    """A row for each way."""
    way = products.blocks(k, 90, "bf16x6")
    found, kinds = (
        [],
        [("pointers", False, False), ("descriptors", True, False), ("a warp of their own", True, True)],
    )
    for name, described, specialised in kinds if k.args[0].dtype.itemsize == 2 else kinds[:2]:
        choice = dataclasses.replace(way, described=described)
        with mock.patch.object(offline, "write", _specialised if specialised else written.write):
            b = offline.compile.__wrapped__(k, "cuda:90", "bf16x6", choice)
        found.append({"factors by": name, "block": f"{way.rows}x{way.columns}x{way.terms}", "threads": _threads(b),
                      "registers": b.regs, "stack, B": b.spills, "shared, KiB": b.shared >> 10,
                      "instructions": _step(b), "chosen": "yes" * (described == way.described and not specialised)})  # fmt: skip
    return found


def _specialised(*args: object) -> written.Written:
    w = written.write(*args)
    return dataclasses.replace(
        w, text=re.sub(r"in range\((0, .*)\):", r"in tl.range(\1, warp_specialize=True):", w.text)
    )


def _threads(b: Binary) -> int:
    return int(re.search(r"\.reqntid (\d+)", b.ptx)[1])


def _step(b: Binary) -> int | str:
    """Instructions of the shortest loop with a product in it."""
    code, jumps = cycles.disassembled(b.cubin)
    loops = [code[start : end + 1] for start, end in jumps]
    found = [len(x) for x in loops if any(op.split(".")[0] in ("HGMMA", "HMMA") for op in x)]
    return min(found) if found else "no loop"


def main() -> int:
    """Compile, print, and keep the table if asked."""
    return evidence(f"fxfunc.bench.{TABLE.stem}", __doc__, TABLE, EXPLAINED, _rows)


def _rows() -> list[dict[str, object]]:
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            k, why = kernel_of(*shape, dtype)
            head = {"product": "x".join(map(str, shape)), "dtype": str(dtype)[6:], "whose": why or "a kernel"}
            rows += [head | row for row in measure(k)]
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
