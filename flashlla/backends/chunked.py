"""PyTorch in blocks of queries: memory linear in the length, any solver, any device."""

from __future__ import annotations

from collections.abc import Iterator
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
from flashlla.solvers.base import warn_unconverged

# Queries a block. Larger blocks waste more of the causal triangle and wait longer for their slowest row; smaller ones
# give the matrix products less to do.
BLOCK_M = 256
# Weights (queries x keys x heads) a block: its few temporaries of this size should stay in a processor's cache.
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


class Block(NamedTuple):
    """Some heads' queries, and the keys that any of them sees. G = heads in the block."""

    heads: slice
    rows: slice
    keys: slice
    hidden: Tensor | None  # (M, N) True where a query does not see a key


def blocks(problem: Problem, device: torch.device) -> Iterator[Block]:
    """All blocks; those of the same heads follow one another."""
    n_heads = problem.batch * problem.q_heads
    budget = _BLOCK_WEIGHTS.get(device.type, _BLOCK_WEIGHTS["cuda"])
    step = max(1, budget // (BLOCK_M * (problem.k_len + problem.solver.workspace(problem.head_dim))))
    for h in range(0, n_heads, step):
        for i in range(0, problem.q_len, BLOCK_M):
            rows = range(i, min(i + BLOCK_M, problem.q_len))
            keys = range(problem.mask.stop(rows[-1], problem.q_len, problem.k_len))
            visible = problem.mask.visible(rows, keys, problem.q_len, problem.k_len, device)
            yield Block(
                slice(h, min(h + step, n_heads)),
                slice(rows.start, rows.stop),
                slice(keys.start, keys.stop),
                None if visible is None else ~visible,
            )


def by_head(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, S, ...) as (B H, S, ...) in ``dtype``; a view where it can be."""
    return t.to(dtype).flatten(0, 1)


def shifted(k: Tensor) -> tuple[Tensor, Tensor]:
    """``k`` of (B H, S, D) about its first key, and that key.

    Moving all keys adds the same to all logits of a query, which its weights do not see; the regression does not
    change when the query moves along. So the digits go to what differs between keys, wherever the caller's keys are.
    """
    origin = k[:, :1].clone()
    return k - origin, origin


def weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights p (G, M, N) of a block, their row maxima m and sums omega (G, M, 1)."""
    p = torch.bmm(q, k.mT).mul_(scale)
    if hidden is not None:
        p.masked_fill_(hidden, float("-inf"))
    m = p.amax(-1, keepdim=True)
    p.sub_(m).exp_()
    omega = p.sum(-1, keepdim=True)
    return p.div_(omega), m, omega


def linear_weights(p: Tensor, z: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """p_ij (1 - a_ij), what (2.3) weighs values by: (G, M, N)."""
    one_minus_a = torch.baddbmm(1 + (z * k_mean).sum(-1, keepdim=True), z, k.mT, alpha=-1)  # (2.2)
    return one_minus_a.mul_(p)


def gather(w: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """sum_j w_ij (k_j - k_mean_i): (G, M, D)."""
    return torch.bmm(w, k) - k_mean * w.sum(-1, keepdim=True)


class Chunked(Backend):
    name = "chunked"
    summary = "PyTorch in blocks of queries, any solver; memory linear in length"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        inputs, _, poison = isolate(problem, inputs)
        dtype = accumulator(problem.dtype)
        q, k, v, ridge_lambda = (by_head(t, dtype) for t in inputs)
        k, origin = shifted(k)
        o = torch.empty_like(q)
        z, k_mean = torch.empty_like(q), torch.empty_like(q)
        lse, omega, guard, residual = (torch.empty_like(q[..., 0]) for _ in range(4))
        iterations = torch.empty_like(lse, dtype=torch.int32)
        converged = torch.empty_like(lse, dtype=torch.bool)
        for heads, rows, keys, hidden in blocks(problem, q.device):
            at = (heads, rows)
            q_i, k_j, v_j = q[at], k[heads, keys], v[heads, keys]  # (G, M, D), (G, N, D), (G, N, Dv)
            p, m, total = weights(q_i, k_j, problem.scale, hidden)
            mean = torch.bmm(p, k_j)
            d = mean - (q_i - origin[heads])
            systems = Systems(k_j, p, mean, ridge_lambda[at], resolution(problem.dtype), rows.start)
            solution = problem.solver.solve_checked(systems, d)  # (2.1)
            damping = 1 / (1 + problem.delta_eps * (1 + (d * solution.x).sum(-1, keepdim=True)) / total)
            o[at] = torch.bmm(linear_weights(p, solution.x, k_j, mean), v_j).mul_(damping)  # (2.3)
            z[at], k_mean[at] = solution.x, mean + origin[heads]
            m = m + problem.scale * (q_i * origin[heads]).sum(-1, keepdim=True)
            lse[at], omega[at] = (m + total.log()).squeeze(-1), total.squeeze(-1)
            guard[at] = damping.squeeze(-1)
            iterations[at], residual[at], converged[at] = solution[1:]
        split = lambda t: t.unflatten(0, (problem.batch, problem.q_heads))
        out = empty_output(inputs.q, inputs.v).copy_(split(o))
        result = Forward(
            out,
            Residuals(*map(split, (lse, guard, z, k_mean))),
            Report(*map(split, (omega, iterations, residual, converged))),
        )
        return result if poison is None else poison.forward(result)

    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        inputs, grad_o, poison = isolate(problem, inputs, grad_o)  # type: ignore[assignment]
        if poison is not None:
            residuals = Residuals(*(t.nan_to_num() for t in residuals))
        dtype = accumulator(problem.dtype)
        q, k, v, ridge_lambda = (by_head(t, dtype) for t in inputs)
        do_all = by_head(grad_o, dtype)
        guard, probe = residuals.guard.flatten(0, 1), residuals.probe.flatten(0, 1)
        k, _ = shifted(k)
        dq, dridge = torch.empty_like(q), torch.empty_like(guard)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        early: list[Tensor] = []  # residuals of the queries whose adjoint probe did not converge
        for heads, rows, keys, hidden in blocks(problem, q.device):
            at, seen = (heads, rows), (heads, keys)
            q_i, k_j, v_j, z = q[at], k[seen], v[seen], probe[at]
            do = do_all[at] * guard[at].unsqueeze(-1)
            ridge = ridge_lambda[at]
            # Anew, not from lse and k_mean: where keys are far from the origin those lack digits that fresh sums have.
            p, _, _ = weights(q_i, k_j, problem.scale, hidden)
            mean = torch.bmm(p, k_j)
            g = torch.bmm(do, v_j.mT)
            if hidden is not None:
                g.masked_fill_(hidden, 0)  # a hidden value may be too large for the product
            g.sub_((p * g).sum(-1, keepdim=True))
            systems = Systems(k_j, p, mean, ridge, resolution(problem.dtype), rows.start)
            solution = problem.solver.solve_scale_free(systems, gather(p * g, k_j, mean))  # (3.1)
            y = solution.x
            early.append(solution.residual[~solution.converged])
            e = g.baddbmm_(y, k_j.mT, alpha=-1).add_((y * mean).sum(-1, keepdim=True))  # (3.2)
            pa = linear_weights(p, z, k_j, mean)
            dridge[at] = (z * y).sum(-1)  # (3.6)
            dl = (pa * e).addcmul_(p, (ridge * dridge[at]).unsqueeze(-1))
            dq[at] = gather(dl, k_j, mean).mul_(problem.scale).add_(y)  # (3.3)
            dk[seen].baddbmm_(dl.mT, q_i, alpha=problem.scale)  # (3.4), and the next two
            dk[seen].baddbmm_(e.mul_(p).mT, z, alpha=-1)
            dk[seen].baddbmm_(pa.mT, y, alpha=-1)
            dv[seen].baddbmm_(pa.mT, do)  # (3.5)
        split = lambda t: t.unflatten(0, (problem.batch, -1))
        warn_unconverged(problem.solver, torch.cat(early), dridge.numel(), " in the backward pass")
        like = lambda t, g: torch.empty_like(t).copy_(split(g))
        result = Gradients(like(inputs.q, dq), like(inputs.k, dk), like(inputs.v, dv), split(dridge))
        return result if poison is None else poison.backward(result)
