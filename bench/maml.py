"""Measures the `maml` workload: `python -m fxfunc.bench.maml [--tasks 25] [--device cpu] [--out FILE]`.

torch.func eager and fxfunc in turn in one process; cold and load times each in fresh processes; agreement.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fxfunc

from . import cold
from .maml_workload import make_inputs, make_meta_step
from .measure import describe_machine, interleave, write_json

Leaves = list[torch.Tensor]


def leaves(answer: tuple[dict[str, torch.Tensor], torch.Tensor]) -> Leaves:
    """Gradients and value as one list."""
    return [*answer[0].values(), answer[1]]


def error(answer: Leaves, reference: Leaves) -> float:
    """max|d| / max(|ref|max, 1), the worst over the leaves."""
    pairs = zip(answer, reference, strict=True)
    return max(((a.double() - r).abs().max() / r.abs().max().clamp(min=1)).item() for a, r in pairs)


def measure_errors(compiled: Any, options: argparse.Namespace) -> dict[str, float]:
    """Float32 errors of both against torch.func in float64."""
    reference = make_meta_step(torch.func)
    exact = leaves(reference(*make_inputs(options.tasks, options.device, torch.float64)))
    inputs = make_inputs(options.tasks, options.device)
    return {
        "torch.func": error(leaves(reference(*inputs)), exact),
        "fxfunc": error(leaves(compiled(*inputs)), exact),
    }


def measure_steady(compiled: Any, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call, the two in turn."""
    inputs = make_inputs(options.tasks, options.device)
    reference = make_meta_step(torch.func)
    calls = {"torch.func": lambda: reference(*inputs), "fxfunc": lambda: compiled(*inputs)}
    return {name: times.samples for name, times in interleave(calls, options.rounds).items()}


def measure_cold(artifact: Path, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Cold seconds of each way, in turn, each in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.cold_rounds):
        for way, samples in runs.items():
            path = str(artifact) if way == "load" else None
            samples.append(cold.measure(way, options.tasks, options.device, options.backend, path))
    return runs


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, every sample."""
    inputs = make_inputs(options.tasks, options.device)
    lowered = fxfunc.jit(make_meta_step(fxfunc)).lower(*inputs)
    compiled = lowered.compile(backend=options.backend)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "maml.zip"
        compiled.save(artifact)
        return {
            "workload": f"maml{options.tasks}",
            "device": options.device,
            "backend": compiled.backend,
            "machine": describe_machine(),
            "stages_s": {**lowered.timings, **compiled.timings},
            "artifact_bytes": artifact.stat().st_size,
            "error": {} if options.load else measure_errors(compiled, options),
            "steady_s": {} if options.load else measure_steady(compiled, options),
            "cold": measure_cold(artifact, options),
        }


def median_and_min(samples: list[float], scale: float, digits: int) -> str:
    """As `3.21 (3.02)`."""
    return f"{scale * statistics.median(samples):.{digits}f} ({scale * min(samples):.{digits}f})"


def steady_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Ms a call, ratio, error."""
    steady = figures["steady_s"]
    medians = {name: statistics.median(samples) for name, samples in steady.items()}
    return [
        (
            name if name == "torch.func" else f"{name} ({figures['backend']})",
            median_and_min(samples, 1e3, 2),
            f"{medians['torch.func'] / medians[name]:.2f}",
            f"{figures['error'][name]:.1e}",
        )
        for name, samples in steady.items()
    ]


def cold_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Seconds of the first result, after the imports and from the start of the process."""
    return [
        (way, *(median_and_min([run[key] for run in runs], 1, 3) for key in ("cold_s", "from_start_s")))
        for way, runs in figures["cold"].items()
    ]


def print_tables(figures: dict[str, Any]) -> None:
    """Steady state (unless left out), then the first call."""
    from tabulate import tabulate

    if figures["steady_s"]:
        headers = (figures["workload"], "ms: median (min)", "times faster", "error")
        print(tabulate(steady_rows(figures), headers, disable_numparse=True), end="\n\n")
    headers = ("first result, fresh process", "s after imports: median (min)", "s from process start")
    print(tabulate(cold_rows(figures), headers, disable_numparse=True))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the ways of a first call that they ask for."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.maml", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=25)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", help="default: eager on cpu, chosen by fxfunc on cuda")
    parser.add_argument("--rounds", type=int, default=100, help="interleaved repeats (default %(default)s)")
    parser.add_argument(
        "--cold-rounds", type=int, default=3, help="fresh processes a row (default %(default)s)"
    )
    parser.add_argument("--load", action="store_true", help="only: load the artifact and get a first result")
    parser.add_argument("--out", type=Path, help="write every sample to this JSON file")
    options = parser.parse_args(arguments)
    if min(options.tasks, options.rounds, options.cold_rounds) < 1:
        parser.error("--tasks, --rounds and --cold-rounds need at least 1")
    options.backend = options.backend or ("eager" if options.device == "cpu" else None)
    options.ways = ("load",) if options.load else cold.WAYS
    return options


def main(arguments: list[str]) -> None:
    """Measures, prints, writes."""
    options = parse(arguments)
    figures = measure(options)
    print_tables(figures)
    if options.out:
        write_json(options.out, figures)


if __name__ == "__main__":
    main(sys.argv[1:])
