"""Python loops become scans: each is the loop that one would write by hand, and computes what its unrolled form does."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc.bench import registry
from fxfunc.passes import config
from fxfunc.passes.graph import scan, subgraphs
from fxfunc.passes.reroll import reroll
from fxfunc.passes.verify import verify


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclasses.dataclass
class Loop:
    """f(api, *args) -> a scalar, of the first argument above all; by_hand is f with `fxfunc.scan` in place of the loop."""

    f: Callable
    by_hand: Callable
    args: tuple
    random: bool = False


# ----- the loops ------------------------------------------------------------------------------------------------------


def leapfrog(api, q, p):
    """Two carries."""
    for _ in range(10):
        p = p - 0.1 * q.sin()
        q = q + 0.1 * p
    return (q * p).sum()


def leapfrog_by_hand(api, q, p):
    def step(carry, _):
        q, p = carry
        p = p - 0.1 * q.sin()
        return (q + 0.1 * p, p), None

    (q, p), _ = api.scan(step, (q, p), length=10)
    return (q * p).sum()


def loss(params, x, y):
    h = torch.tanh(x @ params["w"] + params["b"])
    return ((h @ params["v"] - y) ** 2).mean()


def descent(api, params, x, y):
    """A carry that is a dict, and a gradient in each step."""
    for _ in range(6):
        g = api.grad(loss)(params, x, y)
        params = {k: p - 0.1 * g[k] for k, p in params.items()}
    return loss(params, x, y)


def descent_by_hand(api, params, x, y):
    def step(params, _):
        g = api.grad(loss)(params, x, y)
        return {k: p - 0.1 * g[k] for k, p in params.items()}, None

    return loss(api.scan(step, params, length=6)[0], x, y)


def rates(api, rate, w, x):
    """A learnable rate per step."""
    for i in range(8):
        w = w - rate[i] * api.grad(lambda w: ((x @ w).sin() ** 2).sum())(w)
    return (w**2).sum()


def rates_by_hand(api, rate, w, x):
    step = lambda w, r: (w - r * api.grad(lambda w: ((x @ w).sin() ** 2).sum())(w), None)
    return (api.scan(step, w, rate)[0] ** 2).sum()


def data(api, w, x):
    """Its own data for each step, along the second axis."""
    h, total = torch.zeros_like(w[0]), 0.0
    for i in range(9):
        h = torch.tanh(h @ w + x[:, i])
        total = total + h.sum() * x[0, i, 0]
    return total


def data_by_hand(api, w, x):
    def step(carry, xi):
        h = torch.tanh(carry[0] @ w + xi)
        return (h, carry[1] + h.sum() * xi[0, 0]), None

    h = torch.tanh(torch.zeros_like(w[0]) @ w + x[:, 0])
    first = 0.0 + h.sum() * x[0, 0, 0]
    return api.scan(step, (h, first), x.movedim(1, 0)[1:])[0][1]


def backwards(api, w, x):
    """The places from the last to the first."""
    h = w[0]
    for i in reversed(range(7)):
        h = torch.tanh(w @ h + x[i])
    return h.sum()


def backwards_by_hand(api, w, x):
    turned = torch.stack([x[i] for i in reversed(range(7))])
    return api.scan(lambda h, xi: (torch.tanh(w @ h + xi), None), w[0], turned)[0].sum()


def dropout(api, w, h):
    """A step that draws."""
    for _ in range(6):
        h = F.dropout(torch.tanh(w @ h), 0.4) + h
    return (h**2).sum()


def dropout_by_hand(api, w, h):
    step = lambda h, _: (F.dropout(torch.tanh(w @ h), 0.4) + h, None)
    return (api.scan(step, h, length=6)[0] ** 2).sum()


def adam(api, w, x):
    """Adam, whose corrections are numbers that differ by step."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 8):
        g = api.grad(lambda w: ((x @ w).sin() ** 2).sum())(w)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t) + 1e-8).sqrt())
    return (w**3).sum()


def adam_by_hand(api, w, x):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    first = torch.tensor([1 - 0.9**t for t in range(1, 8)], dtype=w.dtype)
    second = torch.tensor([1 - 0.99**t for t in range(1, 8)], dtype=w.dtype)

    def step(carry, c):
        w, m, v = carry
        g = api.grad(lambda w: ((x @ w).sin() ** 2).sum())(w)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        return (w - 0.1 * (m / c[0]) / ((v / c[1] + 1e-8).sqrt()), m, v), None

    return (api.scan(step, (w, m, v), (first, second))[0][0] ** 3).sum()


def momentum(api, w, x):
    """A first step without momentum."""
    m = None
    for _ in range(8):
        g = torch.cos(x @ w)
        m = g if m is None else 0.9 * m + g
        w = w - 0.1 * m
    return (w**2).sum()


def momentum_by_hand(api, w, x):
    def step(carry, _):
        w, m = carry
        m = 0.9 * m + torch.cos(x @ w)
        return (w - 0.1 * m, m), None

    m = torch.cos(x @ w)
    return (api.scan(step, (w - 0.1 * m, m), length=7)[0][0] ** 2).sum()


def if_first(api, w, x):
    """`if i == 0` and `if i == last`."""
    h = x
    for i in range(8):
        h = torch.tanh(w @ h) * 0.7
        if i == 0:
            h = h.exp()
        if i == 7:
            h = h.sin()
    return h.sum()


def if_first_by_hand(api, w, x):
    h = (torch.tanh(w @ x) * 0.7).exp()
    h = api.scan(lambda h, _: (torch.tanh(w @ h) * 0.7, None), h, length=7)[0]
    return h.sin().sum()


def nested(api, w, x):
    """Five steps in each of six."""
    for i in range(6):
        h = w
        for _ in range(5):
            h = h - 0.1 * torch.sin(h * x[i])
        w = w + 0.5 * torch.tanh(h - w)
    return (w**2).sum()


def nested_by_hand(api, w, x):
    def outer(w, xi):
        h = api.scan(lambda h, _: (h - 0.1 * torch.sin(h * xi), None), w, length=5)[0]
        return w + 0.5 * torch.tanh(h - w), None

    return (api.scan(outer, w, x)[0] ** 2).sum()


def rnn(api, params, x):
    """A recurrent net over 64 tokens, with all of its outputs."""
    h, hs = x[0, :4], []
    for i in range(64):
        h = torch.tanh(x[i] @ params["in"] + h @ params["rec"])
        hs.append(h)
    return (torch.stack(hs, 1) * x.T[:4]).sum() + h.prod()


def rnn_by_hand(api, params, x):
    def step(h, xi):
        h = torch.tanh(xi @ params["in"] + h @ params["rec"])
        return h, h

    h, hs = api.scan(step, x[0, :4], x)
    return (hs.movedim(0, 1) * x.T[:4]).sum() + h.prod()


def block(p, x):
    q, k, v = (x @ p["qkv"]).split(4, -1)
    x = x + torch.softmax(q @ k.mT / 2, -1) @ v @ p["out"]
    return x + F.gelu(F.layer_norm(x, (4,)) @ p["up"]) @ p["down"]


def transformer(api, blocks, x):
    """24 blocks with weights of their own."""
    for p in blocks:
        x = block(p, x)
    return (x**2).mean()


def transformer_by_hand(api, blocks, x):
    stacked = {k: torch.stack([p[k] for p in blocks]) for k in blocks[0]}
    return (api.scan(lambda x, p: (block(p, x), None), x, stacked)[0] ** 2).mean()


def two_back(api, w, x):
    """A step that looks two steps back."""
    a, b = w, x
    for _ in range(9):
        a, b = b, torch.sin(a) + 0.5 * torch.tanh(b)
    return (a * b).sum()


def two_back_by_hand(api, w, x):
    step = lambda c, _: ((c[1], torch.sin(c[0]) + 0.5 * torch.tanh(c[1])), None)
    a, b = api.scan(step, (w, x), length=9)[0]
    return (a * b).sum()


def constants(api, w, x):
    """Tensors made of the step's number, and a stop."""
    for i in range(7):
        w = torch.sin(w * torch.tensor(0.3 * i + 1, dtype=torch.float64)) + (w.detach() * x) / (i + 2.5)
    return w.sum()


def constants_by_hand(api, w, x):
    t = torch.tensor([0.3 * i + 1 for i in range(7)], dtype=torch.float64)
    d = torch.tensor([i + 2.5 for i in range(7)], dtype=torch.float64)
    step = lambda w, c: (torch.sin(w * c[0]) + (w.detach() * x) / c[1], None)
    return api.scan(step, w, (t, d))[0].sum()


def then_another(api, w, x):
    """A loop over what another loop gave."""
    hs, h, total = [], w, x.sum()
    for i in range(8):
        h = torch.tanh(h * x[i] + 0.1)
        hs.append(h)
    for i in range(8):
        total = torch.sin(total) * hs[i].sum() + total
    return total


def then_another_by_hand(api, w, x):
    def step(h, xi):
        h = torch.tanh(h * xi + 0.1)
        return h, h

    hs = api.scan(step, w, x)[1]
    return api.scan(lambda t, h: (torch.sin(t) * h.sum() + t, None), x.sum(), hs)[0]


PARAMS = {"w": rand(3, 5), "b": rand(5, seed=1), "v": rand(5, seed=2)}
WIDTHS = {"qkv": (4, 12), "out": (4, 4), "up": (4, 6), "down": (6, 4)}
BLOCKS = [{k: rand(*s, seed=4 * i + j) / 5 for j, (k, s) in enumerate(WIDTHS.items())} for i in range(24)]
LOOPS = {
    "two carries": Loop(leapfrog, leapfrog_by_hand, (rand(3), rand(3, seed=1))),
    "a dict, with a gradient inside": Loop(descent, descent_by_hand, (PARAMS, rand(7, 3), rand(7))),
    "learnable rates": Loop(rates, rates_by_hand, (rand(8) / 10, rand(3), rand(4, 3))),
    "data by step": Loop(data, data_by_hand, (rand(3, 3), rand(3, 9, 3))),
    "data backwards": Loop(backwards, backwards_by_hand, (rand(3, 3), rand(7, 3))),
    "dropout": Loop(dropout, dropout_by_hand, (rand(3, 3), rand(3)), random=True),
    "Adam": Loop(adam, adam_by_hand, (rand(3), rand(4, 3))),
    "a first step without momentum": Loop(momentum, momentum_by_hand, (rand(3), rand(3, 3))),
    "if first, if last": Loop(if_first, if_first_by_hand, (rand(3, 3), rand(3))),
    "nested": Loop(nested, nested_by_hand, (rand(3), rand(6, 3))),
    "a recurrent net": Loop(rnn, rnn_by_hand, ({"in": rand(5, 4), "rec": rand(4, 4)}, rand(64, 5))),
    "blocks with own weights": Loop(transformer, transformer_by_hand, (BLOCKS, rand(5, 4))),
    "two steps back": Loop(two_back, two_back_by_hand, (rand(3), rand(3, seed=1))),
    "constants by step": Loop(constants, constants_by_hand, (rand(3), rand(3, seed=1))),
    "a loop over the results of another": Loop(then_another, then_another_by_hand, (rand(3), rand(8, 3))),
}


# ----- near misses ----------------------------------------------------------------------------------------------------


def growing(api, w, x):
    for _ in range(6):
        w = torch.cat([w, torch.sin(w[:1]) * x[:1]])
    return w.sum()


def tree(api, w, x):
    hs = [w]
    for i in range(12):
        hs.append(torch.tanh(hs[i // 2] * x) + torch.sin(hs[-1]))
    return hs[-1].sum()


def unequal(api, w, x):
    ops = [torch.sin, torch.cos, torch.tanh, torch.cos, torch.sin, torch.sin, torch.tanh, torch.exp]
    for op in ops:
        w = op(w * x)
    return w.sum()


def independent(api, w, x):
    return torch.stack([torch.sin(w * x[i]).exp().sum() for i in range(8)]).prod()


def powers(api, w, x):
    for i in range(1, 8):
        w = torch.sin(w) ** i + x
    return w.sum()


def ring(api, w, x):
    buffer = w
    for i in range(6):
        buffer = torch.sin(buffer) * buffer[i % 3] + x
    return buffer.sum()


NEAR = {
    "a carry that grows": growing,
    "a value of another step in each": tree,
    "other operations": unequal,
    "steps that do not depend on each other": independent,
    "an exponent": powers,
    "another place of the carry": ring,
}


# ----- what holds -----------------------------------------------------------------------------------------------------


def scans(graph):
    return [n for n in graph.nodes if n.target is scan]


def graph_of(f, args):
    return fxfunc.make_graph(lambda *args: f(fxfunc, *args))(*args)


TRANSFORMS = {
    "value": lambda api, f, w, rest: f(api, w, *rest),
    "jit": lambda api, f, w, rest: (api.jit if api is fxfunc else lambda f: f)(lambda w: f(api, w, *rest))(w),
    "grad": lambda api, f, w, rest: api.grad(lambda w: f(api, w, *rest))(w),
    "grad of all": lambda api, f, w, rest: api.grad(
        lambda w, *rest: f(api, w, *rest), tuple(range(1 + len(rest)))
    )(w, *rest),
    "second order": lambda api, f, w, rest: api.grad(
        lambda w: sum((g**2).sum() for g in pytree.tree_leaves(api.grad(lambda w: f(api, w, *rest))(w)))
    )(w),
    "forward over reverse": lambda api, f, w, rest: api.jvp(api.grad(lambda w: f(api, w, *rest)), (w,), (w,))[1],
    "vmap of grad": lambda api, f, w, rest: api.vmap(
        api.grad(lambda w: f(api, w, *rest)), randomness="different"
    )(pytree.tree_map(lambda t: torch.stack([t, 0.5 * t]), w)),
    "no_grad": lambda api, f, w, rest: api.grad(lambda w: _without_grad(lambda: f(api, w, *rest)) * f(api, w, *rest))(w),
}  # fmt: skip


def _without_grad(f):
    with torch.no_grad():
        return f()


def assert_close(ours, theirs):
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOOPS)
def test_semantics_16_a_loop_is_the_scan_that_one_would_write(name):
    loop = LOOPS[name]
    rolled, by_hand = graph_of(loop.f, loop.args), graph_of(loop.by_hand, loop.args)
    verify(rolled, "reroll")
    assert len(scans(rolled)) == len(scans(by_hand))
    assert [n.kwargs["length"] for n in scans(rolled)] == [n.kwargs["length"] for n in scans(by_hand)]
    assert len(rolled) <= 1.1 * len(by_hand)


@pytest.mark.parametrize("steps", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_meta_gradient_does_not_grow_with_its_inner_steps(steps):
    workload = registry.find("maml25")

    def made(steps):
        size = workload.parameters | {"steps": steps}
        return fxfunc.jit(workload.make(fxfunc, **size)).lower(*workload.inputs(**size))

    few, many = made(5), made(steps)
    assert len(many.graph) == len(few.graph)
    assert len(many.compile(backend="eager").graph) == len(few.compile(backend="eager").graph)


LONG = ("second order", "forward over reverse", "grad of all")
LARGE = ("blocks with own weights", "a recurrent net", "Adam")  # of which two are in the default suite
PAIRS = [  # of most loops these are in the slow suite
    pytest.param(n, t, marks=pytest.mark.slow)
    if (i % 6 and t in LONG) or (n in LARGE and t not in ("grad", "no_grad"))
    else (n, t)
    for i, n in enumerate(LOOPS)
    for t in TRANSFORMS
]


@pytest.mark.parametrize("name, transform", PAIRS)
def test_a_loop_computes_what_its_unrolled_form_does(name, transform, monkeypatch):
    loop, how = LOOPS[name], TRANSFORMS[transform]
    w, *rest = loop.args

    def run(api, f):
        torch.manual_seed(0)
        return how(api, lambda *args: f(*args), w, rest)

    ours = run(fxfunc, loop.f)
    monkeypatch.setattr(config, "REROLL", 10**9)
    assert_close(ours, run(fxfunc, loop.f))
    if not loop.random:
        assert_close(ours, run(torch.func, loop.f))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_a_loop_stays_as_it_is(name, transform):
    w, x = rand(3), rand(8, 3) if name in ("steps that do not depend on each other",) else rand(3, seed=1)
    assert not scans(graph_of(NEAR[name], (w, x)))
    assert_close(*(TRANSFORMS[transform](api, NEAR[name], w, [x]) for api in (fxfunc, torch.func)))


def test_semantics_16_a_number_of_half_precision_stays_a_number():
    """A tensor of no dims would be rounded where the number is not."""

    def f(w):
        for i in range(6):
            w = torch.sin(w * (0.1 * i + 0.3))
        return w

    x = rand(5).half()
    assert not scans(fxfunc.make_graph(f)(x))
    assert scans(fxfunc.make_graph(f)(x.float()))
    assert torch.equal(fxfunc.jit(f)(x), f(x))


def test_draws_come_in_the_order_of_the_unrolled_loop():
    def f(w):
        a = torch.rand(2)
        for _ in range(5):
            w = torch.sin(w) * torch.rand(2) + torch.randn(2)
        return w + torch.rand(2) * a

    assert scans(fxfunc.make_graph(f)(rand(2).float()))
    torch.manual_seed(3)
    ours, next_one = fxfunc.jit(f)(rand(2).float()), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(ours, f(rand(2).float())) and torch.equal(next_one, torch.rand(1))


def test_one_draw_for_all_examples_keeps_a_loop_unrolled():
    def f(w):
        for _ in range(6):
            w = torch.sin(w * (torch.rand(3) + 0.5))
        return w

    w = rand(4, 3).float()
    torch.manual_seed(0)
    ours = fxfunc.vmap(f, randomness="same")(w)
    torch.manual_seed(0)
    assert torch.allclose(ours, torch.func.vmap(f, randomness="same")(w))
    inner = fxfunc.vmap(fxfunc.grad(lambda w: f(w).sum()), randomness="same")
    torch.manual_seed(0)
    ours = inner(w)
    torch.manual_seed(0)
    theirs = torch.func.vmap(torch.func.grad(lambda w: f(w).sum()), randomness="same")(w)
    assert torch.allclose(ours, theirs)


def test_a_loop_over_a_symbolic_batch():
    """The length of a loop is a number; the sizes in its body are whatever they are."""
    f = lambda api: lambda w, x: api.grad(lambda w: (leapfrog(api, w * x, x) ** 2).mean())(w)
    lowered = fxfunc.jit(f(fxfunc)).lower(rand(3), fxfunc.spec(rand(5, 3), {0: fxfunc.Dim("n")}))
    assert len(scans(lowered.graph)) == 2
    compiled = lowered.compile("eager")
    for size in (2, 5, 9):
        w, x = rand(3), rand(size, 3)
        assert_close(compiled(w, x), f(torch.func)(w, x))


def test_calls_keep_the_users_lines():
    graph = graph_of(leapfrog, (rand(3), rand(3)))
    (loop,) = scans(graph)
    (body,) = subgraphs(loop)
    assert all("test_reroll.py" in n.meta["source"] for n in [loop, *body.nodes])


def test_the_graph_does_not_grow_with_the_steps():
    def f(steps, w, x):
        for _ in range(steps):
            w = w - 0.1 * fxfunc.grad(lambda w: torch.sin(x @ w).sum())(w)
        return (w**2).sum()

    sizes = {
        len(fxfunc.make_graph(fxfunc.grad(lambda w, n=n: f(n, w, rand(4, 3))))(rand(3))) for n in (5, 20, 100)
    }
    assert len(sizes) == 1


def test_semantics_16_a_scan_that_is_another_program_is_not_taken(monkeypatch):
    """The check is not a formality: a faulty scan is noticed whatever is wrong with it."""
    from fxfunc.passes import reroll as module

    monkeypatch.setattr(config, "REROLL", 10**9)
    graph = graph_of(adam, LOOPS["Adam"].args)
    monkeypatch.setattr(config, "REROLL", 4)
    assert scans(reroll(graph))
    right = module.emit_scan

    def swapped(b, body, consts, carry, xs, length):
        return right(b, body, consts, carry, xs[::-1], length)

    def shorter(b, body, consts, carry, xs, length):
        return right(b, body, consts, carry, xs, length - 1)

    def mixed(b, body, consts, carry, xs, length):
        return right(b, body, consts, [carry[1], carry[0], *carry[2:]], xs, length)

    for wrong in (swapped, shorter, mixed):
        monkeypatch.setattr(module, "emit_scan", wrong)
        assert reroll(graph) is graph
