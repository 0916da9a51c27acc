"""fxfunc.bench: results files, intervals, verdicts of `compare`, and the simulation over null runs."""

from __future__ import annotations

import copy
import json
import math
import random
import stat
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fxfunc.bench import BenchError, nulls, records, stats
from fxfunc.bench.compare import (
    MISSING,
    NOISY,
    PASS,
    REGRESSION,
    UNSURE,
    WIN,
    Row,
    compare,
    exit_status,
    notes,
    recorded_margins,
    table,
)

MIB = 2**20


def cell(scale: float = 1.0, launches: int = 3, turns: int = 12, **changes: Any) -> dict[str, Any]:
    """An ok cell: steady turns near 1 ms that spread by 1%, three cold starts of 0.5 s, peaks of 50 MiB."""
    noise = random.Random(7)
    steady = [
        [[scale * 1e-3 * noise.uniform(0.99, 1.01) for _ in range(4)] for _ in range(turns)]
        for _ in range(launches)
    ]
    figures = {
        "steady_s": steady,
        "cold": [{"first_s": 0.5, "from_start_s": None, "stages_s": {"capture": 0.1}} for _ in range(3)],
        "peak_bytes": [50 * MIB] * launches,
        "counters": {"ops": 480, "kernels": 0},
    }
    return {"status": "ok", "reason": "", "warm_s": [], "load_s": []} | figures | changes


def bad_cell(status: str = "wrong", reason: str = "error 0.1, allowed 1e-5") -> dict[str, Any]:
    return {"status": status, "reason": reason}


def results(cells: dict[str, dict[str, Any]], run: str = "a1", **changes: Any) -> dict[str, Any]:
    """A results file's content: `cells` of the workload maml25."""
    content = {
        "format": "fxfunc-bench",
        "schema": 1,
        "run": run,
        "started": "2026-11-24T20:00:00+00:00",
        "complete": True,
        "command": ["run"],
        "flags": {"device": "cpu", "threads": 2},
        "machine": {"cpu": "one", "cores": 2, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "revision": {"commit": None, "dirty": None},
        "overhead_s": 9e-8,
        "workloads": {"maml25": {"cells": cells}},
    }
    return content | changes


def margins(metric: str = "steady", paired: float = 0.01, n: int = 20) -> dict[str, Any]:
    noise = {"paired": paired, "unpaired": 3 * paired, "largest": 3 * paired, "n": n}
    return {"rows": {"maml25": {"eager": {metric: noise}}}}


def row_of(
    base: dict[str, Any], head: dict[str, Any], metric: str, noise: dict[str, Any] | None = None
) -> Row:
    """The row of one metric where base and head are single cells of one run."""
    rows = compare(results({"eager": base}), results({"eager": head}), noise or {})
    return next(row for row in rows if row.metric == metric)


def steady(ratio: float) -> dict[str, Any]:
    return cell(ratio)


def cold(ratio: float) -> dict[str, Any]:
    return cell(cold=[{"first_s": 0.5 * ratio}] * 3)


def memory(ratio: float) -> dict[str, Any]:
    return cell(peak_bytes=[round(50 * MIB * ratio)] * 3)


# ----- verdicts -----


@pytest.mark.parametrize(
    ("metric", "head", "noise", "verdict"),
    [
        ("steady", steady(1.0), 0.01, PASS),
        ("steady", steady(1.015), 0.003, PASS),  # seen, but below the least effect
        ("steady", steady(1.10), 0.01, REGRESSION),
        ("steady", steady(1 / 1.10), 0.01, WIN),
        ("steady", steady(1.10), 0.10, UNSURE),
        ("steady", steady(1.0), 0.10, UNSURE),  # a slowdown of 10% could hide in that noise
        ("steady", steady(1.5), None, REGRESSION),
        ("cold", cold(1.0), 0.15, PASS),
        ("cold", cold(1.6), 0.10, REGRESSION),
        ("cold", cold(0.5), None, WIN),
        ("cold", cold(1.3), 0.15, UNSURE),
        ("memory", memory(1.0), 0.01, PASS),
        ("memory", memory(1.3), 0.05, REGRESSION),
        ("memory", memory(0.5), None, WIN),
        ("memory", memory(1.15), 0.10, UNSURE),
    ],
)
def test_verdict_of_a_noisy_figure(
    metric: str, head: dict[str, Any], noise: float | None, verdict: str
) -> None:
    row = row_of(cell(), head, metric, noise and margins(metric, noise))
    assert row.verdict == verdict
    assert row.low <= row.ratio <= row.high
    assert ("default margin" in row.note) == (noise is None)
    assert exit_status([row]) == int(verdict == REGRESSION)


@pytest.mark.parametrize(("peak", "verdict"), [(0, PASS), (2.9 * MIB, PASS), (3.5 * MIB, REGRESSION)])
def test_small_differences_of_memory_are_noise(peak: float, verdict: str) -> None:
    base, head = cell(peak_bytes=[MIB] * 3), cell(peak_bytes=[int(peak)] * 3)
    assert row_of(base, head, "memory", margins("memory", 0.01)).verdict == verdict


@pytest.mark.parametrize(
    ("after", "verdict", "ratio"),
    [(480, PASS, 1.0), (481, REGRESSION, 481 / 480), (479, WIN, 479 / 480), (None, MISSING, None)],
)
def test_counters_are_exact(after: int | None, verdict: str, ratio: float | None) -> None:
    counters = {} if after is None else {"ops": after}
    row = row_of(cell(), cell(counters=counters), "ops")
    assert (row.verdict, row.ratio) == (verdict, ratio)


def test_a_counter_that_was_zero_regresses() -> None:
    row = row_of(cell(), cell(counters={"ops": 480, "kernels": 1}), "kernels")
    assert (row.verdict, row.ratio) == (REGRESSION, math.inf)
    assert row_of(cell(), cell(), "kernels").verdict == PASS


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({}, "not measured"),
        ({"eager": bad_cell()}, "wrong: error 0.1"),
        ({"eager": bad_cell("absent", "")}, "absent"),
    ],
)
def test_a_cell_that_is_gone_or_wrong_is_missing_and_fails(cells: dict[str, Any], words: str) -> None:
    (row,) = compare(results({"eager": cell()}), results(cells), {})
    assert (row.verdict, exit_status([row])) == (MISSING, 1)
    assert words in row.note and "regression" in row.note


def test_a_workload_that_is_gone_is_missing() -> None:
    (row,) = compare(results({"eager": cell()}), results({}, workloads={}), {})
    assert (row.workload, row.implementation, row.verdict) == ("maml25", "eager", MISSING)


@pytest.mark.parametrize("key", ["steady_s", "cold", "peak_bytes"])
def test_a_figure_that_is_gone_is_missing(key: str) -> None:
    metric = {"steady_s": "steady", "cold": "cold", "peak_bytes": "memory"}[key]
    assert row_of(cell(), cell(**{key: []}), metric).verdict == MISSING


def test_what_only_head_has_is_noted_and_fails_nothing() -> None:
    rows = compare(results({"cpp": bad_cell("absent")}), results({"cpp": cell(), "eager": cell()}), {})
    assert [(row.implementation, row.verdict) for row in rows] == [("cpp", PASS), ("eager", PASS)]
    assert all("only in head" in row.note for row in rows) and exit_status(rows) == 0


def test_cells_that_are_bad_on_both_sides_are_no_rows() -> None:
    assert compare(results({"cpp": bad_cell("absent")}), results({"cpp": bad_cell("crashed")}), {}) == []


def test_pairs_of_turns_cancel_drift_that_unpaired_medians_do_not() -> None:
    drift = [1 + i / 10 for i in range(12)]
    drifting = lambda scale: cell(steady_s=[[[scale * 1e-3 * d] for d in drift]] * 3)
    shifted = cell(steady_s=[[[1e-3 * d * 1.05] for d in drift]] * 3)
    assert row_of(drifting(1.0), shifted, "steady", margins(paired=0.005)).verdict == REGRESSION
    apart = compare(
        results({"eager": drifting(1.0)}), results({"eager": shifted}, run="b2"), margins(paired=0.005)
    )
    assert apart[0].verdict == UNSURE


def test_files_of_different_runs_have_the_unpaired_margin() -> None:
    base, head = results({"eager": cell()}), results({"eager": cell(1.06)}, run="b2")
    apart = compare(base, head, margins())[0]
    together = compare(base, head | {"run": "a1"}, margins())[0]
    assert (together.verdict, apart.verdict) == (REGRESSION, UNSURE)
    assert apart.ratio == pytest.approx(together.ratio, rel=0.01)
    assert any("different runs" in line for line in notes(base, head))


def test_one_restless_launch_is_no_regression() -> None:
    restless = cell()
    restless["steady_s"][1] = cell(1.3)["steady_s"][1]
    row = row_of(cell(), restless, "steady", margins(paired=0.003))
    assert row.ratio > 1.05 and row.verdict == UNSURE


def test_an_interrupted_side_is_compared_as_far_as_it_went() -> None:
    head = cell(1.2)
    head["steady_s"] = [[], head["steady_s"][1][:5], head["steady_s"][2]]
    row = row_of(cell(), head, "steady", margins())
    assert row.verdict == REGRESSION and row.ratio == pytest.approx(
        1.2, rel=1e-6
    )  # each turn against its own neighbour


@pytest.mark.parametrize("count", [1, 10, 60])
def test_bonferroni_divides_the_level_by_the_noisy_rows_of_the_table(count: int) -> None:
    """A table of `count` workloads has 3 noisy rows each; half its interval is the error times that at 1% / (6 count)."""
    entry = {"cells": {"eager": cell()}}
    content = results({}, workloads={f"w{i}": entry for i in range(count)})
    noise = {"rows": {"w0": {"eager": {"steady": margins(paired=0.01)["rows"]["maml25"]["eager"]["steady"]}}}}
    row = compare(content, content, noise)[0]
    expected = stats.t_quantile(0.01 / (2 * 3 * count), 19) * 0.01 / math.sqrt(3)
    assert math.log(row.high) == pytest.approx(expected)
    assert math.log(row.low) == pytest.approx(-expected)


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {"cpu": "two", "cores": 2, "gpu": None}},
        {"machine": {"cpu": "one", "cores": 4, "gpu": None}},
        {"machine": {"cpu": "one", "cores": 2, "gpu": "H200"}},
        {"flags": {"device": "cuda", "threads": 2}},
        {"flags": {"device": "cpu", "threads": 1}},
    ],
)
def test_other_machines_are_refused_except_for_counters(change: dict[str, Any]) -> None:
    base, head = results({"eager": cell()}), results({"eager": cell()}, **change)
    with pytest.raises(BenchError, match="different machines or settings"):
        compare(base, head, {})
    assert not records.same_machine(base, head)
    rows = compare(base, head, metrics="counters")
    assert {row.metric: row.verdict for row in rows} == {"ops": PASS, "kernels": PASS}


def test_metrics_choose_rows() -> None:
    content = results({"eager": cell()})
    assert [row.metric for row in compare(content, content, {}, metrics="cold")] == ["cold"]


def test_notes_name_what_differs() -> None:
    head = results({}, versions={"torch": "2.12.0"}, complete=False)
    text = " ".join(notes(results({}), head))
    assert "torch 2.13.0 / 2.12.0" in text and "Head was interrupted" in text
    assert notes(results({}), results({})) == []


# ----- tables -----


def mixed_rows() -> list[Row]:
    base = {"eager": cell(), "cpp": cell(), "triton": cell()}
    head = {
        "eager": cell(1.5, counters={"ops": 1, "kernels": 0}),
        "cpp": bad_cell(reason="a | b"),
        "triton": cell(),
    }
    return compare(results(base), results(head), {})


def test_github_table_has_as_many_cells_in_each_line() -> None:
    lines = [line for line in table(mixed_rows(), "github").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(mixed_rows())
    assert {line.replace(r"\|", "").count("|") for line in lines} == {10}


@pytest.mark.parametrize("format", ["plain", "github"])
def test_what_is_not_pass_comes_first_and_the_summary_last(format: str) -> None:
    text = table(mixed_rows(), format)
    places = [text.index(word) for word in (REGRESSION, MISSING, WIN, PASS)]
    assert places == sorted(places)
    assert all(unit in text for unit in (" ms ", " MiB "))
    last = text.splitlines()[-1]
    assert (
        "11 rows: 1 REGRESSION, 1 MISSING" in last
        and "Bonferroni over 6 noisy rows, 6 with default margins" in last
    )


def test_a_table_of_no_rows() -> None:
    assert "0 rows" in table([], "github") and exit_status([]) == 0


# ----- files -----


def changed(path: str, value: Any) -> dict[str, Any]:
    """Good results with the item at a dotted path replaced, or deleted if the value is `...`."""
    content = results({"eager": cell()})
    *parents, last = path.split(".")
    inner: Any = content
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    last = int(last) if last.isdigit() else last
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


EAGER = "workloads.maml25.cells.eager"
WHERE = "workload maml25, implementation eager: "


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed("format", "other"), "foreign file: its format is 'other'"),
        ([1], "foreign file"),
        (changed("schema", 2), "schema 2, but this fxfunc reads schema 1: use the fxfunc that wrote it"),
        (changed("schema", 0), "schema 0, but this fxfunc reads schema 1: measure again"),
        (changed("run", ...), "key 'run' is missing"),
        (changed("machine.cores", ...), "machine: key 'cores' is missing"),
        (changed("flags.threads", "2"), "flags: threads is '2'"),
        (changed("workloads", []), "workloads is []"),
        (changed("workloads.maml25", 3), "workload maml25: 3 where an object belongs"),
        (changed(f"{EAGER}.status", "fine"), WHERE + "status 'fine' is none of ok"),
        (changed(f"{EAGER}.cold", ...), WHERE + "key 'cold' is missing"),
        (changed(f"{EAGER}.steady_s.1.2.0", float("nan")), WHERE + r"steady_s[1][2][0] is nan"),
        (changed(f"{EAGER}.steady_s.0.3.1", float("inf")), WHERE + r"steady_s[0][3][1] is inf"),
        (changed(f"{EAGER}.steady_s.0.3.1", -0.5), WHERE + r"steady_s[0][3][1] is -0.5"),
        (changed(f"{EAGER}.steady_s.0.3.1", 0), WHERE + r"steady_s[0][3][1] is 0"),
        (changed(f"{EAGER}.steady_s.0.3.1", "1ms"), WHERE + r"steady_s[0][3][1] is '1ms', no number"),
        (changed(f"{EAGER}.steady_s.0.3.1", True), WHERE + r"steady_s[0][3][1] is True, no number"),
        (changed(f"{EAGER}.steady_s.0", [0.1]), WHERE + r"steady_s[0][0] is 0.1, no list of samples"),
        (changed(f"{EAGER}.steady_s.2.4", []), WHERE + r"steady_s[2][4] is [], no list of samples"),
        (changed(f"{EAGER}.cold.1.first_s", 0.0), WHERE + r"cold[1].first_s is 0.0"),
        (changed(f"{EAGER}.cold.1.stages_s.capture", -1), WHERE + r"cold[1].stages_s.capture is -1"),
        (changed(f"{EAGER}.cold.1", {}), WHERE + r"cold[1]: key 'first_s' is missing"),
        (changed(f"{EAGER}.peak_bytes.0", None), WHERE + r"peak_bytes[0] is None, no number"),
        (changed(f"{EAGER}.counters.ops", -1), WHERE + r"counters.ops is -1"),
        (changed("overhead_s", float("nan")), "overhead_s is nan"),
    ],
)
def test_bad_content_is_refused_with_its_place(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(BenchError) as problem:
        records.read(path)
    assert str(problem.value).startswith(str(path)) and words in str(problem.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "no such file"),
        (b'{\n "format": "fxfunc-bench",\n "schema"', "broken JSON at line 3"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"", "broken JSON at line 1"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, raw: bytes | None, words: str) -> None:
    path = tmp_path / "bad.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(BenchError, match=words):
        records.read(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        records.read(tmp_path)


def test_what_is_written_is_read_to_the_nanosecond(tmp_path: Path) -> None:
    content, path = results({"eager": cell(error=3.1e-13)}), tmp_path / "deep" / "r.json"
    records.write(path, content)
    found = records.read(path)
    before, after = (
        each["workloads"]["maml25"]["cells"]["eager"].pop("steady_s") for each in (content, found)
    )
    assert found == content
    assert all(
        a == pytest.approx(b, abs=5.1e-10)
        for x, y in zip(before, after, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert max(len(line.split(",")) for line in path.read_text().splitlines()) >= 4  # a turn a line


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "r.json"
    records.write(path, {"x": 1})
    with pytest.raises((BenchError, TypeError)):
        records.write(path, {"x": [1.0, bad]})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_revision_of_a_checkout(tmp_path: Path) -> None:
    assert records.describe_revision(tmp_path) == {"commit": None, "dirty": None}
    git = lambda *words: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words], check=True
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").write_text("1")
    git("init", "-q"), git("add", "file"), git("commit", "-qm", "one")
    clean = records.describe_revision(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert records.describe_revision(tmp_path) == clean | {"dirty": True}
    assert records.describe_revision(tmp_path / "sub")["commit"] is None


def test_machine_and_versions_have_what_the_schema_names() -> None:
    assert set(records.describe_machine()) == {"cpu", "cores", "memory_gib", "gpu", "system"}
    versions = records.describe_versions()
    assert set(versions) == {"python", "torch", "fxfunc", "triton", "jax", "numpy"} and versions["torch"]


# ----- intervals -----


def test_interval_over_turns_covers_where_neighbouring_samples_are_correlated() -> None:
    """Samples of a turn share an effect: blocks of turns cover the true median, samples taken as independent would not."""
    noise, whole, loose = random.Random(1), 0, 0
    for _ in range(100):
        effects = [noise.gauss(0, 1) for _ in range(25)]
        turns = [[effect + noise.gauss(0, 0.3) for _ in range(8)] for effect in effects]
        low, high = stats.median_interval(turns, resamples=200)
        whole += low <= 0 <= high
        low, high = stats.median_interval([[sample] for turn in turns for sample in turn], resamples=200)
        loose += low <= 0 <= high
    assert whole >= 88 and loose < 70


def test_interval_is_of_the_median_and_the_same_again() -> None:
    turns = [[1.0, 2.0, 3.0], [2.0, 3.0, 9.0], [2.5]]
    low, high = stats.median_interval(turns)
    assert low <= statistics.median(x for turn in turns for x in turn) <= high
    assert (low, high) == stats.median_interval(turns)
    assert stats.median_interval([[4.0]]) == (4.0, 4.0)
    many = [[float(i)] for i in range(30)]
    (low, high), (inner_low, inner_high) = stats.median_interval(many), stats.median_interval(many, level=0.5)
    assert low < inner_low < inner_high < high


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        stats.median_interval([[]])


@pytest.mark.parametrize(
    ("tail", "freedom", "value"),
    [
        (0.025, 1, 12.706),
        (0.025, 10, 2.228),
        (0.0005, 19, 3.883),
        (0.005, 120, 2.617),
        (0.025, math.inf, 1.960),
    ],
)
def test_quantiles_of_t_are_those_of_published_tables(tail: float, freedom: float, value: float) -> None:
    assert stats.t_quantile(tail, freedom) == pytest.approx(value, abs=6e-4)


def test_error_of_a_centre_is_what_launches_or_turns_show() -> None:
    assert stats.centre([[1.0], [2.0], [3.0]]) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert stats.centre([[1.0]]) == (1.0, 0.0)
    noise = random.Random(3)
    estimate, error = stats.centre([[noise.gauss(5, 1) for _ in range(100)]])
    assert estimate == pytest.approx(5, abs=0.5)
    assert error == pytest.approx(1.2533 / 10, rel=0.5)  # of the median of a normal sample


# ----- null runs -----


def null_run(seed: int, process: float = 0.01, workloads: int = 4, cold_day: float = 0.0) -> nulls.Run:
    """Synthetic: log-normal effects of processes, drift that the sides share, noise of turns, some far outliers."""
    noise = random.Random(seed)
    sides = {side: results({}, run=f"{seed:x}", workloads={}) for side in nulls.SIDES}
    for index in range(workloads):
        drift = [noise.gauss(0, 0.03)]
        for _ in range(11):
            drift.append(0.9 * drift[-1] + noise.gauss(0, 0.02))
        for side, content in sides.items():
            effect = noise.gauss(0, process / math.sqrt(2)) + math.log(1.1) * (side == "slow" and index < 3)
            turn = lambda level, effect=effect: math.exp(
                level + effect + noise.gauss(0, 0.01) + 0.3 * (noise.random() < 0.02)
            )
            day = noise.gauss(0, cold_day)
            figures = {
                "steady_s": [[[1e-3 * turn(level)] for level in drift]],
                "cold": [{"first_s": 0.5 * math.exp(day + noise.gauss(0, 0.05))} for _ in range(3)],
                "peak_bytes": [50 * MIB],
            }
            content["workloads"][f"w{index}"] = {"cells": {"eager": cell() | figures}}
    sides["slow"]["flags"] = sides["slow"]["flags"] | {"slow": ["w0", "w1", "w2"]}
    return sides


RUNS = [null_run(seed) for seed in range(20)]


def test_margins_are_the_noise_that_was_put_in() -> None:
    noise = nulls.margins(RUNS)["rows"]["w3"]["eager"]
    assert noise["steady"]["n"] == 20
    assert noise["steady"]["paired"] == pytest.approx(0.011, rel=0.4)
    assert noise["steady"]["paired"] <= noise["steady"]["largest"] <= noise["steady"]["unpaired"] * 2
    assert noise["memory"]["paired"] == 0.003  # the floor


def test_margins_count_what_the_processes_of_a_run_share() -> None:
    """Three cold starts of a run that move together say as little as one."""
    shared = nulls.margins([null_run(seed, cold_day=0.2) for seed in range(20)])["rows"]["w0"]["eager"][
        "cold"
    ]
    alone = nulls.margins(RUNS)["rows"]["w0"]["eager"]["cold"]
    assert alone["paired"] == pytest.approx(0.07, rel=0.5)
    assert shared["paired"] / math.sqrt(3) == pytest.approx(0.2 * math.sqrt(2), rel=0.5)


def test_margins_of_rows_seen_too_seldom_are_left_out() -> None:
    assert nulls.margins(RUNS[:4])["rows"] == {}


def test_recorded_margins_are_those_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    assert recorded_margins(results({}), path) == {}
    nulls.write_margins(RUNS, path)
    assert recorded_margins(results({}), path)["rows"] == nulls.margins(RUNS)["rows"]
    assert recorded_margins(results({}, machine={"cpu": "two", "cores": 2, "gpu": None}), path) == {}


def test_null_runs_are_written_and_read_by_name(tmp_path: Path) -> None:
    for number in (2, 1):
        nulls.write(tmp_path / f"{number:02}.json", RUNS[number])
    assert [run["base"]["run"] for run in nulls.read_folder(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sides: sides.pop("slow"), "has the sides base, head, slow"),
        (lambda sides: sides["head"].pop("run"), "side head: key 'run' is missing"),
        (lambda sides: sides["head"]["flags"].update(threads=1), "different machines"),
    ],
)
def test_bad_null_runs_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    change(sides := copy.deepcopy(RUNS[0]))
    nulls.write(tmp_path / "01.json", sides)
    with pytest.raises(BenchError, match=words):
        nulls.read_folder(tmp_path)


def test_no_null_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no null runs"):
        nulls.read_folder(tmp_path)
    with pytest.raises(BenchError, match="needs 8 or more"):
        nulls.simulate(RUNS[:7], RUNS)


def test_simulation_finds_the_slow_workloads_and_little_else_and_is_the_same_again() -> None:
    simulation = nulls.simulate(RUNS, RUNS, tables=25, seed=1)
    assert simulation.rows == dict.fromkeys(NOISY, 4)
    assert simulation.slowed == [(f"w{i}", "eager") for i in range(3)]
    assert simulation.failing <= 1 and simulation.all_found >= 24
    assert nulls.simulate(RUNS, RUNS, tables=25, seed=1) == simulation
    assert "all 3 rows found in" in nulls.report(simulation)


def test_simulation_counts_alarms_of_sides_that_are_not_equal() -> None:
    """If some runs' head is slow, tables drawn from them alarm: the count can fail."""
    runs = [
        run if index % 2 else run | {"head": run["slow"]}
        for index, run in enumerate(map(null_run, range(60)))
    ]
    biased = [run | {"head": run["slow"]} for run in runs[:3]] + [
        null_run(seed, process=0.003) for seed in range(17)
    ]
    simulation = nulls.simulate(biased, RUNS, tables=1, seed=seed_that_draws([0, 1, 2], 20))
    assert simulation.failing == 1 and simulation.regressions["steady"] == 1


def seed_that_draws(wanted: list[int], runs: int) -> int:
    """The first seed whose first table is made of these runs."""
    draws = lambda seed: sorted(random.Random(seed).sample(range(runs), len(wanted)))
    return next(seed for seed in range(100_000) if draws(seed) == wanted)


def test_a_run_judges_not_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The margins of each table are those of the runs that it was not drawn from."""
    counts = []
    original = nulls._combine
    monkeypatch.setattr(
        nulls, "_combine", lambda observed: counts.append(len(observed)) or original(observed)
    )
    nulls.simulate(RUNS, RUNS, tables=2, launches=3)
    assert counts == [17, 17]


def test_a_cell_that_fails_in_some_runs_is_an_alarm() -> None:
    runs = copy.deepcopy(RUNS)
    for run in runs:
        run["head"]["workloads"]["w3"]["cells"]["eager"] = bad_cell("crashed", "exit 139")
    assert nulls.simulate(runs, RUNS, tables=5).failing == 5
