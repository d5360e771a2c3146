"""Decoding with a cache that lies on several ranks: their moments are merged, and every rank solves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashlla import dispatch
from flashlla.api import lla_decode
from flashlla.backends.moments import shares
from flashlla.calls import prepared
from flashlla.distributed.collectives import gather
from flashlla.distributed.groups import Ranks, agree, ranks_of, untraced
from flashlla.problem import FEW_NEW, Arguments, Inputs, Moments, Problem, describe, empty_output
from flashlla.values import check_values, looked_at

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.distributed.groups import Group
    from flashlla.options import DecodeOptions


@untraced
def lla_decode_cp(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    group: Group,
    **options: Unpack[DecodeOptions],
) -> Tensor:
    """:func:`flashlla.lla_decode` with a cache that lies on several ranks, a share of each sequence's keys on each.

    In order of rank the shares make up the sequence; they may be of any length, and empty. The new tokens' keys are the
    last in use, on the last rank that has any. Every rank gets the whole result.

    A rank sums up its share for each query: one collective brings all ranks' softmax statistics and means, another adds
    up the moments about the mean of all, D (D + Dv) numbers a query and head. Of several new tokens, or with a window,
    a third brings the lengths.

    Args:
        q: (B, Hq, N, D), the same on all ranks.
        k_cache, v_cache: this rank's share, (B, Hkv, L, D) and (B, Hkv, L, Dv), or pages; L may differ from rank to
            rank.
        seqlens_k: (B,) int32 on the device of q: the keys in use of this rank's share.
        group: a ProcessGroup, or a DeviceMesh of one dimension.
        options: the other arguments of :func:`flashlla.lla_decode`, but ``return_info`` and ``out``; ``seqstarts_k``
            and ``block_table`` are those of this rank's share. ``solver`` is "direct" or None.

    Returns:
        o, (B, Hq, N, Dv), on every rank.

    Raises:
        TypeError, ValueError, flashlla.UnsupportedError: as :func:`flashlla.lla_decode`, or an argument above does not
            fit; in the first ten calls of a group, and in all of them where FLASHLLA_CHECK is 1, on all ranks: what
            they call with differs.
        NotImplementedError: an argument requires a gradient, and gradients are enabled.
        torch.linalg.LinAlgError: a system is not positive definite (on the CPU; elsewhere its output is NaN).

    Source: the merge of softmax statistics is that of split-KV decoding; of second moments, Chan et al., "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from flashlla.distributed import lla_decode_cp
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> k_cache, v_cache = torch.randn(2, 2, 2, 128, 32).unbind(0)
        >>> lengths = torch.tensor([100, 37], dtype=torch.int32)  # of this rank's share
        >>> o = lla_decode_cp(torch.randn(2, 8, 1, 32), k_cache, v_cache, lengths, group=dist.group.WORLD)
        >>> o.shape
        torch.Size([2, 8, 1, 32])
        >>> dist.destroy_process_group()
    """
    if options.get("solver") not in (None, "direct"):
        raise ValueError(
            f"solver: got {options['solver']!r}, wanted 'direct' or None: what is merged is solved at once"
        )
    call = prepared(lla_decode, lla_decode_cp, q, k_cache, v_cache, seqlens_k=seqlens_k, **options)
    inputs = call.arguments.inputs
    if torch.is_grad_enabled() and any(t.requires_grad for t in (inputs.q, inputs.k, inputs.v, inputs.ridge_lambda)):
        raise NotImplementedError("lla_decode_cp has no gradient, and an argument requires one; try torch.no_grad()")
    return call.restore(_decode(call.arguments, group))


@torch.no_grad()
def _decode(arguments: Arguments, group: Group) -> Tensor:
    ranks, inputs = ranks_of(group), arguments.inputs.with_dense_lengths()
    problem = describe(arguments)
    check_values(problem, inputs)
    agree(ranks, inputs.q.device, lambda: _asked(arguments))
    o, backend = empty_output(inputs.q, inputs.v), dispatch.choose(problem, arguments.settings.backend)
    starts, stops = _spans(problem, inputs, arguments.settings.window, ranks)
    for first in range(0, problem.q_len, FEW_NEW):
        new = range(first, min(first + FEW_NEW, problem.q_len))
        found = [_moments(arguments, n, starts[:, n], stops[:, n]) for n in new]
        merged = _merged(Moments(*(torch.stack(t, 2) for t in zip(*found))), ranks)  # (B, Hq, N, ...)
        rows = slice(new.start, new.stop)
        o[:, :, rows] = backend.solved(problem, merged, inputs.ridge_lambda[:, :, rows])
        if looked_at(o.device):
            _check_solved(o[:, :, rows], merged, first)
    return o


def _spans(problem: Problem, inputs: Inputs, window: int | None, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The keys of this rank's share that each new token sees: from the first to before the second, (B, N) int32."""
    assert inputs.seqlens_k is not None
    n_new = problem.q_len
    own = inputs.seqlens_k.clamp(0, problem.k_len)[:, None]  # (B, 1)
    starts = torch.zeros_like(own) if inputs.seqstarts_k is None else inputs.seqstarts_k[:, None]
    if n_new == 1 and window is None:  # all of it, whatever others have
        return starts, own
    lengths = gather(own.T, ranks).wait()  # (ranks, B)
    before, total = lengths[: ranks.rank].sum(0)[:, None], lengths.sum(0)[:, None]  # (B, 1)
    end = total - before - n_new + 1 + torch.arange(n_new, device=own.device)  # one past the token's own key
    stops = torch.minimum(end.clamp(min=0), own)
    if window is not None:
        starts = torch.maximum(starts, end - window)
    return starts.clamp(min=0).expand_as(stops).int(), stops.int()


def _moments(arguments: Arguments, n: int, start: Tensor, stop: Tensor) -> Moments:
    """Of new token ``n`` and this rank's keys from ``start`` to before ``stop``."""
    inputs, settings = arguments
    inputs = inputs._replace(
        q=inputs.q[:, :, n : n + 1],
        ridge_lambda=inputs.ridge_lambda[:, :, n : n + 1],
        seqlens_k=stop.contiguous(),
        seqstarts_k=start.contiguous(),
    )
    problem = describe(Arguments(inputs, settings._replace(window=None)))
    return dispatch.choose(problem, settings.backend).moments(problem, inputs)


def _merged(own: Moments, ranks: Ranks) -> Moments:
    """Of all ranks' keys."""
    told = torch.cat([own.m.unsqueeze(-1), own.omega.unsqueeze(-1), own.mean], -1)  # (B, Hq, N, 2 + D + Dv)
    everyones = gather(told.unsqueeze(0), ranks).wait()  # (ranks, B, Hq, N, 2 + D + Dv)
    m, omega, each = shares(everyones[..., 0], everyones[..., 1])
    mean = (each.unsqueeze(-1) * everyones[..., 2:]).sum(0)
    away = own.mean - mean
    second = own.second + away.unsqueeze(-1) * away[..., None, : own.second.shape[-1]]
    second *= each[ranks.rank][..., None, None]
    dist.all_reduce(second, group=ranks.group)
    return Moments(m, omega, mean, second)


def _check_solved(o: Tensor, found: Moments, first: int) -> None:
    """An error where a system could not be solved though all that it was made of is finite."""
    sound = torch.isfinite(found.second).all(-1).all(-1) & torch.isfinite(found.mean).all(-1)
    if bool((lost := o.isnan().any(-1) & sound).any()):
        sequence, head, token = lost.nonzero()[0].tolist()
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"lla_decode_cp: the system of new token {first + token} of sequence and head {(sequence, head)} is not "
            f"positive definite in {str(found.second.dtype).removeprefix('torch.')}. Try a larger ridge_lambda or "
            f"float64"
        )


def _asked(arguments: Arguments) -> dict[str, Any]:
    """All that ranks must have in common."""
    inputs, settings = arguments
    shape = lambda t: (tuple(t.shape), t.dtype)
    return {
        "function": "lla_decode_cp",
        "q": shape(inputs.q),
        "heads of k_cache": inputs.k.shape[1],
        "value dim of v_cache": inputs.v.shape[-1],
        "ridge_lambda": shape(inputs.ridge_lambda),
        **settings._asdict(),
        "backend": dispatch.choose(describe(arguments), settings.backend).name,
    }
