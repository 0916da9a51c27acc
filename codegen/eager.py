"""The CPU fallback and oracle: a lowered graph as straight-line Python over ATen. Entry points: `emit` and `source`.

Dead values are freed where they die, scans are Python loops over a function of their own, symbolic sizes are read off the
inputs once. A call goes through torch's builtin where that is the very same overload (`BUILTINS`, tested), else through
the overload's own entry: both skip Python wrappers. Outputs may alias inputs or each other, as views in torch do.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Node

from fxfunc.passes import errors
from fxfunc.passes.dims import Dim
from fxfunc.passes.graph import Graph, Val, constant, getitem, scan

aten = torch.ops.aten

# Overloads that torch's function of the same name calls when given the same positional arguments.
_SAME_NAME = """
    mm.default bmm.default addmm.default baddbmm.default mv.default dot.default
    add.Tensor sub.Tensor mul.Tensor div.Tensor neg.default abs.default exp.default log.default log1p.default expm1.default
    sin.default cos.default tan.default tanh.default sigmoid.default sqrt.default rsqrt.default reciprocal.default erf.default
    pow.Tensor_Scalar pow.Tensor_Tensor maximum.default minimum.default relu.default clamp.default clamp_min.default sign.default
    where.self eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar
    sum.dim_IntList amax.default amin.default gather.default
    permute.default reshape.default cat.default flip.default index_select.default cumsum.default full.default
""".split()
BUILTINS: dict = {getattr(getattr(aten, name.split(".")[0]), name.split(".")[1]): "torch." + name.split(".")[0] for name in _SAME_NAME}


def emit(graph: Graph, kernels: Mapping[object, Callable] | None = None) -> Callable[[Sequence[torch.Tensor]], list]:
    """A function from flat tensors to flat results. `kernels` gives the callable of each kernel of a fused graph."""
    text, namespace = _generate(graph, kernels or {})
    exec(compile(text, "<fxfunc eager>", "exec"), namespace)
    run = namespace["run"]

    def call(tensors: Sequence[torch.Tensor]) -> list:
        with torch.no_grad():
            return run(*tensors)

    return call


def source(graph: Graph) -> str:
    """The Python that `emit` runs."""
    return _generate(graph, None)[0]


def _generate(graph: Graph, kernels) -> tuple[str, dict]:
    writer = _Writer(kernels)
    writer.function("run", graph, sorted(graph.dims()), top=True)
    return "\n\n".join(writer.functions) + "\n", writer.namespace


class _Writer:
    """Collects functions (bodies of scans first) and the globals they use."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.functions: list[str] = []
        self.namespace: dict = {"torch": torch, "inf": math.inf, "nan": math.nan, "__builtins__": builtins}
        self.names: dict[object, str] = {}

    def bind(self, base: str, x) -> str:
        """A global name for an object."""
        key = x if isinstance(x, (torch._ops.OpOverload, torch.device)) else id(x)
        if key not in self.names:
            self.names[key] = f"_{base}_{len(self.names)}"  # no node is named so
            self.namespace[self.names[key]] = x
        return self.names[key]

    def function(self, name: str, graph: Graph, dims: list[str], top: bool = False) -> None:
        """Add the function of a graph; `dims` are its symbolic sizes, read off the inputs at the top."""
        parameters = [n.name for n in graph.inputs] + ([] if top else dims)
        lines = [f"    {line}" for line in _read_sizes(graph, dims)] if top else []
        last = _last_uses(graph)
        for n in graph.nodes:
            lines += [f"    {line}" for line in self._call(n, dims)]
            dead = [m.name for m in last.get(n, ())]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return [{', '.join(_output(n) for n in graph.outputs)}]")
        self.functions.append("\n".join([f"def {name}({', '.join(parameters)}):", *lines]))

    def _call(self, n: Node, dims) -> list[str]:
        if n.target is getitem:
            return [f"{n.name} = {n.args[0].name}[{n.args[1]}]"]
        if n.target is constant:
            return [f"{n.name} = {self.bind('literal', n.args[0].tensor)}"]
        if n.target is scan:
            return self._scan(n, dims)
        args = [self._argument(a) for a in n.args] + [f"{k}={self._argument(v)}" for k, v in n.kwargs.items()]
        return [f"{n.name} = {self._function_of(n)}({', '.join(args)})"]

    def _function_of(self, n: Node) -> str:
        if isinstance(n.target, torch._ops.OpOverload):
            builtin = BUILTINS.get(n.target)
            if builtin:
                return self.bind(n.target._schema.name.split("::")[1], getattr(torch, builtin.removeprefix("torch.")))
            return self.bind(n.target._schema.name.split("::")[1], n.target._op)
        raise errors.BackendError(backend="eager", what=f"{n.target} cannot run op by op", instead="Lower the graph first.")

    def _scan(self, n: Node, dims) -> list[str]:
        body, consts, carry, xs = n.args
        name = f"body_{len(self.functions)}"
        self.function(name, body, dims)
        length, count = self._argument(n.kwargs["length"]), len(carry)
        ys = [f"{n.name}_y{i}" for i in range(len(body.outputs) - count)]
        state = [f"{n.name}_c{i}" for i in range(count)]
        items = [f"{x.name}[{n.name}_i]" for x in xs]
        order = f"range({length})" if not n.kwargs["reverse"] else f"range({length} - 1, -1, -1)"
        lines = [f"{', '.join(state)}, = {', '.join(c.name for c in carry)}," if state else ""]
        lines += [f"{y} = [None] * {length}" for y in ys]
        given = ", ".join([*(c.name for c in consts), *state, *items, *dims])
        results = ", ".join([*state, *(f"{y}[{n.name}_i]" for y in ys)])
        lines += [f"for {n.name}_i in {order}:", f"    {results}, = {name}({given})" if results else f"    {name}({given})"]
        stacked = [f"torch.stack({y}) if {y} else {self._empty(v)}" for y, v in zip(ys, n.meta["val"][count:], strict=True)]
        return [line for line in [*lines, f"{n.name} = [{', '.join(state + stacked)}]"] if line]

    def _empty(self, val: Val) -> str:
        return f"torch.empty({self._argument(val.shape)}, dtype={val.dtype}, device={self._argument(val.device)})"

    def _argument(self, x) -> str:
        if isinstance(x, Node):
            return x.name
        if isinstance(x, (list, tuple)):
            inside = ", ".join(self._argument(y) for y in x)
            tensors = any(isinstance(y, Node) or y is None for y in x)
            return f"[{inside}]" if tensors else f"({inside}{',' if len(x) == 1 else ''})"
        if isinstance(x, Dim):
            return x.python()
        if isinstance(x, (torch.device, torch.layout)):
            return self.bind("place", x)
        return repr(x) if not isinstance(x, complex) else f"complex({x.real!r}, {x.imag!r})"


def _output(n: Node | None) -> str:
    return "None" if n is None else n.name


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """For each call, the values that die there."""
    last: dict[Node, Node] = {}
    for n in graph.nodes:
        last[n] = n  # a result nobody reads dies at once
        for m in n.all_input_nodes:
            last[m] = n
    out: dict[Node, list[Node]] = {}
    for value, user in last.items():
        if value not in graph.outputs:
            out.setdefault(user, []).append(value)
    return out


def _read_sizes(graph: Graph, dims: list[str]) -> list[str]:
    """Lines that read each symbolic size off an input."""
    lines = []
    for name in dims:
        where = [(n, i) for n in graph.inputs for i, s in enumerate(n.meta["val"].shape) if s == Dim(name)]
        if not where:
            raise errors.DynamicShape(what=f"the size {name}, which is no axis of any input")
        lines.append(f"{name} = {where[0][0].name}.shape[{where[0][1]}]")
    return lines
