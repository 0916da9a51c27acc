"""Modules as functions of their parameters. PyTorch's own helpers, which hold no transform, under our names."""

from __future__ import annotations

import torch


def functional_call(
    module: torch.nn.Module,
    parameter_and_buffer_dicts,
    args=None,
    kwargs=None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
):
    """The output of `module` with these parameters and buffers in place of its own. See torch.func.functional_call.

    parameter_and_buffer_dicts: a dict from names to tensors, or a tuple of such dicts with different keys.
    """
    return torch.func.functional_call(
        module, parameter_and_buffer_dicts, args, kwargs, tie_weights=tie_weights, strict=strict
    )


def stack_module_state(models):
    """`(parameters, buffers)` of N modules of one class, each stacked to [N, *shape]. See torch.func.stack_module_state."""
    return torch.func.stack_module_state(models)


def replace_all_batch_norm_modules_(root: torch.nn.Module) -> torch.nn.Module:
    """`root`, whose batch norms no longer keep running statistics. See torch.func.replace_all_batch_norm_modules_."""
    return torch.func.replace_all_batch_norm_modules_(root)
