"""`digits`, `digits-cnn`: MAML on scikit-learn's digits, with the main job's MLP and with a small CNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d

from .. import digits
from ..errors import BenchError
from ..registry import workload
from .meta import meta_gradient
from .nets import Params, weight

CHANNELS = 16


def sample_tasks(tasks: int) -> digits.Tasks:
    """The same tasks at every call. Raises BenchError without scikit-learn, which brings the images."""
    try:
        images, _ = digits.load_images()
    except ImportError as problem:
        raise BenchError("the digits need scikit-learn: pip install scikit-learn") from problem
    return digits.sample_tasks(images, tasks, torch.Generator().manual_seed(0))


def make_inputs(*, tasks: int, steps: int) -> tuple:
    """Parameters of the MLP, and images [tasks, n, 64] and labels [tasks, n] for support and query."""
    return digits.init_params(0), *sample_tasks(tasks)


@workload("digits", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:digits", tasks=32, steps=3)
def make_meta_step(api: Any, *, tasks: int, steps: int) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the mean query loss after `steps` inner steps, and that loss."""
    return meta_gradient(api, digits.loss, steps, digits.INNER_LR)


def make_cnn_inputs(*, tasks: int, steps: int) -> tuple:
    """Parameters of the CNN, and images [tasks, n, 1, 8, 8] and labels [tasks, n] for support and query."""
    generator = torch.Generator().manual_seed(1)
    params = {
        "conv": weight(generator, CHANNELS, 1, 3, 3),
        "conv_bias": torch.zeros(CHANNELS),
        "out": weight(generator, digits.WAYS, CHANNELS * 3 * 3),
        "out_bias": torch.zeros(digits.WAYS),
    }
    xs, ys, xq, yq = sample_tasks(tasks)
    return params, xs.unflatten(-1, (1, 8, 8)), ys, xq.unflatten(-1, (1, 8, 8)), yq


def cnn_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of images [n, 1, 8, 8]."""
    x = conv2d(x, params["conv"], params["conv_bias"]).relu()
    x = max_pool2d(x, 2).flatten(1)
    return cross_entropy(linear(x, params["out"], params["out_bias"]), y)


@workload(
    "digits-cnn", inputs=make_cnn_inputs, jax="fxfunc.bench.workloads.in_jax:digits_cnn", tasks=32, steps=3
)
def make_cnn_meta_step(api: Any, *, tasks: int, steps: int) -> Callable[..., tuple[Params, Tensor]]:
    """The gradient of the mean query loss after `steps` inner steps, and that loss."""
    return meta_gradient(api, cnn_loss, steps, digits.INNER_LR)
