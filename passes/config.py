"""Every FXFUNC_* flag, one row each, read from the environment at import."""

from __future__ import annotations

import os

# FXFUNC_DUMP=dir: write the graph after every pass and every kernel's source there.
DUMP: str | None = os.environ.get("FXFUNC_DUMP") or None
# FXFUNC_DEBUG=n: 1 prints choices and fallbacks, 2 passes too and verifies every graph, 3 graphs, 4 kernels.
DEBUG: int = int(os.environ.get("FXFUNC_DEBUG") or 0)
VERIFY: bool = DEBUG >= 2  # the tests switch it on
