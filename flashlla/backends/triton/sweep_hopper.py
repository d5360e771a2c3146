"""What kernels in Gluon for Hopper are made of: a tile of queries and its sweep over tiles of keys.

A tile's products are issued at once, and with them the last product of the tile before; each is waited for where it is
needed. Keys, and values where a pass takes them, come ahead through rings of tiles in shared memory.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashlla.backends.triton.primitives import LANES, cut_tile, finite, queries_of, visible

# Triton 3.7 has renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def products(rows, columns):
    """How threads have a product of so many rows: a warp 16 of them."""
    return gl.NVMMADistributedLayout([3, 0], [rows // 16, 1], [16, columns, 16])


class Layouts(NamedTuple):
    """How threads have what belongs to a program's M queries."""

    scores: gl.NVMMADistributedLayout  # logits of a tile of keys (M, N)
    vectors: gl.NVMMADistributedLayout  # (M, D)
    score_rows: gl.SliceLayout  # a number of each query (M,), as logits meet it
    rows: gl.SliceLayout  # and as vectors do
    operand: gl.DotOperandLayout  # vectors in registers, of which products make logits
    halves: gl.NVMMASharedLayout  # those in shared memory, as float16


@gluon.constexpr_function
def layouts(M, N, D):
    scores, vectors = products(M, N), products(M, D)
    found = (
        scores, vectors, gl.SliceLayout(1, scores), gl.SliceLayout(1, vectors), gl.DotOperandLayout(0, scores, 2),
        gl.NVMMASharedLayout.get_default_for([M, D], gl.float16),
    )  # fmt: skip
    return Layouts(*map(gl.constexpr, found))  # as Triton 3.6 takes a member


@gluon.jit
def lanes():
    """What `primitives.packed_tile` looks among."""
    WARPS: gl.constexpr = gl.num_warps()
    return gl.arange(0, LANES, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))


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
def finite_or_zero(x):
    """`primitives.finite_or_zero`, whose zeros have no layout."""
    return gl.where(finite(x), x, 0.0)


@gluon.jit
def masked(s, row, start, at, window, SHAPE: gl.constexpr):
    """Logits s (M, N) of queries ``row`` and keys ``start`` on, -inf where a query does not see a key."""
    LAYOUT: gl.constexpr = s.type.layout
    key = start + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    return gl.where(visible(row[:, None], key[None, :], at, window, SHAPE.CAUSAL), s, float("-inf"))


@gluon.jit
def fetch_rows(shared, base, start, length):
    """Begin to load rows ``start`` on of a contiguous (length, D) matrix, zero beyond it."""
    ROWS: gl.constexpr = shared.shape[0]
    D: gl.constexpr = shared.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    AT_ONCE: gl.constexpr = WARPS * (256 // D)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    # A thread's own place first, then what is the same for all: its addresses are one and constants.
    pointers = base + start.to(gl.int64) * D + ((row % AT_ONCE)[:, None] * D + dim[None, :])
    pointers += (row // AT_ONCE * (AT_ONCE * D))[:, None]
    async_copy.async_copy_global_to_shared(shared, pointers, mask=(row < length - start)[:, None])


@gluon.jit
def ring_of(ROWS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr):
    """A ring of tiles in shared memory: one for each tensor, or Triton would wait for one's tile before the other's."""
    return gl.allocate_shared_memory(
        gl.float16, [SLOTS, ROWS, D], gl.NVMMASharedLayout.get_default_for([ROWS, D], gl.float16)
    )


@gluon.jit
def tile_at(step, ranges, TILE: gl.constexpr):
    """Where the ``step``-th tile of a sweep begins: those that the mask cuts come first, then those that are whole."""
    first, whole, whole_stop, cut, _ = ranges
    start = gl.where(step < cut, cut_tile(step * TILE, first, whole, whole_stop), whole + (step - cut) * TILE)
    return gl.multiple_of(start, TILE)


@gluon.jit
def fetch(rings, coming, TILE: gl.constexpr):
    """Begin to load a tile, to be called by a body once it has begun its products; of no step that there is, zeros."""
    slot, step, sources, ranges = coming
    bases, stop = sources
    start, stop = tile_at(step, ranges, TILE), gl.where(step < ranges[4], stop, 0)
    for i in gl.static_range(len(rings)):
        fetch_rows(rings[i].index(slot), bases[i], start, stop)
    async_copy.commit_group()


@gluon.jit
def tiles_of(ranges, TILE: gl.constexpr):
    """Of `primitives.key_range` or `query_range`, less their ends, how many tiles the mask cuts, and how many there
    are."""
    first, whole, whole_stop, stop = ranges
    cut = gl.cdiv(whole - first, TILE) + gl.cdiv(gl.maximum(stop - whole_stop, 0), TILE)
    return first, whole, whole_stop, cut, cut + gl.cdiv(gl.maximum(whole_stop - whole, 0), TILE)


@gluon.jit
def begin(rings, sources, ranges, TILE: gl.constexpr, AHEAD: gl.constexpr):
    """Begin to load the first tiles of a sweep."""
    for n in gl.static_range(AHEAD):
        fetch(rings, (n, ranges[4] * 0 + n, sources, ranges), TILE)


@gluon.jit
def sweep_part(
    body: gl.constexpr, so_far, rows, steps_from, steps_to, rings, sources, ranges, at, window,
    CUT: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr, AHEAD: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """What ``so_far`` becomes by ``body`` on the tiles of these steps: the state, and where in the rings the next tile
    is, and the last."""
    state, slot, before = so_far
    SLOTS: gl.constexpr = rings[0].shape[0]
    for step in range(steps_from, steps_to):
        # All warps have this tile, and are done with the one whose place the next to come takes.
        async_copy.wait_group(AHEAD - 1)
        barrier()
        free = gl.where(slot + AHEAD < SLOTS, slot + AHEAD, slot + AHEAD - SLOTS)
        coming = free, step + AHEAD, sources, ranges
        start = tile_at(step, ranges, TILE)
        state = body(state, rows, rings, slot, before, coming, start, at, window, CUT, SHAPE, OPTIONS)
        before = slot
        slot = gl.where(slot == SLOTS - 1, 0, slot + 1)
    return state, slot, before


@gluon.jit
def sweep_from(
    body: gl.constexpr, so_far, rows, cut_from, whole_from, rings, sources, ranges, at, window,
    SHAPE: gl.constexpr, TILE: gl.constexpr, AHEAD: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """`sweep` from these steps on, of the tiles that the mask cuts and of those that are whole."""
    so_far = sweep_part(
        body, so_far, rows, cut_from, ranges[3], rings, sources, ranges, at, window, True, SHAPE, TILE, AHEAD, OPTIONS
    )  # fmt: skip
    state, _, last = sweep_part(
        body, so_far, rows, whole_from, ranges[4], rings, sources, ranges, at, window, False, SHAPE, TILE,
        AHEAD, OPTIONS,
    )  # fmt: skip
    async_copy.wait_group(0)  # what was fetched for no step
    return state, last


@gluon.jit
def sweep_storing(
    body: gl.constexpr, so_far, rows, cut_from, whole_from, rings, sources, ranges, at, window, STORED: gl.constexpr,
    SHAPE: gl.constexpr, TILE: gl.constexpr, AHEAD: gl.constexpr, OPTIONS: gl.constexpr,
):  # fmt: skip
    """`sweep_from` of a body that stores something of each of the first STORED tiles: its options are OPTIONS and of
    how many of its tiles, "all", "some" or "none". A choice in the loop of whole tiles would have the compiler put its
    exponentials by themselves, where nothing else is issued."""
    so_far = sweep_part(
        body, so_far, rows, cut_from, ranges[3], rings, sources, ranges, at, window, True, SHAPE, TILE, AHEAD,
        (OPTIONS, "some" if STORED > 0 else "none"),
    )  # fmt: skip
    if STORED > 0:
        stop = gl.maximum(whole_from, gl.minimum(ranges[4], STORED))
        so_far = sweep_part(
            body, so_far, rows, whole_from, stop, rings, sources, ranges, at, window, False, SHAPE, TILE, AHEAD,
            (OPTIONS, "all"),
        )  # fmt: skip
        whole_from = stop
    state, _, last = sweep_part(
        body, so_far, rows, whole_from, ranges[4], rings, sources, ranges, at, window, False, SHAPE, TILE, AHEAD,
        (OPTIONS, "none"),
    )  # fmt: skip
    async_copy.wait_group(0)  # what was fetched for no step
    return state, last


@gluon.jit
def sweep(
    body: gl.constexpr, state, rows, rings, sources, ranges, at, window,
    SHAPE: gl.constexpr, TILE: gl.constexpr, AHEAD: gl.constexpr, OPTIONS: gl.constexpr = None,
):  # fmt: skip
    """``state`` after ``body`` on each tile, of which `begin` has begun to load the first; and where in the rings the
    last is. AHEAD: tiles on their way, of a ring's one less than it has room for beside those that products read."""
    fence_async_shared()  # what ``rows`` has in shared memory
    nought = ranges[4] * 0
    so_far = state, nought, nought
    return sweep_from(
        body, so_far, rows, nought, ranges[3], rings, sources, ranges, at, window, SHAPE, TILE, AHEAD, OPTIONS
    )  # fmt: skip


@gluon.jit
def load_queries(x, at, row, there, D: gl.constexpr, VECTORS: gl.constexpr):
    """The program's rows of a `Strided` (B, Hq, Sq, D) tensor."""
    dim = gl.arange(0, D, layout=gl.SliceLayout(0, VECTORS))
    pointers = queries_of(x, at) + row.to(gl.int64)[:, None] * x.stride_s + dim[None, :]
    return gl.load(pointers, mask=there[:, None], other=0.0)


@gluon.jit
def store_queries(x_out, at, row, there, x):
    VECTORS: gl.constexpr = x.type.layout
    dim = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, VECTORS))
    pointers = queries_of(x_out, at) + row.to(gl.int64)[:, None] * x_out.stride_s + dim[None, :]
    gl.store(pointers, x.to(x_out.ptr.dtype.element_ty), mask=there[:, None])
