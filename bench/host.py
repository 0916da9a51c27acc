"""A process that has made some imports and forks a worker per job: `python -P bench/host.py FD MODULES [WORKLOAD FILE ...]`.

A fork of it is in the state that cold times start from: everything imported, nothing called. It runs under the interpreter
of the code to be measured, and takes the bench itself from beside this file, so two revisions of fxfunc are measured by one
and the same bench. Each datagram on socket FD carries one end of a connection for one worker.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
import types
from pathlib import Path


def make_imports(modules: list[str]) -> dict[str, float]:
    """Seconds of each import."""
    seconds = {}
    for name in modules:
        start = time.perf_counter()
        importlib.import_module(name)
        seconds[name] = time.perf_counter() - start
    return seconds


def adopt_bench() -> None:
    """Makes the folder of this file the package fxfunc.bench, without importing fxfunc where nobody asked for it."""
    package = _adopt("fxfunc.bench", Path(__file__).parent)
    exec(Path(__file__).with_name("__init__.py").read_text(), package.__dict__)


def _adopt(name: str, folder: Path) -> types.ModuleType:
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    return package


def serve(control: socket.socket, imports_s: dict[str, float]) -> None:
    """Forks a worker for each connection that arrives, until the other end is closed."""
    from fxfunc.bench import worker

    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        if os.fork() == 0:
            control.close()
            worker.main(descriptors[0], imports_s)
        os.close(descriptors[0])
        _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main(descriptor: str, modules: list[str], files: list[str]) -> None:
    """Imports, then serves."""
    imports_s = make_imports(modules)
    adopt_bench()
    sys.path += sorted({str(Path(file).parent) for file in files})
    if "torch" in modules:
        from fxfunc.bench.registry import names, register_file

        names()
        for file in files:
            register_file(Path(file))
    else:
        _adopt(
            "fxfunc.bench.workloads", Path(__file__).parent / "workloads"
        )  # what is in JAX, without the rest
    serve(socket.socket(fileno=int(descriptor)), imports_s)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), sys.argv[3:])
