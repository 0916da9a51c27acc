"""What entry points share: `entry` (under torch.compile Dynamo runs them as they are, with a graph break, and never traces
our code) and `no_collection`."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator

import torch

_dynamo = torch._C._dynamo.eval_frame
_SKIP = _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.SKIP)


def entry(function: Callable) -> Callable:
    """A public function that Dynamo leaves alone, and whatever it calls. (torch.compiler.disable would import Dynamo.)"""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call._torchdynamo_disable = True
    return call


def bare_entry(function: Callable) -> Callable:
    """`entry` without a call around the function, for one that is defined once."""
    _dynamo.set_code_exec_strategy(function.__code__, _SKIP)
    function._torchdynamo_disable = True
    return function


_dynamo.set_code_exec_strategy(entry(len).__code__, _SKIP)  # one code object, whatever it wraps


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No full garbage collection inside: one is due since torch was imported, walks all of torch (0.1 s) and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.collect(1)  # the young objects only; leaves the counters low
            gc.enable()
