"""Products of matrices as Triton kernels with what is before and after them: numbers, blocks, code, and which stay ATen's."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, I64, Case, In, assert_equal, graph_of, run
from product_cases import PRODUCTS, graphs, mm, product_inputs, random_product, relu

from fxfunc.codegen import dots, offline, products
from fxfunc.codegen.axes import Axes, axes
from fxfunc.codegen.backends import Program
from fxfunc.codegen.evaluate import evaluate
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import kernel

pytest.importorskip("triton")
aten = torch.ops.aten
LIMITS = {"cuda:80": 160 * 1024, "cuda:90": 224 * 1024}


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def named(name: str) -> Case:
    return next(c for c in PRODUCTS if c.name == name)


def only_kernel(case: Case):
    (k,) = kernels_of(graphs(case)[1])
    return k


@by_name(PRODUCTS + [random_product(seed) for seed in range(30)])
def test_a_product_and_what_is_around_it_are_one_kernel_that_equals_eager(case):
    graph, fused = graphs(case)
    (k,) = kernels_of(fused)
    assert len([n for n in fused.nodes if n.target in (aten.mm.default, aten.bmm.default)]) == 0
    for sizes in case.sizes:
        inputs = product_inputs(case, sizes)
        assert_equal(run(fused, inputs, sizes, evaluate), run(graph, inputs, sizes), scale=20)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
@by_name([c for c in PRODUCTS if c.name in ("linear", "rows", "gate", "bf16", "described")])
def test_it_compiles_without_spills_and_within_shared_memory(case, target):
    b = offline.compile(only_kernel(case), target)
    assert b.spills == 0 and 0 < b.regs <= 255 and b.smem <= LIMITS[target]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_all_compile_within_bounds(target):
    for case in PRODUCTS + [random_product(seed) for seed in range(10)]:
        b = offline.compile(only_kernel(case), target)
        assert b.spills == 0 and b.smem <= LIMITS[target], case.name


@pytest.mark.parametrize(
    ("precision", "has"), [("ieee", False), ("bf16x6", False), ("tf32x3", True), ("tf32", True)]
)
def test_tf32_is_used_only_if_asked_for(precision, has):
    for target in LIMITS:
        assert ("tf32" in offline.compile(only_kernel(named("linear")), target, precision).ptx) == has


def test_half_products_on_hopper_read_through_descriptors_into_tensor_cores():
    ptx = offline.compile(only_kernel(named("described")), "cuda:90").ptx
    assert "cp.async.bulk.tensor" in ptx and "wgmma" in ptx
    assert "cp.async.bulk" not in offline.compile(only_kernel(named("described")), "cuda:80").ptx


@pytest.mark.parametrize("step", [260, 263])
def test_a_factor_whose_rows_are_not_aligned_is_read_without_a_descriptor(step):
    """Descriptors need rows that begin at multiples of 16 bytes."""
    f = named("described").f
    case = Case("odd", f, (In(F16, (64, 120, step)), In(F16, (64, step, 128))))
    k = only_kernel(case)
    text = dots.source(k, products.blocks(k, 90, "ieee"), "ieee")
    assert len(re.findall("make_tensor_descriptor", text)) == 1


def test_rows_columns_and_batch():
    assert axes(only_kernel(named("scores"))) == Axes((0,), (1,), (2,))
    assert axes(only_kernel(named("heads"))) == Axes((), (0, 1), (2, 3))
    # a matrix that all of a batch share has more columns, not a batch
    assert axes(only_kernel(named("broadcast"))) == Axes((), (1,), (0, 2))


def test_blocks_follow_from_shapes_and_there_are_enough_of_them():
    def blocks(rows: int, columns: int, dtype=F32):
        k = only_kernel(
            Case("b", lambda x, w: relu(mm(x, w)), (In(dtype, (rows, 512)), In(dtype, (512, columns))))
        )
        b = products.blocks(k, 90, "bf16x6")
        assert products.programs(k, (b.rows, b.columns)) == -(-rows // b.rows) * -(-columns // b.columns)
        return b

    assert (blocks(4096, 4096, BF16).rows, blocks(4096, 4096, BF16).columns) == (128, 128)
    assert (blocks(4096, 20).rows, blocks(4096, 20).columns) == (32, 32)
    assert blocks(256, 256).rows == 32


def test_terms_are_int64_where_a_factor_has_2_to_the_31_elements():
    k = only_kernel(Case("wide", lambda x, w: relu(mm(x, w)), (In(F16, (16, 64)), In(F16, (64, 2**26)))))
    text = dots.source(k, products.blocks(k, 90, "ieee"), "ieee")
    assert "term = (start + tl.arange(0, 64)).to(tl.int64)" in text and "descriptor" not in text


def test_names_that_mean_something_there_are_not_taken():
    graph = graph_of(named("linear"))
    for n, name in zip(
        (*graph.inputs, *graph.nodes), ("row0", "tl", "start", "pid", "mm", "height"), strict=True
    ):
        n.name = name
    (k,) = kernels_of(fuse(graph, takes=lambda n: True))
    text = dots.source(k, products.blocks(k, 80, "ieee"), "ieee")
    assert (
        not re.search(r"^ +(tl|start) = ", text, re.M)
        and len(re.findall(r"^ +(pid|row0|height) = ", text, re.M)) == 3
    )


# ---- which are kernels ----


def compiled(f, *inputs):
    fused, *_ = offline.compile_graph(graph_of(Case("c", f, inputs)), "cuda:90")
    return [n for n in fused.nodes if n.target is kernel], [n for n in fused.nodes if n.target is not kernel]


@pytest.mark.parametrize(
    ("why", "x", "w"),
    [
        ("a large product", In(F32, (2048, 2048)), In(F32, (2048, 2048))),
        ("few blocks", In(F32, (32, 4096)), In(F32, (4096, 32))),
        ("a product of torch.float64", In(F64, (32, 32)), In(F64, (32, 32))),
        ("a long sum", In(F32, (1, 2**20)), In(F32, (2**20, 4))),
    ],
)
def test_a_product_that_aten_does_better_says_why(why, x, w):
    kernels, rest = compiled(lambda x, w: relu(mm(x, w)) * 2, x, w)
    (product,) = [n for n in rest if n.target is aten.mm.default]
    assert len(kernels) == 1
    assert products.why_aten(product, "bf16x6").startswith(why)


def test_explain_says_why_a_call_is_in_no_kernel():
    def f(x, w, v):
        return relu(mm(x, w)) * 2, mm(x, v), x.call(aten.sort.default)[0]

    graph = graph_of(Case("explained", f, (In(F32, (2048, 2048)), In(F32, (2048, 2048)), In(F32, (2048, 8)))))
    fused, kernels, notes = offline.compile_graph(graph, "cuda:90")
    text = Program(graph, "triton", "cuda:90", None, fused, list(kernels.values()), notes=notes).explain()
    assert re.search(r"mm +aten.mm.default +ATen +a large product, which ATen multiplies faster", text)
    assert re.search(r"mm_2 +aten.mm.default +ATen +alone", text)
    assert re.search(r"aten.sort.default +ATen +aten.sort.default is no kernel", text)


def test_a_product_alone_stays_atens():
    kernels, rest = compiled(mm, In(F32, (64, 64)), In(F32, (64, 64)))
    assert not kernels and [n.target for n in rest] == [aten.mm.default]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: mm(x.exp() * 2, w),  # would be computed again for each block of columns
        lambda x, w: mm(x * 2, w).sum([1]),
        lambda x, w: mm(relu(mm(x, w) + 1), w) * 2,
        lambda x, w: mm(x.sum([1], True) * x, w) * 2,
        lambda x, w: (
            mm(x, w).call(aten.unsqueeze.default, -1)
            * w.call(aten.slice.Tensor, 0, 0, 33).call(aten.unsqueeze.default, 1).expand(33, 40, 40)
        ),
    ],
    ids=["expensive", "sum", "chain", "norm", "along the terms"],
)
def test_what_does_not_fit_in_one_kernel_is_right_in_several(f):
    case = Case("several", f, (In(F32, (33, 40)), In(F32, (40, 40))))
    graph, fused = graphs(case)
    inputs = product_inputs(case, {})
    assert_equal(run(fused, inputs, {}, evaluate), run(graph, inputs, {}), scale=40)


def test_integers_stay_atens():
    kernels, rest = compiled(lambda x, w: mm(x, w) * 2, In(I64, (8, 8)), In(I64, (8, 8)))
    assert aten.mm.default in [n.target for n in rest]


def test_symbolic_sizes_are_arguments():
    k = only_kernel(named("rows"))
    b = offline.compile(k)
    assert k.sizes == ("T",) and b.types[-1] == "i64" and b.programs.at({"T": 97}) == 4
