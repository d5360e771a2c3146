"""What kernels are made of: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.interpreter import hasten

triton = pytest.importorskip("triton")
hasten()

import triton.language as tl  # noqa: E402 (after hasten)

from flashlla.backends.triton.primitives import LANES, TURN, packed_tile, place  # noqa: E402
from flashlla.backends.triton.records import Seqlens  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.quick,
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="neither a GPU nor the interpreter"),
]
BLOCK = 16


@triton.jit(do_not_specialize=["sequences"])
def tiles_kernel(cu_seqlens, out, sequences, total, BLOCK: tl.constexpr):
    sequence, tile = packed_tile(cu_seqlens, tl.program_id(0), sequences, total, BLOCK)
    tl.store(out + tl.program_id(0) * 2, sequence)
    tl.store(out + tl.program_id(0) * 2 + 1, tile)


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [1, 2, 7, LANES.value, LANES.value + 1, 3 * LANES.value])
def test_every_tile_of_packed_sequences_has_one_program(sequences: int) -> None:
    """And those without a tile are no more than the sequences, whatever the lengths: some are 0, one is long."""
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(0, 3 * BLOCK, (sequences,), generator=generator)
    lengths[sequences // 2] = 20 * BLOCK + 5
    edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    total = int(edges[-1]) + 3  # tokens of no sequence at the end
    programs = total // BLOCK + sequences
    out = torch.full((programs, 2), -1, dtype=torch.int32, device=DEVICE)
    tiles_kernel[(programs,)](edges.to(DEVICE, torch.int32), out, sequences, total, BLOCK)
    wanted = {(i, tile) for i, length in enumerate(lengths.tolist()) for tile in range(-(-length // BLOCK))}
    found = [(i, tile) for i, tile in out.tolist() if 0 <= tile < -(-int(lengths[i]) // BLOCK)]
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert programs - len(found) <= sequences


@triton.jit(do_not_specialize=["heads", "length"])
def places_kernel(out, seqlens, heads, length, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr):
    at = place(
        seqlens, heads, heads, heads // heads, length, length, length, length, BLOCK, True, OVER_KEYS, IN_TURNS=True
    )  # fmt: skip
    tl.store(out + tl.program_id(0) * 2, at.q_head)
    tl.store(out + tl.program_id(0) * 2 + 1, at.start // BLOCK)


@pytest.mark.slow
@pytest.mark.parametrize("over_keys", [False, True])
@pytest.mark.parametrize(("heads", "tiles"), [(1, 1), (2, TURN.value + 1), (7, 100), (TURN.value + 9, 1)])
def test_in_turns_every_tile_of_a_head_has_one_program(heads: int, tiles: int, over_keys: bool) -> None:
    """Of as few heads at a time as have so many programs, the longest sweeps first."""
    out = torch.full((heads * tiles, 2), -1, dtype=torch.int32, device=DEVICE)
    places_kernel[(heads * tiles,)](out, Seqlens(), heads, tiles * BLOCK - 3, BLOCK, over_keys)
    found = [tuple(place) for place in out.tolist()]
    assert sorted(found) == [(head, tile) for head in range(heads) for tile in range(tiles)]
    most = -(-TURN.value // tiles)
    for first in range(0, heads, most):
        turn = found[first * tiles : (first + most) * tiles]
        assert {head for head, _ in turn} == set(range(first, min(first + most, heads)))
        order = [tile for _, tile in turn]
        assert order == sorted(order, reverse=not over_keys)
