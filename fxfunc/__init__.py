"""Composable function transforms for PyTorch as passes over FX graphs."""

from .entry import no_collection as _no_collection

with _no_collection():
    from fxfunc.passes import rules as _rules
    from fxfunc.passes.dims import Dim as Dim

    from . import errors as errors
    from .artifact import load as load
    from .checkpoint import checkpoint as checkpoint
    from .checkpoint import saved_residuals as saved_residuals
    from .control import cond as cond
    from .control import fori_loop as fori_loop
    from .control import scan as scan
    from .custom import register_rule as register_rule
    from .functional import debug_unwrap as debug_unwrap
    from .functional import functionalize as functionalize
    from .functional import rearrange as rearrange
    from .jacobians import hessian as hessian
    from .jacobians import jacfwd as jacfwd
    from .jacobians import jacobian as jacobian
    from .jacobians import jacrev as jacrev
    from .jacobians import value_and_jacrev as value_and_jacrev
    from .jit import Compiled as Compiled
    from .jit import Lowered as Lowered
    from .jit import jit as jit
    from .jit import spec as spec
    from .mapping import vmap as vmap
    from .nn import functional_call as functional_call
    from .nn import replace_all_batch_norm_modules_ as replace_all_batch_norm_modules_
    from .nn import stack_module_state as stack_module_state
    from .transforms import grad as grad
    from .transforms import grad_and_value as grad_and_value
    from .transforms import hvp as hvp
    from .transforms import jvp as jvp
    from .transforms import linear_transpose as linear_transpose
    from .transforms import linearize as linearize
    from .transforms import make_graph as make_graph
    from .transforms import stop_gradient as stop_gradient
    from .transforms import value_and_grad as value_and_grad
    from .transforms import vjp as vjp

del _no_collection, _rules
__version__ = "0.1.0"
