"""Which tokens of a sequence each rank has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flashlla.checks import check_whole
from flashlla.distributed import collectives
from flashlla.distributed.groups import Ranks, agree, ranks_of, untraced
from flashlla.hints import with_hints

if TYPE_CHECKING:
    from flashlla.distributed.groups import Group

Order: TypeAlias = Literal["head_tail", "contiguous"]


class Shards(NamedTuple):
    """A sequence in shards of ``length`` tokens, one a rank.

    "contiguous": rank r has the r-th. "head_tail": of twice as many chunks as ranks it has the r-th and the r-th from
    the end, one behind the other, so that the keys that causal queries see are as many on each rank.
    """

    length: int
    size: int
    order: Order

    @property
    def total(self) -> int:
        return self.length * self.size

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.length // 2 if self.order == "head_tail" else self.length

    def chunks(self, rank: int) -> list[range]:
        """The places in the sequence of ``rank``'s tokens, in the order that they lie there."""
        numbers = (rank, 2 * self.size - 1 - rank) if self.order == "head_tail" else (rank,)
        return [range(n * self.chunk, (n + 1) * self.chunk) for n in numbers]

    def in_sequence(self, t: Tensor) -> Tensor:
        """``t`` (total, ...), the ranks' shards one behind the other, as the tokens follow one another."""
        if self.order == "contiguous":
            return t
        heads, tails = t.unflatten(0, (self.size, 2, self.chunk)).unbind(1)
        return torch.cat([*heads.unbind(), *reversed(tails.unbind())])

    def by_rank(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`in_sequence`."""
        if self.order == "contiguous":
            return t
        heads, tails = t.unflatten(0, (2, self.size, self.chunk)).unbind(0)
        return torch.stack([heads, tails.flip(0)], 1).flatten(0, 2)


def shards_of(length: int, ranks: Ranks, order: str, name: str) -> Shards:
    """Shards of ``length`` tokens each; ``name``: of the argument that has them."""
    check_order(order)
    if order == "head_tail" and length % 2:
        raise ValueError(
            f"{name}: got {length} tokens on rank {ranks.rank}, wanted an even number: with order='head_tail' a rank "
            f"has two chunks of the sequence. Try a sequence whose length 2 x {ranks.size} divides, padded, or "
            f"order='contiguous'"
        )
    return Shards(length, ranks.size, order)  # type: ignore[arg-type]


def divided(total: int, ranks: Ranks, order: str, name: str) -> Shards:
    """The shards of ``total`` tokens."""
    check_order(order)
    divisor = ranks.size * (2 if order == "head_tail" else 1)
    if total % divisor:
        why = f"2 x {ranks.size} ranks" if order == "head_tail" else f"{ranks.size} ranks"
        raise ValueError(
            f"{name}: got {total} tokens, wanted a multiple of {divisor}, {why} (order={order!r}); try "
            f"{-total % divisor} more, as padding that no other token sees"
        )
    return Shards(total // ranks.size, ranks.size, order)  # type: ignore[arg-type]


def check_order(order: str) -> None:
    if order not in ("head_tail", "contiguous"):
        raise ValueError(f"order: got {order!r}, wanted 'head_tail' or 'contiguous'")


@with_hints()
def shard_sequence(x: Tensor, *, group: Group, order: Order = "head_tail", dim: int) -> Tensor:
    """This rank's tokens of a tensor that every rank has whole.

    Args:
        x: any tensor; tokens are along ``dim``, and their number is a multiple of the group's size, with "head_tail"
            of twice that.
        group: a ProcessGroup, or a DeviceMesh of one dimension.
        order: "contiguous", or "head_tail" for the n-th chunk and the n-th from the end. Default "head_tail".
        dim: of the tokens, wanted: layouts differ.

    Returns:
        Its part of x, contiguous in memory; differentiable.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Source: head-tail sharding as in PyTorch's ``context_parallel``.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import shard_sequence
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard_sequence(torch.arange(8), group=dist.group.WORLD, dim=0)  # of one rank: all of them
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
        >>> dist.destroy_process_group()
    """
    ranks, dim = ranks_of(group), _check_dim(x, dim)
    shards = divided(x.shape[dim], ranks, order, "x")
    return torch.cat([x.narrow(dim, places.start, len(places)) for places in shards.chunks(ranks.rank)], dim)


@untraced
@with_hints()
def unshard_sequence(x: Tensor, *, group: Group, order: Order = "head_tail", dim: int) -> Tensor:
    """The inverse of :func:`shard_sequence`: all ranks' tokens, on every rank.

    Args:
        x: this rank's tokens; of one shape on all ranks.
        group, order, dim: as for :func:`shard_sequence`.

    Returns:
        The whole, contiguous but for the order of dimensions. Differentiable: the gradient of a rank's tokens is the
        sum of what all ranks' losses want of them. So where all compute one loss of the whole, it counts as often as
        there are ranks: divide it by their number, or take it on one rank.

    Raises:
        ValueError, TypeError: as :func:`shard_sequence`; in the first ten calls of a group, and in all of them where
            FLASHLLA_CHECK is 1, on all ranks: shapes, dtypes, ``order`` or ``dim`` differ from rank to rank.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import shard_sequence, unshard_sequence
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.randn(2, 8)
        >>> shard = shard_sequence(x, group=dist.group.WORLD, dim=1)
        >>> torch.equal(unshard_sequence(shard, group=dist.group.WORLD, dim=1), x)
        True
        >>> dist.destroy_process_group()
    """
    ranks, dim = ranks_of(group), _check_dim(x, dim)
    shards = shards_of(x.shape[dim], ranks, order, "x")
    asked = {"function": "unshard_sequence", "x": (tuple(x.shape), x.dtype), "order": order, "dim": dim}
    agree(ranks, x.device, lambda: asked)
    whole: Tensor = _Unshard.apply(x.movedim(dim, 0), ranks, shards)
    return whole.movedim(0, dim)


@with_hints()
def shard_positions(
    length: int, *, group: Group, order: Order = "head_tail", device: torch.device | str | None = None
) -> Tensor:
    """Where in the sequence this rank's tokens stand: what rotary positions are to be made of.

    Args:
        length: tokens of the whole sequence.
        group, order: as for :func:`shard_sequence`.
        device: of the result. Default None: torch's.

    Returns:
        (length / ranks,) int64.

    Raises:
        ValueError, TypeError: as :func:`shard_sequence`.

    Example:
        >>> import torch.distributed as dist
        >>> from flashlla.distributed import shard_positions
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> shard_positions(4, group=dist.group.WORLD)
        tensor([0, 1, 2, 3])
        >>> dist.destroy_process_group()
    """
    ranks = ranks_of(group)
    if check_whole(length, "length") < 0:
        raise ValueError(f"length: got {length}, wanted 0 tokens or more")
    chunks = divided(length, ranks, order, "length").chunks(ranks.rank)
    return torch.cat([torch.arange(places.start, places.stop, device=device) for places in chunks])


def _check_dim(x: Tensor, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a torch.Tensor")
    if not -x.dim() <= check_whole(dim, "dim") < x.dim():
        raise ValueError(f"dim: got {dim}, wanted a dimension of x, which has {x.dim()}")
    return dim % x.dim()


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, shards: Shards) -> Tensor:
        ctx.ranks, ctx.shards = ranks, shards
        return shards.in_sequence(collectives.gather(x, ranks).wait())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return collectives.reduce_scatter(ctx.shards.by_rank(grad), ctx.ranks).wait(), None, None
