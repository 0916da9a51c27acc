"""The naive way of each item of SEMANTICS.md, as a fault planted in our code and the test that must fail with it.

Run by `scripts/mutate --semantics`. A fault is a function that patches; what it patches must be there, or it is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fxfunc
from fxfunc import custom, guards
from fxfunc.codegen import cxx, native, prelude, tasks
from fxfunc.passes import (
    batch,
    functionalize,
    graph,
    infer,
    intercept,
    jvp,
    pipeline,
    record,
    regions,
    remat,
    reroll,
    transpose,
)
from fxfunc.passes.concrete import Concrete
from fxfunc.passes.graph import Graph, Literal, constant, stop_gradient
from fxfunc.passes.jvp import Dual
from fxfunc.passes.rules import ROWS, batching, region
from fxfunc.passes.trace import Recorder
from fxfunc.passes.tracer import Tracer

aten = torch.ops.aten
capture, jit = sys.modules["fxfunc.capture"], sys.modules["fxfunc.jit"]  # fxfunc.jit is the function


@dataclasses.dataclass(frozen=True)
class Fault:
    """`plant(patch)` is the naive way; `test` is the pytest node that must fail then, and pass otherwise."""

    item: int
    plant: Callable
    test: str

    name = property(lambda self: f"{self.item:02} {self.plant.__name__}")

    @contextlib.contextmanager
    def planted(self):
        with pytest.MonkeyPatch.context() as patch:
            infer.forget()
            self.plant(patch)
            yield
        infer.forget()


FAULTS: list[Fault] = []


def naive(item: int, test: str, file: str = "test_semantics"):
    """A fault of an item, which a test of that item notices."""

    def add(plant):
        FAULTS.append(Fault(item, plant, f"tests/{file}.py::test_semantics_{item:02}_{test}"))
        return plant

    return add


def entry(patch, table: dict, key, value) -> None:
    """Replace an entry that is there."""
    if key not in table:
        raise KeyError(key)
    patch.setitem(table, key, value)


def everywhere(patch, function, other) -> None:
    """Replace a function in every module of ours that has it by its name."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("fxfunc")]
    holders = [m for m in modules if getattr(m, function.__name__, None) is function]
    if not holders:
        raise AttributeError(function.__name__)
    for m in holders:
        patch.setattr(m, function.__name__, other)


# ----- identity and closures ------------------------------------------------------------------------------------------


@naive(1, "an_input_is_not_the_same_tensor_closed_over")
def inputs_are_known_by_identity(patch):
    make, lift = Recorder.input, Recorder.lift

    def with_identity(self, val, name, *flags, **how):
        tracer = make(self, val, name, *flags, **how)
        self.__dict__.setdefault("known", {})[id(how["like"])] = tracer.value
        return tracer

    patch.setattr(Recorder, "input", with_identity)
    patch.setattr(
        Recorder, "lift", lambda self, t: self.__dict__.get("known", {}).get(id(t)) or lift(self, t)
    )


@naive(2, "values_of_an_outer_transform_stay_variables_inside")
def values_of_outer_captures_are_constants(patch):
    lift = Recorder.lift

    def constant_if_foreign(self, t):
        value = lift(self, t)
        foreign = isinstance(t, Tracer) and t.recorder is not self
        return self.builder.emit(stop_gradient, (value,)) if foreign else value

    patch.setattr(Recorder, "lift", constant_if_foreign)


@naive(3, "other_tensors_are_captured_by_reference")
def closures_are_baked(patch):
    lift = Recorder.lift

    def baked(self, t):
        if isinstance(t, Tracer):
            return lift(self, t)
        with infer.hermetic():
            return self.builder.emit(constant, (Literal(t),))

    patch.setattr(Recorder, "lift", baked)


@naive(3, "literals_are_equal_by_dtype_and_bytes")
def literals_are_equal_by_value(patch):
    patch.setattr(Literal, "__eq__", lambda self, other: self.tensor.tolist() == other.tensor.tolist())
    patch.setattr(Literal, "__hash__", lambda self: hash(str(self.tensor.shape)))


@naive(4, "closures_are_read_at_every_call", "test_jit")
def closures_are_not_read_again(patch):
    patch.setattr(guards.Guards, "current", lambda self: [t for _, _, t, _, _ in self.tensors])


@naive(5, "code_branches_on_requires_grad")
def captured_tensors_require_no_grad(patch):
    make = Recorder.input
    patch.setattr(
        Recorder,
        "input",
        lambda self, val, name, tracks=False, known=False, **how: make(self, val, name, known=known, **how),
    )


# ----- stopping gradients ---------------------------------------------------------------------------------------------


@naive(6, "no_grad_stops_reverse_mode_only")
def no_grad_is_dropped(patch):
    patch.setattr(functionalize._Walk, "read", lambda self, n, grad: self._current(n))


@naive(6, "no_grad_stops_reverse_mode_only")
def no_grad_stops_forward_mode_too(patch):
    entry(patch, jvp.SPECIAL, graph.stop_reverse, jvp._stop_gradient)


@naive(7, "writing_under_no_grad_keeps_the_old_derivative")
def writes_under_no_grad_have_the_new_derivative(patch):
    entry(patch, jvp.SPECIAL, graph.graft, lambda jvp, args, kwargs: args[0])


@naive(8, "a_transform_under_no_grad_is_a_constant_to_reverse_mode")
def results_of_a_transform_under_no_grad_are_variables(patch):
    patch.setattr(Recorder, "inline", torch.enable_grad()(Recorder.inline))


@naive(8, "the_function_is_captured_with_grad_enabled")
def captures_start_in_the_mode_of_the_caller(patch):
    start = capture._capture

    def in_mode_of_caller(*args, grad=True, **how):
        return start(*args, grad=torch.is_grad_enabled(), **how)

    patch.setattr(capture, "_capture", in_mode_of_caller)


@naive(9, "a_users_detach_stops_both_modes")
def a_users_detach_is_the_identity(patch):
    entry(
        patch,
        intercept.DISPATCH,
        aten.detach.default,
        lambda recorder, func, x: Tracer(recorder, recorder.lift(x)),
    )


@naive(9, "a_users_detach_stops_both_modes")
def a_users_detach_stops_reverse_mode_only(patch):
    entry(patch, jvp.SPECIAL, stop_gradient, jvp._stop_reverse)


# ----- custom rules and derived rules ---------------------------------------------------------------------------------


@naive(10, "function_keeps_its_own_derivative", "test_custom")
def functions_are_traced_through(patch):
    patch.setattr(custom, "hooks", contextlib.nullcontext)


@naive(11, "agrees_with_torch_func", "test_derived")
def linear_calls_have_constant_residuals(patch):
    rule = jvp.SPECIAL[graph.linear_call]

    def constant_residuals(jvp, args, kwargs):
        body, transposed, residuals, operands = args
        return rule(jvp, (body, transposed, tuple(Dual(d.p) for d in residuals), operands), kwargs)

    entry(patch, jvp.SPECIAL, graph.linear_call, constant_residuals)


@naive(12, "the_numbers_of_the_item")
def autograd_differentiates_what_is_emitted(patch):
    everywhere(patch, capture.run, lambda graph, compile_, tensors: compile_(graph)(list(tensors)))


# ----- regions --------------------------------------------------------------------------------------------------------


@naive(13, "regions_with_other_bodies_are_not_merged", "test_regions")
def bodies_are_equal_by_their_types(patch):
    patch.setattr(Graph, "__hash__", lambda self: hash(tuple(self.in_vals)))
    patch.setattr(
        Graph, "__eq__", lambda self, other: isinstance(other, Graph) and self.in_vals == other.in_vals
    )


@naive(14, "no_residual_of_the_mapped_size_is_made_of_invariants", "test_regions")
def invariants_are_computed_for_each_example(patch):
    patch.setattr(regions, "_varying", lambda body, starts: {*body.inputs, *body.nodes})


@naive(14, "cotangents_of_unmapped_inputs_are_summed_inside", "test_regions")
def cotangents_of_unmapped_inputs_are_stacked_and_summed(patch):
    emit = region.emit_map

    def stacked(b, body, operands, mapped, outs, *rest):
        results = emit(b, body, operands, mapped, ["stack"] * len(outs), *rest)
        return [r.sum([0]) if kind == "sum" else r for r, kind in zip(results, outs, strict=True)]

    patch.setattr(region, "emit_map", stacked)


@naive(14, "a_value_of_out_dims_none_is_not_multiplied_by_the_length", "test_regions")
def a_value_of_out_dims_none_is_a_sum(patch):
    emit = regions._repeated
    kinds = {"once": "sum"}
    patch.setattr(
        regions, "_repeated", lambda value, kind, length: emit(value, kinds.get(kind, kind), length)
    )


@naive(15, "every_draw_is_made_once_and_in_order", "test_regions")
def equal_draws_are_merged(patch):
    patch.setattr(record, "is_random", lambda *args: False)


@naive(15, "an_unused_draw_still_moves_the_stream", "test_random")
def unused_draws_are_dropped(patch):
    patch.setattr(record, "is_random", lambda *args: False)


@naive(15, "no_draw_comes_twice_in_a_backward", "test_remat")
def draws_are_computed_again(patch):
    patch.setattr(remat, "is_random", lambda call: False)


@naive(15, "each_example_draws_its_own_numbers", "test_random")
def all_examples_share_a_draw(patch):
    draw = batch.Batch.call

    def shared(self, op, args, kwargs):
        plain = graph.is_random(op, args) and not any(batch.mapped_in([args, list(kwargs.values())]))
        return self.b.emit(op, args, kwargs) if plain else draw(self, op, args, kwargs)

    patch.setattr(batch.Batch, "call", shared)


@naive(16, "a_loop_is_the_scan_that_one_would_write", "test_reroll")
def calls_are_merged_before_loops_are_rolled(patch):
    roll = reroll.reroll
    everywhere(patch, roll, lambda g, draws=True: roll(pipeline.simplify(g), draws))


@naive(16, "a_number_of_half_precision_stays_a_number", "test_reroll")
def numbers_that_differ_by_step_are_rounded(patch):
    patch.setattr(reroll, "_EXACT", reroll._EXACT | {torch.float16})


@naive(16, "a_scan_that_is_another_program_is_not_taken", "test_reroll")
def scans_are_trusted(patch):
    patch.setattr(reroll._Numbers, "of_graph", lambda self, g, made: None)


@naive(17, "one_program_for_every_size", "test_regions")
def symbolic_sizes_are_those_of_the_example(patch):
    patch.setattr(jit.Spec, "val", property(lambda self: jit.val_of(self.tensor)))


# ----- numbers --------------------------------------------------------------------------------------------------------


@naive(18, "transposes_of_complex_ops_are_adjoints")
def transposes_are_not_conjugated(patch):
    patch.setattr(record.Value, "conj", lambda self: self)


@naive(18, "cotangents_have_the_primals_dtype_and_shape")
def cotangents_are_not_cast(patch):
    everywhere(
        patch, transpose.fit, lambda ct, v: transpose.unbroadcast(ct, v.shape) if ct.shape != v.shape else ct
    )


@naive(19, "a_mapped_0d_operand_promotes_as_one_example_does")
def operands_promote_as_batched(patch):
    patch.setattr(batching, "_promoted", lambda tensors: None)


@naive(19, "views_are_by_the_sizes_of_one_example")
def views_are_by_the_sizes_of_the_batch(patch):
    def reshape(ctx, op, args, kwargs):
        return args[0].x.reshape([*ctx.out.shape[:1], ctx.length, *ctx.out.shape[1:]]).movedim(1, 0)

    row = dataclasses.replace(ROWS[aten.reshape.default], batch=reshape)
    entry(patch, ROWS, aten.reshape.default, row)


def jvp_rule(patch, op, *rules) -> None:
    """Replace the tangent of an op."""
    entry(patch, ROWS, op, dataclasses.replace(ROWS[op], jvp=rules))


@naive(20, "a_value_has_the_same_bits_in_every_lane_and_alone", "test_cpp")
def functions_differ_in_tails(patch):
    declared = 'extern "C" __attribute__((simd("notinbranch"))) double {0}({1});\n#define lanes_{0} {0}\n'
    patch.setattr(prelude, "_lanes_of", lambda name: _declared(declared, name))
    cxx._load.cache_clear()


def _declared(text: str, name: str) -> str:
    t = "float" if name.endswith("f") and name != "erf" else "double"
    count = 2 if name.removesuffix("f") in cxx.PAIRS else 1
    return text.format(name, ", ".join([t] * count)).replace("double " + name, f"{t} {name}")


@naive(20, "arithmetic_has_the_bits_of_aten", "test_cpp")
def products_and_sums_are_fused(patch):
    patch.setattr(cxx, "FLAGS", (*cxx.FLAGS, "-ffp-contract=fast"))
    cxx._load.cache_clear()


@naive(20, "what_compares_is_kept_under_every_policy", "test_remat")
def choices_are_made_again(patch):
    patch.setattr(remat, "is_choice", lambda call: False)


@naive(21, "sums_do_not_depend_on_the_number_of_threads", "test_cpp")
def a_block_a_thread(patch):
    class Threads(int):
        def __format__(self, spec):
            return "threads"

    make = tasks._Map.__init__

    def by_threads(self, outer, n):
        make(self, outer, n)
        self.blocks = Threads(self.blocks)

    patch.setattr(tasks._Map, "__init__", by_threads)


@naive(22, "pytorchs_choices")
def relu_has_slope_1_at_0(patch):
    jvp_rule(patch, aten.relu.default, lambda t, y, a: a.ge(0).where(t, 0.0))


@naive(22, "pytorchs_choices")
def abs_has_slope_1_at_0(patch):
    jvp_rule(patch, aten.abs.default, lambda t, y, a: a.ge(0).where(t, -t))


@naive(22, "pytorchs_choices")
def the_first_of_equal_maxima_takes_all(patch):
    jvp_rule(
        patch,
        aten.maximum.default,
        lambda t, y, a, b: a.ge(b).where(t, 0.0),
        lambda t, y, a, b: a.lt(b).where(t, 0.0),
    )


@naive(22, "pytorchs_choices")
def powers_divide_by_the_base(patch):
    jvp_rule(patch, aten.pow.Tensor_Scalar, lambda t, y, a, n: t * y * n / a)


@naive(22, "pytorchs_choices")
def products_divide_by_each_factor(patch):
    jvp_rule(patch, aten.prod.default, lambda t, y, a, **kwargs: (t / a).sum() * y)


@naive(22, "pytorchs_choices")
def where_multiplies_by_its_condition(patch):
    mul = lambda c, t: c.to(t.dtype) * t
    jvp_rule(
        patch,
        aten.where.self,
        jvp.ROWS[aten.where.self].jvp[0],
        lambda t, y, c, a, b: mul(c, t),
        lambda t, y, c, a, b: mul(~c, t),
    )


def untyped(x, of_node):
    """`typed` without the types."""
    if isinstance(x, torch.fx.Node):
        return of_node(x)
    if isinstance(x, (list, tuple)):
        return tuple(untyped(y, of_node) for y in x)
    return tuple((k, untyped(v, of_node)) for k, v in sorted(x.items())) if isinstance(x, dict) else x


@naive(23, "equal_numbers_of_other_types_are_not_merged")
def calls_are_equal_by_value(patch):
    everywhere(patch, graph.typed, untyped)


# ----- surroundings ---------------------------------------------------------------------------------------------------


@naive(24, "writes_between_and_inside_captures")
def views_are_not_read_again_after_a_write(patch):
    patch.setattr(functionalize._Walk, "_version", lambda self, n: 0)


@naive(24, "writes_under_jit_happen_after_the_run")
def writes_to_closures_are_lost(patch):
    everywhere(patch, capture.write_back, lambda graph, inputs, results, first=0: list(results))


@naive(25, "what_is_drawn_while_values_are_asked_for_is_drawn_once", "test_inside")
def values_are_computed_with_the_generators_of_the_caller(patch):
    patch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())


@naive(25, "arguments_are_not_written_to_while_values_are_asked_for", "test_inside")
def values_are_computed_on_the_arguments(patch):
    patch.setattr(Concrete, "bind", lambda self, value, like: self.data.__setitem__(value.node, like))


@naive(26, "rules_do_not_depend_on_the_surroundings")
def passes_run_in_the_modes_of_the_caller(patch):
    everywhere(patch, infer.hermetic, contextlib.nullcontext)


@naive(27, "a_tensor_of_another_kind_captures_again", "test_jit")
def the_key_has_no_strides(patch):
    signature = guards.signature
    everywhere(patch, guards.signature, lambda t: signature(t.contiguous()))


@naive(27, "a_state_around_the_call_captures_again", "test_jit")
def the_key_has_no_modes(patch):
    patch.setattr(jit, "_modes", lambda: ())


@naive(27, "plain_values_are_part_of_the_key", "test_jit")
def the_key_has_no_plain_values(patch):
    signature = guards.signature
    patch.setattr(jit, "_leaf_key", lambda x: signature(x) if isinstance(x, torch.Tensor) else type(x))


@naive(28, "inside_a_torch_func_transform_we_refuse")
def calls_inside_torch_func_are_run(patch):
    everywhere(patch, capture.check_tensors, lambda transform, leaves: None)


@naive(28, "make_fx_sees_plain_aten")
def foreign_tracers_do_not_see_the_run(patch):
    run = capture.run

    def unseen(*args):
        with _disable_current_modes():
            return run(*args)

    everywhere(patch, run, unseen)


@naive(29, "a_forked_child_runs_with_one_thread", "test_cpp")
def a_forked_child_has_the_threads_of_its_parent(patch):
    patch.setattr(native, "_threads", torch.get_num_threads)


@naive(30, "a_bare_import_is_refused")
def a_bare_import_makes_a_second_table(patch):
    patch.folder = tempfile.TemporaryDirectory()  # lives as long as the patch
    root = Path(patch.folder.name)
    for package in ("passes", "codegen", "bench"):
        init = Path(fxfunc.__file__).parents[1] / package / "__init__.py"
        if "raise ImportError" not in init.read_text():
            raise AttributeError(f"no guard in {init}")
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    patch.setattr(fxfunc, "__file__", str(root / "fxfunc" / "__init__.py"))
