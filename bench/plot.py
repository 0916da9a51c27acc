"""Pictures of a results file. Entry point: `plot`. The only module that imports matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .errors import BenchError
from .figures import (
    Cell,
    Entry,
    Results,
    cell_of,
    cells,
    first_s,
    implementations,
    peak_bytes,
    steady_s,
    workloads,
)
from .implementations import OURS

# Okabe and Ito, "Color Universal Design" (2008), and a grey; an implementation has its colour in every picture.
COLOURS = {
    "torch.func": "#999999",
    "make_fx": "#F0E442",
    "torch.compile": "#E69F00",
    "inductor": "#D55E00",
    "inductor-fxfunc": "#CC79A7",
    "jax": "#009E73",
    "uncompiled": "#666666",
    "eager": "#56B4E9",
    "cpp": "#0072B2",
    "triton": "#000000",
    "torch.compile-graphs": "#A65628",
    "triton-graph": "#444444",
}
MARKERS = "osD^vP*Xh"
STYLE: Any = {"svg.hashsalt": "fxfunc", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}
SCALED = r"(.+)\[(\w+)=(\d+)\]"
EDGE: Any = {"edgecolor": "black", "linewidth": 0.3}
AXES = {"tasks": "tasks", "steps": "inner steps"}

Measure = Callable[[Cell | None], float | None]
Points = dict[int, Entry]


def plot(results: Results, folder: Path) -> list[Path]:
    """Writes steady time and peak memory by workload, and time against each parameter that two workloads or more vary.

    Gives the paths, a PNG and an SVG each; the same results give the same files. Raises BenchError if nothing can be drawn.
    """
    grouped = scaling(results)
    scaled = {id(entry) for points in grouped.values() for entry in points.values()}
    entries = {name: entry for name, entry in workloads(results) if id(entry) not in scaled}
    with matplotlib.rc_context(STYLE):
        figures = {
            "steady": bars(
                results, entries, "Steady time a call", "ms", lambda cell: scaled_by(1e3, steady_s(cell))
            ),
            "memory": bars(
                results, entries, "Peak memory", "MiB", lambda cell: scaled_by(2**-20, peak_bytes(cell))
            ),
        } | {f"{base}-{key}": lines(results, base, key, points) for (base, key), points in grouped.items()}
        paths = [path for name, figure in figures.items() if figure for path in save(figure, folder / name)]
    if not paths:
        raise BenchError("nothing to draw: no workload of these results has a figure")
    return paths


def scaling(results: Results) -> dict[tuple[str, str], Points]:
    """Workloads named `base[key=n]`, by base and key, in order of n; only where there are two or more."""
    found: dict[tuple[str, str], Points] = {}
    for name, entry in workloads(results):
        if match := re.fullmatch(SCALED, name):
            found.setdefault((match[1], match[2]), {})[int(match[3])] = entry
    return {key: dict(sorted(points.items())) for key, points in found.items() if len(points) > 1}


def bars(
    results: Results, entries: dict[str, Entry], what: str, unit: str, measure: Measure
) -> Figure | None:
    """A group of bars a workload, one an implementation, on a log axis; None if there is no figure."""
    heights = {
        name: [measure(cell_of(e, name)) or nan for e in entries.values()]
        for name in implementations(results)
    }
    drawn = {name: found for name, found in heights.items() if not all(map(isnan, found))}
    if not drawn:
        return None
    size = (max(6.5, 1.2 + 0.09 * len(entries) * (len(drawn) + 1.5)), 4.8)
    figure = Figure(figsize=size, layout="constrained")
    axes, width = figure.add_subplot(), 0.86 / len(drawn)
    for i, (name, found) in enumerate(drawn.items()):
        places = [x + (i + 0.5) * width - 0.43 for x in range(len(entries))]
        axes.bar(places, found, width, label=label(name), color=colour(name), **EDGE)
    axes.set_xticks(range(len(entries)), entries, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(entries) - 0.4)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(height for found in drawn.values() for height in found if height > 0))
    dress(axes, results, f"{what} by workload", f"{what.lower()} ({unit}, log scale)")
    caption(figure, left_out(results, entries))
    return figure


def lines(results: Results, base: str, key: str, points: Points) -> Figure | None:
    """Steady and cold time against a parameter, both axes logarithmic; None if there is no figure."""
    steady, cold = "steady time a call (ms)", "first result, fresh process (s)"
    panels: dict[str, tuple[float, Measure]] = {steady: (1e3, steady_s), cold: (1.0, first_s)}
    drawn = [name for name in implementations(results) if any(map(has_figure(name), points.values()))]
    if not drawn:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(headline(results, f"{base}: time against {AXES.get(key, key)}"), fontsize=10)
    for axes, (quantity, (scale, measure)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for i, name in enumerate(drawn):
            found = [(n, scaled_by(scale, measure(cell_of(entry, name)))) for n, entry in points.items()]
            xs, ys = [n for n, y in found if y], [y for _, y in found if y]
            axes.plot(xs, ys, label=label(name), color=colour(name), marker=MARKERS[i % len(MARKERS)], markersize=5,
                      markeredgecolor="black", markeredgewidth=0.4)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=AXES.get(key, key), ylabel=quantity)
        axes.set_xticks(list(points), [f"{n:,}" for n in points], minor=False)
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    caption(figure, left_out(results, {f"{base}[{key}={n}]": entry for n, entry in points.items()}))
    return figure


def dress(axes: Axes, results: Results, title: str, quantity: str) -> None:
    """Title, axis, grid and legend of bars."""
    axes.set_title(headline(results, title), fontsize=10)
    axes.set_ylabel(quantity)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=min(len(labels), 9))


def headline(results: Results, title: str) -> str:
    """The title over machine, threads and date."""
    machine, flags = results.get("machine") or {}, results.get("flags") or {}
    device = machine.get("gpu") if flags.get("device") == "cuda" else machine.get("cpu")
    threads = f"{flags['threads']} threads" if "threads" in flags else None
    parts = [device, threads, str(results.get("started") or "")[:10]]
    return "\n".join([title, ", ".join(part for part in parts if part)])


def left_out(results: Results, entries: dict[str, Entry]) -> str:
    """What is not drawn because it has no figure that could be trusted, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for workload, name, cell in cells(results):
        if workload in entries and cell["status"] not in ("ok", "absent"):
            found.setdefault((cell["status"], name), []).append(workload)
    said = "; ".join(
        f"{status}: {label(name)} ({', '.join(at)})" for (status, name), at in sorted(found.items())
    )
    return f"Not drawn: {said}." if said else ""


def caption(figure: Figure, text: str) -> None:
    """A line under the axes."""
    if text:
        figure.supxlabel(text, fontsize=8, x=0.01, ha="left", wrap=True)


def save(figure: Figure, stem: Path) -> list[Path]:
    """The picture as PNG and SVG, with nothing in them that differs between runs."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    figure.savefig(png, dpi=150, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


def label(name: str) -> str:
    """Of a backend of ours, with our name."""
    return f"fxfunc {name}" if name in OURS else name


def colour(name: str) -> str:
    """That of the implementation; one that is not known shares the last grey."""
    return COLOURS.get(name, "#DDDDDD")


def has_figure(name: str) -> Callable[[Entry], bool]:
    """Whether an entry has a time of the implementation."""
    return lambda entry: bool(steady_s(cell_of(entry, name)) or first_s(cell_of(entry, name)))


def scaled_by(factor: float, value: float | None) -> float | None:
    """None stays None."""
    return None if value is None else factor * value
