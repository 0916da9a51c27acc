"""Calls of compiled functions that are like one before. Entry points: `Dispatch`, `MISS`.

A call that was checked in full teaches what it was like. One test in C (torch's TensorGuards) then says of all tensors of a
call whether they are alike: class, dtype, device, sizes, strides, bits, requires_grad, and that no transform of torch.func, no
dispatch mode and no inference mode is on that was not. The rest, the structure, is a straight-line function written for it.
Whatever is not alike is a `MISS`, for the caller to check in full and to give the errors.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxfunc.codegen.backends import Program
from fxfunc.codegen.promises import Promises, Single
from fxfunc.passes.tracer import recorders

from .capture import own_memory
from .signature import TENSOR, Signature

MISS = object()
LESSONS = 8  # a function whose calls keep changing is checked in full
_PLAIN = (Tensor, torch.nn.Parameter)
_Guards = torch._C._dynamo.guards.TensorGuards


def _miss(args: tuple, kwargs: dict) -> object:
    return MISS


class Dispatch:
    """`call(args, kwargs)` gives the result of one compiled function, or MISS; `learn` says what a checked call was like."""

    def __init__(self, signature: Signature, closed: Sequence[Tensor]):
        self.signature, self.closed = signature, closed
        self.call: Callable[[tuple, dict], object] = _miss
        self._lessons = LESSONS

    def learn(self, program: Program, tensors: Sequence[Tensor]) -> None:
        """Take calls with tensors like these, those of the arguments and then `closed`."""
        if self._lessons and _is_ordinary(tensors):
            self._lessons -= 1
            self.call = _specialised(self.signature, self.closed, program, tensors)


def _is_ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors and the state of this thread have nothing about them that only a full check knows how to take."""
    return (
        len(tensors) > 0
        and all(type(t) in _PLAIN and not (t.is_conj() or t.is_neg()) for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not recorders()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _without_repeats(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Their positions in groups, none of which has a tensor twice: TensorGuards take none that has."""
    groups: dict[int, list[int]] = collections.defaultdict(list)
    seen: collections.Counter[int] = collections.Counter()
    for i, t in enumerate(tensors):
        groups[seen[id(t)]].append(i)
        seen[id(t)] += 1
    return list(groups.values())


def _specialised(
    signature: Signature, closed: Sequence[Tensor], program: Program, tensors: Sequence[Tensor]
) -> Callable[[tuple, dict], object]:
    """The function for calls with tensors like these, or one that misses all, for structures that are not tuples, lists and
    dicts."""
    writer = _Writer(signature)
    if not writer.read_arguments():
        return _miss
    inputs = [*writer.tensors, *(writer.bind(f"closed_{i}", t) for i, t in enumerate(closed))]
    writer.check(program, tensors, inputs)
    writer.run(program.call, inputs, all(t.is_contiguous() for t in tensors))
    writer.give()
    text = "\n    ".join(["def dispatch(args, kwargs):", *writer.lines]) + "\n"
    exec(compile(text, "<fxfunc>/dispatch.py", "exec"), writer.scope)
    return writer.scope["dispatch"]


class _Writer:
    """Writes the lines of one function, whose globals are `scope`."""

    def __init__(self, signature: Signature):
        self.signature = signature
        self.lines: list[str] = []
        self.scope: dict[str, object] = {"MISS": MISS}
        self.tensors: list[str] = []
        self._leaves = iter(signature.in_leaves)
        self._names = (f"x{i}" for i in itertools.count())

    def bind(self, name: str, value: object) -> str:
        """The global of that name, which holds a value."""
        self.scope[name] = value
        return name

    def miss_if(self, condition: str) -> None:
        self.lines.append(f"if {condition}: return MISS")

    # ---- arguments ----

    def read_arguments(self) -> bool:
        """Take the arguments apart; false if there is a node of another kind in them."""
        args, kwargs = self.signature.in_spec.children()
        return self.read(args, "args") and self.read(kwargs, "kwargs")

    def read(self, spec: pytree.TreeSpec, x: str) -> bool:
        """Take a value apart: a name for each leaf, or none where a plain one is as it was."""
        if spec.is_leaf():
            self.leaf(x)
            return True
        if spec.type not in (tuple, list, dict):
            return False
        children, values = spec.children(), x
        self.miss_if(f"type({x}) is not {spec.type.__name__} or len({x}) != {len(children)}")
        if spec.type is dict and children:
            self.miss_if(f"list({x}) != {self.bind(f'keys_{x}', list(spec.context))}")
            values = f"{x}.values()"
        names = list(itertools.islice(self._names, len(children)))
        if names:
            self.lines.append(f"{', '.join(names)}, = {values}")
        return all(self.read(child, name) for child, name in zip(children, names, strict=True))

    def leaf(self, x: str) -> None:
        expected = next(self._leaves)
        if expected is TENSOR:
            self.tensors.append(x)
            return
        value, kind = self.bind(f"plain_{x}", expected), self.bind(f"type_{x}", type(expected))
        self.miss_if(f"type({x}) is not {kind} or {x} != {value}")

    def check(self, program: Program, like: Sequence[Tensor], inputs: Sequence[str]) -> None:
        """Miss what is not alike, duals, what autograd would see, and all once the program is another."""
        for group in _without_repeats(like):
            guards = _Guards(*(like[i] for i in group), dynamic_dims_sizes=None, dynamic_dims_strides=None)
            alike = self.bind(f"alike_{group[0]}", guards.check)
            self.miss_if(f"not {alike}({', '.join(inputs[i] for i in group)})")
        self.bind("forward_ad", forward_ad)
        self.miss_if("forward_ad._current_level >= 0")
        if any(t.requires_grad for t in like):
            self.miss_if(f"{self.bind('is_grad_enabled', torch.is_grad_enabled)}()")
        self.bind("program", program)
        self.miss_if(f"program.call is not {self.bind('call', program.call)}")

    # ---- results ----

    def run(self, call: Callable, inputs: Sequence[str], dense: bool) -> None:
        """The results as a list; straight to the one C++ program that is all there is to call, if it may take these inputs."""
        promises: Promises | None = getattr(call, "promises", None)
        self.places: Sequence[int] = range(self.signature.out_leaves.count(TENSOR))
        if promises and promises.single and dense:
            self.run_single(promises.single, inputs)
            return
        self.lines.append(f"results = call([{', '.join(inputs)}])")
        if not (promises and promises.owned):
            own = self.bind("own_memory", own_memory)
            self.lines.append(f"results = {own}(results, [{', '.join(inputs)}])")

    def run_single(self, single: Single, inputs: Sequence[str]) -> None:
        operands = [
            inputs[x] if isinstance(x, int) else self.bind(f"constant_{i}", x)
            for i, x in enumerate(single.operands)
        ]
        run, self.places = self.bind("run", single.program.run), single.results
        self.lines.append(f"results = {run}(({''.join(x + ', ' for x in operands)}))")

    def give(self) -> None:
        """The results in the structure that the function gave them."""
        leaves = iter(self.signature.out_leaves)
        tensors = (f"results[{i}]" for i in self.places)
        self.lines.append(f"return {self.made(self.signature.out_spec, leaves, tensors)}")

    def made(self, spec: pytree.TreeSpec, leaves: Iterator, tensors: Iterator[str]) -> str:
        """A result as source."""
        if spec.is_leaf():
            x = next(leaves)
            return next(tensors) if x is TENSOR else self.bind(f"result_{next(self._names)}", x)
        parts = [self.made(child, leaves, tensors) for child in spec.children()]
        inside = "".join(f"{p}, " for p in parts)
        if spec.type is tuple:
            return f"({inside})"
        if spec.type is list:
            return f"[{inside}]"
        context = self.bind(f"context_{next(self._names)}", spec.context)
        if spec.type is dict:
            return f"dict(zip({context}, ({inside})))"
        node = self.bind(f"unflatten_{next(self._names)}", pytree.SUPPORTED_NODES[spec.type].unflatten_fn)
        return f"{node}([{inside}], {context})"
