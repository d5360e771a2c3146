"""What local linear attention must do whatever the numbers: invariances and limits, on random problems in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashlla
from flashlla.backends.base import Backend
from tests.support.helpers import called, normal, taking

pytestmark = pytest.mark.quick

SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.integers(1, 40)
DIMS = st.sampled_from([1, 2, 3, 5, 8])
RIDGES = st.floats(-3, 3).map(lambda x: 10.0**x)
SCALES = st.one_of(st.none(), st.floats(-1, 1))

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
# All that solve systems of float64 directly.
every_backend = pytest.mark.parametrize("backend", taking(torch.float64, solver="direct"), ids=called)


def attention(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Solved to float64's last digits."""
    options = {"solver": "direct", "delta_eps": 0.0, **options}
    return flashlla.lla_attention(q, k, v, backend=backend.name, **options)


def close(got: Tensor, wanted: Tensor, ridge: float, among: Tensor) -> None:
    """Equal but for rounding, which conditioning makes larger: |C| / ridge, and twice so through the denominator."""
    size = float(among.abs().max()) + 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * size * (1 + 1 / ridge) * len(got.flatten()) ** 0.5)


@every_backend
@given(seed=SEEDS, s=LENGTHS, d=DIMS, ridge=RIDGES, scale=SCALES, a=st.floats(-3, 3), b=st.floats(-3, 3))
@few
def test_linear_in_v(
    backend: Backend, seed: int, s: int, d: int, ridge: float, scale: float | None, a: float, b: float
) -> None:
    q, k, v, w = (normal(2, s, d, seed=seed + i) for i in range(4))
    f = lambda values: attention(backend, q, k, values, ridge_lambda=ridge, qk_scale=scale)
    of_v, of_w = f(v), f(w)
    close(f(a * v + b * w), a * of_v + b * of_w, ridge, torch.stack([of_v, of_w]))


@every_backend
@given(seed=SEEDS, s=LENGTHS, d=DIMS, ridge=RIDGES, scale=SCALES)
@few
def test_constant_v_comes_back(backend: Backend, seed: int, s: int, d: int, ridge: float, scale: float | None) -> None:
    q, k = (normal(2, s, d, seed=seed + i) for i in range(2))
    v = normal(2, 1, d, seed=seed + 2).expand(2, s, d)
    close(attention(backend, q, k, v, ridge_lambda=ridge, qk_scale=scale), v, ridge, v)


@every_backend
@given(seed=SEEDS, d=st.sampled_from([1, 2, 3, 5]), more=st.integers(0, 20), scale=st.floats(-0.3, 0.3))
@few
def test_affine_v_gives_the_same_function_of_q(backend: Backend, seed: int, d: int, more: int, scale: float) -> None:
    """As the ridge goes to zero, wherever more keys than dimensions are seen; and the bias is proportional to it."""
    s = 4 * d + 4 + more
    q, k = (normal(1, s, d, seed=seed + i) for i in range(2))
    w, b = normal(d, d, seed=seed + 2), normal(d, seed=seed + 3)
    errors = []
    for ridge in (1e-6, 1e-8):
        o = attention(backend, q, k, k @ w.mT + b, ridge_lambda=ridge, qk_scale=scale)
        errors.append(float((o - (q @ w.mT + b))[:, 3 * d + 3 :].norm()))
    assert errors[1] < 1e-4
    assert errors[1] < 0.02 * errors[0] + 1e-8


@every_backend
@given(seed=SEEDS, s=LENGTHS, d=DIMS, ridge=RIDGES, scale=SCALES)
@few
def test_rotation_of_q_and_k(backend: Backend, seed: int, s: int, d: int, ridge: float, scale: float | None) -> None:
    q, k, v = (normal(2, s, d, seed=seed + i) for i in range(3))
    scale = d**-0.5 if scale is None else scale
    rotation, _ = torch.linalg.qr(normal(d, d, seed=seed + 3))
    plain, rotated = (
        attention(backend, q @ r, k @ r, v, ridge_lambda=ridge, qk_scale=scale)
        for r in (torch.eye(d).double(), rotation)
    )
    close(rotated, plain, ridge, plain)


@every_backend
@given(seed=SEEDS, s=st.integers(2, 40), d=DIMS, ridge=RIDGES, scale=SCALES)
@few
def test_order_of_the_pairs_seen(
    backend: Backend, seed: int, s: int, d: int, ridge: float, scale: float | None
) -> None:
    """A query's output does not depend on the order of the keys and values up to it."""
    q, k, v = (normal(2, s, d, seed=seed + i) for i in range(3))
    row = seed % s
    order = torch.arange(s)
    order[: row + 1] = torch.randperm(row + 1, generator=torch.Generator().manual_seed(seed))
    options = {"ridge_lambda": ridge, "qk_scale": scale}
    plain, permuted = attention(backend, q, k, v, **options), attention(backend, q, k[:, order], v[:, order], **options)
    close(permuted[:, row:], plain[:, row:], ridge, plain)


@every_backend
@given(seed=SEEDS, s=LENGTHS, d=DIMS, scale=st.one_of(st.none(), st.floats(0.01, 1)))  # torch's own NaN at scale 0
@few
def test_large_ridge_is_softmax_attention(backend: Backend, seed: int, s: int, d: int, scale: float | None) -> None:
    q, k, v = (normal(2, 2, s, d, seed=seed + i) for i in range(3))
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    o = attention(backend, q, k, v, ridge_lambda=1e8, qk_scale=scale)
    torch.testing.assert_close(o, softmax, rtol=0, atol=1e-5)
    # What is left is Cov(v, k) d / ridge: a hundred times the ridge leaves a hundredth of it.
    o = attention(backend, q, k, v, ridge_lambda=1e10, qk_scale=scale)
    torch.testing.assert_close(o, softmax, rtol=0, atol=1e-7)


@every_backend
@given(seed=SEEDS, s=st.integers(1, 25), d=st.sampled_from([1, 2, 5]), ridge=st.floats(-2, 1).map(lambda x: 10.0**x))
@few
def test_small_scale_is_ridge_regression(backend: Backend, seed: int, s: int, d: int, ridge: float) -> None:
    """With an intercept, which is not penalised, and with the ridge counted once a pair: by NumPy's least squares."""
    q, k, v = (normal(1, s, d, seed=seed + i) for i in range(3))
    o = attention(backend, q, k, v, ridge_lambda=ridge, qk_scale=1e-9)[0].numpy()
    for i in range(s):
        n = i + 1
        design = np.hstack([np.ones((n, 1)), k[0, :n].numpy()])
        penalty = np.hstack([np.zeros((d, 1)), math.sqrt(ridge * n) * np.eye(d)])
        values = np.vstack([v[0, :n].numpy(), np.zeros((d, d))])
        coefficients, *_ = np.linalg.lstsq(np.vstack([design, penalty]), values, rcond=None)
        wanted = np.concatenate([[1.0], q[0, i].numpy()]) @ coefficients
        np.testing.assert_allclose(o[i], wanted, rtol=1e-5, atol=1e-5)
