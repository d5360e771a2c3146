"""Attention of 16-bit inputs where a tile's queries see few keys, in Gluon for Hopper: the solve alone, or all of the
forward pass in one launch.

Keys stay in shared memory and weights in registers, so that an iteration is two products and nothing else: solve.py
loads the keys and makes the weights anew for every sweep. One warp group has a tile of queries, and two programs or
more share a processor: what one sums up between its sweeps the other's products hide.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashlla.backends.triton.primitives import (
    LN2,
    LOG2E,
    NUMBERS,
    TOP,
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
    queries_of,
    ridge_in_units,
    saturated,
    sees_some,
    units_of,
    visible,
)
from flashlla.backends.triton.resident_parts import (
    arrived,
    barrier,
    fetch,
    finite_or_zero,
    itself,
    largest_of,
    left_by_step,
    room_on_chip,
    rows_layout,
    sweep,
    tops,
    values_weighed,
    weighed_keys,
)
from flashlla.backends.triton.solve import LAST_MARGIN, LAST_MOST, RIDGE_MOST


@gluon.constexpr_function
def plan_of(plans, i):
    """By name: in a subscript the compiler forgets what a record's members are called."""
    return plans[i]


@gluon.constexpr_function
def more_than(plans, i):
    """How many tiles of keys a program of plan i sees more than."""
    return plans[i - 1].tiles if i > 0 else -1


@gluon.constexpr_function
def at_once(plan):
    """Tiles of keys that it begins to load before it waits for the first."""
    return plan.tiles if plan.slots == plan.tiles else 1


@gluon.jit
def load_q(q_in, at, row, dim):
    """The queries ``row``: (M, D)."""
    pointers = queries_of(q_in, at) + row.to(gl.int64)[:, None] * q_in.stride_s + dim[None, :]
    return gl.load(pointers, mask=(row < at.q_len)[:, None], other=0.0)


@gluon.jit
def iterate(
    at, row, chip, ws, source, slot, b, k_mean, weight, given_ridge, k_unit, far, window, tolerances, max_iters,
    ADJOINT: gl.constexpr, LAST: gl.constexpr, PLAN: gl.constexpr, SHAPE: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The loop of `solve.solve_kernel` with right-hand sides b (M, D), which are in chip.r too. Returns the solutions
    in units of the keys, their products with b, iterations, |r|^2, |b|^2, what it was to come down to, and ``slot``.

    ``weight``: (M,) what the weights of a query sum up to. ``far``: where in device memory PLAN.far has the solution.
    """
    M: gl.constexpr = chip.r.shape[0]
    N: gl.constexpr = chip.keys.shape[1]
    D: gl.constexpr = chip.keys.shape[2]
    VECTORS: gl.constexpr = b.type.layout
    ROWS: gl.constexpr = gl.SliceLayout(1, VECTORS)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    there = row < at.q_len
    b2 = gl.sum(b * b, 1)  # (M,), as every scalar of the recurrence
    r_mean = gl.sum(b * k_mean, 1)
    nothing = gl.zeros([M, D], gl.float32, VECTORS)
    if PLAN.far:
        gl.store(far, nothing, mask=there[:, None])
    else:
        chip.solution.store(nothing)
    atol, rtol, coarse = tolerances
    if not ADJOINT:
        atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    many_keys = keys_seen(row, at, window, SHAPE.CAUSAL) > 2 * SHAPE.HEAD_DIM
    rtol = gl.where(many_keys, gl.maximum(rtol, coarse), rtol)
    threshold = gl.maximum(b2, atol) * rtol
    # Curvatures and images are those of the weights: ``weight`` times too large.
    ridge = gl.minimum(ridge_in_units(given_ridge, k_unit), RIDGE_MOST) * weight
    r2 = b2
    size = gl.sqrt(r2)
    inverse_size = inverse_or_zero(size)
    x_mean = r_mean * inverse_size
    goal = threshold
    excess = gl.where(r2 > goal, r2 / goal, 0.0)
    iterations = gl.zeros([M], gl.int32, ROWS)
    b_solution = gl.zeros([M], gl.float32, ROWS)  # a direction's product with b is that with its residual
    if ADJOINT:  # |solution|^2 and solution.x, of which the residual takes no part: it is at right angles to all before
        solution2 = gl.zeros([M], gl.float32, ROWS)
        solution_x = gl.zeros([M], gl.float32, ROWS)
    last_size = gl.zeros([M], gl.float32, ROWS)
    if LAST:
        lowest = gl.full([M], float("inf"), gl.float32, ROWS)
        highest = gl.zeros([M], gl.float32, ROWS)
        share_left = gl.where(excess > 1, 1.0, 0.0)
        tells = gl.sum(((excess > 1) & many_keys).to(gl.int32), 0) >= M // 2
    left = 1.0
    chip.x.store((b * inverse_size[:, None]).to(gl.float16))
    chip.told.store(excess)
    fence_async_shared()
    barrier()
    most = largest_of(chip.told)
    zero = gl.zeros([M, N], gl.float32, SCORES)
    sweeps, slot = 0, gl.to_tensor(slot)
    while (sweeps < max_iters) & (most * left > 1):
        nought = sweeps >> 20  # see `tile_of`
        moves = excess * left > 1
        unsolved = excess > 1
        acc, total, slot = sweep(
            chip, gl.convert_layout(x_mean, SCORE_ROWS), ws, source, slot, nought, zero, VECTORS, PLAN.tiles,
            PLAN.ahead, PLAN.shared,
        )  # fmt: skip
        x_wide = chip.x.load(VECTORS).to(gl.float32)
        k_mean = chip.k_mean.load(VECTORS).to(gl.float32)
        image = acc - k_mean * total[:, None] + ridge[:, None] * x_wide  # A x
        curvature = gl.sum(x_wide * image, 1)
        if LAST:
            square = gl.sum(image * image, 1)
        unsolved = unsolved & ((curvature > 0) | ~moves)
        moves = moves & unsolved
        inverse_curvature = 1 / gl.where(moves, curvature, 1.0)
        along = r2 * inverse_or_zero(size)  # r.x
        step = gl.where(moves, along * inverse_curvature, 0.0)
        r = chip.r.load(VECTORS) - step[:, None] * image
        step *= weight
        b_solution += step * along
        iterations += moves.to(gl.int32)
        r2_next = gl.sum(r * r, 1)
        r_mean = gl.sum(r * k_mean, 1)
        turn = gl.where(moves, r2_next / gl.where(moves, r2, 1.0), 0.0) * size
        r2 = r2_next
        size = gl.sqrt(r2 + turn * turn)
        inverse_size = inverse_or_zero(size)
        turn *= inverse_size
        chip.x.store((r * inverse_size[:, None] + turn[:, None] * x_wide).to(gl.float16))
        x_mean = r_mean * inverse_size + turn * x_mean
        if ADJOINT:
            solution2 += step * (2 * solution_x + step)
            solution_x = turn * (solution_x + step)
            next_step = rtol * (curvature / weight) * (curvature / weight) * solution2
            goal = gl.where(moves, gl.minimum(threshold, next_step), goal)
        if LAST:
            lowest = gl.where(moves, gl.minimum(lowest, curvature), lowest)
            highest = gl.where(moves, gl.maximum(highest, curvature), highest)
            found = left_by_step(square, inverse_curvature, lowest, highest)
            share_left = gl.where(moves & many_keys, found, share_left)
            last_size = gl.where(moves & many_keys, inverse_curvature * weight, last_size)
            chip.told_left.store(share_left)
        excess = gl.where(unsolved & (r2 > goal), r2 / goal, 0.0)
        chip.told.store(excess)
        fence_async_shared()
        barrier()
        most = largest_of(chip.told)
        if LAST:
            rest = largest_of(chip.told_left) * (LAST_MARGIN * LAST_MARGIN)
            left = gl.where((rest < LAST_MOST * LAST_MOST) & tells, rest, 1.0)
        chip.r.store(r)
        if PLAN.far:
            gl.store(
                far + nought, gl.load(far + nought, mask=there[:, None]) + step[:, None] * x_wide, mask=there[:, None]
            )
        else:
            chip.solution.store(chip.solution.load(VECTORS) + step[:, None] * x_wide)
        sweeps += 1

    solution = gl.load(far, mask=there[:, None], other=0.0) if PLAN.far else chip.solution.load(VECTORS)
    if LAST:
        solution += gl.where(left < 1, last_size, 0.0)[:, None] * chip.r.load(VECTORS)
        r2 *= gl.where(last_size > 0, left, 1.0)
    solution += (0.0 * r2)[:, None]  # NaN where the right-hand side was
    return solution, b_solution + 0.0 * r2, iterations, r2, b2, threshold, slot


@gluon.jit
def ridge_of(ridge_in, row, at, window, CAUSAL: gl.constexpr):
    """The ridges of queries ``row``, (M,); of those that see nothing they need not be finite."""
    return gl.where(sees_some(row, at, window, CAUSAL), load_ridge(ridge_in, row, at, 1.0), 1.0)


@gluon.jit
def out_of_units(ridge, k_unit):
    """What brings solutions in units of the keys to size, (M,); see `solve.RIDGE_MOST`."""
    kept = gl.minimum(ridge_in_units(ridge, k_unit), RIDGE_MOST) < RIDGE_MOST
    return gl.where(kept, inverse_power(k_unit), RIDGE_MOST * (k_unit / ridge))


@gluon.jit
def store_ended(ended_out, numbers, there, iterations, r2, b2, threshold):
    gl.store(ended_out.iterations + numbers, iterations, mask=there)
    residual = gl.where(r2 == 0, 0.0, gl.sqrt(r2 / b2))
    gl.store(ended_out.residual + numbers, residual, mask=there)
    gl.store(ended_out.converged + numbers, r2 <= threshold, mask=there)


@gluon.jit
def solve_tile(
    at, first, q_in, k_in, units, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, x_out, adjoint, ended_out,
    window, n_heads, group, scale, tolerances, max_iters,
    ADJOINT: gl.constexpr, LAST: gl.constexpr, PLAN: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """`solve.solve_kernel` for the tile of queries ``at``, which see no keys but those of PLAN.tiles tiles from
    ``first`` on. PLAN is a `configs.Resident`."""
    D: gl.constexpr = SHAPE.BLOCK_D
    SCORES: gl.constexpr = rows_layout(N)
    VECTORS: gl.constexpr = rows_layout(D)
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    chip = room_on_chip(PLAN, M, N, D)
    source = keys_of(k_in, at), k_in.stride_s, first, at.k_stop
    AT_ONCE: gl.constexpr = at_once(PLAN)
    for n in gl.static_range(AT_ONCE):
        fetch(chip.keys, n, source, n, N)
    row = itself(at.start) + gl.arange(0, M, layout=gl.SliceLayout(1, VECTORS))
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D), as x_out and all vectors of queries lie
    q = load_q(q_in, at, row, dim)
    k_mean = gl.load(k_mean_ptr + vectors, mask=there[:, None], other=0.0) * inverse_power(k_unit)
    some = sees_some(row, at, window, SHAPE.CAUSAL)
    given_ridge = ridge_of(ridge_in, row, at, window, SHAPE.CAUSAL)  # (M,)
    far = b_ptr if ADJOINT else x_out  # every reader of b is this program
    if ADJOINT:
        b = gl.load(b_ptr + vectors, mask=there[:, None], other=0.0)
    else:
        b = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    b = gl.where(some[:, None], b, 0.0) + (0.0 * given_ridge)[:, None]
    chip.x.store(q)
    chip.k_mean.store(k_mean.to(gl.float16))
    chip.r.store(b)
    score_row = at.start + gl.arange(0, M, layout=gl.SliceLayout(1, SCORES))
    shift = gl.load(lse2_ptr + at.q_row + score_row, mask=score_row < at.q_len, other=0.0) - WEIGHT_BITS
    ws, _, _ = weighed_keys(
        chip, source, score_row, shift, scale * LOG2E * q_unit * k_unit, at, window, SHAPE.CAUSAL, PLAN.tiles,
        PLAN.shared, 0, False, SCORES, VECTORS,
    )  # fmt: skip
    weight = gl.full([M], WEIGHT, gl.float32, gl.SliceLayout(1, VECTORS))
    solution, _, iterations, r2, b2, threshold, _ = iterate(
        at, row, chip, ws, source, PLAN.tiles % PLAN.slots, b, k_mean, weight, given_ridge, k_unit, far + vectors,
        window, tolerances, max_iters, ADJOINT, LAST, PLAN, SHAPE, SCORES,
    )  # fmt: skip
    if PLAN.slots < PLAN.tiles:
        arrived(0)  # one that no sweep took, before its place is used for anything else
    numbers = at.q_row + row
    size = out_of_units(ridge_of(ridge_in, row, at, window, SHAPE.CAUSAL), k_unit)
    if ADJOINT:
        b_size = gl.load(adjoint.b_size + numbers, mask=there, other=0.0)
        y = solution * (b_size * size)[:, None]
        probe = gl.load(adjoint.probe + vectors, mask=there[:, None], other=0.0)
        gl.store(adjoint.z_y + numbers, gl.sum(probe * y, 1), mask=there)
        y = finite_or_zero(y)
        y_unit = power_of_two(gl.max(gl.abs(y), 1))
        gl.store(adjoint.y.ptr + vectors, (y * inverse_power(y_unit)[:, None]).to(gl.float16), mask=there[:, None])
        gl.store(adjoint.y.unit + numbers, y_unit, mask=there)
        lift = lift_of(adjoint.tops, at.k_head, q, D)
        gl.store(x_out + vectors, saturated(y * (-k_unit * lift), q).to(gl.float16), mask=there[:, None])
    else:
        gl.store(x_out + vectors, solution * size[:, None], mask=there[:, None])
        store_ended(ended_out, numbers, there, iterations, r2, b2, threshold)


@gluon.jit
def flaws_seen(
    flaws, at, row, first, stop, cu_seqlens_k, window, n_heads, group, k_total, CAUSAL: gl.constexpr, N: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """`forward.flaws_seen` of the queries ``row``, whose tile sees the keys from ``first`` to ``stop``: (M,)."""
    found = row * 0.0
    k_flaws = flaws.heads + n_heads + at.k_head
    q_flaw, k_flaw, v_flaw = gl.load(flaws.heads + at.q_head), gl.load(k_flaws), gl.load(k_flaws + n_heads // group)
    if q_flaw + k_flaw + v_flaw > 0:  # seldom
        found += gl.load(flaws.q + at.q_row + row, mask=row < gl.where(q_flaw > 0, at.q_len, 0), other=0.0)
        k_row = (at.k_head if cu_seqlens_k is None else at.kv_head).to(gl.int64) * k_total + at.k_first
        for j in range(first, stop, N):
            key = j + gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
            flaw = gl.load(flaws.k + k_row + key, mask=key < gl.where(k_flaw > 0, stop, 0), other=0.0)
            flaw += gl.load(flaws.v + k_row + key, mask=key < gl.where(v_flaw > 0, stop, 0), other=0.0)
            seen = visible(row[:, None], key[None, :], at, window, CAUSAL)
            found += gl.sum(gl.where(seen, flaw[None, :], 0.0), 1)
    return found


@gluon.jit
def attend_tile(
    at, first, stop, q_in, k_in, v_in, units, flaws, ridge_in, outs, ended_out, cu_seqlens_k,
    window, n_heads, group, k_total, scale, delta_eps, tolerances, max_iters,
    LAST: gl.constexpr, PLAN: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """The forward pass for the tile of queries ``at``: `forward.statistics_kernel`, `solve.solve_kernel` and
    `forward.output_kernel`, with weights relative to the largest of their row."""
    D: gl.constexpr = SHAPE.BLOCK_D
    SCORES: gl.constexpr = rows_layout(N)
    VECTORS: gl.constexpr = rows_layout(D)
    ROWS: gl.constexpr = gl.SliceLayout(1, VECTORS)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    chip = room_on_chip(PLAN, M, N, D)
    source = keys_of(k_in, at), k_in.stride_s, first, at.k_stop
    AT_ONCE: gl.constexpr = at_once(PLAN)
    for n in gl.static_range(AT_ONCE):
        fetch(chip.keys, n, source, n, N)
    row = itself(at.start) + gl.arange(0, M, layout=ROWS)
    score_row = gl.convert_layout(row, SCORE_ROWS)
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D)
    numbers = at.q_row + row
    chip.x.store(load_q(q_in, at, row, dim))
    found = flaws_seen(
        flaws, at, score_row, first, stop, cu_seqlens_k, window, n_heads, group, k_total, SHAPE.CAUSAL, N, SCORES
    )  # fmt: skip

    factor = scale * LOG2E * q_unit * k_unit
    top = tops(chip, source, score_row, factor, at, window, SHAPE.CAUSAL, PLAN.tiles, SCORES)  # (M,)
    top = gl.where(top == float("-inf"), 0.0, top)  # of queries that see nothing
    ws, acc, total = weighed_keys(
        chip, source, score_row, top - WEIGHT_BITS, factor, at, window, SHAPE.CAUSAL, PLAN.tiles,
        PLAN.shared, 1, True, SCORES, VECTORS,
    )  # fmt: skip
    some = sees_some(row, at, window, SHAPE.CAUSAL)
    total += gl.where(some, gl.convert_layout(found, ROWS), 0.0)
    lse = (gl.convert_layout(top, ROWS) + (gl.log2(total) - WEIGHT_BITS)) * LN2
    gl.store(outs.lse + numbers, lse, mask=there)
    gl.store(outs.omega + numbers, total * (1 / WEIGHT), mask=there)
    total = gl.where(some, total, 1.0)  # the sums of a query that sees nothing are 0
    k_mean = acc / total[:, None]  # (M, D)
    gl.store(outs.k_mean + vectors, k_mean * k_unit, mask=there[:, None])
    given_ridge = ridge_of(ridge_in, row, at, window, SHAPE.CAUSAL)  # (M,)
    b = k_mean - chip.x.load(VECTORS).to(gl.float32) * (q_unit * inverse_power(k_unit))
    b = gl.where(some[:, None], b, 0.0) + (0.0 * given_ridge)[:, None]
    chip.k_mean.store(k_mean.to(gl.float16))
    chip.r.store(b)
    solution, d_z, iterations, r2, b2, threshold, slot = iterate(
        at, row, chip, ws, source, 2 * PLAN.tiles % PLAN.slots, b, k_mean, total, given_ridge, k_unit,
        outs.probe + vectors, window, tolerances, max_iters, False, LAST, PLAN, SHAPE, SCORES,
    )  # fmt: skip
    store_ended(ended_out, numbers, there, iterations, r2, b2, threshold)

    # As `forward.output_kernel` has it: the probe out of units, and again in those of the keys.
    nought = gl.min(iterations, 0) >> 20  # see `tile_of`
    numbers += nought
    vectors += nought
    size = out_of_units(ridge_of(ridge_in, row + nought, at, window, SHAPE.CAUSAL), k_unit)
    gl.store(outs.probe + vectors, solution * size[:, None], mask=there[:, None])
    probe = solution * (size * k_unit)[:, None]
    d_z *= size * k_unit  # (M,) d.z, which is also z.A z
    z_size = gl.sqrt(gl.sum(probe * probe, 1))
    z = (probe * inverse_or_zero(z_size)[:, None]).to(gl.float16)  # (M, D) of unit length
    chip.x.store(z)
    k_mean = gl.load(outs.k_mean + vectors, mask=there[:, None], other=0.0) * inverse_power(k_unit)
    rest = 1 + z_size * gl.sum(z.to(gl.float32) * k_mean, 1)  # 1 + z.k_mean
    # p a^2 sums to z.C z <= d.z, so |p (1 - a)| <= 1 + sqrt(d.z), and a weight is p ``total``: the largest scale of
    # weights that cannot overflow.
    bound = (1 + gl.sqrt(gl.maximum(d_z, 0.0))) * total
    gain = gl.minimum(power_of_two((1 / bound) * TOP), 1.0)
    omega = gl.load(outs.omega + numbers, mask=there, other=1.0)
    least = gl.where(omega < 1, 1.0, omega)  # NaN stays
    guard = 1 / (1 + delta_eps * (1 + d_z) / least)
    gl.store(outs.guard + numbers, guard, mask=there)
    fence_async_shared()
    barrier()
    acc = values_weighed(
        chip, gl.convert_layout(-z_size * gain, SCORE_ROWS), gl.convert_layout(rest * gain, SCORE_ROWS), ws, source,
        (keys_of(v_in, at), v_in.stride_s, first, at.k_stop), slot, nought, gl.zeros([M, N], gl.float32, SCORES),
        VECTORS, PLAN.tiles, PLAN.shared,
    )  # fmt: skip
    o = acc * (guard * v_unit * inverse_power(gain) / total)[:, None]
    # In rows of whole sectors.
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o = gl.convert_layout(o.to(outs.o.ptr.dtype.element_ty), WIDE)
    row = at.start + gl.arange(0, M, layout=gl.SliceLayout(1, WIDE))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    pointers = queries_of(outs.o, at) + row.to(gl.int64)[:, None] * outs.o.stride_s + dim[None, :]
    gl.store(pointers, o, mask=(row < at.q_len)[:, None])


@gluon.jit(do_not_specialize=[*NUMBERS, "max_iters", "segments", "tiles"])
def resident_solve_kernel(
    q_in, k_in, units, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, made_in, x_out, adjoint, ended_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    tolerances, max_iters, segments, tiles,
    ADJOINT: gl.constexpr, LAST: gl.constexpr, SEGMENT: gl.constexpr, PLANS: gl.constexpr, SHAPE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `solve.solve_kernel` does without a preconditioner, and without a first guess, where no query sees more keys
    than the last of PLANS has, `configs.Resident`s in the order of their tiles. ``tiles``: if causal, it has the first
    so many tiles of queries. What was at b_ptr is lost; of the forward solve nothing is there."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False, tiles
    )
    first, _, _, stop = key_range(at, window, SHAPE.CAUSAL, BLOCK_M, 1)
    needed = gl.cdiv(stop - first, BLOCK_N)
    if outside(at, at.q_len, seqlens.cu_q):
        needed = -1
    if made_in is not None:
        slot = at.q_head.to(gl.int64) * segments + at.start // SEGMENT
        needed = gl.where(gl.load(made_in.use + slot) > 0, -1, needed)
    for i in gl.static_range(len(PLANS)):
        if (needed <= plan_of(PLANS, i).tiles) & (needed > more_than(PLANS, i)):
            solve_tile(
                at, first, q_in, k_in, units, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, x_out, adjoint, ended_out,
                window, n_heads, group, scale, tolerances, max_iters,
                ADJOINT, LAST, plan_of(PLANS, i), SHAPE, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@gluon.jit(do_not_specialize=[*NUMBERS, "max_iters", "tiles"])
def resident_forward_kernel(
    q_in, k_in, v_in, units, flaws, ridge_in, outs, ended_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale, delta_eps,
    tolerances, max_iters, tiles,
    LAST: gl.constexpr, PLANS: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """All of the forward pass, but for the cast, for the same queries."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False, tiles
    )
    first, _, _, stop = key_range(at, window, SHAPE.CAUSAL, BLOCK_M, 1)
    needed = gl.cdiv(stop - first, BLOCK_N)
    if outside(at, at.q_len, seqlens.cu_q):
        needed = -1
    for i in gl.static_range(len(PLANS)):
        if (needed <= plan_of(PLANS, i).tiles) & (needed > more_than(PLANS, i)):
            attend_tile(
                at, first, stop, q_in, k_in, v_in, units, flaws, ridge_in, outs, ended_out, seqlens.cu_k,
                window, n_heads, group, k_len, scale, delta_eps, tolerances, max_iters,
                LAST, plan_of(PLANS, i), SHAPE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
