"""What the text of a program tells of all its calls, so that a caller need not ask at each. Entry point: `promises`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from fxfunc.passes.graph import Graph, constant, getitem, root

from .loops import kernel, native

if TYPE_CHECKING:
    from .native import Native

aten = torch.ops.aten
_OWN = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.sum.default,
        aten.sum.dim_IntList, aten.mean.dim, aten.cat.default, aten.stack.default, aten.clone.default}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Single:
    """One call of a C++ program: that, its operands (constants, and positions among the inputs), and for each result its
    position among what it gives."""

    program: Native
    operands: tuple[Tensor | int, ...]
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Promises:
    """`owned`: no result has the memory of an input. `single`: all there is to do, if it is one call of a C++ program."""

    owned: bool
    single: Single | None


def promises(graph: Graph) -> Promises:
    """What holds whatever the inputs are, as far as a look at the outputs tells."""
    return Promises(all(n is None or _is_owned(n) for n in graph.outputs), _single(graph))


def _is_owned(n: Node) -> bool:
    """Whether a value is in memory that its call made. Schemas do not tell: dropout may return its input, _unsafe_view does."""
    owner = root(n)
    made = owner[0] if isinstance(owner, tuple) else owner
    op = made.target
    if op in (kernel, native, constant) or op in _OWN:
        return True
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags and not _is_composite(op)


def _is_composite(op: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _single(graph: Graph) -> Single | None:
    calls = [n for n in graph.nodes if n.target not in (getitem, constant)]
    if len(calls) != 1 or calls[0].target is not native:
        return None
    program, *operands = calls[0].args
    results = [n.args[1] if n is not None and n.target is getitem else None for n in graph.outputs]
    if None in results or len(set(results)) < len(results):
        return None
    found = tuple(n.args[0].tensor if n.target is constant else graph.inputs.index(n) for n in operands)
    dense = all(t.is_contiguous() for t in found if isinstance(t, Tensor))
    return Single(program, found, tuple(results)) if dense else None
