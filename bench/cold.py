"""One cold measurement, in this process: `python -m fxfunc.bench.cold WAY ...`; prints the seconds as JSON.

Cold is from just before the first call to its result on the host, after the imports of torch, fxfunc and
torch._dynamo (torch's first FakeTensor use imports it, whoever asks). A load does without torch._dynamo.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import fxfunc

from .maml_workload import make_inputs, make_meta_step

WAYS = ("torch.func", "compile", "load")


def first_call(way: str, artifact: str | None, backend: str | None) -> Callable[..., Any]:
    """What a user's first call runs: everything from the Python function, or from the file, to the result."""
    if way == "torch.func":
        return make_meta_step(torch.func)
    if way == "load":
        return lambda *inputs: fxfunc.load(artifact, trust=True)(*inputs)
    return lambda *inputs: fxfunc.jit(make_meta_step(fxfunc)).lower(*inputs).compile(backend=backend)(*inputs)


def run(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first call, and from the start of the process to its end."""
    if options.way != "load":
        import torch._dynamo  # noqa: F401
    inputs = make_inputs(options.tasks, options.device)
    call = first_call(options.way, options.artifact, options.backend)
    start = time.perf_counter()
    _, value = call(*inputs)
    value.item()
    return {"cold_s": time.perf_counter() - start, "from_start_s": time.time() - options.started}


def measure(way: str, tasks: int, device: str, backend: str | None, artifact: str | None) -> dict[str, float]:
    """Runs this module in a fresh process with empty caches."""
    command = [sys.executable, "-m", "fxfunc.bench.cold", way, "--tasks", str(tasks), "--device", device]
    command += ["--backend", backend] if backend else []
    command += ["--artifact", artifact] if artifact else []
    with tempfile.TemporaryDirectory() as empty:
        caches = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        environment = {**os.environ, **dict.fromkeys(caches, empty)}
        command += ["--started", str(time.time())]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(child.stdout)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options that `measure` passes."""
    parser = argparse.ArgumentParser(prog="fxfunc.bench.cold", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--backend")
    parser.add_argument("--artifact")
    parser.add_argument(
        "--started", type=float, required=True, help="time.time() just before the process began"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(run(parse(sys.argv[1:]))))
