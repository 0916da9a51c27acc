"""Artifacts: a compiled function in one zip file. Entry points: `save`, `load`, `check`.

Members: manifest.json (format, versions, signature, captures, backend, target, size and sha256 of every other member),
graph.json (the lowered graph: registered operators and plain data), constants (raw little-endian bytes), and of compiled code
native.json (the same graph with kernels or programs in it), kernels/NAME/ (cubin, PTX, source, what a launch needs),
programs/NAME/ (shared object, C++, what a call needs; the manifest has what they use of a CPU) and source.json (the graph before
maps are batched, from which programs are compiled where the file is loaded untrusted).
There is no pickle and no Python in it, and `load` runs no native code from it unless told to trust it. Digests are checked
before anything else is read. With a key, an HMAC-SHA256 over the manifest proves who wrote it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import hmac
import importlib.metadata
import json
import os
import zipfile
from collections import OrderedDict

import torch
from torch.utils import _pytree as pytree

from fxfunc.codegen import backends, cxx, serial
from fxfunc.passes import errors
from fxfunc.passes.graph import Graph
from fxfunc.passes.verify import verify

from .entry import no_collection
from .jit import Capture, Compiled
from .signature import TENSOR, Signature

FORMAT = 2
_MANIFEST, _MAC, _GRAPH, _NATIVE = "manifest.json", "manifest.hmac", "graph.json", "native.json"
_SOURCE = "source.json"
_LARGEST_MANIFEST = 64 << 20
_LARGEST_RATIO = 500  # of a text to its compressed form; what is written here stays well below


def save(compiled: Compiled, path, *, captures: str = "error", key: bytes | None = None) -> None:
    """Write an artifact; the file appears whole or not at all.

    captures: "error" refuses a function that closes over tensors, naming them; "store" writes their values.
    key: sign the manifest. Raises ArtifactError.
    """
    path = os.fspath(path)
    if captures not in ("error", "store"):
        raise errors.ArtifactError(
            path=path, what=f"captures={captures!r}", instead='Use "error" or "store".'
        )
    if compiled.captures and captures == "error":
        names = "; ".join(f"{c.name} {tuple(c.shape)} at {c.source}" for c in compiled.captures)
        raise errors.ArtifactError(
            path=path,
            what=f"the function closes over {len(compiled.captures)} tensors: {names}",
            instead='Pass them as arguments, or save with captures="store".',
        )
    try:
        members, manifest = _members(compiled)
    except serial.SerialError as e:
        raise errors.ArtifactError(
            path=path, what=str(e), instead="Simplify the arguments to dicts, lists, tuples and plain values."
        ) from e
    text = json.dumps(manifest, indent=1).encode()
    members = {_MANIFEST: text, **members}
    if key is not None:
        members[_MAC] = hmac.new(key, text, hashlib.sha256).hexdigest().encode()
    _write(path, members)


def _members(compiled: Compiled) -> tuple[dict[str, bytes], dict]:
    constants: list[torch.Tensor] = []
    graphs = {_GRAPH: compiled.graph, _NATIVE: compiled.native, _SOURCE: compiled.source}
    members = {
        name: json.dumps(serial.dump(graph, constants)).encode() for name, graph in graphs.items() if graph
    }
    literals = len(constants)
    constants += [c.tensor for c in compiled.captures]
    for i, t in enumerate(constants):
        members[f"constants/{i}"] = _bytes(t)
    for k in compiled.kernels:
        members |= {f"kernels/{k.kernel.name}/{name}": data for name, data in k.files().items()}
    for p in compiled.programs:
        members |= {f"programs/{p.name}/{name}": data for name, data in p.files(compiled.target).items()}
    manifest = {
        "format": FORMAT,
        "fxfunc": _version(),
        "torch": torch.__version__.split("+")[0],
        "triton": _triton_version() if compiled.kernels else None,
        "backend": compiled.backend,
        "target": compiled.target,
        "cpu": cxx.features(compiled.target) if compiled.programs else None,
        "signature": _dump_signature(compiled.signature),
        "constants": [_dump_tensor(t) for t in constants],
        "literals": literals,
        "captures": [{"name": c.name, "source": os.path.basename(c.source or "")} for c in compiled.captures],
        "members": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
        },
    }
    return members, manifest


def _version() -> str:
    from . import __version__

    return __version__


def _triton_version() -> str:
    return importlib.metadata.version("triton")


def _dump_tensor(t: torch.Tensor) -> list:
    return [list(t.shape), str(t.dtype).removeprefix("torch."), str(t.device)]


def _bytes(t: torch.Tensor) -> bytes:
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)


def _write(path: str, members: dict[str, bytes]) -> None:
    """All members into a zip beside `path`, then renamed over it."""
    import tempfile

    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".fxfunc-")
    except OSError as e:
        raise errors.ArtifactError(
            path=path, what=f"cannot be written ({e})", instead="Check the folder."
        ) from e
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in members.items():
                    plain = name.startswith("constants/")  # numbers hardly shrink
                    method = zipfile.ZIP_STORED if plain else zipfile.ZIP_DEFLATED
                    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, method)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as e:
        os.unlink(temporary)
        raise errors.ArtifactError(
            path=path, what=f"cannot be written ({e})", instead="Check the path."
        ) from e
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# ----- signatures as JSON ---------------------------------------------------------------------------------------------


def _dump_signature(s: Signature) -> dict:
    return {
        "arguments": _dump_tree(pytree.tree_unflatten(list(s.in_leaves), s.in_spec)),
        "vals": [serial.dump_val(v) for v in s.in_vals],
        "results": _dump_tree(pytree.tree_unflatten(list(s.out_leaves), s.out_spec)),
    }


def _load_signature(data: dict) -> Signature:
    in_leaves, in_spec = pytree.tree_flatten(_load_tree(data["arguments"]))
    out_leaves, out_spec = pytree.tree_flatten(_load_tree(data["results"]))
    return Signature(
        in_spec,
        tuple(in_leaves),
        tuple(serial.load_val(v) for v in data["vals"]),
        out_spec,
        tuple(out_leaves),
    )


_DICTS = {"dict": dict, "OrderedDict": OrderedDict}


def _dump_tree(x):
    if x is TENSOR:
        return {"tensor": 1}
    if x is None or type(x) in (bool, int, str):
        return {"value": x}
    if type(x) is float:
        return {"float": x.hex()}
    if type(x) in (list, tuple):
        return {type(x).__name__: [_dump_tree(y) for y in x]}
    if type(x) in _DICTS.values() and all(type(k) in (str, int) for k in x):
        return {type(x).__name__: [[k, _dump_tree(v)] for k, v in x.items()]}
    raise serial.SerialError(f"a structure with a {type(x).__name__} cannot be stored")


def _load_tree(data):
    ((kind, x),) = data.items()
    if kind == "tensor":
        return TENSOR
    if kind == "value":
        return x
    if kind == "float":
        return float.fromhex(x)
    if kind in _DICTS:
        return _DICTS[kind]((k, _load_tree(v)) for k, v in x)
    if kind in ("list", "tuple"):
        out = [_load_tree(y) for y in x]
        return out if kind == "list" else tuple(out)
    raise serial.SerialError(f"unknown structure {kind!r}")


# ----- reading --------------------------------------------------------------------------------------------------------


def check(path, key: bytes | None = None) -> dict:
    """The manifest of an artifact, after checking its format, sizes, digests and (with a key) its signature."""
    return _read(os.fspath(path), key)[0]


@no_collection()
def load(
    path,
    *,
    captures: dict[str, torch.Tensor] | None = None,
    key: bytes | None = None,
    trust: bool = False,
    backend: str | None = None,
) -> Compiled:
    """The compiled function of an artifact; no capture, and unless `loaded_as` is "rebuilt" no pass and no compile.

    captures: tensors to bind in place of stored ones, by name. key: require a manifest signed with it.
    trust, or a key that fits, allows native code from the file; without, it runs on the eager backend.
    backend: "eager", or "triton" and "cpp" to compile it here. None: untrusted C++ programs are compiled here, if cpp is what
    FXFUNC_BACKEND and the machine's compiler make the default. Raises ArtifactError naming what is wrong, such as a feature
    that trusted objects use and this CPU has not.
    """
    path = os.fspath(path)
    manifest, members = _read(path, key)
    trust = backend is None and _NATIVE in members and (trust or key is not None)
    if trust:
        _check_cpu(path, manifest)
    elif backend is None and _SOURCE in members and backends.default("cpu") == "cpp":
        backend = "cpp"
    with _readable(path):
        constants = [
            _tensor(members[f"constants/{i}"], *spec) for i, spec in enumerate(manifest["constants"])
        ]
        literals, stored = constants[: manifest["literals"]], constants[manifest["literals"] :]
        signature = _load_signature(manifest["signature"])
        target = manifest["target"]
        backends.check_target(manifest["backend"], target)
        read = functools.partial(_graph, path, members, literals)
        program = _native(members, read, target) if trust else None
        graph = (
            program.native
            if program
            else read(_SOURCE if backend == "cpp" and _SOURCE in members else _GRAPH)
        )
        _check_counts(graph, signature, manifest["captures"], stored)
        if backend == "cpp":
            verify(graph, "load")  # C++ trusts the shapes
        elif not trust and backend in (None, "eager"):
            program = backends.eager_program(graph, "cpu" if backends.is_cpu(target) else target)
    bound = _bound(path, manifest["captures"], stored, captures or {})
    if program is None:
        return _rebuilt(graph, backend, target, signature, bound)
    return Compiled(program, signature, bound, None, {}, loaded_as="native" if trust else "eager")


_MALFORMED = (
    errors.FxfuncError,
    serial.SerialError,
    AssertionError,
    KeyError,
    IndexError,
    AttributeError,
    ValueError,
    TypeError,
    RuntimeError,
)


@contextlib.contextmanager
def _readable(path: str):
    try:
        yield
    except errors.ArtifactError:
        raise
    except _MALFORMED as e:
        raise errors.ArtifactError(
            path=path,
            what=str(e),
            instead="It was written by another version or is damaged; compile it again.",
        ) from e


def _graph(path: str, members, literals, name: str, programs=None) -> Graph:
    """A stored graph; those of a trusted artifact that no call needs are read when somebody asks for them."""
    with _readable(path):
        return serial.load(json.loads(members[name]), literals, programs or {})


def _check_counts(graph, signature, listed, stored) -> None:
    """What indexes each other must fit."""
    inputs = len(signature.in_vals) + len(listed)
    outputs = sum(x is TENSOR for x in signature.out_leaves)
    arguments = sum(x is TENSOR for x in signature.in_leaves)
    found = (len(graph.inputs), len(graph.outputs), len(stored), arguments)
    if found != (inputs, outputs, len(listed), len(signature.in_vals)):
        raise serial.SerialError("its graph does not fit its signature")


def _native(members, read, target) -> backends.Program:
    """The program of stored kernels or objects: the only way by which code from a file runs."""
    from fxfunc.codegen import launch, native
    from fxfunc.codegen.fuse import kernels_of

    names = [m.split("/")[1] for m in members if m.startswith("programs/") and m.endswith("/program.so")]
    programs = {name: native.read(name, _folder(members, f"programs/{name}/")) for name in names}
    whole = read(_NATIVE, programs)
    if programs:
        source, aten = (functools.partial(read, name) for name in (_SOURCE, _GRAPH))
        return backends.with_programs(whole, list(programs.values()), source, target, aten)
    kernels = [launch.read(k, _folder(members, f"kernels/{k.name}/")) for k in kernels_of(whole)]
    return backends.with_kernels(read(_GRAPH), whole, kernels, target)


def _folder(members: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {m.removeprefix(folder): data for m, data in members.items() if m.startswith(folder)}


def _check_cpu(path: str, manifest: dict) -> None:
    """Objects run only where the CPU has what they were compiled to use."""
    if missing := cxx.missing(manifest["cpu"] or ()):
        raise errors.ArtifactError(
            path=path,
            what=f"its programs use {', '.join(missing)}, which this CPU has not",
            instead='Load it with backend="cpp", which compiles it here, or compile it for target="cpu:x86-64-v3".',
        )


def _rebuilt(graph, backend, target, signature, captures) -> Compiled:
    wanted = target if backend == "triton" and target.startswith("cuda:") else None
    graph, backend, target = backends.choose(graph, backend, wanted)
    program = backends.compile(graph, backend, target)
    signature = dataclasses.replace(signature, in_vals=tuple(graph.in_vals[: len(signature.in_vals)]))
    return Compiled(program, signature, captures, None, {}, loaded_as="rebuilt")


def _bound(path, listed, stored, given) -> list[Capture]:
    unknown = sorted(given.keys() - {c["name"] for c in listed})
    if unknown:
        raise errors.ArtifactError(
            path=path,
            what=f"no capture is named {', '.join(unknown)}",
            instead=f"Its captures are {[c['name'] for c in listed]}.",
        )
    out = []
    for c, t in zip(listed, stored, strict=True):
        new = given.get(c["name"], t)
        if not isinstance(new, torch.Tensor):
            raise errors.ArtifactError(
                path=path, what=f"capture {c['name']} is a {type(new).__name__}", instead="Bind a tensor."
            )
        if (new.shape, new.dtype) != (t.shape, t.dtype):
            raise errors.ArtifactError(
                path=path,
                what=f"capture {c['name']} is {tuple(t.shape)} {t.dtype}, not {tuple(new.shape)} {new.dtype}",
                instead="Bind a tensor of the same shape and dtype.",
            )
        out.append(Capture(c["name"], tuple(new.shape), new.dtype, c["source"], new))
    return out


def _tensor(data: bytes, shape, dtype, device) -> torch.Tensor:
    dtype = serial.load_val([[], dtype, "cpu"]).dtype
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).to(device)


def _read(path: str, key: bytes | None) -> tuple[dict, dict[str, bytes]]:
    """The manifest and all members, checked against it."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive, key)
            return manifest, _checked_members(path, archive, manifest)
    except FileNotFoundError as e:
        raise errors.ArtifactError(path=path, what="no such file", instead="Check the path.") from e
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as e:
        raise errors.ArtifactError(
            path=path, what=f"not an artifact, or truncated ({e})", instead="Compile and save it again."
        ) from e
    except Exception as e:
        if isinstance(e, errors.FxfuncError):
            raise
        raise errors.ArtifactError(
            path=path, what=f"damaged ({type(e).__name__}: {e})", instead="Compile and save it again."
        ) from e


def _manifest(path: str, archive: zipfile.ZipFile, key: bytes | None) -> dict:
    names = archive.namelist()
    if _MANIFEST not in names:
        raise errors.ArtifactError(
            path=path, what="a zip file without a manifest", instead="It was not written by fxfunc."
        )
    if archive.getinfo(_MANIFEST).file_size > _LARGEST_MANIFEST:
        raise errors.ArtifactError(
            path=path, what="its manifest is too large", instead="It was not written by fxfunc."
        )
    text = archive.read(_MANIFEST)
    if key is not None:
        _check_mac(path, archive, names, text, key)
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        newer = isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT
        raise errors.ArtifactError(
            path=path,
            what=f"format {manifest.get('format')!r}, this version reads {FORMAT}",
            instead="Update fxfunc." if newer else "Compile and save it again.",
        )
    return manifest


def _check_mac(path, archive, names, text, key) -> None:
    expected = hmac.new(key, text, hashlib.sha256).hexdigest().encode()
    if _MAC not in names or not hmac.compare_digest(archive.read(_MAC), expected):
        raise errors.ArtifactError(
            path=path,
            what="not signed with this key" if _MAC in names else "not signed",
            instead="Use the key given to save, or load it without a key.",
        )


def _checked_members(path: str, archive: zipfile.ZipFile, manifest: dict) -> dict[str, bytes]:
    listed = manifest["members"]
    found = set(archive.namelist()) - {_MANIFEST, _MAC}
    if len(archive.namelist()) != len(set(archive.namelist())) or found != set(listed):
        raise errors.ArtifactError(
            path=path,
            what=f"members missing or added: {sorted(found ^ set(listed))}",
            instead="Compile and save it again.",
        )
    out = {}
    for name, row in listed.items():
        info = archive.getinfo(name)
        if info.file_size > _LARGEST_RATIO * max(info.compress_size, 1):
            raise errors.ArtifactError(
                path=path,
                what=f"{name} would expand from {info.compress_size} to {info.file_size} bytes",
                instead="It was not written by fxfunc.",
            )
        if info.file_size != row["size"]:
            raise errors.ArtifactError(
                path=path,
                what=f"{name} has another size than its manifest says",
                instead="Compile and save it again.",
            )
        out[name] = archive.read(name)
        if hashlib.sha256(out[name]).hexdigest() != row["sha256"]:
            raise errors.ArtifactError(
                path=path, what=f"{name} was altered (digest mismatch)", instead="Compile and save it again."
            )
    return out
