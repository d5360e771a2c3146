"""The Triton backend without a GPU, in Triton's interpreter: what it takes, with which solver, and how exact it is.

What a GPU run must show is in test_gpu.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashlla
from flashlla import CG, PCG, Direct, lla_attention
from tests.support.budget import budget
from tests.support.cases import BY_NAME, DATA
from tests.support.helpers import differentiable
from tests.support.kernels import check, interpreted, make, step


# The interpreter truncates to bfloat16 where devices round: 3.3e-3 of these limits is that.
@interpreted
@pytest.mark.parametrize(
    ("dtype", "length", "dim", "ridge", "limit"),
    [
        (torch.float32, 1, 8, 1.0, 2e-6),
        (torch.float32, 37, 16, 0.1, 4e-5),
        (torch.float32, 70, 3, 10.0, 1e-5),
        (torch.float16, 7, 16, 0.2, 1.5e-2),
        (torch.float16, 100, 24, 1.0, 4e-3),
        (torch.bfloat16, 65, 16, 0.2, 1.2e-2),
        (torch.bfloat16, 63, 40, 10.0, 5e-3),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_gradient_against_the_oracle(
    dtype: torch.dtype, length: int, dim: int, ridge: float, limit: float
) -> None:
    tensors = make((1, 2, length, dim), dtype)
    ridges = ridge * torch.linspace(0.5, 2, length)
    want = step([t.double() for t in tensors], ridges, backend="naive")
    check(step(tensors, ridges, backend="triton"), want, limit, small=1e-3)


@interpreted
@pytest.mark.parametrize("name", ["offset", "scale_large", "sharp", "ridge_weak"])
def test_float32_where_digits_are_scarce(name: str) -> None:
    """Keys far from the origin; weights so sharp that the adjoint's right-hand side is a difference of large sums; and
    probes so long that what k_mean is off by shows in z.k_mean."""
    case = BY_NAME[name]
    leaves = differentiable(case.make(torch.float32))
    keywords = case.keywords(leaves)
    o = lla_attention(*case.arrange(leaves), **keywords, cg_atol=0.0, cg_rtol=0.0, cg_max_iters=1000, backend="triton")
    o.backward(leaves["grad_o"])
    gradients = {n: leaf.grad for n, leaf in leaves.items() if n != "grad_o"}
    for n, excess in budget(case, torch.float32, iterative=True).worst(o, gradients).items():
        assert excess.ratio <= 1, f"{n}: {excess}"


@interpreted
def test_queries_with_fewer_keys_than_dimensions() -> None:
    """What they solve for lies among the keys seen, where A is large; beside them A is a weak ridge, and magnifies."""
    tensors = make((1, 2, 7, 64), torch.float16)
    want = step([t.double() for t in tensors], 0.1, backend="naive")
    got = step(tensors, 0.1, backend="triton")
    for name, limit in (("o", 2e-2), ("dq", 4e-3), ("dk", 8e-2), ("dv", 2e-2), ("dridge", 4e-2)):
        assert (got[name].double() - want[name]).norm() <= limit * want[name].norm(), name


@interpreted
def test_what_is_refused_and_why() -> None:
    q, k, v, _ = make((1, 1, 4, 8), torch.float32)
    reason = lambda *x, **o: flashlla.explain(*x, backend="triton", **o).reasons["triton"]
    assert "not Direct" in reason(q, k, v, solver=Direct())
    assert "float64" in reason(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 1, 2, 300)
    assert "up to 256" in reason(wide, wide, wide)
    assert reason(q, k, v, solver=CG(rtol=1e-4)) is None
    assert reason(q, k, v, solver=PCG()) is None


@interpreted
def test_gram_is_the_default_of_long_sequences_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends import triton
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    monkeypatch.setattr(triton, "GRAM_LEAST_KEYS", 149)
    q, k = (torch.from_numpy(t).bfloat16() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v = make((1, 1, 150, 12), torch.bfloat16)[2]

    def iterations(length: int, dtype: torch.dtype, solver: str | None) -> torch.Tensor:
        tensors = (t[:, :, :length].to(dtype) for t in (q, k, v))
        _, info = lla_attention(*tensors, ridge_lambda=0.02, backend="triton", solver=solver, return_info=True)
        return info.iterations

    bf16, fp32 = torch.bfloat16, torch.float32
    assert torch.equal(iterations(150, bf16, None), iterations(150, bf16, "pcg_gram"))
    assert iterations(150, bf16, None).float().mean() < 0.8 * iterations(150, bf16, "cg").float().mean()
    assert torch.equal(iterations(149, bf16, None), iterations(149, bf16, "cg"))
    assert torch.equal(iterations(150, fp32, None), iterations(150, fp32, "cg"))
