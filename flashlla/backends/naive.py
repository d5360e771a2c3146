"""The oracle: dense, one matrix a query, torch.linalg.solve. Plain on purpose; for tests and small inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.backends import packed
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
    """Softmax weights and what section 2 of docs/math.md builds on them; all heads and queries at once.

    M rows for a key head: the queries of all query heads that share it.
    """

    p: Tensor  # (B, Hkv, M, Sk)
    m: Tensor  # (B, Hkv, M)
    omega: Tensor  # (B, Hkv, M)
    k_mean: Tensor  # (B, Hkv, M, D)
    systems: Systems


def about_first_key(q: Tensor, k: Tensor, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` and ``k`` moved together so that the first key that a query sees is the origin, and that key.

    Moving all keys adds the same to all logits of a query, which its weights do not see; the regression does not
    change when the query moves along. So float32 keeps its digits wherever the caller's keys are.
    """
    origin = problem.key_spans(inputs).first_of(k)  # (B, H, 1, D)
    return q - origin, k - origin, origin


def statistics(q: Tensor, k: Tensor, ridge_lambda: Tensor, problem: Problem, inputs: Inputs) -> Statistics:
    logits = problem.scale * (q @ k.mT)  # (B, Hkv, M, Sk)
    start, stop = problem.key_spans(inputs)
    j = torch.arange(problem.k_len, device=q.device)
    visible = (j >= start[..., None]) & (j < stop[..., None])  # (Sq, Sk) or (B, 1, Sq, Sk)
    visible = visible.repeat(*(1,) * (visible.dim() - 2), problem.group, 1)
    logits = logits.masked_fill(~visible, float("-inf"))
    m = logits.amax(-1)
    m = m.masked_fill(m == float("-inf"), 0)  # a query that sees no key: weights and sum are 0
    w = (logits - m.unsqueeze(-1)).exp()
    omega = w.sum(-1)
    p = w / omega.clamp(min=1).unsqueeze(-1)  # where it sees any, the largest weight is 1
    k_mean = p @ k
    systems = Systems(k, p, k_mean, ridge_lambda, resolution(problem.dtype), per_head=problem.q_len)
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
    waits = True

    def unsupported(self, problem: Problem) -> str | None:
        if not isinstance(problem.solver, (CG, Direct)):
            return (
                f"it solves exactly by torch.linalg.solve, which stands in for cg, pcg and direct but not for "
                f"{type(problem.solver).__name__}"
            )
        return None

    @packed.forward
    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        inputs, _, poison = isolate(problem, inputs)
        dtype, (split, join) = accumulator(problem.dtype), _by_key_head(problem)
        k, v = inputs.k.to(dtype), inputs.v.to(dtype)
        q, ridge_lambda = split(inputs.q.to(dtype)), split(inputs.ridge_lambda.to(dtype))
        moved_q, k, origin = about_first_key(q, k, problem, inputs)
        p, m, omega, k_mean, systems = statistics(q, k, ridge_lambda, problem, inputs)
        d = (k_mean - moved_q) * (omega > 0).unsqueeze(-1)
        z = solve(systems, d)  # (2.1)
        error = (systems.matvec(z) - d).norm(dim=-1)
        a = z @ k.mT - (z * k_mean).sum(-1, keepdim=True)  # (2.2)
        guard = 1 / (1 + problem.delta_eps * (1 + (d * z).sum(-1)) / omega.clamp(min=1))
        o = empty_output(inputs.q, inputs.v)
        o.copy_(join(guard.unsqueeze(-1) * ((p * (1 - a)) @ v)))  # (2.3)
        residual = torch.where(error == 0, 0, error / d.norm(dim=-1))
        steps = torch.zeros_like(residual, dtype=torch.int32)
        m = m + problem.scale * (q * origin).sum(-1)
        report = Report(*map(join, (omega, steps, residual, residual <= SOUND)))
        result = Forward(o, Residuals(*map(join, (m + omega.log(), guard, z, k_mean + origin))), report)
        return result if poison is None else poison.forward(result)

    @packed.backward
    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        inputs, grad_o, poison = isolate(problem, inputs, grad_o)  # type: ignore[assignment]
        dtype, (split, join) = accumulator(problem.dtype), _by_key_head(problem)
        k, v = inputs.k.to(dtype), inputs.v.to(dtype)
        q, ridge_lambda = split(inputs.q.to(dtype)), split(inputs.ridge_lambda.to(dtype))
        _, k, _ = about_first_key(q, k, problem, inputs)
        do = split(grad_o.to(dtype) * residuals.guard.nan_to_num().unsqueeze(-1))
        z = split(residuals.probe.nan_to_num())
        p, _, _, k_mean, systems = statistics(q, k, ridge_lambda, problem, inputs)
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
        result = Gradients(like(inputs.q, join(dq)), like(inputs.k, dk), like(inputs.v, dv), join(dridge))
        return result if poison is None else poison.backward(result)


def _by_key_head(problem: Problem) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(B, Hq, Sq, ...) to (B, Hkv, M, ...), and back."""
    split = lambda t: t.unflatten(1, (problem.kv_heads, problem.group)).flatten(2, 3)
    join = lambda t: t.unflatten(2, (problem.group, problem.q_len)).flatten(1, 2)
    return split, join
