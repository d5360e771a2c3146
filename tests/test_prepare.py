"""Keys, values and gradients of any size, place and layout: what the kernels make ready for the others."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import recorded
from flashlla import CG, lla_attention_varlen
from flashlla.backends.triton import configs
from tests.support.kernels import NAMES, check, interpreted, make, step


@pytest.mark.quick
@interpreted
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_keys_far_from_the_origin(offset: float) -> None:
    """Where they lie does not enter into the budget, which knows them from the first on."""
    tensors = make((1, 1, 64, 16), torch.float16, offset)
    check(step(tensors, 1.0, backend="triton"), tensors, 1.0)


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
    q, k, v, grad_o = make((1, 1, 33, 8), torch.bfloat16)
    scaled = [q, k, (v.float() * size).bfloat16(), grad_o]
    check(step(scaled, 1.0, backend="triton"), scaled, 1.0)
    root = 2.0**40 if size > 1 else 2.0**-20
    moved = [(q.float() * root).bfloat16(), (k.float() * root).bfloat16(), v, grad_o]
    scale = 8**-0.5 / root**2
    check(step(moved, root**2, backend="triton", qk_scale=scale), moved, root**2, qk_scale=scale)


@pytest.mark.quick
@interpreted
@pytest.mark.parametrize("size", [0.0, 1e-21])
def test_keys_of_no_size(size: float) -> None:
    """As projections that begin at zero make them: softmax attention with equal weights, and no NaN."""
    tensors = make((1, 2, 20, 8), torch.bfloat16)
    tensors[1] = tensors[1] * size
    got = step(tensors, 1.0, backend="triton")
    assert all(t.isfinite().all() for t in got.values())
    check(got, tensors, 1.0)


@interpreted
@pytest.mark.parametrize("queries", [1.0, 1e-4])
@pytest.mark.parametrize("keys", [1e-2, 1e-3, 1e-4, 1e-6, 1e-12])
def test_keys_that_are_small_beside_the_ridge(keys: float, queries: float) -> None:
    """As those of weight decay or of a large ridge: adjoint probes go with the square of their size."""
    tensors = make((1, 2, 33, 16), torch.bfloat16)
    tensors[0], tensors[1] = tensors[0] * queries, tensors[1] * keys
    check(step(tensors, 1.0, backend="triton"), tensors, 1.0)


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
    tensors = make((1, 1, 7, 16), torch.float32)
    tensors[1] = torch.randn(1, 1, 22, generator=torch.Generator().manual_seed(0)).unfold(-1, 16, 1)
    check(step(tensors, 1.0, backend="triton"), tensors, 1.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_cast_alike_in_one_launch_and_in_two(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With shared heads, sequences of several lengths, and numbers that are not finite."""
    tensors = make((1, 4, 80, 8), dtype)
    tensors[1:3] = (t[:, :2] for t in tensors[1:3])
    tensors[1][0, 1, 20, 3], tensors[2][0, 0, 70, 0], tensors[0][0, 2, 50, 1] = float("nan"), float("inf"), 1e30
    cu_seqlens = torch.tensor([0, 35, 35, 70, 75], dtype=torch.int32)
    options = {"cu_seqlens": cu_seqlens, "max_seqlen": 35}
    launches = {}
    for longest in (0, configs.CAST_HEAD):
        monkeypatch.setattr(configs, "CAST_HEAD", longest)
        with recorded() as found:
            launches[longest] = step(tensors, 1.0, lla_attention_varlen, backend="triton", **options)
        assert ("cast_heads_kernel" in {x.kernel.__name__ for x in found}) == (longest > 0)
    in_two, in_one = launches.values()
    for name in NAMES:
        assert torch.equal(in_one[name].nan_to_num(7.0), in_two[name].nan_to_num(7.0)), name
