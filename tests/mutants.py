"""Faults planted in the rule tables, one at a time, and the tests that must notice. Entry points: `mutants`, `kill_all`.

A row of an ATen op is tried on the cases of rule_cases.py that look it up; draws, regions, custom calls and gradient stops on
the tests named in `TESTS`. Tests run in children of this process, so that no fault outlives its mutant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import io
import multiprocessing
import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from rule_cases import CASES
from rule_harness import CHECKS, SIZES, Case, Problem, agree, applies, reference

import fxfunc
from fxfunc.passes import batch, decompose, graph, jvp, transpose
from fxfunc.passes.infer import forget
from fxfunc.passes.jvp import Dual
from fxfunc.passes.record import Value
from fxfunc.passes.regions import OF_SHAPE
from fxfunc.passes.rules import ROWS
from fxfunc.passes.rules.table import ZERO, Row

ROOT = Path(__file__).resolve().parent.parent
QUICK = "jvp vjp vmap no_grad vmap_jvp vmap_vjp jvp_vjp vjp_vjp".split()  # checks, as they take time
LIMIT = 120  # seconds for a test with a fault
ENGINES = {"jvp": jvp, "transpose": transpose, "batch": batch, "composite": decompose}  # who looks up what
REGIONS = {
    "SPECIAL jvp": jvp.SPECIAL,
    "SPECIAL transpose": transpose.SPECIAL,
    "SPECIAL batch": batch.SPECIAL,
    "LOWER": batch.LOWER,
}
TESTS = {  # what notices a fault where rule_cases.py does not reach
    graph.map_: ["tests/test_regions.py::test_maps_in_every_nesting"],
    graph.scan: ["tests/test_regions.py::test_scans_in_every_nesting"],
    graph.cond: [
        "tests/test_control.py::test_a_cond_is_an_if",
        "tests/test_control.py::test_each_example_of_a_vmap_takes_its_own_branch",
    ],
    graph.linear_call: ["tests/test_derived.py::test_semantics_11_agrees_with_torch_func"],
    graph.custom: ["tests/test_custom.py::test_semantics_10_function_keeps_its_own_derivative"],
    graph.graft: [
        "tests/test_semantics.py::test_semantics_07_writing_under_no_grad_keeps_the_old_derivative"
    ],
    graph.stop_reverse: ["tests/test_semantics.py::test_semantics_06_no_grad_stops_reverse_mode_only"],
    graph.stop_gradient: ["tests/test_semantics.py::test_semantics_09_a_users_detach_stops_both_modes"],
    graph.checkpoint: [
        "tests/test_remat.py::test_derivatives_agree_with_torch_func[nothing]",
        "tests/test_remat.py::test_a_checkpoint_changes_no_number[jvp-mlp-nothing]",
    ],
    graph.barrier: [
        "tests/test_remat.py::test_derivatives_agree_with_torch_func[nothing]",
        "tests/test_remat.py::test_a_checkpoint_changes_no_number[vmap_grad-mlp-nothing]",
    ],
    "draws": [
        "tests/test_random.py::test_semantics_15_a_row_draws_for_each_example[{op}]",
        "tests/test_random.py::test_semantics_15_gradients_are_exact_given_what_was_drawn",
    ],
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One entry of a rule table with a fault in it."""

    table: str
    op: object
    fault: str
    value: object

    slot = property(lambda self: self.fault.split("[")[0].split()[0])
    name = property(lambda self: f"{'' if self.table == 'ROWS' else self.table + ' '}{self.op} {self.fault}")

    @contextlib.contextmanager
    def planted(self):
        """The fault is in the table."""
        rows = REGIONS.get(self.table, ROWS)
        right = rows[self.op]
        rows[self.op] = self.value
        forget()
        try:
            yield
        finally:
            rows[self.op] = right
            forget()


# ----- faults ---------------------------------------------------------------------------------------------------------


def each(how: Callable) -> Callable:
    """A fault of one value as one of results in any structure."""

    def apply(x):
        return type(x)(map(apply, x)) if isinstance(x, (list, tuple)) else how(x)

    return apply


@each
def negated(x):
    """A share of a derivative with the other sign."""
    if isinstance(x, Dual):
        return Dual(x.p, negated(x.t))
    return -x if isinstance(x, Value) else x


@each
def dropped(x):
    """A derivative that is not there."""
    return Dual(x.p) if isinstance(x, Dual) else None


@each
def flipped(x):
    """The examples in another order."""
    if isinstance(x, batch.Mapped):
        return batch.Mapped(flipped(x.x), x.val)
    return x.call(torch.ops.aten.flip.default, [0]) if isinstance(x, Value) and x.ndim else x


@each
def repeated(x):
    """The first example for all."""
    return x.call(torch.ops.aten.slice.Tensor, 0, 0, 1).expand(x.shape) if isinstance(x, Value) else x


def after(f: Callable, how: Callable) -> Callable:
    """A rule with a fault in what it returns."""
    return lambda *args, **kwargs: how(f(*args, **kwargs))


def swapped(f: Callable, first: int) -> Callable:
    """A rule whose first two operands change places."""

    def call(*args, **kwargs):
        args = list(args)
        args[first], args[first + 1] = args[first + 1], args[first]
        return f(*args, **kwargs)

    return call


def uses_both(f: Callable, first: int) -> bool:
    """Whether a rule reads two arguments from the place `first` on."""
    code = getattr(f, "__code__", None)
    names = code.co_varnames[: code.co_argcount][first : first + 2] if code else ()
    read: set = set()
    for i in dis.get_instructions(code) if code else ():
        read.update(
            i.argval if isinstance(i.argval, tuple) else [i.argval]
        )  # of two names, from Python 3.13 on
    return len(names) == 2 and set(names) <= read


def is_zero(rule: Callable) -> bool:
    """The rule of an op without derivative."""
    return rule.__code__.co_filename.endswith("table.py")


def of_row(op, row: Row) -> Iterator[tuple[str, Row]]:
    """Faulty versions of a row, by name; the name starts with the slot."""
    for slot, first in (("jvp", 2), ("transpose", 1)):
        rules = getattr(row, slot)
        if isinstance(rules, tuple):
            for i, f in enumerate(rules):
                if f is None or f is ZERO:
                    continue
                faults = {"sign": after(f, negated), "dropped": ZERO}
                if uses_both(f, first):
                    faults["operands"] = swapped(f, first)
                for name, fault in faults.items():
                    yield (
                        f"{slot}[{i}] {name}",
                        dataclasses.replace(row, **{slot: (*rules[:i], fault, *rules[i + 1 :])}),
                    )
        elif rules is not None and not is_zero(rules):
            for name, how in {"sign": negated, "dropped": dropped}.items():
                yield f"{slot} {name}", dataclasses.replace(row, **{slot: after(rules, how)})
    if row.batch is not None:
        if graph.is_random(op):
            yield "batch repeated", dataclasses.replace(row, batch=after(row.batch, repeated))
        if not graph.is_random(op) or draws_by_value(op):
            yield "batch order", dataclasses.replace(row, batch=after(row.batch, flipped))
    if row.composite is not None:
        yield "composite sign", dataclasses.replace(row, composite=after(row.composite, negated))


def draws_by_value(op) -> bool:
    """A random op of a tensor whose values say what is drawn: examples in another order are drawn wrong."""
    return op not in OF_SHAPE and any("Tensor" in str(a.type) for a in op._schema.arguments)


def of_region(table: str, op, rule) -> Iterator[tuple[str, Callable]]:
    """Faulty versions of a rule of one of our own ops."""
    if (
        op is graph.stop_gradient
        and table == "SPECIAL jvp"
        or op is graph.custom
        and table == "SPECIAL transpose"
    ):
        return  # has no tangent, always raises
    if "batch" not in table:
        yield "sign", after(rule, negated)
    if "SPECIAL" in table and "batch" not in table:
        yield "dropped", after(rule, dropped)
    if table == "SPECIAL batch" or op is graph.map_ and table == "LOWER":
        yield "order", after(rule, flipped)


def mutants() -> Iterator[Mutant]:
    """All of them."""
    for op, row in ROWS.items():
        yield from (Mutant("ROWS", op, fault, value) for fault, value in of_row(op, row))
    for table, rules in REGIONS.items():
        for op, rule in rules.items():
            yield from (Mutant(table, op, fault, value) for fault, value in of_region(table, op, rule))


# ----- which tests ----------------------------------------------------------------------------------------------------


class Watched(dict):
    """A rule table that remembers what was looked up."""

    def __init__(self, rows):
        super().__init__(rows)
        self.asked: set = set()

    def get(self, op, default=None):
        self.asked.add(op)
        return super().get(op, default)


def fresh(case: Case) -> Case:
    """The case with a new function, of which no graph is kept from an earlier run."""
    return dataclasses.replace(case, f=lambda *args, f=case.f: f(*args))


def looked_up(case: Case) -> list[tuple]:
    """(slot, op's name, check) for the rules that the checks of a case ask for."""
    found, watched = [], {slot: Watched(ROWS) for slot in ENGINES}
    with contextlib.ExitStack() as stack:
        for slot, engine in ENGINES.items():
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(engine, "ROWS", watched[slot])
        for check in (c for c in CHECKS if applies(case, c, SIZES[0])):
            forget()
            for w in watched.values():
                w.asked.clear()
            CHECKS[check](fxfunc, Problem(fresh(case), SIZES[0]))
            found += [(slot, str(op), check) for slot, w in watched.items() for op in w.asked]
    return found


@functools.cache
def expected(case: Case, check: str):
    """What torch.func gives."""
    return reference(case, check, SIZES[0])


def notices(case: Case, check: str) -> bool:
    """Whether a check of a case fails, or raises, now."""
    want = expected(case, check)
    try:
        agree(fresh(case), check, want, SIZES[0])
    except Exception:
        return True
    return False


def killer(mutant: Mutant, tests) -> str | None:
    """The first test that notices a mutant."""
    if (nodes := nodes_of(mutant)) is not None:
        outcome = forked(run_tests, mutant.planted, nodes, "-x")
        return next((name for name, failed in outcome.items() if failed), None)
    with mutant.planted():
        return next((f"{case.name} {check}" for case, check in tests if notices(case, check)), None)


def nodes_of(mutant: Mutant) -> list[str] | None:
    """The pytest nodes that test an op, where it is not the cases of rule_cases.py."""
    nodes = TESTS["draws"] if graph.is_random(mutant.op) else TESTS.get(mutant.op)
    return nodes and [node.format(op=mutant.op) for node in nodes]


# ----- running --------------------------------------------------------------------------------------------------------


class Outcomes:
    """A pytest plugin: what each test raised (None if it passed)."""

    def __init__(self):
        self.raised: dict[str, str | None] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None and not report.skipped:
            self.raised[item.nodeid] = f"{call.excinfo.type.__name__}: {call.excinfo.value}"[:300]
        elif call.when == "call" and not report.skipped:
            self.raised.setdefault(item.nodeid, None)
        return report


class Plant:
    """A pytest plugin: a fault is planted once the tests have been imported, and no graph is derived yet."""

    def __init__(self, planted: Callable):
        self.planted = planted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        with self.planted():
            return (yield)


def _pytest(options: list[str], *plugins) -> tuple[int, str]:
    """(exit status, what it printed)"""
    out = io.StringIO()
    os.chdir(ROOT)
    plain = ["--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return pytest.main([*plain, *options], plugins=plugins), out.getvalue()


def collect(nodes) -> None:
    """Import the tests here, once, for all children."""
    files = sorted({node.split("::")[0] for node in nodes})
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # imports half of torch.distributed
    status, printed = _pytest(["--collect-only", *files]) if files else (0, "")
    if status != 0:
        raise RuntimeError(f"tests cannot be collected\n{printed[-2000:]}")


def run_tests(planted: Callable, nodes: list[str], *options: str) -> dict[str, str | None]:
    """What each test raised with a fault planted."""
    plugin = Outcomes()
    status, printed = _pytest([*options, *nodes], plugin, Plant(planted))
    if status not in (0, 1) or not plugin.raised:
        raise RuntimeError(f"pytest ended with {status!r}\n{printed[-2000:]}")
    return plugin.raised


def forked(function: Callable, *args):
    """The result of a call made in a child process; raises what it raised, or TimeoutError."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(LIMIT)
        try:
            message = (True, function(*args))
        except BaseException as e:
            message = (False, f"{type(e).__name__}: {e}\n{traceback.format_exc()}")
        with os.fdopen(send, "wb") as pipe:
            pickle.dump(message, pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        raise TimeoutError(f"no answer in {LIMIT} s, or a crash")
    ok, result = pickle.loads(data)
    if not ok:
        raise RuntimeError(result)
    return result


# What the workers work on: they are forks of this process and are told numbers, for faults are closures.
_shared: dict = {}


def _reach(i: int) -> list[tuple]:
    warnings.simplefilter("ignore")
    return looked_up(_shared["cases"][i])


def _kill(i: int) -> tuple[str | None, float]:
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    return killer(_shared["mutants"][i], _shared["tests"][i]), time.perf_counter() - start


def _map(jobs: int, function: Callable, count: int) -> Iterator:
    if jobs == 1:
        yield from map(function, range(count))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as workers:
        yield from workers.map(function, range(count))


def kill_all(
    chosen: list[Mutant], cases: list[Case] = CASES, jobs: int = 1
) -> Iterator[tuple[Mutant, str | None, float]]:
    """(mutant, the test that notices it or None, seconds): first by the cases of an op's name, then by all that reach it."""
    collect(node for m in chosen for node in nodes_of(m) or ())
    _shared.update(cases=cases, mutants=chosen, tests=[list(named_as(m.op, cases)) for m in chosen])
    left = []
    for mutant, (by, seconds) in zip(chosen, _map(jobs, _kill, len(chosen)), strict=True):
        if by is None and nodes_of(mutant) is None:
            left.append(mutant)
        else:
            yield mutant, by, seconds
    tests: dict[tuple, list] = {}
    if left:
        for case, found in zip(cases, _map(jobs, _reach, len(cases)), strict=True):
            for slot, op, check in found:
                tests.setdefault((slot, op), []).append((case, check))
    for reaching in tests.values():
        reaching.sort(key=lambda test: QUICK.index(test[1]))
    _shared.update(mutants=left, tests=[tests.get((m.slot, str(m.op)), ()) for m in left])
    for mutant, (by, seconds) in zip(left, _map(jobs, _kill, len(left)), strict=True):
        yield mutant, by, seconds


def named_as(op, cases: list[Case]) -> Iterator[tuple[Case, str]]:
    """The checks of the few cases named as an op."""
    words = str(op).removeprefix("aten.").split(".")[0].strip("_")
    few = [c for c in cases if c.name == words] + [c for c in cases if c.name.startswith(f"{words}_")]
    few += [c for c in cases if words.startswith(c.name) and c.name != words]
    for check in QUICK:
        yield from ((case, check) for case in few[:4] if applies(case, check, SIZES[0]))


# ----- the naive ways of faults.py ------------------------------------------------------------------------------------

BROKEN = (
    "TypeError",
    "AttributeError",
    "NameError",
    "KeyError",
    "UnboundLocalError",
)  # the fault's own, not the test's


def _plant(fault) -> None:
    with fault.planted():
        pass


def _naive(i: int) -> str | None:
    fault = _shared["faults"][i]
    try:
        forked(_plant, fault)
    except RuntimeError as e:
        return f"does not apply: {e}"
    try:
        raised = forked(run_tests, fault.planted, [fault.test], "-x")
    except (RuntimeError, TimeoutError) as e:
        return f"its test does not run: {e}"
    test, error = next(((name, e) for name, e in raised.items() if e), (None, None))
    if test is None:
        return "not noticed"
    if error.split(":")[0] in BROKEN:
        return f"breaks the code rather than the answer: {error}"
    without = forked(run_tests, contextlib.nullcontext, [test])[test]
    return without and f"{test} fails without it: {without}"


def check_faults(faults, jobs: int = 1) -> Iterator[tuple[object, str | None]]:
    """(fault, what is wrong with it or with its test; None if a test fails with the fault and passes without)."""
    collect(f.test for f in faults)
    _shared.update(faults=faults)
    yield from zip(faults, _map(jobs, _naive, len(faults)), strict=True)
