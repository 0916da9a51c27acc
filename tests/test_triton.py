"""The Triton emitter: its text, what the interpreter makes of it, and what compiles without a device."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    F32,
    F64,
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    TOGETHER,
    Case,
    In,
    T,
    graph_of,
    kernel_of,
    random_case,
)
from kernel_corpus import fingerprint

from fxfunc.codegen import offline, triton
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.launch import Binary
from fxfunc.codegen.loops import ELEMENTWISE, kernel
from fxfunc.passes.errors import BackendError

pytest.importorskip("triton")
HERE = Path(__file__).parent
aten = torch.ops.aten


def pattern(name: str) -> Case:
    return next(c for c in PATTERNS if c.name == name)


def only_kernel(case: Case):
    (k,) = kernels_of(fuse(graph_of(case)))
    return k


GOLDEN = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def add_sin_sum_mul(x_ptr, x_2_ptr, mul_out, T):
    row = tl.program_id(0).to(tl.int64) * 8 + tl.arange(0, 8)[:, None]
    row_in = row < T
    col = tl.arange(0, 64)[None, :]
    col_in = col < 40
    x = tl.load(x_ptr + row * 40 + col, mask=row_in & col_in, other=0)
    x_2 = tl.load(x_2_ptr + col, mask=col_in, other=0)
    add = x + x_2
    sin = libdevice.sin(add)
    sum_1 = tl.sum(tl.where(col_in, sin, tl.full([1, 1], 0.0, tl.float32)), axis=1, keep_dims=True)
    mul = sum_1 * 0.5
    tl.store(mul_out + row, mul, mask=row_in)
"""


def test_source_reads_like_the_graph():
    case = Case("golden", lambda x, b: (x + b).sin().sum([1]) * 0.5, (In(F32, (T, 40)), In(F32, (40,))))
    assert triton.source(only_kernel(case)) == GOLDEN


def test_source_shows_the_users_lines(tmp_path):
    model = tmp_path / "model.py"
    model.write_text("def f(x):\n    return x.sin() * 2\n")
    graph = graph_of(Case("lines", lambda x: x.sin() * 2, (In(F32, (8,)),)))
    for n in graph.nodes:
        n.meta["source"] = f"{model}:2"
    (k,) = kernels_of(fuse(graph))
    assert "    # model.py:2  return x.sin() * 2\n    sin = libdevice.sin(x)" in triton.source(k)


def test_names_that_mean_something_to_the_emitter_are_not_taken():
    graph = graph_of(Case("names", lambda x: x.sin() * 2 + 1, (In(F32, (T, 3)),)))
    for n, name in zip((*graph.inputs, *graph.nodes), ("row", "tl", "T", "maximum"), strict=True):
        n.name = name
    (k,) = kernels_of(fuse(graph))
    assert not re.search(r"^    (tl|T|maximum) = ", triton.source(k), re.M)


def test_every_operation_has_a_template():
    assert ELEMENTWISE.keys() == triton.TEMPLATES.keys()


def test_offsets_are_int64_when_sizes_are_symbolic_or_large():
    def wide(*shape) -> bool:
        return triton.schedule(only_kernel(Case("w", lambda x: x.sin() * 2, (In(F32, shape),)))).wide

    assert (wide(T, 4), wide(2**16, 2**15), wide(2**15, 2**15)) == (True, True, False)


@pytest.mark.parametrize(("rows", "columns", "wide"), [(2**16, 2**16, True), (2**15, 2**15, False)])
def test_offsets_down_a_long_column_are_int64(rows, columns, wide):
    k = only_kernel(Case("w", lambda x: (x * 2).sum([0]), (In(F32, (rows, columns)),)))
    (col,) = re.findall(r"col = (.*)", triton.source(k))
    assert col.endswith(".to(tl.int64)") == wide


def test_numbers_of_a_range_with_a_large_step_are_int64():
    def f(x):
        return x.builder.emit(aten.arange.start_step, (0, 2**33, 2**21), {"dtype": torch.int64}) + x * 2

    assert triton.schedule(only_kernel(Case("steps", f, (In(torch.int64, (4096,)),)))).wide


def test_blocks_follow_from_shapes_alone(monkeypatch):
    k = only_kernel(pattern("layer_norm"))
    before = triton.schedule(k)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert triton.schedule(k) == before


@pytest.mark.slow
def test_interpreted_source_equals_eager():
    """One process for all cases: the interpreter and the compiler exclude each other."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, HERE / "interpret_kernels.py"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count, _, _ = done.stdout.splitlines()[0].split()
    assert done.stdout.splitlines()[0] == fingerprint() and int(count) >= 200


def test_interpreting_needs_the_interpreter():
    from fxfunc.codegen.interpret import interpret

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("it is on")
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
        interpret(only_kernel(pattern("half")), [])


# ---- compiling for a device this machine may not have ----


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "softmax_over_symbol", "half", "views", "ties"])
def test_compiles_offline_for_cuda_90(name):
    k = only_kernel(pattern(name))
    b = offline.compile(k, "cuda:90")
    assert b.cubin[:4] == b"\x7fELF" and ".target sm_90a" in b.ptx
    assert 0 < b.regs <= 255 and f".maxnreg {offline.maxnreg(triton.schedule(k).warps)}" in b.ptx
    parameters = b.ptx.split(".entry")[1].split(")")[0]
    assert parameters.count(".param ") == len(b.types) + 2  # and the two pointers to scratch
    assert b.types[len(k.args) :] == ("i64",) * len(k.sizes)
    assert spilled(b) == 0


def _normed(x):
    centred = x - x.mean([1], True)
    return centred * ((centred * centred).mean([1], True) + 1e-5).call(aten.rsqrt.default)


@pytest.mark.parametrize("columns", [4096, 5000, 16384])
@pytest.mark.parametrize("name", ["softmax", "norm"])
def test_a_row_is_read_once_if_its_values_fit_in_registers(name, columns):
    f = pattern("softmax_wide").f if name == "softmax" else _normed
    k = only_kernel(Case("row", f, (In(F32, (3, columns)),)))
    text = triton.source(k)
    assert text.count("tl.load(") == 1 and "for block in" not in text
    assert spilled(offline.compile(k, "cuda:90")) == 0


def test_a_row_of_more_values_than_fit_is_read_in_a_loop():
    def f(x, y, z, w):
        parts = [x.exp(), y.exp(), z.exp(), w.exp(), x * y, z * w]
        total = sum(parts[1:], parts[0]).sum([1], True)
        return sum((p * total for p in parts), x)

    k = only_kernel(Case("many", f, (In(F32, (3, 16384)),) * 4))
    assert triton.schedule(k).looped and spilled(offline.compile(k, "cuda:90")) <= 32
    assert triton.schedule(only_kernel(pattern("softmax_wider"))).looped


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=str)
def test_a_call_on_one_element_compiles_alone(shape):
    for f in (lambda x: x * 2, lambda x: x.sum(), lambda x: x.call(aten.amax.default, [])):
        for k in kernels_of(fuse(graph_of(Case("one", f, (In(F32, shape),))), alone=True)):
            assert offline.compile(k, "cuda:90").spills == 0


def test_a_kernel_of_one_call_has_not_the_name_of_a_helper():
    def f(x, y):
        return x.call(aten.maximum.default, y).call(aten.maximum.default, x * y)

    for g in (
        f,
        lambda x, y: x.call(aten.maximum.default, y),
        lambda x, y: (x > y).call(aten.__and__.Tensor, y > 0),
    ):
        _, binaries, _ = offline.compile_graph(graph_of(Case("named", g, (In(F32, (40,)),) * 2)))
        assert all(b.spills == 0 and name not in triton.HELPERS for name, b in binaries.items())


def test_product_sums_are_exact_float32():
    """No TF32 dot, no fused multiply-add: what ATen's elementwise kernels compute, bit for bit."""
    b = offline.compile(
        only_kernel(Case("p", lambda x, y: (x * y + 1).sum([1]) * 2, (In(F32, (64, 64)), In(F32, (64, 64)))))
    )
    assert "tf32" not in b.ptx.lower() and "fma.rn" not in b.ptx and "mma" not in b.ptx


def test_divisions_are_correctly_rounded():
    case = Case("d", lambda x, y: x.call(aten.floor_divide.default, y / x), (In(F32, (64,)),) * 2)
    ptx = offline.compile(only_kernel(case)).ptx
    assert "div.full" not in ptx and ptx.count("div.rn.f32") == 3


def test_subnormal_numbers_are_not_flushed():
    """The logarithm of one is finite: libdevice scales it up first, which it leaves out where they are flushed."""
    ptx = offline.compile(only_kernel(Case("s", lambda x: x.log() * 2, (In(F32, (64,)),)))).ptx
    assert "ftz" not in ptx


def test_equal_kernels_are_emitted_and_compiled_once():
    def f(x, y, w):
        a = ((x + 1).sin() * 2).call(aten.mm.default, w)
        return ((a + 1).sin() * 2).call(aten.mm.default, w) + y

    fused, binaries, _ = offline.compile_graph(
        graph_of(Case("twice", f, (In(F64, (8, 8)), In(F64, (8, 8)), In(F64, (8, 8)))))
    )
    uses = [n.args[0] for n in fused.nodes if n.target is kernel]
    assert len(uses) == 2 and uses[0] is uses[1] and list(binaries) == [uses[0].name]
    (row,) = offline.table(binaries)
    assert row.keys() == {"name", "regs", "spills", "smem", "size"} and row["size"] == len(
        binaries[row["name"]].cubin
    )


def test_equal_kernels_of_two_names_compile_in_one_process():
    k = only_kernel(Case("names", lambda x: (x + 0.375).exp() * 2, (In(F32, (77,)),)))
    for i, precision in enumerate((None, "ieee", "tf32")):
        assert offline.compile(dataclasses.replace(k, name=f"name_{i}"), "cuda:80", precision).regs > 0


@pytest.mark.parametrize("target", ["cuda", "cuda:75", "cuda:9", "hip:gfx90a", "cpu", "cuda:abc"])
def test_an_unknown_target_is_refused_by_name(target):
    with pytest.raises(BackendError, match=re.escape(repr(target))):
        offline.compile_graph(graph_of(pattern("softmax")), target)


def test_without_triton_the_error_says_so(monkeypatch):
    k = only_kernel(Case("none", lambda x: x.cos() * 17, (In(F32, (11,)),)))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="triton is not installed"):
        offline.compile(k)


TARGETS = pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])


def spilled(b: Binary) -> int:
    """Bytes of stack that are not of arrays in the PTX, each aligned to 8: libdevice's sine keeps a table there."""
    arrays = re.findall(r"\.local .*__local_depot\d+\[(\d+)\]", b.ptx)
    return b.spills - sum(-(-int(n) // 8) * 8 for n in arrays)


@pytest.mark.slow
@TARGETS
@pytest.mark.parametrize("cases", [OPS, OPS_F64, OPS_BF16], ids=["f32", "f64", "bf16"])
def test_every_op_compiles_without_spills(cases, target):
    for case in cases:
        b = offline.compile(kernel_of(graph_of(case))[0], target)
        assert b.target == target and b.regs > 0 and spilled(b) == 0, case.name


@pytest.mark.slow
@TARGETS
def test_every_pattern_compiles_without_spills(target):
    for case in PATTERNS + TOGETHER + [random_case(seed) for seed in range(30)]:
        _, binaries, _ = offline.compile_graph(graph_of(case), target)
        assert all(b.target == target and spilled(b) == 0 for b in binaries.values()), case.name
