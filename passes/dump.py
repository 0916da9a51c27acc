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
    folder = config.DUMP or os.environ.get("FXFUNC_DUMP")
    if config.DEBUG >= 2:
        verify(graph, after=name)
        print(f"{name:24} {len(graph):5} nodes", file=sys.stderr)
    if config.DEBUG >= 3:
        print(graph, file=sys.stderr)
    if folder:
        write(folder, f"{name}.txt", str(graph) + "\n")
    return graph


def write(folder: str, name: str, text: str) -> None:
    """A numbered file in the dump folder."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{next(_number):03}-{name}")
    with open(path, "w") as f:
        f.write(text)
