"""What one launch on a GPU does besides a `loops.Kernel`: `Tasks`, which is to a map what that is to a group of calls, and
`Together`, several of them."""

from __future__ import annotations

import dataclasses

from fxfunc.passes.dims import Size
from fxfunc.passes.graph import Graph
from fxfunc.passes.printer import text

from .loops import Arg, Kernel


@dataclasses.dataclass(frozen=True)
class Tasks:
    """A map as a kernel: `body` once per index, by `programs` programs; what it sums, each program sums for its own tasks."""

    body: Graph
    length: Size
    mapped: tuple[bool, ...]
    outs: tuple[str, ...]
    programs: int
    name: str = dataclasses.field(default="tasks", compare=False)

    @property
    def args(self) -> tuple[Arg, ...]:
        """The operands, then the outputs."""
        ins = [Arg((self.length, *v.shape) if m else v.shape, v.dtype, name=f"{n.name}_ptr")
               for n, v, m in zip(self.body.inputs, self.body.in_vals, self.mapped, strict=True)]  # fmt: skip
        return (*ins, *self.outputs)

    @property
    def outputs(self) -> tuple[Arg, ...]:
        """What it stores; of a sum, that of each program."""
        return tuple(Arg((self.length if kind == "stack" else self.programs, *v.shape), v.dtype, True, f"out{i}_ptr")
                     for i, (v, kind) in enumerate(zip(self.body.out_vals, self.outs, strict=True)))  # fmt: skip

    @property
    def grid(self) -> tuple[int, ...]:
        """Its programs."""
        return (self.programs,)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of its symbolic sizes."""
        return () if isinstance(self.length, int) else tuple(sorted(self.length.names()))

    def __str__(self) -> str:
        kinds = ", ".join(self.outs)
        return f"{self.name}: {self.length} tasks by {self.programs} programs, outputs {kinds}\n{text(self.body, sources=False)}"

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Together:
    """Kernels as one: the operands of all in order, then the outputs of all."""

    parts: tuple[Kernel, ...]
    name: str = dataclasses.field(default="together", compare=False)

    @property
    def args(self) -> tuple[Arg, ...]:
        """The operands, then the outputs."""
        return (*(a for p in self.parts for a in p.inputs), *self.outputs)

    @property
    def outputs(self) -> tuple[Arg, ...]:
        """What it stores."""
        return tuple(a for p in self.parts for a in p.outputs)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of its symbolic sizes."""
        return tuple(sorted({s for p in self.parts for s in p.sizes}))

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {len(self.parts)} kernels", *map(str, self.parts)])

    def __repr__(self) -> str:
        return self.name


AnyKernel = Kernel | Tasks | Together
