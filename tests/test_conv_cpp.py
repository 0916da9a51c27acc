"""Convolutions, pools and batch norm in the C++ backend: every geometry, under the transforms, beside float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import fxfunc
from fxfunc.bench import registry
from fxfunc.codegen import cost, cxx, expand

pytestmark = [
    pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("cache_of_this_file"),
]
pytree = torch.utils._pytree
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def small_maps():
    """Maps of little work are loops too."""
    with cost.forced(maps="loops"):
        yield


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def on_cpp(f, *args):
    """`f` as one program, of which nothing runs in ATen."""
    call = fxfunc.jit(f).lower(*args).compile(backend="cpp")
    assert len(call._program.programs) == 1 and "ATen" not in call.explain(), call.explain()
    return call


def assert_close(found, wanted, tol):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


# ---- convolutions ----

CONVOLUTIONS = {
    "plain": ((2, 3, 7, 6), (4, 3, 3, 2), {}),
    "wide": ((2, 3, 9, 8), (20, 3, 3, 3), {"padding": 1}),
    "stride": ((1, 2, 9, 10), (9, 2, 3, 3), {"stride": (2, 3), "padding": (1, 2)}),
    "dilation": ((2, 2, 9, 9), (3, 2, 3, 2), {"dilation": (2, 3), "padding": 2}),
    "groups": ((2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "wide_groups": ((2, 4, 5, 6), (20, 2, 3, 3), {"groups": 2, "stride": 2}),
    "depthwise": ((2, 5, 6, 7), (5, 1, 3, 3), {"groups": 5}),
    "pointwise": ((2, 10, 4, 5), (12, 10, 1, 1), {}),
    "whole": ((2, 3, 4, 5), (6, 3, 4, 5), {}),
    "more_padding_than_kernel": ((1, 2, 4, 4), (8, 2, 2, 2), {"padding": 3, "stride": 2}),
    "vector": ((2, 3, 11), (9, 3, 4), {"stride": 2, "padding": 1, "dilation": 2}),
    "one_image": ((3, 8, 8), (16, 3, 3, 3), {}),
}
TRANSPOSED = {
    "transposed": ((2, 3, 4, 5), (3, 9, 3, 2), {}),
    "transposed_all": ((2, 4, 4, 5), (4, 3, 3, 2), {"stride": (3, 2), "padding": (1, 0), "output_padding": (2, 1),
                                                    "groups": 2, "dilation": (1, 2)}),
    "transposed_vector": ((2, 4, 5), (4, 6, 3), {"stride": 2, "padding": 2}),
    "transposed_beyond": ((2, 2, 4, 4), (2, 2, 4, 5), {"stride": (3, 2), "padding": (1, 2), "output_padding": (2, 3),
                                                       "groups": 2, "dilation": (4, 4)}),
}  # fmt: skip


def convolution(name):
    """f(x, w, bias) and the shapes of these."""
    x, w, how = (CONVOLUTIONS | TRANSPOSED)[name]
    rank, back = len(w) - 2, name in TRANSPOSED
    op = getattr(F, f"conv{'_transpose' * back}{rank}d")
    return lambda x, w, b: op(x, w, b, **how), x, w, (w[1] * how.get("groups", 1) if back else w[0],)


def transforms(api):
    """By name: f -> a function over (x, w, bias), x and bias with an axis of examples where it maps."""
    scalar = lambda f: lambda *args: (f(*args) ** 3).sum()
    grad = lambda f: api.grad(scalar(f), (0, 1, 2))
    norm = lambda f: lambda *args: sum((g * g).sum() for g in grad(f)(*args))
    return {
        "vmap": lambda f: api.vmap(f, (0, None, None)),
        "vmap(grad)": lambda f: api.vmap(grad(f), (0, None, None)),
        "vmap(jvp)": lambda f: api.vmap(lambda x, w, b: api.jvp(f, (x, w, b), (x.sin(), w * w, b)), (0, None, None)),
        "grad(grad)": lambda f: api.vmap(api.grad(norm(f), (0, 1)), (0, None, None)),
        "vmap over weights": lambda f: lambda x, w, b: api.vmap(
            lambda x, s: grad(f)(x, w * s, b), (0, 0)
        )(x, x.flatten(1).mean(1)),
        "grad of a sum": lambda f: lambda x, w, b: api.grad(
            lambda w: api.vmap(lambda x: scalar(f)(x, w, b))(x).sum()
        )(w),
    }  # fmt: skip


def spread(names, ways):
    """All pairs; of those not marked slow, each name has a way and each way some names."""
    for i, name in enumerate(names):
        for j, how in enumerate(ways):
            yield pytest.param(name, how, marks=[] if (i - j) % len(ways) == 0 else [pytest.mark.slow])


@pytest.mark.parametrize("name, how", list(spread([*CONVOLUTIONS, *TRANSPOSED], transforms(torch.func))))
def test_a_convolution_equals_torch_func(name, how):
    f, x, w, b = convolution(name)
    args = draw(3, *x), draw(*w, seed=1) / 2, draw(*b, seed=2)
    wanted = transforms(torch.func)[how](f)(*args)
    assert_close(on_cpp(transforms(fxfunc)[how](f), *args)(*args), wanted, 1e-9)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_are_as_accurate_as_those_of_aten(dtype):
    """Blocks of terms are added up before they are added to the result: long sums of the weights' gradient too."""
    x, w = draw(2, 8, 20, 30, 30, dtype=dtype), draw(40, 20, 3, 3, dtype=dtype)
    grad = lambda api: api.vmap(
        api.grad(lambda w, x: (F.conv2d(x, w, padding=1) ** 2).sum(), (0, 1)), (None, 0)
    )
    exact = pytree.tree_leaves(grad(torch.func)(w.double(), x.double())) if dtype == F32 else None
    found, aten = on_cpp(grad(fxfunc), w, x)(w, x), grad(torch.func)(w, x)
    if exact is None:
        return assert_close(found, aten, 1e-8)
    for a, b, e in zip(found, aten, exact, strict=True):
        assert (a - e).norm() <= 2 * (b - e).norm()


def test_what_is_not_taken_says_why():
    x, w = draw(3, 2, 2, 5, 5, 5), draw(3, 2, 2, 2, 2)
    call = fxfunc.jit(fxfunc.vmap(F.conv3d, (0, None))).lower(x, w).compile(backend="cpp")
    assert "a convolution of 3 dims" in call.explain()
    assert_close(call(x, w), torch.func.vmap(F.conv3d, (0, None))(x, w), 1e-12)
    x, w = draw(16, 32, 40, 40, dtype=F32), draw(32, 32, 3, 3, dtype=F32)
    call = fxfunc.jit(lambda x, w: F.conv2d(x.sin(), w)).lower(x, w).compile(backend="cpp")
    assert "a large convolution" in call.explain()
    assert_close(call(x, w), F.conv2d(x.sin(), w), 1e-4)


def test_a_loop_that_is_not_taken_keeps_its_convolutions(monkeypatch):
    monkeypatch.setattr(cost, "limits", lambda: dataclasses.replace(cost.MODEL, large_task_windows=0))
    monkeypatch.setattr(expand, "LARGE_CONVOLUTION", 0)
    x, w = draw(2, 3, 6, 6), draw(3, 3, 3, 3, seed=1) / 5

    def f(x, w):
        for _ in range(4):
            x = F.conv2d(x, w, padding=1).tanh()
        return x

    call = fxfunc.jit(f).lower(x, w).compile(backend="cpp")
    assert "fxfunc.scan" in call.explain() and "a large convolution" in call.explain()
    assert_close(call(x, w), f(x, w), 1e-12)


# ---- pools ----

POOLS = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max_padding": lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
    "max_dilation": lambda x: F.max_pool2d(x, 2, 1, 1, (2, 3)),
    "max_ceil": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max_vector": lambda x: F.max_pool1d(x[:, 0], 3, 2),
    "max_places": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg_padding": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_without_padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg_ceil": lambda x: F.avg_pool2d(x, (2, 3), 2, (1, 1), ceil_mode=True),
    "avg_ceil_without": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg_divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg_vector": lambda x: F.avg_pool1d(x[:, 0], 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max": lambda x: F.adaptive_max_pool2d(x, (2, 4)),
    "batch_norm_fixed": lambda x: F.batch_norm(
        x, torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64), x[1, :, 0, 0], x[1, :, 0, 1]
    ),
    "group_norm": lambda x: F.group_norm(x, 3, x[0, :, 0, 0], x[0, :, 0, 1]),
}  # fmt: skip


def nestings(api):
    total = lambda f: lambda x: sum((y**3).sum() for y in pytree.tree_leaves(f(x)) if y.is_floating_point())
    norm = lambda f: lambda x: (api.grad(total(f))(x) ** 2).sum()
    return {
        "vmap": lambda f: api.vmap(f),
        "vmap(grad)": lambda f: api.vmap(api.grad(total(f))),
        "vmap(jvp)": lambda f: api.vmap(lambda x: api.jvp(total(f), (x,), (x.sin(),))),
        "vmap(grad(grad))": lambda f: api.vmap(api.grad(norm(f))),
    }


@pytest.mark.parametrize("name, how", list(spread(POOLS, nestings(torch.func))))
def test_a_pool_equals_torch_func(name, how):
    x = draw(3, 2, 6, 6, 8)
    wanted = nestings(torch.func)[how](POOLS[name])
    assert_close(on_cpp(nestings(fxfunc)[how](POOLS[name]), x)(x), wanted(x), 1e-9)


@pytest.mark.parametrize("name", [n for n in POOLS if "max" in n])
def test_the_first_of_equal_values_wins_and_a_nan_does(name):
    x = draw(3, 2, 6, 6, 8).round()
    x[0, 0, 1, 2, 3], x[1, 1, :, :, :2], x[2, 0, 2] = torch.nan, -torch.inf, torch.inf
    for how in ("vmap", "vmap(grad)"):
        wanted = nestings(torch.func)[how](POOLS[name])(x)
        assert_close(on_cpp(nestings(fxfunc)[how](POOLS[name]), x)(x), wanted, 0)


@pytest.mark.parametrize("calls", ["native", "pairs", "aten"])
def test_a_pool_with_little_else_runs_whoever_does_it(calls):
    f = lambda x: torch.nn.functional.max_pool2d(x, 2)[:, 0] * 2
    x = torch.randn(3, 4, 8, 8)
    with cost.forced(calls=calls):
        assert torch.equal(fxfunc.jit(f).lower(x).compile(backend="cpp")(x), f(x))


def test_places_of_a_pool_are_those_of_aten():
    x = draw(3, 2, 6, 6, 8).round()
    f = lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)
    assert_close(on_cpp(fxfunc.vmap(f), x)(x), torch.func.vmap(f)(x), 0)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("how", ["vmap", "vmap(grad)", "grad(grad)"])
def test_batch_norm_by_the_batch_equals_a_loop_over_examples(weights, how):
    """torch.func.vmap of its second derivative is wrong (torch 2.13), so examples one after another."""
    x, w, b = draw(3, 4, 5, 3, 3), draw(5, seed=1), draw(5, seed=2)
    norm = lambda x, w, b: F.batch_norm(x, None, None, *((w, b) if weights else ()), training=True)
    scalar = lambda x, w, b: (norm(x, w, b) ** 3).sum()
    grads = lambda api: {
        "vmap": norm,
        "vmap(grad)": api.grad(scalar, (0, 1, 2)),
        "grad(grad)": api.grad(lambda *a: sum((g * g).sum() for g in api.grad(scalar, (0, 1))(*a)), (0, 1)),
    }[how]
    wanted = [grads(torch.func)(y, w, b) for y in x]
    wanted = torch.stack(wanted) if how == "vmap" else [torch.stack(ys) for ys in zip(*wanted, strict=True)]
    found = on_cpp(fxfunc.vmap(grads(fxfunc), (0, None, None)), x, w, b)(x, w, b)
    assert_close(found, wanted, 1e-9)


# ---- whole nets ----


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4,), ()], ids=str)
def test_a_loss_by_labels_equals_torch_func(reduction, shape):
    x, y = draw(3, *shape, 5), torch.tensor([[0, 4, -100, 2], [1] * 4, [-100] * 4])
    y = y if shape else y[:, 0]
    f = lambda x, y: F.nll_loss(x.log_softmax(-1), y, reduction=reduction) * 2
    assert_close(on_cpp(fxfunc.vmap(f), x, y)(x, y), torch.func.vmap(f)(x, y), 1e-12)


@pytest.mark.parametrize(
    "name", ["psg8[batch=5]", pytest.param("digits-cnn[tasks=3,steps=2]", marks=pytest.mark.slow)]
)
def test_workloads_equal_their_float64_reference(name):
    w = registry.find(name)
    inputs = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, w.inputs(**w.parameters))
    assert_close(on_cpp(w.function(fxfunc), *inputs)(*inputs), w.exact()(*inputs), 1e-9)
