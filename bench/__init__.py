"""Measuring: workloads, implementations, tables."""

if __name__ != "fxfunc.bench":
    raise ImportError(f"import this package as fxfunc.bench, not as {__name__}: a second copy would have tables of its own")
