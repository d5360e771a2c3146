"""Some queries' outputs and gradients in float64, straight from the definition: what errors are measured against.

Dense and one query of each head at a time, so that memory stays that of a few copies of the keys at any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def output(q: Tensor, k: Tensor, v: Tensor, ridge: float | Tensor) -> Tensor:
    """(..., 1, D) of one query and the keys it sees, (..., n, D), with a ridge or one of each head, (..., 1, 1):
    docs/math.md, (2.1) to (2.3)."""
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # (..., 1, n)
    k_mean = p @ k
    centred = k - k_mean
    a = (centred * p.mT).mT @ centred  # (..., D, D)
    a = a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = torch.linalg.solve(a, (k_mean - q).mT)  # (..., D, 1)
    o: Tensor = (p * (1 - (centred @ z).mT)) @ v
    return o


def relative(x: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    error, size = float((x.double() - reference).norm()), float(reference.norm())
    if size == 0:
        return 0.0 if error == 0 else float("inf")
    return error / size


@dataclass(frozen=True)
class Sample:
    """``o`` and ``dq`` (heads, rows, D) of some heads and rows, causal, in float64.

    dq of a row takes that row alone; dk and dv would take all of them.
    """

    heads: Tensor  # of batch x heads
    rows: Tensor
    o: Tensor
    dq: Tensor

    def errors(self, **results: Tensor) -> dict[str, float]:
        """Relative errors of whole tensors ``o`` and ``dq``, (B, H, S, D), in the sampled rows."""
        pick = lambda t: t.detach().flatten(0, 1)[self.heads[:, None], self.rows]
        return {name: relative(pick(t), getattr(self, name)) for name, t in results.items()}


def sample(
    tensors: Sequence[Tensor], ridge: float | Tensor, heads: int = 3, rows: int = 32, window: int | None = None
) -> Sample:
    """Of q, k, v and grad_o, with a ridge or (B, H, 1 or S) of them: up to ``heads`` of the heads, a quarter of the
    ``rows`` the first, the others spread."""
    length, device = tensors[0].shape[2], tensors[0].device
    first = torch.arange(min(rows // 4, length))  # they see few keys, which is where solvers have it hardest
    spread = torch.linspace(0, length - 1, rows - len(first)).long()
    picked_rows = torch.cat([first, spread]).unique()
    total = tensors[0].shape[0] * tensors[0].shape[1]
    picked_heads = torch.linspace(0, total - 1, min(heads, total)).long().to(device)
    q, k, v, grad_o = (t.detach().flatten(0, 1)[picked_heads].double() for t in tensors)  # (heads, S, D)
    if isinstance(ridge, Tensor):
        ridges = ridge.flatten(0, 1)[picked_heads].double().expand(-1, length)[..., None, None]  # (heads, S, 1, 1)
    else:
        ridges = torch.full((len(picked_heads), length, 1, 1), ridge, dtype=torch.float64, device=device)
    found = []
    for i in picked_rows.tolist():
        query = q[:, i : i + 1].clone().requires_grad_()
        seen = slice(0 if window is None else max(0, i + 1 - window), i + 1)
        o = output(query, k[:, seen], v[:, seen], ridges[:, i])
        (dq,) = torch.autograd.grad(o, query, grad_o[:, i : i + 1])
        found.append((o.detach(), dq))
    o, dq = (torch.cat(parts, dim=1) for parts in zip(*found))
    return Sample(picked_heads, picked_rows.to(device), o, dq)
