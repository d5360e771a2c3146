"""What every kernel is made of: heads and tiles of memory, weights, the sweep over tiles, rounding.

Letters of the shape comments: M = BLOCK_M queries, N = BLOCK_N keys, D = BLOCK_D, the head dim rounded up to a power of
two of at least 16. Operands of products are float16 or float32; all else is float32.

Units. Operands come divided by powers of two, one for each head and tensor (prepare.py's), so that their largest number
lies in [1, 2): nothing finite overflows float16, and nothing that matters falls under it. The kernels compute in the
units of the keys, where keys, k_mean and d are smaller by k_unit, probes larger by it, and ridges smaller by its
square: the equations of docs/math.md hold as they stand.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Weights are WEIGHT p, at most 256: with operands in their units no product of a weight and a number that a kernel
# multiplies it with passes 65504, and a p of 1e-6 still makes a normal float16.
WEIGHT_BITS: tl.constexpr = tl.constexpr(8.0)
WEIGHT: tl.constexpr = tl.constexpr(256.0)
# What weights scaled to the bound of their rows may reach.
TOP: tl.constexpr = tl.constexpr(32768.0)


@triton.jit
def head_of(pointer, stride_b, stride_h, head, heads):
    """Where a head of a strided (B, H, S, D) tensor begins."""
    batch = (head // heads).to(tl.int64)
    return pointer + batch * stride_b + (head % heads).to(tl.int64) * stride_h


@triton.jit
def rows_of(pointer, head, length, width: tl.constexpr):
    """Where a head of a contiguous (B H, length, width) tensor begins."""
    return pointer + head.to(tl.int64) * length * width


@triton.jit
def load_tile(
    base, stride, start, length, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, CUT: tl.constexpr
):
    """Rows ``start`` to ``start + ROWS`` of a (length, HEAD_DIM) matrix: (ROWS, D), zero outside it.

    Not ``CUT``: all the rows are there.
    """
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    if CUT and HEAD_DIM < D:
        return tl.load(pointers, mask=((start + row) < length)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif CUT:
        return tl.load(pointers, mask=((start + row) < length)[:, None], other=0.0)
    elif HEAD_DIM < D:
        return tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(base, stride, start, length, x, HEAD_DIM: tl.constexpr):
    """``x`` (ROWS, D) to rows ``start`` on of a (length, HEAD_DIM) matrix; what is outside it is dropped."""
    row, dim = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    inside = ((start + row) < length)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(base, start, length, ROWS: tl.constexpr, other):
    """(ROWS,) numbers, one a row."""
    row = start + tl.arange(0, ROWS)
    return tl.load(base + row, mask=row < length, other=other)


@triton.jit
def store_rows(base, start, length, x):
    row = start + tl.arange(0, x.shape[0])
    tl.store(base + row, x.to(base.dtype.element_ty), mask=row < length)


@triton.jit
def times(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, in float32; PRECISION matters for float32 operands only."""
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def zeros(a, b):
    """The accumulator of a product of ``a``'s rows and ``b``'s columns."""
    return tl.zeros([a.shape[0], b.shape[1]], tl.float32)


@triton.jit
def rounded(x, like, PRECISION: tl.constexpr):
    """``x`` (float32) as the operand of a product with ``like``.

    What a product would round is rounded here, so that sums made beside the product can use the same numbers.
    """
    if like.dtype == tl.float32 and PRECISION == "tf32":
        near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)  # a NaN of all ones would wrap round to -0
    else:
        return x.to(like.dtype)


@triton.jit
def with_nan(x):
    """``x`` with NaN for inf."""
    return x + (x - x)


@triton.jit
def finite_or_zero(x):
    """``x`` with 0 for NaN and inf: a hidden row of an operand meets a weight of 0, and 0 NaN is NaN."""
    return tl.where((x - x) == 0, x, tl.zeros_like(x))


@triton.jit
def saturated(x, like):
    """``x`` no larger than the dtype of ``like`` holds; NaN stays."""
    if like.dtype == tl.float16:
        return tl.where(tl.abs(x) > 65504.0, tl.where(x > 0, 65504.0, -65504.0), x)
    else:
        return x


@triton.jit
def power_of_two(x):
    """The largest power of two not above ``x`` > 0, kept in a range whose inverses are normal; for 0 the smallest."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(power, 1.1754943508222875e-38), 8.507059173023462e37)  # 2**-126, 2**126


@triton.jit
def inverse_power(unit):
    """1 / unit for a power of two, exactly (a device's division need not be exact)."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_or_zero(x):
    """1 / x, and 0 where x is 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1.0), x)


@triton.jit
def tile_and_head(n_heads, length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """First row and head of this program. Neighbours share a tile's place: the longest sweeps start first."""
    program = tl.program_id(0)
    tile = program // n_heads
    if LAST_FIRST:
        tile = tl.cdiv(length, BLOCK) - 1 - tile
    return tile * BLOCK, program % n_heads


@triton.jit
def visible(row, key, q_len, k_len, CAUSAL: tl.constexpr):
    """Whether queries ``row`` see ``key``s; shapes broadcast. Causal is aligned at the end of the keys."""
    if CAUSAL:
        return (key < k_len) & (key <= row + (k_len - q_len))
    else:
        return (key < k_len) & (row == row)


@triton.jit
def key_range(row, q_len, k_len, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of the keys in tiles of N: where those end that each of the M queries from ``row`` on sees, and that any sees."""
    if CAUSAL:
        first = tl.minimum(tl.maximum(row + 1 + k_len - q_len, 0), k_len)  # keys that the first query sees
        return first // N * N, tl.minimum(tl.maximum(row + M + k_len - q_len, 0), k_len)
    else:
        return k_len // N * N, k_len


@triton.jit
def query_range(key, q_len, k_len, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of the queries in tiles of M: where those start that see any of the N keys from ``key`` on, and that see all."""
    if CAUSAL:
        shift = k_len - q_len
        start = tl.maximum(key - shift, 0) // M * M
        whole = tl.cdiv(tl.maximum(tl.minimum(key + N, k_len) - 1 - shift, 0), M) * M
        return start, tl.minimum(whole, tl.cdiv(q_len, M) * M)
    else:
        return 0, 0


@triton.jit
def sweep_keys(
    body: tl.constexpr, state, rows, keys, row, q_len, k_len,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``state`` after ``body`` on each tile of keys that queries ``row`` to ``row + M`` see.

    Two runs of one body: the tiles that the mask or the length cuts, then those that every query sees whole, if any.
    Matrix instructions of the second run are still under way when it ends: were the run skipped on a path that joins
    there, the assembler would copy accumulators beside them, and wait for every single instruction instead. ``rows`` is
    what ``body`` needs of the queries; ``keys`` the keys' (and values') places and strides.
    """
    whole, stop = key_range(row, q_len, k_len, CAUSAL, M, N)
    for j in tl.range(whole, stop, N):
        i_column, j_row = (row + tl.arange(0, M))[:, None], (j + tl.arange(0, N))[None, :]
        seen = visible(i_column, j_row, q_len, k_len, CAUSAL)
        state = body(state, rows, keys, j, k_len, seen, HEAD_DIM, PRECISION, N, True)
    if whole > 0:
        seen = tl.full([M, N], True, tl.int1)
        for j in tl.range(0, whole, N):
            state = body(state, rows, keys, j, k_len, seen, HEAD_DIM, PRECISION, N, False)
    return state


@triton.jit
def sweep_queries(
    body: tl.constexpr, state, keys, rows, key, q_len, k_len,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """``state`` after ``body`` on each tile of queries that see one of the keys ``key`` to ``key + N``.

    The tile that the end of the queries cuts needs no mask: missing queries have weight 0 from their shift.
    """
    start, whole = query_range(key, q_len, k_len, CAUSAL, M, N)
    seen = tl.full([N, M], True, tl.int1)
    for i in tl.range(start, whole, M):
        i_row, j_column = (i + tl.arange(0, M))[None, :], (key + tl.arange(0, N))[:, None]
        seen = visible(i_row, j_column, q_len, k_len, CAUSAL)
        state = body(state, keys, rows, i, q_len, seen, HEAD_DIM, PRECISION, M, True)
    for i in tl.range(whole, q_len, M):
        state = body(state, keys, rows, i, q_len, seen, HEAD_DIM, PRECISION, M, False)
    return state


@triton.jit
def load_keys(base, stride, start, k_len, like, HEAD_DIM: tl.constexpr, N: tl.constexpr, CUT: tl.constexpr):
    """A tile of keys twice, (N, D): for products that make weights, and for products with weights.

    In a cut tile a key that is not finite must reach the queries that see it (through NaN in their weights), and no
    other (its weight is 0 there).
    """
    k = load_tile(base, stride, start, k_len, HEAD_DIM, N, like.shape[1], CUT)
    if CUT:
        return with_nan(k), finite_or_zero(k)
    else:
        return k, k


@triton.jit
def weights(q, k, factor, shift, seen, PRECISION: tl.constexpr, CUT: tl.constexpr):
    """2**(factor q.k - shift), and 0 where not ``seen``: (M, N)."""
    s = times(q, tl.trans(k), zeros(q, tl.trans(k)), PRECISION) * factor - shift[:, None]
    if CUT:
        s = tl.where(seen, s, float("-inf"))
    return tl.exp2(s)


@triton.jit
def units_of(units, head, n_heads):
    """The powers of two that a head's queries, keys and values were divided by."""
    return tl.load(units + head), tl.load(units + n_heads + head), tl.load(units + 2 * n_heads + head)


@triton.jit
def ridge_in(ridge, k_unit):
    """The ridges in the units of the keys; where keys are tiny beside them, as large as still makes solutions of 0."""
    return tl.minimum(ridge * inverse_power(k_unit) * inverse_power(k_unit), 1e36)


@triton.jit
def query_in(q, q_unit, k_unit, origin_ptr, head, HEAD_DIM: tl.constexpr):
    """The queries q (M, D) in the units of the keys, from the keys' origin (B H, D) if that has been moved: (M, D)."""
    x = q.to(tl.float32) * (q_unit * inverse_power(k_unit))
    if origin_ptr is not None:
        dim = tl.arange(0, q.shape[1])
        x -= tl.load(origin_ptr + head.to(tl.int64) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]
    return x
