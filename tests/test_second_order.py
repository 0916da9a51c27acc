"""Derivatives that torch.func does not have, against finite differences: forward mode, both second orders, nested under vmap."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from rule_harness import error
from torch.autograd import gradcheck, gradgradcheck

import fxfunc

aten = torch.ops.aten


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


INDEX = torch.tensor([0, 2, 1, 3, 2, 2, 1])
OFFSETS = torch.tensor([0, 3, 3, 5])
PLACES = torch.tensor([[0, 2, 1, 0, 0], [1, 1, 1, 2, 0]])


def bags(**how):
    return lambda w, *v: F.embedding_bag(
        INDEX, w.sin(), OFFSETS, **how, **({"per_sample_weights": v[0]} if v else {})
    )


def layer_norm_backward(ct, x, w):
    mean, rstd = x.mean(-1, True), (x.var(-1, correction=0, keepdim=True) + 0.1).rsqrt()
    return aten.native_layer_norm_backward(ct, x, x.shape[-1:], mean, rstd, w, w, [True] * 3)[0]


def group_norm_backward(ct, x, w):
    rows = x.reshape(x.shape[0], 2, -1)
    mean, rstd = rows.mean(-1), (rows.var(-1, correction=0) + 0.1).rsqrt()
    return aten.native_group_norm_backward(ct, x, mean, rstd, w, *x.shape, 2, [True] * 3)[0]


def batch_norm_backward(ct, x, w):
    mean, rstd = x.mean(0), (x.var(0, correction=0) + 0.1).rsqrt()
    return aten.native_batch_norm_backward(ct, x, w, None, None, mean, rstd, True, 0.1, [True] * 3)[0]


def grid_sample(**how):
    return lambda x, g: F.grid_sample(x, 1.3 * g.tanh(), **how)


# name -> (function, arguments)
CASES = {
    "grid_sample": (grid_sample(align_corners=False), (draw(1, 2, 3, 4), draw(1, 2, 2, 2))),
    "grid_sample_border": (
        grid_sample(padding_mode="border", align_corners=True),
        (draw(2, 1, 3, 3), draw(2, 2, 1, 2)),
    ),
    "grid_sample_bicubic": (
        grid_sample(mode="bicubic", padding_mode="reflection", align_corners=False),
        (draw(1, 1, 4, 3), draw(1, 2, 1, 2)),
    ),
    "grid_sample_volume": (grid_sample(align_corners=True), (draw(1, 1, 2, 3, 2), draw(1, 1, 1, 2, 3))),
    "embedding_bag_sum": (bags(mode="sum"), (draw(4, 2),)),
    "embedding_bag_mean": (bags(mode="mean", padding_idx=2), (draw(4, 2),)),
    "embedding_bag_max": (bags(mode="max"), (draw(4, 2),)),
    "embedding_bag_weights": (bags(mode="sum", padding_idx=2), (draw(4, 2), draw(7))),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), (draw(2, 3), draw(3), draw(3, seed=1))),
    "layer_norm_backward": (layer_norm_backward, (draw(2, 3), draw(2, 3, seed=1), draw(3))),
    "group_norm_backward": (group_norm_backward, (draw(2, 4, 2), draw(2, 4, 2, seed=1), draw(4))),
    "batch_norm_backward": (batch_norm_backward, (draw(3, 2), draw(3, 2, seed=1), draw(2))),
    "cdist_1": (lambda a, b: torch.cdist(a, b, 1.0).sin(), (draw(3, 2), draw(2, 2, seed=1))),
    "cdist_2": (torch.cdist, (draw(3, 2), draw(2, 2, seed=1))),
    "cdist_2_by_products": (
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        (draw(3, 2), draw(2, 2, seed=1)),
    ),
    "cdist_3": (lambda a, b: torch.cdist(a, b, 3.0), (draw(3, 2), draw(2, 2, seed=1))),
    "cdist_inf": (lambda a, b: torch.cdist(a, b, math.inf).sin(), (draw(3, 2), draw(2, 2, seed=1))),
    "pdist": (torch.pdist, (draw(4, 2),)),
    "scatter_reduce_prod": (
        lambda a, b: a.scatter_reduce(1, PLACES, b, "prod", include_self=False),
        (draw(2, 3), draw(2, 5, seed=1)),
    ),
    "scatter_reduce_zeros": (
        lambda a, b: (a * torch.tensor([1.0, 0, 1])).scatter_reduce(1, PLACES, b * torch.tensor([1.0, 0, 1, 0, 1]), "prod"),
        (draw(2, 3), draw(2, 5, seed=1)),
    ),
    "scatter_reduce_mean": (lambda a, b: a.scatter_reduce(1, PLACES, b, "mean").sin(), (draw(2, 3), draw(2, 5, seed=1))),
    "scatter_reduce_amax": (lambda a, b: a.scatter_reduce(1, PLACES, b, "amax").sin(), (draw(2, 3), draw(2, 5, seed=1))),
    "index_reduce_prod": (
        lambda a, b: a.index_reduce(1, PLACES[0], b, "prod"), (draw(2, 3), draw(2, 5, seed=1)),
    ),
    "multi_margin": (
        lambda a: F.multi_margin_loss(a, torch.tensor([1, 0]), p=2, reduction="none"),
        (draw(2, 3),),
    ),
    "dropout_backward": (
        lambda ct, x: aten.native_dropout_backward(ct.sin(), x > 0, 2.0), (draw(5), draw(5, seed=1)),
    ),
    "pool_backward": (
        lambda ct, x: aten.adaptive_max_pool2d_backward(ct.sin(), x, torch.tensor([[[0, 1]]])),
        (draw(1, 1, 2), draw(1, 2, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_first_derivative_by_finite_differences(name):
    f, args = CASES[name]
    assert gradcheck(fxfunc.jit(f), [a.clone().requires_grad_() for a in args])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_second_derivative_by_finite_differences(name):
    f, args = CASES[name]
    assert gradgradcheck(fxfunc.jit(f), [a.clone().requires_grad_() for a in args])


def differences(f, args, ts, step=1e-6):
    """The derivative of f along a direction, by central differences."""
    move = lambda by: f(*(a + by * t for a, t in zip(args, ts, strict=True)))
    up, down = (torch.utils._pytree.tree_leaves(move(by)) for by in (step, -step))
    return [(u - d) / (2 * step) for u, d in zip(up, down, strict=True)]


def close(ours, theirs) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(ours), theirs, strict=True)
    return all(error(a, b) <= 1e-6 for a, b in pairs)


def directions(args):
    return tuple(draw(*a.shape, seed=7 + i) for i, a in enumerate(args))


def pullback(f, args, stop=lambda g: g):
    """The gradient of a weighted sum of results, as a function of all arguments."""
    ct = draw(*f(*args).shape, seed=5)
    return lambda *xs: fxfunc.vjp(stop(f), *xs)[1](ct)


def without_gradient(f):
    def g(*xs):
        with torch.no_grad():
            scale = f(*xs)
        return f(*xs) * scale

    return g


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_by_finite_differences(name):
    f, args = CASES[name]
    assert close(fxfunc.jvp(f, args, directions(args))[1], differences(f, args, directions(args)))


@pytest.mark.parametrize("stop", [lambda f: f, without_gradient], ids=["plain", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_forward_over_reverse_by_finite_differences(name, stop):
    f, args = CASES[name]
    ts, g = directions(args), pullback(f, args, stop)
    assert close(fxfunc.jvp(g, args, ts)[1], differences(g, args, ts))


@pytest.mark.parametrize("name", CASES)
def test_per_example_second_derivatives_are_those_of_each_example(name):
    f, args = CASES[name]
    stacked = tuple(torch.stack([a, 0.9 * a, a + 0.1]) for a in args)
    g, ts = pullback(f, args), directions(args)
    twice = lambda *xs: fxfunc.jvp(g, xs, ts)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no op runs one example at a time
        found = fxfunc.vmap(twice)(*stacked)
    each = [twice(*xs) for xs in zip(*stacked, strict=True)]
    leaves = [torch.utils._pytree.tree_leaves(x) for x in each]
    assert close(found, [torch.stack(x) for x in zip(*leaves, strict=True)])


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf])
def test_second_derivatives_at_distance_zero_are_zero_not_nan(p):
    x = draw(3, 2)
    x[1] = x[0]
    for distances in (lambda x: torch.cdist(x, x, p)[0, :2], lambda x: torch.pdist(x, p)[0]):
        f = lambda x, distances=distances: distances(x).sum()
        assert not fxfunc.grad(f)(x).count_nonzero()
        assert not fxfunc.hessian(f)(x).count_nonzero()
        assert not fxfunc.jacfwd(fxfunc.grad(f))(x).count_nonzero()


@pytest.mark.parametrize("order", [fxfunc.jacfwd, fxfunc.jacrev])
def test_third_derivatives_of_a_sampled_image(order):
    x, g = draw(1, 1, 3, 3), draw(1, 1, 1, 2).tanh() / 2
    f = lambda g: F.grid_sample(x, g, mode="bicubic", align_corners=True).sum()
    hessian = fxfunc.hessian(f)
    assert close(
        (order(hessian)(g) * draw(*g.shape, seed=3)).sum((-4, -3, -2, -1)),
        differences(hessian, (g,), (draw(*g.shape, seed=3),)),
    )
