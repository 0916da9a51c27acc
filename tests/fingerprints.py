"""Which rules differ from those of another revision. Entry point: `changed_since`.

A rule's fingerprint is its code: bytecode and constants, what it closes over, and the functions of ours that it calls by
name. So a row counts as changed wherever its op is written, in a loop over ops too, and when a helper of it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fxfunc", "passes", "codegen")


def fingerprint(x, seen: frozenset = frozenset()) -> str:
    """A hash of a rule, or of something that it reads."""
    if isinstance(x, types.CodeType):
        parts = [x.co_code.hex(), *x.co_names, *(fingerprint(c, seen) for c in x.co_consts)]
    elif isinstance(x, types.FunctionType):
        if x.__code__ in seen:
            return "again"
        seen |= {x.__code__}
        used = [x.__globals__.get(name) for name in _names(x.__code__)]
        cells = [c.cell_contents for c in x.__closure__ or ()]
        called = [f for f in used if isinstance(f, types.FunctionType) and ".rules." in f.__module__]
        parts = [fingerprint(p, seen) for p in (x.__code__, *cells, *(x.__defaults__ or ()), *called)]
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = [fingerprint(getattr(x, f.name), seen) for f in dataclasses.fields(x)]
    elif isinstance(x, (list, tuple)):
        parts = ["(", *(fingerprint(y, seen) for y in x), ")"]
    else:
        parts = [type(x).__name__, str(x).split(" at 0x")[0]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _names(code: types.CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


def fingerprints() -> dict[str, str]:
    """Those of the tables of the fxfunc that is imported."""
    from fxfunc.passes import batch, jvp, transpose
    from fxfunc.passes.rules import ROWS

    tables = {"ROWS": ROWS, "LOWER": batch.LOWER}
    tables |= {f"SPECIAL {m.__name__.split('.')[-1]}": m.SPECIAL for m in (jvp, transpose, batch)}
    return {f"{name} {op}": fingerprint(rule) for name, rules in tables.items() for op, rule in rules.items()}


def changed_since(revision: str) -> set[str]:
    """The entries, as "table op", that are new here or differ from those at the merge base with a revision."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True).stdout
    base = git("merge-base", revision, "HEAD").decode().strip()
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as here:
        with tarfile.open(fileobj=io.BytesIO(git("archive", base, *PACKAGES))) as tree:
            tree.extractall(there, filter="data")
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(here) / package)
        before, now = _of_tree(there), _of_tree(here)
    return {name for name, found in now.items() if before.get(name) != found}


def _of_tree(tree: str) -> dict[str, str]:
    """The fingerprints of a checkout, computed in a process of its own."""
    for package in PACKAGES[1:]:
        (Path(tree) / "fxfunc" / package).symlink_to(Path(tree) / package)
    program = (
        "import sys, json; sys.path[:0] = sys.argv[1:]; import fingerprints, fxfunc.passes;"
        "assert fxfunc.passes.__file__.startswith(sys.argv[1]), fxfunc.passes.__file__;"
        "print(json.dumps(fingerprints.fingerprints()))"
    )
    command = [sys.executable, "-c", program, tree, str(ROOT / "tests")]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=tree).stdout)
