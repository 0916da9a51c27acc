"""Triton source -> cubin, with or without a device. Entry points: `compile` (a kernel), `compile_graph`, `table`.

Triton is imported only here, when the first kernel is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from fxfunc.passes import errors
from fxfunc.passes.dump import saw
from fxfunc.passes.graph import Graph, Op, map_, subgraphs
from fxfunc.passes.pipeline import inside, lowered, simplify
from fxfunc.passes.record import Builder

from . import products, reads, tiles
from .cubin import resources
from .expand import expand
from .fuse import fuse, kernel_nodes, kernels_of
from .grid import with_tasks
from .launch import Binary, parameter_types
from .mapped import AnyKernel, Tasks
from .rows import PRODUCTS
from .together import together
from .triton import function_name, load
from .written import Way, write

# Bytes of shared memory that a program can have, by compute capability.
SHARED = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10
}  # fmt: skip
# Of products of float32 in kernels. The first two are as accurate as float32 multiplications, tf32x3 almost, tf32 is not.
PRECISIONS = ("ieee", "bf16x6", "tf32x3", "tf32")


def capability_of(target: str) -> int:
    """`cuda:90` -> 90, or `BackendError`."""
    found = re.fullmatch(r"cuda:(\d{2,3})", target)
    if found is None or int(found[1]) not in SHARED:
        known = ", ".join(f"cuda:{c}" for c in SHARED)
        raise errors.BackendError(
            backend="triton", what=f"no such target: {target!r}", instead=f"Use one of {known}."
        )
    return int(found[1])


def precision_for(target: str, precision: str | None = None) -> str:
    """That of products of float32; None: as accurate as float32, or what torch.set_float32_matmul_precision allows."""
    if precision is not None and precision not in PRECISIONS:
        raise errors.BackendError(
            backend="triton",
            what=f"no such precision: {precision!r}",
            instead=f"Use one of {', '.join(PRECISIONS)}.",
        )
    if precision is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return precision or ("bf16x6" if capability_of(target) >= 90 else "ieee")


@functools.lru_cache(maxsize=512)
def compile(
    k: AnyKernel,
    target: str = "cuda:90",
    precision: str | None = None,
    way: Way | None = None,
) -> Binary:
    """The kernel for a target, compiled without a device, done as the model has it or in this way."""
    capability = capability_of(target)
    try:
        from triton.backends.compiler import GPUTarget

        import triton
    except ImportError as e:
        raise errors.BackendError(
            backend="triton", what="triton is not installed", instead="pip install triton."
        ) from e
    w = write(k, capability, precision_for(target, precision), way)
    types = parameter_types(k)
    fn = load(w.name, w.text)
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t.startswith("*")}
    ast = triton.compiler.ASTSource(fn, dict(zip(fn.arg_names, types, strict=True)), {}, attrs)
    # As nvcc compiles ATen: no fused multiply-adds, and subnormal numbers count.
    exact = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
    options = {"num_warps": w.warps, "num_stages": w.stages, "maxnreg": maxnreg(w.warps), **exact}
    options |= {"debug": True, "sanitize_overflow": False} if w.checks else {}
    done = triton.compile(ast, target=GPUTarget("cuda", capability, 32), options=options)
    m, cubin = done.metadata, done.asm["cubin"]
    used = resources(cubin, m.name)
    return Binary(kernel=k, name=m.name, target=target, cubin=cubin, ptx=done.asm["ptx"], source=w.text, types=types,
                  block=w.block, warps=w.warps, shared=m.shared, regs=used.regs, spills=used.stack, workspace=w.workspace,
                  scratch=(m.global_scratch_size, m.global_scratch_align),
                  profile=(m.profile_scratch_size, m.profile_scratch_align))  # fmt: skip


def maxnreg(warps: int) -> int:
    """Registers a thread may use: without a bound, ptxas was seen to choose 32 and spill."""
    return min(255, 65536 // (32 * warps))


def compile_graph(
    graph: Graph,
    target: str = "cuda:90",
    precision: str | None = None,
    build: Callable[..., Binary] = compile,
) -> tuple[Graph, dict[str, Binary], list[str]]:
    """The graph with its maps and groups as `kernel` nodes, each distinct kernel by name, built, and why maps are none."""
    precision = precision_for(target, precision)
    refused: dict[str, str] = {}
    while True:
        notes: list[str] = []
        done = fused(graph, precision, refused, notes)
        binaries = {
            k.name: dataclasses.replace(build(k, target, precision), kernel=k) for k in kernels_of(done)
        }
        large = [b for b in binaries.values() if b.shared > SHARED[capability_of(target)]]
        if not large:
            return done, binaries, notes
        for b in large:
            refused[_refusable(b, target)] = _too_large(b, target)


def _too_large(b: Binary, target: str) -> str:
    return f"its kernel takes {b.shared >> 10} KiB of shared memory, {target} has {SHARED[capability_of(target)] >> 10}"


def _refusable(b: Binary, target: str) -> str:
    """The text of a map, which can be batched; blocks of other kernels are chosen to fit."""
    if isinstance(b.kernel, Tasks):
        return str(b.kernel)
    raise errors.BackendError(
        backend="triton",
        what=f"{b.name}: {_too_large(b, target)}",
        instead='Use backend="eager", and report it.',
    )


def fused(graph: Graph, precision: str, refused: Mapping[str, str], notes: list[str]) -> Graph:
    """The graph with all its kernels, each with the calls that it is made of."""
    maps = _each(lambda g: with_tasks(g, precision, refused, notes), graph, skip=(map_,))

    def takes(n: Node) -> bool:
        product = n.target in PRODUCTS
        n.meta["why"] = products.why_aten(n, precision) if product else reads.why_aten(n)
        return n.meta["why"] is None

    flat = inside(lambda g: expand(g, gpu=True), lowered(saw("tasks", maps)))
    out = _named(
        _each(lambda g: together(fuse(g, takes=takes, complete=True)), saw("expand", simplify(flat)))
    )
    for n in kernel_nodes(out):
        if isinstance(n.args[0], Tasks):
            n.meta["members"] = tiles.source(n.args[0], precision).rows
    return out


def _each(step: Callable[[Graph], Graph], graph: Graph, skip: tuple[Op, ...] = ()) -> Graph:
    """The graph after a step, which the bodies of its loops and branches have taken first, but for those of ops to skip."""
    if any(n.target not in skip for n in graph.nodes for _ in subgraphs(n)):
        b = Builder(None)

        def call(op: Op, args: tuple, kwargs: dict):
            bodies = op not in skip
            args = tuple(_each(step, x, skip) if bodies and isinstance(x, Graph) else x for x in args)
            return b.emit(op, args, kwargs)

        graph = b.finish(b.inline(graph, [b.input(n.meta["val"], n.name) for n in graph.inputs], call))
    return step(graph)


def _named(graph: Graph) -> Graph:
    """The same graph, equal kernels one object, each with a name of its own."""
    known: dict[object, object] = {}
    names: dict[str, int] = {}
    for n in kernel_nodes(graph):
        k, *operands = n.args
        if k not in known:
            name = function_name(re.sub(r"_\d+$", "", k.name))
            names[name] = names.get(name, 0) + 1
            unique = name if names[name] == 1 else f"{name}_{names[name]}"
            known[k] = dataclasses.replace(k, name=unique)
        n.args = (known[k], *operands)
    return graph


def table(binaries: dict[str, Binary]) -> list[dict[str, object]]:
    """A row a kernel: name, registers a thread, bytes of stack a thread (spills), shared memory, cubin bytes."""
    return [{"name": name, "regs": b.regs, "spills": b.spills, "smem": b.shared, "size": len(b.cubin)}
            for name, b in binaries.items()]  # fmt: skip
