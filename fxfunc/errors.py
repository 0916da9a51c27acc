"""Every error of fxfunc; all are subclasses of `FxfuncError`. Defined beside what raises them, in fxfunc.passes.errors."""

from fxfunc.passes.errors import *  # noqa: F403
