"""`maml25`, `maml1000`: second-order MAML on sinusoids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..registry import workload
from .meta import meta_gradient
from .nets import Params, mlp, mlp_params

WIDTH = 40
SHOTS = 10
INNER_LR = 0.01


def make_inputs(*, tasks: int, steps: int) -> tuple:
    """The same at every call, as `draw` gives them."""
    return draw(tasks, WIDTH, torch.Generator().manual_seed(0))


def draw(tasks: int, width: int, generator: torch.Generator) -> tuple:
    """Parameters of a net with two hidden layers, and the tasks (xs, ys, xq, yq), each [tasks, 10, 1]."""
    params = mlp_params((1, width, width, 1), generator)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    xs, xq = 10 * torch.rand(2, tasks, SHOTS, 1, generator=generator) - 5
    return params, xs, amplitude * torch.sin(xs + phase), xq, amplitude * torch.sin(xq + phase)


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return mse_loss(mlp(params, x, torch.relu), y)


def make_meta_step(api: Any, *, tasks: int, steps: int) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the mean query loss after `steps` inner steps, and that loss."""
    return meta_gradient(api, loss, steps, INNER_LR)


for _tasks in (25, 1000):
    workload(
        f"maml{_tasks}",
        inputs=make_inputs,
        jax="fxfunc.bench.workloads.in_jax:maml",
        tasks=_tasks,
        steps=5,
    )(make_meta_step)
