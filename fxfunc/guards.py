"""What a compiled function read that was not an argument. Entry points: `Guards.of` (before a capture) and `.current`.

Free variables, globals, defaults, attributes of modules and objects, and items of containers reached from the function
are recorded: tensors by identity (one of the same signature is rebound), plain values by value, the rest by identity.
"""

from __future__ import annotations

import functools
import types

import torch

from fxfunc.passes.graph import typed

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_FOREIGN = (
    "torch",
    "fxfunc",
    "builtins",
    "numpy",
    "math",
    "functools",
    "operator",
    "itertools",
    "collections",
    "typing",
    "random",
)
_MISSING = object()
_LIMIT = 20_000


def _foreign(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _FOREIGN


class Guards:
    """Places and what was found there: `container[key]` (or a cell's contents) with its value."""

    def __init__(self):
        self.values: list[tuple] = []  # (container, key, value): equal in type and value
        self.identities: list[tuple] = []  # (container, key, object): the same object
        self.tensors: list[tuple] = []  # (container, key, tensor): the same, or another of its signature
        self.lengths: list[tuple] = []  # (container, number of items)
        self._seen: set[int] = set()

    @classmethod
    def of(cls, function) -> Guards:
        """Everything reachable from a function that a capture of it could read."""
        self = cls()
        self._object(function)
        return self

    def current(self) -> list[torch.Tensor] | None:
        """The tensors now found in the recorded places, or None if anything else has changed."""
        for container, key, value in self.values:
            now = _read(container, key)
            if type(now) is not type(value) or typed(now, None) != typed(value, None):
                return None
        for container, key, value in self.identities:
            if _read(container, key) is not value:
                return None
        for container, count in self.lengths:
            if len(container) != count:
                return None
        found = []
        for container, key, tensor in self.tensors:
            now = _read(container, key)
            if now is not tensor and not same_signature(now, tensor):
                return None
            found.append(now)
        return found

    def _item(self, container, key) -> None:
        x = _read(container, key)
        if isinstance(x, torch.Tensor):
            self.tensors.append((container, key, x))
        elif isinstance(x, _PLAIN):
            self.values.append((container, key, x))
        elif x is not _MISSING:
            self.identities.append((container, key, x))
            self._object(x)

    def _object(self, x) -> None:
        if id(x) in self._seen or len(self._seen) > _LIMIT or isinstance(x, type):
            return
        self._seen.add(id(x))
        if isinstance(x, types.FunctionType):
            self._function(x)
        elif isinstance(x, types.MethodType):
            self._object(x.__self__)
            self._object(x.__func__)
        elif isinstance(x, functools.partial):
            for part in (x.func, x.args, x.keywords):
                self._object(part)
        elif isinstance(x, (list, tuple)):
            self._container(x, range(len(x)))
        elif isinstance(x, dict):
            self._container(x, list(x))
        elif isinstance(x, torch.nn.Module):
            self._module(x)
        elif (
            not isinstance(x, types.ModuleType)
            and hasattr(x, "__dict__")
            and not _foreign(type(x).__module__)
        ):
            self._container(x.__dict__, list(x.__dict__))
            self._methods(type(x))

    def _container(self, x, keys) -> None:
        self.lengths.append((x, len(x)))
        for key in keys:
            self._item(x, key)

    def _module(self, module: torch.nn.Module) -> None:
        for m in module.modules():
            for store in (m._parameters, m._buffers, m._modules):
                self._container(store, list(store))
            for key, value in list(m.__dict__.items()):
                if isinstance(value, (*_PLAIN, torch.Tensor, list, tuple)) or (
                    key not in _MODULE_STATE and isinstance(value, dict)
                ):
                    self._item(m.__dict__, key)
            self._methods(type(m))

    def _methods(self, cls: type) -> None:
        if not _foreign(cls.__module__):
            for value in vars(cls).values():
                if isinstance(value, types.FunctionType):
                    self._object(value)

    def _function(self, f: types.FunctionType) -> None:
        for cell in f.__closure__ or ():
            self._item(cell, None)
        self._object(f.__defaults__ or ())
        self._object(f.__kwdefaults__ or {})
        if not _foreign(f.__globals__.get("__name__")):
            for name in _names(f.__code__):
                self._global(f, name)

    def _global(self, f, name: str) -> None:
        x = f.__globals__.get(name, _MISSING)
        if isinstance(x, types.ModuleType):
            if not _foreign(x.__name__):
                for attribute in _names(f.__code__):
                    if attribute in x.__dict__ and not isinstance(x.__dict__[attribute], types.ModuleType):
                        self._item(x.__dict__, attribute)
        elif x is not _MISSING:
            self._item(f.__globals__, name)


_MODULE_STATE = set(torch.nn.Module().__dict__)


def _names(code: types.CodeType) -> set[str]:
    """Names a function's code (and code inside it) may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _read(container, key):
    try:
        return (
            container.cell_contents
            if key is None and isinstance(container, types.CellType)
            else container[key]
        )
    except (KeyError, IndexError, ValueError):
        return _MISSING


def same_signature(a, b: torch.Tensor) -> bool:
    """True if a tensor can stand in for another without a new capture."""
    return isinstance(a, torch.Tensor) and signature(a) == signature(b)


def signature(t: torch.Tensor) -> tuple:
    """What a capture may have depended on in a tensor, its values aside."""
    return (
        type(t),
        t.shape,
        t.stride(),
        t.dtype,
        t.device,
        t.requires_grad,
        t.is_conj(),
        t.is_neg(),
        t.storage_offset() % 16 == 0,
    )
