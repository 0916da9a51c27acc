"""The sweep of PyTorch's op database notices what it is there to notice."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import torch

from fxfunc.passes.infer import forget
from fxfunc.passes.rules import ROWS, derived

aten = torch.ops.aten
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "sweep"
DTYPES = [torch.float64]


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("sweep_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("sweep_script", loader))
    loader.exec_module(module)
    return module


def entry(name):
    return next(op for op in sweep.entries() if op.formatted_name == name)


def outcomes(name, most=1):
    return {transform: o for (transform, _), o in sweep.sweep_entry(entry(name), most, DTYPES).items()}


def test_an_op_that_both_can_do_agrees():
    found = outcomes("sin")
    assert found.keys() == sweep.TRANSFORMS.keys()
    assert all(o.status == "agrees" and o.samples == 1 and o.elements for o in found.values())


@pytest.mark.parametrize(
    "name, op", [pytest.param("sin", aten.sin.default, marks=pytest.mark.slow), ("mm", aten.mm.default)]
)
def test_a_wrong_rule_is_wrong(monkeypatch, name, op):
    row = ROWS[op]
    wrong = tuple(lambda *args, f=f, **kwargs: f(*args, **kwargs) * 1.5 for f in row.jvp)
    monkeypatch.setitem(ROWS, op, dataclasses.replace(row, jvp=wrong))
    forget()
    found = outcomes(name)
    monkeypatch.undo()
    forget()
    assert {t for t, o in found.items() if o.status == "wrong"} == found.keys() - {"vmap"}


def test_a_missing_rule_is_ours(monkeypatch):
    monkeypatch.delitem(ROWS, aten.sin.default)
    forget()
    with derived.disabled():
        found = outcomes("sin")
    monkeypatch.undo()
    forget()
    assert {t for t, o in found.items() if o.status == "we_cannot"} == found.keys() - {"vmap"}
    assert "MissingRule: aten.sin.default" in found["jvp"].ours


def test_a_fault_of_the_harness_is_no_outcome(monkeypatch):
    def broken(T, p):
        raise RuntimeError("not of any transform")

    monkeypatch.setitem(sweep.TRANSFORMS, "jvp", broken)
    with pytest.raises(RuntimeError, match="not of any transform"):
        outcomes("sin")


def test_what_torch_refuses_is_held_against_something_slower():
    found = outcomes("nn_functional_grid_sample")
    assert found["jvp"].status == "torch_cannot"
    assert found["jvp"].ours == "can; agrees with finite differences"


def test_a_wrong_answer_that_torch_has_no_answer_for_is_wrong(monkeypatch):
    jvp = sweep.fxfunc.jvp
    monkeypatch.setattr(
        sweep.fxfunc, "jvp", lambda *args: sweep.pytree.tree_map(lambda x: x * 1.5, jvp(*args))
    )
    assert outcomes("nn_functional_grid_sample")["jvp"].status == "wrong"


def test_samples_are_chosen_for_what_they_add():
    samples = list(entry("add").sample_inputs("cpu", torch.float64))
    chosen = sweep.choose(iter(samples), 4)
    assert len(chosen) == 4 and chosen[0] is not chosen[1]
    assert set().union(*map(sweep.features, chosen)) > set().union(*map(sweep.features, samples[:1]))


def table(**rows):
    """Outcomes of entries by (entry, transform, dtype)."""
    return {(name, "jvp", "float64"): sweep.Outcome(*rest) for name, rest in rows.items()}


@pytest.mark.parametrize(
    "found, fault",
    [
        (table(a=("wrong",)), "wrong: a | jvp"),
        (table(a=("not_compared",)), "not_compared: a | jvp"),
        (table(a=("harness", 0, 0, "", "KeyError: a")), "harness: a | jvp | float64 | KeyError: a"),
        (table(a=("we_cannot",)), "we_cannot: a has no reason"),
        (table(**{f"op{i}": ("we_cannot",) for i in range(11)}), "we_cannot: 11 entries"),
    ],
    ids=["wrong", "not compared", "a fault of the harness", "no reason", "too many that we cannot"],
)
def test_what_must_not_be(monkeypatch, script, found, fault):
    monkeypatch.setattr(script, "REASONS", dict.fromkeys(["c", *(f"op{i}" for i in range(11))], "why"))
    (line,) = script.faults(script.lines(found))
    assert fault in line
    assert not script.faults(script.lines(table(a=("agrees",), b=("torch_cannot",), c=("we_cannot",))))


def test_an_entry_that_changes_its_file_is_seen(script, tmp_path):
    before = script.lines(table(a=("agrees",), b=("agrees",), c=("agrees",)))
    script.record(before, {"a", "b", "c"}, tmp_path)
    now = script.lines(table(a=("agrees",), b=("we_cannot", 0, 0, "", "a reason")))
    changes = script.changes(now, ["a", "b"], tmp_path)
    assert changes == ["agrees: gone: b | jvp | float64", "we_cannot: new: b | jvp | float64 |  | a reason"]
    assert script.changes(before, ["a", "b", "c"], tmp_path) == []
    script.record(now, {"a", "b"}, tmp_path)
    assert script.changes(now, ["a", "b"], tmp_path) == []
    assert script.changes(script.lines(table(c=("agrees",))), ["c"], tmp_path) == []


@pytest.mark.parametrize(
    "reason, missed",
    [
        ("MissingRule: aten.sin.default has no jvp rule", True),
        ("MissingRule: aten.erfinv.default has no jvp rule", False),
        ("RuntimeError: anything else", True),
    ],
)
def test_without_derived_rules_only_those_may_be_missed(script, reason, missed):
    now = script.lines(table(a=("we_cannot", 0, 0, "", reason)))
    assert bool(script.rules_missed(now)) is missed


@pytest.mark.slow
def test_the_command():
    command = [
        sys.executable,
        SCRIPT,
        "--no-derived",
        "--ops",
        "^sin$",
        "--dtypes",
        "float64",
        "--samples",
        "1",
        "--jobs",
        "1",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 entries; (entry, transform, dtype): 7 agrees; 7 samples" in run.stdout
