"""Random programs under random nests of transforms, against torch.func; and what linear algebra says of any program."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_harness import error

import fxfunc

N = 3
W = torch.linspace(-0.9, 1.1, N * N, dtype=torch.float64).reshape(N, N).sin()
V = torch.tensor([0.7, -1.2, 0.4], dtype=torch.float64)
START = torch.tensor([0.31, -0.53, 0.87], dtype=torch.float64)


def _written(x, y):
    z = x.clone()
    z[1:].mul_(y[:-1])
    return z


def _stopped(x, y):
    with torch.no_grad():
        c = x.cos()
    return c * y


# Steps take two vectors of length N to one, with values that stay near 1.
STEPS = {
    "sin": lambda x, y: x.sin(),
    "tanh": lambda x, y: (x + y).tanh(),
    "mul": lambda x, y: x * y.cos(),
    "div": lambda x, y: x / (2 + y.sin()),
    "matmul": lambda x, y: (W @ x).sin() + y,
    "softmax": lambda x, y: (x * 2).softmax(-1) * y,
    "norm": lambda x, y: x / (1 + (x * x).sum()).sqrt(),
    "where": lambda x, y: torch.where(x > y, x.sin(), y.exp().clamp(max=2.0).tanh()),
    "cumsum": lambda x, y: x.cumsum(-1).sin(),
    "flip": lambda x, y: torch.cat([x.flip(-1)[1:], y[:1]]),
    "outer": lambda x, y: (x[:, None] * y[None, :].sin()).mean(1),
    "index": lambda x, y: x[torch.tensor([2, 0, 2])] + y,
    "write": _written,
    "stop": _stopped,
    "detach": lambda x, y: x.detach() * y.sin(),
    "max": lambda x, y: x - x.max() + y,
    "logsumexp": lambda x, y: x * torch.logsumexp(y, -1).tanh(),
    "pad": lambda x, y: torch.nn.functional.pad(x.sin(), (1, 0))[:N] + y.cos(),
    "prod": lambda x, y: x + y.prod(),
    "layer_norm": lambda x, y: torch.nn.functional.layer_norm(x + 2 * y, (N,)).tanh(),
}

# A nest takes a function of a vector to another one.
NESTS = {
    "grad": lambda T, f: lambda x: T.grad(lambda x: f(x).sum())(x),
    "jvp": lambda T, f: lambda x: T.jvp(f, (x,), (V,))[1],
    "vjp": lambda T, f: lambda x: T.vjp(f, x)[1](V)[0],
    "vmap": lambda T, f: lambda x: T.vmap(f)(torch.stack([x, x.sin() + 0.1])).mean(0),
    "vmap columns": lambda T, f: lambda x: T.vmap(f, 1, 1)(x[:, None] + W).sin().sum(1),
    "vmap closure": lambda T, f: lambda x: T.vmap(lambda c: f(x * c.cos()))(V).mean(0),
    "jacrev": lambda T, f: lambda x: T.jacrev(f)(x).sin() @ V,
    "jacfwd": lambda T, f: lambda x: V @ T.jacfwd(f)(x).sin(),
    "squash": lambda T, f: lambda x: f(x).tanh(),
}

programs = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3)), min_size=1, max_size=5)
nests = st.lists(st.sampled_from(sorted(NESTS)), min_size=1, max_size=4)
checked = settings(
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)


def build(program):
    """Each step sees the last vector and an earlier one."""

    def f(x):
        known = [x, x.cos()]
        for name, back in program:
            known.append(STEPS[name](known[-1], known[-1 - back % len(known)]))
        return known[-1]

    return f


def nested(T, program, nest):
    f = build(program)
    for name in reversed(nest):
        f = NESTS[name](T, f)
    return f


@checked
@given(programs, nests)
def test_a_random_nest_of_a_random_program_is_what_torch_func_says(program, nest):
    theirs = nested(torch.func, program, nest)(START)
    assert error(nested(fxfunc, program, nest)(START), theirs) <= 1e-8
    again = fxfunc.jit(nested(fxfunc, program, nest))
    with torch.no_grad():
        assert error(again(START), theirs) <= 1e-8


@checked
@given(programs)
def test_forward_and_reverse_are_one_linear_map(program):
    f = build([step for step in program if step[0] not in ("stop", "detach")])
    pushed = fxfunc.jvp(f, (START,), (V,))[1]
    ct = W[0]
    pulled = fxfunc.vjp(f, START)[1](ct)[0]
    assert error((ct * pushed).sum(), (pulled * V).sum()) <= 1e-10
    transposed = fxfunc.linear_transpose(lambda t: fxfunc.jvp(f, (START,), (t,))[1], V)
    assert error(transposed(ct)[0], pulled) <= 1e-10


@checked
@given(programs, st.floats(-2, 2))
def test_a_linear_program_is_linear(program, scale):
    _, push = fxfunc.linearize(build(program), START)
    assert error(push(scale * V + W[1]), scale * push(V) + push(W[1])) <= 1e-10


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("nest", sorted(NESTS))
def test_every_nest_at_other_sizes(size, nest):
    f = lambda x: (x.sin() * x.roll(1)).cumsum(0)
    vector = torch.linspace(0.2, 1.3, size, dtype=torch.float64)
    if nest in ("vmap columns", "jvp", "vjp", "jacrev", "jacfwd"):
        pytest.skip("its other operand has a size of its own")
    assert error(NESTS[nest](fxfunc, f)(vector), NESTS[nest](torch.func, f)(vector)) <= 1e-10
