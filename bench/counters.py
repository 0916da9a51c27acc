"""Exact counts of what a program does. Entry points: `Counter` and `count` (what ran), `graph_flops` (what a graph says).

A flop is counted by torch's own formulas (`torch.utils.flop_counter`) and those of `AMENDED`: products and convolutions,
two a multiply-add, nothing else. A byte is counted where an ATen call reads or writes memory, as if no cache were between
two calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_backward_flop,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from fxfunc.passes.graph import Graph, Val, map_, scan, subgraphs, substitute

aten = torch.ops.aten


def _convolution_backward(*shapes: Any, out_shape: Any, **options: Any) -> int:
    """Torch's count, but with the weight's gradient divided by the groups, which torch forgets."""
    *most, groups, (wants_input, wants_weight, _) = shapes
    formula: Callable[..., int] = conv_backward_flop
    of_input = formula(*most, groups, (wants_input, False, False), out_val=out_shape)
    of_weight = formula(*most, groups, (False, wants_weight, False), out_val=out_shape)
    return of_input + of_weight // groups


# What torch's table leaves out (products with a vector, the fused attention of CPUs) or gets wrong, from shapes like its own.
AMENDED = {
    aten.convolution_backward: _convolution_backward,
    aten.mv: lambda a, *rest, **options: 2 * math.prod(a),
    aten.addmv: lambda c, a, *rest, **options: 2 * math.prod(a),
    aten.dot: lambda a, *rest, **options: 2 * math.prod(a),
    aten.vdot: lambda a, *rest, **options: 2 * math.prod(a),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **options: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **options: (
        sdpa_backward_flop_count(*shapes[:4])
    ),
}
FLOPS = flop_registry | {op: shape_wrapper(formula) for op, formula in AMENDED.items()}

_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_READERS = {aten._local_scalar_dense, aten.equal}  # what they give is no tensor
# In-place calls that do not read the old values, beside those that draw random numbers.
_OVERWRITERS = {aten.copy_, aten.fill_, aten.zero_}


class Counter(TorchDispatchMode):
    """Counts the ATen calls made inside `with Counter() as counter`, below autograd and torch.func's transforms.

    `.ops`: calls that move data; views, metadata and bare allocations are none. `.flops`: as FlopCounterMode gives
    with `custom_mapping=AMENDED`. `.bytes`: for each op the operands it reads and the results it writes, each whole (a gather
    counts its whole source), a place that two operands share once, an expanded tensor by what it repeats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        with self:
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        answer = func(*args, **kwargs)
        moved = _moved(func, args, kwargs, answer)
        self.ops += moved > 0
        self.bytes += moved
        self.flops += _flops(func, args, kwargs, answer)
        return answer

    def counts(self) -> dict[str, int]:
        """The three, by name."""
        return {"ops": self.ops, "flops": self.flops, "bytes": self.bytes}


def count(call: Callable[..., Any], *inputs: Any) -> dict[str, int]:
    """`ops`, `flops` and `bytes` of one call of any program that ATen runs; kernels of other making are not seen."""
    with Counter() as counter:
        call(*inputs)
    return counter.counts()


def graph_flops(graph: Graph) -> int:
    """The flops of running a graph once, whatever runs it; its sizes must be numbers."""
    return sum(_node_flops(n) for n in graph.nodes)


def touched(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, shared places once; never more than their storages hold."""
    places: dict[int, dict[tuple, int]] = {}
    limits: dict[int, int] = {}
    for t in tensors:
        storage = t.untyped_storage()
        axes = sorted(
            (stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if stride and size != 1
        )
        size = t.element_size() * math.prod(size for _, size in axes) if t.numel() else 0
        places.setdefault(storage._cdata, {})[(t.storage_offset(), t.dtype, *axes)] = size
        limits[storage._cdata] = storage.nbytes()
    return sum(min(sum(parts.values()), limits[key]) for key, parts in places.items())


def _moved(func: Any, args: tuple, kwargs: dict[str, Any], answer: Any) -> int:
    packet, operands = func._overloadpacket, _tensors((args, kwargs))
    changed = _changed(func, args, kwargs)
    written = [*_elsewhere(_tensors(answer), operands), *changed]
    if packet in _ALLOCATIONS or not (written or packet in _READERS):
        return 0
    unread = {id(t) for t in changed} if _overwrites(func) else set()
    read = [] if _reads_nothing(packet) else [t for t in operands if id(t) not in unread]
    return touched(read) + touched(written)


def _changed(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The operands whose values the call writes; not those whose metadata it changes."""
    if not func._schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return []
    named = dict(zip((a.name for a in func._schema.arguments[: len(args)]), args, strict=True)) | kwargs
    writes = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}
    return _tensors([value for name, value in named.items() if name in writes])


def _overwrites(func: Any) -> bool:
    """Whether what the call writes to is written without being read."""
    arguments = func._schema.arguments
    seeded = torch.Tag.nondeterministic_seeded in func.tags
    return any(a.is_out for a in arguments) or seeded or func._overloadpacket in _OVERWRITERS


def _reads_nothing(packet: Any) -> bool:
    """zeros_like, new_full and such: of the operand they need the shape alone."""
    return packet.__name__.startswith("new_") or packet.__name__.endswith("_like")


def _tensors(tree: Any) -> list[Tensor]:
    """The leaves that have memory: not meta tensors, autograd's symbolic zeros and, as they are many arrays, sparse ones."""
    leaves = (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))
    return [t for t in leaves if t.layout is torch.strided and not t.is_meta and not t._is_zerotensor()]


def _elsewhere(tensors: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Those whose storage is not one of the known tensors'."""
    storages = {t.untyped_storage()._cdata for t in known}
    return [t for t in tensors if t.untyped_storage()._cdata not in storages]


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], answer: Any) -> int:
    """By torch's formula for the overloads of that name; 0 where it has none."""
    formula = FLOPS.get(getattr(func, "_overloadpacket", None))
    return formula(*args, **kwargs, out_val=answer) if formula else 0


def _node_flops(node: Node) -> int:
    """A region's are its first body's, as often as that runs (a derivative or transpose that it holds is not run)."""
    times: Any = node.kwargs["length"] if node.target in (map_, scan) else 1
    body = next(subgraphs(node), None)
    kwargs = {name: substitute(value, _meta) for name, value in node.kwargs.items()}
    inside = graph_flops(body) if body else 0
    return times * inside + _flops(node.target, substitute(node.args, _meta), kwargs, _meta(node))


def _meta(node: Node) -> Any:
    """A node's value without memory, which is what a formula needs of it."""
    return pytree.tree_map(
        lambda v: torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, Val) else v,
        node.meta["val"],
    )
