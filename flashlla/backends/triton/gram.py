"""The preconditioner "gram" (docs/math.md, section 4): for runs of queries, what the keys before them look like.

One kernel, before the solve: the covariance G of the keys without weights, and, where it is worth it, the inverse of
Cholesky's factor of G + lambda I. The solve applies two products of a tile of residuals with D x D matrices, where an
iteration has three with every tile of keys; the inverse is L^-T L^-1 of one rounded factor, so that it stays symmetric
and definite whatever the rounding.
"""

from typing import Any

import triton
import triton.language as tl

from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of
from flashlla.backends.triton.primitives import (
    NUMBERS,
    between,
    finite,
    inverse_or_zero,
    inverse_power,
    keys_of,
    load_tile,
    outside,
    place,
    power_of_two,
    queries_of,
    ridge_in,
    rounded,
    times,
    units_of,
    zeros,
)
from flashlla.solvers import Gram

# Queries that share a preconditioner: a multiple of every tile.
RUN = 256
# lambda in G + lambda I is at least this share of the largest variance: smaller, its factor has no digits left.
FLOOR: tl.constexpr = tl.constexpr(2.0**-12)
# Where it is worth it, (4.5), and where it fits, (4.6).
WORTH: tl.constexpr = tl.constexpr(Gram.WORTH)
FIT_LEAST: tl.constexpr = tl.constexpr(Gram.FIT[0])
FIT_MOST: tl.constexpr = tl.constexpr(Gram.FIT[1])


@triton.jit(do_not_specialize=[*NUMBERS, "runs"])
def gram_kernel(
    k_ptr, units, ridge_ptr, scratch, gram_out, factor_out, worth_out, k_stride_b, k_stride_h, k_stride_s,
    ridge_stride_b, ridge_stride_h, ridge_stride_s,
    cu_q, cu_k, seqlens_k, window, n_heads, heads, group, q_len, k_len, longest_q, longest_k, runs,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, RUN: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Of each run of RUN queries: gram_out, G + lambda I, and factor_out, L^-T of it, both (heads, runs, D, D) in
    units of powers of two; and worth_out (heads, runs), whether the two are to be used: 0 if not, and then they are
    not written. scratch: (heads, runs, 2 D, D).

    lambda is the mean of the run's finite ones. The keys are those that all of the run's queries see; with a window,
    those before it.
    """
    at = place(n_heads, heads, group, q_len, k_len, longest_q, longest_k, cu_q, cu_k, seqlens_k, RUN, CAUSAL, False)
    if outside(at, at.q_len, cu_q):
        return
    _, k_unit, _ = units_of(units, at, n_heads, group)
    slot = at.q_head.to(tl.int64) * runs + at.start // RUN
    k_base = keys_of(k_ptr, k_stride_b, k_stride_h, k_stride_s, at)
    dim = tl.arange(0, BLOCK_D)
    first, stop = 0, at.k_stop
    if CAUSAL:
        stop = between(at.start + at.shift, 0, at.k_stop)
        if window is not None:
            first = between(at.start + at.shift - window, 0, stop)
    origin_at = k_base + tl.cast(first, tl.int64) * k_stride_s + dim
    origin = tl.load(origin_at, mask=(dim < HEAD_DIM) & (first < stop), other=0.0)  # (D,)
    gram, total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for j in tl.range(first, stop, BLOCK_N):
        k = load_tile(k_base, k_stride_s, j, stop, HEAD_DIM, BLOCK_N, BLOCK_D, True).to(tl.float32)  # (N, D)
        x = tl.where((j + tl.arange(0, BLOCK_N) < stop)[:, None], k - origin.to(tl.float32)[None, :], 0.0)
        x = rounded(x, origin, PRECISION)
        gram = times(tl.trans(x), x, gram, PRECISION)  # (D, D)
        total += tl.sum(x.to(tl.float32), 0)
    share = inverse_or_zero((stop - first).to(tl.float32))
    mean = total * share
    row = at.start + tl.arange(0, RUN)
    there = row < at.q_len
    ridge_base = queries_of(ridge_ptr, ridge_stride_b, ridge_stride_h, ridge_stride_s, at)
    given = tl.load(ridge_base + row.to(tl.int64) * ridge_stride_s, mask=there, other=0.0)  # (RUN,)
    there = there & finite(given)
    ridge = tl.sum(tl.where(there, given, 0.0), 0) / tl.maximum(tl.sum(there.to(tl.float32), 0), 1.0)
    ridge = ridge_in(ridge, k_unit)
    on_diagonal = dim[:, None] == dim[None, :]
    gram = gram * share - mean[:, None] * mean[None, :]
    ridge = tl.maximum(ridge, tl.max(tl.where(on_diagonal, gram, 0.0)) * FLOOR)
    gram += tl.where(on_diagonal, ridge, 0.0)
    # (4.5): the trace of the square over the square of the trace, of HEAD_DIM dims.
    inside = (dim[:, None] < HEAD_DIM) & (dim[None, :] < HEAD_DIM)
    largest = tl.max(tl.where(on_diagonal, gram, 0.0))
    unit = power_of_two(largest)
    scaled = gram * inverse_power(unit)
    trace = tl.sum(tl.where(inside & on_diagonal, scaled, 0.0))
    worth = tl.sum(tl.where(inside, scaled * scaled, 0.0)) * HEAD_DIM / (trace * trace)
    if (worth > WORTH) & (largest < float("inf")) & (ridge > 0):
        at_gram = slot * BLOCK_D * BLOCK_D + dim[:, None] * BLOCK_D + dim[None, :]
        tl.store(gram_out + at_gram, scaled.to(gram_out.dtype.element_ty))
        tl.store(worth_out + slot, unit)
        a = scratch + slot * (2 * BLOCK_D * BLOCK_D)
        further = a + BLOCK_D * BLOCK_D
        tl.store(a + dim[:, None] * BLOCK_D + dim[None, :], gram)
        tl.store(further + dim[:, None] * BLOCK_D + dim[None, :], tl.where(on_diagonal, 1.0, 0.0))
        tl.debug_barrier()
        W: tl.constexpr = WARPS
        rows_of_warp: tl.constexpr = BLOCK_D // W
        k_row = tl.arange(0, W)[:, None] * rows_of_warp + tl.arange(0, rows_of_warp)[None, :]  # (W, D / W)
        factor_unit = power_of_two(tl.rsqrt(ridge))
        b = tl.zeros([W, PANEL], tl.float32)
        rows, more, own = panel_of(a, further, k_row, k_row, 0, BLOCK_D)
        for p in tl.range(0, BLOCK_D, PANEL):
            rows, more, b, _square, later = factored_panel(
                rows, more, own, b, p, a, further, None, k_row, k_row, ridge, BLOCK_D, BLOCK_K, PRODUCTS
            )  # fmt: skip
            column = p + tl.arange(0, PANEL)
            to = factor_out + slot * BLOCK_D * BLOCK_D + k_row[:, :, None] * BLOCK_D + column[None, None, :]
            tl.store(to, (more * inverse_power(factor_unit)).to(factor_out.dtype.element_ty))  # (W, D / W, P) of L^-T
            rows, more, own = later
            tl.debug_barrier()
    else:
        tl.store(worth_out + slot, 0.0)


@triton.jit
def fits(x, curvature, gram_ptr, worth, some, like, PRECISION: tl.constexpr, D: tl.constexpr):
    """Whether a tile is to use its run's preconditioner: ``worth`` is not 0, and (4.6) is about 1 for the directions of
    x (M, D), of which x.A x is ``curvature`` (M,), above and below the line summed over ``some`` of the queries."""
    gram = load_tile(gram_ptr, D, 0, D, D, D, D, False)  # (D, D)
    size = tl.sqrt(tl.sum(x * x, 1))
    share = tl.where(some & finite(curvature), inverse_or_zero(size), 0.0)  # (M,)
    unit_x = rounded(tl.where((share > 0)[:, None], x * share[:, None], 0.0), like, PRECISION)  # (M, D)
    image = times(unit_x, gram, zeros(unit_x, gram), PRECISION)
    expected = tl.sum(image * unit_x.to(tl.float32)) * worth
    found = tl.sum(tl.where(share > 0, curvature * share * share, 0.0), 0)
    return (worth > 0) & (found > expected * FIT_LEAST) & (found < expected * FIT_MOST)


@triton.jit
def preconditioned(r, use, factor_ptr, like, PRECISION: tl.constexpr, D: tl.constexpr):
    """L^-T L^-1 r of each row of r, (M, D), but for a factor; r itself of rows that do not ``use`` it, (M,). Without a
    branch: Triton does not compile one with products for Blackwell."""
    factor = load_tile(factor_ptr, D, 0, D, D, D, D, False)  # (D, D) L^-T
    size = tl.sqrt(tl.sum(r * r, 1))
    x = rounded(r * inverse_or_zero(size)[:, None], like, PRECISION)  # (M, D)
    x = rounded(times(x, factor, zeros(x, factor), PRECISION), like, PRECISION)  # (M, D) rows times L^-T
    y = times(x, tl.trans(factor), zeros(x, tl.trans(factor)), PRECISION) * size[:, None]
    return tl.where(use[:, None], y, r)


def settings(d: int) -> dict[str, Any]:
    """Tiles and warps of `gram_kernel` for padded widths ``d``."""
    warps = min(4 if d <= 64 else 8, d // PANEL.value)
    return {"BLOCK_N": 64, "BLOCK_K": 16, "WARPS": warps, "PRODUCTS": "tf32x3", "num_warps": warps, "num_stages": 2}
