"""The emitted Triton source run by Triton's interpreter, on CPU tensors. Entry point: `interpret`, for tests.

Only in a process started with TRITON_INTERPRET=1, where nothing can be compiled. The interpreter has no libdevice, so
torch computes those functions.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfunc.passes import errors
from fxfunc.passes.dims import at

from . import products
from .loops import ELEMENTWISE
from .mapped import AnyKernel
from .triton import TEMPLATES, load
from .written import write

_TORCH: dict[str, Callable[..., Tensor]] = {
    **{name: f for name, f in ELEMENTWISE.items() if name in TEMPLATES},
    "rint": torch.round,
    "copysign": torch.copysign,
    "div_rn": torch.true_divide,
}


def interpret(
    k: AnyKernel, inputs: Sequence[Tensor], sizes: dict[str, int] | None = None
) -> tuple[Tensor, ...]:
    """The outputs of a kernel, its Triton source interpreted. Memory that it should not read is full of NaN."""
    sizes = sizes or {}
    fn, block, workspace = _prepare(k)
    outputs = [_spoiled(torch.empty([at(s, sizes) for s in a.shape], dtype=a.dtype)) for a in k.outputs]
    if count := at(products.programs(k, block), sizes):
        work = [] if workspace is None else [_spoiled(torch.empty(count * workspace, dtype=torch.uint8))]
        fn[(count,)](*(x.contiguous() for x in inputs), *outputs, *work, *(sizes[name] for name in k.sizes))
    return tuple(outputs)


def _spoiled(x: Tensor) -> Tensor:
    x.reshape(-1).view(torch.uint8).fill_(255)
    return x


@functools.lru_cache(maxsize=512)
def _prepare(k: AnyKernel) -> tuple[Callable, tuple[int, ...], int | None]:
    """The function, how much of the grid a program does, and bytes of scratch memory a program if it takes such."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise errors.BackendError(
            backend="triton", what="the interpreter is off", instead="Start with TRITON_INTERPRET=1."
        )
    _install()
    w = write(k, 90, "ieee")
    return load(w.name, w.text), w.block, w.workspace


@functools.cache
def _install() -> None:
    """Give the stubs of libdevice a meaning."""
    from triton.language.extra import libdevice

    for name, f in _TORCH.items():
        if hasattr(libdevice, name):
            setattr(libdevice, name, _on_blocks(f))
    _accept_numpy_2_4()
    _multiply_bfloat16()
    _heed_assertions()


def _heed_assertions() -> None:
    """The interpreter passes over them unless told to debug."""
    from triton.runtime.interpreter import interpreter_builder as builder

    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)


def _accept_numpy_2_4() -> None:
    """Triton 3.6 reads the bound of a loop by int(array of one), which newer numpy refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


def _multiply_bfloat16() -> None:
    """The interpreter has these numbers as uint16, which it multiplies as they are."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def as_float32(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar is not tl.bfloat16:
            return x
        bits = torch.from_numpy(x.data.astype("int32"))
        return interpreter.TensorHandle((bits << 16).view(torch.float32).numpy(), tl.float32)

    def patched(self: object, a: object, b: object, *rest: object) -> object:
        return original(self, as_float32(a), as_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = patched


def _on_blocks(f: Callable[..., Tensor]) -> Callable:
    """`f` on the interpreter's blocks, which hold numpy arrays."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def call(*blocks: tl.tensor) -> tl.tensor:
        scalar = blocks[0].dtype
        out = f(*(torch.from_numpy(b.handle.data.copy()) for b in blocks)).numpy()
        kind = tl.block_type(scalar, list(out.shape)) if out.shape else scalar
        return tl.tensor(TensorHandle(out, scalar), kind)

    return call
