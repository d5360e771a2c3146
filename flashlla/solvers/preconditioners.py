"""Preconditioners: something close to the inverse of a system that is cheap to apply."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashlla import linalg
from flashlla.covariance import Systems, dot
from flashlla.hints import with_hints
from flashlla.products import product


class Preconditioner(ABC):
    """Something close to A^-1 that is cheap to apply. Frozen and hashable, as solvers are."""

    @abstractmethod
    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        """Look at the systems once; return the function that maps residuals (..., M, D) to directions."""

    def prepare_checked(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        """:meth:`prepare`, and an error that names this preconditioner where directions are none."""
        name = f"preconditioner: {type(self).__name__}.prepare returned"
        apply = self.prepare(systems)
        if not callable(apply):
            raise TypeError(f"{name} {type(apply).__name__}, wanted a function that maps residuals to directions")

        def checked(r: Tensor) -> Tensor:
            direction = apply(r)
            if not isinstance(direction, Tensor):
                raise TypeError(f"{name} a function that returns {type(direction).__name__}, wanted a torch.Tensor")
            if direction.shape != r.shape or direction.dtype != r.dtype:
                raise ValueError(
                    f"{name} a function that returns {direction.dtype} of shape {tuple(direction.shape)}, wanted "
                    f"{r.dtype} of shape {tuple(r.shape)}, as of the residuals that it takes"
                )
            return direction

        return checked


@with_hints()
@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divides by the diagonal of A."""

    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        inverse = systems.diagonal().reciprocal()
        return lambda r: inverse * r


@with_hints()
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
        variances, axes = linalg.eigh(product(centred.mT, centred) / count)  # (..., D), (..., D, D)
        # No smaller than there are digits of: a preconditioner need not be exact.
        least = variances.amax(-1)[..., None, None] * torch.finfo(variances.dtype).eps ** 0.5
        shifted = variances.clamp(min=0).unsqueeze(-2) + systems.ridge.unsqueeze(-1).maximum(least)  # (..., M, D)
        worth = shifted.square().mean(-1) / shifted.mean(-1).square()  # (..., M), (4.5)
        use = worth.mean(-1, keepdim=True) > self.WORTH
        if use.any():
            x = systems.k_mean - mean
            along = product(x, axes)
            fit = dot(x, systems.matvec(x)) / (along.square() * shifted).sum(-1, keepdim=True)  # (..., M, 1), (4.6)
            fit = fit.nanmean(-2)
            use = use & (fit > self.FIT[0]) & (fit < self.FIT[1])
        if not use.any():
            return lambda r: r
        scale = torch.where(use.unsqueeze(-1), shifted.reciprocal(), 1)
        return lambda r: product(product(r, axes).mul_(scale), axes.mT)


# A preconditioner with a name has its line here, and one for PCG with it in flashlla/solvers/__init__.py.
NAMED: dict[str, Preconditioner] = {"jacobi": Jacobi(), "gram": Gram()}
