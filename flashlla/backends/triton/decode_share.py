"""Decoding: from the moments of pieces of a cache to those of all its keys, for who merges several caches.

Letters as in decode_solve.py, which adds up many pieces in the same way.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.decode_kernels import SCALARS, key_offsets, key_span, of_head, piece_of, store_scalars
from flashlla.backends.triton.primitives import inverse_power

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def store_sum(
    parts, merged_out, system, block, pieces, active, SHAPE: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
    PIECES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """M rows of C and of Cov(v, k), (systems, D + V, D), and of d and v_mean, (systems, D + V), in units that fit all
    pieces: scalars (systems, 4) as those of a piece. They are of keys alone or of values alone.

    With p_i the share of piece i of the weights, C_i its covariance and c_i its mean from the query, d = sum p_i c_i
    and C = sum p_i (C_i + (c_i - d) (c_i - d)^T); Cov(v, k) likewise.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    R: tl.constexpr = D + SHAPE.BLOCK_V
    is_key = block * M < D
    # Every slice has the m, omega and unit of the keys; each has a unit of its values, whose rows start where its do.
    owner = tl.where(is_key, 0, (block * M - D) // SLICE)
    scalars_ptr = parts.scalars + system * pieces * SLICES * SCALARS
    index = tl.arange(0, PIECES)  # those from ``active`` on are no pieces
    there = index < active
    piece_ptrs = scalars_ptr + index * SLICES * SCALARS
    m_all = tl.load(piece_ptrs, mask=there, other=float("-inf"))  # (I,)
    omega_all = tl.load(piece_ptrs + 1, mask=there, other=1.0)  # (I,)
    k_units = tl.load(piece_ptrs + 2, mask=there, other=0.0)
    every = tl.arange(0, PIECES * SLICES)
    v_unit = tl.max(tl.load(scalars_ptr + every * SCALARS + 3, mask=every < active * SLICES, other=0.0), 0)
    m, k_unit = tl.max(m_all, 0), tl.max(k_units, 0)
    weight = omega_all * tl.exp2(m_all - m)  # (I,)
    omega = tl.sum(weight, 0)
    weight, inverse = weight / omega, 1 / omega_all
    k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)

    row, dim = block * M + tl.arange(0, M), tl.arange(0, D)
    sums_ptr, offset_ptr = parts.sums + system * pieces * R, parts.offset + system * pieces * D
    k_units *= k_scale
    means = tl.load(sums_ptr + index[:, None] * R + dim[None, :], mask=there[:, None], other=0.0)  # (I, D)
    means *= (k_units * inverse)[:, None]
    offsets = tl.load(offset_ptr + index[:, None] * D + dim[None, :], mask=there[:, None], other=0.0)
    centres = means + offsets * k_scale
    d = tl.sum(centres * weight[:, None], 0)  # (D,)
    # The same of this program's rows; those of the values have a unit of their own, and no offset.
    unit_slot, row_scale = tl.where(is_key, 2, 3), tl.where(is_key, k_scale, v_scale)
    row_units = tl.load(piece_ptrs + owner * SCALARS + unit_slot, mask=there, other=0.0) * row_scale * inverse  # (I,)
    row_means = tl.load(sums_ptr + index[:, None] * R + row[None, :], mask=there[:, None], other=0.0)  # (I, M)
    row_means *= row_units[:, None]
    away = tl.load(offset_ptr + index[:, None] * D + row[None, :], mask=there[:, None] & is_key, other=0.0)
    row_centres = row_means + away * k_scale
    row_d = tl.sum(row_centres * weight[:, None], 0)  # (M,)

    place = (index[:, None] * R + row[None, :])[:, :, None] * D + dim[None, None, :]
    tiles = tl.load(parts.moments + system * pieces * R * D + place, mask=there[:, None, None], other=0.0)  # (I, M, D)
    tiles = tiles * (k_units * row_units)[:, None, None] - row_means[:, :, None] * means[:, None, :]
    tiles += (row_centres - row_d[None, :])[:, :, None] * (centres - d[None, :])[:, None, :]
    place = system * R + row
    tl.store(merged_out.moments + place[:, None] * D + dim[None, :], tl.sum(tiles * weight[:, None, None], 0))
    tl.store(merged_out.sums + place, row_d)
    if block == 0:
        store_scalars(merged_out.scalars + system * SCALARS, m, omega, k_unit, v_unit)


@triton.jit(do_not_specialize=["kv_heads", "group", "q_len", "k_len", "window", "pieces", "pages"])
def decode_share_kernel(
    q_in, k_in, caches, block_table, parts, share_out, kv_heads, group, q_len, k_len, window, pieces, pages, scale,
    SHAPE: tl.constexpr, PAGE: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """M rows of C and of Cov(v, k), (systems, D + V, D), and of d and v_mean, (systems, D + V), in units of 1; scalars
    (systems, 4): m, a natural logarithm from nothing but 0, omega, 1 and 1. Of no keys: zeros, and an m of -inf.

    Programs: block of rows, then query.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    R: tl.constexpr = D + SHAPE.BLOCK_V
    BLOCKS: tl.constexpr = R // BLOCK_M
    number, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    pair, member = number // (group * q_len), number % (group * q_len)
    sequence, kv_head, n = pair // kv_heads, pair % kv_heads, member % q_len
    q_head = (kv_head * group + member // q_len).to(tl.int64)
    start, stop = key_span(caches, sequence, n, q_len, k_len, window)
    system = number.to(tl.int64)
    row, dim = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    place = system * R + row
    moments_ptrs, sums_ptrs = share_out.moments + place[:, None] * D + dim[None, :], share_out.sums + place
    scalars_ptr = share_out.scalars + system * SCALARS
    if stop <= start:
        tl.store(moments_ptrs, tl.zeros([BLOCK_M, D], tl.float32))
        tl.store(sums_ptrs, tl.zeros([BLOCK_M], tl.float32))
        if block == 0:
            store_scalars(scalars_ptr, float("-inf"), 0.0, 1.0, 1.0)
        return
    _, _, active = piece_of(start, stop, pieces, BLOCK_T)
    store_sum(parts, share_out, system, block, pieces, active, SHAPE, SLICES, SLICE, PIECES, BLOCK_M)
    every = tl.arange(0, PIECES * SLICES)
    units_ptrs = parts.scalars + (system * pieces * SLICES + every) * SCALARS + 2
    there = every < active * SLICES
    k_unit = tl.max(tl.load(units_ptrs, mask=there, other=0.0), 0)
    v_unit = tl.max(tl.load(units_ptrs + 1, mask=there, other=0.0), 0)
    unit = tl.where(row < D, k_unit, v_unit)
    tl.debug_barrier()
    tl.store(moments_ptrs, tl.load(moments_ptrs) * (unit * k_unit)[:, None])
    tl.store(sums_ptrs, tl.load(sums_ptrs) * unit)
    if block == 0:
        # Weights are powers of 2, and logits those of differences from the last key.
        k_head = of_head(k_in, sequence, kv_head, PAGE)
        table = (block_table.ptr + sequence.to(tl.int64) * block_table.stride_b, block_table.stride_s)
        q_base = q_in.ptr + sequence.to(tl.int64) * q_in.stride_b + q_head * q_in.stride_h + n * q_in.stride_s
        q = tl.load(q_base + dim * q_in.stride_d, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32)
        last = k_head.ptr + key_offsets(k_head, table, pages, stop - 1, None, PAGE)
        logit = tl.sum(q * tl.load(last + dim, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32), 0) * scale
        m, omega = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
        store_scalars(scalars_ptr, m * LN2 + logit, omega, 1.0, 1.0)
