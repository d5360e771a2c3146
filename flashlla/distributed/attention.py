"""What users call: attention of sequences that lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from flashlla import dispatch
from flashlla.api import LLAInfo, info_of, lla_attention, lla_attention_varlen
from flashlla.autograd import forward
from flashlla.calls import prepared
from flashlla.checks import check_whole
from flashlla.distributed.context import Differentiable, Shared
from flashlla.distributed.groups import Ranks, agree, ranks_of, untraced
from flashlla.distributed.heads import check_heads, to_heads, to_tokens
from flashlla.distributed.sharding import Order, Shards, shards_of
from flashlla.problem import Arguments, Report, describe
from flashlla.validation import Call
from flashlla.values import check_values, looked_at

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.distributed.groups import Group
    from flashlla.options import AttentionOptions, VarlenOptions

Method: TypeAlias = Literal["all_gather", "all_to_all"]


@untraced
def lla_attention_cp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    order: Order = "head_tail",
    method: Method = "all_gather",
    key_heads_at_once: int | None = None,
    return_info: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, LLAInfo]:
    """:func:`flashlla.lla_attention` of sequences that lie on several ranks, a share of the tokens on each.

    Exact, whatever the number of ranks: each solves for its own queries with all the keys that these see. Every rank
    calls it with its shard of q, k, v and, where it is one a token, of ridge_lambda, as :func:`shard_sequence` gives
    it, and gets its shard of o.

    Gradients are those of the sum of all ranks' losses. What every rank has whole, as the ridge of heads and a model's
    weights, gets this rank's part of the sum: :func:`sum_gradients` adds the parts up. Every rank must run the backward
    pass, or none.

    Args:
        q: (B, Hq, s, D), this rank's tokens; k, v: (B, Hkv, s, D) and (B, Hkv, s, Dv). s is the same on all ranks, with
            "head_tail" an even number. Other forms as for :func:`flashlla.lla_attention`.
        group: a ProcessGroup, or a DeviceMesh of one dimension.
        order: which tokens a rank has: "head_tail", the n-th chunk and the n-th from the end, which gives causal
            queries of every rank the same number of keys, or "contiguous". Default "head_tail".
        method: "all_gather": keys and values of all ranks are gathered, a few heads at a time, the next while these
            compute, and again in the backward pass; with a window only those that it reaches into travel.
            "all_to_all": heads are exchanged for tokens, and each rank has whole sequences of its share of the heads;
            their numbers must divide. Default "all_gather".
        key_heads_at_once: how many heads' keys are gathered at once. Default None: half of them, more where these have
            few queries, and no more than fit in 256 MiB; at least one.
        options: the other arguments of :func:`flashlla.lla_attention`. Lengths (``seqlens_k``, ``seqstarts_k``) are
            those of whole sequences, the same on all ranks; ridge_lambda broadcasts to (B, Hq, s).

    Returns:
        o, (B, Hq, s, Dv), or (o, info), both of this rank's tokens.

    Raises:
        TypeError, ValueError, flashlla.UnsupportedError: as :func:`flashlla.lla_attention`, or an argument above does
            not fit. In the first ten calls of a group, and in all of them where FLASHLLA_CHECK is 1, on all ranks: what
            they call with differs.
        NotImplementedError: a second derivative was asked for.

    Source: all-gather with head-tail shards as in PyTorch's ``context_parallel``, heads at a time as in
    ring-flash-attention; heads for tokens: Jacobs et al., "DeepSpeed Ulysses", 2023.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import lla_attention_cp, shard_sequence
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 2, 4, 100, 32).unbind(0)  # every rank has them whole
        >>> shards = [shard_sequence(t, group=dist.group.WORLD, dim=2) for t in (q, k, v)]
        >>> o = lla_attention_cp(*shards, group=dist.group.WORLD, ridge_lambda=1.0)
        >>> o.shape
        torch.Size([2, 4, 100, 32])
        >>> dist.destroy_process_group()
    """
    call = prepared(lla_attention, lla_attention_cp, q, k, v, **options)
    return _attend(call, "lla_attention_cp", group, order, method, key_heads_at_once, return_info)


@untraced
def lla_attention_varlen_cp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    order: Order = "head_tail",
    method: Method = "all_gather",
    key_heads_at_once: int | None = None,
    return_info: bool = False,
    **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, LLAInfo]:
    """:func:`flashlla.lla_attention_varlen` of a packed row that lies on several ranks.

    Documents may cross from one rank to others; of any length, and empty ones.

    Args:
        q: (t, Hq, D), this rank's tokens of the row; k, v: (t, Hkv, D) and (t, Hkv, Dv). Other forms as for
            :func:`flashlla.lla_attention_varlen`.
        group, order, method, key_heads_at_once: as for :func:`lla_attention_cp`. Shards are those of the row, whatever
            documents are in it.
        options: the other arguments of :func:`flashlla.lla_attention_varlen`. ``cu_seqlens`` is that of the whole row,
            the same on all ranks, and for queries and keys alike; ridge_lambda broadcasts to (Hq, t).

    Returns:
        o, (t, Hq, Dv), or (o, info), both of this rank's tokens.

    Raises:
        TypeError, ValueError, flashlla.UnsupportedError, NotImplementedError: as :func:`lla_attention_cp` and
            :func:`flashlla.lla_attention_varlen`.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import lla_attention_varlen_cp, shard_sequence
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> q, k, v = torch.randn(3, 100, 4, 32).unbind(0)  # documents of 30, 0 and 70 tokens
        >>> cu_seqlens = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
        >>> shards = [shard_sequence(t, group=dist.group.WORLD, dim=0) for t in (q, k, v)]
        >>> o = lla_attention_varlen_cp(*shards, group=dist.group.WORLD, cu_seqlens=cu_seqlens, max_seqlen=70)
        >>> o.shape
        torch.Size([100, 4, 32])
        >>> dist.destroy_process_group()
    """
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: got one, wanted None: queries and keys lie in one row; try cu_seqlens")
    call = prepared(lla_attention_varlen, lla_attention_varlen_cp, q, k, v, **options)
    return _attend(call, "lla_attention_varlen_cp", group, order, method, key_heads_at_once, return_info)


def _attend(
    call: Call,
    caller: str,
    group: Group,
    order: Order,
    method: Method,
    key_heads_at_once: int | None,
    return_info: bool,
) -> Tensor | tuple[Tensor, LLAInfo]:
    ranks, inputs = ranks_of(group), call.arguments.inputs
    if inputs.k.shape[2] != inputs.q.shape[2]:
        raise ValueError(f"k: got {inputs.k.shape[2]} tokens, wanted {inputs.q.shape[2]}, those of q")
    shards = shards_of(inputs.q.shape[2], ranks, order, "q")
    if key_heads_at_once is not None:
        key_heads_at_once = check_whole(key_heads_at_once, "key_heads_at_once")
        if key_heads_at_once < 1:
            raise ValueError(f"key_heads_at_once: got {key_heads_at_once}, wanted at least 1, or None")
    if method not in _METHODS:
        raise ValueError(f"method: got {method!r}, wanted one of {', '.join(map(repr, _METHODS))}")
    if method == "all_to_all":
        check_heads(inputs, ranks)
    if looked_at(inputs.q.device):
        _check_whole_values(call.arguments, shards)
    agree(ranks, inputs.q.device, lambda: _asked(call, caller, order, method, key_heads_at_once))
    o, report = _METHODS[method](call.arguments, ranks, shards, key_heads_at_once)
    return (call.restore(o), info_of(call, report)) if return_info else call.restore(o)


def _by_gathering(
    arguments: Arguments, ranks: Ranks, shards: Shards, key_heads_at_once: int | None
) -> tuple[Tensor, Report]:
    inputs = arguments.inputs
    own = Differentiable(q=inputs.q, k=inputs.k, v=inputs.v, ridge_lambda=inputs.ridge_lambda)
    return Shared(arguments, ranks, shards, key_heads_at_once).attend(own)


def _by_heads(arguments: Arguments, ranks: Ranks, shards: Shards, _: int | None) -> tuple[Tensor, Report]:
    inputs = arguments.inputs
    whole = inputs._replace(
        q=to_heads(inputs.q, ranks, shards),
        k=to_heads(inputs.k, ranks, shards),
        v=to_heads(inputs.v, ranks, shards),
        ridge_lambda=to_heads(inputs.ridge_lambda, ranks, shards),
    )
    found = forward(arguments._replace(inputs=whole))
    report = Report(*(to_tokens(t.detach(), ranks, shards) for t in found.report))
    return to_tokens(found.o, ranks, shards), report


_METHODS: dict[str, Callable[[Arguments, Ranks, Shards, int | None], tuple[Tensor, Report]]] = {
    "all_gather": _by_gathering,
    "all_to_all": _by_heads,
}


def _check_whole_values(arguments: Arguments, shards: Shards) -> None:
    """Lengths are those of whole sequences, whose shapes alone are looked at."""
    inputs = arguments.inputs
    whole = lambda t: t.new_empty(()).expand(*t.shape[:2], shards.total, t.shape[-1])
    inputs = inputs._replace(q=whole(inputs.q), k=whole(inputs.k), v=whole(inputs.v))
    check_values(describe(arguments._replace(inputs=inputs)), inputs)


def _asked(call: Call, caller: str, order: str, method: str, key_heads_at_once: int | None) -> dict[str, Any]:
    """All that ranks must have in common."""
    inputs, settings = call.arguments
    numbers = lambda t: None if t is None else t.tolist()
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "ridge_lambda": inputs.ridge_lambda}
    graded = torch.is_grad_enabled()
    return {
        "function": caller,
        **{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()},
        "wanting gradients": [name for name, t in tensors.items() if graded and t.requires_grad],
        "seqlens_k": numbers(inputs.seqlens_k),
        "seqstarts_k": numbers(inputs.seqstarts_k),
        "cu_seqlens": numbers(inputs.cu_seqlens_q),
        "order": order,
        "method": method,
        "key_heads_at_once": key_heads_at_once,
        **settings._asdict(),
        "backend": dispatch.choose(describe(call.arguments), settings.backend).name,
    }
