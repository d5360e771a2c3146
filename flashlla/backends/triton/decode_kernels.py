"""Decoding: a few new queries a sequence against a cache of keys and values. One pass over the cache, exact.

With few queries the moments of each fit in registers, so nothing is iterated. Three kernels:

moments   a program for each query and piece of the cache: the sums of w, w k, w v, w k k^T and w v k^T
merge     adds up the pieces, where there are several
solve     C and Cov(v, k) from the moments, a Cholesky factor of A = C + lambda I, and o by (2.3) of docs/math.md

Letters of the shape comments: T = keys a tile; D, V = BLOCK_D, BLOCK_V, the widths of keys and values rounded up to
powers of two of at least 16; P = 16, the columns of a panel of A; W, warps of the solve. A system is a query of one
head: (b Hq + h) N + n.

Precision. Keys enter relative to an origin, the last key that the query sees: a common offset costs no digits. The
operands of the two matrix products are x_j = sqrt(w_j) (k_j - origin) and v_scaled_j = sqrt(w_j) v_j, rounded once, and
*all* sums are made of the rounded numbers. They are then the moments of slightly moved keys and values: C is symmetric
and not negative, and where one key has all the weight it vanishes, though that key is not the origin. Where the mean of
a piece turns out to be far from the origin, beside both the spread of the keys and the ridge, the program goes over its
piece again, with the mean for an origin. Pieces are centred one by one, and added with what lies between their means.

Units. The operands are float16 for 16-bit inputs, in units of powers of two that the origin and its value suggest.
What a piece holds may be larger by 2**11; beyond that its sums are not finite, and the program goes over it again
with units that fit.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of
from flashlla.backends.triton.primitives import (
    LOG2E,
    clamp,
    dot,
    finite,
    finite_or_zero,
    inverse_power,
    power_of_two,
    ridge_in_units,
    rounded,
)
from flashlla.backends.triton.records import Strided
from flashlla.solvers import base as solvers

# Numbers that describe a piece: the maximum m of its logits, omega, and the units of its keys and values.
SCALARS: tl.constexpr = tl.constexpr(4)
# What of a product with A the factor may be off by, beside A's trace, (4.8): float32's rounding, a few times.
FACTOR_ERROR: tl.constexpr = tl.constexpr(2.0**-22)
SOUND: tl.constexpr = tl.constexpr(solvers.SOUND)


@triton.jit
def key_span(caches, sequence, n, q_len, k_len, window):
    """First and one past the last of the keys that new query ``n`` of ``sequence`` sees, which may be none."""
    length = tl.load(caches.stop + sequence.to(tl.int64) * caches.stop_stride).to(tl.int32)
    stop = tl.maximum(clamp(length, 0, k_len) - q_len + n + 1, 0)
    start = tl.maximum(stop - window, 0)
    if caches.start is not None:
        start = tl.maximum(start, tl.load(caches.start + sequence.to(tl.int64) * caches.start_stride).to(tl.int32))
    return start, stop


@triton.jit
def piece_of(start, stop, pieces, T: tl.constexpr):
    """First tile of a span of keys, tiles a piece, and how many pieces have any."""
    first = start // T
    tiles = tl.cdiv(stop, T) - first
    each = tl.maximum(tl.cdiv(tiles, pieces), 1)
    return first, each, tl.cdiv(tiles, each)


@triton.jit
def page_of(table, pages, index, seen):
    """Which of the cache's ``pages`` is the ``index``-th of a sequence: garbage in the table stays among them."""
    pointer, stride = table
    pointer += tl.cast(index, tl.int64) * stride
    page = tl.load(pointer) if seen is None else tl.load(pointer, mask=seen, other=0)
    return clamp(page, 0, pages - 1).to(tl.int64)


@triton.jit
def key_offsets(cache, table, pages, key, seen, PAGE: tl.constexpr):
    """Offsets of ``key``s in their head of the cache; PAGE is 0 where the cache has no pages."""
    if PAGE == 0:
        return key.to(tl.int64) * cache.stride_s
    else:
        page = page_of(table, pages, key // PAGE, seen)
        return page * cache.stride_b + (key % PAGE).to(tl.int64) * cache.stride_s


@triton.jit
def tile_offsets(cache, table, pages, j, seen, PAGE: tl.constexpr, T: tl.constexpr):
    """The same of keys j to j + T: (T,)."""
    row = tl.arange(0, T)
    if PAGE > 0 and PAGE % T == 0:  # the tile lies in one page
        page = page_of(table, pages, j // PAGE, None)
        return page * cache.stride_b + (j % PAGE + row).to(tl.int64) * cache.stride_s
    else:
        return key_offsets(cache, table, pages, j + row, seen, PAGE)


@triton.jit
def of_head(cache, sequence, kv_head, PAGE: tl.constexpr):
    """A `Strided` cache, from where the keys of a head begin: of its sequence, or of page 0."""
    base = cache.ptr + kv_head.to(tl.int64) * cache.stride_h
    if PAGE == 0:
        base += sequence.to(tl.int64) * cache.stride_b
    return Strided(base, cache.stride_b, cache.stride_h, cache.stride_s)


@triton.jit
def load_cached(base, offsets, seen, first, WIDTH: tl.constexpr, D: tl.constexpr):
    """Columns ``first`` to ``first + D`` of the rows at ``offsets``: (T, D), zero where not ``seen`` or past WIDTH."""
    dim = first + tl.arange(0, D)
    return tl.load(base + offsets[:, None] + dim[None, :], mask=seen[:, None] & (dim < WIDTH)[None, :], other=0.0)


@triton.jit
def load_keys_and_values(
    k_head, v_head, table, pages, j, start, stop, first_v, PAGE: tl.constexpr, SHAPE: tl.constexpr, T: tl.constexpr,
    SLICE_V: tl.constexpr,
):  # fmt: skip
    """Of keys j to j + T: whether they lie in ``start`` to ``stop``, (T,); the offsets of the keys, (T,); keys, (T, D);
    and columns ``first_v`` on of values, (T, SLICE_V)."""
    key = j + tl.arange(0, T)
    seen = (key >= start) & (key < stop)
    k_offsets = tile_offsets(k_head, table, pages, j, seen, PAGE, T)
    v_offsets = tile_offsets(v_head, table, pages, j, seen, PAGE, T)
    k = load_cached(k_head.ptr, k_offsets, seen, 0, SHAPE.HEAD_DIM, SHAPE.BLOCK_D)
    v = load_cached(v_head.ptr, v_offsets, seen, first_v, SHAPE.V_DIM, SLICE_V)
    return seen, k_offsets, k, v


@triton.jit
def no_moments(
    T: tl.constexpr, D: tl.constexpr, SLICE_D: tl.constexpr, SLICE_V: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What the sums over a piece begin with: m, omega, the sums and the moments of keys and of values."""
    return (
        tl.full([], float("-inf"), tl.float32), tl.zeros([T], tl.float32),
        tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, SLICE_V], tl.float32),
        tl.zeros([SLICE_D, D], tl.float32), tl.zeros([SLICE_V, D], tl.float32),
    )  # fmt: skip


@triton.jit
def no_slice(T: tl.constexpr, SLICE_D: tl.constexpr, ROWS: tl.constexpr):
    """The same of what a slice of the keys' columns adds up for itself: their sum, and the squares of whole keys."""
    return tl.zeros([ROWS, SLICE_D], tl.float32), tl.zeros([T], tl.float32)


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
def load_query_ridge(ridge, sequence, q_head, n):
    """Of one query."""
    base = ridge.ptr + sequence.to(tl.int64) * ridge.stride_b + q_head.to(tl.int64) * ridge.stride_h
    return tl.load(base + n * ridge.stride_s)


@triton.jit
def store_scalars(pointer, m, omega, k_unit, v_unit):
    tl.store(pointer, m)
    tl.store(pointer + 1, omega)
    tl.store(pointer + 2, k_unit)
    tl.store(pointer + 3, v_unit)


@triton.jit
def store_report(report, query, residual, omega):
    """Of one ``query``; ``residual`` (W,): every warp writes the same."""
    nowhere = tl.zeros_like(residual).to(tl.int32)
    tl.store(report.omega + query + nowhere, omega + tl.zeros_like(residual))
    tl.store(report.iterations + query + nowhere, nowhere)
    tl.store(report.residual + query + nowhere, residual)
    tl.store(report.converged + query + nowhere, residual <= SOUND)


@triton.jit
def not_finite(x):
    return tl.max(tl.where(finite(x), 0, 1), 0) > 0


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces", "pages"])
def decode_moments_kernel(
    q_in, k_in, v_in, caches, block_table, ridge_in, parts_out,
    first_pair, kv_heads, group, q_len, k_len, window, pieces, pages, scale,
    SHAPE: tl.constexpr, PAGE: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, FAR: tl.constexpr,
    BLOCK_T: tl.constexpr, SLICE_D: tl.constexpr, SLICE_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one query and one piece of its keys, with w_j = 2**(factor q.(k_j - origin) - m), x and v_scaled as above:

    moments (systems, pieces, D + V, D) = sum x x^T over sum v_scaled x^T; sums (systems, pieces, D + V) =
    sum sqrt(w) x beside sum sqrt(w) v_scaled; scalars (systems, pieces, slices, 4) = m, omega, units; offset
    (systems, pieces, D) = origin - q.

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
    start, stop = key_span(caches, sequence, n, q_len, k_len, window)
    first, each, active = piece_of(start, stop, pieces, BLOCK_T)
    if piece >= active:
        return
    system = pair.to(tl.int64) * (group * q_len) + member
    slot = system * pieces + piece
    begin, end = (first + piece * each) * BLOCK_T, tl.minimum((first + (piece + 1) * each) * BLOCK_T, stop)

    D: tl.constexpr = SHAPE.BLOCK_D
    k_head, v_head = of_head(k_in, sequence, kv_head, PAGE), of_head(v_in, sequence, kv_head, PAGE)
    table = (block_table.ptr + sequence.to(tl.int64) * block_table.stride_b, block_table.stride_s)
    first_v = slice_id * SLICE_V
    dim = tl.arange(0, D)
    slice_dim, slice_v = slice_id * SLICE_D + tl.arange(0, SLICE_D), first_v + tl.arange(0, SLICE_V)
    q_base = q_in.ptr + sequence.to(tl.int64) * q_in.stride_b + q_head.to(tl.int64) * q_in.stride_h + n * q_in.stride_s
    q = tl.load(q_base + dim * q_in.stride_d, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32)  # (D,)
    k_last = k_head.ptr + key_offsets(k_head, table, pages, stop - 1, None, PAGE)
    v_last = v_head.ptr + key_offsets(v_head, table, pages, stop - 1, None, PAGE)
    origin = finite_or_zero(tl.load(k_last + dim, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32))  # (D,)
    v_first = tl.load(v_last + slice_v, mask=slice_v < SHAPE.V_DIM, other=0.0).to(tl.float32)  # (SLICE_V,)
    if SLICES > 1:
        slice_origin = tl.load(k_last + slice_dim, mask=slice_dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32)
        slice_origin = finite_or_zero(slice_origin)
        slice_sum, squares = no_slice(BLOCK_T, SLICE_D, ROWS)
    ridge = load_query_ridge(ridge_in, sequence, q_head, n)
    least: tl.constexpr = 7.888609052210118e-31  # 2**-100
    k_least = least_unit(ridge)
    offset = origin - q
    q = q * (scale * LOG2E)
    s_origin = tl.full([], 0.0, tl.float32)  # all logits are taken from that of the last key
    k_unit = fitting_unit(tl.max(tl.abs(origin), 0), k_least)
    v_unit = fitting_unit(tl.max(tl.abs(finite_or_zero(v_first)), 0), least)

    m, omega, k_sum, v_sum, k_acc, v_acc = no_moments(BLOCK_T, D, SLICE_D, SLICE_V, ROWS)
    sweeps = 2  # that may yet be repeated
    while sweeps >= 0:
        m, omega, k_sum, v_sum, k_acc, v_acc = no_moments(BLOCK_T, D, SLICE_D, SLICE_V, ROWS)
        if SLICES > 1:
            slice_sum, squares = no_slice(BLOCK_T, SLICE_D, ROWS)
        k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)
        for j in tl.range(begin, end, BLOCK_T):
            seen, k_offsets, k, v = load_keys_and_values(
                k_head, v_head, table, pages, j, start, end, first_v, PAGE, SHAPE, BLOCK_T, SLICE_V
            )  # fmt: skip
            x = k.to(tl.float32) - origin[None, :]  # (T, D)
            s = tl.where(seen, tl.sum(x * q[None, :], 1) + s_origin, float("-inf"))  # (T,)
            m_next = tl.maximum(m, tl.max(s, 0))
            root = tl.exp2(0.5 * (s - m_next))  # (T,) the square roots of the weights
            fade = tl.exp2(m - m_next)
            m = m_next
            omega = omega * fade + root * root
            x = rounded(x * (root * k_scale)[:, None], tl.zeros([1], OPERAND), SHAPE.TF32)  # (T, D)
            k_sum = k_sum * fade + folded(x.to(tl.float32) * root[:, None], ROWS)
            if SLICES == 1:
                k_acc = dot(tl.trans(x), x, k_acc * fade, SHAPE.TF32)  # (D, D)
            else:
                part = load_cached(k_head.ptr, k_offsets, seen, slice_id * SLICE_D, SHAPE.HEAD_DIM, SLICE_D)
                part = (part.to(tl.float32) - slice_origin[None, :]) * (root * k_scale)[:, None]
                part = rounded(part, tl.zeros([1], OPERAND), SHAPE.TF32)  # (T, SLICE_D) columns of x
                slice_sum = slice_sum * fade + folded(part.to(tl.float32) * root[:, None], ROWS)
                squares = squares * fade + tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
                k_acc = dot(tl.trans(part), x, k_acc * fade, SHAPE.TF32)  # (SLICE_D, D)
            v_scaled = v.to(tl.float32) * (root * v_scale)[:, None]
            v_scaled = rounded(v_scaled, tl.zeros([1], OPERAND), SHAPE.TF32)  # (T, SLICE_V)
            v_sum = v_sum * fade + folded(v_scaled.to(tl.float32) * root[:, None], ROWS)
            v_acc = dot(tl.trans(v_scaled), x, v_acc * fade, SHAPE.TF32)  # (SLICE_V, D)
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
        far = ~k_bad & (mean_2 > FAR * ridge_in_units(ridge, k_unit)) & (mean_2 > 8 * spread)
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
                seen, _, k, v = load_keys_and_values(
                    k_head, v_head, table, pages, j, start, end, first_v, PAGE, SHAPE, BLOCK_T, SLICE_V
                )  # fmt: skip
                x = k.to(tl.float32) - origin[None, :]
                x = tl.where((dim < SHAPE.HEAD_DIM)[None, :], x, 0.0)
                k_top = tl.maximum(k_top, tl.where(seen, tl.max(tl.abs(finite_or_zero(x)), 1), 0.0))
                v_top = tl.maximum(v_top, tl.max(tl.abs(finite_or_zero(v.to(tl.float32))), 1))
            if k_bad | far:
                k_unit = fitting_unit(tl.max(k_top, 0), k_least)
            if v_bad:
                v_unit = fitting_unit(tl.max(v_top, 0), least)
        else:
            sweeps = -1

    V: tl.constexpr = SHAPE.BLOCK_V
    store_scalars(parts_out.scalars + (slot * SLICES + slice_id) * SCALARS, m, tl.sum(omega, 0), k_unit, v_unit)
    moments = parts_out.moments + slot * (D + V) * D
    sums = parts_out.sums + slot * (D + V)
    tl.store(moments + slice_dim[:, None] * D + dim[None, :], k_acc, mask=(slice_dim < D)[:, None])
    tl.store(moments + (D + slice_v)[:, None] * D + dim[None, :], v_acc, mask=(slice_v < V)[:, None])
    if slice_id == 0:
        tl.store(parts_out.offset + slot * D + dim, offset)
        tl.store(sums + dim, tl.sum(k_sum, 0))
    tl.store(sums + D + slice_v, tl.sum(v_sum, 0), mask=slice_v < V)


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces"])
def decode_merge_kernel(
    parts, caches, merged_out,
    first_pair, kv_heads, group, q_len, k_len, window, pieces,
    SHAPE: tl.constexpr, SLICES: tl.constexpr, SLICE_V: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M = BLOCK_M rows of C and of Cov(v, k), (systems, D + V, D), and of d and v_mean, (systems, D + V), in units that
    fit all pieces: scalars (systems, 4) as those of a piece.

    With p_i the share of piece i of the weights, C_i its covariance and c_i its mean from the query, d = sum p_i c_i
    and C = sum p_i (C_i + (c_i - d) (c_i - d)^T); Cov(v, k) likewise. PIECES: ``pieces`` rounded up to a power of two.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    blocks: tl.constexpr = (D + V) // BLOCK_M
    system, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pair, n = first_pair + tl.program_id(0) // blocks // (group * q_len), tl.program_id(0) // blocks % q_len
    start, stop = key_span(caches, pair // kv_heads, n, q_len, k_len, window)
    _, _, active = piece_of(start, stop, pieces, BLOCK_T)
    if stop <= start:
        return
    is_key = block * BLOCK_M < D
    # Every slice has the m, omega and unit of the keys; each has a unit of its values, whose rows start where its do.
    owner = tl.where(is_key, 0, (block * BLOCK_M - D) // SLICE_V)
    scalars_ptr = parts.scalars + system * pieces * SLICES * SCALARS
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

    row, dim = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    R: tl.constexpr = D + V
    sums_ptr = parts.sums + system * pieces * R
    offset_ptr = parts.offset + system * pieces * D
    means = tl.load(sums_ptr + index[:, None] * R + dim[None, :], mask=there[:, None], other=0.0)  # (I, D)
    offsets = tl.load(offset_ptr + index[:, None] * D + dim[None, :], mask=there[:, None], other=0.0)
    centres = means * (k_units * k_scale / omega_all)[:, None] + offsets * k_scale
    d = tl.sum(centres * (weight / omega)[:, None], 0)  # (D,)

    # The same of this program's rows; those of the values have a unit of their own, and no offset.
    unit_slot, row_scale = tl.where(is_key, 2, 3), tl.where(is_key, k_scale, v_scale)
    scalars_ptr += owner * SCALARS
    row_units = tl.load(scalars_ptr + index * SLICES * SCALARS + unit_slot, mask=there, other=0.0) * row_scale  # (I,)
    row_sums = tl.load(sums_ptr + index[:, None] * R + row[None, :], mask=there[:, None], other=0.0)  # (I, M)
    away = tl.load(offset_ptr + index[:, None] * D + row[None, :], mask=there[:, None] & is_key, other=0.0)
    row_centres = row_sums * (row_units / omega_all)[:, None] + away * k_scale
    row_d = tl.sum(row_centres * (weight / omega)[:, None], 0)  # (M,)

    total = tl.zeros([BLOCK_M, D], tl.float32)
    for i in tl.range(0, active, num_stages=STAGES):
        tile = tl.load(parts.moments + ((system * pieces + i) * R + row)[:, None] * D + dim[None, :])  # (M, D)
        piece = scalars_ptr + i * SLICES * SCALARS
        piece_m, inverse = tl.load(piece), 1 / tl.load(piece + 1)
        column_unit, row_unit = tl.load(piece + 2) * k_scale, tl.load(piece + unit_slot) * row_scale
        mean = tl.load(sums_ptr + i * R + dim) * (inverse * column_unit)  # (D,) from the piece's origin
        row_mean = tl.load(sums_ptr + i * R + row) * (inverse * row_unit)  # (M,)
        centre = mean + tl.load(offset_ptr + i * D + dim) * k_scale
        row_centre = row_mean + tl.load(offset_ptr + i * D + row, mask=(row >= 0) & is_key, other=0.0) * k_scale
        tile = tile * (inverse * column_unit * row_unit) - row_mean[:, None] * mean[None, :]
        tile += (row_centre - row_d)[:, None] * (centre - d)[None, :]
        total += tile * (tl.exp2(piece_m - m) / (inverse * omega))
    row = system * R + row
    tl.store(merged_out.moments + row[:, None] * D + dim[None, :], total)
    tl.store(merged_out.sums + row, row_d)
    if block == 0:
        store_scalars(merged_out.scalars + system * SCALARS, m, omega, k_unit, v_unit)


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window"])
def decode_solve_kernel(
    found, caches, ridge_in, half_solved_ptr, o_out, report_out,
    first_pair, kv_heads, group, q_len, k_len, window, delta_eps,
    SHAPE: tl.constexpr, MERGED: tl.constexpr, BLOCK_R: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """o of one system from its moments (systems, R = D + V, D), which are overwritten; and how it went, (4.8), to the
    `Report` report_out, if there is one. MERGED: the moments are the
    merge kernel's; if not, there is one piece.

    Cholesky's factor of A = C + lambda I, with Cov(v, k) for further rows: A = L L^T, G = Cov(v, k) L^-T, h = L^-1 d,
    and Cov(v, k) z = G h, so that nothing is solved backwards (cholesky.py). half_solved_ptr: (systems, D), for h. Each
    warp has M rows, of BLOCK_R, which is R rounded up to a power of two.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    system = tl.program_id(0).to(tl.int64)
    pair, member = first_pair + tl.program_id(0) // (group * q_len), tl.program_id(0) % (group * q_len)
    sequence, n = pair // kv_heads, member % q_len
    q_head = ((pair % kv_heads) * group + member // q_len).to(tl.int64)
    query = (sequence * (kv_heads * group) + q_head) * q_len + n  # of (B, Hq, N)
    start, stop = key_span(caches, sequence, n, q_len, k_len, window)
    o_base = o_out.ptr + sequence.to(tl.int64) * o_out.stride_b + q_head * o_out.stride_h + n * o_out.stride_s
    W: tl.constexpr = WARPS
    R: tl.constexpr = D + SHAPE.BLOCK_V
    row = tl.arange(0, W)[:, None] * (BLOCK_R // W) + tl.arange(0, BLOCK_R // W)[None, :]  # (W, M)
    first_columns = tl.arange(0, PANEL)  # those of the first panel
    o_ptrs, there = o_base + (row - D) * o_out.stride_d, (row >= D) & (row < D + SHAPE.V_DIM)
    if stop <= start:
        tl.store(o_ptrs, tl.zeros([W, BLOCK_R // W], o_out.ptr.dtype.element_ty), mask=there)
        if report_out is not None:
            store_report(
                report_out, (sequence * (kv_heads * group) + q_head) * q_len + n, tl.zeros([W], tl.float32), 0.0
            )
        return
    moments = found.moments + system * R * D
    sums_ptr = found.sums + system * R
    scalars_ptr = found.scalars + system * SCALARS
    half_solved_ptr += system * D
    omega, k_unit, v_unit = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    ridge = load_query_ridge(ridge_in, sequence, q_head, n)
    scaled_ridge = ridge_in_units(ridge, k_unit)
    share = 1 / omega
    # d if MERGED, else the mean of the keys from their origin; then the mean of the values
    mean = tl.load(sums_ptr + row, mask=row < R, other=0.0)  # (W, M)
    if not MERGED:
        offset_ptr = found.offset + system * D
        mean *= share

    d_z, d_2, trace = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    slope = tl.zeros([W, BLOCK_R // W], tl.float32)
    panel, square = panel_of(moments, row, 0, R, D)
    tl.debug_barrier()
    for p in tl.range(0, D, PANEL):
        column = p + first_columns
        square_row = tl.zeros([W, 1], tl.int32) + column[None, :]  # (W, P)
        b = tl.load(sums_ptr + square_row)  # (W, P) of d
        if not MERGED:
            b *= share
            panel = panel * share - mean[:, :, None] * b[:, None, :]
            square = square * share - b[:, :, None] * b[:, None, :]
            b += tl.load(offset_ptr + square_row) * inverse_power(k_unit)
        # Of the square, which ``panel`` holds too, no more is asked than what ``square`` tells.
        on_diagonal = square_row[:, :, None] == column[None, None, :]
        square += tl.where(on_diagonal, scaled_ridge, 0.0)
        if report_out is not None:
            d_2 += tl.sum(b * b, 1)
            trace += tl.sum(tl.sum(tl.where(on_diagonal, square, 0.0), 2), 1)
        panel, b, inverse, later = factored_panel(
            panel, square, b, p, moments, half_solved_ptr, row, scaled_ridge, R, D
        )  # fmt: skip
        half_solved = tl.sum(inverse * b[:, :, None], 1)  # (W, P)
        d_z += tl.sum(half_solved * half_solved, 1)
        slope += tl.sum(panel * half_solved[:, None, :], 2)
        tl.store(half_solved_ptr + square_row, half_solved)
        panel, square = later
        tl.debug_barrier()

    # NaN where anything was not finite: of one value, of all.
    flaw = 0.0 * (tl.sum(tl.sum(mean, 1), 0) + omega + ridge)
    guard = 1 / (1 + delta_eps * (1 + d_z) / omega)  # (W,)
    o = (mean - slope) * (guard * v_unit)[:, None] + flaw
    tl.store(o_ptrs, o.to(o_out.ptr.dtype.element_ty), mask=there)
    if report_out is not None:
        residual = FACTOR_ERROR * trace * tl.sqrt(d_z / (scaled_ridge * tl.where(d_2 > 0, d_2, 1.0))) + flaw
        store_report(report_out, query, residual, omega + flaw)
