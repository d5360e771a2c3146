"""The backward pass around the solve: the right-hand side of (3.1) before it, the gradients after it.

The adjoint probe comes as -y: then e = g - g_mean - b is the sum of two products in one accumulator, and the products
with y in (3.4) are sums too. There, and in what dk makes of the probe, both are lifted (`lift_of`). All of a query is
in units of its row of grad_o (prepare.py) times v_unit.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    LIFTED,
    LOG2E,
    NUMBERS,
    TOP,
    WEIGHT,
    WEIGHT_BITS,
    dot,
    finite_or_zero,
    handed_on,
    inverse_or_zero,
    inverse_power,
    keys_of,
    lift_of,
    load_numbers,
    load_queries,
    load_ridge,
    load_tile,
    load_vectors,
    outside,
    place,
    power_of_two,
    query_in_units,
    ridge_in_units,
    room,
    rounded,
    sees_some,
    store_numbers,
    store_queries,
    store_rows,
    store_tile,
    store_vectors,
    sweep_keys,
    sweep_queries,
    units_of,
    weights,
    zeros,
)


@triton.jit
def moments_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j w_ij g_ij k_j, of sum_j w_ij g_ij as rounded for it and unrounded, and of sum_j w_ij; g_ij from
    g_near."""
    acc, weighed, total, whole = state
    q, do, g_near, NEAR, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, SHAPE.V_DIM, N, do.shape[1], CUT)  # (N, V)
    w = weights(q, k, factor, shift, seen, SHAPE.TF32, CUT)  # (M, N)
    whole += tl.sum(w, 1)
    g = dot(do, tl.trans(v), zeros(do, tl.trans(v)), SHAPE.TF32)
    if NEAR:
        g -= g_near[:, None]
    w = w * g
    total += tl.sum(w, 1)
    w = rounded(w, k, SHAPE.TF32)
    return dot(w, k, acc, SHAPE.TF32), weighed + tl.sum(w.to(tl.float32), 1), total, whole


@triton.jit(do_not_specialize=NUMBERS)
def moments_kernel(
    q_in, k_in, v_in, do_ptr, units, lse_ptr, k_mean_ptr, g_near_ptr, z_size_ptr, ridge_in, lse2_out, t_out, t_size_out,
    g_mean_out, tops,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g_mean, t of (3.1) as a direction of unit length and its length, lse2: lse in base 2, without the rounding it
    came with; and, of float16, the first of ``tops``.

    g_near (B H, S): where g_mean is about, so that t is no small difference of large sums; None for 0.
    """
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False)
    if outside(at, at.q_len, seqlens.cu_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    q_unit, k_unit, _ = units_of(units, at, n_heads, group)
    k_base = keys_of(k_in, at)
    v_base = keys_of(v_in, at)
    q = load_queries(q_in, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    do = load_vectors(do_ptr, at, SHAPE.V_DIM, BLOCK_M, V)  # (M, V)
    shift = load_numbers(lse_ptr, at, BLOCK_M, 0.0) * LOG2E - WEIGHT_BITS
    factor = scale * LOG2E * q_unit * k_unit
    nothing = tl.zeros([BLOCK_M], tl.float32)
    NEAR: tl.constexpr = g_near_ptr is not None
    g_near = nothing
    if NEAR:
        g_near = load_numbers(g_near_ptr, at, BLOCK_M, 0.0)
    acc, weighed, total, whole = sweep_keys(
        moments_body,
        (tl.zeros([BLOCK_M, D], tl.float32), nothing, nothing, nothing),
        (q, do, g_near, NEAR, shift, factor), (k_base, k_in.stride_s, v_base, v_in.stride_s), at, window,
        SHAPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    k_mean = load_vectors(k_mean_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = k_mean * inverse_power(k_unit)
    # By the weights' own sum: g - g_mean is then exactly zero for a lone key, and lse that of these very weights.
    share = inverse_or_zero(whole)
    t = (acc - k_mean * weighed[:, None]) * share[:, None]
    t_size = tl.sqrt(tl.sum(t * t, 1))
    # What is no longer than the rounding of its two halves is rounding: the first query's t is zero.
    halves = tl.abs(weighed) * share * tl.sqrt(tl.sum(k_mean * k_mean, 1))
    t_size = tl.where(t_size < 1e-6 * halves, 0.0, t_size)
    t = t * inverse_or_zero(t_size)[:, None]
    store_vectors(t_out, at, t, SHAPE.HEAD_DIM)
    store_numbers(t_size_out, at, t_size)
    store_numbers(g_mean_out, at, total * share + g_near)
    lse2 = load_numbers(lse_ptr, at, BLOCK_M, 0.0) * LOG2E
    store_numbers(lse2_out, at, lse2 + (tl.log2(whole) - WEIGHT_BITS))
    if q.dtype == tl.float16:
        ridge = load_ridge(ridge_in, at.start + tl.arange(0, BLOCK_M), at, 1.0)
        z_size = load_numbers(z_size_ptr, at, BLOCK_M, 0.0) * k_unit
        tl.debug_barrier()  # t_size from memory: Triton does not compile its maximum as it is for Blackwell
        y_most = load_numbers(t_size_out, at, BLOCK_M, 0.0) / ridge_in_units(ridge, k_unit)  # A is at least the ridge
        longest = tl.max(finite_or_zero(tl.maximum(z_size, y_most)), 0)
        # Nor shall what weighs q outgrow what weighs the values.
        tl.atomic_max(tops + at.k_head, tl.maximum(longest, tl.abs(scale * q_unit * k_unit) * LIFTED))


@triton.jit
def dq_body(
    state, rows, keys, j, k_len, seen, SHAPE: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of sum_j dl_ij k_j and of sum_j dl_ij; in float32 of sum_j w_ij (1 - a_ij) and of sum_j w_ij, too."""
    acc, total, answers, whole = state
    q, z, do, y_neg, minus_size, rest, e_mean, push, shift, factor = rows
    k_base, k_stride, v_base, v_stride = keys
    k = load_tile(k_base, k_stride, j, k_len, SHAPE.HEAD_DIM, N, q.shape[1], CUT)  # (N, D)
    v = load_tile(v_base, v_stride, j, k_len, SHAPE.V_DIM, N, do.shape[1], CUT)  # (N, V)
    w = weights(q, k, factor, shift, seen, SHAPE.TF32, CUT)  # (M, N)
    # 1 - a of (2.2)
    not_a = dot(z, tl.trans(k), zeros(z, tl.trans(k)), SHAPE.TF32) * minus_size[:, None] + rest[:, None]
    if k.dtype == tl.float32:
        answers += tl.sum(w * not_a, 1)
        whole += tl.sum(w, 1)
    e = dot(do, tl.trans(v), zeros(do, tl.trans(v)), SHAPE.TF32)
    e = dot(y_neg, tl.trans(k), e, SHAPE.TF32) - e_mean[:, None]  # (3.2)
    dl = rounded(w * (not_a * e + push[:, None]), k, SHAPE.TF32)
    return dot(dl, k, acc, SHAPE.TF32), total + tl.sum(dl.to(tl.float32), 1), answers, whole


@triton.jit(do_not_specialize=[*NUMBERS, "rows_len"])
def dq_kernel(
    q_in, k_in, v_in, do_in, y_neg_ptr, z_in, units, origin_ptr, z_y_ptr, lse2_ptr, k_mean_ptr, ridge_in, g_mean_ptr,
    y_in, dq_out, dridge_out, rows_out, rows_len, tops,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq by (3.3) and dlambda by (3.6); and what dk and dv need of each query, rows_out (5 or 6, B Hq, rows_len): whole
    tiles, queries beyond the last with a weight of 0; and the second of ``tops``, what bounds their weights."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, SHAPE.CAUSAL, False,
        IN_TURNS=True,
    )  # fmt: skip
    if outside(at, at.q_len, seqlens.cu_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    q_unit, k_unit, v_unit = units_of(units, at, n_heads, group)
    i = at.start
    k_base = keys_of(k_in, at)
    v_base = keys_of(v_in, at)
    q = load_queries(q_in, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    do = load_vectors(do_in.ptr, at, SHAPE.V_DIM, BLOCK_M, V)  # (M, V)
    y_neg = load_vectors(y_neg_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = load_vectors(k_mean_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = k_mean * inverse_power(k_unit)
    z = load_vectors(z_in.ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    row = i + tl.arange(0, BLOCK_M)
    ridge = load_ridge(ridge_in, row, at, 1.0)  # (M,)
    lse2 = load_numbers(lse2_ptr, at, BLOCK_M, 0.0)
    g_mean = load_numbers(g_mean_ptr, at, BLOCK_M, 0.0)
    do_unit = load_numbers(do_in.unit, at, BLOCK_M, 1.0)
    z_size = load_numbers(z_in.unit, at, BLOCK_M, 0.0) * k_unit

    z_wide = z.to(tl.float32)
    a_mean = z_size * tl.sum(z_wide * k_mean, 1)
    y_wide, do_wide = y_neg.to(tl.float32), do.to(tl.float32)
    e_mean = g_mean + tl.sum(y_wide * k_mean, 1)
    z_y = load_numbers(z_y_ptr, at, BLOCK_M, 0.0)
    push = ridge * z_y
    # p a^2 sums to z.C z <= d.z and p e^2 to no more than the variance of g, so both sums bound their terms.
    d = k_mean - query_in_units(q, q_unit, k_unit, origin_ptr, at, SHAPE.HEAD_DIM)
    spread = 1 + tl.sqrt(tl.maximum(z_size * tl.sum(d * z_wide, 1), 0.0))  # >= p |1 - a|
    e_top = room(V) * tl.sqrt(tl.sum(do_wide * do_wide, 1))  # >= p |e|, as room(V) >= |v|
    dl_top = spread * e_top + tl.abs(push)
    gain = tl.minimum(power_of_two((1 / (dl_top + 1e-30)) * TOP), WEIGHT * WEIGHT)
    if q.dtype == tl.float32:  # which holds them as they are; and lse2 less than another number has fewer digits
        gain = tl.zeros_like(gain) + 1

    factor = scale * LOG2E * q_unit * k_unit
    nothing = tl.zeros([BLOCK_M], tl.float32)
    acc, total, answers, whole = sweep_keys(
        dq_body,
        (tl.zeros([BLOCK_M, D], tl.float32), nothing, nothing, nothing),
        (q, z, do, y_neg, -z_size, 1 + a_mean, e_mean, push, lse2 - tl.log2(gain), factor),
        (k_base, k_in.stride_s, v_base, v_in.stride_s), at, window, SHAPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    # The sum of dl is zero but for rounding, which k_mean takes out of keys far from the origin.
    k_mean = load_vectors(k_mean_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D)
    k_mean = k_mean * inverse_power(k_unit)
    if y_in is None:
        y = load_vectors(y_neg_ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D) * -inverse_power(k_unit)
    else:
        y = load_vectors(y_in.ptr, at, SHAPE.HEAD_DIM, BLOCK_M, D).to(tl.float32)
        y *= load_numbers(y_in.unit, at, BLOCK_M, 0.0)[:, None]
    # What the sum of the weights is to be over what it is: of float32, whose large logits lse2 holds with fewer digits.
    share = 1.0
    if q.dtype == tl.float32:
        share = tl.where(whole > 0, 1 / tl.where(whole > 0, whole, 1.0), 1.0)  # (M,)
    dq = (acc - k_mean * total[:, None]) * (scale * k_unit * inverse_power(gain) * share)[:, None] + y
    unit = do_unit * v_unit
    some = sees_some(row, at, window, SHAPE.CAUSAL)  # what sees nothing need not be finite
    store_queries(dq_out, at, tl.where(some[:, None], dq * unit[:, None], 0.0), SHAPE.HEAD_DIM)
    store_numbers(dridge_out, at, tl.where(some, unit * z_y, 0.0))

    if q.dtype == tl.float32:  # weights times 1 - a sum to 1 (output_kernel)
        a_mean -= tl.where(whole > 0, answers * share - 1, 0.0)
    kappa = tl.abs(scale * q_unit * k_unit)
    lift = lift_of(tops, at.k_head, q, D)
    z_size, a_mean, push = z_size * lift, a_mean * lift, push * lift
    top = do_unit * tl.maximum(tl.maximum(dl_top * kappa * lift, e_top * z_size), spread)
    top = tl.where(top < float("inf"), top, 0.0)  # a row of NaN must not decide for the others
    # Any NaN of this query must reach the weights of dk_kernel's products, where keys see it; and no others.
    flaw = 0.0 * (do_unit + a_mean + e_mean + push + z_size)
    # do_unit goes with the weights: into lse2, or, of float32, where that would cost lse2 digits, beside it.
    shift = lse2 if q.dtype == tl.float32 else lse2 - tl.log2(do_unit)
    base = handed_on(rows_out.ptr, at, at.q_head, heads, rows_len, seqlens.cu_q)
    store_rows(base, i, rows_len, tl.where(some, shift + flaw, float("inf")))
    store_rows(base + rows_out.stride, i, rows_len, finite_or_zero(z_size))
    store_rows(base + 2 * rows_out.stride, i, rows_len, finite_or_zero(1 + a_mean))
    store_rows(base + 3 * rows_out.stride, i, rows_len, finite_or_zero(e_mean))
    store_rows(base + 4 * rows_out.stride, i, rows_len, finite_or_zero(push * (scale * q_unit * k_unit)))
    if q.dtype == tl.float32:
        store_rows(base + 5 * rows_out.stride, i, rows_len, finite_or_zero(do_unit * share))
    # The largest of several numbers is the same in any order.
    tl.atomic_max(tops + n_heads // group + at.k_head, tl.max(tl.where(some, top, 0.0), 0))


@triton.jit
def dk_body(
    state, keys, rows, i, q_len, seen, SHAPE: tl.constexpr, M: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """One tile of the sums over queries in (3.4) and (3.5). Weights stand transposed, (N, M): keys are their rows."""
    dk, dv = state
    k, v, factor, kappa, gain_bits = keys
    q_base, q_stride, z_base, do_base, y_neg_base, rows_base, rows_stride = rows
    q = load_tile(q_base, q_stride, i, q_len, SHAPE.HEAD_DIM, M, k.shape[1], True)  # (M, D), as z and y_neg
    z = load_tile(z_base, SHAPE.HEAD_DIM, i, q_len, SHAPE.HEAD_DIM, M, k.shape[1], True)
    do = load_tile(do_base, SHAPE.V_DIM, i, q_len, SHAPE.V_DIM, M, v.shape[1], True)  # (M, V)
    y_neg = load_tile(y_neg_base, SHAPE.HEAD_DIM, i, q_len, SHAPE.HEAD_DIM, M, k.shape[1], True)
    row_ptrs = rows_base + i + tl.arange(0, M)
    shift = tl.load(row_ptrs) - gain_bits  # (M,), as the next four
    z_size = tl.load(row_ptrs + rows_stride)
    rest = tl.load(row_ptrs + 2 * rows_stride)
    e_mean = tl.load(row_ptrs + 3 * rows_stride)
    push = tl.load(row_ptrs + 4 * rows_stride)
    w = tl.exp2(dot(k, tl.trans(q), zeros(k, tl.trans(q)), SHAPE.TF32) * factor - shift[None, :])  # (N, M)
    if k.dtype == tl.float32:
        w *= tl.load(row_ptrs + 5 * rows_stride)[None, :]
    if CUT:
        w = tl.where(seen, w, 0.0)
    # 1 - a of (2.2)
    not_a = rest[None, :] - dot(k, tl.trans(z), zeros(k, tl.trans(z)), SHAPE.TF32) * z_size[None, :]
    e = dot(v, tl.trans(do), zeros(v, tl.trans(do)), SHAPE.TF32)
    e = dot(k, tl.trans(y_neg), e, SHAPE.TF32) - e_mean[None, :]  # (3.2)
    w_value = w * not_a
    w_logit = w * (not_a * (e * kappa) + push[None, :])
    w_probe = w * e * -z_size[None, :]
    w_value = rounded(w_value, k, SHAPE.TF32)
    dv = dot(w_value, do, dv, SHAPE.TF32)  # (N, V), (3.5)
    dk = dot(w_value, y_neg, dk, SHAPE.TF32)  # (N, D), (3.4), and the next two
    dk = dot(rounded(w_logit, k, SHAPE.TF32), q, dk, SHAPE.TF32)
    dk = dot(rounded(w_probe, k, SHAPE.TF32), z, dk, SHAPE.TF32)
    return dk, dv


@triton.jit
def one_head(
    state, k, v, at, window, member, gain, lift, units, k_unit, q_in, z_ptr, do_ptr, y_neg_ptr, rows_in, rows_len,
    heads, q_len, seqlens, scale,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``state`` (dk, dv) of a tile of keys after the queries of one head, the ``member``-th of its group."""
    q_unit = tl.load(units + at.q_head + member)
    kappa, factor = scale * q_unit * k_unit, scale * LOG2E * q_unit * k_unit  # rounded as in the passes that made lse2
    q_base = q_in.ptr + at.sequence.to(tl.int64) * q_in.stride_b + (at.head + member).to(tl.int64) * q_in.stride_h
    q_base += at.q_first.to(tl.int64) * q_in.stride_s
    row = at.q_row + member * q_len.to(tl.int64)
    rows = (
        q_base, q_in.stride_s,
        z_ptr + row * SHAPE.HEAD_DIM, do_ptr + row * SHAPE.V_DIM, y_neg_ptr + row * SHAPE.HEAD_DIM,
        handed_on(rows_in.ptr, at, at.q_head + member, heads, rows_len, seqlens.cu_q), rows_in.stride,
    )  # fmt: skip
    return sweep_queries(
        dk_body, state, (k, v, factor, kappa * lift, tl.log2(gain)), rows, at, window, SHAPE, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*NUMBERS, "rows_len"])
def dk_kernel(
    q_in, k_in, v_in, do_ptr, y_neg_ptr, z_ptr, units, rows_in, rows_len, tops, dk_out, dv_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    GROUP: tl.constexpr, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk by (3.4) and dv by (3.5), one program a tile of keys: every sum has one order, call after call.

    GROUP query heads share the keys; their sums follow one another.
    """
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_N, SHAPE.CAUSAL, True,
        IN_TURNS=True,
    )  # fmt: skip
    if outside(at, at.k_len, seqlens.cu_k):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    _, k_unit, v_unit = units_of(units, at, n_heads, group)
    j = at.start
    k_base = keys_of(k_in, at)
    v_base = keys_of(v_in, at)
    k = load_tile(k_base, k_in.stride_s, j, at.k_stop, SHAPE.HEAD_DIM, BLOCK_N, D, True)  # (N, D)
    v = load_tile(v_base, v_in.stride_s, j, at.k_stop, SHAPE.V_DIM, BLOCK_N, V, True)  # (N, V)
    # As large as the weights of these heads' queries can be without overflow.
    top = tl.load(tops + n_heads // group + at.k_head)
    gain = power_of_two((1 / tl.maximum(top, 1e-30)) * TOP)
    if k.dtype == tl.float32:
        gain = tl.full([], 1.0, tl.float32)
    lift = lift_of(tops, at.k_head, k, D)
    state = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, V], tl.float32)
    if GROUP == 1:
        dk, dv = one_head(
            state, k, v, at, window, 0, gain, lift, units, k_unit, q_in, z_ptr, do_ptr, y_neg_ptr, rows_in, rows_len,
            heads, q_len, seqlens, scale, SHAPE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        dk, dv = state
        for member in tl.range(0, GROUP):
            dk, dv = one_head(
                (dk, dv), k, v, at, window, member, gain, lift, units, k_unit, q_in, z_ptr, do_ptr, y_neg_ptr, rows_in,
                rows_len, heads, q_len, seqlens, scale, SHAPE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    unit = inverse_power(gain)
    there = (j + tl.arange(0, BLOCK_N) < at.k_stop)[:, None]  # beyond, zero weights met nothing that was masked
    dk = tl.where(there, dk * (unit * v_unit * inverse_power(k_unit) / lift), 0.0)
    dv = tl.where(there, dv * unit, 0.0)
    store_tile(keys_of(dk_out, at), dk_out.stride_s, j, at.k_len, dk, SHAPE.HEAD_DIM)
    store_tile(keys_of(dv_out, at), dv_out.stride_s, j, at.k_len, dv, SHAPE.V_DIM)
