"""The forward pass of 16-bit inputs in Gluon for Hopper, in one kernel: what those of forward.py and solve.py do.

A tile of queries goes over its keys for the softmax statistics, then for each iteration, then for the output. What one
sweep leaves to the next stays on the chip.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

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
    outside,
    place,
    power_of_two,
    sees_some,
    units_of,
    visible,
)
from flashlla.backends.triton.solve_hopper import (
    add_sums,
    no_sums,
    ones_for,
    operand_of,
    out_of_units_of,
    ridges,
    room_for,
    solved,
    store_ended,
)
from flashlla.backends.triton.sweep_hopper import (
    barrier,
    begin,
    fetch,
    lanes,
    layouts,
    load_queries,
    masked,
    operand,
    packed,
    ring_of,
    store_queries,
    sweep_from,
    sweep_part,
    sweep_storing,
    tiles_of,
    weighed,
)


@gluon.jit
def faded(x, fade):
    LAYOUT: gl.constexpr = x.type.layout
    return x * gl.convert_layout(fade, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def statistics_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """As `forward.statistics_body`, without a first guess. Weights are stored in ``kept``, what they are relative to in
    ``bases``; see `sweep_storing`."""
    m, w, totals, acc = state
    q, row, zero, factor, ones, kept, bases = rows
    FLIP: gl.constexpr = OPTIONS[0][0]
    ONES: gl.constexpr = OPTIONS[0][1]
    STORED: gl.constexpr = OPTIONS[1]
    VECTORS: gl.constexpr = acc.type.layout
    N: gl.constexpr = zero.shape[1]
    s = warpgroup_mma(q, rings[0].index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[0].index(before), acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    fetch(rings, coming, N)
    product = warpgroup_mma_wait(2 if ONES else 1, deps=(s,))
    s = product * factor
    if CUT:
        s = masked(s, row, start, at, window, SHAPE)
        m_next = gl.maximum(m, gl.max(s, 1))  # (M,)
        base = gl.where(m_next == float("-inf"), 0.0, m_next)  # where no key has been seen yet
    else:
        m_next = gl.maximum(m, (gl.min(product, 1) if FLIP else gl.max(product, 1)) * factor)
        base = m_next
    e = gl.exp2(s - (base - WEIGHT_BITS)[:, None])  # (M, N)
    fade = gl.exp2(m - base)
    if ONES:
        acc, totals, e = warpgroup_mma_wait(0, deps=(acc, totals, e))
    else:
        acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    e = packed(e)
    step = coming[1] - (rings[0].shape[0] - 2)
    if STORED == "all":
        kept.index(step).store(e)
        bases.index(step).store(base)
    elif STORED == "some":
        there = step < kept.shape[0]
        if there:
            kept.index(step).store(e)
            bases.index(step).store(base)
    return m_next, e, faded(totals, fade), faded(acc, fade)


@gluon.jit
def flaws_seen(
    flaws, at, row, seqlens, window, n_heads, group, k_total, SHAPE: gl.constexpr, M: gl.constexpr, N: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """`forward.flaws_seen`, for ``row`` in the layout of SCORES."""
    found = gl.zeros([M], gl.float32, gl.SliceLayout(1, SCORES))
    k_flaws = flaws.heads + n_heads + at.k_head
    q_flaw, k_flaw, v_flaw = gl.load(flaws.heads + at.q_head), gl.load(k_flaws), gl.load(k_flaws + n_heads // group)
    if q_flaw + k_flaw + v_flaw > 0:  # seldom
        found += gl.load(flaws.q + at.q_row + row, mask=row < gl.where(q_flaw > 0, at.q_len, 0), other=0.0)
        first, _, _, stop = key_range(at, window, SHAPE.CAUSAL, M, N)
        k_row = (at.k_head if seqlens.cu_k is None else at.kv_head).to(gl.int64) * k_total + at.k_first
        for j in range(first, stop, N):
            key = j + gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
            flaw = gl.load(flaws.k + k_row + key, mask=key < gl.where(k_flaw > 0, stop, 0), other=0.0)
            flaw += gl.load(flaws.v + k_row + key, mask=key < gl.where(v_flaw > 0, stop, 0), other=0.0)
            seen = visible(row[:, None], key[None, :], at, window, SHAPE.CAUSAL)
            found += gl.sum(gl.where(seen, flaw[None, :], 0.0), 1)
    return found


@gluon.jit
def output_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """As `forward.output_body`."""
    acc, w = state
    q, z, minus_size, rest, shift, factor, row, zero = rows
    N: gl.constexpr = zero.shape[1]
    VECTORS: gl.constexpr = acc.type.layout
    k = rings[0].index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    a = warpgroup_mma(z, k, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[1].index(before), acc, is_async=True)
    fetch(rings, coming, N)
    s = warpgroup_mma_wait(2, deps=(s,)) * factor - shift[:, None]
    if CUT:
        s = masked(s, row, start, at, window, SHAPE)
    e = gl.exp2(s)
    a, e = warpgroup_mma_wait(1, deps=(a, e))
    e = e * (a * minus_size[:, None] + rest[:, None])  # 1 - a of (2.2)
    acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return acc, packed(e)


@gluon.jit
def output_kept_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """The same of a tile whose weights are kept."""
    acc, w = state
    z, minus_size, rest, zero, kept = rows
    VECTORS: gl.constexpr = acc.type.layout
    a = warpgroup_mma(z, rings[0].index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[1].index(before), acc, is_async=True)
    fetch(rings, coming, zero.shape[1])
    e = kept.index(coming[1] - (rings[0].shape[0] - 2)).load(w.type.layout)
    a, e = warpgroup_mma_wait(1, deps=(a, e))
    e = weighed(e, a * minus_size[:, None] + rest[:, None])
    acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return acc, e


@gluon.jit(do_not_specialize=[*NUMBERS, "max_iters"])
def forward_hopper_kernel(
    q_in, k_in, v_in, units, flaws, ridge_in, lse_out, omega_out, k_mean_out, probe_out, guard_out, o_out, ended_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale, delta_eps,
    tolerances, max_iters,
    FLIP: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr, ONES: gl.constexpr, SHAPE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `forward.statistics_kernel` without a first guess, `solve.solve_kernel` without a preconditioner and
    `forward.output_kernel` do, where keys and values are as wide as their tiles."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False, lanes()
    )  # fmt: skip
    if outside(at, at.q_len, seqlens.cu_q):
        return
    M: gl.constexpr = BLOCK_M
    N: gl.constexpr = BLOCK_N
    D: gl.constexpr = SHAPE.BLOCK_D
    LAYOUTS: gl.constexpr = layouts(M, N, D)
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    k_ring = ring_of(N, D, SLOTS)
    rings = (k_ring,)
    ranges = tiles_of(key_range(at, window, SHAPE.CAUSAL, M, N), N)
    keys = keys_of(k_in, at)
    sources = (keys,), at.k_stop
    begin(rings, sources, ranges, N, SLOTS - 2)
    row = at.start + gl.arange(0, M, layout=LAYOUTS.rows)
    score_row = at.start + gl.arange(0, M, layout=LAYOUTS.score_rows)
    there = row < at.q_len
    inside = there[:, None]
    numbers = at.q_row + row
    vectors = numbers[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUTS.vectors))[None, :]  # (M, D)
    some = sees_some(row, at, window, SHAPE.CAUSAL)  # (M,) what sees nothing need not be finite
    factor = scale * LOG2E * q_unit * k_unit
    q = load_queries(q_in, at, row, there, D, LAYOUTS.vectors)
    q_operand = operand_of(q, LAYOUTS.scores)
    zero = gl.zeros([M, N], gl.float32, LAYOUTS.scores)
    nothing = packed(zero)
    ones = ones_for(q_operand, N, ONES)
    # A tile's weights are kept from the statistics to the output.
    kept = room_for(KEPT, k_ring, M, N)
    bases = kept  # where none are; else what they are relative to until the solve
    if KEPT > 0:
        bases = gl.allocate_shared_memory(gl.float32, [KEPT, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    state = (
        gl.full([M], float("-inf"), gl.float32, LAYOUTS.score_rows), nothing, no_sums(nothing, ONES),
        gl.zeros([M, D], gl.float32, LAYOUTS.vectors),
    )  # fmt: skip
    fence_async_shared()  # q
    nought = ranges[4] * 0
    so_far = state, nought, nought
    rows = q_operand, score_row, zero, factor, ones, kept, bases
    state, last = sweep_storing(
        statistics_body, so_far, rows, nought, ranges[3], rings, sources, ranges, at, window, KEPT, SHAPE, N, SLOTS - 2,
        (FLIP, ONES),
    )  # fmt: skip
    m, w, totals, acc = state
    acc = warpgroup_mma(operand(w, LAYOUTS.vectors), k_ring.index(last), acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    if ONES:
        acc, totals = warpgroup_mma_wait(0, deps=(acc, totals))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()  # all are done with the ring: the next sweep's first tiles may come
    begin(rings, sources, ranges, N, SLOTS - 2)
    acc = gl.where(some[:, None], acc, 0.0)  # of no keys no tile came
    total = gl.convert_layout(gl.sum(totals, 1), LAYOUTS.rows)
    found = flaws_seen(flaws, at, score_row, seqlens, window, n_heads, group, k_len, SHAPE, M, N, LAYOUTS.scores)
    total += gl.where(some, gl.convert_layout(found, LAYOUTS.rows), 0.0)
    lse2 = gl.convert_layout(m, LAYOUTS.rows) + (gl.log2(total) - WEIGHT_BITS)
    gl.store(lse_out + numbers, lse2 * LN2, mask=there)
    gl.store(omega_out + numbers, total * (1 / WEIGHT), mask=there)
    whole = gl.where(some, total, 1.0)  # the sums of a query that sees nothing are 0
    k_mean = gl.div_rn(acc, whole[:, None] + gl.zeros_like(acc)) * k_unit
    gl.store(k_mean_out + vectors, k_mean, mask=inside)
    k_mean *= inverse_power(k_unit)
    shift = gl.convert_layout(lse2, LAYOUTS.score_rows) - WEIGHT_BITS

    given_ridge, ridge = ridges(ridge_in, row, at, some, k_unit)
    q_wide = q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    r = gl.where(some[:, None], k_mean - q_wide, 0.0) + (0.0 * given_ridge)[:, None]
    atol, rtol, coarse = tolerances
    atol = atol * inverse_power(k_unit) * inverse_power(k_unit)
    solution, b2, r2, threshold, iterations, sweeps = solved(
        q_operand, r, None, k_mean, ridge, shift, factor, (atol, rtol, coarse), max_iters, rings, sources, ranges, row,
        at, window, kept, bases, False, SHAPE, SLOTS, KEPT, ONES, N,
    )  # fmt: skip
    # Asked for before anything is waited for.
    out_of_units = out_of_units_of(ridge, ridge_in, row, at, k_unit)
    omega = gl.load(omega_out + numbers, mask=there, other=1.0)
    k_mean = gl.load(k_mean_out + vectors, mask=inside, other=0.0) * inverse_power(k_unit)
    q = load_queries(q_in, at, row, there, D, LAYOUTS.vectors)
    store_ended(ended_out, numbers, there, b2, r2, threshold, iterations)
    barrier()  # the values' tiles may come where the solve had its own
    v_ring = ring_of(N, D, SLOTS)
    values = keys_of(v_in, at)
    begin((v_ring,), ((values,), at.k_stop), ranges, N, SLOTS - 2)
    probe = solution * out_of_units[:, None]
    gl.store(probe_out + vectors, probe, mask=inside)
    probe *= k_unit
    d = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    d_z = gl.sum(d * probe, 1)  # (M,) d.z, which is also z.A z
    z_size = gl.sqrt(gl.sum(probe * probe, 1))
    z = (probe * inverse_or_zero(z_size)[:, None]).to(gl.float16)  # (M, D) of unit length
    rest = 1 + z_size * gl.sum(z.to(gl.float32) * k_mean, 1)  # 1 + z.k_mean
    # As of `forward.output_kernel`.
    bound = 1 + gl.sqrt(gl.maximum(d_z, 0.0))
    gain = gl.minimum(power_of_two((1 / bound) * TOP), WEIGHT)
    z = gl.convert_layout(z, LAYOUTS.operand)
    minus_size = gl.convert_layout(-z_size, LAYOUTS.score_rows)
    rest = gl.convert_layout(rest, LAYOUTS.score_rows)
    score_gain = gl.convert_layout(gain, LAYOUTS.score_rows)
    output = gl.zeros([M, D], gl.float32, LAYOUTS.vectors), nothing
    output_so_far = output, nought, nought
    both_rings = k_ring, v_ring
    both_sources = (keys, values), at.k_stop
    output_rows = (
        q_operand, z, minus_size, rest, shift + (WEIGHT_BITS - gl.log2(score_gain)), factor, score_row, zero,
    )  # fmt: skip
    held = nought
    if KEPT > 0:
        held = gl.where(sweeps > 0, gl.minimum(ranges[4], KEPT), 0)  # else they are relative to their bases still
        share = score_gain * (1 / WEIGHT)
        output_so_far = sweep_part(
            output_kept_body, output_so_far, (z, minus_size * share, rest * share, zero, kept), nought, held,
            both_rings, both_sources, ranges, at, window, False, SHAPE, N, SLOTS - 2, None,
        )  # fmt: skip
    output, last = sweep_from(
        output_body, output_so_far, output_rows, held, gl.maximum(ranges[3], held), both_rings, both_sources, ranges,
        at, window, SHAPE, N, SLOTS - 2, None,
    )  # fmt: skip
    acc, w = output
    acc = warpgroup_mma(operand(w, LAYOUTS.vectors), v_ring.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    acc = gl.where(some[:, None], acc, 0.0)
    least = gl.where(omega < 1, 1.0, omega)  # NaN stays, which a maximum would drop
    guard = 1 / (1 + delta_eps * (1 + d_z) / least)
    gl.store(guard_out + numbers, guard, mask=there)
    store_queries(o_out, at, row, there, acc * (guard * v_unit * inverse_power(gain))[:, None])
