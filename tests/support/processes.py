"""Checks that several processes make together, spawned once for all of them."""

from __future__ import annotations

import datetime
import functools
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

Check = Callable[[], None]
PATIENCE = 480  # seconds that all checks may take
# Seconds that a rank waits for the others in one collective: long where machines are busy.
TIMEOUT = 60
EXACT = 1e-12  # what differs by less, of itself, is the same in float64


class Checks(dict[str, Check]):
    """Checks by their names."""

    def add(self, *arguments: Any, name: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Decorates a check that all ranks make together, with ``arguments``."""

        def note(function: Callable[..., None]) -> Callable[..., None]:
            self[name or function.__name__] = functools.partial(function, *arguments)
            return function

        return note


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "wanted a process that `outcomes` spawned"
    return group


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= tolerance * float(want.norm()), float((got - want).norm() / want.norm())


def _work(rank: int, size: int, folder: str, checks: Mapping[str, Check]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    outcomes: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = f"rank {rank} of {size}: {traceback.format_exc()}"
        torch.save(outcomes, f"{folder}/outcomes.{rank}")
    dist.destroy_process_group()


def outcomes(size: int, folder: Path, checks: Mapping[str, Check]) -> dict[str, list[str]]:
    """Of every check what each of ``size`` processes has to say: nothing, if it holds."""
    context: Any = spawn(_work, (size, str(folder), checks), nprocs=size, join=False)
    end = time.monotonic() + PATIENCE
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            break
    found = [torch.load(folder / f"outcomes.{rank}") for rank in range(size)]
    return {name: [told.get(name, "not reached") for told in found] for name in checks}
