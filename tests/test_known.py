"""What `infer` knows of calls by its own formulas is what torch says, and it starts no torch._dynamo."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fxfunc.passes import infer, known
from fxfunc.passes.graph import Val

aten = torch.ops.aten
CPU = torch.device("cpu")


def val(*shape, dtype=torch.float32):
    return Val(shape, dtype, CPU)


I64 = torch.int64
CALLS = [
    (aten.eye.default, (4,), {"dtype": torch.float64, "device": CPU}),
    (aten.eye.default, (0,), {"device": CPU}),
    (aten.convolution.default, (val(2, 4, 9), val(6, 4, 3), val(6), [2], [1], [2], False, [0], 1), {}),
    (
        aten.convolution.default,
        (val(2, 4, 9, 8), val(6, 2, 3, 1), None, [1, 3], [0, 1], [1, 1], False, [0, 0], 2),
        {},
    ),
    (
        aten.convolution_backward.default,
        (val(2, 6, 7), val(2, 4, 9), val(6, 4, 3), [6], [1], [0], [1], False, [0], 1, [True, True, True]),
        {},
    ),
    (
        aten.convolution_backward.default,
        (val(2, 6, 7), val(2, 4, 9), val(6, 4, 3), None, [1], [0], [1], False, [0], 1, [False, True, False]),
        {},
    ),
    (aten.trace.default, (val(3, 4),), {}),
    (aten.clamp.default, (val(3, 4), None, 2), {}),
    (aten.remainder.Scalar, (val(3, dtype=I64), 4), {}),
    (aten.reciprocal.default, (val(3, 4),), {}),
    (aten.floor_divide.default, (val(3, dtype=I64), 4), {}),
    (aten.var_mean.correction, (val(2, 3, 4), [0, -1]), {"correction": 1, "keepdim": True}),
    (aten.var_mean.correction, (val(2, 3),), {}),
    (aten.amax.default, (val(2, 3),), {}),
    (aten.amin.default, (val(2, 3), [-1], True), {}),
    (aten.linalg_vector_norm.default, (val(2, 3), 2, [-1]), {}),
    (aten.linalg_vector_norm.default, (val(2, 3), 1, None, True), {}),
    (aten.max_pool2d_with_indices.default, (val(2, 3, 9, 8), [2, 3]), {}),
    (aten.max_pool2d_with_indices.default, (val(3, 9, 8), [2], [3, 1]), {}),
    (aten.nll_loss_forward.default, (val(5), val(dtype=I64), None, 1, -100), {}),
    (aten.nll_loss_forward.default, (val(5), val(dtype=I64), None, 0, -100), {}),
    (aten.add.Tensor, (val(2, 1, dtype=I64), val(3, dtype=I64)), {"alpha": 2}),
    (aten.mul.Tensor, (val(2, dtype=torch.uint8), 3), {}),
    (aten.sub.Tensor, (val(2, dtype=torch.int32), val(dtype=torch.int32)), {}),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].name())
def test_a_known_result_is_the_one_that_torch_gives(call):
    op, args, kwargs = call
    found = infer.KNOWN[op](*args, **kwargs)
    assert found is not None and found == infer._infer_aten(op, args, kwargs)


UNKNOWN = [
    (aten.clamp.default, (val(3), None, None), {}),
    (aten.eye.default, (-1,), {"device": CPU}),
    (aten.convolution.default, (val(2, 4, 9), val(6, 3, 3), None, [1], [0], [1], False, [0], 1), {}),
    (aten.convolution.default, (val(2, 4, 2), val(6, 4, 3), None, [1], [0], [1], False, [0], 1), {}),
    (aten.convolution.default, (val(2, 4, 9), val(6, 4, 3), None, [0], [0], [1], False, [0], 1), {}),
    (aten.var_mean.correction, (val(2, dtype=I64),), {}),
    (aten.amin.default, (val(2, 0), [1]), {}),
    (aten.amax.default, (val(2, 3, dtype=I64), [1]), {}),
    (aten.linalg_vector_norm.default, (val(2, 3), 2, [2]), {}),
    (aten.linalg_vector_norm.default, (val(2, 3), 2, [0, -2]), {}),
    (aten.max_pool2d_with_indices.default, (val(2, 3, 2, 2), [3, 3]), {}),
    (aten.add.Tensor, (val(2, dtype=I64), 1.5), {}),
    (aten.add.Tensor, (val(2, dtype=I64), val(3, dtype=I64)), {}),
    (aten.add.Tensor, (val(2, dtype=I64), val(2, dtype=torch.int32)), {}),
    (aten.sub.Tensor, (val(2, dtype=torch.bool), val(2, dtype=torch.bool)), {}),
]


@pytest.mark.parametrize("call", UNKNOWN, ids=lambda call: call[0].name())
def test_what_is_wrong_or_unusual_is_left_to_torch(call):
    op, args, kwargs = call
    assert infer.KNOWN[op](*args, **kwargs) is None


def test_every_row_is_tried():
    assert {call[0] for call in CALLS} >= set(known.ROWS)


@pytest.mark.parametrize(
    "name",
    [
        "jac",
        "psg8",
        pytest.param("omniglot[tasks=1,steps=1]", marks=pytest.mark.slow),
        "lj",
        "dpsgd-mlp",
        "lap",
    ],
)
def test_the_graph_of_a_workload_is_made_without_dynamo(name):
    script = f"""
import sys, torch, fxfunc
from fxfunc.bench import registry
w = registry.find({name!r})
fxfunc.jit(w.function(fxfunc)).lower(*w.inputs(**w.parameters)).compile(backend="eager")
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
