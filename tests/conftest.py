"""Every graph that a pass or transform makes in a test is verified. Programs are eager unless a test, or FXFUNC_BACKEND, asks for
a backend: most tests are of graphs, and each C++ program costs half a second. Two calls are one, so that tests can be of two."""

import os

import pytest

from fxfunc.codegen import cost
from fxfunc.passes import config

config.VERIFY = True
os.environ.setdefault("FXFUNC_BACKEND", "eager")  # for the processes that tests start, too


@pytest.fixture(autouse=True)
def programs_of_two_calls():
    with cost.forced(calls="pairs"):
        yield


@pytest.fixture(scope="module")
def cache_of_this_file(tmp_path_factory):
    """Compiled objects of a test file, apart from those of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXFUNC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
