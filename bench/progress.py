"""What a long run says while it runs, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Work done, as a share of `total` (any unit), and the time that the rest will take if it goes on like this."""

    def __init__(self, total: float):
        self.total, self.done, self.start = total, 0.0, time.monotonic()
        self.live = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """What is under way: a line that overwrites itself on a terminal, nothing elsewhere."""
        if self.live:
            print(f"\r\x1b[K{self._head()}  {text}", end="", file=sys.stderr, flush=True)

    def advance(self, work: float, text: str) -> None:
        """`work` more is done; `text` says what."""
        self.done += work
        before = "\r\x1b[K" if self.live else ""
        print(f"{before}{self._head()}  {text}", file=sys.stderr, flush=True)

    def _head(self) -> str:
        elapsed = time.monotonic() - self.start
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        left = f"about {clock(elapsed * (1 - share) / share)} left" if share > 0 else "estimating"
        return f"{share:4.0%}  {clock(elapsed)}, {left}"


def clock(seconds: float) -> str:
    """As 3:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
