"""What is said of kernels that no device here has run: the table of what they compile to, and guesses from their instructions."""

from __future__ import annotations

import dataclasses

import pytest
from task_cases import TASKS, graph_and_inputs, tasks_of

from fxfunc.bench import cycles, kernels, registry
from fxfunc.codegen import offline

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def binary():
    case = next(c for c in TASKS if c.name == "a recurrent net")
    return offline.compile(tasks_of(graph_and_inputs(case)[0])[0][0], "cuda:90")


def test_an_instruction_in_a_loop_counts_once_a_step(binary):
    code, jumps = cycles.disassembled(binary.cubin)
    found = cycles.predict(binary, 25)
    assert len([j for j in jumps if j[1] - j[0] > 1]) == len(cycles._trips(binary.source)) > 0
    assert found.instructions > len(code) and found.barriers > sum(op.startswith("BAR") for op in code)


def test_more_tasks_take_longer_and_few_run_at_once(binary):
    times = [cycles.predict(binary, n).seconds for n in (1, 25, 132, 10_000, 20_000)]
    assert times[0] == times[1] == times[2] < times[3] < times[4]


def test_an_unrolled_loop_is_not_guessed_at(binary):
    unrolled = dataclasses.replace(binary, source=binary.source + "    for step in range(3):\n        pass\n")
    assert cycles.predict(unrolled, 25) is None


def test_loops_over_tasks_count_once():
    text = "    for task in range(program * 300 // 264, (program + 1) * 300 // 264):\n        for k0 in range(0, 70, 32):\n"
    assert list(cycles._trips(text)) == [1, 3]


def test_the_committed_table_has_every_workload_and_says_what_was_not_measured():
    text = kernels.TABLE.read_text()
    assert (
        kernels._without_folders("a product (mm at /a/b/nets.py:35): large")
        == "a product (mm at nets.py:35): large"
    )
    assert (
        "not measured" in text
        and " at /" not in text
        and all(f"| {name} " in text for name in registry.names())
    )
