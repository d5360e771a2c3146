"""Cholesky's factor of a D x D matrix in memory, with further rows: A = L L^T, and G = F L^-T of F.

Panels of P = 16 columns, each made of all that come before it, BLOCK_K of them at a time. Each of W warps has its share
of the rows and makes the factor of a panel's square itself: nothing goes from one to another but through memory, once
a panel. All of it stands over A and F; a caller puts a barrier behind each panel.
"""

import triton
import triton.language as tl

PANEL: tl.constexpr = tl.constexpr(16)


@triton.jit
def inverse_factor(a, least):
    """L^-1 of a = L L^T, (W, P, P): W copies. Two columns at a time: the way through a pair is hardly longer than
    through one.

    In exact arithmetic no pivot is below ``least``, the ridge.
    """
    row, column = tl.arange(0, PANEL)[None, :, None], tl.arange(0, PANEL)[None, None, :]
    inverse = tl.where(row == column, 1.0, 0.0) + tl.zeros_like(a)
    for j in tl.static_range(0, PANEL, 2):
        row_0, row_1 = row_of(a, row == j), row_of(a, row == j + 1)  # (W, 1, P)
        column_0 = tl.sum(tl.where(column == j, a, 0.0), 2, keep_dims=True)  # (W, P, 1)
        column_1 = tl.sum(tl.where(column == j + 1, a, 0.0), 2, keep_dims=True)
        done_0, done_1 = row_of(inverse, row == j), row_of(inverse, row == j + 1)  # (W, 1, P)
        pivot_0 = tl.maximum(row_of(column_0, row == j), least)  # (W, 1, 1)
        beside, pivot_1 = row_of(column_1, row == j), row_of(column_1, row == j + 1)
        turn = beside / pivot_0
        pivot_1 = tl.maximum(pivot_1 - turn * beside, least)
        row_1 -= turn * row_0
        column_1 -= turn * column_0
        done_1 -= turn * done_0
        column_0, column_1 = column_0 * (1 / pivot_0), column_1 * (1 / pivot_1)
        a -= column_0 * row_0 + column_1 * row_1
        below = inverse - (column_0 * done_0 + column_1 * done_1)
        above = tl.where(row < j, inverse, done_0 * tl.rsqrt(pivot_0))
        above = tl.where(row == j + 1, done_1 * tl.rsqrt(pivot_1), above)
        inverse = tl.where(row > j + 1, below, above)
    return inverse


@triton.jit
def row_of(a, which):
    """The row of each of W matrices that ``which`` (1, P, 1) picks: (W, 1, P)."""
    return tl.sum(tl.where(which, a, 0.0), 1, keep_dims=True)


@triton.jit
def tile_of(matrix, row, column, there, D: tl.constexpr):
    """Elements of a matrix with D columns at rows ``row`` (W, R) and columns ``column`` (K,), zero where not ``there``
    (W, R): (W, R, K)."""
    return tl.load(matrix + row[:, :, None] * D + column[None, None, :], mask=there[:, :, None], other=0.0)


@triton.jit
def panel_of(a, further, k_row, v_row, p, D: tl.constexpr):
    """Columns ``p`` to p + P of A, (W, D / W, P), of the further rows, (W, V / W, P), and the square on the diagonal,
    (W, P, P); nothing past the last column."""
    W: tl.constexpr = k_row.shape[0]
    panel = p + tl.arange(0, PANEL)
    own_row = tl.zeros([W, 1], tl.int32) + panel[None, :]
    rows = tile_of(a, k_row, panel, (k_row >= p) & (p < D), D)
    more = tile_of(further, v_row, panel, (v_row >= 0) & (p < D), D)
    return rows, more, tile_of(a, own_row, panel, own_row < D, D)


@triton.jit
def factored_panel(
    rows, more, own, b, p, a, further, y_ptr, k_row, v_row, least, D: tl.constexpr, K: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    """The panel at columns ``p`` of L, (W, D / W, P), and of G, (W, V / W, P), which are stored as well; b - L y of the
    columns before (``y_ptr`` (D,) holds y, or is None); L^-1 of the panel's square, (W, P, P); and the next panel as
    `panel_of` loads it. ``rows``, ``more`` and ``own`` are that of this one; ``least`` is under every pivot.
    """
    W: tl.constexpr = k_row.shape[0]
    panel = p + tl.arange(0, PANEL)
    own_row = tl.zeros([W, 1], tl.int32) + panel[None, :]  # (W, P)
    below = k_row >= p  # those above are done
    for k in tl.range(0, p, K):
        column = k + tl.arange(0, K)
        across_at = a + own_row[:, :, None] * D + column[None, None, :]
        across = tl.load(across_at, mask=(column < p)[None, None, :], other=0.0)  # (W, P, K)
        if y_ptr is not None:
            y = tl.load(y_ptr + column, mask=column < p, other=0.0)  # (K,)
            b -= tl.sum(across * y[None, None, :], 2)
        turned = tl.permute(across, (0, 2, 1))  # (W, K, P)
        own -= tl.dot(across, turned, input_precision=PRODUCTS)
        before = tile_of(a, k_row, column, below, D)  # (W, D / W, K); columns from p on meet zeros
        rows -= tl.dot(before, turned, input_precision=PRODUCTS)
        before = tile_of(further, v_row, column, v_row >= 0, D)  # (W, V / W, K)
        more -= tl.dot(before, turned, input_precision=PRODUCTS)
    # What is under way while the next line, which waits for one pivot after the other, is worked on.
    later = panel_of(a, further, k_row, v_row, p + PANEL, D)
    inverse = inverse_factor(own, least)  # (W, P, P)
    turned = tl.permute(inverse, (0, 2, 1))
    rows = tl.dot(rows, turned, input_precision=PRODUCTS)
    more = tl.dot(more, turned, input_precision=PRODUCTS)
    # Rows of the panel's own square are not needed again, and others may be reading them yet.
    tl.store(a + k_row[:, :, None] * D + panel[None, None, :], rows, mask=(k_row >= p + PANEL)[:, :, None])
    tl.store(further + v_row[:, :, None] * D + panel[None, None, :], more)
    return rows, more, b, inverse, later
