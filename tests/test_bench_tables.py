"""fxfunc.bench.tables and fxfunc.bench.plot on results made by hand, and the README's table."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from fxfunc.bench import figures, records, tables
from fxfunc.bench.errors import BenchError

ROOT = Path(__file__).parent.parent
STATUSES = {  # what a cell that is not ok looks like in a table
    "absent": "-",
    "wrong": "wrong",
    "failed": "failed",
    "crashed": "crashed",
    "timeout": "timeout",
    "interrupted": "interrupted",
}


def cell(ms: float = 1.0, **changes) -> dict:
    """An ok cell whose median is `ms`, over two launches of two turns."""
    turns = [[ms / 1e3, 0.9 * ms / 1e3], [ms / 1e3, 1.2 * ms / 1e3]]
    return {
        "status": "ok",
        "reason": "",
        "error": 3.1e-7,
        "allowed": 1e-5,
        "cold": [{"first_s": s, "from_start_s": s + 4, "stages_s": {}} for s in (2.0, 9.0, 3.0)],
        "steady_s": [turns, turns],
        "warm_s": [0.5],
        "load_s": [],
        "artifact_bytes": None,
        "peak_bytes": [3 * 2**20],
        "counters": {"ops": 1480, "flops": 123},
        "why": {"load": "it saves no artifact"},
    } | changes


def bad(status: str, reason: str) -> dict:
    """A cell without figures."""
    empty = {key: [] for key in ("cold", "steady_s", "warm_s", "load_s", "peak_bytes")}
    return cell() | empty | {"status": status, "reason": reason, "error": None, "counters": {}, "why": {}}


def ours(ms: float) -> dict:
    stages = {"codegen": 0.05, "capture": 0.25, "zip": 0.01}
    cold = [{"first_s": 0.5, "from_start_s": None, "stages_s": stages}]
    changes = {"warm_s": [], "load_s": [0.0404], "counters": {"nodes captured": 617}}
    return cell(ms, cold=cold, why={"warm": "it keeps no cache on disk"}, **changes)


def make(workloads: dict) -> dict:
    return {
        "format": "fxfunc-bench",
        "schema": 1,
        "run": "abc",
        "started": "2026-11-24T20:00:00+00:00",
        "seconds": 512.3,
        "complete": True,
        "command": ["run", "--quick"],
        "flags": {"device": "cpu", "threads": 2},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 24.0, "gpu": None, "system": "Linux 6.1"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "jax": None},
        "revision": {"commit": "0123456789abcdef" * 2 + "01234567", "dirty": True},
        "load_average": [0.5, 1.25],
        "peaks": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "overhead_s": 9e-8,
        "imports_s": {"torch": 3.3},
        "workloads": workloads,
    }


@pytest.fixture
def results() -> dict:
    """Two workloads; the first is limited by flops (0.1 ms), the second by bytes (0.2 ms)."""
    first = {
        "torch.func": cell(25),
        "inductor": cell(4),
        "jax": bad("wrong", "error 1.0e-01, allowed 1.0e-05"),
        "inductor-fxfunc": cell(3),
        "eager": ours(8),
        "cpp": ours(0.5),
    }
    second = {
        "torch.func": cell(1200),
        "inductor": bad("timeout", "no answer in 300 s | killed"),
        "jax": bad("wrong", "error 1.0e-01, allowed 1.0e-05"),
        "eager": ours(600),
        "cpp": bad("absent", "fxfunc has no backend 'cpp' yet"),
    }
    return make(
        {
            "maml25": {"flops": 10**7, "bytes": 1000, "cells": first},
            "psg28": {"flops": 1000, "bytes": 2 * 10**6, "cells": second},
        }
    )


SHAPES = {
    "no workloads": lambda: make({}),
    "a workload without cells": lambda: make({"jac": {"cells": {}}}),
    "one cell": lambda: make({"jac": {"flops": None, "bytes": None, "cells": {"eager": cell()}}}),
    "nothing but what is required": lambda: {"workloads": {"jac": {"cells": {"jax": {"status": "ok"}}}}},
    "an unknown implementation": lambda: make({"jac": {"flops": 1, "bytes": 1, "cells": {"mlir": cell()}}}),
    "interrupted": lambda: make({"jac": {"flops": None, "bytes": None, "cells": {"jax": bad("interrupted", "not reached")}}})
    | {"complete": False, "peaks": {}, "overhead_s": None, "imports_s": {}},
    **{f"all {status}": lambda status=status: make({"jac": {"cells": {"jax": bad(status, "why")}}}) for status in STATUSES},
}  # fmt: skip


def read_github(text: str) -> list[list[str]]:
    """Rows of the GitHub table at the start of a text, the header first; fails unless it is one."""
    lines = text.split("\n\n")[0].splitlines()
    rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert re.fullmatch(r"(\|:?-+:?)+\|", lines[1])
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


def row_of(table, results: dict, *names: str) -> dict[str, str]:
    """The row that starts with these names, by column."""
    header, *rows = read_github(table(results, "github"))
    (row,) = [row for row in rows if row[: len(names)] == list(names)]
    return dict(zip(header, row, strict=True))


# ----- tables ---------------------------------------------------------------------------------------------------------


def test_steady_medians_ratios_to_the_best_peer_and_share_of_the_limit(results):
    assert row_of(tables.steady_table, results, "maml25") == {
        "workload": "maml25", "torch.func": "25.0", "inductor": "4.00", "jax": "wrong", "inductor-fxfunc": "3.00",
        "eager": "8.00", "cpp": "0.500", "best peer": "inductor", "eager x": "0.500", "cpp x": "8.00", "% of limit": "20.0",
    }  # fmt: skip
    assert row_of(tables.steady_table, results, "psg28") == {
        "workload": "psg28", "torch.func": "1,200", "inductor": "timeout", "jax": "wrong", "inductor-fxfunc": "-",
        "eager": "600", "cpp": "-", "best peer": "torch.func", "eager x": "2.00", "cpp x": "-", "% of limit": "0.0333",
    }  # fmt: skip


@pytest.mark.parametrize("status, word", STATUSES.items())
def test_what_is_not_ok_is_a_word_and_its_figures_do_not_count(results, status, word):
    results["workloads"]["maml25"]["cells"]["inductor"] |= {"status": status, "reason": "why"}
    row = row_of(tables.steady_table, results, "maml25")
    assert row["inductor"] == word
    assert row["best peer"] == "torch.func" and row["cpp x"] == "50.0"
    assert row_of(tables.memory_table, results, "maml25")["inductor"] == word
    assert "maml25" in tables.notes(results) and f"{word} why: inductor (maml25)" in tables.notes(results)


def test_interval_and_range_of_each_cell(results):
    row = row_of(tables.detail_table, results, "maml25", "inductor")
    assert row["median ms"] == "4.00" and row["min"] == "3.60" and row["max"] == "4.80"
    assert row["samples"] == "8" and row["launches"] == "2"
    low, high = (float(end) for end in row["95% interval"].split(" .. "))
    assert 3.6 <= low <= 4.0 <= high <= 4.8
    assert "jax" not in tables.detail_table(results)  # neither of its cells is ok


def test_first_results_with_their_stages(results):
    row = row_of(tables.cold_table, results, "maml25", "cpp")
    assert list(row) == [
        "workload", "implementation", "first result", "capture", "codegen", "zip", "from start", "warm cache", "artifact",
    ]  # fmt: skip
    assert list(row.values())[2:] == ["0.500", "0.250", "0.050", "0.010", "-", "-", "0.040"]
    row = row_of(tables.cold_table, results, "maml25", "inductor")
    assert list(row.values())[2:] == ["3.00", "-", "-", "-", "7.00", "0.500", "-"]
    assert row_of(tables.cold_table, results, "psg28", "jax")["first result"] == "wrong"


def test_memory_and_counters(results):
    assert row_of(tables.memory_table, results, "maml25")["eager"] == "3.00"
    assert list(row_of(tables.counter_table, results, "maml25", "torch.func").items())[2:] == [
        ("ops", "1,480"), ("flops", "123"), ("nodes captured", "-"), ("error", "3.1e-07"), ("allowed", "1.0e-05"),
    ]  # fmt: skip
    assert row_of(tables.counter_table, results, "maml25", "cpp")["nodes captured"] == "617"


def test_notes_give_one_line_a_reason(results):
    lines = tables.notes(results).splitlines()
    assert "wrong error 1.0e-01, allowed 1.0e-05: jax (all workloads)" in lines
    assert "- fxfunc has no backend 'cpp' yet: cpp (psg28)" in lines
    assert "- not part of this run: inductor-fxfunc (psg28)" in lines
    assert (
        "- no first result with a warm cache: it keeps no cache on disk: eager (all workloads); cpp (maml25)"
        in lines
    )
    assert len({line.rpartition(": ")[0] for line in lines}) == len(lines)


def test_notes_say_what_figures_depend_on(results):
    text = tables.notes(results)
    for part in (
        "AMD EPYC, 2 cores, 24 GiB, Linux 6.1, measured on cpu, 2 threads, load average 0.50 before and 1.25 after",
        "python 3.11.7, torch 2.13.0, jax none",
        "2026-11-24T20:00:00+00:00, 512 s, revision 0123456789ab with uncommitted changes, bench run --quick",
        "100 Gflop/s (sgemm), 10.0 GB/s (stream)",
        "90.0 ns a sample, 0.018% of the shortest median (maml25, cpp: 500 us)",
    ):
        assert part in text
    assert "interrupted" not in text
    assert "interrupted" in tables.notes(results | {"complete": False})


def test_rows_without_peers_or_peaks_say_so(results):
    for entry in results["workloads"].values():
        entry["cells"] = {"eager": entry["cells"]["eager"]}
    results["peaks"] = {}
    row = row_of(tables.steady_table, results, "maml25")
    assert row["best peer"] == row["eager x"] == row["% of limit"] == "-"
    assert "- no ratio: no peer has a figure: all workloads" in tables.notes(results)
    assert (
        "- no limit: the workload's flops and bytes or the machine's peaks are not known: all workloads"
        in tables.notes(results)
    )


@pytest.mark.parametrize("format", ["plain", "github"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_that_are_missing_leave_the_rest(shape, format):
    results = SHAPES[shape]()
    before = copy.deepcopy(results)
    text = tables.report(results, format)
    assert results == before
    assert all(title in text for title, _ in tables.TABLES)
    for name in results["workloads"]:
        assert name in text
    if format == "github":
        for _, table in tables.TABLES:
            assert len(read_github(table(results, format))) >= 1


def test_bars_in_reasons_do_not_break_lists(results):
    results["workloads"] = {"a|b": results["workloads"]["maml25"]}
    assert row_of(tables.steady_table, results, r"a\|b")["eager"] == "8.00"


@pytest.mark.parametrize(
    "value, text",
    [
        (0.02914, "0.0291"),
        (0.9996, "1.000"),
        (1.0, "1.00"),
        (99.96, "100.0"),
        (1234.5, "1,230"),
        (0, "0"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert tables._number(value) == text


# ----- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_block_has_the_row_of_each_workload(results):
    text = tables.readme_table(results, "bench/results/x.json")
    first, *lines, _, provenance, last = text.splitlines()
    assert first == "<!-- bench: from bench/results/x.json -->" and last == "<!-- /bench -->"
    header, maml, psg = read_github("\n".join(lines))
    assert maml == [
        "maml25", "25.0", "4.00 (inductor)", "wrong", "0.500 (cpp)", "8.00 (inductor)", "0.500", "-", "3.00", "wrong",
    ]  # fmt: skip
    assert psg == [
        "psg28", "1,200", "timeout", "wrong", "600 (eager)", "2.00 (torch.func)", "0.500", "-", "timeout", "wrong",
    ]  # fmt: skip
    assert provenance.startswith("Measured 2026-11-24 on AMD EPYC, 2 threads; python 3.11.7, torch 2.13.0.")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_readme_block_is_made_of_any_results(shape):
    lines = tables.readme_table(SHAPES[shape](), "x.json").splitlines()
    assert read_github("\n".join(lines[1:-3]))


def test_update_rewrites_the_block_and_nothing_else(results, tmp_path):
    readme, file = tmp_path / "README.md", tmp_path / "data" / "x.json"
    records.write(file, results)
    readme.write_text("before\n<!-- bench: from old.json -->\nold\n<!-- /bench -->\nafter\n")
    tables.update_readme(readme, file)
    text = readme.read_text()
    assert text == f"before\n{tables.readme_table(results, 'data/x.json')}\nafter\n"
    tables.update_readme(readme, file)
    assert readme.read_text() == text


BLOCK = "<!-- bench: from x.json -->\n<!-- /bench -->\n"


@pytest.mark.parametrize("text", ["no block", BLOCK + BLOCK, "<!-- bench: from x.json -->"])
def test_a_readme_without_one_block_is_refused_and_kept(results, tmp_path, text):
    readme, file = tmp_path / "README.md", tmp_path / "x.json"
    records.write(file, results)
    readme.write_text(text)
    with pytest.raises(BenchError, match="blocks: write the lines"):
        tables.update_readme(readme, file)
    assert readme.read_text() == text


def test_results_that_readers_cannot_find_are_refused(results, tmp_path):
    (tmp_path / "repository").mkdir()
    readme, file = tmp_path / "repository" / "README.md", tmp_path / "x.json"
    records.write(file, results)
    readme.write_text(BLOCK)
    with pytest.raises(BenchError, match="commit it there"):
        tables.update_readme(readme, file)


def test_the_readme_shows_what_the_committed_file_says():
    text = (ROOT / "README.md").read_text()
    begin, end = tables.block(text, "README.md")
    (source,) = re.findall(r"<!-- bench: from (\S+) -->", text)
    assert text[begin:end] == tables.readme_table(records.read(ROOT / source), source)


# ----- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plot():
    return pytest.importorskip(
        "fxfunc.bench.plot", reason="the pictures need matplotlib", exc_type=ImportError
    )


def drawn_text(svg: Path) -> str:
    """All words of a picture, whose text is kept as text."""
    return " ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(), re.S))


def test_bars_of_time_and_memory(results, tmp_path, plot):
    paths = plot.plot(results, tmp_path / "new")
    assert [path.name for path in paths] == ["steady.png", "steady.svg", "memory.png", "memory.svg"]
    for svg, quantity in (
        (paths[1], "steady time a call (ms, log scale)"),
        (paths[3], "peak memory (MiB, log scale)"),
    ):
        text = drawn_text(svg)
        for part in (
            quantity,
            "maml25",
            "psg28",
            "torch.func",
            "fxfunc cpp",
            "AMD EPYC, 2 threads, 2026-11-24",
        ):
            assert part in text
        assert "Not drawn: timeout: inductor (psg28); wrong: jax (maml25, psg28)." in text
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[::2])


def test_a_wrong_answer_is_not_drawn(results, plot):
    results["workloads"]["maml25"]["cells"]["cpp"]["status"] = "wrong"
    figure = plot.bars(results, results["workloads"], "Time", "s", plot.steady_s)
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["torch.func", "inductor", "inductor-fxfunc", "fxfunc eager"]


def test_pictures_are_the_same_at_every_call(results, tmp_path, plot):
    first, second = (plot.plot(results, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_scaling_with_a_parameter(results, tmp_path, plot):
    entry = results["workloads"]["maml25"]
    scaled = {f"maml25[tasks={n}]": copy.deepcopy(entry) for n in (1000, 1, 10)}
    steps = {f"maml25[steps={n}]": copy.deepcopy(entry) for n in (1, 500)}
    results["workloads"] = scaled | steps | {"psg8[batch=3]": entry}
    paths = plot.plot(results, tmp_path)
    assert {path.stem for path in paths} == {"steady", "memory", "maml25-tasks", "maml25-steps"}
    assert "maml25" not in drawn_text(tmp_path / "steady.svg").replace("Not drawn", "")
    assert "psg8[batch=3]" in drawn_text(tmp_path / "steady.svg")  # one point is no line
    for part in (
        "maml25: time against tasks",
        "steady time a call (ms)",
        "first result, fresh process (s)",
        "1,000",
    ):
        assert part in drawn_text(tmp_path / "maml25-tasks.svg")
    assert "inner steps" in drawn_text(tmp_path / "maml25-steps.svg")
    points = plot.scaling(results)[("maml25", "tasks")]
    assert list(points) == [1, 10, 1000]


def test_lines_follow_the_figures(results, plot):
    entry = results["workloads"]["maml25"]
    points = {1: entry, 10: results["workloads"]["psg28"]}
    steady, cold = plot.lines(results, "maml25", "tasks", points).axes
    lines = {line.get_label(): [list(line.get_xdata()), list(line.get_ydata())] for line in steady.lines}
    assert lines["torch.func"] == [[1, 10], [25, 1200]]
    assert lines["inductor"] == [[1], [4]]
    assert {line.get_label(): list(line.get_ydata()) for line in cold.lines}["fxfunc eager"] == [0.5, 0.5]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_cannot_be_drawn_is_said(shape, tmp_path, plot):
    results = SHAPES[shape]()
    if any(figures.steady_s(c) for _, _, c in figures.cells(results)):
        assert len(plot.plot(results, tmp_path)) == 4
    else:
        with pytest.raises(BenchError, match="nothing to draw"):
            plot.plot(results, tmp_path)


def test_the_hand_made_results_are_a_results_file(results, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(results))
    assert records.read(tmp_path / "x.json") == results
