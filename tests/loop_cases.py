"""Programs with loops outside of maps: `LOOPS`, functions and inputs; their bodies are kernels as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fxfunc
from fxfunc.codegen import offline
from fxfunc.passes.graph import Graph


class Loop(NamedTuple):
    """A function of tensors, and their shapes."""

    name: str
    f: object
    shapes: tuple[tuple[int, ...], ...]


def _again(x: Tensor) -> Tensor:
    """Twelve equal steps, which become a loop."""
    for _ in range(12):
        x = (x - x.sum(0, keepdim=True)).tanh() * 0.5
    return x


def _scanned(x: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    """A carry, slices, and stacked results."""

    def step(carry, x):
        new = (carry * 0.9 + x).sin()
        return new, (new * new).sum(-1)

    return fxfunc.scan(step, x, xs)


def _products(x: Tensor, w: Tensor) -> Tensor:
    """A product with its epilogue in each step."""
    return fxfunc.fori_loop(0, 6, lambda i, h: torch.relu(h @ w + 0.1) * 0.2, x)


def _map_inside(x: Tensor, xs: Tensor) -> Tensor:
    """A map of tasks in each step."""

    def step(carry, x):
        return carry - 0.1 * fxfunc.vmap(fxfunc.grad(lambda c, y: ((c - y).sin() ** 2).sum()))(carry, x), None

    return fxfunc.scan(step, x, xs)[0]


def _two_maps(x: Tensor, xs: Tensor) -> Tensor:
    """A map in each step, and another one behind the loop."""
    return fxfunc.vmap(fxfunc.grad(lambda c: (c.cos() ** 3).sum()))(_map_inside(x, xs))


def _gradient(x: Tensor, xs: Tensor) -> Tensor:
    """The backward loop reads what the forward loop stacked."""
    return fxfunc.grad(lambda x: _scanned(x, xs)[1].sum())(x)


LOOPS = [
    Loop("again", _again, ((6, 8),)),
    Loop("scanned", _scanned, ((3, 4), (5, 3, 4))),
    Loop("products", _products, ((20, 24), (24, 24))),
    Loop("map inside", _map_inside, ((6, 4), (5, 6, 4))),
    Loop("two maps", _two_maps, ((6, 4), (5, 6, 4))),
    Loop("gradient", _gradient, ((3, 4), (5, 3, 4))),
]


def inputs_of_loop(loop: Loop) -> list[Tensor]:
    gen = torch.Generator().manual_seed(len(loop.name))
    return [torch.randn(s, generator=gen) for s in loop.shapes]


def with_kernels(loop: Loop) -> tuple[Graph, list[str]]:
    """The graph of kernels and loops, and why maps are none."""
    notes: list[str] = []
    graph = fxfunc.jit(loop.f).lower(*inputs_of_loop(loop)).graph
    return offline.fused(graph, "ieee", {}, notes), notes
