"""The backward pass around the solve: the right-hand side of (3.1) before it, the gradients after it.

The adjoint probe comes as -y: then e = g - g_mean - b is the sum of two products in one accumulator, and the products
with y in (3.4) are sums too. All of a query is in units of its row of grad_o (prepare.py) times v_unit.
"""

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
    query_in,
    ridge_in,
    rounded,
    rows_of,
    store_rows,
    store_tile,
    sweep_keys,
    sweep_queries,
    tile_and_head,
    times,
    units_of,
    weights,
    zeros,
)


@triton.jit
def moments_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij g_ij k_j, of sum_j w_ij g_ij as rounded for it and unrounded, and of sum_j w_ij; g_ij from
    g_near."""
    acc, weighed, total, whole = state
    q, do, g_near, NEAR, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k, k_weighed = load_keys(k_base, k_stride, j, k_len, q, HEAD_DIM, N, CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = weights(q, k, factor, shift, seen, PRECISION, CUT)  # (M, N)
    whole += tl.sum(w, 1)
    g = times(do, tl.trans(v), zeros(do, tl.trans(v)), PRECISION)
    if NEAR:
        g -= g_near[:, None]
    w = w * g
    if CUT:
        w = tl.where(seen, w, 0.0)
    total += tl.sum(w, 1)
    w = rounded(w, k, PRECISION)
    return times(w, k_weighed, acc, PRECISION), weighed + tl.sum(w.to(tl.float32), 1), total, whole


@triton.jit(do_not_specialize=["n_heads", "heads", "q_len", "k_len"])
def moments_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, units, lse_ptr, k_mean_ptr, g_near_ptr, lse_out, t_out, t_size_out, g_mean_out,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    n_heads, heads, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g_mean, t of (3.1) as a direction of unit length and its length, and lse without the rounding it came with.

    g_near (B H, S): where g_mean is about, so that t is no small difference of large sums; None for 0.
    """
    i, head = tile_and_head(n_heads, q_len, BLOCK_M, CAUSAL)
    q_unit, k_unit, _ = units_of(units, head, n_heads)
    q_base = head_of(q_ptr, q_stride_b, q_stride_h, head, heads)
    k_base = head_of(k_ptr, k_stride_b, k_stride_h, head, heads)
    v_base = head_of(v_ptr, v_stride_b, v_stride_h, head, heads)
    q = load_tile(q_base, q_stride_s, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    do = load_tile(rows_of(do_ptr, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    shift = load_rows(rows_of(lse_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0) * LOG2E - WEIGHT_BITS
    factor = scale * LOG2E * q_unit * k_unit
    nothing = tl.zeros([BLOCK_M], tl.float32)
    NEAR: tl.constexpr = g_near_ptr is not None
    g_near = nothing
    if NEAR:
        g_near = load_rows(rows_of(g_near_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0)
    acc, weighed, total, whole = sweep_keys(
        moments_body,
        (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), nothing, nothing, nothing),
        (q, do, g_near, NEAR, shift, factor), (k_base, k_stride_s, v_base, v_stride_s), i, q_len, k_len,
        HEAD_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    k_mean = load_tile(rows_of(k_mean_ptr, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_mean = k_mean * inverse_power(k_unit)
    # By the weights' own sum: g - g_mean is then exactly zero for a lone key, and lse that of these very weights.
    own = inverse_or_zero(whole)
    t = (acc - k_mean * weighed[:, None]) * own[:, None]
    t_size = tl.sqrt(tl.sum(t * t, 1))
    # What is no longer than the rounding of its two halves is rounding: the first query's t is zero.
    halves = tl.abs(weighed) * own * tl.sqrt(tl.sum(k_mean * k_mean, 1))
    t_size = tl.where(t_size < 1e-6 * halves, 0.0, t_size)
    t = t * inverse_or_zero(t_size)[:, None]
    store_tile(rows_of(t_out, head, q_len, HEAD_DIM), HEAD_DIM, i, q_len, t, HEAD_DIM)
    store_rows(rows_of(t_size_out, head, q_len, 1), i, q_len, t_size)
    store_rows(rows_of(g_mean_out, head, q_len, 1), i, q_len, total * own + g_near)
    lse = load_rows(rows_of(lse_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0)
    store_rows(rows_of(lse_out, head, q_len, 1), i, q_len, lse + (tl.log2(whole) - WEIGHT_BITS) * LN2)


@triton.jit
def dq_body(
    state, rows, keys, j, k_len, seen,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j dl_ij k_j and of sum_j dl_ij."""
    acc, total = state
    q, z, do, y_neg, minus_size, rest, e_mean, push, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k, k_weighed = load_keys(k_base, k_stride, j, k_len, q, HEAD_DIM, N, CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    w = weights(q, k, factor, shift, seen, PRECISION, CUT)  # (M, N)
    # 1 - a of (2.2)
    not_a = times(z, tl.trans(k), zeros(z, tl.trans(k)), PRECISION) * minus_size[:, None] + rest[:, None]
    e = times(do, tl.trans(v), zeros(do, tl.trans(v)), PRECISION)
    e = times(y_neg, tl.trans(k), e, PRECISION) - e_mean[:, None]  # (3.2)
    dl = w * (not_a * e + push[:, None])
    if CUT:
        dl = tl.where(seen, dl, 0.0)
    dl = rounded(dl, k, PRECISION)
    return times(dl, k_weighed, acc, PRECISION), total + tl.sum(dl.to(tl.float32), 1)


@triton.jit(do_not_specialize=["n_heads", "heads", "q_len", "k_len", "rows_len"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, y_neg_ptr, z_ptr, units, origin_ptr, do_unit_ptr, z_size_ptr, z_y_ptr, lse_ptr,
    k_mean_ptr, ridge_ptr, g_mean_ptr, dq_out, dridge_out, rows_out, rows_len,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    ridge_stride_b, ridge_stride_h, ridge_stride_s, dq_stride_b, dq_stride_h, dq_stride_s,
    n_heads, heads, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq by (3.3) and dlambda by (3.6); and what dk and dv need of each query, rows_out (6, B H, rows_len): whole
    tiles, queries beyond the last with a weight of 0."""
    i, head = tile_and_head(n_heads, q_len, BLOCK_M, CAUSAL)
    q_unit, k_unit, v_unit = units_of(units, head, n_heads)
    q_base = head_of(q_ptr, q_stride_b, q_stride_h, head, heads)
    k_base = head_of(k_ptr, k_stride_b, k_stride_h, head, heads)
    v_base = head_of(v_ptr, v_stride_b, v_stride_h, head, heads)
    at = head.to(tl.int64) * q_len * HEAD_DIM  # of this head in the contiguous (B H, S, D) tensors
    q = load_tile(q_base, q_stride_s, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)  # (M, D)
    do = load_tile(do_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    y_neg = load_tile(y_neg_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_mean = load_tile(k_mean_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True) * inverse_power(k_unit)
    z = load_tile(z_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    row = i + tl.arange(0, BLOCK_M)
    ridge_base = head_of(ridge_ptr, ridge_stride_b, ridge_stride_h, head, heads)
    ridge = tl.load(ridge_base + row.to(tl.int64) * ridge_stride_s, mask=row < q_len, other=1.0)  # (M,)
    lse = load_rows(rows_of(lse_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0)
    g_mean = load_rows(rows_of(g_mean_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0)
    do_unit = load_rows(rows_of(do_unit_ptr, head, q_len, 1), i, q_len, BLOCK_M, 1.0)
    z_size = load_rows(rows_of(z_size_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0) * k_unit

    z_wide = z.to(tl.float32)
    a_mean = z_size * tl.sum(z_wide * k_mean, 1)
    y_wide, do_wide = y_neg.to(tl.float32), do.to(tl.float32)
    e_mean = g_mean + tl.sum(y_wide * k_mean, 1)
    z_y = load_rows(rows_of(z_y_ptr, head, q_len, 1), i, q_len, BLOCK_M, 0.0)
    push = ridge_in(ridge, k_unit) * z_y
    # p a^2 sums to z.C z <= d.z and p e^2 to no more than the variance of g, so both sums bound their terms.
    d = k_mean - query_in(q, q_unit, k_unit, origin_ptr, head, HEAD_DIM)
    spread = 1 + tl.sqrt(tl.maximum(z_size * tl.sum(d * z_wide, 1), 0.0))  # >= p |1 - a|
    ROOM: tl.constexpr = 32 if BLOCK_D > 64 else (16 if BLOCK_D > 16 else 8)  # >= |v|
    e_top = ROOM * tl.sqrt(tl.sum(do_wide * do_wide, 1))  # >= p |e|
    dl_top = spread * e_top + tl.abs(push)
    gain = tl.minimum(power_of_two((1 / (dl_top + 1e-30)) * TOP), WEIGHT * WEIGHT)

    factor = scale * LOG2E * q_unit * k_unit
    acc, total = sweep_keys(
        dq_body,
        (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32)),
        (q, z, do, y_neg, -z_size, 1 + a_mean, e_mean, push, lse * LOG2E - tl.log2(gain), factor),
        (k_base, k_stride_s, v_base, v_stride_s), i, q_len, k_len, HEAD_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # The sum of dl is zero but for rounding, which k_mean takes out of keys far from the origin.
    k_mean = load_tile(k_mean_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True) * inverse_power(k_unit)
    y_wide = load_tile(y_neg_ptr + at, HEAD_DIM, i, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, True).to(tl.float32)
    dq = (acc - k_mean * total[:, None]) * (scale * k_unit * inverse_power(gain))[:, None] - y_wide * inverse_power(
        k_unit
    )
    unit = do_unit * v_unit
    store_tile(
        head_of(dq_out, dq_stride_b, dq_stride_h, head, heads), dq_stride_s, i, q_len, dq * unit[:, None], HEAD_DIM
    )
    dridge = unit * (z_y * inverse_power(k_unit) * inverse_power(k_unit))
    store_rows(rows_of(dridge_out, head, q_len, 1), i, q_len, dridge)

    kappa = tl.abs(scale * q_unit * k_unit)
    top = do_unit * tl.maximum(tl.maximum(dl_top * kappa, e_top * z_size), spread)
    top = tl.where(top < float("inf"), top, 0.0)  # a row of NaN must not decide for the others
    # Any NaN of this query must reach the weights of dk_kernel's products.
    shift = lse * LOG2E - tl.log2(do_unit) + 0.0 * (a_mean + e_mean + push + z_size)
    shift = tl.where(row < q_len, shift, float("inf"))
    base, stride = rows_of(rows_out, head, rows_len, 1), n_heads.to(tl.int64) * rows_len
    store_rows(base, i, rows_len, shift)
    store_rows(base + stride, i, rows_len, z_size)
    store_rows(base + 2 * stride, i, rows_len, 1 + a_mean)
    store_rows(base + 3 * stride, i, rows_len, e_mean)
    store_rows(base + 4 * stride, i, rows_len, push * (scale * q_unit * k_unit))
    store_rows(base + 5 * stride, i, rows_len, top)


@triton.jit
def dk_body(
    state, keys, rows, i, q_len, seen,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of the sums over queries in (3.4) and (3.5). Weights stand transposed, (N, M): keys are their rows."""
    dk, dv = state
    k, v, factor, kappa, gain_bits = keys
    q_base, q_stride, z_base, do_base, y_neg_base, rows_base, rows_stride = rows
    q = load_tile(q_base, q_stride, i, q_len, HEAD_DIM, M, k.shape[1], True)  # (M, D), as the next three
    z = load_tile(z_base, HEAD_DIM, i, q_len, HEAD_DIM, M, k.shape[1], True)
    do = load_tile(do_base, HEAD_DIM, i, q_len, HEAD_DIM, M, k.shape[1], True)
    y_neg = load_tile(y_neg_base, HEAD_DIM, i, q_len, HEAD_DIM, M, k.shape[1], True)
    at = rows_base + i + tl.arange(0, M)
    shift = tl.load(at) - gain_bits  # (M,), as the next four
    z_size = tl.load(at + rows_stride)
    rest = tl.load(at + 2 * rows_stride)
    e_mean = tl.load(at + 3 * rows_stride)
    push = tl.load(at + 4 * rows_stride)
    w = tl.exp2(times(k, tl.trans(q), zeros(k, tl.trans(q)), PRECISION) * factor - shift[None, :])  # (N, M)
    # 1 - a of (2.2)
    not_a = rest[None, :] - times(k, tl.trans(z), zeros(k, tl.trans(z)), PRECISION) * z_size[None, :]
    e = times(v, tl.trans(do), zeros(v, tl.trans(do)), PRECISION)
    e = times(k, tl.trans(y_neg), e, PRECISION) - e_mean[None, :]  # (3.2)
    w_value = w * not_a
    w_logit = w * (not_a * (e * kappa) + push[None, :])
    w_probe = w * e * -z_size[None, :]
    if CUT:
        w_value = tl.where(seen, w_value, 0.0)
        w_logit = tl.where(seen, w_logit, 0.0)
        w_probe = tl.where(seen, w_probe, 0.0)
        q, z, do, y_neg = finite_or_zero(q), finite_or_zero(z), finite_or_zero(do), finite_or_zero(y_neg)
    w_value = rounded(w_value, k, PRECISION)
    dv = times(w_value, do, dv, PRECISION)  # (N, D), (3.5)
    dk = times(w_value, y_neg, dk, PRECISION)  # (3.4), and the next two
    dk = times(rounded(w_logit, k, PRECISION), q, dk, PRECISION)
    dk = times(rounded(w_probe, k, PRECISION), z, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["n_heads", "heads", "q_len", "k_len", "rows_len"])
def dk_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, y_neg_ptr, z_ptr, units, rows_ptr, top_ptr, dk_out, dv_out, rows_len,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    dk_stride_b, dk_stride_h, dk_stride_s, dv_stride_b, dv_stride_h, dv_stride_s,
    n_heads, heads, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk by (3.4) and dv by (3.5), one program a tile of keys: every sum has one order, run after run."""
    j, head = tile_and_head(n_heads, k_len, BLOCK_N, False)
    q_unit, k_unit, v_unit = units_of(units, head, n_heads)
    q_base = head_of(q_ptr, q_stride_b, q_stride_h, head, heads)
    k_base = head_of(k_ptr, k_stride_b, k_stride_h, head, heads)
    v_base = head_of(v_ptr, v_stride_b, v_stride_h, head, heads)
    at = head.to(tl.int64) * q_len * HEAD_DIM
    k = load_tile(k_base, k_stride_s, j, k_len, HEAD_DIM, BLOCK_N, BLOCK_D, True)  # (N, D)
    v = load_tile(v_base, v_stride_s, j, k_len, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    # As large as the weights of this head's queries can be without overflow.
    gain = power_of_two((1 / tl.maximum(tl.load(top_ptr + head), 1e-30)) * TOP)
    kappa = scale * q_unit * k_unit
    nothing = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = sweep_queries(
        dk_body, (nothing, nothing), (k, v, kappa * LOG2E, kappa, tl.log2(gain)),
        (
            q_base, q_stride_s, z_ptr + at, do_ptr + at, y_neg_ptr + at,
            rows_of(rows_ptr, head, rows_len, 1), n_heads.to(tl.int64) * rows_len,
        ),
        j, q_len, k_len, HEAD_DIM, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    unit = inverse_power(gain)
    dk_base = head_of(dk_out, dk_stride_b, dk_stride_h, head, heads)
    store_tile(dk_base, dk_stride_s, j, k_len, dk * (unit * v_unit * inverse_power(k_unit)), HEAD_DIM)
    dv_base = head_of(dv_out, dv_stride_b, dv_stride_h, head, heads)
    store_tile(dv_base, dv_stride_s, j, k_len, dv * unit, HEAD_DIM)
