"""`jac`, `hess`, `hessb64`: derivatives of an MLP 64-64-10 in its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import workload
from .nets import Params, mlp, mlp_params

SIZES = (64, 64, 10)


def make_inputs(**points: int) -> tuple:
    """Parameters of the net and one point [64], or [points, 64]."""
    generator = torch.Generator().manual_seed(0)
    return mlp_params(SIZES, generator), torch.randn(*points.values(), SIZES[0], generator=generator)


def net(params: Params, x: Tensor) -> Tensor:
    """[10] from [64]."""
    return mlp(params, x, torch.tanh)


def total(params: Params, x: Tensor) -> Tensor:
    """The sum of the outputs."""
    return net(params, x).sum()


@workload("jac", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:jacobian")
def make_jacobian(api: Any) -> Callable[..., Tensor]:
    """The Jacobian [10, 64] in reverse mode."""
    return api.jacrev(net, argnums=1)


@workload("hess", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:hessian")
def make_hessian(api: Any) -> Callable[..., Tensor]:
    """The Hessian [64, 64] of the sum of the outputs."""
    return api.hessian(total, argnums=1)


@workload("hessb64", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:hessian_batch", points=64)
def make_hessian_batch(api: Any, *, points: int) -> Callable[..., Tensor]:
    """The Hessians of all outputs at each point, [points, 10, 64, 64]."""
    return api.vmap(api.hessian(net, argnums=1), in_dims=(None, 0))
