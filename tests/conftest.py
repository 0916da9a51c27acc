"""Every graph that a pass or transform makes in a test is verified. Programs are eager unless a test asks for a backend: most
tests are of graphs, and each C++ program costs half a second."""

import os

from fxfunc.passes import config

config.VERIFY = True
os.environ["FXFUNC_BACKEND"] = "eager"  # for the processes that tests start, too
