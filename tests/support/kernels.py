"""Ways to call the Triton backend in Triton's interpreter, and to say how far it is off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla import lla_attention
from tests.support.budget import budget_of
from tests.support.cases import Case

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter; with a GPU, test_gpu.py runs the kernels themselves",
)
NAMES = ("o", "dq", "dk", "dv", "dridge")


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    offset: float = 0.0,
    seed: int | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k, v, grad_o; each shape has a seed of its own where none is given."""
    generator = torch.Generator(device).manual_seed(sum(shape) if seed is None else seed)
    q, k, v, grad = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    point = torch.randn(shape[-1], generator=generator, device=device)
    point *= offset / point.norm()
    return [t.to(dtype) for t in (q + point, k + point, v, grad)]


def step(
    tensors: list[Tensor], ridge: float | Tensor, operator: Callable[..., Tensor] = lla_attention, **options: Any
) -> dict[str, Tensor]:  # fmt: skip
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ridge = (torch.as_tensor(ridge).to(q.device, wide).expand(q.shape[:-1])).clone().requires_grad_()
    o = operator(q, k, v, ridge_lambda=ridge, **options)
    grads = torch.autograd.grad(o, (q, k, v, ridge), tensors[3].to(o.dtype))
    return dict(zip(NAMES, (o.detach(), *grads)))


def check(
    got: Mapping[str, Tensor],
    tensors: list[Tensor],
    ridge: float | Tensor,
    only: Sequence[str] = NAMES,
    **options: Any,
) -> None:
    """Whether ``step(tensors, ridge, **options)`` may have given ``got``: the error budget of these very numbers."""
    q = tensors[0]
    rows = torch.as_tensor(ridge).float().expand(q.shape[:-1])
    leaves = dict(zip(("q", "k", "v", "ridge_lambda", "grad_o"), (*tensors[:3], rows, tensors[3]), strict=True))
    batch, heads, length, dim = q.shape
    masks = {"scale": options.get("qk_scale"), "causal": options.get("causal", True)}
    case = Case("kernels", batch, heads, length, dim, ridge="per_head_and_token", **masks)
    allowed = budget_of(case, leaves, q.dtype, iterative=True, truncates=os.environ.get("TRITON_INTERPRET") == "1")
    gradients = {"q": got["dq"], "k": got["dk"], "v": got["dv"], "ridge_lambda": got["dridge"]}
    worst = zip(NAMES, allowed.worst(got["o"], gradients).values(), strict=True)
    over = {name: str(excess) for name, excess in worst if name in only and not excess.ratio <= 1}
    assert not over, f"error over budget: {over}"
