"""Compiling in a thread, with answers of the eager backend meanwhile. Entry point: `Background`, what `jit(f, background=True)`
compiles its graphs with."""

from __future__ import annotations

import os
import threading
import warnings

import torch

from fxfunc.passes import errors
from fxfunc.passes.graph import Graph

from .capture import compiled

# One thread compiles, so that the others' work goes on; and a fork waits for it, lest the child have locks that nobody releases.
_turn = threading.Lock()
os.register_at_fork(before=_turn.acquire, after_in_parent=_turn.release, after_in_child=_turn.release)


class Background:
    """From a graph to its callable, for a backend and target; each graph is compiled once."""

    def __init__(self, backend: str, target: str):
        self.backend, self.target = backend, target
        self._pending: dict[Graph, Pending] = {}
        self._lock = threading.Lock()

    def __call__(self, graph: Graph) -> Pending:
        with self._lock:
            if graph not in self._pending:
                self._pending[graph] = Pending(graph, self.backend, self.target)
            return self._pending[graph]

    def wait(self) -> None:
        """Return when all graphs are compiled; raises what one of them failed with."""
        for pending in list(self._pending.values()):
            pending.wait()


class Pending:
    """A graph's callable: that of the eager backend, until a thread has compiled another."""

    def __init__(self, graph: Graph, backend: str, target: str):
        self._job = graph, backend, target
        self._call = self._eager = compiled(graph)
        self._done = False
        self._error: Exception | None = None
        self._unsaid: list[Exception] = []
        self._thread = threading.Thread(target=self._in_turn, name="fxfunc-compile")
        self._thread.start()

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        if self._unsaid:
            self._say()
        return self._call(tensors)

    def wait(self) -> None:
        """Return when it is compiled, raise if that failed."""
        self._thread.join()
        if not self._done:  # in a forked child, which has no thread waiting for its turn
            self._compile()
        if self._error is not None:
            raise self._error

    def _in_turn(self) -> None:
        with _turn:
            if (
                threading.main_thread().is_alive()
            ):  # else the process would not end until the last is compiled
                self._compile()

    def _compile(self) -> None:
        try:
            self._call = compiled(*self._job)
        except Exception as problem:
            self._error = problem
            self._unsaid.append(problem)
        self._done = True

    def _say(self) -> None:
        """Once, in the thread of a caller."""
        try:
            problem = self._unsaid.pop()
        except IndexError:
            return  # another thread did
        warnings.warn(
            f"compiling in the background failed, the eager backend goes on: {problem}",
            errors.BackendWarning,
            stacklevel=2,
        )
