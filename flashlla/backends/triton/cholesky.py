"""Cholesky's factor of a D x D matrix in memory, with further rows below it: A = L L^T, and G = F L^-T of F.

Panels of P = 16 columns, each made of all that come before it, P of them at a time. Each of W warps has its share, M,
of the R rows of A over F and makes the factor of a panel's square itself: nothing goes from one to another but through
memory, once a panel. L and G stand over A and F; a caller puts a barrier behind each panel.

Products are of TF32, three for each: a number is the sum of its upper 11 bits and of the rest. Triton's own way of
doing so also looks for NaN, at two instructions more for each number.
"""

import triton
import triton.language as tl

from flashlla.backends.triton import configs
from flashlla.backends.triton.primitives import to_tf32

PANEL: tl.constexpr = tl.constexpr(configs.PANEL)


@triton.jit
def halves(x):
    """``x`` as a sum of two: its upper bits, as TF32 holds them, and the rest. One of them is NaN if ``x`` is."""
    upper = to_tf32(x)
    return upper, x - upper


@triton.jit
def product(a, b, total):
    """``total`` + a b, in halves, but for the product of the rests."""
    upper_a, rest_a = halves(a)
    upper_b, rest_b = halves(b)
    total = tl.dot(rest_a, upper_b, total, input_precision="tf32")
    total = tl.dot(upper_a, rest_b, total, input_precision="tf32")
    return tl.dot(upper_a, upper_b, total, input_precision="tf32")


@triton.jit
def turned_inverse(a, least, spot, D: tl.constexpr):
    """L^-T of a = L L^T, (W, P, P): W copies, one for each warp. In exact arithmetic no pivot is below ``least``.

    Elimination in [a | 1]. Its 2 P columns are the lanes of a warp, a row is one number of each: rows are taken from
    rows, times what one lane tells the others. ``spot``, (P, P) in a matrix with D columns, is where numbers change
    hands; every warp writes the same.
    """
    W: tl.constexpr = a.shape[0]
    copies = tl.zeros([W, 1, 1], tl.int32)
    row, column = copies + tl.arange(0, PANEL)[None, :, None], copies + tl.arange(0, PANEL)[None, None, :]
    tl.store(spot + row * D + column, a)
    tl.debug_barrier()
    lane = tl.zeros([W, 1], tl.int32) + tl.arange(0, 2 * PANEL)[None, :]  # (W, 2 P), as each of the rows
    rows = ()
    for i in tl.static_range(PANEL):
        of_a = tl.load(spot + i * D + lane, mask=lane < PANEL, other=0.0)
        rows += (tl.where(lane == PANEL + i, 1.0, of_a),)  # type: ignore[assignment]
    tl.debug_barrier()
    for j in tl.static_range(PANEL):
        pivot = tl.maximum(tl.gather(rows[j], lane * 0 + j, 1), least)
        share = rows[j] * (1 / pivot)
        tl.store(spot + j * D + (lane - PANEL), rows[j] * tl.rsqrt(pivot), mask=lane >= PANEL)
        later = ()
        for i in tl.static_range(PANEL):
            left = rows[i] - tl.gather(rows[i], lane * 0 + j, 1) * share if i > j else rows[i]
            later += (left,)  # type: ignore[assignment]
        rows = later
    tl.debug_barrier()
    return tl.load(spot + column * D + row)


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
    column = p + tl.arange(0, PANEL)
    square_row = tl.zeros([W, 1], tl.int32) + column[None, :]
    there = (row >= p) & (row < R) & (p < D)
    return tile_of(a, row, column, there, D), tile_of(a, square_row, column, square_row < D, D)


@triton.jit
def factored_panel(panel, square, b, p, a, half_solved, row, least, R: tl.constexpr, D: tl.constexpr):
    """The panel at columns ``p`` of L over G, (W, M, P), which is stored as well, but for its square; b - L h of the
    columns before (``half_solved`` (D,) is where the h = L^-1 d that goes with them lies, or None); L^-T of the square,
    (W, P, P); and the next panel as `panel_of` loads it. ``panel`` and ``square`` are those of this one; ``row`` (W, M)
    counts the R rows; ``least`` is under every pivot. Nobody may be reading this panel's square any more.
    """
    W: tl.constexpr = row.shape[0]
    column = p + tl.arange(0, PANEL)
    square_row = tl.zeros([W, 1], tl.int32) + column[None, :]  # (W, P)
    below = (row >= p) & (row < R)  # those above are done
    for k in tl.range(0, p, PANEL):
        earlier = k + tl.arange(0, PANEL)
        across = tile_of(a, square_row, earlier, square_row < D, D)  # (W, P, P)
        if half_solved is not None:
            b -= tl.sum(across * tl.load(half_solved + earlier)[None, None, :], 2)
        turned = tl.permute(-across, (0, 2, 1))
        square = product(across, turned, square)
        panel = product(tile_of(a, row, earlier, below, D), turned, panel)
    # What is under way while the next line, which waits for one pivot after the other, is worked on.
    later = panel_of(a, row, p + PANEL, R, D)
    inverse = turned_inverse(square, least, a + p * D + p, D)  # (W, P, P)
    panel = product(panel, inverse, tl.zeros_like(panel))
    done = (row >= p + PANEL) & (row < R)
    tl.store(a + row[:, :, None] * D + column[None, None, :], panel, mask=done[:, :, None])
    return panel, b, inverse, later
