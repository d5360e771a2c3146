"""Any backend runs the backward of any other's forward: what forward leaves has one meaning for all."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla.backends.base import Backend
from flashlla.backends.naive import Naive
from flashlla.problem import Inputs, Problem, accumulator
from flashlla.solvers import CG
from tests.support.budget import ALLOWANCE, OPERAND, Excess, budget
from tests.support.cases import BY_NAME, LAYOUTS
from tests.support.helpers import BACKENDS, DTYPES, interpreted, problem_of, table

# Several heads, odd lengths, a strong guard, keys far from the origin; all with q, k and v apart, as (B, H, S, D).
NAMES = ("length_7", "guard_large", "offset", "one_token_weak")
PACKED = ("varlen_keys",)
CASES = [BY_NAME[name] for name in (*NAMES, *PACKED)]
SOLVER = CG(atol=0.0, rtol=0.0, max_iters=1000)


@functools.cache
def _call(name: str, dtype: torch.dtype) -> tuple[Problem, Inputs, Tensor]:
    case = BY_NAME[name]
    assert case.layout in ("bhsd", "transposed")
    leaves = case.make(dtype)
    problem, inputs = problem_of(*case.arrange(leaves), op=case.op, **case.keywords(leaves), solver=SOLVER)
    return problem, inputs, leaves["grad_o"]


def takes(*row: Any) -> bool:
    """Whether the backends, which come before a dtype and a case's name, can; in the interpreter float32 alone."""
    *backends, dtype, name = row
    if any(map(interpreted, backends)) and (dtype != torch.float32 or name == "offset"):
        return False
    problem, *_ = _call(name, dtype)
    return not any(backend.unsupported(problem) for backend in backends)


@pytest.mark.usefixtures("poisoned_memory")
@table(
    "forward backward dtype name",
    BACKENDS,
    BACKENDS,
    DTYPES,
    [*NAMES, *PACKED],
    when=takes,
    quick=lambda forward, backward, dtype, name: dtype == torch.float32 and name == "length_7" and forward != backward,
)
def test_backward_of_anothers_forward(forward: Backend, backward: Backend, dtype: torch.dtype, name: str) -> None:
    problem, inputs, grad_o = _call(name, dtype)
    o, residuals, _ = forward.forward(problem, inputs)
    gradients = backward.backward(problem, inputs, residuals, grad_o)
    allowed = budget(BY_NAME[name], dtype, iterative=True)
    found = allowed.worst(
        o, {"q": gradients.q, "k": gradients.k, "v": gradients.v, "ridge_lambda": gradients.ridge_lambda}
    )
    over = {key: str(excess) for key, excess in found.items() if not excess.ratio <= 1}
    assert not over, f"forward by {forward.name}, backward by {backward.name}: {over}"


@pytest.mark.usefixtures("poisoned_memory")
@table("backend dtype name", BACKENDS, DTYPES, NAMES, when=takes)
def test_residuals_have_one_layout(backend: Backend, dtype: torch.dtype, name: str) -> None:
    problem, inputs, _ = _call(name, dtype)
    _, residuals, _ = backend.forward(problem, inputs)
    rows = (problem.batch, problem.q_heads, problem.q_len)
    shapes = [rows, rows, (*rows, problem.head_dim), (*rows, problem.head_dim)]
    assert [tuple(t.shape) for t in residuals] == shapes
    assert all(t.dtype == accumulator(dtype) for t in residuals)
    wide = (t.double() for t in inputs[:4])
    exact = Naive().forward(replace(problem, dtype=torch.float64), Inputs(*wide, *inputs[4:])).residuals
    q, k = inputs.q.double().norm(dim=-1).amax(), inputs.k.double().norm(dim=-1).amax()
    # Logits err by roundings of |s| |q| |k|, weights by that much of themselves, a mean of keys by that much of a key.
    logit = 1 + abs(problem.scale) * float(q * k)
    rounding = ALLOWANCE * OPERAND[dtype] * math.sqrt(problem.k_len)
    assert (residuals.lse.double() - exact.lse).abs().max() <= rounding * logit
    assert (residuals.k_mean.double() - exact.k_mean).norm(dim=-1).max() <= rounding * logit * float(k)
    # The probe and the guard: as the output and its gradient show, which the budget judges; here that they are theirs.
    assert Excess.of(residuals.probe, exact.probe, 0.1 * exact.probe.norm(dim=-1) + 0.1).ratio <= 1
    assert (residuals.guard.double() - exact.guard).abs().max() <= 0.01


def test_cases_have_their_heads_apart() -> None:
    assert all(LAYOUTS[case.layout].lacking is None for case in CASES)
