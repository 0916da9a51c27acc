"""Imports point down only, `fxfunc -> codegen -> passes -> torch`, and `import fxfunc` brings in torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxfunc

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "fxfunc": "fxfunc",
    "passes": "fxfunc.passes",
    "codegen": "fxfunc.codegen",
    "bench": "fxfunc.bench",
}
BELOW = {"passes": {"passes"}, "codegen": {"passes", "codegen"}, "fxfunc": {"passes", "codegen", "fxfunc"}}
OTHERS = {
    "passes": {"torch"},
    "codegen": {"torch", "triton"},
    "fxfunc": {"torch", "functorch"},
}  # functorch comes with torch


def modules() -> dict[str, Path]:
    """Every module of the project by its full name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()
COMMAND_LINES = {"fxfunc.__main__", "fxfunc.coverage"}  # above all layers, imported by none but each other


def layer(module: str) -> str:
    """The folder that a module lives in."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in PACKAGES and second != "fxfunc" else "fxfunc"


def imported(name: str, path: Path) -> set[str]:
    """The full names of the modules that the source of a module imports, anywhere in it."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {base}
    return found


@pytest.mark.parametrize(
    "name", [name for name in MODULES if layer(name) != "bench" and name not in COMMAND_LINES]
)
def test_a_module_imports_only_from_its_layer_and_below(name):
    folder = layer(name)
    for target in imported(name, MODULES[name]):
        if target.split(".")[0] == "fxfunc":
            assert layer(target) in BELOW[folder], f"{name} imports {target}"
        else:
            assert target.split(".")[0] in OTHERS[folder] | sys.stdlib_module_names, (
                f"{name} imports {target}"
            )


@pytest.mark.parametrize("name", MODULES)
def test_relative_imports_stay_in_their_package(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            depth = (
                len(name.split("."))
                - (MODULES[name].name != "__init__.py")
                - len(PACKAGES[layer(name)].split("."))
            )
            assert node.level <= depth + 1, f"{name}:{node.lineno} leaves its package"


def test_the_walk_sees_every_folder_and_every_kind_of_import():
    assert {layer(name) for name in MODULES} == set(PACKAGES) and len(MODULES) > 50
    assert "fxfunc.passes.graph" in imported("fxfunc.capture", MODULES["fxfunc.capture"])
    assert "fxfunc.codegen.offline" in imported("fxfunc.codegen.backends", MODULES["fxfunc.codegen.backends"])
    assert "triton.backends.compiler" in imported("fxfunc.codegen.offline", MODULES["fxfunc.codegen.offline"])
    assert "fxfunc.passes.rules.table" in imported(
        "fxfunc.passes.rules.conv", MODULES["fxfunc.passes.rules.conv"]
    )


PROBE = """
import sys, torch
before = set(sys.modules)
import fxfunc
print(*sorted(m for m in set(sys.modules) - before))
"""


def test_import_fxfunc_brings_in_torch_alone():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert new <= {"fxfunc", "torch"} | sys.stdlib_module_names, new
    assert "torch._dynamo" not in done.stdout.split()


USE = """
import sys, torch, fxfunc
x = torch.linspace(0, 1, 4)
f = fxfunc.vmap(fxfunc.grad(lambda x: x.sin() * x))
torch.testing.assert_close(fxfunc.jit(f)(x), f(x))
print(*sorted(sys.modules))
"""


def test_the_eager_backend_runs_without_the_other_dependencies():
    block = "import sys\nfor name in ('triton', 'tabulate', 'sklearn'): sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", block + USE], check=True)


MAIN_JOB = """
import sys, torch, fxfunc
from fxfunc.bench import digits_main
digits_main.compile_meta_step(digits_main.parse([]))
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""


def test_compiling_the_main_job_imports_no_dynamo():
    subprocess.run([sys.executable, "-c", MAIN_JOB], check=True)


@pytest.mark.parametrize("folder", ["passes", "codegen", "bench"])
def test_a_folder_imported_bare_says_how_to_import_it(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and f"import fxfunc.{folder}" in done.stderr


def test_the_public_names_are_there():
    names = "grad grad_and_value value_and_grad vjp jvp linearize vmap jacrev jacfwd hessian functional_call stack_module_state"
    for name in (
        names + " make_graph jit scan fori_loop cond load Dim spec errors register_rule stop_gradient"
        " checkpoint saved_residuals"
    ).split():
        assert hasattr(fxfunc, name), name
