"""``python -m tests.fuzz --calls 1000 --seed 3``: random calls of the operators, against the oracle and what is
promised. Whatever goes wrong is printed as Python to paste, as small as it could be made; the status is then 1."""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time

import torch

if __name__ == "__main__" and not torch.cuda.is_available() and any("triton" in word for word in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import flashlla
from benchmarks import record
from tests.fuzz.calls import COMPILED, INTERPRETED, USUAL
from tests.fuzz.campaign import Campaign, Series, one_by_one
from tests.fuzz.processes import side_by_side
from tests.support import helpers  # noqa: F401  makes the interpreter fast


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the same gives the same calls (default 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first call, to go on from (default 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", nargs="+", help="default: chunked and naive on the CPU, all on a GPU")
    parser.add_argument("--processes", type=int, default=1, help="side by side (default 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no call after so many")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.command = "fuzz"
    on_cpu = ["chunked", "naive"]
    backends = options.backend or (on_cpu if options.device == "cpu" else list(flashlla.available_backends()))
    torch.set_num_threads(1)
    fused = any("triton" in name for name in backends)
    sizes = USUAL if not fused else COMPILED if options.device == "cuda" else INTERPRETED
    series = Series(options.seed, tuple(backends), options.device, sizes)
    numbers = range(options.first, options.first + options.calls)
    kept, campaign, begun = record.Record(options, options.device), Campaign(), time.monotonic()

    def keep() -> None:
        kept.figures |= {
            "seed": options.seed,
            "first": options.first,
            "calls": campaign.calls,
            "forms": len({number // sizes.turns for number in campaign.numbers}),
            "processes": options.processes,
            "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
            "seconds": round(time.monotonic() - begun),
            "verdicts": campaign.table(),
            "faults": campaign.faults,
        }
        kept.write()

    try:
        run = one_by_one if options.processes == 1 else functools.partial(side_by_side, options.processes)
        campaign.add(run(series, numbers, options.seconds), len(numbers), keep)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    keep()
    print(f"{campaign.calls} calls: {campaign}")
    kept.end()
    return 1 if campaign.faults else 0


if __name__ == "__main__":
    sys.exit(main())
