"""Maps as Triton kernels: which they are, their text, and what it compiles to. What it computes is tested by test_triton.py."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import F32, Case, In, graph_of
from task_cases import TASKS, draw, graph_and_inputs, races, random_tasks, tasks_of

import fxfunc
from fxfunc.bench import registry
from fxfunc.codegen import grid, launch, offline, serial, tiles
from fxfunc.codegen.loops import kernel
from fxfunc.passes.errors import BackendError

pytest.importorskip("triton")
LIMITS = {"cuda:80": 160 * 1024, "cuda:90": 224 * 1024}  # bytes of shared memory
STACK = 2048  # bytes a thread
SMALL = ("per-sample gradients", "an integer carry", "attention")


def tasks(name: str, precision: str = "ieee"):
    case = next(c for c in TASKS if c.name == name)
    found, notes = tasks_of(graph_and_inputs(case, 3)[0], precision)
    assert found and not notes
    return found


def workload(name: str):
    w = registry.find(name)
    return fxfunc.jit(w.function(fxfunc)).lower(*w.inputs(**w.parameters)).graph


GOLDEN = """\
import triton
import triton.language as tl


@triton.jit
def tasks(x_ptr, x_2_ptr, out0_ptr, scratch_ptr):
    i_16 = tl.arange(0, 16)[:, None]
    j_16 = tl.arange(0, 16)[None, :]
    j_8 = tl.arange(0, 8)[None, :]
    program = tl.program_id(0).to(tl.int64)
    task = program
    x_2 = x_2_ptr + task * 54
    out0 = out0_ptr + task * 63
    f = tl.load(x_2 + i_16 * 6 + j_16, mask=(i_16 < 9) & (j_16 < 6), other=0)
    f_2 = tl.load(x_ptr + i_16 * 7 + j_8, mask=(i_16 < 6) & (j_8 < 7), other=0)
    mm = tl.dot(f, f_2, input_precision="ieee", out_dtype=tl.float32)
    mul = mm * 2.0
    tl.store(out0 + i_16 * 7 + j_8, mul, mask=(i_16 < 9) & (j_8 < 7))
"""


def test_source_reads_like_the_graph():
    """A product stays in registers for what follows it; nothing is written that nobody reads."""
    f = fxfunc.vmap(lambda w, x: (x @ w) * 2.0, (None, 0))
    (t,), _ = tasks_of(fxfunc.jit(f).lower(draw(6, 7), draw(4, 9, 6)).graph)
    text = re.sub(r" +# .*\n", "", tiles.source(t, "ieee").text)
    assert text == GOLDEN


# ---- between threads ----


@pytest.mark.parametrize("case", TASKS, ids=[c.name for c in TASKS])
def test_what_a_thread_stored_is_read_after_a_barrier(case):
    for t in tasks_of(graph_and_inputs(case, 3)[0])[0]:
        assert races(tiles.source(t, "ieee").text) == []


@pytest.mark.parametrize("name", ["maml25", "digits", "psg8", "dpsgd-mlp", "lj"])
def test_a_workload_has_no_races_and_would_without_barriers(name):
    texts = [tiles.source(t, "ieee").text for t in tasks_of(workload(name))[0]]
    assert texts and all(races(text) == [] for text in texts)
    bare = [text.replace("tl.debug_barrier()", "pass") for text in texts]
    assert any(races(text) for text in bare)


def test_a_program_without_barriers_is_found(monkeypatch):
    """The emitter, with the line that writes a barrier taken out."""
    t = tasks("a recurrent net")[0]
    lines = tiles.Program.lines
    monkeypatch.setattr(tiles.Program, "lines", lambda p: (x for x in lines(p) if "barrier" not in x))
    assert races(tiles.source.__wrapped__(t, "ieee").text)


# ---- which maps ----


@pytest.mark.parametrize(("f", "args", "why"), [
    (lambda x: x.sort().values * 2, (draw(4, 3),), "aten.sort.default has no place in a kernel"),
    (lambda x: (x @ x).sin(), (draw(4, 200, 200),), "a large product"),
    (lambda x: (x @ x.mT).sin(), (draw(4, 1, 1030),), None),
    (lambda x: x.square().mean(), (draw(4, 9000),), "a reduction of 9000 elements in a task"),
    (lambda x: x * 2, (draw(1, 3),), "1 tasks"),
    (lambda x, y: (x @ y) @ x, (draw(9, 3, 3), draw(9, 3, 3)), "times the work in padding"),
])  # fmt: skip
def test_why_a_map_is_batched(f, args, why):
    found, notes = tasks_of(fxfunc.jit(fxfunc.vmap(f)).lower(*args).graph)
    if why is None:
        assert found and not notes
    else:
        assert not found and len(notes) == 1 and why in notes[0]


def test_what_a_map_draws_is_drawn_before_it():
    f = fxfunc.vmap(lambda x: (x @ x.mT + torch.rand(4)).sin(), randomness="different")
    found, notes = tasks_of(fxfunc.jit(f).lower(draw(3, 4, 9)).graph)
    assert len(found) == 1 and not found[0].body.draws
    assert notes == ["a map of 3 is batched: it draws random numbers"]


def test_a_large_number_of_lines_is_batched(monkeypatch):
    monkeypatch.setattr(grid, "MOST_LINES", 10)
    graph = graph_and_inputs(TASKS[0])[0]
    assert "would compile for long" in tasks_of(graph)[1][0]


def test_a_sum_over_tasks_of_half_precision_is_batched():
    x = draw(3, 5, dtype=torch.float16)
    f = lambda w, x: fxfunc.grad(lambda w: fxfunc.vmap(lambda x: (w * x).sin().sum())(x).sum())(w)
    assert any(
        "a sum over tasks of torch.float16" in n for n in tasks_of(fxfunc.jit(f).lower(x[0], x).graph)[1]
    )


def test_explain_says_which_kernel_and_why_not():
    f = lambda x, y: (fxfunc.vmap(lambda x: (x @ x.mT).sin())(x), fxfunc.vmap(lambda y: y.sort().values)(y))
    compiled = fxfunc.jit(f).lower(draw(3, 9, 20), draw(2, 5)).compile(backend="triton", target="cuda:90")
    text = compiled.explain()
    assert re.search(r"mm +aten.mm.default +kernel tasks", text)
    assert "a map of 2 is batched: aten.sort.default has no place in a kernel" in text


# ---- compiled ----


def bounds(t, target: str) -> launch.Binary:
    b = offline.compile(t, target)
    assert b.cubin[:4] == b"\x7fELF" and b.types[len(t.args)] == "*u8"
    assert b.spills <= STACK and b.smem <= LIMITS[target] and b.regs <= 255
    assert "tf32" not in b.ptx
    return b


@pytest.mark.parametrize(
    "name", [c.name if c.name in SMALL else pytest.param(c.name, marks=pytest.mark.slow) for c in TASKS]
)
def test_tasks_compile_for_cuda_90(name):
    for t in tasks(name, "bf16x6"):
        bounds(t, "cuda:90")


@pytest.mark.slow
@pytest.mark.parametrize("name", [c.name for c in TASKS])
def test_tasks_compile_for_cuda_80(name):
    for t in tasks(name):
        bounds(t, "cuda:80")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_a_meta_gradient_is_one_kernel_and_its_sums(target):
    (t,) = tasks_of(workload("maml25"), offline.precision_for(target))[0]
    bounds(t, target)


@pytest.mark.parametrize(
    ("precision", "has"),
    [("tf32", True), ("tf32x3", True), ("ieee", False), ("bf16x6", False), (None, False)],
)
def test_tf32_only_if_asked(precision, has):
    (t,) = tasks("transposed products")
    assert ("tf32" in offline.compile(t, "cuda:90", precision).ptx) == has


def test_torchs_setting_allows_tf32(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert offline.precision_for("cuda:90") == "tf32" and offline.precision_for("cuda:90", "ieee") == "ieee"


@pytest.mark.parametrize("precision", ["bf16", "TF32", ""])
def test_an_unknown_precision_is_refused_by_name(precision):
    lowered = fxfunc.jit(lambda x: x * 2).lower(draw(3))
    with pytest.raises(BackendError, match=f"no such precision: '{precision}'.*ieee, bf16x6"):
        lowered.compile(backend="triton", target="cuda:90", precision=precision)


def test_other_backends_have_no_precision():
    with pytest.raises(BackendError, match="no precision to choose"):
        fxfunc.jit(lambda x: x * 2).lower(draw(3)).compile(backend="eager", precision="ieee")


def test_blocks_follow_from_shapes_alone(monkeypatch):
    t = tasks("attention")[0]
    before = tiles.source(t, "ieee").text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert tiles.source.__wrapped__(t, "ieee").text == before


# ---- kept ----


def test_files_of_a_kernel_of_tasks_give_it_back():
    t = tasks("any number of tasks")[-1]
    b = offline.compile(t, "cuda:90")
    graph = serial.load(serial.dump(_graph_of(t), []), [])
    (again,) = [n.args[0] for n in graph.nodes if n.target is kernel]
    assert again == t and str(again) == str(t)
    read = launch.read(again, b.files())
    assert (read.workspace, read.programs, read.cubin) == (b.workspace, grid.MOST_PROGRAMS, b.cubin)


def _graph_of(t):
    from fxfunc.passes.graph import Val
    from fxfunc.passes.record import Builder

    b = Builder(None)
    ins = [
        b.input(Val(a.shape, a.dtype, torch.device("cuda:0")), f"x{i}")
        for i, a in enumerate(t.args)
        if not a.output
    ]
    out = b.emit(kernel, (t, *ins), {})
    return b.finish(list(out) if isinstance(out, tuple) else [out])


def test_equal_maps_are_one_kernel():
    f = lambda c: fxfunc.jit(fxfunc.vmap(lambda x: (x @ x.mT).sin() * c)).lower(draw(3, 9, 20)).graph
    (a,), (b,), (c,) = (tasks_of(f(c))[0] for c in (2.0, 2.0, 3.0))
    assert a == b != c and hash(a) == hash(b)


def test_random_programs_have_no_races():
    for seed in range(12):
        assert races(tiles.source(random_tasks(seed)[0], "ieee").text) == []


def test_a_map_whose_kernel_has_more_shared_memory_than_the_target_is_batched_and_says_so(monkeypatch):
    graph, _ = graph_and_inputs(next(c for c in TASKS if c.name == "attention"))
    assert any(b.workspace is not None for b in offline.compile_graph(graph, "cuda:80")[1].values())
    monkeypatch.setitem(offline.SHARED, 80, 1024)
    monkeypatch.setattr(offline.products, "why_aten", lambda n, precision: "to see the map alone")
    _, binaries, notes = offline.compile_graph(graph, "cuda:80")
    assert all(b.workspace is None for b in binaries.values())
    assert any(
        "is batched: its kernel takes" in x and "KiB of shared memory, cuda:80 has 1" in x for x in notes
    )


def test_a_kernel_that_fits_no_device_is_an_error_with_a_way_out(monkeypatch):
    monkeypatch.setitem(offline.SHARED, 80, 8)
    graph = graph_of(Case("sum", lambda x: (x * 2).sum([1]), (In(F32, (64, 4096)),)))
    with pytest.raises(BackendError, match=r"of shared memory, cuda:80 has.*eager"):
        offline.compile_graph(graph, "cuda:80")
