"""A process for a script; several of one group, and checks that they make together, spawned once for all of them."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import subprocess
import sys
import textwrap
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

ROOT = Path(__file__).resolve().parents[2]
Check = Callable[[], None]
PATIENCE = 480  # seconds that processes may take for all that they do
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
    assert group is not None, "wanted a process that `together` spawned"
    return group


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= tolerance * float(want.norm()), float((got - want).norm() / want.norm())


def python(script: str, timeout: float = 200, **environment: str) -> str:
    """What ``script`` prints, run by a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def together(size: int, folder: Path, work: Callable[[], None]) -> None:
    """``work`` in each of ``size`` processes of one group, whose files go to ``folder``; an error there is one here."""
    context: Any = spawn(_work, (size, str(folder), work), nprocs=size, join=False)
    end = time.monotonic() + PATIENCE
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"the processes took more than {PATIENCE} s")


def _work(rank: int, size: int, folder: str, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    work()
    dist.destroy_process_group()
    # Not by the interpreter's end: torch keeps groups that a DeviceMesh has had, and where a thread of theirs gives up
    # a tensor while the interpreter ends, the process aborts.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outcomes(size: int, folder: Path, checks: Mapping[str, Check]) -> dict[str, list[str]]:
    """Of every check what each of ``size`` processes has to say: nothing, if it holds."""
    with contextlib.suppress(TimeoutError):  # then some were not reached, which says more
        together(size, folder, functools.partial(_tell, folder, checks))
    found = [torch.load(folder / f"outcomes.{rank}") for rank in range(size)]
    return {name: [told.get(name, "not reached") for told in found] for name in checks}


def _tell(folder: Path, checks: Mapping[str, Check]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()  # before a check that may leave the group
    told: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check()
            told[name] = ""
        except Exception:
            told[name] = f"rank {rank} of {size}: {traceback.format_exc()}"
        torch.save(told, folder / f"outcomes.{rank}")
