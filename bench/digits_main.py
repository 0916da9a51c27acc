"""The main job (`scripts/maml`): compile a MAML meta-step ahead of time, then meta-train from its artifact.

This process captures, compiles and saves; digits_train, a fresh process, loads, trains and measures.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 3000
TASKS = 32


def at_least(least: int):
    """An argparse type: an int that is not below `least`."""

    def integer(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"needs an integer of at least {least}, not {text!r}")
        return int(text)

    return integer


def target(text: str) -> str:
    """An argparse type: cpu, or a CUDA compute capability."""
    if not re.fullmatch(r"cpu|cuda:\d{2,3}", text):
        raise argparse.ArgumentTypeError(f"needs cpu or cuda:NN (as cuda:90), not {text!r}")
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; exits with status 2 and a line that says why when one is bad."""
    parser = argparse.ArgumentParser(
        prog="scripts/maml",
        description="Compiles a second-order MAML meta-step on real digits ahead of time, saves it, "
        "loads it in a fresh process, meta-trains from it and prints what came out.",
    )
    parser.add_argument("--steps", type=at_least(1), default=STEPS, help="meta-steps (default %(default)s)")
    parser.add_argument(
        "--tasks", type=at_least(1), default=TASKS, help="tasks a meta-step (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="decides initial weights and tasks (default 0)"
    )
    parser.add_argument("--backend", choices=["eager", "cpp", "triton"], help="default: chosen by the target")
    parser.add_argument(
        "--target", type=target, default="cpu", help="cpu or cuda:NN, GPU or not (default cpu)"
    )
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write every pass's graph and every kernel to DIR"
    )
    options = parser.parse_args(arguments)
    if options.backend == "triton" and options.target == "cpu":
        parser.error("--backend triton needs --target cuda:NN (as cuda:90)")
    if options.backend == "cpp" and options.target != "cpu":
        parser.error("--backend cpp needs --target cpu")
    if options.dump and options.dump.exists() and not options.dump.is_dir():
        parser.error(f"--dump {options.dump}: not a directory")
    return options


def compile_meta_step(options: argparse.Namespace):
    """Captures the meta-gradient for any number of tasks and compiles it: (Lowered, Compiled)."""
    import torch

    import fxfunc

    from . import digits

    images, _ = digits.load_images()
    tasks = digits.sample_tasks(images, options.tasks, torch.Generator().manual_seed(options.seed))
    length = fxfunc.Dim("tasks")
    meta_step = fxfunc.jit(digits.make_meta_step(fxfunc))
    specs = [fxfunc.spec(each, {0: length}) for each in tasks]
    lowered = meta_step.lower(digits.init_params(options.seed), *specs)
    return lowered, lowered.compile(backend=options.backend, target=options.target)


def train_elsewhere(artifact: Path, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """The outcome of digits_train in a fresh process; exits as it did if it failed."""
    command = [sys.executable, "-m", "fxfunc.bench.digits_train", str(artifact), "--device", device]
    for name in ("steps", "tasks", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {name: value for name, value in os.environ.items() if name != "FXFUNC_DUMP"}
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if child.returncode:
        sys.exit(child.returncode)
    return json.loads(child.stdout)


def accuracy_rows(accuracy: dict[str, Any]) -> list[tuple[str, str]]:
    """Two rows for each initialisation: before and after adaptation."""
    rows = []
    for name, (lr, before, after) in accuracy.items():
        rows.append((f"{name}: before adaptation", f"{before[0]:.3f} ± {before[1]:.3f}"))
        rows.append((f"{name}: after 3 steps, lr {lr:g}", f"{after[0]:.3f} ± {after[1]:.3f}"))
    return rows


def speed_rows(speed: dict[str, Any]) -> list[tuple[str, str]]:
    """Ms of a meta-step each, and the ratio."""
    rows = [
        (f"ms a meta-step, {name}", f"{median:.2f} (min {least:.2f})")
        for name, (median, least) in speed.items()
    ]
    return [*rows, ("times faster", f"{speed['torch.func eager'][0] / speed['fxfunc'][0]:.2f}")]


def compile_rows(lowered: Any, compiled: Any, artifact: Path) -> list[tuple[str, str]]:
    """Seconds of each stage and the artifact's size."""
    seconds = {**lowered.timings, **compiled.timings}
    rows = [(f"{stage}, s", f"{seconds[stage]:.2f}") for stage in ("capture", "passes", "codegen")]
    return [*rows, ("artifact, KiB", f"{artifact.stat().st_size / 1024:.1f}"), ("backend", compiled.backend)]


def print_table(rows: list[tuple[str, ...]], headers: tuple[str, ...]) -> None:
    """Plain text, nothing rounded again."""
    from tabulate import tabulate

    print(tabulate(rows, headers=headers, disable_numparse=True))


def print_kernels(compiled: Any) -> None:
    """What each kernel takes of the GPU."""
    rows = [tuple(str(x) for x in (k.name, k.regs, k.spills, k.smem, k.size)) for k in compiled.kernels]
    print_table(rows, ("kernel", "registers", "spills", "shared, B", "cubin, B"))


def run(options: argparse.Namespace) -> None:
    """Compiles, saves, has it trained from, prints the table."""
    import torch

    lowered, compiled = compile_meta_step(options)
    artifact = Path("artifacts") / f"maml-digits-{options.target.replace(':', '')}.zip"
    artifact.parent.mkdir(exist_ok=True)
    compiled.save(artifact)
    print(f"saved {artifact}", file=sys.stderr)
    if options.target != "cpu" and not torch.cuda.is_available():
        print_kernels(compiled)
        print_table(compile_rows(lowered, compiled, artifact), ("", options.target))
        print("no GPU on this machine: training is skipped")
        return
    outcome = train_elsewhere(artifact, options, "cpu" if options.target == "cpu" else "cuda")
    rows = accuracy_rows(outcome["accuracy"]) + speed_rows(outcome["speed"])
    rows += compile_rows(lowered, compiled, artifact)
    rows += [(f"{stage}, s", f"{outcome[f'{key}_s']:.3f}") for stage, key in STAGES]
    print_table(
        rows, (f"{options.steps} meta-steps of {options.tasks} tasks, seed {options.seed}", options.target)
    )


STAGES = (("load", "load"), ("first result after loading", "first"), ("meta-training", "train"))


def main(arguments: list[str]) -> int:
    """Runs the job; an error of fxfunc is one line and status 1."""
    options = parse(arguments)
    if options.dump:
        os.environ["FXFUNC_DUMP"] = str(options.dump.resolve())
    from fxfunc.errors import FxfuncError

    try:
        run(options)
    except FxfuncError as error:
        print(f"scripts/maml: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
