"""Results files and what they say of machine, versions and revision. Entry points: `read`, `write`, `describe_*`."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BenchError

FORMAT, SCHEMA = "fxfunc-bench", 1
STATUSES = ("ok", "absent", "wrong", "failed", "crashed", "timeout", "interrupted")
PACKAGES = ("torch", "fxfunc", "triton", "jax", "numpy")
REQUIRED = {
    "run": str,
    "started": str,
    "complete": bool,
    "command": list,
    "flags": dict,
    "machine": dict,
    "versions": dict,
    "revision": dict,
    "workloads": dict,
}
OK_CELL = {
    "cold": list,
    "steady_s": list,
    "peak_bytes": list,
    "counters": dict,
}  # other statuses may lack them


def read(path: Path | str) -> dict[str, Any]:
    """The results in a file; raises BenchError for one that is missing, broken, foreign, of another schema or has bad figures."""
    content = load(path, FORMAT, SCHEMA)
    check(content, str(path))
    return content


def load(path: Path | str, form: str, schema: int) -> dict[str, Any]:
    """The JSON object in a file of ours, of this format and schema, its content unchecked."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path}: no such file") from None
    except json.JSONDecodeError as problem:
        raise BenchError(
            f"{path}: broken JSON at line {problem.lineno}, column {problem.colno} ({problem.msg}): write it again by a run"
        ) from None
    except UnicodeDecodeError:
        raise BenchError(f"{path}: not a text file: give a JSON file that `bench` wrote") from None
    except OSError as problem:
        raise BenchError(f"{path}: cannot be read: {problem.strerror}") from None
    _check_kind(content, str(path), form, schema)
    return content


def _check_kind(content: Any, path: str, form: str, schema: int) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if found != form:
        raise BenchError(
            f"{path}: foreign file: its format is {found!r}, not {form!r}: give one that `bench` wrote"
        )
    number = content.get("schema")
    if number != schema:
        newer = isinstance(number, int) and number > schema
        advice = "use the fxfunc that wrote it" if newer else "measure again"
        raise BenchError(f"{path}: schema {number!r}, but this fxfunc reads schema {schema}: {advice}")


def check(content: dict[str, Any], path: str) -> None:
    """Raises BenchError unless the content is a results file's; the text names workload, implementation and position."""
    _require(content, REQUIRED, path)
    _require(content["flags"], {"device": str, "threads": int}, f"{path}: flags")
    _require(content["machine"], {"cpu": str, "cores": int, "gpu": str | None}, f"{path}: machine")
    for name, workload in content["workloads"].items():
        _require(workload, {"cells": dict}, f"{path}: workload {name}")
        for implementation, cell in workload["cells"].items():
            _check_cell(cell, f"{path}: workload {name}, implementation {implementation}")
    _refuse_not_finite(content, path)


def _require(content: Any, kinds: dict[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise BenchError(f"{where}: {_short(content)} where an object belongs: measure again")
    for key, kind in kinds.items():
        if key not in content:
            raise BenchError(f"{where}: key {key!r} is missing: measure again")
        if not isinstance(content[key], kind):
            raise BenchError(f"{where}: {key} is {_short(content[key])}: measure again")


def _check_cell(cell: Any, where: str) -> None:
    _require(cell, {"status": str}, where)
    if cell["status"] not in STATUSES:
        raise BenchError(f"{where}: status {cell['status']!r} is none of {', '.join(STATUSES)}")
    _require(cell, OK_CELL if cell["status"] == "ok" else {}, where)
    _check_nesting(cell, where)
    for position, value, least in _figures(cell):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and (value >= 0 if least == 0 else value > 0)):
            wanted = "no number" if not number else "not finite" if not math.isfinite(value) else "too small"
            raise BenchError(f"{where}: {position} is {_short(value)}, {wanted}: measure again")


def _check_nesting(cell: dict[str, Any], where: str) -> None:
    """Launches hold turns and turns hold samples; a cold start has at least its first result."""
    for launch, turns in enumerate(cell.get("steady_s", [])):
        for turn, samples in enumerate(turns if isinstance(turns, list) else [turns]):
            if not (isinstance(turns, list) and isinstance(samples, list) and samples):
                raise BenchError(
                    f"{where}: steady_s[{launch}][{turn}] is {_short(samples)}, no list of samples: measure again"
                )
    for process, first in enumerate(cell.get("cold", [])):
        _require(first, {"first_s": int | float}, f"{where}: cold[{process}]")


def _figures(cell: dict[str, Any]) -> Iterator[tuple[str, Any, int | None]]:
    """Every figure of a cell: its position, its value, and 0 if it may be zero."""
    for key in ("steady_s", "warm_s", "load_s"):
        yield from ((position, value, None) for position, value in _leaves(cell.get(key, []), key))
    for key in ("peak_bytes", "counters"):
        yield from ((position, value, 0) for position, value in _leaves(cell.get(key, []), key))
    for position, value in _leaves(cell.get("cold", []), "cold"):
        if not (value is None and position.endswith("from_start_s")):
            yield position, value, 0 if ".stages_s." in position else None


def _leaves(value: Any, position: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested lists and objects, with its position."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{position}.{key}" if position else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{position}[{index}]")
    else:
        yield position, value


def _refuse_not_finite(content: Any, path: str) -> None:
    for position, value in _leaves(content, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise BenchError(f"{path}: {position} is {value}: a figure that is not there is null")


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 40 else f"{text[:37]}..."


def write(path: Path | str, content: dict[str, Any]) -> None:
    """Writes any of our JSON files whole or not at all, seconds to the nanosecond; raises BenchError for NaN and infinity."""
    _refuse_not_finite(content, str(path))
    write_text(Path(path), _text(content) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _text(value: Any, indent: str = "", seconds: bool = False) -> str:
    """JSON with a key a line, and lists of plain values on one line each."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        rows = (
            f"{json.dumps(str(key))}: {_text(item, inner, seconds or str(key).endswith('_s'))}"
            for key, item in value.items()
        )
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, list | tuple | dict) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner, seconds) for item in value) + f"\n{indent}]"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(item, seconds=seconds) for item in value)}]"
    return json.dumps(round(value, 9) if seconds and isinstance(value, float) else value)


def describe_machine() -> dict[str, Any]:
    """What a figure cannot be read without."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_versions() -> dict[str, str | None]:
    """Installed versions by the packages' metadata, which imports none of them; None for what is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_revision(root: Path | str) -> dict[str, Any]:
    """Commit of the checkout whose top folder is `root`, and whether tracked files differ from it; None if it is no checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(root).resolve():
        return {"commit": None, "dirty": None}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""}


def _git(root: Path | str, *arguments: str) -> str | None:
    """What git prints; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine_differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In words, where two results are of different machines or settings; figures are comparable if there is nothing."""
    pairs = [(key, a["machine"][key], b["machine"][key]) for key in ("cpu", "cores", "gpu")]
    pairs += [(key, a["flags"][key], b["flags"][key]) for key in ("device", "threads")]
    return [f"{key}: {left} and {right}" for key, left, right in pairs if left != right]


def same_machine(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether figures of two results files can be held against each other."""
    return not machine_differences(a, b)
