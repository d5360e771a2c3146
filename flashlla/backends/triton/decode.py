"""Decoding: a few new queries a sequence against a cache of keys and values. One pass over the cache, exact.

With few queries the moments of each fit in registers, so nothing is iterated. Three kernels:

moments   a program for each query and piece of the cache: the sums of w, w k, w v, w k k^T and w v k^T
merge     adds up the pieces, where there are several
solve     C and Cov(v, k) from the moments, a Cholesky factor of A = C + lambda I, and o by (2.3) of docs/math.md

Letters of the shape comments: T = keys a tile; D, V = BLOCK_D, BLOCK_V, the widths of keys and values rounded up to
powers of two of at least 16; P = 16, the columns of a panel of A; W, warps of the solve. A system is a query of one
head: (b Hq + h) N + n.

Precision. Keys enter relative to an origin, the last key that the query sees: a common offset costs no digits. The
operands of the two matrix products are x_j = sqrt(w_j) (k_j - origin) and y_j = sqrt(w_j) v_j, rounded once, and *all*
sums are made of the rounded numbers. They are then the moments of slightly moved keys and values: C is symmetric and
not negative, and where one key has all the weight it vanishes, though that key is not the origin. Where the mean of a
piece turns out to be far from the origin, beside both the spread of the keys and the ridge, the program goes over its
piece again, with the mean for an origin. Pieces are centred one by one, and added with what lies between their means.

Units. The operands are float16 for 16-bit inputs, in units of powers of two that the origin and its value suggest.
What a piece holds may be larger by 2**11; beyond that its sums are not finite, and the program goes over it again
with units that fit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlla.backends.triton import configs
from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of
from flashlla.backends.triton.launch import cdiv, launch
from flashlla.backends.triton.primitives import (
    LOG2E,
    finite,
    finite_or_zero,
    inverse_power,
    power_of_two,
    ridge_in,
    rounded,
)

# Numbers that describe a piece: the maximum m of its logits, omega, and the units of its keys and values.
SCALARS: tl.constexpr = tl.constexpr(4)


@triton.jit
def key_span(seqlens_k, seqlens_k_stride, sequence, n, q_len, k_len, window):
    """First and one past the last of the keys that new query ``n`` of ``sequence`` sees."""
    length = tl.load(seqlens_k + sequence.to(tl.int64) * seqlens_k_stride).to(tl.int32)
    stop = tl.maximum(tl.minimum(tl.maximum(length, 0), k_len) - q_len + n + 1, 0)
    return tl.maximum(stop - window, 0), stop


@triton.jit
def piece_of(start, stop, pieces, T: tl.constexpr):
    """First tile of a span of keys, tiles a piece, and how many pieces have any."""
    first = start // T
    tiles = tl.cdiv(stop, T) - first
    each = tl.maximum(tl.cdiv(tiles, pieces), 1)
    return first, each, tl.cdiv(tiles, each)


@triton.jit
def row_offsets(block_table, table_stride, pages, j, seen, stride_page, stride_s, PAGE: tl.constexpr, T: tl.constexpr):
    """Offsets (T,) of keys j to j + T in their head of the cache; PAGE is 0 where the cache has no pages."""
    row = tl.arange(0, T)
    if PAGE == 0:
        return (j + row).to(tl.int64) * stride_s
    elif PAGE % T == 0:  # the tile lies in one page
        page = tl.load(block_table + tl.cast(j // PAGE, tl.int64) * table_stride)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        return page * stride_page + (j % PAGE + row).to(tl.int64) * stride_s
    else:
        page = tl.load(block_table + ((j + row) // PAGE).to(tl.int64) * table_stride, mask=seen, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        return page * stride_page + ((j + row) % PAGE).to(tl.int64) * stride_s


@triton.jit
def load_cached(base, rows, seen, first, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns ``first`` to ``first + D`` of the cache's ``rows``: (T, D), zero where not ``seen`` or past WIDTH."""
    dim = first + tl.arange(0, D)
    return tl.load(base + rows[:, None] + dim[None, :], mask=seen[:, None] & (dim < WIDTH)[None, :], other=0.0)


@triton.jit
def fitting_unit(largest, least):
    """The unit of operands of which the ``largest`` is this: there it lies in [16, 32)."""
    return tl.maximum(power_of_two(largest) * 0.0625, least)


@triton.jit
def least_unit(ridge):
    """Keys so much smaller than the root of the ridge do not matter; and a unit's inverse shall be normal."""
    return tl.maximum(power_of_two(tl.sqrt(ridge)) * 8.881784197001252e-16, 7.888609052210118e-31)  # 2**-50, 2**-100


@triton.jit
def folded(x, ROWS: tl.constexpr):
    """Sums of every ROWS-th row: (ROWS, D). Rows that a thread holds itself, if ROWS are those of all the threads."""
    return tl.sum(tl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1]]), 0)


@triton.jit
def not_finite(x):
    return tl.max(tl.where(finite(x), 0, 1), 0) > 0


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces", "pages"])
def decode_moments_kernel(
    q_ptr, k_ptr, v_ptr, seqlens_k, block_table, ridge_ptr, moments_out, sums_out, scalars_out, offset_out,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h,
    v_stride_s, seqlens_k_stride, table_stride_b, table_stride_s, ridge_stride_b, ridge_stride_h, ridge_stride_s,
    first_pair, kv_heads, group, q_len, k_len, window, pieces, pages, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, FAR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SLICE_D: tl.constexpr, SLICE_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one query and one piece of its keys, with w_j = 2**(factor q.(k_j - origin) - m), x and y as above:

    moments (systems, pieces, D + V, D) = sum x x^T over sum y x^T; sums (systems, pieces, D + V) = sum sqrt(w) x beside
    sum sqrt(w) y; scalars (systems, pieces, slices, 4) = m, omega, units; offset (systems, pieces, D) = origin - q.

    Where registers do not hold D + V rows of moments, SLICES programs have a share of the rows each.
    Programs: slice, then query of the group, then piece, then pair of sequence and key head, so that those which read
    the same keys run side by side.
    """
    program = tl.program_id(0)
    slice_id = program % SLICES
    member = program // SLICES % (group * q_len)
    piece = program // (SLICES * group * q_len) % pieces
    pair = program // (SLICES * group * q_len * pieces)  # of this launch; in the cache it is first_pair + pair
    sequence, kv_head = (first_pair + pair) // kv_heads, (first_pair + pair) % kv_heads
    q_head, n = kv_head * group + member // q_len, member % q_len
    start, stop = key_span(seqlens_k, seqlens_k_stride, sequence, n, q_len, k_len, window)
    first, each, active = piece_of(start, stop, pieces, BLOCK_T)
    if piece >= active:
        return
    system = pair.to(tl.int64) * (group * q_len) + member
    slot = system * pieces + piece
    begin, end = (first + piece * each) * BLOCK_T, tl.minimum((first + (piece + 1) * each) * BLOCK_T, stop)

    k_base = k_ptr + kv_head.to(tl.int64) * k_stride_h
    v_base = v_ptr + kv_head.to(tl.int64) * v_stride_h
    if PAGE == 0:
        k_base += sequence.to(tl.int64) * k_stride_b
        v_base += sequence.to(tl.int64) * v_stride_b
    else:
        block_table += sequence.to(tl.int64) * table_stride_b
    dim = tl.arange(0, BLOCK_D)
    slice_dim, slice_v = slice_id * SLICE_D + tl.arange(0, SLICE_D), slice_id * SLICE_V + tl.arange(0, SLICE_V)
    q_base = q_ptr + sequence.to(tl.int64) * q_stride_b + q_head.to(tl.int64) * q_stride_h + n * q_stride_s
    q = tl.load(q_base + dim * q_stride_d, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)  # (D,)
    last = stop - 1
    if PAGE == 0:
        k_last, v_last = k_base + last.to(tl.int64) * k_stride_s, v_base + last.to(tl.int64) * v_stride_s
    else:
        page = tl.load(block_table + (last // PAGE).to(tl.int64) * table_stride_s)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        k_last = k_base + page * k_stride_b + (last % PAGE).to(tl.int64) * k_stride_s
        v_last = v_base + page * v_stride_b + (last % PAGE).to(tl.int64) * v_stride_s
    origin = finite_or_zero(tl.load(k_last + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32))  # (D,)
    v_first = tl.load(v_last + slice_v, mask=slice_v < V_DIM, other=0.0).to(tl.float32)  # (SLICE_V,)
    if SLICES > 1:
        slice_origin = tl.load(k_last + slice_dim, mask=slice_dim < HEAD_DIM, other=0.0).to(tl.float32)
        slice_origin = finite_or_zero(slice_origin)
        slice_sum = tl.zeros([ROWS, SLICE_D], tl.float32)
        squares = tl.zeros([BLOCK_T], tl.float32)
    ridge = ridge_ptr + sequence.to(tl.int64) * ridge_stride_b + q_head.to(tl.int64) * ridge_stride_h
    ridge = tl.load(ridge + n * ridge_stride_s)
    least: tl.constexpr = 7.888609052210118e-31  # 2**-100
    k_least = least_unit(ridge)
    offset = origin - q
    q = q * (scale * LOG2E)
    s_origin = tl.full([], 0.0, tl.float32)  # all logits are taken from that of the last key
    k_unit = fitting_unit(tl.max(tl.abs(origin), 0), k_least)
    v_unit = fitting_unit(tl.max(tl.abs(finite_or_zero(v_first)), 0), least)

    m = tl.full([], float("-inf"), tl.float32)
    omega = tl.zeros([BLOCK_T], tl.float32)
    k_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    v_sum = tl.zeros([ROWS, SLICE_V], tl.float32)
    k_acc = tl.zeros([SLICE_D, BLOCK_D], tl.float32)
    v_acc = tl.zeros([SLICE_V, BLOCK_D], tl.float32)
    sweeps = 2  # that may yet be repeated
    while sweeps >= 0:
        m = tl.full([], float("-inf"), tl.float32)
        omega = tl.zeros([BLOCK_T], tl.float32)
        k_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
        v_sum = tl.zeros([ROWS, SLICE_V], tl.float32)
        k_acc = tl.zeros([SLICE_D, BLOCK_D], tl.float32)
        v_acc = tl.zeros([SLICE_V, BLOCK_D], tl.float32)
        if SLICES > 1:
            slice_sum = tl.zeros([ROWS, SLICE_D], tl.float32)
            squares = tl.zeros([BLOCK_T], tl.float32)
        k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)
        for j in tl.range(begin, end, BLOCK_T):
            key = j + tl.arange(0, BLOCK_T)
            seen = (key >= start) & (key < end)  # (T,)
            k_rows = row_offsets(block_table, table_stride_s, pages, j, seen, k_stride_b, k_stride_s, PAGE, BLOCK_T)
            v_rows = row_offsets(block_table, table_stride_s, pages, j, seen, v_stride_b, v_stride_s, PAGE, BLOCK_T)
            k = load_cached(k_base, k_rows, seen, 0, HEAD_DIM, BLOCK_D)  # (T, D)
            v = load_cached(v_base, v_rows, seen, slice_id * SLICE_V, V_DIM, SLICE_V)  # (T, SLICE_V)
            x = k.to(tl.float32) - origin[None, :]  # (T, D)
            s = tl.where(seen, tl.sum(x * q[None, :], 1) + s_origin, float("-inf"))  # (T,)
            m_next = tl.maximum(m, tl.max(s, 0))
            root = tl.exp2(0.5 * (s - m_next))  # (T,) the square roots of the weights
            fade = tl.exp2(m - m_next)
            m = m_next
            omega = omega * fade + root * root
            x = rounded(x * (root * k_scale)[:, None], tl.zeros([1], OPERAND), PRECISION)  # (T, D)
            k_sum = k_sum * fade + folded(x.to(tl.float32) * root[:, None], ROWS)
            if SLICES == 1:
                k_acc = tl.dot(tl.trans(x), x, k_acc * fade, input_precision=PRECISION)  # (D, D)
            else:
                part = load_cached(k_base, k_rows, seen, slice_id * SLICE_D, HEAD_DIM, SLICE_D).to(tl.float32)
                part = (part - slice_origin[None, :]) * (root * k_scale)[:, None]
                part = rounded(part, tl.zeros([1], OPERAND), PRECISION)  # (T, SLICE_D) columns of x
                slice_sum = slice_sum * fade + folded(part.to(tl.float32) * root[:, None], ROWS)
                squares = squares * fade + tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
                k_acc = tl.dot(tl.trans(part), x, k_acc * fade, input_precision=PRECISION)  # (SLICE_D, D)
            y = v.to(tl.float32) * (root * v_scale)[:, None]
            y = rounded(y, tl.zeros([1], OPERAND), PRECISION)  # (T, SLICE_V)
            v_sum = v_sum * fade + folded(y.to(tl.float32) * root[:, None], ROWS)
            v_acc = tl.dot(tl.trans(y), x, v_acc * fade, input_precision=PRECISION)  # (SLICE_V, D)
        # What decides on the keys' origin and unit is of the keys alone: all slices must agree.
        k_total, share_of = tl.sum(k_sum, 0), 1 / tl.sum(omega, 0)
        k_bad, v_bad = not_finite(k_total), not_finite(tl.sum(v_sum, 0))
        mean = k_total * share_of  # (D,) from the origin
        mean_2 = tl.sum(mean * mean, 0)
        if SLICES == 1:
            on_diagonal = slice_dim[:, None] == dim[None, :]
            # Along one axis after the other, Triton 3.7 does not compile it for Blackwell.
            trace = tl.sum(tl.where(on_diagonal, k_acc, 0.0))
        else:
            trace = tl.sum(squares, 0)
        spread = tl.maximum(trace * share_of - mean_2, 0.0)
        far = ~k_bad & (mean_2 > FAR * ridge_in(ridge, k_unit)) & (mean_2 > 8 * spread)
        if (sweeps > 0) & (k_bad | v_bad | far):
            sweeps -= 1
            if far:
                step = mean * k_unit
                origin += step
                offset += step
                s_origin += tl.sum(step * q, 0)
                if SLICES > 1:
                    slice_origin += tl.sum(slice_sum, 0) * (share_of * k_unit)
            k_top = tl.zeros([BLOCK_T], tl.float32)
            v_top = tl.zeros([BLOCK_T], tl.float32)
            for j in tl.range(begin, end, BLOCK_T):
                key = j + tl.arange(0, BLOCK_T)
                seen = (key >= start) & (key < end)
                k_rows = row_offsets(block_table, table_stride_s, pages, j, seen, k_stride_b, k_stride_s, PAGE, BLOCK_T)
                v_rows = row_offsets(block_table, table_stride_s, pages, j, seen, v_stride_b, v_stride_s, PAGE, BLOCK_T)
                x = load_cached(k_base, k_rows, seen, 0, HEAD_DIM, BLOCK_D).to(tl.float32) - origin[None, :]
                y = load_cached(v_base, v_rows, seen, slice_id * SLICE_V, V_DIM, SLICE_V).to(tl.float32)
                x = tl.where((dim < HEAD_DIM)[None, :], x, 0.0)
                k_top = tl.maximum(k_top, tl.where(seen, tl.max(tl.abs(finite_or_zero(x)), 1), 0.0))
                v_top = tl.maximum(v_top, tl.max(tl.abs(finite_or_zero(y)), 1))
            if k_bad | far:
                k_unit = fitting_unit(tl.max(k_top, 0), k_least)
            if v_bad:
                v_unit = fitting_unit(tl.max(v_top, 0), least)
        else:
            sweeps = -1

    moments_out += slot * (BLOCK_D + BLOCK_V) * BLOCK_D
    sums_out += slot * (BLOCK_D + BLOCK_V)
    scalars_out += (slot * SLICES + slice_id) * SCALARS
    tl.store(scalars_out, m)
    tl.store(scalars_out + 1, tl.sum(omega, 0))
    tl.store(scalars_out + 2, k_unit)
    tl.store(scalars_out + 3, v_unit)
    if slice_id == 0:
        tl.store(offset_out + slot * BLOCK_D + dim, offset)
    tl.store(moments_out + slice_dim[:, None] * BLOCK_D + dim[None, :], k_acc, mask=(slice_dim < BLOCK_D)[:, None])
    tl.store(
        moments_out + (BLOCK_D + slice_v)[:, None] * BLOCK_D + dim[None, :], v_acc, mask=(slice_v < BLOCK_V)[:, None]
    )
    if slice_id == 0:
        tl.store(sums_out + dim, tl.sum(k_sum, 0))
    tl.store(sums_out + BLOCK_D + slice_v, tl.sum(v_sum, 0), mask=slice_v < BLOCK_V)


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces"])
def decode_merge_kernel(
    moments_ptr, sums_ptr, scalars_ptr, offset_ptr, seqlens_k, moments_out, sums_out, scalars_out, seqlens_k_stride,
    first_pair, kv_heads, group, q_len, k_len, window, pieces,
    SLICES: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M = BLOCK_M rows of C and of Cov(v, k), (systems, D + V, D), and of d and v_mean, (systems, D + V), in units that
    fit all pieces: scalars (systems, 4) as those of a piece.

    With p_i the share of piece i of the weights, C_i its covariance and c_i its mean from the query, d = sum p_i c_i
    and C = sum p_i (C_i + (c_i - d) (c_i - d)^T); Cov(v, k) likewise. PIECES: ``pieces`` rounded up to a power of two.
    """
    blocks: tl.constexpr = (BLOCK_D + BLOCK_V) // BLOCK_M
    system, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pair, n = first_pair + tl.program_id(0) // blocks // (group * q_len), tl.program_id(0) // blocks % q_len
    start, stop = key_span(seqlens_k, seqlens_k_stride, pair // kv_heads, n, q_len, k_len, window)
    _, _, active = piece_of(start, stop, pieces, BLOCK_T)
    if stop <= start:
        return
    is_key = block * BLOCK_M < BLOCK_D
    # Every slice has the m, omega and unit of the keys; each has a unit of its values, whose rows start where its do.
    slice_v: tl.constexpr = BLOCK_V // SLICES if BLOCK_V // SLICES > 16 else 16
    owner = tl.where(is_key, 0, (block * BLOCK_M - BLOCK_D) // slice_v)
    scalars_ptr += system * pieces * SLICES * SCALARS
    index = tl.arange(0, PIECES)  # I = PIECES, of which those from ``active`` on are no pieces
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
    k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)

    row, dim = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows, sums_ptr = BLOCK_D + BLOCK_V, sums_ptr + system * pieces * (BLOCK_D + BLOCK_V)
    offset_ptr += system * pieces * BLOCK_D
    means = tl.load(sums_ptr + index[:, None] * rows + dim[None, :], mask=there[:, None], other=0.0)  # (I, D)
    offsets = tl.load(offset_ptr + index[:, None] * BLOCK_D + dim[None, :], mask=there[:, None], other=0.0)
    centres = means * (k_units * k_scale / omega_all)[:, None] + offsets * k_scale
    d = tl.sum(centres * (weight / omega)[:, None], 0)  # (D,)

    # The same of this program's rows; those of the values have a unit of their own, and no offset.
    unit_slot, row_scale = tl.where(is_key, 2, 3), tl.where(is_key, k_scale, v_scale)
    scalars_ptr += owner * SCALARS
    row_units = tl.load(scalars_ptr + index * SLICES * SCALARS + unit_slot, mask=there, other=0.0) * row_scale  # (I,)
    own = tl.load(sums_ptr + index[:, None] * rows + row[None, :], mask=there[:, None], other=0.0)  # (I, M)
    away = tl.load(offset_ptr + index[:, None] * BLOCK_D + row[None, :], mask=there[:, None] & is_key, other=0.0)
    own = own * (row_units / omega_all)[:, None] + away * k_scale
    own_mean = tl.sum(own * (weight / omega)[:, None], 0)  # (M,)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(0, active, num_stages=STAGES):
        tile = tl.load(moments_ptr + ((system * pieces + i) * rows + row)[:, None] * BLOCK_D + dim[None, :])  # (M, D)
        piece = scalars_ptr + i * SLICES * SCALARS
        piece_m, inverse = tl.load(piece), 1 / tl.load(piece + 1)
        column_unit, row_unit = tl.load(piece + 2) * k_scale, tl.load(piece + unit_slot) * row_scale
        mean = tl.load(sums_ptr + i * rows + dim) * (inverse * column_unit)  # (D,) from the piece's origin
        row_mean = tl.load(sums_ptr + i * rows + row) * (inverse * row_unit)  # (M,)
        centre = mean + tl.load(offset_ptr + i * BLOCK_D + dim) * k_scale
        row_centre = row_mean + tl.load(offset_ptr + i * BLOCK_D + row, mask=(row >= 0) & is_key, other=0.0) * k_scale
        tile = tile * (inverse * column_unit * row_unit) - row_mean[:, None] * mean[None, :]
        tile += (row_centre - own_mean)[:, None] * (centre - d)[None, :]
        total += tile * (tl.exp2(piece_m - m) / (inverse * omega))
    row = system * rows + row
    tl.store(moments_out + row[:, None] * BLOCK_D + dim[None, :], total)
    tl.store(sums_out + row, own_mean)
    if block == 0:
        scalars_out += system * SCALARS
        tl.store(scalars_out, m)
        tl.store(scalars_out + 1, omega)
        tl.store(scalars_out + 2, k_unit)
        tl.store(scalars_out + 3, v_unit)


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window"])
def decode_solve_kernel(
    moments, sums_ptr, scalars_ptr, offset_ptr, seqlens_k, ridge_ptr, y_ptr, o_out,
    seqlens_k_stride, ridge_stride_b, ridge_stride_h, ridge_stride_s, o_stride_b, o_stride_h, o_stride_s, o_stride_d,
    first_pair, kv_heads, group, q_len, k_len, window, delta_eps,
    V_DIM: tl.constexpr, MERGED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """o of one system from its moments (systems, R = D + V, D), which are overwritten. MERGED: the moments are the
    merge kernel's; if not, there is one piece.

    Cholesky's factor of A = C + lambda I, with Cov(v, k) for further rows: A = L L^T, G = Cov(v, k) L^-T, y = L^-1 d,
    and Cov(v, k) z = G y, so that nothing is solved backwards (cholesky.py). y_ptr: (systems, D). Each warp has M rows,
    of BLOCK_R, which is R rounded up to a power of two.
    """
    system = tl.program_id(0).to(tl.int64)
    pair, member = first_pair + tl.program_id(0) // (group * q_len), tl.program_id(0) % (group * q_len)
    sequence, n = pair // kv_heads, member % q_len
    q_head = ((pair % kv_heads) * group + member // q_len).to(tl.int64)
    start, stop = key_span(seqlens_k, seqlens_k_stride, sequence, n, q_len, k_len, window)
    o_base = o_out + sequence.to(tl.int64) * o_stride_b + q_head * o_stride_h + n * o_stride_s
    W: tl.constexpr = WARPS
    R: tl.constexpr = BLOCK_D + BLOCK_V
    row = tl.arange(0, W)[:, None] * (BLOCK_R // W) + tl.arange(0, BLOCK_R // W)[None, :]  # (W, M)
    panel = tl.arange(0, PANEL)
    o_ptrs, there = o_base + (row - BLOCK_D) * o_stride_d, (row >= BLOCK_D) & (row < BLOCK_D + V_DIM)
    if stop <= start:
        tl.store(o_ptrs, tl.zeros([W, BLOCK_R // W], o_out.dtype.element_ty), mask=there)
        return
    moments += system * R * BLOCK_D
    sums_ptr += system * R
    scalars_ptr += system * SCALARS
    y_ptr += system * BLOCK_D
    omega, k_unit, v_unit = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    ridge = tl.load(ridge_ptr + sequence.to(tl.int64) * ridge_stride_b + q_head * ridge_stride_h + n * ridge_stride_s)
    scaled_ridge = ridge_in(ridge, k_unit)
    share = 1 / omega
    # d if MERGED, else the mean of the keys from their origin; then the mean of the values
    mean = tl.load(sums_ptr + row, mask=row < R, other=0.0)  # (W, M)
    if not MERGED:
        offset_ptr += system * BLOCK_D
        mean *= share

    d_z = tl.zeros([W], tl.float32)
    slope = tl.zeros([W, BLOCK_R // W], tl.float32)
    rows, own = panel_of(moments, row, 0, R, BLOCK_D)
    tl.debug_barrier()
    for p in tl.range(0, BLOCK_D, PANEL):
        own_row = tl.zeros([W, 1], tl.int32) + (p + panel)[None, :]  # (W, P)
        b = tl.load(sums_ptr + own_row)  # (W, P) of d
        if not MERGED:
            b *= share
            rows = rows * share - mean[:, :, None] * b[:, None, :]
            own = own * share - b[:, :, None] * b[:, None, :]
            b += tl.load(offset_ptr + own_row) * inverse_power(k_unit)
        # Of the square, which ``rows`` holds too, no more is asked than what ``own`` tells.
        own += tl.where(own_row[:, :, None] == (p + panel)[None, None, :], scaled_ridge, 0.0)
        rows, b, inverse, later = factored_panel(rows, own, b, p, moments, y_ptr, row, scaled_ridge, R, BLOCK_D)
        y = tl.sum(inverse * b[:, :, None], 1)  # (W, P)
        d_z += tl.sum(y * y, 1)
        slope += tl.sum(rows * y[:, None, :], 2)
        tl.store(y_ptr + own_row, y)
        rows, own = later
        tl.debug_barrier()

    # NaN where anything was not finite: of one value, of all.
    flaw = 0.0 * (tl.sum(tl.sum(mean, 1), 0) + omega + ridge)
    guard = 1 / (1 + delta_eps * (1 + d_z) / omega)  # (W,)
    o = (mean - slope) * (guard * v_unit)[:, None] + flaw
    tl.store(o_ptrs, o.to(o_out.dtype.element_ty), mask=there)


class Tuning(NamedTuple):
    """Sizes of tiles, warps a program, tiles in flight; ``pieces`` of the cache, None: as many as fill the device."""

    tile: int
    warps: int
    stages: int
    pieces: int | None = None
    solve_warps: int = 4


# Numbers of moments that the registers of one program hold; half of it where matrix instructions take both operands
# from registers.
MOMENTS = 32768
# Bytes of scratch memory that one round of launches may take.
SCRATCH = 256 * 2**20
MAX_PIECES = 32
MERGE_ROWS = 16
# How many ridges the square of a mean may be away from its origin. float32 sums lose the digits of the larger one: of a
# C that lies below it, and of a Cov(v, k), 1e-7 times this; products of tensor cores, which cut off, a few times that.
FAR, FAR_FULL = 4096.0, 128.0


def shared_rows(d: int, v: int, count: int) -> tuple[int, int]:
    """Rows of the keys' and of the values' moments that each of ``count`` programs has."""
    return max(16, d // count), max(16, v // count)


def slices(d: int, v: int, large: bool) -> int:
    """Programs that share the rows of one system's moments; d and v are powers of two, ``large`` is `configs.large`."""
    count = 1
    while sum(shared_rows(d, v, count)) * d > (MOMENTS if large else MOMENTS // 2):
        count *= 2
    return count


def tuning(d: int, v: int, half: bool, full: bool, large: bool = True) -> Tuning:
    """For padded widths ``d`` and ``v``; ``full``: float32 products without tensor cores."""
    wide = sum(shared_rows(d, v, slices(d, v, large))) * d >= MOMENTS // 2
    if half:
        return Tuning(64 if max(d, v) <= 128 else 32, 8 if wide else 4, 3)
    return Tuning(16 if wide or full else 32, 8 if wide else 4, 1 if full else 2)


def pieces_of(programs: int, tiles: int, slots: int) -> int:
    """Into how many pieces to cut caches of ``tiles`` tiles, with ``programs`` a piece, on a device that runs ``slots``
    programs at a time: waves times (tiles a piece and what a program costs beside them), and the merge."""
    most = max(1, min(MAX_PIECES, tiles // 2))
    cost = lambda n: -(-programs * n // slots) * (-(-tiles // n) + (4 if n == 1 else 6)) + 0.01 * n
    return min(range(1, most + 1), key=cost)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens_k: Tensor, ridge: Tensor, scale: float, delta_eps: float,
    window: int | None, block_table: Tensor | None, out: Tensor, tuned: Tuning | None = None,
) -> Tensor:  # fmt: skip
    """Local linear attention of the N newest tokens of each sequence with all cached keys, into ``out``.

    q: (B, Hq, N, D). k_cache, v_cache: (B, Hkv, L, D) and (B, Hkv, L, Dv), or with a ``block_table`` (B, pages) of
    int32 (pages, Hkv, page size, D and Dv), the page size a multiple of 16: key j of sequence b lies in page
    block_table[b, j // page size]. Last strides of 1. seqlens_k: (B,) int32, valid keys with those of the new tokens,
    clamped to what there is room for. ridge: (B, Hq, N) float32. out: (B, Hq, N, Dv).

    Query n sees the keys up to seqlens_k - N + n, with a ``window`` only the latest of them; if none, its output is 0.
    What else the cache holds does not matter. Pages out of range are taken for the nearest that exists: garbage stays
    in its own sequence. Nothing waits for the device, and grids depend on shapes alone, so a CUDA graph of the call
    stays right while lengths, tables and contents change.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, v_dim = k_cache.shape[1], v_cache.shape[-1]
    group = q_heads // kv_heads
    page = 0 if block_table is None else k_cache.shape[2]
    k_len = k_cache.shape[2] if block_table is None else block_table.shape[1] * page
    if out.numel() == 0:
        return out
    if k_len == 0:
        return out.zero_()
    window = min(window or k_len, k_len)
    half = q.dtype != torch.float32
    full = torch.get_float32_matmul_precision() == "highest"
    d, v = configs.padded(head_dim), configs.padded(v_dim)
    large = configs.large(configs.capability(q.device))
    shares = slices(d, v, large)
    t = tuned or tuning(d, v, half, full, large)
    pairs = batch * kv_heads
    members = group * q_len
    pieces = t.pieces
    if pieces is None:
        tiles = min(cdiv(k_len, t.tile), cdiv(window, t.tile) + 1)
        # Two programs of four warps go where one of eight does.
        pieces = pieces_of(pairs * members * shares, tiles, configs.processors(q.device) * max(1, 8 // t.warps))
    each = members * pieces * (d + v) * d * 4
    at_once = max(1, min(pairs, SCRATCH // each))
    systems = at_once * members
    empty = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)
    moments, sums = empty(systems, pieces, d + v, d), empty(systems, pieces, d + v)
    scalars, offset = empty(systems, pieces, shares, SCALARS.value), empty(systems, pieces, d)
    y = empty(systems, d)
    merging = pieces > 1 or shares > 1
    merged = (moments, sums, scalars)
    if merging:
        merged = empty(systems, d + v, d), empty(systems, d + v), empty(systems, SCALARS.value)
    table = seqlens_k if block_table is None else block_table  # where there are no pages it is not read
    table_strides = (0, 0) if block_table is None else block_table.stride()
    rows_all = triton.next_power_of_2(d + v)
    solve_warps = min(t.solve_warps, rows_all // PANEL.value)  # each has at least a panel's height of rows
    vector = 8 if half else 4  # numbers of one load of a thread
    sizes = {"BLOCK_D": d, "BLOCK_V": v}
    slice_d, slice_v = shared_rows(d, v, shares)
    rows = min(t.tile, max(1, 32 * t.warps * vector // max(d, vector)))

    for first in range(0, pairs, at_once):
        count = min(at_once, pairs - first)
        shape = (first, kv_heads, group, q_len, k_len, window)
        launch(
            decode_moments_kernel, "decode", (count * members * pieces * shares,), q.device,
            q, k_cache, v_cache, seqlens_k, table, ridge, moments, sums, scalars, offset,
            *q.stride(), *k_cache.stride()[:3], *v_cache.stride()[:3], seqlens_k.stride(0), *table_strides,
            *ridge.stride(), *shape, pieces, k_cache.shape[0], scale,
            HEAD_DIM=head_dim, V_DIM=v_dim, PAGE=page, SLICES=shares,
            PRECISION="ieee" if half or full else "tf32", OPERAND=tl.float16 if half else tl.float32,
            FAR=FAR if half or not full else FAR_FULL, BLOCK_T=t.tile, SLICE_D=slice_d, SLICE_V=slice_v, ROWS=rows,
            num_warps=t.warps, num_stages=t.stages, **sizes,
        )  # fmt: skip
        if merging:
            launch(
                decode_merge_kernel, "decode", (count * members * (d + v) // MERGE_ROWS,), q.device,
                moments, sums, scalars, offset, seqlens_k, *merged, seqlens_k.stride(0), *shape, pieces,
                SLICES=shares, PIECES=triton.next_power_of_2(pieces), BLOCK_T=t.tile, BLOCK_M=MERGE_ROWS, STAGES=4,
                num_warps=4, **sizes,
            )  # fmt: skip
        launch(
            decode_solve_kernel, "decode", (count * members,), q.device,
            *merged, offset, seqlens_k, ridge, y, out, seqlens_k.stride(0), *ridge.stride(), *out.stride(),
            *shape, delta_eps,
            V_DIM=v_dim, MERGED=merging, BLOCK_R=rows_all, WARPS=solve_warps,
            num_warps=solve_warps, num_stages=2, **sizes,
        )  # fmt: skip
    return out
