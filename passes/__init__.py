"""Graph to graph: derivatives, batching, algebra; knows nothing of backends."""

if __name__ != "fxfunc.passes":
    raise ImportError(f"import fxfunc.passes, not {__name__}: a second copy would hold tables of its own")
