"""The loop IR: every row agrees with ATen, groups are found and legal, the verifier refuses what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import (
    BOOL,
    F32,
    F64,
    I64,
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    Case,
    In,
    T,
    assert_equal,
    graph_of,
    inputs_of,
    kernel_of,
    random_case,
    run,
)

from fxfunc.codegen.evaluate import evaluate
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import (
    Apply,
    Arg,
    Const,
    Index,
    Kernel,
    Load,
    Reduce,
    Store,
    kernel,
    verify,
)
from fxfunc.codegen.rows import POINTWISE, REDUCING
from fxfunc.passes.errors import InvalidGraph

aten = torch.ops.aten


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


# ---- numbers ----


@by_name(OPS + OPS_F64 + OPS_BF16)
def test_op_as_a_kernel_equals_aten(case: Case):
    graph = graph_of(case)
    k, operands = kernel_of(graph)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        env = dict(zip(graph.inputs, inputs, strict=True))
        assert_equal(evaluate(k, [env[n] for n in operands], sizes), run(graph, inputs, sizes))


def test_every_row_has_a_case():
    called = {n.target for case in OPS for n in graph_of(case).nodes}
    assert not (POINTWISE.keys() | REDUCING.keys()) - called


@by_name(PATTERNS)
def test_fused_graph_equals_eager(case: Case):
    graph = graph_of(case)
    fused = fuse(graph)
    assert kernels_of(fused)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(fused, inputs, sizes), run(graph, inputs, sizes), scale=4)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize("seed", range(60))
def test_random_program_fused_equals_eager(seed: int, dtype: torch.dtype):
    case = random_case(seed, dtype)
    graph = graph_of(case)
    fused = fuse(graph)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(fused, inputs, sizes), run(graph, inputs, sizes), scale=20)


# ---- what is fused ----


def fused_of(f, *inputs: In):
    return fuse(graph_of(Case("fused", f, inputs)))


def kinds(graph) -> list[str]:
    return [n.target.name if n.target is kernel else n.target.__name__ for n in graph.nodes]


ROW, MATRIX = In(F32, (8,)), In(F32, (8, 8))


def test_a_chain_with_its_reduction_and_epilogue_is_one_kernel():
    assert kinds(fused_of(lambda x, y: ((x * y).sin().sum([1]) / 3).exp(), MATRIX, ROW)) == ["kernel"]


def test_matmul_stays_aten_between_two_kernels():
    fused = fused_of(lambda x, w: ((x + 1).sin() @ w + 1).sin(), MATRIX, MATRIX)
    assert kinds(fused) == ["kernel", "mm.default", "kernel"]


def test_one_call_alone_stays_aten():
    assert kinds(fused_of(lambda x: x.sin(), MATRIX)) == ["sin.default"]


def test_groups_that_a_matmul_connects_are_not_merged():
    def f(x, w):
        a = (x + 1).sin()
        return a * (a @ w)

    fused = fused_of(f, MATRIX, MATRIX)
    assert kinds(fused) == ["kernel", "mm.default", "mul.Tensor"]


def test_views_and_constants_cost_nothing():
    def f(x):
        y = x.permute([1, 0]).reshape(4, 16).call(aten.slice.Tensor, 1, 0, 8)
        return y * 2 + x.full([8], 1.0)

    (k,) = kernels_of(fused_of(f, MATRIX))
    assert [type(i) for i in k.body].count(Load) == 1 and kinds(fused_of(f, MATRIX)) == ["kernel"]


def test_a_value_read_outside_is_stored_by_the_kernel_that_computes_it():
    def f(x, w):
        a = (x + 1).sin()
        return a.permute([1, 0]) @ w, a.sum([1])

    fused = fused_of(f, MATRIX, MATRIX)
    (k,) = kernels_of(fused)
    assert len(k.outputs) == 2 and kinds(fused) == [
        "kernel",
        "getitem",
        "getitem",
        "permute.default",
        "mm.default",
    ]


@by_name([*PATTERNS, *map(random_case, range(20))])
def test_every_call_is_computed_in_one_place(case: Case):
    """So what is compared with something derived from it (ties of amax) has the same bits on both sides."""
    fused = fuse(graph_of(case))
    made = [name for n in fused.nodes if n.target is kernel for name in n.meta["origin"][5:-1].split(", ")]
    made += [n.name for n in fused.nodes if n.target in POINTWISE.keys() | REDUCING.keys()]
    assert len(made) == len(set(made))


def test_costly_work_is_not_repeated_along_a_broadcast_axis():
    fused = fused_of(lambda x, y: (x + 1).exp() + y, ROW, MATRIX)
    assert kinds(fused) == ["kernel", "add.Tensor"]


def test_equal_kernels_are_one_object_whatever_their_names():
    def f(x, w):
        return (((x + 1).sin() @ w) + 1).sin() @ w

    fused = fused_of(f, MATRIX, MATRIX)
    assert len(kernels_of(fused)) == 1 and kinds(fused).count("kernel") == 2


def test_kernels_that_differ_in_a_constants_type_or_sign_differ():
    def of(value, dtype=F32):
        return Kernel((1,), (), (Const(value, dtype),))

    assert of(1) != of(1.0) and of(0.0) != of(-0.0) and of(1.0) != of(1.0, F64)
    assert of(float("nan")) == of(float("nan"))


def test_large_reductions_run_in_two_phases_over_fixed_chunks():
    (first, second) = kernels_of(fused_of(lambda x: (x * x).sum([0]).sqrt(), In(F32, (2**20,))))
    assert first.outputs[0].shape == second.inputs[0].shape == (256,)
    (only,) = kernels_of(fused_of(lambda x: (x * x).sum([1]).sqrt(), In(F32, (2**10, 2**10))))
    assert only.outputs[0].shape == (2**10,)


def test_fusing_is_deterministic():
    case = random_case(7)
    assert str(fuse(graph_of(case))) == str(fuse(graph_of(case)))


# ---- the IR itself ----


def row_sum(**changes) -> Kernel:
    """Sums the rows of sin(x), x of shape (3, 4)."""
    body = (Load(0, Index(0, (4,), (1,)), (4,), name="x"), Apply("sin", (0,), F32), Reduce("sum", 1, (4,), (0,)),
            Store(1, Index(0, (1,), (0,)), 2, (1,)))  # fmt: skip
    return dataclasses.replace(
        Kernel((3,), (Arg((3, 4), F32), Arg((3,), F32, True)), body, "row_sum"), **changes
    )


def with_instr(i: int, instr) -> Kernel:
    body = list(row_sum().body)
    body[i] = instr
    return row_sum(body=tuple(body))


def test_text_is_one_line_an_instruction():
    assert str(row_sum()) == (
        "row_sum(arg0: float32[3,4], arg1: float32[3] out) for [3]:\n"
        "  x: float32[4] = arg0[4*g0 + t0]\n"
        "  v1: float32[4] = sin(x)\n"
        "  v2: float32[1] = sum(v1, axes=[0])\n"
        "  arg1[g0] = v2"
    )


def test_evaluate_follows_the_body():
    x = torch.randn(3, 4)
    torch.testing.assert_close(evaluate(verify(row_sum()), [x])[0], x.sin().sum(1))


WRONG = {
    "reads a value that is not there": with_instr(1, Apply("sin", (1,), F32)),
    "no such operation": with_instr(1, Apply("sine", (0,), F32)),
    "mixes dtypes": with_instr(1, Apply("sin", (0,), F64)),
    "is for floating point": row_sum(args=(Arg((3, 4), I64), Arg((3,), F32, True)),
                                     body=(row_sum().body[0], Apply("sin", (0,), I64))),
    "the condition is not bool": with_instr(1, Apply("where", (0, 0, 0), F32)),
    "no such reduction or axis": with_instr(2, Reduce("sum", 1, (4,), (1,))),
    "reduces torch.float32": with_instr(2, Reduce("any", 1, (4,), (0,))),
    "tiles .* do not broadcast": with_instr(2, Reduce("sum", 1, (5,), (0,))),
    "an index of rank": with_instr(0, Load(0, Index(0, (4, 1), (1,)), (4,))),
    "reaches outside of 12 elements": with_instr(0, Load(0, Index(1, (4,), (1,)), (4,))),
    "loads read inputs": with_instr(0, Load(1, Index(0, (1,), (0,)), (1,))),
    "does not cover": row_sum(args=(Arg((3, 4), F32), Arg((4,), F32, True))),
    "stores torch.float32 to torch.bool": row_sum(args=(Arg((3, 4), F32), Arg((3,), BOOL, True))),
    "each output must be stored exactly once": row_sum(body=row_sum().body[:3]),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_verify_refuses(message: str):
    with pytest.raises(InvalidGraph, match=message):
        verify(WRONG[message])


def test_sizes_are_the_symbols_a_kernel_takes():
    (k,) = kernels_of(fused_of(lambda x: x.sin() * T, In(F32, (T, 4))))
    assert k.sizes == ("T",)
