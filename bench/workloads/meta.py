"""Meta-learning by gradient descent through gradient descent (Finn et al. 2017), over torch.func or fxfunc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .nets import Params

Loss = Callable[[Params, Tensor, Tensor], Tensor]


def adapt(api: Any, loss: Loss, params: Params, x: Tensor, y: Tensor, steps: int, lr: float) -> Params:
    """The parameters after `steps` steps of SGD on one task's support set."""
    for _ in range(steps):
        grads = api.grad(loss)(params, x, y)
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return params


def task_losses(api: Any, loss: Loss, steps: int, lr: float) -> Callable[..., Tensor]:
    """(params, xs, ys, xq, yq) -> each task's query loss after its own `steps` steps; the data have tasks in front."""

    def one(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return loss(adapt(api, loss, params, xs, ys, steps, lr), xq, yq)

    return api.vmap(one, in_dims=(None, 0, 0, 0, 0))


def meta_gradient(api: Any, loss: Loss, steps: int, lr: float) -> Callable[..., tuple[Params, Tensor]]:
    """The second-order gradient of the mean query loss over the tasks, and that loss."""
    losses = task_losses(api, loss, steps, lr)
    return api.grad_and_value(lambda params, *tasks: losses(params, *tasks).mean())
