"""Every differentiable op of core ATen has rules of ours, and `coverage` says which tier answers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fxfunc
from fxfunc import coverage

aten = torch.ops.aten
OURS = ("native", "composite")
NO_TENSOR_FUNCTION = {  # nothing to differentiate or to map
    "_local_scalar_dense.default", "arange.start_step", "nonzero.default", "sym_is_contiguous.default", "sym_numel.default",
    "sym_size.int", "sym_storage_offset.default", "sym_stride.int",
}  # fmt: skip
NOT_YET = {  # PyTorch's decomposition or formula answers
    "_cdist_forward.default", "_embedding_bag.default", "_fft_c2r.default", "_fft_r2c.default", "_pdist_forward.default",
    "adaptive_avg_pool1d.default", "avg_pool1d.default", "bitwise_and.Scalar", "bitwise_or.Scalar", "bitwise_xor.Scalar",
    "col2im.default", "copy.default", "div.Scalar_mode", "fill.Scalar", "grid_sampler_2d.default",
    "max_pool2d_with_indices_backward.default", "native_group_norm_backward.default", "native_layer_norm_backward.default",
    "reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default", "replication_pad2d.default",
    "replication_pad3d.default", "scatter_reduce.two", "upsample_bilinear2d.vec", "upsample_nearest2d.vec", "var.dim",
}  # fmt: skip


def test_core_ops_have_rules_of_ours_but_for_those_that_are_listed():
    without = set()
    for op in coverage.core_ops():
        found = coverage.tiers(op)
        ours = found["jvp"] in OURS and found["batch"] in OURS and found["transpose"] in (*OURS, "-")
        if not ours:
            without.add(str(op).removeprefix("aten."))
    assert without - NO_TENSOR_FUNCTION == NOT_YET


@pytest.mark.parametrize(
    "op, tiers",
    [
        (aten.mm.default, ("native", "native", "native")),
        (aten.sin.default, ("native", "-", "native")),
        (aten.eq.Tensor, ("native", "-", "native")),
        (aten.view.default, ("native", "native", "native")),
        (aten.grid_sampler_3d.default, ("derived", "derived", "derived")),
    ],
    ids=str,
)
def test_the_tier_that_answers(op, tiers):
    assert tuple(coverage.tiers(op).values()) == tiers


def test_a_derived_rule_shows_in_the_graph():
    x, grid = torch.randn(1, 1, 2, 2, 2), torch.randn(1, 2, 2, 2, 3)
    f = lambda x: torch.nn.functional.grid_sample(x, grid, align_corners=True).sum()
    graph = str(fxfunc.make_graph(lambda x, t: fxfunc.jvp(f, (x,), (t,)))(x, x))
    assert "linear_call" in graph and "grid_sampler_3d" in graph


def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "fxfunc", "coverage", "aten.mm.default", "grid_sampler_3d"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aten.mm.default" in out and "native" in out and "derived" in out
    none = subprocess.run([*command[:4], "no_such_op"], capture_output=True)
    assert none.returncode == 2
