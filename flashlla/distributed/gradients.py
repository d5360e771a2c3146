"""Gradients of what every rank has whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from flashlla.distributed.groups import agree, ranks_of, untraced
from flashlla.hints import with_hints

if TYPE_CHECKING:
    from flashlla.distributed.groups import Group


@untraced
@with_hints()
def sum_gradients(parameters: Tensor | Iterable[Tensor], *, group: Group) -> None:
    """Add up over ``group`` the gradients of tensors that every rank has whole, as a learned ridge: in place.

    A rank's gradient is that of the sum of all ranks' losses by way of its own tokens; the sum over ranks is the whole.
    To be called once between the backward pass and the optimiser's step, on all ranks, with the same tensors in the
    same order; for all parameters of a model whose sequences lie on several ranks, or for those that nothing else sums.

    DistributedDataParallel and FSDP take the mean over their group. If that is the group of the sequence, too, leave
    this function out, and take for each rank's loss the sum over its own tokens, divided by all tokens and multiplied
    by the number of ranks: the mean of the gradients is then that of the mean over all tokens.

    Args:
        parameters: a tensor or several, such as ``layer.ridge.parameters()``; of a DTensor the rank's shard is summed.
            One that wants a gradient and has none is given one of zeros: other ranks may have one.
        group: a ProcessGroup, or a DeviceMesh of one dimension.

    Raises:
        TypeError, ValueError: an argument does not fit; in the first ten calls of a group, and in all of them where
            FLASHLLA_CHECK is 1, on all ranks: shapes or dtypes differ from rank to rank, as in another order.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import lla_attention_cp, sum_gradients
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> ridge = torch.ones(4, 1, requires_grad=True)  # one a head, the same on every rank
        >>> q, k, v = torch.randn(3, 2, 4, 100, 32).unbind(0)
        >>> lla_attention_cp(q, k, v, group=dist.group.WORLD, ridge_lambda=ridge).sum().backward()
        >>> sum_gradients(ridge, group=dist.group.WORLD)
        >>> dist.destroy_process_group()
    """
    ranks = ranks_of(group)
    given = [parameters] if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable) else [*parameters]
    for t in given:
        if not isinstance(t, Tensor):
            raise TypeError(f"parameters: got {type(t).__name__}, wanted a tensor or several; try model.parameters()")
    if not given:
        return
    owns: list[Tensor] = []
    for t in given:
        if t.requires_grad:
            if t.grad is None:
                t.grad = torch.zeros_like(t)
            owns.append(_own(t.grad))
    # Sums are of one long row: in another order, of as many numbers, they would be finite and wrong.
    asked = lambda: {f"gradient {i}": (tuple(own.shape), own.dtype) for i, own in enumerate(owns)}
    agree(ranks, given[0].device, lambda: {"function": "sum_gradients", "gradients": len(owns), **asked()})
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for own in owns:
        alike.setdefault((own.dtype, own.device), []).append(own)
    for gradients in alike.values():
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(summed, group=ranks.group)
        for gradient, total in zip(gradients, summed.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(total.view(gradient.shape))


def _own(gradient: Tensor) -> Tensor:
    """What this rank has of it, in the same memory."""
    if not hasattr(gradient, "to_local"):
        return gradient
    with torch.no_grad():
        own: Tensor = gradient.to_local()
    return own
