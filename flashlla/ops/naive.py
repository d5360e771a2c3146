"""The published reference's functions, thin over the naive backend.

Names, arguments and results are the published ones (the paper's text form, with rho and a denominator); the gradients
are the full derivative, which the published ones are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlla.api import lla_attention
from flashlla.autograd import forward
from flashlla.backends.naive import Naive, whole
from flashlla.calls import prepared
from flashlla.hints import with_hints
from flashlla.problem import Residuals, describe

__all__ = ["lla_backward_naive", "lla_forward_naive"]


@with_hints()
def lla_forward_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_scale: float | None,
    ridge_lambda: float | Tensor,
    delta_eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense forward pass: ``(o, rho, denom, m)``.

    Args:
        q, k, v: (B, S, D), a floating dtype.
        qk_scale: a number, or None for 1 / sqrt(D).
        ridge_lambda: a number above 0, or a tensor that broadcasts to (B, S).
        delta_eps: added to the denominator. Default 1e-12.

    Returns:
        (o, rho, denom, m). o: (B, S, D), dtype of q, differentiable. rho: (B, S, D), Sigma^-1 mu. denom: (B, S, 1),
        omega - mu.rho + delta_eps. m: (B, S, 1), the row maximum of s q.k. The last three in float32 (float64 for
        float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`flashlla.lla_attention`.

    Source: Zuo et al. (ICLR 2026); docs/math.md, sections 1 and 2.

    Example:
        >>> import torch
        >>> from flashlla.ops.naive import lla_forward_naive
        >>> q, k, v = torch.randn(3, 1, 20, 8).unbind(0)
        >>> o, rho, denom, m = lla_forward_naive(q, k, v, 8**-0.5, 10.0, 1e-12)
    """
    call = prepared(
        lla_attention,
        lla_forward_naive,
        q,
        k,
        v,
        ridge_lambda=ridge_lambda,
        qk_scale=qk_scale,
        delta_eps=delta_eps,
        solver="direct",
        backend="naive",
    )
    found = forward(call.arguments)
    with torch.no_grad():
        z, d = found.residuals.probe, found.residuals.k_mean - call.arguments.inputs.q
        spike = 1 + (d * z).sum(-1, keepdim=True)  # (B, 1, S, 1)
        omega = found.report.omega.unsqueeze(-1)
        rho, denom, m = z / spike, omega / spike + delta_eps, found.residuals.lse.unsqueeze(-1) - omega.log()
    return call.restore(found.o), call.restore(rho), call.restore(denom), call.restore(m)


@with_hints()
def lla_backward_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    denom: Tensor,
    m: Tensor,
    grad_o: Tensor,
    qk_scale: float | None,
    ridge_lambda: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense backward pass: ``(dq, dk, dv)`` of ``sum(o * grad_o)``.

    Args:
        q, k, v, qk_scale, ridge_lambda: as given to :func:`lla_forward_naive`.
        rho, denom, m: as it returned them.
        grad_o: (B, S, D).

    Returns:
        (dq, dk, dv), each (B, S, D) in the dtype of q; the full derivative, with the ridge lambda * omega
        differentiated too.

    Raises:
        TypeError, ValueError: as :func:`flashlla.lla_attention`.

    Source: docs/math.md, section 3.

    Example:
        >>> import torch
        >>> from flashlla.ops.naive import lla_backward_naive, lla_forward_naive
        >>> q, k, v, grad_o = torch.randn(4, 1, 20, 8).unbind(0)
        >>> o, rho, denom, m = lla_forward_naive(q, k, v, None, 10.0, 1e-12)
        >>> dq, dk, dv = lla_backward_naive(q, k, v, rho, denom, m, grad_o, None, 10.0)
    """
    call = prepared(
        lla_attention, lla_backward_naive, q, k, v, ridge_lambda=ridge_lambda, qk_scale=qk_scale, solver="direct"
    )
    problem, inputs = describe(call.arguments), call.arguments.inputs
    if problem.empty:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with torch.no_grad():
        rho, denom, m, grad_o = (t.unsqueeze(1) if q.dim() == 3 else t for t in (rho, denom, m, grad_o))
        given, found = whole(problem, inputs)
        omega, k_mean = found.omega.reshape(m.shape[:-1]), (found.k_mean + given.origin).reshape(rho.shape)
        spike = 1 / (1 - ((k_mean - inputs.q) * rho).sum(-1))  # 1 + d.z, since rho = z / (1 + d.z)
        guard = omega / spike / denom.squeeze(-1)
        residuals = Residuals(m.squeeze(-1) + omega.log(), guard, rho * spike.unsqueeze(-1), k_mean)
        dq, dk, dv, _ = Naive().backward(problem, inputs, residuals, grad_o)
    return call.restore(dq), call.restore(dk), call.restore(dv)
