"""What is kept between a function and its derivative. Entry point: `of`."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from .graph import REGIONS, Graph, Val, checkpoint, getitem, is_random, reached, root
from .infer import rewriting
from .linearize import Linearized, linearize
from .pipeline import lowered
from .remat import call_of, is_choice, nbytes
from .rules.region import transposed


@dataclasses.dataclass(frozen=True)
class Kept:
    """One value; `source` is the user's line."""

    name: str
    val: Val
    bytes: int
    source: str | None
    why: str
    given: bool  # an input of the function, which is there anyway


@dataclasses.dataclass(frozen=True)
class Footprint:
    """The values, their bytes without inputs, and the most bytes of them and of what is computed again, at a time."""

    kept: tuple[Kept, ...]
    total: int
    peak: int


@rewriting
def of(graph: Graph, nonzero: tuple[bool, ...]) -> Footprint:
    """What reverse mode keeps of a graph."""
    cut = linearize(graph, nonzero, reverse=True)
    kept = tuple(_kept(n, cut) for n in cut.primal.outputs[cut.count :])
    back = lowered(transposed(cut.linear, cut.residuals, list(range(len(cut.linear.outputs)))))
    sizes = [0 if k.given else k.bytes for k in kept]
    return Footprint(kept, sum(sizes), peak(back, sizes))


def _kept(n: Node, cut: Linearized) -> Kept:
    made, policy = _made(n)
    val = n.meta["val"]
    return Kept(
        made.name, val, nbytes(val), made.meta.get("source"), _why(made, policy), n in cut.primal.inputs
    )


def _made(n: Node) -> tuple[Node, object]:
    """The node that makes a value, inside of regions too, and the policy of the innermost checkpoint among these."""
    policy = None
    while n.target is getitem and n.args[0].target in REGIONS:
        call, place = n.args
        policy = call.kwargs["policy"] if call.target is checkpoint else policy
        inner = call.args[0] and call.args[0].outputs[place]
        if inner is None or inner.op == "placeholder":
            break
        n = inner
    return n, policy


def _why(n: Node, policy) -> str:
    call = call_of(n)
    if call.op == "placeholder":
        return "an argument"
    if is_random(call):
        return f"{call.target}, drawn once"
    if is_choice(call):
        return f"{call.target}, chosen once"
    by = "the derivative reads it" if policy is None else f'kept by "{getattr(policy, "__name__", policy)}"'
    return f"{call.target}, {by}"


def peak(back: Graph, sizes: list[int]) -> int:
    """The most bytes at a time of the first inputs, of these sizes, and of what is computed from them alone.

    What a loop has inside of a step is not counted.
    """
    saved = back.inputs[: len(sizes)]
    known = reached(back.nodes, saved) - reached(back.nodes, back.inputs[len(sizes) :])
    last = {root(m): n for n in back.nodes for m in n.all_input_nodes}
    last |= {root(n): None for n in back.outputs if n is not None}
    alive = {n: size for n, size in zip(saved, sizes, strict=True) if n in last}
    most = sum(alive.values())
    for n in back.nodes:
        if n in known and root(n) is n and isinstance(n.meta["val"], Val):
            alive[n] = nbytes(n.meta["val"])
        most = max(most, sum(alive.values()))
        for m in [m for m in alive if m not in last or last[m] is n]:
            del alive[m]
    return most
