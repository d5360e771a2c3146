"""What an attention mask says: which of the new tokens are padding, and where each sequence begins."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.values import CHECK_VARIABLE


class Past(NamedTuple):
    """What a cache holds before a call. Its slots are numbered from 0; a sequence's keys lie in consecutive ones."""

    length: int | Tensor = 0  # slots in use: of all sequences alike, a number or (); or of each, (B,)
    seqstarts: Tensor | None = None  # (B,) int32: the slot of each sequence's first key; None: 0
    remembers: bool = False  # whether the cache keeps seqstarts, so that a mask may leave the past out


class Padding(NamedTuple):
    """What a mask says."""

    tokens: Tensor  # (B, S) bool: which of the new tokens are no padding
    seqstarts: Tensor  # (B,) int32: the slot of each sequence's first token; behind the new ones where it has none yet
    kept: Tensor  # (B,) int32: how many of the S new slots stay in use; those of padding on the right do not


def looked_at(device: torch.device) -> bool:
    """Whether numbers that tensors on ``device`` hold are checked: to look at them may wait for the device."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get(CHECK_VARIABLE) == "1"


def read_mask(attention_mask: Tensor, batch: int, length: int, past: Past) -> Padding:
    """What ``attention_mask`` says of ``length`` new tokens.

    attention_mask: (B, S), of the new tokens, or (B, keys), with one column for each slot of the past in front.
    """
    mask = _check(attention_mask, batch, length, past)
    new = mask[:, -length:]  # (B, S)
    before = torch.as_tensor(past.length, dtype=torch.int32, device=mask.device)
    seqstarts = _zeros_before_a_token(mask)
    begun = torch.zeros_like(seqstarts, dtype=torch.bool)
    if past.remembers and mask.shape[1] == length:  # of the new tokens alone
        earlier = torch.zeros_like(seqstarts) if past.seqstarts is None else past.seqstarts
        begun = earlier < before
        seqstarts = torch.where(begun, earlier, before + seqstarts)
    to_the_last = length - _zeros_before_a_token(new.flip(1))
    # Padding of a sequence that has not begun is on its left.
    kept = torch.where(new.any(1), to_the_last, torch.where(seqstarts >= before + length, length, 0))
    if looked_at(mask.device):
        _check_values(mask, length, before, begun)
    return Padding(new, seqstarts, kept.to(torch.int32))


def _zeros_before_a_token(mask: Tensor) -> Tensor:
    """How many of each row, (B,) int32."""
    return (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)


def _check(mask: Tensor, batch: int, length: int, past: Past) -> Tensor:
    """``mask`` as bool."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got {type(mask).__name__}, wanted a tensor (B, keys), True or 1 for tokens")
    if mask.dim() != 2 or mask.shape[0] != batch:
        hint = "; masks of queries and keys are not taken: try window, or None for causal attention" * (mask.dim() > 2)
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, wanted (B, keys), B = {batch}, True or 1 for tokens{hint}"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask: got dtype {mask.dtype}, wanted bool or integers, True or 1 for tokens; try "
            f"attention_mask.bool() where 1.0 is a token, attention_mask == 0 where 0.0 is one"
        )
    keys = mask.shape[1]
    if keys < length if isinstance(past.length, Tensor) else keys != past.length + length:
        raise ValueError(
            f"attention_mask: got {keys} columns, wanted one for each of the {length} new tokens, and in front one for "
            f"each in the cache"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def _check_values(mask: Tensor, length: int, before: Tensor, begun: Tensor) -> None:
    """mask: (B, keys); before: () or (B,); begun: (B,), whether the mask goes on where a sequence had tokens."""
    if mask.shape[1] > length and bool((before + length != mask.shape[1]).any()):
        raise ValueError(
            f"attention_mask: got {mask.shape[1]} columns, wanted {length}, the new tokens alone: sequences have "
            f"{before.tolist()} tokens in the cache"
        )
    first = _zeros_before_a_token(mask)
    behind_last = mask.shape[1] - _zeros_before_a_token(mask.flip(1))
    holes = (mask.sum(1) < behind_last - first) | (begun & mask.any(1) & (first > 0))
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"attention_mask: got a hole in row {row}, {mask[row].int().tolist()}, wanted padding on the left, on the "
            f"right or both, and none between tokens of a sequence (a prompt padded on the right, and then tokens?): "
            f"try padding on the left, or an LLACache and masks of the new tokens alone"
        )
