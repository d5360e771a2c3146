"""Cholesky's factor of a D x D matrix in memory, with further rows below it: A = L L^T, and G = F L^-T of F.

Panels of P = 16 columns, each made of all that come before it, P of them at a time. Each of W warps has its share, M,
of the R rows of A over F and makes the factor of a panel's square itself: nothing goes from one to another but through
memory, once a panel. L and G stand over A and F; a caller puts a barrier behind each panel.

Products are of TF32, three for each: a number is the sum of two, its upper 11 bits and the rest, and L and G are kept
in memory so, the rest in a matrix of its own: they are taken apart once and multiplied often.
"""

import triton
import triton.language as tl

PANEL: tl.constexpr = tl.constexpr(16)


@triton.jit
def halves(x):
    """``x`` as a sum of two: its upper bits, as TF32 holds them, and the rest. One of them is NaN if ``x`` is."""
    upper = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return upper, x - upper


@triton.jit
def product(a, a_rest, b, b_rest, total):
    """``total`` + a b of numbers in halves, but for the product of the rests."""
    total = tl.dot(a_rest, b, total, input_precision="tf32")
    total = tl.dot(a, b_rest, total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="tf32")


@triton.jit
def turned_inverse(a, least, spot, inverse_spot, D: tl.constexpr):
    """L^-T of a = L L^T, (W, P, P): W copies, one for each warp. In exact arithmetic no pivot is below ``least``.

    Elimination in [a | 1], whose 2 P columns are the lanes of a warp, and each row a number of theirs: a row that is
    taken from another, times what one lane tells the rest. ``spot`` and ``inverse_spot``, (P, P) in matrices with D
    columns, are where the numbers change hands.
    """
    W: tl.constexpr = a.shape[0]
    copies = tl.zeros([W, 1, 1], tl.int32)
    row, column = copies + tl.arange(0, PANEL)[None, :, None], copies + tl.arange(0, PANEL)[None, None, :]
    tl.store(spot + row * D + column, a)
    tl.debug_barrier()
    lane = tl.zeros([W, 1], tl.int32) + tl.arange(0, 2 * PANEL)[None, :]  # (W, 2 P), as each of the rows
    rows = ()
    for i in tl.static_range(PANEL):
        left = tl.load(spot + i * D + lane, mask=lane < PANEL, other=0.0)
        rows += (tl.where(lane == PANEL + i, 1.0, left),)  # type: ignore[assignment]
    for j in tl.static_range(PANEL):
        pivot = tl.maximum(tl.gather(rows[j], lane * 0 + j, 1), least)
        share = rows[j] * (1 / pivot)
        tl.store(inverse_spot + j * D + (lane - PANEL), rows[j] * tl.rsqrt(pivot), mask=lane >= PANEL)
        later = ()
        for i in tl.static_range(PANEL):
            own = rows[i] - tl.gather(rows[i], lane * 0 + j, 1) * share if i > j else rows[i]
            later += (own,)  # type: ignore[assignment]
        rows = later
    tl.debug_barrier()
    return tl.load(inverse_spot + column * D + row)


@triton.jit
def tile_of(matrix, row, column, there, D: tl.constexpr):
    """Elements of a matrix with D columns at rows ``row`` (W, M) and columns ``column`` (N,), zero where not ``there``
    (W, M): (W, M, N)."""
    return tl.load(matrix + row[:, :, None] * D + column[None, None, :], mask=there[:, :, None], other=0.0)


@triton.jit
def panel_of(a, row, p, R: tl.constexpr, D: tl.constexpr):
    """Columns ``p`` to p + P of the rows ``row`` (W, M), (W, M, P), and the square on the diagonal, (W, P, P); nothing
    past the last column, nor above the square."""
    W: tl.constexpr = row.shape[0]
    panel = p + tl.arange(0, PANEL)
    own_row = tl.zeros([W, 1], tl.int32) + panel[None, :]
    there = (row >= p) & (row < R) & (p < D)
    return tile_of(a, row, panel, there, D), tile_of(a, own_row, panel, own_row < D, D)


@triton.jit
def factored_panel(rows, own, b, p, a, rest, y_ptr, row, least, R: tl.constexpr, D: tl.constexpr):
    """The panel at columns ``p`` of L over G, (W, M, P), which is stored as well; b - L y of the columns before
    (``y_ptr`` (D,) holds y, or is None); L^-T of the panel's square, (W, P, P); and the next panel as `panel_of` loads
    it. ``rows`` and ``own`` are that of this one; ``row`` (W, M) counts the R rows; ``least`` is under every pivot.
    """
    W: tl.constexpr = row.shape[0]
    panel = p + tl.arange(0, PANEL)
    own_row = tl.zeros([W, 1], tl.int32) + panel[None, :]  # (W, P)
    below = (row >= p) & (row < R)  # those above are done
    for k in tl.range(0, p, PANEL):
        column = k + tl.arange(0, PANEL)
        across = tile_of(a, own_row, column, own_row < D, D)  # (W, P, P)
        across_rest = tile_of(rest, own_row, column, own_row < D, D)
        if y_ptr is not None:
            b -= tl.sum((across + across_rest) * tl.load(y_ptr + column)[None, None, :], 2)
        turned, turned_rest = tl.permute(-across, (0, 2, 1)), tl.permute(-across_rest, (0, 2, 1))
        own = product(across, across_rest, turned, turned_rest, own)
        before, before_rest = tile_of(a, row, column, below, D), tile_of(rest, row, column, below, D)  # (W, M, P)
        rows = product(before, before_rest, turned, turned_rest, rows)
    # What is under way while the next line, which waits for one pivot after the other, is worked on.
    later = panel_of(a, row, p + PANEL, R, D)
    square = p * D + p
    inverse = turned_inverse(own, least, rest + square, a + square, D)  # (W, P, P)
    upper, lower = halves(rows)
    turned, turned_rest = halves(inverse)
    rows = product(upper, lower, turned, turned_rest, tl.zeros_like(rows))
    # Rows of the panel's own square are not needed again, and others may be reading them yet.
    upper, lower = halves(rows)
    at = row[:, :, None] * D + panel[None, None, :]
    done = ((row >= p + PANEL) & (row < R))[:, :, None]
    tl.store(a + at, upper, mask=done)
    tl.store(rest + at, lower, mask=done)
    return rows, b, inverse, later
