"""Accuracy on tasks of held-out digits, and the controls that a meta-trained initialisation has to beat.

Everything here runs on torch.func or plain autograd, whatever trained the parameters: a judge of its own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .digits import INNER_LR, OUTER_LR, Images, Params, Tasks, adapt, init_params, logits, loss, sample_tasks

EVAL_TASKS = 200
CONTROL_LRS = (0.01, 0.1, 0.5, 1.0)


class Accuracy(NamedTuple):
    """Mean query accuracy over tasks, and the half-width of its 95% interval."""

    mean: float
    interval: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.interval:.3f}"


class Control(NamedTuple):
    """Accuracy before and after adaptation at the stated lr."""

    lr: float
    before: Accuracy
    after: Accuracy


def eval_tasks(images: Images, seed: int) -> Tasks:
    """The 200 tasks that every row of the table is judged on."""
    return sample_tasks(images, EVAL_TASKS, torch.Generator().manual_seed(seed))


def accuracy(params: Params, tasks: Tasks, lr: float | None = None) -> Accuracy:
    """Query accuracy after adaptation on each task's support set; before it, for `lr=None`."""

    def one(xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        adapted = params if lr is None else adapt(torch.func, params, xs, ys, lr)
        return (logits(adapted, xq).argmax(-1) == yq).float().mean()

    with torch.no_grad():
        each = torch.func.vmap(one)(*tasks)
    return Accuracy(each.mean().item(), 1.96 * each.std().item() / len(each) ** 0.5)


def judge(params: Params, held_out: Tasks, lr: float = INNER_LR) -> Control:
    """The row of one initialisation, adapted as in meta-training unless an lr is given."""
    return Control(lr, accuracy(params, held_out), accuracy(params, held_out, lr))


def judge_best_lr(params: Params, chosen_on: Tasks, held_out: Tasks) -> Control:
    """The row of one initialisation adapted with the best of four lrs, chosen on tasks of training images."""
    best = max(CONTROL_LRS, key=lambda lr: accuracy(params, chosen_on, lr).mean)
    return judge(params, held_out, best)


def train_jointly(seed: int, stream: Iterator[Tasks], steps: int) -> Params:
    """The same network trained with Adam on the pooled images and labels of the tasks, with no adaptation."""
    params = {name: p.requires_grad_() for name, p in init_params(seed).items()}
    optimizer = torch.optim.Adam(params.values(), lr=OUTER_LR)
    for _ in range(steps):
        xs, ys, xq, yq = next(stream)
        optimizer.zero_grad()
        loss(params, torch.cat([xs, xq], 1).flatten(0, 1), torch.cat([ys, yq], 1).flatten()).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}
