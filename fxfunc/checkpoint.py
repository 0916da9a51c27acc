"""What reverse mode keeps of a function: `checkpoint` says it, `saved_residuals` shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxfunc.passes import errors, residuals
from fxfunc.passes.graph import Graph
from fxfunc.passes.infer import rewriting
from fxfunc.passes.remat import POLICIES, Policy
from fxfunc.passes.rules.checkpoint import opened, region
from fxfunc.passes.tracer import recorders, tracked, val_of

from .capture import capture, check_tensors, execute, is_tensor, vals_of, write_back
from .reuse import transform


def checkpoint(f: Callable, *, policy: str | Callable[[Node], bool] = "min_cut") -> Callable:
    """`f`, of which reverse mode keeps less between the function and its derivative, and computes the rest again.

    policy: "min_cut" keeps the values of least bytes from which the rest follows without products, loops and large sums;
    "dots" keeps the results of products; "nothing" only the arguments. A function of a node of the graph (its `target` an
    operator, its `meta["val"]` shape and dtype) says True for a call whose results are kept; it must be pure. Under every
    policy random numbers are drawn once, and what compares floating point numbers for equality, sorts, or finds the place
    of one is computed once. Under vmap(randomness="same") a function that draws keeps everything.

    Values, structure and derivatives of any order are those of `f`; it may write to its arguments, once. Follows
    jax.checkpoint and torch.utils.checkpoint. Raises TypeOfArgument for another policy.
    """
    if not (
        policy in POLICIES if isinstance(policy, str) else callable(policy) and isinstance(policy, Hashable)
    ):
        raise errors.TypeOfArgument(
            what=f"checkpoint: policy is {policy!r}",
            instead=f"Use one of {', '.join(map(repr, POLICIES))}, or a function of a node that can be hashed.",
        )

    @transform(f, "checkpoint", policy)
    def wrapper(*args, **kwargs):
        return _checkpointed(f, policy, args, kwargs)

    return wrapper


def _checkpointed(f: Callable, policy: Policy, args, kwargs):
    leaves, spec = pytree.tree_flatten((args, kwargs))
    check_tensors("checkpoint", leaves)
    tensors = [x for x in leaves if is_tensor(x)]
    captured = capture(
        f,
        leaves,
        spec,
        vals_of(leaves),
        by_value=(True,) * len(tensors),
        tracks=[tracked(t) for t in tensors],
        grad=torch.is_grad_enabled(),
        writable=lambda i: True,
    )
    inputs, graph = [*tensors, *captured.captures], captured.graph
    drawn_outside = graph.draws and any(
        r.randomness == "same" for r in recorders()
    )  # by a vmap, not from a region
    graph = graph if drawn_outside else _region(graph, policy, graph.written, graph.fresh)
    return captured.outputs(write_back(captured.graph, inputs, execute(graph, inputs)))


@rewriting
def _region(body: Graph, policy: Policy, written: tuple[int, ...], fresh: tuple[int, ...]) -> Graph:
    """A graph as one call of it."""
    graph = region(body, policy)
    graph.written, graph.fresh = written, fresh
    return graph


# ----- seeing it ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Residual:
    """A value kept between a function and its derivative; `source` is the line that computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    source: str | None
    why: str

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"
        return f"{self.bytes:>12,}  {kind:<24} {self.name}: {self.why}{f' ({self.source})' if self.source else ''}"


class Residuals(tuple[Residual, ...]):
    """All of them. `total` bytes, without those of arguments, which are there anyway, and `peak`: the most at a time, with what
    is computed again; `plain_total` and `plain_peak` are those of the function without any checkpoint."""

    total: int
    peak: int
    plain_total: int
    plain_peak: int

    def __str__(self) -> str:
        def line(what: str, now: int, plain: int) -> str:
            return f"{now:>12,}  bytes {what} ({plain:,} without checkpoints{f', {now / plain:.2f}' if plain else ''})"

        ends = line("in all", self.total, self.plain_total), line("at most", self.peak, self.plain_peak)
        return "\n".join([*map(str, self), *ends])


def saved_residuals(f: Callable, *args, **kwargs) -> Residuals:
    """What reverse mode of `f` keeps at these arguments, of which every floating point tensor has a gradient, as has a
    tensor that `f` closes over and that requires grad. Nothing is computed.

    Printed it is a table: bytes, type, name, why it is kept, the user's line; then the bytes in all, and at most at a time
    during the backward, both with and without the checkpoints. Follows jax.ad_checkpoint.print_saved_residuals.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    check_tensors("saved_residuals", leaves)
    vals = vals_of(leaves)
    captured = capture(
        f, leaves, spec, vals, by_value=(True,) * len(vals), tracks=[v.differentiable for v in vals]
    )
    closed = [t.requires_grad and val_of(t).differentiable for t in captured.captures]
    nonzero = (*(v.differentiable for v in vals), *closed)
    now, plain = (residuals.of(g, nonzero) for g in (captured.graph, opened(captured.graph)))
    found = Residuals(Residual(k.name, k.val.shape, k.val.dtype, k.bytes, k.source, k.why) for k in now.kept)
    found.total, found.peak, found.plain_total, found.plain_peak = (
        now.total,
        now.peak,
        plain.total,
        plain.peak,
    )
    return found
