"""The cost model's choices, what forces others, and the committed table of how they compare."""

from __future__ import annotations

import json

import pytest
import torch

import fxfunc
from fxfunc.bench import choices
from fxfunc.bench.drawn import draw
from fxfunc.codegen import cost

pytree = torch.utils._pytree


def mapped():
    x, w = torch.randn(40, 6, 5), torch.randn(5, 4)
    return fxfunc.jit(fxfunc.vmap(lambda w, x: (x @ w).sin().sum(0), (None, 0))).lower(w, x)


def test_a_forced_choice_holds_inside_of_its_block():
    outside = cost.limits()
    with cost.forced(maps="batched", products="aten") as inside:
        assert cost.limits() is inside and inside.small_map == cost.NEVER and inside.large_product == cost.ANY
        with cost.forced(maps="loops"):
            assert cost.limits().small_map == cost.ANY and cost.limits().large_product == cost.ANY
    assert cost.limits() is outside


def test_every_other_program_is_built_once():
    found = choices.programs(mapped())
    texts = [choices._text(built) for built in found.values()]
    assert list(found)[0] == choices.MODEL and len(set(texts)) == len(texts)
    loops = {"loop over" in "".join(p.describe() for p in built.programs) for built in found.values()}
    assert loops == {True, False}


def test_a_choice_that_is_impossible_stays_what_is_possible():
    lowered = fxfunc.jit(fxfunc.vmap(lambda x: x.cumsum(0))).lower(torch.randn(9, 5))
    with cost.forced(maps="loops"):
        assert not lowered.compile(backend="cpp")._program.programs


@pytest.mark.parametrize("seed", [2, 8, 15, 18, 22])
def test_a_drawn_program_is_the_same_for_torch_func(seed):
    ours, theirs = draw(fxfunc, seed), draw(torch.func, seed)
    assert ours.name == theirs.name
    found, wanted = (pytree.tree_leaves(d.function(*d.inputs)) for d in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_table_says_how_far_the_model_is_from_the_best():
    times = {
        "a": {"model": {"least_s": 2.0}, "maps=loops": {"least_s": 1.0}},
        "b": {"model": {"least_s": 1.0}, "maps=loops": {"least_s": 3.0}},
    }
    assert choices.ratio(times["a"]) == 2 and choices.ratio(times["b"]) == 1
    assert choices.summary(times) == "1 of 2 cases within 1.25x of the best choice; the worst 2.00x"
    assert choices.table(times).splitlines()[2].split("|")[1].strip() == "a"


def test_the_committed_table_is_within_what_is_promised():
    measured = json.loads(choices.RESULTS.read_text())["cases"]
    ratios = [choices.ratio(times) for times in measured.values()]
    assert sum(r <= choices.WITHIN for r in ratios) >= choices.ENOUGH * len(ratios)
    assert max(ratios) <= choices.NEVER_OVER
    assert choices.table(measured) in choices.TABLE.read_text()
