"""Every tile size, and why. A table, not tuning: a new length never stalls a run, but for one more kernel to compile
where a pass has a config for few programs.

FLASHLLA_AUTOTUNE=1 times the table's entry against a few others at the first launch of each key instead; keys do not
contain the length, and configs for few programs are not tuned.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# What a query hands on to the keys' pass is kept for whole tiles of queries; none has more than this.
ROWS_PAD = 128


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
# float32 operands. Full products are sums of scalar multiply-adds, unrolled: small tiles keep them in registers.
_SINGLE: dict[int, dict[str, Config]] = {
    16: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    32: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    64: dict.fromkeys(PASSES, Config(32, 32, 4, 1)),
    128: dict.fromkeys(PASSES, Config(32, 32, 8, 1)),
    256: {**dict.fromkeys(PASSES, Config(16, 16, 4, 1)), "dk": Config(16, 16, 8, 1)},
}
_SINGLE_SMALL: dict[int, dict[str, Config]] = {
    **_SINGLE,
    128: {**_SINGLE[128], "dq": Config(16, 32, 8, 1), "dk": Config(16, 32, 8, 1)},
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
    tables = (_SINGLE_SMALL, _SINGLE, _HALF_SMALL, _HALF)[2 * (operand == torch.float16) + large(capability)]
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
