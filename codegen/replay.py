"""A program of kernels as a CUDA graph: one call of the driver launches all. Entry points: `Replay`, `refusal` (why not).

The program runs once with launchers that only note what they would launch; of that a graph is made, in which a kernel waits for
those whose results it reads. Values between kernels keep their memory. Inputs and results do not: results are new tensors each
time, and where addresses are not those of the call before, the parameters of the kernels that see them are set. So no input is
copied, and no result is overwritten by a later call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from fxfunc.passes import errors
from fxfunc.passes.decompose import tensors_in
from fxfunc.passes.graph import Graph, constant, getitem, is_random, root, scan

from . import eager
from .cost import named
from .fuse import kernel_nodes
from .index import VIEWS
from .launch import Cells, Driver, Launcher, allocated, is_dense, parameters
from .loops import Kernel, kernel
from .lower import is_constant
from .promises import promises

aten = torch.ops.aten
_PLANS = 16  # of sizes that are remembered; each keeps the memory between its kernels


def refusal(graph: Graph) -> str | None:
    """Why a program is no CUDA graph: calls that are no kernels, or results that no kernel made; None if it is one.

    Loops are unrolled in the graph, unless they stack results, which is done by copies."""
    if not any(True for _ in kernel_nodes(graph)):
        return "it has no kernels"
    if (why := _call_refusal(graph)) is not None:
        return why
    for n in graph.outputs:
        if n is not None and _origin(n).target not in (kernel, scan):
            return f"the result {n} is not made by a kernel"
    return None


def _call_refusal(graph: Graph) -> str | None:
    for n in graph.nodes:
        if n.target is scan:
            if len(n.meta["val"]) > len(n.args[2]):
                return f"{named(n)} stacks results"
            if (why := _call_refusal(n.args[0])) is not None:
                return why
        elif n.target not in (kernel, getitem) and n.target not in VIEWS and not _is_fixed(n):
            return f"{named(n)} is ATen's"
    return None


def _is_fixed(n: Node) -> bool:
    """True for what depends on nothing: it is computed when the graph is made."""
    return is_constant(n) or n.target is constant or (not n.all_input_nodes and not is_random(n))


def _origin(n: Node) -> Node:
    """The call in whose memory a value is."""
    made = root(n)
    return made[0] if isinstance(made, tuple) else made


class Replay:
    """The program of a graph that `refusal` does not refuse, on CUDA tensors, replayed on torch's current stream.

    Calls whose inputs a kernel would not read as they are run kernel by kernel, as without CUDA graphs. Raises BackendError
    where a value is copied between kernels."""

    def __init__(self, graph: Graph, launchers: Mapping[Kernel, Launcher]):
        self._log: list[_Launch] = []
        self._plain = eager.emit(graph, launchers)
        self._noting = eager.emit(graph, {k: _Noting(x, self._log) for k, x in launchers.items()})
        self._first = next(iter(launchers.values()))
        self._plans: dict[tuple, _Plan] = {}
        self._lock = threading.Lock()
        self.promises = promises(graph)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        tensors = list(tensors)
        device = tensors[0].device
        if torch.cuda.is_current_stream_capturing():
            return self._plain(tensors)
        with torch.cuda.device(device):
            return self.start(tensors, device.index, torch.cuda.current_stream(device).cuda_stream)

    def start(self, tensors: list[Tensor], device: int, stream: int) -> list[Tensor | None]:
        """Replay on a stream of the current device."""
        if not all(map(is_dense, tensors)) or len({x.get_device() for x in tensors}) > 1:
            return self._plain(tensors)
        key = (device, stream, *[x.shape for x in tensors])
        with self._lock:
            if key not in self._plans:
                if not _are_apart(tensors):
                    return self._plain(tensors)
                if len(self._plans) >= _PLANS:
                    self._plans.clear()
                self._plans[key] = self._made(tensors, device)
            self._first.function(device, tensors[0])  # makes the context current in this thread
            return self._plans[key].run(tensors, stream)

    def _made(self, tensors: list[Tensor], device: int) -> _Plan:
        """The plan for tensors of these sizes."""
        self._log.clear()
        try:
            with _OnlyViews():
                results = self._noting(list(tensors))
            return _Plan(self._first.driver(), tensors, self._log, results, device)
        except _Copied as e:
            what = f"no CUDA graph for these sizes: {e}"
            raise errors.BackendError(
                backend="triton", what=what, instead="Call it without with_cuda_graph()."
            ) from None
        finally:
            self._log.clear()


class _Copied(Exception):
    """A value is copied, or made by a call that is no kernel."""


_LIKE = {getattr(aten, name).default for name in ("full_like", "zeros_like", "ones_like", "new_empty")}


class _OnlyViews(TorchDispatchMode):
    """Lets ATen make views and what depends on no values; anything else would be done once, not at each replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = {
            x.untyped_storage().data_ptr() for x in tensors_in([args, list((kwargs or {}).values())], Tensor)
        }
        made = {x.untyped_storage().data_ptr() for x in tensors_in([out], Tensor)}
        if read and func not in _LIKE and (func._schema.is_mutable or not made <= read):
            raise _Copied(f"{func} copies a value")
        return out


class _Launch(NamedTuple):
    """What a launcher would have launched: operands, outputs and scratch memory, and values of sizes."""

    launcher: Launcher
    count: int
    operands: Sequence[Tensor]
    outputs: Sequence[Tensor]
    memory: Sequence[Tensor | None]
    values: tuple[int, ...]


class _Noting:
    """In place of a launcher: allocates what it would, and notes the launch."""

    def __init__(self, launcher: Launcher, log: list[_Launch]):
        self.launcher, self.log = launcher, log

    def __call__(self, operands: Sequence[Tensor], sizes: dict[str, int]) -> tuple[Tensor, ...]:
        if not all(map(is_dense, operands)):
            raise _Copied(f"{self.launcher.binary.name} reads a view that is copied first")
        values, plan = self.launcher.plan(sizes)
        outputs, memory = plan.allocate(operands[0])
        if plan.count:
            self.log.append(_Launch(self.launcher, plan.count, operands, outputs, memory, values))
        return outputs


class _Params(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = [("func", ctypes.c_void_p), ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("params", ctypes.c_void_p), ("extra", ctypes.c_void_p)]  # fmt: skip


class _Moving(NamedTuple):
    """A parameter that is in an input or a result: its position, which of them, and how many bytes behind its begin."""

    position: int
    which: int
    behind: int


class _Node:
    """A kernel of a graph, with its parameters."""

    def __init__(self, driver: Driver, graph: ctypes.c_void_p, step: _Launch, moved: _Moved, waits: list[ctypes.c_void_p],
                 function: ctypes.c_void_p):  # fmt: skip
        binary = step.launcher.binary
        addresses = [x.data_ptr() for x in (*step.operands, *step.outputs)]
        self.values = parameters(addresses, step.memory, step.values)
        self.moving = [_Moving(i, *found) for i, a in enumerate(addresses) if (found := moved.find(a))]
        self.cells = Cells(binary.types)
        self.cells.pack(self.values)
        one = ctypes.c_uint * 3
        self.params = _Params(function, one(step.count, 1, 1), one(32 * binary.warps, 1, 1), binary.shared,
                              ctypes.cast(self.cells.params, ctypes.c_void_p), None)  # fmt: skip
        self.node = ctypes.c_void_p()
        before = (ctypes.c_void_p * len(waits))(*waits)
        driver.call("cuGraphAddKernelNode", ctypes.byref(self.node), graph, before, ctypes.c_size_t(len(waits)),
                    ctypes.byref(self.params))  # fmt: skip

    def move(self, addresses: Sequence[int]) -> None:
        """Take parameters from these addresses of inputs and results."""
        for m in self.moving:
            self.values[m.position] = addresses[m.which] + m.behind
        self.cells.pack(self.values)


class _Moved:
    """Which memory is that of inputs and results."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.ranges = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]

    def find(self, address: int) -> tuple[int, int] | None:
        """Whose memory an address is in, and how far behind its begin."""
        return next(((i, address - a) for i, (a, b) in enumerate(self.ranges) if a <= address < b), None)


class _Result(NamedTuple):
    """A result: which of the new tensors, whole or as a view with these sizes, strides and offset."""

    which: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


class _Plan:
    """A CUDA graph for given sizes, device and stream."""

    def __init__(
        self,
        driver: Driver,
        tensors: list[Tensor],
        log: list[_Launch],
        results: list[Tensor | None],
        device: int,
    ):
        self.driver = driver
        fresh: list[Tensor] = []
        self.results = [None if r is None else _result(r, log, fresh) for r in results]
        self.new = [(tuple(x.shape), x.stride(), x.dtype) for x in fresh]
        self.addresses = [x.data_ptr() for x in (*tensors, *fresh)]
        moved = _Moved([*tensors, *fresh])
        self.kept = [x for step in log for x in (*step.operands, *step.outputs, *step.memory)
                     if x is not None and moved.find(x.data_ptr()) is None]  # fmt: skip
        self.nodes: list[_Node] = []
        writers: dict[int, ctypes.c_void_p] = {}
        # The graph is kept: its nodes, by which parameters are set, go with it.
        self.graph, self.exec = ctypes.c_void_p(), ctypes.c_void_p()
        functions = [step.launcher.function(device, tensors[0]) for step in log]
        driver.call("cuGraphCreate", ctypes.byref(self.graph), 0)
        for step, function in zip(log, functions, strict=True):
            read = dict.fromkeys(x.untyped_storage().data_ptr() for x in step.operands)
            node = _Node(
                driver, self.graph, step, moved, [writers[p] for p in read if p in writers], function
            )
            self.nodes.append(node)
            writers |= {x.untyped_storage().data_ptr(): node.node for x in step.outputs if x.numel()}
        driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self.exec), self.graph, ctypes.c_ulonglong(0))

    def run(self, tensors: list[Tensor], stream: int) -> list[Tensor | None]:
        """New results, computed on a stream."""
        fresh = allocated(self.new, tensors[0])
        addresses = [x.data_ptr() for x in (*tensors, *fresh)]
        if addresses != self.addresses:
            self._move(addresses)
        self.driver.call("cuGraphLaunch", self.exec, ctypes.c_void_p(stream))
        return [None if r is None else fresh[r.which] if r.view is None else fresh[r.which].as_strided(*r.view)
                for r in self.results]  # fmt: skip

    def _move(self, addresses: list[int]) -> None:
        """Set the parameters that are in other memory than before."""
        changed = {
            i for i, (old, new) in enumerate(zip(self.addresses, addresses, strict=True)) if old != new
        }
        self.addresses = [-1] * len(addresses)  # if a call fails, all are set by the next
        for n in self.nodes:
            if any(m.which in changed for m in n.moving):
                n.move(addresses)
                self.driver.call("cuGraphExecKernelNodeSetParams", self.exec, n.node, ctypes.byref(n.params))
        self.addresses = addresses

    def __del__(self):
        for name, handle in (("cuGraphExecDestroy", "exec"), ("cuGraphDestroy", "graph")):
            if getattr(self, handle, None):
                getattr(self.driver.lib, name)(getattr(self, handle))


def _result(x: Tensor, log: Sequence[_Launch], fresh: list[Tensor]) -> _Result:
    """How a result is made; the output whose memory it is becomes one of the `fresh` tensors."""
    if not x.numel():
        fresh.append(x)
        return _Result(len(fresh) - 1, None)
    made = (y for step in log for y in step.outputs if y.numel())
    whole = next((y for y in made if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()), None)
    if whole is None:
        raise _Copied("a result is no kernel's")
    which = next((i for i, y in enumerate(fresh) if y is whole), len(fresh))
    if which == len(fresh):
        fresh.append(whole)
    same = x.shape == whole.shape and x.stride() == whole.stride()
    return _Result(which, None if same else (tuple(x.shape), x.stride(), x.storage_offset()))


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """True for tensors that share no memory, so that an address tells whose it is."""
    ranges = sorted(_Moved(tensors).ranges)
    return all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
