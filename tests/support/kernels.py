"""Ways to call the Triton backend in Triton's interpreter, and to say how far it is off."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla import lla_attention

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter; with a GPU, test_gpu.py runs the kernels themselves",
)
NAMES = ("o", "dq", "dk", "dv", "dridge")


def make(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """q, k, v, grad_o."""
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    point = torch.randn(shape[-1], generator=generator)
    point *= offset / point.norm()
    return [t.to(dtype) for t in (q + point, k + point, v, grad)]


def step(tensors: list[Tensor], ridge: float | Tensor, **options: Any) -> dict[str, Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ridge = (torch.as_tensor(ridge).to(wide).expand(q.shape[:-1])).clone().requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=ridge, **options)
    grads = torch.autograd.grad(o, (q, k, v, ridge), tensors[3].to(o.dtype))
    return dict(zip(NAMES, (o.detach(), *grads)))


def check(got: dict[str, Tensor], want: dict[str, Tensor], limit: float, small: float = 0.0) -> None:
    """Relative errors in the Frobenius norm; ``small``: what a root mean square below it counts as."""
    for name in NAMES:
        size = max(want[name].norm().item(), small * want[name].numel() ** 0.5)
        error = (got[name].double() - want[name]).norm().item() / size
        assert error <= limit, f"{name}: {error:.1e}"
