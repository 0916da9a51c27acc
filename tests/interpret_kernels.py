"""Run as a script with TRITON_INTERPRET=1: every case's kernels, interpreted, against eager. Prints the cases that differ."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Iterator

import torch
from kernel_cases import (
    OPS,
    OPS_BF16,
    OPS_F64,
    PATTERNS,
    TOGETHER,
    Case,
    assert_equal,
    graph_of,
    inputs_of,
    kernel_of,
    random_case,
    run,
)
from kernel_corpus import fingerprint
from loop_cases import LOOPS, Loop, inputs_of_loop
from loop_cases import with_kernels as loops_with_kernels
from move_cases import MOVES, PRODUCTS_OF_MOVED, move_inputs, random_move
from move_cases import fused as moves_fused
from product_cases import PRODUCTS, graphs, product_inputs, random_product
from task_cases import TASKS, Mapped, graph_and_inputs, random_tasks
from triton.runtime.errors import InterpreterError

import fxfunc
from fxfunc.bench import digits
from fxfunc.codegen import eager, grid
from fxfunc.codegen.fuse import fuse, kernels_of
from fxfunc.codegen.grid import with_tasks
from fxfunc.codegen.interpret import interpret
from fxfunc.codegen.mapped import Tasks
from fxfunc.codegen.together import together
from fxfunc.passes.pipeline import for_aten, lowered


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


def check_product(case: Case) -> None:
    graph, fused = graphs(case)
    for sizes in case.sizes:
        inputs = product_inputs(case, sizes)
        assert_equal(run(fused, inputs, sizes, interpret), run(graph, inputs, sizes), scale=20)


def check_moves(case: Case) -> None:
    graph, fused = graph_of(case), moves_fused(case)
    for sizes in case.sizes:
        inputs = move_inputs(case, sizes)
        assert_equal(run(fused, inputs, sizes, interpret), run(graph, inputs, sizes), scale=20)


def check_a_bad_index(case: Case) -> None:
    """The device stops there."""
    x, index = move_inputs(case, {})
    index[2, 1] = x.shape[1]
    try:
        run(moves_fused(case), [x, index], {}, interpret)
    except InterpreterError as e:
        assert "index out of bounds" in str(e)
    else:
        raise AssertionError("nothing stopped")


def check_together(case: Case) -> None:
    graph = graph_of(case)
    joined = together(fuse(graph))
    for sizes in case.sizes:
        inputs = inputs_of(case, sizes)
        assert_equal(run(joined, inputs, sizes, interpret), run(graph, inputs, sizes), scale=20)


def check_loop(loop: Loop) -> None:
    """The loop in Python, its kernels interpreted."""
    graph, _ = loops_with_kernels(loop)
    inputs = inputs_of_loop(loop)
    launchers = {k: functools.partial(_interpreted, k) for k in kernels_of(graph)}
    wanted = loop.f(*inputs)
    assert_equal(
        eager.emit(graph, launchers)(inputs), wanted if isinstance(wanted, tuple) else (wanted,), scale=20
    )


def _interpreted(k, operands: list[torch.Tensor], sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    return interpret(k, operands, sizes)


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


def check_tasks(case: Mapped) -> None:
    """The kernels of a map."""
    for tasks in case.tasks or (0,):
        graph, inputs = graph_and_inputs(case, tasks)
        sizes, notes = {"tasks": tasks} if tasks else {}, []
        fused = fuse(lowered(with_tasks(graph, "ieee", {}, notes)))
        assert not notes and any(isinstance(k, Tasks) for k in kernels_of(fused))
        wanted = eager.emit(for_aten(lowered(graph)))(inputs)
        assert_equal(run(fused, inputs, sizes, interpret), wanted, scale=40)


def check_random_tasks(case: Case) -> None:
    """A random program as a map, and each of its tasks alone."""
    tasks, operands = random_tasks(int(case.name.split("-")[1]))
    found = interpret(tasks, operands)
    for i in range(tasks.length):
        wanted = run(tasks.body, [x[i] for x in operands], {})
        assert_equal([x[i] for x in found], wanted, scale=20)


def failures(wanted: list[str]) -> Iterator[str]:
    """Name and traceback of each case that fails."""
    cases = [(check_op, c) for c in OPS + OPS_F64 + OPS_BF16]
    cases += [(check_pattern, c) for c in PATTERNS + [random_case(seed) for seed in range(30)]]
    cases += [(check_product, c) for c in PRODUCTS + [random_product(seed) for seed in range(60)]]
    cases += [(check_moves, c) for c in MOVES + PRODUCTS_OF_MOVED + [random_move(seed) for seed in range(60)]]
    cases += [(check_a_bad_index, c) for c in MOVES if c.name == "gather"]
    cases += [(check_together, c) for c in TOGETHER + [random_case(seed) for seed in range(30)]]
    cases += [(check_loop, loop) for loop in LOOPS]
    cases += [(check_tasks, c) for c in TASKS]
    cases += [(check_random_tasks, Case(f"tasks-{seed}", None, ())) for seed in range(30)]
    cases.append((check_maml, Case("maml", None, ())))
    for check, case in cases:
        if wanted and case.name not in wanted:
            continue
        try:
            check(case)
        except Exception:
            yield f"{case.name}\n{traceback.format_exc(limit=-3)}"


if __name__ == "__main__":
    print(fingerprint())
    grid.MOST_PROGRAMS = 4  # so that programs have several tasks
    found = list(failures(sys.argv[1:]))
    print(*found, sep="\n")
    sys.exit(len(found) > 0)
