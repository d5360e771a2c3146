"""Keys, values and gradients of any size, place and layout: what the kernels make ready for the others."""

from __future__ import annotations

import pytest
import torch

from flashlla import CG, lla_attention
from tests.support.kernels import NAMES, interpreted, make, step


@pytest.mark.quick
@interpreted
def test_keys_far_from_the_origin() -> None:
    errors = []
    for offset in (0.0, 30.0):
        tensors = make((1, 1, 64, 16), torch.float16, offset)
        want = step([t.double() for t in tensors], 1.0, backend="naive")["o"]
        got = step(tensors, 1.0, backend="triton")["o"]
        errors.append(((got.double() - want).norm() / want.norm()).item())
    assert errors[1] <= 2 * errors[0] + 2e-3, errors


@pytest.mark.quick
@interpreted
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_first_key_far_from_all_others(factor: float) -> None:
    tensors = make((1, 1, 40, 8), torch.float32)
    tensors[1][:, :, 0] *= factor
    want = step([t.double() for t in tensors], 0.5, backend="naive")
    errors = []
    for backend in ("triton", "chunked"):
        got = step(tensors, 0.5, backend=backend, solver=CG(atol=0.0, rtol=0.0, max_iters=1000))
        errors.append(((got["o"].double() - want["o"]).norm() / want["o"].norm()).item())
    assert errors[0] <= 4 * errors[1] + 1e-6, errors


@interpreted
@pytest.mark.parametrize("size", [1e30, 1e-6])
def test_sizes_that_float16_does_not_hold(size: float) -> None:
    """Keys and queries of any size, values and gradients of any other."""
    tensors = make((1, 1, 33, 8), torch.bfloat16)
    want = step([t.double() for t in tensors], 1.0, backend="naive")
    scaled = [tensors[0], tensors[1], (tensors[2].float() * size).bfloat16(), tensors[3]]
    got = step(scaled, 1.0, backend="triton")
    for name, factor in (("o", size), ("dq", size), ("dk", size), ("dv", 1.0)):
        error = (got[name].double() / factor - want[name]).norm() / want[name].norm()
        assert error < 1e-2, (name, error)
    root = 2.0**40 if size > 1 else 2.0**-20
    moved = [(t.float() * root).bfloat16() for t in tensors[:2]]
    got = step([*moved, *tensors[2:]], root**2, backend="triton", qk_scale=8**-0.5 / root**2)
    assert (got["o"].double() - want["o"]).norm() / want["o"].norm() < 1e-2
    assert (got["dk"].double() * root - want["dk"]).norm() / want["dk"].norm() < 1e-2


@pytest.mark.quick
@interpreted
@pytest.mark.parametrize("size", [0.0, 1e-21])
def test_keys_of_no_size(size: float) -> None:
    """As projections that begin at zero make them: softmax attention with equal weights, and no NaN."""
    tensors = make((1, 2, 20, 8), torch.bfloat16)
    tensors[1] = tensors[1] * size
    got, want = step(tensors, 1.0, backend="triton"), step([t.double() for t in tensors], 1.0, backend="naive")
    assert all(t.isfinite().all() for t in got.values())
    assert (got["o"].double() - want["o"]).norm() <= 1e-2 * want["o"].norm()
    assert (got["dv"].double() - want["dv"]).norm() <= 1e-2 * want["dv"].norm()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_inputs(dtype: torch.dtype) -> None:
    tensors = make((2, 3, 20, 8), dtype)
    plain = step(tensors, 1.0, backend="triton")
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    views[3] = views[3].transpose(2, 3).contiguous().transpose(2, 3)  # rows that are not contiguous
    got = step(views, 1.0, backend="triton")
    assert got["o"].stride() == views[0].stride()
    for name in NAMES:
        assert torch.equal(got[name], plain[name]), name


@pytest.mark.quick
@interpreted
def test_keys_whose_difference_lies_otherwise() -> None:
    """Strides that make PyTorch lay out k minus its first key with rows apart by one."""
    q, _, v, grad = make((1, 1, 7, 16), torch.float32)
    strided = torch.randn(1, 1, 22, generator=torch.Generator().manual_seed(0)).unfold(-1, 16, 1)
    want = step([t.double() for t in (q, strided, v, grad)], 1.0, backend="naive")
    o = lla_attention(q, strided, v, ridge_lambda=1.0, backend="triton")
    assert (o.double() - want["o"]).norm() <= 1e-5 * want["o"].norm()
