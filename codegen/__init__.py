"""Graph to loop IR to kernels to a callable."""

if __name__ != "fxfunc.codegen":
    raise ImportError(f"import this package as fxfunc.codegen, not as {__name__}: a second copy would have tables of its own")
