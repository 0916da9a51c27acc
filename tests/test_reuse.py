"""An uncompiled transform of an unchanged function is captured once; whatever may have changed is captured again."""

from __future__ import annotations

import functools
import itertools
import random
import time
import types

import pytest
import torch
from torch import nn

import fxfunc
from fxfunc import arguments, mapping

X = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
SCALE = 2.0
CONFIG = {"scale": 2.0}


@pytest.fixture
def captures(monkeypatch):
    """A list with an item for each capture that a transform asked for."""
    made = []

    def watched(capture):
        def call(*args, **kwargs):
            made.append(args[0])
            return capture(*args, **kwargs)

        return call

    for module in (arguments, mapping):
        monkeypatch.setattr(module, "capture", watched(module.capture))
    return made


def loss(x, w=1.0):
    return (x * w).sin().sum()


CALLS = {
    "grad": lambda f: fxfunc.grad(f)(X),
    "vmap(grad)": lambda f: fxfunc.vmap(fxfunc.grad(f))(X[:, None]),
    "jacrev": lambda f: fxfunc.jacrev(f)(X),
    "hessian": lambda f: fxfunc.hessian(f)(X),
    "value_and_grad": lambda f: fxfunc.value_and_grad(f)(X),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_second_call_captures_nothing_even_through_new_wrappers(captures, call):
    first = CALLS[call](loss)
    count = len(captures)
    assert count
    torch.testing.assert_close(CALLS[call](loss), first)
    assert len(captures) == count


def test_a_kept_wrapper_of_anything_callable_is_reused(captures):
    class Loss:
        def __call__(self, x):
            return x.sin().sum()

        def method(self, x):
            return x.cos().sum()

    for f in (Loss(), Loss().method, functools.partial(loss, w=2.0), torch.sum):
        g = fxfunc.grad(f)
        first = g(X)
        count = len(captures)
        torch.testing.assert_close(g(X), first)
        assert len(captures) == count, f


def test_other_signatures_and_parameters_have_graphs_of_their_own(captures):
    f = lambda x, y: (x * y).sum()
    torch.testing.assert_close(fxfunc.grad(f)(X, 2 * X), 2 * X)
    torch.testing.assert_close(fxfunc.grad(f, 1)(X, 2 * X), X)
    torch.testing.assert_close(fxfunc.grad(f, (0, 1))(X, 2 * X), (2 * X, X))
    torch.testing.assert_close(fxfunc.grad(f)(X[:2], X[:2]), X[:2])
    torch.testing.assert_close(fxfunc.grad(f)(X.float(), X.float()), X.float())
    torch.testing.assert_close(fxfunc.grad(lambda x, y: f(x, y) * 3)(X, 2 * X), 6 * X)


def of_cell():
    w = 2.0

    def set(value):
        nonlocal w
        w = value

    return (lambda x: (x * w).sum()), set


def of_global():
    return (lambda x: (x * SCALE).sum()), lambda value: globals().update(SCALE=value)


def of_default():
    def f(x, w=2.0):
        return (x * w).sum()

    def set(value):
        f.__defaults__ = (value,)

    return f, set


def of_attribute():
    state = types.SimpleNamespace(w=2.0)
    return (lambda x: (x * state.w).sum()), lambda value: setattr(state, "w", value)


def of_list():
    weights = [2.0]

    def set(value):
        weights[0] = value

    return (lambda x: sum((x * w).sum() for w in weights)), set


def of_appended_list():
    weights = [2.0]
    return (lambda x: sum((x * w).sum() for w in weights)), lambda value: weights.append(value - sum(weights))


def of_dict():
    return (lambda x: (x * CONFIG["scale"]).sum()), lambda value: CONFIG.update(scale=value)


def of_method():
    class Model:
        def weight(self):
            return 2.0

    model = Model()

    def set(value):
        Model.weight = lambda self: value

    return (lambda x: (x * model.weight()).sum()), set


def of_code():
    def f(x):
        return (x * 2.0).sum()

    def set(value):
        namespace: dict = {}
        exec(f"def f(x):\n    return (x * {value}).sum()", namespace)
        f.__code__ = namespace["f"].__code__

    return f, set


def of_tensor():
    state = {"w": torch.full((4,), 2.0, dtype=torch.float64)}
    return (lambda x: (x * state["w"]).sum()), lambda value: state.update(
        w=torch.full((4,), value, dtype=torch.float64)
    )


def of_tensor_in_place():
    w = torch.full((4,), 2.0, dtype=torch.float64)
    return (lambda x: (x * w).sum()), w.fill_


def of_module():
    net = nn.Linear(1, 1, bias=False).double()

    def set(value):
        net.weight = nn.Parameter(torch.full((1, 1), value, dtype=torch.float64))

    set(2.0)
    return (lambda x: net(x[:, None]).sum()), set


def of_numpy():
    numpy = pytest.importorskip("numpy")
    w = numpy.array([2.0])
    return (lambda x: (x * float(w[0])).sum()), lambda value: w.fill(value)


CHANGES = [
    of_cell, of_global, of_default, of_attribute, of_list, of_appended_list, of_dict, of_method, of_code, of_tensor,
    of_tensor_in_place, of_module, of_numpy,
]  # fmt: skip


@pytest.mark.parametrize("make", CHANGES, ids=lambda make: make.__name__)
def test_what_changed_is_seen(make):
    f, set = make()
    for value in (2.0, 5.0, 2.0, 7.0):
        set(value)
        for _ in range(2):
            torch.testing.assert_close(fxfunc.grad(f)(X), torch.full_like(X, value))
            torch.testing.assert_close(fxfunc.vmap(fxfunc.grad(f))(X[None])[0], torch.full_like(X, value))


def test_training_flags_grad_mode_and_autocast_are_seen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0)).double()
    f = lambda x: net(x).sum()
    assert (fxfunc.grad(f)(X) == 0).all()
    net.eval()
    assert (fxfunc.grad(f)(X) != 0).any()
    x = X.clone().requires_grad_()
    assert fxfunc.grad(loss)(x).requires_grad
    with torch.no_grad():
        assert not fxfunc.grad(loss)(x).requires_grad
    square = lambda x: (x @ x).sum()
    m = torch.randn(4, 4)
    exact = fxfunc.vmap(square)(m[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(fxfunc.vmap(square)(m[None]), exact)


class Counter:
    def __init__(self):
        self.calls = 0


def counting(counter):
    def f(x):
        counter.calls += 1
        return x.sum()

    return f


def printing(counter):
    def f(x):
        print("called")
        return x.sum()

    return f


def drawing(counter):
    return lambda x: x.sum() * random.random()


def timing(counter):
    return lambda x: x.sum() * time.perf_counter()


def iterating(counter):
    numbers = itertools.count(1)
    return lambda x: x.sum() * next(numbers)


def generating(counter):
    numbers = (float(i) for i in range(1, 100))
    return lambda x: x.sum() * next(numbers)


def importing(counter):
    def f(x):
        import random

        return x.sum() * random.random()

    return f


def bound(counter):
    draw = random.Random(0).random
    return lambda x: x.sum() * draw()


@pytest.mark.parametrize(
    "make", [counting, printing, drawing, timing, iterating, generating, importing, bound]
)
def test_a_function_that_acts_is_run_at_every_call(make, capsys):
    counter = Counter()
    f = make(counter)
    found = [fxfunc.grad(f)(X)[0].item() for _ in range(5)]
    if make is counting:
        assert counter.calls == 5
    elif make is printing:
        assert capsys.readouterr().out == "called\n" * 5
    else:
        assert len(set(found)) == 5


def test_decorated_functions_share_nothing_with_what_they_wrap():
    @functools.wraps(loss)
    def doubled(x):
        return 2 * loss(x)

    torch.testing.assert_close(fxfunc.grad(loss)(X), X.cos())
    torch.testing.assert_close(fxfunc.grad(doubled)(X), 2 * X.cos())
    g = fxfunc.grad(loss)

    @functools.wraps(g)
    def negative(x):
        return -g(x)

    torch.testing.assert_close(fxfunc.vmap(g)(X[None])[0], X.cos())
    torch.testing.assert_close(fxfunc.vmap(negative)(X[None])[0], -X.cos())


def test_random_numbers_are_drawn_at_every_call():
    noisy = lambda x: x.sum() * torch.rand((), dtype=x.dtype)
    assert len({fxfunc.grad(noisy)(X)[0].item() for _ in range(4)}) == 4


def test_objects_that_a_function_makes_are_made_at_every_call():
    f = lambda x: (x.sum(), Counter())
    first, second = (fxfunc.grad(f, has_aux=True)(X)[1] for _ in range(2))
    assert first is not second


def test_results_are_not_shared_between_calls():
    g = fxfunc.grad(lambda x: x.sum())
    first = g(X)
    first.add_(1)
    torch.testing.assert_close(g(X), torch.ones_like(X))
