"""A x = b for a tile of queries by conjugate gradients, A = C + lambda I of (2.1): one kernel for both directions.

A is never formed: A x is one sweep over the keys, sum_j p_j (k_j.x - k_mean.x) (k_j - k_mean) + lambda x.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.gram import preconditioned
from flashlla.backends.triton.primitives import (
    LOG2E,
    NUMBERS,
    WEIGHT,
    WEIGHT_BITS,
    dot,
    finite_or_zero,
    inverse_or_zero,
    inverse_power,
    keys_of,
    keys_seen,
    load_rows,
    load_tile,
    outside,
    place,
    queries_of,
    query_in,
    ridge_in,
    rounded,
    rows_of,
    saturated,
    sees_some,
    shortening,
    store_rows,
    store_tile,
    sweep_keys,
    units_of,
    weights,
    zeros,
)

# The last step (4.7): the margin on what it is seen to leave of a residual, and the most it may leave.
LAST_MARGIN: tl.constexpr = tl.constexpr(5 / 4)
LAST_MOST: tl.constexpr = tl.constexpr(0.5)


@triton.jit
def matvec_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij c_ij k_j and of sum_j w_ij c_ij, c_ij = x_i.(k_j - k_mean_i)."""
    acc, total = state
    q, x, x_mean, shift, factor = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = weights(q, k, factor, shift, seen, PRECISION, CUT)  # (M, N); first: its exponentials overlap the next product
    w = w * (dot(x, tl.trans(k), zeros(x, tl.trans(k)), PRECISION) - x_mean[:, None])
    w = rounded(w, k, PRECISION)
    # The total of the rounded numbers: k_mean times it takes out what keys far from the origin made of their rounding.
    return dot(w, k, acc, PRECISION), total + tl.sum(w.to(tl.float32), 1)


@triton.jit
def diagonal_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij (k_j - origin)^2, element by element."""
    q, origin, shift, factor = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = rounded(weights(q, k, factor, shift, seen, PRECISION, CUT), k, PRECISION)  # (M, N)
    moved = k.to(tl.float32) - origin[None, :]
    return dot(w, rounded(moved * moved, k, PRECISION), state, PRECISION)  # (M, D)


@triton.jit
def prepare_jacobi(
    q, k_mean, ridge, shift, factor, k_base, k_stride, at, window,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The inverse diagonals of A, (M, D): sum_j p_j (k_j - origin)^2 - (k_mean - origin)^2 + lambda.

    1 for queries that see no more keys than there are dimensions: what they solve for lies in the span of those keys,
    which plain directions do not leave; beside it rounding would meet the ridge alone.
    """
    dim = tl.arange(0, q.shape[1])
    origin = tl.load(k_base + dim, mask=(dim < HEAD_DIM) & (at.k_stop > 0), other=0.0)  # (D,) the first key
    origin = origin.to(tl.float32)
    squares = sweep_keys(
        diagonal_body, tl.zeros([M, q.shape[1]], tl.float32), (q, origin, shift, factor), (k_base, k_stride),
        at, window, HEAD_DIM, V_DIM, CAUSAL, PRECISION, M, N,
    )  # fmt: skip
    mean = k_mean - origin[None, :]
    inverse = 1 / (tl.maximum(squares * (1 / WEIGHT) - mean * mean, 0.0) + ridge[:, None])
    return tl.where((keys_seen(at.start + tl.arange(0, M), at, window, CAUSAL) > HEAD_DIM)[:, None], inverse, 1.0)


@triton.jit
def spread_of(x, image, inverse_curvature, low, high):
    """The square of (4.7) for directions x (M, D), of which ``image`` is A x, and the lowest and highest curvature
    along the directions so far: (M,)."""
    image = image * inverse_curvature[:, None]
    square = tl.sum(image * image, 1) * tl.sum(x * x, 1)
    apart = (high - low) * inverse_curvature
    return tl.maximum(tl.where(square > 1, square - 1, 0.0), apart * apart)


@triton.jit
def left_by_last(spread, softness, LAST: tl.constexpr):
    """What the last step (4.7) leaves of a tile's squared residuals, given the ``spread`` (M,) of its queries; 1 where
    it is not to be taken. Queries whose ``softness`` is 0 have not been seen to tell."""
    if LAST:
        rest = tl.max(spread, 0) * (LAST_MARGIN * LAST_MARGIN)
        known = tl.sum((softness > 0).to(tl.int32), 0)
        return tl.where((rest < LAST_MOST * LAST_MOST) & (known >= spread.shape[0] // 2), rest, 1.0)
    else:
        return 1.0


@triton.jit
def moving(active, r2, spread, softness, enough, LAST: tl.constexpr):
    """Which queries of a tile go on: (M,)."""
    return active & (r2 * left_by_last(spread, softness, LAST) > enough)


@triton.jit(do_not_specialize=[*NUMBERS, "max_iters", "segments"])
def solve_kernel(
    q_ptr, k_ptr, units, origin_ptr, lse2_ptr, k_mean_ptr, ridge_ptr, b_ptr, b_size_ptr, probe_ptr, inverse_ptr,
    use_ptr, x_out, z_y_out, iterations_out, residual_out, converged_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, ridge_stride_b, ridge_stride_h,
    ridge_stride_s,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, window,
    n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    atol, rtol, coarse, max_iters, segments, ADJOINT: tl.constexpr, PRECONDITIONER: tl.constexpr, SEGMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Forward: the probe z of (2.1), right-hand side k_mean - q; b is C u of statistics_kernel. ADJOINT: -y of (3.1)
    and z.y of (3.6); b is the right-hand side t in rows of unit length, |t| beside it.

    PRECONDITIONER is "none", "jacobi", or "gram": what gram.py makes for each segment of queries, and where it has
    made one; if there is a use_ptr, "none" is for all others. A row leaves off when |r|^2 <= max(atol, |b|^2) rtol, of
    the adjoint when the next step is as small beside the solution too, (4.4); the tile when all its rows have. A row
    that is NaN has left off. The plain solve of 16-bit inputs counts on a last step that needs no sweep, (4.7).
    """
    at = place(
        n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
        cu_seqlens_q, cu_seqlens_k, seqlens_k, BLOCK_M, CAUSAL, False,
    )  # fmt: skip
    if outside(at, at.q_len, cu_seqlens_q):
        return
    if use_ptr is not None:
        slot = at.q_head.to(tl.int64) * segments + at.start // SEGMENT
        if (tl.load(use_ptr + slot) > 0) != (PRECONDITIONER == "gram"):
            return
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    i = at.start
    q_base = queries_of(q_ptr, q_stride_b, q_stride_h, q_stride_s, at)
    k_base = keys_of(k_ptr, k_stride_b, k_stride_h, k_stride_s, at)
    q = load_tile(q_base, q_stride_s, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    k_mean = load_tile(rows_of(k_mean_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_mean = k_mean * inverse_power(k_unit)
    ridge_base = queries_of(ridge_ptr, ridge_stride_b, ridge_stride_h, ridge_stride_s, at)
    row = i + tl.arange(0, BLOCK_M)
    given = tl.load(ridge_base + row.to(tl.int64) * ridge_stride_s, mask=row < at.q_len, other=1.0)  # (M,)
    ridge = ridge_in(given, k_unit)
    shift = load_rows(rows_of(lse2_ptr, at, 1), i, at.q_len, BLOCK_M, 0.0) - WEIGHT_BITS
    factor = scale * LOG2E * q_unit * k_unit
    if ADJOINT:
        r = load_tile(rows_of(b_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        r = r.to(tl.float32)
    else:
        r = k_mean - query_in(q, q_unit, k_unit, origin_ptr, at, HEAD_DIM)
        atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    r = tl.where(sees_some(row, at, window, CAUSAL)[:, None], r, 0.0)
    r += (0.0 * given)[:, None]  # a ridge that is not finite makes NaN
    if PRECONDITIONER == "jacobi":
        inverse = prepare_jacobi(
            q, k_mean, ridge, shift, factor, k_base, k_stride_s, at, window,
            HEAD_DIM, V_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        inverse = 1.0
    b2 = tl.sum(r * r, 1)  # (M,), as every scalar of the recurrence
    # Few keys leave much of the probe to the ridge alone, which magnifies errors: no coarser there than the dtype.
    many = keys_seen(row, at, window, CAUSAL) > 2 * HEAD_DIM
    rtol = tl.where(many, tl.maximum(rtol, coarse), rtol)  # (M,)
    threshold = tl.maximum(b2, atol) * rtol
    LAST: tl.constexpr = PRECONDITIONER == "none" and q.dtype == tl.float16
    # For the last step: lowest and highest curvature so far, 1 / the latest (0: none yet), and the square of (4.7).
    low, high = tl.full([BLOCK_M], float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    softness = tl.zeros([BLOCK_M], tl.float32)
    if ADJOINT:
        solution = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        # The first guess (4.3).
        u = q.to(tl.float32) * shortening(q)[:, None]
        image = load_tile(rows_of(b_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        image += ridge[:, None] * u  # A u
        curvature = tl.sum(u * image, 1)
        step = tl.where(curvature > 0, tl.sum(r * u, 1) / tl.where(curvature > 0, curvature, 1.0), 0.0)
        solution = step[:, None] * u
        if LAST:  # u counts among the directions
            along_u = tl.where(curvature > 0, curvature * inverse_or_zero(tl.sum(u * u, 1)), 0.0)
            low, high = tl.where(along_u > 0, along_u, low), along_u
        r -= step[:, None] * image
    if PRECONDITIONER == "gram":
        inverse_ptr += slot * BLOCK_D * BLOCK_D
        use = keys_seen(row, at, window, CAUSAL) > HEAD_DIM  # (M,), as in prepare_jacobi
        direction = preconditioned(r, use, inverse_ptr, q, PRECISION, BLOCK_D)
    else:
        direction = r * inverse
    r2 = tl.sum(r * r, 1)
    r_y = tl.sum(r * direction, 1)
    taken = tl.zeros([BLOCK_M], tl.int32)
    enough = threshold
    active = r2 > enough  # False for NaN
    # No last step before a sweep has seen a residual's direction; nor with few keys: what is beside their span meets
    # the ridge alone, and no direction within it shows that.
    spread = tl.where(active, 1.0, 0.0)
    sweeps = 0
    # Which queries move is made out at the loop's head and not where its numbers are: Triton does not compile that for
    # Blackwell. One that has stopped, counting on the last step, goes on from its residual if that step leaves more.
    while (sweeps < max_iters) & (tl.max(moving(active, r2, spread, softness, enough, LAST).to(tl.int32), 0) > 0):
        moves = moving(active, r2, spread, softness, enough, LAST)  # (M,)
        # Of unit length, so that nothing in the sweep overflows or goes subnormal; rounded first, and the rounded x is
        # the one that moves the solution.
        size = tl.sqrt(tl.sum(direction * direction, 1))
        x = rounded(direction * inverse_or_zero(size)[:, None], q, PRECISION)  # (M, D)
        x_mean = tl.sum(x.to(tl.float32) * k_mean, 1)
        acc, total = sweep_keys(
            matvec_body,
            (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)),
            (q, x, x_mean, shift, factor), (k_base, k_stride_s), at, window,
            HEAD_DIM, V_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        x_wide = x.to(tl.float32)
        image = (acc - k_mean * total[:, None]) * (1 / WEIGHT) + ridge[:, None] * x_wide  # A x
        curvature = tl.sum(x_wide * image, 1)
        active = active & ((curvature > 0) | ~moves)
        moves = moves & active
        now = 1 / tl.where(moves, curvature, 1.0)
        step = tl.where(moves, tl.sum(r * x_wide, 1) * now, 0.0)
        solution += step[:, None] * x_wide
        r -= step[:, None] * image
        taken += moves.to(tl.int32)
        y = preconditioned(r, use, inverse_ptr, q, PRECISION, BLOCK_D) if PRECONDITIONER == "gram" else r * inverse
        r2 = tl.sum(r * r, 1)
        r_y_next = tl.sum(r * y, 1)
        turn = tl.where(moves, r_y_next / tl.where(moves, r_y, 1.0), 0.0) * size
        direction = y + turn[:, None] * x_wide
        r_y = r_y_next
        if ADJOINT:
            near = rtol * curvature * curvature * tl.sum(solution * solution, 1)
            enough = tl.where(moves, tl.minimum(threshold, near), enough)
        if LAST:
            low = tl.where(moves, tl.minimum(low, curvature), low)
            high = tl.where(moves, tl.maximum(high, curvature), high)
            spread = tl.where(moves & many, spread_of(x_wide, image, now, low, high), spread)
            softness = tl.where(moves & many, now, softness)
        active = active & (r2 > enough)
        sweeps += 1
    if LAST:
        left = left_by_last(spread, softness, LAST)
        solution += tl.where(left < 1, softness, 0.0)[:, None] * r
        r2 *= tl.where(softness > 0, left, 1.0)
    out = rows_of(x_out, at, HEAD_DIM)
    solution += (0.0 * r2)[:, None]  # NaN where the right-hand side was
    if ADJOINT:
        size = load_rows(rows_of(b_size_ptr, at, 1), i, at.q_len, BLOCK_M, 0.0)
        y_neg = saturated(finite_or_zero(solution * -size[:, None]), q)
        store_tile(out, HEAD_DIM, i, at.q_len, y_neg, HEAD_DIM)
        probe = load_tile(rows_of(probe_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        store_rows(rows_of(z_y_out, at, 1), i, at.q_len, k_unit * size * tl.sum(probe * solution, 1))
    else:
        store_tile(out, HEAD_DIM, i, at.q_len, solution * inverse_power(k_unit), HEAD_DIM)
        store_rows(rows_of(iterations_out, at, 1), i, at.q_len, taken)
        residual = tl.where(r2 == 0, 0.0, tl.sqrt(r2 / b2))
        store_rows(rows_of(residual_out, at, 1), i, at.q_len, residual)
        store_rows(rows_of(converged_out, at, 1), i, at.q_len, r2 <= threshold)
