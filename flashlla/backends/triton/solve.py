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
    lift_of,
    load_numbers,
    load_queries,
    load_ridge,
    load_tile,
    load_vectors,
    outside,
    place,
    power_of_two,
    query_in_units,
    ridge_in_units,
    rounded,
    saturated,
    sees_some,
    shortening,
    store_numbers,
    store_vectors,
    sweep_keys,
    units_of,
    weights,
    zeros,
)

# The last step (4.7): the margin on what it is seen to leave of a residual, and the most it may leave.
LAST_MARGIN: tl.constexpr = tl.constexpr(5 / 4)
LAST_MOST: tl.constexpr = tl.constexpr(0.5)
# Beside a larger ridge, in units of the keys, the keys' part of a system is no more than rounding: the system is solved
# with this one, whose square float32 holds, and its solution brought to size.
RIDGE_MOST: tl.constexpr = tl.constexpr(1152921504606846976.0)  # 2**60


@triton.jit
def matvec_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij c_ij k_j and of sum_j w_ij c_ij, c_ij = x_i.(k_j - k_mean_i)."""
    acc, total = state
    q, x, x_mean, shift, factor = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    # (M, N); first: its exponentials overlap the next product
    w = weights(q, k, factor, shift, seen, SHAPE.TF32, CUT)
    w = w * (dot(x, tl.trans(k), zeros(x, tl.trans(k)), SHAPE.TF32) - x_mean[:, None])
    w = rounded(w, k, SHAPE.TF32)
    # The total of the rounded numbers: k_mean times it takes out what keys far from the origin made of their rounding.
    return dot(w, k, acc, SHAPE.TF32), total + tl.sum(w.to(tl.float32), 1)


@triton.jit
def diagonal_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij (k_j - origin)^2, element by element."""
    q, origin, shift, factor = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = rounded(weights(q, k, factor, shift, seen, SHAPE.TF32, CUT), k, SHAPE.TF32)  # (M, N)
    moved = k.to(tl.float32) - origin[None, :]
    return dot(w, rounded(moved * moved, k, SHAPE.TF32), state, SHAPE.TF32)  # (M, D)


@triton.jit
def jacobi(
    q, k_mean, ridge, shift, factor, k_base, k_stride, at, window, SHAPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The inverse diagonals of A, (M, D): sum_j p_j (k_j - origin)^2 - (k_mean - origin)^2 + lambda.

    1 for queries that see no more keys than there are dimensions: what they solve for lies in the span of those keys,
    which plain directions do not leave; beside it rounding would meet the ridge alone.
    """
    dim = tl.arange(0, q.shape[1])
    origin = tl.load(k_base + dim, mask=(dim < SHAPE.HEAD_DIM) & (at.k_stop > 0), other=0.0)  # (D,) the first key
    origin = origin.to(tl.float32)
    squares = sweep_keys(
        diagonal_body, tl.zeros([M, q.shape[1]], tl.float32), (q, origin, shift, factor), (k_base, k_stride),
        at, window, SHAPE, M, N,
    )  # fmt: skip
    mean = k_mean - origin[None, :]
    inverse = 1 / (tl.maximum(squares * (1 / WEIGHT) - mean * mean, 0.0) + ridge[:, None])
    many = keys_seen(at.start + tl.arange(0, M), at, window, SHAPE.CAUSAL) > SHAPE.HEAD_DIM
    return tl.where(many[:, None], inverse, 1.0)


@triton.jit
def right_side(
    q, k_mean, given_ridge, b_ptr, q_unit, k_unit, origin_ptr, at, window, ADJOINT: tl.constexpr, SHAPE: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """b of A x = b, (M, D): d of (2.1), or t of (3.1) in rows of unit length. 0 for queries that see nothing, NaN for
    those whose ridge is not finite."""
    if ADJOINT:
        b = load_vectors(b_ptr, at, SHAPE.HEAD_DIM, M, SHAPE.BLOCK_D).to(tl.float32)
    else:
        b = k_mean - query_in_units(q, q_unit, k_unit, origin_ptr, at, SHAPE.HEAD_DIM)
    b = tl.where(sees_some(at.start + tl.arange(0, M), at, window, SHAPE.CAUSAL)[:, None], b, 0.0)
    return b + (0.0 * given_ridge)[:, None]


@triton.jit
def first_guess(q, r, ridge, image_ptr, at, SHAPE: tl.constexpr, M: tl.constexpr):
    """(4.3), a step along the shortened query u, of which C u is at ``image_ptr``: the solution so far (M, D), its
    residual (M, D), and the curvature along u, 0 where there is none (M,)."""
    u = q.to(tl.float32) * shortening(q)[:, None]
    image = load_vectors(image_ptr, at, SHAPE.HEAD_DIM, M, SHAPE.BLOCK_D)
    image += ridge[:, None] * u  # A u
    u_image = tl.sum(u * image, 1)
    step = tl.where(u_image > 0, tl.sum(r * u, 1) / tl.where(u_image > 0, u_image, 1.0), 0.0)
    curvature = tl.where(u_image > 0, u_image * inverse_or_zero(tl.sum(u * u, 1)), 0.0)
    return step[:, None] * u, r - step[:, None] * image, curvature


@triton.jit
def left_by_step(image, inverse_curvature, lowest, highest):
    """What share of a query's squared residual a last step leaves, (4.7) squared, for directions of unit length, of
    which ``image`` (M, D) is A x, and the lowest and highest curvature along the directions so far: (M,)."""
    image = image * inverse_curvature[:, None]
    square = tl.sum(image * image, 1)
    apart = (highest - lowest) * inverse_curvature
    return tl.maximum(tl.where(square > 1, square - 1, 0.0), apart * apart)


@triton.jit
def left_by_last(share_left, tells, PLAIN: tl.constexpr):
    """What the last step leaves of a tile's squared residuals, given the ``share_left`` (M,) of its queries; 1 where
    it is not to be taken. ``tells``: whether enough of them tell."""
    if PLAIN:
        rest = tl.max(share_left) * (LAST_MARGIN * LAST_MARGIN)
        return tl.where((rest < LAST_MOST * LAST_MOST) & tells, rest, 1.0)
    else:
        return 1.0


@triton.jit(do_not_specialize=[*NUMBERS, "max_iters", "segments"])
def solve_kernel(
    q_in, k_in, units, origin_ptr, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, made_in, x_out, adjoint, ended_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    tolerances, max_iters, segments,
    ADJOINT: tl.constexpr, PRECONDITIONER: tl.constexpr, SEGMENT: tl.constexpr,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Forward: the probe z of (2.1), right-hand side k_mean - q; b_ptr has C u of statistics_kernel, None without a
    first guess, and ended_out says how it went. ADJOINT: -y of (3.1), in the units of the keys and lifted, and z.y of
    (3.6); b_ptr has the right-hand side t in rows of unit length, and ``adjoint`` what else it takes and gives.

    PRECONDITIONER is "none", "jacobi", or "gram": what gram.py makes for each segment of queries; if there is any
    (made_in), "none" is for all others. A row leaves off when |r|^2 <= max(atol, |b|^2) rtol, of the adjoint when the
    next step is as small beside the solution too, (4.4); the tile when all its rows have. A row that is NaN has left
    off. The plain solve of 16-bit inputs counts on a last step that needs no sweep, (4.7).
    """
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False)
    if outside(at, at.q_len, seqlens.cu_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    if made_in is not None:
        slot = at.q_head.to(tl.int64) * segments + at.start // SEGMENT
        if (tl.load(made_in.use + slot) > 0) != (PRECONDITIONER == "gram"):
            return
    # The recurrence of plain 16-bit solves is short, and ends with a step that needs no sweep.
    PLAIN: tl.constexpr = PRECONDITIONER == "none" and q_in.ptr.dtype.element_ty == tl.float16
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    k_base = keys_of(k_in, at)
    q = load_queries(q_in, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    k_mean = load_vectors(k_mean_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = k_mean * inverse_power(k_unit)
    row = at.start + tl.arange(0, BLOCK_M)
    # Of queries that see nothing neither they nor their ridges need be finite.
    given_ridge = tl.where(sees_some(row, at, window, SHAPE.CAUSAL), load_ridge(ridge_in, row, at, 1.0), 1.0)  # (M,)
    ridge = tl.minimum(ridge_in_units(given_ridge, k_unit), RIDGE_MOST)
    shift = load_numbers(lse2_ptr, at, BLOCK_M, 0.0) - WEIGHT_BITS
    factor = scale * LOG2E * q_unit * k_unit

    r = right_side(q, k_mean, given_ridge, b_ptr, q_unit, k_unit, origin_ptr, at, window, ADJOINT, SHAPE, BLOCK_M)
    atol, rtol, coarse = tolerances
    if not ADJOINT:
        atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    if PRECONDITIONER == "jacobi":
        inverse = jacobi(
            q, k_mean, ridge, shift, factor, k_base, k_in.stride_s, at, window, SHAPE, BLOCK_M, BLOCK_N
        )  # fmt: skip
    else:
        inverse = 1.0
    b2 = tl.sum(r * r, 1)  # (M,), as every scalar of the recurrence
    # Few keys leave much of the probe to the ridge alone, which magnifies errors: no coarser there than the dtype.
    many_keys = keys_seen(row, at, window, SHAPE.CAUSAL) > 2 * SHAPE.HEAD_DIM
    rtol = tl.where(many_keys, tl.maximum(rtol, coarse), rtol)  # (M,)
    threshold = tl.maximum(b2, atol) * rtol

    # For the last step: lowest and highest curvature so far; how long it is, 1 / the latest curvature (0: none yet).
    lowest, highest = tl.full([BLOCK_M], float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    last_size = tl.zeros([BLOCK_M], tl.float32)
    if ADJOINT or b_ptr is None:
        solution = tl.zeros([BLOCK_M, D], tl.float32)
    else:
        solution, r, along_u = first_guess(q, r, ridge, b_ptr, at, SHAPE, BLOCK_M)
        if PLAIN:  # u counts among the directions
            lowest, highest = tl.where(along_u > 0, along_u, lowest), along_u
    if PRECONDITIONER == "gram":
        inverse_ptr = made_in.inverse + slot * D * D
        use = keys_seen(row, at, window, SHAPE.CAUSAL) > SHAPE.HEAD_DIM  # (M,), as in `jacobi`
        direction = preconditioned(r, use, inverse_ptr, q, SHAPE.TF32, D)
    else:
        direction = r * inverse
    r2 = tl.sum(r * r, 1)
    rho = tl.sum(r * direction, 1)  # r.M^-1 r, M the preconditioner
    iterations = tl.zeros([BLOCK_M], tl.int32)
    size, x_mean = tl.sqrt(r2), tl.zeros([BLOCK_M], tl.float32)
    if PLAIN:
        x_mean = tl.sum(r * k_mean, 1) * inverse_or_zero(size)
    goal = threshold  # what r2 is to come down to
    excess = tl.where(r2 > goal, r2 / goal, 0.0)  # (M,) 0 where it has, and for NaN
    # No last step before a sweep has seen a residual's direction; nor with few keys: what is beside their span meets
    # the ridge alone, and no direction within it shows that. Half of a tile's queries must tell.
    share_left = tl.where(excess > 1, 1.0, 0.0)
    tells = tl.sum(((excess > 1) & many_keys).to(tl.int32), 0) >= BLOCK_M // 2
    left, most = 1.0, tl.max(excess)
    sweeps = 0
    # One that has stopped, counting on the last step, goes on from its residual if that step leaves more.
    while (sweeps < max_iters) & (most * left > 1):
        moves = excess * left > 1  # (M,)
        unsolved = excess > 1
        # Of unit length, so that nothing in the sweep overflows or goes subnormal; rounded first, and the rounded x is
        # the one that moves the solution.
        if not PLAIN:
            size = tl.sqrt(tl.sum(direction * direction, 1))
        x = rounded(direction * inverse_or_zero(size)[:, None], q, SHAPE.TF32)  # (M, D)
        if not PLAIN:
            x_mean = tl.sum(x.to(tl.float32) * k_mean, 1)
        acc, total = sweep_keys(
            matvec_body,
            (tl.zeros([BLOCK_M, D], tl.float32), tl.zeros([BLOCK_M], tl.float32)),
            (q, x, x_mean, shift, factor), (k_base, k_in.stride_s), at, window, SHAPE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        x_wide = x.to(tl.float32)
        image = (acc - k_mean * total[:, None]) * (1 / WEIGHT) + ridge[:, None] * x_wide  # A x
        curvature = tl.sum(x_wide * image, 1)
        unsolved = unsolved & ((curvature > 0) | ~moves)
        moves = moves & unsolved
        inverse_curvature = 1 / tl.where(moves, curvature, 1.0)
        along = r2 * inverse_or_zero(size) if PLAIN else tl.sum(r * x_wide, 1)  # r.x
        step = tl.where(moves, along * inverse_curvature, 0.0)
        solution += step[:, None] * x_wide
        r -= step[:, None] * image
        iterations += moves.to(tl.int32)
        if PRECONDITIONER == "gram":
            preconditioned_r = preconditioned(r, use, inverse_ptr, q, SHAPE.TF32, D)
        else:
            preconditioned_r = r * inverse
        r2 = tl.sum(r * r, 1)
        rho_next = tl.sum(r * preconditioned_r, 1)
        turn = tl.where(moves, rho_next / tl.where(moves, rho, 1.0), 0.0) * size
        direction = preconditioned_r + turn[:, None] * x_wide
        rho = rho_next
        if PLAIN:  # (4.9): no further sums over dims
            size = tl.sqrt(r2 + turn * turn)
            x_mean = (tl.sum(r * k_mean, 1) + turn * x_mean) * inverse_or_zero(size)
        if ADJOINT:
            next_step = rtol * curvature * curvature * tl.sum(solution * solution, 1)
            goal = tl.where(moves, tl.minimum(threshold, next_step), goal)
        if PLAIN:
            lowest = tl.where(moves, tl.minimum(lowest, curvature), lowest)
            highest = tl.where(moves, tl.maximum(highest, curvature), highest)
            share = left_by_step(image, inverse_curvature, lowest, highest)
            share_left = tl.where(moves & many_keys, share, share_left)
            last_size = tl.where(moves & many_keys, inverse_curvature, last_size)
            left = left_by_last(share_left, tells, PLAIN)
        excess = tl.where(unsolved & (r2 > goal), r2 / goal, 0.0)
        most = tl.max(excess)
        sweeps += 1

    if PLAIN:  # the last step: along the residual, as long as the latest curvature says
        solution += tl.where(left < 1, last_size, 0.0)[:, None] * r
        r2 *= tl.where(last_size > 0, left, 1.0)
    solution += (0.0 * r2)[:, None]  # NaN where the right-hand side was
    given_ridge = load_ridge(ridge_in, row, at, 1.0)
    out_of_units = tl.where(ridge < RIDGE_MOST, inverse_power(k_unit), RIDGE_MOST * (k_unit / given_ridge))  # (M,)
    if ADJOINT:
        y = solution * (load_numbers(adjoint.b_size, at, BLOCK_M, 0.0) * out_of_units)[:, None]
        probe = load_vectors(adjoint.probe, at, SHAPE.HEAD_DIM, BLOCK_M, D)
        store_numbers(adjoint.z_y, at, tl.sum(probe * y, 1))
        y = finite_or_zero(y)
        if adjoint.y is not None:
            y_unit = power_of_two(tl.max(tl.abs(y), 1))
            store_vectors(adjoint.y.ptr, at, y * inverse_power(y_unit)[:, None], SHAPE.HEAD_DIM)
            store_numbers(adjoint.y.unit, at, y_unit)
        lift = lift_of(adjoint.tops, at.k_head, q, D)
        store_vectors(x_out, at, saturated(y * (-k_unit * lift), q), SHAPE.HEAD_DIM)
    else:
        store_vectors(x_out, at, solution * out_of_units[:, None], SHAPE.HEAD_DIM)
        store_numbers(ended_out.iterations, at, iterations)
        residual = tl.where(r2 == 0, 0.0, tl.sqrt(r2 / b2))
        store_numbers(ended_out.residual, at, residual)
        store_numbers(ended_out.converged, at, r2 <= threshold)
