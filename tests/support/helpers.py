"""Short ways to call backends, for tests of every kind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla.backends.base import Backend
from flashlla.calls import prepared
from flashlla.covariance import Systems
from flashlla.dispatch import all_backends
from flashlla.problem import Inputs, Problem, describe
from tests.support.interpreter import hasten

BACKENDS = [backend for backend in all_backends() if backend.unavailable() is None]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def interpreted(backend: Backend) -> bool:
    """Whether its kernels run in Triton's interpreter: right, but a thousand times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1" and "triton" in type(backend).__module__


def turn(backend: Backend, at: int) -> torch.dtype | None:
    """The dtype whose turn it is at case number ``at``; None at every other case, which are those of a sibling."""
    order = (torch.float32, torch.bfloat16, torch.float16)
    return order[at // 2 % len(order)] if (at + BACKENDS.index(backend)) % 2 else None


def called(value: object) -> str:
    """What a value is called in the name of a test."""
    return str(getattr(value, "name", value)).removeprefix("torch.")


def table(
    names: str, *axes: Iterable[Any], when: Callable[..., object], quick: Callable[..., object] = lambda *_: False
) -> pytest.MarkDecorator:
    """A test for every combination of ``axes`` that ``when`` lets through: what cannot run is not collected.

    quick: which of them take part in `make quick`. Those whose device is "cuda" need a GPU.
    """
    rows = []
    for values in itertools.product(*axes):
        if when(*values):
            marks = [pytest.mark.gpu] if "cuda" in values else []
            marks += [pytest.mark.quick] if quick(*values) else []
            rows.append(pytest.param(*values, id="-".join(map(called, values)), marks=marks))
    assert rows, f"no combination of {names} is let through"
    return pytest.mark.parametrize(names.split(), rows)


every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=called)
IN_PYTORCH = [backend for backend in BACKENDS if backend.name in ("naive", "chunked")]


if any(interpreted(backend) and backend.unavailable() is None for backend in all_backends()):
    hasten()


def refusal(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> str | None:
    """Why ``backend`` cannot take the call (of ``op`` among the keywords); None where it can."""
    return flashlla.explain(q, k, v, **keywords, backend=backend.name).reasons[backend.name]


def taking(dtype: torch.dtype, **keywords: Any) -> list[Backend]:
    """The backends that take a plain call in ``dtype`` on the CPU."""
    q = torch.zeros(1, 4, 4, dtype=dtype)
    return [backend for backend in BACKENDS if refusal(backend, q, q, q, **keywords) is None]


def skip_if_refused(backend: Backend, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> None:
    if reason := refusal(backend, q, k, v, **keywords):
        pytest.skip(f"{backend.name}: {reason}")


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, op: Callable[..., Any] | None = None, **keywords: Any
) -> tuple[Problem, Inputs]:
    """What a backend is called with."""
    arguments = prepared(op, flashlla.explain, q, k, v, **keywords).arguments
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
