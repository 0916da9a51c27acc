"""`maml25`, `maml1000`: second-order MAML on sinusoids (Finn et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..workload import workload
from .nets import Params, mlp, mlp_params

SIZES = (1, 40, 40, 1)
SHOTS = 10
INNER_LR = 0.01


def make_inputs(*, tasks: int, steps: int) -> tuple:
    """Parameters of the net and the tasks (xs, ys, xq, yq), each [tasks, 10, 1]."""
    generator = torch.Generator().manual_seed(0)
    params = mlp_params(SIZES, generator)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    xs, xq = 10 * torch.rand(2, tasks, SHOTS, 1, generator=generator) - 5
    return params, xs, amplitude * torch.sin(xs + phase), xq, amplitude * torch.sin(xq + phase)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return mse_loss(mlp(params, x, torch.relu), y)


_workload = {"inputs": make_inputs, "jax": "fxfunc.bench.workloads.in_jax:maml", "steps": 5}


@workload("maml25", tasks=25, **_workload)
@workload("maml1000", tasks=1000, **_workload)
def make_meta_step(api: Any, *, tasks: int, steps: int) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the mean query loss after `steps` inner steps, and that loss."""

    def task_loss(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(steps):
            grads = api.grad(loss)(params, xs, ys)
            params = {name: p - INNER_LR * grads[name] for name, p in params.items()}
        return loss(params, xq, yq)

    def mean_loss(params: Params, *task_data: Tensor) -> Tensor:
        return api.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(params, *task_data).mean()

    return api.grad_and_value(mean_loss)
