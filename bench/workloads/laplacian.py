"""`lap`: the Laplacian of an MLP over 50 dimensions, as physics-informed networks need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import workload
from .nets import Params, mlp, mlp_params

SIZES = (50, 64, 64, 1)


def make_inputs(*, batch: int) -> tuple:
    """Parameters of the net and points [batch, 50]."""
    generator = torch.Generator().manual_seed(0)
    return mlp_params(SIZES, generator), torch.randn(batch, SIZES[0], generator=generator)


def net(params: Params, x: Tensor) -> Tensor:
    """A number from [50]."""
    return mlp(params, x, torch.tanh).squeeze(-1)


@workload("lap", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:laplacian", batch=256)
def make_laplacian(api: Any, *, batch: int) -> Callable[..., Tensor]:
    """The trace of the Hessian at each point, [batch]."""
    hessian = api.hessian(net, argnums=1)
    return api.vmap(lambda params, x: hessian(params, x).trace(), in_dims=(None, 0))
