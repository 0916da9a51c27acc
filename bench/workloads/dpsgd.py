"""`dpsgd-mlp`, `dpsgd-block`: gradients as differentially private SGD needs them, clipped sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from ..registry import workload
from .nets import Params, mlp, mlp_params, weight

MLP_SIZES = (784, 256, 256, 10)
WIDTH = 128
HEADS = 4
SEQUENCE = 32
CLASSES = 10
CLIP = 1.0


def clipped(api: Any, loss: Callable[..., Tensor]) -> Callable[..., tuple[Params, Tensor]]:
    """The mean of each sample's gradient scaled to a norm over all parameters of at most CLIP, and those norms [batch]."""
    per_sample = api.vmap(api.grad(loss), in_dims=(None, 0, 0))

    def step(params: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor]:
        grads = per_sample(params, x, y)
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
        scale = (CLIP / norms).clamp(max=1) / len(norms)
        return {name: torch.einsum("n,n...->...", scale, g) for name, g in grads.items()}, norms

    return step


# ----- MLP ------------------------------------------------------------------------------------------------------------


def make_mlp_inputs(*, batch: int) -> tuple:
    """Parameters, samples [batch, 784] and labels [batch]."""
    generator = torch.Generator().manual_seed(0)
    params = mlp_params(MLP_SIZES, generator)
    x = torch.randn(batch, MLP_SIZES[0], generator=generator)
    return params, x, torch.randint(CLASSES, (batch,), generator=generator)


def mlp_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of one sample [784]."""
    return cross_entropy(mlp(params, x, torch.relu), y)


@workload("dpsgd-mlp", inputs=make_mlp_inputs, jax="fxfunc.bench.workloads.in_jax:dpsgd_mlp", batch=64)
def make_mlp_step(api: Any, *, batch: int) -> Callable[..., tuple[Params, Tensor]]:
    """Clipped mean gradients of an MLP, and the norms."""
    return clipped(api, mlp_loss)


# ----- transformer block ----------------------------------------------------------------------------------------------


def make_block_inputs(*, batch: int) -> tuple:
    """Parameters, sequences [batch, 32, 128] and labels [batch]."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "qkv": (3 * WIDTH, WIDTH),
        "merge": (WIDTH, WIDTH),
        "up": (4 * WIDTH, WIDTH),
        "down": (WIDTH, 4 * WIDTH),
    }
    params: Params = {}
    for name, shape in (shapes | {"out": (CLASSES, WIDTH)}).items():
        params[name], params[f"{name}_bias"] = weight(generator, *shape), torch.zeros(shape[0])
    for name in ("norm1", "norm2", "norm3"):
        params[name], params[f"{name}_bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)
    x = torch.randn(batch, SEQUENCE, WIDTH, generator=generator)
    return params, x, torch.randint(CLASSES, (batch,), generator=generator)


def dense(params: Params, name: str, x: Tensor) -> Tensor:
    """A linear layer by name."""
    return linear(x, params[name], params[f"{name}_bias"])


def normalise(params: Params, name: str, x: Tensor) -> Tensor:
    """A layer norm by name."""
    return layer_norm(x, (WIDTH,), params[name], params[f"{name}_bias"])


def attend(params: Params, x: Tensor) -> Tensor:
    """Self-attention of a sequence [s, 128] with 4 heads."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in dense(params, "qkv", x).chunk(3, -1))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return dense(params, "merge", (weights @ v).transpose(0, 1).flatten(-2))


def block_loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of one sequence [s, 128]: a pre-norm block, the mean over positions, a linear layer."""
    x = x + attend(params, normalise(params, "norm1", x))
    x = x + dense(params, "down", gelu(dense(params, "up", normalise(params, "norm2", x))))
    return cross_entropy(dense(params, "out", normalise(params, "norm3", x).mean(0)), y)


@workload("dpsgd-block", inputs=make_block_inputs, jax="fxfunc.bench.workloads.in_jax:dpsgd_block", batch=32)
def make_block_step(api: Any, *, batch: int) -> Callable[..., tuple[Params, Tensor]]:
    """Clipped mean gradients of a transformer block, and the norms."""
    return clipped(api, block_loss)
