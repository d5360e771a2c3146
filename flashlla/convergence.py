"""How many queries did not converge, counted on the device, where to look at each call would wait for it."""

from __future__ import annotations

from threading import Lock
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.hints import with_hints

# The counters that are on.
active: tuple[ConvergenceCounter, ...] = ()
_lock = Lock()


class Counted(NamedTuple):
    """What a :class:`ConvergenceCounter` has counted: queries, each of a head, and those that did not converge."""

    unconverged: int
    queries: int


@with_hints()
class ConvergenceCounter:
    """Counts the queries whose solve did not reach its tolerance, without waiting for the device.

    On from where it is made until :meth:`stop`, or to the end of a ``with`` block, it counts the forward passes of
    ``lla_attention`` and ``lla_attention_varlen`` of the whole process: of all threads and devices, eager and compiled,
    and of each replay of a CUDA graph that was captured while it was on. A pass that checkpointing runs again counts
    again; backward passes, decoding, and other processes do not. It costs a few small kernels a call, and while none is
    on nothing. Several may be on at a time. Where CUDA graphs are captured, make it when the model is on its device.

    Example: a training loop that logs it.
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 2, 4, 50, 16).unbind(0)
        >>> with flashlla.ConvergenceCounter() as counter:
        ...     for step in range(20):
        ...         o = flashlla.lla_attention(q, k, v, ridge_lambda=1.0)  # the model
        ...         if step % 10 == 9:
        ...             unconverged, queries = counter.read()
        ...             print(f"step {step}: {unconverged} of {queries} queries did not converge")
        step 9: 0 of 4000 queries did not converge
        step 19: 0 of 4000 queries did not converge
    """

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}  # of converged queries, and of all: (2,)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # before a graph is captured, which cannot
            for index in range(torch.cuda.device_count()):
                if torch.cuda.memory_reserved(index):
                    self._counts_on(torch.device("cuda", index))
        self._put(True)

    def add(self, converged: Tensor) -> None:
        """Count the queries of ``converged``, bool of any shape; nothing waits."""
        counts = self._counts_on(converged.device)
        found = torch.stack((converged.sum(), converged.new_full((), converged.numel(), dtype=torch.int64)))
        self._add(counts, found)

    def read(self) -> Counted:
        """What has been counted since the last look; waits for the devices, and begins anew."""
        converged = queries = 0
        for device, counts in list(self._counts.items()):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # calls may be on any stream
            found = counts.clone()
            self._add(counts, -found)  # not zeros: other threads may go on counting
            here, all_here = found.tolist()
            converged, queries = converged + here, queries + all_here
        return Counted(queries - converged, queries)

    def stop(self) -> None:
        """Count no more; what has been counted can still be read."""
        self._put(False)

    def _put(self, on: bool) -> None:
        global active
        with _lock:
            active = (*(counter for counter in active if counter is not self), *([self] if on else []))

    def __enter__(self) -> ConvergenceCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _counts_on(self, device: torch.device) -> Tensor:
        with _lock:
            if device not in self._counts:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"flashlla: a ConvergenceCounter met {device} first while a CUDA graph was captured; run the "
                        f"call once before, as warm-up, while it is on"
                    )
                with torch.inference_mode(False):  # else it could not be added to outside
                    self._counts[device] = torch.zeros(2, dtype=torch.int64, device=device)
            return self._counts[device]

    def _add(self, counts: Tensor, more: Tensor) -> None:
        """``counts += more``, as one step, whatever threads and streams do so at a time."""
        if counts.device.type == "cpu":
            with _lock:
                counts += more
        else:
            counts.scatter_add_(0, torch.arange(2, device=counts.device), more)  # by atomics
