"""Calls that move values with what is fused to them: `MOVES`, and `fused`, the graph of their kernels."""

from __future__ import annotations

import random

import torch
from kernel_cases import BF16, BOOL, F16, F32, F64, I32, I64, Case, In, T, graph_of, inputs_of
from torch import Tensor

from fxfunc.codegen import reads
from fxfunc.codegen.fuse import fuse
from fxfunc.passes.graph import Graph
from fxfunc.passes.record import Value

aten = torch.ops.aten
PLACES = 4  # indices are in [0, PLACES), or from -PLACES where that is allowed


def cat(*xs: Value, dim: int = 0) -> Value:
    return xs[0].builder.emit(aten.cat.default, (list(xs), dim), {})


def stack(*xs: Value, dim: int = 0) -> Value:
    return xs[0].builder.emit(aten.stack.default, (list(xs), dim), {})


def pad(x: Value, sides: list, value: float = 0.0) -> Value:
    return x.call(aten.constant_pad_nd.default, sides, value)


def into_slice(x: Value, src: Value, *where: int) -> Value:
    return x.call(aten.slice_scatter.default, src, *where)


def gather(x: Value, dim: int, index: Value) -> Value:
    return x.call(aten.gather.default, dim, index)


def select(x: Value, dim: int, index: Value) -> Value:
    return x.call(aten.index_select.default, dim, index)


def at(x: Value, *indices: Value | None) -> Value:
    return x.builder.emit(aten.index.Tensor, (x, list(indices)), {})


def _embedded(w: Value, i: Value, position: Value) -> Value:
    """Rows of a table and of their positions, normalised."""
    x = w.builder.emit(aten.embedding.default, (w, i), {}) + position
    x = x - x.mean([-1], True)
    return x * ((x * x).mean([-1], True) + 1e-5).call(aten.rsqrt.default)


def _label_losses(x: Value, y: Value) -> Value:
    """Cross-entropy: the logarithm of a sum less the number at a label, which is read again from where it was."""
    most = x.call(aten.amax.default, [-1], True)
    total = (x - most).exp().sum([-1], True).log() + most
    return total - gather(x, 1, y.reshape([7, 1]))


def _picked_by_a_count(x: Value, w: Value) -> Value:
    """An index that a reduction gives."""
    return select(w, 0, (x > 0).to(I64).sum([-1]).call(aten.clamp.default, 0, PLACES - 1)) * 2


def _shifted(x: Value) -> Value:
    """Differences to the neighbour before, zero for the first."""
    return x - pad(x.call(aten.slice.Tensor, 0, 0, 10) * 1.0, [0, 0, 1, 0])


X, Y = In(F32, (7, 5)), In(F32, (7, 9))
MOVES: list[Case] = [
    Case("cat", lambda x, y: cat(x * 2, y.exp(), dim=1) + 1, (X, Y)),
    Case("cat_three", lambda x, y, z: cat(x, y * 0.5, z, dim=-1).call(aten.relu.default), (X, Y, In(F32, (7, 1)))),
    Case("cat_promotes", lambda x, y: cat(x, y) * 2, (In(F32, (3, 4)), In(F64, (2, 4)))),
    Case("cat_nothing", lambda x, y, z: cat(x, y, z) * 2, (In(F32, (0,)), In(F32, (3, 4)), In(F32, (2, 4)))),
    Case("cat_sizes", lambda x, y: cat(x * 2, y) + 1, (In(F32, (T, 5)), In(F32, (3, 5))), ({"T": 0}, {"T": 1}, {"T": 70})),
    Case("cat_sum", lambda x, y: cat(x * x, y, dim=1).sum([1]), (X, Y)),
    Case("cat_long_sum", lambda x, y: cat(x * x, y, dim=1).sum([1]), (In(F32, (3, 3000)), In(F32, (3, 2500)))),
    Case("cat_rows_sum", lambda x, y: cat(x * x, y).sum([1]), (In(F32, (2, 20000)), In(F32, (1, 20000)))),
    Case("stack", lambda x, y: stack(x * 2, y, x.call(aten.relu.default), dim=1) - 1, (X, X)),
    Case("pad", lambda x: pad(x * 2, [1, 2, 0, 3], -1.5) + 1, (X,)),
    Case("pad_negative", lambda x: pad(x * 2, [-1, 2, 1, -3]) + 1, (X,)),
    Case("pad_bool", lambda x: pad(x > 0, [1, 0], True).call(aten.logical_not.default), (X,)),
    Case("shifted", _shifted, (In(F32, (11, 6)),)),
    Case("slice", lambda x, y: into_slice(x * 2, y.exp(), 1, 2, 6) + 1, (Y, In(F32, (7, 4)))),
    Case("slice_of_zeros", lambda y: into_slice(y.full([7, 9], 0.0), y * 2, 1, -4, 9) * 3, (In(F32, (7, 4)),)),
    Case("select", lambda x, y: x.call(aten.select_scatter.default, y * 2, 1, -2) + 1, (Y, In(F32, (7,)))),
    *(Case(f"diagonal_{offset}", lambda x, y, o=offset: x.call(aten.diagonal_scatter.default, y * 2, o) + 1,
           (In(F32, (5, 6)), In(F32, (size,)))) for offset, size in ((0, 5), (1, 5), (-2, 3))),
    Case("gather", lambda x, i: gather(x, 1, i) * 2, (Y, In(I64, (7, 3)))),
    Case("gather_smaller", lambda x, i: gather(x, 0, i) * 2, (Y, In(I64, (6, 4)))),
    Case("gather_computed", lambda x, i: gather(x, 1, i + 0) * 2, (Y, In(I64, (7, 3)))),
    Case("gather_bool", lambda x, i: gather(x, 1, i).call(aten.logical_not.default), (In(BOOL, (7, 9)), In(I64, (7, 3)))),
    Case("index_select", lambda x, i: select(x, 1, i).exp() + 1, (Y, In(I64, (6,)))),
    Case("index_select_rows", lambda x, i: select(x, 0, i) * 2, (In(F32, (T, 33)), In(I64, (70,))), ({"T": 4}, {"T": 50})),
    Case("index_select_reshaped", lambda x, i: select(x.reshape([9, 7]), 0, i) * 2, (Y, In(I64, (6,)))),
    Case("index_select_int32", lambda x, i: select(x, 1, i) * 2, (Y, In(I32, (6,)))),
    Case("index", lambda x, i: at(x, i) * 2, (Y, In(I64, (3, 4)))),
    Case("index_second", lambda x, i: at(x, None, i).sum([-1]), (In(F32, (3, 6, 5)), In(I64, (4,)))),
    Case("index_two", lambda x, i, j: at(x, i, j) * 2, (In(F32, (6, 5, 4)), In(I64, (3, 1)), In(I64, (4,)))),
    Case("index_apart", lambda x, i, j: at(x, i, None, j) * 2, (In(F32, (6, 5, 4)), In(I64, (3,)), In(I64, (3,)))),
    Case("index_bf16", lambda x, i: at(x, i) * 2, (In(BF16, (6, 5)), In(I64, (3,)))),
    Case("embedding", _embedded, (In(F32, (6, 40)), In(I64, (5, 7)), In(F32, (7, 40)))),
    Case("embedding_long", _embedded, (In(F32, (6, 20000)), In(I64, (1, 3)), In(F32, (3, 20000)))),
    Case("label_losses", _label_losses, (In(F32, (7, 6)), In(I64, (7,)))),
    Case("index_of_a_count", _picked_by_a_count, (Y, In(F32, (PLACES,)))),
    Case("index_in_a_piece", lambda x, w, i: cat(x * 2, select(w, 0, i)) + 1, (In(F32, (3, 6)), In(F32, (5, 6)), In(I64, (8,)))),
    Case("padded_index", lambda w, i: pad(select(w, 0, i) * 2, [0, 0, 2, 3]), (In(F32, (5, 6)), In(I64, (8,)))),
]  # fmt: skip
PRODUCTS_OF_MOVED: list[Case] = [
    Case("embedding_product", lambda w, i, v: w.builder.emit(aten.embedding.default, (w, i), {}).call(aten.mm.default, v) + 1,
         (In(F32, (6, 33)), In(I64, (35,)), In(F32, (33, 20)))),
    Case("padded_product", lambda x, w: pad(x * 2, [3, 4]).call(aten.mm.default, w).call(aten.relu.default),
         (In(F32, (33, 20)), In(F32, (27, 18)))),
    Case("indexed_terms", lambda x, w, i: x.call(aten.mm.default, select(w, 0, i)) * 2,
         (In(F16, (33, 40)), In(F16, (6, 18)), In(I64, (40,)))),
    Case("indexed_epilogue", lambda x, w, b, i: x.call(aten.mm.default, w) + select(b, 0, i),
         (In(F32, (33, 40)), In(F32, (40, 18)), In(F32, (5, 18)), In(I64, (33,)))),
]  # fmt: skip


def fused(case: Case) -> Graph:
    """The graph with every call in a kernel that has more of them."""
    return fuse(graph_of(case), takes=lambda n: reads.why_aten(n) is None)


def move_inputs(case: Case, sizes: dict[str, int]) -> list[Tensor]:
    """Its inputs; integers are indices, at times negative where that counts from the end."""
    least = -PLACES if case.name in ("index", "index_two") else 0
    return [
        least + (x.long() % (PLACES - least)).to(x.dtype) if s.dtype in (I64, I32) else x
        for s, x in zip(case.inputs, inputs_of(case, sizes), strict=True)
    ]


def random_move(seed: int) -> Case:
    """Moves, views and arithmetic in random order over random sizes, at times with a sum at the end."""
    rng = random.Random(seed)
    rows, columns = rng.choice([1, 3, 8, 33, T, 2 * T]), rng.choice([4, 6, 17, T])
    steps = [rng.choice(sorted(_STEPS)) for _ in range(rng.randint(2, 6))]
    total = rng.choice([None, None, 0, 1])

    def f(x: Value, y: Value, i: Value) -> Value:
        for step in steps:
            x = _STEPS[step](x, y, i)
        return (x if total is None else x.sum([total])) * 2 + 1

    inputs = [In(rng.choice([F32, F32, F64]), (rows, columns))] * 2
    return Case(f"move-{seed}", f, (*inputs, In(I64, (5,))), ({"T": 3}, {"T": 8}))


def _of_numbers(x: Value) -> bool:
    return all(isinstance(n, int) for n in x.shape)


def _as_wide(x: Value, y: Value) -> tuple[Value, Value]:
    """Both with as few columns as the narrower, or one twice where that is not known."""
    if x.shape[1] == y.shape[1]:
        return x, y
    if not (_of_numbers(x) and _of_numbers(y)):
        return x, x
    n = min(x.shape[1], y.shape[1])
    return tuple(v.call(aten.slice.Tensor, 1, 0, n) for v in (x, y))


def _over(x: Value, y: Value) -> Value:
    """The first rows of `y` in place of those of `x`."""
    x, y = _as_wide(x, y)
    if not (_of_numbers(x) and _of_numbers(y)):
        return x
    n = min(x.shape[0], y.shape[0])
    return into_slice(x, y.call(aten.slice.Tensor, 0, 0, n) * 0.5, 0, 0, n)


_STEPS = {
    "scale": lambda x, y, i: x * 0.5 + 0.25,
    "relu": lambda x, y, i: x.call(aten.relu.default),
    "turn": lambda x, y, i: x.call(aten.transpose.int, 0, 1),
    "flip": lambda x, y, i: x.call(aten.flip.default, [1]),
    "flat": lambda x, y, i: x.reshape([1, x.shape[0] * x.shape[1]]),
    "other": lambda x, y, i: x.reshape([x.shape[1], x.shape[0]]),
    "shift": lambda x, y, i: pad(x.reshape([x.shape[0] * x.shape[1]]), [2, -2]).reshape(list(x.shape)),
    "pad": lambda x, y, i: pad(x, [1, 0, 0, 2], 3.0),
    "cut": lambda x, y, i: pad(x, [-1, 1]),
    "cat": lambda x, y, i: cat(*_as_wide(x, y)),
    "twice": lambda x, y, i: cat(x, x, dim=1),
    "over": lambda x, y, i: _over(x, y),
    "row": lambda x, y, i: x.call(aten.select_scatter.default, x.call(aten.select.int, 0, 0) * 2, 0, -1),
    "pick": lambda x, y, i: at(x, None, i) if _of_numbers(x) and x.shape[1] >= PLACES else x,
}
