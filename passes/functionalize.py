"""From what was recorded to a functional graph. Entry point: `functionalize`.

In one walk: writes become new values (views of a written tensor are read again from it), grad modes become `stop_reverse`
on the edges from no_grad to grad, and ops with many spellings get one (spellings.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch.fx import Node

from . import errors
from .graph import Graph, Val, getitem, graft, root, stop_reverse, substitute
from .record import Builder, Value, aten
from .spellings import CANONICAL, VIEWS, explicit, is_write, new_values


def functionalize(raw: Graph, *, writable: Callable[[int], bool] = lambda i: False) -> Graph:
    """The functional graph. Writes to input i raise, unless `writable(i)`: then the new values of all written
    inputs are appended to the outputs, and `graph.written` says which inputs they are."""
    walk = _Walk(raw)
    for n in raw.nodes:
        walk.step(n)
    outputs = [None if n is None else walk.read(n, True) for n in raw.outputs]
    written = [i for i, n in enumerate(raw.inputs) if walk.version.get(n)]
    for i in (i for i in written if not writable(i)):
        node = walk.writer[raw.inputs[i]]
        raise errors.MutatedCapture(op=node.target, source=node.meta.get("source"))
    graph = walk.b.finish(outputs + [walk.read(raw.inputs[i], True) for i in written])
    graph.written = tuple(written)
    graph.fresh = tuple(i for i, n in enumerate(raw.outputs) if n is not None and root(n) not in raw.inputs)
    return graph


@dataclasses.dataclass
class _View:
    """A value that is a window on `base`: read by `forward(b, base)`, written back by `backward(b, base, new)`."""

    base: Node
    forward: object
    backward: object


class _Walk:
    def __init__(self, raw: Graph):
        self.b = Builder(None)
        self.env: dict[Node, object] = {n: self.b.input(n.meta["val"], n.name) for n in raw.inputs}
        self.views: dict[Node, _View] = {}
        self.version: dict[Node, int] = {}
        self.seen: dict[Node, int] = {}
        self.writer: dict[Node, Node] = {}
        self.no_grad: set[Node] = set()
        self.stopped: dict[Value, Value] = {}
        self.track = any(is_write(n) for n in raw.nodes)
        self.scattered = {
            n for n in raw.inputs if n.meta.get("scattered")
        }  # not laid out in order, as far as is known
        self.parted: dict[
            Node, Node
        ] = {}  # base -> a write that reached it or not, as its layout would have it

    def step(self, n: Node) -> None:
        """Emit one recorded call."""
        grad = n.meta.get("grad_mode", True)
        if not grad:
            self.no_grad.add(n)
        with self.b.at(n):
            if n.target is getitem:
                self._item(n)
                return
            if is_write(n):
                self._write(n, grad)
                return
            self.env[n] = self._call(n, *self._arguments(n, grad))
            if self.track:
                self._lay_out(n)
            if self.track and n.target in VIEWS:
                self._view(n)

    def _arguments(self, n: Node, grad: bool):
        def get(m):
            return self.read(m, grad)

        return substitute(n.args, get), {k: substitute(v, get) for k, v in n.kwargs.items()}

    def _call(self, n: Node, args, kwargs):
        val, canonical = n.meta["val"], CANONICAL.get(n.target)
        if canonical:
            return canonical(self.b, val, *args, **kwargs)
        if isinstance(val, Val):
            args, kwargs = explicit(n.target, val, args, kwargs)
        return self.b.emit(n.target, args, kwargs)

    def _item(self, n: Node) -> None:
        source, i = n.args
        if source in self.no_grad:
            self.no_grad.add(n)
        self.env[n] = self.env[source][i]
        if self.track and source.target in VIEWS:
            view = VIEWS[source.target](
                *source.args[1:], **source.kwargs, index=i, val=source.args[0].meta["val"]
            )
            self._register(n, source.args[0], view)
            place = 1 if source.target is aten.unbind.int else 2
            if source.args[0] in self.scattered or source.args[place:] not in ((), (0,)):
                self.scattered.add(n)

    def _lay_out(self, n: Node) -> None:
        """Note a value whose elements may lie in another order, or with gaps: torch then copies in reshape and contiguous."""
        if any(m in self.scattered for m in n.all_input_nodes):
            kept = n.target not in _ORDERED and n.target is not aten.alias.default
        else:
            dim = n.args[1] if len(n.args) > 1 and n.target in (aten.select.int, aten.slice.Tensor) else None
            kept = n.target in _SCATTERING and dim != 0
        if kept:
            self.scattered.add(n)

    def _may_copy(self, n: Node) -> bool:
        """True for a reshape of a scattered value, which is a view or a copy as its layout will have it."""
        return n.target in _RESHAPES and n.args[0] in self.scattered and not n.meta.get("view")

    def _view(self, n: Node) -> None:
        if isinstance(n.meta["val"], Val):
            self._register(n, n.args[0], VIEWS[n.target](*n.args[1:], **n.kwargs, val=n.args[0].meta["val"]))

    def _register(self, n: Node, base: Node, view) -> None:
        self.views[n] = _View(base, *view)
        self.seen[n] = self._version(base)

    def _version(self, n: Node) -> int:
        return self.version.get(self._base(n), 0)

    def _base(self, n: Node) -> Node:
        return self._base(self.views[n].base) if n in self.views else n

    def read(self, n: Node, grad: bool) -> Value:
        """The present value of a recorded one, as code in this grad mode sees it."""
        value = self._current(n)
        if grad and n in self.no_grad and isinstance(value, Value):
            key = value.node
            if key not in self.stopped:
                self.stopped[key] = self.b.emit(stop_reverse, (value,))
            return self.stopped[key]
        return value

    def _current(self, n: Node):
        if (writer := self.parted.get(self._base(n))) is not None:
            raise _unknown_layout(writer)
        if n in self.views and self.seen[n] != self._version(n):
            view = self.views[n]
            if self._may_copy(n):
                raise _unknown_layout(self.writer[self._base(n)])
            self.env[n] = view.forward(self.b, self.read(view.base, n not in self.no_grad))
            self.seen[n] = self._version(n)
        return self.env[n]

    def _write(self, n: Node, grad: bool) -> None:
        args, kwargs = self._arguments(n, grad)
        targets, new = new_values(self.b, n, args, kwargs)
        for target, value in zip(targets, new, strict=True):
            if grad:
                self._leave_no_grad(target)
            old = self._current(target)
            if value.dtype != old.dtype:
                value = value.to(old.dtype)
            if value.shape != old.shape:
                value = value.expand(old.shape)
            if not grad and self._base(target) not in self.no_grad:
                value = self.b.emit(graft, (value, old))
            self._store(target, value, n)
        self.env[n] = (
            self._current(targets[0])
            if len(targets) == 1 and isinstance(n.meta["val"], Val)
            else self.env.get(n)
        )

    def _leave_no_grad(self, n: Node) -> None:
        """A tensor made under no_grad is written to under grad: what it held is constant, what is written is not."""
        base = self._base(n)
        self.env[base] = self.read(base, True)
        self.no_grad -= {base, n}

    def _store(self, n: Node, value: Value, writer: Node) -> None:
        if n in self.views and self._may_copy(n):
            base = self._base(n)
            if base.op == "placeholder":
                raise _unknown_layout(writer)
            self.parted[base] = writer  # reading it from here on raises
            del self.views[n]
        if n in self.views:
            view = self.views[n]
            self._store(view.base, view.backward(self.b, self._current(view.base), value), writer)
            self.seen[n] = self._version(n)
        else:
            self.version[n] = self.version.get(n, 0) + 1
            self.writer[n] = writer
        self.env[n] = value


_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.alias.default}
_SCATTERING = {
    *(
        aten.t.default,
        aten.permute.default,
        aten.transpose.int,
        aten.expand.default,
        aten.select.int,
        aten.slice.Tensor,
    ),
    *(aten.diagonal.default, aten.unfold.default, aten.as_strided.default),
}
# Their results are laid out in order whatever their operands are.
_ORDERED = {
    *(
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.mv.default,
        aten.dot.default,
    ),
    *(aten.convolution.default, aten.embedding.default, aten.cat.default, aten.native_layer_norm.default),
}


def _unknown_layout(writer: Node) -> errors.NotSupported:
    return errors.NotSupported(
        what="writing in place where reshape or contiguous may have copied (the layout of the tensor is not known)",
        instead="Clone the tensor before it is reshaped and written to.",
        source=writer.meta.get("source"),
    )
