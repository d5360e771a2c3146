"""What kernels are made of: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.interpreter import hasten

triton = pytest.importorskip("triton")
hasten()

import triton.language as tl  # noqa: E402 (after hasten)

from flashlla.backends.triton.primitives import LANES, packed_tile  # noqa: E402

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
