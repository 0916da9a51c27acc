"""Every graph that a pass or transform makes in a test is verified."""

from fxfunc.passes import config

config.VERIFY = True
