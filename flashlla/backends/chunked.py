"""PyTorch in blocks of queries: memory linear in the length, any solver, any device."""

from __future__ import annotations

from collections.abc import Iterator
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
from flashlla.solvers.base import warn_unconverged

# Queries a block. Larger blocks waste more of the causal triangle and wait longer for their slowest row; smaller ones
# give the matrix products less to do.
BLOCK_M = 256
# Weights (queries x keys x heads) a block: its few temporaries of this size should stay in a processor's cache.
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


class Block(NamedTuple):
    """Some key heads; the same queries of every query head that shares one; and the keys that any of these sees.

    G = key heads in the block; M = its rows, the queries of one query head after those of another.
    """

    heads: slice
    rows: slice
    keys: slice
    hidden: Tensor | None  # (M, N) or (G, M, N), True where a query does not see a key


def blocks(problem: Problem, inputs: Inputs) -> Iterator[Block]:
    """All blocks; those of the same heads follow one another."""
    n_heads, group, mask = problem.batch * problem.kv_heads, problem.group, problem.mask
    q_len, k_len, device = problem.q_len, problem.k_len, inputs.q.device
    spans = problem.key_spans(inputs)
    length = max(1, BLOCK_M // group)
    budget = _BLOCK_WEIGHTS.get(device.type, _BLOCK_WEIGHTS["cuda"])
    step = max(1, budget // (group * length * (k_len + problem.solver.workspace(problem.head_dim))))
    for h in range(0, n_heads, step):
        heads = slice(h, min(h + step, n_heads))
        for i in range(0, q_len, length):
            queries = range(i, min(i + length, q_len))
            keys = mask.span(queries, q_len, k_len)
            rows = slice(queries.start, queries.stop)
            hidden = None
            if mask.hides_within(queries, keys, q_len, k_len):
                sequence = torch.arange(heads.start, heads.stop, device=device) // problem.kv_heads
                # (M,), or (G, M), each head's of its sequence
                start, stop = (t[..., rows][sequence, 0] if t.dim() > 1 else t[rows] for t in spans)
                j = torch.arange(keys.start, keys.stop, device=device)
                hidden = (j < start[..., None]) | (j >= stop[..., None])
                hidden = hidden.repeat(*(1,) * (hidden.dim() - 2), group, 1)
            yield Block(heads, rows, slice(keys.start, keys.stop), hidden)


def by_head(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hkv, S, ...) as (B Hkv, S, ...) in ``dtype``; a view where it can be."""
    return t.to(dtype).flatten(0, 1)


def shifted(k: Tensor, problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``k`` of (B Hkv, Sk, D) about the first key that a query sees, and that key.

    Moving all keys adds the same to all logits of a query, which its weights do not see; the regression does not
    change when the query moves along. So the digits go to what differs between keys, wherever the caller's keys are.
    """
    by_sequence = k.unflatten(0, (problem.batch, problem.kv_heads))
    origin = problem.key_spans(inputs).first_of(by_sequence).flatten(0, 1)  # (B Hkv, 1, D)
    return k - origin, origin


def weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights p (G, M, N) of a block, their row maxima m and sums omega (G, M, 1)."""
    p = torch.bmm(q, k.mT).mul_(scale)
    if hidden is not None:
        p.masked_fill_(hidden, float("-inf"))
    m = p.amax(-1, keepdim=True) if p.shape[-1] else p.new_full((*p.shape[:-1], 1), float("-inf"))
    m.masked_fill_(m == float("-inf"), 0)  # a query that sees no key: weights and sum are 0
    p.sub_(m).exp_()
    omega = p.sum(-1, keepdim=True)
    return p.div_(omega.clamp(min=1)), m, omega  # where it sees any, the largest weight is 1


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
    waits = True

    def unsupported(self, problem: Problem) -> str | None:
        return None

    @packed.forward
    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        inputs, _, poison = isolate(problem, inputs)
        dtype, grouped = accumulator(problem.dtype), _Grouped(problem)
        q, ridge_lambda = (grouped.split(t.to(dtype)) for t in (inputs.q, inputs.ridge_lambda))
        k, v = by_head(inputs.k, dtype), by_head(inputs.v, dtype)
        k, origin = shifted(k, problem, inputs)
        z, k_mean = torch.empty_like(q), torch.empty_like(q)
        o = q.new_empty((*q.shape[:-1], problem.v_dim))
        lse, omega, guard, residual = (torch.empty_like(q[..., 0]) for _ in range(4))
        iterations = torch.empty_like(lse, dtype=torch.int32)
        converged = torch.empty_like(lse, dtype=torch.bool)
        for heads, rows, keys, hidden in blocks(problem, inputs):
            at = (heads, slice(None), rows)
            q_i, ridge = q[at].flatten(1, 2), ridge_lambda[at].flatten(1, 2)  # (G, M, D), (G, M)
            k_j, v_j = k[heads, keys], v[heads, keys]  # (G, N, D), (G, N, Dv)
            p, m, total = weights(q_i, k_j, problem.scale, hidden)
            mean = torch.bmm(p, k_j)
            d = mean - (q_i - origin[heads])
            if hidden is not None:
                d *= total > 0
            systems = Systems(k_j, p, mean, ridge, resolution(problem.dtype), rows.start, rows.stop - rows.start)
            solution = problem.solver.solve_checked(systems, d)  # (2.1)
            d_z = (d * solution.x).sum(-1, keepdim=True)
            damping = 1 / (1 + problem.delta_eps * (1 + d_z) / total.clamp(min=1))
            write = lambda t, x: t[at].copy_(x.unflatten(1, (problem.group, -1)))  # noqa: B023
            write(o, torch.bmm(linear_weights(p, solution.x, k_j, mean), v_j).mul_(damping))  # (2.3)
            write(z, solution.x)
            write(k_mean, mean + origin[heads])
            m = m + problem.scale * (q_i * origin[heads]).sum(-1, keepdim=True)
            write(lse, (m + total.log()).squeeze(-1))
            write(omega, total.squeeze(-1))
            write(guard, damping.squeeze(-1))
            for t, x in zip((iterations, residual, converged), solution[1:], strict=True):
                write(t, x)
        out = empty_output(inputs.q, inputs.v).copy_(grouped.join(o))
        result = Forward(
            out,
            Residuals(*map(grouped.join, (lse, guard, z, k_mean))),
            Report(*map(grouped.join, (omega, iterations, residual, converged))),
        )
        return result if poison is None else poison.forward(result)

    @packed.backward
    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        inputs, grad_o, poison = isolate(problem, inputs, grad_o)  # type: ignore[assignment]
        if poison is not None:
            residuals = Residuals(*(t.nan_to_num() for t in residuals))
        dtype, grouped = accumulator(problem.dtype), _Grouped(problem)
        q, ridge_lambda, do_all = (grouped.split(t.to(dtype)) for t in (inputs.q, inputs.ridge_lambda, grad_o))
        k, v = by_head(inputs.k, dtype), by_head(inputs.v, dtype)
        guard, probe = grouped.split(residuals.guard), grouped.split(residuals.probe)
        k, _ = shifted(k, problem, inputs)
        dq, dridge = torch.empty_like(q), torch.empty_like(guard)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        early: list[Tensor] = []  # residuals of the queries whose adjoint probe did not converge
        for heads, rows, keys, hidden in blocks(problem, inputs):
            at, seen = (heads, slice(None), rows), (heads, keys)
            q_i, z, ridge = (t[at].flatten(1, 2) for t in (q, probe, ridge_lambda))
            do = (do_all[at] * guard[at].unsqueeze(-1)).flatten(1, 2)
            k_j, v_j = k[seen], v[seen]
            # Anew, not from lse and k_mean: where keys are far from the origin those lack digits that fresh sums have.
            p, _, _ = weights(q_i, k_j, problem.scale, hidden)
            mean = torch.bmm(p, k_j)
            g = torch.bmm(do, v_j.mT)
            if hidden is not None:
                g.masked_fill_(hidden, 0)  # a hidden value may be too large for the product
            g.sub_((p * g).sum(-1, keepdim=True))
            systems = Systems(k_j, p, mean, ridge, resolution(problem.dtype), rows.start, rows.stop - rows.start)
            solution = problem.solver.solve_scale_free(systems, gather(p * g, k_j, mean))  # (3.1)
            y = solution.x
            early.append(solution.residual[~solution.converged])
            e = g.baddbmm_(y, k_j.mT, alpha=-1).add_((y * mean).sum(-1, keepdim=True))  # (3.2)
            pa = linear_weights(p, z, k_j, mean)
            z_y = (z * y).sum(-1)  # (3.6)
            dl = (pa * e).addcmul_(p, (ridge * z_y).unsqueeze(-1))
            write = lambda t, x: t[at].copy_(x.unflatten(1, (problem.group, -1)))  # noqa: B023
            write(dridge, z_y)
            write(dq, gather(dl, k_j, mean).mul_(problem.scale).add_(y))  # (3.3)
            dk[seen].baddbmm_(dl.mT, q_i, alpha=problem.scale)  # (3.4), and the next two
            dk[seen].baddbmm_(e.mul_(p).mT, z, alpha=-1)
            dk[seen].baddbmm_(pa.mT, y, alpha=-1)
            dv[seen].baddbmm_(pa.mT, do)  # (3.5)
        warn_unconverged(problem.solver, torch.cat(early), dridge.numel(), " in the backward pass")
        like = lambda t, g: torch.empty_like(t).copy_(g)
        per_key = lambda t: t.unflatten(0, (problem.batch, -1))
        result = Gradients(
            like(inputs.q, grouped.join(dq)), like(inputs.k, per_key(dk)), like(inputs.v, per_key(dv)),
            grouped.join(dridge),
        )  # fmt: skip
        return result if poison is None else poison.backward(result)


class _Grouped:
    """(B, Hq, Sq, ...) as (B Hkv, Hq / Hkv, Sq, ...) and back."""

    def __init__(self, problem: Problem) -> None:
        self.batch, self.kv_heads, self.group = problem.batch, problem.kv_heads, problem.group

    def split(self, t: Tensor) -> Tensor:
        batch, _, *rest = t.shape
        return t.reshape(batch * self.kv_heads, self.group, *rest)

    def join(self, t: Tensor) -> Tensor:
        return t.reshape(self.batch, self.kv_heads * self.group, *t.shape[2:])
