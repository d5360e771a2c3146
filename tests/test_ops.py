"""The published reference's names."""

from __future__ import annotations

import pytest
import torch

from flashlla import lla_attention
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick


def test_published_naive_functions():
    from flashlla.ops.naive import lla_backward_naive, lla_forward_naive

    q, k, v = (t.requires_grad_() for t in qkv(2, 11, 4, dtype=torch.float64))
    grad_o = qkv(2, 11, 4, dtype=torch.float64, seed=1)[0]
    ridge = torch.rand(2, 11, dtype=torch.float64) + 0.1
    for eps in (0.0, 1e-3):
        o, rho, denom, m = lla_forward_naive(q, k, v, 0.4, ridge, eps)
        expected = lla_attention(q, k, v, qk_scale=0.4, ridge_lambda=ridge, delta_eps=eps, backend="naive")
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        assert o.requires_grad
        # The text form, from its definition.
        logits = (0.4 * q @ k.mT).masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(m, logits.amax(-1, keepdim=True), rtol=1e-12, atol=1e-12)
        w = (logits - m).exp()
        apart = k[:, None] - q[:, :, None]  # (B, S, S, D): k_j - q_i
        mu = torch.einsum("bij,bijd->bid", w, apart)
        sigma = torch.einsum("bij,bijd,bije->bide", w, apart, apart)
        sigma = sigma + (ridge * w.sum(-1))[..., None, None] * torch.eye(4)
        torch.testing.assert_close(rho, torch.linalg.solve(sigma, mu), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(denom, w.sum(-1, keepdim=True) - (mu * rho).sum(-1, keepdim=True) + eps)
        got = lla_backward_naive(q, k, v, rho, denom, m, grad_o, 0.4, ridge)
        for a, b in zip(got, torch.autograd.grad(expected, (q, k, v), grad_o)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
