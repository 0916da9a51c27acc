"""What `compare` promises (an alarm in one of 100 tables at most, a 10% slowdown found in 95), from recorded runs."""

from __future__ import annotations

import pytest

from fxfunc.bench import cli, nulls
from fxfunc.bench.compare import MARGINS


@pytest.fixture(scope="module")
def runs():
    return nulls.read_folder()


@pytest.mark.parametrize("folder", [nulls.FOLDER, nulls.SLOWED_FOLDER], ids=["null", "slowed"])
def test_there_are_twenty_runs_of_processes_of_their_own(folder):
    runs = nulls.read_folder(folder)
    assert len(runs) >= 20
    assert len({run["base"]["run"] for run in runs}) == len(runs)
    assert all(run["base"]["revision"] == run["head"]["revision"] for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_equal_programs_alarm_in_no_more_than_one_table_of_100_and_slow_ones_in_95(runs, seed):
    slow_runs = nulls.read_folder(nulls.SLOWED_FOLDER)
    simulation = nulls.simulate(runs, slow_runs, tables=100, launches=cli.LAUNCHES, seed=seed)
    assert simulation.failing <= 1
    assert len(simulation.slowed) == 3 and simulation.all_found >= 95


def test_the_recorded_margins_are_those_of_the_null_runs(runs, tmp_path):
    nulls.write_margins(runs, tmp_path / "margins.json")
    assert (tmp_path / "margins.json").read_text() == MARGINS.read_text()
