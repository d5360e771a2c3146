"""Decoding: a few new queries a sequence against a cache of keys and values. One pass over the cache, exact.

With few queries the moments of each fit in registers, so that no iteration takes another. Two kernels:

moments   a program for each query and piece of the cache: the sums of w, w k, w v, w k k^T and w v k^T
solve     adds up the pieces, solves with A = C + lambda I, and makes o by (2.3) of docs/math.md (decode_solve.py)

Letters of the shape comments: T = keys a tile; D, V = BLOCK_D, BLOCK_V, the widths of keys and values rounded up to
powers of two of at least 16. A system is a query of one head: (b Hq + h) N + n.

Precision. Keys enter relative to an origin, the last key that the query sees: a common offset costs no digits. The
operands of the two matrix products are x_j = sqrt(w_j) (k_j - origin) and v_scaled_j = sqrt(w_j) v_j, rounded once, and
*all* sums are made of the rounded numbers. They are then the moments of slightly moved keys and values: C is symmetric
and not negative, and where one key has all the weight it vanishes, though that key is not the origin. Where the mean of
a piece turns out to be far from the origin, beside both the spread of the keys and the ridge, the program goes over its
piece again, with the mean for an origin. Pieces are centred one by one, and added with what lies between their means.

Units. The operands are float16 for 16-bit inputs, in units of powers of two that the origin and its value suggest.
What a piece holds, times the roots of weights, may be larger by 2**11; beyond that its sums are not finite, and the
program goes over it again with units that fit.
"""

import triton
import triton.language as tl

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

# Numbers that describe a piece: the maximum m of its logits, omega, and the units of its keys and values.
SCALARS: tl.constexpr = tl.constexpr(4)
# A weight may be 2**HEADROOM before the sums fade: for most tiles they do not.
HEADROOM: tl.constexpr = tl.constexpr(8.0)
# At every so many tiles it is looked whether they must. Where a weight in between is larger than 2**MOST_HEADROOM, the
# sums are made again: of operands in their units float16 holds so much.
LOOK: tl.constexpr = tl.constexpr(8)
MOST_HEADROOM: tl.constexpr = tl.constexpr(16.0)
# Of operands: its inverse shall be normal.
LEAST_UNIT: tl.constexpr = tl.constexpr(2.0**-100)


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
    SLICE: tl.constexpr,
):  # fmt: skip
    """Of keys j to j + T: whether they lie in ``start`` to ``stop``, (T,); the offsets of the keys, (T,); keys, (T, D);
    and columns ``first_v`` on of values, (T, SLICE)."""
    key = j + tl.arange(0, T)
    seen = (key >= start) & (key < stop)
    k_offsets = tile_offsets(k_head, table, pages, j, seen, PAGE, T)
    v_offsets = tile_offsets(v_head, table, pages, j, seen, PAGE, T)
    k = load_cached(k_head.ptr, k_offsets, seen, 0, SHAPE.HEAD_DIM, SHAPE.BLOCK_D)
    v = load_cached(v_head.ptr, v_offsets, seen, first_v, SHAPE.V_DIM, SLICE)
    return seen, k_offsets, k, v


@triton.jit
def no_moments(T: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr):
    """What the sums over a piece begin with: the largest logits, omega, the sums of keys and of values, the moments."""
    return (
        tl.full([T], float("-inf"), tl.float32), tl.zeros([T], tl.float32),
        tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, SLICE], tl.float32), tl.zeros([2 * SLICE, D], tl.float32),
    )  # fmt: skip


@triton.jit
def no_slice(D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr):
    """The same of what a slice of the keys' columns adds up for itself: their sum, and the squares of whole keys."""
    return tl.zeros([ROWS, SLICE], tl.float32), tl.zeros([ROWS, D], tl.float32)


@triton.jit
def fitting_unit(largest, least):
    """The unit of operands of which the ``largest`` is this: there it lies in [16, 32)."""
    return tl.maximum(power_of_two(largest) * 0.0625, least)


@triton.jit
def least_unit(ridge):
    """Of keys: those so much smaller than the root of the ridge do not matter."""
    return tl.maximum(power_of_two(tl.sqrt(ridge)) * 8.881784197001252e-16, LEAST_UNIT)  # 2**-50


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
def not_finite(x):
    return tl.max(tl.where(finite(x), 0, 1), 0) > 0


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces", "pages"])
def decode_moments_kernel(
    q_in, k_in, v_in, caches, block_table, ridge_in, parts_out,
    first_pair, kv_heads, group, q_len, k_len, window, pieces, pages, scale,
    SHAPE: tl.constexpr, PAGE: tl.constexpr, SLICES: tl.constexpr, OPERAND: tl.constexpr, FAR: tl.constexpr,
    BLOCK_T: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one query and one piece of its keys, with w_j = 2**(factor q.(k_j - origin) - m), m the largest of those
    logits, and x and v_scaled as above:

    moments (systems, pieces, D + V, D) = sum x x^T over sum v_scaled x^T; sums (systems, pieces, D + V) =
    sum sqrt(w) x beside sum sqrt(w) v_scaled; scalars (systems, pieces, slices, 4) = m, omega, units; offset
    (systems, pieces, D) = origin - q.

    SLICES programs have a share of the rows each, SLICE of the keys and of the values: registers may not hold all, and
    few systems have few programs. Both shares are one product, whose rows are a key's and a value's in turn.
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
    WHOLE: tl.constexpr = SLICES == 1 and SLICE == D  # the slice of a key is the key
    first_column = slice_id * SLICE
    dim, column = tl.arange(0, D), first_column + tl.arange(0, SLICE)
    q_base = q_in.ptr + sequence.to(tl.int64) * q_in.stride_b + q_head.to(tl.int64) * q_in.stride_h + n * q_in.stride_s
    q = tl.load(q_base + dim * q_in.stride_d, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32)  # (D,)
    k_last = k_head.ptr + key_offsets(k_head, table, pages, stop - 1, None, PAGE)
    v_last = v_head.ptr + key_offsets(v_head, table, pages, stop - 1, None, PAGE)
    origin = finite_or_zero(tl.load(k_last + dim, mask=dim < SHAPE.HEAD_DIM, other=0.0).to(tl.float32))  # (D,)
    v_first = tl.load(v_last + column, mask=column < SHAPE.V_DIM, other=0.0).to(tl.float32)  # (SLICE,)
    if not WHOLE:
        slice_origin = tl.load(k_last + column, mask=column < SHAPE.HEAD_DIM, other=0.0).to(tl.float32)
        slice_origin = finite_or_zero(slice_origin)
        slice_sum, squares = no_slice(D, SLICE, ROWS)
    ridge = load_query_ridge(ridge_in, sequence, q_head, n)
    k_least = least_unit(ridge)
    offset = origin - q
    q = q * (scale * LOG2E)
    s_origin = tl.full([], 0.0, tl.float32)  # all logits are taken from that of the last key
    k_unit = fitting_unit(tl.max(tl.abs(origin), 0), k_least)
    v_unit = fitting_unit(tl.max(tl.abs(finite_or_zero(v_first)), 0), LEAST_UNIT)

    top, omega, k_sum, v_sum, moments = no_moments(BLOCK_T, D, SLICE, ROWS)
    m = tl.full([], float("-inf"), tl.float32)
    k_total, v_total, total = tl.zeros([D], tl.float32), tl.zeros([SLICE], tl.float32), 0.0
    highest = m
    sweeps = 2  # that may yet be repeated
    while sweeps >= 0:
        top, omega, k_sum, v_sum, moments = no_moments(BLOCK_T, D, SLICE, ROWS)
        if not WHOLE:
            slice_sum, squares = no_slice(D, SLICE, ROWS)
        k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)
        for j in tl.range(begin, end, BLOCK_T):
            seen, k_offsets, k, v = load_keys_and_values(
                k_head, v_head, table, pages, j, start, end, first_column, PAGE, SHAPE, BLOCK_T, SLICE
            )  # fmt: skip
            x = k.to(tl.float32) - origin[None, :]  # (T, D)
            s = tl.where(seen, tl.sum(x * q[None, :], 1) + s_origin, float("-inf"))  # (T,)
            top = tl.maximum(top, s)
            if (j - begin) % (LOOK * BLOCK_T) == 0:
                so_far = tl.max(top, 0)
                if so_far > m + HEADROOM:
                    fade = tl.exp2(m - so_far)
                    m = so_far
                    omega *= fade
                    k_sum *= fade
                    v_sum *= fade
                    moments *= fade
                    if not WHOLE:
                        slice_sum *= fade
                        squares *= fade
            root = tl.exp2(0.5 * (s - m))  # (T,) the square roots of the weights
            omega += root * root
            x = rounded(x * (root * k_scale)[:, None], tl.zeros([1], OPERAND), SHAPE.TF32)  # (T, D)
            k_sum += folded(x.to(tl.float32) * root[:, None], ROWS)
            part = x  # (T, SLICE) columns of x
            if not WHOLE:
                part = load_cached(k_head.ptr, k_offsets, seen, first_column, SHAPE.HEAD_DIM, SLICE)
                part = (part.to(tl.float32) - slice_origin[None, :]) * (root * k_scale)[:, None]
                part = rounded(part, tl.zeros([1], OPERAND), SHAPE.TF32)
                slice_sum += folded(part.to(tl.float32) * root[:, None], ROWS)
                squares += folded(x.to(tl.float32) * x.to(tl.float32), ROWS)
            v_scaled = v.to(tl.float32) * (root * v_scale)[:, None]
            v_scaled = rounded(v_scaled, tl.zeros([1], OPERAND), SHAPE.TF32)  # (T, SLICE)
            v_sum += folded(v_scaled.to(tl.float32) * root[:, None], ROWS)
            both = tl.reshape(tl.join(part, v_scaled), [BLOCK_T, 2 * SLICE])
            moments = dot(tl.trans(both), x, moments, SHAPE.TF32)  # (2 SLICE, D)
        # What decides on the keys' origin and unit is of the keys alone: all slices must agree.
        k_total, v_total, total = tl.sum(k_sum, 0), tl.sum(v_sum, 0), tl.sum(omega, 0)
        mean = k_total / total  # (D,) from the origin
        mean_2 = tl.sum(mean * mean, 0)
        k_bad, v_bad = ~finite(mean_2), not_finite(v_total)
        far = ~k_bad & (mean_2 > FAR * ridge_in_units(ridge, k_unit))
        if far:
            if WHOLE:
                on_diagonal = tl.arange(0, 2 * SLICE)[:, None] == 2 * dim[None, :]
                # Along one axis after the other, Triton 3.7 does not compile it for Blackwell.
                trace = tl.sum(tl.where(on_diagonal, moments, 0.0))
            else:
                trace = tl.sum(squares)
            far = mean_2 > 8 * tl.maximum(trace / total - mean_2, 0.0)  # than the spread
        highest = tl.max(top, 0)
        risen = highest > m + MOST_HEADROOM
        if (sweeps > 0) & (k_bad | v_bad | far | risen):
            sweeps -= 1
            m = tl.where(risen, highest, m)
            if far:
                step = mean * k_unit
                origin += step
                offset += step
                s_origin += tl.sum(step * q, 0)
                if not WHOLE:
                    slice_origin += tl.sum(slice_sum, 0) * (k_unit / total)
            k_top = tl.zeros([BLOCK_T], tl.float32)
            v_top = tl.zeros([BLOCK_T], tl.float32)
            for j in tl.range(begin, end, BLOCK_T):
                seen, _, k, v = load_keys_and_values(
                    k_head, v_head, table, pages, j, start, end, first_column, PAGE, SHAPE, BLOCK_T, SLICE
                )  # fmt: skip
                x = k.to(tl.float32) - origin[None, :]
                x = tl.where((dim < SHAPE.HEAD_DIM)[None, :], x, 0.0)
                k_top = tl.maximum(k_top, tl.where(seen, tl.max(tl.abs(finite_or_zero(x)), 1), 0.0))
                v_top = tl.maximum(v_top, tl.max(tl.abs(finite_or_zero(v.to(tl.float32))), 1))
            if k_bad | far:
                k_unit = fitting_unit(tl.max(k_top, 0), k_least)
            if v_bad:
                v_unit = fitting_unit(tl.max(v_top, 0), LEAST_UNIT)
        else:
            sweeps = -1

    fade = tl.exp2(m - highest)
    total, k_total, v_total, moments = total * fade, k_total * fade, v_total * fade, moments * fade
    R: tl.constexpr = D + SHAPE.BLOCK_V
    store_scalars(parts_out.scalars + (slot * SLICES + slice_id) * SCALARS, highest, total, k_unit, v_unit)
    turn = tl.arange(0, 2 * SLICE)
    of_slice = first_column + turn // 2
    row = tl.where(turn % 2 == 0, of_slice, D + of_slice)
    inside = of_slice < tl.where(turn % 2 == 0, D, SHAPE.BLOCK_V)
    moments_ptr, sums = parts_out.moments + slot * R * D, parts_out.sums + slot * R
    tl.store(moments_ptr + row[:, None] * D + dim[None, :], moments, mask=inside[:, None])
    if slice_id == 0:
        tl.store(parts_out.arrivals + system, 0, mask=piece == 0)
        tl.store(parts_out.offset + slot * D + dim, offset)
        tl.store(sums + dim, k_total)
    tl.store(sums + D + column, v_total, mask=column < SHAPE.BLOCK_V)
