"""Where the resident kernels (resident_kernels.py) run, and where not, in words.

They run only where FLASHLLA_HOPPER=1 asks for them: they are right, and slower where they were timed
(docs/performance.md).
"""

from __future__ import annotations

from typing import NamedTuple

from flashlla.backends.triton import configs, hopper
from flashlla.backends.triton.runtime import cdiv
from flashlla.problem import Problem


class Share(NamedTuple):
    """What of a solve, or of a forward pass, is a resident kernel's."""

    q_tiles: int  # tiles of queries, from the first
    k_tiles: int  # tiles of keys that any of them sees, at most


def unsupported(problem: Problem) -> str | None:
    """Why the resident solve does not run for this problem; None where it does."""
    if (reason := hopper.unsupported(problem.device, problem.dtype)) is not None:
        return reason
    if problem.head_dim not in configs.RESIDENT:
        widths = ", ".join(map(str, configs.RESIDENT))
        return f"it takes head dims of {widths}, and this one is {problem.head_dim}"
    if solves(problem) is None:
        most = configs.RESIDENT[problem.head_dim][-1].tiles * configs.RESIDENT_TILE
        return f"it takes queries that see at most {most} keys, and none of these is known to"
    return None


def solves(problem: Problem) -> Share | None:
    """The share of the solve alone."""
    return share(problem, configs.RESIDENT[problem.head_dim][-1].tiles)


def attends(problem: Problem) -> Share | None:
    """The share of the whole forward pass."""
    found = share(problem, configs.RESIDENT_FORWARD.get(problem.head_dim, 0))
    # With other masks its kernel is out of registers, and waits for every single product.
    if found is None or problem.v_dim != problem.head_dim or problem.mask.padded or not problem.mask.causal:
        return None
    # With a window later queries see no more keys than the last of these: better to solve all of them alike.
    return None if problem.mask.window and found.q_tiles < cdiv(problem.q_len, configs.RESIDENT_TILE) else found


def share(problem: Problem, most: int) -> Share | None:
    """Of the queries, those that see up to ``most`` tiles of keys; None if there are none."""
    tile, mask = configs.RESIDENT_TILE, problem.mask
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
