"""`omniglot`: the net and the training step of TorchBench's functorch_maml_omniglot, on digits of its image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ..digits import WAYS
from ..registry import workload
from .few_shot import sample_tasks
from .meta import adapt, task_losses
from .nets import Params, weight

WIDTH = 64
SIDE = 28
INNER_LR = 0.1
NOISE = 0.1  # no two pixels alike: maxima that tie have no one gradient
SEED = 2  # with some others a pixel of a late layer is so near a kink that float32 falls on the other side


def build_net() -> nn.Module:
    """The net without numbers; batch norm uses the statistics of the batch."""
    layers: list[nn.Module] = []
    with torch.device("meta"):
        for channels in (1, WIDTH, WIDTH):
            layers += [
                nn.Conv2d(channels, WIDTH, 3),
                nn.BatchNorm2d(WIDTH, affine=True, track_running_stats=False),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2, 2),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTH, WAYS))


def initial(name: str, p: Tensor, generator: torch.Generator) -> Tensor:
    """Normal weights; batch norm starts as the identity, biases at zero."""
    if p.ndim > 1:
        return weight(generator, *p.shape)
    return torch.ones(p.shape) if name.endswith("weight") else torch.zeros(p.shape)


def enlarge(images: Tensor, generator: torch.Generator) -> Tensor:
    """[tasks, n, 1, 28, 28] with noise from [tasks, n, 64]."""
    small = images.reshape(-1, 1, 8, 8)
    large = interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    noisy = large + NOISE * torch.randn(large.shape, generator=generator)
    return noisy.reshape(*images.shape[:2], 1, SIDE, SIDE)


def make_inputs(*, tasks: int, steps: int) -> tuple:
    """Parameters of the net, and images [tasks, n, 1, 28, 28] and labels [tasks, n] for support and query."""
    generator = torch.Generator().manual_seed(SEED)
    params = {name: initial(name, p, generator) for name, p in build_net().named_parameters()}
    xs, ys, xq, yq = sample_tasks(tasks)
    return params, enlarge(xs, generator), ys, enlarge(xq, generator), yq


def make_loss(api: Any) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """Mean cross-entropy of the net."""
    net = build_net()
    return lambda params, x, y: cross_entropy(api.functional_call(net, params, (x,)), y)


def send_back(call: Callable[..., Tensor], params: Params, *tasks: Tensor) -> tuple[Params, Tensor]:
    """The gradients that `.backward()` of the summed losses leaves in the parameters, and the losses."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    losses = call(leaves, *tasks)
    losses.sum().backward()
    return {name: p.grad for name, p in leaves.items()}, losses.detach()


class _Autograd:
    """What `adapt` needs of an api, by ordinary autograd."""

    functional_call = staticmethod(torch.func.functional_call)

    @staticmethod
    def grad(loss: Callable[..., Tensor]) -> Callable[..., Params]:
        def gradients(params: Params, *data: Tensor) -> Params:
            found = torch.autograd.grad(loss(params, *data), list(params.values()), create_graph=True)
            return dict(zip(params, found, strict=True))

        return gradients


def by_autograd(*, tasks: int, steps: int) -> Callable[..., tuple[Params, Tensor]]:
    """One task after another. Under torch.func.vmap the second derivative of batch norm is wrong (torch 2.13)."""
    loss = make_loss(_Autograd)

    def one(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return loss(adapt(_Autograd, loss, params, xs, ys, steps, INNER_LR), xq, yq)

    def losses(params: Params, *data: Tensor) -> Tensor:
        return torch.stack([one(params, *task) for task in zip(*data, strict=True)])

    return lambda *inputs: send_back(losses, *inputs)


@workload(
    "omniglot",
    inputs=make_inputs,
    jax="fxfunc.bench.workloads.in_jax:omniglot",
    drive=send_back,
    reference=by_autograd,
    tasks=4,
    steps=5,
)
def make_losses(api: Any, *, tasks: int, steps: int) -> Callable[..., Tensor]:
    """The query loss of each task after `steps` inner steps."""
    return task_losses(api, make_loss(api), steps, INNER_LR)
