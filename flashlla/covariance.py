"""The small ridge systems of a block of queries, ``A_i = C_i + lambda_i I`` of (2.1), seen as operators.

Solvers get nothing else: what a solver may ask of a system is a method here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashlla.products import product

# Elements of the largest temporary that `dense` makes: 16 MiB in float32.
_DENSE_BUDGET = 1 << 22


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row a.b: (..., M, 1)."""
    rows: Tensor = torch.linalg.vecdot(a, b)
    return rows.unsqueeze(-1)


@dataclass(frozen=True)
class Systems:
    """``M`` systems of size ``D`` for each leading index, which share their ``N`` keys.

    k: (..., N, D) keys. p: (..., M, N) softmax weights, zero where a query does not see the key, rows sum to one.
    k_mean: (..., M, D) sum_j p_ij k_j. ridge: (..., M) lambda_i > 0.
    resolution: the smallest relative residual worth reaching (:func:`flashlla.problem.resolution`).
    name: what messages call the system at an index into ``ridge``.
    """

    k: Tensor
    p: Tensor
    k_mean: Tensor
    ridge: Tensor
    resolution: float
    name: Callable[[tuple[int, ...]], str] = "row {}".format

    def matvec(self, x: Tensor) -> Tensor:
        """A x without forming A; x: (..., M, D)."""
        # c_ij = (k_j - k_mean_i).x_i: the scalar is subtracted before weighting, and the weighted row sum of c, zero
        # but for rounding, is taken out again, so that an error in k_mean counts to second order only.
        c = product(x, self.k.mT)  # (..., M, N)
        c.sub_(dot(x, self.k_mean)).mul_(self.p)
        y = product(c, self.k)  # (..., M, D)
        y.addcmul_(self.k_mean, c.sum(-1, keepdim=True), value=-1)
        return y.addcmul_(x, self.ridge.unsqueeze(-1))

    def diagonal(self) -> Tensor:
        """The diagonals of the A_i: (..., M, D)."""
        # Shifting all keys shifts no covariance; about the first key, the squares do not swamp their difference.
        first = self.k[..., :1, :].sum(-2, keepdim=True)  # (..., 1, D), 0 where there are no keys
        shifted = self.k - first  # (..., N, D)
        mean = self.k_mean - first  # (..., M, D)
        spread = product(self.p, shifted.square()) - mean.square()
        return spread.clamp_(min=0) + self.ridge.unsqueeze(-1)

    def dense(self) -> Tensor:
        """The A_i as matrices: (..., M, D, D)."""
        *lead, m, _ = self.p.shape
        n, d = self.k.shape[-2:]
        a = self.k.new_empty((*lead, m, d, d))
        step = max(1, _DENSE_BUDGET // max(1, n * d * self.ridge[..., 0].numel()))
        for i in range(0, m, step):
            rows = slice(i, i + step)
            # Centred exactly, row by row: sum_j p_ij (k_j - k_mean_i)(k_j - k_mean_i)^T is symmetric and not negative.
            centred = self.k.unsqueeze(-3) - self.k_mean[..., rows, None, :]  # (..., rows, N, D)
            weighted = centred * self.p[..., rows, :, None]
            product(weighted.mT, centred, out=a[..., rows, :, :])
        a.diagonal(dim1=-2, dim2=-1).add_(self.ridge.unsqueeze(-1))
        return a

    def not_definite(self, index: tuple[int, ...], who: str, instead: str) -> Exception:
        """The error for the system at ``index`` (into ``ridge``), which ``who`` found singular or not definite."""
        dtype = str(self.k.dtype).removeprefix("torch.")
        more = "" if self.k.dtype == torch.float64 else "float64 inputs, "
        return torch.linalg.LinAlgError(  # type: ignore[attr-defined,no-any-return]
            f"{who}: the system of {self.name(index)} is not positive definite in {dtype} (ridge_lambda there is "
            f"{self.ridge[index].item():.3g}). Try a larger ridge_lambda, {more}or {instead}."
        )
