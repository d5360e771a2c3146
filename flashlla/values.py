"""Checks on the numbers that a call's tensors hold.

To look at them waits for the device. So they are made on the CPU, where that costs nothing, and elsewhere only where
the environment asks for them; and inside the operators, which torch.compile runs as they are.
"""

from __future__ import annotations

import itertools
import os

import torch
from torch import Tensor

from flashlla.problem import Inputs, Problem


def looked_at(device: torch.device) -> bool:
    """Whether numbers that tensors on ``device`` hold are checked."""
    return device.type == "cpu" or os.environ.get("FLASHLLA_CHECK") == "1"


def check_values(problem: Problem, inputs: Inputs) -> None:
    """Refuse numbers that are out of range."""
    if not looked_at(problem.device):
        return
    _check_ridge(inputs.ridge_lambda)
    if inputs.seqlens_k is not None:
        _check_keys("seqlens_k", inputs.seqlens_k, problem.k_len)
    if inputs.seqstarts_k is not None:
        _check_keys("seqstarts_k", inputs.seqstarts_k, problem.k_len)
    if inputs.block_table is not None:
        _check_pages(inputs.block_table, inputs.k.shape[0])
    shared = inputs.cu_seqlens_q is inputs.cu_seqlens_k  # given as cu_seqlens
    for name, edges, packed, max_seqlen in (
        ("q", inputs.cu_seqlens_q, inputs.q, problem.max_seqlen_q),
        ("k", inputs.cu_seqlens_k, inputs.k, problem.max_seqlen_k),
    ):
        if edges is not None:
            _check_cu_seqlens(
                "cu_seqlens" if shared else f"cu_seqlens_{name}", edges.tolist(), name, packed, max_seqlen
            )


def _check_ridge(ridge_lambda: Tensor) -> None:
    if place := _first(ridge_lambda <= 0):
        batch, head, query = place
        raise ValueError(
            f"ridge_lambda: got {ridge_lambda[place].item()} at batch {batch}, head {head}, query {query}, "
            f"wanted above 0"
        )


def _check_keys(name: str, ends: Tensor, room: int) -> None:
    if place := _first((ends < 0) | (ends > room)):
        raise ValueError(
            f"{name}: got {ends[place].item()} at sequence {place[0]}, wanted 0 to {room}, the keys there is room for"
        )


def _check_pages(block_table: Tensor, pages: int) -> None:
    if place := _first((block_table < 0) | (block_table >= pages)):
        raise ValueError(
            f"block_table: got page {block_table[place].item()} at sequence {place[0]}, place {place[1]}, wanted 0 to "
            f"{pages - 1}; fill the places not in use with 0"
        )


def _check_cu_seqlens(name: str, edges: list[int], of: str, packed: Tensor, max_seqlen: int) -> None:
    """``packed``: (1, H, T, D), which the caller calls ``of``."""
    if edges[0] != 0:
        raise ValueError(
            f"{name}: got {edges[0]} first, wanted 0; if these are lengths: "
            f"torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )
    sequences = list(itertools.pairwise(edges))
    for i, (first, last) in enumerate(sequences):
        if last < first:
            raise ValueError(f"{name}: got {first} and then {last} at {i + 1}, wanted numbers that never fall")
    heads, total = packed.shape[1:3]
    if edges[-1] > total:
        swapped = f"; of (1, T, H, D) try {of}[0], of (H, T, D) {of}.transpose(0, 1)" * (edges[-1] <= heads)
        raise ValueError(
            f"{name}: got {edges[-1]} last, wanted at most {total}, the tokens that {of} has as (T, H, D) or "
            f"(1, H, T, D){swapped}"
        )
    for i, (first, last) in enumerate(sequences):
        if last - first > max_seqlen:
            raise ValueError(
                f"max_seqlen: got {max_seqlen}, wanted at least {last - first}, the length of sequence {i} in {name}"
            )


def _first(bad: Tensor) -> tuple[int, ...]:
    """Where the first of them is; () where there is none."""
    return tuple(bad.nonzero()[0].tolist()) if bool(bad.any()) else ()
