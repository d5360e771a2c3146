"""Operands: one pass before the kernels instead of work for each tile that they load.

q, k and v become contiguous and finite, divided by a power of two a head, of 16 bits in float16; grad_o, times the
guard, by a power of two a row; the probe by its length. All of it is decided on the device.
"""

import triton
import triton.language as tl

from flashlla.backends.triton.primitives import (
    NUMBERS,
    finite_or_zero,
    inverse_or_zero,
    inverse_power,
    key_at,
    load_numbers,
    load_queries,
    load_tile,
    load_vectors,
    outside,
    packed_tile,
    place,
    power_of_two,
    room,
    rounded,
    sequence_extent,
    store_numbers,
    store_rows,
    store_tile,
    store_vectors,
)
from flashlla.backends.triton.records import Seqlens

# No unit is smaller: the square of a query in units of such keys is a float32. Smaller keys have fewer digits.
LEAST_UNIT: tl.constexpr = tl.constexpr(3.469446951953614e-18)  # 2**-58
# What numbers other than keys may be: all that are finite.
MOST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def cleaned(tile, most):
    """``tile`` with 0 for NaN and what is larger than ``most``; and of each row NaN if it had such, else 0: (M,)."""
    sound = tl.abs(tile) <= most
    return tl.where(sound, tile, 0.0), tl.sum(tl.where(sound, 0.0, float("nan")), 1)


@triton.jit
def rows_of_operand(
    program, tensor, seqlens, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, OVER_KEYS: tl.constexpr
):  # fmt: skip
    """Where a head of q, or (OVER_KEYS) of k or v, begins; how many rows it has; and the place of its first among the
    rows of a contiguous (B, H, S). ``program`` counts the heads."""
    if OVER_KEYS:
        heads = heads // group
        cu, total, max_seqlen = seqlens.cu_k, k_len, max_seqlen_k
    else:
        cu, total, max_seqlen = seqlens.cu_q, q_len, max_seqlen_q
    sequence, head = program // heads, program % heads
    first, length = sequence_extent(cu, sequence, total, max_seqlen)
    if OVER_KEYS:
        stop = length if seqlens.k is None else key_at(seqlens.k, sequence, length)
        if seqlens.k_start is not None:
            start = key_at(seqlens.k_start, sequence, length)
            first, stop = first + start, tl.maximum(stop - start, 0)
        length = stop
    base = tensor.ptr + sequence.to(tl.int64) * tensor.stride_b + head.to(tl.int64) * tensor.stride_h
    base += first.to(tl.int64) * tensor.stride_s
    row = (program if cu is None else head).to(tl.int64) * total + first
    return base, length, row


@triton.jit
def tile_of_operand(
    program, seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK: tl.constexpr,
    OVER_KEYS: tl.constexpr,
):  # fmt: skip
    """The head of q, or (OVER_KEYS) of k or v, of this ``program``, counted through all sequences; whether there is
    one; and the first row of its tile."""
    own_heads = heads // group if OVER_KEYS else heads  # of a sequence
    cu, total = (seqlens.cu_k, k_len) if OVER_KEYS else (seqlens.cu_q, q_len)
    if seqlens.slots is None:
        tiles = tl.cdiv(tl.maximum(max_seqlen_q, max_seqlen_k), BLOCK)
        head, tile = program // tiles, program % tiles
        return head, head < n_heads // heads * own_heads, tile * BLOCK
    else:
        sequence, tile = packed_tile(cu, program // heads, n_heads // heads, total, BLOCK)
        own = program % heads
        return sequence * own_heads + own, (own < own_heads) & (tile >= 0), tile * BLOCK


@triton.jit
def searched(
    base, stride, first, stop, most, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """The largest finite magnitude of rows ``first`` to ``stop`` of a (., WIDTH) matrix, and 1 where some number is
    not finite or is larger than ``most``, else 0."""
    found, flaw = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for i in tl.range(first, stop, M):
        tile = tl.abs(load_tile(base, stride, i, stop, WIDTH, M, COLUMNS, True).to(tl.float32))  # (M, COLUMNS)
        sound = tile <= most
        found = tl.maximum(found, tl.max(tl.where(sound, tile, 0.0), 1))
        flaw = tl.maximum(flaw, tl.max(tl.where(sound, 0.0, 1.0), 1))
    return tl.max(found, 0), tl.max(flaw, 0)


@triton.jit
def unit_of(top):
    """What numbers no larger than ``top`` are divided by: the power of two under it."""
    return tl.where(top > 0, tl.maximum(power_of_two(top), LEAST_UNIT), 1.0)


@triton.jit
def cast_tile(
    base, stride, i, length, most, flaw, row_flaws, origin_ptr, head, unit, out, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Rows from i on of a head, less its origin, over ``unit`` to ``out``; where it has a ``flaw``, 0 for what is not
    finite, and which rows have such to ``row_flaws``."""
    tile = load_tile(base, stride, i, length, WIDTH, M, COLUMNS, True).to(tl.float32)  # (M, COLUMNS)
    if flaw > 0:
        tile, row_flaw = cleaned(tile, most)
        store_rows(row_flaws, i, length, row_flaw)
    if origin_ptr is not None:
        dim = tl.arange(0, COLUMNS)
        tile -= tl.load(origin_ptr + head.to(tl.int64) * WIDTH + dim, mask=dim < WIDTH, other=0.0)[None, :]
    store_tile(out, WIDTH, i, length, tile * inverse_power(unit), WIDTH)


@triton.jit(do_not_specialize=[*NUMBERS, "chunk"])
def largest_kernel(
    q_in, k_in, v_in, k_most, largest, flawed,
    seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, chunk,
    SHAPE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each of CHUNKS chunks of each head's rows, and 1 where some number is not finite,
    else 0: of q's heads, of k's, of v's. A key beyond k_most is not finite."""
    program, part = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    n_kv_heads = n_heads // group
    tensors = (q_in, k_in, v_in)
    for which in tl.static_range(3):
        here = (tl.program_id(1) == which) & ((which == 0) | (program < n_kv_heads))
        if here:
            WIDTH: tl.constexpr = SHAPE.V_DIM if which == 2 else SHAPE.HEAD_DIM
            COLUMNS: tl.constexpr = SHAPE.BLOCK_V if which == 2 else SHAPE.BLOCK_D
            base, length, _ = rows_of_operand(
                program, tensors[which], seqlens, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, which > 0
            )
            stop = tl.minimum((part + 1) * chunk, length)
            most = k_most if which == 1 else MOST
            found, flaw = searched(base, tensors[which].stride_s, part * chunk, stop, most, WIDTH, COLUMNS, BLOCK_M)
            slot = tl.where(which == 0, 0, n_heads + (which - 1) * n_kv_heads) + program
            tl.store(largest + slot * CHUNKS + part, found)
            tl.store(flawed + slot * CHUNKS + part, flaw)


@triton.jit(do_not_specialize=NUMBERS)
def cast_kernel(
    q_in, k_in, v_in, k_most, origin_ptr, largest, flawed, outs, units, flaws,
    seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
    SHAPE: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q, k and v divided by their heads' units, contiguous, 0 for what is not finite; and these units, the powers
    of two under the largest. k from its heads' origins (sequences Hkv, D), if there are any.

    What was not finite goes to ``flaws``, rows of heads that have such numbers alone. Rows that no sequence has are not
    written. What `largest_kernel` has read last, and a cache may still hold, comes first.
    """
    n_kv_heads = n_heads // group
    tensors, row_flaws = (q_in, k_in, v_in), (flaws.q, flaws.k, flaws.v)
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    for which in tl.static_range(3):
        program, there, i = tile_of_operand(
            turn, seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, which > 0
        )
        if (2 - tl.program_id(1) == which) & there:
            WIDTH: tl.constexpr = SHAPE.V_DIM if which == 2 else SHAPE.HEAD_DIM
            COLUMNS: tl.constexpr = SHAPE.BLOCK_V if which == 2 else SHAPE.BLOCK_D
            slot = tl.where(which == 0, 0, n_heads + (which - 1) * n_kv_heads) + program
            unit = unit_of(tl.max(tl.load(largest + slot * CHUNKS + tl.arange(0, CHUNKS)), 0))
            flaw = tl.max(tl.load(flawed + slot * CHUNKS + tl.arange(0, CHUNKS)), 0)
            tl.store(units + slot, unit, mask=i == 0)
            tl.store(flaws.heads + slot, flaw, mask=i == 0)
            base, length, row = rows_of_operand(
                program, tensors[which], seqlens, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, which > 0
            )
            cast_tile(
                base, tensors[which].stride_s, i, length, k_most if which == 1 else MOST, flaw, row_flaws[which] + row,
                origin_ptr if which == 1 else None, program, unit, outs[which] + row * WIDTH, WIDTH, COLUMNS, BLOCK_M,
            )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def cast_heads_kernel(
    q_in, k_in, v_in, k_most, origin_ptr, outs, units, flaws,
    seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`largest_kernel` and `cast_kernel` in one, where heads are many and short: a program has all rows of a head, and
    reads them twice, the second time from a cache."""
    program = tl.program_id(0)
    n_kv_heads = n_heads // group
    tensors, row_flaws = (q_in, k_in, v_in), (flaws.q, flaws.k, flaws.v)
    for which in tl.static_range(3):
        if (tl.program_id(1) == which) & ((which == 0) | (program < n_kv_heads)):
            WIDTH: tl.constexpr = SHAPE.V_DIM if which == 2 else SHAPE.HEAD_DIM
            COLUMNS: tl.constexpr = SHAPE.BLOCK_V if which == 2 else SHAPE.BLOCK_D
            base, length, row = rows_of_operand(
                program, tensors[which], seqlens, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, which > 0
            )
            most = k_most if which == 1 else MOST
            top, flaw = searched(base, tensors[which].stride_s, 0, length, most, WIDTH, COLUMNS, BLOCK_M)
            unit = unit_of(top)
            slot = tl.where(which == 0, 0, n_heads + (which - 1) * n_kv_heads) + program
            tl.store(units + slot, unit)
            tl.store(flaws.heads + slot, flaw)
            for i in tl.range(0, length, BLOCK_M):
                cast_tile(
                    base, tensors[which].stride_s, i, length, most, flaw, row_flaws[which] + row,
                    origin_ptr if which == 1 else None, program, unit, outs[which] + row * WIDTH, WIDTH, COLUMNS,
                    BLOCK_M,
                )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def cast_rows_kernel(
    grad_o, guard, probe, do_out, z_out, cu_seqlens_q, slots,
    n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row by row do = guard grad_o / its unit, so that no row of do is longer than 1 and none but zeros is short; and
    probe = z times its unit, z of unit length. Of a row that is not finite the unit is NaN."""
    seqlens = Seqlens(cu_seqlens_q, cu_seqlens_q, None, None, None, slots)
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_M, False, False)
    if outside(at, at.q_len, cu_seqlens_q):
        return
    D: tl.constexpr = SHAPE.BLOCK_D
    V: tl.constexpr = SHAPE.BLOCK_V
    tile = load_queries(grad_o, at, SHAPE.V_DIM, BLOCK_M, V).to(tl.float32)  # (M, V)
    tile = tile * load_numbers(guard, at, BLOCK_M, 1.0)[:, None]
    tile, flaw = cleaned(tile, MOST)
    top = tl.max(tl.abs(tile), 1)  # (M,)
    unit = power_of_two(top * room(V))  # elements under 2 / room: the row's length is under 1
    store_vectors(do_out.ptr, at, tile * inverse_power(unit)[:, None], SHAPE.V_DIM)
    store_numbers(do_out.unit, at, unit + flaw)
    z = load_vectors(probe, at, SHAPE.HEAD_DIM, BLOCK_M, D)  # (M, D)
    z_size = tl.sqrt(tl.sum(z * z, 1))  # (M,)
    z = rounded(z * inverse_or_zero(z_size)[:, None], tl.zeros([1], z_out.ptr.dtype.element_ty), SHAPE.TF32)
    store_vectors(z_out.ptr, at, finite_or_zero(z), SHAPE.HEAD_DIM)
    store_numbers(z_out.unit, at, z_size)
