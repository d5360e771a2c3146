"""Decoding: from the moments of pieces of a cache to the output of a query.

A system is solved by conjugate gradients on A = C + lambda I, which registers hold, as far as that is the shorter way
and the inputs tell no more; what is left, by a Cholesky factor of A. Where a system has several pieces, programs add
them up, a few rows each, and the last of them to end goes on to solve it: the same numbers, whichever that is.

Letters as in decode_kernels.py; I = PIECES, the pieces of a cache rounded up to a power of two; M = BLOCK_M, rows of
the moments that a program adds up; W, warps, and P = 16, the columns of a panel of A, are Cholesky's (cholesky.py).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of
from flashlla.backends.triton.decode_kernels import SCALARS, key_span, load_query_ridge, piece_of, store_scalars
from flashlla.backends.triton.decode_share import store_sum
from flashlla.backends.triton.primitives import inverse_power, ridge_in_units
from flashlla.solvers import base as solvers

# What of a product with A rounding may put off, beside A's trace, (4.8): float32's, a few times.
ROUNDING: tl.constexpr = tl.constexpr(2.0**-22)
SOUND: tl.constexpr = tl.constexpr(solvers.SOUND)
# Pieces that are added up one after the other, unrolled: more take long to compile, and registers.
UNROLLED: tl.constexpr = tl.constexpr(8)


class System(NamedTuple):
    """One query's, in the units of its keys and values."""

    moments: Any  # where its (R = D + V, D) lie
    sums: Any  # (R,)
    offset: Any  # (D,)
    half_solved: Any  # (D,)   for h
    omega: Any
    ridge: Any
    scaled_ridge: Any
    k_unit: Any
    v_unit: Any


@triton.jit
def store_report(report, query, iterations, residual, omega):
    """Of one ``query``; ``residual`` has any shape, and the same number all over."""
    nowhere = tl.zeros_like(residual).to(tl.int32)
    tl.store(report.omega + query + nowhere, omega + tl.zeros_like(residual))
    tl.store(report.iterations + query + nowhere, iterations + nowhere)
    tl.store(report.residual + query + nowhere, residual)
    tl.store(report.converged + query + nowhere, residual <= SOUND)


@triton.jit
def rounding_of_a_product(trace, d_z, d_2, scaled_ridge):
    """The bound (4.8)."""
    return trace * ROUNDING * tl.sqrt(d_z / (scaled_ridge * tl.where(d_2 > 0, d_2, 1.0)))


@triton.jit
def store_merged(
    parts, merged_out, system, block, pieces, active, SHAPE: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
    PIECES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """`decode_share.store_sum` of few pieces: each thread adds up its own numbers of all of them."""
    D: tl.constexpr = SHAPE.BLOCK_D
    R: tl.constexpr = D + SHAPE.BLOCK_V
    row, dim = block * M + tl.arange(0, M), tl.arange(0, D)
    is_key = block * M < D
    # Every slice has the m, omega and unit of the keys; each has a unit of its values, whose rows start where its do.
    owner = tl.where(is_key, 2, (block * M - D) // SLICE * SCALARS + 3)
    # All is asked for before anything is made of it. Sums over pieces are each thread's own.
    found = ()
    m, k_unit, v_unit = float("-inf"), 0.0, 0.0
    for i in tl.static_range(PIECES):  # those from ``active`` on are no pieces
        there, piece = i < active, system * pieces + i
        scalars = parts.scalars + piece * SLICES * SCALARS
        found += ((  # type: ignore[assignment]
            tl.load(scalars, mask=there, other=float("-inf")),
            tl.load(scalars + 1, mask=there, other=1.0),
            tl.load(scalars + 2, mask=there, other=0.0),
            tl.load(scalars + owner, mask=there, other=0.0),
            tl.load(parts.sums + piece * R + dim, mask=there, other=0.0),  # (D,)
            tl.load(parts.offset + piece * D + dim, mask=there, other=0.0),  # (D,)
            tl.load(parts.sums + piece * R + row, mask=there, other=0.0),  # (M,)
            tl.load(parts.offset + piece * D + row, mask=there & is_key, other=0.0),  # (M,) rows of values have none
            tl.load(parts.moments + (piece * R + row)[:, None] * D + dim[None, :], mask=there, other=0.0),  # (M, D)
        ),)  # fmt: skip
        for j in tl.static_range(SLICES):
            v_unit = tl.maximum(v_unit, tl.load(scalars + j * SCALARS + 3, mask=there, other=0.0))
    for i in tl.static_range(PIECES):
        piece_m, _, piece_unit, _, _, _, _, _, _ = found[i]
        m, k_unit = tl.maximum(m, piece_m), tl.maximum(k_unit, piece_unit)
    k_scale = inverse_power(k_unit)
    row_scale = tl.where(is_key, k_scale, inverse_power(v_unit))

    omega, d, row_d = 0.0, tl.zeros([D], tl.float32), tl.zeros([M], tl.float32)
    for i in tl.static_range(PIECES):
        piece_m, piece_omega, piece_unit, row_unit, mean, offset, row_mean, row_offset, _ = found[i]
        fade = tl.exp2(piece_m - m)
        omega += fade * piece_omega
        d += fade * (mean * (piece_unit * k_scale) + offset * (k_scale * piece_omega))
        row_d += fade * (row_mean * (row_unit * row_scale) + row_offset * (k_scale * piece_omega))
    d, row_d = d / omega, row_d / omega
    total = tl.zeros([M, D], tl.float32)
    for i in tl.static_range(PIECES):
        piece_m, piece_omega, piece_unit, row_unit, mean, offset, row_mean, row_offset, tile = found[i]
        k_factor, row_factor = piece_unit * k_scale / piece_omega, row_unit * row_scale
        mean, row_mean = mean * k_factor, row_mean * (row_factor / piece_omega)
        away, row_away = mean + offset * k_scale - d, row_mean + row_offset * k_scale - row_d
        tile = tile * (k_factor * row_factor) - row_mean[:, None] * mean[None, :] + row_away[:, None] * away[None, :]
        total += (tl.exp2(piece_m - m) * piece_omega / omega) * tile
    tl.store(merged_out.moments + (system * R + row)[:, None] * D + dim[None, :], total)
    tl.store(merged_out.sums + system * R + row, row_d)
    if block == 0:
        store_scalars(merged_out.scalars + system * SCALARS, m, omega, k_unit, v_unit)


@triton.jit
def in_every_warp(pointers, W: tl.constexpr):
    """Numbers (D,), laid out as the sum of a matrix's rows is: each of W warps has all of them, and adds up products of
    such vectors alone. By a load of one number a thread Triton would lay out all that is made of it."""
    first = tl.arange(0, W)[:, None] == 0
    return tl.sum(tl.load(pointers[None, :] + tl.zeros([W, 1], tl.int32), mask=first, other=0.0), 0)


@triton.jit
def conjugate_gradients(c, shift, b, TOLERANCE: tl.constexpr, ITERATIONS: tl.constexpr):
    """x of (C + diag(shift)) x = b, c (D, D), whose residual r is TOLERANCE of b or what ITERATIONS leave: x, r (D,),
    whether it is the former, and iterations.

    Both products of directions that an iteration needs, r.r and r.A r, are those of one residual: so it waits for one
    sum over D, and not for two (Chronopoulos and Gear).
    """
    r = b
    x, p, a_p = tl.zeros_like(r), tl.zeros_like(r), tl.zeros_like(r)
    a_r = tl.sum(c * r[:, None], 0) + shift * r
    r_2 = tl.sum(r * r, 0)
    stop = TOLERANCE * TOLERANCE * r_2
    alpha, beta, iterations = r_2 / tl.sum(r * a_r, 0), 0.0, 0
    while (iterations < ITERATIONS) & (r_2 > stop):
        p = r + beta * p
        a_p = a_r + beta * a_p
        x += alpha * p
        r -= alpha * a_p
        a_r = tl.sum(c * r[:, None], 0) + shift * r
        before = r_2
        r_2 = tl.sum(r * r, 0)
        beta = r_2 / before
        alpha = r_2 / (tl.sum(r * a_r, 0) - beta * r_2 / alpha)
        iterations += 1
    return x, r, r_2 <= stop, iterations


@triton.jit
def iterated(
    system, SHAPE: tl.constexpr, MERGED: tl.constexpr, TOLERANCE: tl.constexpr, ITERATIONS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """v_mean - Cov(v, k) z (V,), d.z, the residual (4.8), whether it may stand, and iterations.

    Of A with a diagonal of 1: z is sqrt(1 / diagonal) times what is solved for.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    dim, v_row = tl.arange(0, D), D + tl.arange(0, SHAPE.BLOCK_V)
    c = tl.load(system.moments + dim[:, None] * D + dim[None, :])  # (D, D)
    variance = in_every_warp(system.moments + dim * (D + 1), WARPS)  # (D,)
    k_mean, v_mean = in_every_warp(system.sums + dim, WARPS), tl.load(system.sums + v_row)  # (D,), (V,)
    d, share = k_mean, 1.0
    if not MERGED:
        share = 1 / system.omega
        k_mean, v_mean = k_mean * share, v_mean * share
        c = c * share - k_mean[:, None] * k_mean[None, :]
        variance = variance * share - k_mean * k_mean
        d = k_mean + in_every_warp(system.offset + dim, WARPS) * inverse_power(system.k_unit)
    diagonal = variance + system.scaled_ridge
    root = tl.rsqrt(diagonal)
    c = c * (root[:, None] * root[None, :])
    shift = system.scaled_ridge * (root * root)
    x, r, done, iterations = conjugate_gradients(c, shift, d * root, TOLERANCE, ITERATIONS)
    z, r = x * root, r / root
    d_z, d_2 = tl.sum(d * z, 0), tl.sum(d * d, 0)
    residual = tl.sqrt(tl.sum(r * r, 0) / tl.where(d_2 > 0, d_2, 1.0))
    residual += rounding_of_a_product(tl.sum(diagonal, 0), d_z, d_2, system.scaled_ridge)
    covariance = tl.load(system.moments + v_row[:, None] * D + dim[None, :])  # (V, D)
    slope = tl.sum(covariance * z[None, :], 1) * share
    if not MERGED:
        slope -= v_mean * tl.sum(k_mean * z, 0)
    flaw = 0.0 * (tl.sum(v_mean, 0) + tl.sum(d, 0))
    # Of an A that rounding has made indefinite d.z tells nothing, nor does the bound.
    return v_mean - slope + flaw, d_z, residual, done & (d_z >= 0), iterations


@triton.jit
def factored(system, row, SHAPE: tl.constexpr, MERGED: tl.constexpr, REPORTED: tl.constexpr):
    """Of ``row`` (W, M), which counts the moments' R rows: v_mean - Cov(v, k) z (W, M) in those of values; d.z and, if
    REPORTED, the residual (4.8), (W,), every warp's the same. The moments are overwritten.

    A Cholesky factor of A, with Cov(v, k) for further rows: A = L L^T, G = Cov(v, k) L^-T, h = L^-1 d, and
    Cov(v, k) z = G h, so that nothing is solved backwards.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    R: tl.constexpr = D + SHAPE.BLOCK_V
    W: tl.constexpr = row.shape[0]
    first_columns = tl.arange(0, PANEL)  # those of the first panel
    share = 1 / system.omega
    # d if MERGED, else the mean of the keys from their origin; then the mean of the values
    mean = tl.load(system.sums + row, mask=row < R, other=0.0)  # (W, M)
    if not MERGED:
        mean *= share
    d_z, d_2, trace = tl.zeros([W], tl.float32), tl.zeros([W], tl.float32), tl.zeros([W], tl.float32)
    slope = tl.zeros([W, row.shape[1]], tl.float32)
    panel, square = panel_of(system.moments, row, 0, R, D)
    tl.debug_barrier()
    for p in tl.range(0, D, PANEL):
        column = p + first_columns
        square_row = tl.zeros([W, 1], tl.int32) + column[None, :]  # (W, P)
        b = tl.load(system.sums + square_row)  # (W, P) of d
        if not MERGED:
            b *= share
            panel = panel * share - mean[:, :, None] * b[:, None, :]
            square = square * share - b[:, :, None] * b[:, None, :]
            b += tl.load(system.offset + square_row) * inverse_power(system.k_unit)
        # Of the square, which ``panel`` holds too, no more is asked than what ``square`` tells.
        on_diagonal = square_row[:, :, None] == column[None, None, :]
        square += tl.where(on_diagonal, system.scaled_ridge, 0.0)
        if REPORTED:
            d_2 += tl.sum(b * b, 1)
            trace += tl.sum(tl.sum(tl.where(on_diagonal, square, 0.0), 2), 1)
        panel, b, inverse, later = factored_panel(
            panel, square, b, p, system.moments, system.half_solved, row, system.scaled_ridge, R, D
        )  # fmt: skip
        half_solved = tl.sum(inverse * b[:, :, None], 1)  # (W, P)
        d_z += tl.sum(half_solved * half_solved, 1)
        slope += tl.sum(panel * half_solved[:, None, :], 2)
        tl.store(system.half_solved + square_row, half_solved)
        panel, square = later
        tl.debug_barrier()
    flaw = 0.0 * tl.sum(tl.sum(mean, 1), 0)
    return mean - slope + flaw, d_z, rounding_of_a_product(trace, d_z, d_2, system.scaled_ridge) + flaw


@triton.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces"])
def decode_solve_kernel(
    parts, merged, caches, ridge_in, half_solved_ptr, o_out, report_out,
    first_pair, kv_heads, group, q_len, k_len, window, pieces, delta_eps,
    SHAPE: tl.constexpr, MERGED: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, TOLERANCE: tl.constexpr, ITERATIONS: tl.constexpr,
    BLOCK_R: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """o of one system from its moments (systems, R = D + V, D), which are overwritten; and how it went, (4.8), to the
    `Report` report_out, if there is one. MERGED: the moments of all pieces are added up first, to ``merged``, by the
    system's programs; if not, there is one of either. half_solved_ptr: (systems, D), for h.

    ITERATIONS: the most of conjugate gradients, to the residual TOLERANCE; 0: none, a factor alone, of which each warp
    has its share of the rows, BLOCK_R, which is R rounded up to a power of two.
    """
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    R: tl.constexpr = D + V
    BLOCKS: tl.constexpr = R // BLOCK_M if MERGED else 1
    number, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    pair, member = first_pair + number // (group * q_len), number % (group * q_len)
    sequence, n = pair // kv_heads, member % q_len
    q_head = ((pair % kv_heads) * group + member // q_len).to(tl.int64)
    query = (sequence * (kv_heads * group) + q_head) * q_len + n  # of (B, Hq, N)
    start, stop = key_span(caches, sequence, n, q_len, k_len, window)
    o_base = o_out.ptr + sequence.to(tl.int64) * o_out.stride_b + q_head * o_out.stride_h + n * o_out.stride_s
    v_dim = tl.arange(0, V)
    o_ptrs, there = o_base + v_dim * o_out.stride_d, v_dim < SHAPE.V_DIM
    if stop <= start:
        if block == 0:
            tl.store(o_ptrs, tl.zeros([V], o_out.ptr.dtype.element_ty), mask=there)
            if report_out is not None:
                store_report(report_out, query, 0, tl.zeros([1], tl.float32), 0.0)
        return
    system = number.to(tl.int64)
    found = parts
    if MERGED:
        found = merged
        _, _, active = piece_of(start, stop, pieces, BLOCK_T)
        if PIECES > UNROLLED:
            store_sum(parts, merged, system, block, pieces, active, SHAPE, SLICES, SLICE, PIECES, BLOCK_M)
        else:
            store_merged(parts, merged, system, block, pieces, active, SHAPE, SLICES, SLICE, PIECES, BLOCK_M)
        tl.debug_barrier()
        if tl.atomic_add(parts.arrivals + system, 1) % BLOCKS < BLOCKS - 1:
            return
    scalars_ptr = found.scalars + system * SCALARS
    omega, k_unit, v_unit = tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    ridge = load_query_ridge(ridge_in, sequence, q_head, n)
    scaled_ridge = ridge_in_units(ridge, k_unit)
    one = System(
        found.moments + system * R * D, found.sums + system * R, parts.offset + system * D,
        half_solved_ptr + system * D, omega, ridge, scaled_ridge, k_unit, v_unit,
    )  # fmt: skip
    flaw = 0.0 * (omega + ridge)  # NaN where anything was not finite: of one value, of all
    if ITERATIONS > 0:
        o, d_z, residual, done, iterations = iterated(one, SHAPE, MERGED, TOLERANCE, ITERATIONS, WARPS)
        if done:
            guard = 1 / (1 + delta_eps * (1 + d_z) / omega)
            tl.store(o_ptrs, (o * (guard * v_unit) + flaw).to(o_out.ptr.dtype.element_ty), mask=there)
            if report_out is not None:
                store_report(report_out, query, iterations, residual + flaw + tl.zeros([1], tl.float32), omega + flaw)
            return
    row = tl.arange(0, WARPS)[:, None] * (BLOCK_R // WARPS) + tl.arange(0, BLOCK_R // WARPS)[None, :]  # (W, M)
    o, d_z, residual = factored(one, row, SHAPE, MERGED, report_out is not None)
    guard = 1 / (1 + delta_eps * (1 + d_z) / omega)  # (W,)
    o = o * (guard * v_unit)[:, None] + flaw
    tl.store(
        o_base + (row - D) * o_out.stride_d, o.to(o_out.ptr.dtype.element_ty),
        mask=(row >= D) & (row < D + SHAPE.V_DIM),
    )  # fmt: skip
    if report_out is not None:
        store_report(report_out, query, 0, residual + flaw, omega + flaw)
