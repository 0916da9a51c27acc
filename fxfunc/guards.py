"""What a compiled function read that was not an argument. Entry points: `Guards.of` (before a capture) and `.current`.

Free variables, globals, defaults, attributes of modules, objects and classes, and items of containers reached from the
function are recorded: tensors (one of the same signature is rebound), plain values by value, the rest by identity.
"""

from __future__ import annotations

import collections
import dis
import functools
import types

import torch

from fxfunc.passes.graph import typed
from fxfunc.passes.tracer import refuse_tensor

PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
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
    "abc",
    "enum",
)
_PURE = {  # what these give depends on their arguments alone
    "torch",
    "fxfunc",
    "builtins",
    "numpy",
    "math",
    "cmath",
    "functools",
    "operator",
    "_operator",
    "itertools",
    "collections",
    "_collections",
    "typing",
    "abc",
    "enum",
    "dataclasses",
    "numbers",
    "copy",
    "contextlib",
}
_IMPURE_BUILTINS = {
    "print",
    "input",
    "open",
    "exec",
    "eval",
    "globals",
    "locals",
    "vars",
    "id",
    "breakpoint",
    "__import__",
}
_IMMUTABLE = (range, slice, type(...), type(NotImplemented), types.BuiltinFunctionType, types.GenericAlias)
_IMPORT = dis.opmap["IMPORT_NAME"]
OWN = "__fxfunc__"  # an attribute of functions, for us alone
_MISSING = object()
_LIMIT = 20_000
_MODULE_STATE = set(torch.nn.Module().__dict__) - {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
}


def _foreign(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _FOREIGN


class Guards:
    """Places and what was found there: `container[key]`, a cell's contents, a slot, the defaults of a function.

    strict: `complete` is false if anything could act or differ from call to call unseen: printing, clocks, random numbers of
    Python, iterators, imports at call time, objects that hold their state elsewhere.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.values: list[tuple] = []  # (container, key, type and value)
        self.identities: list[tuple] = []  # (container, key, object): the same object
        self.tensors: list[tuple] = []  # (container, key, tensor, signature, first place of this tensor)
        self.snapshots: list[tuple] = []  # (object, function, what the function said of it)
        self.complete = True
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._first: dict[int, int] = {}

    @classmethod
    def of(cls, *objects, strict: bool = False) -> Guards:
        """Everything reachable from a function (and its plain arguments) that a capture of it could read."""
        self = cls(strict)
        for x in objects:
            self._object(x)
        return self

    def current(self) -> list[torch.Tensor] | None:
        """The tensors now found in the recorded places, or None if anything else has changed."""
        if not (self.complete and self._unchanged()):
            return None
        found: list[torch.Tensor] = []
        for container, key, _, known, first in self.tensors:
            now = _read(container, key)
            if not isinstance(now, torch.Tensor) or signature(now) != known:
                return None
            found.append(now)
            if found[first] is not now:  # places that shared a tensor must still share it
                return None
        return found

    def _unchanged(self) -> bool:
        return (
            all(typed(_read(c, key), None) == value for c, key, value in self.values)
            and all(_read(c, key) is x for c, key, x in self.identities)
            and all(function(x) == value for x, function, value in self.snapshots)
        )

    def _item(self, container, key) -> None:
        x = _read(container, key)
        if isinstance(x, torch.Tensor):
            first = self._first.setdefault(id(x), len(self.tensors))
            self.tensors.append((container, key, x, signature(x), first))
        elif isinstance(x, PLAIN):
            self.values.append((container, key, typed(x, None)))
        elif x is not _MISSING:
            self.identities.append((container, key, x))
            self._object(x)

    def _object(self, x) -> None:
        if id(x) in self._seen or isinstance(x, PLAIN):
            return
        self.complete = self.complete and len(self._seen) < _LIMIT
        self.complete = self.complete and not (self.strict and _acts(x))
        if self.complete:
            self._seen.add(id(x))
            for kind, explore in _KINDS:
                if isinstance(x, kind):
                    explore(self, x)
                    return
            self._instance(x)

    def _parts(self, *parts) -> None:
        for part in parts:
            self._object(part)

    def _snapshot(self, x, function) -> None:
        self.snapshots.append((x, function, function(x)))

    def _container(self, x, keys) -> None:
        self._snapshot(x, len)
        for key in list(keys):
            self._item(x, key)

    def _instance(self, x) -> None:
        """The attributes of an object and of its class; of a function object of others only what it wraps."""
        attributes = getattr(x, "__dict__", {})
        if type(x).__module__ == "numpy" and hasattr(x, "tobytes"):
            self._snapshot(x, _bytes)
        elif not (_foreign(type(x).__module__) and callable(x)):
            self._container(attributes, attributes)
        elif "__wrapped__" in attributes:
            self._object(attributes["__wrapped__"])
        self._class(type(x))
        for cls in type(x).__mro__:
            for slot in vars(cls).values():
                if isinstance(slot, types.MemberDescriptorType) and not _foreign(cls.__module__):
                    self._item(x, slot)

    def _module(self, module: torch.nn.Module) -> None:
        self._snapshot(module.__dict__, len)
        for key in [k for k in module.__dict__ if k not in _MODULE_STATE]:
            self._item(module.__dict__, key)
        self._class(type(module))

    def _class(self, cls: type) -> None:
        """Class attributes and methods, those of bases included."""
        for c in cls.__mro__:
            if c not in self._classes and not _foreign(c.__module__):
                self._classes.add(c)
                self._snapshot(vars(c), len)
                for key, value in list(vars(c).items()):
                    if not key.startswith("__") or isinstance(value, types.FunctionType):
                        self._item(vars(c), key)

    def _function(self, f: types.FunctionType) -> None:
        names, modules = _names(f.__code__), set()
        for cell in f.__closure__ or ():
            self._named(cell, None, names, modules)
        self.identities.append((f, "__code__", f.__code__))
        self._item(f, "__defaults__")
        self._item(f, "__kwdefaults__")
        self._snapshot(f.__dict__, _attributes)
        for key in _attributes(f.__dict__):
            self._item(f.__dict__, key)
        if not _foreign(f.__globals__.get("__name__")):
            self.complete = self.complete and not (self.strict and _reaches_out(f, names))
            for name in names & f.__globals__.keys():
                self._named(f.__globals__, name, names, modules)

    def _named(self, container, key, names: set[str], modules: set) -> None:
        """A variable of a function; of a module, what the function's names may find in it."""
        x = _read(container, key)
        if not isinstance(x, types.ModuleType):
            self._item(container, key)
        elif self.strict and _foreign(x.__name__) and not _pure(x.__name__, names):
            self.complete = False
        elif not _foreign(x.__name__) and x not in modules:
            modules.add(x)
            self.identities.append((container, key, x))
            for name in names & x.__dict__.keys():
                self._named(x.__dict__, name, names, modules)


def _pure(module: str, names: set[str]) -> bool:
    root, *rest = module.split(".")
    return root in _PURE and not (root == "numpy" and ("random" in names or "random" in rest))


def _acts(x) -> bool:
    """Whether an object's state, or what calling it does, cannot be seen from its attributes."""
    if isinstance(x, types.BuiltinFunctionType):
        bound = x.__self__
        if bound is None or isinstance(bound, types.ModuleType):
            return not _pure(x.__module__ or "builtins", set())
        return not isinstance(bound, type) and _root(type(bound)) != "torch"
    if isinstance(x, (types.FunctionType, type, types.MethodType)):
        return _foreign(x.__module__) and not _pure(x.__module__, set())
    if hasattr(type(x), "__next__") or type(x).__module__.startswith("numpy.random"):
        return True
    native = not type(x).__flags__ & _HEAP_TYPE and not isinstance(x, (*_CONTAINERS, *_IMMUTABLE))
    return native and _root(type(x)) not in ("torch", "numpy")


def _root(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _reaches_out(f: types.FunctionType, names: set[str]) -> bool:
    """Calls of builtins that act, and imports at call time."""
    return bool(names & _IMPURE_BUILTINS - f.__globals__.keys()) or _imports(f.__code__)


def _imports(code: types.CodeType) -> bool:
    return _IMPORT in code.co_code[::2] or any(
        isinstance(c, types.CodeType) and _imports(c) for c in code.co_consts
    )


_HEAP_TYPE = 1 << 9
_CONTAINERS = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    collections.deque,
    types.MappingProxyType,
    types.ModuleType,
    functools.partial,
    staticmethod,
    classmethod,
    property,
)


def _attributes(namespace: dict) -> list[str]:
    return [key for key in namespace if key != OWN]


def _bytes(array) -> tuple:
    return array.dtype, array.shape, array.tobytes()


_KINDS = (
    (types.FunctionType, Guards._function),
    (types.MethodType, lambda self, x: self._parts(x.__self__, x.__func__)),
    (functools.partial, lambda self, x: self._parts(x.func, x.args, x.keywords)),
    ((staticmethod, classmethod), lambda self, x: self._parts(x.__func__)),
    (property, lambda self, x: self._parts(x.fget)),
    (types.ModuleType, lambda self, x: None),
    (type, Guards._class),
    (torch.nn.Module, Guards._module),
    ((list, tuple, collections.deque), lambda self, x: self._container(x, range(len(x)))),
    ((dict, types.MappingProxyType), lambda self, x: self._container(x, x)),
    ((set, frozenset), lambda self, x: self._snapshot(x, frozenset)),
)


def _names(code: types.CodeType) -> set[str]:
    """Names a function's code (and code inside it) may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _read(container, key):
    if type(container) is dict:
        return container.get(key, _MISSING)
    try:
        if isinstance(container, types.CellType):
            return container.cell_contents
        if isinstance(container, types.FunctionType):
            return getattr(container, key)
        if isinstance(key, types.MemberDescriptorType):
            return key.__get__(container)
        return container[key]
    except (KeyError, IndexError, ValueError, AttributeError):
        return _MISSING


def signature(t: torch.Tensor) -> tuple:
    """What a capture may have depended on in a tensor, its values aside."""
    if t.is_nested or t.layout is not torch.strided:
        refuse_tensor(t, "closing over")
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
