"""C++ source -> a shared object in this process. Entry points: `compiler` (which one), `load` (compile or find, and open),
`compiled` and `loaded` (an object as bytes, for artifacts), `missing` (what of a CPU an object needs and this one has not).

Objects are kept on disk, named by a digest of source, compiler and flags (with the CPU that -march=native stands for). A
file appears whole, by a rename, so any number of processes may compile the same source at once; the oldest go when all of
them pass a size.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from fxfunc.passes import errors

# No -ffast-math. Without traps too, g++ makes float(int(x)) trunc(x), which keeps NaN and -0; with them, what it sinks into the
# branch of a choice is never a vector again.
FLAGS = ("-std=gnu++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
         "-fno-tree-sink", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC", "-w",
         *os.environ.get("FXFUNC_CXXFLAGS", "").split())  # fmt: skip
# What a target's objects use of a CPU, by the names of /proc/cpuinfo; "cpu" is this machine's.
_V3 = "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe".split()
LEVELS = {
    "cpu:x86-64-v3": _V3,
    "cpu:x86-64-v4": [*_V3, *"avx512f avx512bw avx512cd avx512dq avx512vl".split()],
}
_USED = re.compile(
    r"(avx|amx|sse|ssse|bmi)\w*|fma4?|pni|f16c|xop|tbm|abm|popcnt|movbe|cx16|lahf_lm|gfni|v?aes|v?pclmulqdq|adx"
)
LIMIT = 512 * 2**20  # bytes of objects kept
_BUILD, _ABANDONED = "build-", 24 * 3600  # folders of compilers at work, and seconds after which none is
_EAGER = 'backend="eager" (FXFUNC_BACKEND=eager)'
# One thread compiles a source, the others wait for it; in a forked child none does.
_turns: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
os.register_at_fork(after_in_child=_turns.clear)


def cache() -> Path:
    """Where what was compiled or measured is kept."""
    named = os.environ.get("FXFUNC_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxfunc")


def folder() -> Path:
    """Where objects are kept."""
    return cache() / "cpp"


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++, whichever there is first."""
    return next(filter(None, map(shutil.which, wanted())), None)


def wanted() -> list[str]:
    """What is looked for."""
    return [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]


# Functions of libm that libmvec may have for vectors, within 4 ulp.
VECTORS = ("exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc "
           "pow atan2").split()  # fmt: skip
PAIRS = ("pow", "atan2")  # of them, those of two arguments


@functools.cache
def _cpu() -> str:
    """The line of /proc/cpuinfo with the CPU's features; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _features() -> list[str]:
    return _cpu().partition(":")[2].split()


@functools.cache
def vectorised() -> frozenset[str]:
    """The names in C of the functions that this machine's libmvec has for AVX2; none without either."""
    try:
        library = ctypes.CDLL("libmvec.so.1")
    except OSError:
        return frozenset()
    if "avx2" not in _features():
        return frozenset()
    names = [(f"{name}{f}", _mangled(name, f)) for name in VECTORS for f in ("", "f")]
    return frozenset(name for name, symbol in names if hasattr(library, symbol))


def _mangled(name: str, f: str) -> str:
    """The symbol of a function of libmvec for a vector of AVX2."""
    return f"_ZGVdN{8 if f else 4}{'vv' if name in PAIRS else 'v'}_{name}{f}"


def features(target: str) -> list[str]:
    """What objects for a target use of a CPU."""
    if target in LEVELS:
        return LEVELS[target]
    names = _features()
    return sorted(names if platform.machine() != "x86_64" else filter(_USED.fullmatch, names))


def missing(needed: Iterable[str]) -> list[str]:
    """What of these this machine's CPU has not."""
    return sorted(set(needed) - set(_features()))


def load(source: str, target: str = "cpu") -> ctypes.CDLL:
    """The compiled source, opened; compiled at most once for each process and, the cache kept, each machine.

    Raises BackendError with the compiler's first complaint and where its log is; then nothing of the object stays on disk.
    """
    path, flags, found = _job(source, target)
    with _turns[found.stem]:
        return _load(source, path, flags, found)


def compiled(source: str, target: str = "cpu") -> bytes:
    """The object of a source: that in the cache, else compiled. Raises as `load` does."""
    path, flags, found = _job(source, target)
    with _turns[found.stem]:
        try:
            if not found.exists():
                _compile(source, path, flags, found)
            return found.read_bytes()
        except OSError as e:
            raise _unusable(found, e) from e


def loaded(data: bytes) -> ctypes.CDLL:
    """An object that `compiled` gave, perhaps elsewhere, opened; no file of it stays. Raises BackendError if it cannot be."""
    try:
        with tempfile.NamedTemporaryFile(prefix="fxfunc-", suffix=".so") as file:
            file.write(data)
            file.flush()
            return ctypes.CDLL(file.name)
    except OSError as e:
        raise _error(
            f"the object of a program cannot be opened here ({e})",
            f'Load it with backend="cpp", which compiles it here, or use {_EAGER}.',
        ) from e


def _job(source: str, target: str) -> tuple[str, tuple[str, ...], Path]:
    """The compiler, its flags, and where the object is kept."""
    path = compiler()
    if path is None:
        raise _error(
            f"no C++ compiler ({', '.join(wanted())}) on this machine, so there is no log",
            f"Install g++, set CXX, or use {_EAGER}.",
        )
    flags = (f"-march={target.partition(':')[2] or 'native'}", *FLAGS)
    name = hashlib.sha256("\0".join((source, _identity(path), *flags)).encode()).hexdigest()[:32]
    found = folder() / f"{name}.so"
    return path, flags, found


@functools.lru_cache(maxsize=1024)
def _load(source: str, path: str, flags: tuple[str, ...], found: Path) -> ctypes.CDLL:
    try:
        if found.exists():
            try:
                return _open(found)
            except OSError:  # cut short when the machine stopped, or removed meanwhile by another process
                found.unlink(missing_ok=True)
        _compile(source, path, flags, found)
        return _open(found)
    except OSError as e:
        raise _unusable(found, e) from e


def _unusable(found: Path, e: OSError) -> errors.BackendError:
    return _error(
        f"the object {found} cannot be written or opened ({e}); there is no log",
        f"Set FXFUNC_CACHE to a folder with space that can be written, or use {_EAGER}.",
    )


def _open(path: Path) -> ctypes.CDLL:
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(path)  # the oldest are those not used for longest
    return ctypes.CDLL(str(path))


@functools.cache
def _identity(path: str) -> str:
    """What else an object depends on: the compiler's version and the CPU's features."""
    version = _run([path, "--version"], None).stdout.partition("\n")[0]
    return "\0".join((path, version, _cpu(), platform.machine(), platform.processor()))


def _compile(source: str, path: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile in a folder of our own beside the target, the compiler's temporary files too, and move the object out of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_BUILD, dir=target.parent))
    try:
        text, made = work / f"{target.stem}.cpp", work / "made.so"
        text.write_text(source)
        libraries = ["-lmvec"] if vectorised() else []
        done = _run([path, *flags, str(text), "-o", str(made), "-lm", *libraries], work)
        if done.returncode or not made.exists():
            raise _failed(done, source, work / "log", target.with_suffix(".log"))
        os.replace(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _clean(target)


def _run(command: list[str], temporary: Path | None) -> subprocess.CompletedProcess:
    environment = os.environ | ({"TMPDIR": str(temporary)} if temporary else {})
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as e:
        raise _error(
            f"{command[0]} cannot be run ({e}); there is no log",
            f"Set CXX to another compiler, or use {_EAGER}.",
        ) from e


def _failed(done: subprocess.CompletedProcess, source: str, draft: Path, log: Path) -> errors.BackendError:
    """What to raise for a compiler that made nothing; its log appears whole or not at all."""
    how = (
        f"was killed by signal {-done.returncode}"
        if done.returncode < 0
        else f"failed with {done.returncode}"
    )
    try:
        draft.write_text(f"{' '.join(done.args)}\n{done.stdout}{done.stderr}\n{source}")
        os.replace(draft, log)
        where = f"see {log}"
    except OSError as e:
        where = f"there is no log, it cannot be written ({e})"
    first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
    return _error(f"{done.args[0]} {how}: {first}; {where}", f"Report it with what it says, or use {_EAGER}.")


def _clean(newest: Path) -> None:
    """Remove what was not used for longest while there are more than `LIMIT` bytes, and what killed processes left."""
    found = []
    for p in newest.parent.iterdir():
        with contextlib.suppress(OSError):  # another process was first
            used = p.stat()
            if p.suffix in (".so", ".log"):
                found.append((used.st_mtime, used.st_size, p))
            elif p.name.startswith(_BUILD) and used.st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(p, ignore_errors=True)
    total = sum(size for _, size, _ in found)
    for _, size, p in sorted(found):
        if total <= LIMIT:
            return
        if p != newest:
            with contextlib.suppress(OSError):
                p.unlink(missing_ok=True)
            total -= size


def _error(what: str, instead: str) -> errors.BackendError:
    return errors.BackendError(backend="cpp", what=what, instead=instead)
