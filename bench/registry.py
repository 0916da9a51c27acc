"""Workloads: what is measured. Entry points: `workload` registers one, `find` gets one by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BenchError


@dataclasses.dataclass(frozen=True)
class Workload:
    """A function to measure, over a namespace that is either torch.func or fxfunc. See `workload`."""

    name: str
    make: Callable[..., Callable[..., Any]]
    inputs: Callable[..., tuple]
    parameters: dict[str, int]
    jax: str | None = None
    drive: Callable[..., Any] | None = None
    reference: Callable[..., Callable[..., Any]] | None = None

    def function(self, api: Any) -> Callable[..., Any]:
        """The function that implementations compile, written over `api`."""
        return self.make(api, **self.parameters)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What is timed: `call`, with the ordinary autograd that the workload puts around it."""
        return call if self.drive is None else lambda *inputs: self.drive(call, *inputs)

    def exact(self) -> Callable[..., Any]:
        """The function whose float64 answer the others are held against."""
        import torch

        if self.reference is not None:
            return self.reference(**self.parameters)
        return self.around(self.function(torch.func))


_REGISTRY: dict[str, Workload] = {}


def workload(
    name: str,
    *,
    inputs: Callable[..., tuple],
    jax: str | None = None,
    drive: Callable[..., Any] | None = None,
    reference: Callable[..., Callable[..., Any]] | None = None,
    **parameters: int,
) -> Callable:
    """Registers the decorated `make(api, **parameters) -> f(*inputs)` as a workload; it stays usable as it is.

    `api` is `torch.func` or `fxfunc`. `inputs(**parameters)` gives the arguments of f: a tuple of tensors, or of dicts, lists
    and tuples of them, float32 on the CPU, the same numbers at every call; the bench moves and casts them.
    `jax="module:function"` names a function `(jax, **parameters) -> f(*inputs)` with the same answer, for the JAX row.
    `drive(call, *inputs)` gives the answer where ordinary autograd runs around the compiled `call`.
    `reference(**parameters) -> f(*inputs)` is trusted in float64 in place of torch.func. `parameters` are integers that
    `name[key=value]` on the command line overrides. Raises BenchError for a name that is taken or badly formed.
    """

    def register(make: Callable) -> Callable:
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or name in _REGISTRY:
            raise BenchError(
                f"workload {name!r}: names are letters, digits, '.', '_' and '-', each used once"
            )
        _REGISTRY[name] = Workload(name, make, inputs, parameters, jax, drive, reference)
        return make

    return register


def names() -> list[str]:
    """All registered workloads, in order of registration."""
    _register_own()
    return list(_REGISTRY)


def find(text: str) -> Workload:
    """The workload called `name` or `name[key=value,...]`; raises BenchError for one that is not registered."""
    _register_own()
    match = re.fullmatch(r"([\w.-]+)(?:\[([^\]]*)\])?", text)
    if not match or match[1] not in _REGISTRY:
        raise BenchError(f"no workload {text!r}; there are {', '.join(_REGISTRY)}")
    found = _REGISTRY[match[1]]
    changes = dict(_override(found, text, item) for item in (match[2] or "").split(",") if item)
    return dataclasses.replace(found, name=text, parameters=found.parameters | changes)


def _override(found: Workload, text: str, item: str) -> tuple[str, int]:
    key, _, value = item.partition("=")
    if key not in found.parameters or not re.fullmatch(r"\d+", value):
        known = ", ".join(found.parameters) or "none"
        raise BenchError(f"workload {text!r}: {item!r} sets no integer parameter of {found.name} ({known})")
    return key, int(value)


def register_file(path: Path) -> None:
    """Runs a Python file that registers workloads. Raises BenchError if it cannot."""
    _register_own()
    spec = importlib.util.spec_from_file_location(f"fxfunc_bench_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BenchError(f"{path}: not a Python file")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as problem:
        raise BenchError(f"{path}: {type(problem).__name__}: {problem}") from problem


def _register_own() -> None:
    from . import workloads  # noqa: F401
