"""Moments of a share of a cache: torch adds up the pieces that decoding's first kernel leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashlla.backends.moments import merged
from flashlla.backends.triton.configs import decode_rows, padded
from flashlla.backends.triton.decode import sums
from flashlla.problem import Inputs, Moments, Problem


def moments(problem: Problem, inputs: Inputs) -> Moments:
    """Of one new query a sequence and the keys in use."""
    stop, start = inputs.seqlens_k, inputs.seqstarts_k
    assert stop is not None
    if start is not None:  # where no key is left, there shall be no piece
        inputs = inputs._replace(seqlens_k=torch.where(stop > start, stop, 0))
    found = sums(problem, inputs)
    d, v, block_d, block_v = problem.head_dim, problem.v_dim, padded(problem.head_dim), padded(problem.v_dim)
    rows = decode_rows(block_d, block_v, found.scalars.shape[2])
    of_rows = lambda t: (
        t if (d, v) == (block_d, block_v) else torch.cat([t[:, :, :d], t[:, :, block_d : block_d + v]], 2)
    )
    m, omega, k_unit, _ = found.scalars[:, :, 0].unbind(-1)  # (systems, pieces): every slice has the same
    v_unit = found.scalars[..., 3].repeat_interleave(rows, -1)[..., :v]  # each slice has a unit of its values
    units = torch.cat([k_unit.unsqueeze(-1).expand(*k_unit.shape, d), v_unit], -1)  # (systems, pieces, D + Dv)
    there = omega > 0
    share = torch.where(there, 1 / omega, 0).unsqueeze(-1)
    mean = of_rows(found.sums) * share  # of keys from the piece's origin
    second = of_rows(found.moments)[..., :d] * share.unsqueeze(-1) - mean.unsqueeze(-1) * mean[..., None, :d]
    second *= units.unsqueeze(-1) * k_unit[..., None, None]
    mean = mean * units
    mean[..., :d] += found.offset[..., :d]  # from the query
    # Weights are powers of 2, and logits those of differences from the last key.
    q = inputs.q[:, :, 0].float()  # (B, Hq, D)
    logit = (q * _last_keys(problem, inputs).float().repeat_interleave(problem.group, 1)).sum(-1) * problem.scale
    m = torch.where(there, m * math.log(2) + logit.reshape(-1, 1), -math.inf)
    of_queries = lambda t: t.unflatten(0, q.shape[:2]).movedim(2, 0)  # (pieces, B, Hq, ...)
    return merged(Moments(*map(of_queries, (m, omega, mean, second))))


def _last_keys(problem: Problem, inputs: Inputs) -> Tensor:
    """The last key in use of each sequence: (B, Hkv, D); if none, any."""
    k, table = inputs.k, inputs.block_table
    assert inputs.seqlens_k is not None
    place = (inputs.seqlens_k.long().clamp(1, problem.k_len) - 1)[:, None]  # (B, 1)
    if table is None:
        return k.gather(2, place[..., None, None].expand(*k.shape[:2], 1, k.shape[3])).squeeze(2)
    page = table.gather(1, place // k.shape[2]).long().clamp(0, k.shape[0] - 1)
    return k[page[:, 0], :, place[:, 0] % k.shape[2]]
