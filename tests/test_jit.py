"""jit: what it closes over is never stale (SEMANTICS 4), what its key holds (SEMANTICS 27), its cache, writes, threads."""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn

import fxfunc
from fxfunc import errors

F64 = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=F64)
W = torch.tensor([2.0, 3.0, 5.0], dtype=F64)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ----- SEMANTICS 4: closures are read again at every call -------------------------------------------------------------
# A case gives a function, a change to what it reads, and whether the compiled entry serves on (else it captures again).

GLOBAL_TENSOR, GLOBAL_NUMBER, GLOBAL_FUNCTION, GLOBAL_LIST = W, 2.0, torch.sin, [1.0, 2.0]


def set_global(name, value):
    globals()[name] = value


def helper(x):
    return x * GLOBAL_NUMBER


class Config:
    scale = 2.0

    def __init__(self):
        self.w, self.k = W.clone(), 3.0

    def __call__(self, x):
        return x * self.w * self.k * self.scale

    def method(self, x):
        return self(x) + 1

    @property
    def doubled(self):
        return self.k * GLOBAL_NUMBER

    @staticmethod
    def static(x):
        return x * GLOBAL_NUMBER

    @classmethod
    def of_class(cls, x):
        return x * cls.scale


class Derived(Config):
    pass


class Slots:
    __slots__ = ("k", "w")

    def __init__(self):
        self.k, self.w = 2.0, W.clone()


@dataclasses.dataclass
class Data:
    k: float = 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=F64)
        self.register_buffer("shift", torch.ones(3, dtype=F64))
        self.act, self.k, self.sizes, self.config = torch.tanh, 2.0, [1.0, 2.0], Data()

    def forward(self, x):
        y = self.act(self.layer(x)) * self.k + self.shift
        return y * self.sizes[-1] * self.config.k * (3 if self.training else 1)


def module_of(**values):
    module = types.ModuleType("user_settings")
    module.__dict__.update(values)
    return module


SERVES_ON, AGAIN = True, False
CASES = {}


def case(serves_on):
    return lambda make: CASES.setdefault(make.__name__, (make, serves_on))


@case(SERVES_ON)
def a_free_variable_rebound():
    w = W

    def change():
        nonlocal w
        w = w - 0.5

    return lambda x: x * w, change


@case(SERVES_ON)
def a_tensor_written_in_place():
    w = W.clone()
    return lambda x: x * w, lambda: w.mul_(2)


@case(SERVES_ON)
def a_view_of_a_tensor_written_in_place():
    w = W.clone()
    v = w[:2]
    return lambda x: x[:2] * v, lambda: w.mul_(2)


@case(AGAIN)
def a_tensor_of_another_shape():
    w = W

    def change():
        nonlocal w
        w = W[:1]

    return lambda x: x * w, change


@case(AGAIN)
def a_tensor_of_another_dtype():
    w = W

    def change():
        nonlocal w
        w = W.float() + 1

    return lambda x: x * w, change


@case(AGAIN)
def a_tensor_that_becomes_a_number():
    w = W

    def change():
        nonlocal w
        w = 4.0

    return lambda x: x * w, change


@case(AGAIN)
def a_changed_float():
    k = 2.0

    def change():
        nonlocal k
        k = 3.0

    return lambda x: x * k, change


@case(AGAIN)
def minus_zero():
    k = 0.0

    def change():
        nonlocal k
        k = -0.0

    return lambda x: x.abs() / k, change


@case(AGAIN)
def an_integer_that_becomes_a_float():
    k = 2

    def change():
        nonlocal k
        k = 2.0

    return lambda x: (x > 0).long() * k, change


@case(AGAIN)
def a_changed_string():
    op = "sin"

    def change():
        nonlocal op
        op = "cos"

    return lambda x: getattr(torch, op)(x), change


@case(AGAIN)
def a_changed_function():
    op = torch.sin

    def change():
        nonlocal op
        op = torch.cos

    return lambda x: op(x), change


@case(SERVES_ON)
def a_global_tensor():
    return lambda x: x * GLOBAL_TENSOR, lambda: set_global("GLOBAL_TENSOR", W + 1)


@case(AGAIN)
def a_global_number():
    return lambda x: x * GLOBAL_NUMBER, lambda: set_global("GLOBAL_NUMBER", 7.0)


@case(AGAIN)
def a_global_function():
    return lambda x: GLOBAL_FUNCTION(x), lambda: set_global("GLOBAL_FUNCTION", torch.cos)


@case(AGAIN)
def a_global_of_a_called_function():
    return lambda x: helper(x), lambda: set_global("GLOBAL_NUMBER", 7.0)


@case(AGAIN)
def a_global_list():
    return lambda x: x * GLOBAL_LIST[0], lambda: GLOBAL_LIST.insert(0, 5.0)


@case(AGAIN)
def a_nested_function():
    k = [2.0]

    def outer(x):
        def inner(y):
            return y * k[0] * GLOBAL_NUMBER

        return inner(x)

    return outer, lambda: set_global("GLOBAL_NUMBER", 9.0)


@case(AGAIN)
def a_module_attribute():
    settings = module_of(k=2.0)
    return lambda x: x * settings.k, lambda: setattr(settings, "k", 3.0)


@case(AGAIN)
def an_attribute_of_a_module_in_a_module():
    package = module_of(settings=module_of(k=2.0))
    return lambda x: x * package.settings.k, lambda: setattr(package.settings, "k", 3.0)


@case(SERVES_ON)
def a_tensor_in_a_module():
    settings = module_of(w=W)
    return lambda x: x * settings.w, lambda: setattr(settings, "w", W + 1)


@case(SERVES_ON)
def a_tensor_in_a_dict():
    params = {"w": W}
    return lambda x: x * params["w"], lambda: params.update(w=W * 2)


@case(SERVES_ON)
def a_tensor_deep_in_containers():
    params = {"layers": [(W, {"b": W + 1})]}
    return lambda x: x * params["layers"][0][1]["b"], lambda: params["layers"][0][1].update(b=W * 3)


@case(AGAIN)
def a_key_added_to_a_dict():
    params = {"a": W}
    return lambda x: x * sum(params.values()), lambda: params.update(b=W)


@case(AGAIN)
def an_item_appended_to_a_list():
    scales = [2.0]
    return lambda x: x * sum(scales), lambda: scales.append(3.0)


@case(AGAIN)
def an_item_replaced_in_a_list():
    scales = [2.0, 3.0]
    return lambda x: x * scales[1], lambda: scales.__setitem__(1, 4.0)


@case(AGAIN)
def a_deque():
    scales = collections.deque([2.0], maxlen=1)
    return lambda x: x * scales[0], lambda: scales.append(4.0)


@case(AGAIN)
def a_set():
    chosen = {"sin"}
    return lambda x: x.sin() if "sin" in chosen else x.cos(), lambda: (chosen.clear(), chosen.add("cos"))


@case(AGAIN)
def a_numpy_array():
    scales = np.array([2.0, 3.0])
    return lambda x: x * float(scales[1]), lambda: scales.__setitem__(1, 4.0)


@case(AGAIN)
def a_numpy_array_made_a_tensor():
    scales = np.array([2.0, 3.0, 4.0])
    return lambda x: x * torch.from_numpy(scales), lambda: scales.__setitem__(1, 5.0)


@case(AGAIN)
def the_items_of_a_default_argument():
    def f(x, options={"k": 2.0}):  # noqa: B006
        return x * options["k"]

    return f, lambda: f.__defaults__[0].update(k=3.0)


@case(AGAIN)
def default_arguments():
    def f(x, k=2.0, *, n=1.0):
        return x * k * n

    return f, lambda: setattr(f, "__defaults__", (3.0,))


@case(AGAIN)
def default_keyword_arguments():
    def f(x, *, n=1.0):
        return x * n

    return f, lambda: setattr(f, "__kwdefaults__", {"n": 2.0})


@case(SERVES_ON)
def a_tensor_as_a_default_argument():
    w = W.clone()

    def f(x, w=w):
        return x * w

    return f, lambda: w.add_(1)


@case(AGAIN)
def an_attribute_of_a_function():
    def f(x):
        return x * f.k

    f.k = 2.0
    return f, lambda: setattr(f, "k", 3.0)


@case(AGAIN)
def a_decorated_function():
    k = [2.0]

    @functools.wraps(helper)
    def f(x):
        return helper(x) * k[0]

    return f, lambda: k.__setitem__(0, 3.0)


@case(AGAIN)
def the_arguments_of_a_partial():
    options = {"k": 2.0}
    return functools.partial(lambda options, x: x * options["k"], options), lambda: options.update(k=3.0)


@case(SERVES_ON)
def a_tensor_attribute_of_an_object():
    c = Config()
    return c, lambda: setattr(c, "w", W * 3)


@case(AGAIN)
def an_attribute_of_an_object():
    c = Config()
    return c.method, lambda: setattr(c, "k", 4.0)


@case(AGAIN)
def an_attribute_of_a_class():
    return Config(), lambda: setattr(Config, "scale", 4.0)


@case(AGAIN)
def an_attribute_of_a_base_class():
    c = Derived()
    return lambda x: c.method(x), lambda: setattr(Config, "scale", 5.0)


@case(AGAIN)
def a_class_used_as_a_namespace():
    return lambda x: x * Config.scale, lambda: setattr(Config, "scale", 6.0)


@case(AGAIN)
def a_method_replaced_on_the_class():
    c, old = Config(), Config.static
    return lambda x: c.static(x) * c.k, lambda: setattr(c, "static", lambda x: old(x) + 1)


@case(AGAIN)
def a_global_behind_a_property():
    c = Config()
    return lambda x: x * c.doubled, lambda: set_global("GLOBAL_NUMBER", 8.0)


@case(AGAIN)
def a_global_behind_a_static_method():
    return lambda x: Config.static(x), lambda: set_global("GLOBAL_NUMBER", 8.0)


@case(AGAIN)
def an_attribute_read_by_a_class_method():
    return Config.of_class, lambda: setattr(Config, "scale", 7.0)


@case(AGAIN)
def a_slot():
    s = Slots()
    return lambda x: x * s.k, lambda: setattr(s, "k", 4.0)


@case(SERVES_ON)
def a_tensor_in_a_slot():
    s = Slots()
    return lambda x: x * s.w, lambda: setattr(s, "w", W + 2)


@case(AGAIN)
def a_dataclass():
    d = Data()
    return lambda x: x * d.k, lambda: setattr(d, "k", 4.0)


@case(AGAIN)
def a_namespace():
    n = types.SimpleNamespace(k=2.0)
    return lambda x: x * n.k, lambda: setattr(n, "k", 4.0)


@case(AGAIN)
def an_option_of_an_optimizer():
    opt = torch.optim.SGD([W.clone()], lr=0.1)
    return lambda x: x * opt.param_groups[0]["lr"], lambda: opt.param_groups[0].update(lr=0.2)


@case(SERVES_ON)
def a_parameter_updated():
    net = Net()

    def change():
        with torch.no_grad():
            net.layer.weight.mul_(2)

    return net, change


@case(SERVES_ON)
def a_parameter_replaced():
    net = Net()
    return net, lambda: setattr(net.layer, "weight", nn.Parameter(torch.eye(3, dtype=F64)))


@case(SERVES_ON)
def a_buffer_replaced():
    net = Net()
    return lambda x: net(x), lambda: setattr(net, "shift", W)


@case(SERVES_ON)
def a_state_dict_loaded():
    net, other = Net(), Net()
    return net, lambda: net.load_state_dict({k: v + 1 for k, v in other.state_dict().items()})


@case(AGAIN)
def the_training_flag():
    net = Net()
    return net, net.eval


@case(AGAIN)
def a_flag_of_a_module():
    net = Net()
    return net, lambda: setattr(net, "k", 5.0)


@case(AGAIN)
def a_list_of_a_module():
    net = Net()
    return net, lambda: net.sizes.append(7.0)


@case(AGAIN)
def a_function_of_a_module():
    net = Net()
    return net, lambda: setattr(net, "act", torch.relu)


@case(AGAIN)
def an_object_of_a_module():
    net = Net()
    return net, lambda: setattr(net.config, "k", 9.0)


@case(AGAIN)
def a_layer_replaced():
    net = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Tanh())
    return net, lambda: net.__setitem__(1, nn.ReLU())


@case(AGAIN)
def a_layer_appended():
    net = nn.Sequential(nn.Linear(3, 3, dtype=F64))
    return lambda x: net(x), lambda: net.append(nn.Tanh())


@case(AGAIN)
def a_forward_hook():
    net = Net()
    return net, lambda: net.layer.register_forward_hook(lambda module, args, y: y * 2)


@case(AGAIN)
def the_probability_of_a_layer():
    net = nn.Threshold(0.0, 2.0)
    return net, lambda: setattr(net, "value", 3.0)


@case(AGAIN)
def a_requires_grad_that_code_branches_on():
    w = W.clone()
    return lambda x: x * (w if w.requires_grad else 2 * w).detach(), lambda: w.requires_grad_()


@case(AGAIN)
def one_of_two_names_of_a_tensor():
    a = b = W

    def change():
        nonlocal b
        b = W * 3

    return lambda x: x * a + b, change


@case(SERVES_ON)
def two_tensors_exchanged():
    a, b = W, W + 1

    def change():
        nonlocal a, b
        a, b = b, a

    return lambda x: x * a - b, change


@case(AGAIN)
def a_closure_of_a_transformed_function():
    k = [2.0]
    g = fxfunc.grad(lambda x: (x * x * k[0]).sum())
    return lambda x: fxfunc.vmap(g)(x.reshape(3, 1)), lambda: k.append(k.pop() + 1)


@case(AGAIN)
def a_closure_of_a_compiled_function():
    k = [2.0]
    g = fxfunc.jit(lambda x: x * k[0])
    return lambda x: g(x), lambda: k.append(k.pop() + 1)


@case(AGAIN)
def a_closure_behind_lru_cache():
    k = [2.0]
    g = functools.lru_cache(lambda: k)
    return lambda x: x * g()[0], lambda: k.append(k.pop() + 1)


@pytest.fixture
def restored():
    """The globals and class attributes that cases change."""
    names = ("GLOBAL_TENSOR", "GLOBAL_NUMBER", "GLOBAL_FUNCTION", "GLOBAL_LIST")
    before, scale = {n: globals()[n] for n in names}, Config.scale
    items = list(GLOBAL_LIST)
    yield
    globals().update(before)
    GLOBAL_LIST[:] = items
    Config.scale = scale


@pytest.mark.parametrize("name", CASES)
def test_semantics_04_closures_are_read_at_every_call(name, restored):
    make, serves_on = CASES[name]
    f, change = make()
    jitted = fxfunc.jit(f)
    first = jitted(X)
    same(first, f(X))
    same(jitted(X), f(X))
    captures = jitted.cache_info().misses
    change()
    assert f(X).dtype != first.dtype or not torch.equal(f(X), first)
    same(jitted(X), f(X))
    assert (jitted.cache_info().misses == captures) == serves_on
    same(jitted(X), f(X))


@pytest.mark.parametrize("name", [n for n, (_, serves_on) in CASES.items() if serves_on])
def test_semantics_04_gradients_are_at_the_values_read(name, restored):
    f, change = CASES[name][0]()
    jitted = fxfunc.jit(fxfunc.grad(lambda x: (f(x) ** 2).sum()))
    for _ in range(2):
        same(jitted(X), torch.func.grad(lambda x: (f(x) ** 2).sum())(X))
        change()
    assert jitted.cache_info().misses == 1


def test_semantics_04_a_training_loop_that_rebinds_its_weights():
    w, lr = W, 0.1

    def loss(v):
        return ((X * v).sin() ** 2).sum()

    step = fxfunc.jit(lambda: w - lr * fxfunc.grad(loss)(w))
    for _ in range(4):
        want = w - lr * torch.func.grad(loss)(w)
        w = step()
        same(w, want)
    lr = 0.2
    same(step(), w - lr * torch.func.grad(loss)(w))
    assert step.cache_info() == (3, 2, 128, 1)


class Stepper:
    def __init__(self, k):
        self.k, self.w = k, W

    @fxfunc.jit
    def step(self, x):
        """Doc."""
        return x * self.k * self.w


def test_semantics_04_attributes_of_an_instance_whose_method_is_compiled():
    a, b = Stepper(2.0), Stepper(3.0)
    for stepper in (a, b, a):
        same(stepper.step(X), X * stepper.k * stepper.w)
    a.k = 5.0
    b.w = W + 1
    for stepper in (a, b):
        same(stepper.step(X), X * stepper.k * stepper.w)
    assert (a.step.__name__, a.step.__doc__) == ("step", "Doc.")


@pytest.mark.parametrize("static", [(), (0,)])
def test_semantics_04_attributes_of_an_object_that_is_an_argument(static):
    c, net = Config(), Net()
    f = fxfunc.jit(lambda c, x: c(x), static_argnums=static)
    for change in (lambda: setattr(c, "k", 4.0), lambda: setattr(c, "w", W * 2), lambda: c.w.add_(1)):
        same(f(c, X), c(X))
        change()
        same(f(c, X), c(X))
    for change in (net.eval, lambda: setattr(net, "k", 4.0), lambda: net.layer.weight.data.mul_(2)):
        same(f(net, X), net(X))
        change()
        same(f(net, X), net(X))


def test_semantics_04_an_argument_that_is_also_closed_over():
    w = W
    f = fxfunc.jit(lambda n, v: v * n + w, static_argnums=0)
    same(f(2, w), W * 3)
    w = W * 10
    same(f(2, W), W * 12)


def test_semantics_04_an_argument_that_died_is_not_mistaken_for_a_new_one():
    f = fxfunc.jit(lambda a, x: x * float(a[0]))
    for k in range(5):
        same(f(np.array([float(k)]), X), X * k)


# ----- SEMANTICS 27: the key ------------------------------------------------------------------------------------------


def facts(x, *rest, **kwargs):
    """What Python code may ask of a tensor and of the state around it, as a number each."""
    flags = (
        x.ndim,
        x.dtype.itemsize,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.get_default_dtype().itemsize,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision() == "high",
        len(rest),
        len(kwargs),
        *(v for v in rest if isinstance(v, (int, float))),
        *kwargs.values(),
    )
    number = sum((k + 1) * float(v) for k, v in enumerate(flags))
    return x.reshape(-1).sum() * 2, torch.full((2,), number, dtype=F64), torch.ones(2)


M = torch.arange(12.0).reshape(3, 4)
ARGUMENTS = {
    "shape": (M, M[:2]),
    "number of axes": (M, M[0]),
    "strides: transposed": (M, torch.arange(12.0).reshape(4, 3).T),
    "strides: expanded": (M, M[:1].expand(3, 4)),
    "strides: sliced": (M, torch.arange(24.0).reshape(3, 8)[:, ::2]),
    "offset": (M.reshape(-1)[:8], M.reshape(-1)[3:11]),
    "dtype": (M, M.double()),
    "integers": (M, M.long()),
    "requires_grad": (M, M.clone().requires_grad_()),
    "type": (M, nn.Parameter(M)),
    "meta device": (M, M.to("meta")),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_semantics_27_a_tensor_of_another_kind_captures_again(kind):
    f, args = fxfunc.jit(facts), ARGUMENTS[kind]
    for x in (*args, *args):
        got, want = f(x), facts(x)
        assert [t.device for t in got] == [t.device for t in want]
        assert x.is_meta or torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert f.cache_info()[:2] == (2, 2)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1),
        lambda x: x.reshape(-1) + 1,
        lambda x: x.view(2, 6).T,
        lambda x: x.flatten().cumsum(0),
    ],
)
def test_semantics_27_reshaping_a_transposed_input_after_a_contiguous_capture(view):
    f = fxfunc.jit(view)
    for x in (M, torch.arange(12.0).reshape(4, 3).T.contiguous(), M.clone()):
        same(f(x), view(x))
    transposed = torch.arange(12.0).reshape(4, 3).T
    same(f(transposed), view(transposed.contiguous()))
    same(f(M), view(M))


def test_semantics_27_conjugate_and_negative_bits():
    z = torch.complex(X, W)
    f = fxfunc.jit(lambda z: torch.view_as_real(z.resolve_conj()) * 2 + z.imag[..., None])
    inputs = (z, z.conj(), z.clone(), z.conj().conj())
    for x in inputs:
        same(f(x), torch.view_as_real(x.resolve_conj()) * 2 + x.imag[..., None])
    assert f.cache_info().misses == 2
    g = fxfunc.jit(lambda x: x * 2)
    for x in (z.imag, z.conj().imag, z.conj().imag.resolve_neg()):
        same(g(x), x * 2)
    assert z.conj().imag.is_neg() and g.cache_info().misses == 3


STATES = {
    "grad mode": (torch.no_grad, torch.enable_grad),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.autocast("cpu", enabled=False)),
    "autocast dtype": (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_semantics_27_a_state_around_the_call_captures_again(state):
    body = lambda x: (x @ x.T, *facts(x))
    f = fxfunc.jit(body)
    for context in STATES[state] * 2:
        with context():
            got, want = f(M), body(M)
        assert [t.dtype for t in got] == [t.dtype for t in want]
        same(got, want)
    assert f.cache_info()[:2] == (2, 2)


SETTINGS = {
    "default dtype": (torch.set_default_dtype, torch.get_default_dtype, F64),
    "default device": (torch.set_default_device, torch.get_default_device, "meta"),
    "deterministic": (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True),
    "matmul precision": (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "high"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_semantics_27_a_global_setting_captures_again(name):
    change, read, value = SETTINGS[name]
    before = None if name == "default device" else read()
    f = fxfunc.jit(facts)
    want = facts(M)
    same(f(M), want)
    try:
        change(value)
        got, new = f(M), facts(M)
        assert [(t.dtype, t.device) for t in got] == [(t.dtype, t.device) for t in new]
        assert name == "default device" or not torch.equal(new[1], want[1])
        assert name == "default device" or torch.equal(got[1], new[1])
    finally:
        change(before)
    same(f(M), want)
    assert f.cache_info()[:2] == (1, 2)


PLAIN = {
    "number of arguments": [((1,), {}), ((1, 1), {})],
    "value": [((1,), {}), ((2,), {})],
    "type": [((1,), {}), ((1.0,), {}), ((True,), {})],
    "sign of zero": [((0.0,), {}), ((-0.0,), {})],
    "keyword": [((), {"a": 1}), ((), {"b": 1})],
    "keyword value": [((), {"a": 1}), ((), {"a": 2})],
    "none": [((None,), {}), ((0,), {})],
    "structure": [(([1, 2],), {}), (((1, 2),), {})],
    "key": [(({"a": 1},), {}), (({"b": 1},), {})],
    "string": [(("a",), {}), (("b",), {})],
}


def tells(x, *args, **kwargs):
    return x * 1, repr((args, kwargs))


@pytest.mark.parametrize("name", PLAIN)
def test_semantics_27_plain_values_are_part_of_the_key(name):
    f, calls = fxfunc.jit(tells), PLAIN[name]
    for args, kwargs in calls * 2:
        assert f(X, *args, **kwargs)[1] == repr((args, kwargs))
    assert f.cache_info()[:2] == (len(calls), len(calls))


STATIC = [2, 2.0, True, (2,), (2.0,), "2", (0.0,), (-0.0,), frozenset({2})]


@pytest.mark.parametrize("how", ["position", "negative position", "name"])
def test_semantics_27_static_values_are_part_of_the_key(how):
    keywords = (
        {"static_argnames": "n"} if how == "name" else {"static_argnums": 1 if how == "position" else -1}
    )
    f = fxfunc.jit(lambda x, n: (x, repr(n)), **keywords)
    for n in STATIC * 2:
        got = f(X, n=n) if how == "name" else f(X, n)
        assert got[1] == repr(n)
    assert f.cache_info()[:2] == (len(STATIC), len(STATIC))


def test_semantics_27_the_training_flag_is_part_of_what_holds():
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5))
    f = fxfunc.jit(lambda x: (net(x) == 0).any())
    assert f(X.float()) and net.eval() and not f(X.float()) and net.train() and f(X.float())


# ----- the cache ------------------------------------------------------------------------------------------------------


def test_cache_size_bounds_and_drops_the_least_recently_used():
    f = fxfunc.jit(lambda x: x * 2, cache_size=2)
    for n in (1, 2, 1, 3, 1, 2):  # the 3 drops the 2, which is captured again
        same(f(torch.ones(n)), torch.full((n,), 2.0))
    assert f.cache_info() == (2, 4, 2, 2)
    f.clear_cache()
    assert f.cache_info() == (0, 0, 2, 0)
    same(f(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("size, kept", [(0, 0), (1, 1), (None, 5)])
def test_cache_sizes(size, kept):
    f = fxfunc.jit(lambda x: x + 1, cache_size=size)
    for n in range(5):
        same(f(torch.zeros(n)), torch.ones(n))
    assert f.cache_info() == (0, 5, size, kept)


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, W, (W,)], ids=lambda v: type(v).__name__)
def test_static_values_must_be_hashable_by_value(value):
    for f, call in (
        (fxfunc.jit(lambda x, n: x, static_argnums=1), lambda f: f(X, value)),
        (fxfunc.jit(lambda x, n: x, static_argnames="n"), lambda f: f(X, n=value)),
    ):
        with pytest.raises(errors.TypeOfArgument, match="jit: the static argument .* cannot be hashed"):
            call(f)
        assert f.cache_info().currsize == 0


def test_static_arguments_between_others():
    f = lambda a, op, b, *, flip, scale=1: getattr(torch, op)(*((b, a) if flip else (a, b))) * scale
    jitted = fxfunc.jit(f, static_argnums=(1,), static_argnames=("flip", "scale"))
    for op, flip in (("sub", False), ("sub", True), ("mul", False), ("sub", False)):
        same(jitted(X, op, W, flip=flip), f(X, op, W, flip=flip))
        same(jitted(X, op, W, flip=flip, scale=3), f(X, op, W, flip=flip, scale=3))
    assert jitted.cache_info()[:2] == (2, 6)


class Broken(Exception):
    pass


def test_an_exception_leaves_the_cache_and_the_tracing_clean():
    broken = True

    def f(x):
        if broken:
            y = x * 2
            raise Broken(y.shape)
        return x * 3

    jitted = fxfunc.jit(f)
    same(jitted(torch.ones(2)) if not broken else torch.zeros(1), torch.zeros(1))
    for _ in range(2):
        with pytest.raises(Broken):
            jitted(X)
        assert jitted.cache_info() == (0, 0, 128, 0)
        assert not isinstance(X * 2, fxfunc.passes.tracer.Tracer)
    broken = False
    same(jitted(X), X * 3)
    broken = True
    with pytest.raises(Broken):
        jitted(X)
    broken = False
    same(jitted(X), X * 3)


def test_an_exception_of_a_nested_transform_leaves_the_tracing_clean():
    with pytest.raises(errors.NonScalarOutput):
        fxfunc.jit(fxfunc.vmap(fxfunc.grad(lambda x: x.reshape(1))))(X)
    same(torch.func.grad(lambda x: (x**2).sum())(X), 2 * X)
    same(fxfunc.jit(fxfunc.grad(lambda x: (x**2).sum()))(X), 2 * X)


# ----- results, writes ------------------------------------------------------------------------------------------------


def test_results_that_are_not_tensors():
    marker = object()
    f = fxfunc.jit(
        lambda x: {"y": x * 2, "n": 3, "s": ["text", None, 2.5, True], "o": marker, "t": (), "shape": x.shape}
    )
    for _ in range(2):
        got = f(X)
        same(got.pop("y"), X * 2)
        assert got == {"n": 3, "s": ["text", None, 2.5, True], "o": marker, "t": (), "shape": X.shape}
    assert fxfunc.jit(lambda x: None)(X) is None
    assert fxfunc.jit(lambda x: 5)(X) == 5


def test_results_belong_to_the_caller():
    """Changing a result changes neither the next result nor a constant of the compiled function."""
    f = fxfunc.jit(lambda x: {"y": x * 2, "c": torch.tensor([1.0, 2.0]), "z": torch.zeros(2), "l": [1]})
    first = f(X)
    first["y"].zero_(), first["c"].zero_(), first["z"].add_(1), first["l"].append(2)
    second = f(X)
    same(second["y"], X * 2)
    same((second["c"], second["z"]), (torch.tensor([1.0, 2.0]), torch.zeros(2)))
    assert second["l"] == [1]


def swap(a, b):
    t = a.clone()
    a.copy_(b)
    b.copy_(t)
    return t


def old_and_new(a, b):
    old = a.clone()
    a.add_(b)
    return old, a * 1, a[1:] * b[:2]


def through_a_view(a, b):
    a[1:].mul_(b[:2])
    a[0] = 7.0
    return a.sum()


def twice(a, b):
    a.add_(1)
    y = a * b
    a.mul_(3)
    return y


def nothing_else(a, b):
    a.sub_(b)


def a_result_that_is_the_argument(a, b):
    return a.mul_(b)


WRITES = [swap, old_and_new, through_a_view, twice, nothing_else, a_result_that_is_the_argument]


@pytest.mark.parametrize("f", WRITES, ids=lambda f: f.__name__)
def test_writes_to_arguments_happen(f):
    jitted = fxfunc.jit(f)
    got, want = (X.clone(), W.clone()), (X.clone(), W.clone())
    for _ in range(3):
        same(jitted(*got), f(*want))
        same(got, want)
    assert jitted.cache_info().misses == 1


@pytest.mark.parametrize("f", WRITES, ids=lambda f: f.__name__)
def test_writes_to_closures_happen(f):
    a, b = X.clone(), W.clone()
    jitted = fxfunc.jit(lambda: f(a, b))
    want = (X.clone(), W.clone())
    for _ in range(3):
        same(jitted(), f(*want))
        same((a, b), want)


def test_writes_of_inner_compiled_functions_and_of_transforms_happen():
    @fxfunc.jit
    def inner(a, b):
        a.add_(b)
        return a * 2

    outer = fxfunc.jit(lambda a, b: (inner(a, b), fxfunc.vmap(lambda p, q: p.mul_(q) + 1)(b, a)))
    got, want = (X.clone(), W.clone()), (X.clone(), W.clone())
    same(outer(*got), ((want[0].add_(want[1]) * 2), want[1].mul_(want[0]) + 1))
    same(got, want)


@pytest.mark.parametrize("alias", [lambda x: x, lambda x: x[1:2], lambda x: x.detach()])
def test_writes_to_memory_that_two_inputs_share_are_refused(alias):
    x = X.clone()
    with pytest.raises(errors.NotSupported, match="shares memory.*clone"):
        fxfunc.jit(lambda a, b: (a.add_(1), b * 2)[1])(x, alias(x))
    same(x, X)
    same(fxfunc.jit(lambda a, b: a + b)(x, alias(x)), x + alias(x))


def test_writes_are_seen_by_ordinary_autograd():
    def gradient(wrap):
        x = X.clone().requires_grad_()
        y = x * 1
        z = wrap(lambda y: y.mul_(2) * 3)(y)
        (y.sin().sum() + z.sum()).backward()
        return x.grad

    same(gradient(fxfunc.jit), gradient(lambda f: f))


def test_an_optimizer_step_inside():
    def run(wrap):
        net = Net()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel(), dtype=F64).reshape(p.shape))

        def step(x):
            names = dict(net.named_parameters())
            T = fxfunc if wrap is fxfunc.jit else torch.func
            loss = lambda p: T.functional_call(net, p, x).square().sum()
            grads = T.grad(loss)({k: p.detach() for k, p in names.items()})
            with torch.no_grad():
                for k, p in names.items():
                    p.sub_(0.01 * grads[k])

        step = wrap(step)
        for _ in range(3):
            step(X)
        return {k: v.detach() for k, v in net.state_dict().items()}

    same(run(fxfunc.jit), run(lambda f: f))


# ----- nesting, methods, threads --------------------------------------------------------------------------------------


def test_compiled_functions_inside_transforms_and_the_other_way_round():
    f = lambda x: (x.sin() * W).sum()
    jitted = fxfunc.jit(f)
    for program in (
        lambda T, f: T.grad(f)(X),
        lambda T, f: T.hessian(f)(X),
        lambda T, f: T.vmap(T.grad(f))(torch.stack([X, W])),
        lambda T, f: T.jvp(f, (X,), (W,)),
        lambda T, f: T.jacrev(lambda x: x * f(x))(X),
    ):
        want = program(torch.func, f)
        same(program(fxfunc, jitted), want)
        same(fxfunc.jit(lambda x, program=program: program(fxfunc, jitted))(X), want)
    assert jitted.cache_info() == (0, 0, 128, 0)  # each was part of another capture


def test_backward_through_a_compiled_function():
    x = X.clone().requires_grad_()
    f = fxfunc.jit(lambda x: (x * W).sin())
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))
    assert f.cache_info().misses == 1


def test_compiled_methods():
    a = Stepper(2.0)
    same(a.step(X), X * 2 * W)
    same(Stepper.step(a, X), X * 2 * W)
    same(fxfunc.vmap(a.step, 0)(torch.stack([X, W])), torch.stack([X, W]) * 2 * W)
    assert a.step.cache_info is not None and Stepper.step.cache_info().misses >= 1


@pytest.mark.parametrize(
    "f",
    [Config(), functools.partial(torch.mul, W), Net(), torch.sin, Config().method],
    ids=["callable", "partial", "module", "builtin", "method"],
)
def test_kinds_of_functions(f):
    jitted = fxfunc.jit(f)
    for _ in range(2):
        same(jitted(X), f(X))
    assert jitted.cache_info()[:2] == (1, 1)


def in_threads(count, work):
    """Run work(k) at once in threads; what they raised is raised here."""
    failures, barrier = [], threading.Barrier(count)

    def run(k):
        try:
            barrier.wait()
            work(k)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


def test_one_compiled_function_in_four_threads():
    """Captures, hits and evictions at once: a cache of two signatures, of which four are wanted."""
    f = fxfunc.jit(fxfunc.vmap(fxfunc.grad(lambda x: (x.sin() * x).sum())), cache_size=2)

    def work(k):
        for i in range(12):
            n = (k + i) % 4 + 1
            x = torch.linspace(0, 1, 3 * n, dtype=F64).reshape(n, 3)
            same(f(x), x.cos() * x + x.sin())

    in_threads(4, work)
    hits, misses, _, size = f.cache_info()
    assert hits + misses == 48 and size == 2


def test_other_threads_are_not_part_of_a_capture():
    """While one thread captures, tensors of another are ordinary ones, and its grad mode is its own."""
    inside, done = threading.Event(), threading.Event()

    def slow(x):
        inside.set()
        assert done.wait(30)
        return x * 2

    def work(k):
        if k == 0:
            same(fxfunc.jit(slow)(X), X * 2)
            return
        assert inside.wait(30)
        try:
            y = X * 3
            assert type(y) is torch.Tensor and y.tolist() and torch.is_grad_enabled()
            same(fxfunc.jit(fxfunc.grad(lambda x: (x**2).sum()))(X), 2 * X)
        finally:
            done.set()

    in_threads(2, work)


def test_a_compiled_call_takes_the_structure_it_was_made_for():
    f = lambda d, xs: d["a"] * xs[0] + xs[1]["b"]
    d, xs = {"a": X, "c": 2.0}, [X, {"b": W}]
    call = fxfunc.jit(f).lower(d, xs).compile()
    same(call(d, xs), f(d, xs))
    same(call(dict(d), list(xs)), f(d, xs))
    others = [
        ({"c": 2.0, "a": X}, xs), ({"a": X}, xs), ({"a": X, "c": 3.0}, xs), ({"a": X, "c": 2}, xs), ({"a": [X], "c": 2.0}, xs),
        (collections.OrderedDict(d), xs), (d, tuple(xs)), (d, [X, {"b": 1.0}]), (d, [X, [W]]), (d, [X]), (d,), (d, xs, X),
        (d, [X[:2], {"b": W}]), (d, [X.float(), {"b": W}]),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(errors.StructureMismatch):
            call(*other)
    with pytest.raises(errors.StructureMismatch):
        call(d, xs=xs)
