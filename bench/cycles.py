"""A guess of how long a kernel of tasks takes on an H200, from its instructions. Entry point: `predict`.

It is there to be held against measurements. The cubin is disassembled; an instruction counts once for each step of the loops
around it, whose lengths are those of the source. The assumptions are those of a prototype's estimate: 132 processors at 1.98 GHz
with four schedulers, which issue an instruction of a warp a cycle with an efficiency of 0.6; 60 cycles a barrier where a program
is alone on its processor; conversions between widths 8 cycles on their own pipe. As many programs run at once as registers and
shared memory allow.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fxfunc.codegen.launch import Binary

PROCESSORS, HERTZ, SCHEDULERS, EFFICIENCY = 132, 1.98e9, 4, 0.6
BARRIER, CONVERSION = 60, 8
REGISTERS, SHARED = 65536, 227 * 1024


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a kernel that runs `tasks` tasks: instructions of a warp a task, barriers a task, and seconds for all."""

    instructions: int
    barriers: int
    seconds: float


def predict(b: Binary, tasks: int) -> Prediction | None:
    """The guess, or None if the loops of the code are not those of the source (the compiler unrolled one)."""
    code, jumps = disassembled(b.cubin)
    trips = _trips(b.source)
    loops = sorted((start, end) for start, end in jumps if end - start > 1)
    if len(loops) != len(trips):
        return None
    weights = [1] * len(code)
    for (start, end), count in zip(loops, trips, strict=True):
        for i in range(start, end + 1):
            weights[i] *= count
    total = lambda *kinds: sum(
        w for w, op in zip(weights, code, strict=True) if not kinds or op.split(".")[0] in kinds
    )
    instructions, barriers = total() - total("NOP"), total("BAR")
    here = max(
        1, min(REGISTERS // (b.regs * 32 * b.warps), SHARED // max(1, b.smem))
    )  # programs on a processor
    share = max(1, min(here, -(-tasks // PROCESSORS)))
    warps = b.warps / SCHEDULERS
    issue = max(instructions * warps / EFFICIENCY, total("F2F") * warps * CONVERSION) * share
    cycles = issue + barriers * BARRIER / share  # another program fills the wait
    return Prediction(instructions, barriers, cycles * -(-tasks // (PROCESSORS * share)) / HERTZ)


def disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """The opcodes of a kernel in order, and the jumps back: to which instruction, from which."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[str, int]] = []
    for line in text.splitlines():
        if m := re.match(r"(\.L_x_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)(.*)", line):
            if m[1].startswith("BRA") and (to := re.search(r"`\((\.L_x_\d+)\)", m[2])):
                jumps.append((to[1], len(code)))
            code.append(m[1])
    return code, [(labels[to], at) for to, at in jumps if labels.get(to, at + 1) <= at]


def _trips(source: str) -> Sequence[int]:
    """How often each loop of a source runs, in order; those over tasks once, being a task's cost."""
    found = []
    for numbers in re.findall(r"^ +for \w+ in range\((.*)\):$", source, re.M):
        if "program" in numbers:
            found.append(1)
            continue
        parts = [int(n) for n in numbers.split(",")]
        found.append(len(range(*parts)))
    return found
