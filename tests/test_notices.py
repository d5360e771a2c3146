"""Warnings: of solvers that stopped early and of NaN, once each."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch

import flashlla
from flashlla import lla_attention, notices
from flashlla.solvers.base import warn_unconverged
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("backend", "solver", "spread", "ridge"),
    [("naive", None, 4, 1e-12), ("chunked", "direct", 2, 1e-4), ("chunked", None, 2, 1e-4)],
)
def test_a_solution_that_is_none_is_not_called_converged(backend, solver, spread, ridge):
    """Keys of very unequal spread and a tiny ridge: more than the precision can do, float64 under naive, whoever
    solves."""
    q, k, v = qkv(1, 60, 8)
    k = k * torch.logspace(spread, -spread, 8)
    scale = 10.0 ** -(4 + spread)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        _, info = lla_attention(
            q, k, v, ridge_lambda=ridge, qk_scale=scale, solver=solver, backend=backend, return_info=True
        )
    assert not info.converged.all()
    assert info.residual[~info.converged].max() > 1e-6


def test_early_stops_are_told_once_and_again_where_they_are_worse():
    q, k, v = qkv(1, 60, 8)
    call = lambda ridge: lla_attention(q, k, v, ridge_lambda=ridge, backend="chunked", cg_max_iters=2)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        call(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(0.1)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        call(1e-5)


def test_nan_from_finite_inputs_is_not_silent():
    q, k, v = qkv(1, 9, 4)
    with pytest.warns(flashlla.ConvergenceWarning, match="NaN on"):
        o = lla_attention(q, k, v, ridge_lambda=torch.full((9,), 1e-38), qk_scale=1e20, solver="cg", backend="chunked")
    assert not o.isfinite().all()


def test_nan_is_told_after_residuals_near_one_and_the_other_way_round():
    nan, near_one = torch.full((3,), torch.nan), torch.full((3,), 1.2)
    for first, second in ((nan, near_one), (near_one, nan)):
        notices.forget()
        for residuals in (first, second):
            with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
                warn_unconverged(flashlla.CG(), residuals, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unconverged(flashlla.CG(), nan, 9)


@dataclass(frozen=True)
class Tired(flashlla.Solver):
    """Does not converge on right-hand sides of unit length, which those of the backward pass are."""

    def solve(self, systems, b):
        solution = flashlla.CG(max_iters=100).solve(systems, b)
        return solution._replace(converged=(b.norm(dim=-1) - 1).abs() > 1e-5)


def test_backward_says_that_it_stopped_early():
    q, k, v = (t.requires_grad_() for t in qkv(1, 60, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = lla_attention(q, k, v, solver=Tired(), backend="chunked")
    with pytest.warns(flashlla.ConvergenceWarning, match="Tired stopped early in the backward pass on 5"):
        o.sum().backward()


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (flashlla.Direct(), r"1 of 2 queries.*\. Try a larger ridge_lambda or float64"),
        (flashlla.CG(), r"Try more iterations .*, solver='direct', a larger ridge_lambda or float64"),
    ],
)
def test_what_to_try_where_a_solver_stopped_early(solver, words):
    """Where Direct stops, CG would, too."""
    with pytest.warns(flashlla.ConvergenceWarning, match=words):
        warn_unconverged(solver, torch.tensor([0.5]), 2)
