"""Artifacts: a round trip into a fresh process, what a load must not do, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import fxfunc
from fxfunc import artifact
from fxfunc.errors import ArtifactError, BackendError, FxfuncError, StructureMismatch

Spec = type(fxfunc.spec(torch.ones(1), {}))

T = fxfunc.Dim("T")
HERE = Path(__file__).parent


# ----- round trips ----------------------------------------------------------------------------------------------------


def scan_case():
    step = lambda c, x: (c * 0.5 + x.sin(), c * x)
    return lambda c, xs: fxfunc.scan(step, c, xs), (torch.randn(3), fxfunc.spec(torch.randn(5, 3), {0: T}))


def scan_gradient_case():
    final = lambda c, xs: fxfunc.scan(lambda c, x: ((c * x).tanh(), None), c, xs)[0].sum()
    return fxfunc.grad(final, argnums=(0, 1)), (torch.randn(3), torch.randn(4, 3))


def per_sample_case():
    loss = lambda w, x: (x @ w["a"]).relu().sum() + w["b"][0].square()
    w = {"a": torch.randn(4, 2), "b": [torch.tensor(3.0)]}
    return fxfunc.vmap(fxfunc.grad(loss), (None, 0)), (w, fxfunc.spec(torch.randn(6, 4), {0: T}))


def literal_case():
    return lambda x: x + torch.tensor([1.5, -0.0, float("inf")]) * torch.tensor(2), (torch.randn(3),)


def pytree_case():
    def f(state, scale, *, flag):
        return {
            "sum": state["x"] + state["y"],
            1: (state["x"] * scale, None, 7),
            "flag": flag,
            "l": [True, 0.1],
        }

    return f, (OrderedDict(x=torch.randn(2), y=torch.randn(2)), 2.5), {"flag": "yes"}


def complex_case():
    return lambda z: (z.conj() * (2 - 1j)).real.sum() + (z * complex(0, float("nan"))).abs().sum(), (
        torch.randn(4, dtype=torch.complex128),
    )


def dtype_case():
    def f(h, b, i, m):
        return h * 2, b.float().sum(), i + m.to(torch.int32), torch.where(m, h, h.neg()), i.to(torch.uint8)

    return f, (
        torch.randn(3).half(),
        torch.randn(3).bfloat16(),
        torch.arange(3, dtype=torch.int32),
        torch.tensor([True, False, True]),
    )


def size_case():
    return lambda x: (x.mean(0), x.sum() / x.shape[0], x.reshape(-1), x.new_zeros(x.shape[0] * 2 + 1)), (
        fxfunc.spec(torch.randn(5, 2), {0: T}),
    )


CASES = {name.removesuffix("_case"): case for name, case in list(globals().items()) if name.endswith("_case")}

CHILD = """
import sys, torch
from torch.utils import _pytree as pytree
import fxfunc
from fxfunc.passes import jvp, linearize, pipeline, trace
from fxfunc.codegen import backends
def forbidden(*args, **kwargs): raise AssertionError("a load captures, transforms and compiles nothing")
trace.Recorder.__init__ = jvp.jvp = linearize.linearize = pipeline.lowered = backends.lowered = backends.compile = forbidden
cases = {name: torch.load(f"{name}.pt", weights_only=False) for name in sys.argv[1].split()}
before = set(sys.modules)
answers = []
for name, case in cases.items():
    f = fxfunc.load(f"{name}.zip")
    assert f.loaded_as == "eager"
    answers += [(f(*args, **kwargs), expected) for (args, kwargs), expected in case]
new = set(sys.modules) - before
assert not [m for m in new if m.startswith(("torch._dynamo", "sympy", "triton", "numpy", "tabulate"))], new
assert "torch._dynamo" not in sys.modules and "triton" not in sys.modules
for found, expected in answers:
    found, spec = pytree.tree_flatten(found)
    expected, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for x, y in zip(found, expected, strict=True):
        if isinstance(y, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert type(x) is type(y) and x == y
print("done", len(answers))
"""


def at_size(x, n):
    """A spec as a tensor with n in place of its symbolic size."""
    if not isinstance(x, Spec):
        return x
    return torch.randn([n if i in dict(x.dims) else s for i, s in enumerate(x.tensor.shape)])


def test_a_fresh_process_loads_and_runs_with_nothing_but_torch(tmp_path):
    for name, case in CASES.items():
        f, args, *rest = case()
        kwargs = rest[0] if rest else {}
        fxfunc.jit(f).lower(*args, **kwargs).compile().save(tmp_path / f"{name}.zip")
        calls = [(tuple(at_size(x, n) for x in args), kwargs) for n in (1, 4, 7)]
        torch.save([(call, f(*call[0], **call[1])) for call in calls], tmp_path / f"{name}.pt")
    command = [sys.executable, "-c", CHILD, " ".join(CASES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", str(3 * len(CASES))]


def test_a_loaded_function_saves_and_loads_again(tmp_path):
    f, (c, xs) = scan_case()
    compiled = fxfunc.jit(f).lower(c, xs).compile()
    compiled.save(tmp_path / "one.zip")
    fxfunc.load(tmp_path / "one.zip").save(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_loaded_function_checks_its_arguments(tmp_path):
    fxfunc.jit(lambda x: x * 2).lower(torch.ones(3)).compile().save(tmp_path / "f.zip")
    f = fxfunc.load(tmp_path / "f.zip")
    for bad in ((torch.ones(4),), (torch.ones(3).double(),), (torch.ones(3), 1), ([torch.ones(3)],), (2,)):
        with pytest.raises(StructureMismatch):
            f(*bad)


# ----- what is in the file --------------------------------------------------------------------------------------------


@pytest.fixture
def weight():
    return torch.randn(3)


@pytest.fixture
def closing(weight):
    return fxfunc.jit(lambda x: x * weight + torch.tensor([1.0, 2.0, 3.0])).lower(torch.randn(3)).compile()


def test_members_are_data_with_digests_and_no_pickle(tmp_path, closing):
    closing.save(tmp_path / "f.zip", captures="store")
    with zipfile.ZipFile(tmp_path / "f.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    assert set(members) == {"graph.json", "constants/0", "constants/1"}
    json.loads(members["graph.json"])
    assert members["constants/0"] == torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes()
    assert manifest["format"] == artifact.FORMAT and manifest["torch"] == torch.__version__.split("+")[0]
    assert manifest["signature"]["vals"] == [[[3], "float32", "cpu"]]
    assert {name: row["sha256"] for name, row in manifest["members"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in members.items()
    }
    assert str(HERE) not in str(manifest) + str(members)


def test_equal_functions_give_equal_files(tmp_path):
    for name in ("a", "b"):
        fxfunc.jit(lambda x: x.sin() * 2).lower(torch.ones(3)).compile().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ----- captures -------------------------------------------------------------------------------------------------------


def test_captures_are_refused_by_name_shape_and_line(tmp_path, closing):
    (capture,) = closing.captures
    with pytest.raises(ArtifactError) as e:
        closing.save(tmp_path / "f.zip")
    assert capture.name in str(e.value) and "(3,)" in str(e.value)
    assert f"{Path(__file__).name}:" in str(e.value).split(" at ")[1] and 'captures="store"' in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda w: w, lambda w: w.conj(), lambda w: w[::2], lambda w: w.T])
def test_stored_captures_are_values_whatever_their_layout(tmp_path, change):
    w = change(torch.randn(4, 4, dtype=torch.complex64))
    fxfunc.jit(lambda x: x + w).lower(torch.zeros(w.shape)).compile().save(
        tmp_path / "f.zip", captures="store"
    )
    assert torch.equal(fxfunc.load(tmp_path / "f.zip")(torch.zeros(w.shape)), w)


def test_stored_captures_can_be_bound_again(tmp_path, closing, weight):
    closing.save(tmp_path / "f.zip", captures="store")
    name, x = closing.captures[0].name, torch.randn(3)
    new = fxfunc.load(tmp_path / "f.zip", captures={name: weight + 1})
    torch.testing.assert_close(new(x), closing(x) + x)
    with pytest.raises(ArtifactError, match=name):
        fxfunc.load(tmp_path / "f.zip", captures={name: torch.ones(4)})
    with pytest.raises(ArtifactError, match="no capture is named other"):
        fxfunc.load(tmp_path / "f.zip", captures={"other": weight})
    with pytest.raises(ArtifactError, match="list"):
        fxfunc.load(tmp_path / "f.zip", captures={name: [1.0]})


def test_an_unknown_choice_or_structure_is_refused(tmp_path, closing):
    with pytest.raises(ArtifactError, match="'drop'"):
        closing.save(tmp_path / "f.zip", captures="drop")
    strange = fxfunc.jit(lambda x, mode: x * 2).lower(torch.ones(2), object()).compile()
    with pytest.raises(ArtifactError, match="a object cannot be stored|object"):
        strange.save(tmp_path / "f.zip")
    assert not list(tmp_path.iterdir())


# ----- keys and trust -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "f.zip"
    w = torch.arange(600.0)
    f = fxfunc.vmap(fxfunc.grad(lambda x, c: (x.sin() * w[:3] * c).sum()), (0, None))
    compiled = fxfunc.jit(f).lower(fxfunc.spec(torch.randn(5, 3), {0: T}), torch.randn(3)).compile()
    compiled.save(path, captures="store", key=b"secret")
    return path


def test_a_key_must_fit(saved, tmp_path):
    fxfunc.load(saved, key=b"secret")
    fxfunc.load(saved)
    with pytest.raises(ArtifactError, match="not signed with this key"):
        fxfunc.load(saved, key=b"other")
    fxfunc.jit(torch.sin).lower(torch.ones(2)).compile().save(tmp_path / "plain.zip")
    with pytest.raises(ArtifactError, match="not signed"):
        fxfunc.load(tmp_path / "plain.zip", key=b"secret")


def test_a_manifest_written_by_someone_else_does_not_pass_for_signed(saved):
    def double(members):
        graph = members["graph.json"].replace(b"aten.cos.default", b"aten.sin.default")
        assert graph != members["graph.json"]
        members["graph.json"] = graph

    rewrite(saved, double)
    fxfunc.load(saved)
    with pytest.raises(ArtifactError, match="not signed with this key"):
        fxfunc.load(saved, key=b"secret")


@pytest.fixture(scope="module")
def for_gpu(tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("gpu") / "g.zip"
    x = fxfunc.spec(torch.randn(4, 8), {0: T})
    f = lambda x: (x.softmax(1) * torch.arange(8) + torch.tensor([2.0])).sin()
    compiled = fxfunc.jit(f).lower(x).compile(target="cuda:90")
    compiled.save(path, key=b"secret")
    return compiled, path


def test_native_code_is_loaded_only_when_trusted(for_gpu):
    compiled, path = for_gpu
    untrusted = fxfunc.load(path)
    assert (untrusted.loaded_as, untrusted.backend, untrusted.kernels) == ("eager", "eager", [])
    for trusted in (fxfunc.load(path, trust=True), fxfunc.load(path, key=b"secret")):
        assert (trusted.loaded_as, trusted.backend, trusted.target) == ("native", "triton", "cuda:90")
        assert [(k.kernel, k.cubin, k.types) for k in trusted.kernels] == [
            (k.kernel, k.cubin, k.types) for k in compiled.kernels
        ]
        assert trusted.native == compiled.native


def test_a_trusted_load_needs_no_triton(for_gpu):
    code = f"import sys, fxfunc; fxfunc.load({str(for_gpu[1])!r}, trust=True); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_kernel_that_is_not_the_graphs_is_refused(for_gpu, tmp_path):
    path = tmp_path / "g.zip"
    path.write_bytes(for_gpu[1].read_bytes())
    name = for_gpu[0].kernels[0].kernel.name

    def other(members):
        meta = json.loads(members[f"kernels/{name}/launch.json"])
        members[f"kernels/{name}/launch.json"] = json.dumps(meta | {"kernel": "other"}).encode()

    rewrite(path, other)
    with pytest.raises(ArtifactError, match="another kernel"):
        fxfunc.load(path, trust=True)


def test_values_are_placed_on_the_targets_device(for_gpu):
    compiled, _ = for_gpu
    assert {str(v.device) for v in compiled.graph.in_vals + compiled.graph.out_vals} == {"cuda:0"}
    arange = next(n for n in compiled.graph.nodes if "arange" in str(n.target))
    assert arange.kwargs["device"] == torch.device("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_program_for_an_absent_device_says_so(for_gpu):
    compiled, path = for_gpu
    for f in (compiled, fxfunc.load(path), fxfunc.load(path, trust=True)):
        with pytest.raises(BackendError, match="cuda:90, which this machine has not"):
            f(torch.randn(4, 8))


def test_backends_of_a_load(for_gpu, saved):
    rebuilt = fxfunc.load(for_gpu[1], backend="triton")
    assert rebuilt.loaded_as == "rebuilt" and [k.cubin for k in rebuilt.kernels]
    x, c = torch.randn(2, 3), torch.randn(3)
    torch.testing.assert_close(fxfunc.load(saved, backend="eager")(x, c), fxfunc.load(saved)(x, c))
    with pytest.raises(BackendError, match="no such backend"):
        fxfunc.load(saved, backend="jax")


# ----- files that are wrong -------------------------------------------------------------------------------------------


def rewrite(path, change, manifest_change=None, digests=True):
    """Change members of an artifact, and unless told otherwise write digests that fit, as someone would who means harm."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if digests:
        manifest = json.loads(members["manifest.json"])
        for name in set(manifest["members"]) & set(members):
            data = members[name]
            manifest["members"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (manifest_change or (lambda m: None))(manifest)
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def refused(path, match=None, **options):
    """The ArtifactError of a load, which names the file."""
    with pytest.raises(ArtifactError, match=match) as e:
        fxfunc.load(path, **options)
    assert str(path) in str(e.value)
    return str(e.value)


def test_a_truncated_file_is_refused_at_any_length(saved):
    whole = saved.read_bytes()
    for length in sorted(
        {0, 1, 4, 30, *range(0, len(whole), max(len(whole) // 60, 1)), len(whole) - 22, len(whole) - 1}
    ):
        saved.write_bytes(whole[:length])
        refused(saved)


def test_a_changed_byte_of_the_file_never_gives_another_answer(saved):
    whole, (x, c) = saved.read_bytes(), (torch.randn(2, 3), torch.randn(3))
    expected, refusals = fxfunc.load(saved)(x, c), 0
    for place in range(0, len(whole), max(len(whole) // 150, 1)):
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        try:
            assert torch.equal(fxfunc.load(saved, key=b"secret")(x, c), expected)  # a date, padding
        except ArtifactError:
            refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("member", ["manifest.json", "manifest.hmac", "graph.json", "constants/0"])
def test_a_changed_byte_of_a_member_is_refused(saved, member):
    for part in (0.0, 0.4, 0.999):
        whole = saved.read_bytes()
        rewrite(saved, lambda m, part=part: m.update({member: changed(m[member], part)}), digests=False)
        refused(saved, None if member.startswith("manifest") else f"{member} was altered", key=b"secret")
        saved.write_bytes(whole)


def changed(data, part):
    """The bytes with one of them another."""
    at = int(len(data) * part)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_what_is_no_artifact_is_refused(tmp_path):
    refused(tmp_path / "missing", "no such file")
    refused(tmp_path, "directory")
    (tmp_path / "text").write_text("import os")
    refused(tmp_path / "text", "not an artifact")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(tmp_path / "zip", "without a manifest")
    for text in (
        "[]",
        "{}",
        "null",
        "{",
        json.dumps({"format": artifact.FORMAT}),
        "[" * 100_000,
        '{"format": true}',
    ):
        with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
            archive.writestr("manifest.json", text)
        refused(tmp_path / "zip")
    torch.save(torch.ones(3), tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "without a manifest")


def test_another_format_says_which_way_to_go(saved):
    rewrite(saved, lambda m: None, lambda m: m.update(format=artifact.FORMAT + 1))
    assert "Update fxfunc" in refused(saved, f"format {artifact.FORMAT + 1}")
    rewrite(saved, lambda m: None, lambda m: m.update(format=0))
    assert "Compile and save it again" in refused(saved, "format 0")


def test_members_missing_added_or_repeated_are_refused(saved):
    whole = saved.read_bytes()
    rewrite(saved, lambda m: m.update({"code.py": b"print(1)"}))
    refused(saved, "code.py")
    saved.write_bytes(whole)
    rewrite(saved, lambda m: m.pop("constants/0"))
    refused(saved, "constants/0")
    saved.write_bytes(whole)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("graph.json", "{}")
    refused(saved)


def test_a_member_that_expands_without_bound_is_refused_before_it_does(saved):
    rewrite(saved, lambda m: m.update({"graph.json": b" " * (32 << 20)}))
    refused(saved, "would expand")


def test_an_oversized_manifest_is_refused(saved):
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b" " * (65 << 20))
    refused(saved, "too large")


def graph_with(change):
    """A change of the parsed graph."""

    def apply(members):
        graph = json.loads(members["graph.json"])
        change(graph)
        members["graph.json"] = json.dumps(graph).encode()

    return apply


def first_call(**fields):
    """Set fields of the first call: name, target, args, kwargs, val."""
    places = {"name": 0, "target": 1, "args": 2, "kwargs": 3, "val": 4}
    return graph_with(lambda g: [g["nodes"][0].__setitem__(places[k], v) for k, v in fields.items()])


HARMFUL = {
    "an unknown operator": (first_call(target="aten.no_such.default"), "aten.no_such.default"),
    "an operator of Python": (first_call(target="os.system.default"), "unknown operator"),
    "an attribute of torch.ops": (first_call(target="load_library.__func__.__globals__"), "unknown operator"),
    "a region": (first_call(target="fxfunc.map"), None),
    "a write": (first_call(target="aten.add_.Tensor"), "more than compute"),
    "a file": (first_call(target="aten.from_file.default"), "more than compute"),
    "code for a name": (first_call(name="x = __import__('os').system('touch pwned')"), "no name"),
    "a keyword for a name": (first_call(name="import"), "no name"),
    "code for a keyword": (first_call(kwargs={"a=print(1), b": 1}), "no name"),
    "a value that is not there": (first_call(args=[{"n": 999}]), "refers to nothing"),
    "a later value": (first_call(args=[{"n": -1}]), "refers to nothing"),
    "an unknown tag": (first_call(args=[{"py": "print(1)"}]), None),
    "a number for a string": (first_call(args=[{"s": 3}]), "no string"),
    "an unknown dtype": (first_call(args=[{"t": "load"}]), "unknown dtype"),
    "a device of nowhere": (first_call(args=[{"d": "nowhere"}]), None),
    "a size with code": (first_call(val=[[{"D": [[1, ["T);print(1"]]]}], "float32", "cpu"]), "no name"),
    "a list for a graph": (lambda m: m.update({"graph.json": b"[]"}), "malformed"),
    "deep nesting": (lambda m: m.update({"graph.json": b"[" * 100_000}), None),
    "a short constant": (lambda m: m.update({"constants/0": m["constants/0"][:-4]}), None),
    "no outputs": (graph_with(lambda g: g.update(outputs=[])), "does not fit"),
    "an input too many": (
        graph_with(lambda g: g["inputs"].append(["y", [[3], "float32", "cpu"]])),
        "does not fit",
    ),
    "two values of one name": (
        graph_with(lambda g: g["inputs"][1].__setitem__(0, g["inputs"][0][0])),
        "two values",
    ),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_file_with_harmful_or_senseless_content_is_refused(saved, what, monkeypatch):
    monkeypatch.chdir(saved.parent)
    change, match = HARMFUL[what]
    rewrite(saved, change)
    refused(saved, match)
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("target", ["tpu", "cuda:9", "cpu; rm", None, 3])
def test_an_unknown_target_is_refused(saved, target):
    rewrite(saved, lambda m: None, lambda m: m.update(target=target))
    refused(saved, "target")


def test_a_signed_manifest_that_is_damaged_is_an_artifact_error(saved):
    for key, value in {
        "signature": {},
        "captures": 3,
        "literals": "x",
        "constants": [[[3], "load", "cpu"]],
    }.items():
        whole = saved.read_bytes()
        rewrite(saved, lambda m: None, lambda m, key=key, value=value: m.update({key: value}))
        refused(saved)
        saved.write_bytes(whole)


def test_check_reads_the_manifest_alone(saved):
    manifest = artifact.check(saved, key=b"secret")
    assert manifest["backend"] == "eager" and [c["name"] for c in manifest["captures"]]
    saved.write_bytes(saved.read_bytes()[:-30])
    with pytest.raises(ArtifactError):
        artifact.check(saved)


# ----- saving ---------------------------------------------------------------------------------------------------------


def test_a_failing_save_leaves_the_old_file_and_nothing_else(saved, closing, monkeypatch):
    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for step in ("zipfile.ZipFile.writestr", "os.fsync", "os.replace"):
        with monkeypatch.context() as m:
            m.setattr(step, full)
            with pytest.raises(ArtifactError, match="No space left"):
                closing.save(saved, captures="store")
        assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


def test_an_interrupted_save_leaves_nothing(saved, closing, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("zipfile.ZipFile.writestr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        closing.save(saved, captures="store")
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_is_whole_when_it_appears(tmp_path, closing, monkeypatch):
    path, replace = tmp_path / "f.zip", os.replace
    seen = []

    def checked(source, destination):
        assert not path.exists()
        seen.append(artifact.check(source))
        replace(source, destination)

    monkeypatch.setattr("os.replace", checked)
    closing.save(path, captures="store")
    assert seen and artifact.check(path) == seen[0]


def test_a_path_that_cannot_be_written_is_an_artifact_error(tmp_path, closing):
    for path in (tmp_path / "no" / "such" / "f.zip", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be written"):
            closing.save(path, captures="store")
    assert not list(tmp_path.iterdir())


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path, closing):
    (tmp_path / "plain").touch()
    closing.save(tmp_path / "f.zip", captures="store")
    assert (tmp_path / "f.zip").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_signature_is_an_hmac_over_the_manifest(saved):
    with zipfile.ZipFile(saved) as archive:
        text, mac = archive.read("manifest.json"), archive.read("manifest.hmac")
    assert mac.decode() == hmac.new(b"secret", text, hashlib.sha256).hexdigest()
    assert issubclass(ArtifactError, FxfuncError) and issubclass(ArtifactError, RuntimeError)
