"""The loop IR: every row agrees with ATen, groups are found and legal, the verifier refuses what is wrong."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    Case,
    assert_equal,
    graph_of,
    inputs_of,
    kernel_of,
    run,
)

from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import evaluate
from fxfunc.codegen.rows import POINTWISE, REDUCING


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


@by_name(OPS + OPS_F64 + OPS_BF16)
def test_op_as_a_kernel_equals_aten(case: Case):
    graph = graph_of(case)
    k, operands = kernel_of(graph)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        env = dict(zip(graph.inputs, inputs, strict=True))
        assert_equal(evaluate(k, [env[n] for n in operands], sizes), run(graph, inputs, sizes))


def test_every_row_has_a_case():
    called = {n.target for case in OPS for n in graph_of(case).nodes}
    assert not (POINTWISE.keys() | REDUCING.keys()) - called


@by_name(PATTERNS)
def test_fused_graph_equals_eager(case: Case):
    graph = graph_of(case)
    fused = fuse(graph)
    assert kernels_of(fused)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(fused, inputs, sizes), run(graph, inputs, sizes), scale=4)
