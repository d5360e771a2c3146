"""Conjugate gradients, plain and preconditioned: one recurrence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from flashlla.covariance import Systems
from flashlla.solvers.base import SOUND, Solution, Solver


class Preconditioner(ABC):
    """Something close to A^-1 that is cheap to apply. Frozen and hashable, as solvers are."""

    @abstractmethod
    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        """Look at the systems once; return the function that maps residuals (..., M, D) to directions."""


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divides by the diagonal of A."""

    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        inverse = systems.diagonal().reciprocal()
        return lambda r: inverse * r


@dataclass(frozen=True)
class Gram(Preconditioner):
    """The inverse of ``G + lambda_i I``, where G is the covariance, without weights, of the keys that all queries of a
    block see.

    Softmax weights change where a covariance is centred more than what it is, so one matrix serves all queries; of
    keys whose directions differ much in variance, as those of trained models do, it leaves a third of the iterations.
    It is left off for the queries of a head where it would not help: where the variances, ridge included, are alike
    (``WORTH``), or where the weights make something else of the keys than G says (``FIT``).

    Source: docs/math.md, equations (4.5) and (4.6).
    """

    # Mean square of the eigenvalues of G + lambda I over the square of their mean.
    WORTH: ClassVar[float] = 1.25
    # x.A x over x.(G + lambda I) x, for one vector x a query, on average.
    FIT: ClassVar[tuple[float, float]] = (0.7, 2.0)

    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        seen = (systems.p > 0).all(-2, keepdim=True).mT.to(systems.k.dtype)  # (..., N, 1)
        count = seen.sum(-2, keepdim=True).clamp(min=1)
        mean = (systems.k * seen).sum(-2, keepdim=True) / count  # (..., 1, D)
        centred = (systems.k - mean) * seen
        variances, axes = torch.linalg.eigh(torch.matmul(centred.mT, centred) / count)  # (..., D), (..., D, D)
        # No smaller than there are digits of: a preconditioner need not be exact.
        least = variances.amax(-1)[..., None, None] * torch.finfo(variances.dtype).eps ** 0.5
        shifted = variances.clamp(min=0).unsqueeze(-2) + systems.ridge.unsqueeze(-1).maximum(least)  # (..., M, D)
        worth = shifted.square().mean(-1) / shifted.mean(-1).square()  # (..., M), (4.5)
        use = worth.mean(-1, keepdim=True) > self.WORTH
        if use.any():
            x = systems.k_mean - mean
            along = torch.matmul(x, axes)
            fit = _dot(x, systems.matvec(x)) / (along.square() * shifted).sum(-1, keepdim=True)  # (..., M, 1), (4.6)
            fit = fit.nanmean(-2)
            use = use & (fit > self.FIT[0]) & (fit < self.FIT[1])
        if not use.any():
            return lambda r: r
        scale = torch.where(use.unsqueeze(-1), shifted.reciprocal(), 1)
        return lambda r: torch.matmul(torch.matmul(r, axes).mul_(scale), axes.mT)


_NAMED: dict[str, Preconditioner] = {"jacobi": Jacobi(), "gram": Gram()}
_WANTED = f"{' or '.join(map(repr, _NAMED))}, or a Preconditioner object"


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

    Raises:
        ValueError: a tolerance is negative or not finite, or ``max_iters`` is under 1.

    Source: Hestenes and Stiefel (1952); the rule is that of Zuo et al. (ICLR 2026). docs/math.md, section 4.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 4, dtype=torch.float64).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, solver=flashlla.CG(rtol=1e-26, max_iters=100))
    """

    advice: ClassVar[str] = (
        "more iterations (cg_max_iters, or max_iters of the solver object), a looser cg_rtol, solver='direct'"
    )

    atol: float = 1e-12
    rtol: float = 1e-12
    max_iters: int = 32

    def __post_init__(self) -> None:
        check_tolerances(self.atol, self.rtol, self.max_iters)

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        return conjugate_gradients(systems, b, self.atol, self.rtol, self.max_iters)


@dataclass(frozen=True)
class PCG(CG):
    """Conjugate gradients with a preconditioner; the stopping rule is that of :class:`CG`.

    Args:
        atol, rtol, max_iters: as in :class:`CG`.
        preconditioner: "jacobi" (the default), "gram" (:class:`Gram`) or a :class:`Preconditioner` object.

    Raises:
        ValueError: as :class:`CG`, or the preconditioner's name is not known.
        TypeError: the preconditioner is neither a name nor a :class:`Preconditioner`.

    Source: docs/math.md, section 4.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 4).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, solver=flashlla.PCG(max_iters=64))
    """

    preconditioner: str | Preconditioner = "jacobi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.preconditioner, str):
            if self.preconditioner not in _NAMED:
                raise ValueError(f"preconditioner: got {self.preconditioner!r}, wanted {_WANTED}")
        elif not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(f"preconditioner: got {type(self.preconditioner).__name__}, wanted {_WANTED}")

    @property
    def preconditioner_object(self) -> Preconditioner:
        """The preconditioner, whatever name it goes by."""
        return _NAMED[self.preconditioner] if isinstance(self.preconditioner, str) else self.preconditioner

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        apply = self.preconditioner_object.prepare(systems)
        return conjugate_gradients(systems, b, self.atol, self.rtol, self.max_iters, apply)


def check_tolerances(atol: float, rtol: float, max_iters: int, prefix: str = "") -> None:
    """Raise an error that names the argument (``prefix`` and all) which is out of range."""
    for name, value in (("atol", atol), ("rtol", rtol), ("max_iters", max_iters)):
        if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
            raise TypeError(f"{prefix}{name}: got {type(value).__name__}, wanted a number")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{prefix}{name}: got {value}, wanted a finite number of at least 0")
    if max_iters < 1 or max_iters != int(max_iters):
        raise ValueError(f"{prefix}max_iters: got {max_iters}, wanted a whole number of at least 1")


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
    size2 = _dot(b, b)  # (..., M, 1), as every scalar of the recurrence
    threshold = size2.clamp(min=atol) * rtol
    x = torch.zeros_like(b)
    r = b.clone()
    r2 = size2
    y = r if precondition is None else precondition(r)
    ry = r2 if precondition is None else _dot(r, y)
    direction = y.clone()
    iterations = torch.zeros_like(size2, dtype=torch.int32)
    zero = b.new_zeros(())
    for _ in range(max_iters):
        # A row that has converged takes steps of length 0; so does one that holds NaN, which compares as False.
        active = r2 > threshold
        if not active.any():
            break
        image = systems.matvec(direction)
        curvature = _dot(direction, image)
        active &= curvature > 0  # rounding has taken the matrix's definiteness: no step helps
        step = torch.where(active, ry / curvature, zero)
        x.addcmul_(direction, step)
        r.addcmul_(image, step, value=-1)
        iterations += active
        r2 = _dot(r, r)
        y = r if precondition is None else precondition(r)
        ry_next = r2 if precondition is None else _dot(r, y)
        direction = torch.addcmul(y, direction, torch.where(active, ry_next / ry, zero))
        ry = ry_next
    # The recurrence's r drifts from the true residual, by much where the system is ill-conditioned for its precision.
    error2 = (systems.matvec(x) - b).square().sum(-1, keepdim=True)
    residual = torch.where(error2 == 0, 0, (error2 / size2).sqrt())
    converged = (r2 <= threshold) & (error2 <= torch.maximum(SOUND**2 * size2, 4 * threshold))
    return Solution(x, iterations.squeeze(-1), residual.squeeze(-1), converged.squeeze(-1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row a.b: (..., M, 1)."""
    dot: Tensor = torch.linalg.vecdot(a, b)
    return dot.unsqueeze(-1)
