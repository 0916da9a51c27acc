"""Graphs for the kernel tests: `OPS` (a call of each row), `PATTERNS` (groups), and `run`, a plain walk over a graph."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxfunc.codegen.evaluate import evaluate
from fxfunc.codegen.loops import Kernel, kernel
from fxfunc.codegen.lower import is_fusable, lower
from fxfunc.codegen.mapped import Together
from fxfunc.codegen.rows import REDUCING
from fxfunc.passes.dims import Dim, at
from fxfunc.passes.graph import Graph, Val, constant
from fxfunc.passes.record import Builder, Value

aten, prims = torch.ops.aten, torch.ops.prims
T = Dim("T")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
I64, I32, I8, U8, BOOL = torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool
TOLERANCE = {F64: 1e-12, F32: 3e-6, BF16: 2e-2, F16: 2e-3}


class In(NamedTuple):
    """An input; a positive one is above 0.1."""

    dtype: torch.dtype
    shape: tuple
    positive: bool = False


class Case(NamedTuple):
    """A program over inputs, and the sizes to run it at."""

    name: str
    f: Callable
    inputs: tuple[In, ...]
    sizes: tuple[dict[str, int], ...] = ({},)


def graph_of(case: Case) -> Graph:
    """Its graph."""
    b = Builder(None)
    out = case.f(*(b.input(Val(tuple(x.shape), x.dtype, torch.device("cpu")), "x") for x in case.inputs))
    return b.finish(out if isinstance(out, tuple) else (out,))


def kernel_of(graph: Graph) -> tuple[Kernel, tuple]:
    """All pointwise and reducing calls of a graph as one kernel."""
    members = [n for n in graph.nodes if is_fusable(n)]
    return lower(members, list(dict.fromkeys(graph.outputs)), "case")


def inputs_of(case: Case, sizes: dict[str, int]) -> list[Tensor]:
    """Random inputs, the same in every process: floats with some ties, zeros and NaNs, small integers without zero."""
    gen = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    return [_tensor(x, [at(s, sizes) for s in x.shape], gen) for x in case.inputs]


def _tensor(spec: In, shape: list[int], gen: torch.Generator) -> Tensor:
    if spec.dtype is BOOL:
        return torch.rand(shape, generator=gen) > 0.5
    if spec.dtype.is_floating_point:
        x = torch.randn(shape, generator=gen, dtype=torch.float64)
        x = torch.where(torch.rand(shape, generator=gen) < 0.2, (2 * x).round(), x)
        x = torch.where(torch.rand(shape, generator=gen) < 0.03, torch.nan, x)
        return (x.abs() + 0.1 if spec.positive else x).to(spec.dtype)
    x = torch.randint(0 if spec.dtype is U8 else -9, 10, shape, generator=gen)
    return torch.where(x == 0, 3, x).to(spec.dtype)


def evaluated(k: Kernel | Together, operands: Sequence[Tensor], sizes: dict) -> tuple[Tensor, ...]:
    """The outputs of a kernel, of several each on its own operands."""
    if isinstance(k, Kernel):
        return evaluate(k, operands, sizes)
    given = iter(operands)
    return tuple(y for p in k.parts for y in evaluate(p, [next(given) for _ in p.inputs], sizes))


def run(
    graph: Graph, inputs: Sequence[Tensor], sizes: dict, on_kernel: Callable = evaluated
) -> list[Tensor | None]:
    """The outputs of a graph, node by node in torch; kernels by `on_kernel(kernel, operands, sizes)`."""
    env = dict(zip(graph.inputs, inputs, strict=True))

    def value(x):
        if isinstance(x, (tuple, list)):
            return type(x)(map(value, x)) if type(x) in (tuple, list) else [value(y) for y in x]
        return env[x] if isinstance(x, torch.fx.Node) else at(x, sizes)

    for n in graph.nodes:
        if n.target is kernel:
            k, operands = n.args[0], value(n.args[1:])
            out = on_kernel(k, operands, sizes)
            env[n] = out if isinstance(n.meta["val"], tuple) else out[0]
        else:
            call = (lambda literal: literal.tensor) if n.target is constant else n.target
            env[n] = call(*value(n.args), **{k: value(v) for k, v in n.kwargs.items()})
    return [None if n is None else env[n] for n in graph.outputs]


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor], scale: float = 1.0) -> None:
    """Dtypes and shapes equal, values within rounding of the dtype; NaN equals NaN."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        tol = scale * TOLERANCE.get(b.dtype, 0)
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


# ---- one call of each row ----


def _call(op, *args, **kwargs) -> tuple:
    return op, args, kwargs


X, Y, POS = In(F32, (3, 5)), In(F32, (5,)), In(F32, (3, 5), True)
N, M, B = In(I64, (3, 5)), In(I64, (5,)), In(BOOL, (3, 5))
_UNARY = (
    "neg abs exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh "
    "erf erfc floor ceil trunc round lgamma square reciprocal sign sgn relu sigmoid silu gelu softplus elu leaky_relu "
    "hardtanh isnan isinf isfinite logical_not"
).split()
_BINARY = "add sub rsub mul div remainder fmod eq ne lt le gt ge".split()
_CALLS = [
    *(_call(getattr(aten, name).default, X) for name in _UNARY),
    *(_call(getattr(aten, name).Tensor, X, Y) for name in _BINARY),
    *(_call(getattr(aten, name).Tensor, N, M) for name in _BINARY),
    *(_call(getattr(aten, name).Scalar, X, 2) for name in _BINARY),
    *(_call(getattr(aten, name).Scalar, N, 2) for name in _BINARY),
    *(_call(getattr(aten, name).default, N)
      for name in "neg abs sign relu sqrt sigmoid square isnan isinf isfinite floor ceil trunc round".split()),
    *(_call(aten.div.Tensor_mode, x, y, rounding_mode=m) for x, y in ((X, Y), (N, M)) for m in ("floor",
    "trunc", None)),
    _call(aten.div.Scalar_mode, X, 0.3, rounding_mode="floor"),
    _call(aten.floor_divide.default, N, M), _call(aten.floor_divide.default, X, Y), _call(aten.div.Tensor, X, 2.0),
    _call(aten.mul.Tensor, X, 2.5), _call(aten.mul.Tensor, N, 2.5), _call(aten.mul.Tensor, N, T), _call(aten.add.Tensor, X, T),
    _call(aten.add.Tensor, X, Y, alpha=3), _call(aten.sub.Tensor, X, Y, alpha=0.5), _call(aten.add.Tensor, N, X),
    _call(aten.add.Tensor, In(F16, (3, 5)), In(F64, ())), _call(aten.mul.Tensor, In(BF16, (3, 5)), In(F32, (3, 5))),
    _call(aten.add.Tensor, B, B), _call(aten.mul.Tensor, B, N), _call(aten.add.Tensor, In(U8, (3, 5)), In(I8, (3, 5))),
    _call(aten.mul.Tensor, In(I8, (3, 5)), In(I8, (3, 5))), _call(aten.remainder.Scalar_Tensor, 7, M),
    _call(aten.atan2.default, X, Y), _call(aten.maximum.default, X, Y), _call(aten.minimum.default, X, Y),
    _call(aten.maximum.default, N, M), _call(aten.minimum.default, B, B), _call(aten.logaddexp.default, X, Y),
    _call(aten.xlogy.Tensor, X, POS),
    *(_call(aten.pow.Tensor_Scalar, X, e) for e in (0, 1, 2, 3, -1, 2.5, 4)),
    *(_call(aten.pow.Tensor_Scalar, POS, e) for e in (0.5, -0.5, -2, 1.7)), _call(aten.pow.Tensor_Scalar, N, 5),
    _call(aten.pow.Tensor_Tensor, POS, Y), _call(aten.pow.Scalar, 2.0, X), _call(aten.pow.Scalar, 3.0, X),
    _call(aten.clamp.default, X, -0.5, 0.5), _call(aten.clamp.default, X, None, 0.5), _call(aten.clamp.default, N, -2, 3),
    _call(aten.clamp.Tensor, X, Y, None), _call(aten.clamp_min.default, X, 0.1), _call(aten.clamp_min.Tensor, X, Y),
    _call(aten.clamp_max.default, X, 0.1), _call(aten.clamp_max.Tensor, X, Y), _call(aten.hardtanh.default, X, -0.3, 0.4),
    _call(aten.gelu.default, X, approximate="tanh"), _call(aten.softplus.default, X, 2.0, 1.0),
    _call(aten.elu.default, X, 0.7, 1.1, 0.9), _call(aten.leaky_relu.default, X, 0.2),
    _call(aten.threshold_backward.default, X, In(F32, (3, 5)), 0.1), _call(aten.sigmoid_backward.default, X, In(F32, (3, 5))),
    _call(aten.tanh_backward.default, X, In(F32, (3, 5))),
    _call(aten.addcmul.default, X, Y, In(F32, (3, 1)), value=0.5), _call(aten.addcdiv.default, X, Y, POS),
    _call(aten.lerp.Scalar, X, Y, 0.7), _call(aten.lerp.Tensor, X, Y, In(F32, (3, 1))),
    _call(aten.where.self, B, X, Y), _call(aten.where.self, B, N, X), _call(aten.where.ScalarSelf, B, 1.5, X),
    _call(aten.where.ScalarOther, B, X, 0), _call(aten.where.Scalar, B, 1.0, 2.0),
    _call(aten.masked_fill.Scalar, X, B, -1.0), _call(aten.masked_fill.Tensor, X, B, In(F32, ())),
    *(_call(aten._to_copy.default, x, dtype=d) for x in (X, N, B) for d in (F64, F16, BF16, I32, I8, BOOL)),
    _call(aten._to_copy.default, POS, dtype=U8), _call(aten._to_copy.default, In(F64, (4,)), dtype=F32),
    _call(prims.convert_element_type.default, X, F64),
    _call(aten.eq.Tensor, B, B), _call(aten.lt.Tensor, B, B), _call(aten.gt.Scalar, N, 0.5), _call(aten.lt.Tensor, N, X),
    *(_call(getattr(aten, f"logical_{name}").default, X, B) for name in ("and", "or", "xor")),
    *(_call(getattr(aten, f"bitwise_{name}").Tensor, x, x) for name in ("and", "or", "xor") for x in (N, B)),
    *(_call(getattr(aten, f"bitwise_{name}").Scalar, N, 6) for name in ("and", "or", "xor")),
    _call(aten.bitwise_not.default, N), _call(aten.bitwise_not.default, B),
    # ---- reductions ----
    *(_call(op, X) for op in (aten.sum.default, aten.mean.default, aten.prod.default, aten.any.default, aten.all.default,
                              aten.max.default, aten.min.default)),
    *(_call(aten.sum.dim_IntList, In(d, (4, 3, 5)), [0, 2], k) for d in (F32, I32, BOOL, BF16) for k in (True, False)),
    *(_call(op, In(F32, (4, 3, 5)), dims, k) for op in (aten.mean.dim, aten.amax.default, aten.amin.default, aten.sum.dim_IntList)
      for dims in ([1], [-1, 0], [2]) for k in (True, False)),
    _call(aten.amax.default, N, [0]), _call(aten.amin.default, In(U8, (3, 5)), [1]), _call(aten.amax.default, B, [0]),
    _call(aten.prod.dim_int, X, 1), _call(aten.prod.dim_int, N, 0, True), _call(aten.any.dim, B, 1), _call(aten.any.dims, X, [0]),
    _call(aten.all.dim, N, 0, True), _call(aten.all.dims, B, [0, 1]), _call(aten.sum.dim_IntList, X, [0], dtype=F64),
    _call(aten.mean.dim, X, None),
]  # fmt: skip


def _of_call(i: int, op, args: tuple, kwargs: dict) -> Case:
    """The case of one call; the tensors among its arguments become inputs."""

    def f(*xs: Value) -> Value:
        given = iter(xs)
        values = tuple(next(given) if isinstance(a, In) else a for a in args)
        return xs[0].builder.emit(op, values, kwargs)

    name = f"{op}-{i}".removeprefix("aten.")
    return Case(name, f, tuple(a for a in args if isinstance(a, In)), ({"T": 4},))


def _in_dtype(case: Case, dtype: torch.dtype) -> Case:
    changed = tuple(x._replace(dtype=dtype) if x.dtype is F32 else x for x in case.inputs)
    return case._replace(name=f"{case.name}-{str(dtype)[6:]}", inputs=changed)


OPS: list[Case] = [_of_call(i, *call) for i, call in enumerate(_CALLS)]
OPS_F64 = [_in_dtype(c, F64) for c in OPS if any(x.dtype is F32 for x in c.inputs)]
OPS_BF16 = [_in_dtype(c, BF16) for c, call in zip(OPS, _CALLS, strict=True)
            if call[0] not in REDUCING and all(x.dtype is F32 for x in c.inputs)]  # fmt: skip


# ---- groups ----


def _softmax(x: Value) -> Value:
    e = (x - x.call(aten.amax.default, [-1], True)).exp()
    return e / e.sum([-1], True)


def _ties(x: Value) -> tuple:
    y = x.sin() * 2
    top = y.call(aten.amax.default, [-1], True)
    hit = y.eq(top).to(F32)
    return hit / hit.sum([-1], True), top


def _layer_norm(x: Value, w: Value, b: Value) -> Value:
    centred = x - x.call(aten.mean.dim, [-1], True)
    return centred * ((centred * centred).call(aten.mean.dim, [-1], True) + 1e-5).rsqrt() * w + b


def _views(x: Value, y: Value) -> Value:
    turned = (x.permute([1, 0, 2]) * 2).reshape(4 * 6)
    return (
        turned.sin()
        + y.expand(4, 6).reshape(24)
        + y.call(aten.slice.Tensor, 0, 1, 2).call(aten.flip.default, [0])
    )


def _slices(x: Value) -> Value:
    left, right = (x.call(aten.slice.Tensor, 1, a, b, 2).exp() for a, b in ((0, 6), (-6, 7)))
    return left * right + x.call(aten.select.int, 1, -1).call(aten.unsqueeze.default, 1)


def _constants(x: Value) -> Value:
    b, shape = x.builder, list(x.shape)
    steps = b.emit(aten.arange.start_step, (1, 1 + 2 * shape[-1], 2), {"dtype": F32})
    zero = b.emit(aten.full.default, (shape, 0.0), {"dtype": F32})
    return (x > 0).where(x * steps, zero) + b.emit(aten.scalar_tensor.default, (0.1,), {"dtype": F32})


def _several(x: Value, w: Value) -> tuple:
    h = (x * w).tanh()
    return h, 1 - h * h, h.sum([0]) * 2


def _steps(x: Value, g: Value) -> Value:
    return (x - 0.1 * g.call(aten.mean.dim, [0])).call(aten.relu.default)


def _negative_zero(x: Value) -> Value:
    return (x > 0).where(x.full([], -0.0), x * 0 * -0.0).call(aten.reciprocal.default)


def _half_steps(x: Value) -> Value:
    steps = x.builder.emit(aten.arange.start_step, (0.0, 1.0, 0.1), {"dtype": F16})
    return steps * 3 + x


def _steps_of(*ps: Value) -> tuple:
    """An optimizer's step: parameters, then as many gradients."""
    half = len(ps) // 2
    return tuple(p - 0.1 * (g * g).sqrt() for p, g in zip(ps[:half], ps[half:], strict=True))


def _sums(*xs: Value) -> tuple:
    return tuple(x.sum([0]) for x in xs)


def _waiting(x: Value, y: Value, w: Value) -> tuple:
    """Two that are ready, two that wait for a product, and one for those."""
    a, b = x.sin() * 2, y.cos() * 3
    c = a.call(aten.mm.default, w)
    d, e = c.sum([0]), (c * 2).exp()
    return b, d, e, (e.sum([1]) + 1).sqrt()


TS = ({"T": 0}, {"T": 1}, {"T": 5}, {"T": 33})
PATTERNS: list[Case] = [
    Case("softmax", _softmax, (In(F32, (T, 7)),), TS),
    Case("softmax_wide", _softmax, (In(F32, (3, 5000)),)),
    Case("softmax_wider", _softmax, (In(F32, (3, 20000)),)),
    Case("softmax_over_symbol", lambda x: _softmax(x.permute([1, 0])), (In(F32, (T, 3)),), TS[1:]),
    Case("ties", _ties, (In(F32, (T, 6)),), TS),
    Case("layer_norm", _layer_norm, (In(F32, (T, 9)), In(F32, (9,)), In(F32, (9,))), TS),
    Case("views", _views, (In(F32, (2, 4, 3)), In(F32, (6,)))),
    Case("slices", _slices, (In(F32, (T, 7)),), TS),
    Case("constants", _constants, (In(F32, (T, 3)),), TS),
    Case("negative_zero", _negative_zero, (In(F32, (T, 7)),), TS),
    Case("half_steps", _half_steps, (In(F32, (10,)),)),
    Case("several", _several, (In(F32, (T, 4)), In(F32, (4,))), TS),
    Case("column_sums", _steps, (In(F32, (6, 5)), In(F32, (T, 6, 5))), TS[1:]),
    Case("size_row", lambda x: (x * 2).sum([1]) + 1, (In(F32, (Dim("row"), 7)),), ({"row": 5},)),
    Case("size_col", lambda x: (x * 2).sum([1]) + 1, (In(F32, (7, Dim("col"))),), ({"col": 5},)),
    Case("size_g0", lambda x, y: x.permute([1, 0]) * 2 + y, (In(F32, (Dim("g0"), 7)), In(F32, (Dim("g0"),))), ({"g0": 5},)),
    Case("scalars", lambda x, y: (x * y + 1).sqrt() / 3, (In(F32, (), True), In(F32, (), True))),
    Case("broadcast", lambda x, y: (x + y).exp() * x, (In(F32, (T, 1, 3)), In(F32, (4, 1))), TS),
    Case("half", lambda x, y: ((x + y) * 2).sin() - y, (In(F16, (T, 3)), In(F16, (3,))), TS),
    Case("empty", lambda x: (x * 2 + 1).sum([0]), (In(F32, (0, 3)),)),
    Case("empty_rows", lambda x: (x * 2 + 1).sum([1]), (In(F32, (0, 3)),)),
    Case("two_phase_sum", lambda x: (x * x).sum([0, 1]).sqrt(), (In(F32, (T, 4096)),), ({"T": 1}, {"T": 37})),
    Case("two_phase_mean", lambda x: (x * 2).call(aten.mean.dim, [0, 1], True) + 1, (In(BF16, (1000, 70)),)),
    Case("two_phase_amax", lambda x: (-x).call(aten.amax.default, [0]) * 2, (In(F32, (100003,)),)),
    Case("two_phase_columns", lambda x: (x * 2).sum([0]), (In(F32, (3000, 24)),)),
]  # fmt: skip

# Calls and kernels that wait for none of each other.
TOGETHER: list[Case] = [
    Case("step", _steps_of, tuple(In(F32, s) for _ in range(2) for s in ((40, 1), (40,), (40, 40), (1,)))),
    Case("sums", _sums, (In(F32, (25, 40, 40)), In(F32, (25,)), In(BF16, (25, 3)), In(I64, (25, 2)), In(F64, (5, 25)))),
    Case("sums_of_rows", _sums, (In(F32, (T, 9)), In(F32, (T, 3, 2)), In(F32, (T,))), TS),
    Case("waiting", _waiting, (In(F32, (20, 30)), In(F32, (7,)), In(F32, (30, 12)))),
    Case("many", lambda *xs: tuple(x * 2 for x in xs), tuple(In(F32, (n + 1,)) for n in range(40))),
    Case("sizes", lambda x, y: (x.tanh() * 2, y.sum([1])), (In(F32, (Dim("pid"), 5)), In(F32, (7, Dim("part0")))),
         ({"pid": 6, "part0": 9},)),
    Case("same", lambda x, y: (x.tanh() * 2, y.tanh() * 2, (x + y).exp()), (In(F32, (T, 5)), In(F32, (T, 5))), TS),
]  # fmt: skip


# ---- random programs ----

_SHAPES = ((T, 4, 6), (4, 6), (T, 1, 6), (6,), (T, 4, 1), ())
_SMOOTH = ("sin", "tanh", "abs", "neg", "relu", "sigmoid", "exp", "erf")


def random_case(seed: int, dtype: torch.dtype = F64) -> Case:
    """A program of about fifteen random calls: elementwise with broadcasting, views, reductions, choices, integers."""
    rng = random.Random(seed)
    inputs = tuple(
        In(dtype if rng.random() < 0.75 else rng.choice((I64, BOOL)), rng.choice(_SHAPES)) for _ in range(4)
    )

    def f(*xs: Value) -> tuple:
        grown = random.Random(seed + 1)
        pool = [x.to(dtype) if grown.random() < 0.8 else x for x in xs]
        for _ in range(15):
            pool.append(_random_step(grown, pool, dtype))
        chosen = [v for v in pool[-4:] if v.dtype == dtype]
        return tuple(dict.fromkeys(chosen)) or (pool[-1].to(dtype) * 2,)

    return Case(f"random-{seed}-{str(dtype)[6:]}", f, inputs, ({"T": 0}, {"T": 1}, {"T": 5}))


def _random_step(rng: random.Random, pool: list[Value], dtype: torch.dtype) -> Value:
    x = rng.choice(pool[-6:])
    kind = rng.choice(
        ("smooth", "smooth", "binary", "binary", "binary", "choose", "view", "view", "reduce", "integer")
    )
    if kind == "binary" or kind == "choose":
        y = next((y for y in rng.sample(pool, len(pool)) if _broadcasts(x.shape, y.shape)), x)
        a, b = x.to(dtype), y.to(dtype)
        if kind == "choose":
            return (a > b).where(a * 0.5, b)
        return rng.choice(
            (lambda: a + b, lambda: a * b, lambda: a - b, lambda: a.call(aten.maximum.default, b))
        )()
    if kind == "view":
        return _random_view(rng, x)
    if kind == "reduce" and x.ndim:
        dims = sorted(rng.sample(range(x.ndim), rng.randint(1, x.ndim)))
        if any(isinstance(x.shape[d], Dim) for d in dims) or rng.random() < 0.5:
            return x.to(dtype).sum(dims, rng.random() < 0.5) * 0.25
        return x.to(dtype).call(aten.amax.default, dims, rng.random() < 0.5)
    if kind == "integer":
        return (x.to(dtype) * 3).to(I64)
    return x.to(dtype).call(getattr(aten, rng.choice(_SMOOTH)).default).call(aten.clamp.default, -3.0, 3.0)


def _random_view(rng: random.Random, x: Value) -> Value:
    shape = list(x.shape)
    if not shape:
        return x.expand(4, 6)
    choice = rng.randrange(6)
    if choice == 0:
        return x.permute(rng.sample(range(x.ndim), x.ndim))
    if choice == 1 and len(shape) > 1:
        return x.reshape([shape[0] * shape[1], *shape[2:]])
    if choice == 2 and shape[-1] in (4, 6, 24):
        return x.reshape([*shape[:-1], shape[-1] // 2, 2])
    if choice == 3 and shape[-1] in (4, 6, 24):
        return x.call(aten.slice.Tensor, x.ndim - 1, 1, shape[-1], 2)
    if choice == 4 and not isinstance(shape[-1], Dim):
        return x.call(aten.select.int, x.ndim - 1, -1)
    return x.expand([3, *shape]) if x.ndim < 4 else x


def _broadcasts(a: tuple, b: tuple) -> bool:
    return all(s == t or 1 in (s, t) for s, t in zip(reversed(a), reversed(b), strict=False))
