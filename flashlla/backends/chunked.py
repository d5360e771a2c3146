"""PyTorch in blocks of queries: memory linear in the length, any solver, any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashlla.backends import dense
from flashlla.backends.dense import Block
from flashlla.backends.frame import Framed
from flashlla.covariance import dot
from flashlla.problem import Forward, Gradients, Inputs, Problem, Report, Residuals, accumulator
from flashlla.products import add_product, product
from flashlla.solvers.base import warn_unconverged

# Queries a block. Larger blocks waste more of the causal triangle and wait longer for their slowest row; smaller ones
# give the matrix products less to do.
BLOCK_M = 256
# Weights (queries x keys x heads) a block: its few temporaries of this size should stay in a processor's cache.
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def blocks(problem: Problem, device: torch.device) -> Iterator[Block]:
    """All blocks, each with the keys that any of its queries sees; those of the same heads follow one another."""
    n_heads, group, q_len = problem.batch * problem.kv_heads, problem.group, problem.q_len
    length = max(1, BLOCK_M // group)
    budget = _BLOCK_WEIGHTS.get(device.type, _BLOCK_WEIGHTS["cuda"])
    step = max(1, budget // (group * length * (problem.k_len + problem.solver.workspace(problem.head_dim))))
    for h in range(0, n_heads, step):
        for i in range(0, q_len, length):
            queries = range(i, min(i + length, q_len))
            yield Block(range(h, min(h + step, n_heads)), queries, problem.mask.span(queries, q_len, problem.k_len))


def linear_weights(p: Tensor, z: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """p_ij (1 - a_ij), what (2.3) weighs values by: (G, M, N)."""
    one_minus_a = add_product((1 + dot(z, k_mean)).repeat(1, 1, k.shape[-2]), z, k.mT, alpha=-1)  # (2.2)
    return one_minus_a.mul_(p)


class Chunked(Framed):
    name = "chunked"
    summary = "PyTorch in blocks of queries, any solver; memory linear in length"

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def forward_plain(self, problem: Problem, inputs: Inputs) -> Forward:
        q, k, v, ridge_lambda, origin = dense.operands(problem, inputs, accumulator(problem.dtype))
        spans = problem.key_spans(inputs)
        number = lambda dtype=q.dtype: q.new_empty(q.shape[:-1], dtype=dtype)  # one a query
        o = q.new_empty((*q.shape[:-1], problem.v_dim))
        residuals = Residuals(number(), number(), torch.empty_like(q), torch.empty_like(q))
        report = Report(number(), number(torch.int32), number(), number(torch.bool))
        for block in blocks(problem, q.device):
            q_i, ridge_i = block.rows_of(q), block.rows_of(ridge_lambda)  # (G, M, D), (G, M)
            k_j, v_j = block.keys_of(k), block.keys_of(v)  # (G, N, D), (G, N, Dv)
            k_0 = block.heads_of(origin)  # (G, 1, D)
            found = dense.statistics(problem, block, q_i, k_j, ridge_i, block.hidden(problem, spans))
            d = dense.offset(found, q_i, k_0)
            solution = problem.solver.solve_checked(found.systems, d)  # (2.1)
            z = solution.x
            left = dense.residuals_of(problem, found, q_i, d, z, k_0)
            how = Report(found.omega, solution.iterations, solution.residual, solution.converged)
            o_i = product(linear_weights(found.p, z, k_j, found.k_mean), v_j).mul_(left.guard)  # (2.3)
            block.put_rows(o, o_i)
            for whole, rows in (*zip(residuals, left), *zip(report, how)):
                block.put_rows(whole, rows)
        return dense.as_forward(inputs, o, residuals, report)

    def backward_plain(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        q, k, v, ridge_lambda, _ = dense.operands(problem, inputs, accumulator(problem.dtype))
        spans = problem.key_spans(inputs)
        grad_o, guard, probe = (
            dense.by_key_head(problem, t) for t in (grad_o.to(q.dtype), residuals.guard, residuals.probe)
        )
        dq, dridge = torch.empty_like(q), torch.empty_like(guard)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        early: list[Tensor] = []  # residuals of the queries whose adjoint probe did not converge
        for block in blocks(problem, q.device):
            q_i, z, ridge_i = (block.rows_of(t) for t in (q, probe, ridge_lambda))
            do = block.rows_of(grad_o) * block.rows_of(guard).unsqueeze(-1)
            k_j, v_j, hidden = block.keys_of(k), block.keys_of(v), block.hidden(problem, spans)
            # Anew, not from lse and k_mean: where keys are far from the origin those lack digits that fresh sums have.
            found = dense.statistics(problem, block, q_i, k_j, ridge_i, hidden)
            p, k_mean = found.p, found.k_mean
            g = product(do, v_j.mT)
            if hidden is not None:
                g.masked_fill_(hidden, 0)  # a hidden value may be too large for the product
            g.sub_((p * g).sum(-1, keepdim=True))
            solution = problem.solver.solve_scale_free(found.systems, dense.about_mean(p * g, k_j, k_mean))  # (3.1)
            y = solution.x
            early.append(solution.residual[~solution.converged])
            e = add_product(g, y, k_j.mT, alpha=-1).add_(dot(y, k_mean))  # (3.2)
            # Weighted they add up to zero, but for rounding, which where one key has nearly all the weight is all that
            # is left of its e, and the same for all queries. Taken out, an error in a mean counts to second order only.
            e.sub_(dot(p, e))
            pa = linear_weights(p, z, k_j, k_mean)
            z_y = dot(z, y)  # (3.6)
            dl = (pa * e).addcmul_(p, ridge_i.unsqueeze(-1) * z_y)
            block.put_rows(dridge, z_y)
            block.put_rows(dq, dense.about_mean(dl, k_j, k_mean).mul_(problem.scale).add_(y))  # (3.3)
            dk_j, dv_j = block.keys_of(dk), block.keys_of(dv)
            # Each sum by itself: begun at what is there already, each of its terms would be rounded to that size.
            dk_j.add_(product(dl.mT, q_i), alpha=problem.scale)  # (3.4), and the next two
            dk_j.sub_(product(e.mul_(p).mT, z))
            dk_j.sub_(product(pa.mT, y))
            dv_j.add_(product(pa.mT, do))  # (3.5)
        warn_unconverged(problem.solver, torch.cat(early), dridge.numel(), " in the backward pass")
        return dense.as_gradients(problem, inputs, dq, dk, dv, dridge)
