"""Which tier answers for an op. Entry points: `tiers`, and `python -m fxfunc coverage`.

native: a row of ours. composite: a row that writes the op with others. decomposed: ATen writes it with others. derived:
PyTorch's formula for that one op, or its decomposition if there is none. loop: one example at a time. missing: MissingRule.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator

import torch

from fxfunc.passes.graph import is_random
from fxfunc.passes.rules import ROWS
from fxfunc.passes.spellings import CANONICAL

COLUMNS = ("jvp", "transpose", "batch")


def core_ops() -> list[torch._ops.OpOverload]:
    """The functional overloads that PyTorch tags as core ATen."""
    return [op for op in _overloads() if torch.Tag.core in op.tags]


def _overloads() -> Iterator[torch._ops.OpOverload]:
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    for name in names:
        packet, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if op is not None and not op._schema.is_mutable:
            yield op


def tiers(op: torch._ops.OpOverload) -> dict[str, str]:
    """Of each of jvp, transpose and batch the tier that answers; "-" for a transpose that no tangent program asks for."""
    row = ROWS.get(op)
    if op in CANONICAL and row is None:
        return dict.fromkeys(COLUMNS, "native")
    below = (
        "composite" if row is not None and row.composite else "decomposed" if op._can_decompose() else None
    )
    formula = "missing" if is_random(op) else "derived"
    found = {name: "native" if row is not None and getattr(row, name) else below for name in COLUMNS}
    if found["transpose"] is None:
        found["transpose"] = "-" if found["jvp"] == "native" else formula
    found["jvp"] = found["jvp"] or formula
    batched = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "FuncTorchBatched")
    found["batch"] = found["batch"] or ("missing" if is_random(op) else "derived" if batched else "loop")
    return found


def main(arguments: list[str]) -> int:
    """Prints op x {jvp, transpose, batch}, and counts."""
    parser = argparse.ArgumentParser(prog="python -m fxfunc coverage", description=__doc__)
    parser.add_argument("names", nargs="*", help="only overloads whose name contains one of these")
    parser.add_argument("--all", action="store_true", help="all of ATen, not only its core")
    parser.add_argument("--format", choices=["plain", "github"], default="plain")
    options = parser.parse_args(arguments)
    from tabulate import tabulate

    ops = list(_overloads()) if options.all or options.names else core_ops()
    chosen = [op for op in ops if not options.names or any(name in str(op) for name in options.names)]
    lines = [(str(op), *tiers(op).values()) for op in chosen]
    print(tabulate(lines, ("op", *COLUMNS), tablefmt=options.format))
    for i, column in enumerate(COLUMNS, 1):
        counts = Counter(line[i] for line in lines)
        print(f"{column}: " + ", ".join(f"{n} {tier}" for tier, n in counts.most_common()))
    return 0 if lines else 2
