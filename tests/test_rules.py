"""Every rule row against torch.func: the table of cases times the checks of the harness."""

from __future__ import annotations

import pytest
from mutants import looked_up
from rule_cases import CASES
from rule_harness import CHECKS, SIZES, Problem, error, run

import fxfunc
from fxfunc.passes.graph import is_random
from fxfunc.passes.rules import ROWS

pytestmark = [
    pytest.mark.filterwarnings("error:fxfunc"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
BY_NAME = {c.name: c for c in CASES}
assert len(BY_NAME) == len(CASES), "two cases of one name"


# What jvp_vjp, vmap_vjp, no_grad and the adjoint find in the default suite, alone or the other way round.
LONG = ("jvp", "vjp", "vjp_vjp", "vmap_jvp")
# Three in four of the many options of this op are in the slow suite.
SAMPLED = [name for name in BY_NAME if name.startswith("grid_sample")]
REST = [name for i, name in enumerate(SAMPLED) if i % 4]


def marked(name: str) -> list:
    return [pytest.mark.slow] if name in REST else []


NAMES = [pytest.param(name, marks=marked(name)) for name in BY_NAME]


@pytest.mark.parametrize(
    "check", [pytest.param(c, marks=pytest.mark.slow) if c in LONG else c for c in CHECKS]
)
@pytest.mark.parametrize("name", NAMES)
def test_rule(name, check):
    run(BY_NAME[name], check, SIZES[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_rule_at_another_size(name):
    for check in CHECKS:
        run(BY_NAME[name], check, SIZES[1])


@pytest.mark.parametrize(
    "name,dtype", [pytest.param(c.name, d, marks=marked(c.name)) for c in CASES for d in c.dtypes], ids=str
)
def test_dtype(name, dtype):
    for check in ("jvp", "vjp", "vmap", "vmap_vjp"):
        run(BY_NAME[name], check, SIZES[0], dtype)


@pytest.mark.parametrize("name", NAMES)
def test_adjoint(name):
    """<ct, J t> = <J* ct, t>: forward and reverse mode are one linear map."""
    p = Problem(BY_NAME[name], SIZES[0])
    if p.empty or not p.case.adjoint:
        return
    pushed, pulled = fxfunc.jvp(p.g, p.xs, p.ts)[1], fxfunc.vjp(p.g, *p.xs)[1](p.cts)
    left = sum((ct.conj() * t).sum().real for ct, t in zip(p.cts, pushed, strict=True))
    right = sum((ct.conj() * t).sum().real for ct, t in zip(pulled, p.ts, strict=True))
    assert error(left, right) <= 1e-10


@pytest.mark.slow
def test_every_row_is_reached_by_a_case():
    """A row that no case reaches is untested; draws have tests of their own (test_random.py)."""
    reached = {op for c in CASES for _, op, _ in looked_up(c)}
    missing = {str(op) for op in ROWS if not is_random(op)} - reached
    assert missing <= {"aten.argsort.default"}  # emitted by randperm
