"""Fails unless `import fxfunc` adds under 0.15 s to `import torch`, and needs torch alone."""

import os
import subprocess
import sys

LIMIT_S = 0.15
ATTEMPTS = 5  # the least of them: a busy machine only ever adds time
OPTIONAL = ("triton", "tabulate", "numpy", "sklearn", "sympy", "torch._dynamo")

PROBE = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import fxfunc
print(time.perf_counter() - start, *(set(sys.modules) - before))
"""


def probe() -> tuple[float, set[str]]:
    """Seconds that `import fxfunc` takes after torch in a fresh process, and the modules it brings in."""
    environment = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
    }  # an installation has bytecode
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, env=environment
    )
    seconds, *modules = answer.stdout.split()
    return float(seconds), set(modules)


def main() -> int:
    """Prints the time; 1 when it is over the limit or an optional package was imported."""
    runs = [probe() for _ in range(ATTEMPTS)]
    least = min(seconds for seconds, _ in runs)
    unwanted = sorted(set(OPTIONAL) & runs[0][1])
    print(f"import fxfunc after torch: {least:.3f} s (limit {LIMIT_S} s)")
    if unwanted:
        print(f"import fxfunc imports {', '.join(unwanted)}; it may need torch alone")
    return int(least > LIMIT_S or bool(unwanted))


if __name__ == "__main__":
    sys.exit(main())
