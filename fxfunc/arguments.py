"""What transforms do with arguments and outputs before and after a graph is rewritten. Entry point: `Call`."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from fxfunc.passes import errors
from fxfunc.passes.tracer import val_of

from .capture import Captured, capture, check_tensors, is_tensor, vals_of


def check_chunk_size(transform: str, chunk_size) -> None:
    """A number of examples above zero, or None."""
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size > 0):
        raise errors.TypeOfArgument(
            what=f"{transform}: chunk_size is {chunk_size!r}",
            instead="Use an int above 0, or None for no chunks.",
        )


def check_randomness(transform: str, randomness: str) -> None:
    """One of what torch.func.vmap takes."""
    if randomness not in ("error", "same", "different"):
        raise errors.TypeOfArgument(
            what=f"{transform}: randomness is {randomness!r}", instead='Use "error", "same" or "different".'
        )


def checked_argnums(transform: str, argnums, count: int) -> tuple[int, ...]:
    """argnums as non-negative ints, each once."""
    if not count:
        raise errors.NoTensorInputs(
            transform=transform, what="among its positional arguments: there are none"
        )
    given = (argnums,) if isinstance(argnums, int) and not isinstance(argnums, bool) else argnums
    ok = (
        isinstance(given, tuple)
        and given
        and all(isinstance(i, int) and not isinstance(i, bool) and -count <= i < count for i in given)
    )
    if not ok or len({i % count for i in given}) < len(given):
        raise errors.BadArgnums(transform=transform, argnums=argnums, count=count, low=-count, high=count - 1)
    return tuple(i % count for i in given)


class Call:
    """One call of a transformed function: its arguments flat, and which tensor leaves are differentiated."""

    def __init__(
        self, transform: str, function, args, kwargs, argnums, *, reverse: bool = True, randomness=None
    ):
        self.transform = transform
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        check_tensors(transform, self.leaves)
        self.single = isinstance(argnums, int)
        positions = checked_argnums(transform, argnums, len(args))
        marked = [i in positions for i, a in enumerate(args) for _ in pytree.tree_leaves(a)]
        marked += [False] * (len(self.leaves) - len(marked))  # keyword arguments come last
        selected = args[positions[0]] if self.single else tuple(args[i] for i in positions)
        self.selected, self.selected_spec = pytree.tree_flatten(selected)
        self.order = _order(args, positions)
        self.tensors = [x for x in self.leaves if is_tensor(x)]
        self.marked = tuple(m for m, x in zip(marked, self.leaves, strict=True) if is_tensor(x))
        self._check()
        self.captured: Captured = capture(
            function,
            self.leaves,
            self.spec,
            vals_of(self.leaves),
            by_value=(True,) * len(self.tensors),
            tracks=self.marked if reverse else (),
            randomness=randomness,
            writable=lambda i: i < len(self.marked) and not (reverse and self.marked[i]),
        )
        self.graph = self.captured.graph
        self.nonzero = self.marked + (False,) * len(self.captured.captures)
        self.inputs = [*self.tensors, *self.captured.captures]

    def _check(self) -> None:
        if not any(is_tensor(x) for x in self.selected):
            raise errors.NoTensorInputs(transform=self.transform, what="among the arguments to differentiate")
        for x in self.selected:
            if not is_tensor(x):
                raise errors.TypeOfArgument(
                    what=f"{self.transform}: an argument to differentiate holds a {type(x).__name__}, not a tensor",
                    instead="Leave it out of argnums, or let the function close over it.",
                )
            if not val_of(x).differentiable:
                raise errors.NotDifferentiable(transform=self.transform, what="an argument", dtype=x.dtype)

    def unflatten(self, tensors: list):
        """Results for the marked leaves in graph order, in the structure of the selected arguments."""
        return pytree.tree_unflatten([tensors[i] for i in self.order], self.selected_spec)


def _order(args, positions) -> list[int]:
    """For each leaf of the selected arguments in argnums order, its place among marked leaves in call order."""
    start, places = 0, {}
    for i in sorted(positions):
        count = sum(is_tensor(x) for x in pytree.tree_leaves(args[i]))
        places[i] = list(range(start, start + count))
        start += count
    return [place for i in positions for place in places[i]]


class Mark:
    """Stands for output tensor `index`."""

    def __init__(self, index: int):
        self.index = index


def split_aux(transform: str, captured: Captured, has_aux: bool):
    """(the result to differentiate, marks for its tensors; function from all output tensors to (value, aux))."""
    marks = captured.outputs([Mark(i) for i in range(len(captured.graph.outputs))])
    if not has_aux:
        return marks, lambda tensors: (captured.outputs(tensors), None)
    if not (isinstance(marks, tuple) and len(marks) == 2):
        raise errors.TypeOfArgument(
            what=f"{transform} with has_aux=True expects the function to return a tuple (output, aux)",
            instead="Return exactly two values, or drop has_aux.",
        )
    return marks[0], captured.outputs


def count_outputs(transform: str, value) -> int:
    """The number of tensors to differentiate; there is at least one, and nothing else."""
    leaves = pytree.tree_leaves(value)
    others = [type(x).__name__ for x in leaves if not isinstance(x, Mark)]
    if others or not leaves:
        raise errors.TypeOfArgument(
            what=f"{transform} expects the function to return only tensors, got {', '.join(others) or 'nothing'}",
            instead="Return a tensor or a structure of tensors; with has_aux=True, other values beside it.",
        )
    return len(leaves)


def matching(where: str, what: str, tree, spec, vals) -> list[torch.Tensor]:
    """The leaves of `tree`, which must match a structure of tensors."""
    given, given_spec = pytree.tree_flatten(tree)
    if given_spec != spec:
        raise errors.StructureMismatch(
            what=f"{where}: the {what} has another structure than the {'output' if what == 'cotangent' else 'primals'}",
            expected=str(spec),
        )
    for x, v in zip(given, vals, strict=True):
        if not is_tensor(x) or val_of(x).shape != v.shape or x.dtype != v.dtype:
            got = val_of(x) if is_tensor(x) else type(x).__name__
            raise errors.StructureMismatch(
                what=f"{where}: a {what} is {got} where {v} belongs", expected=", ".join(map(str, vals))
            )
    return given


def primal_call(transform: str, f, primals) -> Call:
    if not isinstance(primals, tuple) or not primals:
        raise errors.NoTensorInputs(transform=transform, what="primals: expected a non-empty tuple")
    return Call(transform, f, primals, {}, tuple(range(len(primals))), reverse=False)
