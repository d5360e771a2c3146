"""Forward and backward time of each backend and solver: `make bench`.

The cases are of the kind the tests use (tests/support/cases.py), longer. A backend that cannot take one is skipped with
its reason; one that runs in an emulator here is not timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import dispatch
from tests.support.cases import Case

SIZES = (
    Case("short", batch=1, heads=4, length=256, dim=64, ridge_lambda=10.0),
    Case("short_weak", batch=1, heads=4, length=256, dim=64, ridge_lambda=0.1),
    Case("long", length=1024, dim=64, ridge_lambda=10.0),
    Case("long_weak", length=1024, dim=64, ridge_lambda=0.1),
    Case("long_correlated", length=1024, dim=64, ridge_lambda=0.1, data="correlated"),
    Case("narrow", heads=4, length=1024, dim=16, ridge_lambda=0.1),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("solver", ["cg", "pcg", "direct"])
@pytest.mark.parametrize("backend", [b.name for b in dispatch.all_backends()])
@pytest.mark.parametrize("case", SIZES, ids=[case.name for case in SIZES])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.filterwarnings("ignore::flashlla.ConvergenceWarning")
def test_time(benchmark: Any, case: Case, backend: str, solver: str, direction: str) -> None:
    if dispatch.backend_named(backend).emulated():
        pytest.skip("it runs in an emulator here")
    benchmark.group = f"{direction} {case.name}"
    leaves = {name: t.requires_grad_(name != "grad_o") for name, t in case.make(DTYPE, DEVICE).items()}
    q, k, v = case.arrange(leaves)
    options = {**case.keywords(leaves), "backend": backend, "solver": solver}
    told = flashlla.explain(q, k, v, **options)
    if told.backend is None:
        pytest.skip(str(told.reasons[backend]))

    def forward() -> Tensor:
        o: Tensor = flashlla.lla_attention(q, k, v, **options)
        synchronise()
        return o

    if direction == "forward":
        benchmark.pedantic(forward, rounds=5, warmup_rounds=1)
        return
    o = forward()

    def backward() -> None:
        torch.autograd.grad(o, (q, k, v), leaves["grad_o"], retain_graph=True)
        synchronise()

    benchmark.pedantic(backward, rounds=5, warmup_rounds=1)
