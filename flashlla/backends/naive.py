"""The oracle: dense, one matrix a query, torch.linalg.solve. Plain on purpose; for tests and small inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.backends.base import Backend
from flashlla.covariance import Systems
from flashlla.nonfinite import isolate
from flashlla.problem import (
    Forward,
    Gradients,
    Inputs,
    Problem,
    Report,
    Residuals,
    accumulator,
    empty_output,
    resolution,
)
from flashlla.solvers import CG, Direct
from flashlla.solvers.base import SOUND


class Statistics(NamedTuple):
    """Softmax weights and what section 2 of docs/math.md builds on them; all heads and queries at once."""

    p: Tensor  # (B, H, Sq, Sk)
    m: Tensor  # (B, H, Sq)
    omega: Tensor  # (B, H, Sq)
    k_mean: Tensor  # (B, H, Sq, D)
    systems: Systems


def about_first_key(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` and ``k`` moved together so that the first key is the origin, and that key.

    Moving all keys adds the same to all logits of a query, which its weights do not see; the regression does not
    change when the query moves along. So float32 keeps its digits wherever the caller's keys are.
    """
    origin = k[:, :, :1]  # (B, H, 1, D)
    return q - origin, k - origin, origin


def statistics(q: Tensor, k: Tensor, ridge_lambda: Tensor, problem: Problem) -> Statistics:
    logits = problem.scale * (q @ k.mT)  # (B, H, Sq, Sk)
    visible = problem.mask.visible(range(problem.q_len), range(problem.k_len), problem.q_len, problem.k_len, q.device)
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    m = logits.amax(-1)
    w = (logits - m.unsqueeze(-1)).exp()
    omega = w.sum(-1)
    p = w / omega.unsqueeze(-1)
    k_mean = p @ k
    systems = Systems(k, p, k_mean, ridge_lambda, resolution(problem.dtype))
    return Statistics(p, m, omega, k_mean, systems)


def solve(systems: Systems, b: Tensor) -> Tensor:
    x: Tensor
    x, info = torch.linalg.solve_ex(systems.dense(), b.unsqueeze(-1))
    if (info != 0).any():
        index = tuple(int(i) for i in (info != 0).nonzero()[0])
        raise systems.not_definite(index, "backend 'naive'", "backend='chunked'")
    return x.squeeze(-1)


class Naive(Backend):
    name = "naive"
    summary = "dense PyTorch, torch.linalg.solve: the oracle; memory quadratic in length"

    def unsupported(self, problem: Problem) -> str | None:
        if not isinstance(problem.solver, (CG, Direct)):
            return (
                f"it solves exactly by torch.linalg.solve, which stands in for cg, pcg and direct but not for "
                f"{type(problem.solver).__name__}"
            )
        return None

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        inputs, _, poison = isolate(problem, inputs)
        dtype = accumulator(problem.dtype)
        q, k, v, ridge_lambda = (t.to(dtype) for t in inputs)
        moved_q, k, origin = about_first_key(q, k)
        p, m, omega, k_mean, systems = statistics(q, k, ridge_lambda, problem)
        d = k_mean - moved_q
        z = solve(systems, d)  # (2.1)
        error = (systems.matvec(z) - d).norm(dim=-1)
        a = z @ k.mT - (z * k_mean).sum(-1, keepdim=True)  # (2.2)
        guard = 1 / (1 + problem.delta_eps * (1 + (d * z).sum(-1)) / omega)
        o = empty_output(inputs.q, inputs.v)
        o.copy_(guard.unsqueeze(-1) * ((p * (1 - a)) @ v))  # (2.3)
        residual = torch.where(error == 0, 0, error / d.norm(dim=-1))
        steps = torch.zeros_like(residual, dtype=torch.int32)
        m = m + problem.scale * (q * origin).sum(-1)
        report = Report(omega, steps, residual, residual <= SOUND)
        result = Forward(o, Residuals(m + omega.log(), guard, z, k_mean + origin), report)
        return result if poison is None else poison.forward(result)

    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        inputs, grad_o, poison = isolate(problem, inputs, grad_o)  # type: ignore[assignment]
        dtype = accumulator(problem.dtype)
        q, k, v, ridge_lambda = (t.to(dtype) for t in inputs)
        _, k, _ = about_first_key(q, k)
        do = grad_o.to(dtype) * residuals.guard.nan_to_num().unsqueeze(-1)
        z = residuals.probe.nan_to_num()
        p, _, _, k_mean, systems = statistics(q, k, ridge_lambda, problem)
        a = z @ k.mT - (z * k_mean).sum(-1, keepdim=True)  # (2.2)
        g = (do @ v.mT).where(p > 0, 0)  # a hidden value may be too large for the product
        g = g - (p * g).sum(-1, keepdim=True)
        about = lambda w: w @ k - w.sum(-1, keepdim=True) * k_mean  # sum_j w_ij (k_j - k_mean_i)
        y = solve(systems, about(p * g))  # (3.1)
        e = g - (y @ k.mT - (y * k_mean).sum(-1, keepdim=True))  # (3.2)
        dridge = (z * y).sum(-1)  # (3.6)
        dl = p * ((1 - a) * e + (ridge_lambda * dridge).unsqueeze(-1))
        dq = problem.scale * about(dl) + y  # (3.3)
        dk = problem.scale * (dl.mT @ q) - (p * e).mT @ z - (p * (1 - a)).mT @ y  # (3.4)
        dv = (p * (1 - a)).mT @ do  # (3.5)
        like = lambda t, g: torch.empty_like(t).copy_(g)
        result = Gradients(like(inputs.q, dq), like(inputs.k, dk), like(inputs.v, dv), dridge)
        return result if poison is None else poison.backward(result)
