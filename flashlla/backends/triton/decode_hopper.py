"""Decoding's moments in Gluon for Hopper: a tile's products run while the next tile is weighed.

In decode_kernels.py, whose letters and numbers these are, loads, sums, products and the waits between them take turns,
and registers hold one program a processor, so nothing else runs meanwhile. Here operands lie in shared memory twice:
the matrix unit reads one tile's while the next one's are written. Keys and values are on their way STAGES tiles ahead,
each row in half a warp, which sums up its logit by itself. Two barriers a tile are left of five.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from flashlla.backends.triton.decode_kernels import (
    HEADROOM,
    LEAST_UNIT,
    LOOK,
    MOST_HEADROOM,
    SCALARS,
    fitting_unit,
    key_offsets,
    key_span,
    least_unit,
    load_query_ridge,
    of_head,
    page_of,
    piece_of,
    store_scalars,
)
from flashlla.backends.triton.primitives import LOG2E, clamp, finite, inverse_power, ridge_in_units

# Triton 3.7 has renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def finite_or_zero(x):
    """`primitives.finite_or_zero`, whose zeros have no layout."""
    return gl.where(finite(x), x, 0.0)


@gluon.jit
def folded(x, ROWS: gl.constexpr):
    """`decode_kernels.folded`."""
    return gl.sum(gl.reshape(x, [x.shape[0] // ROWS, ROWS, x.shape[1]]), 0)


@gluon.jit
def added(a, b, c, d):
    return a + c, b + d


@gluon.jit
def added_and_largest(a, b, c, d):
    return a + c, gl.maximum(b, d)


@gluon.jit
def keys_at(j, low, end, T: gl.constexpr, LOADS: gl.constexpr):
    """Keys j to j + T, those outside of ``low`` to ``end`` the nearest within: (T,)."""
    return clamp(j + gl.arange(0, T, layout=gl.SliceLayout(1, LOADS)), low, end - 1)


@gluon.jit
def pages_at(table, pages, key, PAGE: gl.constexpr):
    """The pages that ``key`` (T,) lie in; 0 where the cache has none."""
    return key * 0 if PAGE == 0 else page_of(table, pages, key // PAGE, None)


@gluon.jit
def rows_at(head, key, page, PAGE: gl.constexpr, D: gl.constexpr, LOADS: gl.constexpr):
    """Pointers to the rows of ``key`` in a cache: (T, D)."""
    if PAGE == 0:
        offset = key.to(gl.int64) * head.stride_s
    else:
        offset = page.to(gl.int64) * head.stride_b + (key % PAGE).to(gl.int64) * head.stride_s
    return head.ptr + offset[:, None] + gl.arange(0, D, layout=gl.SliceLayout(0, LOADS))[None, :]


@gluon.jit
def fetch(k_ring, v_ring, slot, k_head, v_head, key, page, PAGE: gl.constexpr, LOADS: gl.constexpr):
    """Begin to load a tile of keys and values."""
    D: gl.constexpr = k_ring.shape[2]
    async_copy.async_copy_global_to_shared(k_ring.index(slot), rows_at(k_head, key, page, PAGE, D, LOADS))
    async_copy.async_copy_global_to_shared(v_ring.index(slot), rows_at(v_head, key, page, PAGE, D, LOADS))
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["first_pair", "kv_heads", "group", "q_len", "k_len", "window", "pieces", "pages"])
def decode_moments_hopper_kernel(
    q_in, k_in, v_in, caches, block_table, ridge_in, parts_out,
    first_pair, kv_heads, group, q_len, k_len, window, pieces, pages, scale,
    SHAPE: gl.constexpr, PAGE: gl.constexpr, FAR: gl.constexpr, BLOCK_T: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """`decode_kernels.decode_moments_kernel` of one slice, where keys and values are as wide as BLOCK_D says."""
    T: gl.constexpr = BLOCK_T
    D: gl.constexpr = SHAPE.BLOCK_D
    ROWS: gl.constexpr = 256 // D * num_warps  # that all threads hold at once
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    KEYS: gl.constexpr = gl.SliceLayout(1, LOADS)
    DIMS: gl.constexpr = gl.SliceLayout(0, LOADS)
    MOMENTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    RING: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([T, D], gl.float16)

    program = gl.program_id(0)
    member = program % (group * q_len)
    piece = program // (group * q_len) % pieces
    pair = program // (group * q_len * pieces)
    sequence, kv_head = (first_pair + pair) // kv_heads, (first_pair + pair) % kv_heads
    q_head, n = kv_head * group + member // q_len, member % q_len
    dim = gl.arange(0, D, layout=DIMS)
    q_base = q_in.ptr + sequence.to(gl.int64) * q_in.stride_b + q_head.to(gl.int64) * q_in.stride_h + n * q_in.stride_s
    q = gl.load(q_base + dim * q_in.stride_d).to(gl.float32)  # (D,)
    ridge = load_query_ridge(ridge_in, sequence, q_head, n)
    start, stop = key_span(caches, sequence, n, q_len, k_len, window)
    first, each, active = piece_of(start, stop, pieces, T)
    if piece >= active:
        return
    system = pair.to(gl.int64) * (group * q_len) + member
    begin, end = (first + piece * each) * T, gl.minimum((first + (piece + 1) * each) * T, stop)
    low = gl.maximum(begin, start)
    k_head, v_head = of_head(k_in, sequence, kv_head, PAGE), of_head(v_in, sequence, kv_head, PAGE)
    table = (block_table.ptr + sequence.to(gl.int64) * block_table.stride_b, block_table.stride_s)
    k_ring = gl.allocate_shared_memory(k_in.ptr.dtype.element_ty, [STAGES, T, D], RING)
    v_ring = gl.allocate_shared_memory(v_in.ptr.dtype.element_ty, [STAGES, T, D], RING)
    x_operands = gl.allocate_shared_memory(gl.float16, [2, T, D], OPERANDS)
    v_operands = gl.allocate_shared_memory(gl.float16, [2, T, D], OPERANDS)
    for ahead in gl.static_range(STAGES):
        key = keys_at(begin + ahead * T, low, end, T, LOADS)
        fetch(k_ring, v_ring, ahead, k_head, v_head, key, pages_at(table, pages, key, PAGE), PAGE, LOADS)

    k_last = k_head.ptr + key_offsets(k_head, table, pages, stop - 1, None, PAGE)
    v_last = v_head.ptr + key_offsets(v_head, table, pages, stop - 1, None, PAGE)
    origin = finite_or_zero(gl.load(k_last + dim).to(gl.float32))  # (D,)
    v_first = finite_or_zero(gl.load(v_last + dim).to(gl.float32))  # (D,)
    k_least = least_unit(ridge)
    offset = origin - q
    q = q * (scale * LOG2E)
    k_unit = fitting_unit(gl.max(gl.abs(origin), 0), k_least)
    v_unit = fitting_unit(gl.max(gl.abs(v_first), 0), LEAST_UNIT)

    row, column = gl.arange(0, D, layout=gl.SliceLayout(1, MOMENTS)), gl.arange(0, D, layout=gl.SliceLayout(0, MOMENTS))
    nothing, nobody = gl.zeros([T, D], gl.float32, LOADS), gl.zeros([T], gl.float32, KEYS)
    nought = gl.to_tensor(0.0)
    s_origin = nought  # all logits are taken from that of the last key
    m = nought + float("-inf")
    highest = m
    k_total, v_total, total = gl.zeros([D], gl.float32, DIMS), gl.zeros([D], gl.float32, DIMS), nought
    k_moments, v_moments = gl.zeros([D, D], gl.float32, MOMENTS), gl.zeros([D, D], gl.float32, MOMENTS)
    sweeps = 2  # that may yet be repeated
    while sweeps >= 0:
        top, omega = nobody + float("-inf"), nobody
        k_sum, v_sum = folded(nothing, ROWS), folded(nothing, ROWS)
        k_scale, v_scale = inverse_power(k_unit), inverse_power(v_unit)
        k_made = warpgroup_mma_init(gl.zeros([D, D], gl.float32, MOMENTS))
        v_made = warpgroup_mma_init(gl.zeros([D, D], gl.float32, MOMENTS))
        page = pages_at(table, pages, keys_at(begin + STAGES * T, low, end, T, LOADS), PAGE)
        tile, slot = 0, 0
        # Of a sweep without a tile the assembler would fear that its zeros meet the products of another.
        gl.assume(begin < end)
        for j in range(begin, end, T):
            async_copy.wait_group(STAGES - 1)
            k, v = k_ring.index(slot).load(LOADS), v_ring.index(slot).load(LOADS)  # (T, D)
            key = j + gl.arange(0, T, layout=KEYS)
            x = k.to(gl.float32) - origin[None, :]
            s = gl.sum(x * q[None, :], 1) + s_origin
            s = gl.where((key >= start) & (key < end), s, float("-inf"))  # (T,)
            top = gl.maximum(top, s)
            fade = nought + 1.0
            if tile % LOOK == 0:
                so_far = gl.max(top, 0)
                if so_far > m + HEADROOM:
                    fade = gl.exp2(m - so_far)
                    m = so_far
                    omega *= fade
                    k_sum *= fade
                    v_sum *= fade
            root = gl.exp2(0.5 * (s - m))  # (T,) the square roots of the weights
            omega += root * root
            x = (x * (root * k_scale)[:, None]).to(gl.float16)
            k_sum += folded(x.to(gl.float32) * root[:, None], ROWS)
            x_operands.index(tile % 2).store(x)
            v_scaled = (v.to(gl.float32) * (root * v_scale)[:, None]).to(gl.float16)
            v_sum += folded(v_scaled.to(gl.float32) * root[:, None], ROWS)
            v_operands.index(tile % 2).store(v_scaled)
            k_moments, v_moments = warpgroup_mma_wait(0, deps=(k_made, v_made))
            if fade != 1:
                k_moments *= fade
                v_moments *= fade
            fence_async_shared()
            barrier()
            x_now, v_now = x_operands.index(tile % 2), v_operands.index(tile % 2)
            k_made = warpgroup_mma(x_now.permute((1, 0)), x_now, k_moments, is_async=True)
            v_made = warpgroup_mma(v_now.permute((1, 0)), x_now, v_moments, is_async=True)
            fetch(
                k_ring, v_ring, slot, k_head, v_head, keys_at(j + STAGES * T, low, end, T, LOADS), page, PAGE, LOADS
            )  # fmt: skip
            # Known before it is wanted: who waits for a number of a page begins no load.
            page = pages_at(table, pages, keys_at(j + (STAGES + 1) * T, low, end, T, LOADS), PAGE)
            tile, slot = tile + 1, (slot + 1) % STAGES
        k_moments, v_moments = warpgroup_mma_wait(0, deps=(k_made, v_made))
        k_total, v_total = gl.reduce((k_sum, v_sum), 0, added)
        k_total, v_total = gl.convert_layout(k_total, DIMS), gl.convert_layout(v_total, DIMS)
        total, highest = gl.reduce((omega, top), 0, added_and_largest)
        mean = k_total / total  # (D,) from the origin
        mean_2 = gl.sum(mean * mean, 0)
        k_bad, v_bad = ~finite(mean_2), gl.max(gl.where(finite(v_total), 0, 1), 0) > 0
        far = ~k_bad & (mean_2 > FAR * ridge_in_units(ridge, k_unit))
        if far:
            trace = gl.sum(gl.sum(gl.where(row[:, None] == column[None, :], k_moments, 0.0), 1), 0)
            far = mean_2 > 8 * gl.maximum(trace / total - mean_2, 0.0)  # than the spread
        risen = highest > m + MOST_HEADROOM
        if (sweeps > 0) & (k_bad | v_bad | far | risen):
            sweeps -= 1
            m = gl.where(risen, highest, m)
            if far:
                step = mean * k_unit
                origin += step
                offset += step
                s_origin += gl.sum(step * q, 0)
            k_top, v_top = nobody, nobody
            for j in range(begin, end, T):
                key = keys_at(j, low, end, T, LOADS)
                page = pages_at(table, pages, key, PAGE)
                x = gl.load(rows_at(k_head, key, page, PAGE, D, LOADS)).to(gl.float32) - origin[None, :]
                v_far = gl.load(rows_at(v_head, key, page, PAGE, D, LOADS)).to(gl.float32)
                k_top = gl.maximum(k_top, gl.max(gl.abs(finite_or_zero(x)), 1))
                v_top = gl.maximum(v_top, gl.max(gl.abs(finite_or_zero(v_far)), 1))
            if k_bad | far:
                k_unit = fitting_unit(gl.max(k_top, 0), k_least)
            if v_bad:
                v_unit = fitting_unit(gl.max(v_top, 0), LEAST_UNIT)
            async_copy.wait_group(0)
            barrier()
            for ahead in gl.static_range(STAGES):
                key = keys_at(begin + ahead * T, low, end, T, LOADS)
                fetch(k_ring, v_ring, ahead, k_head, v_head, key, pages_at(table, pages, key, PAGE), PAGE, LOADS)
        else:
            sweeps = -1
    async_copy.wait_group(0)

    fade = gl.exp2(m - highest)
    place = system * pieces + piece
    store_scalars(parts_out.scalars + place * SCALARS, highest, total * fade, k_unit, v_unit)
    moments_ptr, sums = parts_out.moments + place * 2 * D * D, parts_out.sums + place * 2 * D
    square = row[:, None] * D + column[None, :]
    gl.store(moments_ptr + square, k_moments * fade)
    gl.store(moments_ptr + D * D + square, v_moments * fade)
    gl.store(parts_out.arrivals + system, 0, mask=piece == 0)
    gl.store(parts_out.offset + place * D + dim, offset)
    gl.store(sums + dim, k_total * fade)
    gl.store(sums + D + dim, v_total * fade)
