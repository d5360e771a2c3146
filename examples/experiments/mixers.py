"""What Local Linear Attention is compared with: mixers of q, k (B, H, S, D) and v (B, H, S, Dv), causal, in PyTorch.

Written for clarity at a few hundred tokens, not for speed: time and memory grow with the square of the length, or with
S D^2. tests/test_experiments.py checks each against the formula beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """sum_j softmax_j(scale q_i.k_j) v_j over j <= i; the scale is 1 / sqrt(D) by default."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def ridge_regression(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor | float) -> Tensor:
    """W_i q_i with W_i = (sum_j v_j k_j^T) (sum_j k_j k_j^T + ridge I)^-1 over j <= i: the limit that MesaNet nears.

    Source: von Oswald et al., "MesaNet", 2025.
    """
    gram = torch.einsum("bhsd,bhse->bhsde", k, k).cumsum(2)  # (B, H, S, D, D)
    cross = torch.einsum("bhsd,bhse->bhsde", k, v).cumsum(2)  # (B, H, S, D, Dv)
    ridge = torch.as_tensor(ridge, dtype=k.dtype, device=k.device)[..., None, None]  # (H, 1, 1, 1), or a number
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device))
    found = torch.cholesky_solve(q.unsqueeze(-1), factor)  # (B, H, S, D, 1)
    o: Tensor = (found.mT @ cross).squeeze(-2)
    return o


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """W_i q_i with W_i = a_i W_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, W_0 = 0, a_i = exp(log_decay_i) or 1.

    beta, from 0 to 1, and log_decay, 0 and less: (B, H, S). Keys should have norm 1. What token j writes, u_j, is the
    solution of one triangular system:  u_i + beta_i sum_{j<i} a_{j+1}...a_i (k_i.k_j) u_j = beta_i v_i.

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024; "Gated Delta Networks", 2024.
    """
    kept = torch.ones_like(q[..., :1] * k[..., :1].mT).tril()  # (B, H, S, S)
    if log_decay is not None:
        total = log_decay.cumsum(-1)
        kept = (total.unsqueeze(-1) - total.unsqueeze(-2)).where(kept > 0, -torch.inf).exp()
    beta = beta.unsqueeze(-1)  # (B, H, S, 1)
    system = (beta * (k @ k.mT) * kept).tril(-1)
    written = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
    o: Tensor = (q @ k.mT * kept) @ written
    return o
