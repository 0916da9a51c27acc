"""Exercises an installed fxfunc away from its checkout: `python -I smoke.py PREFIX`, where it must lie."""

import pathlib
import sys
import tempfile

import torch

import fxfunc


def check_installed(prefix: str) -> None:
    """The package, with the folders mapped under it, comes from PREFIX and not from a checkout."""
    import fxfunc.bench
    import fxfunc.codegen
    import fxfunc.passes

    for module in (fxfunc, fxfunc.passes, fxfunc.codegen, fxfunc.bench):
        assert pathlib.Path(module.__file__).is_relative_to(prefix), f"at {module.__file__}"
    assert (pathlib.Path(fxfunc.__file__).parent / "py.typed").exists(), "py.typed is not in the wheel"


def check_works() -> None:
    """A nested transform, uncompiled and from a saved artifact, gives the closed-form answer."""
    x = torch.linspace(-1, 1, 5)
    second = fxfunc.vmap(fxfunc.grad(fxfunc.grad(torch.sin)))
    torch.testing.assert_close(second(x), -x.sin())
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/second.zip"
        fxfunc.jit(second).lower(x).compile(backend="eager").save(path)
        torch.testing.assert_close(fxfunc.load(path)(x), -x.sin())


if __name__ == "__main__":
    check_installed(sys.argv[1])
    check_works()
    print("the installed package works")
