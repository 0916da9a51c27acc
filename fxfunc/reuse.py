"""Transforms called again: at an unchanged signature, a function that is provably unchanged is not captured twice.

Entry point: `transform`. The graph of a whole call is kept with the function, under the transforms around it. What cannot be
proved unchanged (see `guards`, strict) is captured at every call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

from fxfunc.passes import errors
from fxfunc.passes.graph import typed
from fxfunc.passes.tracer import current

from .entry import entry
from .guards import OWN, PLAIN
from .jit import _Jit

SIGNATURES = 8  # kept for a function under given transforms
NESTS = 16  # kept for a function
PATIENCE = 3  # captures of one signature in vain, before a function is no longer watched


def transform(func: Callable, name: str, *parameters) -> Callable:
    """A decorator for what a transform of `func` does at a call: `body(*args, **kwargs)`, by the parameters alone."""

    def decorate(body: Callable) -> Callable:
        @entry
        @functools.wraps(func)
        def wrapper(*args, **kwargs):
            if current() is None and (kept := _kept(wrapper, body)) is not None:
                try:
                    return kept(*args, **kwargs)
                except (
                    errors.FxfuncError
                ) as problem:  # the body says it in its own words, or captures with values at hand
                    kept.hopeless = isinstance(problem, errors.ValueDependent)
            return body(*args, **kwargs)

        setattr(wrapper, OWN, _Place(wrapper, func, (name, typed(parameters, None))))
        return wrapper

    return decorate


class _Place:
    """Where a transformed function keeps its graphs: at the function under all transforms, by their names and parameters.

    Decorators copy attributes, so what is found on a function counts only if it says that it is that function's.
    """

    def __init__(self, wrapper: Callable, func: Callable, path: tuple):
        inner = getattr(func, OWN, None)
        known = isinstance(inner, _Place) and inner.owner is func
        self.owner = wrapper
        self.root = inner.root if known else func
        self.path: tuple = (*path, *(inner.path if known else ()))
        self.own = _Graphs(wrapper)

    def graphs(self) -> _Graphs:
        """Those of every nest of transforms of the root, if it can carry them; else of this nest alone."""
        if type(self.root) is not types.FunctionType:
            return self.own
        kept = self.root.__dict__.get(OWN)
        if not (isinstance(kept, _Graphs) and kept.owner is self.root):
            kept = self.root.__dict__[OWN] = _Graphs(self.root)
        return kept


class _Graphs(dict):
    """path -> _Kept, of one function."""

    def __init__(self, owner: Callable):
        super().__init__()
        self.owner = owner


class _Kept(_Jit):
    """The graphs of one nest of transforms of one function."""

    def __init__(self, body: Callable):
        # Eager: such a function is called once or a few times.
        super().__init__(body, cache_size=SIGNATURES, strict=True, backend="eager")
        self.hopeless, self._vain = False, 0

    def _entry(self, key, *rest):
        before = self._entries.get(key)
        self._vain = 0 if self._short_hits else self._vain
        found, closures = super()._entry(key, *rest)
        self._vain = 0 if found is before else self._vain + (before is not None)
        objects = any(
            not isinstance(x, PLAIN) for x in found.captured.others
        )  # made by the function, at each call
        self.hopeless = objects or self._vain >= PATIENCE
        return found, closures


def _kept(wrapper: Callable, body: Callable) -> _Kept | None:
    """The graphs for this nest; None if there are none to be had."""
    place = wrapper.__dict__[OWN]
    graphs = place.graphs()
    try:
        kept = graphs.get(place.path)
    except TypeError:  # parameters that cannot be hashed
        graphs, kept = place.own, place.own.get(())
        key: tuple = ()
    else:
        key = place.path
    if kept is None:
        kept = graphs[key] = _Kept(body)
        while len(graphs) > NESTS:
            del graphs[next(iter(graphs))]
    return None if kept.hopeless else kept
