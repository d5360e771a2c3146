"""A campaign by several processes. One that dies, hangs, or loses its device is followed by another."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tests.fuzz.campaign import Judged, Series, ended, judge, lost

# Seconds that a process may be silent: to start, to judge a call, to make it small.
_PATIENCE = 300
# And after the time that a campaign was given.
_GRACE = 20


def _work(series: Series, line: Connection) -> None:
    torch.set_num_threads(1)
    while not lost(series.device):
        line.send(judge(series, line.recv()))


@dataclass
class _Worker:
    """A process, the number that it is at, since when, and those that it is to have next."""

    process: Any
    line: Connection
    number: int = 0
    since: float = 0.0
    next: deque[int] = field(default_factory=deque)

    @classmethod
    def start(cls, series: Series) -> _Worker:
        context = multiprocessing.get_context("spawn")  # no fork outlives CUDA
        mine, its = context.Pipe()
        process = context.Process(target=_work, args=(series, its), daemon=True)
        process.start()
        its.close()  # so that its end is heard of
        return cls(process, mine)

    def give(self, numbers: deque[int]) -> None:
        self.next, self.number, self.since = numbers, numbers.popleft(), time.monotonic()
        with contextlib.suppress(OSError):  # it has just ended, which is heard when it is listened to
            self.line.send(self.number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.line.close()


def side_by_side(processes: int, series: Series, numbers: Iterable[int], seconds: float) -> Iterator[Judged]:
    """What comes of calls, in any order; those that take the same kernels one process has, one after the other. None
    is begun once so many ``seconds`` are over."""
    stop, turns = time.monotonic() + seconds, series.sizes.turns
    left = (deque(kernels) for _, kernels in itertools.groupby(numbers, lambda number: number // turns))
    again: list[deque[int]] = []
    workers: list[_Worker] = []

    def following(own: deque[int]) -> deque[int]:
        if time.monotonic() > stop:
            return deque()
        return own or (again.pop() if again else next(left, deque()))

    def begin() -> None:
        if numbers := following(deque()):
            workers.append(_Worker.start(series))
            workers[-1].give(numbers)

    for _ in range(processes):
        begin()
    try:
        while workers and time.monotonic() < stop + _GRACE:
            heard = wait([worker.line for worker in workers], timeout=1)
            for worker in list(workers):
                silent = worker.line not in heard
                if silent and time.monotonic() - worker.since < _PATIENCE:
                    continue
                try:
                    if silent:
                        raise TimeoutError
                    yield worker.line.recv()
                    if numbers := following(worker.next):
                        worker.give(numbers)
                        continue
                except TimeoutError:
                    yield ended(series, worker.number, f"silent: no answer in {_PATIENCE} s")
                except EOFError:
                    worker.process.join()
                    if worker.process.exitcode == 0:  # its device was lost in the call before, which it has told
                        worker.next.appendleft(worker.number)
                    else:
                        yield ended(series, worker.number, f"died: its process ended with {worker.process.exitcode}")
                worker.end()
                workers.remove(worker)
                if worker.next:
                    again.append(worker.next)
                begin()
    finally:
        for worker in workers:
            worker.end()
