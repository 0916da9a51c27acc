"""Meta-trains from a saved artifact and judges it: `python -m fxfunc.bench.digits_train ARTIFACT ...`.

Run by digits_main in a process of its own. Progress goes to stderr, the outcome to stdout as JSON.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch

import fxfunc

from .digits import (
    Images,
    MetaStep,
    Params,
    Tasks,
    init_params,
    load_images,
    make_meta_step,
    sample_tasks,
    task_stream,
    train,
)
from .digits_eval import Control, eval_tasks, judge, judge_best_lr, train_jointly
from .measure import interleave

ROUNDS = 50


def report_progress(step: int, steps: int, value: float, seconds: float) -> None:
    """A line that overwrites itself on a terminal; about ten lines elsewhere."""
    terminal = sys.stderr.isatty()
    if step != steps and step % (25 if terminal else max(steps // 10, 1)):
        return
    end = "\r" if terminal and step != steps else "\n"
    text = f"meta-step {step}/{steps}  query loss {value:.4f}  {1e3 * seconds / step:.2f} ms a step"
    print(text, end=end, file=sys.stderr, flush=True)


def load_and_run(path: str, params: Params, tasks: Tasks) -> tuple[MetaStep, float, float]:
    """The loaded meta-step, the seconds of loading it and those of its first call."""
    start = time.perf_counter()
    meta_step = fxfunc.load(path, trust=True)  # the parent process has just written it
    loaded = time.perf_counter()
    meta_step(params, *tasks)[1].item()
    return meta_step, loaded - start, time.perf_counter() - loaded


def meta_train(meta_step: MetaStep, params: Params, images: Images, options: argparse.Namespace) -> float:
    """Meta-trains `params` in place, with a progress line; returns the seconds."""
    start = time.perf_counter()
    stream = task_stream(images, options.tasks, options.seed)
    losses = train(meta_step, params, stream, options.steps)
    for step, value in enumerate(losses, 1):
        report_progress(step, options.steps, value, time.perf_counter() - start)
    return time.perf_counter() - start


def judge_all(params: Params, options: argparse.Namespace) -> dict[str, Control]:
    """The rows of accuracy: what was meta-trained, then the controls."""
    images, held_out = load_images()
    chosen_on, judged_on = (eval_tasks(each, options.seed) for each in (images, held_out))
    random = init_params(options.seed)
    stream = task_stream(images, options.tasks, options.seed)
    joint = train_jointly(options.seed, stream, options.steps)
    return {
        "meta-trained": judge(params, judged_on),
        "control, random initialisation": judge_best_lr(random, chosen_on, judged_on),
        "control, trained jointly": judge(joint, judged_on),
        "control, trained jointly, best lr": judge_best_lr(joint, chosen_on, judged_on),
    }


def compare_speed(meta_step: MetaStep, params: Params, tasks: Tasks) -> dict[str, tuple[float, float]]:
    """Median and least ms of a meta-step, ours and torch.func's in turn."""
    reference = make_meta_step(torch.func)
    calls = {
        "fxfunc": lambda: meta_step(params, *tasks),
        "torch.func eager": lambda: reference(params, *tasks),
    }
    return {name: (t.median_ms, t.min_ms) for name, t in interleave(calls, ROUNDS).items()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Loads, meta-trains, measures, judges."""
    images = Images(*(t.to(options.device) for t in load_images()[0]))
    params = {name: p.to(options.device) for name, p in init_params(options.seed).items()}
    tasks = sample_tasks(images, options.tasks, torch.Generator().manual_seed(options.seed))
    meta_step, load_s, first_s = load_and_run(options.artifact, params, tasks)
    train_s = meta_train(meta_step, params, images, options)
    return {
        "load_s": load_s,
        "first_s": first_s,
        "train_s": train_s,
        "speed": compare_speed(meta_step, params, tasks),
        "accuracy": judge_all({name: p.cpu() for name, p in params.items()}, options),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options that digits_main passes on."""
    parser = argparse.ArgumentParser(prog="digits_train", description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(run(parse(sys.argv[1:]))))
