"""The `maml` workload: second-order MAML on sinusoids (Finn et al. 2017), over fxfunc or torch.func."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

SHOTS = 10
HIDDEN = 40
INNER_STEPS = 5
INNER_LR = 0.01

Params = dict[str, Tensor]


def make_inputs(tasks: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """Parameters of a net 1-40-40-1 and the tasks (xs, ys, xq, yq), each [tasks, 10, 1]; always the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, HIDDEN, HIDDEN, 1]
    params = {}
    for layer, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        params[f"w{layer}"] = torch.randn(out, fan_in, generator=generator) / math.sqrt(fan_in)
        params[f"b{layer}"] = torch.zeros(out)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    xs, xq = 10 * torch.rand(2, tasks, SHOTS, 1, generator=generator) - 5
    batch = (xs, amplitude * torch.sin(xs + phase), xq, amplitude * torch.sin(xq + phase))
    moved = {name: p.to(device, dtype) for name, p in params.items()}
    return moved, *(t.to(device, dtype) for t in batch)


def predict(params: Params, x: Tensor) -> Tensor:
    """The net, relu between its three layers."""
    x = linear(x, params["w0"], params["b0"]).relu()
    x = linear(x, params["w1"], params["b1"]).relu()
    return linear(x, params["w2"], params["b2"])


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return mse_loss(predict(params, x), y)


def make_meta_step(api) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the mean query loss after 5 inner steps, and that loss."""

    def task_loss(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(INNER_STEPS):
            grads = api.grad(loss)(params, xs, ys)
            params = {name: p - INNER_LR * grads[name] for name, p in params.items()}
        return loss(params, xq, yq)

    def mean_loss(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return api.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(params, xs, ys, xq, yq).mean()

    return api.grad_and_value(mean_loss)
