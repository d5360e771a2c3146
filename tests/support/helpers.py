"""Short ways to call backends, for tests of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla.api import prepared
from flashlla.backends.base import Backend
from flashlla.covariance import Systems
from flashlla.dispatch import all_backends
from flashlla.problem import Inputs, Problem, describe
from tests.support.interpreter import hasten

BACKENDS = [pytest.param(backend, id=backend.name) for backend in all_backends()]
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
]


DTYPE_ORDER = (torch.float32, torch.bfloat16, torch.float16)


def interpreted(backend: Backend) -> bool:
    """Whether its kernels run in Triton's interpreter: right, but a thousand times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1" and "triton" in type(backend).__module__


def turn(backend: Backend, at: int) -> torch.dtype | None:
    """The dtype whose turn it is at case number ``at``; None at every other case, which are those of a sibling."""
    sibling = [param.id for param in BACKENDS].index(backend.name)
    return DTYPE_ORDER[at // 2 % len(DTYPE_ORDER)] if (at + sibling) % 2 else None


if any(interpreted(backend) and backend.unavailable() is None for backend in all_backends()):
    hasten()


def refusal(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> str | None:
    """Why ``backend`` cannot take the call (of ``op`` among the keywords); None where it can."""
    return flashlla.explain(q, k, v, **keywords, backend=backend.name).reasons[backend.name]


def skip_if_refused(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    if reason := refusal(backend, q, k, v, **keywords):
        pytest.skip(f"{backend.name}: {reason}")


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, op: Callable[..., Any] | None = None, **keywords: Any
) -> tuple[Problem, Inputs]:
    """What a backend is called with."""
    arguments = prepared(op, "problem_of", q, k, v, **keywords).arguments
    return describe(arguments), arguments.inputs


def differentiable(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of ``leaves`` that want gradients, all but "grad_o"."""
    return {name: t.detach().clone().requires_grad_() if name != "grad_o" else t.detach() for name, t in leaves.items()}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_indefinite(monkeypatch: pytest.MonkeyPatch, ridge: float) -> None:
    """The matrices of the queries whose ridge is ``ridge`` get an eigenvalue of at most -1, whatever is rounded."""
    dense = Systems.dense

    def spoilt(systems: Systems) -> Tensor:
        matrices = dense(systems)
        matrices[..., 0, 0].masked_fill_(systems.ridge == ridge, -1.0)
        return matrices

    monkeypatch.setattr(Systems, "dense", spoilt)


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v, all of one shape."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return q, k, v


def cu(*edges: int, **keywords: Any) -> Tensor:
    """cu_seqlens."""
    return torch.tensor(edges, **{"dtype": torch.int32, **keywords})
