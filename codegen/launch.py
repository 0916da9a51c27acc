"""Running compiled kernels through libcuda alone. Entry points: `Binary` (a compiled kernel), `Launcher`.

Needs neither Triton nor a C compiler. The parameters of a Triton kernel are its runtime arguments in order, then two
pointers: global scratch and profile scratch, null where the kernel uses none. Kernels run on torch's current stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import re
import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxfunc.passes import errors
from fxfunc.passes.dims import Size, at

from .axes import is_product
from .loops import Kernel, verify_sizes
from .mapped import AnyKernel, Tasks, Together
from .products import programs
from .triton import POINTERS

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OPT_IN_SHARED = 48 * 1024
_ALIGNMENT = 16  # bytes; the kernels are compiled for pointers that are so aligned
_SCALARS = {"i64": "q", "i32": "i4x", "fp32": "f4x", "fp64": "d"}
_MOST_PROGRAMS = 2**31
_PLANS = 256  # of sizes that are remembered
_NOTHING = contextlib.nullcontext()
# On the current device, past the dispatcher and all modes.
_new_cpu, _new_cuda = torch._C._dynamo.guards._empty_strided_cpu, torch._C._dynamo.guards._empty_strided_cuda


@dataclasses.dataclass(frozen=True, eq=False)
class Binary:
    """A kernel compiled for a target: code, source, and what a launch needs. `types` are those of the parameters in order."""

    kernel: AnyKernel
    name: str
    target: str
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    source: str = dataclasses.field(repr=False)
    types: tuple[str, ...]
    block: tuple[int, ...]  # of the grid, a program: rows, or of a product rows and columns
    warps: int
    shared: int
    regs: int
    spills: int
    workspace: int | None = (
        None  # bytes a program of memory for what is between calls of a task; None: not a map
    )
    scratch: tuple[int, int] = (0, 1)  # bytes a program, alignment
    profile: tuple[int, int] = (0, 1)

    @property
    def programs(self) -> Size:
        """How many programs cover the grid."""
        return programs(self.kernel, self.block)

    @property
    def size(self) -> int:
        """Bytes of code."""
        return len(self.cubin)

    @property
    def smem(self) -> int:
        """Bytes of shared memory a program."""
        return self.shared

    def files(self) -> dict[str, bytes]:
        """What an artifact keeps of it; `read` is the inverse."""
        meta = {name: getattr(self, name) for name in _META} | {"kernel": str(self.kernel)}
        return {"kernel.cubin": self.cubin, "kernel.ptx": self.ptx.encode(), "kernel.py": self.source.encode(),
                "launch.json": json.dumps(meta, indent=1).encode()}  # fmt: skip


_META = (
    "name",
    "target",
    "types",
    "block",
    "warps",
    "shared",
    "regs",
    "spills",
    "workspace",
    "scratch",
    "profile",
)


def read(kernel: AnyKernel, files: dict[str, bytes]) -> Binary:
    """The binary of `kernel` from its files; `BackendError` if they are of another kernel, or do not say how it is launched."""
    meta = json.loads(files["launch.json"])
    if meta.pop("kernel") != str(kernel):
        what = f"the files of {meta['name']} were compiled from another kernel"
        raise errors.BackendError(backend="triton", what=what, instead="Compile it again.")
    pairs = {name: tuple(meta.pop(name)) for name in ("types", "block", "scratch", "profile")}
    if not _is_record(kernel, meta, **pairs):
        what = f"the record of {kernel.name} is not one of how it is launched"
        raise errors.BackendError(backend="triton", what=what, instead="Compile it again.")
    return Binary(kernel=kernel, cubin=files["kernel.cubin"], ptx=files["kernel.ptx"].decode(),
                  source=files["kernel.py"].decode(), **meta, **pairs)  # fmt: skip


def parameter_types(kernel: AnyKernel) -> tuple[str, ...]:
    """The types of the parameters of a kernel: its arguments, the memory of a map, and its sizes."""
    pointers = tuple(POINTERS[a.dtype] for a in kernel.args) + ("*u8",) * isinstance(kernel, Tasks)
    return pointers + ("i64",) * len(kernel.sizes)


def _is_record(
    kernel: AnyKernel, meta: dict, types: tuple, block: tuple, scratch: tuple, profile: tuple
) -> bool:
    """True for a record that can be one of this kernel."""
    parts = len(kernel.parts) if isinstance(kernel, Together) else 2 if is_product(kernel) else 1
    numbers = [meta[name] for name in ("warps", "shared", "regs", "spills")] + [*block, *scratch, *profile]
    numbers += [meta["workspace"]] if isinstance(kernel, Tasks) else []
    return (types == parameter_types(kernel) and len(block) == parts and len(scratch) == len(profile) == 2
            and all(type(n) is int and n >= 0 for n in numbers) and min(block) > 0 and 0 < meta["warps"] <= 32
            and isinstance(kernel, Tasks) == (meta["workspace"] is not None))  # fmt: skip


class Driver:
    """The calls of libcuda that a launch needs, with failures raised."""

    def __init__(self, lib: object):
        self.lib = lib

    def call(self, name: str, *args: object) -> None:
        """Call `name`; `BackendError` with the driver's message if it fails."""
        if status := getattr(self.lib, name)(*args):
            message = ctypes.c_char_p()
            self.lib.cuGetErrorString(status, ctypes.byref(message))
            what = f"{name} failed: {(message.value or str(status).encode()).decode()}"
            raise errors.BackendError(
                backend="triton", what=what, instead="Check the device with nvidia-smi."
            )

    def ensure_context(self, device: int) -> None:
        """Make the device's primary context (torch's) current in this thread if none is."""
        context, handle = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            self.call("cuDeviceGet", ctypes.byref(handle), device)
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self.call("cuCtxSetCurrent", context)

    def function(self, binary: Binary, code: bytes) -> ctypes.c_void_p:
        """The kernel, loaded from its cubin or PTX to the current context."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), code)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
        if binary.shared > _OPT_IN_SHARED:
            self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, binary.shared)
        return function


@functools.cache
def driver() -> Driver:
    """libcuda."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as e:
        raise errors.BackendError(
            backend="triton", what=f"libcuda is missing ({e})", instead="Install the driver."
        ) from e


class Launcher:
    """A binary as a function of its operands (CUDA tensors of one device) and, by name, its sizes; gives all outputs.

    It runs on torch's current stream and does not wait for it. What does not change from call to call is done once: the check of
    the device and loading (a device), checking sizes and shapes of outputs (sizes), and making the context current (a thread).
    """

    def __init__(self, binary: Binary, cuda: Driver | None = None):
        self.binary, self.cuda, self._sizes = binary, cuda, binary.kernel.sizes
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._free: list[Cells] = []
        self._threads = threading.local()

    def __call__(self, operands: Sequence[Tensor], sizes: dict[str, int]) -> tuple[Tensor, ...]:
        device = operands[0].device
        if device.type != "cuda":
            what = f"{self.binary.name} runs on a GPU, its operands are on {device}"
            raise errors.BackendError(backend="triton", what=what, instead="Move them to the GPU.")
        with torch.cuda.device(device) if torch.cuda.current_device() != device.index else _NOTHING:
            stream = torch.cuda.current_stream(device).cuda_stream
            return self.start(operands, sizes, device.index, stream)

    def start(
        self, operands: Sequence[Tensor], sizes: dict[str, int], device: int, stream: int
    ) -> tuple[Tensor, ...]:
        """Allocate the outputs and launch on a stream of the current device."""
        values, plan = self.plan(sizes)
        first, addresses, copies = operands[0], [], []
        where = first.get_device()
        for x in operands:
            if x.get_device() != where:
                devices = ", ".join(sorted({str(y.device) for y in operands}))
                raise errors.MixedDevices(op=self.binary.name, devices=devices)
            address = x.data_ptr()
            if address % _ALIGNMENT or not x.is_contiguous() or x.is_neg():
                copies.append(_dense(x))
                address = copies[-1].data_ptr()
            addresses.append(address)
        outputs, memory = plan.allocate(first)
        if plan.count:
            function = self.function(device, first)
            addresses += [y.data_ptr() for y in outputs]
            cells = self._cells()
            cells.pack(parameters(addresses, memory, values))
            self.driver().call("cuLaunchKernel", function, plan.count, 1, 1, 32 * self.binary.warps, 1, 1, self.binary.shared,
                               ctypes.c_void_p(stream), cells.params, None)  # fmt: skip
            self._free.append(cells)
        return outputs

    def plan(self, sizes: dict[str, int]) -> tuple[tuple[int, ...], Plan]:
        """The values of its symbolic sizes, and what follows from them."""
        values = tuple([sizes[name] for name in self._sizes]) if self._sizes else ()
        return values, self._plans.get(values) or self._planned(values, sizes)

    def function(self, device: int, on: Tensor) -> ctypes.c_void_p:
        """The function on the device of a tensor, whose context is current in this thread then."""
        if not getattr(self._threads, "ready", False):
            self.driver().ensure_context(device)
            self._threads.ready = True
        return self._functions.get(device) or self._load(device, on.device)

    def _cells(self) -> Cells:
        """Memory for the parameters that no other thread has."""
        try:
            return self._free.pop()
        except IndexError:
            return Cells(self.binary.types)

    def driver(self) -> Driver:
        """libcuda, or what stands for it."""
        if self.cuda is None:
            self.cuda = driver()
        return self.cuda

    def _load(self, device: int, where: torch.device) -> ctypes.c_void_p:
        """The function on a device."""
        capability = torch.cuda.get_device_capability(where) if where.type == "cuda" else None
        code = self.binary.cubin if capability is None else code_for(self.binary, capability)
        self._functions[device] = self.driver().function(self.binary, code)
        return self._functions[device]

    def _planned(self, values: tuple[int, ...], sizes: dict[str, int]) -> Plan:
        """What follows from sizes, which are checked."""
        b = self.binary
        parts = b.kernel.parts if isinstance(b.kernel, Together) else [b.kernel]
        for k in parts:
            if isinstance(k, Kernel):
                verify_sizes(k, sizes)
        count = at(b.programs, sizes)
        if count >= _MOST_PROGRAMS:
            what = f"{b.name} would take {count} programs, a device runs {_MOST_PROGRAMS - 1}"
            raise errors.BackendError(backend="triton", what=what, instead="Call it on parts.")
        needs = [*([] if b.workspace is None else [b.workspace]), b.scratch[0], b.profile[0]]
        shapes = [(tuple(at(s, sizes) for s in a.shape), a.dtype) for a in b.kernel.outputs]
        outputs = [(shape, torch.empty(shape, device="meta").stride(), dtype) for shape, dtype in shapes]
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        plan = self._plans[values] = Plan(
            count, outputs, [n * count for n in needs], len(needs) > 2 or any(needs)
        )
        return plan


class Plan(NamedTuple):
    """Of given sizes: programs, shapes, strides and dtypes of outputs, and bytes of scratch memory of each kind."""

    count: int
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    memory: list[int]
    takes_memory: bool

    def allocate(self, like: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        """On the current device, as `like`: the outputs, and memory of a map, global and profile scratch, or [] if none."""
        try:
            outputs = tuple(allocated(self.outputs, like))
            if not self.takes_memory:
                return outputs, []
            return outputs, [like.new_empty(n, dtype=torch.uint8) if n else None for n in self.memory]
        except torch.OutOfMemoryError as e:
            results = sum(math.prod(shape) * dtype.itemsize for shape, _, dtype in self.outputs)
            e.add_note(f"fxfunc: a kernel takes {results} bytes for results and {sum(self.memory)} for scratch memory; "
                       "call the function on parts of its inputs (chunk_size of vmap)")  # fmt: skip
            raise


def allocated(layouts: Sequence[tuple], like: Tensor) -> list[Tensor]:
    """Tensors of these shapes, strides and dtypes on the current device, which is that of `like`."""
    new = _new_cuda if like.is_cuda else _new_cpu
    return [new(*layout) for layout in layouts]


class Cells:
    """The parameters of a launch, the last two pointers to scratch memory, each in a cell of its type, and pointers to them."""

    def __init__(self, types: Sequence[str]):
        formats = [*map(_format, types), "Q", "Q"]
        widths = [struct.calcsize(f"<{f}") for f in formats]
        self._pack = struct.Struct("<" + "".join(formats)).pack_into
        self.memory = (ctypes.c_char * sum(widths))()
        starts = itertools.accumulate(widths[:-1], initial=ctypes.addressof(self.memory))
        self.params = (ctypes.c_void_p * len(widths))(*starts)

    def pack(self, values: Sequence[int | float]) -> None:
        """Write all values."""
        self._pack(self.memory, 0, *values)


def parameters(addresses: Sequence[int], memory: Sequence[Tensor | None], values: Sequence[int]) -> list[int]:
    """Those of a launch in order: addresses, memory of a map, values of sizes, and global and profile scratch."""
    if not memory:
        return [*addresses, *values, 0, 0]
    pointers = [0 if x is None else x.data_ptr() for x in memory]
    return [*addresses, *pointers[:-2], *values, *pointers[-2:]]


def _format(kind: str) -> str:
    """How a value of a recorded type is packed; a pointer is a u64. Each takes eight bytes, so that all are aligned."""
    return "Q" if kind.startswith("*") else _SCALARS[kind]


def code_for(binary: Binary, capability: tuple[int, int]) -> bytes:
    """The cubin if a device of this compute capability runs it, else the PTX if it can be compiled for it, or `BackendError`."""
    built = divmod(int(re.sub(r"\D", "", binary.target)), 10)
    has_features = built >= (9, 0)  # of that architecture alone (sm_90a)
    if capability == built or (not has_features and capability[0] == built[0] and capability[1] >= built[1]):
        return binary.cubin
    if not has_features and capability > built:
        return binary.ptx.encode() + b"\0"
    here = f"cuda:{capability[0]}{capability[1]}"
    what = f"{binary.name} was compiled for {binary.target}, the device is {here}"
    raise errors.BackendError(backend="triton", what=what, instead=f'Compile with target="{here}".')


def is_dense(x: Tensor) -> bool:
    """True for what the kernels read as it is: row-major, aligned, without a negative bit."""
    return x.is_contiguous() and not x.data_ptr() % _ALIGNMENT and not x.is_neg()


def _dense(x: Tensor) -> Tensor:
    """A copy as the kernels expect it."""
    x = x.resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x
