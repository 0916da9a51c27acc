"""Running compiled kernels through libcuda alone. Entry points: `Binary` (a compiled kernel), `launch`, `bind`.

Needs neither Triton nor a C compiler. The parameters of a Triton kernel are its runtime arguments in order, then two
pointers: global scratch and profile scratch, null where the kernel uses none. Kernels run on torch's current stream.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfunc.passes import errors
from fxfunc.passes.dims import Size, at, numel

from .loops import Kernel, verify_sizes

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_OPT_IN_SHARED = 48 * 1024
_ALIGNMENT = 16  # bytes; the kernels are compiled for pointers that are so aligned
_SCALARS = {"i64": ctypes.c_int64, "i32": ctypes.c_int32, "fp32": ctypes.c_float, "fp64": ctypes.c_double}


@dataclasses.dataclass(frozen=True, eq=False)
class Binary:
    """A kernel compiled for a target: code, source, and what a launch needs. `types` are those of the parameters in order."""

    kernel: Kernel
    name: str
    target: str
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    source: str = dataclasses.field(repr=False)
    types: tuple[str, ...]
    rows: int  # of the grid, a program
    warps: int
    shared: int
    regs: int
    spills: int
    scratch: tuple[int, int] = (0, 1)  # bytes a program, alignment
    profile: tuple[int, int] = (0, 1)

    @property
    def programs(self) -> Size:
        """How many programs cover the grid."""
        return (numel(self.kernel.grid) + (self.rows - 1)) // self.rows

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


_META = ("name", "target", "types", "rows", "warps", "shared", "regs", "spills", "scratch", "profile")


def read(kernel: Kernel, files: dict[str, bytes]) -> Binary:
    """The binary of `kernel` from its files; `BackendError` if they are of another kernel."""
    meta = json.loads(files["launch.json"])
    if meta.pop("kernel") != str(kernel):
        what = f"the files of {meta['name']} were compiled from another kernel"
        raise errors.BackendError(backend="triton", what=what, instead="Compile it again.")
    pairs = {name: tuple(meta.pop(name)) for name in ("types", "scratch", "profile")}
    return Binary(kernel=kernel, cubin=files["kernel.cubin"], ptx=files["kernel.ptx"].decode(),
                  source=files["kernel.py"].decode(), **meta, **pairs)  # fmt: skip


class Driver:
    """The calls of libcuda that a launch needs, with failures raised."""

    def __init__(self, lib: object):
        self.lib = lib
        self.functions: dict[tuple[bytes, str, int], ctypes.c_void_p] = {}

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

    def function(self, binary: Binary, device: int) -> ctypes.c_void_p:
        """The loaded kernel; a module is loaded once for each device."""
        key = (binary.cubin, binary.name, device)
        if key not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), binary.cubin)
            self.call("cuModuleGetFunction", ctypes.byref(function), module, binary.name.encode())
            if binary.shared > _OPT_IN_SHARED:
                self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, binary.shared)
            self.functions[key] = function
        return self.functions[key]


@functools.cache
def driver() -> Driver:
    """libcuda."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as e:
        raise errors.BackendError(
            backend="triton", what=f"libcuda is missing ({e})", instead="Install the driver."
        ) from e


def launch(binary: Binary, operands: Sequence[Tensor], sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """The outputs of a kernel on CUDA tensors, in order of its output arguments."""
    device = operands[0].device
    _check_once(binary, device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        return start(driver(), binary, operands, sizes, device.index or 0, stream)


def bind(binary: Binary) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The kernel as a function of its operands and, by name, its sizes; one output is not a tuple."""

    def call(*operands: Tensor, **sizes: int) -> Tensor | tuple[Tensor, ...]:
        outputs = launch(binary, operands, sizes)
        return outputs[0] if len(outputs) == 1 else outputs

    return call


@functools.lru_cache(maxsize=4096)
def _check_once(binary: Binary, device: torch.device) -> None:
    check_device(binary, torch.cuda.get_device_capability(device))


@functools.lru_cache(maxsize=4096)
def _check_sizes(binary: Binary, sizes: tuple[tuple[str, int], ...]) -> None:
    verify_sizes(binary.kernel, dict(sizes))


def check_device(binary: Binary, capability: tuple[int, int]) -> None:
    """`BackendError` unless a device of this compute capability runs the code."""
    built = divmod(int(re.sub(r"\D", "", binary.target)), 10)
    runs = capability == built if built >= (9, 0) else capability[0] == built[0] and capability[1] >= built[1]
    if not runs:
        here = f"cuda:{capability[0]}{capability[1]}"
        what = f"{binary.name} was compiled for {binary.target}, the device is {here}"
        raise errors.BackendError(backend="triton", what=what, instead=f'Compile with target="{here}".')


def start(cuda: Driver, binary: Binary, operands: Sequence[Tensor], sizes: dict[str, int], device: int,
          stream: int) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the outputs and launch, on a given driver and stream."""
    k = binary.kernel
    _check_sizes(binary, tuple(sizes.items()))
    inputs = [_dense(x) for x in operands]
    outputs = [inputs[0].new_empty([at(s, sizes) for s in a.shape], dtype=a.dtype) for a in k.outputs]
    count = at(binary.programs, sizes)
    if count:
        cuda.ensure_context(device)
        scratch = [_scratch(inputs[0], count, *need) for need in (binary.scratch, binary.profile)]
        pointers = [x.data_ptr() for x in (*inputs, *outputs)]
        cells = pack(binary.types, [*pointers, *(sizes[name] for name in k.sizes)])
        cells += [ctypes.c_uint64(x.data_ptr() if x is not None else 0) for x in scratch]
        params = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(c) for c in cells))
        threads = 32 * binary.warps
        cuda.call("cuLaunchKernel", cuda.function(binary, device), count, 1, 1, threads, 1, 1, binary.shared,
                  ctypes.c_void_p(stream), params, None)  # fmt: skip
    return tuple(outputs)


def pack(types: Sequence[str], values: Sequence[int | float]) -> list:
    """Each value as a cell of its recorded type; a pointer is a u64."""
    return [
        ctypes.c_uint64(v) if t.startswith("*") else _SCALARS[t](v)
        for t, v in zip(types, values, strict=True)
    ]


def _dense(x: Tensor) -> Tensor:
    """Row-major and aligned as the kernels expect, without a negative bit; a copy only where it is not."""
    x = x.resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _scratch(like: Tensor, count: int, size: int, alignment: int) -> Tensor | None:
    """Scratch memory for all programs; torch allocates it more aligned than kernels ask for."""
    return like.new_empty(size * count, dtype=torch.uint8) if size else None
