"""Least cuts of networks with whole capacities. Entry point: `Network.least_cut`.

Dinic's algorithm: augment along shortest paths, a level graph at a time. Without recursion, since the paths through a graph
of calls are as long as it is deep, and the same cut in every run.
"""

from __future__ import annotations

from collections import deque


class Network:
    """A directed network. An edge and its reverse are neighbours in `head` and `left`: e and e ^ 1."""

    def __init__(self, nodes: int):
        self.edges: list[list[int]] = [[] for _ in range(nodes)]
        self.head: list[int] = []
        self.left: list[int] = []

    def edge(self, tail: int, head: int, capacity: int) -> None:
        """Add an edge; both directions of it count, the reverse with no capacity."""
        for a, b, c in ((tail, head, capacity), (head, tail, 0)):
            self.edges[a].append(len(self.head))
            self.head.append(b)
            self.left.append(c)

    def least_cut(self, source: int, sink: int) -> tuple[int, set[int]]:
        """(capacity, the nodes on the sink's side) of a least cut; of several the one nearest to the sink."""
        flow = 0
        while (level := self._levels(source))[sink] >= 0:
            place = [0] * len(self.edges)
            while pushed := self._augment(source, sink, level, place):
                flow += pushed
        return flow, self._behind(sink)

    def _levels(self, source: int) -> list[int]:
        """The distance of each node from the source over edges with capacity left, -1 where there is no way."""
        level = [-1] * len(self.edges)
        level[source] = 0
        queue = deque([source])
        while queue:
            v = queue.popleft()
            for e in self.edges[v]:
                if self.left[e] and level[self.head[e]] < 0:
                    level[self.head[e]] = level[v] + 1
                    queue.append(self.head[e])
        return level

    def _augment(self, source: int, sink: int, level: list[int], place: list[int]) -> int:
        """Push along one shortest path; how much. `place` is the next edge to try of each node."""
        path: list[int] = []
        v = source
        while v != sink:
            e = self._next(v, level, place)
            if e is not None:
                path.append(e)
                v = self.head[e]
            elif path:
                v = self.head[path.pop() ^ 1]
                place[v] += 1
            else:
                return 0
        pushed = min(self.left[e] for e in path)
        for e in path:
            self.left[e] -= pushed
            self.left[e ^ 1] += pushed
        return pushed

    def _next(self, v: int, level: list[int], place: list[int]) -> int | None:
        while place[v] < len(self.edges[v]):
            e = self.edges[v][place[v]]
            if self.left[e] and level[self.head[e]] == level[v] + 1:
                return e
            place[v] += 1
        return None

    def _behind(self, sink: int) -> set[int]:
        """What still reaches the sink."""
        found, stack = {sink}, [sink]
        while stack:
            for e in self.edges[stack.pop()]:
                if self.left[e ^ 1] and self.head[e] not in found:
                    found.add(self.head[e])
                    stack.append(self.head[e])
        return found
