"""Heads for tokens: each rank gets whole sequences of its share of the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlla.distributed.collectives import swap
from flashlla.distributed.groups import Ranks
from flashlla.distributed.sharding import Shards
from flashlla.problem import Inputs


def check_heads(inputs: Inputs, ranks: Ranks) -> None:
    """Whether every rank gets as many heads."""
    for name, t in (("q", inputs.q), ("k", inputs.k)):
        if t.shape[1] % ranks.size:
            raise ValueError(
                f"method: got 'all_to_all' with {t.shape[1]} heads of {name} on {ranks.size} ranks, wanted a multiple "
                f"of {ranks.size}: each rank gets a share of the heads. Try method='all_gather', which takes any number"
            )


def to_heads(t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
    """(B, H, s, ...) of all heads and this rank's tokens as (B, H / ranks, S, ...)."""
    found: Tensor = _ToHeads.apply(t, ranks, shards)
    return found


def to_tokens(t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
    """The inverse of :func:`to_heads`."""
    found: Tensor = _ToTokens.apply(t, ranks, shards)
    return found


def _to_heads(t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
    sent = t.unflatten(1, (ranks.size, t.shape[1] // ranks.size)).movedim((1, 3), (0, 1))  # (ranks, s, B, h, ...)
    return shards.in_sequence(swap(sent, ranks).flatten(0, 1)).movedim(0, 2)


def _to_tokens(t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
    sent = shards.by_rank(t.movedim(2, 0)).unflatten(0, (ranks.size, shards.length))  # (ranks, s, B, h, ...)
    return swap(sent, ranks).movedim((0, 1), (1, 3)).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
        ctx.ranks, ctx.shards = ranks, shards
        return _to_heads(t, ranks, shards)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(grad, ctx.ranks, ctx.shards), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
        ctx.ranks, ctx.shards = ranks, shards
        return _to_tokens(t, ranks, shards)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(grad, ctx.ranks, ctx.shards), None, None
