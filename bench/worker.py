"""One implementation of one workload, in a process of its own, doing what it is asked. Entry point: `main`, in a fork of host.py.

The first question is "prepare", then the methods of `Session` by name. An answer is ("ok", value) or ("raised", text).
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import answers, implementations, memory
from .sides import JaxSide, TorchSide

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, imports_s: dict[str, float]) -> None:
    """Answers questions until the other end of the connection is closed; never returns.

    It does so in a new thread: that which forked has no pool of threads for OpenMP.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    thread = threading.Thread(target=_serve, args=(descriptor, imports_s))
    thread.start()
    thread.join()


def _serve(descriptor: int, imports_s: dict[str, float]) -> None:
    connection = Connection(descriptor)
    session = Session(imports_s)
    try:
        while True:
            command, arguments = connection.recv()
            connection.send(_answer(getattr(session, command), arguments))
    except (EOFError, BrokenPipeError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(method: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "ok", method(**arguments)
    except Exception as problem:
        traceback.print_exc()
        first = (str(problem).strip().splitlines() or [""])[0]
        return "raised", f"{type(problem).__name__}: {first}"[:300]


class Session:
    """The state of a worker."""

    def __init__(self, imports_s: dict[str, float]):
        self.imports_s = imports_s

    def prepare(
        self,
        *,
        workload: str,
        implementation: str,
        log: str,
        jax: str | None,
        parameters: dict[str, int],
        inputs: str,
        device: str,
        threads: int,
        caches: str,
        extra_work: float = 0.0,
    ) -> dict[str, Any]:
        """Threads, caches and inputs; the memory now used is what later peaks are counted from."""
        _write_to(log)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        for name in (
            "XDG_CACHE_HOME",
            "TRITON_CACHE_DIR",
            "TORCHINDUCTOR_CACHE_DIR",
            "JAX_COMPILATION_CACHE_DIR",
        ):
            os.environ[name] = str(Path(caches) / name.lower())
        self.implementation = implementations.find(implementation)
        make = JaxSide if self.implementation.imports == implementations.JAX else TorchSide
        self.side = make(workload, implementation, jax, parameters, device, threads)
        self.extra_work = extra_work
        made = Path(inputs).exists()
        self.inputs = self.side.inputs(pickle.loads(Path(inputs).read_bytes())) if made else ()
        gc.collect()
        memory.map_files()
        self.baseline = memory.reset_peak()
        return {"pid": os.getpid(), "imports_s": self.imports_s}

    def make_reference(self, *, inputs: str, answer: str) -> dict[str, Any]:
        """Writes the inputs and the float64 answer; gives the error allowed to float32, and the bytes nobody can avoid."""
        arrays = self.side.make_inputs()
        Path(inputs).write_bytes(pickle.dumps(arrays))
        exact, found = self.side.exact(arrays)
        leaves = answers.leaves(exact)
        answers.save(leaves, Path(answer))
        error = answers.error(answers.leaves(found), leaves)
        compulsory = sum(a.nbytes for tree in (arrays, found) for a in answers.leaves(tree))
        return {"allowed": max(1e-5, 3 * error), "bytes": compulsory}

    def first(self) -> dict[str, Any]:
        """Seconds from just before the first call to its result on the host, and those of the stages within it."""
        built: list[Any] = []

        def call(*inputs: Any) -> Any:
            if not built:
                built.extend(self.implementation.build(self.side.function, inputs))
            return built[0](*inputs)

        start = time.perf_counter()
        self.answer = self.side.finish(self.side.around(call)(*self.inputs))
        seconds = time.perf_counter() - start
        self.built, stages_s = built
        self._settle(self.side.around(self.built))
        return {"first_s": seconds, "stages_s": stages_s}

    def load(self, *, artifact: str) -> float:
        """Seconds to the first result of a saved artifact."""
        import fxfunc

        call = self.side.around(lambda *inputs: fxfunc.load(artifact, trust=True)(*inputs))
        start = time.perf_counter()
        self.side.finish(call(*self.inputs))
        return time.perf_counter() - start

    def check(self, *, answer: str) -> float:
        """Error of the first call's answer; raises ValueError where it has another structure, or NaN elsewhere."""
        found = answers.leaves(self.side.to_numpy(self.answer))
        del self.answer
        before = memory.peak()
        error = answers.error(found, answers.load(Path(answer)))
        del found
        gc.collect()
        memory.reset_peak()
        self.peak_before_check = before
        return error

    def _settle(self, call: Callable[..., Any]) -> None:
        inputs, finish = self.inputs, self.side.finish
        self.call = lambda: finish(call(*inputs))
        if self.extra_work:
            self.call = with_extra_work(self.call, self.extra_work)

    def turn(self, *, calls: int, discard: int) -> list[float]:
        """Seconds of each of `calls` calls, after `discard` that are not counted."""
        return timed(self.call, calls, discard)

    def overhead(self, *, calls: int) -> float:
        """Median seconds of a sample of a function that does nothing."""
        self._settle(lambda *inputs: None)
        return statistics.median(self.turn(calls=calls, discard=10))

    def peak(self) -> int:
        """Bytes at the highest point of the first and the steady calls above what imports and inputs take."""
        return max(self.side.device_peak() or max(self.peak_before_check, memory.peak()) - self.baseline, 0)

    def count(self) -> dict[str, int]:
        """Exact counters of one call and of the graphs behind it."""
        return self.side.count(self.implementation.name, self.built, self.call, self.inputs)

    def save(self, *, artifact: str) -> int:
        """Bytes of the saved artifact."""
        self.built.save(artifact)
        return os.path.getsize(artifact)

    def measure_peaks(self) -> dict[str, float]:
        """What this machine can do at most."""
        from .peaks import measure

        return measure(self.side.device, self.side.threads)


def timed(call: Callable[[], Any], calls: int, discard: int) -> list[float]:
    """Seconds of each of `calls` calls, after `discard` that are not counted."""
    clock = time.perf_counter
    for _ in range(discard):
        call()
    samples = []
    for _ in range(calls):
        start = clock()
        call()
        samples.append(clock() - start)
    return samples


def with_extra_work(call: Callable[[], Any], fraction: float) -> Callable[[], Any]:
    """`call` followed by real work that makes it `fraction` slower, for testing that a slowdown is found."""
    import torch

    size, repeats = 16, 1
    a, b, out = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    def slowed() -> Any:
        answer = call()
        work()
        return answer

    def seconds(function: Callable[[], Any], calls: int) -> float:
        return statistics.median(timed(function, calls, discard=1))  # it meets what was called before

    calls = 40 if seconds(call, 1) < 0.002 else 5
    repeats = max(1, round(fraction * seconds(call, calls) / seconds(work, 100)))
    for _ in range(3):  # the work also slows down the call, whose data it evicts from the caches
        pairs = [(seconds(call, calls), seconds(slowed, calls)) for _ in range(5)]
        cost = statistics.median(both / one for one, both in pairs) - 1
        repeats = max(1, round(repeats * min(max(fraction / cost, 0.5), 2.0) if cost > 0 else repeats))
    return slowed


def _write_to(log: str) -> None:
    """All that is printed goes to the log, a crash's last words too."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
