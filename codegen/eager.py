"""A lowered graph as straight-line Python over ATen. Entry points: `emit` (a callable), `source` (its text).

Values are freed right after their last use. Symbolic sizes are read off the input shapes once. `scan` is a loop, `cond` an if.
Outputs are ordinary tensors: an output that is an input is that very tensor, one that views an input shares its memory, as
in torch.func. No two outputs share memory otherwise, and none shares it with a constant of the graph: what would is copied.
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fxfunc.passes import errors
from fxfunc.passes.dims import Dim, Size
from fxfunc.passes.dump import saw_source
from fxfunc.passes.graph import Graph, Literal, Op, Val, barrier, cond, constant, getitem, root, scan

from .calls import best
from .loops import Kernel, native
from .loops import kernel as kernel_op
from .mapped import Tasks, Together
from .promises import promises

# What a graph becomes: flat tensors in (its inputs), flat results out.
Program = Callable[[Sequence[Tensor]], list[Tensor | None]]
# What computes a kernel: operands and the values of its symbolic sizes -> outputs.
Launcher = Callable[[Sequence[Tensor], dict[str, int]], tuple[Tensor, ...]]

_numbers = itertools.count()
_RESERVED = frozenset(keyword.kwlist) | frozenset(dir(builtins))


def emit(graph: Graph, kernels: Mapping[Kernel, Launcher] | None = None) -> Program:
    """The graph as a callable; `kernels` computes its `kernel` nodes.

    It runs without gradients and autocast, whatever is on around it. Its argument is read once: where the caller keeps no
    reference to a temporary list of inputs, these are freed after their last use too. Raises DynamicShape if a symbolic
    size is no axis of an input, BackendError for a node that is not lowered.
    """
    writer = _Writer(graph, kernels or {})
    text = writer.text()
    saw_source("program", text)
    number = next(_numbers)
    # `<` keeps our lines out of the user's; the loader lets tracebacks show them.
    scope = {**writer.scope, "__name__": f"program_{number}", "__loader__": _Source(text)}
    exec(compile(text, f"<fxfunc>/program_{number}.py", "exec"), scope)
    scope["program"].promises = promises(graph)
    return scope["program"]


def source(graph: Graph) -> str:
    """The text that `emit` compiles, for people."""
    return _Writer(graph, None).text()


_DENSE = (torch.ops.aten.native_group_norm.default,)  # whose first operand must lie as its shape says


class _Source:
    """Gives linecache the text of a program for as long as the program lives."""

    def __init__(self, text: str):
        self.get_source = lambda name: text


class _Writer:
    """Writes one program. `scope` are its globals; every name in it, local or global, is distinct and chosen by `fresh`."""

    def __init__(self, graph: Graph, kernels: Mapping[Kernel, Launcher] | None):
        self.graph, self.kernels = graph, kernels
        self.scope: dict[str, object] = {}
        self.taken: set[str] = {"program", "tensors", "grad", "autocast", "sizes"}
        self.globals: dict[object, str] = {}
        self.names: dict[Node, str] = {}
        self.sizes: dict[str, str] = {}
        self.prologue: dict[str, str] = {}
        self.lines: list[str] = []

    def text(self) -> str:
        """The source of the program."""
        names = [self.name(n) for n in self.graph.inputs]
        self.sizes = {name: self.fresh(name) for name in _dims_used(self.graph)}
        self.block(self.graph, "        ", set(self.graph.inputs))
        self.lines.append(f"        return [{', '.join(self.results())}]")
        is_grad, set_grad = (
            self.bind("is_grad", torch.is_grad_enabled),
            self.bind("set_grad", torch._C._set_grad_enabled),
        )
        head = ["def program(tensors):", f"    grad = {is_grad}()", f"    {set_grad}(False)",
                f"    autocast = {self.bind('no_autocast', _no_autocast)}()", "    try:"]  # fmt: skip
        head += (
            [f"        {''.join(n + ', ' for n in names)}= tensors", "        del tensors"] if names else []
        )
        head += [
            f"        {line}"
            for line in [*self.read_sizes(), *(f"{v} = {k}" for k, v in self.prologue.items())]
        ]
        first = [self.names[n] for n in self.graph.inputs if n not in _used(self.graph)]
        head += [f"        del {', '.join(first)}"] if first else []
        tail = ["    finally:", f"        {set_grad}(grad)", "        del autocast"]
        return "\n".join([*head, *self.lines, *tail]) + "\n"

    # ---- names ----

    def fresh(self, wanted: str) -> str:
        """A new identifier like `wanted`, whatever characters that has."""
        base = re.sub(r"\W", "_", wanted, flags=re.ASCII)[:80] or "v"
        base = f"v{base}" if base[0].isdigit() or base[0] == "_" else base
        name, count = base, 1
        while name in self.taken or name in _RESERVED:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def name(self, node: Node) -> str:
        """The new local that holds a node."""
        self.names[node] = self.fresh(node.name)
        return self.names[node]

    def bind(self, wanted: str, value: object) -> str:
        """The global that holds a value."""
        key = value if isinstance(value, (torch.dtype, torch.device, Literal, Kernel)) else id(value)
        if key not in self.globals:
            self.globals[key] = self.fresh(wanted)
            self.scope[self.globals[key]] = value
        return self.globals[key]

    # ---- sizes ----

    def read_sizes(self) -> list[str]:
        """Lines that read each symbolic size off an input."""
        lines = []
        for name, local in self.sizes.items():
            found = next(
                (
                    (n, i)
                    for n in self.graph.inputs
                    for i, s in enumerate(n.meta["val"].shape)
                    if s == Dim(name)
                ),
                None,
            )
            if found is None:
                raise errors.DynamicShape(what=f"the size {name}, which no input has as an axis of its own")
            lines.append(f"{local} = {self.names[found[0]]}.size({found[1]})")
        return lines

    def size(self, d: Dim) -> str:
        """A Dim over the locals that hold the sizes."""
        return (
            "("
            + " + ".join(
                "*".join([str(c)] * (c != 1 or not m) + [self.atom(a) for a in m]) for m, c in d.terms
            )
            + ")"
        )

    def atom(self, a: str | tuple) -> str:
        return self.sizes[a] if isinstance(a, str) else f"({self.size(a[1])} {a[0]} {a[2]})"

    def early(self, text: str, name: str) -> str:
        """A local set once before everything else."""
        if text not in self.prologue:
            self.prologue[text] = self.fresh(name)
        return self.prologue[text]

    # ---- arguments ----

    def arg(self, x: object) -> str:
        """An argument as source."""
        if isinstance(x, Node):
            return self.names[x]
        if isinstance(x, (list, tuple)):
            return self.sequence(x)
        if isinstance(x, Dim):
            return self.size(x)
        if x is None or isinstance(x, (bool, int, str)):
            return repr(x)
        if isinstance(x, float):
            return (
                repr(x)
                if math.isfinite(x)
                else self.bind("nan" if x != x else "inf", x)
                if x != -math.inf
                else f"-{self.bind('inf', math.inf)}"
            )
        return self.bind(str(x).removeprefix("torch."), x)

    def sequence(self, xs: Sequence) -> str:
        """A list of tensors is a list, one of sizes a tuple: a constant, or made once before everything else."""
        text = ", ".join(map(self.arg, xs))
        if any(isinstance(x, Node) for x in xs):
            return f"[{text}]"
        text = f"({text},)" if len(xs) == 1 else f"({text})"
        return self.early(text, "size") if any(isinstance(x, Dim) for x in xs) else text

    # ---- nodes ----

    def block(self, graph: Graph, indent: str, owned: set[Node], kept: Iterable[Node] = ()) -> None:
        """The calls of a graph whose inputs have names. `owned` inputs, and all values but outputs, are freed when dead."""
        last = {m: n for n in graph.nodes for m in n.all_input_nodes}
        keep = {*graph.outputs, *kept}
        for n in graph.nodes:
            self.node(n, indent, n in last or n in keep)
            owned.add(n)
            dead = [m for m in n.all_input_nodes if last[m] is n and m in owned and m not in keep]
            if dead:
                self.lines.append(f"{indent}del {', '.join(self.names[m] for m in dead)}")

    def node(self, n: Node, indent: str, read: bool) -> None:
        """One call, its result bound if somebody reads it."""
        if n.target is scan:
            self.scan(n, indent)
            return
        if n.target is cond:
            self.cond(n, indent)
            return
        call = self.call(n)
        where = n.meta.get("source")
        tail = f"  # {_comment(where)}" if where else ""
        self.lines.append(f"{indent}{self.name(n)} = {call}{tail}" if read else f"{indent}{call}{tail}")

    def call(self, n: Node) -> str:
        """The right side of a node."""
        op, args = n.target, n.args
        if op is getitem:
            return f"{self.arg(args[0])}[{int(args[1])}]"
        if op is constant:
            return self.literal(args[0])
        if op is barrier:
            return self.arg(args[0])
        if op is kernel_op:
            return self.kernel(n)
        if op is native:
            return f"{self.bind(args[0].name, args[0])}([{', '.join(map(self.arg, args[1:]))}])"
        if isinstance(op, Op):
            raise errors.BackendError(
                backend="eager",
                what=f"{op} is not lowered",
                instead="Lower the graph first (passes/pipeline.py).",
            )
        args, kwargs = _positional(op, args, n.kwargs)
        given = [self.arg(a) for a in args] + [f"{k}={self.arg(v)}" for k, v in kwargs.items()]
        if op in _DENSE:
            given[0] += ".contiguous()"
        function = best(op, args)
        module = "torch" if function is not getattr(op, "_op", op) else "aten"
        return f"{self.bind(f'{module}_{_op_name(op, module)}', function)}({', '.join(given)})"

    def literal(self, x: Literal) -> str:
        return self.bind("constant", x.tensor)

    def kernel(self, n: Node) -> str:
        """A call of a kernel's launcher with its operands and sizes."""
        k, *operands = n.args
        launcher = None if self.kernels is None else self.kernels.get(k)
        if launcher is None and self.kernels is not None:
            raise errors.BackendError(
                backend="eager", what=f"nothing computes the kernel {k.name}", instead="Give its launcher."
            )
        sizes = ", ".join(f"{name!r}: {self.sizes[name]}" for name in k.sizes)
        call = f"{self.bind(f'kernel_{k.name}', launcher or k)}([{', '.join(map(self.arg, operands))}], {{{sizes}}})"
        return call + "[0]" if isinstance(n.meta["val"], Val) else call

    # ---- loops ----

    def scan(self, n: Node, indent: str) -> None:
        """A loop over the steps; ys are written into outputs made before it, or listed for the loops that read them."""
        body, consts, carry, xs = n.args
        inputs = iter(body.inputs)
        for x, inner in zip(consts, inputs, strict=False):
            self.names[inner] = self.names[x]
        state, steps = [next(inputs) for _ in carry], list(inputs)
        for x, inner in zip(carry, state, strict=True):
            self.lines.append(f"{indent}{self.name(inner)} = {self.names[x]}")
        ys, stores, cells = [], [], {}
        listed = _lists(n)
        for i, v in enumerate(body.out_vals[len(carry) :], len(carry)):
            if i in listed:
                ys.append(self.list(indent))
                stores.append(f"{ys[-1]}.append")
            else:
                ys.append(self.output(v, n.kwargs["length"], indent))
                cell = self.fresh("cell")
                stores.append(f"{cell}.copy_")
                cells[cell] = ys[-1]
        self.header(n, [*zip(xs, steps, strict=True)], cells, indent)
        self.body(body, state, steps, stores, cells, indent + "    ")
        if n.kwargs["reverse"]:
            self.lines += [f"{indent}{y}.reverse()" for y in ys if y not in cells.values()]
        results = [*(self.names[x] for x in state), *ys]
        self.lines.append(f"{indent}{self.name(n)} = [{', '.join(results)}]")
        if results:
            self.lines.append(f"{indent}del {', '.join(results)}")

    def list(self, indent: str) -> str:
        """A new list for results that only loops read, step by step."""
        name = self.fresh("ys")
        self.lines.append(f"{indent}{name} = []")
        return name

    def output(self, val: Val, length: Size, indent: str) -> str:
        """A new tensor for stacked results."""
        name = self.fresh("ys")
        dtype, device = self.arg(val.dtype), self.arg(val.device)
        shape = self.arg((length, *val.shape))
        self.lines.append(
            f"{indent}{name} = {self.bind('torch_empty', torch.empty)}({shape}, dtype={dtype}, device={device})"
        )
        return name

    def header(self, n: Node, xs: Sequence[tuple[Node, Node]], cells: Mapping[str, str], indent: str) -> None:
        """The `for` line: a step's xs, and the places of its ys."""
        unbind = self.bind("torch_unbind", torch.unbind)
        turn = "[::-1]" if n.kwargs["reverse"] else ""
        sources = [
            f"range({self.arg(n.kwargs['length'])})",
            *(f"{self.names[x] if _is_list(x) else f'{unbind}({self.names[x]})'}{turn}" for x, _ in xs),
            *(f"{unbind}({y}){turn}" for y in cells.values()),
        ]
        targets = [self.fresh("step"), *(self.name(inner) for _, inner in xs), *cells]
        where = n.meta.get("source")
        tail = f"  # {_comment(where)}" if where else ""
        loop = (
            f"{targets[0]} in {sources[0]}"
            if len(sources) == 1
            else f"{', '.join(targets)} in zip({', '.join(sources)})"
        )
        self.lines.append(f"{indent}for {loop}:{tail}")

    def body(
        self,
        body: Graph,
        state: Sequence[Node],
        steps: Sequence[Node],
        stores: Sequence[str],
        cells: Iterable[str],
        indent: str,
    ) -> None:
        """One step: from the carry and a slice of each x to the new carry, and each y where `stores` puts it."""
        used, before = _used(body), len(self.lines)
        unused = [x for x in [*state, *steps] if x not in used]
        if unused:
            self.lines.append(f"{indent}del {', '.join(self.names[x] for x in unused)}")
        self.block(body, indent, {*state, *steps})
        outs = [self.names[x] for x in body.outputs]
        new, rest = outs[: len(state)], outs[len(state) :]
        self.lines += [f"{indent}{store}({y})" for store, y in zip(stores, rest, strict=True)]
        old = [self.names[x] for x in state]
        if new != old:
            self.lines.append(f"{indent}{', '.join(old)} = {', '.join(new)}")
        dead = {self.names[x] for x in body.outputs if x in body.nodes or x in steps} | set(cells)
        if dead:
            self.lines.append(f"{indent}del {', '.join(sorted(dead))}")
        elif len(self.lines) == before:
            self.lines.append(f"{indent}pass")

    # ---- branches ----

    def cond(self, n: Node, indent: str) -> None:
        """An if over the value of the predicate."""
        *branches, pred, operands = n.args
        result, where = self.name(n), n.meta.get("source")
        tail = f"  # {_comment(where)}" if where else ""
        for head, body in zip((f"if {self.names[pred]}:{tail}", "else:"), branches, strict=True):
            self.lines.append(f"{indent}{head}")
            self.names |= {inner: self.names[x] for x, inner in zip(operands, body.inputs, strict=True)}
            self.block(body, indent + "    ", set())
            outs = [self.names[x] for x in body.outputs]
            self.lines.append(f"{indent}    {result} = [{', '.join(outs)}]")
            if own := sorted({self.names[x] for x in body.outputs if x in body.nodes}):
                self.lines.append(f"{indent}    del {', '.join(own)}")

    # ---- results ----

    def results(self) -> list[str]:
        """The outputs, copied where they would share memory with a constant or with an earlier output."""
        seen: set[object] = set(self.graph.inputs)
        out = []
        for n in self.graph.outputs:
            owner = None if n is None else root(n)
            copied = n is not None and (
                owner in seen and owner not in self.graph.inputs or _is_constant(owner) or _is_shared(owner)
            )
            seen.add(owner)
            out.append(
                "None"
                if n is None
                else f"{self.bind('torch_clone', torch.clone)}({self.names[n]})"
                if copied
                else self.names[n]
            )
        return out


def _no_autocast() -> object | None:
    """A guard that turns autocast off until it is dropped, if it is on."""
    return torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else None


def _op_name(op: torch._ops.OpOverload, module: str) -> str:
    name = op._schema.name.split("::")[1]
    return f"{name}_{op._overloadname}" if module == "aten" and op._overloadname != "default" else name


def _comment(where: object) -> str:
    """A source line's file name and number, with nothing that could end a comment."""
    return re.sub(r"[^\x20-\x7e]", "?", os.path.basename(str(where)))[:120]


def _positional(
    op: torch._ops.OpOverload, args: Sequence, kwargs: Mapping[str, object]
) -> tuple[tuple, dict[str, object]]:
    """The same arguments, by position as far as the schema allows."""
    if not kwargs:
        return tuple(args), {}
    out, rest = list(args), dict(kwargs)
    for a in op._schema.arguments[len(args) :]:
        if a.kwarg_only or a.name not in rest:
            break
        out.append(rest.pop(a.name))
    return tuple(out), rest


def _used(graph: Graph) -> set[Node | None]:
    """What the calls and outputs of a graph read."""
    return {m for n in graph.nodes for m in n.all_input_nodes} | set(graph.outputs)


def _is_list(n: Node) -> bool:
    """True for stacked results that are kept as a list, one tensor a step."""
    return n.target is getitem and n.args[0].target is scan and n.args[1] in _lists(n.args[0])


def _lists(n: Node) -> set[int]:
    """Which stacked results of a scan are read by other scans alone, a step at a time: nothing has to be copied."""
    items = [m for m in n.users if m.target is getitem and m.args[1] >= len(n.args[2])]
    whole = {m.args[1] for m in items if not all(_only_steps(m, user) for user in m.users)}
    return {m.args[1] for m in items} - whole


def _only_steps(x: Node, user: Node) -> bool:
    """Whether a call reads a value as the xs of a loop and in no other way."""
    return user.target is scan and x not in user.args[1] and x not in user.args[2]


def _is_constant(owner: object) -> bool:
    return isinstance(owner, Node) and owner.target is constant


def _is_shared(owner: object) -> bool:
    """True for a result of a cond that in one branch has the memory of an operand, a constant or another result."""
    if not (isinstance(owner, tuple) and owner[0].target is cond):
        return False
    for body in owner[0].args[:2]:
        roots = [root(x) for x in body.outputs]
        inside = roots[owner[1]]
        if inside in body.inputs or roots.count(inside) > 1 or _is_constant(inside) or _is_shared(inside):
            return True
    return False


def _dims_used(graph: Graph) -> list[str]:
    """The names of the symbolic sizes that calls use, sorted."""
    found: set[str] = set()
    for n in graph.nodes:
        found |= _dims_in([n.args, list(n.kwargs.values())])
    return sorted(found)


def _dims_in(x: object) -> set[str]:
    if isinstance(x, Dim):
        return x.names()
    if isinstance(x, (Kernel, Tasks, Together)):
        return set(x.sizes)
    if isinstance(x, Graph):
        shapes = {name for v in x.out_vals if v is not None for name in _dims_in(list(v.shape))}
        return shapes | set(_dims_used(x))
    if isinstance(x, (list, tuple)):
        return set().union(*map(_dims_in, x))
    return set()
