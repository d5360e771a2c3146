"""Many calls, one after the other, and what came of them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.fuzz.calls import Call, draw, pasted
from tests.fuzz.check import Fault, check
from tests.fuzz.shrink import shrink


@dataclass
class Campaign:
    """What came of calls: how many of each backend were judged how far, and those that went wrong, as small as they
    could be made."""

    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[dict[str, str]] = field(default_factory=list)

    def run(
        self, seed: int, numbers: Sequence[int], backends: Sequence[str], device: str, small: bool, say: bool
    ) -> None:
        begun = told = time.monotonic()
        for done, number in enumerate(numbers, 1):
            call = draw(seed, number, backends, small)
            try:
                verdict = check(call, device)
            except Fault as fault:
                verdict = "wrong"
                smallest = shrink(call, lambda smaller, kind=fault.kind: _fails(smaller, device, kind))
                self.faults.append({"number": str(number), "seen": _seen(smallest, device), "call": pasted(smallest)})
                print(f"\ncall {number}: {self.faults[-1]['seen']}\n{self.faults[-1]['call']}\n", flush=True)
            except Exception as error:  # of the checks' own, which are to be mended
                verdict = "not judged"
                self.faults.append({"number": str(number), "seen": f"not judged: {error!r}", "call": pasted(call)})
                print(f"\ncall {number}: {self.faults[-1]['seen']}\n{self.faults[-1]['call']}\n", flush=True)
            self.found[call.backend, verdict] += 1
            if say and (done == len(numbers) or time.monotonic() - told > 10):
                told = time.monotonic()
                left = (told - begun) / done * (len(numbers) - done)
                print(f"{done} of {len(numbers)} calls, {self}, {left:.0f} s left", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        total: Counter[str] = Counter()
        for (_, verdict), many in self.found.items():
            total[verdict] += many
        return ", ".join(f"{many} {verdict}" for verdict, many in total.most_common())

    def table(self) -> dict[str, dict[str, int]]:
        """Counts by backend, then by verdict."""
        backends = sorted({backend for backend, _ in self.found})
        return {b: {v: n for (of, v), n in sorted(self.found.items()) if of == b} for b in backends}


def _fails(call: Call, device: str, kind: str) -> bool:
    try:
        check(call, device)
    except Fault as fault:
        return fault.kind == kind
    except Exception:  # no call that the checks know
        return False
    return False


def _seen(call: Call, device: str) -> str:
    try:
        return check(call, device)
    except Fault as fault:
        return str(fault)
