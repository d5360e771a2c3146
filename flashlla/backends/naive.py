"""The oracle: dense, one matrix a query, torch.linalg.solve, in float64 whatever the inputs are. Plain on purpose; for
tests and small inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlla import linalg
from flashlla.backends import dense
from flashlla.backends.frame import Framed
from flashlla.covariance import Systems, dot
from flashlla.problem import Forward, Gradients, Inputs, Problem, Report, Residuals
from flashlla.solvers import CG, Direct, Solution
from flashlla.solvers.base import SOUND


class Naive(Framed):
    name = "naive"
    summary = "dense PyTorch, torch.linalg.solve: the oracle; memory quadratic in length"

    def unsupported(self, problem: Problem) -> str | None:
        if not isinstance(problem.solver, (CG, Direct)):
            return (
                f"it solves exactly by torch.linalg.solve, which stands in for cg, pcg and direct but not for "
                f"{problem.solver.described()}"
            )
        return None

    def forward_plain(self, problem: Problem, inputs: Inputs) -> Forward:
        given, found = whole(problem, inputs)
        q, k, v = given.q, given.k, given.v
        d = dense.offset(found, q, given.origin)
        z = solve(found.systems, d)  # (2.1)
        a = covariate(z, k, found.k_mean)  # (2.2)
        residuals = dense.residuals_of(problem, found, q, d, z, given.origin)
        o = residuals.guard * ((found.p * (1 - a)) @ v)  # (2.3)
        solution = Solution.check(found.systems, d, z, iterations=0, tolerance=SOUND)
        report = Report(found.omega, solution.iterations, solution.residual, solution.converged)
        return dense.as_forward(inputs, o, residuals, report)

    def backward_plain(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        given, found = whole(problem, inputs)
        q, k, v, p, k_mean = given.q, given.k, given.v, found.p, found.k_mean
        grad_o = grad_o.to(q.dtype) * residuals.guard.unsqueeze(-1)
        do, z = (dense.by_key_head(problem, t.to(q.dtype)).flatten(1, 2) for t in (grad_o, residuals.probe))
        a = covariate(z, k, k_mean)  # (2.2)
        g = (do @ v.mT).where(p > 0, 0)  # a hidden value may be too large for the product
        g_mean = (p * g).sum(-1, keepdim=True)
        y = solve(found.systems, moment(p, g, g_mean, k, k_mean))  # (3.1)
        e = error(do, v, g, g_mean, y, k, k_mean)  # (3.2)
        dridge = dot(z, y)  # (3.6)
        moved = (1 - a) * e + given.ridge_lambda.unsqueeze(-1) * dridge  # dl / p
        dq = problem.scale * dense.about_mean(p * moved, k, k_mean) + y  # (3.3)
        dk, dv = of_keys(problem, p, q, k, a, e, moved, do, y, z)
        return dense.as_gradients(problem, inputs, dq, dk, dv, dridge)


def whole(problem: Problem, inputs: Inputs) -> tuple[dense.Operands, dense.Statistics]:
    """All heads, queries and keys at once: q is (H, M, D), ridge_lambda (H, M), the weights (H, M, Sk)."""
    # float64 is what no setting of torch rounds; mps, which has none, rounds float32 by no setting.
    widest = torch.float32 if problem.device.type == "mps" else torch.float64
    given = dense.operands(problem, inputs, widest)
    block = dense.Block(range(given.k.shape[0]), range(problem.q_len), range(problem.k_len))
    rows = given._replace(q=block.rows_of(given.q), ridge_lambda=block.rows_of(given.ridge_lambda))
    hidden = block.hidden(problem, problem.key_spans(inputs))
    return rows, dense.statistics(problem, block, rows.q, rows.k, rows.ridge_lambda, hidden)


def moment(p: Tensor, g: Tensor, g_mean: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """t of (3.1), (H, M, D)."""
    return dense.about_mean(p * (g - g_mean), k, k_mean)


def error(do: Tensor, v: Tensor, g: Tensor, g_mean: Tensor, y: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """e of (3.2), (H, M, Sk)."""
    return g - g_mean - covariate(y, k, k_mean)


def of_keys(
    problem: Problem, p: Tensor, q: Tensor, k: Tensor, a: Tensor, e: Tensor, moved: Tensor, do: Tensor, y: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk of (3.4) and dv of (3.5), (H, Sk, D) and (H, Sk, V)."""
    dk = problem.scale * ((p * moved).mT @ q) - (p * e).mT @ z - (p * (1 - a)).mT @ y
    return dk, (p * (1 - a)).mT @ do


def covariate(x: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """x_i.(k_j - k_mean_i): (H, M, Sk)."""
    return x @ k.mT - dot(x, k_mean)


def solve(systems: Systems, b: Tensor) -> Tensor:
    x: Tensor
    x, info = linalg.solve(systems.dense(), b.unsqueeze(-1))
    if (info != 0).any():
        index = tuple(int(i) for i in (info != 0).nonzero()[0])
        raise systems.not_definite(index, "backend 'naive'", "backend='chunked'")
    return x.squeeze(-1)
