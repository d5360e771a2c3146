"""The Triton backend without a GPU, in Triton's interpreter: what it takes, and with which solver.

How exact it is, test_conformance.py tells, and on a GPU test_gpu.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashlla
from flashlla import CG, PCG, Direct, lla_attention
from tests.support.cases import DATA
from tests.support.kernels import interpreted, make


@pytest.mark.quick
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
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
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
