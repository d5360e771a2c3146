"""Keys and values where queries need them, and their gradients back where they belong.

Both lie together, tokens first: (tokens, B, h, D + Dv), of h key heads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.distributed.collectives import Pending, exchange, gather, reduce_scatter
from flashlla.distributed.groups import Ranks
from flashlla.distributed.sharding import Shards


class Part(NamedTuple):
    """Queries that follow one another in the sequence, and the keys that they may see; by their places there."""

    queries: range
    keys: range

    @property
    def before(self) -> range:
        """Keys before the first query's own."""
        return range(self.keys.start, self.queries.start)


class OfKeys(NamedTuple):
    """Gradients of a part's keys, and of their values: (n, B, h, D) and (n, B, h, Dv), not rounded."""

    k: Tensor
    v: Tensor


def parts_of(rank: int, shards: Shards, causal: bool, window: int | None) -> list[Part]:
    """Of the queries of ``rank``."""
    parts = []
    for queries in shards.chunks(rank):
        stop = queries.stop if causal else shards.total
        start = 0 if window is None else max(0, queries.start + 1 - window)
        parts.append(Part(queries, range(start, stop)))
    return parts


class Everywhere:
    """Every rank gets all keys: one all-gather, and one reduce-scatter of their gradients."""

    def __init__(self, ranks: Ranks, shards: Shards, parts: Sequence[Part]) -> None:
        self.ranks, self.shards, self.parts = ranks, shards, parts

    def bring(self, own: Tensor) -> Pending[list[Tensor]]:
        """The keys of every part, of this rank's ``own``, (s, ...)."""

        def of_parts(everyones: Tensor) -> list[Tensor]:
            whole = self.shards.in_sequence(everyones)
            return [whole[_slice(part.keys)] for part in self.parts]

        return gather(own, self.ranks).then(of_parts)

    def give_back(self, found: Sequence[OfKeys]) -> Pending[Tensor]:
        """All ranks' sums for this rank's own keys, (s, ...), of what each part has ``found``."""
        widths, like = [t.shape[-1] for t in found[0]], found[0].k
        total = like.new_empty((self.shards.total, *like.shape[1:-1], sum(widths)))
        # Ranks' shards one behind the other, as they leave. A part's keys are whole chunks, from the first on.
        chunks = [chunk for rank in range(self.ranks.size) for chunk in self.shards.chunks(rank)]
        for rows, chunk in zip(total.split(self.shards.chunk), chunks):
            seen = [gradients for part, gradients in zip(self.parts, found) if chunk.stop <= part.keys.stop]
            for i, columns in enumerate(rows.split(widths, -1)):
                _write_sum([gradients[i][_slice(chunk)] for gradients in seen], columns)
        return reduce_scatter(total, self.ranks)


class _Trip(NamedTuple):
    """Keys that one rank needs for one of its parts, and has not, of one chunk of another: by their places."""

    source: int  # the rank that has them
    target: int
    part: int  # of the target's
    chunk: int  # of the source's
    places: range


class Neighbours:
    """Every rank gets the keys that its windows reach into, from the ranks that have them, which mostly are two."""

    def __init__(self, ranks: Ranks, shards: Shards, parts: Sequence[Part], window: int) -> None:
        self.ranks, self.shards, self.parts = ranks, shards, parts
        self.chunks = shards.chunks(ranks.rank)
        everyone = range(ranks.size)
        trips = [
            _Trip(source, target, i, j, places)
            for source in everyone
            for target in everyone
            for i, part in enumerate(parts_of(target, shards, True, window))
            for j, chunk in enumerate(shards.chunks(source))
            if len(places := _common(part.before, chunk))
        ]
        self.leaving = [trip for trip in trips if trip.source == ranks.rank]  # by target, as exchange sends
        self.coming = [trip for trip in trips if trip.target == ranks.rank]  # by source
        rows = lambda of: sum(len(trip.places) for trip in of)
        self.sends = [rows(trip for trip in self.leaving if trip.target == rank) for rank in everyone]
        self.receives = [rows(trip for trip in self.coming if trip.source == rank) for rank in everyone]

    def bring(self, own: Tensor) -> Pending[list[Tensor]]:
        sent = torch.cat([self._own(own, trip) for trip in self.leaving] or [own[:0]])

        def of_parts(came: Tensor) -> list[Tensor]:
            keys = [own.new_empty((len(part.keys), *own.shape[1:])) for part in self.parts]
            for part, mine, chunk in zip(self.parts, own.split(self.shards.chunk), keys):
                chunk[_slice(part.queries, part.keys.start)] = mine
            for trip, rows in zip(self.coming, came.split([len(trip.places) for trip in self.coming])):
                keys[trip.part][_slice(trip.places, self.parts[trip.part].keys.start)] = rows
            return keys

        return exchange(sent, self.sends, self.receives, self.ranks).then(of_parts)

    def give_back(self, found: Sequence[OfKeys]) -> Pending[Tensor]:
        sums = [torch.cat(gradients, -1) for gradients in found]
        of_trip = lambda trip: sums[trip.part][_slice(trip.places, self.parts[trip.part].keys.start)]
        sent = torch.cat([of_trip(trip) for trip in self.coming] or [sums[0][:0]])

        def summed(came: Tensor) -> Tensor:
            own = torch.cat([rows[_slice(part.queries, part.keys.start)] for part, rows in zip(self.parts, sums)])
            for trip, rows in zip(self.leaving, came.split([len(trip.places) for trip in self.leaving])):
                self._own(own, trip).add_(rows)
            return own

        return exchange(sent, self.receives, self.sends, self.ranks).then(summed)

    def _own(self, own: Tensor, trip: _Trip) -> Tensor:
        """What this rank has of a trip that leaves."""
        begin = trip.chunk * self.shards.chunk
        return own[begin : begin + self.shards.chunk][_slice(trip.places, self.chunks[trip.chunk].start)]


Bringing = Everywhere | Neighbours


def bringing(ranks: Ranks, shards: Shards, parts: Sequence[Part], window: int | None) -> Bringing:
    return Everywhere(ranks, shards, parts) if window is None else Neighbours(ranks, shards, parts, window)


def _write_sum(terms: Sequence[Tensor], out: Tensor) -> None:
    """Of none it is 0, and of a head and a tail the head comes first."""
    if len(terms) > 1:
        torch.add(*terms, out=out)
    elif terms:
        out.copy_(terms[0])
    else:
        out.zero_()


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _slice(places: range, first: int = 0) -> slice:
    """``places`` of a tensor whose first row is that of place ``first``."""
    return slice(places.start - first, places.stop - first)
