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
    load_rows,
    load_tile,
    outside,
    own_key,
    place,
    power_of_two,
    queries_of,
    query_in,
    rounded,
    rows_of,
    sees_some,
    shortening,
    store_rows,
    store_tile,
    sweep_keys,
    units_of,
    visible,
    weights,
    zeros,
)


@triton.jit
def statistics_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of the running maximum m, and of the sums of w, w k, c and c k, c = w u.(k - origin)."""
    m, total, acc, c_total, c_acc = state
    q, factor, short, u_origin, FLIP = rows
    k_base, k_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    product = dot(q, tl.trans(k), zeros(q, tl.trans(k)), PRECISION)  # (M, N)
    s = product * factor
    if CUT:
        s = tl.where(seen, s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))  # (M,)
        base = tl.where(m_next == float("-inf"), 0.0, m_next)  # where no key has been seen yet
    else:  # the product of a sign that is known: one multiplication a query instead of one a pair
        m_next = tl.maximum(m, (tl.min(product, 1) if FLIP else tl.max(product, 1)) * factor)
        base = m_next
    w = tl.exp2(s - (base - WEIGHT_BITS)[:, None])  # (M, N)
    c = w * (product * short[:, None] - u_origin[:, None])
    fade = tl.exp2(m - base)
    # Totals of the rounded numbers: they make k_mean a mean of keys, and C u a covariance, wherever the origin is.
    w = rounded(w, k, PRECISION)
    total = total * fade + tl.sum(w.to(tl.float32), 1)
    acc = dot(w, k, acc * fade[:, None], PRECISION)  # (M, D)
    c = rounded(c, k, PRECISION)
    c_total = c_total * fade + tl.sum(c.to(tl.float32), 1)
    c_acc = dot(c, k, c_acc * fade[:, None], PRECISION)  # (M, D)
    return m_next, total, acc, c_total, c_acc


@triton.jit
def flaws_seen(
    flaws, q_flaws, k_flaws, v_flaws, at, window, n_heads, group, k_total, cu_seqlens_k, CAUSAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of each query 0, or NaN where it is not finite or sees a key or a value that is not: (M,). The arguments are what
    `cast_kernel` has found."""
    found = tl.zeros([M], tl.float32)
    own = flaws + n_heads + at.k_head
    q_flaw, k_flaw, v_flaw = tl.load(flaws + at.q_head), tl.load(own), tl.load(own + n_heads // group)
    if q_flaw + k_flaw + v_flaw > 0:  # seldom
        found += load_rows(q_flaws + at.q_row, at.start, tl.where(q_flaw > 0, at.q_len, 0), M, 0.0)
        first, _, _, stop = key_range(at, window, CAUSAL, M, N)
        k_row = (at.k_head if cu_seqlens_k is None else at.kv_head).to(tl.int64) * k_total + at.k_first
        row = at.start + tl.arange(0, M)
        for j in tl.range(first, stop, N):
            flaw = load_rows(k_flaws + k_row, j, tl.where(k_flaw > 0, stop, 0), N, 0.0)  # (N,)
            flaw += load_rows(v_flaws + k_row, j, tl.where(v_flaw > 0, stop, 0), N, 0.0)
            seen = visible(row[:, None], (j + tl.arange(0, N))[None, :], at, window, CAUSAL)
            found += tl.sum(tl.where(seen, flaw[None, :], 0.0), 1)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def statistics_kernel(
    q_ptr, k_ptr, units, flaws, q_flaws, k_flaws, v_flaws, lse_out, lse2_out, omega_out, k_mean_out, image_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, window,
    n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    FLIP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """lse, omega and k_mean of section 2; lse2, which is lse in base 2, not rounded in between; and C u in units of the
    keys, u the query, shortened, for the first guess (4.3).

    FLIP: the scale is negative, and the smallest product has the largest logit.
    """
    at = place(
        n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
        cu_seqlens_q, cu_seqlens_k, seqlens_k, BLOCK_M, CAUSAL, False,
    )  # fmt: skip
    if outside(at, at.q_len, cu_seqlens_q):
        return
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    i = at.start
    q_base = queries_of(q_ptr, q_stride_b, q_stride_h, q_stride_s, at)
    k_base = keys_of(k_ptr, k_stride_b, k_stride_h, k_stride_s, at)
    q = load_tile(q_base, q_stride_s, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    factor = scale * LOG2E * q_unit * k_unit
    wide = q.to(tl.float32)
    short = shortening(q)  # (M,)
    # Keys far from the origin are near each other, but for some: u.k is measured from that of the query's own key.
    own = gather_tile(k_base, k_stride_s, own_key(i, at, BLOCK_M), at.k_stop, HEAD_DIM, BLOCK_D).to(tl.float32)
    u_origin = tl.sum(wide * own, 1) * short  # (M,)
    nothing, nowhere = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m, total, acc, c_total, c_acc = sweep_keys(
        statistics_body, (nothing - float("inf"), nothing, nowhere, nothing, nowhere),
        (q, factor, short, u_origin, FLIP), (k_base, k_stride_s), at, window,
        HEAD_DIM, V_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    total += flaws_seen(
        flaws, q_flaws, k_flaws, v_flaws, at, window, n_heads, group, k_len, cu_seqlens_k, CAUSAL, BLOCK_M, BLOCK_N
    )  # fmt: skip
    lse2 = m + (tl.log2(total) - WEIGHT_BITS)
    store_rows(rows_of(lse2_out, at, 1), i, at.q_len, lse2)
    store_rows(rows_of(lse_out, at, 1), i, at.q_len, lse2 * LN2)
    store_rows(rows_of(omega_out, at, 1), i, at.q_len, total * (1 / WEIGHT))
    some = sees_some(i + tl.arange(0, BLOCK_M), at, window, CAUSAL)  # (M,)
    whole = tl.where(some, total, 1.0)  # the sums of a query that sees nothing are 0
    k_mean = tl.div_rn(acc, whole[:, None] + tl.zeros_like(acc))  # `/` may be off by 2 units in the last place
    store_tile(rows_of(k_mean_out, at, HEAD_DIM), HEAD_DIM, i, at.q_len, k_mean * k_unit, HEAD_DIM)
    image = (c_acc - k_mean * c_total[:, None]) / whole[:, None]
    store_tile(rows_of(image_out, at, HEAD_DIM), HEAD_DIM, i, at.q_len, image, HEAD_DIM)


@triton.jit
def output_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j p_ij (1 - a_ij) v_j, (2.3); where float32 makes use of them, of the sums of p_ij v_j, of p_ij
    (1 - a_ij) and of p_ij."""
    acc, plain, total, whole = state
    q, z, minus_size, rest, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, V_DIM, N, acc.shape[1], CUT)  # (N, V)
    w = weights(q, k, factor, shift, seen, PRECISION, CUT)  # (M, N)
    if v.dtype == tl.float32:
        alone = rounded(w, v, PRECISION)
        plain = dot(alone, v, plain, PRECISION)  # (M, V)
        whole += tl.sum(alone, 1)  # (M,)
    # 1 - a of (2.2) in one multiply-add
    w = w * (dot(z, tl.trans(k), zeros(z, tl.trans(k)), PRECISION) * minus_size[:, None] + rest[:, None])
    w = rounded(w, v, PRECISION)
    if v.dtype == tl.float32:
        total += tl.sum(w, 1)  # (M,)
    return dot(w, v, acc, PRECISION), plain, total, whole


@triton.jit(do_not_specialize=NUMBERS)
def output_kernel(
    q_ptr, k_ptr, v_ptr, units, origin_ptr, lse2_ptr, omega_ptr, k_mean_ptr, probe_ptr, guard_out, o_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    o_stride_b, o_stride_h, o_stride_s,
    cu_seqlens_q, cu_seqlens_k, seqlens_k, window,
    n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale, delta_eps,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """o by (2.2) and (2.3), and the guard that delta_eps makes of the probe."""
    at = place(
        n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
        cu_seqlens_q, cu_seqlens_k, seqlens_k, BLOCK_M, CAUSAL, False,
    )  # fmt: skip
    if outside(at, at.q_len, cu_seqlens_q):
        return
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    i = at.start
    q_base = queries_of(q_ptr, q_stride_b, q_stride_h, q_stride_s, at)
    k_base = keys_of(k_ptr, k_stride_b, k_stride_h, k_stride_s, at)
    v_base = keys_of(v_ptr, v_stride_b, v_stride_h, v_stride_s, at)
    q = load_tile(q_base, q_stride_s, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    k_mean = load_tile(rows_of(k_mean_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    probe = load_tile(rows_of(probe_ptr, at, HEAD_DIM), HEAD_DIM, i, at.q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_mean = k_mean * inverse_power(k_unit)
    probe = probe * k_unit
    d = k_mean - query_in(q, q_unit, k_unit, origin_ptr, at, HEAD_DIM)
    d_z = tl.sum(d * probe, 1)  # (M,) d.z, which is also z.A z
    z_size = tl.sqrt(tl.sum(probe * probe, 1))
    z = rounded(probe * inverse_or_zero(z_size)[:, None], q, PRECISION)  # (M, D) of unit length
    rest = 1 + z_size * tl.sum(z.to(tl.float32) * k_mean, 1)  # 1 + z.k_mean
    # p a^2 sums to z.C z <= d.z, so |p (1 - a)| <= 1 + sqrt(d.z): the largest weight scale that cannot overflow.
    bound = 1 + tl.sqrt(tl.maximum(d_z, 0.0))
    gain = tl.minimum(power_of_two((1 / bound) * TOP), WEIGHT)
    shift = load_rows(rows_of(lse2_ptr, at, 1), i, at.q_len, BLOCK_M, 0.0) - tl.log2(gain)
    factor = scale * LOG2E * q_unit * k_unit
    nothing, nowhere = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc, plain, total, whole = sweep_keys(
        output_body, (nowhere, nowhere, nothing, nothing),
        (q, z, -z_size, rest, shift, factor), (k_base, k_stride_s, v_base, v_stride_s), at, window,
        HEAD_DIM, V_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    share = inverse_power(gain)
    if q.dtype == tl.float32:
        # Weights sum to 1, and so do weights times 1 - a: what lse and, times a large z, k_mean are off by goes.
        share = 1 / tl.where(whole == 0, 1.0, whole)
        acc -= plain * (total * share - 1)[:, None]
    omega = load_rows(rows_of(omega_ptr, at, 1), i, at.q_len, BLOCK_M, 1.0)
    least = tl.where(omega < 1, 1.0, omega)  # NaN stays, which tl.maximum would drop
    guard = 1 / (1 + delta_eps * (1 + d_z) / least)
    store_rows(rows_of(guard_out, at, 1), i, at.q_len, guard)
    o_base = queries_of(o_out, o_stride_b, o_stride_h, o_stride_s, at)
    o = acc * (guard * v_unit * share)[:, None]
    store_tile(o_base, o_stride_s, i, at.q_len, o, V_DIM)
