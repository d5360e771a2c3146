"""What a solver is: it knows systems, not attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flashlla.covariance import Systems
from flashlla.hints import with_hints
from flashlla.notices import ConvergenceWarning, warn_once

# Above this relative residual, computed afresh, a solution is wrong whatever the solver's own account of it.
SOUND = 1e-3


class Solution(NamedTuple):
    """What a solver returns for ``M`` systems of size ``D`` and each leading index."""

    x: Tensor  # (..., M, D)
    iterations: Tensor  # (..., M) int32
    residual: Tensor  # (..., M) |A x - b| / |b|, and 0 where b is 0; x and residual have the dtype of b
    converged: Tensor  # (..., M) bool

    @classmethod
    @with_hints()
    def check(cls, systems: Systems, b: Tensor, x: Tensor, *, iterations: int, tolerance: float) -> Solution:
        """The solution ``x`` with its residual computed afresh; converged where that is at most ``tolerance``."""
        error = (systems.matvec(x) - b).norm(dim=-1)
        residual = torch.where(error == 0, 0, error / b.norm(dim=-1))
        steps = torch.full_like(residual, iterations, dtype=torch.int32)
        return cls(x, steps, residual, residual <= tolerance)


class Spelling(NamedTuple):
    """A solver as operators of torch.library carry it, which take strings and numbers, no Python objects."""

    name: str
    numbers: list[float]


class Solver(ABC):
    """A small frozen object that holds a solver's configuration.

    Subclass it as a frozen dataclass (solvers must be hashable: equal configurations count as one) and write
    :meth:`solve`; the object is then good for ``lla_attention(..., solver=...)``.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, flashlla
        >>> from flashlla.solvers import Solution, Solver
        >>> @dataclass(frozen=True)
        ... class Richardson(Solver):
        ...     steps: int = 500
        ...     def solve(self, systems, b):
        ...         step = 1 / (systems.diagonal().sum(-1, keepdim=True))  # at most 1 / largest eigenvalue
        ...         x = torch.zeros_like(b)
        ...         for _ in range(self.steps):
        ...             x = x + step * (b - systems.matvec(x))
        ...         return Solution.check(systems, b, x, iterations=self.steps, tolerance=1e-4)
        >>> q, k, v = torch.randn(3, 1, 20, 4).unbind(0)
        >>> flashlla.lla_attention(q, k, v, ridge_lambda=1.0, solver=Richardson()).shape
        torch.Size([1, 20, 4])
    """

    advice: ClassVar[str] = "another solver"  # what to try first where it stops early, if anything

    @abstractmethod
    def solve(self, systems: Systems, b: Tensor) -> Solution:
        """Solve ``A_i x_i = b_i``; b: (..., M, D), the dtype of ``systems.k``."""

    def spelled(self) -> Spelling | None:
        """The name and numbers of a solver of this package; None where nothing but the object will do.

        That of a class is not that of its subclasses: ask :func:`flashlla.solvers.spelling`.
        """
        return None

    def with_numbers(self, *numbers: float) -> Solver:
        """This solver with other numbers, in the order in which :meth:`spelled` tells them."""
        raise TypeError(f"solver: {type(self).__name__} takes no numbers")

    def described(self) -> str:
        """What a backend that cannot run it calls it."""
        return type(self).__name__

    def workspace(self, head_dim: int) -> int:
        """Numbers that :meth:`solve` holds a query, beyond a few vectors; blocks of queries are sized by it."""
        return 0

    def solve_checked(self, systems: Systems, b: Tensor) -> Solution:
        """:meth:`solve`, and an error that names this solver where what it returns is no solution."""
        solution = self.solve(systems, b)
        returned, hint = f"solver: {type(self).__name__}.solve returned", "try Solution.check(systems, b, x, ...)"
        if not isinstance(solution, Solution):
            raise TypeError(f"{returned} {type(solution).__name__}, wanted a flashlla.Solution; {hint}")
        dtypes = Solution(b.dtype, torch.int32, b.dtype, torch.bool)  # type: ignore[arg-type]
        for name, t, dtype in zip(Solution._fields, solution, dtypes):
            shape = b.shape if name == "x" else b.shape[:-1]
            if not isinstance(t, Tensor):
                raise TypeError(f"{returned} {type(t).__name__} as {name}, wanted a torch.Tensor; {hint}")
            if t.shape != shape or t.dtype != dtype:
                raise ValueError(
                    f"{returned} {name} of {t.dtype} and shape {tuple(t.shape)}, wanted {dtype} and {tuple(shape)}, "
                    f"for b of {b.dtype} and {tuple(b.shape)}; {hint}"
                )
        return solution

    def solve_scale_free(self, systems: Systems, b: Tensor) -> Solution:
        """As :meth:`solve_checked`, with ``b`` scaled to unit rows first.

        A right-hand side made of gradients may be of any size (a loss averaged over a million tokens makes it
        1e-6); neither an absolute tolerance nor the range of squares must decide how exact a gradient is.
        """
        power = power_of_two_above(b.abs().amax(-1, keepdim=True))  # divides without rounding
        near_one = b / power
        size = near_one.norm(dim=-1, keepdim=True)
        unit = torch.where(size > 0, near_one / size, near_one)
        size = size * power
        solution = self.solve_checked(systems, unit)
        return solution._replace(x=solution.x * size)


def warn_unconverged(solver: Solver, residuals: Tensor, total: int, where: str = "") -> None:
    """Say that ``solver`` left ``residuals`` (one number a query that has not converged) of ``total`` queries: once for
    each power of ten of the worst."""
    if not residuals.numel():
        return
    name = type(solver).__name__
    nans = int(residuals.isnan().sum())
    worst = residuals.nan_to_num(0).max().item()
    found = f"relative residual up to {worst:.1e}" + (f", NaN on {nans}" if nans else "")
    advice = f"{solver.advice}, a larger" if solver.advice else "a larger"
    # The power of ten of the worst, or "inf"; NaN alone says nothing of residuals.
    magnitude = "NaN" if nans == residuals.numel() else f"{worst:.0e}"[-3:]
    warn_once(
        f"{solver} stopped early{where}: {magnitude}",
        f"{name} stopped early{where} on {residuals.numel()} of {total} queries, {found}. Try {advice} "
        "ridge_lambda or float64 inputs; return_info=True shows each query. Said once for each power of ten.",
        ConvergenceWarning,
    )


def power_of_two_above(size: Tensor) -> Tensor:
    """The smallest power of two above ``size``, of those that float32 holds with all their digits and whose inverses it
    holds so; 1 for 0."""
    _, exponent = torch.frexp(size)
    return torch.ldexp(torch.ones_like(size), exponent.clamp(-126, 126))
