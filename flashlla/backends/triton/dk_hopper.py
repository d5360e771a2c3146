"""dk and dv of 16-bit inputs in Gluon for Hopper: what `backward.dk_kernel` does, with its products under way together.

Plain Triton waits for each of a tile's first four products before it issues the next. Here they are issued at once, and
each is waited for where it is needed; the next tile's operands come meanwhile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from flashlla.backends.triton.primitives import (
    LOG2E,
    NUMBERS,
    TOP,
    handed_on,
    inverse_power,
    keys_of,
    lift_of,
    outside,
    place,
    power_of_two,
    query_range,
    units_of,
    visible,
)
from flashlla.backends.triton.sweep_hopper import barrier, fetch_rows, lanes, products, ring_of, tile_at, tiles_of


@gluon.jit
def numbers_of(M: gl.constexpr, SLOTS: gl.constexpr):
    """A ring for one of the numbers of each query."""
    return gl.allocate_shared_memory(gl.float32, [SLOTS, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def fetch(rings, slot, bases, step, ranges, q_len, M: gl.constexpr):
    """Begin to load what the ``step``-th tile of queries takes: a tile for each of the first ``rings``, zero beyond the
    last query and of no step that there is, and the queries' numbers."""
    vectors, numbers, stride = bases
    tiles, of_rows = rings
    there = step < ranges[4]
    start, length = tile_at(step, ranges, M), gl.where(there, q_len, 0)
    for i in gl.static_range(len(tiles)):
        fetch_rows(tiles[i].index(slot), vectors[i], start, length)
    WARPS: gl.constexpr = gl.num_warps()
    column = gl.arange(0, M, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    mask = column < gl.where(there, M, 0)
    for i in gl.static_range(len(of_rows)):
        async_copy.async_copy_global_to_shared(of_rows[i].index(slot), numbers + i * stride + start + column, mask=mask)
    async_copy.commit_group()


@gluon.jit
def add_tiles(
    state, steps_from, steps_to, k, v, rings, bases, ranges, factor, kappa, gain_bits, at, window,
    CUT: gl.constexpr, SHAPE: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """``state``, dk and dv, after the tiles of these steps. `backward.dk_body` has the equations; weights stand
    transposed, (N, M)."""
    dk, dv = state
    N: gl.constexpr = k.shape[0]
    tiles, of_rows = rings
    SLOTS: gl.constexpr = tiles[0].shape[0]
    slot = steps_from % SLOTS
    WEIGHTS: gl.constexpr = products(N, M)
    KEYS: gl.constexpr = dk.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    zero = gl.zeros([N, M], gl.float32, WEIGHTS)
    OF_ROWS: gl.constexpr = gl.SliceLayout(0, WEIGHTS)
    column = gl.arange(0, M, layout=OF_ROWS)
    for step in range(steps_from, steps_to):
        start = tile_at(step, ranges, M)
        # All warps have this tile, and are done with the one before it, whose place the next one to come takes.
        async_copy.wait_group(SLOTS - 2)
        fence_async_shared()
        barrier()
        shift = of_rows[0].index(slot).load(OF_ROWS) - gain_bits  # (M,), as the next four
        z_size = of_rows[1].index(slot).load(OF_ROWS)
        rest = of_rows[2].index(slot).load(OF_ROWS)
        before = gl.where(slot == 0, SLOTS - 1, slot - 1)
        fetch(rings, before, bases, step + SLOTS - 1, ranges, at.q_len, M)
        q, z, do, y_neg = tiles[0].index(slot), tiles[1].index(slot), tiles[2].index(slot), tiles[3].index(slot)
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        a = warpgroup_mma(k, z.permute((1, 0)), zero, use_acc=False, is_async=True)
        e = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
        e = warpgroup_mma(k, y_neg.permute((1, 0)), e, is_async=True)
        s = warpgroup_mma_wait(3, deps=(s,)) * factor - shift[None, :]
        if CUT:
            key = at.start + gl.arange(0, N, layout=gl.SliceLayout(1, WEIGHTS))
            s = gl.where(visible((start + column)[None, :], key[:, None], at, window, SHAPE.CAUSAL), s, float("-inf"))
        w = gl.exp2(s)
        a, w = warpgroup_mma_wait(2, deps=(a, w))
        a = rest[None, :] - a * z_size[None, :]  # 1 - a of (2.2)
        value = gl.convert_layout((w * a).to(gl.float16), OPERAND)
        dv = warpgroup_mma(value, do, dv, is_async=True)  # (3.5)
        dk = warpgroup_mma(value, y_neg, dk, is_async=True)  # (3.4), and the next two
        e_mean = of_rows[3].index(slot).load(OF_ROWS)
        push = of_rows[4].index(slot).load(OF_ROWS)
        e = warpgroup_mma_wait(2, deps=(e,)) - e_mean[None, :]  # (3.2)
        logit = gl.convert_layout((w * (a * (e * kappa) + push[None, :])).to(gl.float16), OPERAND)
        probe = gl.convert_layout((w * e * -z_size[None, :]).to(gl.float16), OPERAND)
        dk = warpgroup_mma(logit, q, dk, is_async=True)
        dk = warpgroup_mma(probe, z, dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    return dk, dv


@gluon.jit
def store_keys(out, at, x, WIDTH: gl.constexpr):
    """``x`` (N, D) to the program's rows of a `Strided` (B, Hkv, Sk, WIDTH) tensor."""
    row = at.start + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, x.type.layout))
    dim = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
    pointers = keys_of(out, at) + (row.to(gl.int64) * out.stride_s)[:, None] + dim[None, :]
    x = gl.where((row < at.k_stop)[:, None], x, 0.0)  # beyond, zero weights met nothing that was masked
    gl.store(pointers, x.to(out.ptr.dtype.element_ty), mask=(row < at.k_len)[:, None])


@gluon.jit(do_not_specialize=[*NUMBERS, "rows_len"])
def dk_hopper_kernel(
    q_in, k_in, v_in, do_ptr, y_neg_ptr, z_ptr, units, rows_in, rows_len, tops, dk_out, dv_out,
    seqlens, window, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, scale,
    GROUP: gl.constexpr, SLOTS: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `backward.dk_kernel` does, where keys and values are as wide as their tiles."""
    at = place(
        seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_N, SHAPE.CAUSAL, True, lanes(),
        IN_TURNS=True,
    )  # fmt: skip
    if outside(at, at.k_len, seqlens.cu_k):
        return
    D: gl.constexpr = SHAPE.BLOCK_D
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], gl.float16)
    KEYS: gl.constexpr = products(BLOCK_N, D)
    k = gl.allocate_shared_memory(gl.float16, [BLOCK_N, D], TILE)
    v = gl.allocate_shared_memory(gl.float16, [BLOCK_N, D], TILE)
    tiles = (
        ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS),
    )  # fmt: skip
    of_rows = (
        numbers_of(BLOCK_M, SLOTS), numbers_of(BLOCK_M, SLOTS), numbers_of(BLOCK_M, SLOTS),
        numbers_of(BLOCK_M, SLOTS), numbers_of(BLOCK_M, SLOTS),
    )  # fmt: skip
    rings = tiles, of_rows
    fetch_rows(k, keys_of(k_in, at), at.start, at.k_stop)
    fetch_rows(v, keys_of(v_in, at), at.start, at.k_stop)
    async_copy.commit_group()
    _, k_unit, v_unit = units_of(units, at, n_heads, group)
    # As large as the weights of these heads' queries can be without overflow.
    top = gl.load(tops + n_heads // group + at.k_head)
    gain = power_of_two((1 / gl.maximum(top, 1e-30)) * TOP)
    lift = lift_of(tops, at.k_head, gl.zeros([BLOCK_N, D], gl.float16, KEYS), D)
    ranges = tiles_of(query_range(at, window, SHAPE.CAUSAL, BLOCK_M, BLOCK_N), BLOCK_M)
    cut, steps = ranges[3], ranges[4]
    dk = gl.zeros([BLOCK_N, D], gl.float32, KEYS)
    dv = gl.zeros([BLOCK_N, D], gl.float32, KEYS)
    q_first = q_in.ptr + at.sequence.to(gl.int64) * q_in.stride_b + at.q_first.to(gl.int64) * q_in.stride_s
    for member in range(0, GROUP):
        kappa = scale * gl.load(units + at.q_head + member) * k_unit
        row = (at.q_row + member * q_len.to(gl.int64)) * D
        bases = (
            (q_first + (at.head + member).to(gl.int64) * q_in.stride_h, z_ptr + row, do_ptr + row, y_neg_ptr + row),
            handed_on(rows_in.ptr, at, at.q_head + member, heads, rows_len, seqlens.cu_q), rows_in.stride,
        )  # fmt: skip
        barrier()  # all are done with the head before
        for step in gl.static_range(SLOTS - 1):
            fetch(rings, step, bases, step, ranges, at.q_len, BLOCK_M)
        dk, dv = add_tiles(
            (dk, dv), 0, cut, k, v, rings, bases, ranges, kappa * LOG2E, kappa * lift,
            gl.log2(gain), at, window, True, SHAPE, BLOCK_M,
        )  # fmt: skip
        dk, dv = add_tiles(
            (dk, dv), cut, steps, k, v, rings, bases, ranges, kappa * LOG2E, kappa * lift,
            gl.log2(gain), at, window, False, SHAPE, BLOCK_M,
        )  # fmt: skip
        async_copy.wait_group(0)  # what was fetched for no step
    unit = inverse_power(gain)
    store_keys(dk_out, at, dk * (unit * v_unit * inverse_power(k_unit) / lift), SHAPE.HEAD_DIM)
    store_keys(dv_out, at, dv * unit, SHAPE.V_DIM)
