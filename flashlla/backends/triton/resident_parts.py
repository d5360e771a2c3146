"""What the resident kernels are made of, in Gluon for Hopper: keys in shared memory, weights in registers.

Letters of the shape comments are those of primitives.py. A tile of weights is held as packed float16, two columns in
an integer.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from flashlla.backends.triton.primitives import finite, visible

# Triton 3.7 has renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def rows_layout(width):
    """Of (64, width) as products give it to one warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def adds(width):
    """Whether rows of weights are summed up by adding, not by a product with ones: there is no room for these."""
    return width > 64


class Chip(NamedTuple):
    """What a program has in shared memory; where it has none of the kind, ``told``."""

    keys: Any  # (slots, N, D)
    x: Any  # (M, D)   the queries, then directions
    k_mean: Any  # (M, D)   float16: an error of it is of second order
    r: Any  # (M, D)
    solution: Any  # (M, D)
    weights: Any  # (tiles, M, N / 2)
    ones: Any  # (N, 8)   a matrix whose product sums up rows, but for `adds`
    told: Any  # (M,)   numbers that all warps are told
    told_left: Any  # (M,)


@gluon.jit
def room_on_chip(PLAN: gl.constexpr, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """A `Chip`, empty but for its ones."""
    HALVES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], gl.float16)
    SINGLES: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    TOLD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, D], gl.float16)
    keys = gl.allocate_shared_memory(gl.float16, [PLAN.slots, N, D], KEYS)
    x = gl.allocate_shared_memory(gl.float16, [M, D], HALVES)
    k_mean = gl.allocate_shared_memory(gl.float16, [M, D], HALVES)
    r = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES)
    told = gl.allocate_shared_memory(gl.float32, [M], TOLD)
    told_left = gl.allocate_shared_memory(gl.float32, [M], TOLD)
    solution, weights, ones = told, told, told
    if not PLAN.far:
        solution = gl.allocate_shared_memory(gl.float32, [M, D], SINGLES)
    if PLAN.shared > 0:
        WEIGHTS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
        weights = gl.allocate_shared_memory(gl.int32, [PLAN.shared, M, N // 2], WEIGHTS)
    if not adds(D):
        WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
        ONES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, 8], gl.float16)
        ones = gl.allocate_shared_memory(gl.float16, [N, 8], ONES, gl.full([N, 8], 1 / 8, gl.float16, WHOLE))
    return Chip(keys, x, k_mean, r, solution, weights, ones, told, told_left)


@gluon.jit
def itself(x):
    """An integer that no compiler knows: what is made of it is made here, not once for several branches, whose
    registers it would take."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def halves(x):
    """Even and odd columns of (M, N), neighbours of which are one thread's: (M, N / 2) each."""
    return gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@gluon.jit
def packed(x):
    """float16 of x (M, N), two columns in an integer: (M, N / 2)."""
    even, odd = halves(x)
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def weighed(w, c):
    """float16 of w c, packed, for w packed (M, N / 2) and c (M, N)."""
    even, odd = halves(c)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 c; cvt.rn.f16x2.f32 c, $3, $2; mul.rn.f16x2 $0, $1, c; }",
        "=r,r,f,f", [w, even, odd], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def weighed_widely(w, c):
    """The same with c as large as may be, where the product is not: it is made in float32."""
    even, odd = halves(c)
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; cvt.f32.f16 y, b;"
        " mul.f32 x, x, $2; mul.f32 y, y, $3; cvt.rn.f16x2.f32 $0, y, x; }",
        "=r,r,f,f", [w, even, odd], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def operand(w, OUT: gl.constexpr):
    """Packed w (M, N / 2) as the left operand of a product with the layout OUT: (M, N)."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [w], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )
    wide = gl.reshape(gl.join(even, odd), [w.shape[0], 2 * w.shape[1]])
    return gl.convert_layout(wide, gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def part_sums(w):
    """Of packed w (M, N / 2) the sums of what each of four threads has of a row: (M, 4)."""
    pairs = gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; cvt.f32.f16 y, b; add.f32 $0, x, y; }",
        "=f,r", [w], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.sum(gl.reshape(pairs, [w.shape[0], w.shape[1] // 4, 4]), 1)


@gluon.jit
def fetch(keys, slot, source, n, N: gl.constexpr):
    """Begin to load tile ``n`` of the keys. Beyond the last key stands the last one again, whose weight there is 0;
    where there is none nothing is loaded, and no sweep will come."""
    D: gl.constexpr = keys.shape[2]
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    k_base, k_stride, first, stop = source
    key = first + n * N + gl.arange(0, N, layout=gl.SliceLayout(1, COPY))
    there = key * 0 < stop
    key = gl.minimum(key, gl.maximum(stop - 1, 0))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    pointers = k_base + (key.to(gl.int64) * k_stride)[:, None] + dim[None, :]
    async_copy.async_copy_global_to_shared(keys.index(slot), pointers, mask=there[:, None])
    async_copy.commit_group()


@gluon.jit
def arrived(pending: gl.constexpr):
    """When all but the last ``pending`` tiles that were fetched are there for all."""
    async_copy.wait_group(pending)
    fence_async_shared()
    barrier()


@gluon.jit
def in_turn(keys, source, turn: gl.constexpr, TILES: gl.constexpr):
    """Tile ``turn`` % TILES of the keys, once it is there: of several rounds, before any sweep."""
    SLOTS: gl.constexpr = keys.shape[0]
    if SLOTS < TILES:
        arrived(0)
        fetch(keys, (turn + 1) % SLOTS, source, (turn + 1) % TILES, keys.shape[1])
    elif turn < TILES:
        arrived(TILES - 1 - turn)
    return keys.index(turn % SLOTS)


@gluon.jit
def logits(s, n: gl.constexpr, row, factor, first, at, window, CAUSAL: gl.constexpr):
    """Products s (M, N) of tile n times ``factor``, -inf where not seen. Tiles that are seen whole have a mask, too:
    without it the assembler finds too few registers, and waits for every single product."""
    LAYOUT: gl.constexpr = s.type.layout
    key = itself(first) + n * s.shape[1] + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    return gl.where(visible(row[:, None], key[None, :], at, window, CAUSAL), s * factor, float("-inf"))


@gluon.jit
def tops(
    chip, source, row, factor, at, window, CAUSAL: gl.constexpr, TILES: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """The largest logits of the queries in chip.x: (M,). The first round."""
    M: gl.constexpr = chip.r.shape[0]
    N: gl.constexpr = chip.keys.shape[1]
    zero = gl.zeros([M, N], gl.float32, SCORES)
    found = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    k = in_turn(chip.keys, source, 0, TILES)
    s = warpgroup_mma(chip.x, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    for n in gl.static_range(TILES):
        s_now = warpgroup_mma_wait(0, deps=(s,))
        if n + 1 < TILES:
            k = in_turn(chip.keys, source, n + 1, TILES)
            s = warpgroup_mma(chip.x, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        s_now = logits(s_now, n, row, factor, source[2], at, window, CAUSAL)
        found = gl.maximum(found, gl.max(s_now, 1))
    return found


@gluon.jit
def weighed_keys(
    chip, source, row, shift, factor, at, window, CAUSAL: gl.constexpr, TILES: gl.constexpr,
    SHARED: gl.constexpr, ROUND: gl.constexpr, SUMS: gl.constexpr, SCORES: gl.constexpr,
    VECTORS: gl.constexpr,
):  # fmt: skip
    """The weights 2**(logits - shift) of the queries in chip.x, packed: TILES of (M, N / 2). And, if SUMS, the sums of
    the keys that they weigh, (M, D), and of themselves, (M,). ROUND: how many rounds there were before."""
    M: gl.constexpr = chip.r.shape[0]
    N: gl.constexpr = chip.keys.shape[1]
    D: gl.constexpr = chip.keys.shape[2]
    ADDS: gl.constexpr = adds(D)
    zero = gl.zeros([M, N], gl.float32, SCORES)
    acc = gl.zeros([M, D], gl.float32, VECTORS)
    totals = no_totals(M, zero, ADDS)
    ws = gl.tuple(())
    for n in gl.static_range(TILES):
        k = in_turn(chip.keys, source, ROUND * TILES + n, TILES)
        s = warpgroup_mma(chip.x, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if SUMS and n > 0:
            if ADDS:
                s, acc = warpgroup_mma_wait(0, deps=(s, acc))
            else:
                s, acc, totals = warpgroup_mma_wait(0, deps=(s, acc, totals))
        else:
            s = warpgroup_mma_wait(0, deps=(s,))
        w = packed(gl.exp2(logits(s, n, row, factor, source[2], at, window, CAUSAL) - shift[:, None]))
        if SUMS:
            acc = warpgroup_mma(operand(w, VECTORS), k, acc, is_async=True)
            totals = totalled(w, chip.ones, totals, ADDS)
        if n < SHARED:
            chip.weights.index(n).store(w)
            ws += (0,)
        else:
            ws += (w,)
    total = gl.zeros([M], gl.float32, gl.SliceLayout(1, VECTORS))
    if SUMS:
        acc, total = summed(acc, totals, ADDS, VECTORS)
    return ws, acc, total


@gluon.jit
def no_totals(M: gl.constexpr, zero, ADDS: gl.constexpr):
    """Where sums of rows begin: of what each thread has, or of a product with ones."""
    if ADDS:
        return part_sums(packed(zero))
    else:
        return gl.zeros([M, 8], gl.float32, rows_layout(8))


@gluon.jit
def totalled(w, ones, totals, ADDS: gl.constexpr):
    """``totals`` and the sums of the rows of packed w."""
    if ADDS:
        return totals + part_sums(w)
    else:
        return warpgroup_mma(operand(w, rows_layout(8)), ones, totals, is_async=True)


@gluon.jit
def summed(acc, totals, ADDS: gl.constexpr, VECTORS: gl.constexpr):
    """When all products are done: acc, and totals (M,)."""
    if ADDS:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        acc, totals = warpgroup_mma_wait(0, deps=(acc, totals))
    return acc, gl.convert_layout(gl.sum(totals, 1), gl.SliceLayout(1, VECTORS))


@gluon.jit
def tile_of(ws, shared, n: gl.constexpr, nought, SHARED: gl.constexpr, LIKE: gl.constexpr):
    """Tile n of the weights; ``nought`` is 0, but no compiler knows: what it is addressed with is not kept through a
    loop."""
    if n < SHARED:
        return shared.index(n + nought).load(LIKE)
    else:
        return ws[n]


@gluon.jit
def next_slot(slot, SLOTS: gl.constexpr):
    return gl.where(slot == SLOTS - 1, 0, slot + 1)


@gluon.jit
def sweep(
    chip, x_mean, ws, source, slot, nought, zero, VECTORS: gl.constexpr, TILES: gl.constexpr, AHEAD: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """sum_j w_ij c_ij k_j (M, D) and sum_j w_ij c_ij (M,), c_ij = x_i.k_j - x_mean_i, of the directions in chip.x.

    AHEAD: the next tile's first product is under way while this one's second is; it takes the registers of a tile.
    Keys that are not all there come one tile ahead, the first into ``slot``.
    """
    M: gl.constexpr = chip.r.shape[0]
    N: gl.constexpr = chip.keys.shape[1]
    D: gl.constexpr = chip.keys.shape[2]
    SLOTS: gl.constexpr = chip.keys.shape[0]
    LIKE: gl.constexpr = packed(zero).type.layout
    ADDS: gl.constexpr = adds(D)
    acc = gl.zeros([M, D], gl.float32, VECTORS)
    totals = no_totals(M, zero, ADDS)
    if AHEAD:
        c = warpgroup_mma(chip.x, chip.keys.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        c = warpgroup_mma_wait(0, deps=(c,))
        for n in gl.static_range(TILES):
            if n + 1 < TILES:
                k = chip.keys.index(n + 1).permute((1, 0))
                c_next = warpgroup_mma(chip.x, k, zero, use_acc=False, is_async=True)
            w = weighed(tile_of(ws, chip.weights, n, nought, SHARED, LIKE), c - x_mean[:, None])
            acc = warpgroup_mma(operand(w, VECTORS), chip.keys.index(n), acc, is_async=True)
            totals = totalled(w, chip.ones, totals, ADDS)
            if n + 1 < TILES:
                c = warpgroup_mma_wait(1 if ADDS else 2, deps=(c_next,))
    else:
        for n in gl.static_range(TILES):
            if SLOTS < TILES:
                arrived(0)
                k = chip.keys.index(slot)
                slot = next_slot(slot, SLOTS)
                fetch(chip.keys, slot, source, (n + 1) % TILES, N)
            else:
                k = chip.keys.index(n)
            c = warpgroup_mma(chip.x, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            if n == 0:
                c = warpgroup_mma_wait(0, deps=(c,))
            elif ADDS:
                c, acc = warpgroup_mma_wait(0, deps=(c, acc))
            else:
                c, acc, totals = warpgroup_mma_wait(0, deps=(c, acc, totals))
            w = weighed(tile_of(ws, chip.weights, n, nought, SHARED, LIKE), c - x_mean[:, None])
            acc = warpgroup_mma(operand(w, VECTORS), k, acc, is_async=True)
            totals = totalled(w, chip.ones, totals, ADDS)
    acc, total = summed(acc, totals, ADDS, VECTORS)
    return acc, total, slot


@gluon.jit
def values_weighed(
    chip, minus, rest, ws, source, v_source, slot, nought, zero, VECTORS: gl.constexpr, TILES: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """sum_j w_ij (rest_i + minus_i x_i.k_j) v_j (M, V) of the directions in chip.x. Values take the places of keys."""
    M: gl.constexpr = chip.r.shape[0]
    N: gl.constexpr = chip.keys.shape[1]
    V: gl.constexpr = chip.keys.shape[2]
    SLOTS: gl.constexpr = chip.keys.shape[0]
    LIKE: gl.constexpr = packed(zero).type.layout
    us = gl.tuple(())
    for n in gl.static_range(TILES):
        if SLOTS < TILES:
            arrived(0)
            k = chip.keys.index(slot)
            slot = next_slot(slot, SLOTS)
            fetch(chip.keys, slot, source if n + 1 < TILES else v_source, (n + 1) % TILES, N)
        else:
            k = chip.keys.index(n)
        c = warpgroup_mma(chip.x, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        c = warpgroup_mma_wait(0, deps=(c,)) * minus[:, None] + rest[:, None]
        if SLOTS == TILES:
            barrier()  # all have read it
            fetch(chip.keys, n, v_source, n, N)
        u = weighed_widely(tile_of(ws, chip.weights, n, nought, SHARED, LIKE), c)
        if n < SHARED:
            chip.weights.index(n + nought).store(u)
            us += (0,)
        else:
            us += (u,)
    acc = gl.zeros([M, V], gl.float32, VECTORS)
    for n in gl.static_range(TILES):
        if SLOTS < TILES:
            if n > 0:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            arrived(0)
            v = chip.keys.index(slot)
            slot = next_slot(slot, SLOTS)
            if n + 1 < TILES:
                fetch(chip.keys, slot, v_source, n + 1, N)
        else:
            arrived(TILES - 1 - n)
            v = chip.keys.index(n)
        u = tile_of(us, chip.weights, n, nought, SHARED, LIKE)
        acc = warpgroup_mma(operand(u, VECTORS), v, acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def finite_or_zero(x):
    """`primitives.finite_or_zero`, whose zeros have no layout."""
    return gl.where(finite(x), x, 0.0)


@gluon.jit
def largest_of(told):
    """Of the numbers of all rows, in every warp: no sum across warps, which takes two more barriers."""
    LANES: gl.constexpr = gl.BlockedLayout([told.shape[0] // 32], [32], [4], [0])
    return gl.max(told.load(LANES), 0)


@gluon.jit
def left_by_step(square, inverse_curvature, lowest, highest):
    """`solve.left_by_step`, given |A x|^2, whose sum need not wait for that of the curvature."""
    spread = square * inverse_curvature * inverse_curvature
    apart = (highest - lowest) * inverse_curvature
    return gl.maximum(gl.where(spread > 1, spread - 1, 0.0), apart * apart)
