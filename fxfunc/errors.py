"""Every error of fxfunc, all subclasses of `FxfuncError`, and `BackendWarning`. Defined beside what raises them, in
fxfunc.passes.errors."""

from fxfunc.passes.errors import *  # noqa: F403
