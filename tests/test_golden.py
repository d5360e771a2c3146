"""The reference values in tests/data/lla_f64.npz: inputs, outputs and gradients in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, Direct
from flashlla.backends.base import Backend
from flashlla.backends.naive import Naive
from tests.support.budget import Excess, allowance, spreads
from tests.support.helpers import IN_PYTORCH, called, problem_of, taking
from tests.support.rounding import EXACT, Rounding, disturbed

pytestmark = pytest.mark.quick

_FILE = Path(__file__).parent / "data" / "lla_f64.npz"
GOLDEN: dict[str, dict[str, Tensor]] = {}
with np.load(_FILE) as _archive:
    for _key in _archive.files:
        _case, _name = _key.split("/")
        GOLDEN.setdefault(_case, {})[_name] = torch.from_numpy(_archive[_key])

INPUTS = ("q", "k", "v", "ridge_lambda")
SOLVERS = {
    "cg": CG(atol=0.0, rtol=1e-28, max_iters=1000),
    "pcg": PCG(atol=0.0, rtol=1e-28, max_iters=1000),
    "direct": Direct(),
}
# Hard enough for float32 that rounding costs more than 1e-5.
ILL_CONDITIONED = {"weak_ridge"}


def _run(case: str, backend: Backend, solver: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients, by the file's names; a gradient that the file lacks is left out."""
    data = GOLDEN[case]
    leaves = {name: data[name].to(dtype, copy=True).requires_grad_() for name in INPUTS}
    keywords: dict[str, Any] = {
        "ridge_lambda": leaves["ridge_lambda"],
        "qk_scale": float(data["qk_scale"]),
        "delta_eps": float(data["delta_eps"]),
        "solver": SOLVERS[solver],
    }
    q, k, v = (leaves[name] for name in INPUTS[:3])
    o, info = flashlla.lla_attention(q, k, v, **keywords, backend=backend.name, return_info=True)
    o.backward(data["grad_o"].to(dtype))
    assert info.converged.all()
    if "omega" in data:
        torch.testing.assert_close(info.omega.unsqueeze(-1), data["omega"].to(info.omega.dtype))
    return {"o": o.detach(), **{f"grad_{name}": leaves[name].grad for name in INPUTS}}


def _relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact result; the norm of the error where that vanishes."""
    size = float(exact.norm())
    return float((got.double() - exact).norm()) / (size or 1.0)


def _evaluate(case: str, rounding: Rounding = EXACT, draws: int = 1) -> list[list[Tensor]]:
    """The naive backend's results in float64 on the inputs rounded to float32, disturbed so many times."""
    data = {name: t.float().double() for name, t in GOLDEN[case].items()}
    many = lambda t: t.unsqueeze(1).repeat(1, draws, *(1,) * (t.dim() - 1))
    q, k, v, ridge, grad_o = (many(data[name]) for name in (*INPUTS, "grad_o"))
    settings = {name: float(GOLDEN[case][name]) for name in ("qk_scale", "delta_eps")}
    problem, inputs = problem_of(q, k, v, ridge_lambda=ridge, **settings)

    def step() -> tuple[Tensor, ...]:
        result = Naive().forward(problem, inputs)
        return result.o, *Naive().backward(problem, inputs, result.residuals, grad_o)

    return [list(each) for each in zip(*(t.unbind(1) for t in disturbed(step, rounding, (q, k, v, ridge, grad_o))))]


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", taking(torch.float64), ids=called)
def test_float64(backend: Backend, solver: str, case: str, figure: Callable[[str], None]) -> None:
    got = _run(case, backend, solver, torch.float64)
    errors = {name: _relative(t, GOLDEN[case][name]) for name, t in got.items() if name in GOLDEN[case]}
    figure(f"golden float64  {case:<21} {backend.name:<11} {solver:<7} " + _show(errors))
    for name, error in errors.items():
        assert error <= (1e-10 if name == "o" else 1e-9), f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("backend", IN_PYTORCH, ids=called)
def test_float32(backend: Backend, solver: str, case: str, figure: Callable[[str], None]) -> None:
    """Within 1e-5 of float64 on the same rounded inputs: a promise of the two that compute in PyTorch. Where a weak
    ridge lets the rounding of one intermediate cost more, and for other backends, the error budget says what is owed.
    """
    (exact,) = _evaluate(case)
    got = _run(case, backend, solver, torch.float32)
    errors = {name: _relative(t, wanted) for (name, t), wanted in zip(got.items(), exact, strict=True)}
    figure(f"golden float32  {case:<21} {backend.name:<11} {solver:<7} " + _show(errors))
    if case not in ILL_CONDITIONED:
        assert max(errors.values()) <= 1e-5, errors
        return
    known = spreads(functools.partial(_evaluate, case), exact)
    for i, (name, t) in enumerate(got.items()):
        allowed = allowance(exact[i], {kind: of[i] for kind, of in known.items()}, torch.float32, solver != "direct")
        excess = Excess.of(t, exact[i], allowed)
        assert excess.ratio <= 1, f"{name}: {excess}"


def _show(errors: dict[str, float]) -> str:
    return "  ".join(
        f"{name.removeprefix('grad_').replace('ridge_lambda', 'ridge')} {e:.0e}" for name, e in errors.items()
    )
