"""Conjugate gradients: the recurrence, plain and preconditioned, and the plain solver."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from flashlla.covariance import Systems, dot
from flashlla.hints import SOLVER, with_hints
from flashlla.solvers.base import SOUND, Solution, Solver, Spelling, power_of_two_above

# The largest float, and the most iterations: reports and kernels count in int32.
_LARGEST, _MOST = sys.float_info.max, 2**31 - 1


@with_hints({**SOLVER, "preconditioner": "flashlla.PCG, which has it"})
@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients, matrix-free.

    A row stops when ``|r|^2 <= max(atol, |b|^2) * rtol``, or after ``max_iters`` iterations. A ``rtol`` below what
    the inputs' dtype resolves is raised to it: 1e-6 (a relative residual of 1e-3) for bfloat16 and float16, 1e-12 for
    float32, 1e-30 for float64.

    Args:
        atol: floor under ``|b|^2`` in the rule, the square of a length in key space. Default 1e-12.
        rtol: squared relative residual to reach. Default 1e-12.
        max_iters: cap on iterations a row. Default 32.
        tolerance: the relative residual itself, instead of ``rtol``, which becomes its square: two solvers that say
            the same either way are equal. By keyword. Default None: as ``rtol`` says.

    Raises:
        TypeError: an argument is no number.
        ValueError: ``atol`` or ``rtol`` is negative or not finite, ``tolerance`` is not from 0 to below 1 or comes
            together with another ``rtol``, or ``max_iters`` is under 1 or beyond int32.

    Source: Hestenes and Stiefel (1952); the rule is that of Zuo et al. (ICLR 2026). docs/math.md, section 4.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 4, dtype=torch.float64).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, solver=flashlla.CG(rtol=1e-26, max_iters=100))
        >>> flashlla.CG(tolerance=1e-2)
        CG(atol=1e-12, rtol=0.0001, max_iters=32)
    """

    advice: ClassVar[str] = (
        "more iterations (cg_max_iters, or max_iters of the solver object), a looser tolerance, solver='direct'"
    )

    atol: float = 1e-12
    rtol: float = 1e-12
    max_iters: int = 32
    # What rtol was made of, if anything; rtol alone decides what is equal.
    tolerance: float | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            square = squared(self.tolerance)
            if self.rtol not in (CG.rtol, square):
                raise ValueError(
                    f"rtol: got {self.rtol} together with tolerance={self.tolerance}, wanted one of the two: the one "
                    f"is the square of the other"
                )
            object.__setattr__(self, "rtol", square)
        check_tolerances(self.atol, self.rtol, self.max_iters)

    def spelled(self) -> Spelling | None:
        return Spelling("cg", self._numbers())

    def _numbers(self) -> list[float]:
        return [self.atol, self.rtol, float(self.max_iters)]

    def with_numbers(self, *numbers: float) -> CG:
        atol, rtol, max_iters = numbers
        return CG(atol, rtol, int(max_iters))

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        return conjugate_gradients(systems, b, self.atol, self.rtol, self.max_iters)


def check_tolerances(atol: float, rtol: float, max_iters: int, prefix: str = "") -> None:
    """Raise an error that names the argument (``prefix`` and all) which is out of range."""
    for name, value in (("atol", atol), ("rtol", rtol), ("max_iters", max_iters)):
        if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
            raise TypeError(f"{prefix}{name}: got {type(value).__name__}, wanted a number")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not 0 <= value <= _LARGEST:
            raise ValueError(f"{prefix}{name}: got {value}, wanted a finite number of at least 0")
    if not 1 <= max_iters <= _MOST or max_iters != int(max_iters):
        raise ValueError(f"{prefix}max_iters: got {max_iters}, wanted a whole number from 1 to {_MOST}")


def squared(tolerance: float) -> float:
    """The ``rtol`` that ``tolerance``, a relative residual, stands for."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, Real)):
        raise TypeError(f"tolerance: got {type(tolerance).__name__}, wanted a number or None")
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance: got {tolerance}, wanted a number from 0 to below 1: how long a residual may be beside the "
            f"right-hand side"
        )
    return float(tolerance) * float(tolerance)


def conjugate_gradients(
    systems: Systems,
    b: Tensor,
    atol: float,
    rtol: float,
    max_iters: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve ``A x = b`` row by row, from x = 0; b: (..., M, D). A row that has converged stops moving."""
    rtol = max(rtol, systems.resolution**2)
    size2 = dot(b, b)  # (..., M, 1), as every scalar of the recurrence
    threshold = size2.clamp(min=atol) * rtol
    x = torch.zeros_like(b)
    r = b.clone()
    r2 = size2
    y = r if precondition is None else precondition(r)
    ry = r2 if precondition is None else dot(r, y)
    direction = y.clone()
    iterations = torch.zeros_like(size2, dtype=torch.int32)
    zero = b.new_zeros(())
    for _ in range(max_iters):
        # A row that has converged takes steps of length 0; so does one that holds NaN, which compares as False.
        active = r2 > threshold
        if not active.any():
            break
        # Of unit length or a little less, by a power of two, which rounds nothing: its square meets the largest ridges.
        unit = power_of_two_above(direction.abs().amax(-1, keepdim=True) * direction.shape[-1] ** 0.5)
        along = direction / unit
        image = systems.matvec(along)
        curvature = dot(along, image)
        # No step helps where rounding has taken the matrix's definiteness, or what is left is less than numbers hold.
        active &= (curvature > 0) & (ry > 0)
        step = torch.where(active, ry / unit / curvature, zero)
        x.addcmul_(along, step)
        r.addcmul_(image, step, value=-1)
        iterations += active
        r2 = dot(r, r)
        y = r if precondition is None else precondition(r)
        ry_next = r2 if precondition is None else dot(r, y)
        direction = torch.addcmul(y, direction, torch.where(active, ry_next / ry, zero))
        ry = ry_next
    # The recurrence's r drifts from the true residual, by much where the system is ill-conditioned for its precision.
    error2 = (systems.matvec(x) - b).square().sum(-1, keepdim=True)
    residual = torch.where(error2 == 0, 0, (error2 / size2).sqrt())
    converged = (r2 <= threshold) & (error2 <= torch.maximum(SOUND**2 * size2, 4 * threshold))
    return Solution(x, iterations.squeeze(-1), residual.squeeze(-1), converged.squeeze(-1))
