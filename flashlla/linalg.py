"""torch's factorisations. Whoever needs one calls it here.

torch has those for GPUs in a library that it loads when one is first called, and where two threads are the first at
once it raises "lazy wrapper should be called at most once". So the first call of all is made under a lock.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

_lock = threading.Lock()


def cholesky(a: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of each matrix, and a number that is 0 where it is positive definite."""
    _load(a.device)
    found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(a)
    return found


def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x of a x = b, b a matrix of columns, and a number that is 0 where ``a`` is regular."""
    _load(a.device)
    found: tuple[Tensor, Tensor] = torch.linalg.solve_ex(a, b)
    return found


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of each symmetric matrix, rising, and its eigenvectors, columns."""
    _load(a.device)
    found: tuple[Tensor, Tensor] = torch.linalg.eigh(a)
    return found


def _load(device: torch.device) -> None:
    if device.type == "cuda":
        with _lock:
            _first_call()


@functools.cache
def _first_call() -> None:
    torch.linalg.cholesky_ex(torch.ones(1, 1, device="cuda"))
