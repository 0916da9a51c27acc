"""`Compiled.explain()`: each call once, by what computes it, and why it is cut from what it reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fxfunc
from fxfunc.codegen import cost, cxx, partition
from fxfunc.codegen.lower import is_free
from fxfunc.passes.graph import Graph, getitem, map_, scan

F64 = torch.float64
needs_compiler = pytest.mark.skipif(cxx.compiler() is None, reason="no C++ compiler")


def compiled(f, *args, backend="cpp", **choices):
    with cost.forced(**choices):
        return fxfunc.jit(f).lower(*args).compile(backend=backend)


def rows(call):
    """What it says of each call."""
    return [r for p in call._program.programs for r in p.rows] + call._program.outside


def calls(graph: Graph) -> Counter:
    """How often each operation is called, in bodies of loops too."""
    found = Counter()
    for n in graph.nodes:
        if n.target is getitem or is_free(n):
            continue
        found[str(n.target)] += 1
        if n.target in (map_, scan):
            found += calls(n.args[0])
    return found


def net(w, x):
    y = torch.tanh(x @ w)
    return (y.softmax(-1) * y.mean(0)).square().mean()


def recurrent(w, x):
    return fxfunc.scan(lambda h, row: (torch.tanh(h @ w) + row, h.sum()), torch.zeros_like(x[0]), x)


CASES = {
    "net": (net, (4, 5), (9, 4)),
    "grad": (fxfunc.grad(net), (4, 5), (9, 4)),
    "vmap(grad)": (fxfunc.vmap(fxfunc.grad(net), (None, 0)), (4, 5), (30, 9, 4)),
    "steps": (recurrent, (4, 4), (6, 4)),
    "split": (lambda w, x: (x @ w).sin().cumsum(1).cos() + 1, (4, 5), (9, 4)),
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_each_call_of_the_programs_has_one_line(name, monkeypatch):
    f, *shapes = CASES[name]
    graphs, to_cpp = [], partition.to_cpp
    monkeypatch.setattr(partition, "to_cpp", lambda name, graph: graphs.append(graph) or to_cpp(name, graph))
    call = compiled(f, *(torch.randn(s, dtype=F64) for s in shapes), maps="loops")
    found = Counter(r.op for p in call._program.programs for r in p.rows)
    wanted = sum(map(calls, graphs), Counter())
    copies = found - wanted
    assert not wanted - found and set(copies) <= {"aten._to_copy.default"}  # of views that are outputs
    assert len({(r.place.partition(":")[0], r.name) for r in rows(call)}) == len(rows(call))
    text = call.explain().splitlines()
    assert all(sum(line.split()[:2] == [r.name, r.op] for line in text) >= 1 for r in rows(call))
    assert sum(line.startswith("  ") for line in text) == len(rows(call))


@needs_compiler
def test_calls_are_grouped_by_kernel_and_the_cut_is_named():
    def f(w, x):
        y = torch.tanh(x @ w)
        return y.softmax(-1) * y.mean(0)

    found = {r.op.split(".")[1]: r for r in rows(compiled(f, torch.randn(6, 5), torch.randn(4, 6)))}
    assert found["mm"].place == "program: a product"
    assert found["tanh"].why == "mm: a product"
    assert len({found[op].place for op in ("tanh", "amax", "sub", "exp", "div")}) == 1
    assert found["exp"].why == ""
    assert found["mean"].place != found["tanh"].place
    assert found["mean"].why == "tanh: a reduction over other axes"


@needs_compiler
def test_calls_of_a_task_are_said_to_be_in_its_function():
    f = fxfunc.vmap(lambda w, x: (x @ w).sin().sum(), (None, 0))
    call = compiled(f, torch.randn(6, 5), torch.randn(30, 4, 6), maps="loops", blocks="one")
    (task,) = (r.place.partition(":")[0] for r in rows(call) if "mm" in r.op)
    assert task.startswith("task_") and f"void {task}(" in call._program.programs[0].source
    assert [r.place for r in rows(call) if r.op == "fxfunc.map"] == ["program: a loop over 30 tasks"]


@needs_compiler
@pytest.mark.parametrize(
    "f, why",
    [
        (lambda x: x.sin().cumsum(0) * 2, "no loop-IR rule"),
        (lambda x: (x @ x).sin() * 2, "a large product"),
        (lambda x: x.sin(), "too little for a program"),
    ],
)
def test_what_is_left_to_aten_says_why(f, why):
    call = compiled(f, torch.randn(4, 4), **({"products": "aten"} if "product" in why else {}))
    assert any(why in r.why for r in call._program.outside)
    assert any(
        "runs in ATen" in line and why in line and "test_explain.py" in line
        for line in call.explain().splitlines()
    )


def test_the_eager_backend_says_that_each_call_is_one_of_aten():
    call = compiled(CASES["split"][0], torch.randn(4, 5), torch.randn(9, 4), backend="eager")
    head, *lines = call.explain().splitlines()
    assert head == "backend eager"
    assert [line.split()[1].split(".")[1] for line in lines] == ["mm", "sin", "cumsum", "cos", "add"]
    assert all("ATen" in line and "test_explain.py" in line for line in lines)
