"""Workloads: registered by name with parameters, the same inputs every time, and one answer from torch.func, fxfunc and JAX."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc.bench import BenchError, workload
from fxfunc.bench import registry as registry_module
from fxfunc.bench.registry import find, names, register_file

SMALL = [
    "maml25[tasks=3,steps=1]",
    "maml1000[tasks=2,steps=1]",
    "digits[tasks=2,steps=1]",
    "digits-cnn[tasks=2,steps=1]",
    "psg8[batch=3]",
    "psg28[batch=2]",
    "ens10[models=3]",
    "jac",
    "hess",
    "hessb64[points=3]",
    pytest.param("omniglot[tasks=2,steps=1]", marks=pytest.mark.slow),
    "lj[points=20]",
    "dpsgd-mlp[batch=3]",
    "dpsgd-block[batch=2]",
    "lap[batch=4]",
]


def by_path(tree):
    """Leaves by their place; dicts have no order here, as JAX sorts them."""
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def error(found, reference):
    """GOALS.md: max|d| / max(|ref|max, 1), the worst over the leaves."""
    found, reference = by_path(found), by_path(reference)
    assert found.keys() == reference.keys() and reference
    worst = 0.0
    for path, exact in reference.items():
        assert found[path].shape == exact.shape and exact.isfinite().all()
        difference = (found[path].double() - exact.double()).abs().max()
        worst = max(worst, (difference / exact.double().abs().max().clamp(min=1)).item())
    return worst


def in_float64(inputs):
    return pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)


@functools.cache
def made(name):
    """A workload, its inputs and its float64 answer."""
    found = find(name)
    inputs = found.inputs(**found.parameters)
    return found, inputs, found.exact()(*in_float64(inputs))


def ours(found, inputs):
    """The answer of the eager backend."""
    compiled = fxfunc.jit(found.function(fxfunc)).lower(*inputs).compile(backend="eager")
    return found.around(compiled)(*inputs)


def test_every_workload_is_in_the_order_of_the_tables():
    small = [case if isinstance(case, str) else case.values[0] for case in SMALL]
    assert [name.partition("[")[0] for name in small] == names()[: len(small)]


@pytest.mark.parametrize("name", SMALL)
def test_fxfunc_gives_the_float64_reference(name):
    found, inputs, exact = made(name)
    assert error(ours(found, in_float64(inputs)), exact) <= 1e-10
    allowed = max(1e-5, 3 * error(found.exact()(*inputs), exact))
    assert error(ours(found, inputs), exact) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_jax_gives_the_float64_reference(name):
    jax = pytest.importorskip("jax")
    found, inputs, exact = made(name)
    module, _, attribute = found.jax.partition(":")
    function = getattr(importlib.import_module(module), attribute)(jax, **found.parameters)
    arrays = pytree.tree_map(lambda t: jax.numpy.asarray(t.numpy()), inputs)
    answer = pytree.tree_map(lambda a: torch.from_numpy(np.array(a)), jax.jit(function)(*arrays))
    assert error(answer, exact) <= max(1e-5, 3 * error(found.exact()(*inputs), exact))


@pytest.mark.parametrize("name", SMALL)
def test_no_part_of_the_answer_is_zero(name):
    """An answer of zeros would agree with anything that forgets to compute it."""
    parts = by_path(made(name)[2])
    constant = {f"[0]['{layer}.bias']" for layer in (0, 4, 8)} if name.startswith("omniglot") else set()
    assert all(part.abs().max() > 1e-4 for path, part in parts.items() if path not in constant)


@pytest.mark.parametrize("name", names())
def test_inputs_are_the_same_float32_and_integers_whatever_the_global_seed(name):
    found = find(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = found.inputs(**found.parameters)
    found.function(torch.func)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    pytree.tree_map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), first, found.inputs(**found.parameters)
    )
    for leaf in pytree.tree_leaves(first):
        assert (
            leaf.dtype in (torch.float32, torch.int64)
            and leaf.device.type == "cpu"
            and not leaf.requires_grad
        )


@pytest.mark.parametrize(
    "change",
    ["maml25[tasks=3]", "digits[tasks=3]", "digits-cnn[tasks=3]", "psg8[batch=3]", "hessb64[points=3]"]
    + ["omniglot[tasks=3]", "lj[points=3]", "dpsgd-mlp[batch=3]", "dpsgd-block[batch=3]", "lap[batch=3]"],
)
def test_a_size_is_that_of_the_data(change):
    found = find(change)
    _, *data = found.inputs(**found.parameters)
    assert {len(t) for t in data} == {3}


def test_steps_change_the_answer():
    one, two = (made(f"maml25[tasks=2,steps={steps}]")[2] for steps in (1, 2))
    assert error(one, two) > 1e-3


def test_clipping_leaves_some_gradients_and_shortens_others():
    _, norms = made("dpsgd-mlp[batch=16]")[2]
    assert norms.max() > 1.0
    found, inputs, (grads, norms) = made("dpsgd-block[batch=1]")
    assert sum(g.square().sum() for g in grads.values()).sqrt().item() == pytest.approx(
        min(1.0, norms.item())
    )


def test_the_jax_versions_import_neither_torch_nor_fxfunc():
    from fxfunc.bench.workloads import in_jax

    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("in_jax", {in_jax.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print({{"torch", "fxfunc", "jax"}} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# ----- users' workloads -----------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    names()
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def powers(*, n, k):
    return (torch.arange(float(n)),)


def test_a_user_registers_a_function(registry):
    @workload("powers", inputs=powers, n=3, k=2)
    def make(api, *, n, k):
        return api.vmap(lambda x: x**k)

    assert names()[-1] == "powers"
    found = find("powers")
    assert found.function(fxfunc)(*found.inputs(**found.parameters)).tolist() == [0, 1, 4]
    larger = find("powers[k=3,n=4]")
    assert (larger.name, larger.parameters) == ("powers[k=3,n=4]", {"n": 4, "k": 3})
    assert larger.exact()(*larger.inputs(**larger.parameters)).tolist() == [0, 1, 8, 27]
    assert make(torch.func, n=2, k=5)(torch.tensor([2.0])).tolist() == [32]
    assert found.parameters == {"n": 3, "k": 2}


def test_drive_and_reference_stand_around_and_in_for_the_function(registry):
    @workload(
        "driven",
        inputs=powers,
        drive=lambda call, x: 10 * call(x),
        reference=lambda *, n, k: lambda x: x - k,
        n=2,
        k=7,
    )
    def make(api, *, n, k):
        return lambda x: x + k

    found, (x,) = find("driven"), torch.tensor([[1.0]])
    assert found.around(found.function(fxfunc))(x).item() == 80
    assert found.exact()(x).item() == -6


def test_a_file_registers_workloads(registry, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "from fxfunc.bench import workload\n"
        "@workload('mine.sin', inputs=lambda: (torch.ones(2),))\n"
        "def make(api):\n"
        "    return api.grad(lambda x: x.sin().sum())\n"
    )
    register_file(path)
    assert find("mine.sin").exact()(torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ["absent.py"]),
        ("import fxfunc_no_such_module", ["absent.py", "ModuleNotFoundError"]),
        ("1 +", ["absent.py", "SyntaxError"]),
        ("from fxfunc.bench import workload\nworkload('jac', inputs=tuple)(tuple)", ["'jac'", "used once"]),
    ],
)
def test_a_file_that_cannot_run_is_named(registry, tmp_path, text, words):
    path = tmp_path / "absent.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchError) as raised:
        register_file(path)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("name", ["", "two words", "jac", "1st", "a[b=1]", "a,b"])
def test_a_bad_or_taken_name_is_refused(registry, name):
    with pytest.raises(BenchError, match="names are"):
        workload(name, inputs=tuple)(tuple)


@pytest.mark.parametrize("name", ["maml", "maml25[", "maml25]", "", "maml25[tasks=1]x", "maml25 "])
def test_an_unknown_workload_lists_those_there_are(name):
    with pytest.raises(BenchError) as raised:
        find(name)
    assert all(known in str(raised.value) for known in names())


@pytest.mark.parametrize(
    "change", ["task=1", "tasks", "tasks=", "tasks=-1", "tasks=1.5", "tasks=x", "steps=1,size=2"]
)
def test_a_bad_override_lists_the_parameters(change):
    with pytest.raises(BenchError, match="tasks, steps"):
        find(f"maml25[{change}]")


def test_a_workload_without_parameters_says_so():
    with pytest.raises(BenchError, match="none"):
        find("jac[points=1]")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BenchError, match="pip install scikit-learn"):
        find("digits").inputs(tasks=1, steps=1)
