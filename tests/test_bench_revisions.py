"""Comparing two revisions: their environments, and a comparison from end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fxfunc.bench import records, revisions
from fxfunc.bench.errors import BenchError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("revision", ["nonsense", "--version", "HEAD:README.md"])
def test_what_names_no_commit_is_refused(revision):
    with pytest.raises(BenchError, match="neither a results file nor a git revision"):
        revisions.commit_of(revision)


def test_a_revision_that_asks_for_other_packages_gets_an_environment_of_its_own(tmp_path, monkeypatch):
    commands = []

    def run(*arguments):
        commands.append(arguments)
        (tmp_path / "environment" / "lib" / "python3" / "site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(revisions, "_run", run)
    for name in ("pyproject.toml", "scripts/constraints.txt"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text((ROOT / name).read_text())
    revisions.install(tmp_path / "tree", tmp_path / "environment")
    assert "--no-deps" in commands[-1]
    pins = tmp_path / "tree" / "scripts" / "constraints.txt"
    pins.write_text(pins.read_text().replace("torch==2", "torch==3"))
    revisions.install(tmp_path / "tree", tmp_path / "environment")
    assert "--no-deps" not in commands[-1] and str(pins) in commands[-1]


@pytest.mark.slow
def test_two_revisions_are_measured_in_worktrees_of_their_own(tmp_path):
    command = [sys.executable, "-m", "fxfunc", "bench", "compare", "HEAD", ".", "--out", str(tmp_path)]
    options = ["--quick", "--launches", "2", "--workload", "hess", "--format", "github"]
    worktrees = ["git", "-C", str(ROOT), "worktree", "list"]
    before = subprocess.run(worktrees, capture_output=True, text=True, check=True).stdout
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert "| hess" in done.stdout and "steady" in done.stdout and "nodes captured" in done.stdout
    base, head = (records.read(tmp_path / f"{side}.json") for side in ("base", "head"))
    assert base["run"] == head["run"]
    for side in (base, head):
        assert len(side["workloads"]["hess"]["cells"]["eager"]["steady_s"]) == 2
    after = subprocess.run(worktrees, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in after.splitlines()] == [
        line.split()[0] for line in before.splitlines()
    ]
