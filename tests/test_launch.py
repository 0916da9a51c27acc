"""The launcher: what it asks of libcuda, argument by argument, with a driver that only records; the rest on a GPU."""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import json

import pytest
import torch
from kernel_cases import F16, F32, PATTERNS, TOGETHER, Case, In, T, assert_equal, graph_of, inputs_of, run
from move_cases import MOVES, PRODUCTS_OF_MOVED, move_inputs
from move_cases import fused as moves_fused
from product_cases import PRODUCTS, graphs, product_inputs
from task_cases import TASKS, graph_and_inputs, tasks_of

from fxfunc.codegen import eager, launch
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.grid import with_tasks
from fxfunc.codegen.loops import Arg, Kernel
from fxfunc.codegen.together import together
from fxfunc.passes import errors
from fxfunc.passes.errors import BackendError
from fxfunc.passes.pipeline import for_aten, lowered

aten = torch.ops.aten
U64, I64 = ctypes.c_uint64, ctypes.c_int64
PARAMETERS = (U64, U64, U64, I64, U64, U64)  # of `binary`: three pointers, T, two pointers to scratch


class RecordingDriver:
    """libcuda as far as the launcher knows: calls succeed and are recorded, handles are numbers.

    `launches` holds grid, block, shared memory and stream of each launch, and its parameters read as `PARAMETERS`.
    """

    def __init__(self, failing: str = "", context: int = 1):
        self.calls: list[tuple[str, tuple]] = []
        self.launches: list[tuple[tuple, list]] = []
        self.failing, self.context = failing, context

    def __getattr__(self, name: str):
        def call(*args):
            self.calls.append((name, args))
            if name == "cuGetErrorString":
                args[1]._obj.value = b"invalid argument"
            elif name == "cuLaunchKernel":
                self.record(*args)
            elif name == "cuCtxGetCurrent":
                args[0]._obj.value = self.context
            elif args and hasattr(args[0], "_obj"):
                args[0]._obj.value = 1000 + len(self.calls)
            return int(name == self.failing)

        return call

    def record(self, function, *rest) -> None:
        *numbers, params, extra = rest
        assert extra is None
        values = [
            ctypes.cast(p, ctypes.POINTER(t)).contents.value for p, t in zip(params, PARAMETERS, strict=True)
        ]
        self.launches.append((tuple(getattr(n, "value", n) for n in numbers), values))

    def named(self, name: str) -> list[tuple]:
        return [args for n, args in self.calls if n == name]


def binary(**changes) -> launch.Binary:
    """A binary of a kernel with two inputs and an output, over T rows."""
    k = Kernel((T,), (Arg((T, 4), F32), Arg((4,), F16), Arg((T,), F32, True)), (), "k")
    fields = dict(kernel=k, name="k", target="cuda:90", cubin=b"code", ptx="", source="", block=(4,), warps=4,
                  types=("*fp32", "*fp16", "*fp32", "i64"), shared=0, regs=8, spills=0)  # fmt: skip
    return launch.Binary(**(fields | changes))


def operands(rows: int = 10) -> list[torch.Tensor]:
    return [torch.zeros(rows, 4), torch.zeros(4, dtype=F16)]


def test_parameters_are_packed_in_order_with_two_null_scratch_pointers():
    lib, xs = RecordingDriver(), operands()
    (out,) = launch.Launcher(binary(), launch.Driver(lib)).start(xs, {"T": 10}, 0, 77)
    ((numbers, params),) = lib.launches
    assert params == [xs[0].data_ptr(), xs[1].data_ptr(), out.data_ptr(), 10, 0, 0]
    assert numbers == (3, 1, 1, 128, 1, 1, 0, 77)
    assert out.shape == (10,) and out.dtype == F32


@pytest.mark.parametrize(
    ("kind", "value"), [("i64", -(2**40)), ("i32", -5), ("fp32", 0.5), ("fp64", 0.1), ("*fp32", 2**63)]
)
def test_a_value_is_packed_as_its_recorded_type(kind, value):
    types = {"i64": I64, "i32": ctypes.c_int32, "fp32": ctypes.c_float, "fp64": ctypes.c_double, "*fp32": U64}
    cells = launch.Cells(("i32", kind))
    cells.pack((7, value, 1, 2))
    found = [ctypes.cast(p, ctypes.POINTER(t)).contents.value
             for p, t in zip(cells.params, (ctypes.c_int32, types[kind], U64, U64), strict=True)]  # fmt: skip
    assert found == [7, value, 1, 2]


def test_a_module_is_loaded_once_for_each_device():
    lib, b = RecordingDriver(), binary()
    start = launch.Launcher(b, launch.Driver(lib)).start
    for device in (0, 0, 1):
        start(operands(), {"T": 10}, device, 0)
    assert [code for _, code in lib.named("cuModuleLoadData")] == [b"code"] * 2
    assert len({args[0].value for args in lib.named("cuLaunchKernel")}) == 2


@pytest.mark.parametrize(("shared", "asked"), [(1024, []), (48 * 1024, []), (100_000, [(8, 100_000)])])
def test_shared_memory_above_48_kb_is_asked_for(shared, asked):
    lib = RecordingDriver()
    launch.Launcher(binary(shared=shared), launch.Driver(lib)).start(operands(), {"T": 10}, 0, 0)
    assert [args[1:] for args in lib.named("cuFuncSetAttribute")] == asked
    assert lib.launches[0][0][6] == shared


def test_scratch_is_allocated_for_every_program():
    lib = RecordingDriver()
    launch.Launcher(binary(scratch=(64, 16)), launch.Driver(lib)).start(operands(), {"T": 10}, 0, 0)
    params = lib.launches[0][1]
    assert params[4] != 0 and params[5] == 0


def parameters_of_a_map(workspace: int) -> list[int]:
    """What the kernel of a map that takes so much memory a program is launched with."""
    lib, seen = RecordingDriver(), []
    b = binary(workspace=workspace, types=("*fp32", "*fp16", "*fp32", "*u8", "i64"))
    lib.record = lambda function, *rest: seen.extend(
        ctypes.cast(p, ctypes.POINTER(t)).contents.value
        for p, t in zip(rest[-2], (U64,) * 4 + (I64, U64, U64), strict=True)
    )
    launch.Launcher(b, launch.Driver(lib)).start(operands(), {"T": 10}, 0, 0)
    return seen


def test_a_map_gets_memory_between_its_outputs_and_its_sizes():
    seen = parameters_of_a_map(256)
    assert seen[3] not in (0, *seen[:3]) and seen[4:] == [10, 0, 0]


def test_a_map_that_takes_no_memory_gets_a_null_pointer_for_it():
    assert parameters_of_a_map(0)[3:] == [0, 10, 0, 0]


def test_no_rows_no_launch():
    lib = RecordingDriver()
    (out,) = launch.Launcher(binary(), launch.Driver(lib)).start(operands(0), {"T": 0}, 0, 0)
    assert out.shape == (0,) and not lib.calls


def test_operands_that_are_not_dense_or_not_aligned_are_copied():
    strided, shifted = torch.zeros(4, 10).t(), torch.zeros(5, dtype=F16)[1:]
    lib = RecordingDriver()
    launch.Launcher(binary(), launch.Driver(lib)).start([strided, shifted], {"T": 10}, 0, 0)
    params = lib.launches[0][1]
    assert params[0] != strided.data_ptr() and params[1] != shifted.data_ptr() and params[1] % 16 == 0


def test_an_operand_with_a_negative_bit_is_resolved():
    x = torch.tensor([1 + 2j]).conj().imag
    assert x.is_neg() and x.is_contiguous()
    assert not launch._dense(x).is_neg()


@pytest.mark.parametrize(("f", "least"), [
    (lambda x: (x.call(aten.slice.Tensor, 0, 0, 1) * 2).sin(), 1),
    (lambda x: (x.call(aten.slice.Tensor, 0, -1, None) * 2).sin(), 1),
    (lambda x: (x.call(aten.slice.Tensor, 0, 1, None) * 2).sin(), 1),
    (lambda x: (x * 2).call(aten.amax.default, [0]), 1),
    (lambda x: (x * 2).sum([0]), 0),
])  # fmt: skip
def test_sizes_below_what_the_kernel_reads_are_refused(f, least):
    (k,) = kernels_of(fuse(graph_of(Case("sizes", f, (In(F32, (T, 3)),)))))
    b, lib = binary(kernel=k, types=("*fp32", "*fp32", "i64")), RecordingDriver()
    lib.record = lambda *args: None
    for n in range(least):
        with pytest.raises(errors.DynamicShape, match=f"'T': {n}"):
            launch.Launcher(b, launch.Driver(lib)).start([torch.zeros(n, 3)], {"T": n}, 0, 0)
    launch.Launcher(b, launch.Driver(lib)).start([torch.zeros(least, 3)], {"T": least}, 0, 0)


def test_a_thread_without_a_context_gets_the_primary_one():
    lib = RecordingDriver(context=0)
    launch.Launcher(binary(), launch.Driver(lib)).start(operands(), {"T": 10}, 3, 0)
    names = [name for name, _ in lib.calls]
    assert (
        names.index("cuDevicePrimaryCtxRetain")
        < names.index("cuCtxSetCurrent")
        < names.index("cuModuleLoadData")
    )
    assert lib.named("cuDeviceGet")[0][1] == 3


def test_a_failing_call_is_a_named_error():
    cuda = launch.Driver(RecordingDriver(failing="cuModuleLoadData"))
    with pytest.raises(BackendError, match="cuModuleLoadData failed: invalid argument"):
        launch.Launcher(binary(), cuda).start(operands(), {"T": 10}, 0, 0)


@pytest.mark.parametrize(("target", "capability", "code"), [
    ("cuda:90", (9, 0), b"code"), ("cuda:90", (10, 0), None), ("cuda:90", (8, 0), None), ("cuda:80", (8, 0), b"code"),
    ("cuda:80", (8, 6), b"code"), ("cuda:86", (8, 0), None), ("cuda:80", (9, 0), b"text\0"), ("cuda:100", (10, 3), None),
])  # fmt: skip
def test_a_device_gets_the_cubin_the_ptx_or_a_named_error(target, capability, code):
    b = binary(target=target, ptx="text")
    if code is not None:
        assert launch.code_for(b, capability) == code
        return
    here = f"cuda:{capability[0]}{capability[1]}"
    with pytest.raises(errors.BackendError, match=f'compiled for {target}.*Compile with target="{here}"'):
        launch.code_for(b, capability)


def test_calls_of_other_sizes_and_of_threads_share_a_launcher():
    lib = RecordingDriver()
    start = launch.Launcher(binary(), launch.Driver(lib)).start
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [3 + i % 5 for i in range(200)]
        outs = list(pool.map(lambda n: start(operands(n), {"T": n}, 0, 0)[0], rows))
    assert [len(x) for x in outs] == rows
    seen = {params[2]: params[3] for _, params in lib.launches}
    assert len(lib.launches) == 200 and all(seen[x.data_ptr()] == n for x, n in zip(outs, rows, strict=True))


def on_gpu(k, operands, sizes):
    from fxfunc.codegen import offline

    major, minor = torch.cuda.get_device_capability()
    b = offline.compile(k, f"cuda:{major}{minor}")
    return tuple(x.cpu() for x in launch.Launcher(b)([x.cuda() for x in operands], sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("case", TASKS, ids=[c.name for c in TASKS])
def test_maps_on_a_gpu_equal_eager(case):
    for tasks in case.tasks or (0,):
        graph, inputs = graph_and_inputs(case, tasks)
        fused = fuse(lowered(with_tasks(graph, "bf16x6", {}, [])))
        wanted = eager.emit(for_aten(lowered(graph)))(inputs)
        assert_equal(run(fused, inputs, {"tasks": tasks}, on_gpu), wanted, scale=100)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PATTERNS, ids=[c.name for c in PATTERNS])
def test_kernels_on_a_gpu_equal_eager(case):
    fused = fuse(graph_of(case))
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(fused, inputs, sizes, on_gpu), run(graph_of(case), inputs, sizes), scale=8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", TOGETHER, ids=[c.name for c in TOGETHER])
def test_kernels_together_on_a_gpu_equal_eager(case):
    joined = together(fuse(graph_of(case)))
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(joined, inputs, sizes, on_gpu), run(graph_of(case), inputs, sizes), scale=8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", PRODUCTS, ids=[c.name for c in PRODUCTS])
def test_products_on_a_gpu_equal_eager(case):
    graph, fused = graphs(case)
    for sizes in case.sizes:
        inputs = product_inputs(case, sizes)
        assert_equal(run(fused, inputs, sizes, on_gpu), run(graph, inputs, sizes), scale=20)


@pytest.mark.gpu
@pytest.mark.parametrize("case", MOVES + PRODUCTS_OF_MOVED, ids=[c.name for c in MOVES + PRODUCTS_OF_MOVED])
def test_moves_on_a_gpu_equal_eager(case):
    for sizes in case.sizes:
        inputs = move_inputs(case, sizes)
        assert_equal(
            run(moves_fused(case), inputs, sizes, on_gpu), run(graph_of(case), inputs, sizes), scale=20
        )


def test_files_of_a_binary_give_it_back():
    b = binary(scratch=(64, 16), ptx="text", source="lines")
    again = launch.read(b.kernel, b.files())
    assert {f.name: getattr(again, f.name) for f in dataclasses.fields(b)} == {
        f.name: getattr(b, f.name) for f in dataclasses.fields(b)
    }


def kernels_of_all_kinds() -> dict:
    """A kernel, a product, several together and a map."""
    (plain,) = kernels_of(fuse(graph_of(next(c for c in PATTERNS if c.name == "softmax"))))
    (product,) = kernels_of(graphs(next(c for c in PRODUCTS if c.name == "linear"))[1])
    (several,) = kernels_of(together(fuse(graph_of(next(c for c in TOGETHER if c.name == "step")))))
    (tasks,) = tasks_of(graph_and_inputs(next(c for c in TASKS if c.name == "per-sample gradients"))[0])[0][
        :1
    ]
    return {"plain": plain, "product": product, "several": several, "map": tasks}


@pytest.mark.parametrize("kind", ["plain", "product", "several", "map"])
def test_files_of_a_compiled_kernel_give_it_back(kind):
    pytest.importorskip("triton")
    from fxfunc.codegen import offline

    b = offline.compile(kernels_of_all_kinds()[kind], "cuda:80")
    again = launch.read(b.kernel, b.files())
    assert {f.name: getattr(again, f.name) for f in dataclasses.fields(b)} == {
        f.name: getattr(b, f.name) for f in dataclasses.fields(b)
    }


def test_files_of_another_kernel_are_refused():
    other = Kernel((T,), (Arg((T, 5), F32), Arg((4,), F16), Arg((T,), F32, True)), (), "k")
    with pytest.raises(BackendError, match="another kernel"):
        launch.read(other, binary().files())


@pytest.mark.parametrize("change", [
    {"types": ["*fp32", "*fp16", "*fp32"]}, {"types": ["*fp32", "*fp32", "*fp32", "i64"]}, {"block": [4, 4]}, {"block": [0]},
    {"block": [-4]}, {"warps": 0}, {"warps": 64}, {"shared": -1}, {"shared": "1"}, {"workspace": 128}, {"scratch": [1]},
    {"profile": [1.5, 1]},
], ids=str)  # fmt: skip
def test_a_record_that_is_not_of_its_kernel_is_refused(change):
    files = binary().files()
    files["launch.json"] = json.dumps(json.loads(files["launch.json"]) | change).encode()
    with pytest.raises(BackendError, match="the record of k is not one of how it is launched"):
        launch.read(binary().kernel, files)


# ---- bad input ----


def test_operands_on_a_cpu_are_refused_by_name():
    with pytest.raises(BackendError, match="k runs on a GPU, its operands are on cpu"):
        launch.Launcher(binary(), launch.Driver(RecordingDriver()))(operands(), {"T": 10})


def test_operands_on_several_devices_are_refused_before_anything_is_launched():
    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 1

    lib, (x, y) = RecordingDriver(), operands()
    with pytest.raises(errors.MixedDevices, match="k got tensors on different devices"):
        launch.Launcher(binary(), launch.Driver(lib)).start([x, y.as_subclass(Elsewhere)], {"T": 10}, 0, 0)
    assert not lib.launches


def test_more_programs_than_a_device_runs_are_refused():
    launcher = launch.Launcher(binary(), launch.Driver(RecordingDriver()))
    launcher.plan({"T": 4 * (2**31 - 1)})
    with pytest.raises(BackendError, match="k would take 2147483648 programs.*Call it on parts"):
        launcher.plan({"T": 4 * 2**31})


def test_out_of_memory_says_for_what(monkeypatch):
    def full(*layout):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "_new_cpu", full)
    _, plan = launch.Launcher(binary(), launch.Driver(RecordingDriver())).plan({"T": 1000})
    with pytest.raises(torch.OutOfMemoryError) as e:
        plan.allocate(torch.ones(1))
    assert "a kernel takes 4000 bytes for results and 0 for scratch memory" in e.value.__notes__[0]


def test_a_binary_says_what_the_kernel_table_shows():
    b = dataclasses.replace(binary(shared=16), cubin=b"12345")
    assert (b.name, b.regs, b.spills, b.smem, b.size) == ("k", 8, 0, 16, 5)
