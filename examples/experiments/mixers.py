"""What Local Linear Attention is compared with: mixers of q, k (B, H, S, D) and v (B, H, S, Dv), causal, in PyTorch.

Written for clarity at a few hundred tokens, not for speed: time and memory grow with the square of the length, or with
S D^2. tests/test_experiments.py checks each against the formula beside it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _fused_delta_rule() -> Callable[..., Any] | None:
    """flash-linear-attention's, where it is installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    return importlib.import_module("fla.ops.delta_rule").fused_recurrent_delta_rule  # type: ignore[no-any-return]


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
    system = gram + ridge * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    factor = torch.linalg.cholesky_ex(system).L  # the one that a CUDA graph can hold: it does not wait for an error
    half = torch.linalg.solve_triangular(factor, q.unsqueeze(-1), upper=False)
    found = torch.linalg.solve_triangular(factor.mT, half, upper=True)  # (B, H, S, D, 1)
    o: Tensor = (found.mT @ cross).squeeze(-2)
    return o


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """W_i q_i with W_i = a_i W_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, W_0 = 0, a_i = exp(log_decay_i) or 1.

    beta, from 0 to 1, and log_decay, 0 and less: (B, H, S). Keys should have norm 1. What token j writes, u_j, is the
    solution of one triangular system:  u_i + beta_i sum_{j<i} a_{j+1}...a_i (k_i.k_j) u_j = beta_i v_i.

    On a GPU without decays it is flash-linear-attention's, where that is installed. (Its gated rule has a backward pass
    in bfloat16 alone; these experiments are in float32.)

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024; "Gated Delta Networks", 2024.
    """
    if log_decay is None and q.is_cuda and (fused := _fused_delta_rule()) is not None:
        turned = (t.transpose(1, 2) for t in (q, k, v, beta))  # (B, S, H, ...)
        found: Tensor = fused(*turned, scale=1.0)[0]
        return found.transpose(1, 2)
    kept = torch.ones_like(q[..., :1] * k[..., :1].mT).tril()  # (B, H, S, S)
    if log_decay is not None:
        total = log_decay.cumsum(-1)
        kept = (total.unsqueeze(-1) - total.unsqueeze(-2)).where(kept > 0, -torch.inf).exp()
    beta = beta.unsqueeze(-1)  # (B, H, S, 1)
    system = (beta * (k @ k.mT) * kept).tril(-1)
    written = torch.linalg.solve_triangular(system, beta * v, upper=False, unitriangular=True)
    o: Tensor = (q @ k.mT * kept) @ written
    return o
