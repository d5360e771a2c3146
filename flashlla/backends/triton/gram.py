"""The preconditioner "gram" (docs/math.md, section 4): for segments of queries, what the keys before them look like.

Two kernels before the solve. The first adds up the moments of chunks of keys; the second, for each segment of
queries, makes of the chunks before it the covariance G without weights, looks whether (G + lambda I)^-1 would help
there, and if so makes it, by way of Cholesky's factor. The solve is then launched twice: tiles of segments that have a
preconditioner are solved by the one, all others by the other, which is plain and has no register to spare for it.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of
from flashlla.backends.triton.primitives import (
    NUMBERS,
    clamp,
    dot,
    finite,
    inverse_or_zero,
    inverse_power,
    keys_of,
    load_ridge,
    load_tile,
    place,
    power_of_two,
    queries_of,
    query_in_units,
    ridge_in_units,
    rounded,
    rows_of,
    sees_some,
    shortening,
    units_of,
    zeros,
)
from flashlla.solvers import Gram

# lambda in G + lambda I is at least this share of the largest variance: smaller, and the inverse, rounded to float16,
# would not be definite.
FLOOR: tl.constexpr = tl.constexpr(2.0**-8)
# Where it is worth it, (4.5), and where it fits, (4.6).
WORTH: tl.constexpr = tl.constexpr(Gram.WORTH)
FIT_LEAST: tl.constexpr = tl.constexpr(Gram.FIT[0])
FIT_MOST: tl.constexpr = tl.constexpr(Gram.FIT[1])


@triton.jit(do_not_specialize=[*NUMBERS, "chunks"])
def gram_sums_kernel(
    k_in, sums_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, chunks,
    SHAPE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums_out (heads of keys, chunks, D + 1, D): of x = k - (the head's first key), sum x x^T over sum x, of each
    chunk of SEGMENT keys."""
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, SEGMENT, SHAPE.CAUSAL, True)
    D: tl.constexpr = SHAPE.BLOCK_D
    k_base = keys_of(k_in, at)
    dim = tl.arange(0, D)
    origin = tl.load(k_base + dim, mask=(dim < SHAPE.HEAD_DIM) & (at.k_stop > 0), other=0.0)  # (D,)
    stop = tl.minimum(at.start + SEGMENT, at.k_stop)
    gram, total = tl.zeros([D, D], tl.float32), tl.zeros([D], tl.float32)
    for j in tl.range(at.start, stop, BLOCK_N):
        k = load_tile(k_base, k_in.stride_s, j, stop, SHAPE.HEAD_DIM, BLOCK_N, D, True).to(tl.float32)  # (N, D)
        x = tl.where((j + tl.arange(0, BLOCK_N) < stop)[:, None], k - origin.to(tl.float32)[None, :], 0.0)
        x = rounded(x, origin, SHAPE.TF32)
        gram = dot(tl.trans(x), x, gram, SHAPE.TF32)  # (D, D)
        total += tl.sum(x.to(tl.float32), 0)
    slot = at.k_head.to(tl.int64) * chunks + at.start // SEGMENT
    sums_out += slot * (D + 1) * D
    tl.store(sums_out + dim[:, None] * D + dim[None, :], gram)
    tl.store(sums_out + D * D + dim, total)


@triton.jit(do_not_specialize=[*NUMBERS, "chunks", "segments"])
def gram_kernel(
    q_in, sums_ptr, units, origin_ptr, k_mean_ptr, ridge_in, b_ptr, probe_ptr, scratch, made_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, chunks, segments,
    ADJOINT: tl.constexpr, SHAPE: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Of each segment of queries: made_out.use, whether its queries are to use made_out.inverse, (G + lambda I)^-1 but
    for a power of two; where not, it is not written. scratch: (heads, segments, 2 D, D).

    lambda is the mean of the segment's finite ones. The keys are those that all of the segment's queries see, with a
    window those before it: the whole chunks of them.
    """
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, SEGMENT, SHAPE.CAUSAL, False)
    D: tl.constexpr = SHAPE.BLOCK_D
    HEAD_DIM: tl.constexpr = SHAPE.HEAD_DIM
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    slot = at.q_head.to(tl.int64) * segments + at.start // SEGMENT
    tl.store(made_out.use + slot, 0)
    first, last = 0, tl.cdiv(at.k_stop, SEGMENT)
    if SHAPE.CAUSAL:
        stop = clamp(at.start + at.diagonal, 0, at.k_stop)
        last = stop // SEGMENT
        if window is not None:
            first = tl.cdiv(clamp(at.start + at.diagonal - window, 0, stop), SEGMENT)
    dim = tl.arange(0, D)
    element = dim[:, None] * D + dim[None, :]
    gram, total = tl.zeros([D, D], tl.float32), tl.zeros([D], tl.float32)
    for c in tl.range(first, last):
        sums = sums_ptr + (at.k_head.to(tl.int64) * chunks + c) * (D + 1) * D
        gram += tl.load(sums + element)  # (D, D)
        total += tl.load(sums + D * D + dim)  # (D,)
    share = inverse_or_zero((tl.minimum(last * SEGMENT, at.k_stop) - first * SEGMENT).to(tl.float32))
    mean = total * share
    row = at.start + tl.arange(0, SEGMENT)
    there = row < at.q_len
    given = load_ridge(ridge_in, row, at, 0.0)  # (SEGMENT,)
    there = there & finite(given)
    ridge = tl.sum(tl.where(there, given, 0.0), 0) / tl.maximum(tl.sum(there.to(tl.float32), 0), 1.0)
    ridge = ridge_in_units(ridge, k_unit)
    on_diagonal = dim[:, None] == dim[None, :]
    gram = gram * share - mean[:, None] * mean[None, :]
    ridge = tl.maximum(ridge, tl.max(tl.where(on_diagonal, gram, 0.0)) * FLOOR)
    gram += tl.where(on_diagonal, ridge, 0.0)
    # (4.5): the trace of the square over the square of the trace, of HEAD_DIM dims.
    inside = (dim[:, None] < HEAD_DIM) & (dim[None, :] < HEAD_DIM)
    largest = tl.max(tl.where(on_diagonal, gram, 0.0))
    unit = power_of_two(largest)
    scaled = gram * inverse_power(unit)
    trace = tl.sum(tl.where(inside & on_diagonal, scaled, 0.0))
    worth = tl.sum(tl.where(inside, scaled * scaled, 0.0)) * HEAD_DIM / (trace * trace)
    if ~((last > first) & (worth > WORTH) & (largest < float("inf")) & (ridge > 0)):
        return
    # (4.6), above and below the line summed over the segment's queries.
    q_base = queries_of(q_in, at)
    found, expected = 0.0, 0.0
    for i in tl.range(at.start, tl.minimum(at.start + SEGMENT, at.q_len), BLOCK_M):
        q = load_tile(q_base, q_in.stride_s, i, at.q_len, HEAD_DIM, BLOCK_M, D, True)  # (M, D)
        member = i + tl.arange(0, BLOCK_M)
        ridges = load_ridge(ridge_in, member, at, 1.0)  # (M,)
        if ADJOINT:  # the probe z has z.A z = z.d
            x = load_tile(rows_of(probe_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, D, True)
            x = x * k_unit
            d = load_tile(rows_of(k_mean_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, D, True)
            d = d * inverse_power(k_unit) - query_in_units(q, q_unit, k_unit, origin_ptr, at, HEAD_DIM)
            curvature = tl.sum(x * d, 1)  # (M,)
            inverse_size = inverse_or_zero(tl.sqrt(tl.sum(x * x, 1)))
            curvature *= inverse_size * inverse_size
        else:  # the first guess's direction u has C u = b
            x = q.to(tl.float32) * shortening(q)[:, None]
            image = load_tile(rows_of(b_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, D, True)
            inverse_size = inverse_or_zero(tl.sqrt(tl.sum(x * x, 1)))
            curvature = tl.sum(x * image, 1) * inverse_size * inverse_size + ridge_in_units(ridges, k_unit)
        some = sees_some(member, at, window, SHAPE.CAUSAL) & finite(ridges) & finite(curvature) & (inverse_size > 0)
        x = rounded(tl.where(some[:, None], x * inverse_size[:, None], 0.0), q, SHAPE.TF32)  # (M, D) of unit length
        matrix = rounded(scaled, q, SHAPE.TF32)  # (D, D)
        expected += tl.sum(dot(x, matrix, zeros(x, matrix), SHAPE.TF32) * x.to(tl.float32)) * unit
        found += tl.sum(tl.where(some, curvature, 0.0))
    if ~((found > expected * FIT_LEAST) & (found < expected * FIT_MOST)):
        return
    tl.store(made_out.use + slot, 1)
    a = scratch + slot * (2 * D * D)  # G + lambda I over the unit matrix
    further = a + D * D
    tl.store(a + element, gram)
    tl.store(further + element, tl.where(on_diagonal, 1.0, 0.0))
    tl.debug_barrier()
    W: tl.constexpr = WARPS
    R: tl.constexpr = 2 * D
    warp_row = tl.arange(0, W)[:, None] * (R // W) + tl.arange(0, R // W)[None, :]  # (W, R / W)
    b = tl.zeros([W, PANEL], tl.float32)
    panel, square = panel_of(a, warp_row, 0, R, D)
    tl.debug_barrier()
    for p in tl.range(0, D, PANEL):
        _panel, b, _inverse, later = factored_panel(panel, square, b, p, a, None, warp_row, ridge, R, D)
        panel, square = later
        tl.debug_barrier()
    factor = tl.load(further + element) * inverse_power(power_of_two(tl.rsqrt(ridge)))  # (D, D) L^-T
    factor = rounded(factor, tl.zeros([1], made_out.inverse.dtype.element_ty), SHAPE.TF32)
    inverse = dot(factor, tl.trans(factor), zeros(factor, tl.trans(factor)), SHAPE.TF32)  # (D, D)
    tl.store(made_out.inverse + slot * D * D + element, inverse.to(made_out.inverse.dtype.element_ty))


@triton.jit
def preconditioned(r, use, inverse_ptr, like, TF32: tl.constexpr, D: tl.constexpr):
    """(G + lambda I)^-1 r of each row of r, (M, D), but for a factor; r itself of rows that do not ``use`` it, (M,)."""
    inverse = load_tile(inverse_ptr, D, 0, D, D, D, D, False)  # (D, D)
    size = tl.sqrt(tl.sum(r * r, 1))
    x = rounded(r * inverse_or_zero(size)[:, None], like, TF32)  # (M, D)
    return tl.where(use[:, None], dot(x, inverse, zeros(x, inverse), TF32) * size[:, None], r)
