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


@contextlib.contextmanager
def recorded(carried_out: bool = True) -> Iterator[list[Launch]]:
    """Fills the list with every launch made meanwhile; unless ``carried_out``, none reaches the device."""
    from flashlla.backends.triton import decode, launch, runtime

    found: list[Launch] = []

    def note(
        kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
    ) -> None:
        found.append(Launch(kernel, name, grid, device, arguments, settings))
        if carried_out:
            runtime.launch(kernel, name, grid, device, *arguments, **settings)

    with mock.patch.object(launch, "launch", note), mock.patch.object(decode, "launch", note):
        yield found


def repeat(made: Launch) -> None:
    from flashlla.backends.triton.runtime import launch

    launch(made.kernel, made.name, made.grid, made.device, *made.arguments, **made.settings)
