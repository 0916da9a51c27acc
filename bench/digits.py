"""5-way 5-shot MAML on scikit-learn's digits: the images, the tasks, the network and the meta-gradient.

The meta-gradient is written once, over a namespace that is either fxfunc or torch.func.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

CLASSES = 10
WAYS = 5
SHOTS = 5
QUERIES = 10
PIXELS = 64
HIDDEN = 64
INNER_STEPS = 3
INNER_LR = 0.1
OUTER_LR = 1e-3
TRAIN_PER_CLASS = 120

Params = dict[str, Tensor]
MetaStep = Callable[..., tuple[Params, Tensor]]


class Images(NamedTuple):
    """Images in [0, 1] and their row numbers in the data set, by class: [10, n, 64] and [10, n]."""

    pixels: Tensor
    rows: Tensor


class Tasks(NamedTuple):
    """T tasks: support images [T, 25, 64] and labels [T, 25], query images [T, 50, 64] and labels [T, 50]."""

    xs: Tensor
    ys: Tensor
    xq: Tensor
    yq: Tensor


def load_images() -> tuple[Images, Images]:
    """The images to train on and the held-out ones: disjoint, the same split whatever the seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    target = torch.tensor(digits.target)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    by_class = [order[target[order] == label] for label in range(CLASSES)]
    fewest = min(len(rows) for rows in by_class)
    train = torch.stack([rows[:TRAIN_PER_CLASS] for rows in by_class])
    held_out = torch.stack([rows[TRAIN_PER_CLASS:fewest] for rows in by_class])
    return Images(pixels[train], train), Images(pixels[held_out], held_out)


def sample_rows(images: Images, tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each task, 5 classes in random order and 15 distinct images of each: [T, 5] and [T, 5, 15]."""
    per_class = images.pixels.shape[1]
    classes = torch.rand(tasks, CLASSES, generator=generator).topk(WAYS).indices
    picks = torch.rand(tasks, WAYS, per_class, generator=generator).topk(SHOTS + QUERIES).indices
    return classes, picks


def sample_tasks(images: Images, tasks: int, generator: torch.Generator) -> Tasks:
    """Tasks with labels 0 to 4 permuted at random over the classes; no image is in both support and query."""
    classes, picks = sample_rows(images, tasks, generator)
    pixels = images.pixels[classes[:, :, None], picks]
    labels = torch.arange(WAYS, device=pixels.device)[None, :, None].expand(tasks, WAYS, SHOTS + QUERIES)
    return Tasks(
        pixels[:, :, :SHOTS].reshape(tasks, WAYS * SHOTS, PIXELS),
        labels[:, :, :SHOTS].reshape(tasks, WAYS * SHOTS),
        pixels[:, :, SHOTS:].reshape(tasks, WAYS * QUERIES, PIXELS),
        labels[:, :, SHOTS:].reshape(tasks, WAYS * QUERIES),
    )


def task_stream(images: Images, tasks: int, seed: int) -> Iterator[Tasks]:
    """Batches of tasks for ever; the seed decides them all."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sample_tasks(images, tasks, generator)


def init_params(seed: int) -> Params:
    """An MLP 64-64-5 with He-uniform weights and zero biases."""
    generator = torch.Generator().manual_seed(seed)

    def weight(out: int, fan_in: int) -> Tensor:
        return (torch.rand(out, fan_in, generator=generator) * 2 - 1) * (6 / fan_in) ** 0.5

    return {
        "w1": weight(HIDDEN, PIXELS),
        "b1": torch.zeros(HIDDEN),
        "w2": weight(WAYS, HIDDEN),
        "b2": torch.zeros(WAYS),
    }


def logits(params: Params, x: Tensor) -> Tensor:
    """Scores of the 5 labels, [n, 5] from [n, 64]."""
    hidden = linear(x, params["w1"], params["b1"]).relu()
    return linear(hidden, params["w2"], params["b2"])


def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return cross_entropy(logits(params, x), y)


def adapt(api, params: Params, x: Tensor, y: Tensor, lr: float = INNER_LR) -> Params:
    """The parameters after 3 steps of SGD on one task's support set."""
    for _ in range(INNER_STEPS):
        grads = api.grad(loss)(params, x, y)
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return params


def make_meta_step(api) -> MetaStep:
    """The second-order gradient of the mean query loss, and that loss: (params, *Tasks) -> (grads, loss)."""

    def task_loss(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return loss(adapt(api, params, xs, ys), xq, yq)

    def mean_loss(params: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return api.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(params, xs, ys, xq, yq).mean()

    return api.grad_and_value(mean_loss)


def train(meta_step: MetaStep, params: Params, stream: Iterator[Tasks], steps: int) -> Iterator[float]:
    """Meta-trains `params` in place with Adam; yields the query loss of each step."""
    optimizer = torch.optim.Adam(params.values(), lr=OUTER_LR)
    for _ in range(steps):
        grads, value = meta_step(params, *next(stream))
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()
        yield float(value)


def loss_curve(meta_step: MetaStep, seed: int, steps: int, tasks: int = 32) -> list[float]:
    """The query losses of the first meta-steps; the seed decides the initial parameters and every task."""
    train_images, _ = load_images()
    return list(train(meta_step, init_params(seed), task_stream(train_images, tasks, seed), steps))
