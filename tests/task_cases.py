"""Maps for the tests of kernels of tasks: `TASKS` (functions of fxfunc, with arguments), `random_tasks`, and `races`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import F64, Case, graph_of, inputs_of, random_case
from torch import Tensor
from torch.utils import _pytree as pytree

import fxfunc
from fxfunc.codegen.grid import with_tasks
from fxfunc.codegen.mapped import Tasks
from fxfunc.passes.graph import Graph


class Mapped(NamedTuple):
    """A function that maps, its arguments, and the numbers of tasks to run it at if that is symbolic."""

    name: str
    f: Callable
    args: tuple
    tasks: tuple[int, ...] = ()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _labels(n: int, *shape: int) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(1))


def _loss(w: dict, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((x @ w["a"] + w["b"]).relu() @ w["c"], y)


def _steps(w: dict, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(4):
        g = fxfunc.grad(_loss)(w, x, y)
        w = {k: w[k] - 0.1 * g[k] for k in w}
    return _loss(w, x, y)


def _recurrent(w: Tensor, xs: Tensor) -> Tensor:
    h = xs[0]
    for t in range(1, 6):
        h = (h @ w + xs[t]).tanh()
    return (h * h).sum()


def _counting(x: Tensor) -> tuple[Tensor, Tensor]:
    return fxfunc.fori_loop(0, 5, lambda i, c: ((c[0] * 1.5).sin(), c[1] + i), (x, torch.tensor(3)))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def _written(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[1:3] = y
    z[:, 2] = y.sum()
    z.diagonal()[:] = 0.5
    return z * 2


def _pooled(x: Tensor, **how) -> Tensor:
    return F.max_pool2d(x, **how)


W = {"a": draw(6, 9, seed=3), "b": draw(9, seed=4), "c": draw(9, 5, seed=5)}
SQUARE = draw(5, 5)
each = lambda f, in_dims=0: fxfunc.vmap(f, in_dims)
T = fxfunc.Dim("tasks")

TASKS: list[Mapped] = [
    Mapped("per-sample gradients", each(fxfunc.grad(_loss), (None, 0, 0)), (W, draw(5, 7, 6), _labels(5, 5, 7))),
    Mapped("a meta-gradient", lambda w, x, y: fxfunc.grad(
        lambda w: each(_steps, (None, 0, 0))(w, x, y).mean())(w), (W, draw(3, 7, 6), _labels(5, 3, 7))),
    Mapped("more tasks than programs", lambda w, x, y: fxfunc.grad(
        lambda w: each(_loss, (None, 0, 0))(w, x, y).sum())(w), (W, draw(10, 8, 6), _labels(5, 10, 8))),
    Mapped("any number of tasks", lambda w, x, y: fxfunc.grad(
        lambda w: each(_loss, (None, 0, 0))(w, x, y).sum())(w), (W, draw(2, 8, 6), _labels(5, 2, 8)), (1, 3, 10)),
    Mapped("a recurrent net", each(fxfunc.grad(_recurrent, (0, 1)), (None, 0)), (draw(7, 7, seed=2), draw(4, 6, 3, 7))),
    Mapped("an integer carry", each(_counting), (draw(6, 3),)),
    Mapped("hessians", each(fxfunc.hessian(lambda x: (x.tanh() @ SQUARE * x).sum())), (draw(4, 5),)),
    Mapped("attention", each(_attention), (draw(3, 2, 9, 6), draw(3, 2, 11, 6, seed=1), draw(3, 2, 11, 5, seed=2))),
    Mapped("gradients of attention", each(fxfunc.grad(lambda *a: _attention(*a).square().sum(), (0, 1, 2))),
           (draw(3, 9, 6), draw(3, 11, 6, seed=1), draw(3, 11, 5, seed=2))),
    Mapped("large products", each(lambda x, y: (x @ y).relu()), (draw(2, 70, 90), draw(2, 90, 130))),
    Mapped("one row", each(lambda x, y: x @ y + 1), (draw(3, 1, 50), draw(3, 50, 9))),
    Mapped("one column", each(lambda x, y: x @ y + 1), (draw(3, 40, 33), draw(3, 33, 1))),
    Mapped("one row of half", each(lambda x, y: x @ y),
           (draw(3, 1, 50, dtype=torch.float16), draw(3, 50, 9, dtype=torch.float16))),
    Mapped("one element", each(lambda x, y: (x @ y).sin()), (draw(3, 50), draw(3, 50, seed=1))),
    Mapped("expanded factors", each(lambda x, y: (x.sum().expand(9, 20) @ y).sin() + x[:1].expand(9, 20) @ y
                                    + x.mT[:, :1].expand(20, 20)[:9] @ y), (draw(3, 9, 20), draw(3, 20, 17))),
    Mapped("transposed products", each(lambda x, y: (x.mT @ y.mT).sin()), (draw(3, 33, 20), draw(3, 17, 33))),
    Mapped("float64", each(lambda x, y: (x @ y).softmax(-1)), (draw(3, 9, 8, dtype=F64), draw(3, 8, 7, dtype=F64))),
    Mapped("bfloat16", each(lambda x, y: (x @ y).relu() * 2), (draw(3, 9, 20, dtype=torch.bfloat16),
                                                              draw(3, 20, 7, dtype=torch.bfloat16))),
    Mapped("half", each(lambda x: x.softmax(-1) * 3), (draw(3, 9, 20, dtype=torch.float16),)),
    Mapped("layer norm", each(fxfunc.grad(lambda x, w: (F.layer_norm(x, (13,), w) ** 3).sum(), (0, 1)), (0, None)),
           (draw(4, 5, 13), draw(13, seed=1))),
    Mapped("long sums", each(lambda x: x.square().sum() + x.amax(0).sum()), (draw(3, 9, 500),)),
    Mapped("columns of many rows", each(lambda x: x.sum(0) * 2), (draw(3, 700, 20),)),
    Mapped("truths", each(lambda x: ((x > 0).any(1), (x < 2).all(), x.prod(0), (x > 0).sum())), (draw(4, 3, 5),)),
    Mapped("views", each(lambda x: (x.reshape(6, 4).mT.reshape(3, 8) + x.flip(0).reshape(3, 8))[:, ::2].sin()),
           (draw(4, 2, 12),)),
    Mapped("scalars", each(lambda x, y: x.sin() * y), (draw(5), draw(5, seed=1))),
    Mapped("numbers of places", each(lambda x: x * torch.arange(7) + torch.arange(0, 3.5, 0.5)), (draw(4, 7),)),
    Mapped("joined", each(lambda x, y: torch.cat([x, y.mT, x[:1]]).sin() + torch.stack([x[0], y[:, 0], x[1]], 1).sum()),
           (draw(3, 4, 5), draw(3, 5, 2))),
    Mapped("padded", each(lambda x: F.pad(x, (1, 2, 0, 3), value=0.5).cos()), (draw(3, 4, 5),)),
    Mapped("written", each(_written), (draw(3, 4, 4), draw(3, 2, 4))),
    Mapped("gathered", each(lambda x, i: x.gather(0, i).sin()), (draw(3, 6, 4), _labels(6, 3, 9, 4))),
    Mapped("picked", each(lambda x, i: x[i] + x.index_select(1, i[:4].abs()).sum() + x[:, i].mT),
           (draw(3, 6, 6), _labels(6, 3, 6) - 3)),
    Mapped("embedded", each(lambda w, i: F.embedding(i, w).sin(), (None, 0)), (draw(9, 5), _labels(9, 3, 2, 4))),
    Mapped("running sums", each(fxfunc.grad(lambda x: (x.cumsum(0) ** 3).sum() + x.cumsum(1).sin().sum())), (draw(3, 7, 9),)),
    Mapped("scattered", each(lambda x, i: x.sin().scatter_add(1, i, x.cos())), (draw(3, 6, 4), _labels(4, 3, 6, 4))),
    Mapped("max pool", each(lambda x: _pooled(x, kernel_size=3, stride=2, padding=1)), (draw(3, 2, 9, 8),)),
    Mapped("dilated max pool", each(fxfunc.grad(lambda x: (_pooled(x, kernel_size=2, dilation=2, ceil_mode=True) ** 3).sum())),
           (draw(3, 1, 7, 8),)),
    Mapped("average pool", each(fxfunc.grad(lambda x: (F.avg_pool2d(x, 2) ** 3).sum())), (draw(3, 2, 6, 6),)),
    Mapped("convolutions", each(fxfunc.grad(lambda w, x: (F.conv2d(x, w, stride=2, padding=1) ** 3).sum(), (0, 1)), (None, 0)),
           (draw(4, 3, 3, 3) / 3, draw(3, 3, 8, 9))),
    Mapped("results that are arguments", each(lambda x, y: (x, x * y, x)), (draw(3, 4), draw(3, 4, seed=1))),
]  # fmt: skip


def graph_and_inputs(case: Mapped, tasks: int = 0) -> tuple[Graph, list[Tensor]]:
    """Its graph, and tensors for it, of so many tasks if their number is symbolic."""
    args = case.args
    given = args
    if case.tasks:
        first, *rest = args
        given = (first, *(fxfunc.spec(x, {0: T}) for x in rest))
        args = (first, *(x[:1].expand(tasks, *x.shape[1:]).clone() for x in rest))
        args[1].mul_(torch.linspace(0.5, 1.5, tasks).reshape(-1, 1, 1))
    lowered = fxfunc.jit(case.f).lower(*given)
    return lowered.graph, [*pytree.tree_leaves(args), *(c.tensor for c in lowered.captures)]


def random_tasks(seed: int) -> tuple[Tasks, list[Tensor]]:
    """A random program as the body of a map of four, and its operands."""
    case = random_case(seed)
    inputs = tuple(
        x._replace(shape=tuple(5 if isinstance(s, fxfunc.Dim) else s for s in x.shape)) for x in case.inputs
    )
    body = graph_of(Case(case.name, case.f, inputs))
    several = Case(case.name, case.f, tuple(x._replace(shape=(4, *x.shape)) for x in inputs))
    outs = ("stack",) * len(body.outputs)
    return Tasks(body, 4, (True,) * len(inputs), outs, 4), inputs_of(several, {})


def tasks_of(graph: Graph, precision: str = "ieee") -> tuple[list[Tasks], list[str]]:
    """The kernels of a graph's maps, and why others are none."""
    notes: list[str] = []
    made = with_tasks(graph, precision, {}, notes)
    return [n.args[0] for n in made.nodes if n.args and isinstance(n.args[0], Tasks)], notes


# ---- what another thread has stored is read after a barrier only ----


def races(text: str) -> list[str]:
    """The lines that load from or store to scratch memory where another line has stored since the last barrier."""
    roots: dict[str, set[str]] = {}
    written: set[tuple[str, str]] = set()  # place, line
    found: list[str] = []
    for line in map(str.strip, _unrolled([x for x in text.splitlines() if x.startswith("    ")])):
        if line == "tl.debug_barrier()":
            written = set()
        elif m := re.match(r"(\w+) = \(scratch \+ (\d+)\)", line):
            roots[m[1]] = {m[2]}
        elif m := re.match(r"(\w+), (\w+), (\w+) = \2, \3, \2$", line):
            roots |= dict.fromkeys(m.groups(), roots[m[1]] | roots[m[2]] | roots[m[3]])
        elif m := re.match(r"(\w+) = (\w+)( \+ .*)?$", line):
            roots[m[1]] = roots.get(m[2], set())
        for pointer in re.findall(r"tl\.(?:load|store)\((\w+)", line):
            found += [line for place, by in written if place in roots.get(pointer, ()) and by != line]
        for pointer in re.findall(r"tl\.store\((\w+)", line):
            written = written | {(place, line) for place in roots.get(pointer, ())}
    return found


def _unrolled(lines: Sequence[str]) -> list[str]:
    """The lines with the body of each loop twice."""
    out: list[str] = []
    i = 0
    while i < len(lines):
        depth = len(lines[i]) - len(lines[i].lstrip())
        out.append(lines[i])
        i += 1
        if lines[i - 1].strip().startswith("for "):
            end = i
            while end < len(lines) and len(lines[end]) - len(lines[end].lstrip()) > depth:
                end += 1
            inner = _unrolled(lines[i:end])
            out += inner * 2
            i = end
    return out
