"""The ranks that a benchmark of several GPUs runs on, and how their calls are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from flashlla.distributed.groups import COMPARED, Ranks, agree


class Cost(NamedTuple):
    """Of one call."""

    seconds: float  # the median, of the slowest rank
    gib: float  # that it allocates at most, beside what there is before, on the rank where that is most


class World:
    """The first ``size`` ranks, by themselves, and the device of this one. To be made by all ranks."""

    def __init__(self, device: str, size: int) -> None:
        self.device, self.size, self.rank = device, size, dist.get_rank()
        self.group: Any = dist.new_group(list(range(size)))

    def settle(self) -> None:
        """Have done with what ranks do in a group's first calls alone: they compare what they ask for."""
        for _ in range(COMPARED):
            agree(Ranks(self.group, self.rank, self.size), torch.device(self.device), dict)

    @property
    def mine(self) -> bool:
        """Whether this rank is one of them."""
        return self.rank < self.size

    def say(self, *words: Any) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def most(self, number: float) -> float:
        """The largest of all ranks'."""
        return max(self.every(number))

    def every(self, number: float) -> list[float]:
        found = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(number, dtype=torch.float64, device=self.device), group=self.group)
        return [float(x) for x in found]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def cost(self, call: Callable[[], Any], calls: int = 5, most: float = 1.5, warm: bool = True) -> Cost:
        """Of up to ``calls``, fewer if they take longer than ``most`` seconds; ``warm``: after another."""
        before = 0
        if self.device == "cuda":
            self.wait()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        if warm:
            call()
        times: list[float] = []
        while len(times) < calls and sum(times) <= most:
            self.most(0.0)  # all begin at once
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(self.most(time.perf_counter() - start))
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else 0
        return Cost(statistics.median(times), self.most((peak - before) / 2**30))

    def begun(self, call: Callable[[], Any]) -> float:
        """Seconds that the host of the slowest rank takes to begin what ``call`` asks of the device."""
        self.most(0.0)
        self.wait()
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        self.wait()
        return self.most(took)
