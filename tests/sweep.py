"""PyTorch's op database under every transform, against torch.func. Entry points: `entries`, `sweep_entry`; run by scripts/sweep.

An outcome is one (entry, transform, dtype): "agrees" if every sample that torch.func answers has the same answer here;
"torch_cannot" if torch.func raises on all of them; "we_cannot" if fxfunc raises where torch.func answers; "wrong" if the
answers differ. What torch.func cannot do is held against finite differences or a loop over examples where fxfunc can.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rule_harness import error
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxfunc
from fxfunc import coverage
from fxfunc.passes import decompose

BATCH = 2
TORCH = types.SimpleNamespace(jvp=torch.func.jvp, vjp=torch.func.vjp, vmap=torch.func.vmap)
TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10}
INEXACT = {  # torch's own error in float64
    "nn_functional_hardsigmoid": 1e-7,  # its 1/6 is rounded to float32
    "logcumsumexp": 1e-6,  # near 1e4
    "linalg_householder_product": 1e-8,  # its second derivative in complex64 has no digit right, torch's neither
}
UNDECIDED = {  # what finite differences of the op cannot say
    "cholesky": "finite differences see one triangle alone, the formula both",
    "cholesky_inverse": "finite differences see one triangle alone; for tangents in it ours agrees, torch's is inexact",
    "linalg_norm_subgradients_at_zero": "second derivatives where there is no first; torch has NaN for orders below 1",
    **dict.fromkeys(
        ("nn_functional_linear_cross_entropy_chunked", "nn_functional_linear_cross_entropy_chunked_none"),
        "its backward detaches what it saved: second derivatives are what the op's author says",
    ),
    **dict.fromkeys(
        ("linalg_eig", "linalg_eigh"), "the vectors have a free phase, which torch checks at run time"
    ),
    **dict.fromkeys(
        ("var_mean", "var_mean_unbiased"),
        "the mean of nothing is NaN, its second derivative zero to torch, NaN here",
    ),
    "masked_logaddexp": "torch's second derivative is NaN where both are masked: a derivative at -inf, which is not used",
}
FLOAT32 = 1e-5  # or three times torch's own error against float64


@dataclasses.dataclass
class Outcome:
    """What became of one (entry, transform, dtype)."""

    status: str
    samples: int = 0
    elements: int = 0
    theirs: str = ""  # what torch.func raised: type and first line
    ours: str = ""  # what fxfunc raised, or how its answer was checked


class Disagreement(Exception):
    """Two answers that differ."""


def entries() -> list:
    """All of op_db, by name and variant."""
    from torch.testing._internal.common_methods_invocations import op_db

    return sorted(op_db, key=lambda op: op.formatted_name)


class Problem:
    """An op at one sample: a function of its tensors, and its floating point part."""

    def __init__(self, op, sample, dtype: torch.dtype):
        self.dtype = dtype
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        self.tensors = [leaves[i].detach() for i in self.places]
        self.floats = [i for i, x in enumerate(self.tensors) if x.is_floating_point() or x.is_complex()]
        self.generator = torch.Generator().manual_seed(0)

        def call(*tensors):
            full = list(leaves)
            for i, t in zip(self.places, tensors, strict=True):
                full[i] = t
            args, kwargs = pytree.tree_unflatten(full, spec)
            out = op.op(*args, **kwargs)
            return tuple(x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))

        self.call = call

    def float_function(self, tensors=None) -> Callable:
        """The differentiable results as a function of the floating point tensors."""
        tensors = self.tensors if tensors is None else tensors

        def f(*xs):
            full = list(tensors)
            for i, x in zip(self.floats, xs, strict=True):
                full[i] = x
            return tuple(y for y in self.call(*full) if y.is_floating_point() or y.is_complex())

        return f

    def xs(self, tensors=None) -> tuple:
        tensors = self.tensors if tensors is None else tensors
        return tuple(tensors[i] for i in self.floats)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.complex128 if x.is_complex() else torch.float64
        return torch.randn(x.shape, dtype=wide, generator=self.generator).to(x.dtype)

    def likes(self, xs) -> tuple:
        return tuple(map(self.like, xs))

    def second(self, x: torch.Tensor) -> torch.Tensor:
        """Another example like this one, within the op's domain if that is a cone."""
        return x * 0.7654321 if x.is_floating_point() or x.is_complex() else x.clone()


class Empty(Exception):
    """Nothing to transform in this sample."""


def needs_floats(p: Problem) -> tuple:
    xs = p.xs()
    outs = p.float_function()(*(x.clone() for x in xs)) if xs else ()
    if not outs:
        raise Empty
    return xs, outs


# ----- the transforms: programs over T --------------------------------------------------------------------------------


def jvp(T, p):
    xs, outs = needs_floats(p)
    return T.jvp(p.float_function(), xs, p.likes(xs))


def vjp(T, p):
    xs, outs = needs_floats(p)
    out, pull = T.vjp(p.float_function(), *xs)
    return out, pull(p.likes(out))


def vmap(T, p):
    """Over each tensor alone."""
    if not p.tensors:
        raise Empty
    found = []
    for i, x in enumerate(p.tensors):
        dims = tuple(0 if j == i else None for j in range(len(p.tensors)))
        stacked = [guarded(torch.stack)([x, p.second(x)]) if j == i else y for j, y in enumerate(p.tensors)]
        found.append(T.vmap(p.call, in_dims=dims)(*stacked))
    return found


def _examples(p):
    return tuple(guarded(torch.stack)([x, p.second(x)]) for x in p.tensors)


def vmap_vjp(T, p):
    _, outs = needs_floats(p)
    cts = tuple(torch.stack([p.like(y) for _ in range(BATCH)]) for y in outs)
    one = lambda tensors, cts: T.vjp(p.float_function(tensors), *p.xs(tensors))[1](cts)
    return T.vmap(one)(_examples(p), cts)


def vmap_jvp(T, p):
    xs, _ = needs_floats(p)
    ts = tuple(torch.stack([p.like(x) for _ in range(BATCH)]) for x in xs)
    one = lambda tensors, ts: T.jvp(p.float_function(tensors), p.xs(tensors), ts)
    return T.vmap(one)(_examples(p), ts)


def _pullback(T, p):
    return lambda xs, cts: T.first_vjp(p.float_function(), *xs)[1](cts)


def jvp_vjp(T, p):
    xs, outs = needs_floats(p)
    cts = p.likes(outs)
    return T.jvp(_pullback(T, p), (xs, cts), (p.likes(xs), p.likes(outs)))


def vjp_vjp(T, p):
    xs, outs = needs_floats(p)
    out, pull = T.vjp(_pullback(T, p), xs, p.likes(outs))
    return out, pull(p.likes(out))


TRANSFORMS = {f.__name__: f for f in (jvp, vjp, vmap, vmap_vjp, vmap_jvp, jvp_vjp, vjp_vjp)}


# ----- what torch.func cannot: slow references --------------------------------------------------------------------------


def _loop(function, in_dims=0, randomness="different"):
    """vmap one example after the other."""

    def mapped(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        pick = lambda b: [
            pytree.tree_map(lambda x, d=d: x[b].clone() if d is not None else x, a)
            for a, d in zip(args, dims, strict=True)
        ]
        outs = [function(*pick(b)) for b in range(BATCH)]
        flat = [pytree.tree_flatten(o)[0] for o in outs]
        return pytree.tree_unflatten(
            [torch.stack(xs) for xs in zip(*flat, strict=True)], pytree.tree_structure(outs[0])
        )

    return mapped


STEPS = (1e-6, 1e-7)  # the second where the first is not right: it may cross a kink


def difference(step, function, primals, tangents):
    """Central differences."""
    at = lambda h: function(*pytree.tree_map(lambda x, t: x + h * t, primals, tangents))
    out, (up, down) = function(*primals), (at(step), at(-step))
    return out, pytree.tree_map(lambda a, b: (a - b) / (2 * step), up, down)


def _inner(a, b) -> torch.Tensor:
    """Re <a, b> over all tensors of two structures."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return sum((x.conj() * y).sum().real for x, y in pairs)


def pulled(step, function, *primals):
    """vjp by central differences, one element of the primals after the other."""
    leaves, spec = pytree.tree_flatten(primals)
    at = lambda i, x: function(*pytree.tree_unflatten([*leaves[:i], x, *leaves[i + 1 :]], spec))

    def pull(cts):
        def slope(i, e):
            return (_inner(cts, at(i, leaves[i] + e)) - _inner(cts, at(i, leaves[i] - e))) / (2 * step)

        found = []
        for i, x in enumerate(leaves):
            steps = [step * e.reshape(x.shape) for e in torch.eye(x.numel(), dtype=x.dtype)]
            g = [slope(i, e) + (1j * slope(i, 1j * e) if x.is_complex() else 0) for e in steps]
            found.append(torch.stack(g).reshape(x.shape) if g else torch.zeros_like(x))
        return pytree.tree_unflatten(found, spec)

    return function(*primals), pull


# ----- one entry ------------------------------------------------------------------------------------------------------


def features(sample) -> set[str]:
    tensors = [
        x
        for x in pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
        if isinstance(x, torch.Tensor)
    ]
    found = set()
    for x in tensors:
        found |= {"strided"} if x.layout is not torch.strided or not x.is_contiguous() else set()
        found |= {"0-d"} if x.ndim == 0 else set()
        found |= {"empty"} if x.numel() == 0 else set()
    if len({tuple(x.shape) for x in tensors}) > 1:
        found.add("shapes differ")
    return found


def choose(samples: Iterator, most: int | None) -> list:
    """Up to `most` samples: the first, then those that add a feature, then the earliest."""
    samples = list(itertools.islice(samples, 400))
    if most is None or len(samples) <= most:
        return samples
    chosen, seen = [samples[0]], features(samples[0])
    for s in samples[1:]:
        if len(chosen) < most and features(s) - seen:
            chosen.append(s)
            seen |= features(s)
    rest = [s for s in samples if not any(s is c for c in chosen)]
    return (chosen + rest)[:most]


class Draws(TorchDispatchMode):
    """Whether an op that draws random numbers was called."""

    def __init__(self):
        super().__init__()
        self.any = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.any |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


UNSET = {
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}  # memory as it was


def is_random(p: Problem, op) -> bool:
    """Whether the numbers are any, seen on a plain call; `Empty` if the op itself refuses the sample."""
    with Draws() as draws:
        try:
            p.call(*(t.clone() for t in p.tensors))
        except Exception as problem:
            raise Empty from problem
    return draws.any or op.name in UNSET


def first_line(problem: BaseException) -> str:
    """Type and first words; without the place, whose length would decide how many."""
    lines = re.sub(r" ?\(at [^)]*\)", "", str(problem)).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:160] if lines else ''}"


def guarded(function: Callable) -> Callable:
    """A transform, and the functions among its results, that say of their exceptions that they are theirs."""

    def call(*args, **kwargs):
        try:
            out = function(*args, **kwargs)
        except Exception as problem:
            problem.of_transform = True
            raise
        return pytree.tree_map(
            lambda x: guarded(x) if callable(x) and not isinstance(x, torch.Tensor) else x, out
        )

    return call


def attempt(transform, T, p) -> tuple[Any, BaseException | None]:
    torch.default_generator.manual_seed(0)
    p.generator.manual_seed(0)
    names = types.SimpleNamespace(
        jvp=guarded(T.jvp),
        vjp=guarded(T.vjp),
        first_vjp=guarded(getattr(T, "first_vjp", T.vjp)),
        vmap=lambda *args, **kwargs: guarded(T.vmap(*args, randomness="different", **kwargs)),
    )
    try:
        return transform(names, p), None
    except Exception as problem:
        if not hasattr(problem, "of_transform"):  # a fault of this harness
            raise
        return None, problem


def compare(ours, theirs, allowed: Callable[[int], float], random: bool) -> int:
    """Elements compared; raises Disagreement."""
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    if len(a) != len(b):
        raise Disagreement(f"{len(a)} results, torch gives {len(b)}")
    elements = 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            raise Disagreement(f"[{i}] {x.dtype}{list(x.shape)}, torch gives {y.dtype}{list(y.shape)}")
        if not random and (found := error(x, y)) > allowed(i):
            raise Disagreement(f"[{i}] error {found:.1e}, allowed {allowed(i):.1e}")
        elements += x.numel()
    return elements


def _wide(sample):
    """A sample in float64, the dtypes among its arguments too."""

    def wide(x):
        if isinstance(x, torch.Tensor):
            return x.double() if x.dtype == torch.float32 else x
        return torch.float64 if x is torch.float32 else x

    return sample.transform(wide)


def _allowed(transform, op, sample, p, theirs) -> Callable[[int], float]:
    """The larger of a fixed tolerance and 3 times torch's own float32 error against float64."""
    if p.dtype in TOLERANCE:
        return lambda i: INEXACT.get(op.formatted_name, TOLERANCE[p.dtype])
    exact, problem = attempt(transform, TORCH, Problem(op, _wide(sample), torch.float64))
    if problem is not None:
        return lambda i: FLOAT32
    pairs = list(zip(pytree.tree_leaves(theirs), pytree.tree_leaves(exact), strict=True))
    return lambda i: max(FLOAT32, 3 * error(*pairs[i])) if pairs[i][0].shape == pairs[i][1].shape else FLOAT32


def has_rules(name: str, rule: str) -> bool:
    """Whether an op has a rule of its own, or is written with ops that have."""
    namespace, packet, overload = name.split(".")
    op = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return op in decompose.table() or coverage.tiers(op).get(rule) in ("native", "composite", "decomposed")


def applies(op, transform: str, dtype: torch.dtype) -> bool:
    """Whether something must be compared: derivatives where torch has them."""
    if op.name.startswith("jiterator"):  # CUDA only
        return False
    return transform == "vmap" or dtype in op.supported_backward_dtypes("cpu")


def sweep_entry(op, most: int | None, dtypes) -> dict[tuple[str, str], Outcome]:
    """Outcomes by (transform, dtype)."""
    found = {}
    for dtype in dtypes:
        if dtype not in op.supported_dtypes("cpu"):
            continue
        torch.default_generator.manual_seed(0)
        samples = choose(op.sample_inputs("cpu", dtype, requires_grad=False), most)
        for name, transform in TRANSFORMS.items():
            outcome = _over(samples, functools.partial(_one, transform, op, dtype))
            if outcome is None and applies(op, name, dtype) and any(_has_tensors(s, name) for s in samples):
                outcome = Outcome("not_compared", ours="every sample was refused")
            if outcome is not None:
                found[name, str(dtype).removeprefix("torch.")] = outcome
    return found


def _has_tensors(sample, transform: str) -> bool:
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return (
        bool(tensors)
        if transform == "vmap"
        else any(x.is_floating_point() or x.is_complex() for x in tensors)
    )


def _over(samples, run) -> Outcome | None:
    """The outcomes of all samples as one: the worst, or agreement where there is any."""
    outcomes = []
    for sample in samples:
        try:
            outcomes.append(run(sample))
        except Empty:
            continue
    for status in ("wrong", "we_cannot"):
        bad = [o for o in outcomes if o.status == status]
        if bad:
            return bad[0]
    good = [o for o in outcomes if o.status == "agrees"]
    if good:
        return Outcome("agrees", len(good), sum(o.elements for o in good))
    return outcomes[0] if outcomes else None


def _one(transform, op, dtype, sample) -> Outcome:
    p = Problem(op, sample, dtype)
    random = is_random(p, op)
    theirs, cannot = attempt(transform, TORCH, Problem(op, sample, dtype))
    ours, problem = attempt(transform, fxfunc, p)
    if cannot is not None:
        return _alone(transform, op, sample, dtype, cannot, ours, problem, random)
    if problem is not None:
        return Outcome("we_cannot", ours=first_line(problem))
    try:
        elements = compare(ours, theirs, _allowed(transform, op, sample, p, theirs), random)
    except Disagreement as problem:
        if (reason := UNDECIDED.get(op.formatted_name)) is not None:
            return Outcome("torch_cannot", theirs="gives another answer", ours=f"can; {reason}")
        how = None if random else _settled(transform, op, sample, dtype, ours, theirs)
        if how is None:
            return Outcome("wrong", ours=str(problem))
        return Outcome("torch_cannot", theirs="gives another answer", ours=f"can; agrees with {how}")
    return Outcome("agrees", 1, elements)


def _alone(transform, op, sample, dtype, cannot, ours, problem, random) -> Outcome:
    """torch.func raised: our answer, if there is one, against a loop over examples and finite differences."""
    outcome = Outcome("torch_cannot", theirs=first_line(cannot))
    if problem is not None:
        outcome.ours = f"cannot either: {first_line(problem)}"
        return outcome
    if random:
        outcome.ours = "can; draws"
        return outcome
    if op.formatted_name in UNDECIDED:
        outcome.ours = f"can; {UNDECIDED[op.formatted_name]}"
        return outcome
    try:
        outcome.ours = f"can; agrees with {_checked(transform, op, sample, dtype, ours)}"
    except Disagreement as wrong:  # with what torch.func gives for one example, perhaps
        how = _settled(transform, op, sample, dtype, ours, None)
        if how is None:
            return Outcome("wrong", theirs=outcome.theirs, ours=str(wrong))
        outcome.ours = f"can; agrees with {how}"
    return outcome


def _settled(transform, op, sample, dtype, ours, theirs) -> str | None:
    """Two answers differ: the slow reference that ours agrees with and torch's does not, roughly or closely."""
    check = functools.partial(_checked, op=op, sample=sample, dtype=dtype, trusted=False)
    for tolerance in (1e-4, 1e-6):
        try:
            how = check(transform, answer=ours, tolerance=tolerance)
            if transform in (jvp_vjp, vjp_vjp):  # whose reference takes our first derivative for granted
                first, _ = attempt(vjp, fxfunc, Problem(op, sample, dtype))
                check(vjp, answer=first, tolerance=1e-4)
        except Disagreement:
            return None
        if theirs is None:
            return how
        try:
            check(transform, answer=theirs, tolerance=tolerance)
        except Disagreement:
            return how
    return None


def _checked(transform, op, sample, dtype, answer, trusted: bool = True, tolerance: float = 1e-4) -> str:
    """The slow reference that an answer agrees with; raises Disagreement."""
    for step in STEPS:
        try:
            return _checked_at(step, transform, op, sample, dtype, answer, trusted, tolerance)
        except Disagreement as wrong:
            problem = wrong
    raise problem


def _checked_at(step, transform, op, sample, dtype, answer, trusted, tolerance) -> str:
    narrow, sample = dtype is torch.float32, _wide(sample)
    wide = torch.float64 if narrow else dtype
    expected, how = _slowly(step, transform, op, sample, wide, trusted)
    found, spec = pytree.tree_flatten(expected)
    given = pytree.tree_leaves(answer)
    expected = pytree.tree_unflatten([x.to(y.dtype) for x, y in zip(found, given, strict=True)], spec)
    tolerance = 1e-3 if narrow else 1e-10 if transform is vmap else tolerance
    try:
        compare(answer, expected, lambda i: tolerance, random=False)
    except Disagreement as wrong:
        raise Disagreement(f"against {how}: {wrong}") from None
    return how


def _references(step, transform, trusted: bool) -> dict:
    """Slow ways to the same answer, by name; trusted: what torch.func gives for one example is."""
    numeric = types.SimpleNamespace(
        jvp=functools.partial(difference, step), vjp=functools.partial(pulled, step), vmap=_loop
    )
    of = lambda T: types.SimpleNamespace(**vars(numeric), first_vjp=T.vjp)
    if transform is vmap or not trusted:
        second = (
            "finite differences of fxfunc.vjp" if transform in (jvp_vjp, vjp_vjp) else "finite differences"
        )
        return {"a loop": of(fxfunc)} if transform is vmap else {second: of(fxfunc)}
    loop = types.SimpleNamespace(jvp=torch.func.jvp, vjp=torch.func.vjp, vmap=_loop, first_vjp=torch.func.vjp)
    return {
        "a loop over torch.func": loop,
        "finite differences": of(torch.func),
        "finite differences of fxfunc.vjp": of(fxfunc),
    }


def _slowly(step, transform, op, sample, dtype, trusted: bool) -> tuple[Any, str]:
    """The answer of the first slow reference that gives one, and which."""
    for how, slow in _references(step, transform, trusted).items():
        expected, failed = attempt(transform, slow, Problem(op, sample, dtype))
        if failed is None:
            return expected, how
    raise Disagreement(f"no reference: {first_line(failed)}")
