"""Several kernels as one launch: which join, in what order, and that numbers stay as they are."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import F32, TOGETHER, Case, In, assert_equal, graph_of, inputs_of, random_case, run

from fxfunc.codegen import offline, products, serial
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import kernel
from fxfunc.codegen.mapped import Together
from fxfunc.codegen.together import together
from fxfunc.codegen.written import write

pytest.importorskip("triton")
aten = torch.ops.aten


def named(name: str) -> Case:
    return next(c for c in TOGETHER if c.name == name)


def joined(case: Case):
    return together(fuse(graph_of(case)))


def parts_of(graph) -> list[int]:
    """How many kernels each launch of several has."""
    return [len(k.parts) for k in kernels_of(graph) if isinstance(k, Together)]


@pytest.mark.parametrize("case", TOGETHER + [random_case(seed) for seed in range(30)], ids=lambda c: c.name)
def test_numbers_stay_as_they_are(case):
    graph = joined(case)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(graph, inputs, sizes), run(graph_of(case), inputs, sizes), scale=20)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("step", [4]),
        ("sums", [5]),
        ("sums_of_rows", [3]),
        ("waiting", [2, 2]),
        ("many", [16, 16, 8]),
        ("same", [3]),
    ],
)
def test_what_waits_for_nothing_joins(name, parts):
    graph = joined(named(name))
    assert parts_of(graph) == parts
    assert not [n for n in graph.nodes if n.target is aten.sum.dim_IntList]


def test_a_chain_stays_apart():
    case = Case(
        "chain", lambda x, w: ((x * 2).exp().call(aten.mm.default, w) + 1).sin(), (In(F32, (8, 8)),) * 2
    )
    graph = joined(case)
    assert parts_of(graph) == [] and len(kernels_of(graph)) == 2


def test_what_a_constant_is_like_is_not_computed_twice():
    def f(x, w):
        y = (x * 2).tanh()
        return y, w.exp(), x.builder.emit(aten.full_like.default, (y, 3.0), {}).call(aten.mm.default, w)

    graph = joined(Case("like", f, (In(F32, (6, 8)), In(F32, (8, 4)))))
    assert len([n for n in graph.nodes if n.target is kernel]) == 1


def test_a_large_kernel_does_not_join():
    case = Case("large", lambda x, y: (x.sin() * 2, y.sin() * 2), (In(F32, (2**11, 2**10)), In(F32, (4,))))
    assert parts_of(joined(case)) == []


def test_programs_are_those_of_all_parts():
    (k,) = [k for k in kernels_of(joined(named("step"))) if isinstance(k, Together)]
    w = write(k, 90, "ieee")
    assert products.programs(k, w.block) == sum(
        products.programs(p, (n,)) for p, n in zip(k.parts, w.block, strict=True)
    )
    assert len(w.block) == 4 and products.programs(k, w.block) > 4


@pytest.mark.parametrize("name", ["step", "sums", "same"])
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_it_compiles_without_spills(name, target):
    for k in kernels_of(joined(named(name))):
        b = offline.compile(k, target)
        assert b.spills == 0 and b.types[len(k.args) :] == ("i64",) * len(k.sizes)


def test_it_is_stored_and_read_again():
    graph = joined(named("same"))
    again = serial.load(serial.dump(graph, []), [])
    assert kernels_of(again) == kernels_of(graph)
    inputs = inputs_of(named("same"), {"T": 4})
    assert_equal(run(again, inputs, {"T": 4}), run(graph, inputs, {"T": 4}))


def test_explain_has_the_calls_of_all_parts():
    (n,) = [n for n in joined(named("waiting")).nodes if n.target is kernel][:1]
    assert [r.op for r in n.meta["members"]] == [
        "aten.sin.default",
        "aten.mul.Tensor",
        "aten.cos.default",
        "aten.mul.Tensor",
    ]


def test_calls_that_are_alone_are_kernels_where_nothing_else_is_atens():
    """So that the program can be a CUDA graph."""
    inputs = (In(F32, (300, 128, 128)), In(F32, (4, 5)))

    def left(f) -> list[str]:
        fused = offline.fused(graph_of(Case("alone", f, inputs)), "ieee", {}, [])
        return [n.name for n in fused.nodes if n.target is not kernel]

    assert not left(lambda x, y: x.sum([0]))
    assert left(lambda x, y: (x.sum([0]), y.call(aten.sort.default)[0])) == ["sum_1", "sort", "item"]
