"""What every kernel is made of: heads and tiles of memory, weights, the sweep over tiles, rounding.

Letters of the shape comments: M = BLOCK_M queries, N = BLOCK_N keys, D = BLOCK_D and V = BLOCK_V, the dims of keys and
values rounded up to a power of two of at least 16. Operands of products are float16 or float32; all else is float32.

Units. Operands come divided by powers of two, one for each head and tensor (prepare.py's), so that their largest number
lies in [1, 2): nothing finite overflows float16, nor its squares float32, and nothing that matters falls under. The
kernels compute in the units of the keys, where keys, k_mean and d are smaller by k_unit, probes larger by it, and
ridges smaller by its square: the equations of docs/math.md hold as they stand.

Numbers that are not finite. A hidden row of an operand meets a weight of 0, and 0 NaN is NaN: so operands hold 0 in
place of what is not finite, and every query that sees some of it has an lse of NaN, hence NaN in all its weights.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashlla.backends.triton import configs

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Weights are WEIGHT p, at most 256: with operands in their units no product of a weight and a number that a kernel
# multiplies it with passes 65504, and a p of 1e-6 still makes a normal float16.
WEIGHT_BITS: tl.constexpr = tl.constexpr(8.0)
WEIGHT: tl.constexpr = tl.constexpr(256.0)
# What weights scaled to the bound of their rows may reach.
TOP: tl.constexpr = tl.constexpr(32768.0)
# What a and b of lengthened probes may reach: that is where probes point at the longest key, a few float16 roundings
# elsewhere.
LIFTED: tl.constexpr = tl.constexpr(0.015625)  # 2**-6  # 2**-10
ROWS_PAD: tl.constexpr = tl.constexpr(configs.ROWS_PAD)
# Programs, or more, that the heads of one turn have: twice as many as a large chip runs at once (docs/performance.md).
TURN: tl.constexpr = tl.constexpr(512)
# Sequences among which a program looks for its own at a time.
LANES: tl.constexpr = tl.constexpr(128)


# Arguments that no kernel is compiled anew for, each by itself: Triton's do_not_specialize does not reach into tuples.
NUMBERS = ("window", "n_heads", "heads", "group", "q_len", "k_len", "max_seqlen_q", "max_seqlen_k")


class Place(NamedTuple):
    """Where a program works: a tile of rows of one head of one sequence."""

    start: Any  # first row of the tile: of the queries, or of the keys
    sequence: Any
    head: Any  # of the queries; of the keys' programs, the first of the group
    kv_head: Any  # of the keys
    q_head: Any  # the same two, counted through all sequences
    k_head: Any
    q_first: Any  # where the sequence begins in a packed row; 0
    k_first: Any  # the first key that may be seen; keys are counted from here on
    q_row: Any  # where the head begins in a contiguous (B, Hq, Sq)
    q_len: Any
    k_len: Any  # from k_first on
    k_stop: Any  # keys that there are: k_len, or fewer by seqlens_k
    diagonal: Any  # query i is at the place of key i + diagonal


@triton.jit
def clamp(x, least, most):
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def sequence_extent(cu_seqlens, sequence, total, max_seqlen):
    """Where a sequence begins in a row of ``total``, and its length: never outside the row, whatever the numbers."""
    if cu_seqlens is None:
        return sequence * 0, total
    else:
        first = clamp(tl.load(cu_seqlens + sequence), 0, total)
        last = clamp(tl.load(cu_seqlens + sequence + 1), first, total)
        return first, tl.minimum(last - first, max_seqlen)


@triton.jit
def key_at(pointer, sequence, k_len):
    """What a `Seqlens` tells of a sequence's keys, within them whatever the number."""
    return clamp(tl.load(pointer + sequence), 0, k_len)


@triton.jit
def packed_tile(cu_seqlens, slot, sequences, total, BLOCK: tl.constexpr, lanes=None):
    """The sequence that has the ``slot``-th tile of BLOCK rows of a packed row, and which of its tiles that is.

    Sequence i has the slots from cu_seqlens[i] // BLOCK + i on: enough for all its rows, and one more at most, which
    lies outside it. So ``total`` // BLOCK + ``sequences`` are enough, whatever the lengths. ``lanes``: 0 to LANES, of
    kernels in Gluon, who know in which layout.
    """
    if lanes is None:
        lanes = tl.arange(0, LANES)
    first, stop = sequences * 0, sequences
    while stop - first > 1:  # of so many the sequence is one: each round leaves a LANES-th
        step = tl.cdiv(stop - first, LANES)
        i = first + lanes * step
        begins = clamp(tl.load(cu_seqlens + i, mask=i < stop, other=0), 0, total) // BLOCK + i
        reached = tl.sum(((i < stop) & (begins <= slot)).to(tl.int32), 0)
        first += tl.maximum(reached - 1, 0) * step
        stop = tl.minimum(first + step, stop)
    return first, slot - clamp(tl.load(cu_seqlens + first), 0, total) // BLOCK - first


@triton.jit
def place(
    seqlens, n_heads, heads, group, q_total, k_total, max_seqlen_q, max_seqlen_k,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, OVER_KEYS: tl.constexpr, lanes=None, IN_TURNS: tl.constexpr = False,
):  # fmt: skip
    """The tile of this program, of BLOCK queries or (OVER_KEYS) keys. Neighbours share a tile's place: the longest
    sweeps start first, where sequences have slots the longest of each. IN_TURNS: of some heads at a time, so that what
    they sweep over stays in the second-level cache. With sequences of several lengths some tiles lie outside theirs:
    see `outside`. ``lanes``: see `packed_tile`."""
    program = tl.program_id(0)
    cu, total = (seqlens.cu_k, k_total) if OVER_KEYS else (seqlens.cu_q, q_total)
    own_heads = heads // group if OVER_KEYS else heads  # of a sequence
    if seqlens.slots is None:
        all_heads = n_heads // group if OVER_KEYS else n_heads
        if IN_TURNS:
            tiles = tl.num_programs(0) // all_heads
            most = tl.cdiv(TURN, tiles)  # heads at a time
            turn = program // (most * tiles)
            program -= turn * most * tiles
            some = tl.minimum(most, all_heads - turn * most)
            tile, counted = program // some, turn * most + program % some
        else:
            tile, counted = program // all_heads, program % all_heads
        sequence, own = counted // own_heads, counted % own_heads
    else:
        sequence, tile = packed_tile(cu, program // own_heads, n_heads // heads, total, BLOCK, lanes)
        own = program % own_heads
        counted = sequence * own_heads + own
    if OVER_KEYS:
        head, q_head, kv_head, k_head = own * group, counted * group, own, counted
    else:
        head, q_head, kv_head, k_head = own, counted, own // group, counted // group
    q_first, q_len = sequence_extent(seqlens.cu_q, sequence, q_total, max_seqlen_q)
    k_first, k_len = sequence_extent(seqlens.cu_k, sequence, k_total, max_seqlen_k)
    diagonal = (k_len if seqlens.own_end is None else key_at(seqlens.own_end, sequence, k_len)) - q_len
    k_stop = k_len if seqlens.k is None else key_at(seqlens.k, sequence, k_len)
    if seqlens.k_start is not None:
        start = key_at(seqlens.k_start, sequence, k_len)
        k_first, k_len, k_stop, diagonal = (
            k_first + start,
            k_len - start,
            tl.maximum(k_stop - start, 0),
            diagonal - start,
        )
    q_row = (q_head if seqlens.cu_q is None else head).to(tl.int64) * q_total + q_first
    if CAUSAL and not OVER_KEYS:
        tile = tl.cdiv(q_len, BLOCK) - 1 - tile
    return Place(
        tile * BLOCK, sequence, head, kv_head, q_head, k_head, q_first, k_first, q_row, q_len, k_len, k_stop, diagonal,
    )  # fmt: skip


@triton.jit
def outside(at, length, cu_seqlens):
    """Whether the program's tile lies outside its sequence of ``length``: it then has nothing to do."""
    if cu_seqlens is None:
        return False
    else:
        return (at.start < 0) | (at.start >= length)


@triton.jit
def queries_of(x, at):
    """Where a program's queries begin in a `Strided` (B, Hq, Sq, ...) tensor."""
    return x.ptr + at.sequence.to(tl.int64) * x.stride_b + at.head.to(tl.int64) * x.stride_h + (
        at.q_first.to(tl.int64) * x.stride_s
    )  # fmt: skip


@triton.jit
def keys_of(x, at):
    """The same of a (B, Hkv, Sk, ...) tensor."""
    return x.ptr + at.sequence.to(tl.int64) * x.stride_b + at.kv_head.to(tl.int64) * x.stride_h + (
        at.k_first.to(tl.int64) * x.stride_s
    )  # fmt: skip


@triton.jit
def handed_on(pointer, at, q_head, heads, rows_len, cu_seqlens_q):
    """Where the numbers that a head's queries hand on to the keys' pass begin, in (B Hq, rows_len): each sequence has
    whole tiles of ROWS_PAD queries, so that none needs a mask."""
    if cu_seqlens_q is None:
        return pointer + q_head.to(tl.int64) * rows_len
    else:
        return pointer + (q_head % heads).to(tl.int64) * rows_len + (at.q_first // ROWS_PAD + at.sequence) * ROWS_PAD


@triton.jit
def rows_of(pointer, at, width: tl.constexpr):
    """Where a program's queries begin in a contiguous (B, Hq, Sq, width) tensor."""
    return pointer + at.q_row * width


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
def gather_tile(base, stride, row, length, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The rows ``row`` (ROWS,) of a (length, HEAD_DIM) matrix: (ROWS, D)."""
    dim = tl.arange(0, D)
    pointers = base + (row.to(tl.int64)[:, None] * stride + dim[None, :])
    return tl.load(pointers, mask=((row >= 0) & (row < length))[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)


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
def load_queries(x, at, WIDTH: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's rows of a `Strided` (B, Hq, Sq, WIDTH) tensor: (M, COLUMNS)."""
    return load_tile(queries_of(x, at), x.stride_s, at.start, at.q_len, WIDTH, M, COLUMNS, True)


@triton.jit
def store_queries(x_out, at, x, WIDTH: tl.constexpr):
    store_tile(queries_of(x_out, at), x_out.stride_s, at.start, at.q_len, x, WIDTH)


@triton.jit
def load_vectors(pointer, at, WIDTH: tl.constexpr, M: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of a contiguous one."""
    return load_tile(rows_of(pointer, at, WIDTH), WIDTH, at.start, at.q_len, WIDTH, M, COLUMNS, True)


@triton.jit
def store_vectors(pointer, at, x, WIDTH: tl.constexpr):
    store_tile(rows_of(pointer, at, WIDTH), WIDTH, at.start, at.q_len, x, WIDTH)


@triton.jit
def load_numbers(pointer, at, M: tl.constexpr, other):
    """One number a query, of a contiguous (B, Hq, Sq): (M,), ``other`` beyond the last."""
    return load_rows(rows_of(pointer, at, 1), at.start, at.q_len, M, other)


@triton.jit
def store_numbers(pointer, at, x):
    store_rows(rows_of(pointer, at, 1), at.start, at.q_len, x)


@triton.jit
def load_ridge(ridge, row, at, other):
    """Of queries ``row``, in any order: (M,)."""
    return tl.load(queries_of(ridge, at) + row.to(tl.int64) * ridge.stride_s, mask=row < at.q_len, other=other)


@triton.jit
def dot(a, b, accumulator, TF32: tl.constexpr):
    """accumulator + a b, in float32; TF32: float32 operands as tensor cores take them."""
    return tl.dot(a, b, accumulator, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def zeros(a, b):
    """The accumulator of a product of ``a``'s rows and ``b``'s columns."""
    return tl.zeros([a.shape[0], b.shape[1]], tl.float32)


@triton.jit
def to_tf32(x):
    """``x`` (float32) with the 11 bits of TF32; a NaN of all ones wraps round to -0."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, like, TF32: tl.constexpr):
    """``x`` (float32) as the operand of a product with ``like``.

    What a product would round is rounded here, so that sums made beside the product can use the same numbers.
    """
    if like.dtype == tl.float32 and TF32:
        return tl.where(x == x, to_tf32(x), x)
    else:
        return x.to(like.dtype)


@triton.jit
def finite(x):
    """Not by x - x == 0: of a product x, that is a multiply-add, and its rounding error."""
    return tl.abs(x) < float("inf")


@triton.jit
def finite_or_zero(x):
    """``x`` with 0 for NaN and inf."""
    return tl.where(finite(x), x, tl.zeros_like(x))


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


@triton.constexpr_function
def room(width):
    """The power of two at or above 2 sqrt(width): rows of ``width`` elements under 2 are no longer."""
    return 8 if width <= 16 else 16 if width <= 64 else 32


@triton.jit
def shortening(q):
    """Of each row of operands q (M, D) a power of two that makes it no longer than 1, and not by much shorter: (M,).

    Exact but for lengths that no power of two in range mends, so that products made with it in one kernel are those of
    the very vector that another makes with it.
    """
    return inverse_power(power_of_two(tl.max(tl.abs(q.to(tl.float32)), 1))) * (1 / room(q.shape[1]))


@triton.jit
def visible(row, key, at, window, CAUSAL: tl.constexpr):
    """Whether queries ``row`` see ``key``s; shapes broadcast. ``window``: the latest keys that one sees, or None."""
    if CAUSAL:
        seen = (key < at.k_stop) & (key <= row + at.diagonal)
        if window is not None:
            seen = seen & (key > row + (at.diagonal - window))
        return seen
    else:
        return (key < at.k_stop) & (row == row)


@triton.jit
def keys_seen(row, at, window, CAUSAL: tl.constexpr):
    """How many keys queries ``row`` see; 0 or less: none."""
    if CAUSAL:
        stop = tl.minimum(row + 1 + at.diagonal, at.k_stop)
        if window is None:
            return stop
        else:
            return stop - tl.maximum(row + 1 + at.diagonal - window, 0)
    else:
        return row * 0 + at.k_stop


@triton.jit
def sees_some(row, at, window, CAUSAL: tl.constexpr):
    """Whether queries ``row`` are there and see any key."""
    return (row < at.q_len) & (keys_seen(row, at, window, CAUSAL) > 0)


@triton.jit
def own_key(start, at, M: tl.constexpr):
    """A key near the place of each of M queries: its own, if it is there."""
    return clamp(start + tl.arange(0, M) + at.diagonal, 0, at.k_stop - 1)


@triton.jit
def key_range(at, window, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of the keys in tiles of N: where those begin and end that any of the M queries from ``at.start`` on sees, and,
    within, those that each of them sees: (first, whole, whole_stop, stop)."""
    if CAUSAL:
        own = at.start + at.diagonal
        stop = clamp(own + M, 0, at.k_stop)
        whole_stop = clamp(own + 1, 0, at.k_stop) // N * N
        if window is None:
            return 0, 0, whole_stop, stop
        else:
            first = clamp(own + 1 - window, 0, stop)
            first = tl.where(first < stop, first // N * N, stop)
            whole_stop = tl.maximum(whole_stop, first)
            whole = clamp(tl.cdiv(tl.maximum(own + M - window, 0), N) * N, first, whole_stop)
            return first, whole, whole_stop, stop
    else:
        return 0, 0, at.k_stop // N * N, at.k_stop


@triton.jit
def query_range(at, window, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Of the queries in tiles of M: where those begin and end that see any of the N keys from ``at.start`` on, and,
    within, those that see all of them: (first, whole, whole_stop, stop). A tile that the end of the queries cuts needs
    no mask: missing queries have weight 0 from their shift."""
    end = tl.where(at.start < at.k_stop, at.q_len, 0)
    if CAUSAL:
        own = at.start - at.diagonal  # the query at the first key's place
        first = clamp(own, 0, end) // M * M
        last_key = tl.minimum(at.start + N, at.k_stop) - 1
        whole = clamp(tl.cdiv(tl.maximum(last_key - at.diagonal, 0), M) * M, first, tl.cdiv(end, M) * M)
        if window is None:
            return first, whole, end, end
        else:
            stop = clamp(last_key - at.diagonal + window, 0, end)
            whole_stop = tl.maximum(tl.maximum(own + window, 0) // M * M, whole)
            return first, whole, tl.minimum(whole_stop, tl.maximum(stop, whole)), stop
    else:
        return 0, 0, end, end


@triton.jit
def cut_tile(step, first, whole, whole_stop):
    """The tile at ``step`` of those that the mask cuts: those before the whole ones, then those after."""
    before = whole - first
    return step + tl.where(step < before, first, whole_stop - before)


@triton.jit
def sweep_keys(
    body: tl.constexpr, state, rows, keys, at, window, SHAPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """``state`` after ``body`` on each tile of keys that the M queries from ``at.start`` on see.

    Two loops of one body: the tiles that the mask or the length cuts, then those that every query sees whole, if any.
    Matrix instructions of the second loop are still under way when it ends: were it skipped on a path that joins
    there, the assembler would copy accumulators beside them, and wait for every single instruction instead. ``rows`` is
    what ``body`` needs of the queries; ``keys`` the keys' (and values') places and strides.
    """
    first, whole, whole_stop, stop = key_range(at, window, SHAPE.CAUSAL, M, N)
    for step in tl.range(0, whole - first + stop - whole_stop, N):
        j = cut_tile(step, first, whole, whole_stop)
        i_column, j_row = (at.start + tl.arange(0, M))[:, None], (j + tl.arange(0, N))[None, :]
        seen = visible(i_column, j_row, at, window, SHAPE.CAUSAL)
        state = body(state, rows, keys, j, at.k_stop, seen, SHAPE, N, True)
    if whole < whole_stop:
        seen = tl.full([M, N], True, tl.int1)
        for j in tl.range(whole, whole_stop, N):
            state = body(state, rows, keys, j, at.k_stop, seen, SHAPE, N, False)
    return state


@triton.jit
def sweep_queries(
    body: tl.constexpr, state, keys, rows, at, window, SHAPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """``state`` after ``body`` on each tile of queries that see one of the N keys from ``at.start`` on."""
    first, whole, whole_stop, stop = query_range(at, window, SHAPE.CAUSAL, M, N)
    seen = tl.full([N, M], True, tl.int1)
    for step in tl.range(0, whole - first + stop - whole_stop, M):
        i = cut_tile(step, first, whole, whole_stop)
        i_row, j_column = (i + tl.arange(0, M))[None, :], (at.start + tl.arange(0, N))[:, None]
        seen = visible(i_row, j_column, at, window, SHAPE.CAUSAL)
        state = body(state, keys, rows, i, at.q_len, seen, SHAPE, M, True)
    for i in tl.range(whole, whole_stop, M):
        state = body(state, keys, rows, i, at.q_len, seen, SHAPE, M, False)
    return state


@triton.jit
def weights(q, k, factor, shift, seen, TF32: tl.constexpr, CUT: tl.constexpr):
    """2**(factor q.k - shift), and 0 where not ``seen``: (M, N)."""
    s = dot(q, tl.trans(k), zeros(q, tl.trans(k)), TF32) * factor - shift[:, None]
    if CUT:
        s = tl.where(seen, s, float("-inf"))
    return tl.exp2(s)


@triton.jit
def units_of(units, at, n_heads, group):
    """The powers of two that a head's queries, keys and values were divided by."""
    k_unit = units + n_heads + at.k_head
    return tl.load(units + at.q_head), tl.load(k_unit), tl.load(k_unit + n_heads // group)


@triton.jit
def lift_of(tops, k_head, like, D: tl.constexpr):
    """How many times too long, for dk, probes and adjoint probes are taken: a power of two.

    Where keys are tiny beside the root of the ridges, so are both, and float16 would hold neither y nor, beside the
    weights 1 - a of the values, what weighs q and z in (3.4). They are lengthened as far as what they do to a and b,
    next to nothing there, stays about what float16 resolves. ``tops``: see `records.Adjoint`.
    """
    if like.dtype == tl.float16:
        return power_of_two(tl.maximum((1 / tl.maximum(tl.load(tops + k_head) * room(D), 1e-30)) * LIFTED, 1.0))
    else:
        return 1.0


@triton.jit
def ridge_in_units(ridge, k_unit):
    """The ridges in the units of the keys; where keys are tiny beside them, as large as still makes solutions of 0."""
    return tl.minimum(ridge * inverse_power(k_unit) * inverse_power(k_unit), 1e36)


@triton.jit
def query_in_units(q, q_unit, k_unit, origin_ptr, at, HEAD_DIM: tl.constexpr):
    """The queries q (M, D) in the units of the keys, from their origin (heads, D) if that has been moved: (M, D)."""
    x = q.to(tl.float32) * (q_unit * inverse_power(k_unit))
    if origin_ptr is not None:
        dim = tl.arange(0, q.shape[1])
        origin = tl.load(origin_ptr + at.k_head.to(tl.int64) * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        x -= (origin * inverse_power(k_unit))[None, :]
    return x
