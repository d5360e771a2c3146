"""Gradients against finite differences, in float64, through every way that tensors can be handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, Direct
from flashlla.backends.base import Backend
from tests.support.helpers import BACKENDS, normal, table, taking

# A finite difference needs the function itself to 1e-12 or so.
SOLVERS = {
    "cg": CG(atol=0.0, rtol=1e-29, max_iters=200),
    "pcg": PCG(atol=0.0, rtol=1e-29, max_iters=200),
    "direct": Direct(),
}

# name: (shapes of what is differentiated, how q, k, v and the ridge are made of it)
Views = Callable[..., tuple[Tensor, Tensor, Tensor, "Tensor | float"]]
ARRANGEMENTS: dict[str, tuple[list[tuple[int, ...]], Views]] = {
    "bsd": ([(2, 5, 3)] * 3 + [(2, 5)], lambda q, k, v, r: (q, k, v, r)),
    "bhsd": ([(1, 2, 6, 3)] * 3 + [(1, 2, 6)], lambda q, k, v, r: (q, k, v, r)),
    "ridge_scalar": ([(1, 6, 3)] * 3 + [()], lambda q, k, v, r: (q, k, v, r)),
    "ridge_per_head": ([(2, 2, 4, 3)] * 3 + [(2, 1)], lambda q, k, v, r: (q, k, v, r)),
    "ridge_per_token": ([(2, 2, 4, 3)] * 3 + [(1, 4)], lambda q, k, v, r: (q, k, v, r)),
    "number": ([(1, 7, 3)] * 3, lambda q, k, v: (q, k, v, 0.3)),
    "transposed": (
        [(1, 5, 2, 3)] * 3 + [(5, 2)],
        lambda q, k, v, r: (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), r.mT),
    ),
    "strided": (
        [(1, 2, 9, 5)] * 3 + [(2, 9)],
        lambda q, k, v, r: (q[:, :, ::2, 1::2], k[:, :, ::2, 1::2], v[:, :, ::2, ::3], r[:, ::2]),
    ),
    "expanded": (
        [(1, 1, 5, 3), (2, 1, 5, 3), (1, 2, 5, 3), (1,)],
        lambda q, k, v, r: (q.expand(2, 2, 5, 3), k.expand(2, 2, 5, 3), v.expand(2, 2, 5, 3), r.expand(2, 2, 5)),
    ),
    "one_tensor": ([(1, 6, 3), (1, 6)], lambda x, r: (x, x, x, r)),
    "one_token": ([(1, 2, 1, 3)] * 3 + [(1, 2, 1)], lambda q, k, v, r: (q, k, v, r)),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@table(
    "backend solver", BACKENDS, SOLVERS, when=lambda backend, solver: backend in taking(torch.float64, solver=solver)
)
def test_gradcheck(backend: Backend, solver: str, arrangement: str) -> None:
    shapes, arrange = ARRANGEMENTS[arrangement]
    leaves = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    if arrangement != "number":
        leaves[-1] = leaves[-1].mul(0.3).exp()  # the ridge
    leaves = [t.requires_grad_() for t in leaves]
    options: dict[str, Any] = {"solver": SOLVERS[solver], "delta_eps": 0.0}

    def attention(*given: Tensor) -> Tensor:
        q, k, v, ridge = arrange(*given)
        return flashlla.lla_attention(q, k, v, ridge_lambda=ridge, backend=backend.name, **options)

    assert torch.autograd.gradcheck(attention, leaves, atol=1e-7, rtol=1e-5)
