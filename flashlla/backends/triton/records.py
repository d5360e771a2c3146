"""What a kernel's arguments are grouped by. Triton takes each for a tuple, whose members kernels name as the host does.

Where an integer inside a tuple becomes 1 or a multiple of 16, or ceases to be, the kernel is compiled anew: strides may
be there, which seldom change; numbers that do, lengths before all, are arguments of their own (`primitives.NUMBERS`).
"""

from __future__ import annotations

from typing import NamedTuple

from flashlla.backends.triton.plan import Buffer


class Strided(NamedTuple):
    """A (B, H, S, ...) tensor whose last dimension is contiguous. Packed: stride_b is 0."""

    ptr: Buffer
    stride_b: int
    stride_h: int
    stride_s: int


class Columns(NamedTuple):
    """One whose last dimension need not be."""

    ptr: Buffer
    stride_b: int
    stride_h: int
    stride_s: int
    stride_d: int


class Seqlens(NamedTuple):
    """Lengths that lie on the device, as in `problem.Inputs`."""

    cu_q: Buffer | None = None  # (sequences + 1,)
    cu_k: Buffer | None = None
    k: Buffer | None = None  # (B,)   one past the last key
    k_start: Buffer | None = None  # (B,)   the first key
    own_end: Buffer | None = None  # (B,)   one past the last query's own key; None: one past the tensor's last key
    slots: Buffer | None = None  # cu_q, where tiles are those of `primitives.packed_tile`; None: the longest's, of all


class Shape(NamedTuple):
    """What every kernel of a call is compiled for, beside its tiles: a tl.constexpr."""

    HEAD_DIM: int
    V_DIM: int
    BLOCK_D: int  # HEAD_DIM and V_DIM as tiles have them: powers of two
    BLOCK_V: int
    CAUSAL: bool
    TF32: bool  # whether products of float32 operands may round them so


class Operands(NamedTuple):
    """q, k and v as the kernels have them: contiguous, in their dtype and units."""

    q: Buffer
    k: Buffer
    v: Buffer


class Flaws(NamedTuple):
    """What was not finite. Of ``heads`` that have nothing of the kind no row is told."""

    heads: Buffer  # (heads of q, of k, of v)   1 where some number is not, else 0
    q: Buffer  # (B, Hq, Sq)   NaN where the row has one, else 0
    k: Buffer  # (B, Hkv, Sk)
    v: Buffer  # (B, Hkv, Sk)


class Scaled(NamedTuple):
    """Rows of operands (B, Hq, Sq, ...), and what each is to be multiplied by, (B, Hq, Sq)."""

    ptr: Buffer
    unit: Buffer


class Adjoint(NamedTuple):
    """What the solve for the adjoint probe takes and gives beside what every solve does."""

    b_size: Buffer  # (B, Hq, Sq)   the lengths of the right-hand sides
    probe: Buffer  # (B, Hq, Sq, D)
    # (2, B Hkv)   of float16 what no probe or adjoint probe is longer than, in the units of the keys, or more; and for
    # the pass of dq to fill
    tops: Buffer
    z_y: Buffer  # (B, Hq, Sq)   to be filled
    y: Scaled | None  # the solution itself, to be filled, of float16; None: where the solve's goes it is exact


class Ended(NamedTuple):
    """How a solve went, to be filled: (B, Hq, Sq) each."""

    iterations: Buffer
    residual: Buffer
    converged: Buffer


class Preconditioner(NamedTuple):
    """What gram.py makes for each segment of queries."""

    inverse: Buffer  # (B Hq, segments, D, D)
    use: Buffer  # (B Hq, segments)   1 where there is one


class Tolerances(NamedTuple):
    atol: float
    rtol: float
    coarse: float  # what rtol may be where queries see many keys


class HandedOn(NamedTuple):
    """Five numbers a query that dq hands on to dk, of float32 six, (5 or 6, B Hq, rows_len)."""

    ptr: Buffer
    stride: int


class Caches(NamedTuple):
    """Decoding: from which to which keys of a cache are in use, (B,) each."""

    stop: Buffer
    stop_stride: int
    start: Buffer | None  # None: from the first
    start_stride: int


class BlockTable(NamedTuple):
    """Decoding: which page holds a sequence's keys, (B, pages)."""

    ptr: Buffer
    stride_b: int
    stride_s: int


class Moments(NamedTuple):
    """Decoding: the sums over pieces of the cache, or over all of it. See `decode_moments_kernel`."""

    moments: Buffer
    sums: Buffer
    scalars: Buffer
    offset: Buffer
    arrivals: Buffer  # (systems,)   programs of a system that have added up their rows of all pieces
