"""One call whose sequence lies on several ranks: each solves for its own queries, exactly, and keys travel."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flashlla.autograd import AdjointArguments, backward, forward, ran
from flashlla.distributed.collectives import Lanes, Pending, ahead
from flashlla.distributed.groups import Ranks
from flashlla.distributed.keys import Bringing, OfKeys, Part, bringing, parts_of
from flashlla.distributed.sharding import Shards
from flashlla.problem import Arguments, Inputs, Report, Residuals, Settings, empty_output, empty_report

# Unless the caller says how many heads' keys are gathered at once: half of them, so that the others travel and compute
# meanwhile; more where these have fewer queries of a part, counted for each head, than keep a GPU busy; and of keys and
# values no more than so many bytes.
BUSY = 16384
GATHERED = 256 * 2**20


class Differentiable(NamedTuple):
    """What of a call has a gradient: this rank's share of it."""

    q: Tensor  # (B, Hq, s, D)
    k: Tensor  # (B, Hkv, s, D)
    v: Tensor  # (B, Hkv, s, Dv)
    ridge_lambda: Tensor  # (B, Hq, s)


class Heads(NamedTuple):
    """Key heads whose keys are gathered at once, and the query heads that share them."""

    keys: slice
    queries: slice
    lane: int


class Lengths(NamedTuple):
    """Where sequences begin and end, by places in the whole; as in :class:`flashlla.problem.Inputs`."""

    seqlens_k: Tensor | None
    seqstarts_k: Tensor | None
    cu_seqlens: Tensor | None


class Shared:
    """A call of which this rank has a share: that of q, k, v and ridge_lambda, and of nothing else."""

    def __init__(self, arguments: Arguments, ranks: Ranks, shards: Shards, at_once: int | None) -> None:
        inputs, settings = arguments
        self.lengths = Lengths(inputs.seqlens_k, inputs.seqstarts_k, inputs.cu_seqlens_q)
        self.settings, self.shards = settings, shards
        self.parts = parts_of(ranks.rank, shards, settings.causal, settings.window)
        self.keys: Bringing = bringing(ranks, shards, self.parts, settings.window)
        kv_heads, group = inputs.k.shape[1], inputs.q.shape[1] // max(1, inputs.k.shape[1])
        if at_once is None:
            at_once = heads_at_once(inputs, shards)
        self.heads = [
            Heads(slice(first, last), slice(first * group, last * group), first // at_once)
            for first in range(0, kv_heads, at_once)
            for last in [min(first + at_once, kv_heads)]
        ]
        # Each lane has its own memory: what is large goes through one.
        self.lanes = Lanes(inputs.q.device, len(self.heads) if bytes_of_head(inputs, shards) <= GATHERED else 1)

    def bring(self, own: Differentiable, heads: Heads) -> Pending[list[Tensor]]:
        """Keys and values of ``heads``, for each part."""
        with self.lanes.lane(heads.lane):
            return self.keys.bring(torch.cat([t[:, heads.keys].permute(2, 0, 1, 3) for t in (own.k, own.v)], -1))

    def calls(self, own: Differentiable) -> Generator[tuple[Heads, list[tuple[Part, Arguments]]]]:
        """For some heads at a time the call of each part, once its keys are there, to be made before the next: until
        then whoever asks is in their lane; who stops before the last must close this, to be where it was. The last
        part comes first: it sees most keys, so the device is at work long enough for the host to be ahead of it."""
        for heads, coming in ahead(self.heads, lambda heads: self.bring(own, heads)):
            with self.lanes.lane(heads.lane):
                arrived = reversed([*zip(self.parts, coming.wait())])
                yield heads, [(part, self.call(own, heads, part, keys)) for part, keys in arrived]

    def rows(self, part: Part) -> slice:
        """Its queries among this rank's."""
        begin = self.shards.chunk * self.parts.index(part)
        return slice(begin, begin + self.shards.chunk)

    def call(self, own: Differentiable, heads: Heads, part: Part, both: Tensor) -> Arguments:
        """What one process would call for ``part`` alone, with its keys and values ``both``, (n, B, h, D + Dv)."""
        seqlens_k, seqstarts_k, cu_seqlens = self.lengths
        rows, first, last = self.rows(part), part.keys.start, part.keys.stop
        k, v = both.permute(1, 2, 0, 3).split([own.k.shape[-1], own.v.shape[-1]], -1)
        within = lambda ends, begin, stop: None if ends is None else ends.clamp(begin, stop) - begin
        inputs = Inputs(
            q=own.q[:, heads.queries, rows],
            k=k,
            v=v,
            ridge_lambda=own.ridge_lambda[:, heads.queries, rows],
            seqlens_k=within(seqlens_k, first, last),
            seqstarts_k=within(seqstarts_k, first, last),
            # A document that goes on behind its part ends there, and queries are aligned at its end.
            cu_seqlens_q=within(cu_seqlens, part.queries.start, part.queries.stop),
            cu_seqlens_k=within(cu_seqlens, first, last),
        )
        return Arguments(inputs, self.settings)

    def attend(self, own: Differentiable) -> tuple[Tensor, Report]:
        """o (B, Hq, s, Dv) and how each query was solved."""
        o, *report = _Attend.apply(self, *own)
        return o, Report(*report)

    def adjoint(
        self,
        own: Differentiable,
        residuals: Iterator[Tensor],
        settings: Iterator[Settings],
        grad_o: Tensor,
        of_keys: bool,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of ``own``, of whose keys where they are wanted, from what the forward passes left and with the
        settings that they ran with."""
        width = own.k.shape[-1]
        columns_of = slice(0, width), slice(width, width + own.v.shape[-1])
        dq, dridge = torch.empty_like(own.q), own.ridge_lambda.new_empty(own.ridge_lambda.shape)
        dk, dv = torch.empty_like(own.k), torch.empty_like(own.v)
        leaving: list[tuple[Heads, Pending[Tensor]]] = []  # at most one a lane, while its next heads are computed

        def arrive(but: int) -> None:
            while len(leaving) > but:
                heads, coming = leaving.pop(0)
                with self.lanes.lane(heads.lane):
                    both = coming.wait().permute(1, 2, 0, 3)
                    dk[:, heads.keys], dv[:, heads.keys] = (both[..., columns] for columns in columns_of)

        with closing(self.calls(own)) as of_heads:
            for heads, calls in of_heads:
                of_parts: dict[Part, OfKeys] = {}
                for part, (inputs, _) in calls:
                    place = slice(None), heads.queries, self.rows(part)
                    left = Residuals(*itertools.islice(residuals, len(Residuals._fields)))
                    found = backward(AdjointArguments(grad_o[place], inputs, left, next(settings), unrounded=of_keys))
                    dq[place], dridge[place] = found.q, found.ridge_lambda
                    of_parts[part] = OfKeys(*(t.permute(2, 0, 1, 3) for t in (found.k, found.v)))
                arrive(but=self.lanes.number - 1)
                if of_keys:
                    leaving.append((heads, self.keys.give_back([of_parts[part] for part in self.parts])))
        arrive(but=0)
        return dq, dk if of_keys else None, dv if of_keys else None, dridge


def bytes_of_head(inputs: Inputs, shards: Shards) -> int:
    """Of the keys and values of all tokens of a key head."""
    return inputs.k.shape[0] * shards.total * (inputs.k.shape[-1] + inputs.v.shape[-1]) * inputs.k.element_size()


def heads_at_once(inputs: Inputs, shards: Shards) -> int:
    """How many heads' keys are gathered at once where the caller does not say."""
    batch, kv_heads = inputs.k.shape[:2]
    queries = batch * shards.chunk * inputs.q.shape[1] // max(1, kv_heads)  # of a part and key head
    wanted = max(-(-kv_heads // 2), -(-BUSY // max(1, queries)))
    return max(1, min(kv_heads, wanted, GATHERED // max(1, bytes_of_head(inputs, shards))))


class _Attend(torch.autograd.Function):
    """The derivative is written here, not left to autograd: parts' gradients of keys are added up before they are
    rounded, and gathered keys are not kept but gathered again."""

    @staticmethod
    def forward(ctx: Any, shared: Shared, *row: Tensor) -> Any:
        own = Differentiable(*row)
        o, report = empty_output(own.q, own.v), empty_report(own.q)
        residuals: list[Tensor] = []
        settings: list[Settings] = []
        with shared.lanes.open(), closing(shared.calls(own)) as of_heads:
            for heads, calls in of_heads:
                for part, arguments in calls:
                    found, place = forward(arguments), (slice(None), heads.queries, shared.rows(part))
                    settings.append(ran(arguments).settings)
                    for whole, rows in zip((o, *report), (found.o, *found.report)):
                        whole[place] = rows
                    residuals += found.residuals
        ctx.shared, ctx.settings = shared, settings
        ctx.save_for_backward(*row, *residuals)
        ctx.mark_non_differentiable(*report)
        return (o, *report)

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, *_: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: who checkpoints counts
        own = Differentiable(*saved[: len(Differentiable._fields)])
        of_keys = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        with torch.no_grad(), ctx.shared.lanes.open():
            residuals = iter(saved[len(own) :])
            gradients = ctx.shared.adjoint(own, residuals, iter(ctx.settings), grad_o, of_keys)
        return None, *(_Final.apply(grad_o, *own, *gradients) if torch.is_grad_enabled() else gradients)


class _Final(torch.autograd.Function):
    """Gradients, which have no derivative, and depend on what they were made of."""

    @staticmethod
    def forward(ctx: Any, *made_of_and_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = made_of_and_gradients[-len(Differentiable._fields) :]
        return tuple(t if t is None else t.view_as(t) for t in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            "flashlla: lla_attention_cp has a first derivative only; this asked for the derivative of its gradient. "
            "Try finite differences of the gradient, or detach it."
        )
