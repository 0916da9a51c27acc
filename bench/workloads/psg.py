"""`psg8`, `psg28`: per-sample gradients of a small CNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d

from ..registry import workload
from .nets import Params, weight

CLASSES = 10


def make_inputs(*, batch: int, size: int) -> tuple:
    """Parameters of the net, images of noise [batch, 1, size, size] and their labels [batch]."""
    generator = torch.Generator().manual_seed(0)
    side = (size - 4) // 2
    params = {
        "conv1": weight(generator, 32, 1, 3, 3),
        "conv1_bias": torch.zeros(32),
        "conv2": weight(generator, 64, 32, 3, 3),
        "conv2_bias": torch.zeros(64),
        "hidden": weight(generator, 128, 64 * side * side),
        "hidden_bias": torch.zeros(128),
        "out": weight(generator, CLASSES, 128),
        "out_bias": torch.zeros(CLASSES),
    }
    images = torch.randn(batch, 1, size, size, generator=generator)
    return params, images, torch.randint(CLASSES, (batch,), generator=generator)


def logits(params: Params, x: Tensor) -> Tensor:
    """Scores [n, 10] of images [n, 1, h, w]."""
    x = conv2d(x, params["conv1"], params["conv1_bias"]).relu()
    x = conv2d(x, params["conv2"], params["conv2_bias"]).relu()
    x = max_pool2d(x, 2).flatten(1)
    x = linear(x, params["hidden"], params["hidden_bias"]).relu()
    return linear(x, params["out"], params["out_bias"])


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of one image [1, h, w]."""
    return cross_entropy(logits(params, x[None]), y[None])


def make_gradients(api: Any, *, batch: int, size: int) -> Callable[..., Params]:
    """The gradients of each image's loss: every parameter's shape after [batch]."""
    return api.vmap(api.grad(loss), in_dims=(None, 0, 0))


for _size in (8, 28):
    workload(
        f"psg{_size}",
        inputs=make_inputs,
        jax="fxfunc.bench.workloads.in_jax:psg",
        batch=64,
        size=_size,
    )(make_gradients)
