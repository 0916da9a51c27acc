"""Calls that move values as parts of Triton kernels: numbers, code, what is checked on the device, and what stays ATen's."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from kernel_cases import F32, I64, Case, In, assert_equal, graph_of, run
from move_cases import MOVES, PRODUCTS_OF_MOVED, at, cat, fused, gather, into_slice, move_inputs, random_move
from torch.nn import functional as F

import fxfunc
from fxfunc.codegen import offline, reads, serial
from fxfunc.codegen.evaluate import evaluate
from fxfunc.codegen.fuse import kernels_of
from fxfunc.codegen.loops import Load, Pick, kernel, verify
from fxfunc.codegen.lower import is_free
from fxfunc.passes.decompose import taken_apart
from fxfunc.passes.errors import InvalidGraph
from fxfunc.passes.graph import Val

pytest.importorskip("triton")
aten = torch.ops.aten
TARGETS = ["cuda:80", "cuda:90"]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def named(name: str) -> Case:
    return next(c for c in MOVES + PRODUCTS_OF_MOVED if c.name == name)


def only_kernel(case: Case):
    (k,) = kernels_of(fused(case))
    return k


def atens(graph) -> list[str]:
    """The calls that are no kernels."""
    return [n.name for n in graph.nodes if n.target is not kernel and not is_free(n)]


# ---- numbers ----


@by_name(MOVES + PRODUCTS_OF_MOVED)
def test_moves_and_what_is_around_them_are_one_kernel_that_equals_eager(case):
    graph, one = graph_of(case), fused(case)
    assert len(kernels_of(one)) == 1 and not atens(one)
    for sizes in case.sizes:
        inputs = move_inputs(case, sizes)
        assert_equal(run(one, inputs, sizes), run(graph, inputs, sizes), scale=20)


@by_name([random_move(seed) for seed in range(150)])
def test_random_moves_equal_eager(case):
    for sizes in case.sizes:
        inputs = move_inputs(case, sizes)
        assert_equal(run(fused(case), inputs, sizes), run(graph_of(case), inputs, sizes), scale=20)


def test_most_random_moves_are_in_kernels():
    def moves(graphs) -> int:
        return sum(n.target in reads.READS for g in graphs for n in g.nodes)

    cases = [random_move(seed) for seed in range(150)]
    fixed = [c for c in cases if all(isinstance(s, int) for x in c.inputs for s in x.shape)]
    for some, least, share in ((cases, 150, 0.4), (fixed, 100, 0.3)):
        before, left = moves(map(graph_of, some)), moves(map(fused, some))
        assert before > least and left < share * before


@by_name([named(n) for n in ("gather", "padded_index", "index_two", "indexed_epilogue")])
def test_they_are_stored_and_read_again(case):
    graph = fused(case)
    again = serial.load(serial.dump(graph, []), [])
    assert kernels_of(again) == kernels_of(graph)
    inputs = move_inputs(case, {})
    assert_equal(run(again, inputs, {}), run(graph, inputs, {}))


# ---- code ----


@pytest.mark.parametrize("target", TARGETS)
@by_name([named(name) for name in ("cat_long_sum", "padded_index", "embedding_long", "embedding_product")])
def test_it_compiles_without_spills(case, target):
    b = offline.compile(only_kernel(case), target)
    assert b.spills == 0 and 0 < b.regs <= 255


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_compile_without_spills(target):
    for case in MOVES + PRODUCTS_OF_MOVED + [random_move(seed) for seed in range(20)]:
        for k in kernels_of(fused(case)):
            assert offline.compile(k, target).spills == 0, case.name


def test_an_index_is_checked_on_the_device_and_nothing_else_is():
    def ptx(name: str) -> str:
        return offline.compile(only_kernel(named(name)), "cuda:90").ptx

    assert "assertfail" in ptx("gather") and "assertfail" in ptx("indexed_epilogue")
    assert "assertfail" not in ptx("cat") and "assertfail" not in ptx("padded_product")


@pytest.mark.parametrize("bad", [-1, 9])
def test_an_index_out_of_range_is_an_error(bad):
    case = named("gather")
    x, index = move_inputs(case, {})
    index[2, 1] = bad
    with pytest.raises(IndexError, match="out of range of 9"):
        run(fused(case), [x, index], {}, evaluate)


def test_an_index_that_no_guard_lets_through_is_not_checked():
    case = Case(
        "guarded", lambda x, w, i: cat(x * 2, at(w, i)) + 1, (In(F32, (3, 6)), In(F32, (5, 6)), In(I64, (0,)))
    )
    x, w, index = move_inputs(case, {})
    assert_equal(run(fused(case), [x, w, index], {}), [x * 2 + 1])


def test_the_verifier_reads_picks():
    k = only_kernel(named("index_select"))
    i, load = next((i, x) for i, x in enumerate(k.body) if isinstance(x, Load) and x.picks)

    def with_pick(pick: Pick):
        body = (*k.body[:i], dataclasses.replace(load, picks=(pick,)), *k.body[i + 1 :])
        return dataclasses.replace(k, body=body)

    (pick,) = load.picks
    with pytest.raises(InvalidGraph, match="reaches outside of 63 elements"):
        verify(with_pick(Pick(pick.value, pick.stride, pick.size + 1)))
    with pytest.raises(InvalidGraph, match="a value that is not there"):
        verify(with_pick(Pick(i, pick.stride, pick.size)))


# ---- which are kernels ----


@pytest.mark.parametrize(
    ("f", "inputs"),
    [
        (lambda x, y: cat(x, y, x, y, x) * 2, (In(F32, (3, 4)),) * 2),
        (lambda x, i: gather(x * 2, 1, i) + 1, (In(F32, (3, 4)), In(I64, (3, 2)))),
        (lambda x, i: gather(x.call(aten.transpose.int, 0, 1), 1, i) + 1, (In(F32, (9, 4)), In(I64, (3, 2)))),
        (lambda x, y: into_slice(x, y, 0, 0, 6, 2) * 2, (In(F32, (6, 4)), In(F32, (3, 4)))),
        (lambda x, y: cat(x.sum([1], True) * x, y) + 1, (In(F32, (3, 4)), In(F32, (3, 4)))),
    ],
    ids=["five pieces", "index of a result", "index of a view", "steps", "a reduction in a piece"],
)
def test_what_does_not_fit_is_right_beside_a_kernel(f, inputs):
    case = Case("beside", f, inputs)
    graph = graph_of(case)
    given = move_inputs(case, {})
    assert_equal(run(fused(case), given, {}), run(graph, given, {}), scale=20)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda x, y: torch.cat([x * 2, y])[-1:] + 1, ((4, 5), (4, 5))),
        (lambda x: F.pad(x * 2, (1, 0))[:, 3] + 1, ((4, 5),)),
        (lambda x, y: torch.stack([x * 2, y])[1] * 3, ((4, 5), (4, 5))),
        (lambda x, y: torch.slice_scatter(x * 2, y.double(), 1, 2, 4) + 1, ((4, 5), (4, 2))),
        (lambda x: (x * 2, (x * 2).unfold(0, 4, 3) + 1), ((8,),)),
        (
            lambda x: x.reshape(12, 4).flip(0).reshape(2, 6, 4).transpose(0, 1).reshape(12, 4).sum(1) * 2,
            ((2, 6, 4),),
        ),
    ],
    ids=[
        "the last row",
        "a column of a pad",
        "one of a stack",
        "another dtype",
        "overlapping windows",
        "flipped",
    ],
)
def test_what_is_read_in_part_or_twice_is_right(f, shapes):
    inputs = [torch.randn(s) for s in shapes]
    graph, kernels, _ = offline.compile_graph(fxfunc.jit(f).lower(*inputs).graph)
    wanted = f(*inputs)
    assert kernels
    assert_equal(run(graph, inputs, {}), wanted if isinstance(wanted, tuple) else (wanted,))


@pytest.mark.parametrize(
    "how", [lambda y: y.t().reshape(-1), lambda y: y.reshape(-1)], ids=["turned", "flat"]
)
def test_a_pad_of_what_a_symbolic_size_reshapes_is_right(how):
    y = torch.randn(5, 2)
    f = lambda y: F.pad(how(y), (1, -1)) + 1
    graph = fxfunc.jit(f).lower(fxfunc.spec(y, {0: fxfunc.Dim("T")})).graph
    assert_equal(run(offline.fused(graph, "ieee", {}, []), [y], {"T": 5}), [f(y)])


@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (lambda x, s: torch.slice_scatter(x * 2, s, 1, 0, 4) + 1, (4, 2)),
        (lambda x, s: torch.select_scatter(x * 2, s, 0, 1) + 1, (2,)),
        (lambda x, s: torch.diagonal_scatter(x * 2, s) + 1, (2,)),
    ],
    ids=["slice", "select", "diagonal"],
)
def test_a_value_that_does_not_fit_is_refused_as_in_eager(f, shape):
    inputs = [torch.randn(4, 5), torch.randn(shape)]
    with pytest.raises(RuntimeError, match="expected src to have a size"):
        f(*inputs)
    with pytest.raises(RuntimeError, match="expected src to have a size"):
        run(offline.fused(fxfunc.jit(f).lower(*inputs).graph, "ieee", {}, []), inputs, {})


def test_a_mean_loss_of_halves_is_summed_in_float32():
    x, y = torch.full((8000, 3), -10.5).half(), torch.zeros(8000, dtype=torch.int64)
    graph = fxfunc.jit(lambda x, y: F.nll_loss(x, y) * 1).lower(x, y).graph
    assert run(offline.fused(graph, "ieee", {}, []), [x, y], {}) == [torch.tensor(10.5).half()]


def explained(f, *inputs) -> tuple[list, str]:
    compiled = fxfunc.jit(f).lower(*inputs).compile(backend="triton", target="cuda:90")
    return compiled.kernels, compiled.explain()


def test_explain_says_why_a_move_is_in_no_kernel():
    x = torch.randn(3, 4)
    _, text = explained(lambda x: torch.cat([x, x + 1, x, x, x]) * 2, x)
    assert re.search(r"cat +aten.cat.default +ATen +more than 4 pieces", text)
    _, text = explained(lambda x: torch.cat([x, x]), x)
    assert re.search(r"cat +aten.cat.default +ATen +alone", text)


# ---- what PyTorch has as one call ----

X, W, Y = torch.randn(16, 24), torch.rand(24), torch.arange(16) % 24
CHAINS = {
    "layer norm, gelu, residual": lambda x, w, y: x + F.gelu(F.layer_norm(x, (24,), w, w)),
    "softmax": lambda x, w, y: F.softmax(x * w, -1),
    "log_softmax": lambda x, w, y: F.log_softmax(x * w, -1),
    "variance": lambda x, w, y: x.var(0).sqrt() * w,
    "batch norm": lambda x, w, y: F.batch_norm(x, None, None, w, w, True).relu(),
    "group norm": lambda x, w, y: F.group_norm(x, 4, w, w).relu(),
    "embedding": lambda x, w, y: F.layer_norm(F.embedding(y.clamp(0, 1), x) + w, (24,)),
}


@pytest.mark.parametrize("rows", [(16,), (2, 16, 40)], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("f", CHAINS.values(), ids=CHAINS)
def test_norms_and_softmax_are_one_kernel_with_what_is_around_them(f, rows):
    x = X if len(rows) == 1 else fxfunc.spec(X, {0: fxfunc.Dim("rows")})
    one = offline.fused(fxfunc.jit(f).lower(x, W, Y).graph, "ieee", {}, [])
    assert len(kernels_of(one)) == 1 and len(atens(one)) <= (f is CHAINS["variance"])  # how many are free
    for n in rows:
        inputs = [torch.randn(n, 24), W, Y]
        assert_equal(run(one, inputs, {"rows": n}), [f(*inputs)], scale=20)


def test_a_label_loss_reads_its_labels_in_a_kernel():
    kernels, text = explained(lambda x, y: F.cross_entropy(x * 2, y), X, Y)
    assert any("gather" in b.name for b in kernels) and " ATen " not in text


def test_a_decomposition_for_a_gpu_is_made_where_there_is_none():
    """Indexing by a tensor on a GPU asks for the driver."""
    w, i = (Val(s, d, torch.device("cuda:0")) for s, d in (((5, 3), F32), ((4,), I64)))
    graph = taken_apart(aten.embedding.default, (w, i), {})
    assert graph is not None and all(v.device.type == "cuda" for v in graph.out_vals)
    assert taken_apart(aten.eye.default, (3,), {"device": torch.device("cuda:0")}) is not None
