"""What one call asks for, and the shapes of what backends take and give. No computation lives here.

Letters used in every shape comment of the package:

    B batch    Hq query heads    Hkv key and value heads    Sq queries    Sk keys    D head dim    Dv value dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashlla.solvers.base import Solver

# The smallest relative residual |A x - b| / |b| worth iterating for when keys and queries come in this dtype: below
# it the rounding of the operands, not the solver, decides the error of the output (docs/math.md, section 6).
_RESOLUTION = {
    torch.float64: 1e-15,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
SUPPORTED_DTYPES = tuple(_RESOLUTION)


def resolution(dtype: torch.dtype) -> float:
    """Smallest relative residual that operands of ``dtype`` can make use of."""
    return _RESOLUTION[dtype]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Under every mask they are one run of neighbours."""

    causal: bool = True

    def stop(self, query: int, q_len: int, k_len: int) -> int:
        """One past the last key that ``query`` sees; causal is aligned at the end of the keys."""
        return min(k_len, max(0, query + 1 + k_len - q_len)) if self.causal else k_len

    def visible(self, queries: range, keys: range, q_len: int, k_len: int, device: torch.device) -> Tensor | None:
        """Boolean (len(queries), len(keys)), True where the query sees the key; None where all of it is True."""
        if not self.causal or self.stop(queries.start, q_len, k_len) >= keys.stop:
            return None
        i = torch.arange(queries.start, queries.stop, device=device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=device)[None, :]
        return j <= i + (k_len - q_len)


@dataclass(frozen=True)
class Problem:
    """Frozen, hashable description of one call: everything a backend needs to say yes or no, and no tensor.

    ``solver_demanded`` is False where the caller named no solver: ``solver`` then carries the tolerances, and a
    backend may use them with the solver it does best.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    delta_eps: float
    solver: Solver
    solver_demanded: bool = True
    mask: Mask = Mask()

    @property
    def empty(self) -> bool:
        """Nothing to compute: no queries, or no keys for them to see."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.k_len)


class Inputs(NamedTuple):
    """The tensors of one call, four-dimensional views with any strides."""

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D)
    v: Tensor  # (B, Hkv, Sk, Dv)
    ridge_lambda: Tensor  # (B, Hq, Sq), accumulator dtype, often expanded from fewer numbers


class Residuals(NamedTuple):
    """What forward leaves for backward, in one layout for all backends and in the accumulator dtype."""

    lse: Tensor  # (B, Hq, Sq)     m + log(omega), natural logarithm
    guard: Tensor  # (B, Hq, Sq)   1 / (1 + delta_eps (1 + d.z) / omega), the factor delta_eps puts on o and grad_o
    probe: Tensor  # (B, Hq, Sq, D)   z of (2.1)
    k_mean: Tensor  # (B, Hq, Sq, D)  sum_j p_j k_j


class Report(NamedTuple):
    """What ``return_info`` shows, one number a query."""

    omega: Tensor  # (B, Hq, Sq)   sum_j exp(s q.k_j - m), accumulator dtype
    iterations: Tensor  # (B, Hq, Sq) int32; 0 for direct solves
    residual: Tensor  # (B, Hq, Sq)   |A z - d| / |d|, accumulator dtype
    converged: Tensor  # (B, Hq, Sq) bool


class Forward(NamedTuple):
    o: Tensor  # (B, Hq, Sq, Dv), the inputs' dtype
    residuals: Residuals
    report: Report


class Gradients(NamedTuple):
    q: Tensor  # as q
    k: Tensor  # as k
    v: Tensor  # as v
    ridge_lambda: Tensor  # (B, Hq, Sq), accumulator dtype


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised (B, Hq, Sq, Dv) laid out in memory as ``q`` is, so that a transposed q gives a transposed o."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
