"""Choosing how a kernel is done by measuring: what is tried, what is kept, and what a damaged cache does."""

from __future__ import annotations

import json

import pytest
import torch
from kernel_cases import F32, PATTERNS, Case, In, T, graph_of
from product_cases import PRODUCTS, graphs

import fxfunc
from fxfunc.codegen import offline, tune, written
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.passes.errors import BackendError

pytest.importorskip("triton")


def kernel(name: str):
    """The kernel of a case."""
    plain = [c for c in PATTERNS if c.name == name]
    graph = fuse(graph_of(plain[0])) if plain else graphs(next(c for c in PRODUCTS if c.name == name))[1]
    (k,) = kernels_of(graph)
    return k


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXFUNC_CACHE", str(tmp_path))
    return tmp_path / "tuned"


class Stopwatch:
    """Says that a kernel takes a second, but for one of so many warps and such a block, and counts."""

    def __init__(self, **fastest):
        self.fastest, self.seen = fastest, []

    def __call__(self, b) -> float:
        self.seen.append(b)
        return 0.5 if self.fastest and all(getattr(b, k) == v for k, v in self.fastest.items()) else 1.0


@pytest.mark.parametrize(
    ("name", "fastest"), [("layer_norm", {"warps": 8}), ("linear", {"block": (32, 64), "warps": 4})]
)
def test_the_fastest_is_compiled_and_remembered(name, fastest):
    k, watch = kernel(name), Stopwatch(**fastest)
    b = tune.tuned(k, "cuda:90", measure=watch)
    assert all(getattr(b, x) == v for x, v in fastest.items()) and len(watch.seen) > 3
    again = Stopwatch()
    assert tune.tuned(k, "cuda:90", measure=again).cubin == b.cubin and not again.seen


def test_without_a_clear_winner_it_is_the_models_choice():
    k = kernel("layer_norm")
    assert tune.tuned(k, "cuda:90", measure=Stopwatch()).block == offline.compile(k, "cuda:90").block


def test_what_does_not_fit_or_spills_is_not_tried(monkeypatch):
    k, watch = kernel("linear"), Stopwatch()
    first = offline.compile(k, "cuda:90")
    monkeypatch.setitem(offline.SHARED, 90, first.shared)
    tune.tuned(k, "cuda:90", measure=watch)
    assert all(b.shared <= first.shared and b.spills == 0 for b in watch.seen)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"chosen": "1"}', '{"chosen": 10000}', '{"chosen": -1}', '{"chosen": true}']
)
def test_a_damaged_file_is_measured_anew_and_mended(cache, text):
    k = kernel("layer_norm")
    tune.tuned(k, "cuda:90", measure=Stopwatch(warps=8))
    (file,) = cache.iterdir()
    good = file.read_text()
    file.write_text(text)
    watch = Stopwatch(warps=8)
    assert tune.tuned(k, "cuda:90", measure=watch).warps == 8 and watch.seen
    assert file.read_text() == good and json.loads(good)["chosen"] > 0


def test_a_cache_that_cannot_be_written_is_none(monkeypatch):
    monkeypatch.setenv("FXFUNC_CACHE", "/dev/null")
    assert tune.tuned(kernel("layer_norm"), "cuda:90", measure=Stopwatch(warps=8)).warps == 8


def test_kernels_targets_precisions_and_devices_do_not_share_a_choice():
    k, ways = kernel("linear"), written.ways(kernel("linear"), 90, "bf16x6")
    same = (k, 90, "bf16x6", "H200", ways)
    others = [(k, 80, *same[2:]), (k, 90, "ieee", *same[3:]), (*same[:3], "H100", ways), (*same[:4], ways[1:]),
              (kernel("gate"), *same[1:])]  # fmt: skip
    cases = [same, *others]
    assert len({tune._path(*case) for case in cases}) == len(cases)


def test_every_way_of_a_symbolic_kernel_compiles():
    (k,) = kernels_of(fuse(graph_of(Case("s", lambda x: (x * 2).sum([1]), (In(F32, (T, 40)),)))))
    found = [offline.compile(k, "cuda:80", None, w) for w in written.ways(k, 80, "ieee")]
    assert len({(b.block, b.warps) for b in found}) == len(found) > 3


def test_without_a_gpu_it_says_so():
    lowered = fxfunc.jit(lambda x: x.sin() * 2).lower(torch.ones(3))
    with pytest.raises(BackendError, match="to tune for cuda:90 takes such a GPU; here is"):
        lowered.compile(backend="triton", target="cuda:90", tune=True)


@pytest.mark.gpu
def test_a_tuned_program_equals_eager_on_a_gpu():
    f = lambda x, w: torch.softmax(torch.relu(x @ w) * 2, -1)
    x, w = torch.randn(300, 64), torch.randn(64, 80)
    tuned = fxfunc.jit(f).lower(x.cuda(), w.cuda()).compile(tune=True)
    torch.testing.assert_close(tuned(x.cuda(), w.cuda()).cpu(), f(x, w))
