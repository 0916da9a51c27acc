"""The loop in an unrolled loop. Entry point: `reroll`, which makes the repeated steps of a captured graph a `scan`.

A Python `for` is captured step by step. Steps of the same calls, in which every operand is made in the same step, in one
before (a carry), before the loop (a constant) or differs by step but is known before the loop (xs), are one body.
It runs on what a capture recorded, before anything is merged: that is when steps still look alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.fx import Node

from . import config
from .dump import said, saw
from .graph import Graph, Literal, Val, constant, getitem, is_random, scan, substitute, typed
from .infer import hermetic
from .record import Builder, Value, aten
from .regions import emit_scan

# Steps differ in such a number only by what a tensor of no dims, of the result's dtype, says as well.
_NUMBERS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_EXACT = {torch.float32, torch.float64, torch.int64, torch.int32, torch.complex64, torch.complex128}
_HOLE = "_"
_MOST_DELAY = 4  # how many steps back a step may look


def reroll(graph: Graph, draws: bool = True) -> Graph:
    """The graph with its unrolled loops as scans, inner ones first; loops that draw random numbers too if `draws`.

    The new graph is taken only if, unrolled, it is the old one call by call.
    """
    while loops := _loops(graph, draws):
        rolled, made = _rolled(graph, loops)
        numbers = _Numbers()
        if numbers.of_graph(graph, ()) != numbers.of_graph(rolled, made):
            said("reroll", "kept unrolled: the scan unrolled is another program")
            break
        graph = saw("reroll", rolled)
    return graph


# ----- what looks alike -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """A call: what it has in common with the same call of another step, its operands, and a literal that may differ."""

    key: tuple
    operands: list[Node]
    literal: object


def _call(n: Node) -> _Call:
    operands: list[Node] = []

    def of_node(m: Node) -> str:
        operands.append(m)
        return _HOLE

    args, literal = n.args, None
    if n.target is constant:
        args, literal = ((n.meta["val"],), n.args[0])
    elif _number(n):
        args, literal = (args[0], _HOLE), args[1]
    elif n.target is aten.select.int and isinstance(args[2], int):
        args, literal = (*args[:2], _HOLE), args[2]
    elif n.target is aten.slice.Tensor and len(args) > 3 and all(type(p) is int for p in args[2:]):
        args, literal = (*args[:2], _HOLE), tuple(args[2:])
    key = (n.target, typed(args, of_node), typed(dict(n.kwargs), of_node), n.meta["val"])
    return _Call(key, operands, literal)


def _number(n: Node) -> bool:
    """True if the second operand is a number that a tensor of no dims can stand for."""
    if n.target not in _NUMBERS or type(n.args[1]) not in (int, float) or n.kwargs:
        return False
    val = n.meta["val"]
    return val.dtype in _EXACT and isinstance(n.args[0], Node) and n.args[0].meta["val"].dtype == val.dtype


def _runs(ids: list[int], least: int) -> Iterator[tuple[int, int, int]]:
    """(period, start, end) of the longest stretches that repeat a period `least` times or more, short periods first.

    Such a stretch holds least - 1 neighbouring multiples of its period, so looking at these alone is n log n.
    """
    found: list[tuple[int, int, int]] = []
    for p in range(1, len(ids) // least + 1):
        i, streak = 0, 0
        while i + p < len(ids):
            streak = streak + 1 if ids[i] == ids[i + p] else 0
            if streak < least - 1:
                i += p
                continue
            start, end = i, i
            while start and ids[start - 1] == ids[start - 1 + p]:
                start -= 1
            while end + p < len(ids) and ids[end] == ids[end + p]:
                end += 1
            run = (p, start, end + p)
            if end + p - start >= least * p and not any(_is_multiple(run, r) for r in found):
                found.append(run)
                yield run
            i, streak = -(-end // p) * p + p * (end % p == 0), 0
    return


def _is_multiple(run, other) -> bool:
    return run[0] % other[0] == 0 and other[1] <= run[1] and run[2] <= other[2]


# ----- what is a loop -------------------------------------------------------------------------------------------------


class _Unlike(Exception):
    """Steps that are no steps of this loop, and why."""

    def __init__(self, why: str, steps):
        super().__init__(why)
        self.steps = list(steps)


class _Code:
    """The calls of a graph by place."""

    def __init__(self, graph: Graph):
        self.nodes = graph.nodes
        self.calls = [_call(n) for n in graph.nodes]
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        ids: dict[tuple, int] = {}
        self.ids = [ids.setdefault(c.key, len(ids)) for c in self.calls]

    def before(self, n: Node, start: int) -> bool:
        return self.place.get(n, -1) < start


def _loops(graph: Graph, draws: bool) -> list[_Loop]:
    """Loops that do not overlap."""
    if len(graph.nodes) < config.REROLL * 2:
        return []
    code = _Code(graph)
    loops: list[_Loop] = []
    for period, start, end in _runs(code.ids, config.REROLL):
        if any(start < x.end and x.start < end for x in loops):
            continue
        if not draws and any(is_random(n) for n in code.nodes[start:end]):
            said("reroll", "kept unrolled: one draw for all examples of a vmap is made outside loops")
            continue
        if (loop := _fitted(code, period, start, end)) is not None:
            loops.append(loop)
    return sorted(loops, key=lambda x: x.start)


def _fitted(code: _Code, period: int, start: int, end: int) -> _Loop | None:
    """A loop within a stretch of repeated calls; first and last steps that differ are left out."""
    first = start + _best_cut(code, period, start, end)
    tries, seen = [(0, (end - first) // period)], set()
    while tries and len(seen) < 8:
        tries.sort(key=lambda t: t[0] - t[1])
        lo, hi = step = tries.pop(0)
        if step in seen or hi - lo < config.REROLL:
            continue
        seen.add(step)
        try:
            return _Loop(code, period, first + lo * period, hi - lo)
        except _Unlike as e:
            where = code.nodes[first].meta.get("source")
            said("reroll", f"kept unrolled: steps {lo} to {hi - 1} of {period} calls at {where}: {e}")
            if e.steps:
                tries += [(lo + 1, hi), (lo + max(e.steps) + 1, hi), (lo, hi - 1), (lo, lo + min(e.steps))]
    return None


def _best_cut(code: _Code, period: int, start: int, end: int) -> int:
    """Where in the period a step begins: the cut that the fewest values cross, and that leaves out the fewest calls."""
    middle = start + (end - start) // period // 2 * period
    change = [0] * (period + 1)
    for i in range(max(start, middle - period), min(end, middle + period)):
        used = [code.place[m] for m in code.nodes[i].users if m in code.place and code.place[m] < end]
        weight = 1 if isinstance(code.nodes[i].meta["val"], Val) else 1000
        lo, hi = max(i + 1, middle), min(max(used, default=i), middle + period - 1)
        if lo <= hi:
            change[lo - middle] += weight
            change[hi - middle + 1] -= weight
    rest, crossing, costs = (end - start) % period, 0, []
    for phase in range(period):
        crossing += change[phase]
        costs.append(crossing + (period if phase > rest else 0))
    return min(range(period), key=costs.__getitem__)


class _Loop:
    """`count` steps of `period` calls from place `start` on, all alike; raises _Unlike if they are not.

    operands[j][k]: what call j of a step takes as operand k: ("step", j'), ("const", node), ("carry", key) or ("x", key).
    """

    def __init__(self, code: _Code, period: int, start: int, count: int):
        self.code, self.period, self.start, self.count = code, period, start, count
        self.end = start + period * count
        self.consts: dict[Node, None] = {}
        self.carries: dict[tuple, Val] = {}  # (j, values before the first step, latest first)
        self.xs: dict[tuple, Val] = {}
        self.literals: dict[int, tuple] = {}  # calls whose literal differs by step: the xs it is in
        self.fixed: set[int] = set()  # calls that are the same in every step
        self.operands = []
        for j in range(period):
            self.operands.append(self._operands(j))
        self.ys: list[int] = []
        self._outside()
        if not self.carries:
            raise _Unlike("no step depends on the one before", [])
        self._profit()

    def at(self, step: int, j: int) -> Node:
        return self.code.nodes[self.start + step * self.period + j]

    def column(self, j: int) -> tuple[Node, ...]:
        """Call j of each step."""
        return self.code.nodes[self.start + j : self.end : self.period]

    def _operands(self, j: int) -> list[tuple]:
        calls = self.code.calls[self.start + j : self.end : self.period]
        operands = [self._operand(j, column) for column in zip(*(c.operands for c in calls), strict=True)]
        literals = tuple(c.literal for c in calls)
        if len({typed(x, None) for x in literals}) > 1:
            self._differ(j, literals, operands)
        elif all(self._is_fixed(x) for x in operands) and not is_random(self.at(0, j)):
            self.fixed.add(j)
        return operands

    def _is_fixed(self, operand: tuple) -> bool:
        return operand[0] == "const" or operand[0] == "step" and operand[1] in self.fixed

    def _differ(self, j: int, literals: tuple, operands) -> None:
        """A literal that is another one in each step."""
        n = self.at(0, j)
        if n.target in (aten.select.int, aten.slice.Tensor):
            if not self._is_fixed(operands[0]):
                raise _Unlike(f"{n.name} reads another place of a value of the loop in each step", [])
            key = (n.target, n.args[0], n.args[1], literals)
        elif n.target is constant:
            key = ("constant", literals)
        else:
            key = (
                "number",
                n.meta["val"].dtype,
                n.meta["val"].device,
                tuple(typed(x, None) for x in literals),
                literals,
            )
        val = n.meta["val"]
        self.xs[key] = Val((), val.dtype, val.device) if key[0] == "number" else val
        self.literals[j] = key

    def _operand(self, j: int, column: tuple[Node, ...]) -> tuple:
        code, (start, end, period) = self.code, (self.start, self.end, self.period)
        last = code.place.get(column[-1], -1)
        if not start <= last < end:
            if late := [s for s, m in enumerate(column) if not code.before(m, start)]:
                raise _Unlike(f"{self.at(0, j).name} has operands that change places", late)
            if len(set(column)) == 1:
                self.consts[column[0]] = None
                return "const", column[0]
            return self._stacked(j, column)
        step, source = divmod(last - start, period)
        delay = self.count - 1 - step
        made = self.column(source)
        odd = [s for s in range(delay, self.count) if column[s] is not made[s - delay]]
        odd += [s for s in range(min(delay, self.count)) if not code.before(column[s], start)]
        if odd or delay > _MOST_DELAY:
            raise _Unlike(f"{self.at(0, j).name} has operands that change places", odd)
        if not delay:
            return "step", source
        inits, val = tuple(reversed(column[:delay])), made[0].meta["val"]
        if not isinstance(val, Val):
            raise _Unlike(f"{made[0].name} has several results", [])
        if any(m.meta["val"] != val for m in inits):
            raise _Unlike(f"the carry {made[0].name} changes type", [0])
        for k in range(1, delay + 1):
            self.carries[source, inits[:k]] = val
        return "carry", (source, inits)

    def _stacked(self, j: int, column: tuple[Node, ...]) -> tuple:
        vals = [m.meta["val"] for m in column]
        if not isinstance(vals[0], Val) or any(v != vals[0] for v in vals):
            odd = [s for s, v in enumerate(vals) if v != vals[-1]]
            raise _Unlike(f"{self.at(0, j).name} has operands of different types", odd)
        self.xs["stack", column] = vals[0]
        return "x", ("stack", column)

    def _outside(self) -> None:
        """Find the values that are used after the loop: last carries, or those of every step."""
        kept: dict[int, set[int]] = {}
        for source, inits in self.carries:
            kept.setdefault(source, set()).add(self.count - len(inits))
        for j in range(self.period):
            steps = {s for s, n in enumerate(self.column(j)) if any(not self._inside(m) for m in n.users)}
            if steps <= kept.get(j, set()):
                continue
            if missing := [s for s in range(self.count) if s not in steps]:
                odd = missing if len(missing) < len(steps) else steps
                raise _Unlike(f"{self.at(0, j).name} is used after the loop, but not of every step", odd)
            if not isinstance(self.at(0, j).meta["val"], Val):
                raise _Unlike(f"{self.at(0, j).name} has several results", [])
            self.ys.append(j)

    def _inside(self, n: Node) -> bool:
        return self.start <= self.code.place.get(n, -1) < self.end

    def _profit(self) -> None:
        """Raise if the scan and what surrounds it are more than half of the unrolled calls."""
        around = sum(self._weight(key) for key in self.xs) + len(self.carries) + 1
        if 2 * (self.period + around) > self.count * self.period:
            raise _Unlike("a scan would be as large", [])

    def _weight(self, key: tuple) -> int:
        """Calls and operands that make xs."""
        if key[0] == "stack":
            return 1 + len(key[1]) // 2
        return 2

    # ---- the scan ----

    def body(self) -> Graph:
        """consts + carries + xs -> carries + ys."""
        b = Builder(None)
        given = {("const", n): b.input(n.meta["val"], n.name) for n in self.consts}
        given |= {("carry", key): b.input(val, self.at(0, key[0]).name) for key, val in self.carries.items()}
        given |= {("x", key): b.input(val, "x") for key, val in self.xs.items()}
        env: list = []
        for j, operands in enumerate(self.operands):
            n, key = self.at(0, j), self.literals.get(j)
            if key is not None and key[0] != "number":
                env.append(given["x", key])
                continue
            values = iter([env[i] if kind == "step" else given[kind, i] for kind, i in operands])
            args = substitute(n.args, lambda _, values=values: next(values))
            kwargs = {
                k: substitute(n.kwargs[k], lambda _, values=values: next(values)) for k in sorted(n.kwargs)
            }
            args = args if key is None else (args[0], given["x", key])
            with b.at(n):
                env.append(args[0][args[1]] if n.target is getitem else b.emit(n.target, args, kwargs))
        new = [env[j] if len(inits) == 1 else given["carry", (j, inits[:-1])] for j, inits in self.carries]
        return b.finish(new + [env[j] for j in self.ys])

    def emit(self, b: Builder, env: dict, columns: dict) -> Node:
        """Emit the scan, and what of it is used afterwards into `env`; the node of the scan."""
        with b.at(self.at(0, 0)):
            b.run([self.at(0, j) for j in sorted(self.fixed)], env)
            carry = [env[inits[-1]] for _, inits in self.carries]
            xs = [self._x(b, key, env, columns) for key in self.xs]
            results = emit_scan(b, self.body(), [env[n] for n in self.consts], carry, xs, self.count)
            made = next(reversed([n for n in b.fx.nodes if n.target is scan]))
            for (j, inits), value in zip(self.carries, results, strict=False):
                env[self.at(self.count - len(inits), j)] = value
            for j, y in zip(self.ys, results[len(carry) :], strict=True):
                columns[self.at(0, j)] = (self.column(j), y)
                for s, n in enumerate(self.column(j)):
                    env.setdefault(n, y.call(aten.select.int, 0, s))
        return made

    def _x(self, b: Builder, key: tuple, env: dict, columns: dict) -> Value:
        kind, *rest = key
        if kind == "stack":
            return _stack(b, list(rest[0]), 0, env, columns)
        if kind is aten.slice.Tensor:
            parts = [env[rest[0]].call(kind, rest[1], *places) for places in rest[2]]
            return b.emit(aten.stack.default, (parts,))
        if kind is aten.select.int:
            return _selected(b, env[rest[0]], *rest[1:])
        with hermetic():
            if kind == "constant":
                return b.constant(torch.stack([x.tensor for x in rest[0]]))
            return b.constant(torch.tensor(rest[-1], dtype=rest[0], device=rest[1]))


def _selected(b: Builder, x: Value, dim: int, places: tuple[int, ...]) -> Value:
    """The slices at these places along a dim, stacked. Where the size is symbolic each place is still read, or raises."""
    size, by = x.shape[dim], places[1] - places[0]
    x = x.movedim(dim, 0) if dim else x
    if (
        isinstance(size, int)
        and places[0] >= 0 < by
        and places == tuple(range(places[0], places[-1] + 1, by))
    ):
        end = places[-1] + 1
        whole = by == 1 and places[0] == 0 and size == end
        return x if whole else x.call(aten.slice.Tensor, 0, places[0], end, *[by][: by - 1])
    return b.emit(aten.stack.default, ([x.call(aten.select.int, 0, p) for p in places],))


def _stack(b: Builder, nodes: list[Node], dim: int, env: dict, columns: dict) -> Value:
    """Nodes stacked; ys of a scan are stacked already."""
    parts: list[Value | list[Node]] = [[]]
    i = 0
    while i < len(nodes):
        column, y = columns.get(nodes[i], (None, None))
        if column is not None and tuple(nodes[i : i + len(column)]) == column:
            parts += [y, []]
            i += len(column)
        else:
            parts[-1].append(nodes[i])
            i += 1
    whole = [
        b.emit(aten.stack.default, ([env[n] for n in x],)) if isinstance(x, list) else x
        for x in parts
        if x != []
    ]
    out = whole[0] if len(whole) == 1 else b.emit(aten.cat.default, (whole,))
    return out.movedim(0, dim) if dim else out


def _rolled(graph: Graph, loops: list[_Loop]) -> tuple[Graph, list[Node]]:
    """The graph with these loops as scans, and the scans."""
    b = Builder(None)
    env: dict[Node, object] = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    columns: dict[Node, tuple] = {}
    made, rest = [], iter([*loops, None])
    loop = next(rest)
    for i, n in enumerate(graph.nodes):
        if loop is not None and i >= loop.start:
            if i == loop.start:
                made.append(loop.emit(b, env, columns))
            if i == loop.end - 1:
                loop = next(rest)
        elif n.target is aten.stack.default and any(m in columns for m in n.args[0]):
            dim = (*n.args, *n.kwargs.values(), 0)[1]
            with b.at(n):
                env[n] = _stack(b, list(n.args[0]), dim % len(n.meta["val"].shape), env, columns)
        else:
            b.run([n], env)
    rolled = b.finish([None if n is None else env[n] for n in graph.outputs])
    rolled.written, rolled.fresh = graph.written, graph.fresh
    return rolled, made


# ----- whether it is the same program ---------------------------------------------------------------------------------


class _Numbers:
    """Numbers the values of graphs: equal numbers mean the same calls of the same values, scans of ours being unrolled."""

    def __init__(self):
        self.numbers: dict[tuple, int] = {}
        self.made: list[tuple] = []  # by number: (op, operands ...)
        self.draws: list[int] = []

    def of_graph(self, graph: Graph, opened) -> tuple[list, list]:
        """(outputs, draws in order) of a graph, the scans `opened` being unrolled."""
        self.draws = []
        env = {n: self.number("input", i) for i, n in enumerate(graph.inputs)}
        self.run(graph.nodes, env, set(opened))
        return [None if n is None else env[n] for n in graph.outputs], self.draws

    def number(self, *key) -> int:
        found = self.numbers.setdefault(key, len(self.numbers))
        if found == len(self.made):
            self.made.append(key)
        return found

    def run(self, nodes, env: dict, opened: set[Node]) -> None:
        for n in nodes:
            if n in opened:
                env[n] = self.unrolled(n, env)
            elif n.target is getitem and isinstance(env[n.args[0]], list):
                env[n] = env[n.args[0]][n.args[1]]
            elif is_random(n):
                env[n] = self.number("draw", len(self.draws), *self.plain(n, env))
                self.draws.append(env[n])
            else:
                env[n] = self.call(n, env)

    def plain(self, n: Node, env) -> tuple:
        return n.target, typed(n.args, env.__getitem__), typed(dict(n.kwargs), env.__getitem__)

    def call(self, n: Node, env) -> int:
        val = n.meta["val"]
        if n.target is aten.stack.default:
            dim = (*n.args, *n.kwargs.values(), 0)[1] % len(val.shape)
            return self.moved(self.number("stack", *(env[m] for m in n.args[0])), dim, len(val.shape))
        if n.target is aten.cat.default and len(n.args) == 1:
            parts = [self.made[env[m]] for m in n.args[0]]
            if all(p[0] == "stack" for p in parts):
                return self.number("stack", *(x for p in parts for x in p[1:]))
        if n.target is aten.select.int and isinstance(n.args[2], int) and n.args[2] >= 0:
            return self.select(env[n.args[0]], n.args[1], n.args[2])
        if n.target is constant:
            return self.number(constant, n.args[0])
        if _number(n):
            with hermetic():
                literal = Literal(torch.tensor(n.args[1], dtype=val.dtype, device=val.device))
            return self.number(n.target, (env[n.args[0]], self.number(constant, literal)), ())
        return self.number(*self.plain(n, env))

    def moved(self, x: int, dim: int, ndim: int) -> int:
        """Axis 0 moved to `dim`."""
        order = [*range(1, dim + 1), 0, *range(dim + 1, ndim)]
        return x if not dim else self.number(aten.permute.default, *_permuted(x, order))

    def select(self, x: int, dim: int, i: int) -> int:
        """The slice at a place, found in what the value was made of."""
        op, *rest = self.made[x]
        if dim == 0 and op == "stack":
            return rest[i]
        if dim == 0 and op is constant:
            with hermetic():
                return self.number(constant, Literal(rest[0].tensor[i]))
        if dim == 0 and op is aten.slice.Tensor:
            base, _, start, _, *by = rest[0]
            if rest[0][1] == (int, 0) and start[0] is int:
                return self.select(base, 0, start[1] + i * (by[0][1] if by else 1))
        if dim == 0 and op is aten.permute.default:
            base, order = rest[0][0], [d for _, d in rest[0][1]]
            if order[1:] == sorted(order[1:]):
                return self.select(base, order[0], i)
        return self.number(aten.select.int, (x, (int, dim), (int, i)), ())

    def unrolled(self, n: Node, env) -> list[int]:
        body, consts, carry, xs = n.args
        state, ys = [env[m] for m in carry], []
        for step in range(n.kwargs["length"]):
            given = [env[m] for m in consts] + state + [self.select(env[m], 0, step) for m in xs]
            inner = dict(zip(body.inputs, given, strict=True))
            self.run(body.nodes, inner, set())
            state = [inner[m] for m in body.outputs[: len(carry)]]
            ys.append([inner[m] for m in body.outputs[len(carry) :]])
        return state + [self.number("stack", *column) for column in zip(*ys, strict=True)]


def _permuted(x: int, order: list[int]) -> tuple:
    return (x, tuple((int, d) for d in order)), ()
