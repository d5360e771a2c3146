"""Every backend, with every solver, over the one table of cases, against the oracle and the error budget.

A backend or a case is added without a line here. A backend may refuse a case, and says why; it may not refuse all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, Direct
from flashlla.backends.base import Backend
from flashlla.backends.naive import Naive
from flashlla.dispatch import all_backends
from flashlla.problem import accumulator, resolution
from tests.support.budget import ALLOWANCE, OPERAND, budget
from tests.support.cases import BY_NAME, CASES, LAYOUTS, Case
from tests.support.helpers import (
    BACKENDS,
    DEVICES,
    DTYPES,
    called,
    differentiable,
    every_backend,
    interpreted,
    skip_if_refused,
    table,
    turn,
)

# Tolerances are raised to what the dtype resolves; the caps are out of reach.
SOLVERS: dict[str, dict[str, Any]] = {
    "default": {"cg_atol": 0.0, "cg_rtol": 0.0, "cg_max_iters": 1000},
    "cg": {"solver": CG(atol=0.0, rtol=0.0, max_iters=1000)},
    "pcg": {"solver": PCG(atol=0.0, rtol=0.0, max_iters=1000)},
    "gram": {"solver": PCG(atol=0.0, rtol=0.0, max_iters=1000, preconditioner="gram")},
    "direct": {"solver": Direct()},
}

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("error::flashlla.ConvergenceWarning", "error::flashlla.FallbackWarning"),
]


@functools.cache
def refusals(device: str, solver: str, dtype: torch.dtype, case: Case) -> Mapping[str, str | None]:
    """What each backend has against the call."""
    leaves = case.make(dtype, device)
    call = functools.partial(flashlla.explain, *case.arrange(leaves), op=case.op, backend="naive")
    return call(**case.keywords(leaves), **SOLVERS[solver]).reasons


def takes(backend: Backend, device: str, solver: str, dtype: torch.dtype, case: Case) -> bool:
    """What is run: all that a backend does not refuse. The naive one solves alike whatever the solver; in the
    interpreter, small cases in one dtype each, and in float32 where digits are scarce."""
    if isinstance(backend, Naive) and solver != "default":
        return False
    if interpreted(backend):
        scarce = dtype == torch.float32 and case.scarce and backend.name == "triton"
        if solver != "default" or not case.small or not (scarce or dtype == turn(backend, CASES.index(case))):
            return False
    return refusals(device, solver, dtype, case)[backend.name] is None


def quick(backend: Backend, device: str, solver: str, dtype: torch.dtype, case: Case) -> bool:
    """One case of each feature in float32, one with each solver in each dtype; in the interpreter the smallest."""
    if interpreted(backend):
        return case.quick and case.length * case.dim <= 17 * 8
    return case.quick and (case.name == "length_17" or (solver == "default" and dtype == torch.float32))


@table("backend device solver dtype case", BACKENDS, DEVICES, SOLVERS, DTYPES, CASES, when=takes, quick=quick)
def test_against_oracle(backend: Backend, device: str, solver: str, dtype: torch.dtype, case: Case) -> None:
    leaves = differentiable(case.make(dtype, device))
    keywords = {**case.keywords(leaves), **SOLVERS[solver]}

    q, k, v = case.arrange(leaves)
    o, info = case.op(q, k, v, **keywords, backend=backend.name, return_info=True)
    o.backward(leaves["grad_o"])

    assert o.dtype == dtype
    assert o.device.type == device
    gradients = {name: _gradient(leaf) for name, leaf in leaves.items() if name != "grad_o"}
    allowed = budget(case, dtype, iterative=solver != "direct", truncates=interpreted(backend))
    worst = allowed.worst(o, gradients)
    over = {name: str(excess) for name, excess in worst.items() if not excess.ratio <= 1}
    assert not over, f"error over budget: {over}"
    _check_info(info, backend.name, q, dtype, solver, allowed.reference.omega, case)


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    assert leaf.grad.dtype == leaf.dtype
    return leaf.grad


def _check_info(
    info: flashlla.LLAInfo, name: str, q: Tensor, dtype: torch.dtype, solver: str, omega: Tensor, case: Case
) -> None:
    rows = q.shape[:-1]
    assert info.backend == name
    assert [t.shape for t in info[:4]] == [rows] * 4
    dtypes = [info.iterations.dtype, info.residual.dtype, info.converged.dtype, info.omega.dtype]
    assert dtypes == [torch.int32, accumulator(dtype), torch.bool, accumulator(dtype)]
    assert info.converged.all()
    assert (info.iterations >= 0).all()
    if solver == "direct":
        assert (info.iterations == 0).all()
    else:
        assert (info.iterations < 1000).all()
        assert (info.residual >= 0).all()
    # A residual computed afresh is rounded: by some roundings of |A| |z| / |d|, which is at most |A| / lambda. Kernels
    # may stop a factor of two earlier on bfloat16 inputs: the budget, which knows nothing of it, is the judge.
    slack = 2 if dtype == torch.bfloat16 else 1
    leaves = case.make(torch.float64)
    keys = LAYOUTS[case.layout].wide(case.arrange(leaves)[1]).nan_to_num()  # NaN beyond a length
    spread = (keys - keys[..., :1, :]).norm(dim=-1).amax() ** 2
    condition = 1 + float(spread) / float(torch.as_tensor(case.keywords(leaves)["ridge_lambda"]).min())
    assert (info.residual <= slack * resolution(dtype) + 4 * torch.finfo(accumulator(dtype)).eps * condition).all()
    # A logit's error is some roundings of |q| |k|, and a weight's relative error is that.
    scale = abs(q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    k = case.arrange(case.make(dtype))[1].nan_to_num()
    longest = q.detach().nan_to_num().double().norm(dim=-1).amax() * k.double().norm(dim=-1).amax()
    allowed = ALLOWANCE * OPERAND[dtype] * (1 + scale * float(longest)) * keys.shape[-2] ** 0.5
    error = ((info.omega.cpu().double() - omega) / omega.clamp(min=1)).abs().max()  # 0 where no key is seen
    assert error <= allowed, f"omega: relative error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.quick
@pytest.mark.parametrize("backend", all_backends(), ids=called)
def test_some_case_is_taken(backend: Backend) -> None:
    """In every dtype but float64, which kernels may leave to others."""
    if reason := backend.unavailable():
        pytest.skip(f"{backend.name}: {reason}")
    for dtype in DTYPES[1:]:
        rows = itertools.product([backend], DEVICES, SOLVERS, [dtype], CASES)
        assert any(takes(*row) for row in rows), f"{backend.name} refuses every case in {dtype}"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=called)
@pytest.mark.parametrize("name", ["length_63", "everything"])
def test_naive_solves_alike_whatever_the_solver(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    results = []
    for solver in ("default", "cg", "pcg", "direct"):
        leaves = differentiable(case.make(dtype))
        o = case.op(*case.arrange(leaves), **case.keywords(leaves), **SOLVERS[solver], backend="naive")
        o.backward(leaves["grad_o"])
        results.append([o, *(_gradient(leaf) for leaf in leaves.values() if leaf.requires_grad)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.quick
@every_backend
def test_nothing_asked_for(backend: Backend) -> None:
    """With all arguments at their defaults, and no gradient wanted of some."""
    case = next(c for c in CASES if c.name == "length_17")
    leaves = case.make(torch.float32)
    q, k, v = case.arrange(leaves)
    skip_if_refused(backend, q, k, v)
    v.requires_grad_()
    with flashlla.set_backend(backend.name):
        o = flashlla.lla_attention(q, k, v, ridge_lambda=case.ridge_lambda)
    o.backward(leaves["grad_o"])
    assert q.grad is None
    exact = budget(case, torch.float32, iterative=True)
    assert exact.worst(o, {"q": torch.zeros_like(q), "k": torch.zeros_like(k), "v": v.grad})["v"].ratio <= 1
    assert exact.worst(o, {"q": torch.zeros_like(q), "k": torch.zeros_like(k), "v": v.grad})["o"].ratio <= 1
