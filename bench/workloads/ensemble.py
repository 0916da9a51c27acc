"""`ens10`: the forward pass of stacked MLPs over one minibatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import workload
from .nets import Params, weight

BATCH = 64
PIXELS = 784
HIDDEN = 256
CLASSES = 10


def build_model() -> nn.Module:
    """One model of the ensemble, without numbers."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def build_trained(generator: torch.Generator) -> nn.Module:
    """A model with numbers of its own."""
    model = build_model().to_empty(device="cpu").requires_grad_(False)
    for p in model.parameters():
        p.copy_(weight(generator, *p.shape))
    return model


def make_inputs(*, models: int) -> tuple:
    """The models' parameters, stacked, and a minibatch [64, 784]."""
    generator = torch.Generator().manual_seed(0)
    params, _ = torch.func.stack_module_state([build_trained(generator) for _ in range(models)])
    return params, torch.randn(BATCH, PIXELS, generator=generator)


@workload("ens10", inputs=make_inputs, jax="fxfunc.bench.workloads.in_jax:ensemble", models=10)
def make_predictions(api: Any, *, models: int) -> Callable[..., Tensor]:
    """Every model's scores [models, 64, 10]."""
    base = build_model()

    def one(params: Params, x: Tensor) -> Tensor:
        return api.functional_call(base, params, (x,))

    return api.vmap(one, in_dims=(0, None))
