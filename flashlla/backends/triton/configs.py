"""Every tile size, and why. A table, not tuning: a new length never stalls a run, but for one more kernel to compile
where a pass has a config for few programs.

FLASHLLA_AUTOTUNE=1 times the table's entry against a few others at the first launch of each key instead; keys do not
contain the length, and configs for few programs are not tuned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

# What a query hands on to the keys' pass is kept for whole tiles of queries; none has more than this.
ROWS_PAD = 128
# Rows that one program of the cast kernels takes. They do little but load and store: a row stays in its program's
# registers, 128 float32 a thread of four warps at 256 columns.
CAST_ROWS = 64
# Rows of heads that one program casts, if it takes so many programs to fill the chip, and rows of a tile then.
CAST_HEAD, CAST_HEAD_ROWS = 512, 128
# Chunks of a head's rows that look for its largest number side by side; the interpreter has no sides.
CAST_CHUNKS = 16
# Programs that run side by side on a processor: a pass with no more of them takes its config for few, if it has one.
FEW = 2
# Queries that share a preconditioner of gram, and keys a chunk of its sums: a multiple of every tile. Causal queries of
# the first have none; a matrix more costs time and memory, and with 256 it saved 2 % of the iterations.
SEGMENT = 512
# Where queries see no more keys the plain solves of 16-bit inputs have no first guess, which costs the statistics a
# third product and memory its traffic: forward takes 4 to 8 % less (docs/performance.md). With 4096 keys and a large
# ridge it saves most of an iteration.
FEW_KEYS = 1024
# Columns of a panel of Cholesky's factor: the fewest that a matrix product takes, and twice as many are the lanes of a
# warp, which eliminates in [square | 1].
PANEL = 16


def cast_chunks(tokens: int) -> int:
    """The same for sequences of so many ``tokens``, the mean of packed ones: none has much less than a tile."""
    return min(CAST_CHUNKS, 1 << (2 * tokens // CAST_ROWS).bit_length())


class Config(NamedTuple):
    """Queries and keys a tile, warps a program, tiles of the sweep in flight, cap on registers a thread."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton is told."""
        options = {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


# solve_gram is the solve with that preconditioner; what ends in _few is for so few programs that it takes more of them
# to fill the chip, and need not be in a table.
PASSES = ("statistics", "solve", "solve_gram", "output", "moments", "dq", "dk")

# Tables by padded head dim and pass. float16 operands on Hopper and Blackwell's data-centre chips (measured on an H200;
# docs/performance.md): 227 KiB of shared memory a processor, products of whole warp groups.
_HALF: dict[int, dict[str, Config]] = {
    16: dict.fromkeys(PASSES, Config(64, 64, 4, 2)),
    32: {**dict.fromkeys(PASSES, Config(64, 64, 4, 3)), "dk": Config(32, 64, 4, 2)},
    64: {
        "statistics": Config(64, 64, 4, 3, 168),
        "solve": Config(64, 64, 4, 3),
        "solve_gram": Config(64, 64, 4, 3),
        "output": Config(64, 64, 4, 3, 168),
        "moments": Config(64, 64, 4, 3, 168),
        "dq": Config(64, 64, 4, 3),
        "dk": Config(32, 64, 4, 2, 168),
        "dk_few": Config(64, 32, 4, 2),
    },
    128: {
        "statistics": Config(64, 64, 4, 3),
        "solve": Config(64, 32, 4, 3),
        "solve_gram": Config(64, 32, 4, 3),
        "output": Config(128, 64, 8, 3),
        "moments": Config(128, 64, 8, 3),
        "dq": Config(128, 64, 8, 2),
        "dk": Config(32, 64, 4, 2),
        "dk_few": Config(64, 32, 4, 3),
    },
    256: {
        "statistics": Config(64, 32, 8, 2),
        "solve": Config(64, 32, 8, 2),
        "output": Config(64, 32, 8, 2),
        "moments": Config(64, 32, 8, 2),
        "dq": Config(64, 32, 8, 2),
        "dk": Config(32, 32, 8, 1),
    },
}
# The same where Triton is 3.8 or later, whose Gluon the kernels for Hopper are not written in, so that dk is Triton's:
# 3.9 spills 13 % of a window's sweep under the cap, and nothing without, which takes no longer (docs/performance.md).
_HALF_LATER: dict[int, dict[str, Config]] = {**_HALF, 64: {**_HALF[64], "dk": Config(32, 64, 4, 2)}}
# float16 operands on all other chips: as little as 99 KiB of shared memory, products of single warps. Not measured.
_HALF_SMALL: dict[int, dict[str, Config]] = {
    16: dict.fromkeys(PASSES, Config(64, 64, 4, 2)),
    32: dict.fromkeys(PASSES, Config(64, 64, 4, 2)),
    64: {**dict.fromkeys(PASSES, Config(64, 64, 4, 2)), "dk": Config(32, 64, 4, 2)},
    128: {
        **dict.fromkeys(PASSES, Config(64, 32, 4, 2)),
        "solve_gram": Config(32, 32, 4, 2),
        "dk": Config(32, 32, 4, 2),
    },
    256: {**dict.fromkeys(PASSES, Config(32, 32, 4, 2)), "dk": Config(16, 32, 4, 1)},
}
# float32 operands. Full products are sums of scalar multiply-adds, unrolled: small tiles keep them in registers. No
# times of others are on record.
_SINGLE: dict[int, dict[str, Config]] = {
    16: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    32: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    64: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    128: dict.fromkeys(PASSES, Config(32, 32, 8, 1)),
    256: {**dict.fromkeys(PASSES, Config(16, 16, 4, 1)), "dk": Config(16, 16, 8, 1)},
}
# The same in as little as 99 KiB of shared memory: at 128 columns dk of 32 queries takes 108 and dq 96.
_SINGLE_SMALL: dict[int, dict[str, Config]] = {
    **_SINGLE,
    128: {**_SINGLE[128], "dq": Config(16, 32, 8, 1), "dk": Config(16, 32, 8, 1)},
}


class HopperConfig(NamedTuple):
    """Of a kernel in Gluon for Hopper: queries and keys a tile, tiles that are there or on their way, cap on registers
    a thread, warps a program: one for 16 rows of its products.

    Of the solve and the whole forward pass, too: whether sums of weights are a product with ones, and of how many tiles
    of keys these are kept.
    """

    m: int
    n: int
    slots: int
    registers: int | None = None
    warps: int = 4
    ones: bool | None = None
    kept: int | None = None

    def options(self) -> dict[str, Any]:
        """What Triton is told."""
        options = {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "SLOTS": self.slots, "num_warps": self.warps,
        }  # fmt: skip
        options |= {} if self.ones is None else {"ONES": self.ones}
        options |= {} if self.kept is None else {"KEPT": self.kept}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


# By head dim and pass, those that Gluon has faster than _HALF's kernels (docs/performance.md).
HOPPER: dict[int, dict[str, HopperConfig]] = {
    64: {
        "forward": HopperConfig(64, 64, 4, 255, ones=True, kept=5),
        "solve": HopperConfig(64, 64, 4, 255, ones=True, kept=5),
        "dk": HopperConfig(32, 64, 2, 168),
    },
    128: {
        "forward": HopperConfig(64, 32, 4, 255, ones=False, kept=0),
        "solve": HopperConfig(64, 32, 4, 255, ones=False, kept=0),
        "dq": HopperConfig(128, 64, 3, 255, warps=8),
        "dk": HopperConfig(32, 64, 2),
    },
}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of the device; on the CPU, in Triton's interpreter, that of the architecture most configs were made for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Of the device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def large(capability: tuple[int, int]) -> bool:
    """Whether the chip is one that the large tables are for."""
    return capability[0] in (9, 10)


def too_large(head_dim: int, operand: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Why there is no config; None if there is."""
    if operand == torch.float32 and head_dim > 128 and not large(capability) and capability != (8, 0):
        return f"float32 at head dims above 128 (this one is {head_dim}) takes more shared memory than this GPU has"
    return None


def triton_version() -> tuple[int, int]:
    """Of the Triton that is here, (3, 6) say."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def gram_compiles(capability: tuple[int, int]) -> bool:
    """Whether the preconditioner "gram" does: at its sums for Blackwell an assertion of Triton 3.6 ends the process."""
    return capability[0] != 10 or triton_version() != (3, 6)


def gram_widest(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """The widest head dim that the preconditioner "gram" is made for: while it is made, registers hold its matrix, and
    shared memory two of them."""
    return 64 if too_large(256, dtype, capability) else 128


def padded(head_dim: int) -> int:
    """The power of two that tiles of ``head_dim`` columns take up."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def config(name: str, head_dim: int, operand: torch.dtype, capability: tuple[int, int], few: bool = False) -> Config:
    """The config of pass ``name``; ``operand`` is float16 or float32, ``capability`` the device's, (9, 0) say; ``few``:
    that for few programs, if there is one."""
    half = _HALF if triton_version() < (3, 8) else _HALF_LATER
    tables = (_SINGLE_SMALL, _SINGLE, _HALF_SMALL, half)[2 * (operand == torch.float16) + large(capability)]
    table = tables[padded(head_dim)]
    return table.get(f"{name}_few", table[name]) if few else table[name]


def candidates(name: str, head_dim: int, operand: torch.dtype, capability: tuple[int, int]) -> list[Config]:
    """What FLASHLLA_AUTOTUNE=1 times: the table's entry first, then its neighbours."""
    first = config(name, head_dim, operand, capability)
    # dk reads what dq writes of whole tiles of queries: its own may not be larger.
    most = config("dq", head_dim, operand, capability).m if name == "dk" else ROWS_PAD
    others = [
        first._replace(stages=stages, warps=warps, m=m)
        for m in (first.m, 2 * first.m)
        for warps in (4, 8)
        for stages in (2, 3)
        if m <= most
    ]
    return [first, *(c for c in others if c != first)]


def factor_warps(most: int, rows: int) -> int:
    """Warps of a kernel that factors ``rows`` rows by Cholesky: each has at least a panel's height of them."""
    return min(most, rows // PANEL)


def gram_tiles(d: int) -> dict[str, int]:
    """Tiles and warps of `gram_kernel` for padded width ``d``: it holds a (D, D) matrix in registers, and its warps
    factor 2 D rows."""
    warps = factor_warps(4 if d <= 64 else 8, 2 * d)
    return {"BLOCK_M": 64 if d <= 64 else 32, "WARPS": warps, "num_warps": warps, "num_stages": 2}


def gram_sums_tiles(d: int) -> dict[str, int]:
    """The same of `gram_sums_kernel`, which adds up a (D, D) matrix in registers. 64 keys a tile, as in most sweeps: no
    other number was measured."""
    return {"BLOCK_N": 64, "num_warps": 4 if d <= 64 else 8, "num_stages": 2}


class DecodeConfig(NamedTuple):
    """Keys a tile, warps a program, tiles in flight; ``pieces`` of the cache and ``slices``, programs that share the
    rows of a system's moments: None: as many as are fastest.

    ``solve_warps``: one for each scheduler of a processor; 2 and 8 were measured slower (docs/performance.md).
    """

    tile: int
    warps: int
    stages: int
    pieces: int | None = None
    slices: int | None = None
    solve_warps: int = 4

    def thread_rows(self, width: int, half: bool) -> int:
        """Rows of a (tile, width) tile that all the threads hold at once, each with the numbers of one load of 16
        bytes: in sums of every so many rows (`decode_kernels.folded`) nothing goes from thread to thread."""
        numbers = 8 if half else 4
        return min(self.tile, max(1, 32 * self.warps * numbers // max(width, numbers)))

    def programs_a_processor(self) -> int:
        """That its registers hold: one of eight warps, or two of four."""
        return max(1, 8 // self.warps)


# Decode: numbers of moments that the registers of one program hold; half of it where matrix instructions take both
# operands from registers.
DECODE_MOMENTS = 32768
# Widths of keys and values that Hopper's own kernel takes, and tiles in flight: three were measured slower.
DECODE_HOPPER, DECODE_HOPPER_STAGES = (64, 128), 2
# Bytes of scratch memory that one round of launches may take: what is beyond goes in rounds.
DECODE_SCRATCH = 256 * 2**20
# Pieces of a cache: who adds them up holds the means of all in registers.
DECODE_PIECES = 32
# Rows of all pieces' moments that one program adds up: registers hold them all.
MERGE_ROWS = 128
# The residual that decoding iterates to where inputs have 16 bits, and the widest keys whose C registers hold.
DECODE_TOLERANCE, DECODE_WIDEST = 1e-4, 128
# Of the decode solve, which loads ahead by hand (cholesky.py); no other number was measured.
SOLVE_STAGES = 2


def merge_rows(pieces: int) -> int:
    """Rows of the moments that one program adds up of ``pieces``, a power of two; a slice has as many or more."""
    return min(16, MERGE_ROWS // pieces)


def decode_iterations(d: int, half: bool) -> int:
    """Conjugate gradients that decoding tries before it factors a matrix: about as many take as long as that."""
    return d // 2 if half and d <= DECODE_WIDEST else 0


def decode_rows(d: int, v: int, count: int) -> int:
    """Rows of the keys' moments, and as many of the values', that each of ``count`` programs has."""
    return max(16, max(d, v) // count)


def decode_solve_rows(d: int, v: int) -> int:
    """Rows of moments, as the factor's warps share them."""
    return max(1, 1 << (d + v - 1).bit_length())


def decode_slices(d: int, v: int, large: bool) -> int:
    """Programs that share the rows of one system's moments; d and v are powers of two, ``large`` as of `large`."""
    count = 1
    while 2 * decode_rows(d, v, count) * d > (DECODE_MOMENTS if large else DECODE_MOMENTS // 2):
        count *= 2
    return count


def decode_slicings(d: int, v: int, half: bool, large: bool) -> list[int]:
    """Numbers of slices to choose from: more than it takes, where both shares of one fill the 64 rows of a product."""
    least = decode_slices(d, v, large)
    return [least, 2 * least] if half and decode_rows(d, v, 2 * least) >= 32 else [least]


def decode_config(d: int, v: int, half: bool, full: bool, large: bool = True) -> DecodeConfig:
    """For padded widths ``d`` and ``v``; ``full``: float32 products without tensor cores, which are unrolled.

    Of 16-bit inputs three stages and 64 keys were measured best (docs/performance.md). The rest was not measured: half
    the keys where rows are wider than 128, and for float32 small tiles, as in _SINGLE.
    """
    wide = 2 * decode_rows(d, v, decode_slices(d, v, large)) * d >= DECODE_MOMENTS // 2
    if half:
        return DecodeConfig(64 if max(d, v) <= 128 else 32, 8 if wide else 4, 3)
    return DecodeConfig(16 if wide or full else 32, 8 if wide else 4, 1 if full else 2)


class DecodeCost(NamedTuple):
    """Microseconds of a program that makes moments, measured at D = 128 on an H100 (docs/performance.md)."""

    tile: float
    sliced: float  # a tile with fewer rows than registers hold
    rows: float  # to store them, if it has all
    rest: float
    stored: float  # that memory takes for the moments of each program of the launch
    added: float  # to add up the pieces of a system, for each
    read: float  # and that memory takes for each program's


DECODE_COST = DecodeCost(tile=2.7, sliced=4.9, rows=5.7, rest=7.3, stored=0.0, added=0.8, read=0.0)
DECODE_HOPPER_COST = DecodeCost(
    tile=1.8, sliced=float("inf"), rows=0.0, rest=9.6, stored=0.053, added=0.3, read=0.04
)  # fmt: skip


def decode_parts(
    systems: int, tiles: int, slots: int, slices: Sequence[int], width: int = 128, hopper: bool = False
) -> tuple[int, int]:  # fmt: skip
    """Into how many pieces to cut caches of ``tiles`` tiles, and rows into how many of ``slices``, with so many
    ``systems``, ``width`` wide, on a device that runs ``slots`` programs at a time; ``hopper``: of Hopper's own
    kernel."""
    takes, size = DECODE_HOPPER_COST if hopper else DECODE_COST, (width / 128) ** 2

    def cost(parts: tuple[int, int]) -> float:
        pieces, count = parts
        programs = systems * pieces * count
        waves = -(-programs // slots)
        adding = 0.0
        if pieces * count > 1:  # who adds them up goes on to the next power of two
            adding = 0.5 + takes.added * (1 << (pieces - 1).bit_length()) + takes.read * size * programs
        tile = takes.tile if count == min(slices) else takes.sliced
        each = -(-tiles // pieces) * tile + takes.rest + takes.rows * min(slices) / count
        return waves * each + takes.stored * size * programs + adding

    most = max(1, min(DECODE_PIECES, tiles))
    return min(((pieces, count) for pieces in range(1, most + 1) for count in slices), key=cost)
