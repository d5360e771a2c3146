"""Moments of a share of a cache for each new query, in PyTorch, in blocks of keys; how they are merged, and solved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla import linalg
from flashlla.covariance import dot
from flashlla.problem import Inputs, Moments, Problem, accumulator
from flashlla.products import add_product, product

# Numbers of the largest temporary: keys and values about the mean of each query.
_BLOCK = 1 << 24


def moments(problem: Problem, inputs: Inputs) -> Moments:
    """Of one new query a sequence, q (B, Hq, 1, D), and the keys in use of a cache without pages."""
    assert problem.q_len == 1
    dtype, group = accumulator(problem.dtype), problem.group
    q = inputs.q.to(dtype).reshape(problem.batch, problem.kv_heads, group, -1)
    span = problem.key_spans(inputs)
    start, stop = (t.expand(problem.batch, 1, 1).unsqueeze(-1) for t in span)  # (B, 1, 1, 1)

    def blocks(columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Keys at a time, and whether they are in use, (B, 1, n, 1)."""
        step = max(1, _BLOCK // max(1, problem.batch * problem.q_heads * columns))
        for first in range(0, problem.k_len, step):
            keys = slice(first, min(first + step, problem.k_len))
            place = torch.arange(keys.start, keys.stop, device=q.device)[:, None]
            yield keys, (place >= start) & (place < stop)

    # What is not in use may hold anything.
    of_keys = lambda t, keys, seen: torch.where(seen, t[:, :, keys].to(dtype), 0)  # (B, Hkv, n, D or Dv)
    s = q.new_full((*q.shape[:-1], problem.k_len), float("-inf"))  # (B, Hkv, group, L)
    for keys, seen in blocks(problem.head_dim):
        logits = product(q, of_keys(inputs.k, keys, seen).mT) * problem.scale
        s[..., keys] = logits.masked_fill_(~seen.mT, float("-inf"))
    m = s.amax(-1) if problem.k_len else s.new_full(s.shape[:-1], float("-inf"))
    p = s.sub_(m.clamp(min=torch.finfo(dtype).min).unsqueeze(-1)).exp_()
    omega = p.sum(-1)  # (B, Hkv, group)
    p.div_(omega.clamp(min=1).unsqueeze(-1))
    widths = [problem.head_dim, problem.v_dim]
    mean = q.new_zeros((*q.shape[:-1], sum(widths)))
    both = lambda keys, seen: torch.cat([of_keys(inputs.k, keys, seen), of_keys(inputs.v, keys, seen)], -1)
    for keys, seen in blocks(sum(widths)):
        mean += product(p[..., keys], both(keys, seen))
    # About each query's own mean: sums about a common point would lose what the keys near a query differ by.
    second = q.new_zeros((problem.batch * problem.q_heads, sum(widths), problem.head_dim))
    for keys, seen in blocks(sum(widths)):
        about = both(keys, seen).unsqueeze(2) - mean.unsqueeze(-2)  # (B, Hkv, group, n, D + Dv)
        weighted = (about * p[..., keys].unsqueeze(-1)).flatten(0, 2)
        add_product(second, weighted.mT, about.flatten(0, 2)[..., : problem.head_dim])
    mean[..., : problem.head_dim] -= q * (omega > 0).unsqueeze(-1)
    of_queries = lambda t, *shape: t.reshape(*inputs.q.shape[:2], *shape)
    return Moments(
        m=of_queries(m),
        omega=of_queries(omega),
        mean=of_queries(mean, sum(widths)),
        second=of_queries(second, sum(widths), problem.head_dim),
    )


class Shares(NamedTuple):
    """What pieces of a softmax are in the whole."""

    m: Tensor  # (...)
    omega: Tensor  # (...)
    each: Tensor  # (pieces, ...), which add up to 1, or to 0 where there are no keys


def shares(m: Tensor, omega: Tensor) -> Shares:
    """Of the pieces' m and omega, (pieces, ...)."""
    largest = m.amax(0)
    weights = omega * (m - largest.clamp(min=torch.finfo(m.dtype).min)).exp()  # 0 of a piece without keys
    total = weights.sum(0)
    return Shares(largest, total, weights / total.clamp(min=torch.finfo(m.dtype).tiny))


def merged(pieces: Moments) -> Moments:
    """Of the keys of all pieces, which the fields of ``pieces`` have in front."""
    m, omega, each = shares(pieces.m, pieces.omega)
    mean = (each.unsqueeze(-1) * pieces.mean).sum(0)
    away = (pieces.mean - mean).movedim(0, -1)  # (..., D + Dv, pieces)
    width = pieces.second.shape[-1]
    second = (each[..., None, None] * pieces.second).sum(0)
    return Moments(m, omega, mean, second + product(away * each.movedim(0, -1).unsqueeze(-2), away[..., :width, :].mT))


def solved(problem: Problem, found: Moments, ridge_lambda: Tensor) -> Tensor:
    """o by (2.1) and (2.3), (..., Dv), of queries (...), each with its own moments and ridge; NaN where a system is not
    positive definite."""
    d, v_mean = found.mean.split([problem.head_dim, problem.v_dim], -1)
    a, slopes = found.second.split([problem.head_dim, problem.v_dim], -2)
    a = a.clone()
    a.diagonal(dim1=-2, dim2=-1).add_(ridge_lambda.unsqueeze(-1))
    factor, info = linalg.cholesky(a)
    z = torch.cholesky_solve(d.unsqueeze(-1), factor)  # (..., D, 1)
    omega = found.omega.unsqueeze(-1)
    guard = 1 / (1 + problem.delta_eps * (1 + dot(d, z.squeeze(-1))) / omega.clamp(min=1))  # (2.5)
    o: Tensor = (v_mean - product(slopes, z).squeeze(-1)) * guard
    return o.masked_fill((info > 0).unsqueeze(-1), torch.nan).to(problem.dtype)
