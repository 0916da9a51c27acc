"""What torch.func has beside its transforms: functionalize, rearrange and looking into a transform's tensors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxfunc.passes import errors
from fxfunc.passes.tracer import Tracer, current, tracked

from .capture import capture, check_tensors, execute, is_tensor, vals_of, write_back
from .entry import entry

REMOVABLE = ("mutations", "mutations_and_views")


def functionalize(func: Callable, *, remove: str = "mutations") -> Callable:
    """`func` without in-place writes, and with "mutations_and_views" without views: what another tracer (make_fx, export) sees
    of it, apart from one copy_ at the end for each input that it writes to.

    Raises TypeOfArgument for another `remove`. Follows torch.func.functionalize.
    """
    if remove not in REMOVABLE:
        raise errors.TypeOfArgument(
            what=f"functionalize: remove is {remove!r}",
            instead=f"Use one of {', '.join(map(repr, REMOVABLE))}.",
        )

    @entry
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        leaves, spec = pytree.tree_flatten((args, kwargs))
        check_tensors("functionalize", leaves)
        tensors = [x for x in leaves if is_tensor(x)]
        captured = capture(
            func,
            leaves,
            spec,
            vals_of(leaves),
            tracks=[tracked(t) for t in tensors],
            grad=torch.is_grad_enabled(),
            writable=lambda i: True,
        )
        inputs = [*tensors, *captured.captures]
        views = remove == "mutations_and_views" and current() is None
        with _CopiesOfViews() if views else contextlib.nullcontext():
            results = execute(captured.graph, inputs)
        return captured.outputs(write_back(captured.graph, inputs, results))

    return wrapper


class _CopiesOfViews(TorchDispatchMode):
    """Every call that gives a view as the call that copies."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, overload = func._schema.name.split("::")[1], func._overloadname
        copies = getattr(torch.ops.aten, f"{packet}_copy", None) if func.is_view else None
        return getattr(copies, overload, func)(*args, **(kwargs or {}))


def debug_unwrap(tensor: torch.Tensor, *, recurse: bool = True) -> torch.Tensor:
    """The tensor itself: outside of transforms there is nothing to unwrap. Follows torch.func.debug_unwrap.

    Inside a transform a tensor stands for a value that is computed later: raises ValueDependent.
    """
    if isinstance(tensor, Tracer):
        raise errors.ValueDependent(op="debug_unwrap; print(tensor) shows its shape and dtype")
    return tensor


def rearrange(tensor, pattern: str, **axes_lengths: int) -> torch.Tensor:
    """Axes split, reordered and joined as an einops pattern says: "(h a) w -> a h w", with a=2.

    tensor: a tensor, or a list of tensors of one shape, which are stacked first. Raises TypeOfArgument where the pattern does
    not fit the shape, ValueError for a pattern that is malformed. Follows torch.func.rearrange.
    """
    from functorch.einops._parsing import _ellipsis, parse_pattern, validate_rearrange_expressions

    x = tensor if isinstance(tensor, torch.Tensor) else torch.stack(tensor)
    left, right = parse_pattern(pattern, axes_lengths)
    validate_rearrange_expressions(left, right, axes_lengths)
    spread = x.ndim - len(left.composition) + left.has_ellipsis
    if spread < 0 or spread and not left.has_ellipsis:
        raise errors.TypeOfArgument(
            what=f"rearrange: {pattern!r} names {len(left.composition)} axes of a tensor with {x.ndim}",
            instead="Name every axis once, or use '...'.",
        )
    rest = list(range(spread))  # names of the axes under the ellipsis
    expand = lambda group: [n for name in group for n in (rest if name == _ellipsis else [name])]
    sizes: dict = {}
    shape = iter(x.shape)
    for group in left.composition:
        if group == _ellipsis:
            sizes |= {name: next(shape) for name in rest}
        else:
            sizes |= zip(group, _split(group, next(shape), axes_lengths, pattern), strict=True)
    order = list(sizes)
    groups = [
        g
        for group in right.composition
        for g in ([[n] for n in rest] if group == _ellipsis else [expand(group)])
    ]
    parts = x.reshape(list(sizes.values())).permute([order.index(name) for group in groups for name in group])
    return parts.reshape([math.prod(sizes[name] for name in group) for group in groups])


def _split(group, size: int, lengths: dict[str, int], pattern: str) -> list[int]:
    """The sizes of the axes that an axis is split into; one that is not given is what is left."""
    known = math.prod(lengths[name] for name in group if name in lengths)
    unknown = [name for name in group if name not in lengths]
    if len(unknown) > 1 or size % known or not unknown and size != known:
        raise errors.TypeOfArgument(
            what=f"rearrange: {pattern!r} does not split an axis of size {size}",
            instead="Give the length of all axes in parentheses but one; they must divide the axis.",
        )
    return [lengths.get(name, size // known) for name in group]
