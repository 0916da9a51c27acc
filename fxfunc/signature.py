"""What a compiled function takes and gives: pytrees whose tensors have fixed types, checked at every call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import Val


class _Tensor:
    """Stands where a tensor goes in a template."""

    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _Tensor()


def resolved(tensors) -> list[torch.Tensor]:
    """Tensors without conjugate and negative bits, of which a graph knows nothing."""
    return [t.resolve_conj().resolve_neg() if t.is_conj() or t.is_neg() else t for t in tensors]


@dataclasses.dataclass(frozen=True)
class Signature:
    """Structures of arguments `(args, kwargs)` and result; leaves are `TENSOR` or the plain value that belongs there."""

    in_spec: pytree.TreeSpec
    in_leaves: tuple
    in_vals: tuple[Val, ...]
    out_spec: pytree.TreeSpec
    out_leaves: tuple

    def tensors(self, args, kwargs) -> list[torch.Tensor]:
        """The tensors of a call. Raises StructureMismatch; symbolic sizes must agree among themselves."""
        leaves: list = []
        if self._read is None or not self._read((args, kwargs), leaves):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.in_spec:
                raise self._mismatch(f"the arguments have the structure {spec}, not {self.in_spec}")
        for x, expected in zip(leaves, self.in_leaves, strict=True):
            if expected is not TENSOR and (type(x) is not type(expected) or x != expected):
                raise self._mismatch(f"a plain argument is {x!r}, the function was compiled for {expected!r}")
        tensors = [x for x, expected in zip(leaves, self.in_leaves, strict=True) if expected is TENSOR]
        sizes: dict[str, int] = {}
        for i, (x, v) in enumerate(zip(tensors, self.in_vals, strict=True)):
            if not isinstance(x, torch.Tensor):
                raise self._mismatch(f"tensor argument {i} is a {type(x).__name__}, not {v}")
            same = x.shape == v.shape or _fits(x.shape, v.shape, sizes)
            if not same or x.dtype != v.dtype or x.device != v.device:
                raise self._mismatch(
                    f"tensor argument {i} is {Val(tuple(x.shape), x.dtype, x.device)}, not {v}"
                )
        return resolved(tensors)

    @functools.cached_property
    def _read(self) -> Callable[[object, list], bool] | None:
        return _reader(self.in_spec)

    def outputs(self, tensors: list):
        """The result made of these tensors."""
        tensors = iter(tensors)
        return pytree.tree_unflatten(
            [next(tensors) if x is TENSOR else x for x in self.out_leaves], self.out_spec
        )

    def _mismatch(self, what: str) -> errors.StructureMismatch:
        return errors.StructureMismatch(what=what, expected=", ".join(map(str, self.in_vals)))


def _reader(spec: pytree.TreeSpec) -> Callable[[object, list], bool] | None:
    """A function that appends the leaves of a value to a list, or says that it has another structure: what tree_flatten does,
    without making a structure to compare. None for a structure with other nodes than tuples, lists and dicts."""
    if spec.is_leaf():
        return _read_leaf
    children = [_reader(child) for child in spec.children()]
    if spec.type not in (tuple, list, dict) or None in children:
        return None
    kind, count, keys = spec.type, len(children), spec.context

    def read(x: object, leaves: list) -> bool:
        if type(x) is not kind or len(x) != count:
            return False
        if kind is dict:
            if list(x) != keys:
                return False
            x = x.values()
        return all(child(y, leaves) for child, y in zip(children, x, strict=True))

    return read


def _read_leaf(x: object, leaves: list) -> bool:
    leaves.append(x)
    return type(x) not in pytree.SUPPORTED_NODES


def _fits(shape, expected, sizes: dict[str, int]) -> bool:
    """Match a shape, binding the names of symbolic sizes; an expression in bound names must hold."""
    if len(shape) != len(expected):
        return False
    for s, e in zip(shape, expected, strict=True):
        if isinstance(e, Dim):
            names = sorted(e.names())
            if e == Dim(names[0]):
                e = sizes.setdefault(names[0], s)
            elif set(names) <= sizes.keys():
                e = e.at(sizes)
            else:
                continue
        if s != e:
            return False
    return True
