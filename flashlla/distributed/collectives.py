"""Collectives that run while others compute; tokens come first in all that they carry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashlla.distributed.groups import Ranks

T = TypeVar("T")
U = TypeVar("U")

# Streams of a GPU that work is handed to in turn, where there is so much of it.
LANES = 2
# By the names that they have had since torch 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Generic[T]):
    """What a collective is bringing."""

    def __init__(self, work: Any, sent: Tensor, result: Callable[[], T]) -> None:
        self._work, self._sent, self._result = work, sent, result  # what is sent lives until it has been

    def wait(self) -> T:
        """It, once it is there: on a GPU its stream waits, and not the host."""
        self._work.wait()
        return self._result()

    def then(self, make: Callable[[T], U]) -> Pending[U]:
        """What ``make`` makes of it, once it is there."""
        return Pending(self._work, self._sent, lambda: make(self._result()))


def gather(x: Tensor, ranks: Ranks) -> Pending[Tensor]:
    """All ranks' ``x`` (n, ...), one behind the other: (size n, ...)."""
    x = x.contiguous()
    out = x.new_empty((ranks.size * x.shape[0], *x.shape[1:]))
    return Pending(_all_gather(out, x, group=ranks.group, async_op=True), x, lambda: out)


def reduce_scatter(x: Tensor, ranks: Ranks) -> Pending[Tensor]:
    """This rank's n rows of the sum of all ranks' ``x`` (size n, ...)."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // ranks.size, *x.shape[1:]))
    return Pending(_reduce_scatter(out, x, group=ranks.group, async_op=True), x, lambda: out)


def exchange(x: Tensor, sends: Sequence[int], receives: Sequence[int], ranks: Ranks) -> Pending[Tensor]:
    """Of ``x`` the first ``sends[0]`` rows go to rank 0, the next to rank 1; what comes, in the order of the ranks."""
    x = x.contiguous()
    out = x.new_empty((sum(receives), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, list(receives), list(sends), group=ranks.group, async_op=True)
    return Pending(work, x, lambda: out)


class Lanes:
    """Streams of a GPU that ``pieces`` of work are handed to in turn: kernels of one fill the processors that those of
    another, at their end, leave idle. Elsewhere, and for one piece, the caller's stream."""

    def __init__(self, device: torch.device, pieces: int) -> None:
        self.device = device
        self.streams = _streams(device)[:pieces] if pieces > 1 else []

    @property
    def number(self) -> int:
        return max(1, len(self.streams))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lanes begin after what the caller's stream has to do, and it goes on when they have ended. So whatever lies
        in memory of the caller's stream may be used in them, if it lives until then; what they allocate may not be
        used outside, but in the same lane of a later call."""
        if not self.streams:
            yield
            return
        own = torch.cuda.current_stream(self.device)
        for stream in self.streams:
            stream.wait_stream(own)
        try:
            yield
        finally:
            for stream in self.streams:
                own.wait_stream(stream)

    def lane(self, number: int) -> AbstractContextManager[Any]:
        """Where the ``number``-th piece of work is done."""
        return torch.cuda.stream(self.streams[number % len(self.streams)]) if self.streams else nullcontext()


@functools.cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """The same ones in all calls: torch keeps memory for each."""
    return [torch.cuda.Stream(device) for _ in range(LANES)] if device.type == "cuda" else []


def ahead(items: Iterable[T], start: Callable[[T], Pending[U]]) -> Iterator[tuple[T, Pending[U]]]:
    """Each item with what ``start`` brings for it, which is on its way while the one before is worked on."""
    coming: tuple[T, Pending[U]] | None = None
    for item in items:
        before, coming = coming, (item, start(item))
        if before is not None:
            yield before
    if coming is not None:
        yield coming


def swap(x: Tensor, ranks: Ranks) -> Tensor:
    """Row block r of ``x`` (size n, ...) goes to rank r; what comes, in the order of the ranks: as large."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=ranks.group)
    return out
