"""The solve kernel: CG with and without a preconditioner, its last step, and what it tells."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import flashlla
from benchmarks.launches import recorded
from flashlla import CG, lla_attention
from flashlla.problem import Inputs, Mask, Problem
from tests.support.cases import DATA
from tests.support.kernels import check, interpreted, make, step


@pytest.mark.quick
@interpreted
@pytest.mark.parametrize("solver", ["cg", "pcg"])
@pytest.mark.parametrize("backend", ["triton", "triton_pcg"])
def test_solvers(backend: str, solver: str) -> None:
    tensors = make((1, 1, 40, 8), torch.float32)
    if backend == "triton_pcg" and solver == "cg":
        with pytest.raises(flashlla.UnsupportedError, match="fuses the solver PCG"):
            step(tensors, 0.1, backend=backend, solver=solver)
        return
    check(step(tensors, 0.1, backend=backend, solver=solver), tensors, 0.1)


@pytest.mark.quick
@interpreted
def test_how_the_solve_went() -> None:
    q, k, v, _ = make((1, 1, 40, 8), torch.float32)
    _, info = lla_attention(q, k, v, ridge_lambda=0.1, backend="triton", return_info=True)
    assert info.converged.all()
    assert 0 < info.iterations[0, 0, -1] <= 32
    assert info.iterations[0, 0, 0] == 1  # A = lambda I
    assert (info.residual <= 2e-6).all()
    _, info = lla_attention(q, k, v, ridge_lambda=0.1, backend="triton", return_info=True, cg_max_iters=2)
    assert info.iterations.max() == 2
    assert not info.converged.all()


@interpreted
def test_a_tolerance_of_0_is_all_that_bfloat16_tells() -> None:
    q, k, v, _ = make((1, 1, 200, 12), torch.bfloat16)
    call = lambda **options: lla_attention(q, k, v, ridge_lambda=0.1, backend="triton", return_info=True, **options)[1]
    usual, close = call(), call(tolerance=0.0)
    assert usual.residual[..., 24:].max() > 1e-3  # of queries that see more than 2 D keys
    assert close.residual.max() <= 1e-3
    assert usual.converged.all()
    assert close.converged.all()
    assert close.iterations.sum() > usual.iterations.sum()


@interpreted
@pytest.mark.parametrize(
    ("data", "guess", "most"),
    [
        ("iid", True, 0.9),
        ("iid", False, 0.95),
        ("power_law", True, 1.0),
        ("power_law", False, 1.0),
        ("sharp", True, 1.0),
    ],
)
def test_a_last_step_saves_iterations_and_costs_no_accuracy(
    monkeypatch: pytest.MonkeyPatch, data: str, guess: bool, most: float
) -> None:
    """(4.7): as good as what CG's tolerance allows, and converged by its own account, though iterations are saved."""
    import triton.language as tl

    from flashlla.backends.triton import configs, solve

    monkeypatch.setattr(configs, "FEW_KEYS", 0 if guess else 200)
    q, k = (torch.from_numpy(t).bfloat16() for t in DATA[data](np.random.default_rng(0), (1, 1, 200, 12)))
    tensors = [q, k, *make((1, 1, 200, 12), torch.bfloat16)[2:]]
    want = step([t.double() for t in tensors], 10.0, backend="naive")

    def call() -> tuple[float, float]:
        info = lla_attention(*tensors[:3], ridge_lambda=10.0, backend="triton", solver="cg", return_info=True)[1]
        assert info.converged.all()
        got = step(tensors, 10.0, backend="triton", solver="cg")
        error = max(((got[n] - want[n]).norm() / want[n].norm()).item() for n in ("o", "dq", "dk", "dv", "dridge"))
        return info.iterations.float().mean().item(), error

    iterations, error = call()
    monkeypatch.setattr(solve, "LAST_MOST", tl.constexpr(0.0))
    plain_iterations, plain_error = call()
    assert error < 1.2 * plain_error
    assert iterations <= most * plain_iterations


@interpreted
def test_a_last_step_is_not_taken_on_the_word_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one query, of one query many times, and such as need no sweep, are what they are without it."""
    import triton.language as tl

    from flashlla.backends.triton import solve

    q, k = (torch.from_numpy(t).bfloat16() for t in DATA["power_law"](np.random.default_rng(1), (1, 24, 193, 16)))
    v = make((1, 24, 193, 16), torch.bfloat16)[2]
    flat = k.clone()
    flat[..., 0] = 0
    away = torch.zeros_like(q)
    away[..., 0] = 2000 * (1 + 0.1 * torch.rand(q.shape[:-1]))

    def outputs() -> list[torch.Tensor]:
        cases = (
            (q[:, :, -1:], k, 1.0),
            (q[:, :, -1:].expand(-1, -1, 64, -1), k, 1.0),
            (away[:, :2], flat[:, :2], 0.01),
        )
        return [
            lla_attention(q, k, v[:, : k.shape[1]], ridge_lambda=ridge, causal=False, backend="triton", solver="cg")
            for q, k, ridge in cases
        ]

    found = outputs()
    monkeypatch.setattr(solve, "LAST_MOST", tl.constexpr(0.0))
    (one, same, none), (plain_one, plain_same, plain_none) = found, outputs()
    assert torch.equal(one, plain_one)
    assert torch.equal(none, plain_none)
    far = (same - plain_same).double().norm(dim=-1) / plain_same.double().norm(dim=-1)
    assert far.max() < 5e-3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "preconditioner", "guessed"),
    [
        ({}, "none", False),
        ({"q_len": 1025, "k_len": 1025}, "none", True),
        ({"q_len": 1025, "k_len": 1025, "mask": Mask(window=1024)}, "none", False),
        ({"dtype": torch.float32}, "none", False),
        ({"dtype": torch.float32, "q_len": 1025, "k_len": 1025}, "jacobi", False),
        ({"dtype": torch.float32}, "gram", False),
        ({}, "jacobi", True),
        ({}, "gram", True),
    ],
)  # fmt: skip
def test_a_first_guess_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], preconditioner: str, guessed: bool
) -> None:
    from flashlla.backends.triton import launch

    monkeypatch.setenv("FLASHLLA_HOPPER", "0")  # Gluon's forward pass, in one, makes none
    problem = Problem(1, 2, 2, 1024, 1024, 64, 64, torch.bfloat16, torch.device("meta"), 0.3, 1e-12, CG())
    problem = dataclasses.replace(problem, **changes)
    q = torch.empty(1, 2, problem.q_len, 64, dtype=problem.dtype, device="meta")
    ridge = torch.empty(1, 2, problem.q_len, device="meta")
    with recorded(carried_out=False) as found:
        launch.forward(problem, Inputs(q, q, q, ridge), preconditioner)
    for made in found:
        given = dict(zip(made.kernel.arg_names, made.arguments))
        if made.name == "statistics":
            assert (given["image_out"] is not None) == (guessed or preconditioner == "gram")
        if made.name == "solve":
            assert (given["b_ptr"] is not None) == guessed
    assert {"statistics", "solve"} <= {made.name for made in found}
