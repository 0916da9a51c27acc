"""Graph to graph: derivatives, batching, algebra; knows nothing of backends."""

if __name__ != "fxfunc.passes":
    raise ImportError(f"import this package as fxfunc.passes, not as {__name__}: a second copy would have tables of its own")
