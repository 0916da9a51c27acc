"""Networks over dicts of parameters, written as users of torch.func write them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

Params = dict[str, Tensor]


def weight(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers over the root of the fan-in; the shape is that of a linear or convolution weight."""
    return torch.randn(*shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def mlp_params(sizes: Sequence[int], generator: torch.Generator) -> Params:
    """Weights w0, w1, ... and zero biases b0, b1, ... of a net with layers of these sizes."""
    params = {}
    for layer, (fan_in, out) in enumerate(itertools.pairwise(sizes)):
        params[f"w{layer}"] = weight(generator, out, fan_in)
        params[f"b{layer}"] = torch.zeros(out)
    return params


def mlp(params: Params, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The net of `mlp_params`, the activation between its layers; x is [in] or [n, in]."""
    last = len(params) // 2 - 1
    for layer in range(last):
        x = activation(linear(x, params[f"w{layer}"], params[f"b{layer}"]))
    return linear(x, params[f"w{last}"], params[f"b{last}"])
