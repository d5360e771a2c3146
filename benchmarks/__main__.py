"""All that this repository measures, one command each.

Figures are printed; files are written only where asked for (--name, --out, --json), and named at the end.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import compile, cpu, decode, distributed, first, gpu, host, keys, model, run, sanitize
from benchmarks.needs import Missing

COMMANDS = {
    "run": run,
    "model": model,
    "gpu": gpu,
    "decode": decode,
    "distributed": distributed,
    "host": host,
    "cpu": cpu,
    "first": first,
    "keys": keys,
    "compile": compile,
    "sanitize": sanitize,
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=look)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name_of_command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=look)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *arguments])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status: int = options.main(options)
    except Missing as missing:
        print(f"python -m benchmarks {options.name_of_command}: {missing}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
