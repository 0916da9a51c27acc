"""What a kernel of the loop IR means. Entry point: `evaluate`, which tests hold every emitter against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxfunc.passes.dims import Size, at

from .loops import (
    ELEMENTWISE,
    REDUCTIONS,
    Apply,
    Const,
    Dot,
    Index,
    Iota,
    Kernel,
    Load,
    Reduce,
    Store,
    neutral,
)


def evaluate(k: Kernel, inputs: Sequence[Tensor], sizes: dict[str, int] | None = None) -> tuple[Tensor, ...]:
    """The outputs, instruction by instruction in torch: slow, and the meaning of the IR."""
    return _Evaluator(k, inputs, sizes or {}).run()


class _Evaluator:
    """Holds each value as a tensor of shape grid + tile, tiles padded in front to one rank."""

    def __init__(self, k: Kernel, inputs: Sequence[Tensor], sizes: dict[str, int]):
        self.k, self.sizes = k, sizes
        self.grid = tuple(at(s, sizes) for s in k.grid)
        given = iter(inputs)
        self.args = [
            torch.empty([at(s, sizes) for s in a.shape], dtype=a.dtype).reshape(-1)
            if a.output
            else next(given).contiguous().reshape(-1)
            for a in k.args
        ]
        self.values: list[Tensor | None] = []

    def run(self) -> tuple[Tensor, ...]:
        for instr in self.k.body:
            self.values.append(getattr(self, "_" + type(instr).__name__.lower())(instr))
        return tuple(
            x.reshape([at(s, self.sizes) for s in a.shape])
            for a, x in zip(self.k.args, self.args, strict=True)
            if a.output
        )

    def _address(self, index: Index, shape: tuple[Size, ...]) -> Tensor:
        index, pad = index.at(self.sizes), (1,) * (self.k.rank - len(shape))
        space = (*self.grid, *pad, *(at(s, self.sizes) for s in shape))
        out = torch.full(space, index.offset, dtype=torch.int64)
        for axis, (n, stride) in enumerate(
            zip(space, (*index.grid, *(0 for _ in pad), *index.tile), strict=True)
        ):
            out += (torch.arange(n) * stride).reshape([-1 if a == axis else 1 for a in range(len(space))])
        return out

    def _load(self, instr: Load) -> Tensor:
        address, flat = self._address(instr.index, instr.shape), self.args[instr.arg]
        mask = torch.tensor(True) if instr.mask is None else self.values[instr.mask]
        for p in (p.at(self.sizes) for p in instr.picks):
            value = self.values[p.value]
            if bool((((value < 0) | (value >= p.size)) & mask).any()):
                raise IndexError(f"an index is out of range of {p.size}")
            address = address + value * p.stride
        if instr.mask is None:
            return flat[address]
        address, mask = torch.broadcast_tensors(address, mask)
        return torch.zeros(address.shape, dtype=flat.dtype).masked_scatter(mask, flat[address[mask]])

    def _const(self, instr: Const) -> Tensor:
        value = torch.tensor(at(instr.value, self.sizes), dtype=instr.dtype)
        return value.expand(*self.grid, *(1,) * self.k.rank)

    def _iota(self, instr: Iota) -> Tensor:
        return self._address(instr.index, instr.shape)

    def _apply(self, instr: Apply) -> Tensor:
        args = [self.values[i] for i in instr.args]
        return args[0].to(instr.dtype) if instr.op == "cast" else ELEMENTWISE[instr.op](*args)

    def _reduce(self, instr: Reduce, x: Tensor | None = None) -> Tensor:
        x, tile = self.values[instr.x] if x is None else x, [at(s, self.sizes) for s in instr.shape]
        dims = [x.ndim - len(tile) + axis for axis in instr.axes]
        x = x.expand(*self.grid, *x.shape[len(self.grid) : x.ndim - len(tile)], *tile)
        if all(x.shape[d] for d in dims):
            return REDUCTIONS[instr.op](x, dims)
        return torch.full(
            [1 if d in dims else n for d, n in enumerate(x.shape)], neutral(instr.op, x.dtype), dtype=x.dtype
        )

    def _dot(self, instr: Dot) -> Tensor:
        x, y = (self.values[i].to(instr.dtype) for i in (instr.x, instr.y))
        return self._reduce(Reduce("sum", -1, instr.shape, tuple(range(len(instr.shape)))), x * y)

    def _store(self, instr: Store) -> None:
        address = self._address(instr.index, instr.shape)
        self.args[instr.arg][address] = self.values[instr.x].expand(address.shape)
