"""Collectives that run while others compute; tokens come first in all that they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashlla.distributed.groups import Ranks

T = TypeVar("T")
U = TypeVar("U")

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


def ahead(items: Iterable[T], start: Callable[[T], Pending[U]]) -> Iterator[tuple[T, U]]:
    """Each item with what ``start`` brings for it, which is on its way while the one before is worked on."""
    coming: tuple[T, Pending[U]] | None = None
    for item in items:
        arrived = None if coming is None else (coming[0], coming[1].wait())
        coming = item, start(item)
        if arrived is not None:
            yield arrived
    if coming is not None:
        yield coming[0], coming[1].wait()


def swap(x: Tensor, ranks: Ranks) -> Tensor:
    """Row block r of ``x`` (size n, ...) goes to rank r; what comes, in the order of the ranks: as large."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=ranks.group)
    return out
