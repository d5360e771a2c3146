"""Many calls, and what came of them."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tests.fuzz.calls import USUAL, Call, Sizes, draw, pasted
from tests.fuzz.check import Fault, check
from tests.fuzz.shrink import shrink

# Seconds between what a campaign says of itself, and between the records that it keeps.
_APART = 10


@dataclass(frozen=True)
class Series:
    """Calls by number: always the same."""

    seed: int
    backends: tuple[str, ...]
    device: str = "cpu"
    sizes: Sizes = USUAL

    def draw(self, number: int) -> Call:
        return draw(self.seed, number, self.backends, self.sizes)


class Judged(NamedTuple):
    """What came of a call. fault: what went wrong, and the smallest call that goes wrong in that way."""

    number: int
    backend: str
    verdict: str
    fault: dict[str, str] | None = None


def judge(series: Series, number: int) -> Judged:
    call = series.draw(number)
    try:
        return Judged(number, call.backend, check(call, series.device))
    except Fault as fault:
        smallest = call
        if not lost(series.device):
            smallest = shrink(call, lambda smaller, kind=fault.kind: _fails(smaller, series.device, kind))
        seen = _seen(smallest, series.device)
        if seen is None:  # it goes wrong now and then
            smallest, seen = call, str(fault)
        return Judged(number, call.backend, "wrong", _fault(number, seen, smallest))
    except Exception as error:  # of the checks' own, which are to be mended
        return Judged(number, call.backend, "not judged", _fault(number, f"not judged: {error!r}", call))


def one_by_one(series: Series, numbers: Iterable[int], seconds: float = math.inf) -> Iterator[Judged]:
    """What comes of calls. None is begun once so many ``seconds`` are over."""
    stop = time.monotonic() + seconds
    for number in numbers:
        if time.monotonic() > stop:
            return
        yield judge(series, number)


def ended(series: Series, number: int, how: str) -> Judged:
    """Of a call that its process did not outlive."""
    call = series.draw(number)
    return Judged(number, call.backend, "wrong", _fault(number, how, call))


def lost(device: str) -> bool:
    """Whether an error has made the device useless to this process."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        return bool(torch.ones((), device=device).item() != 1)
    except RuntimeError:
        return True


def _fault(number: int, seen: str, call: Call) -> dict[str, str]:
    return {"number": str(number), "seen": seen, "call": pasted(call)}


@dataclass
class Campaign:
    """What came of calls: how many of each backend were judged how far, and those that went wrong, as small as they
    could be made."""

    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[dict[str, str]] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)

    def add(self, judged: Iterable[Judged], many: int | None = None, keep: Callable[[], None] = lambda: None) -> None:
        """``many``: how many there will be, to say how far they have come. ``keep``: called now and then."""
        begun = told = time.monotonic()
        for done, one in enumerate(judged, 1):
            self.found[one.backend, one.verdict] += 1
            self.numbers.add(one.number)
            if one.fault:
                self.faults.append(one.fault)
                print(f"\ncall {one.number}: {one.fault['seen']}\n{one.fault['call']}\n", flush=True)
            if many is not None and (done == many or time.monotonic() - told > _APART):
                told = time.monotonic()
                left = (told - begun) / done * (many - done)
                print(f"{done} of {many} calls, {self}, {left:.0f} s left", file=sys.stderr, flush=True)
                keep()

    @property
    def calls(self) -> int:
        return sum(self.found.values())

    def __str__(self) -> str:
        total: Counter[str] = Counter()
        for (_, verdict), many in self.found.items():
            total[verdict] += many
        return ", ".join(f"{many} {verdict}" for verdict, many in total.most_common())

    def table(self) -> dict[str, dict[str, int]]:
        """Counts by backend, then by verdict."""
        backends = sorted({backend for backend, _ in self.found})
        return {b: {v: n for (of, v), n in sorted(self.found.items()) if of == b} for b in backends}


def row(kept: dict[str, Any], name: str) -> str:
    """Of a record that a campaign kept as ``name``, the row of the table in docs/reliability.md."""
    total: Counter[str] = Counter()
    for counts in kept["verdicts"].values():
        total.update(counts)
    kinds = f" of {kept['forms']} kinds" if kept.get("forms", kept["calls"]) != kept["calls"] else ""
    where = f"{kept['device']}, Python {kept['python']}, torch {kept['torch'].split('+')[0]}, Triton {kept['triton']}"
    cells = [
        f"{', '.join(f'`{backend}`' for backend in kept['verdicts'])}{', interpreted' * kept['interpreted']}",
        str(kept["seed"]),
        f"{kept['calls']}{kinds}",
        *(str(total[verdict]) for verdict in ("right", "refused", "unconverged", "loose", "wrong")),
        f"{kept['date'].split()[0]}, {where}",
        f"`benchmarks/results/{name}.json`",
    ]
    return f"| {' | '.join(cells)} |"


def _fails(call: Call, device: str, kind: str) -> bool:
    try:
        check(call, device)
    except Fault as fault:
        return fault.kind == kind
    except Exception:  # no call that the checks know
        return False
    return False


def _seen(call: Call, device: str) -> str | None:
    try:
        check(call, device)
    except Fault as fault:
        return str(fault)
    return None
