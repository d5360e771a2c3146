"""Cholesky factorisation of the dense systems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashlla import linalg
from flashlla.covariance import Systems
from flashlla.hints import with_hints
from flashlla.solvers.base import SOUND, Solution, Solver, Spelling


@with_hints()
@dataclass(frozen=True)
class Direct(Solver):
    """Forms each A_i and factorises it (Cholesky): exact to the accumulator dtype, D^2 memory and D^3 work a query.

    Use it for float64 references, for tiny ridges that CG cannot reach, and where D is small.

    Raises:
        torch.linalg.LinAlgError: while solving, when a system is not positive definite in its precision; the message
            names the query and what to try.

    Source: docs/math.md, section 4.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 4).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, ridge_lambda=1e-4, solver=flashlla.Direct())
    """

    advice: ClassVar[str] = ""

    def spelled(self) -> Spelling | None:
        return Spelling("direct", [])

    def workspace(self, head_dim: int) -> int:
        return 3 * head_dim**2  # A, its finite copy, its factor

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        a = systems.dense()  # (..., M, D, D)
        # A row that holds NaN or inf is answered with NaN; it must not stop the others.
        usable = a.isfinite().all(-1).all(-1)  # (..., M)
        a = torch.where(usable[..., None, None], a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))
        factor, info = linalg.cholesky(a)
        if (info != 0).any():
            index = tuple(int(i) for i in (info != 0).nonzero()[0])
            raise systems.not_definite(index, "solver 'direct'", "solver='cg'")
        x = torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)
        x = torch.where(usable.unsqueeze(-1), x, float("nan"))
        # Backward stable, so a larger residual than this means the precision is too small for the conditioning.
        return Solution.check(systems, b, x, iterations=0, tolerance=SOUND)
