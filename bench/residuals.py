"""What rematerialisation saves and costs: `python -m fxfunc.bench.residuals`, a transformer's gradient under several policies.

A table: bytes kept between the forward and the backward, the most at a time in the backward, both as shares of the plain
function's, the time of a gradient (interleaved in one process: median and least) and what a process of its own adds to its
resident memory at the highest point.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fxfunc

from .measure import interleave
from .memory import peak, reset_peak

HEADS, HIDDEN = 4, 4  # heads, and the width of the hidden layer in widths
MIB = 2**20


def parameters(blocks: int, width: int) -> list[dict[str, Tensor]]:
    """The weights of each block."""
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, HIDDEN * width),
        "down": (HIDDEN * width, width),
    }
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(blocks):
        block = {k: torch.randn(s, generator=generator) * s[0] ** -0.5 for k, s in shapes.items()}
        block |= {f"{k}_bias": torch.zeros(s[1]) for k, s in shapes.items()}
        found.append(block | {k: torch.ones(width) for k in ("norm", "second_norm")})
    return found


def block(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Attention and a layer of GELUs, each after a norm and added to what came in."""
    batch, length, width = x.shape
    y = F.layer_norm(x, (width,), p["norm"])
    heads = F.linear(y, p["qkv"].T, p["qkv_bias"]).view(batch, length, 3, HEADS, width // HEADS)
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
    x = x + F.linear(y, p["out"].T, p["out_bias"])
    y = F.gelu(F.linear(F.layer_norm(x, (width,), p["second_norm"]), p["up"].T, p["up_bias"]))
    return x + F.linear(y, p["down"].T, p["down_bias"])


def loss(params: list[dict[str, Tensor]], x: Tensor, *, each: Callable = block) -> Tensor:
    """The mean square of what the blocks make of x."""
    for p in params:
        x = each(p, x)
    return x.square().mean()


WAYS: dict[str, Callable] = {
    "plain": loss,
    "min_cut": fxfunc.checkpoint(loss),
    "dots": fxfunc.checkpoint(loss, policy="dots"),
    "nothing, each block": functools.partial(loss, each=fxfunc.checkpoint(block, policy="nothing")),
}


def gradient(way: str, example: tuple) -> Callable[[], object]:
    """A compiled gradient, as a call."""
    call = fxfunc.jit(fxfunc.grad(WAYS[way])).lower(*example).compile()
    return lambda: call(*example)


def resident(way: str, example: tuple) -> int:
    """Bytes that the second call of a gradient adds to what is resident before the first."""
    call = gradient(way, example)
    before = reset_peak()
    call()
    return peak() - before


def _resident_alone(way: str, options: argparse.Namespace) -> int:
    sizes = [f"--{k}={getattr(options, k)}" for k in ("blocks", "width", "length", "batch", "threads")]
    command = [sys.executable, "-m", "fxfunc.bench.residuals", *sizes, "--resident", way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(options: argparse.Namespace, example: tuple) -> str:
    """All ways, a line each."""
    kept = {way: fxfunc.saved_residuals(f, *example) for way, f in WAYS.items()}
    times = interleave({way: gradient(way, example) for way in WAYS}, options.rounds)
    memory = {way: _resident_alone(way, options) for way in WAYS}
    plain, first = kept["plain"], times["plain"]
    heads = ("kept MiB", "share", "most MiB", "share", "ms", "ratio", "of least", "RSS MiB")
    lines = [f"{'':<20}" + "".join(f"{head:>10}" for head in heads)]
    for way in WAYS:
        k, t = kept[way], times[way]
        numbers = (k.total / MIB, k.total / plain.total, k.peak / MIB, k.peak / plain.peak, t.median_ms)
        numbers += (t.median_ms / first.median_ms, t.min_ms / first.min_ms, memory[way] / MIB)
        lines.append(f"{way:<20}" + "".join(f"{x:>10.3f}" for x in numbers))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fxfunc.bench.residuals", description=__doc__)
    numbers = {"blocks": 12, "width": 128, "length": 64, "batch": 4, "rounds": 40, "threads": 1}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--resident", choices=WAYS, help="print the bytes of one way alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    x = torch.randn(options.batch, options.length, options.width, generator=torch.Generator().manual_seed(1))
    example = (parameters(options.blocks, options.width), x)
    print(resident(options.resident, example) if options.resident else table(options, example))


if __name__ == "__main__":
    main()
