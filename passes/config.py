"""Every FXFUNC_* flag, one row each, read from the environment at import."""

from __future__ import annotations

import os

# FXFUNC_DUMP=dir: write the graph after every transform and pass there, and the source of every program and kernel.
DUMP: str | None = os.environ.get("FXFUNC_DUMP") or None
# FXFUNC_DEBUG=n: 2 verifies the graph after every transform and pass and prints its size, 3 prints the graph, 4 sources too.
DEBUG: int = int(os.environ.get("FXFUNC_DEBUG") or 0)
VERIFY: bool = DEBUG >= 2  # the tests switch it on
# FXFUNC_REROLL=n: a Python loop of n steps or more that are alike becomes a scan (passes/reroll.py). The eager backend runs
# maml25's meta-gradient as a scan at 1.07 (5 steps) and 1.01 (20 steps) times its unrolled form, which shares more of step 1.
REROLL: int = int(os.environ.get("FXFUNC_REROLL") or 4)
