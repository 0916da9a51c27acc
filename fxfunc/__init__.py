"""Composable function transforms for PyTorch as passes over FX graphs."""

from fxfunc.passes import rules as _rules
from fxfunc.passes.dims import Dim as Dim

from . import errors as errors
from .artifact import load as load
from .control import fori_loop as fori_loop
from .control import scan as scan
from .custom import register_rule as register_rule
from .jit import Compiled as Compiled
from .jit import Lowered as Lowered
from .jit import jit as jit
from .jit import spec as spec
from .nn import functional_call as functional_call
from .nn import stack_module_state as stack_module_state
from .transforms import grad as grad
from .transforms import grad_and_value as grad_and_value
from .transforms import hessian as hessian
from .transforms import jacfwd as jacfwd
from .transforms import jacrev as jacrev
from .transforms import jvp as jvp
from .transforms import linearize as linearize
from .transforms import make_graph as make_graph
from .transforms import stop_gradient as stop_gradient
from .transforms import value_and_grad as value_and_grad
from .transforms import vjp as vjp
from .transforms import vmap as vmap

del _rules
__version__ = "0.1.0"
