"""The C++ backend: kernels, products, programs, what falls back and why, threads, and the cache of compiled objects."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading

import pytest
import torch
from cpp_kernels import compiled
from kernel_cases import (
    F32,
    F64,
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    assert_equal,
    graph_of,
    inputs_of,
    kernel_of,
    random_case,
    run,
)

import fxfunc
from fxfunc.bench import registry
from fxfunc.codegen import cost, cpp, cxx, frames, native
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import ELEMENTWISE
from fxfunc.passes.errors import BackendError

pytestmark = [
    pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("cache_of_this_file"),
]
pytree = torch.utils._pytree


@pytest.fixture
def loops():
    """Maps as loops over tasks, little work or not."""
    with cost.forced(maps="loops"):
        yield


def on_cpp(f, *args):
    return fxfunc.jit(f).lower(*args).compile(backend="cpp")


def assert_close(found, wanted, tol):
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


# ---- kernels ----


def test_every_operation_has_a_template():
    assert ELEMENTWISE.keys() == cpp.TEMPLATES.keys()


CASES = OPS + OPS_F64 + OPS_BF16


@pytest.fixture(scope="module")
def kernels():
    """All of them in one translation unit."""
    graphs = {c.name: graph_of(c) for c in CASES}
    lowered = {name: kernel_of(g) for name, g in graphs.items()}
    launchers = compiled([k for k, _ in lowered.values()])
    return {
        name: (graphs[name], lowered[name][1], run_) for name, run_ in zip(graphs, launchers, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_kernel_equals_eager(case, kernels):
    graph, operands, launch = kernels[case.name]
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        env = dict(zip(graph.inputs, inputs, strict=True))
        assert_equal(launch([env[n] for n in operands], sizes), run(graph, inputs, sizes))


GROUPS = PATTERNS + [random_case(s) for s in range(30)] + [random_case(s, F32) for s in range(10)]


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["serial", "parallel"]
)
def groups(request):
    fused = {c.name: fuse(graph_of(c)) for c in GROUPS}
    every = list(dict.fromkeys(k for g in fused.values() for k in kernels_of(g)))
    return fused, dict(zip(every, compiled(every, request.param), strict=True))


@pytest.mark.parametrize("case", GROUPS, ids=lambda c: c.name)
def test_groups_equal_eager(case, groups):
    fused, launchers = groups
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        found = run(fused[case.name], inputs, sizes, lambda k, xs, s: launchers[k](xs, s, 2))
        assert_equal(found, run(graph_of(case), inputs, sizes), scale=20)


# ---- products ----

SIZES = [
    (10, 40, 40),
    (1, 40, 10),
    (40, 1, 7),
    (3, 7, 5),
    (2, 3, 9),
    (1, 1, 5),
    (17, 23, 3),
    (5, 8, 1),
    (13, 66, 33),
    (33, 50, 600),  # several blocks of terms, columns that overlap, rows that are worth a copy of the columns
    (40, 130, 300),
    (32, 70, 130),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_products_of_every_layout_equal_eager(size, dtype):
    m, n, k = size
    g = torch.Generator().manual_seed(0)
    a, b, at, bt = (torch.randn(s, generator=g, dtype=dtype) for s in ((m, k), (k, n), (k, m), (n, k)))

    def f(a, b, at, bt):
        outs = [x @ y for x in (a, at.t()) for y in (b, bt.t())]
        return [o * 2 for o in outs] + [torch.stack([a, at.t()]) @ torch.stack([b, bt.t()])]

    tol = (1e-12 if dtype == F64 else 2e-5) * max(1, k / 100)
    assert_close(on_cpp(f, a, b, at, bt)(a, b, at, bt), f(a, b, at, bt), tol)


@pytest.mark.parametrize("shape, columns", [((32, 130), 32), ((30, 130), 70), ((32, 100), 70)])
def test_the_smaller_factor_is_turned_where_either_can_be(shape, columns):
    x, y = torch.randn(shape), torch.randn(70, shape[1])
    (source,) = (p.source for p in on_cpp(lambda x, y: (x @ y.t()).relu(), x, y).programs)
    assert f"mm<float, {columns}, 1," in source or f"mm<float, {columns}, {columns}" in source


@pytest.mark.parametrize("size", [(40, 40), (10, 40), (3, 5), (17, 9), (1, 7), (33, 16)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_transposed_values_are_copied_right(size, dtype):
    x = torch.randn(*size, dtype=dtype)

    def f(x):
        y = torch.stack([x.sin(), x * 2])
        return y.mT @ y[:, :, :3], y.mT.reshape(-1)[1::2] * 2, (x.exp().t() @ x).t()

    assert_close(on_cpp(f, x)(x), f(x), 1e-12 if dtype == F64 else 1e-4)


def test_column_sums_have_lanes_along_the_columns():
    """Also where what is read along the sum alone, once for each column, lies in order."""
    x, y = torch.randn(10, 40, dtype=F64), torch.randn(10, 1, dtype=F64)

    def f(x, y):
        z = x * y
        return z, z.sum(0)

    call = on_cpp(f, x, y)
    (source,) = (p.source for p in call._program.programs)
    kernel = source[source.index("void k_mul_sum") : source.index('extern "C" void program')]
    assert "const int64_t g0 = block + lane" in kernel
    assert_close(call(x, y), f(x, y), 1e-12)


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_a_large_reduction_that_keeps_its_axis_is_written(reduce):
    x = torch.randn(8, 20000, dtype=F64)
    f = lambda x: (getattr(x.sin(), reduce)(1, keepdim=True), x * 2)
    call = on_cpp(f, x)
    for _ in range(3):
        assert_close(call(x), f(x), 1e-11)


@pytest.mark.parametrize("start", [0, 1, 1000])
@pytest.mark.parametrize("size", [1, 2**20, 2**21])
def test_advice_on_pages_leaves_memory_as_it_is(start, size):
    x = torch.arange(2**21 + 1000)
    y = x.clone()[start : start + size]
    assert frames.in_huge_pages(y) is y
    assert torch.equal(y, x[start : start + size])


def test_large_outputs_and_scratch_memory_ask_for_huge_pages(monkeypatch):
    asked = []
    for module in (native, frames):
        monkeypatch.setattr(module, "in_huge_pages", lambda x: asked.append(x.nbytes))
    x = torch.randn(1200, 1000)
    on_cpp(lambda x: (x.sin() * 2, x.sum(0) * 2), x)(x)
    frames.Frame(1, frames.LARGE - 1)
    frames.Frame(1, frames.LARGE)
    assert asked == [x.nbytes, frames.LARGE]


@pytest.mark.parametrize("rows", [64, 1000])
@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_lanes_run_along_a_longer_axis_than_one_of_few_elements(rows, columns):
    x, y = torch.randn(rows, columns, dtype=F64), torch.randn(columns, dtype=F64)
    f = lambda x, y: [(x + y).tanh() * y, x.softmax(-1) * 2, (x.exp() * y).sum(-1)]
    call = on_cpp(f, x, y)
    (source,) = (p.source for p in call._program.programs)
    assert columns == 1 or "for (int64_t g0 = block;" in source  # the pointwise one
    assert "const int64_t t0 =" not in source or columns == 1  # the sums
    assert_close(call(x, y), f(x, y), 1e-12)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_choices_keep_the_bits_of_what_they_choose(dtype):
    x = torch.tensor(SPECIAL, dtype=dtype)
    f = lambda x: [
        torch.where(x > 0.3, x, -x),
        torch.where(x.isnan(), -torch.zeros_like(x), x),
        (x - 1).relu().relu(),
        -(x * 0),
    ]
    for a, b in zip(on_cpp(f, x)(x), f(x), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


@pytest.mark.parametrize("rows", [1, 20])
def test_a_large_matrix_that_all_tasks_read_for_few_rows_is_read_once(rows):
    w, x = torch.randn(300, 300, dtype=F32), torch.randn(30, rows, 300, dtype=F32)
    f = lambda api: lambda w, x: api.vmap(lambda w, x: (x @ w).tanh(), (None, 0))(w, x)
    call = on_cpp(f(fxfunc), w, x)
    assert ("read all of a large matrix" in call.explain()) == (rows == 1)
    assert_close(call(w, x), f(torch.func)(w, x), 1e-4)


# What reads a product of 70 rows, and how many kernels can follow its rows.
EPILOGUES = {
    "relu": (lambda x, y, r, c: (x @ y).relu(), 1),
    "bias": (lambda x, y, r, c: (x @ y + r).tanh(), 1),
    "column": (lambda x, y, r, c: (x @ y) * c[:, None], 1),
    "two results": (lambda x, y, r, c: (x @ y, (x @ y + r).exp()), 1),
    "product of products": (lambda x, y, r, c: (x @ y) * (x.sin() @ y).cos(), 1),
    "chain": (lambda x, y, r, c: ((x @ y).relu() @ y.t()[:, :33]).relu(), 2),
    "transposed": (lambda x, y, r, c: (x @ y).t().reshape(70, 20) + r, 0),
    "sum": (lambda x, y, r, c: (x @ y).exp().sum(0), 0),
    "one column": (lambda x, y, r, c: (x @ y[:, :1]).relu() + r[0], 0),
    "one column of many": (lambda x, y, r, c: (x @ x.t()[:, 7:8]).relu() + r[0], 0),
}


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EPILOGUES)
def test_a_kernel_that_follows_the_rows_of_a_product_gives_the_same_bits(name, dtype):
    f, count = EPILOGUES[name]
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=g, dtype=dtype) for s in ((70, 33), (33, 20), (20,), (70,))]
    with cost.forced(epilogues="all", products="native"):
        early = on_cpp(f, *args)
    with cost.forced(epilogues="none", products="native"):
        late = on_cpp(f, *args)
    sources = [p.source for call in (early, late) for p in call.programs]
    assert [s.count("[=](int64_t begin, int64_t end)") for s in sources] == [count, 0]
    for a, b in zip(*(pytree.tree_leaves(call(*args)) for call in (early, late)), strict=True):
        assert torch.equal(a, b)
    assert_close(early(*args), f(*args), 1e-4 if dtype is F32 else 1e-12)


@pytest.mark.parametrize(
    "name",
    ["maml25", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dpsgd-block[batch=4]", "lj[points=64]"))],
)
def test_all_kernels_that_can_follow_rows_leave_a_workload_as_it_is(name):
    w = registry.find(name)
    lowered = fxfunc.jit(w.function(fxfunc)).lower(*(inputs := w.inputs(**w.parameters)))
    with cost.forced(epilogues="all"):
        early = lowered.compile(backend="cpp")
    with cost.forced(epilogues="none"):
        late = lowered.compile(backend="cpp")
    assert [p.source for p in early.programs] != [p.source for p in late.programs]
    for a, b in zip(*(pytree.tree_leaves(call(*inputs)) for call in (early, late)), strict=True):
        assert torch.equal(a, b)


# ---- programs ----


@pytest.mark.parametrize("name", ["maml25", "hess", "jac", "lj", "hessb64[points=16]"])
def test_workloads_equal_their_float64_reference(name):
    w = registry.find(name)
    inputs = pytree.tree_map(lambda x: x.double(), w.inputs(**w.parameters))
    call = on_cpp(w.function(fxfunc), *inputs)
    assert call._program.programs
    assert_close(w.around(call)(*inputs), w.exact()(*inputs), 1e-10)


def test_calls_that_do_not_need_atens_are_in_the_program_before_them():
    def f(x):
        y, z = (x.sin() * 2) @ x, (x.cos() + 1) @ x
        return (y.exp() - y).sum(), (z.exp() * z).sum()

    x = torch.randn(40, 40, dtype=F64)
    with cost.forced(products="aten"):
        call = on_cpp(f, x)
    assert len(call.programs) == 2
    assert_close(call(x), f(x), 1e-12)


def test_random_calls_keep_their_order_whatever_waits_for_a_program():
    def f(x):
        y = torch.bernoulli(((x @ x).sin() * 2).sigmoid())
        return y, torch.rand(40, dtype=F64) + x.cos() * 2, torch.randn(40, dtype=F64)

    x = torch.randn(40, 40, dtype=F64)
    with cost.forced(products="aten"):
        call = on_cpp(f, x)
    assert call.programs
    torch.manual_seed(0)
    ours = call(x)
    torch.manual_seed(0)
    assert_close(ours, f(x), 1e-12)


def net(params, x):
    w, v = params
    return torch.tanh(x @ w).relu() @ v


def data(tasks_=24, dtype=F64):
    g = torch.Generator().manual_seed(1)
    w, v = torch.randn(6, 40, generator=g, dtype=dtype), torch.randn(40, 3, generator=g, dtype=dtype)
    return (w, v), torch.randn(tasks_, 50, 6, generator=g, dtype=dtype)


def loss(params, x):
    return (net(params, x) ** 2).mean()


def derivatives(api):
    each = (None, 0)
    return {
        "vmap": api.vmap(net, each),
        "vmap(grad)": api.vmap(api.grad(loss), each),
        "grad(vmap)": api.grad(lambda p, xs: api.vmap(loss, each)(p, xs).mean()),
        "vmap(jvp)": api.vmap(lambda p, x: api.jvp(lambda y: net(p, y), (x,), (x,)), each),
        "second order": api.grad(
            lambda p, xs: api.vmap(lambda q, x: (api.grad(loss)(q, x)[0] ** 2).sum(), each)(p, xs).sum()
        ),
    }


@pytest.mark.parametrize("name", derivatives(torch.func))
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_derivatives_of_a_map_equal_torch_func(name, guard, loops):
    args = data()
    with guard():
        call = on_cpp(derivatives(fxfunc)[name], *args)
        assert any("loop over" in p.describe() for p in call._program.programs)
        assert_close(call(*args), derivatives(torch.func)[name](*args), 1e-11)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 130])
def test_any_number_of_tasks(count, loops):
    args = data(count)
    call = on_cpp(derivatives(fxfunc)["second order"], *args)
    assert_close(call(*args), derivatives(torch.func)["second order"](*args), 1e-11)


def test_no_task_at_all():
    args = data(0)
    assert on_cpp(derivatives(fxfunc)["vmap"], *args)(*args).shape == (0, 50, 3)


def test_semantics_21_sums_do_not_depend_on_the_number_of_threads(loops):
    args = data(130, F32)
    call = on_cpp(derivatives(fxfunc)["grad(vmap)"], *args)
    (source,) = (p.source for p in call._program.programs)
    sums = [line for line in source.splitlines() if "block" in line and not line.startswith("#")]
    assert sums and not any("threads" in line for line in sums)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_inputs_that_are_not_contiguous_or_repeat_elements():
    x, y = torch.randn(5, 7, dtype=F64).t(), torch.randn(1, 5, dtype=F64).expand(7, 5)

    def f(x, y):
        return (x * y).sin().sum(0) + x[0]

    assert_close(on_cpp(f, x, y)(x, y), f(x, y), 1e-12)


def test_nan_and_infinity_are_where_eager_has_them():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0])

    def f(x):
        return torch.maximum(x, -x).relu(), 1 / x, x.amax(0, True) - x, (x * 0).sum(), x.log().exp()

    assert_close(on_cpp(f, x)(x), f(x), 1e-6)


def test_outputs_are_inputs_views_and_the_same_value_twice():
    x = torch.randn(4, 6, dtype=F64)

    def f(x):
        y = x.sin() * 2
        return y, y.t(), x, y, (x + 1).sum()

    assert_close(on_cpp(f, x)(x), f(x), 1e-12)


def _child(call, args, results):
    def answer():
        results.put((native._threads(), [x.tolist() for x in call(*args)]))

    answer()
    thread = threading.Thread(target=lambda: (torch.set_num_threads(2), answer()))
    thread.start()
    thread.join()


def test_semantics_29_a_forked_child_runs_with_one_thread(loops):
    """With two it would wait forever for a thread that was not forked. A thread that it starts has threads of its own."""
    args = data(24)
    call = on_cpp(derivatives(fxfunc)["grad(vmap)"], *args)
    context = multiprocessing.get_context("fork")
    results, before = context.Queue(), torch.get_num_threads()
    torch.set_num_threads(2)
    if native._left is None:
        call(*args)  # now there are threads that a fork leaves behind
    child = context.Process(target=_child, args=(call, args, results), daemon=True)
    try:
        child.start()
        answer = [x.tolist() for x in call(*args)]
        assert results.get(timeout=60) == (1, answer)
        assert results.get(timeout=60) == (2, answer)
    finally:
        child.kill()
        torch.set_num_threads(before)


# ---- loops of steps ----


def _recurrent(w, x):
    h, ys = torch.zeros_like(x[0]), []
    for i in range(x.shape[0]):
        h = torch.tanh(w @ h + x[i])
        ys.append(h * h[0])
    return torch.stack(ys), h


def _two_carries(w, x):
    a, b = x[0], x[1]
    for i in range(x.shape[0]):
        a, b = b, (a + w @ b).sin() * x[i]
    return a, b, (a * b).sum()


def _adam(w, x):
    p, m, v = w, torch.zeros_like(w), torch.zeros_like(w)
    for i in range(x.shape[0]):
        g = 2 * (p @ x[i])[:, None] * x[i]
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p = p - 0.1 * m / (v.sqrt() + 1e-3)
    return p


def nestings(api):
    return {
        "forward": lambda f, w, x: f(w, x),
        "grad": lambda f, w, x: api.grad(_total(f), (0, 1))(w, x),
        "second order": lambda f, w, x: api.grad(lambda w: (api.grad(_total(f))(w, x) ** 2).sum())(w),
        "jvp": lambda f, w, x: api.jvp(lambda w: f(w, x), (w,), (w,)),
        "vmap(grad)": lambda f, w, x: api.vmap(api.grad(_total(f)), (None, 0))(
            w, torch.stack([x, -x, x * x])
        ),
    }


def _total(f):
    return lambda *args: sum((y * y).sum() for y in pytree.tree_leaves(f(*args)))


@pytest.mark.parametrize("steps", [5, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", nestings(torch.func))
@pytest.mark.parametrize("f", [_recurrent, _two_carries, _adam], ids=lambda f: f.__name__)
def test_a_loop_of_steps_equals_torch_func(f, name, steps, loops):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 4, generator=g, dtype=F64) / 2, torch.randn(steps, 4, generator=g, dtype=F64)
    call = on_cpp(lambda w, x: nestings(fxfunc)[name](f, w, x), w, x)
    assert "steps" in call.explain() or "tasks" in call.explain()
    assert_close(call(w, x), nestings(torch.func)[name](f, w, x), 1e-10)


# ---- calls that move values, and calls taken apart ----

MOVED = {
    "cat": lambda x, i: torch.cat([x, x.exp(), x[:, :2]], 1) * 2,
    "cat_0": lambda x, i: torch.cat([x.sin(), x[1:]]),
    "stack": lambda x, i: torch.stack([x, x.t().contiguous().t(), x * 2], 1).sum(0),
    "stack_last": lambda x, i: torch.stack([x, x * 2], -1),
    "slice_scatter_by_two": lambda x, i: torch.slice_scatter(x.sin(), x[:, :2] * 2, 1, 0, 4, 2),
    "diagonal_scatter": lambda x, i: torch.diagonal_scatter(x.sin(), x[0, :3] * 2, 1),
    "pad": lambda x, i: torch.nn.functional.pad(x.sin(), (1, 2, 0, 3), value=2.5) * 2,
    "unbind": lambda x, i: sum(a * k for k, a in enumerate(x.unbind(1))),
    "slice_scatter": lambda x, i: torch.slice_scatter(x.sin(), x[:, 1:3] * 2, 1, 1, 3),
    "slice_scatter_from_the_end": lambda x, i: torch.slice_scatter(x.sin(), x[1:] * 2, 0, -2),
    "select_scatter": lambda x, i: torch.select_scatter(x.sin(), x[:, 0] * 2, 1, -1),
    "gather": lambda x, i: x.sin().gather(1, i) * 2,
    "scatter_add": lambda x, i: x.sin().scatter_add(1, i, x[:, :2] + 1) * 2,
    "gather_0": lambda x, i: (x * 2).gather(0, torch.zeros_like(x[:1], dtype=torch.int64)),
    "diagonal": lambda x, i: x[:, :3].diagonal(1).sin() * 2,
    "trace": lambda x, i: x[:, :3].trace() * 2,
    "softmax": lambda x, i: x.softmax(1) * 2,
    "log_softmax": lambda x, i: x.log_softmax(0) + 1,
    "cross_entropy": lambda x, i: -x.log_softmax(1).gather(1, i[:, :1]).mean() * 2,
    "layer_norm": lambda x, i: torch.nn.functional.layer_norm(x, (4,), x[0], x[1]) * 2,
    "norm": lambda x, i: x.norm(dim=1) * 2,
    "var": lambda x, i: x.var(1) + x.std(0).sum(),
    "logsumexp": lambda x, i: x.logsumexp(1) * 2,
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "vmap(grad)"])
def test_what_no_kernel_computes_alone_is_in_the_program(name, mapped, loops):
    g = torch.Generator().manual_seed(0)
    x, i = torch.randn(5, 3, 4, generator=g, dtype=F64), torch.randint(0, 4, (5, 3, 2), generator=g)
    f = MOVED[name]
    scalar = lambda x, i: f(x, i).square().sum()
    if mapped:  # by hand, for torch.func maps slice_scatter from the end wrongly
        ours, wanted = (
            fxfunc.vmap(fxfunc.grad(scalar)),
            torch.stack([torch.func.grad(scalar)(*xi) for xi in zip(x, i, strict=True)]),
        )
    else:
        x, i, ours, wanted = x[0], i[0], f, f(x[0], i[0])
    call = on_cpp(ours, x, i)
    assert len(call._program.programs) == 1 and "runs in ATen" not in call.explain()
    assert ("a loop over 5 tasks" in call.explain()) == mapped
    assert_close(call(x, i), wanted, 1e-11)


@pytest.mark.parametrize("bad", [4, -1])
@pytest.mark.parametrize("name", ["gather", "scatter_add"])
def test_an_index_out_of_range_raises_as_in_eager(name, bad):
    x, i = torch.randn(3, 4, dtype=F64), torch.tensor([[0, 1], [3, 2], [0, 0]])
    call = on_cpp(MOVED[name], x, i)
    i[1, 1] = bad
    said = f"index {bad} is out of bounds for dimension 1 with size 4"
    for f in (MOVED[name], call):
        with pytest.raises(RuntimeError, match=said):
            f(x, i)
    i[1, 1] = 0
    assert_close(call(x, i), MOVED[name](x, i), 1e-12)


# ---- one value, one result ----

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, torch.inf, -torch.inf, torch.nan, 1e-40, 80.0, -80.0, 1e4, 3.0]


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.slow)])
def test_semantics_20_a_value_has_the_same_bits_in_every_lane_and_alone(dtype):
    x = torch.cat([torch.tensor(SPECIAL, dtype=dtype), torch.randn(64 - len(SPECIAL), dtype=dtype)])
    names = [n for n in cxx.VECTORS if n not in cxx.PAIRS]
    f = lambda x: [*(getattr(torch, n)(x) * 1 for n in names), torch.atan2(x, x + 1) * 1, x.abs().pow(x) * 1]
    whole = on_cpp(f, x)(x)
    for n in (1, 2, 3, 5, 7, 9, 13):
        for start in (0, 1, 4, 51):
            part = x[start : start + n].clone()
            for a, b in zip(on_cpp(f, part)(part), whole, strict=True):
                b = b[start : start + n]
                assert torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)), (n, start)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_semantics_20_arithmetic_has_the_bits_of_aten(dtype):
    x, y, z = torch.randn(3, 1001, dtype=dtype, generator=torch.Generator().manual_seed(0))
    f = lambda x, y, z: [x * y + z, (x - y * z) * x, x / y - z]
    for a, b in zip(on_cpp(f, x, y, z)(x, y, z), f(x, y, z), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("columns", [3, 16, 37])
def test_a_maximum_is_found_again(columns):
    x = torch.randn(50, columns)

    def f(x):
        y = x.exp().tanh()
        return (y == y.amax(1, True)).sum(1), (y == y.amax(0)).sum(0)

    for counts in on_cpp(f, x)(x):
        assert (counts >= 1).all()


# ---- what is not C++ ----


def test_what_cannot_be_lowered_is_named_and_runs_in_aten(caplog):
    x = torch.randn(4, 9, dtype=F64)

    def f(x):
        return (x.sin() * 2).cumsum(1).cos() + 1

    with caplog.at_level(logging.INFO, "fxfunc"):
        call = on_cpp(f, x)
    assert_close(call(x), f(x), 1e-12)
    assert "aten.cumsum" in call.explain() and "no loop-IR rule" in call.explain()
    assert "aten.cumsum" in caplog.text
    assert "test_cpp.py" in call.explain()


def test_a_map_with_such_a_call_is_batched_and_says_so():
    x = torch.randn(30, 9, dtype=F64)
    call = on_cpp(fxfunc.vmap(lambda y: (y.sin().cumsum(0) * y).sum()), x)
    assert "a map of 30 is batched: aten.cumsum" in call.explain()
    assert_close(call(x), (x.sin().cumsum(1) * x).sum(1), 1e-12)


def test_integer_division_stays_where_a_zero_raises():
    x, y = torch.tensor([7, -7]), torch.tensor([2, 0])
    call = on_cpp(lambda x, y: (x * 2) // y + 1, x, y)
    assert "may be zero" in call.explain()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        call(x, y)


def test_symbolic_sizes_are_named():
    x = torch.randn(5, 3, dtype=F64)
    call = (
        fxfunc.jit(lambda x: x.sin() * 2).lower(fxfunc.spec(x, {0: fxfunc.Dim("n")})).compile(backend="cpp")
    )
    assert "symbolic sizes" in call.explain()
    assert_close(call(x), x.sin() * 2, 0)


def test_the_target_is_the_cpu():
    with pytest.raises(BackendError, match="no such target"):
        fxfunc.jit(torch.sin).lower(torch.ones(3)).compile(backend="cpp", target="cuda:90")


# ---- source ----


def test_source_reads_like_the_graph(tmp_path):
    x = torch.randn(6, 5)
    text = on_cpp(lambda x: (x.sin() * 2).sum(0), x)._program.programs[0].source
    assert "// test_cpp.py:" in text and "const float sin_2 = sinf(" in text or "const float sin" in text


@pytest.mark.parametrize("line", ["x = 1 \\", "/* */ #define", "??/", "é\x00\n"])
def test_a_comment_is_one_line(line):
    assert not cpp.comment(line).endswith("\\") and "\n" not in cpp.comment(line)


# ---- compiler and cache ----

SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXFUNC_CACHE", str(tmp_path))
    cxx._load.cache_clear()
    yield tmp_path / "cpp"
    cxx._load.cache_clear()


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_compiler_is_said(own_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(BackendError, match="no C\\+\\+ compiler"):
        cxx.load(SOURCE % 1)


def test_an_error_names_the_log_and_leaves_nothing_half_written(own_cache):
    with pytest.raises(BackendError, match=r"failed with 1: .*error.*; see .*\.log"):
        cxx.load("int main( {")
    assert [p.suffix for p in own_cache.iterdir()] == [".log"]
    assert "int main( {" in next(own_cache.iterdir()).read_text()


BROKEN = {  # compiler -> what is said of it
    "kill -9 $$": "killed by signal 9: no message; see",
    "echo x > /dev/full": "failed with [12]: .*; see",
    "exit 0": "failed with 0: no message; see",
    "echo 'fatal error: No space left on device' >&2; exit 1": "No space left on device; see",
    'echo half > "$TMPDIR/made.so"; exit 1': "failed with 1: no message; see",
}


def broken(folder, how):
    return script(folder / "broken", f'[ "$1" = --version ] && echo 1 && exit 0\n{how}\n')


@pytest.mark.parametrize("how", BROKEN)
def test_a_compiler_that_dies(how, own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", broken(tmp_path, how))
    with pytest.raises(BackendError, match=BROKEN[how]) as raised:
        cxx.load(SOURCE % 2)
    (log,) = own_cache.iterdir()
    assert log.suffix == ".log" and str(log) in str(raised.value) and "answer" in log.read_text()
    monkeypatch.delenv("CXX")
    assert cxx.load(SOURCE % 2).answer() == 2


def test_a_compiler_that_cannot_be_run(own_cache, tmp_path, monkeypatch):
    (tmp_path / "no").write_bytes(b"\x7fELF")
    (tmp_path / "no").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "no"))
    with pytest.raises(BackendError, match="cannot be run .*; there is no log"):
        cxx.load(SOURCE % 2)


def test_a_cache_that_is_no_folder(tmp_path, own_cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXFUNC_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="cannot be written or opened .*; there is no log.*FXFUNC_CACHE"):
        cxx.load(SOURCE % 5)


FULL = """
import resource, signal, sys
from pathlib import Path
from fxfunc.codegen import cxx
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
try:
    cxx.load("// " + "x" * 3000 + '\\nextern "C" int answer() { return 6; }\\n')
except cxx.errors.BackendError as problem:
    print(problem)
print(*sorted(p.suffix or p.name for p in cxx.folder().iterdir()))
"""


@pytest.mark.parametrize(
    ("limit", "said", "left"),
    [pytest.param(1000, "there is no log", "", marks=pytest.mark.slow), (6000, "; see ", ".log")],
    ids=["not even the source", "the source and the log, not the object"],
)
def test_a_full_disk_leaves_nothing_half_written(limit, said, left, own_cache):
    run = subprocess.run([sys.executable, "-c", FULL, str(limit)], capture_output=True, text=True)
    *problem, listed = run.stdout.split("\n")[:-1]
    assert said in "".join(problem), run
    assert listed == left
    assert cxx.load(SOURCE % 6).answer() == 6


@pytest.mark.parametrize("content", [b"", b"\x7fELF"], ids=["empty", "cut short"])
def test_an_object_cut_short_is_made_again(content, own_cache):
    cxx.load(SOURCE % 7)
    (made,) = own_cache.iterdir()
    made.unlink()  # not written over: it is mapped
    made.write_bytes(content)
    cxx._load.cache_clear()
    assert cxx.load(SOURCE % 7).answer() == 7


def test_what_killed_processes_left_is_removed(own_cache):
    (own_cache / "build-old").mkdir(parents=True)
    (own_cache / "build-new").mkdir()
    os.utime(own_cache / "build-old", (0, 0))
    cxx.load(SOURCE % 8)
    assert sorted(p.name for p in own_cache.glob("build-*")) == ["build-new"]


def test_an_object_is_compiled_once(own_cache, monkeypatch):
    assert cxx.load(SOURCE % 3).answer() == 3
    cxx._load.cache_clear()
    monkeypatch.setattr(cxx, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cxx.load(SOURCE % 3).answer() == 3


def test_another_compiler_has_objects_of_its_own(own_cache, monkeypatch):
    cxx.load(SOURCE % 4)
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", script(own_cache.parent / "other", f'exec {real} "$@"\n'))
    cxx.load(SOURCE % 4)
    assert len(list(own_cache.glob("*.so"))) == 2


def test_the_oldest_objects_go_first(own_cache, monkeypatch):
    for i in (10, 11, 12):
        cxx.load(SOURCE % i)
    files = sorted(own_cache.glob("*.so"), key=lambda p: p.stat().st_mtime_ns)
    for age, p in enumerate(reversed(files)):
        os.utime(p, (1000 - age, 1000 - age))
    monkeypatch.setattr(cxx, "LIMIT", sum(p.stat().st_size for p in files))
    cxx.load(SOURCE % 13)
    assert [p.exists() for p in files] == [False, True, True]


@pytest.mark.skipif(
    "-fsanitize" not in " ".join(cxx.FLAGS), reason="only scripts/test --all asks for sanitizers"
)
@pytest.mark.parametrize(
    ("line", "said"),
    [("x[4] = 1;", "AddressSanitizer"), ("((volatile int*)x)[0] << 40;", "runtime error")],
    ids=["memory", "undefined"],
)
def test_a_sanitizer_sees_a_fault(line, said):
    source = f'extern "C" void fault(int* x) {{ {line} }}\n'
    program = (
        "import ctypes, torch\nfrom fxfunc.codegen import cxx\nx = torch.zeros(4, dtype=torch.int32)\n"
        f"cxx.load({source!r}).fault(ctypes.c_void_p(x.data_ptr()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode and said in run.stderr


def _load_in_process(i):
    return cxx.load(SOURCE % 77).answer()


def test_processes_compile_the_same_source_at_once(own_cache):
    with multiprocessing.get_context("fork").Pool(16) as pool:
        assert pool.map(_load_in_process, range(16), chunksize=1) == [77] * 16
    assert len(list(own_cache.iterdir())) == 1
