"""Run as a script with TRITON_INTERPRET=1: every case's kernels, interpreted, against eager. Prints the cases that differ."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

import torch
from kernel_cases import (
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    Case,
    assert_equal,
    graph_of,
    inputs_of,
    kernel_of,
    random_case,
    run,
)

import fxfunc
from fxfunc.bench import digits
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.interpret import interpret
from fxfunc.passes.pipeline import lowered


def check_op(case: Case) -> None:
    graph = graph_of(case)
    k, operands = kernel_of(graph)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        env = dict(zip(graph.inputs, inputs, strict=True))
        assert_equal(interpret(k, [env[n] for n in operands], sizes), run(graph, inputs, sizes))


def check_pattern(case: Case) -> None:
    graph = graph_of(case)
    fused = fuse(graph)
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(fused, inputs, sizes, interpret), run(graph, inputs, sizes), scale=20)


def check_maml(case: Case) -> None:
    """The groups of the main job's meta-step, on the images' shapes."""
    tasks = fxfunc.Dim("tasks")
    xs = [torch.rand(2, n, digits.PIXELS) for n in (digits.WAYS * digits.SHOTS, digits.WAYS * digits.QUERIES)]
    ys = [torch.randint(digits.WAYS, x.shape[:2]) for x in xs]
    examples, params = [xs[0], ys[0], xs[1], ys[1]], digits.init_params(0)
    specs = [fxfunc.spec(x, {0: tasks}) for x in examples]
    graph = lowered(fxfunc.jit(digits.make_meta_step(fxfunc)).lower(params, *specs).graph)
    inputs, fused = [*params.values(), *examples], fuse(graph)
    assert len(kernels_of(fused)) > 20
    assert_equal(run(fused, inputs, {"tasks": 2}, interpret), run(graph, inputs, {"tasks": 2}), scale=20)


def failures(wanted: list[str]) -> Iterator[str]:
    """Name and traceback of each case that fails."""
    cases = [(check_op, c) for c in OPS + OPS_F64 + OPS_BF16]
    cases += [(check_pattern, c) for c in PATTERNS + [random_case(seed) for seed in range(30)]]
    cases.append((check_maml, Case("maml", None, ())))
    for check, case in cases:
        if wanted and case.name not in wanted:
            continue
        try:
            check(case)
        except Exception:
            yield f"{case.name}\n{traceback.format_exc(limit=-3)}"


if __name__ == "__main__":
    found = list(failures(sys.argv[1:]))
    print("\n".join(found))
    sys.exit(len(found) > 0)
