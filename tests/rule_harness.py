"""The differential harness: one table row an op, every transform of it compared with torch.func.

A check is a program over a namespace of transforms `T`; it runs once with fxfunc and once with torch.func.
"""

from __future__ import annotations

import dataclasses
import types
import zlib
from collections.abc import Callable

import torch

import fxfunc
from fxfunc.passes.tracer import current

SIZES = (3, 4)
BATCH = 2


class Sample:
    """Draws the arguments of a case: `n` is its size, `dtype` that of its floating point tensors."""

    def __init__(self, n: int, dtype: torch.dtype, seed: int):
        self.n, self.dtype = n, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def _rand(self, shape) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, *shape) -> torch.Tensor:
        """Normal numbers."""
        if self.dtype.is_complex:
            return torch.randn(shape, generator=self.generator, dtype=torch.complex128).to(self.dtype)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def inside(self, lo: float, hi: float, *shape) -> torch.Tensor:
        """Numbers from an interval."""
        return (self._rand(shape) * (hi - lo) + lo).to(self.dtype)

    def complex(self, *shape) -> torch.Tensor:
        """Complex normal numbers, in any case."""
        return torch.randn(shape, generator=self.generator, dtype=torch.complex128)

    def pos(self, *shape) -> torch.Tensor:
        """Numbers away from zero."""
        return self.inside(0.5, 2.0, *shape)

    def distinct(self, *shape) -> torch.Tensor:
        """Numbers without ties, well apart."""
        n = torch.Size(shape).numel()
        return (
            (torch.randperm(n, generator=self.generator).to(torch.float64) - n / 3)
            .mul(0.37)
            .reshape(shape)
            .to(self.dtype)
        )

    def ints(self, high: int, *shape) -> torch.Tensor:
        """int64 below `high`."""
        return torch.randint(high, shape, generator=self.generator)

    def bools(self, *shape) -> torch.Tensor:
        """Truth values."""
        return self._rand(shape) > 0.4

    def perm(self, *shape) -> torch.Tensor:
        """Distinct int64 along the last axis."""
        return self._rand(shape).argsort(-1)

    def like(self, t: torch.Tensor) -> torch.Tensor:
        """Normal numbers of a tensor's shape and dtype."""
        dtype = torch.complex128 if t.dtype.is_complex else torch.float64
        return torch.randn(t.shape, generator=self.generator, dtype=dtype).to(t.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """f(*args(sample)); forward=False where torch.func has no forward rule, `skip` names checks without any reference.

    reference: the same function in other ops, for torch.func where it cannot take `f` or is inexact.
    precision: the dtype of the least exact intermediate value, if that is less than the results'.
    """

    name: str
    f: Callable
    args: Callable[[Sample], tuple]
    dtypes: tuple[torch.dtype, ...] = ()
    forward: bool = True
    skip: frozenset = frozenset()
    adjoint: bool = True
    reference: Callable | None = None
    precision: torch.dtype | None = None

    def sample(self, n: int, dtype: torch.dtype, example: int = 0) -> Sample:
        """The same numbers in every process."""
        return Sample(n, dtype, zlib.crc32(f"{self.name} {n} {example}".encode()))

    def examples(self, n: int, dtype: torch.dtype) -> list[tuple]:
        """BATCH argument tuples."""
        return [self.args(self.sample(n, dtype, e)) for e in range(BATCH)]


def recorded(op):
    """An op as it is, where a capture would have torch write it with others: any graph may hold it."""

    def call(*args, **kwargs):
        recorder = current()
        return op(*args, **kwargs) if recorder is None else recorder._record(op, *args, **kwargs)

    return call


def flat(out) -> tuple:
    """Outputs as a tuple of tensors."""
    return (out,) if isinstance(out, torch.Tensor) else tuple(x for y in out for x in flat(y))


def is_float(x) -> bool:
    """A tensor that can have a derivative."""
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def floats(xs) -> tuple:
    """Those that can have a derivative."""
    return tuple(x for x in xs if is_float(x))


def function_of_floats(f, args):
    """f of its floating point arguments alone, with its floating point results."""
    places = [i for i, a in enumerate(args) if is_float(a)]

    def g(*xs):
        full = list(args)
        for i, x in zip(places, xs, strict=True):
            full[i] = x
        return floats(flat(f(*full)))

    return g


class Problem:
    """What one check works on: a function, its arguments, tangents and cotangents."""

    def __init__(self, case: Case, n: int, dtype: torch.dtype = torch.float64):
        self.case, self.f = case, case.f
        self.examples = case.examples(n, dtype)
        self.args = self.examples[0]
        self.s = case.sample(n, dtype, BATCH)
        self.g, self.xs = function_of_floats(self.f, self.args), floats(self.args)
        self.outs = self.g(*(x.clone() for x in self.xs))
        self.empty = not self.xs or not self.outs
        self.ts, self.cts = self.randoms(self.xs), self.randoms(self.outs)

    def randoms(self, like) -> tuple:
        """Random tensors like these."""
        return tuple(self.s.like(x) for x in like)

    def stacked(self) -> tuple:
        """The arguments of all examples, stacked."""
        return tuple(torch.stack(x) for x in zip(*self.examples, strict=True))

    def stacks(self, like) -> tuple:
        """Random tensors like these with a batch axis."""
        return tuple(torch.stack([self.s.like(x) for _ in range(BATCH)]) for x in like)


# ----- the checks: programs over T ------------------------------------------------------------------------------------


def jvp(T, p):
    return T.jvp(p.g, p.xs, p.ts)


def vjp(T, p):
    out, pull = T.vjp(p.g, *p.xs)
    return out, pull(p.cts)


def vmap(T, p):
    """All arguments mapped, then each alone, with other positions of the axis."""
    stacked, k = p.stacked(), len(p.args)
    found = [T.vmap(p.f)(*stacked)]
    for i in range(k if k > 1 else 0):
        dims = tuple(0 if j == i else None for j in range(k))
        found.append(T.vmap(p.f, in_dims=dims)(*(stacked[j] if j == i else p.args[j] for j in range(k))))
    last = tuple(x.movedim(0, -1) for x in stacked)
    found.append(T.vmap(p.f, in_dims=-1)(*last))
    return found


def _vjp_of(T, f, args, cts):
    return T.vjp(function_of_floats(f, args), *floats(args))[1](cts)


def vmap_vjp(T, p):
    """Per-example gradients; also with only the cotangents mapped (a jacobian), and with only the first argument."""
    stacked, cts = p.stacked(), p.stacks(p.outs)
    found = [T.vmap(lambda args, cts: _vjp_of(T, p.f, args, cts))(stacked, cts)]
    found.append(T.vmap(lambda cts: _vjp_of(T, p.f, p.args, cts))(cts))
    if len(stacked) > 1:
        found.append(T.vmap(lambda x: _vjp_of(T, p.f, (x, *p.args[1:]), p.cts))(stacked[0]))
    return found


def vmap_jvp(T, p):
    stacked, ts = p.stacked(), p.stacks(p.xs)
    found = [T.vmap(lambda args, ts: T.jvp(function_of_floats(p.f, args), floats(args), ts))(stacked, ts)]
    found.append(T.vmap(lambda ts: T.jvp(p.g, p.xs, ts)[1])(ts))
    return found


def _second(T, p):
    return lambda xs, cts: T.vjp(p.g, *xs)[1](cts)


def jvp_vjp(T, p):
    """Forward over reverse."""
    return T.jvp(_second(T, p), (p.xs, p.cts), (p.ts, p.randoms(p.cts)))


def vjp_vjp(T, p):
    """Reverse over reverse."""
    out, pull = T.vjp(_second(T, p), p.xs, p.cts)
    return out, pull(p.randoms(p.xs))


def no_grad(T, p):
    """A value made under no_grad stops reverse mode and lets forward mode through."""

    def f(*xs):
        with torch.no_grad():
            stopped = p.g(*xs)
        return tuple(a * b for a, b in zip(p.g(*xs), stopped, strict=True))

    reverse = T.vjp(f, *p.xs)[1](p.cts)
    return (reverse, T.jvp(f, p.xs, p.ts)[1]) if p.case.forward else reverse


CHECKS = {f.__name__: f for f in (jvp, vjp, vmap, vmap_vjp, vmap_jvp, jvp_vjp, vjp_vjp, no_grad)}


def _jvp_by_vjp(f, xs, ts):
    """The pushforward as the transpose of the pullback, for ops that torch gives no forward rule."""
    out, pull = torch.func.vjp(f, *xs)
    zeros = torch.utils._pytree.tree_map(torch.zeros_like, out)
    _, push = torch.func.vjp(lambda cts: pull(cts), zeros)
    return out, push(ts if len(ts) > 1 else ts)[0]


TORCH = types.SimpleNamespace(jvp=torch.func.jvp, vjp=torch.func.vjp, vmap=torch.func.vmap)
TORCH_REVERSE = types.SimpleNamespace(jvp=_jvp_by_vjp, vjp=torch.func.vjp, vmap=torch.func.vmap)
TOLERANCE = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 2e-5,
    torch.complex64: 2e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


def run(case: Case, check: str, n: int, dtype: torch.dtype = torch.float64) -> None:
    """Compare one check of one case at one size."""
    if applies(case, check, n, dtype):
        agree(case, check, reference(case, check, n, dtype), n, dtype)


def applies(case: Case, check: str, n: int, dtype: torch.dtype = torch.float64) -> bool:
    """Whether a check has anything to compare."""
    return check not in case.skip and (check == "vmap" or not Problem(case, n, dtype).empty)


def reference(case: Case, check: str, n: int, dtype: torch.dtype = torch.float64):
    """What torch.func gives."""
    theirs = Problem(dataclasses.replace(case, f=case.reference or case.f), n, dtype)
    return CHECKS[check](TORCH if case.forward else TORCH_REVERSE, theirs)


def agree(case: Case, check: str, expected, n: int, dtype: torch.dtype = torch.float64) -> None:
    """Compare what fxfunc gives with what is expected."""
    ours = CHECKS[check](fxfunc, Problem(case, n, dtype))
    compare(ours, expected, f"{case.name} {check} n={n}", TOLERANCE.get(case.precision, 0))


def compare(ours, theirs, what: str, tolerance: float = 0) -> None:
    """Same structure, shapes, dtypes and numbers, by the error of the project: max|d| / max(|ref|max, 1)."""
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs), f"{what}: {len(ours)} results, torch gives {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what} [{i}]: {a.dtype}{list(a.shape)}, torch gives {b.dtype}{list(b.shape)}"
        )
        found = error(a, b)
        assert found <= max(tolerance, TOLERANCE.get(b.dtype, 0)), (
            f"{what} [{i}]: error {found:.2e}\nours  {a}\ntorch {b}"
        )


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max(|b|max, 1); infinite unless NaNs and infinities are in the same places."""
    a, b = (
        x.detach().resolve_conj().to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b)
    )
    if not a.numel():
        return 0.0
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    finite = b.isfinite()
    if (
        not torch.equal(a[~finite].nan_to_num(nan=0.5), b[~finite].nan_to_num(nan=0.5))
        or not a[finite].isfinite().all()
    ):
        return float("inf")
    return ((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1)).item() if finite.any() else 0.0
