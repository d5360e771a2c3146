"""The operator from its definition, in float64, with gradients by automatic differentiation.

It shares nothing with the package, neither code nor form: each query's regression about the query itself (the
published text form), where the package solves the centred systems and differentiates by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.cases import LAYOUTS, Case


def attention(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, scale: float, delta_eps: float, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """``(o, omega)``; q: (B, H, Sq, D), k: (B, H, Sk, D), v: (B, H, Sk, Dv), ridge: broadcasts to (B, H, Sq),
    visible: broadcasts to (B, H, Sq, Sk); a query without a True has zeros for o and omega."""
    visible = visible.to(q.device).expand(*q.shape[:-1], k.shape[-2])
    hidden = ~visible.any(-1)  # a stand-in sees the first key
    visible = visible | (hidden.unsqueeze(-1) & (torch.arange(k.shape[-2], device=q.device) == 0))
    logits = (scale * (q @ k.mT)).masked_fill(~visible, -torch.inf)
    w = (logits - logits.detach().amax(-1, keepdim=True)).exp()  # (B, H, Sq, Sk)
    omega = w.sum(-1)
    from_query = k.unsqueeze(-3) - q.unsqueeze(-2)  # (B, H, Sq, Sk, D)
    mu = (w.unsqueeze(-1) * from_query).sum(-2)
    sigma = (w.unsqueeze(-1) * from_query).mT @ from_query
    sigma = sigma + ((ridge * omega)[..., None, None] * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device))
    rho = torch.linalg.solve(sigma, mu)
    denominator = omega - (mu * rho).sum(-1)
    weights = w * (1 - (from_query @ rho.unsqueeze(-1)).squeeze(-1))
    guard = denominator / (denominator + delta_eps)  # held constant in gradients
    o = (weights @ v) * (guard.detach() / denominator).unsqueeze(-1)
    return o.masked_fill(hidden.unsqueeze(-1), 0), omega.masked_fill(hidden, 0)


@dataclass(frozen=True)
class Reference:
    """What a backend should give: ``o``, ``gradients`` (by leaf) and ``omega`` with the caller's shapes."""

    o: Tensor
    gradients: Mapping[str, Tensor]
    omega: Tensor


def reference(case: Case, leaves: Mapping[str, Tensor]) -> Reference:
    """The exact result on ``leaves`` as they are, rounded to whatever dtype they have."""
    exact = {name: t.detach().cpu().double().requires_grad_(name != "grad_o") for name, t in leaves.items()}
    layout = LAYOUTS[case.layout]
    q, k, v = (layout.wide(t) for t in case.arrange(exact))
    ridge = exact.get("ridge_lambda", torch.tensor(case.ridge_lambda, dtype=torch.float64))
    q, k, v = (torch.where(t.isnan(), 0, t) for t in (q, k, v))  # beyond seqlens, or of no sequence
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    ridge = layout.wide_ridge(ridge, q.shape[:-1])
    scale = 1 / math.sqrt(q.shape[-1]) if case.scale is None else case.scale
    o, omega = attention(q, k, v, ridge, scale, case.delta_eps, case.visible())
    o, omega = layout.narrow(o), layout.narrow(omega)
    names = [name for name in exact if name != "grad_o"]
    gradients = torch.autograd.grad(o, [exact[name] for name in names], exact["grad_o"])
    return Reference(o.detach(), dict(zip(names, gradients, strict=True)), omega.detach())
