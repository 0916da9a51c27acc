"""The command line: `python -m fxfunc bench ...` and `python -m fxfunc coverage`."""

import sys


def main(arguments: list[str]) -> int:
    """Exit status of the command; 2 for one that there is not."""
    command, rest = arguments[:1], arguments[1:]
    if command == ["bench"]:
        from fxfunc.bench.cli import main as bench

        return bench(rest)
    if command == ["coverage"]:
        from fxfunc.coverage import main as coverage

        return coverage(rest)
    print("usage: python -m fxfunc {bench,coverage} ...", file=sys.stderr)
    return 0 if command in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
