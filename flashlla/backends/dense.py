"""Attention whose weights are matrices: what the PyTorch backends share.

H = B Hkv, the key heads of all sequences. The query heads that share one become more rows of it: M rows, the queries of
one query head after those of another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.covariance import Systems, dot
from flashlla.problem import (
    Forward,
    Gradients,
    Inputs,
    KeySpans,
    Problem,
    Report,
    Residuals,
    accumulator,
    empty_output,
    resolution,
)
from flashlla.products import product


class Operands(NamedTuple):
    """The inputs by key head, in the dtype that is computed in.

    ``k`` is relative to ``origin``, the first key that a query sees. That adds the same to all logits of a query, which
    its weights do not see, and the regression stays as it is if the query moves along there (docs/math.md, section 6).
    So the digits go to what differs between keys, wherever the caller's keys are.
    """

    q: Tensor  # (H, group, Sq, D), where the caller has it
    k: Tensor  # (H, Sk, D)
    v: Tensor  # (H, Sk, Dv)
    ridge_lambda: Tensor  # (H, group, Sq)
    origin: Tensor  # (H, 1, D)


def operands(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> Operands:
    k = inputs.k.to(dtype)
    origin = problem.key_spans(inputs).first_of(k).flatten(0, 1)
    return Operands(
        by_key_head(problem, inputs.q.to(dtype)),
        k.flatten(0, 1) - origin,
        inputs.v.to(dtype).flatten(0, 1),
        by_key_head(problem, inputs.ridge_lambda.to(dtype)),
        origin,
    )


def by_key_head(problem: Problem, t: Tensor) -> Tensor:
    """(B, Hq, Sq, ...) as (H, group, Sq, ...)."""
    return t.reshape(problem.batch * problem.kv_heads, problem.group, *t.shape[2:])


class Block(NamedTuple):
    """Some key heads, G; the same queries of every query head that shares one, M rows; and some keys, N."""

    heads: range
    queries: range
    keys: range

    def rows_of(self, t: Tensor) -> Tensor:
        """Its part of (H, group, Sq, ...): (G, M, ...)."""
        return self._rows(t).flatten(1, 2)

    def put_rows(self, t: Tensor, rows: Tensor) -> None:
        """Write ``rows``, (G, M, ...), to its part of ``t``, (H, group, Sq, ...)."""
        part = self._rows(t)
        part.copy_(rows.reshape(part.shape))

    def _rows(self, t: Tensor) -> Tensor:
        return t[_slice(self.heads), :, _slice(self.queries)]

    def keys_of(self, t: Tensor) -> Tensor:
        """Its part of (H, Sk, ...): (G, N, ...), a view."""
        return t[_slice(self.heads), _slice(self.keys)]

    def heads_of(self, t: Tensor) -> Tensor:
        """Its part of (H, ...): (G, ...)."""
        return t[_slice(self.heads)]

    def hidden(self, problem: Problem, spans: KeySpans) -> Tensor | None:
        """(M, N) or (G, M, N), True where a query does not see a key; None where every query sees every key."""
        if not problem.mask.hides_within(self.queries, self.keys, problem.q_len, problem.k_len):
            return None
        device = spans.start.device
        sequence = torch.arange(self.heads.start, self.heads.stop, device=device) // problem.kv_heads
        # (queries,), or (G, queries), each head's of its sequence.
        start, stop = (t[sequence, 0] if t.dim() > 1 else t for t in (s[..., _slice(self.queries)] for s in spans))
        j = torch.arange(self.keys.start, self.keys.stop, device=device)
        hidden = (j < start[..., None]) | (j >= stop[..., None])
        return hidden.repeat(*(1,) * (hidden.dim() - 2), problem.group, 1)

    def name(self, problem: Problem, index: tuple[int, ...]) -> str:
        """What messages call the row at ``index`` of (G, M)."""
        head, row = index
        sequence, kv_head = divmod(self.heads[head], problem.kv_heads)
        shared, query = divmod(row, len(self.queries))
        return f"query {self.queries[query]} of sequence and head {(sequence, kv_head * problem.group + shared)}"


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)


class Statistics(NamedTuple):
    """Softmax weights of a block and what section 2 of docs/math.md builds on them."""

    p: Tensor  # (G, M, N)
    m: Tensor  # (G, M, 1), the largest logit; 0 where a query sees no key
    omega: Tensor  # (G, M, 1)
    k_mean: Tensor  # (G, M, D)
    systems: Systems


def statistics(
    problem: Problem, block: Block, q: Tensor, k: Tensor, ridge_lambda: Tensor, hidden: Tensor | None
) -> Statistics:
    """Of the block's rows q, (G, M, D), and ridge_lambda, (G, M), and its keys k, (G, N, D)."""
    p = product(q, k.mT).mul_(problem.scale)  # the logits; from here on in place, for these are the largest tensors
    if hidden is not None:
        p.masked_fill_(hidden, float("-inf"))
    m = p.amax(-1, keepdim=True) if p.shape[-1] else p.new_full((*p.shape[:-1], 1), float("-inf"))
    m.masked_fill_(m == float("-inf"), 0)  # a query that sees no key: weights and sum are 0
    p.sub_(m).exp_()
    omega = p.sum(-1, keepdim=True)
    p.div_(omega.clamp(min=1))  # where it sees any, the largest weight is 1
    k_mean = product(p, k)
    systems = Systems(k, p, k_mean, ridge_lambda, resolution(problem.dtype), lambda index: block.name(problem, index))
    return Statistics(p, m, omega, k_mean, systems)


def offset(found: Statistics, q: Tensor, origin: Tensor) -> Tensor:
    """d of (2.1), (G, M, D); 0 for a query that sees no key."""
    return (found.k_mean - (q - origin)) * (found.omega > 0)


def about_mean(w: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """sum_j w_ij (k_j - k_mean_i): (G, M, D)."""
    return product(w, k) - k_mean * w.sum(-1, keepdim=True)


def residuals_of(problem: Problem, found: Statistics, q: Tensor, d: Tensor, z: Tensor, origin: Tensor) -> Residuals:
    """lse and guard, (G, M, 1), z and k_mean, (G, M, D), of keys where the caller has them."""
    guard = 1 / (1 + problem.delta_eps * (1 + dot(d, z)) / found.omega.clamp(min=1))  # (2.5)
    m = found.m + problem.scale * dot(q, origin)
    return Residuals(m + found.omega.log(), guard, z, found.k_mean + origin)


def as_forward(inputs: Inputs, o: Tensor, residuals: Residuals, report: Report) -> Forward:
    """What was found by key head, (H, group, Sq, ...) or (H, M, ...), in the shapes that a backend gives."""
    rows = inputs.q.shape[:-1]
    kept = accumulator(inputs.q.dtype)
    lse, guard, probe, k_mean = (t.to(kept) for t in residuals)
    report = report._replace(omega=report.omega.to(kept), residual=report.residual.to(kept))
    return Forward(
        empty_output(inputs.q, inputs.v).copy_(o.reshape(*rows, -1)),
        Residuals(lse.reshape(rows), guard.reshape(rows), probe.reshape(*rows, -1), k_mean.reshape(*rows, -1)),
        Report(*(t.reshape(rows) for t in report)),
    )


def as_gradients(problem: Problem, inputs: Inputs, dq: Tensor, dk: Tensor, dv: Tensor, dridge: Tensor) -> Gradients:
    """The same for the gradients: those of q, k and v in the layout of these."""
    like = lambda t, gradient, dtype: torch.empty_like(t, dtype=dtype).copy_(gradient.reshape(t.shape))
    ridge = inputs.ridge_lambda
    return Gradients(
        q=like(inputs.q, dq, problem.dtype),
        k=like(inputs.k, dk, problem.key_gradients),
        v=like(inputs.v, dv, problem.key_gradients),
        ridge_lambda=dridge.reshape(ridge.shape).to(ridge.dtype),
    )
