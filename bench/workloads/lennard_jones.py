"""`lj`: energies and forces of an MLP fitted to the Lennard-Jones potential, the shape of TorchBench's lennard_jones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..registry import workload
from .nets import Params, mlp, mlp_params

SIZES = (1, 16, 16, 16, 16, 1)
FORCE_WEIGHT = 0.001


def make_inputs(*, points: int) -> tuple:
    """Parameters of the net, displacements [n, 3], and their energies [n, 1] and forces [n, 3]."""
    generator = torch.Generator().manual_seed(0)
    params = mlp_params(SIZES, generator)
    r = 0.9 + 1.1 * torch.rand(points, 1, generator=generator)
    directions = torch.randn(points, 3, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    slopes = -48 * r**-13 + 24 * r**-7
    return params, r * directions, 4 * (r**-12 - r**-6), -slopes * directions


def net(params: Params, r: Tensor) -> Tensor:
    """The energy [1] at a distance [1]."""
    return mlp(params, r, torch.tanh)


@workload("lj", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:lennard_jones", points=1000)
def make_step(api: Any, *, points: int) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the loss on energies and forces to the weights, and that loss."""

    def loss(params: Params, displacements: Tensor, energies: Tensor, forces: Tensor) -> Tensor:
        r = displacements.norm(dim=1, keepdim=True)
        predicted = api.vmap(net, in_dims=(None, 0))(params, r)
        slopes = api.vmap(api.jacrev(net, argnums=1), in_dims=(None, 0))(params, r).squeeze(-1)
        predicted_forces = -slopes * displacements / r
        return mse_loss(predicted, energies) + FORCE_WEIGHT * mse_loss(predicted_forces, forces)

    return api.grad_and_value(loss)
