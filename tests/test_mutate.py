"""The tests of the tests: scripts/mutate kills what a case can see, and reports what none does or what does not apply."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import fingerprints
import mutants
import pytest
import torch
from faults import FAULTS
from rule_harness import Case

from fxfunc.passes.rules import ROWS

ROOT = Path(__file__).resolve().parent.parent
SIN = Case("sin", torch.sin, lambda s: (s(2, s.n),))
BLIND = Case("sin", lambda x: x.sin() * 0, lambda s: (s(2, s.n),))


def run_script(monkeypatch, *arguments, cases) -> int:
    """The exit status of scripts/mutate with these cases."""
    loader = importlib.machinery.SourceFileLoader("mutate", str(ROOT / "scripts/mutate"))
    script = importlib.util.module_from_spec(importlib.util.spec_from_loader("mutate", loader))
    loader.exec_module(script)
    monkeypatch.setattr(script.mutants, "kill_all", functools.partial(mutants.kill_all, cases=cases))
    monkeypatch.setattr(sys, "argv", ["mutate", *arguments, "--jobs", "1"])
    with warnings.catch_warnings():
        return script.main()


def test_mutants_of_an_op_are_killed(monkeypatch, capsys):
    right = ROWS[torch.ops.aten.sin.default]
    assert run_script(monkeypatch, "aten.sin.default", "--verbose", cases=[SIN]) == 0
    printed = capsys.readouterr().out
    assert "aten.sin.default jvp[0] sign: sin jvp" in printed and "batch order: sin vmap" in printed
    assert ROWS[torch.ops.aten.sin.default] is right


@pytest.mark.parametrize("cases", [[BLIND], []], ids=["blind", "none"])
def test_mutants_that_no_case_notices_survive(monkeypatch, capsys, cases):
    assert run_script(monkeypatch, "aten.sin.default", cases=cases) == 1
    printed = capsys.readouterr().out
    assert "0 of 3 mutants killed" in printed and "survived: aten.sin.default jvp[0] sign" in printed


def test_every_item_has_a_naive_way():
    assert {f.item for f in FAULTS} == set(range(1, 31))


@pytest.mark.slow
def test_a_naive_way_that_is_not_noticed_or_does_not_apply_is_reported():
    program = """
import faults, mutants
test = "tests/test_jit.py::test_semantics_04_a_training_loop_that_rebinds_its_weights"
def harmless(patch): pass
def gone(patch): patch.setattr(faults.guards.Guards, "no_such_method", None)
def outdated(patch): patch.setattr(faults.guards.Guards, "current", lambda: None)
plants = [faults.closures_are_not_read_again, harmless, gone, outdated]
for _, problem in mutants.check_faults([faults.Fault(4, plant, test) for plant in plants]):
    print(problem and problem.splitlines()[0])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True, check=True
    )
    noticed, harmless, gone, outdated = run.stdout.splitlines()
    assert (noticed, harmless) == ("None", "not noticed")
    assert gone.startswith("does not apply: AttributeError")
    assert outdated.startswith("breaks the code rather than the answer: TypeError")


def test_a_rule_changes_with_its_code_its_closure_and_its_helpers():
    def rule(scale, helper):
        return lambda t: helper(t) * scale

    one = fingerprints.fingerprint(rule(2, torch.sin))
    assert one == fingerprints.fingerprint(rule(2, torch.sin))
    others = [rule(3, torch.sin), rule(2.0, torch.sin), rule(2, torch.cos), rule(2, lambda t: t), lambda t: t]
    assert len({one, *map(fingerprints.fingerprint, others)}) == 6
