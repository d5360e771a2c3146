"""Where the resident solve (resident_kernels.py) runs, and where not, in words.

It runs only where FLASHLLA_RESIDENT=1 asks for it: its solutions have been compared with float64 on an H100, its times
with the plain solve's have not (docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

from flashlla.backends.triton import configs, hopper
from flashlla.backends.triton.runtime import cdiv
from flashlla.problem import Problem


class Share(NamedTuple):
    """What of a solve is the resident kernel's."""

    q_tiles: int  # tiles of queries, from the first
    k_tiles: int  # tiles of keys that any of them sees, at most


def unsupported(problem: Problem) -> str | None:
    """Why the resident solve does not run for this problem; None where it does."""
    if (reason := hopper.unsupported(problem.device, problem.dtype)) is not None:
        return reason
    if problem.head_dim not in configs.RESIDENT:
        widths = ", ".join(map(str, configs.RESIDENT))
        return f"it takes head dims of {widths}, and this one is {problem.head_dim}"
    if not problem.mask.causal or problem.mask.padded or problem.group > 1 or problem.q_len != problem.k_len:
        return "it has been tried with causal masks alone, as many queries as keys, and no shared heads"
    if share(problem) is None:
        most = configs.RESIDENT[problem.head_dim][-1].tiles * configs.RESIDENT_TILE
        return f"it takes queries that see at most {most} keys, and none of these is known to"
    return None


def share(problem: Problem) -> Share | None:
    """Of the queries, those that see few enough keys; None if there are none."""
    tile, most = configs.RESIDENT_TILE, configs.RESIDENT[problem.head_dim][-1].tiles
    mask = problem.mask
    if mask.packed:  # where a sequence's diagonal lies only the device knows
        window = mask.window or problem.max_seqlen_k
        seen = cdiv(min(problem.max_seqlen_k, window + tile - 1), tile)
        return Share(cdiv(problem.max_seqlen_q, tile), seen) if seen <= most else None
    widest = tiles = 0
    for start in range(0, problem.q_len, tile):
        seen = cdiv(len(mask.span(range(start, start + tile), problem.q_len, problem.k_len)), tile)
        if seen > most:
            break
        widest, tiles = max(widest, seen), tiles + 1
    # The first queries have the shortest sweeps only where causal: elsewhere all see the same keys.
    return Share(tiles, widest) if tiles else None
