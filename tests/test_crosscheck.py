"""flashlla.verify: the cross-check with SciPy, what it takes, and that it sees what is wrong."""

import numpy as np
import pytest
import torch

import flashlla
from flashlla.backends.chunked import Chunked

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_agrees_with_scipy(backend, dtype, capsys):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 8, generator=generator, dtype=dtype) for _ in range(3))
    ridge = torch.rand(2, 3, 40, generator=generator) + 0.05
    report = flashlla.verify(
        q, k, v, rows=50, backend=backend, ridge_lambda=ridge, qk_scale=0.5, delta_eps=1e-3, solver="direct"
    )
    print(report)
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    assert report.error.max() < bound
    assert report.residual.max() < bound
    assert report.condition.min() >= 1
    assert report.row.shape == (50, 3)
    assert len(np.unique(report.row, axis=0)) == 50
    assert report.backend == backend
    assert "condition number" in capsys.readouterr().out


def test_verify_sees_a_wrong_output(monkeypatch):
    right = Chunked.forward

    def wrong(self, problem, inputs):
        result = right(self, problem, inputs)
        result.o[..., 7, :] *= 1.5
        result.residuals.probe[..., 3, :] *= 2
        return result

    monkeypatch.setattr(Chunked, "forward", wrong)
    q, k, v = torch.randn(3, 1, 20, 4, dtype=torch.float64).unbind(0)
    report = flashlla.verify(q, k, v, solver="direct", backend="chunked")
    assert len(report.row) == 20
    assert (report.error > 0.1).nonzero()[0].tolist() == [7]
    assert (report.residual > 0.1).nonzero()[0].tolist() == [3]


def test_verify_checks_its_arguments():
    q = torch.randn(1, 5, 4)
    with pytest.raises(ValueError, match="rows: got 0"):
        flashlla.verify(q, q, q, rows=0)
    with pytest.raises(ValueError, match="solver: got 'drect'"):
        flashlla.verify(q, q, q, solver="drect")
    assert len(flashlla.verify(q[:, :0], q[:, :0], q[:, :0]).row) == 0


def test_verify_knows_every_mask():
    q, k, v = torch.randn(2, 4, 9, 4), torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 6)
    lengths = torch.tensor([12, 7])
    report = flashlla.verify(q, k, v, ridge_lambda=1.0, window=5, seqlens_k=lengths)
    assert report.error.max() < 1e-4
