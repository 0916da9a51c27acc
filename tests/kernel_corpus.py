"""All kernels that the tests interpret and compile, in two processes: `fingerprint` says that they are the same."""

from __future__ import annotations

import hashlib

from kernel_cases import OPS, OPS_BF16, OPS_F64, PATTERNS, TOGETHER, graph_of, kernel_of
from loop_cases import LOOPS, with_kernels
from move_cases import MOVES, PRODUCTS_OF_MOVED
from move_cases import fused as moves_fused
from product_cases import PRODUCTS, graphs
from task_cases import TASKS, graph_and_inputs, tasks_of

from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.mapped import Together
from fxfunc.codegen.together import together
from fxfunc.codegen.written import write


def sources() -> list[str]:
    """Their Triton source, products in float32."""
    ops = [kernel_of(graph_of(c))[0] for c in OPS + OPS_F64 + OPS_BF16]
    groups = [k for c in PATTERNS for k in kernels_of(fuse(graph_of(c)))]
    products = [k for c in PRODUCTS for k in kernels_of(graphs(c)[1])]
    moves = [k for c in MOVES + PRODUCTS_OF_MOVED for k in kernels_of(moves_fused(c))]
    maps = [t for c in TASKS for t in tasks_of(graph_and_inputs(c, 3)[0])[0]]
    joined = [k for c in TOGETHER for k in kernels_of(together(fuse(graph_of(c)))) if isinstance(k, Together)]
    bodies = [k for loop in LOOPS for k in kernels_of(with_kernels(loop)[0])]
    return [write(k, 90, "ieee").text for k in ops + groups + products + moves + maps + joined + bodies]


def fingerprint() -> str:
    """How many there are, and a hash of them all."""
    found = sources()
    return f"{len(found)} kernels {hashlib.sha256(chr(0).join(found).encode()).hexdigest()[:16]}"
