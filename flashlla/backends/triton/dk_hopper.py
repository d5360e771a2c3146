"""dk and dv of 16-bit inputs in Gluon for Hopper: what `backward.dk_kernel` does, with its products under way together.

Plain Triton waits for each of a tile's first four products before it issues the next. Here they are issued at once, and
each is waited for where it is needed; the next tile's operands come meanwhile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

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
from flashlla.backends.triton.resident_parts import barrier
from flashlla.backends.triton.sweep_hopper import begin, fetch, fetch_rows, products, ring_of, sweep, tiles_of


@gluon.jit
def dk_body(
    state, rows, rings, slot, before, coming, start, at, window, CUT: gl.constexpr, SHAPE: gl.constexpr,
    OPTIONS: gl.constexpr,
):  # fmt: skip
    """As `backward.dk_body`; weights stand transposed, (N, M)."""
    dk, dv = state
    k, v, numbers, stride, factor, kappa, gain_bits, zero = rows
    N: gl.constexpr = zero.shape[0]
    M: gl.constexpr = zero.shape[1]
    WEIGHTS: gl.constexpr = zero.type.layout
    KEYS: gl.constexpr = dk.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, KEYS, 2)
    column = gl.arange(0, M, layout=gl.SliceLayout(0, WEIGHTS))
    fetch(rings, coming, M)  # Triton has warps meet where products and loads of a ring take turns: here, and no more
    q, z, do, y_neg = rings[0].index(slot), rings[1].index(slot), rings[2].index(slot), rings[3].index(slot)
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    a = warpgroup_mma(k, z.permute((1, 0)), zero, use_acc=False, is_async=True)
    e = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    e = warpgroup_mma(k, y_neg.permute((1, 0)), e, is_async=True)
    of_rows = numbers + start + column
    shift = gl.load(of_rows) - gain_bits  # (M,), as the next four
    z_size = gl.load(of_rows + stride)
    rest = gl.load(of_rows + 2 * stride)
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
    e_mean = gl.load(of_rows + 3 * stride)
    push = gl.load(of_rows + 4 * stride)
    e = warpgroup_mma_wait(2, deps=(e,)) - e_mean[None, :]  # (3.2)
    logit = gl.convert_layout((w * (a * (e * kappa) + push[None, :])).to(gl.float16), OPERAND)
    probe = gl.convert_layout((w * e * -z_size[None, :]).to(gl.float16), OPERAND)
    dk = warpgroup_mma(logit, q, dk, is_async=True)
    dk = warpgroup_mma(probe, z, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
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
    GROUP: gl.constexpr, SLOTS: gl.constexpr, ONES: gl.constexpr, SHAPE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What `backward.dk_kernel` does, where keys and values are as wide as their tiles."""
    at = place(seqlens, n_heads, heads, group, q_len, k_len, max_seqlen_q, max_seqlen_k, BLOCK_N, SHAPE.CAUSAL, True)
    if outside(at, at.k_len, seqlens.cu_k):
        return
    D: gl.constexpr = SHAPE.BLOCK_D
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], gl.float16)
    KEYS: gl.constexpr = products(BLOCK_N, D)
    k = gl.allocate_shared_memory(gl.float16, [BLOCK_N, D], TILE)
    v = gl.allocate_shared_memory(gl.float16, [BLOCK_N, D], TILE)
    rings = (
        ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS), ring_of(BLOCK_M, D, SLOTS)
    )  # fmt: skip
    fetch_rows(k, keys_of(k_in, at), k_in.stride_s, at.start, at.k_stop)
    fetch_rows(v, keys_of(v_in, at), v_in.stride_s, at.start, at.k_stop)
    async_copy.commit_group()
    _, k_unit, v_unit = units_of(units, at, n_heads, group)
    # As large as the weights of these heads' queries can be without overflow.
    top = gl.load(tops + n_heads // group + at.k_head)
    gain = power_of_two((1 / gl.maximum(top, 1e-30)) * TOP)
    lift = lift_of(tops, at.k_head, gl.zeros([BLOCK_N, D], gl.float16, KEYS), D)
    ranges = tiles_of(query_range(at, window, SHAPE.CAUSAL, BLOCK_M, BLOCK_N), BLOCK_M)
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, products(BLOCK_N, BLOCK_M))
    state = gl.zeros([BLOCK_N, D], gl.float32, KEYS), gl.zeros([BLOCK_N, D], gl.float32, KEYS)  # dk, dv
    q_first = q_in.ptr + at.sequence.to(gl.int64) * q_in.stride_b + at.q_first.to(gl.int64) * q_in.stride_s
    for member in range(0, GROUP):
        kappa = scale * gl.load(units + at.q_head + member) * k_unit
        row = (at.q_row + member * q_len.to(gl.int64)) * D
        places = (
            (q_first + (at.head + member).to(gl.int64) * q_in.stride_h, q_in.stride_s), (z_ptr + row, D),
            (do_ptr + row, D), (y_neg_ptr + row, D),
        )  # fmt: skip
        sources = places, at.q_len
        barrier()  # all are done with the head before
        begin(rings, sources, ranges, BLOCK_M, SLOTS - 1)
        numbers = handed_on(rows_in.ptr, at, at.q_head + member, heads, rows_len, seqlens.cu_q)
        rows = k, v, gl.multiple_of(numbers, 16), rows_in.stride, kappa * LOG2E, kappa * lift, gl.log2(gain), zero
        state, _last = sweep(
            dk_body, state, rows, rings, sources, ranges, at, window, SHAPE, BLOCK_M, SLOTS - 1
        )  # fmt: skip
    dk, dv = state
    unit = inverse_power(gain)
    store_keys(dk_out, at, dk * (unit * v_unit * inverse_power(k_unit) / lift), SHAPE.HEAD_DIM)
    store_keys(dv_out, at, dv * unit, SHAPE.V_DIM)
