"""PyTorch's operators as a program of each backend: calls of `op_db` with neighbours, and their gradients.

Eager's answer is torch's own; what the others make of the graph is taken apart without an error, and evaluated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import evaluated
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc.codegen import eager, offline, partition
from fxfunc.codegen.fuse import kernels_of
from fxfunc.codegen.mapped import Tasks
from fxfunc.passes.errors import FxfuncError
from fxfunc.passes.pipeline import for_aten, lowered

OPS = {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op for op in op_db
       if torch.float32 in op.dtypes and not op.name.startswith(("empty", "new_empty", "jiterator"))}  # fmt: skip
SAMPLES = 2
# In the default suite, each for a fault that was found by it.
ALWAYS = (
    "nn.functional.mse_loss copysign igamma take bucketize cat gather nn.functional.conv_transpose2d nn.functional.layer_norm "
    "index_select nn.functional.embedding nn.functional.cross_entropy nn.functional.pad linalg.multi_dot stack"
).split()


def programs(op: Any) -> Iterator[tuple[Callable, list[Tensor]]]:
    """A function of tensors and these, for each of some samples: the op between other calls, and its gradient."""
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float32), SAMPLES):
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]

        def f(*tensors: Tensor, leaves=leaves, spec=spec, where=where) -> list[Tensor]:
            given = dict(zip(where, tensors, strict=True))
            args, kwargs = pytree.tree_unflatten([given.get(i, x) for i, x in enumerate(leaves)], spec)
            outs = pytree.tree_leaves(op.op(*args, **kwargs))
            return [x * 2 + 1 if x.is_floating_point() else x for x in outs if isinstance(x, Tensor)]

        def loss(*tensors: Tensor, f=f) -> Tensor:
            return sum((x * x).sum() for x in f(*tensors) if x.is_floating_point())

        tensors = [leaves[i] for i in where]
        floats = tuple(i for i, x in enumerate(tensors) if x.is_floating_point())
        yield f, tensors
        yield fxfunc.grad(loss, argnums=floats), tensors


def captured(f: Callable, inputs: list[Tensor]) -> Any:
    """The graph, or None for what draws, or has none: the sweep is about these."""
    try:
        graph = fxfunc.jit(f).lower(*inputs).graph
    except (FxfuncError, RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        return None
    return None if graph.draws else graph


def compare(found: list, wanted: list) -> None:
    for a, b in zip(found, wanted, strict=True):
        if b is None or a is None:
            assert a is b
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        if b.is_floating_point() or b.is_complex():
            largest = float(b.abs().nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 + 1e-4 * largest, equal_nan=True)
        else:
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in OPS])
def test_an_op_is_the_same_on_every_backend(name):
    op = OPS[name]
    for i, (f, inputs) in enumerate(programs(op)):
        graph = captured(f, inputs)
        if graph is None:
            continue
        found = eager.emit(for_aten(lowered(graph)))(list(inputs))
        if i % 2 == 0:
            compare(found, f(*inputs))
        partition.build(graph)
        fused = offline.fused(graph, "ieee", {}, [])
        if not any(isinstance(k, Tasks) for k in kernels_of(fused)):
            launchers = {k: functools.partial(evaluated, k) for k in kernels_of(fused)}
            compare(eager.emit(fused, launchers)(list(inputs)), found)
