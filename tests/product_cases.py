"""Products of matrices with what is fused to them: `PRODUCTS` (by hand), `random_product`, and `fused`, the graphs of kernels."""

from __future__ import annotations

import random

import torch
from kernel_cases import BF16, BOOL, F16, F32, I64, Case, In, T, graph_of, inputs_of
from torch import Tensor

from fxfunc.codegen.fuse import fuse
from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import Graph
from fxfunc.passes.record import Value

aten = torch.ops.aten


def mm(x: Value, y: Value) -> Value:
    return x.call(aten.mm.default, y)


def bmm(x: Value, y: Value) -> Value:
    return x.call(aten.bmm.default, y)


def turned(x: Value) -> Value:
    return x.call(aten.transpose.int, -1, -2)


def relu(x: Value) -> Value:
    return x.call(aten.relu.default)


def _relu_backward(g: Value, w: Value, y: Value) -> Value:
    return mm((y > 0).where(g, g * 0), turned(w)) * 0.5


def _heads(x: Value, w: Value) -> Value:
    """The result goes to heads first, rows later."""
    return (mm(x, w) * 2).reshape(9, 4, 4, 6).permute([1, 2, 0, 3]) + 1


def _scores(q: Value, k: Value, m: Value) -> Value:
    return m.where(bmm(q, turned(k)) * 0.25, q.full([], -1e9))


def _far_steps(x: Value, w: Value) -> Value:
    """Numbers above 2^32 beside a small product."""
    steps = x.builder.emit(aten.arange.start_step, (0, 64 * 10**8, 10**8), {"dtype": I64})
    return mm(x, w) + steps.to(F32)


def _both(x: Value, w: Value) -> tuple:
    y = mm(x, w)
    return y, relu(y)


PRODUCTS: list[Case] = [
    *(Case(f"size_{name}", lambda x, w: relu(mm(x, w)), (In(F32, (Dim(name), 20)), In(F32, (20, 24))), ({name: 33},))
      for name in ("row", "pid", "col_in", "lambda")),
    *(Case(f"terms_{name}", lambda x, w: relu(mm(x, w)), (In(F32, (20, Dim(name))), In(F32, (Dim(name), 24))), ({name: 40},))
      for name in ("start", "term", "row")),
    Case("far_steps", _far_steps, (In(F32, (16, 24)), In(F32, (24, 64)))),
    Case("linear", lambda x, w, b: relu(mm(x, w) + b), (In(F32, (65, 70)), In(F32, (70, 50)), In(F32, (50,)))),
    Case("rows", lambda x, w: relu(mm(x, w)), (In(F32, (T, 20)), In(F32, (20, 24))), ({"T": 0}, {"T": 1}, {"T": 5}, {"T": 97})),
    Case("terms", lambda x, w: mm(x * 2 + 1, w) * 2, (In(F32, (20, T)), In(F32, (T, 24))), ({"T": 2}, {"T": 40})),
    Case("backward", _relu_backward, (In(F32, (40, 33)), In(F32, (30, 33)), In(F32, (40, 33)))),
    Case("turned", lambda x, w: turned(mm(turned(x), turned(w))) + 1, (In(F32, (35, 40)), In(F32, (50, 35)))),
    Case("gate", lambda x, v, w: mm(x, v) * mm(x, w).call(aten.sigmoid.default), (In(F32, (33, 48)), *[In(F32, (48, 40))] * 2)),
    Case("scores", _scores, (In(F32, (3, 33, 20)), In(F32, (3, 40, 20)), In(BOOL, (33, 40)))),
    Case("both_ways", lambda x, y: mm(x, turned(y)) + turned(mm(y, turned(x))), (In(F32, (33, 20)), In(F32, (18, 20)))),
    Case("heads", _heads, (In(F32, (36, 20)), In(F32, (20, 24)))),
    Case("broadcast", lambda x, w: relu(bmm(x.expand(3, 33, 20), w)), (In(F32, (1, 33, 20)), In(F32, (3, 20, 17)))),
    Case("both", _both, (In(F32, (33, 20)), In(F32, (20, 33)))),
    Case("slices", lambda x, w: relu(mm(x.call(aten.slice.Tensor, 1, 3, 23), w.call(aten.flip.default, [0]))),
         (In(F32, (33, 25)), In(F32, (20, 18)))),
    Case("column", lambda x, w: relu(mm(x, w)), (In(F32, (70, 40)), In(F32, (40, 1)))),
    Case("row", lambda x, w: relu(mm(x, w)), (In(F32, (1, 40)), In(F32, (40, 70)))),
    Case("outer", lambda x, y, d: mm(x, y) * 0.1 + d, (In(F32, (33, 1)), In(F32, (1, 40)), In(F32, (33, 40)))),
    Case("bf16", lambda x, w, b: relu(mm(x, w) + b), (In(BF16, (65, 70)), In(BF16, (70, 50)), In(BF16, (50,)))),
    Case("half", lambda x, w: relu(mm(x * 0.5, w)), (In(F16, (65, 70)), In(F16, (70, 50)))),
    Case("described", lambda x, w: relu(bmm(x, w)), (In(F16, (64, 120, 264)), In(F16, (64, 264, 128)))),
    Case("described_turned", lambda x, w: relu(bmm(x, turned(w))), (In(BF16, (64, 120, 264)), In(BF16, (64, 128, 264)))),
]  # fmt: skip


def fused(graph: Graph) -> Graph:
    """The graph with every product in a kernel that has more calls."""
    return fuse(graph, takes=lambda n: True)


def product_inputs(case: Case, sizes: dict[str, int]) -> list[Tensor]:
    """Its inputs, with a NaN and an infinity in the first row of the first alone."""
    inputs = [x.nan_to_num() if x.dtype.is_floating_point else x for x in inputs_of(case, sizes)]
    if inputs[0].numel() > 1:
        first = inputs[0].view(-1)
        first[0], first[1] = torch.nan, torch.inf
    return inputs


def random_product(seed: int) -> Case:
    """Factors of random sizes and orders, each with random steps before, and random steps on the result."""
    rng = random.Random(seed)
    rows, terms, columns = (rng.choice([2, 7, 16, 33, 65]) for _ in range(3))
    batch = rng.choice([None, None, 1, 3])
    flips = [rng.random() < 0.4 for _ in range(2)]
    steps = [
        [rng.choice("scale shift relu none".split()) for _ in range(rng.randint(0, 2))] for _ in range(3)
    ]
    bias = rng.choice([None, "row", "column", "full"])
    dtype = rng.choice([F32, F32, F32, F16])

    def shape(a: int, b: int, flip: bool) -> tuple[int, ...]:
        inner = (b, a) if flip else (a, b)
        return inner if batch is None else (batch, *inner)

    def step(x: Value, kind: str) -> Value:
        return {
            "scale": lambda: x * 0.5,
            "shift": lambda: x + 0.25,
            "relu": lambda: relu(x),
            "none": lambda: x,
        }[kind]()

    def f(x: Value, w: Value, *rest: Value) -> Value:
        for kind in steps[0]:
            x = step(x, kind)
        for kind in steps[1]:
            w = step(w, kind)
        y = (mm if batch is None else bmm)(
            *(turned(v) if flip else v for v, flip in zip((x, w), flips, strict=True))
        )
        for kind in steps[2]:
            y = step(y, kind)
        return step(y + rest[0] if rest else y, "relu")

    more = {
        None: [],
        "row": [In(dtype, (1, columns))],
        "column": [In(dtype, (rows, 1))],
        "full": [In(dtype, (rows, columns))],
    }
    inputs = (
        In(dtype, shape(rows, terms, flips[0])),
        In(dtype, shape(terms, columns, flips[1])),
        *more[bias],
    )
    return Case(f"product-{seed}", f, inputs)


def graphs(case: Case) -> tuple[Graph, Graph]:
    """The graph of a case, and that of its kernels."""
    graph = graph_of(case)
    return graph, fused(graph)
