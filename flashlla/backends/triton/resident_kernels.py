"""The plain solve of 16-bit inputs where a tile's queries see few keys, in Gluon for Hopper.

Keys stay in shared memory and weights in registers, so that an iteration is two products and nothing else: solve.py
loads the keys and makes the weights anew for every sweep. One warp group has a tile of queries, and two programs or
more share a processor: what one sums up between its sweeps the other's products hide.
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
    finite,
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
    units_of,
    visible,
)
from flashlla.backends.triton.solve import LAST_MARGIN, LAST_MOST, RIDGE_MOST

# Triton 3.7 has renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def plan_of(plans, i):
    """By name: in a subscript the compiler forgets what a record's members are called."""
    return plans[i]


@gluon.jit
def halves(x):
    """Even and odd columns of (M, N), neighbours of which are one thread's: (M, N / 2) each."""
    return gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@gluon.jit
def packed(x):
    """float16 of x (M, N), two columns in an integer: (M, N / 2)."""
    even, odd = halves(x)
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def weighed(w, c):
    """float16 of w c, packed, for w packed (M, N / 2) and c (M, N)."""
    even, odd = halves(c)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 c; cvt.rn.f16x2.f32 c, $3, $2; mul.rn.f16x2 $0, $1, c; }",
        "=r,r,f,f", [w, even, odd], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def operand(w, OUT: gl.constexpr):
    """Packed w (M, N / 2) as the left operand of a product with the layout OUT: (M, N)."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [w], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    wide = gl.reshape(gl.join(even, odd), [w.shape[0], 2 * w.shape[1]])
    return gl.convert_layout(wide, gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def part_sums(w):
    """Of packed w (M, N / 2) the sums of what each of four threads has of a row: (M, 4)."""
    pairs = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; cvt.f32.f16 y, b; add.f32 $0, x, y; }",
        "=f,r", [w], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.sum(gl.reshape(pairs, [w.shape[0], w.shape[1] // 4, 4]), 1)


@gluon.jit
def fetch(keys, slot, source, n, N: gl.constexpr):
    """Begin to load tile ``n`` of the keys. Beyond the last key stands the last one again, whose weight there is 0;
    where there is none nothing is loaded, and no sweep will come."""
    D: gl.constexpr = keys.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k_base, k_stride, first, stop = source
    key = first + n * N + gl.arange(0, N, layout=gl.SliceLayout(1, COPY))
    there = key * 0 < stop
    key = gl.minimum(key, gl.maximum(stop - 1, 0))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    pointers = k_base + (key.to(gl.int64) * k_stride)[:, None] + dim[None, :]
    async_copy.async_copy_global_to_shared(keys.index(slot), pointers, mask=there[:, None])
    async_copy.commit_group()


@gluon.jit
def arrived(pending: gl.constexpr):
    """When all but the last ``pending`` tiles that were fetched are there for all."""
    async_copy.wait_group(pending)
    fence_async_shared()
    barrier()


@gluon.jit
def load_weights(
    q_shared, keys, w_shared, source, row, shift, factor, at, window, SHAPE: gl.constexpr, LAYOUT: gl.constexpr,
    N: gl.constexpr, TILES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """The weights of the queries ``row``, packed: TILES of (M, N / 2)."""
    SLOTS: gl.constexpr = keys.shape[0]
    _, _, first, _ = source
    zero = gl.zeros([row.shape[0], N], gl.float32, LAYOUT)
    ws = gl.tuple(())
    for n in gl.static_range(TILES):
        arrived(TILES - 1 - n if SLOTS == TILES else 0)
        if SLOTS < TILES:
            fetch(keys, (n + 1) % SLOTS, source, (n + 1) % TILES, N)
        s = warpgroup_mma(q_shared, keys.index(n % SLOTS).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,)) * factor - shift[:, None]
        key = first + n * N + gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
        s = gl.where(visible(row[:, None], key[None, :], at, window, SHAPE.CAUSAL), s, float("-inf"))
        w = packed(gl.exp2(s))
        if n < SHARED:
            w_shared.index(n).store(w)
            ws += (0,)
        else:
            ws += (w,)
    return ws


@gluon.jit
def tile_of(ws, w_shared, n: gl.constexpr, nought, SHARED: gl.constexpr, LIKE: gl.constexpr):
    if n < SHARED:
        return w_shared.index(n + nought).load(LIKE)
    else:
        return ws[n]


@gluon.jit
def sweep(
    x_shared, x_mean, ws, w_shared, keys, ones, source, slot, nought, zero, VECTORS: gl.constexpr,
    TILES: gl.constexpr, AHEAD: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """sum_j w_ij c_ij k_j (M, D) and sum_j w_ij c_ij (M,), c_ij = x_i.k_j - x_mean_i.

    AHEAD: the next tile's first product is under way while this one's second is; it takes the registers of a tile.
    Keys that are not all there come one tile ahead, the first into ``slot``.
    """
    M: gl.constexpr = x_shared.shape[0]
    N: gl.constexpr = zero.shape[1]
    D: gl.constexpr = x_shared.shape[1]
    SLOTS: gl.constexpr = keys.shape[0]
    TOTALS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    LIKE: gl.constexpr = packed(zero).type.layout
    acc = gl.zeros([M, D], gl.float32, VECTORS)
    SUMS: gl.constexpr = ones is None
    totals = part_sums(packed(zero)) if SUMS else gl.zeros([M, 8], gl.float32, TOTALS)
    if AHEAD:
        c = warpgroup_mma(x_shared, keys.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        c = warpgroup_mma_wait(0, deps=(c,))
        for n in gl.static_range(TILES):
            if n + 1 < TILES:
                c_next = warpgroup_mma(x_shared, keys.index(n + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
            w = weighed(tile_of(ws, w_shared, n, nought, SHARED, LIKE), c - x_mean[:, None])
            acc = warpgroup_mma(operand(w, VECTORS), keys.index(n), acc, is_async=True)
            if SUMS:
                totals += part_sums(w)
            else:
                totals = warpgroup_mma(operand(w, TOTALS), ones, totals, is_async=True)
            if n + 1 < TILES:
                c = warpgroup_mma_wait(1 if SUMS else 2, deps=(c_next,))
    else:
        for n in gl.static_range(TILES):
            if SLOTS < TILES:
                arrived(0)
                k = keys.index(slot)
                slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
                fetch(keys, slot, source, (n + 1) % TILES, N)
            else:
                k = keys.index(n)
            c = warpgroup_mma(x_shared, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            if n == 0:
                c = warpgroup_mma_wait(0, deps=(c,))
            elif SUMS:
                c, acc = warpgroup_mma_wait(0, deps=(c, acc))
            else:
                c, acc, totals = warpgroup_mma_wait(0, deps=(c, acc, totals))
            w = weighed(tile_of(ws, w_shared, n, nought, SHARED, LIKE), c - x_mean[:, None])
            acc = warpgroup_mma(operand(w, VECTORS), k, acc, is_async=True)
            if SUMS:
                totals += part_sums(w)
            else:
                totals = warpgroup_mma(operand(w, TOTALS), ones, totals, is_async=True)
    if SUMS:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        acc, totals = warpgroup_mma_wait(0, deps=(acc, totals))
    return acc, gl.convert_layout(gl.sum(totals, 1), gl.SliceLayout(1, VECTORS)), slot


@gluon.jit
def finite_or_zero(x):
    """`primitives.finite_or_zero`, whose zeros have no layout."""
    return gl.where(finite(x), x, 0.0)


@gluon.jit
def largest_of(told):
    """Of the numbers of all rows, in every warp: no sum across warps, which takes two more barriers."""
    LANES: gl.constexpr = gl.BlockedLayout([told.shape[0] // 32], [32], [4], [0])
    return gl.max(told.load(LANES), 0)


@gluon.jit
def left_by_step(square, inverse_curvature, lowest, highest):
    """`solve.left_by_step`, given |A x|^2, whose sum need not wait for that of the curvature."""
    spread = square * inverse_curvature * inverse_curvature
    apart = (highest - lowest) * inverse_curvature
    return gl.maximum(gl.where(spread > 1, spread - 1, 0.0), apart * apart)


@gluon.jit
def solve_tile(
    at, first, q_in, k_in, units, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, x_out, adjoint, ended_out,
    window, n_heads, group, scale, tolerances, max_iters,
    ADJOINT: gl.constexpr, LAST: gl.constexpr, PLAN: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """`solve.solve_kernel` for the tile of queries ``at``, which see no keys but those of PLAN.tiles tiles from
    ``first`` on. PLAN is a `configs.Resident`."""
    TILES: gl.constexpr = PLAN.tiles
    SLOTS: gl.constexpr = PLAN.slots
    SHARED: gl.constexpr = PLAN.shared
    FAR: gl.constexpr = PLAN.far
    AHEAD: gl.constexpr = PLAN.ahead
    D: gl.constexpr = SHAPE.BLOCK_D
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    VECTORS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, VECTORS)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    HALVES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], gl.float16)
    SINGLES: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    TOLD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    keys = gl.allocate_shared_memory(
        gl.float16, [SLOTS, N, D], gl.NVMMASharedLayout.get_default_for([N, D], gl.float16)
    )
    source = keys_of(k_in, at), k_in.stride_s, first, at.k_stop
    for n in gl.static_range(SLOTS if SLOTS == TILES else 1):
        fetch(keys, n, source, n, N)

    row = at.start + gl.arange(0, M, layout=ROWS)
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D), as x_out and all vectors of queries lie
    q = gl.load(
        q_in.ptr
        + at.sequence.to(gl.int64) * q_in.stride_b
        + at.head.to(gl.int64) * q_in.stride_h
        + (at.q_first + row).to(gl.int64)[:, None] * q_in.stride_s
        + dim[None, :],
        mask=there[:, None],
        other=0.0,
    )
    x_shared = gl.allocate_shared_memory(gl.float16, [M, D], HALVES, q)  # the queries, then directions
    k_mean = gl.load(k_mean_ptr + vectors, mask=there[:, None], other=0.0) * inverse_power(k_unit)
    mean_shared = gl.allocate_shared_memory(gl.float16, [M, D], HALVES, k_mean.to(gl.float16))
    some = sees_some(row, at, window, SHAPE.CAUSAL)
    given_ridge = gl.where(some, load_ridge(ridge_in, row, at, 1.0), 1.0)  # (M,)
    if ADJOINT:
        r = gl.load(b_ptr + vectors, mask=there[:, None], other=0.0)
    else:
        r = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    r = gl.where(some[:, None], r, 0.0) + (0.0 * given_ridge)[:, None]
    r2 = gl.sum(r * r, 1)  # (M,), as every scalar of the recurrence
    r_mean = gl.sum(r * k_mean, 1)
    r_shared = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES, r)
    if FAR:  # every reader of b is this program, which has read it
        gl.store(b_ptr + vectors, gl.zeros([M, D], gl.float32, VECTORS), mask=there[:, None])
    else:
        solution_shared = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES, gl.zeros([M, D], gl.float32, VECTORS))
    ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 8], gl.float16)
    if D > 64:
        ones = None
    else:
        WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
        ones = gl.allocate_shared_memory(gl.float16, [N, 8], ONES, gl.full([N, 8], 1 / 8, gl.float16, WHOLE))
    told = gl.allocate_shared_memory(gl.float32, [M], TOLD)
    told_left = gl.allocate_shared_memory(gl.float32, [M], TOLD)

    score_row = at.start + gl.arange(0, M, layout=SCORE_ROWS)
    shift = gl.load(lse2_ptr + at.q_row + score_row, mask=score_row < at.q_len, other=0.0) - WEIGHT_BITS
    factor = scale * LOG2E * q_unit * k_unit
    if SHARED > 0:
        w_shared = gl.allocate_shared_memory(gl.int32, [SHARED, M, N // 2], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    else:
        w_shared = told
    ws = load_weights(
        x_shared, keys, w_shared, source, score_row, shift, factor, at, window, SHAPE, SCORES, N, TILES, SHARED
    )  # fmt: skip

    r = r_shared.load(VECTORS)
    atol, rtol, coarse = tolerances
    if not ADJOINT:
        atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    many_keys = keys_seen(row, at, window, SHAPE.CAUSAL) > 2 * SHAPE.HEAD_DIM
    rtol = gl.where(many_keys, gl.maximum(rtol, coarse), rtol)
    b2 = r2
    threshold = gl.maximum(b2, atol) * rtol
    ridge = gl.minimum(ridge_in_units(given_ridge, k_unit), RIDGE_MOST)
    size = gl.sqrt(r2)
    inverse_size = inverse_or_zero(size)
    x = (r * inverse_size[:, None]).to(gl.float16)
    x_mean = r_mean * inverse_size
    goal = threshold
    excess = gl.where(r2 > goal, r2 / goal, 0.0)
    iterations = gl.zeros([M], gl.int32, ROWS)
    if ADJOINT:  # |solution|^2 and solution.x, of which the residual takes no part: it is at right angles to all before
        solution2 = gl.zeros([M], gl.float32, ROWS)
        solution_x = gl.zeros([M], gl.float32, ROWS)
    if LAST:
        lowest = gl.full([M], float("inf"), gl.float32, ROWS)
        highest = gl.zeros([M], gl.float32, ROWS)
        last_size = gl.zeros([M], gl.float32, ROWS)
        share_left = gl.where(excess > 1, 1.0, 0.0)
        tells = gl.sum(((excess > 1) & many_keys).to(gl.int32), 0) >= M // 2
    left = 1.0
    x_shared.store(x)
    told.store(excess)
    fence_async_shared()
    barrier()
    most = largest_of(told)
    zero = gl.zeros([M, N], gl.float32, SCORES)
    sweeps, slot = 0, TILES % SLOTS
    while (sweeps < max_iters) & (most * left > 1):
        nought = sweeps >> 20  # 0, but no compiler knows: what is addressed with it is not kept through the loop
        moves = excess * left > 1
        unsolved = excess > 1
        acc, total, slot = sweep(
            x_shared, gl.convert_layout(x_mean, SCORE_ROWS), ws, w_shared, keys, ones, source, slot, nought, zero,
            VECTORS, TILES, AHEAD, SHARED,
        )  # fmt: skip
        x_wide = x_shared.load(VECTORS).to(gl.float32)
        k_mean = mean_shared.load(VECTORS).to(gl.float32)
        image = (acc - k_mean * total[:, None]) * (1 / WEIGHT) + ridge[:, None] * x_wide  # A x
        curvature = gl.sum(x_wide * image, 1)
        if LAST:
            square = gl.sum(image * image, 1)
        unsolved = unsolved & ((curvature > 0) | ~moves)
        moves = moves & unsolved
        inverse_curvature = 1 / gl.where(moves, curvature, 1.0)
        along = r2 * inverse_or_zero(size)  # r.x
        step = gl.where(moves, along * inverse_curvature, 0.0)
        r = r_shared.load(VECTORS) - step[:, None] * image
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
        if LAST:
            lowest = gl.where(moves, gl.minimum(lowest, curvature), lowest)
            highest = gl.where(moves, gl.maximum(highest, curvature), highest)
            share = left_by_step(square, inverse_curvature, lowest, highest)
            share_left = gl.where(moves & many_keys, share, share_left)
            last_size = gl.where(moves & many_keys, inverse_curvature, last_size)
            told_left.store(share_left)
        excess = gl.where(unsolved & (r2 > goal), r2 / goal, 0.0)
        x_shared.store(x)
        told.store(excess)
        fence_async_shared()
        barrier()
        most = largest_of(told)
        if LAST:
            rest = largest_of(told_left) * (LAST_MARGIN * LAST_MARGIN)
            left = gl.where((rest < LAST_MOST * LAST_MOST) & tells, rest, 1.0)
        r_shared.store(r)
        if FAR:
            far = b_ptr + (vectors + nought)
            gl.store(far, gl.load(far, mask=there[:, None]) + step[:, None] * x_wide, mask=there[:, None])
        else:
            solution_shared.store(solution_shared.load(VECTORS) + step[:, None] * x_wide)
        sweeps += 1

    if SLOTS < TILES:
        arrived(0)  # one that no sweep took, before its place is used for anything else
    solution = gl.load(b_ptr + vectors, mask=there[:, None], other=0.0) if FAR else solution_shared.load(VECTORS)
    if LAST:
        solution += gl.where(left < 1, last_size, 0.0)[:, None] * r_shared.load(VECTORS)
        r2 *= gl.where(last_size > 0, left, 1.0)
    solution += (0.0 * r2)[:, None]  # NaN where the right-hand side was
    given_ridge = load_ridge(ridge_in, row, at, 1.0)
    out_of_units = gl.where(ridge < RIDGE_MOST, inverse_power(k_unit), RIDGE_MOST * (k_unit / given_ridge))
    numbers = at.q_row + row
    if ADJOINT:
        b_size = gl.load(adjoint.b_size + numbers, mask=there, other=0.0)
        y = solution * (b_size * out_of_units)[:, None]
        probe = gl.load(adjoint.probe + vectors, mask=there[:, None], other=0.0)
        gl.store(adjoint.z_y + numbers, gl.sum(probe * y, 1), mask=there)
        y = finite_or_zero(y)
        y_unit = power_of_two(gl.max(gl.abs(y), 1))
        gl.store(adjoint.y.ptr + vectors, (y * inverse_power(y_unit)[:, None]).to(gl.float16), mask=there[:, None])
        gl.store(adjoint.y.unit + numbers, y_unit, mask=there)
        lift = lift_of(adjoint.tops, at.k_head, q, D)
        gl.store(x_out + vectors, saturated(y * (-k_unit * lift), q).to(gl.float16), mask=there[:, None])
    else:
        gl.store(x_out + vectors, solution * out_of_units[:, None], mask=there[:, None])
        gl.store(ended_out.iterations + numbers, iterations, mask=there)
        residual = gl.where(r2 == 0, 0.0, gl.sqrt(r2 / b2))
        gl.store(ended_out.residual + numbers, residual, mask=there)
        gl.store(ended_out.converged + numbers, r2 <= threshold, mask=there)


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
    so many tiles of queries. What was at b_ptr is lost, of the forward solve a place to work in."""
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
        if (needed <= plan_of(PLANS, i).tiles) & (needed > (-1 if i == 0 else plan_of(PLANS, i - 1).tiles)):
            solve_tile(
                at, first, q_in, k_in, units, lse2_ptr, k_mean_ptr, ridge_in, b_ptr, x_out, adjoint, ended_out,
                window, n_heads, group, scale, tolerances, max_iters,
                ADJOINT, LAST, plan_of(PLANS, i), SHAPE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
