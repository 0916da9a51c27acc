"""Every graph that a pass or transform makes in a test is verified. Programs are eager unless a test, or FXFUNC_BACKEND, asks for
a backend: most tests are of graphs, and each C++ program costs half a second. Two calls are one, so that tests can be of two."""

import os

from fxfunc.codegen import partition
from fxfunc.passes import config

config.VERIFY = True
partition.FEW_CALLS = 2
os.environ.setdefault("FXFUNC_BACKEND", "eager")  # for the processes that tests start, too
