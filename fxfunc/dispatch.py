"""Calls of compiled functions that are like one before. Entry points: `Dispatch` (of `Compiled`), `repeated` (of `jit`), `MISS`.

A call that was checked in full teaches what it was like. One test in C (torch's TensorGuards) then says of all tensors of a
call whether they are alike: class, dtype, device, sizes, strides, bits, requires_grad, and that no transform of torch.func, no
dispatch mode and no inference mode is on that was not. The rest, the structure, is a straight-line function written for it.
Whatever is not alike is a `MISS`, for the caller to check in full and to give the errors.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxfunc.codegen.backends import Program
from fxfunc.codegen.promises import Promises, Single
from fxfunc.passes.graph import Graph
from fxfunc.passes.tracer import recorders

from .capture import own_memory, write_back
from .signature import TENSOR, Signature

if TYPE_CHECKING:
    from .jit import _Entry

MISS = object()
LESSONS = 8  # a function whose calls keep changing is checked in full
_PLAIN = (Tensor, torch.nn.Parameter)
_Guards = torch._C._dynamo.guards.TensorGuards


Short = Callable[[tuple, dict], object]  # (args, kwargs) -> the result, or MISS


def miss(args: tuple, kwargs: dict) -> object:
    """No call is like one before."""
    return MISS


class Dispatch:
    """`call(args, kwargs)` gives the result of one compiled function, or MISS; `learn` says what a checked call was like."""

    def __init__(self, signature: Signature, closed: Sequence[Tensor]):
        self.signature, self.closed = signature, closed
        self.call: Short = miss
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
) -> Short:
    """The function for calls with tensors like these, or one that misses all, for structures that are not tuples, lists and
    dicts."""
    writer = _Writer(signature)
    if not writer.read_arguments():
        return miss
    inputs = [*writer.tensors, *(writer.bind(f"closed_{i}", t) for i, t in enumerate(closed))]
    writer.check(tensors, inputs)
    if any(t.requires_grad for t in tensors):
        writer.miss_if(f"{writer.bind('is_grad_enabled', torch.is_grad_enabled)}()")
    writer.bind("program", program)
    writer.miss_if(f"program.call is not {writer.bind('call', program.call)}")
    writer.run(program.call, inputs, all(t.is_contiguous() for t in tensors))
    return writer.function()


def repeated(
    signature: Signature,
    entry: _Entry,
    tensors: Sequence[Tensor],
    state: tuple,
    modes: Callable[[], tuple],
    hit: Callable[[], None],
) -> Short:
    """The function for calls of a jitted function that fit one entry of its cache, whose tensors are those of the arguments
    and then the closures; `modes()` must be the `state` that it was made in, `hit()` is told of each call."""
    count, graph = signature.in_leaves.count(TENSOR), entry.captured.graph
    plain = all(x is TENSOR or _is_exact(x) for x in signature.in_leaves)
    writer = _Writer(signature)
    if not (count and plain and not graph.written and _is_ordinary(tensors) and writer.read_arguments()):
        return miss
    writer.check(tensors[:count], writer.tensors)
    for x, t in zip(writer.tensors, tensors, strict=False):
        writer.miss_if(f"{x}.storage_offset() % 16 {'!=' if t.storage_offset() % 16 == 0 else '=='} 0")
    writer.scope |= {
        "modes": modes,
        "state": state,
        "hit": hit,
        "closures": entry.closures,
        "call": entry.call,
    }
    writer.miss_if("modes() != state")
    writer.lines.append("closed = closures()")
    writer.miss_if("closed is None")
    writer.lines.append("hit()")
    writer.run_and_own(graph, writer.tensors)
    return writer.function()


def _is_exact(x: object) -> bool:
    """Whether a plain value is equal to itself and to no other, by type and ==; zeros have signs and a nan is no nan's equal."""
    return type(x) in (int, bool, str, type(None)) or type(x) is float and x != 0 and x == x


def _promises(call: Callable) -> Promises | None:
    """What a callable promises; one that is compiling in the background, nothing."""
    return getattr(call, "promises", None)


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

    def check(self, like: Sequence[Tensor], inputs: Sequence[str]) -> None:
        """Miss what is not alike, and dual tensors, which are."""
        for group in _without_repeats(like):
            guards = _Guards(*(like[i] for i in group), dynamic_dims_sizes=None, dynamic_dims_strides=None)
            alike = self.bind(f"alike_{group[0]}", guards.check)
            self.miss_if(f"not {alike}({', '.join(inputs[i] for i in group)})")
        self.bind("forward_ad", forward_ad)
        self.miss_if("forward_ad._current_level >= 0")

    # ---- results ----

    def run(self, call: Callable, inputs: Sequence[str], dense: bool) -> None:
        """The results as a list; straight to the one C++ program that is all there is to call, if it may take these inputs."""
        promises = _promises(call)
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

    def run_and_own(self, graph: Graph, inputs: Sequence[str]) -> None:
        """The results of a jitted function: those that it made are in memory of their own."""
        self.places = range(self.signature.out_leaves.count(TENSOR))
        self.lines += [f"inputs = [{', '.join(inputs)}, *closed]", "results = call(inputs)"]
        promises = _promises(self.scope["call"])
        if graph.fresh and not (promises and promises.owned):
            self.scope |= {"write_back": write_back, "graph": graph}
            self.lines.append("results = write_back(graph, inputs, results)")

    def function(self) -> Short:
        """The function, which gives the results in the structure that they have."""
        leaves = iter(self.signature.out_leaves)
        tensors = (f"results[{i}]" for i in self.places)
        self.lines.append(f"return {self.made(self.signature.out_spec, leaves, tensors)}")
        text = "\n    ".join(["def dispatch(args, kwargs):", *self.lines]) + "\n"
        exec(compile(text, "<fxfunc>/dispatch.py", "exec"), self.scope)
        return self.scope["dispatch"]

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
