"""The emitted Triton source run by Triton's interpreter, on CPU tensors. Entry point: `interpret`, for tests.

Only in a process started with TRITON_INTERPRET=1, where nothing can be compiled. The interpreter has no libdevice, so
torch computes those functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfunc.passes import errors
from fxfunc.passes.dims import at

from .loops import ELEMENTWISE, Kernel
from .triton import TEMPLATES, load, programs, source

_TORCH: dict[str, Callable[..., Tensor]] = {
    **{name: f for name, f in ELEMENTWISE.items() if name in TEMPLATES},
    "rint": torch.round,
    "copysign": torch.copysign,
    "div_rn": torch.true_divide,
}


def interpret(k: Kernel, inputs: Sequence[Tensor], sizes: dict[str, int] | None = None) -> tuple[Tensor, ...]:
    """The outputs of a kernel, its Triton source interpreted."""
    sizes = sizes or {}
    fn = _prepare(k)
    outputs = [torch.empty([at(s, sizes) for s in a.shape], dtype=a.dtype) for a in k.outputs]
    if count := at(programs(k), sizes):
        fn[(count,)](*(x.contiguous() for x in inputs), *outputs, *(sizes[name] for name in k.sizes))
    return tuple(outputs)


@functools.lru_cache(maxsize=512)
def _prepare(k: Kernel) -> Callable:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise errors.BackendError(
            backend="triton", what="the interpreter is off", instead="Start with TRITON_INTERPRET=1."
        )
    _install()
    return load(k, source(k))


@functools.cache
def _install() -> None:
    """Give the stubs of libdevice a meaning."""
    from triton.language.extra import libdevice

    for name, f in _TORCH.items():
        if hasattr(libdevice, name):
            setattr(libdevice, name, _on_blocks(f))
    _accept_numpy_2_4()


def _accept_numpy_2_4() -> None:
    """Triton 3.6 reads the bound of a loop by int(array of one), which newer numpy refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


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
