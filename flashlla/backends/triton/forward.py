"""The forward pass around the solve: softmax statistics before it, the output after it."""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    LN2,
    LOG2E,
    TOP,
    WEIGHT,
    WEIGHT_BITS,
    finite_or_zero,
    head_of,
    inverse_or_zero,
    inverse_power,
    load_keys,
    load_rows,
    load_tile,
    power_of_two,
    rounded,
    rows_of,
    store_rows,
    store_tile,
    sweep_keys,
    tile_and_head,
    times,
    units_of,
    weights,
    with_nan,
    zeros,
)


@triton.jit
def statistics_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of the running maximum m, total and weighted sum of keys."""
    m, total, weighed, acc = state
    q, factor = rows
    k_base, k_stride = keys
    k, k_weighed = load_keys(k_base, k_stride, j, k_len, q, HEAD_DIM, N, CUT)  # (N, D)
    s = times(q, tl.trans(k), zeros(q, tl.trans(k)), PRECISION) * factor  # (M, N)
    if CUT:
        s = tl.where(seen, s, float("-inf"))
    m_next = tl.maximum(m, tl.max(s, 1))  # (M,)
    w = tl.exp2(s - (m_next - WEIGHT_BITS)[:, None])  # (M, N)
    fade = tl.exp2(m - m_next)
    # omega is the total of the weights; k_mean divides by that of the rounded weights, which makes it a mean of keys
    # exactly, wherever their origin is.
    total = total * fade + tl.sum(w, 1)
    w = rounded(w, k, PRECISION)
    weighed = weighed * fade + tl.sum(w.to(tl.float32), 1)
    acc = times(w, k_weighed, acc * fade[:, None], PRECISION)  # (M, D)
    return m_next, total, weighed, acc


@triton.jit(do_not_specialize=["n_heads", "heads", "q_len", "k_len"])
def statistics_kernel(
    q_ptr, k_ptr, units, lse_out, omega_out, k_mean_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    n_heads, heads, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse, omega and k_mean of section 2."""
    i, head = tile_and_head(n_heads, q_len, BLOCK_M, CAUSAL)
    q_unit, k_unit, _ = units_of(units, head, n_heads)
    q_base = head_of(q_ptr, q_stride_b, q_stride_h, head, heads)
    k_base = head_of(k_ptr, k_stride_b, k_stride_h, head, heads)
    q = load_tile(q_base, q_stride_s, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    factor = scale * LOG2E * q_unit * k_unit
    nothing = tl.zeros([BLOCK_M], tl.float32)
    state = (nothing - float("inf"), nothing, nothing, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
    m, total, weighed, acc = sweep_keys(
        statistics_body, state, (q, factor), (k_base, k_stride_s), i, q_len, k_len,
        HEAD_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    store_rows(rows_of(lse_out, head, q_len, 1), i, q_len, (m + (tl.log2(total) - WEIGHT_BITS)) * LN2)
    store_rows(rows_of(omega_out, head, q_len, 1), i, q_len, total * (1 / WEIGHT))
    k_mean = with_nan(acc / weighed[:, None]) * k_unit
    store_tile(rows_of(k_mean_out, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, k_mean, HEAD_DIM)


@triton.jit
def output_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j p_ij (1 - a_ij) v_j, (2.3)."""
    q, z, z_size, a_mean, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k, _ = load_keys(k_base, k_stride, j, k_len, q, HEAD_DIM, N, CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = weights(q, k, factor, shift, seen, PRECISION, CUT)  # (M, N)
    a = times(z, tl.trans(k), zeros(z, tl.trans(k)), PRECISION) * z_size[:, None] - a_mean[:, None]  # (2.2)
    w = w * (1 - a)
    if CUT:
        # A value that is not finite reaches the queries that see it through their weights, as in load_keys.
        flaw = tl.sum((v - v).to(tl.float32), 1)  # (N,) 0 or NaN
        w = tl.where(seen, w + flaw[None, :], 0.0)
        v = finite_or_zero(v)
    return times(rounded(w, v, PRECISION), v, state, PRECISION)  # (M, D)


@triton.jit(do_not_specialize=["n_heads", "heads", "q_len", "k_len"])
def output_kernel(
    q_ptr, k_ptr, v_ptr, units, lse_ptr, omega_ptr, k_mean_ptr, probe_ptr, guard_out, o_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    o_stride_b, o_stride_h, o_stride_s, n_heads, heads, q_len, k_len, scale, delta_eps,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o by (2.2) and (2.3), and the guard that delta_eps makes of the probe."""
    i, head = tile_and_head(n_heads, q_len, BLOCK_M, CAUSAL)
    q_unit, k_unit, v_unit = units_of(units, head, n_heads)
    q_base = head_of(q_ptr, q_stride_b, q_stride_h, head, heads)
    k_base = head_of(k_ptr, k_stride_b, k_stride_h, head, heads)
    v_base = head_of(v_ptr, v_stride_b, v_stride_h, head, heads)
    q = load_tile(q_base, q_stride_s, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    k_mean = load_tile(rows_of(k_mean_ptr, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    probe = load_tile(rows_of(probe_ptr, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_mean = k_mean * inverse_power(k_unit)
    probe = probe * k_unit
    d = k_mean - q.to(tl.float32) * (q_unit * inverse_power(k_unit))
    d_z = tl.sum(d * probe, 1)  # (M,) d.z, which is also z.A z
    z_size = tl.sqrt(tl.sum(probe * probe, 1))
    z = rounded(probe * inverse_or_zero(z_size)[:, None], q, PRECISION)  # (M, D) of unit length
    a_mean = z_size * tl.sum(z.to(tl.float32) * k_mean, 1)
    # p a^2 sums to z.C z <= d.z, so |p (1 - a)| <= 1 + sqrt(d.z): the largest weight scale that cannot overflow.
    bound = 1 + tl.sqrt(tl.maximum(d_z, 0.0))
    gain = tl.minimum(power_of_two((1 / bound) * TOP), WEIGHT)
    shift = load_rows(rows_of(lse_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0) * LOG2E - tl.log2(gain)
    factor = scale * LOG2E * q_unit * k_unit
    acc = sweep_keys(
        output_body, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), (q, z, z_size, a_mean, shift, factor),
        (k_base, k_stride_s, v_base, v_stride_s), i, q_len, k_len, HEAD_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    omega = load_rows(rows_of(omega_ptr, head, q_len, 1), i, q_len, BLOCK_M, 1.0)
    guard = 1 / (1 + delta_eps * (1 + d_z) / omega)
    store_rows(rows_of(guard_out, head, q_len, 1), i, q_len, guard)
    o_base = head_of(o_out, o_stride_b, o_stride_h, head, heads)
    acc = with_nan(acc)
    acc += (0.0 * tl.sum(acc, 1))[:, None]  # a query that sees one number that is not has none in its output
    o = acc * (guard * v_unit * inverse_power(gain))[:, None]
    store_tile(o_base, o_stride_s, i, q_len, o, HEAD_DIM)
