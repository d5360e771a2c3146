"""The Gram preconditioner's kernels: where they help, where they are left off."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import flashlla
from flashlla import CG, PCG, lla_attention, lla_attention_varlen
from tests.support.cases import DATA
from tests.support.kernels import check, interpreted, make, step


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_gram(monkeypatch: pytest.MonkeyPatch, causal: bool, dtype: torch.dtype) -> None:
    """Fewer iterations for correlated keys, forward and backward the same."""
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
    monkeypatch.setattr(configs, "FEW_KEYS", 0)  # both solvers have the first guess, as on long sequences
    q, k = (torch.from_numpy(t).to(dtype) for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    tensors = [q, k, *make((1, 1, 150, 12), dtype)[2:]]
    options = {"causal": causal, "qk_scale": 12**-0.5 if causal else 0.05}
    solver = PCG(max_iters=200, preconditioner="gram")
    call = functools.partial(lla_attention, *tensors[:3], **options, ridge_lambda=0.02, return_info=True)
    plain, info = (call(backend="triton", solver=s)[1].iterations for s in (CG(max_iters=200), solver))
    first = 64 if causal else 0  # earlier queries have no keys in common
    assert info[..., first:].float().mean() < 0.8 * plain[..., first:].float().mean()
    assert torch.equal(info[..., :first], plain[..., :first])
    got = step(tensors, 0.02, backend="triton", solver=solver, **options)
    check(got, tensors, 0.02, **options)


@interpreted
@pytest.mark.parametrize("data", ["iid", "power_law", "sharp"])
def test_gram_is_left_off_where_it_would_not_help(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 128)
    monkeypatch.setattr(configs, "FEW_KEYS", 0)  # both solvers have the first guess, as on long sequences
    q, k = (torch.from_numpy(t).bfloat16() for t in DATA[data](np.random.default_rng(0), (1, 1, 256, 12)))
    v = make((1, 1, 256, 12), torch.bfloat16)[2]
    plain, o = (
        lla_attention(q, k, v, ridge_lambda=1.0, backend="triton", solver=solver)
        for solver in (CG(max_iters=200), PCG(max_iters=200, preconditioner="gram"))
    )
    assert torch.equal(o, plain)


@interpreted
def test_gram_is_left_off_where_queries_see_no_more_keys_than_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
    q, k = (torch.from_numpy(t).float() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v = make((1, 1, 150, 12), torch.float32)[2]
    plain, o = (
        lla_attention(q, k, v, ridge_lambda=1e-3, window=12, backend="triton", solver=solver)
        for solver in (CG(max_iters=200), PCG(max_iters=200, preconditioner="gram"))
    )
    assert torch.equal(o, plain)


@interpreted
@pytest.mark.parametrize("spoilt", ["query", "ridge"])
def test_one_bad_number_leaves_gram_to_the_others(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
    q, k = (torch.from_numpy(t).float() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v, grad = make((1, 1, 150, 12), torch.float32)[2:]
    ridge = torch.full((150,), 0.02)
    # So few that gradients show whether the adjoint solve had it.
    solver = PCG(max_iters=12, preconditioner="gram")
    clean = step([q, k, v, grad], ridge, backend="triton", solver=solver)
    if spoilt == "query":
        q[0, 0, 70, 3] = float("nan")
    else:
        ridge[70] = float("inf")
    got = step([q, k, v, grad], ridge, backend="triton", solver=solver)
    others = torch.arange(150) != 70
    for name in ("o", "dq", "dridge"):
        torch.testing.assert_close(got[name][0, 0][others], clean[name][0, 0][others], rtol=2e-3, atol=2e-3)


@pytest.mark.quick
@interpreted
def test_gram_of_keys_of_few_dims_and_a_ridge_of_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix is singular but for the ridge, which has no digits in it."""
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
    q, k, v = (t.float() for t in make((1, 1, 150, 32), torch.float32)[:3])
    k = 3 * k[..., :3] @ torch.linspace(-1, 1, 96).view(3, 32)
    o, info = lla_attention(
        0.1 * q, k, v, ridge_lambda=1e-6, backend="triton", solver=PCG(preconditioner="gram"), return_info=True
    )
    assert o.isfinite().all()
    assert info.residual.isfinite().all()


@pytest.mark.quick
@interpreted
def test_what_gram_is_not_made_for() -> None:
    solver = PCG(preconditioner="gram")
    q, k, v, _ = make((1, 1, 4, 200), torch.float32)
    assert "up to 128" in str(flashlla.explain(q, k, v, solver=solver).reasons["triton"])
    q, k, v = (torch.randn(1, 1, 9, 8) for _ in range(3))
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    why = flashlla.explain(q, k, v, op=lla_attention_varlen, cu_seqlens=lengths, max_seqlen=5, solver=solver).reasons
    assert "packed" in str(why["triton"])
