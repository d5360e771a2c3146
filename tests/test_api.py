"""What callers may pass, and what they get."""

import inspect
from fractions import Fraction

import numpy as np
import pytest
import torch

import flashlla
from flashlla import lla_attention
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick


def test_signature_and_defaults_are_the_published_ones():
    parameters = inspect.signature(lla_attention).parameters
    published = {
        "ridge_lambda": 10.0,
        "qk_scale": None,
        "delta_eps": 1e-12,
        "cg_atol": 1e-12,
        "cg_rtol": 1e-12,
        "cg_max_iters": 32,
        "cg_use_preconditioner": False,
    }
    assert list(parameters)[:3] == ["q", "k", "v"]
    for name, default in published.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 3, 9, 4)])
def test_output_has_the_inputs_shape_and_dtype(shape, dtype):
    q, k, v = qkv(*shape, dtype=dtype)
    o, info = lla_attention(q, k, v, ridge_lambda=0.5, return_info=True)
    assert (o.shape, o.dtype) == (q.shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert info.omega.dtype == info.residual.dtype == wide
    assert info.iterations.dtype == torch.int32
    assert info.converged.dtype == torch.bool
    assert {t.shape for t in info[:4]} == {q.shape[:-1]}
    assert info.backend in flashlla.available_backends()


def test_output_keeps_the_layout_of_a_transposed_query():
    q, k, v = (t.transpose(1, 2) for t in qkv(2, 9, 3, 4))  # (B, S, H, D) seen as (B, H, S, D)
    assert lla_attention(q, k, v).stride() == q.stride()


def test_lla_function_is_the_published_call():
    q, k, v = (t.requires_grad_() for t in qkv(2, 9, 4))
    ridge = torch.tensor(0.7, requires_grad=True)
    o, omega = flashlla.LLAFunction.apply(q, k, v, ridge, None, 1e-12, 1e-12, 1e-12, 32, False)
    expected, info = lla_attention(q, k, v, ridge_lambda=ridge, return_info=True)
    assert torch.equal(o, expected)
    assert omega.shape == (2, 9, 1)
    assert torch.equal(omega.squeeze(-1), info.omega)
    o.sum().backward(retain_graph=True)
    assert ridge.grad is not None
    assert q.grad is not None
    with pytest.raises(NotImplementedError, match="omega has no gradient"):
        (o.sum() + omega.sum()).backward()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1), (2, 7)])
def test_ridge_broadcasts_and_has_a_gradient_of_its_own_shape(shape):
    q, k, v = qkv(2, 7, 3, dtype=torch.float64)
    ridge = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=ridge, solver="direct")
    (grad,) = torch.autograd.grad(o.square().sum(), ridge)
    full = ridge.detach().expand(2, 7).clone().requires_grad_()
    (per_row,) = torch.autograd.grad(lla_attention(q, k, v, ridge_lambda=full, solver="direct").square().sum(), full)
    torch.testing.assert_close(grad, per_row.sum_to_size(shape) if shape else per_row.sum())
    assert grad.abs().sum() > 0


def test_ridge_is_not_rounded_to_a_narrow_dtype():
    q, k, v = qkv(1, 8, 4, dtype=torch.bfloat16)
    exact, rounded = 0.1, float(torch.tensor(0.1).bfloat16())
    as_tensor = lla_attention(q, k, v, ridge_lambda=torch.tensor(exact), return_info=True)[1]
    as_number = lla_attention(q, k, v, ridge_lambda=exact, return_info=True)[1]
    other = lla_attention(q, k, v, ridge_lambda=rounded, return_info=True)[1]
    assert torch.equal(as_tensor.residual, as_number.residual)
    assert not torch.equal(as_number.residual, other.residual)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape, backend):
    q, k, v = (t.requires_grad_() for t in qkv(*shape))
    ridge = torch.tensor(1.0, requires_grad=True)
    o = lla_attention(q, k, v, ridge_lambda=ridge, backend=backend)
    assert o.shape == shape
    o.sum().backward()
    assert q.grad.shape == shape
    assert ridge.grad == 0


def test_heads_that_share_keys_are_as_if_keys_were_repeated():
    q, k, v = torch.randn(2, 6, 20, 4), torch.randn(2, 2, 20, 4), torch.randn(2, 2, 20, 4)
    o = lla_attention(q, k, v, ridge_lambda=1.0)
    apart = lla_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), ridge_lambda=1.0)
    torch.testing.assert_close(o, apart, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_no_key():
    q, k, v = (t.requires_grad_() for t in (torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)))
    ridge = torch.ones(2, 9, requires_grad=True)
    o, info = lla_attention(
        q, k, v, ridge_lambda=ridge, seqlens_k=torch.tensor([5, 0]), delta_eps=0.0, return_info=True
    )
    grads = torch.autograd.grad(o, (q, k, v, ridge), torch.randn_like(o))
    assert not o[0, :4].any()
    assert not o[1].any()
    assert o[0, 4:].all()
    assert info.converged.all()
    for g in (grads[0], grads[3]):
        assert not g[0, :4].any()
        assert not g[1].any()
    assert not grads[1][1].any()
    assert all(g.isfinite().all() for g in grads)


def test_what_lies_beyond_seqlens_is_not_looked_at():
    q, k, v = qkv(2, 9, 4)
    lengths = torch.tensor([9, 6])
    want = lla_attention(q, k, v, ridge_lambda=1.0, seqlens_k=lengths)
    k[1, 6:], v[1, 6:] = float("nan"), float("inf")
    k, v = k.requires_grad_(), v.requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=1.0, seqlens_k=lengths)
    assert torch.equal(o, want)
    o.sum().backward()
    assert not k.grad[1, 6:].any()
    assert k.grad.isfinite().all()
    # The diagonal stays: query 3 of the short sequence sees keys 0 to 3, as ever.
    assert torch.equal(o[1, :6], lla_attention(q, *qkv(2, 9, 4)[1:], ridge_lambda=1.0)[1, :6])


def test_layout_of_heads_after_tokens():
    q, k, v = (t.requires_grad_() for t in qkv(2, 9, 3, 4))
    o, info = lla_attention(q, k, v, ridge_lambda=1.0, layout="bshd", return_info=True)
    turned = lla_attention(*(t.transpose(1, 2) for t in (q, k, v)), ridge_lambda=1.0)
    assert torch.equal(o, turned.transpose(1, 2))
    assert o.is_contiguous()
    assert info.residual.shape == (2, 9, 3)


def test_the_output_lies_as_the_query_does_when_values_are_wider():
    q, k, v = torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 7)
    assert lla_attention(q, k, v, layout="bshd").is_contiguous()


def test_numpy_numbers_are_numbers():
    q, k, v = qkv(1, 5, 4)
    o = lla_attention(q, k, v, ridge_lambda=np.float32(2.0), qk_scale=np.float64(0.5))
    assert torch.equal(o, lla_attention(q, k, v, ridge_lambda=2.0, qk_scale=0.5))
    o = lla_attention(q, k, v, window=np.int64(2), causal=np.bool_(True))
    assert torch.equal(o, lla_attention(q, k, v, window=2))
    for ridge in (Fraction(1, 2), Fraction(1, 4)):
        for _ in range(2):  # the second goes the short way
            o = lla_attention(q, k, v, ridge_lambda=ridge)
            assert torch.equal(o, lla_attention(q, k, v, ridge_lambda=float(ridge)))
