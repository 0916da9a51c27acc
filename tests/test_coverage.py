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


def test_core_ops_have_rules_of_ours():
    without = set()
    for op in coverage.core_ops():
        found = coverage.tiers(op)
        ours = found["jvp"] in OURS and found["batch"] in OURS and found["transpose"] in (*OURS, "-")
        if not ours:
            without.add(str(op).removeprefix("aten."))
    assert without == NO_TENSOR_FUNCTION


@pytest.mark.parametrize(
    "op, tiers",
    [
        (aten.mm.default, ("native", "native", "native")),
        (aten.sin.default, ("native", "-", "native")),
        (aten.eq.Tensor, ("native", "-", "native")),
        (aten.view.default, ("native", "native", "native")),
        (aten.grid_sampler_3d.default, ("native", "native", "native")),
        (aten.erfinv.default, ("derived", "derived", "derived")),
    ],
    ids=str,
)
def test_the_tier_that_answers(op, tiers):
    assert tuple(coverage.tiers(op).values()) == tiers


def test_a_derived_rule_shows_in_the_graph():
    x = torch.rand(3)
    f = lambda x: x.erfinv().sum()
    graph = str(fxfunc.make_graph(lambda x, t: fxfunc.jvp(f, (x,), (t,)))(x, x))
    assert "linear_call" in graph and "erfinv" in graph


@pytest.mark.slow
def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "fxfunc", "coverage", "aten.mm.default", "erfinv"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aten.mm.default" in out and "native" in out and "derived" in out
    none = subprocess.run([*command[:4], "no_such_op"], capture_output=True)
    assert none.returncode == 2
