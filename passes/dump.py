"""Writing down what the passes did. Entry point: `saw`, called with every graph a pass or transform made."""

from __future__ import annotations

import itertools
import os
import sys

from . import config
from .graph import Graph
from .verify import verify

_number = itertools.count()


def saw(name: str, graph: Graph) -> Graph:
    """The graph, having been verified, printed or written as the flags ask."""
    if config.VERIFY:
        verify(graph, after=name)
    if config.DEBUG >= 2:
        print(f"{name:24} {len(graph):5} nodes", file=sys.stderr)
    if config.DEBUG >= 3:
        print(graph, file=sys.stderr)
    if _folder():
        _write(f"{name}.txt", str(graph) + "\n")
    return graph


def said(name: str, text: str) -> None:
    """A line on what a pass left as it is, and why, if the flags ask."""
    if config.DEBUG >= 2:
        print(f"{name:24} {text}", file=sys.stderr)


def saw_source(name: str, text: str) -> None:
    """Write the source of a kernel or program, if the flags ask."""
    if config.DEBUG >= 4:
        print(text, file=sys.stderr)
    if _folder():
        _write(f"{name}.py", text)


def _folder() -> str | None:
    return config.DUMP or os.environ.get("FXFUNC_DUMP")


def _write(name: str, text: str) -> None:
    """A numbered file in the dump folder."""
    folder = _folder()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{next(_number):03}-{name}")
    with open(path, "w") as f:
        f.write(text)
