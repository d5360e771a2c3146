"""The plain solve of 16-bit inputs in Gluon for Hopper: what solve.py's kernel does.

Directions stay in registers as operands of the products; the residual is in shared memory meanwhile. So is the
solution where it is wide; where it is not, registers have it, and shared memory the weights of a sweep's first tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from flashlla.backends.triton.primitives import (
    LOG2E,
    NUMBERS,
    WEIGHT,
    WEIGHT_BITS,
    inverse_or_zero,
    inverse_power,
    key_range,
    keys_of,
    keys_seen,
    lift_of,
    load_ridge,
    outside,
    place,
    power_of_two,
    ridge_in_units,
    saturated,
    sees_some,
    shortening,
    units_of,
)
from flashlla.backends.triton.solve import LAST_MARGIN, LAST_MOST, RIDGE_MOST
from flashlla.backends.triton.sweep_hopper import (
    barrier,
    begin,
    fetch,
    finite_or_zero,
    lanes,
    layouts,
    load_queries,
    masked,
    operand,
    packed,
    part_sums,
    products,
    ring_of,
    sweep_part,
    sweep_storing,
    tiles_of,
    weighed,
)


@gluon.jit
def no_sums(w, ONES: gl.constexpr):
    """Sums of what is packed like ``w``, before any."""
    if ONES:
        LAYOUT: gl.constexpr = products(w.shape[0], 8)
        return gl.zeros([w.shape[0], 8], gl.float32, LAYOUT)
    else:
        return part_sums(w) * 0.0


@gluon.jit
def add_sums(totals, w, ones, ONES: gl.constexpr):
    if not ONES:
        return totals + part_sums(w)
    else:
        LAYOUT: gl.constexpr = totals.type.layout
        return warpgroup_mma(operand(w, LAYOUT), ones, totals, is_async=True)


@gluon.jit
def ones_for(other, N: gl.constexpr, ONES: gl.constexpr):
    if ONES:
        LIKE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 8], gl.float16)
        WARPS: gl.constexpr = gl.num_warps()
        WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [WARPS, 1], [1, 0])
        return gl.allocate_shared_memory(gl.float16, [N, 8], LIKE, gl.full([N, 8], 1 / 8, gl.float16, WHOLE))
    else:
        return other


@gluon.jit
def matvec_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """As `solve.matvec_body`. Weights are stored in ``kept``; see `sweep_storing`."""
    ONES: gl.constexpr = OPTIONS[0]
    STORED: gl.constexpr = OPTIONS[1]
    acc, totals, w = state
    q, x, x_mean, shift, factor, ones, row, zero, kept = rows
    N: gl.constexpr = zero.shape[1]
    VECTORS: gl.constexpr = acc.type.layout
    BESIDE: gl.constexpr = 2 if ONES else 1  # products issued after the first two
    k = rings[0].index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    c = warpgroup_mma(x, k, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[0].index(before), acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    fetch(rings, coming, N)
    s = warpgroup_mma_wait(BESIDE + 1, deps=(s,)) * factor - shift[:, None]
    if CUT:
        s = masked(s, row, start, at, window, SHAPE)
    e = gl.exp2(s)
    if STORED == "all":
        kept.index(coming[1] - (rings[0].shape[0] - 2)).store(packed(e))
    elif STORED == "some":
        step = coming[1] - (rings[0].shape[0] - 2)
        if step < kept.shape[0]:
            kept.index(step).store(packed(e))
    c, e = warpgroup_mma_wait(BESIDE, deps=(c, e))
    e = e * (c - x_mean[:, None])
    if ONES:
        acc, totals, e = warpgroup_mma_wait(0, deps=(acc, totals, e))
    else:
        acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return acc, totals, packed(e)


@gluon.jit
def kept_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    ONES: gl.constexpr,
):  # fmt: skip
    """The same of a tile whose weights are kept."""
    acc, totals, w = state
    _, x, x_mean, _, _, ones, _, zero, kept = rows
    VECTORS: gl.constexpr = acc.type.layout
    BESIDE: gl.constexpr = 2 if ONES else 1  # products issued after the first
    k = rings[0].index(slot).permute((1, 0))
    c = warpgroup_mma(x, k, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[0].index(before), acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    fetch(rings, coming, zero.shape[1])
    e = kept.index(coming[1] - (rings[0].shape[0] - 2)).load(w.type.layout)
    c, e = warpgroup_mma_wait(BESIDE, deps=(c, e))
    e = weighed(e, c - x_mean[:, None])
    if ONES:
        acc, totals, e = warpgroup_mma_wait(0, deps=(acc, totals, e))
    else:
        acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return acc, totals, e


@gluon.jit
def fresh_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    ONES: gl.constexpr,
):  # fmt: skip
    """The same of a tile whose weights are as a pass before has left them, relative to ``bases``: they are made what
    they shall be, and kept so."""
    acc, totals, w = state
    x, x_mean, ones, zero, kept, bases, shift = rows
    VECTORS: gl.constexpr = acc.type.layout
    BESIDE: gl.constexpr = 2 if ONES else 1  # products issued after the first
    k = rings[0].index(slot).permute((1, 0))
    c = warpgroup_mma(x, k, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[0].index(before), acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    fetch(rings, coming, zero.shape[1])
    step = coming[1] - (rings[0].shape[0] - 2)
    less = gl.exp2(gl.minimum(bases.index(step).load(x_mean.type.layout) - (shift + WEIGHT_BITS), 0.0))  # (M,)
    less, _ = gl.broadcast(less[:, None], zero)
    e = weighed(kept.index(step).load(w.type.layout), less)
    kept.index(step).store(e)
    c, e = warpgroup_mma_wait(BESIDE, deps=(c, e))
    e = weighed(e, c - x_mean[:, None])
    if ONES:
        acc, totals, e = warpgroup_mma_wait(0, deps=(acc, totals, e))
    else:
        acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return acc, totals, e


@gluon.jit
def room_for(KEPT: gl.constexpr, other, M: gl.constexpr, N: gl.constexpr):
    """For the weights of so many tiles; of none ``other``."""
    if KEPT > 0:
        return gl.allocate_shared_memory(gl.int32, [KEPT, M, N // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    else:
        return other


@gluon.jit
def larger(a, b, c, d):
    return gl.maximum(a, c), gl.maximum(b, d)


@gluon.jit
def left_by_step(square, inverse_curvature, lowest, highest):
    """`solve.left_by_step`, given |A x|^2, whose sum need not wait for that of the curvature."""
    spread = square * inverse_curvature * inverse_curvature
    apart = (highest - lowest) * inverse_curvature
    return gl.maximum(gl.where(spread > 1, spread - 1, 0.0), apart * apart)


@gluon.jit
def ridges(ridge_in, row, at, some, k_unit):
    """The ridges of queries ``row``, as given, 1 where ``some`` is not, and in units of the keys: (M,) each."""
    given = gl.where(some, load_ridge(ridge_in, row, at, 1.0), 1.0)
    return given, gl.minimum(ridge_in_units(given, k_unit), RIDGE_MOST)


@gluon.jit
def operand_of(q, SCORES: gl.constexpr):
    """q (M, D) as it lies during sweeps: in registers where it is wide, as shared memory has no room."""
    if q.shape[1] > 64:
        return gl.convert_layout(q, gl.DotOperandLayout(0, SCORES, 2))
    else:
        HALVES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([q.shape[0], q.shape[1]], gl.float16)
        return gl.allocate_shared_memory(gl.float16, [q.shape[0], q.shape[1]], HALVES, q)


@gluon.jit
def first_guess(q, r, ridge, image):
    """`solve.first_guess`, given C u of the shortened query u."""
    u = q.to(gl.float32) * shortening(q)[:, None]
    image += ridge[:, None] * u  # A u
    u_image = gl.sum(u * image, 1)
    step = gl.where(u_image > 0, gl.sum(r * u, 1) / gl.where(u_image > 0, u_image, 1.0), 0.0)
    curvature = gl.where(u_image > 0, u_image * inverse_or_zero(gl.sum(u * u, 1)), 0.0)
    return step[:, None] * u, r - step[:, None] * image, curvature


@gluon.jit
def solved(
    q_operand, r, start, k_mean, ridge, shift, factor, tolerances, max_iters, rings, sources, ranges, row, at, window,
    kept, bases, ADJOINT: gl.constexpr, SHAPE: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr,
    ONES: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """A x = r for a tile of queries: x, |r|^2 before and after, what it was to come down to, iterations, and sweeps.

    ``start``: None, or what a first guess leaves: x so far, its residual, and the curvature along it. ``kept``: room
    for the weights of KEPT tiles; ``bases``: None, or what those are relative to that a pass before has left there, of
    each tile and query. `begin` has begun the first sweep's first tiles.
    """
    M: gl.constexpr = r.shape[0]
    D: gl.constexpr = r.shape[1]
    FILLED: gl.constexpr = bases is not None
    LAYOUTS: gl.constexpr = layouts(M, N, D)
    WIDE: gl.constexpr = D > 64
    SINGLES: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    mean_shared = gl.allocate_shared_memory(gl.float16, [M, D], LAYOUTS.halves, k_mean.to(gl.float16))
    b2 = gl.sum(r * r, 1)  # (M,), as every scalar of the recurrence
    lowest = gl.full([M], float("inf"), gl.float32, LAYOUTS.rows)
    highest = gl.zeros([M], gl.float32, LAYOUTS.rows)
    solution = gl.zeros([M, D], gl.float32, LAYOUTS.vectors)
    if start is not None:
        solution, r, highest = start
        lowest = gl.where(highest > 0, highest, lowest)
    if WIDE:
        solution_shared = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES, solution)
    r2 = gl.sum(r * r, 1)
    r_mean = gl.sum(r * k_mean, 1)
    r_shared = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES, r)
    ones = ones_for(mean_shared, N, ONES)

    score_row = at.start + gl.arange(0, M, layout=LAYOUTS.score_rows)
    atol, rtol, coarse = tolerances
    many_keys = keys_seen(row, at, window, SHAPE.CAUSAL) > 2 * SHAPE.HEAD_DIM
    rtol = gl.where(many_keys, gl.maximum(rtol, coarse), rtol)
    threshold = gl.maximum(b2, atol) * rtol
    size = gl.sqrt(r2)
    inverse_size = inverse_or_zero(size)
    x = (r * inverse_size[:, None]).to(gl.float16)
    x_mean = r_mean * inverse_size
    goal = threshold
    excess = gl.where(r2 > goal, r2 / goal, 0.0)
    iterations = gl.zeros([M], gl.int32, LAYOUTS.rows)
    if ADJOINT:  # |solution|^2 and solution.x, of which the residual takes no part: it is at right angles to all before
        solution2 = gl.zeros([M], gl.float32, LAYOUTS.rows)
        solution_x = gl.zeros([M], gl.float32, LAYOUTS.rows)
    last_size = gl.zeros([M], gl.float32, LAYOUTS.rows)
    share_left = gl.where(excess > 1, 1.0, 0.0)
    tells = gl.sum(((excess > 1) & many_keys).to(gl.int32), 0) >= M // 2
    left = 1.0
    most = gl.max(excess, 0)
    fence_async_shared()
    barrier()
    zero = gl.zeros([M, N], gl.float32, LAYOUTS.scores)
    sweeps = 0
    nothing = packed(zero)
    heavy_ridge = ridge * WEIGHT
    while (sweeps < max_iters) & (most * left > 1):
        moves = excess * left > 1
        unsolved = excess > 1
        rows = (
            q_operand, gl.convert_layout(x, LAYOUTS.operand), gl.convert_layout(x_mean, LAYOUTS.score_rows), shift,
            factor, ones, score_row, zero, kept,
        )  # fmt: skip
        state = gl.zeros([M, D], gl.float32, LAYOUTS.vectors), no_sums(nothing, ONES), nothing
        nought = ranges[4] * 0
        so_far = state, nought, nought
        held = nought
        if KEPT > 0:
            fresh = nought
            held = gl.minimum(ranges[4], KEPT)
            if FILLED:
                fresh = gl.where(sweeps == 0, held, 0)
                fresh_rows = rows[1], rows[2], ones, zero, kept, bases, shift
                so_far = sweep_part(
                    fresh_body, so_far, fresh_rows, nought, fresh, rings, sources, ranges, at, window, False, SHAPE, N,
                    SLOTS - 2, ONES,
                )  # fmt: skip
            else:  # the first sweep stores them
                held = gl.where(sweeps == 0, 0, held)
            so_far = sweep_part(
                kept_body, so_far, rows, fresh, held, rings, sources, ranges, at, window, False, SHAPE, N, SLOTS - 2,
                ONES,
            )  # fmt: skip
        state, last = sweep_storing(
            matvec_body, so_far, rows, held, gl.maximum(ranges[3], held), rings, sources, ranges, at, window,
            0 if FILLED else KEPT, SHAPE, N, SLOTS - 2, ONES,
        )  # fmt: skip
        acc, total, w = state
        acc = warpgroup_mma(operand(w, LAYOUTS.vectors), rings[0].index(last), acc, is_async=True)
        total = add_sums(total, w, ones, ONES)
        if ONES:
            acc, total = warpgroup_mma_wait(0, deps=(acc, total))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        barrier()  # all are done with the ring: the next sweep's first tiles may come
        begin(rings, sources, ranges, N, SLOTS - 2)
        total = gl.convert_layout(gl.sum(total, 1), LAYOUTS.rows)
        x_wide = x.to(gl.float32)
        k_mean = mean_shared.load(LAYOUTS.vectors).to(gl.float32)
        image = acc - k_mean * total[:, None] + heavy_ridge[:, None] * x_wide  # WEIGHT A x
        curvature = gl.sum(x_wide * image, 1) * (1 / WEIGHT)
        square = gl.sum(image * image, 1) * (1 / WEIGHT / WEIGHT)
        unsolved = unsolved & ((curvature > 0) | ~moves)
        moves = moves & unsolved
        inverse_curvature = 1 / gl.where(moves, curvature, 1.0)
        along = r2 * inverse_or_zero(size)  # r.x
        step = gl.where(moves, along * inverse_curvature, 0.0)
        r = r_shared.load(LAYOUTS.vectors) - (step * (1 / WEIGHT))[:, None] * image
        iterations += moves.to(gl.int32)
        r2_next = gl.sum(r * r, 1)
        r_mean = gl.sum(r * k_mean, 1)
        turn = gl.where(moves, r2_next / gl.where(moves, r2, 1.0), 0.0) * size
        r2 = r2_next
        size = gl.sqrt(r2 + turn * turn)
        inverse_size = inverse_or_zero(size)
        turn *= inverse_size
        x = (r * inverse_size[:, None] + turn[:, None] * x_wide).to(gl.float16)
        x_mean = r_mean * inverse_size + turn * x_mean
        if ADJOINT:
            solution2 += step * (2 * solution_x + step)
            solution_x = turn * (solution_x + step)
            next_step = rtol * curvature * curvature * solution2
            goal = gl.where(moves, gl.minimum(threshold, next_step), goal)
        lowest = gl.where(moves, gl.minimum(lowest, curvature), lowest)
        highest = gl.where(moves, gl.maximum(highest, curvature), highest)
        share = left_by_step(square, inverse_curvature, lowest, highest)
        share_left = gl.where(moves & many_keys, share, share_left)
        last_size = gl.where(moves & many_keys, inverse_curvature, last_size)
        excess = gl.where(unsolved & (r2 > goal), r2 / goal, 0.0)
        most, rest = gl.reduce((excess, share_left), 0, larger)
        rest = rest * (LAST_MARGIN * LAST_MARGIN)
        left = gl.where((rest < LAST_MOST * LAST_MOST) & tells, rest, 1.0)
        r_shared.store(r)
        if WIDE:
            solution_shared.store(solution_shared.load(LAYOUTS.vectors) + step[:, None] * x_wide)
        else:
            solution += step[:, None] * x_wide
        sweeps += 1

    if WIDE:
        solution = solution_shared.load(LAYOUTS.vectors)
    solution += gl.where(left < 1, last_size, 0.0)[:, None] * r_shared.load(LAYOUTS.vectors)
    r2 *= gl.where(last_size > 0, left, 1.0)
    solution += (0.0 * r2)[:, None]  # NaN where the right-hand side was
    return solution, b2, r2, threshold, iterations, sweeps


@gluon.jit
def out_of_units_of(ridge, ridge_in, row, at, k_unit):
    """What solutions in units of the keys are multiplied by."""
    return gl.where(
        ridge < RIDGE_MOST, inverse_power(k_unit), RIDGE_MOST * (k_unit / load_ridge(ridge_in, row, at, 1.0))
    )


@gluon.jit
def store_ended(ended_out, numbers, there, b2, r2, threshold, iterations):
    gl.store(ended_out.iterations + numbers, iterations, mask=there)
    residual = gl.where(r2 == 0, 0.0, gl.sqrt(r2 / b2))
    gl.store(ended_out.residual + numbers, residual, mask=there)
    gl.store(ended_out.converged + numbers, r2 <= threshold, mask=there)


@gluon.jit(do_not_specialize=[*NUMBERS, "max_iters", "segments"])
def solve_hopper_kernel(
    q_in, k_in, units, origin_ptr, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, made_in, x_out, adjoint, ended_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    tolerances, max_iters, segments,
    ADJOINT: gl.constexpr, PRECONDITIONER: gl.constexpr, SEGMENT: gl.constexpr, SLOTS: gl.constexpr,
    KEPT: gl.constexpr, ONES: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `solve.solve_kernel` does without a preconditioner. KEPT: tiles whose weights are in shared memory."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False, lanes()
    )  # fmt: skip
    if outside(at, at.q_len, seqlens.cu_q):
        return
    if made_in is not None:
        slot = at.q_head.to(gl.int64) * segments + at.start // SEGMENT
        if gl.load(made_in.use + slot) > 0:
            return
    N: gl.constexpr = BLOCK_N
    D: gl.constexpr = SHAPE.BLOCK_D
    LAYOUTS: gl.constexpr = layouts(BLOCK_M, N, D)
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    rings = (ring_of(N, D, SLOTS),)
    ranges = tiles_of(key_range(at, window, SHAPE.CAUSAL, BLOCK_M, N), N)
    sources = (keys_of(k_in, at),), at.k_stop
    begin(rings, sources, ranges, N, SLOTS - 2)
    row = at.start + gl.arange(0, BLOCK_M, layout=LAYOUTS.rows)
    there = row < at.q_len
    numbers = at.q_row + row
    vectors = numbers[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUTS.vectors))[None, :]  # (M, D)
    q = load_queries(q_in, at, row, there, D, LAYOUTS.vectors)
    k_mean = gl.load(k_mean_ptr + vectors, mask=there[:, None], other=0.0) * inverse_power(k_unit)
    some = sees_some(row, at, window, SHAPE.CAUSAL)
    given_ridge, ridge = ridges(ridge_in, row, at, some, k_unit)
    if ADJOINT:
        r = gl.load(b_ptr + vectors, mask=there[:, None], other=0.0)
    else:
        r = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    r = gl.where(some[:, None], r, 0.0) + (0.0 * given_ridge)[:, None]
    start = None
    if not ADJOINT and b_ptr is not None:
        start = first_guess(q, r, ridge, gl.load(b_ptr + vectors, mask=there[:, None], other=0.0))
    score_row = at.start + gl.arange(0, BLOCK_M, layout=LAYOUTS.score_rows)
    shift = gl.load(lse2_ptr + at.q_row + score_row, mask=score_row < at.q_len, other=0.0) - WEIGHT_BITS
    atol, rtol, coarse = tolerances
    if not ADJOINT:
        atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    solution, b2, r2, threshold, iterations, _ = solved(
        operand_of(q, LAYOUTS.scores), r, start, k_mean, ridge, shift, scale * LOG2E * q_unit * k_unit,
        (atol, rtol, coarse), max_iters, rings, sources, ranges, row, at, window,
        room_for(KEPT, rings[0], BLOCK_M, N), None, ADJOINT, SHAPE, SLOTS, KEPT, ONES, N,
    )  # fmt: skip
    async_copy.wait_group(0)  # what was fetched for no sweep
    solution *= out_of_units_of(ridge, ridge_in, row, at, k_unit)[:, None]
    if ADJOINT:
        y = solution * gl.load(adjoint.b_size + numbers, mask=there, other=0.0)[:, None]
        probe = gl.load(adjoint.probe + vectors, mask=there[:, None], other=0.0)
        gl.store(adjoint.z_y + numbers, gl.sum(probe * y, 1), mask=there)
        y = finite_or_zero(y)
        y_unit = power_of_two(gl.max(gl.abs(y), 1))
        gl.store(adjoint.y.ptr + vectors, (y * inverse_power(y_unit)[:, None]).to(gl.float16), mask=there[:, None])
        gl.store(adjoint.y.unit + numbers, y_unit, mask=there)
        lift = lift_of(adjoint.tops, at.k_head, q, D)
        gl.store(x_out + vectors, saturated(y * (-k_unit * lift), q).to(gl.float16), mask=there[:, None])
    else:
        gl.store(x_out + vectors, solution, mask=there[:, None])
        store_ended(ended_out, numbers, there, b2, r2, threshold, iterations)
