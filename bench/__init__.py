"""Measuring: workloads, implementations, tables."""

if __name__ != "fxfunc.bench":
    raise ImportError(f"import fxfunc.bench, not {__name__}: a second copy would hold tables of its own")

from .errors import BenchError as BenchError
from .registry import workload as workload
