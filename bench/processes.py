"""The processes that are measured, as the process that measures sees them. Entry point: `Host.start`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .errors import BenchError

STARTUP_S = 120.0


class WorkerFailed(Exception):
    """A worker gave no answer; `status` is what its cell becomes."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


# glibc learns from what is freed which blocks to take from its heap, whose layout imports have left to chance: 40% of a time,
# and half of a peak. With a threshold that is fixed every large block is a mapping of its own, in any process; the heap of the
# small ones keeps what it has, as it would else be given back and faulted in again wherever its end happens to lie.
FIXED_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def _environment(fixed_heap: bool) -> dict[str, str]:
    """That of this process, with bytecode, without which fxfunc is slow to import."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return environment | (FIXED_HEAP if fixed_heap else {})


class Worker:
    """One implementation of one workload in a process of its own."""

    def __init__(self, connection: Connection, log: Path):
        self._connection, self._log = connection, log
        self.pid: int | None = None

    def ask(self, command: str, limit_s: float, **arguments: Any) -> Any:
        """The worker's answer; raises WorkerFailed if it raises, dies or takes longer than `limit_s` seconds."""
        try:
            self._connection.send((command, arguments))
            if not self._connection.poll(limit_s):
                raise WorkerFailed("timeout", f"{command}: no answer within {limit_s:.0f} s")
            outcome, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerFailed("crashed", f"{command}: the process died: {self._last_words()}") from None
        if outcome == "raised":
            raise WorkerFailed("failed", value)
        return value

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        fatal = [line for line in lines if line.startswith("Fatal")]
        return (fatal or lines or ["it said nothing (killed, or out of memory)"])[-1]

    def stop(self) -> None:
        """Ends the process and those it started."""
        self._connection.close()
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class Host:
    """A process that has imported `modules` (see host.py) under one interpreter, and so with one installation of fxfunc."""

    def __init__(
        self, modules: tuple[str, ...], python: str, files: tuple[Path, ...] = (), fixed_heap: bool = False
    ):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        script = Path(__file__).with_name("host.py")
        command = [python, "-P", str(script), str(theirs.fileno()), ",".join(modules), *map(str, files)]
        self._logs = tempfile.TemporaryDirectory(prefix="fxfunc-bench-")
        self._log = Path(self._logs.name) / "host"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the process that measures
                env=_environment(fixed_heap),
            )
        theirs.close()
        self._modules, self._workers = modules, 0
        self.imports_s: dict[str, float] | None = None

    def start(self, job: dict[str, Any]) -> Worker:
        """A worker that has the inputs of `job` ready; raises WorkerFailed if it cannot, BenchError if there is no host."""
        self._workers += 1
        log = Path(self._logs.name) / str(self._workers)
        log.touch()
        ours, theirs = socket.socketpair()
        worker = Worker(Connection(ours.detach()), log)
        with contextlib.suppress(OSError):  # a dead host is found below
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        theirs.close()
        try:
            hello = worker.ask("prepare", STARTUP_S, **job, log=str(log))
        except WorkerFailed as problem:
            worker.stop()
            self._check_alive()
            raise problem
        worker.pid, self.imports_s = hello["pid"], hello["imports_s"]
        return worker

    def _check_alive(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
        if self._process.returncode is not None:
            words = self._log.read_text(errors="replace").strip().splitlines()
            raise BenchError(f"importing {self._modules}: {words[-1] if words else 'the process died'}")

    def close(self) -> None:
        """Ends the host; workers still running end with it."""
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._logs.cleanup()
