"""Operands: one cast before the kernels instead of one for each tile that they load.

q, k and v become float16, divided by a power of two a head; grad_o, times the guard, by a power of two a row; the probe
by its length. All of it is decided on the device.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    head_of,
    inverse_or_zero,
    inverse_power,
    load_rows,
    load_tile,
    power_of_two,
    rounded,
    rows_of,
    store_rows,
    store_tile,
    with_nan,
)


@triton.jit(do_not_specialize=["heads", "length", "chunk"])
def largest_kernel(
    q, k, v, largest, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s, heads, length, chunk,
    HEAD_DIM: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each of CHUNKS runs of rows of each tensor: (3, B H, CHUNKS)."""
    head, part = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    tensors = (
        (q, q_stride_b, q_stride_h, q_stride_s),
        (k, k_stride_b, k_stride_h, k_stride_s),
        (v, v_stride_b, v_stride_h, v_stride_s),
    )
    found = tl.zeros([BLOCK_M], tl.float32)
    for which in tl.static_range(3):
        if tl.program_id(1) == which:
            base = head_of(tensors[which][0], tensors[which][1], tensors[which][2], head, heads)
            for i in tl.range(part * chunk, tl.minimum((part + 1) * chunk, length), BLOCK_M):
                tile = load_tile(base, tensors[which][3], i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
                tile = tl.abs(tile.to(tl.float32))
                found = tl.maximum(found, tl.max(tl.where(tile < float("inf"), tile, 0.0), 1))
    tl.store(largest + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(found, 0))


@triton.jit(do_not_specialize=["n_heads", "heads", "length"])
def cast_kernel(
    q, k, v, largest, y, units, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    v_stride_b, v_stride_h, v_stride_s, n_heads, heads, length,
    HEAD_DIM: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (3, B H, S, D) = x / unit, NaN for all that is not finite; units (3, B H): powers of two under the largest."""
    tiles = tl.cdiv(length, BLOCK_M)
    head, i = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK_M
    slot = tl.program_id(1) * n_heads + head
    top = tl.max(tl.load(largest + slot * CHUNKS + tl.arange(0, CHUNKS)), 0)
    unit = tl.where(top > 0, power_of_two(top), 1.0)
    tl.store(units + slot, unit, mask=i == 0)
    tensors = (
        (q, q_stride_b, q_stride_h, q_stride_s),
        (k, k_stride_b, k_stride_h, k_stride_s),
        (v, v_stride_b, v_stride_h, v_stride_s),
    )
    for which in tl.static_range(3):
        if tl.program_id(1) == which:
            base = head_of(tensors[which][0], tensors[which][1], tensors[which][2], head, heads)
            tile = load_tile(base, tensors[which][3], i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            tile = with_nan(tile.to(tl.float32) * inverse_power(unit))  # (M, D)
            store_tile(rows_of(y, slot, length, HEAD_DIM), HEAD_DIM, i, length, tile, HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "length"])
def cast_rows_kernel(
    grad_o, guard, probe, y, y_unit_out, z_out, z_size_out, stride_b, stride_h, stride_s, heads, length,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row by row y = guard grad_o / y_unit, so that no row of y is longer than 1 and none but zeros is short; and
    probe = z_size z, z of unit length."""
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
    store_rows(rows_of(y_unit_out, head, length, 1), i, length, unit)
    z = load_tile(rows_of(probe, head, length, HEAD_DIM), HEAD_DIM, i, length, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    z_size = tl.sqrt(tl.sum(z * z, 1))  # (M,)
    z = rounded(z * inverse_or_zero(z_size)[:, None], tl.zeros([1], z_out.dtype.element_ty), PRECISION)  # (M, D)
    store_tile(rows_of(z_out, head, length, HEAD_DIM), HEAD_DIM, i, length, z, HEAD_DIM)
    store_rows(rows_of(z_size_out, head, length, 1), i, length, z_size)
