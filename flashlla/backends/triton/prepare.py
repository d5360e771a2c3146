"""Operands: one cast before the kernels instead of one for each tile that they load.

q, k and v become float16, divided by a power of two a head; grad_o, times the guard, by a power of two a row. All of it is
decided on the device.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    head_of,
    inverse_power,
    load_rows,
    load_tile,
    power_of_two,
    rows_of,
    store_rows,
    store_tile,
    with_nan,
)


@triton.jit(do_not_specialize=["heads", "length", "chunk"])
def largest_kernel(
    x, largest, stride_b, stride_h, stride_s, heads, length, chunk,
    HEAD_DIM: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each of CHUNKS runs of rows: (B H, CHUNKS)."""
    head, part = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    base = head_of(x, stride_b, stride_h, head, heads)
    found = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_M):
        tile = tl.abs(load_tile(base, stride_s, i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32))  # (M, D)
        found = tl.maximum(found, tl.max(tl.where(tile < float("inf"), tile, 0.0), 1))
    tl.store(largest + tl.program_id(0), tl.max(found, 0))


@triton.jit(do_not_specialize=["heads", "length"])
def cast_kernel(
    x, largest, y, unit_out, stride_b, stride_h, stride_s, heads, length,
    HEAD_DIM: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = x / unit, NaN for all that is not finite; unit the power of two under the head's largest magnitude."""
    tiles = tl.cdiv(length, BLOCK_M)
    head, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    unit = power_of_two(tl.max(tl.load(largest + head * CHUNKS + tl.arange(0, CHUNKS)), 0))
    tile = load_tile(head_of(x, stride_b, stride_h, head, heads), stride_s, i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    store_tile(rows_of(y, head, length, HEAD_DIM), HEAD_DIM, i, length, with_nan(tile.to(tl.float32) * inverse_power(unit)), HEAD_DIM)
    tl.store(unit_out + head, unit, mask=i == 0)


@triton.jit(do_not_specialize=["heads", "length"])
def cast_grad_kernel(
    grad_o, guard, y, unit_out, stride_b, stride_h, stride_s, heads, length,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = guard grad_o / unit, row by row, so that no row of y is longer than 1 and none but zeros is short."""
    tiles = tl.cdiv(length, BLOCK_M)
    head, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    base = head_of(grad_o, stride_b, stride_h, head, heads)
    tile = load_tile(base, stride_s, i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)  # (M, D)
    tile = with_nan(tile * load_rows(rows_of(guard, head, length, 1), i, length, BLOCK_M, 1.0)[:, None])
    top = tl.max(tl.where(tile == tile, tl.abs(tile), 0.0), 1)  # (M,)
    # Elements under 2 / (2 sqrt(D)): the row's length is under 1. ROOM is the power of two at or above 2 sqrt(D).
    ROOM: tl.constexpr = 32 if BLOCK_D > 64 else (16 if BLOCK_D > 16 else 8)
    unit = power_of_two(top * ROOM)
    store_tile(rows_of(y, head, length, HEAD_DIM), HEAD_DIM, i, length, tile * inverse_power(unit)[:, None], HEAD_DIM)
    store_rows(rows_of(unit_out, head, length, 1), i, length, unit)
