"""Modules and functions of torch.nn inside transforms: values, both modes, second order and vmap of each.

The reference is ordinary autograd, and central differences of its gradients: torch.func has no second order through fused
attention, none through recurrent cells.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import fxfunc
from fxfunc import errors

F64 = torch.float64
T, B, D, H = 3, 2, 4, 3


def wave(*shape, shift=0.0):
    """Distinct numbers in (-1, 1)."""
    return (torch.arange(math.prod(shape), dtype=F64) * 0.7 + 0.3 + shift).sin().reshape(shape)


def made(make, *args, **kwargs):
    """A module in float64 with weights that no generator decides."""
    module = make(*args, **kwargs).double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(wave(*p.shape, shift=0.37 * i) * 0.7)
    return module


# ----- what is called -------------------------------------------------------------------------------------------------


def recurrent(cell, shape=(T, B, D), **options):
    module = made(cell, D, H, **options)

    def f(x):
        out, state = module(x)
        hidden = state if isinstance(state, tuple) else (state,)
        return out.sin().sum() + sum(h.pow(2).sum() for h in hidden)

    return f, wave(*shape)


def stepped(cell):
    module = made(cell, D, H)

    def f(x):
        state = None
        for row in x:
            state = module(row, state)
        return (state[0] * state[1] if isinstance(state, tuple) else state).sin().sum()

    return f, wave(T, B, D)


def encoder(training, mask=None, grad=True, **options):
    layer = made(nn.TransformerEncoderLayer, D, 2, 8, dropout=0.0, batch_first=True, **options)
    layer.train(training).requires_grad_(grad)
    return (lambda x: layer(x, **(mask or {})).sin().sum()), wave(B, T, D)


def whole_encoder(training):
    layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
    stack = made(nn.TransformerEncoder, layer, 2).train(training)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    return (lambda x: stack(x, src_key_padding_mask=padding)[:, :2].sin().sum()), wave(B, T, D)


def decoder(training):
    layer = made(nn.TransformerDecoderLayer, D, 2, 8, dropout=0.0, batch_first=True).train(training)
    return (lambda x: layer(x, x.cos(), tgt_is_causal=True, tgt_mask=CAUSAL).sin().sum()), wave(B, T, D)


CAUSAL = torch.full((T, T), -math.inf, dtype=F64).triu(1)
KEEP = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])


def multihead(training=True, grad=True, **call):
    module = made(nn.MultiheadAttention, D, 2, batch_first=True).train(training).requires_grad_(grad)

    def f(x):
        out, weights = module(x, x.cos(), x.sin(), **call)
        return out.sin().sum() + (0 if weights is None else weights.pow(2).sum())

    return f, wave(B, T, D)


def attention(heads=2, groups=2, **options):
    def f(x):
        q = x[:, :heads]
        k, v = x[:, :groups].cos() * 2, x[:, :groups].exp()
        return F.scaled_dot_product_attention(q, k, v, **options).sin().sum()

    return f, wave(B, 2, T, D)


def normalized(module, shape=(5, D)):
    module = made(lambda: module)

    def f(x):
        buffers = {k: v.clone() for k, v in module.named_buffers()}
        state = {**dict(module.named_parameters()), **buffers}
        out = fxfunc.functional_call(module, state, (x,))
        return out.sin().sum() + sum(b.double().sin().sum() for b in buffers.values())

    return f, wave(*shape)


class Tied(nn.Module):
    """An encoder and a decoder with one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(D, D), nn.Linear(D, D)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


def tied(w):
    state = {"encode.weight": w, "encode.bias": wave(D), "decode.bias": wave(D, shift=1.0)}
    return fxfunc.functional_call(TIED, state, (wave(2, D),)).sin().sum()


TIED = made(Tied)


def embedded(**options):
    index = torch.tensor([[0, 2, 2], [1, 0, 3]])
    return (lambda w: F.embedding(index, w, **options).pow(3).sum()), wave(4, D)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


def parametrized(register, state="parametrizations.weight.original"):
    """The loss as a function of what a parametrized weight is made from."""
    layer = made(nn.Linear, D, D)
    register(layer)
    layer.eval()
    name = next(k for k, _ in layer.named_parameters() if k.startswith(state))
    f = lambda w: fxfunc.functional_call(layer, {name: w}, (wave(2, D),)).sin().sum()
    return f, dict(layer.named_parameters())[name].detach().clone()


def as_vector(v):
    pointers = dict(TIED.encode.named_parameters())
    sizes = [p.numel() for p in pointers.values()]
    state = {k: c.reshape(p.shape) for (k, p), c in zip(pointers.items(), v.split(sizes), strict=True)}
    again = nn.utils.parameters_to_vector(state.values())
    return fxfunc.functional_call(TIED.encode, state, (wave(2, D),)).sin().sum() + (again * v).sum()


CASES = {
    **{
        f"{cell.__name__} {name}": recurrent(cell, **options)
        for cell in (nn.LSTM, nn.GRU, nn.RNN)
        for name, options in {
            "": {},
            "batch_first": {"batch_first": True, "shape": (B, 2, D)},
            "bidirectional of 2": {"bidirectional": True, "num_layers": 2, "shape": (2, B, D)},
            "unbatched": {"bias": False, "shape": (2, D)},
        }.items()
    },
    "RNN relu": recurrent(nn.RNN, nonlinearity="relu"),
    "LSTM proj": recurrent(nn.LSTM, proj_size=2),
    **{f"{cell.__name__}": stepped(cell) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "encoder train": encoder(True),
    "encoder eval": encoder(False),
    "encoder eval frozen": encoder(False, grad=False),
    "encoder eval gelu norm_first": encoder(False, activation="gelu", norm_first=True),
    "encoder eval causal": encoder(False, mask={"src_mask": CAUSAL, "is_causal": True}),
    "encoder eval masked": encoder(False, mask={"src_mask": ~KEEP}),
    "encoders eval": whole_encoder(False),
    "encoders train": whole_encoder(True),
    "decoder": decoder(True),
    "multihead": multihead(),
    "multihead eval": multihead(False),
    "multihead eval frozen": multihead(False, grad=False),
    "multihead eval frozen no weights": multihead(False, grad=False, need_weights=False),
    "multihead no weights": multihead(need_weights=False),
    "multihead mask": multihead(attn_mask=CAUSAL),
    "multihead padding": multihead(key_padding_mask=torch.tensor([[False, False, True]] * B)),
    "sdpa": attention(),
    "sdpa bool mask": attention(attn_mask=KEEP),
    "sdpa float mask": attention(attn_mask=wave(T, T, shift=2.0)),
    "sdpa causal": attention(is_causal=True),
    "sdpa scale": attention(scale=0.3),
    "sdpa gqa": attention(groups=1, enable_gqa=True),
    "batch norm": normalized(nn.BatchNorm1d(D)),
    "batch norm eval": normalized(nn.BatchNorm1d(D).eval()),
    "batch norm 2d": normalized(nn.BatchNorm2d(2), (2, 2, 2, 3)),
    "instance norm": normalized(nn.InstanceNorm1d(2, affine=True, track_running_stats=True), (2, 2, 4)),
    "layer norm": normalized(nn.LayerNorm(D)),
    "rms norm": normalized(nn.RMSNorm(D)),
    "group norm": normalized(nn.GroupNorm(2, 4), (2, 4, 3)),
    "tied": (tied, wave(D, D)),
    "embedding": embedded(),
    "embedding padding": embedded(padding_idx=2),
    "embedding sparse": embedded(sparse=True),
    "parametrize": parametrized(lambda m: parametrize.register_parametrization(m, "weight", Symmetric())),
    "weight_norm": parametrized(parametrizations.weight_norm, "parametrizations.weight.original1"),
    "old weight_norm": parametrized(nn.utils.weight_norm, "weight_v"),
    "spectral_norm": parametrized(parametrizations.spectral_norm),
    "orthogonal": parametrized(lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")),
    "vector": (as_vector, wave(D * D + D)),
}

DEEP = ("LSTM bidirectional of 2", "GRU bidirectional of 2", "encoders eval", "decoder")
A_SIXTH = [  # the other modules in the slow suite
    case if i % 6 == 0 and case not in DEEP else pytest.param(case, marks=pytest.mark.slow)
    for i, case in enumerate(CASES)
]


def reference(f, x):
    """The gradient by ordinary autograd."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x)
    return g.to_dense() if g.is_sparse else g


def difference(f, x, v, h=1e-5):
    """The derivative of the gradient along v, and that of this one's sine."""
    return (reference(f, x + h * v) - reference(f, x - h * v)) / (2 * h)


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in DEEP else c for c in CASES])
def test_values_and_both_modes(case):
    f, x = CASES[case]
    v, want, g = x.cos(), f(x).detach(), reference(f, x)
    close(fxfunc.jit(f)(x).detach(), want)
    close(fxfunc.grad_and_value(f)(x), (g, want))
    y, pull = fxfunc.vjp(f, x)
    close((y, pull(torch.tensor(2.0, dtype=F64))[0]), (want, 2 * g))
    along = torch.func.jvp(f, (x,), (v,))[1] if case == "embedding padding" else (g * v).sum()
    close(fxfunc.jvp(f, (x,), (v,)), (want, along))
    with torch.no_grad():
        close(fxfunc.grad(f)(x), g)


@pytest.mark.parametrize("case", A_SIXTH)
def test_second_order(case):
    f, x = CASES[case]
    v = x.cos()
    want = difference(f, x, v)
    close(fxfunc.jvp(fxfunc.grad(f), (x,), (v,))[1], want, 1e-6)
    close(fxfunc.grad(lambda x: (fxfunc.grad(f)(x) * v).sum())(x), want, 1e-6)
    close(fxfunc.grad(lambda x: fxfunc.jvp(f, (x,), (v,))[1])(x), want, 1e-6)


@pytest.mark.parametrize("case", A_SIXTH)
def test_mapped(case):
    f, x = CASES[case]
    xs = torch.stack([x, x.cos(), -x])
    want = torch.stack([reference(f, x) for x in xs])
    close(fxfunc.vmap(fxfunc.grad(f))(xs), want)
    close(fxfunc.grad(lambda xs: fxfunc.vmap(f)(xs).sum())(xs), want)
    hvp = lambda x: fxfunc.jvp(fxfunc.grad(f), (x,), (x.cos(),))[1]
    close(fxfunc.vmap(hvp)(xs), torch.stack([difference(f, x, x.cos()) for x in xs]), 1e-6)


# ----- draws ----------------------------------------------------------------------------------------------------------

STACK = made(nn.LSTM, D, H, num_layers=2, dropout=0.5)
LAYER = made(nn.TransformerEncoderLayer, D, 2, 8, dropout=0.5)
DROPPING = {
    "LSTM": (lambda x: STACK(x)[0].sin().sum(), wave(T, B, D)),
    "encoder": (lambda x: LAYER(x).sin().sum(), wave(T, B, D)),
    "dropout": (lambda x: F.dropout(x, 0.5).sin().sum(), wave(3, D)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5).sin().sum(), wave(1, 4, 2, 2)),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.5, True).sin().sum(), wave(3, D)),
    "sdpa": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).sin().sum(), wave(1, 2, T, D)),
}


def seeded(f):
    def call(x):
        torch.manual_seed(1)
        return f(x)

    return call


@pytest.mark.parametrize("case", DROPPING)
def test_what_a_module_draws_is_drawn_once(case):
    f, x = DROPPING[case]
    close(seeded(fxfunc.grad(f))(x), reference(seeded(f), x))
    hvp = fxfunc.grad(lambda x: (fxfunc.grad(f)(x) * x.cos()).sum())
    v = x.detach().cos()
    second = fxfunc.jvp(fxfunc.grad(f), (x,), (v,))
    close(seeded(lambda x: fxfunc.jvp(fxfunc.grad(f), (x,), (v,))[1])(x), difference(seeded(f), x, v), 1e-6)
    assert hvp(x).shape == second[1].shape


@pytest.mark.parametrize("case", DROPPING)
def test_draws_of_modules_in_a_vmap(case):
    f, x = DROPPING[case]
    xs = torch.stack([x, x, x])
    with pytest.raises(errors.RandomInVmap):
        fxfunc.vmap(fxfunc.grad(f))(xs)
    same = fxfunc.vmap(fxfunc.grad(f), randomness="same")(xs)
    different = fxfunc.vmap(fxfunc.grad(f), randomness="different")(xs)
    assert same[0].equal(same[1]) and not different[0].equal(different[1])


# ----- buffers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("transform", ["value", "grad", "jvp", "no_grad"])
def test_batch_norm_updates_the_buffers_it_is_given_and_returns_them(transform, jitted):
    def step(api, params, buffers, x):
        def loss(params):
            new = {k: v.clone() for k, v in buffers.items()}
            out = api.functional_call(norm, {**params, **new}, (x,))
            return out.pow(3).sum(), new

        if transform == "value":
            return loss(params)
        if transform == "jvp":
            return api.jvp(loss, (params,), (params,), has_aux=True)
        with torch.set_grad_enabled(transform != "no_grad"):
            return api.grad(loss, has_aux=True)(params)

    norm = made(nn.BatchNorm1d, D)
    params = {k: v.detach().clone() for k, v in norm.named_parameters()}
    buffers = {k: v.clone() for k, v in norm.named_buffers()}
    ours = (fxfunc.jit if jitted else lambda f: f)(lambda *args: step(fxfunc, *args))
    for x in (wave(5, D), wave(5, D, shift=2.0)):
        got, want = ours(params, buffers, x), step(torch.func, params, buffers, x)
        close(got, want)
        buffers = got[-1]
    assert buffers["num_batches_tracked"] == 2 and norm.num_batches_tracked == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_of_each_model_of_an_ensemble(mode):
    models = [getattr(made(nn.BatchNorm1d, D), mode)() for _ in range(2)]
    params, buffers = fxfunc.stack_module_state(models)
    params = {k: v.detach() * torch.tensor([1.0, 2.0], dtype=F64)[:, None] for k, v in params.items()}

    def program(api):
        def run(p, b, x):
            def loss(p):
                new = {k: v.clone() for k, v in b.items()}
                return api.functional_call(models[0], {**p, **new}, (x,)).pow(3).sum(), new

            return api.grad(loss, has_aux=True)(p)

        return api.vmap(run, (0, 0, None))(params, buffers, wave(5, D))

    close(program(fxfunc), program(torch.func))


# ----- what is refused ------------------------------------------------------------------------------------------------


def packed(x):
    out, _ = STEPS(nn.utils.rnn.pack_padded_sequence(x, [3, 2]))
    return nn.utils.rnn.pad_packed_sequence(out)[0].sum()


STEPS, AVERAGE = made(nn.GRU, D, H), made(nn.BatchNorm1d, D, momentum=None)
INDEX = torch.tensor([0, 2, 2])
REFUSED = {
    "packed": (packed, wave(T, B, D), errors.NotSupported),
    "max_norm": (lambda w: F.embedding(INDEX, w, max_norm=0.5).sum(), wave(3, D), errors.MutatedCapture),
    "second order by frequency": (
        lambda w: fxfunc.grad(lambda w: F.embedding(INDEX, w, scale_grad_by_freq=True).pow(2).sum())(w).sum(),
        wave(3, D),
        errors.NotSupported,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_are_refused_by_name(case):
    f, x, error = REFUSED[case]
    for call in (lambda: fxfunc.vmap(fxfunc.grad(f))(x[None]), lambda: fxfunc.jit(fxfunc.grad(f))(x)):
        with pytest.raises(error) as caught:
            call()
        assert "test_modules.py" in str(caught.value)


def test_a_cumulative_average_reads_how_often_it_was_called():
    """Which one graph for all calls cannot."""

    def f(x):
        return (
            fxfunc.functional_call(AVERAGE, {k: b.clone() for k, b in AVERAGE.named_buffers()}, (x,))
            .pow(3)
            .sum()
        )

    x = wave(5, D)
    close(fxfunc.grad(f)(x), reference(f, x))
    close(fxfunc.vmap(fxfunc.grad(f))(x[None]), reference(f, x)[None])
    with pytest.raises(errors.ValueDependent, match="test_modules.py"):
        fxfunc.jit(fxfunc.grad(f))(x)


def test_max_norm_of_a_clone_is_right():
    f = lambda w: F.embedding(INDEX, w.clone(), max_norm=0.5).sin().sum()
    close(fxfunc.grad(f)(wave(3, D)), reference(f, wave(3, D)))
