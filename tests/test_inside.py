"""What captured code may do that torch.func's code may: ask for values, and call torch.autograd.grad."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import fxfunc
from fxfunc import errors


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(math.prod(shape)))


X, W = random(5), random(5, 5)


# ----- values ---------------------------------------------------------------------------------------------------------


def branches(x):
    return (x.sin() if x.sum() > 0 else x.cos()).sum()


def loops(x):
    while x.abs().max() > 0.1:
        x = x * x.tanh() * 0.5
    return x.sum()


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clamp(max=x.mean().item())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, ct):
        return ct * 3


VALUES = {
    "branch": branches,
    "loop": loops,
    "item": lambda x: (x * x[0].item()).sum(),
    "float": lambda x: (x * float(x.max())).sin().sum(),
    "mask": lambda x: x[x > 0].pow(2).sum(),
    "masked_select": lambda x: torch.masked_select(x, x < 0.5).exp().sum(),
    "nonzero": lambda x: x[(x > 0).nonzero().squeeze(1)].sin().sum(),
    "size": lambda x: x.sum() * x[x > 0].numel(),
    "assign to a mask": lambda x: torch.zeros_like(x).masked_fill(x > 0, 1.0).mul(x).sum(),
    "index_put": lambda x: _assigned(x).sin().sum(),
    "tolist": lambda x: (x * torch.tensor(x.tolist()[:1]).double()).sum(),
    "tensor of tensors": lambda x: (x * torch.tensor([x[0], x[1], 1, 2, 3])).sum(),
    "one_hot": lambda x: (torch.nn.functional.one_hot(x.argsort()).to(x.dtype) @ x).sin().sum(),
    "view of a write": lambda x: _through_a_view(x),
    "dropout": lambda x: (nn.functional.dropout(x, 0.5) * (1 if x.sum() > 0 else 2)).sum(),
    "closure": lambda x: x.sum() * (W[0, 0].item() + (1 if (W > 0).any() else 2)),
    "inverse": lambda x: torch.linalg.inv(x.diag() + (1 if x.sum() > 0 else 2) * W).sum(),
    "repeat": lambda x: x.repeat_interleave((x > 0).int() + 1).sin().sum(),
}


def _assigned(x):
    y = x.clone()
    y[x > 0] = x[x > 0] * 2
    return y


def _through_a_view(x):
    y = x.clone()
    y[:2].mul_(3)
    return (y * (1 if y[0] > 0 else -1)).sin().sum()


TRANSFORMS = {
    "grad": lambda api, f: api.grad(f)(X),
    "value": lambda api, f: api.grad_and_value(f)(X),
    "vjp": lambda api, f: api.vjp(f, X)[1](torch.tensor(2.0, dtype=X.dtype)),
    "jvp": lambda api, f: api.jvp(f, (X,), (X.cos(),)),
    "second": lambda api, f: api.grad(lambda x: api.grad(f)(x).sin().sum())(X),
    "jvp of grad": lambda api, f: api.jvp(api.grad(f), (X,), (X.cos(),)),
    "no_grad": lambda api, f: _under_no_grad(api, f),
    "jacrev": lambda api, f: api.jacrev(f)(X),
    "jacfwd": lambda api, f: api.jacfwd(f, randomness="same")(X),
    "map inside": lambda api, f: api.grad(lambda x: f(x) + api.vmap(torch.sin)(x).sum())(X),
}


def _under_no_grad(api, f):
    with torch.no_grad():
        return api.grad(f)(X)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", VALUES)
def test_code_that_asks_for_values(function, transform):
    torch.manual_seed(0)
    ours = TRANSFORMS[transform](fxfunc, VALUES[function])
    torch.manual_seed(0)
    torch.testing.assert_close(ours, TRANSFORMS[transform](torch.func, VALUES[function]))


def test_another_value_takes_the_other_branch():
    f = fxfunc.grad(branches)
    torch.testing.assert_close((f(X.abs()), f(-X.abs())), (X.abs().cos(), -(-X.abs()).sin()))


def test_a_rule_of_the_user_that_asks_for_values():
    torch.testing.assert_close(fxfunc.grad(lambda x: Clipped.apply(x).sum())(X), 3 * torch.ones_like(X))


def test_semantics_25_what_is_drawn_while_values_are_asked_for_is_drawn_once():
    def f(x):
        noise = torch.rand(5, dtype=x.dtype)
        return (x * noise).sum() if noise[0] < 2 else x.sum()

    torch.manual_seed(1)
    gradient = fxfunc.grad(f)(X)
    after = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close((gradient, after), (torch.rand(5, dtype=X.dtype), torch.rand(3)))


def test_semantics_25_arguments_are_not_written_to_while_values_are_asked_for():
    """A write that is refused has not happened to the argument either."""
    x = X.clone()

    def f(x, write):
        y = x if write else x.clone()
        y.add_(1)
        return y.sum() if y[0] > 0 else -y.sum()

    fxfunc.grad(f)(x, False)
    with pytest.raises(errors.MutatedCapture):
        fxfunc.grad(f)(x, True)
    torch.testing.assert_close(x, X)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fxfunc.vmap(branches)(W),
        lambda: fxfunc.vmap(fxfunc.grad(branches))(W),
        lambda: fxfunc.grad(lambda w: fxfunc.vmap(branches)(w).sum())(W),
        lambda: fxfunc.jit(branches)(X),
        lambda: fxfunc.jit(fxfunc.grad(branches))(X),
        lambda: fxfunc.make_graph(fxfunc.grad(branches))(X),
    ],
)
def test_a_graph_that_is_used_again_or_for_many_examples_has_no_values(call):
    with pytest.raises(errors.ValueDependent, match="depends on the value"):
        call()


def test_a_value_of_one_example_is_no_value_but_a_closure_has_one():
    f = lambda w: fxfunc.vmap(lambda row: row.sum() * (1.0 if W[0, 0] > 0 else 2.0))(w).sum()
    torch.testing.assert_close(fxfunc.grad(f)(W), torch.full_like(W, 1.0 if W[0, 0] > 0 else 2.0))


# ----- torch.autograd.grad ----------------------------------------------------------------------------------------------


def inner(x, **how):
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad((x.sin() * x).sum(), x, **how)[0]


def energy(x):
    return (x.sin().exp() * W.diag()).sum()


def force(x):
    return -torch.autograd.grad(energy(x), x, create_graph=True)[0]


def unrolled(w):
    for _ in range(3):
        w = w - 0.1 * torch.autograd.grad((w.tanh() * X).sum(), w, create_graph=True)[0]
    return w.sin().sum()


def dependent(x):
    y = x.sin()
    z = y * x
    dx, dy = torch.autograd.grad((z * y).sum(), (x, y), create_graph=True)
    return (dx * dy.cos()).sum()


def with_cotangent(x):
    y = x.sin()
    return torch.autograd.grad(y, x, grad_outputs=x.cos(), create_graph=True)[0].sum()


def of_a_draw(x):
    return (
        torch.autograd.grad((nn.functional.dropout(x, 0.5) ** 2).sum(), x, create_graph=True)[0].sin().sum()
    )


AUTOGRAD = {
    "force": lambda x: force(x).pow(2).sum(),
    "unrolled": unrolled,
    "dependent": dependent,
    "cotangent": with_cotangent,
    "constant": lambda x: (inner(x) * x).sum(),
    "twice": lambda x: torch.autograd.grad(force(x).sum(), x, create_graph=True)[0].sin().sum(),
    "unused": lambda x: (
        x.sum() if torch.autograd.grad(x.sum(), (x, x.cos()), allow_unused=True)[1] is None else x
    ),
    "writes": lambda x: torch.autograd.grad(_assigned_part(x), x, create_graph=True)[0].sin().sum(),
    "draw": of_a_draw,
}


def _assigned_part(x):
    y = x * 1
    y[1:].mul_(x[:-1])
    return y.sin().sum()


@pytest.mark.parametrize("transform", ["grad", "value", "vjp", "jvp", "second", "jvp of grad", "no_grad"])
@pytest.mark.parametrize("function", AUTOGRAD)
def test_autograd_grad_inside(function, transform):
    if transform == "jvp":  # there x does not require grad, and torch.func cannot make it
        with pytest.raises(RuntimeError, match="require"):
            TRANSFORMS[transform](torch.func, AUTOGRAD[function])
        return
    outcomes = []
    for api in (torch.func, fxfunc):
        torch.manual_seed(0)
        outcomes.append(TRANSFORMS[transform](api, AUTOGRAD[function]))
    torch.testing.assert_close(outcomes[1], outcomes[0])


def test_autograd_grad_in_a_map_gives_each_example_its_own():
    per_example = lambda x: force(x.clone().requires_grad_())
    expected = torch.stack([fxfunc.grad(lambda x: -energy(x))(x) for x in W])
    torch.testing.assert_close(fxfunc.vmap(per_example)(W), expected)
    torch.testing.assert_close(fxfunc.jit(fxfunc.vmap(per_example))(W), expected)


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda x: torch.autograd.grad(x.sin(), x)[0], "scalar"),
        (lambda x: torch.autograd.grad(torch.ones(()), x)[0], "no part"),
        (lambda x: torch.autograd.grad(x.sum(), x.clone())[0], "no part"),
        (lambda x: torch.autograd.grad(x.sum(), x, is_grads_batched=True)[0], "is_grads_batched"),
        (lambda x: x.sum().backward(), "backward"),
    ],
)
def test_autograd_calls_that_are_refused(f, message):
    with pytest.raises(RuntimeError, match=message):
        fxfunc.grad(lambda x: f(x).sum())(X)


def test_a_mask_that_broadcasts_selects_from_copies():
    f = lambda x: torch.masked_select(x, torch.stack([x > 0, x < 0.5])).exp().sum()
    torch.testing.assert_close(fxfunc.grad(f)(X), torch.func.grad(f)(X))


# ----- torch.utils.checkpoint -----------------------------------------------------------------------------------------

LAYERS = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double()
SHIFT = nn.Parameter(random(5))


def _block(x, scale=2.0):
    return (LAYERS(x) * SHIFT * scale + x).exp()


def _kept_sines():
    return create_selective_checkpoint_contexts([torch.ops.aten.tanh.default])


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "reentrant, rng not kept": {"use_reentrant": True, "preserve_rng_state": False},
    "hooks": {"use_reentrant": False},
    "hooks, rng not kept": {"use_reentrant": False, "preserve_rng_state": False},
    "keyword of the function": {"use_reentrant": False, "scale": 3.0},
    "selective": {"use_reentrant": False, "context_fn": _kept_sines},
}
NESTINGS = TRANSFORMS | {
    "hessian": lambda api, f: api.hessian(f)(X),
    "vmap of grad": lambda api, f: api.vmap(api.grad(f), randomness="same")(torch.stack([X, X.sin()])),
    "grad of vmap": lambda api, f: api.grad(lambda xs: api.vmap(f, randomness="same")(xs).pow(2).sum())(
        torch.stack([X, X.sin()])
    ),
    "jit": lambda api, f: (fxfunc.jit if api is fxfunc else lambda g: g)(api.grad(f))(X),
}


@pytest.mark.parametrize("transform", NESTINGS)
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_checkpoint_is_the_function(how, transform):
    options = CHECKPOINTS[how]
    plain = lambda x: _block(x, options.get("scale", 2.0)).sum()
    kept = lambda x: checkpoint(_block, x, **options).sum()
    torch.testing.assert_close(NESTINGS[transform](fxfunc, kept), NESTINGS[transform](torch.func, plain))


@pytest.mark.parametrize("transform", NESTINGS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_sequence_of_checkpoints_is_the_sequence(use_reentrant, transform):
    kept = lambda x: checkpoint_sequential(LAYERS, 2, x, use_reentrant=use_reentrant).sum()
    plain = lambda x: LAYERS(x).sum()
    torch.testing.assert_close(NESTINGS[transform](fxfunc, kept), NESTINGS[transform](torch.func, plain))


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("transform", ["grad", "second", "jvp of grad", "jit", "vmap of grad"])
def test_a_checkpoint_draws_once(transform, use_reentrant, preserve):
    def plain(x):
        return (nn.functional.dropout(x.sin(), 0.5) * x).pow(2).sum()

    def kept(x):
        return checkpoint(plain, x, use_reentrant=use_reentrant, preserve_rng_state=preserve)

    results = []
    for f in (kept, plain):
        torch.manual_seed(3)
        results.append((NESTINGS[transform](fxfunc, f), torch.rand(2)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_reads_its_parameters_anew_and_has_their_gradients(use_reentrant):
    layer = nn.Linear(5, 5).double()
    loss = lambda p: checkpoint(
        lambda x: fxfunc.functional_call(layer, p, (x,)).tanh().sum(), X, use_reentrant=use_reentrant
    )
    gradient = fxfunc.jit(fxfunc.grad(loss))
    for factor in (1.0, 2.0):
        params = {k: v.detach() * factor for k, v in layer.named_parameters()}
        plain = lambda p: torch.func.functional_call(layer, p, (X,)).tanh().sum()
        torch.testing.assert_close(gradient(params), torch.func.grad(plain)(params))


def test_checkpoints_outside_of_a_capture_are_torchs_own():
    x = X.clone().requires_grad_()
    fxfunc.grad(lambda x: checkpoint(_block, x, use_reentrant=True).sum())(X)
    y = checkpoint(torch.sin, x, use_reentrant=True)
    assert type(y.grad_fn).__name__ == "CheckpointFunctionBackward"


# ----- tensors that a capture cannot stand for ------------------------------------------------------------------------


class Doubled(torch.Tensor):
    """A wrapper whose every result is twice that of its tensor."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return cls(func(*plain[0], **plain[1]) * 2)

    __repr__ = object.__repr__


class Swapped(torch.Tensor):
    """A tensor to which the sine is the cosine."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(torch.cos if func is torch.sin else func, types, args, kwargs or {})


FOREIGN = {
    "wrapper": (lambda: Doubled(X), "Doubled"),
    "functions": (lambda: X.as_subclass(Swapped), "Swapped"),
    "masked": (lambda: torch.masked.masked_tensor(X, X > 0), "MaskedTensor"),
    "sparse": (lambda: W.to_sparse(), "sparse_coo"),
    "csr": (lambda: W.to_sparse_csr(), "sparse_csr"),
    "quantized": (lambda: torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8), "quantized"),
    "nested": (lambda: torch.nested.nested_tensor([X, X[:2]]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), "nested"),
}
HANDED = {
    "grad": lambda t: fxfunc.grad(lambda x: x.sin().sum())(t),
    "vjp": lambda t: fxfunc.vjp(torch.sin, t),
    "jvp": lambda t: fxfunc.jvp(torch.sin, (t,), (t,)),
    "vmap": lambda t: fxfunc.vmap(torch.sin)(t),
    "hessian": lambda t: fxfunc.hessian(lambda x: x.sin().sum())(t),
    "jit": lambda t: fxfunc.jit(torch.sin)(t),
    "scan": lambda t: fxfunc.scan(lambda c, x: (c, x), t, X),
    "cond": lambda t: fxfunc.cond(X.sum() > 0, torch.sin, torch.cos, t),
    "closure of grad": lambda t: fxfunc.grad(lambda x: (torch.sin(t) * x).sum())(X),
    "closure of vmap of grad": lambda t: fxfunc.vmap(fxfunc.grad(lambda x: (torch.sin(t) * x).sum()))(W),
    "closure of jit": lambda t: fxfunc.jit(lambda x: torch.sin(t) * x)(X),
    "no_grad": lambda t: torch.no_grad()(fxfunc.grad(lambda x: (torch.sin(t) * x).sum()))(X),
}


@pytest.fixture(scope="module")
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("handed", HANDED)
def test_distributed_tensors_are_refused_by_name(mesh, handed):
    with pytest.raises(errors.NotSupported, match="DTensor") as caught:
        HANDED[handed](distribute_tensor(X, mesh))
    assert "test_inside.py" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("handed", HANDED)
@pytest.mark.parametrize("kind", FOREIGN)
def test_tensors_of_another_meaning_are_refused_by_name(kind, handed):
    make, name = FOREIGN[kind]
    with pytest.raises(errors.NotSupported, match=name) as caught:
        HANDED[handed](make())
    assert "test_inside.py" in str(caught.value)


@pytest.mark.parametrize("wrap", [nn.Parameter, nn.Buffer])
def test_parameters_and_buffers_are_tensors(wrap):
    f = lambda x, w: (x * w).sin().sum()
    w = wrap(W[0])
    torch.testing.assert_close(fxfunc.grad(f, (0, 1))(X, w), torch.func.grad(f, (0, 1))(X, W[0]))
    torch.testing.assert_close(fxfunc.jit(fxfunc.grad(lambda x: f(x, w)))(X), torch.func.grad(f)(X, W[0]))
