"""Softmax statistics and the output of 16-bit inputs in Gluon for Hopper: what forward.py's kernels do."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashlla.backends.triton.primitives import (
    LN2,
    LOG2E,
    NUMBERS,
    TOP,
    WEIGHT,
    WEIGHT_BITS,
    clamp,
    inverse_or_zero,
    inverse_power,
    key_range,
    keys_of,
    outside,
    place,
    power_of_two,
    sees_some,
    shortening,
    units_of,
    visible,
)
from flashlla.backends.triton.resident_parts import operand, packed
from flashlla.backends.triton.sweep_hopper import (
    add_sums,
    begin,
    fetch,
    load_queries,
    no_sums,
    ones_for,
    products,
    ring_of,
    store_queries,
    sweep,
    tiles_of,
)


@gluon.jit
def faded(x, fade):
    LAYOUT: gl.constexpr = x.type.layout
    return x * gl.convert_layout(fade, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def statistics_body(state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    m, w, totals, acc, c, c_totals, c_acc = state
    q, row, zero, factor, short, u_origin, ones = rows
    GUESS: gl.constexpr = OPTIONS[0]
    FLIP: gl.constexpr = OPTIONS[1]
    ONES: gl.constexpr = OPTIONS[2]
    SCORES: gl.constexpr = zero.type.layout
    VECTORS: gl.constexpr = acc.type.layout
    N: gl.constexpr = zero.shape[1]
    SUMS: gl.constexpr = not ONES
    BESIDE: gl.constexpr = (1 if SUMS else 2) * (2 if GUESS else 1)
    k, k_before = rings[0].index(slot), rings[0].index(before)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), k_before, acc, is_async=True)
    totals = add_sums(totals, w, ones, ONES)
    if GUESS:
        c_acc = warpgroup_mma(operand(c, VECTORS), k_before, c_acc, is_async=True)
        c_totals = add_sums(c_totals, c, ones, ONES)
    fetch(rings, coming, N)
    product = warpgroup_mma_wait(BESIDE, deps=(s,))
    s = product * factor
    if CUT:
        key = start + gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
        s = gl.where(visible(row[:, None], key[None, :], at, window, SHAPE.CAUSAL), s, float("-inf"))
        m_next = gl.maximum(m, gl.max(s, 1))  # (M,)
        base = gl.where(m_next == float("-inf"), 0.0, m_next)  # where no key has been seen yet
    else:
        m_next = gl.maximum(m, (gl.min(product, 1) if FLIP else gl.max(product, 1)) * factor)
        base = m_next
    e = gl.exp2(s - (base - WEIGHT_BITS)[:, None])  # (M, N)
    fade = gl.exp2(m - base)
    if GUESS:
        d = e * (product * short[:, None] - u_origin[:, None])
        if SUMS:
            acc, c_acc, e, d = warpgroup_mma_wait(0, deps=(acc, c_acc, e, d))
        else:
            acc, c_acc, totals, c_totals, e, d = warpgroup_mma_wait(0, deps=(acc, c_acc, totals, c_totals, e, d))
        c = packed(d)
        c_acc, c_totals = faded(c_acc, fade), faded(c_totals, fade)
    elif SUMS:
        acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    else:
        acc, totals, e = warpgroup_mma_wait(0, deps=(acc, totals, e))
    w = packed(e)
    return m_next, w, faded(totals, fade), faded(acc, fade), c, c_totals, c_acc


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


@gluon.jit(do_not_specialize=NUMBERS)
def statistics_hopper_kernel(
    q_in, k_in, units, flaws, lse_out, lse2_out, omega_out, k_mean_out, image_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    FLIP: gl.constexpr, SLOTS: gl.constexpr, ONES: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `forward.statistics_kernel` does."""
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False)
    if outside(at, at.q_len, seqlens.cu_q):
        return
    M: gl.constexpr = BLOCK_M
    N: gl.constexpr = BLOCK_N
    D: gl.constexpr = SHAPE.BLOCK_D
    SCORES: gl.constexpr = products(M, N)
    VECTORS: gl.constexpr = products(M, D)
    ROWS: gl.constexpr = gl.SliceLayout(1, VECTORS)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    rings = (ring_of(N, D, SLOTS),)
    ranges = tiles_of(key_range(at, window, SHAPE.CAUSAL, M, N), N)
    k_base = keys_of(k_in, at)
    sources = ((k_base, k_in.stride_s),), at.k_stop
    begin(rings, sources, ranges, N, SLOTS - 2)
    row = at.start + gl.arange(0, M, layout=ROWS)
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D)
    numbers = at.q_row + row
    q = load_queries(q_in, at, row, there, D, VECTORS)
    q_shared = gl.allocate_shared_memory(
        gl.float16, [M, D], gl.NVMMASharedLayout.get_default_for([M, D], gl.float16), q
    )
    factor = scale * LOG2E * q_unit * k_unit
    GUESS: gl.constexpr = image_out is not None
    short = shortening(q)  # (M,)
    u_origin = short
    if GUESS:
        own = clamp(row + at.diagonal, 0, at.k_stop - 1)
        own_keys = gl.load(
            k_base + own.to(gl.int64)[:, None] * k_in.stride_s + dim[None, :],
            mask=((own >= 0) & (own < at.k_stop))[:, None], other=0.0,
        )  # fmt: skip
        u_origin = gl.sum(q.to(gl.float32) * own_keys.to(gl.float32), 1) * short  # (M,)
    score_row = at.start + gl.arange(0, M, layout=SCORE_ROWS)
    zero = gl.zeros([M, N], gl.float32, SCORES)
    ones = ones_for(q_shared, N, ONES)
    w = packed(zero)
    nowhere = gl.zeros([M, D], gl.float32, VECTORS)
    rows = (
        q_shared, score_row, zero, factor, gl.convert_layout(short, SCORE_ROWS),
        gl.convert_layout(u_origin, SCORE_ROWS), ones,
    )  # fmt: skip
    m = gl.full([M], float("-inf"), gl.float32, SCORE_ROWS)
    state = m, w, no_sums(w, ONES), nowhere, w, no_sums(w, ONES), nowhere
    if ranges[4] > 0:
        state, last = sweep(
            statistics_body, state, rows, rings, sources, ranges, at, window, SHAPE, N, SLOTS - 2,
            (GUESS, FLIP, ONES),
        )  # fmt: skip
        m, w, totals, acc, c, c_totals, c_acc = state
        last = rings[0].index(last)
        acc = warpgroup_mma(operand(w, VECTORS), last, acc, is_async=True)
        totals = add_sums(totals, w, ones, ONES)
        if GUESS:
            c_acc = warpgroup_mma(operand(c, VECTORS), last, c_acc, is_async=True)
            c_totals = add_sums(c_totals, c, ones, ONES)
        if not ONES:
            acc, c_acc = warpgroup_mma_wait(0, deps=(acc, c_acc))
        else:
            acc, c_acc, totals, c_totals = warpgroup_mma_wait(0, deps=(acc, c_acc, totals, c_totals))
        state = m, w, totals, acc, c, c_totals, c_acc
    m, w, totals, acc, c, c_totals, c_acc = state
    m = gl.convert_layout(m, ROWS)
    total = gl.convert_layout(gl.sum(totals, 1), ROWS)
    some = sees_some(row, at, window, SHAPE.CAUSAL)  # (M,) what sees nothing need not be finite
    found = flaws_seen(flaws, at, score_row, seqlens, window, n_heads, group, k_len, SHAPE, M, N, SCORES)
    total += gl.where(some, gl.convert_layout(found, ROWS), 0.0)
    lse2 = m + (gl.log2(total) - WEIGHT_BITS)
    gl.store(lse2_out + numbers, lse2, mask=there)
    gl.store(lse_out + numbers, lse2 * LN2, mask=there)
    gl.store(omega_out + numbers, total * (1 / WEIGHT), mask=there)
    whole = gl.where(some, total, 1.0)  # the sums of a query that sees nothing are 0
    k_mean = gl.div_rn(acc, whole[:, None] + gl.zeros_like(acc))
    gl.store(k_mean_out + vectors, k_mean * k_unit, mask=there[:, None])
    if GUESS:
        c_total = gl.convert_layout(gl.sum(c_totals, 1), ROWS)
        image = (c_acc - k_mean * c_total[:, None]) / whole[:, None]
        gl.store(image_out + vectors, image, mask=there[:, None])


@gluon.jit
def output_body(state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    w, acc = state
    q, z, row, zero, factor, minus_size, rest, shift = rows
    SCORES: gl.constexpr = zero.type.layout
    VECTORS: gl.constexpr = acc.type.layout
    N: gl.constexpr = zero.shape[1]
    k = rings[0].index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    a = warpgroup_mma(z, k, zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(operand(w, VECTORS), rings[1].index(before), acc, is_async=True)
    fetch(rings, coming, N)
    s = warpgroup_mma_wait(2, deps=(s,)) * factor - shift[:, None]
    if CUT:
        key = start + gl.arange(0, N, layout=gl.SliceLayout(0, SCORES))
        s = gl.where(visible(row[:, None], key[None, :], at, window, SHAPE.CAUSAL), s, float("-inf"))
    e = gl.exp2(s)
    a, e = warpgroup_mma_wait(1, deps=(a, e))
    e = e * (a * minus_size[:, None] + rest[:, None])  # 1 - a of (2.2)
    acc, e = warpgroup_mma_wait(0, deps=(acc, e))
    return packed(e), acc


@gluon.jit(do_not_specialize=NUMBERS)
def output_hopper_kernel(
    q_in, k_in, v_in, units, origin_ptr, lse2_ptr, omega_ptr, k_mean_ptr, probe_ptr, guard_out, o_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale, delta_eps,
    SLOTS: gl.constexpr, ONES: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `forward.output_kernel` does, where keys and values are as wide as their tiles."""
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False)
    if outside(at, at.q_len, seqlens.cu_q):
        return
    M: gl.constexpr = BLOCK_M
    N: gl.constexpr = BLOCK_N
    D: gl.constexpr = SHAPE.BLOCK_D
    SCORES: gl.constexpr = products(M, N)
    VECTORS: gl.constexpr = products(M, D)
    ROWS: gl.constexpr = gl.SliceLayout(1, VECTORS)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    HALVES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], gl.float16)
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    rings = ring_of(N, D, SLOTS), ring_of(N, D, SLOTS)
    ranges = tiles_of(key_range(at, window, SHAPE.CAUSAL, M, N), N)
    sources = ((keys_of(k_in, at), k_in.stride_s), (keys_of(v_in, at), v_in.stride_s)), at.k_stop
    begin(rings, sources, ranges, N, SLOTS - 2)
    row = at.start + gl.arange(0, M, layout=ROWS)
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D)
    numbers = at.q_row + row
    q = load_queries(q_in, at, row, there, D, VECTORS)
    k_mean = gl.load(k_mean_ptr + vectors, mask=there[:, None], other=0.0) * inverse_power(k_unit)
    probe = gl.load(probe_ptr + vectors, mask=there[:, None], other=0.0) * k_unit
    d = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    d_z = gl.sum(d * probe, 1)  # (M,) d.z, which is also z.A z
    z_size = gl.sqrt(gl.sum(probe * probe, 1))
    z = (probe * inverse_or_zero(z_size)[:, None]).to(gl.float16)  # (M, D) of unit length
    rest = 1 + z_size * gl.sum(z.to(gl.float32) * k_mean, 1)  # 1 + z.k_mean
    # As of `forward.output_kernel`.
    bound = 1 + gl.sqrt(gl.maximum(d_z, 0.0))
    gain = gl.minimum(power_of_two((1 / bound) * TOP), WEIGHT)
    shift = gl.load(lse2_ptr + numbers, mask=there, other=0.0) - gl.log2(gain)
    q_shared = gl.allocate_shared_memory(gl.float16, [M, D], HALVES, q)
    z_shared = gl.allocate_shared_memory(gl.float16, [M, D], HALVES, z)
    score_row = at.start + gl.arange(0, M, layout=SCORE_ROWS)
    zero = gl.zeros([M, N], gl.float32, SCORES)
    rows = (
        q_shared, z_shared, score_row, zero, scale * LOG2E * q_unit * k_unit, gl.convert_layout(-z_size, SCORE_ROWS),
        gl.convert_layout(rest, SCORE_ROWS), gl.convert_layout(shift, SCORE_ROWS),
    )  # fmt: skip
    state = packed(zero), gl.zeros([M, D], gl.float32, VECTORS)
    if ranges[4] > 0:
        state, last = sweep(
            output_body, state, rows, rings, sources, ranges, at, window, SHAPE, N, SLOTS - 2
        )  # fmt: skip
        w, acc = state
        acc = warpgroup_mma(operand(w, VECTORS), rings[1].index(last), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        state = w, acc
    _, acc = state
    omega = gl.load(omega_ptr + numbers, mask=there, other=1.0)
    least = gl.where(omega < 1, 1.0, omega)  # NaN stays, which a maximum would drop
    guard = 1 / (1 + delta_eps * (1 + d_z) / least)
    gl.store(guard_out + numbers, guard, mask=there)
    store_queries(o_out, at, row, there, acc * (guard * v_unit * inverse_power(gain))[:, None])
