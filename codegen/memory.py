"""Memory for the values of a program. Entry points: `Memory` (offsets), `last_reads` (when a value is done with), `results`,
`fresh` (a name of its own)."""

from __future__ import annotations

from torch.fx import Node

from fxfunc.passes.graph import Graph, Val, getitem

from .lower import base, is_free


class Memory:
    """Offsets for buffers that come and go: the first gap that is large enough."""

    def __init__(self) -> None:
        self.live: list[tuple[int, int]] = []
        self.size = 0

    def take(self, size: int) -> int:
        """The offset of a new buffer."""
        size, at = -(-max(size, 1) // 64) * 64, 0
        for start, end in sorted(self.live):
            if start - at >= size:
                break
            at = end
        self.live.append((at, at + size))
        self.size = max(self.size, at + size)
        return at

    def free(self, at: int) -> None:
        """Give a buffer back."""
        self.live = [x for x in self.live if x[0] != at]


def fresh(wanted: str, taken: set[str], end: str = "") -> str:
    """A name that is not taken, and is from now on."""
    name, count = wanted + end, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}{end}"
    taken.add(name)
    return name


def results(n: Node) -> list[Node]:
    """The values of a call, those of several that are read."""
    if isinstance(n.meta["val"], Val):
        return [n]
    found = {m.args[1]: m for m in n.users if m.target is getitem}
    return [found[i] for i in sorted(found)]


def last_reads(graph: Graph) -> dict[Node, list[Node]]:
    """For each call, the values that nobody reads after it."""
    last: dict[Node, Node] = {}
    for n in graph.nodes:
        if not (is_free(n) or n.target is getitem):
            last |= {m: n for x in n.all_input_nodes for m in [base(x)]}
            last |= {m: n for m in results(n) if not any(u for u in m.users)}
    kept, out = set(graph.outputs), {}
    for m, n in last.items():
        if m not in kept:
            out.setdefault(n, []).append(m)
    return out
