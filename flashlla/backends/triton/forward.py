"""The forward pass around the solve: softmax statistics before it, the output after it."""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    LN2,
    LOG2E,
    NUMBERS,
    TOP,
    WEIGHT,
    WEIGHT_BITS,
    dot,
    gather_tile,
    inverse_or_zero,
    inverse_power,
    key_range,
    keys_of,
    load_numbers,
    load_queries,
    load_rows,
    load_tile,
    load_vectors,
    outside,
    own_key,
    place,
    power_of_two,
    query_in_units,
    rounded,
    sees_some,
    shortening,
    store_numbers,
    store_queries,
    store_vectors,
    sweep_keys,
    units_of,
    visible,
    weights,
    zeros,
)


@triton.jit
def statistics_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of the running maximum m, and of the sums of w, w k and, for a first GUESS, c and c k, c = w u.(k -
    origin)."""
    m, total, acc, c_total, c_acc = state
    q, factor, short, u_origin, FLIP, GUESS = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    product = dot(q, tl.trans(k), zeros(q, tl.trans(k)), SHAPE.TF32)  # (M, N)
    s = product * factor
    if CUT:
        s = tl.where(seen, s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))  # (M,)
        base = tl.where(m_next == float("-inf"), 0.0, m_next)  # where no key has been seen yet
    else:  # the product of a sign that is known: one multiplication a query instead of one a pair
        m_next = tl.maximum(m, (tl.min(product, 1) if FLIP else tl.max(product, 1)) * factor)
        base = m_next
    w = tl.exp2(s - (base - WEIGHT_BITS)[:, None])  # (M, N)
    fade = tl.exp2(m - base)
    if GUESS:
        c = rounded(w * (product * short[:, None] - u_origin[:, None]), k, SHAPE.TF32)
        c_total = c_total * fade + tl.sum(c.to(tl.float32), 1)
        c_acc = dot(c, k, c_acc * fade[:, None], SHAPE.TF32)  # (M, D)
    # Totals of the rounded numbers: they make k_mean a mean of keys, and C u a covariance, wherever the origin is.
    w = rounded(w, k, SHAPE.TF32)
    total = total * fade + tl.sum(w.to(tl.float32), 1)
    acc = dot(w, k, acc * fade[:, None], SHAPE.TF32)  # (M, D)
    return m_next, total, acc, c_total, c_acc


@triton.jit
def flaws_seen(
    flaws, at, seqlens, window, n_heads, group, k_total, SHAPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Of each query 0, or NaN where it is not finite or sees a key or a value that is not: (M,). ``flaws`` are what
    `cast_kernel` has found."""
    found = tl.zeros([M], tl.float32)
    k_flaws = flaws.heads + n_heads + at.k_head
    q_flaw, k_flaw, v_flaw = tl.load(flaws.heads + at.q_head), tl.load(k_flaws), tl.load(k_flaws + n_heads // group)
    if q_flaw + k_flaw + v_flaw > 0:  # seldom
        found += load_rows(flaws.q + at.q_row, at.start, tl.where(q_flaw > 0, at.q_len, 0), M, 0.0)
        first, _, _, stop = key_range(at, window, SHAPE.CAUSAL, M, N)
        k_row = (at.k_head if seqlens.cu_k is None else at.kv_head).to(tl.int64) * k_total + at.k_first
        row = at.start + tl.arange(0, M)
        for j in tl.range(first, stop, N):
            flaw = load_rows(flaws.k + k_row, j, tl.where(k_flaw > 0, stop, 0), N, 0.0)  # (N,)
            flaw += load_rows(flaws.v + k_row, j, tl.where(v_flaw > 0, stop, 0), N, 0.0)
            seen = visible(row[:, None], (j + tl.arange(0, N))[None, :], at, window, SHAPE.CAUSAL)
            found += tl.sum(tl.where(seen, flaw[None, :], 0.0), 1)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def statistics_kernel(
    q_in, k_in, units, flaws, lse_out, lse2_out, omega_out, k_mean_out, image_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    FLIP: tl.constexpr, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse, omega and k_mean of section 2; lse2, which is lse in base 2, not rounded in between; and C u in units of the
    keys, u the query, shortened, for the first guess (4.3), if any is made.

    FLIP: the scale is negative, and the smallest product has the largest logit.
    """
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False)
    if outside(at, at.q_len, seqlens.cu_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    i = at.start
    k_base = keys_of(k_in, at)
    q = load_queries(q_in, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    factor = scale * LOG2E * q_unit * k_unit
    GUESS: tl.constexpr = image_out is not None
    short = shortening(q)  # (M,)
    u_origin = short
    if GUESS:
        # Keys far from the origin are near each other, but for some: u.k is measured from that of the query's own key.
        own_keys = gather_tile(k_base, k_in.stride_s, own_key(i, at, BLOCK_M), at.k_stop, SHAPE.HEAD_DIM, D)
        u_origin = tl.sum(q.to(tl.float32) * own_keys.to(tl.float32), 1) * short  # (M,)
    nothing, nowhere = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, D], tl.float32)
    m, total, acc, c_total, c_acc = sweep_keys(
        statistics_body, (nothing - float("inf"), nothing, nowhere, nothing, nowhere),
        (q, factor, short, u_origin, FLIP, GUESS), (k_base, k_in.stride_s), at, window, SHAPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    some = sees_some(i + tl.arange(0, BLOCK_M), at, window, SHAPE.CAUSAL)  # (M,) what sees nothing need not be finite
    found = flaws_seen(flaws, at, seqlens, window, n_heads, group, k_len, SHAPE, BLOCK_M, BLOCK_N)
    total += tl.where(some, found, 0.0)
    lse2 = m + (tl.log2(total) - WEIGHT_BITS)
    store_numbers(lse2_out, at, lse2)
    store_numbers(lse_out, at, lse2 * LN2)
    store_numbers(omega_out, at, total * (1 / WEIGHT))
    whole = tl.where(some, total, 1.0)  # the sums of a query that sees nothing are 0
    k_mean = tl.div_rn(acc, whole[:, None] + tl.zeros_like(acc))  # `/` may be off by 2 units in the last place
    store_vectors(k_mean_out, at, k_mean * k_unit, SHAPE.HEAD_DIM)
    if GUESS:
        image = (c_acc - k_mean * c_total[:, None]) / whole[:, None]
        store_vectors(image_out, at, image, SHAPE.HEAD_DIM)


@triton.jit
def output_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j p_ij (1 - a_ij) v_j, (2.3); where float32 makes use of them, of the sums of p_ij v_j, of p_ij
    (1 - a_ij) and of p_ij."""
    acc, plain, total, whole = state
    q, z, minus_size, rest, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, SHAPE.V_DIM, N, acc.shape[1], CUT)  # (N, V)
    w = weights(q, k, factor, shift, seen, SHAPE.TF32, CUT)  # (M, N)
    if v.dtype == tl.float32:
        alone = rounded(w, v, SHAPE.TF32)
        plain = dot(alone, v, plain, SHAPE.TF32)  # (M, V)
        whole += tl.sum(alone, 1)  # (M,)
    # 1 - a of (2.2) in one multiply-add
    w = w * (dot(z, tl.trans(k), zeros(z, tl.trans(k)), SHAPE.TF32) * minus_size[:, None] + rest[:, None])
    w = rounded(w, v, SHAPE.TF32)
    if v.dtype == tl.float32:
        total += tl.sum(w, 1)  # (M,)
    return dot(w, v, acc, SHAPE.TF32), plain, total, whole


@triton.jit(do_not_specialize=NUMBERS)
def output_kernel(
    q_in, k_in, v_in, units, origin_ptr, lse2_ptr, omega_ptr, k_mean_ptr, probe_ptr, guard_out, o_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale, delta_eps,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o by (2.2) and (2.3), and the guard that delta_eps makes of the probe."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False,
        IN_TURNS=True,
    )  # fmt: skip
    if outside(at, at.q_len, seqlens.cu_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    k_base = keys_of(k_in, at)
    v_base = keys_of(v_in, at)
    q = load_queries(q_in, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    k_mean = load_vectors(k_mean_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    probe = load_vectors(probe_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = k_mean * inverse_power(k_unit)
    probe = probe * k_unit
    d = k_mean - query_in_units(q, q_unit, k_unit, origin_ptr, at, SHAPE.HEAD_DIM)
    d_z = tl.sum(d * probe, 1)  # (M,) d.z, which is also z.A z
    z_size = tl.sqrt(tl.sum(probe * probe, 1))
    z = rounded(probe * inverse_or_zero(z_size)[:, None], q, SHAPE.TF32)  # (M, D) of unit length
    rest = 1 + z_size * tl.sum(z.to(tl.float32) * k_mean, 1)  # 1 + z.k_mean
    # p a^2 sums to z.C z <= d.z, so |p (1 - a)| <= 1 + sqrt(d.z): the largest weight scale that cannot overflow.
    bound = 1 + tl.sqrt(tl.maximum(d_z, 0.0))
    gain = tl.minimum(power_of_two((1 / bound) * TOP), WEIGHT)
    shift = load_numbers(lse2_ptr, at, BLOCK_M, 0.0) - tl.log2(gain)
    factor = scale * LOG2E * q_unit * k_unit
    nothing, nowhere = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, V], tl.float32)
    acc, plain, total, whole = sweep_keys(
        output_body, (nowhere, nowhere, nothing, nothing),
        (q, z, -z_size, rest, shift, factor), (k_base, k_in.stride_s, v_base, v_in.stride_s), at, window,
        SHAPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    share = inverse_power(gain)
    if q.dtype == tl.float32:
        # Weights sum to 1, and so do weights times 1 - a: what lse and, times a large z, k_mean are off by goes.
        share = 1 / tl.where(whole == 0, 1.0, whole)
        acc -= plain * (total * share - 1)[:, None]
    omega = load_numbers(omega_ptr, at, BLOCK_M, 1.0)
    least = tl.where(omega < 1, 1.0, omega)  # NaN stays, which tl.maximum would drop
    guard = 1 / (1 + delta_eps * (1 + d_z) / least)
    store_numbers(guard_out, at, guard)
    o = acc * (guard * v_unit * share)[:, None]
    store_queries(o_out, at, o, SHAPE.V_DIM)
