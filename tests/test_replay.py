"""Programs of kernels as CUDA graphs, on a driver that computes them on the CPU: whose memory they use, and in what order."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import random
import re

import pytest
import torch
from kernel_cases import F32, TOGETHER, Case, In, T, graph_of, inputs_of, run
from loop_cases import LOOPS, inputs_of_loop, with_kernels
from torch import Tensor

import fxfunc
from fxfunc.codegen import launch, offline, replay
from fxfunc.codegen.evaluate import evaluate
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.loops import Kernel
from fxfunc.codegen.mapped import Together
from fxfunc.codegen.together import together
from fxfunc.codegen.triton import POINTERS
from fxfunc.codegen.written import write
from fxfunc.passes.errors import BackendError

aten = torch.ops.aten


class Computing:
    """libcuda on CPU memory: a launch, alone or as a node of a graph, evaluates its kernel."""

    def __init__(self, kernels: list, failing: str = ""):
        self.kernels, self.failing = {k.name: k for k in kernels}, failing
        self.functions: dict[int, str] = {}
        self.graphs: dict[int, list] = {}
        self.owners: dict[int, int] = {}  # of a node, its graph
        self.calls: list[str] = []
        self.handles = iter(range(1000, 10**6))

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args):
            self.calls.append(name)
            getattr(self, f"_{name}", lambda *_: None)(*args)
            return int(name == self.failing)

        return call

    def _new(self, where) -> int:
        where._obj.value = next(self.handles)
        return where._obj.value

    def _cuGetErrorString(self, status, message):
        message._obj.value = b"invalid argument"

    def _cuCtxGetCurrent(self, context):
        context._obj.value = 1

    def _cuModuleLoadData(self, module, code):
        self._new(module)

    def _cuModuleGetFunction(self, function, module, name):
        self.functions[self._new(function)] = name.decode()

    def _cuLaunchKernel(self, function, *rest):
        self._compute(function.value, rest[-2])

    def _cuGraphCreate(self, graph, flags):
        self.graphs[self._new(graph)] = []

    def _cuGraphAddKernelNode(self, node, graph, before, count, params):
        p = params._obj
        self.graphs[graph.value].append((self._new(node), set(before), p.func, self._copied(p)))
        self.owners[node._obj.value] = graph.value

    def _cuGraphInstantiateWithFlags(self, exec_, graph, flags):
        self.graphs[self._new(exec_)] = list(self.graphs[graph.value])

    def _cuGraphDestroy(self, graph):
        del self.graphs[graph.value]

    def _cuGraphExecKernelNodeSetParams(self, exec_, node, params):
        assert self.owners[node.value] in self.graphs, "a node goes with its graph"
        nodes = self.graphs[exec_.value]
        (i,) = [i for i, n in enumerate(nodes) if n[0] == node.value]
        nodes[i] = (*nodes[i][:3], self._copied(params._obj))

    def _cuGraphLaunch(self, exec_, stream):
        """Any order that the edges allow."""
        waiting, done = list(self.graphs[exec_.value]), set()
        while waiting:
            ready = random.choice([n for n in waiting if n[1] <= done])
            self._compute(ready[2], ready[3])
            done.add(ready[0])
            waiting.remove(ready)

    def _copied(self, p) -> list[int]:
        """The parameters as they are now: later changes of the cells do not count."""
        k = self.kernels[self.functions[p.func]]
        pointers = ctypes.cast(p.params, ctypes.POINTER(ctypes.c_void_p))
        return [self._value(pointers[i]) for i in range(len(k.args) + len(k.sizes))]

    def _value(self, cell: int) -> int:
        return ctypes.cast(cell, ctypes.POINTER(ctypes.c_int64)).contents.value

    def _compute(self, function: int, params) -> None:
        k = self.kernels[self.functions[function]]
        values = (
            params
            if isinstance(params, list)
            else [self._value(p) for p in params[: len(k.args) + len(k.sizes)]]
        )
        sizes = dict(zip(k.sizes, values[len(k.args) :], strict=True))
        memory = [
            self._tensor(p, [launch.at(s, sizes) for s in a.shape], a.dtype)
            for p, a in zip(values, k.args, strict=False)
        ]
        given = iter([x for x, a in zip(memory, k.args, strict=True) if not a.output])
        made = [x for x, a in zip(memory, k.args, strict=True) if a.output]
        parts = k.parts if isinstance(k, Together) else [k]
        found = [y for p in parts for y in evaluate(p, [next(given) for _ in p.inputs], sizes)]
        for x, y in zip(made, found, strict=True):
            x.copy_(y)

    def _tensor(self, address: int, shape: list[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=dtype).reshape(shape)


def binary(k: Kernel | Together) -> launch.Binary:
    types = tuple(POINTERS[a.dtype] for a in k.args) + ("i64",) * len(k.sizes)
    block = write(k, 90, "ieee").block
    return launch.Binary(kernel=k, name=k.name, target="cuda:90", cubin=b"code", ptx="", source="", types=types, block=block,
                         warps=4, shared=0, regs=8, spills=0)  # fmt: skip


class Here(launch.Launcher):
    """A launcher on the CPU."""

    def __call__(self, operands, sizes):
        return self.start(operands, sizes, 0, 0)


def replayed(case: Case, failing: str = "") -> tuple[replay.Replay, Computing]:
    return replay_of(together(fuse(graph_of(case), alone=True)), failing)


def replay_of(graph, failing: str = "") -> tuple[replay.Replay, Computing]:
    lib = Computing(kernels_of(graph), failing)
    launchers = {k: Here(binary(k), launch.Driver(lib)) for k in kernels_of(graph)}
    assert replay.refusal(graph) is None
    return replay.Replay(graph, launchers), lib


def _chain(x: Tensor, y: Tensor, w: Tensor) -> tuple:
    """Sums and what reads them through views; two results, one of them a view."""
    a = (x.sin() * y).sum([0])
    b = (a * 2 + w).call(aten.unsqueeze.default, 0)
    return (b.exp() + x).sum([1]), ((b * 3).sum([1], True) - x).permute([1, 0])


CHAIN = Case(
    "chain", _chain, (In(F32, (T, 6)), In(F32, (T, 6)), In(F32, (6,))), ({"T": 5}, {"T": 1}, {"T": 9})
)
CASES = [CHAIN, *(c for c in TOGETHER if c.name in ("step", "sums", "same", "many"))]


def check(found, case: Case, inputs, sizes) -> None:
    for a, b in zip(found, run(graph_of(case), inputs, sizes), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_replayed_program_equals_eager_wherever_its_inputs_are(case):
    program, lib = replayed(case)
    for sizes in case.sizes * 2:
        inputs = inputs_of(case, sizes)
        check(program.start(inputs, 0, 0), case, inputs, sizes)
    assert "cuLaunchKernel" not in lib.calls or any(0 in s.values() for s in case.sizes)


def test_the_same_memory_is_one_call_of_the_driver():
    program, lib = replayed(CHAIN)
    inputs = inputs_of(CHAIN, {"T": 5})
    for _ in range(3):
        program.start(inputs, 0, 0)  # the results are freed and their memory is taken again
    lib.calls.clear()
    program.start(inputs, 0, 0)
    assert (
        set(lib.calls) <= {"cuGraphLaunch", "cuGraphExecKernelNodeSetParams"}
        and lib.calls.count("cuGraphLaunch") == 1
    )


def test_results_are_new_tensors_that_later_calls_leave_alone():
    program, _ = replayed(CHAIN)
    first = inputs_of(CHAIN, {"T": 5})
    kept = program.start(first, 0, 0)
    copies = [x.clone() for x in kept]
    program.start([x * 2 for x in first], 0, 0)
    torch.testing.assert_close(kept, copies, rtol=0, atol=0, equal_nan=True)


def test_inputs_that_are_changed_in_place_are_read_anew():
    program, _ = replayed(CHAIN)
    inputs = inputs_of(CHAIN, {"T": 5})
    program.start(inputs, 0, 0)
    inputs[0].mul_(-1)
    check(program.start(inputs, 0, 0), CHAIN, inputs, {"T": 5})


def test_inputs_that_share_memory_are_right_before_and_after_a_graph_is_made():
    program, lib = replayed(CHAIN)
    x, _, w = inputs_of(CHAIN, {"T": 5})
    check(program.start([x, x, w], 0, 0), CHAIN, [x, x, w], {"T": 5})
    assert "cuGraphLaunch" not in lib.calls
    program.start(inputs_of(CHAIN, {"T": 5}), 0, 0)
    check(program.start([x, x, w], 0, 0), CHAIN, [x, x, w], {"T": 5})
    assert lib.calls.count("cuGraphLaunch") == 2


def test_inputs_that_are_not_dense_are_run_without_a_graph():
    program, lib = replayed(CHAIN)
    x, y, w = inputs_of(CHAIN, {"T": 5})
    x = x.t().contiguous().t()
    check(program.start([x, y, w], 0, 0), CHAIN, [x, y, w], {"T": 5})
    assert "cuGraphLaunch" not in lib.calls


def test_each_stream_has_memory_of_its_own():
    program, lib = replayed(CHAIN)
    inputs = inputs_of(CHAIN, {"T": 5})
    for stream in (0, 7, 0, 7):
        check(program.start(inputs, 0, stream), CHAIN, inputs, {"T": 5})
    assert lib.calls.count("cuGraphInstantiateWithFlags") == 2


def test_few_sizes_are_remembered_and_graphs_are_freed():
    program, lib = replayed(CHAIN)
    for n in range(1, 20):
        inputs = inputs_of(CHAIN, {"T": n})
        check(program.start(inputs, 0, 0), CHAIN, inputs, {"T": n})
    gc.collect()
    assert lib.calls.count("cuGraphExecDestroy") == 16 and lib.calls.count("cuGraphDestroy") == 16


def test_threads_take_turns():
    program, _ = replayed(CHAIN)
    several = [inputs_of(CHAIN, {"T": 1 + n % 3}) for n in range(60)]
    several = [[x + i for x in xs] for i, xs in enumerate(several)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda xs: program.start(xs, 0, 0), several))
    for out, xs in zip(found, several, strict=True):
        check(out, CHAIN, xs, {"T": len(xs[0])})


COPIES = {
    "a result twice": lambda x: (x.sin() * 2, (x.sin() * 2).t()),
    "a turned result in one row": lambda x: (x.sin() * 2 + 1).t().reshape(-1),
    "a turned value for tasks": lambda x: fxfunc.vmap(_task)((x.sin() * 2 + 1).t().reshape(12, 4)),
    "a turned input for tasks": lambda x: fxfunc.vmap(_task)(x.t().reshape(12, 4)),
    "an input through a loop": lambda x: fxfunc.fori_loop(0, 2, lambda i, s: (s[1], s[2], s[0].sin() * s[1]), (x * 2, x + 1, x)),
}  # fmt: skip


def _task(r: Tensor) -> Tensor:
    return ((r @ r) * r.sin()).exp().sum()


@pytest.mark.parametrize("name", COPIES)
def test_values_that_are_copied_between_kernels_are_refused_and_never_frozen(name):
    x = torch.randn(8, 6)
    notes: list[str] = []
    graph = offline.fused(fxfunc.jit(COPIES[name]).lower(x).graph, "ieee", {}, notes)
    if replay.refusal(graph) is not None:
        return
    program, _ = replay_of(graph)
    with pytest.raises(BackendError, match="no CUDA graph for these sizes"):
        program.start([x], 0, 0)


@pytest.mark.parametrize("failing", ["cuGraphAddKernelNode", "cuGraphInstantiateWithFlags", "cuGraphLaunch"])
def test_a_failing_call_is_a_named_error(failing):
    program, _ = replayed(CHAIN, failing)
    with pytest.raises(BackendError, match=f"{failing} failed: invalid argument"):
        program.start(inputs_of(CHAIN, {"T": 5}), 0, 0)


def test_after_a_failure_between_parameters_all_are_set():
    program, lib = replayed(CHAIN)
    inputs = inputs_of(CHAIN, {"T": 5})
    kept = program.start(inputs, 0, 0)
    lib.failing = "cuGraphExecKernelNodeSetParams"
    others = [x + 1 for x in inputs]
    with pytest.raises(BackendError, match="cuGraphExecKernelNodeSetParams"):
        program.start(others, 0, 0)
    lib.failing = ""
    check(program.start(inputs, 0, 0), CHAIN, inputs, {"T": 5})
    check(program.start(others, 0, 0), CHAIN, others, {"T": 5})
    check(kept, CHAIN, inputs, {"T": 5})


@pytest.mark.parametrize("name", ["again", "products"])
def test_a_loop_is_unrolled_in_the_graph(name):
    (loop,) = [x for x in LOOPS if x.name == name]
    graph, _ = with_kernels(loop)
    program, lib = replay_of(graph)
    inputs = inputs_of_loop(loop)
    for xs in (inputs, [x * 2 for x in inputs], inputs):
        torch.testing.assert_close(program.start(xs, 0, 0), [loop.f(*xs)])
    assert lib.calls.count("cuGraphLaunch") == 3 and lib.calls.count("cuGraphAddKernelNode") > 5


# ---- what is no graph ----


@pytest.mark.parametrize("name", ["scanned", "gradient"])
def test_a_loop_that_stacks_results_is_refused(name):
    (loop,) = [x for x in LOOPS if x.name == name]
    assert re.search("fxfunc.scan.*stacks results", replay.refusal(with_kernels(loop)[0]))


def test_a_program_with_atens_calls_is_refused_with_the_call_and_its_line():
    def f(x):
        return torch.linalg.inv(x).sin() * 2

    compiled = fxfunc.jit(f).lower(torch.eye(3)).compile(backend="triton", target="cuda:90")
    with pytest.raises(BackendError, match=r"no CUDA graph: aten.*test_replay.py:\d+.*is ATen's"):
        compiled.with_cuda_graph()


def test_results_that_are_inputs_are_refused():
    compiled = (
        fxfunc.jit(lambda x: (x, x.sin() * 2))
        .lower(torch.ones(3))
        .compile(backend="triton", target="cuda:90")
    )
    with pytest.raises(BackendError, match="is not made by a kernel"):
        compiled.with_cuda_graph()


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_other_backends_are_refused(backend):
    compiled = fxfunc.jit(lambda x: x.sin() * 2).lower(torch.ones(3)).compile(backend=backend)
    with pytest.raises(BackendError, match="no CUDA graph: its programs are no kernels"):
        compiled.with_cuda_graph()


@pytest.mark.gpu
def test_a_replayed_workload_equals_eager_on_a_gpu():
    from fxfunc.bench.registry import find

    w = find("maml25")
    f, inputs = w.function(fxfunc), w.inputs(**w.parameters)
    on_gpu = torch.utils._pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, inputs)
    wanted = f(*inputs)
    program = fxfunc.jit(f).lower(*on_gpu).compile().with_cuda_graph()
    for _ in range(3):
        torch.testing.assert_close(program(*on_gpu), wanted, check_device=False)
