"""Graph to loop IR to kernels to a callable."""

if __name__ != "fxfunc.codegen":
    raise ImportError(f"import fxfunc.codegen, not {__name__}: a second copy would hold tables of its own")
