"""dq and dlambda of 16-bit inputs in Gluon for Hopper: what `backward.dq_kernel` does."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from flashlla.backends.triton.primitives import (
    LOG2E,
    NUMBERS,
    TOP,
    WEIGHT,
    handed_on,
    inverse_power,
    key_range,
    keys_of,
    lift_of,
    load_ridge,
    outside,
    place,
    power_of_two,
    room,
    sees_some,
    units_of,
)
from flashlla.backends.triton.sweep_hopper import (
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
    ring_of,
    store_queries,
    sweep,
    tiles_of,
)


@gluon.jit
def dq_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """As `backward.dq_body`."""
    acc, totals, dl = state
    q, z, do, y_neg, minus_size, rest, e_mean, push, shift, factor, row, zero = rows
    N: gl.constexpr = zero.shape[1]
    VECTORS: gl.constexpr = acc.type.layout
    k, v = rings[0].index(slot).permute((1, 0)), rings[1].index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    a = warpgroup_mma(z, k, zero, use_acc=False, is_async=True)
    e = warpgroup_mma(do, v, zero, use_acc=False, is_async=True)
    e = warpgroup_mma(y_neg, k, e, is_async=True)
    acc = warpgroup_mma(operand(dl, VECTORS), rings[0].index(before), acc, is_async=True)
    totals += part_sums(dl)
    fetch(rings, coming, N)
    s = warpgroup_mma_wait(4, deps=(s,)) * factor - shift[:, None]
    if CUT:
        s = masked(s, row, start, at, window, SHAPE)
    w = gl.exp2(s)
    a, w = warpgroup_mma_wait(3, deps=(a, w))
    a = a * minus_size[:, None] + rest[:, None]  # 1 - a of (2.2)
    e, a = warpgroup_mma_wait(1, deps=(e, a))
    w = w * (a * (e - e_mean[:, None]) + push[:, None])  # (3.2)
    acc, w = warpgroup_mma_wait(0, deps=(acc, w))
    return acc, totals, packed(w)


@gluon.jit(do_not_specialize=[*NUMBERS, "rows_len"])
def dq_hopper_kernel(
    q_in, k_in, v_in, do_in, y_neg_ptr, z_in, units, origin_ptr, z_y_ptr, lse2_ptr, k_mean_ptr, ridge_in, g_mean_ptr,
    y_in, dq_out, dridge_out, rows_out, rows_len, tops,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    SLOTS: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `backward.dq_kernel` does, where keys and values are as wide as their tiles."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False, lanes(),
        IN_TURNS=True,
    )  # fmt: skip
    if outside(at, at.q_len, seqlens.cu_q):
        return
    M: gl.constexpr = BLOCK_M
    N: gl.constexpr = BLOCK_N
    D: gl.constexpr = SHAPE.BLOCK_D
    LAYOUTS: gl.constexpr = layouts(M, N, D)
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    rings = ring_of(N, D, SLOTS), ring_of(N, D, SLOTS)
    ranges = tiles_of(key_range(at, window, SHAPE.CAUSAL, M, N), N)
    sources = (keys_of(k_in, at), keys_of(v_in, at)), at.k_stop
    begin(rings, sources, ranges, N, SLOTS - 2)
    row = at.start + gl.arange(0, M, layout=LAYOUTS.rows)
    there = row < at.q_len
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUTS.vectors))
    vectors = (at.q_row + row)[:, None] * D + dim[None, :]  # (M, D)
    numbers = at.q_row + row
    inside = there[:, None]
    q = load_queries(q_in, at, row, there, D, LAYOUTS.vectors)
    do = gl.load(do_in.ptr + vectors, mask=inside, other=0.0)
    y_neg = gl.load(y_neg_ptr + vectors, mask=inside, other=0.0)
    z = gl.load(z_in.ptr + vectors, mask=inside, other=0.0)
    k_mean = gl.load(k_mean_ptr + vectors, mask=inside, other=0.0) * inverse_power(k_unit)
    ridge = load_ridge(ridge_in, row, at, 1.0)  # (M,), as all that follow
    lse2 = gl.load(lse2_ptr + numbers, mask=there, other=0.0)
    g_mean = gl.load(g_mean_ptr + numbers, mask=there, other=0.0)
    do_unit = gl.load(do_in.unit + numbers, mask=there, other=1.0)
    z_size = gl.load(z_in.unit + numbers, mask=there, other=0.0) * k_unit
    z_y = gl.load(z_y_ptr + numbers, mask=there, other=0.0)
    z_wide, y_wide, do_wide = z.to(gl.float32), y_neg.to(gl.float32), do.to(gl.float32)
    a_mean = z_size * gl.sum(z_wide * k_mean, 1)
    e_mean = g_mean + gl.sum(y_wide * k_mean, 1)
    push = ridge * z_y
    # As of `backward.dq_kernel`.
    d = k_mean - q.to(gl.float32) * (q_unit * inverse_power(k_unit))
    spread = 1 + gl.sqrt(gl.maximum(z_size * gl.sum(d * z_wide, 1), 0.0))
    e_top = room(D) * gl.sqrt(gl.sum(do_wide * do_wide, 1))
    dl_top = spread * e_top + gl.abs(push)
    gain = gl.minimum(power_of_two((1 / (dl_top + 1e-30)) * TOP), WEIGHT * WEIGHT)
    q_shared = gl.allocate_shared_memory(gl.float16, [M, D], LAYOUTS.halves, q)
    zero = gl.zeros([M, N], gl.float32, LAYOUTS.scores)
    rows = (
        q_shared, gl.allocate_shared_memory(gl.float16, [M, D], LAYOUTS.halves, z),
        gl.allocate_shared_memory(gl.float16, [M, D], LAYOUTS.halves, do),
        gl.allocate_shared_memory(gl.float16, [M, D], LAYOUTS.halves, y_neg),
        gl.convert_layout(-z_size, LAYOUTS.score_rows), gl.convert_layout(1 + a_mean, LAYOUTS.score_rows),
        gl.convert_layout(e_mean, LAYOUTS.score_rows), gl.convert_layout(push, LAYOUTS.score_rows),
        gl.convert_layout(lse2 - gl.log2(gain), LAYOUTS.score_rows), scale * LOG2E * q_unit * k_unit,
        at.start + gl.arange(0, M, layout=LAYOUTS.score_rows), zero,
    )  # fmt: skip
    dl = packed(zero)
    state = gl.zeros([M, D], gl.float32, LAYOUTS.vectors), part_sums(dl), dl
    if ranges[4] > 0:
        state, last = sweep(
            dq_body, state, rows, rings, sources, ranges, at, window, SHAPE, N, SLOTS - 2
        )  # fmt: skip
        acc, totals, dl = state
        acc = warpgroup_mma(operand(dl, LAYOUTS.vectors), rings[0].index(last), acc, is_async=True)
        totals += part_sums(dl)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        state = acc, totals, dl
    acc, totals, _ = state
    total = gl.convert_layout(gl.sum(totals, 1), LAYOUTS.rows)
    # The sum of dl is zero but for rounding, which k_mean takes out of keys far from the origin.
    k_mean = gl.load(k_mean_ptr + vectors, mask=inside, other=0.0) * inverse_power(k_unit)
    y = gl.load(y_in.ptr + vectors, mask=inside, other=0.0).to(gl.float32)
    y *= gl.load(y_in.unit + numbers, mask=there, other=0.0)[:, None]
    dq = (acc - k_mean * total[:, None]) * (scale * k_unit * inverse_power(gain))[:, None] + y
    unit = do_unit * v_unit
    some = sees_some(row, at, window, SHAPE.CAUSAL)  # what sees nothing need not be finite
    store_queries(dq_out, at, row, there, gl.where(some[:, None], dq * unit[:, None], 0.0))
    gl.store(dridge_out + numbers, gl.where(some, unit * z_y, 0.0), mask=there)

    kappa = gl.abs(scale * q_unit * k_unit)
    lift = lift_of(tops, at.k_head, q, D)
    z_size, a_mean, push = z_size * lift, a_mean * lift, push * lift
    top = do_unit * gl.maximum(gl.maximum(dl_top * kappa * lift, e_top * z_size), spread)
    top = gl.where(top < float("inf"), top, 0.0)  # a row of NaN must not decide for the others
    # Any NaN of this query must reach the weights of dk's products, where keys see it; and no others.
    shift = lse2 - gl.log2(do_unit) + 0.0 * (a_mean + e_mean + push + z_size)
    shift = gl.where(some, shift, float("inf"))
    base = handed_on(rows_out.ptr, at, at.q_head, heads, rows_len, seqlens.cu_q) + row
    room_for = row < rows_len
    gl.store(base, shift, mask=room_for)
    gl.store(base + rows_out.stride, finite_or_zero(z_size), mask=room_for)
    gl.store(base + 2 * rows_out.stride, finite_or_zero(1 + a_mean), mask=room_for)
    gl.store(base + 3 * rows_out.stride, finite_or_zero(e_mean), mask=room_for)
    gl.store(base + 4 * rows_out.stride, finite_or_zero(push * (scale * q_unit * k_unit)), mask=room_for)
    # The largest of several numbers is the same in any order.
    gl.atomic_max(tops + n_heads // group + at.k_head, gl.max(gl.where(some, top, 0.0), 0))
