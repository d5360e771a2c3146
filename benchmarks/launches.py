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
    """Fills the list with every launch made meanwhile; unless ``carried_out``, none is compiled or reaches a device."""
    from flashlla.backends.triton import plan

    found: list[Launch] = []
    run = plan.Launch.run

    def note(launch: plan.Launch, call: plan.Running) -> None:
        if carried_out:
            run(launch, call)
        tensors = plan.of_tensors(launch.arguments, call.memories)
        found.append(
            Launch(launch.kernel, launch.name, launch.grid, launch.device, tensors, launch.settings, launch.compiled)
        )

    plan.forget()  # those of tensors without memory shall be nobody else's
    with mock.patch.object(plan.Launch, "run", note), contextlib.ExitStack() as stack:
        if not carried_out:
            stack.enter_context(mock.patch.object(plan.Launch, "compile"))
        yield found
    plan.forget()


def repeat(made: Launch) -> None:
    made.compiled.launch(made.grid, made.arguments)
