"""Every error a user can meet, as a template: what, where (the user's line), what to do.

Each class is also a subclass of the type `torch.func` raises in the same place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading

_PASSES = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(_PASSES)
_FOLDERS = (
    ("fxfunc", "passes", "codegen") if os.path.exists(os.path.join(_ROOT, "fxfunc", "__init__.py")) else ("",)
)
_OURS = tuple(os.path.join(_ROOT, folder, "") for folder in _FOLDERS)
_STDLIB = tuple(m.__file__ for m in (contextlib, functools, threading))
_TORCH = os.sep + os.path.join("site-packages", "torch") + os.sep


def user_line() -> str | None:
    """`file:line` of the innermost frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not (name.startswith(_OURS) or name in _STDLIB or _TORCH in name or name.startswith("<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class FxfuncError(Exception):
    """Base of all errors of fxfunc. `op` names the operator (if any), `source` the user's file:line."""

    message = "{what}"
    fix = ""

    def __init__(self, *, source: str | None = None, op=None, **fields):
        self.op = str(op) if op is not None else None
        self.source = source or user_line()
        text = self.message.format(op=self.op, **fields)
        where = f" (at {self.source})" if self.source else ""
        super().__init__(f"{text}{where}. {self.fix.format(op=self.op, **fields)}".strip())


class MissingRule(FxfuncError, NotImplementedError):
    message = "{op} has no {rule} rule"
    fix = "Register one with fxfunc.register_rule({op}, {rule}=...), or write the function with ops that have rules."


class NotSupported(FxfuncError, NotImplementedError):
    message = "{what} is not supported"
    fix = "{instead}"


class NonScalarOutput(FxfuncError, RuntimeError):
    message = "{transform} expects the function to return a scalar tensor, got {got}"
    fix = "Return a 0-d float tensor (for example loss.sum()), or use vjp or jacrev."


class BadArgnums(FxfuncError, RuntimeError, ValueError, IndexError):
    message = "{transform}: argnums={argnums} does not name an argument of a function called with {count} positional arguments"
    fix = "Use integers between {low} and {high}, without repeats."


class BadInDims(FxfuncError, TypeError, ValueError, IndexError):
    message = "vmap: {what}"
    fix = "Give in_dims as an int, None, or a structure that matches the arguments."


class BadOutDims(FxfuncError, ValueError, IndexError):
    message = "vmap: {what}"
    fix = "Give out_dims as an int, None, or a structure that matches the outputs."


class NoTensorInputs(FxfuncError, RuntimeError, ValueError):
    message = "{transform} was called with no tensor {what}"
    fix = "Pass at least one tensor."


class MixedDevices(FxfuncError, RuntimeError):
    message = "{op} got tensors on different devices: {devices}"
    fix = "Move its inputs to one device with .to(device)."


class NotDifferentiable(FxfuncError, RuntimeError, ValueError):
    message = "{transform} cannot differentiate {what}: {dtype} is not a floating point or complex dtype"
    fix = "Convert it to float, or leave it out of argnums."


class RandomInVmap(FxfuncError, RuntimeError):
    message = 'vmap: {op} draws random numbers, and randomness is "{randomness}"{why}'
    fix = 'Pass randomness="different" to vmap, or draw the numbers outside.'


class IndependentOutput(FxfuncError, RuntimeError):
    message = "{transform}: output {index} does not depend on the primals"
    fix = "Pass strict=False to get a tangent of zeros."


class UnusedInput(FxfuncError, RuntimeError):
    message = "torch.autograd.grad: {what} has no part in the graph"
    fix = "Pass allow_unused=True to get None for it, or call requires_grad_() on it before it is used."


class NotLinear(FxfuncError, RuntimeError):
    message = "{transform}: the function is not linear in its primals"
    fix = "Close over what it is not linear in, or use vjp."


class ValueDependent(FxfuncError, RuntimeError):
    message = "the function depends on the value of a tensor ({op}), which is not known while it is captured"
    fix = "Use torch.where or arithmetic instead of Python control flow, or pass the value as a plain Python number."


class DynamicShape(FxfuncError, RuntimeError):
    message = "the function depends on {what}, and the size is symbolic"
    fix = "Give that axis a fixed size, or write the function so that it holds for every size."


class StructureMismatch(FxfuncError, TypeError, ValueError, RuntimeError):
    message = "{what}"
    fix = "Call it with the structure, dtypes and shapes it was made for: {expected}."


class NestedTorchFunc(FxfuncError, RuntimeError):
    message = "{transform} was called inside an active torch.func transform"
    fix = "Use fxfunc for the outer transform too; both take the same arguments."


class UnsupportedInside(FxfuncError, RuntimeError):
    message = "{what} cannot be used inside a captured function"
    fix = "{instead}"


class MutatedCapture(FxfuncError, RuntimeError):
    message = "{op} writes in place to an input of the transform or to a tensor that its function closes over"
    fix = "The change would be lost: write to a clone of it, and return the new value."


class TypeOfArgument(FxfuncError, TypeError, ValueError, RuntimeError):
    message = "{what}"
    fix = "{instead}"


class ArtifactError(FxfuncError, RuntimeError):
    message = "{path}: {what}"
    fix = "{instead}"


class BackendError(FxfuncError, RuntimeError):
    message = "backend {backend!r}: {what}"
    fix = "{instead}"


class InvalidGraph(FxfuncError, AssertionError):
    message = "invalid graph after {after}: {what}"
    fix = "This is a fault of fxfunc: please report it with the dump written by FXFUNC_DUMP=dir."


class BackendWarning(UserWarning):
    """A backend other than the wished-for one answers, and why."""


__all__ = [
    name
    for name, x in list(globals().items())
    if isinstance(x, type) and issubclass(x, (FxfuncError, BackendWarning))
]
