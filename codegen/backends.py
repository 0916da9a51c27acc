"""Choosing and running a backend. Entry points: `choose` (which), `compile` (from a captured graph to a `Program`)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fxfunc.passes import errors
from fxfunc.passes.dump import saw, saw_source
from fxfunc.passes.graph import Graph, Val
from fxfunc.passes.infer import hermetic
from fxfunc.passes.pipeline import for_aten, lowered
from fxfunc.passes.place import place

from . import cxx, eager
from .explain import Row, rows_of, table

if TYPE_CHECKING:
    from .launch import Binary
    from .native import Native
    from .partition import Built


@dataclasses.dataclass
class Program:
    """A compiled graph: `call` takes flat tensors and gives flat results. `native` is what the eager backend runs anywhere,
    with `kernels` or `programs` in it, if there are any. A graph that is a function is stored, and read when asked for."""

    aten: Graph | Callable[[], Graph] | None  # None: made when asked for
    backend: str
    target: str
    call: Callable | None  # None: made for a device this machine has not
    native: Graph | None = None
    kernels: list[Binary] = dataclasses.field(default_factory=list)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    given: Graph | Callable[[], Graph] | None = None  # to cpp: with the loops that its programs are made of
    programs: list[Native] = dataclasses.field(default_factory=list)  # of the cpp backend
    notes: list[str] = dataclasses.field(default_factory=list)  # which maps are batched, and why
    outside: list[Row] = dataclasses.field(default_factory=list)  # calls that stay ATen's there

    def explain(self) -> str:
        """Each call of the program that runs, by what computes it and why that ends there; views and constants are no calls."""
        lines = [f"backend {self.backend}", *self.notes]
        for p in self.programs:
            lines += [p.describe(), *table(p.rows)]
        rows = self.outside
        if not (self.programs or rows):
            rows = rows_of(self.native or self.graph, with_kernels=self.native is not None)
        return "\n".join(
            [*lines, *([f"outside: {len(rows)} calls"] if self.programs and rows else []), *table(rows)]
        )

    @property
    def graph(self) -> Graph:
        """What the eager backend runs anywhere. A C++ program needs it only if it is stored or looked at."""
        if self.aten is None:
            self.aten = for_aten(lowered(self.source))
        elif not isinstance(self.aten, Graph):
            self.aten = self.aten()
        return self.aten

    @property
    def source(self) -> Graph | None:
        """What the cpp backend was given; None on others."""
        if self.given is not None and not isinstance(self.given, Graph):
            self.given = self.given()
        return self.given

    @property
    def in_vals(self) -> tuple[Val, ...]:
        """What the inputs are."""
        return tuple((self.native or self.source or self.graph).in_vals)


# ---- which one ----


def choose(graph: Graph, backend: str | None = None, target: str | None = None) -> tuple[Graph, str, str]:
    """The graph on the target's kind of device, and the backend and target that None stands for."""
    device = _device_of(graph)
    backend = backend or default((target or device).partition(":")[0])
    target = target or _row(backend).target(device)
    check_target(backend, target)
    if device != target.partition(":")[0]:
        graph = saw("place", place(graph, torch.device("cpu" if is_cpu(target) else "cuda:0")))
    return graph, backend, target


def choose_here(graph: Graph, backend: str | None) -> tuple[str, str]:
    """Backend and target for tensors where they are. None stands for eager on a GPU: only `compile` makes kernels unasked."""
    device = _device_of(graph)
    backend = backend or (default(device) if device == "cpu" else "eager")
    if _row(backend) is _TABLE["eager"]:
        return backend, "cpu"  # runs wherever the tensors are
    target = _row(backend).target(device)
    if device != target.partition(":")[0]:
        raise errors.BackendError(
            backend=backend,
            what=f"the arguments are on {device}, its programs run on {target}",
            instead="Move them there, or leave the backend out.",
        )
    return backend, target


def default(device: str) -> str:
    """The backend that None stands for: on a CPU what FXFUNC_BACKEND names, else cpp if there is a compiler."""
    if device == "cuda":
        return "triton"
    if device != "cpu":
        return "eager"
    if named := os.environ.get("FXFUNC_BACKEND"):
        _row(named, "FXFUNC_BACKEND: ")
        return named
    if cxx.compiler() is not None:
        return "cpp"
    _say_no_compiler()
    return "eager"


@functools.cache
def _say_no_compiler() -> None:
    """Once in a process."""
    warnings.warn(
        f"no C++ compiler ({', '.join(cxx.wanted())}) on this machine: programs run on the eager backend, slower. "
        "Install g++ or set CXX; FXFUNC_BACKEND=eager asks for it and says nothing.",
        errors.BackendWarning,
        stacklevel=2,
    )


def check_target(backend: str, target: str) -> None:
    """Raise BackendError for a target that a backend does not know."""
    row = _row(backend)
    if not re.fullmatch(row.targets, str(target)):
        raise errors.BackendError(backend=backend, what=f"no such target: {target!r}", instead=row.instead)


def is_cpu(target: str) -> bool:
    """Whether a target is a CPU, this one or a level of them."""
    return target.partition(":")[0] == "cpu"


def default_target() -> str:
    """The target of this machine's GPU."""
    if not torch.cuda.is_available():
        raise errors.BackendError(
            backend="triton", what="no GPU here to compile for", instead='Give target="cuda:80" or "cuda:90".'
        )
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def _device_of(graph: Graph) -> str:
    return next((v.device.type for v in graph.in_vals), "cpu")


def _row(backend: str, where: str = "") -> Backend:
    if backend not in _TABLE:
        raise errors.BackendError(
            backend=backend, what=f"{where}no such backend", instead=f"Use one of {', '.join(BACKENDS)}."
        )
    return _TABLE[backend]


# ---- compiling ----


def compile(
    graph: Graph, backend: str, target: str, precision: str | None = None, tune: bool = False
) -> Program:
    """Lower and compile a captured graph for what `choose` gave; `precision` and `tune` are for Triton's kernels."""
    options = {name: x for name, x in (("precision", precision), ("tune", tune or None)) if x is not None}
    if options and backend != "triton":
        what = f"it has no {' and no '.join(options)} to choose"
        raise errors.BackendError(backend=backend, what=what, instead="Leave it out.")
    start = time.perf_counter()
    with hermetic():
        low = _TABLE[backend].lower(graph)
        middle = time.perf_counter()
        program = _TABLE[backend].emit(low, graph, target, **options)
    program.timings = {"passes": middle - start, "codegen": time.perf_counter() - middle}
    return program


def eager_program(graph: Graph, target: str) -> Program:
    """A program of ATen calls alone."""
    return Program(graph, "eager", target, eager.emit(graph) if _is_here(target) else None)


def with_kernels(graph: Graph, native: Graph, kernels: list[Binary], target: str) -> Program:
    """A program of compiled kernels, which runs where there is a GPU."""
    from .launch import Launcher

    launchers = {b.kernel: Launcher(b) for b in kernels}
    call = eager.emit(native, launchers) if _is_here(target) else None
    return Program(graph, "triton", target, call, native, kernels)


def replayed(program: Program) -> Program:
    """The program with its kernels launched at once, as a CUDA graph; `BackendError` if there is something else in it."""
    from .launch import Launcher
    from .replay import Replay, refusal

    why = "its programs are no kernels" if program.backend != "triton" else refusal(program.native)
    if why is not None:
        raise errors.BackendError(
            backend=program.backend, what=f"no CUDA graph: {why}", instead="Call it without."
        )
    if program.call is None:
        return program
    call = Replay(program.native, {b.kernel: Launcher(b) for b in program.kernels})
    return dataclasses.replace(program, call=call)


def with_programs(
    native: Graph,
    programs: list[Native],
    source: Graph | Callable[[], Graph],
    target: str,
    aten: Callable[[], Graph] | None = None,
) -> Program:
    """A program of compiled C++ programs, which were made of `source`."""
    program = Program(aten, "cpp", target, None, native, given=source, programs=programs)
    if _is_here(target):
        program.call = _unless_observed(eager.emit(native), lambda: eager.emit(program.graph))
    return program


def _is_here(target: str) -> bool:
    return not cxx.missing(cxx.LEVELS.get(target, ())) if is_cpu(target) else torch.cuda.is_available()


def _eager(low: Graph, graph: Graph, target: str) -> Program:
    return eager_program(for_aten(low), target)


def _triton(
    low: Graph, graph: Graph, target: str, precision: str | None = None, tune: bool = False
) -> Program:
    """Maps are kernels, so it takes the graph before they are batched; what runs anywhere is made of the batched one."""
    from . import offline
    from .tune import tuned

    build = tuned if tune else offline.compile
    native, kernels, notes = offline.compile_graph(graph, target, precision, build)
    saw("fuse", native)
    for name, binary in kernels.items():
        saw_source(f"kernel-{name}", binary.source)
    program = with_kernels(for_aten(low), native, list(kernels.values()), target)
    program.notes = notes
    return program


def _parted(graph: Graph) -> Built:
    """Maps are loops in C++, so it takes the graph before they are batched."""
    from .partition import build

    return build(graph)


def _cpp(built: Built, graph: Graph, target: str) -> Program:
    """A graph of which nothing is C++ runs as the eager backend has it, its own spelling of calls being for C++."""
    built.compile(target)
    if built.programs:
        program = with_programs(built.graph, built.programs, graph, target)
    else:
        program = Program(None, "cpp", target, None, given=graph)
        program.call = eager.emit(program.graph)
    program.notes, program.outside = built.notes, built.outside
    return program


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))


def _unless_observed(native: Callable, make_aten: Callable[[], Callable]) -> Callable:
    """`native`, but ATen calls for the tensors without memory of other tracers, and under modes that want to see calls."""
    aten = functools.cache(make_aten)

    def call(tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        if torch._C._len_torch_dispatch_stack() or not _PLAIN.issuperset(map(type, tensors)):
            return aten()(tensors)
        return native(tensors)

    return call


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the table: the targets it knows, what else to say of one, what None stands for on a kind of device, and the two
    steps of compiling: passes, and code of what they give."""

    targets: str
    instead: str
    target: Callable[[str], str]
    lower: Callable[[Graph], Any]
    emit: Callable[..., Program]


_TABLE = {
    "eager": Backend(r"cpu|cuda(:\d{2,3})?", 'Use "cpu" or "cuda".', str, lowered, _eager),
    "triton": Backend(
        r"cuda:\d{2,3}",
        'Use "cuda:80", "cuda:90" or another compute capability.',
        lambda device: default_target(),
        lowered,
        _triton,
    ),
    "cpp": Backend(
        "|".join(("cpu", *cxx.LEVELS)),
        f'Use "cpu", which is this machine\'s, or one of {", ".join(cxx.LEVELS)}.',
        lambda device: "cpu",
        _parted,
        _cpp,
    ),
}
BACKENDS = tuple(_TABLE)
