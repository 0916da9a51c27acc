"""The command line: `python -m fxfunc bench ...`."""

import sys


def main(arguments: list[str]) -> int:
    """Exit status of the command; 2 for one that there is not."""
    if arguments[:1] != ["bench"]:
        print("usage: python -m fxfunc bench {run,compare,plot,nulls,simulate,readme} ...", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    from fxfunc.bench.cli import main as bench

    return bench(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
