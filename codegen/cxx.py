"""C++ source -> a shared object in this process. Entry points: `compiler` (which one), `load` (compile or find, and open).

Objects are kept on disk, named by a digest of source, compiler and flags (with the CPU that -march=native stands for). A
file appears whole, by a rename, so any number of processes may compile the same source at once; the oldest go when all of
them pass a size.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from fxfunc.passes import errors

# No -ffast-math. Without traps too, g++ makes float(int(x)) trunc(x), which keeps NaN and -0; with them, what it sinks into the
# branch of a choice is never a vector again.
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
         "-fno-tree-sink", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC", "-w",
         *os.environ.get("FXFUNC_CXXFLAGS", "").split())  # fmt: skip
LIMIT = 512 * 2**20  # bytes of objects kept
_lock = threading.Lock()


def folder() -> Path:
    """Where objects are kept."""
    base = (
        os.environ.get("FXFUNC_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxfunc"
    )
    return Path(base) / "cpp"


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++, whichever there is first."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, wanted)), None)


# Functions of libm that libmvec may have for vectors, within 4 ulp.
VECTORS = ("exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
           "pow atan2").split()  # fmt: skip
PAIRS = ("pow", "atan2")  # of them, those of two arguments


@functools.cache
def vectorised() -> frozenset[str]:
    """The names in C of the functions that this machine's libmvec has for AVX2; none without either."""
    try:
        library, cpu = ctypes.CDLL("libmvec.so.1"), Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    if " avx2 " not in cpu:
        return frozenset()
    names = [(f"{name}{f}", _mangled(name, f)) for name in VECTORS for f in ("", "f")]
    return frozenset(name for name, symbol in names if hasattr(library, symbol))


def _mangled(name: str, f: str) -> str:
    """The symbol of a function of libmvec for a vector of AVX2."""
    return f"_ZGVdN{8 if f else 4}{'vv' if name in PAIRS else 'v'}_{name}{f}"


def load(source: str) -> ctypes.CDLL:
    """The compiled source, opened; compiled at most once for each process and, the cache kept, each machine."""
    path = compiler()
    if path is None:
        raise _error(
            f"no C++ compiler ({os.environ.get('CXX', 'g++, clang++')}) on this machine",
            "Install g++ or set CXX.",
        )
    with _lock:
        return _load(source, path)


@functools.lru_cache(maxsize=1024)
def _load(source: str, path: str) -> ctypes.CDLL:
    name = hashlib.sha256("\0".join((source, _identity(path), *FLAGS)).encode()).hexdigest()[:32]
    found = folder() / f"{name}.so"
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        if not found.exists():
            _compile(source, path, found)
        os.utime(found)  # the oldest are those not used for longest
        return ctypes.CDLL(str(found))
    except OSError as e:
        raise _error(
            f"the compiled object {found} cannot be used ({e})", "Set FXFUNC_CACHE to a folder with space."
        ) from e


@functools.cache
def _identity(path: str) -> str:
    """What else an object depends on: the compiler's version and the CPU's features."""
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    try:
        cpu = next(
            (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
        )
    except OSError:
        cpu = ""
    return "\0".join((path, version, cpu, platform.machine(), platform.processor()))


def _compile(source: str, path: str, target: Path) -> None:
    """Compile to a file of our own beside the target, then rename it; on failure only the log and the source stay."""
    work = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    try:
        text, made = work / f"{target.stem}.cpp", work / "made.so"
        text.write_text(source)
        libraries = ["-lmvec"] if vectorised() else []
        done = subprocess.run(
            [path, *FLAGS, str(text), "-o", str(made), "-lm", *libraries],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode or not made.exists():
            raise _failed(done, path, source, target)
        os.replace(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _clean(target)


def _failed(done: subprocess.CompletedProcess, path: str, source: str, target: Path) -> errors.BackendError:
    log = target.with_suffix(".log")
    how = (
        f"was killed by signal {-done.returncode}"
        if done.returncode < 0
        else f"failed with {done.returncode}"
    )
    log.write_text(f"{path} {' '.join(FLAGS)}\n{done.stdout}{done.stderr}\n{source}")
    first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
    return _error(f"{path} {how}: {first}; see {log}", "Report it with that log, or use another backend.")


def _clean(newest: Path) -> None:
    """Remove the objects that were not used for longest while there are more than `LIMIT` bytes of them."""
    found = []
    for p in newest.parent.iterdir():
        try:
            found.append((p.stat().st_mtime, p.stat().st_size, p)) if p.suffix in (".so", ".log") else None
        except FileNotFoundError:
            continue  # another process was first
    total = sum(size for _, size, _ in found)
    for _, size, p in sorted(found):
        if total <= LIMIT:
            return
        if p != newest:
            p.unlink(missing_ok=True)
            total -= size


def _error(what: str, instead: str) -> errors.BackendError:
    return errors.BackendError(backend="cpp", what=what, instead=instead)
