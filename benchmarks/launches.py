"""The launches of Triton kernels that a call makes, to be timed one by one or compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch


class Launch(NamedTuple):
    kernel: Any
    name: str  # of its pass
    grid: tuple[int, ...]
    device: torch.device
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    compiled: Any  # None where it was not carried out


@contextlib.contextmanager
def recorded(carried_out: bool = True) -> Iterator[list[Launch]]:
    """Fills the list with every launch made meanwhile; unless ``carried_out``, none reaches the device."""
    from flashlla.backends.triton import plan, runtime

    found: list[Launch] = []
    launch = runtime.launch

    def note(
        kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
    ) -> None:
        compiled = launch(kernel, name, grid, device, *arguments, **settings) if carried_out else None
        found.append(Launch(kernel, name, grid, device, arguments, settings, compiled))

    plan.forget()  # those in use launch without it
    with mock.patch.object(runtime, "launch", note), mock.patch.object(runtime, "compiled", {}):
        yield found


def repeat(made: Launch) -> None:
    made.compiled.launch(made.grid, None, made.arguments)
