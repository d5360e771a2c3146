"""What an attention mask says: which of the new tokens are padding, and where each sequence begins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.values import looked_at

_MISFIT = "wanted one for each slot in use, or for the new tokens alone"
_HOLE = (
    "wanted padding on the left, on the right or both, and none between tokens of a sequence (a prompt padded on the "
    "right, and then tokens?); try padding on the left, or an LLACache and masks of the new tokens alone"
)


class Past(NamedTuple):
    """What a cache holds before a call. Its slots are numbered from 0; a sequence's keys lie in consecutive ones."""

    length: int | Tensor = 0  # slots in use: of all sequences alike, a number or (); or of each, (B,)
    seqstarts: Tensor | None = None  # (B,) int32: the slot of each sequence's first key; None: 0
    remembers: bool = False  # whether the cache keeps seqstarts, so that a mask may leave the past out

    @property
    def empty(self) -> bool:
        """Whether it is known, without a look at a tensor, to hold nothing."""
        return not isinstance(self.length, Tensor) and self.length == 0

    def check_batch(self, batch: int) -> None:
        """Refuse new tokens of another batch, where the cache tells of its own."""
        if isinstance(self.length, Tensor) and self.length.dim() and self.length.shape[0] != batch:
            raise ValueError(
                f"past_key_values: got a cache of {self.length.shape[0]} sequences with a batch of {batch}, wanted as "
                f"many; try a new LLACache for another batch"
            )


class Padding(NamedTuple):
    """What a mask says."""

    tokens: Tensor  # (B, S) bool: which of the new tokens are no padding
    seqstarts: Tensor  # (B,) int32: the slot of each sequence's first token; behind the new ones where it has none yet
    kept: Tensor  # (B,) int32: how many of the S new slots stay in use; those of padding on the right do not


def read_mask(attention_mask: Tensor, new: Tensor, past: Past) -> Padding:
    """What ``attention_mask`` says of the tokens ``new``, (B, S, ...).

    attention_mask: (B, S), of the new tokens, or (B, keys), with one column for each slot of the past in front.
    """
    length = new.shape[1]
    mask = _check(attention_mask, new, past)
    tokens = mask[:, mask.shape[1] - length :]  # (B, S)
    seqstarts = _zeros_before_a_token(mask)
    begun = torch.zeros_like(seqstarts, dtype=torch.bool)
    if past.remembers and mask.shape[1] == length:  # of the new tokens alone
        earlier = torch.zeros_like(seqstarts) if past.seqstarts is None else past.seqstarts
        begun = earlier < past.length
        seqstarts = torch.where(begun, earlier, seqstarts + past.length)
    to_the_last = length - _zeros_before_a_token(tokens.flip(1))
    # Padding of a sequence that has not begun is on its left.
    kept = torch.where(tokens.any(1), to_the_last, torch.where(seqstarts >= past.length + length, length, 0))
    if looked_at(mask.device):
        _check_values(mask, length, past, begun)
    return Padding(tokens, seqstarts, kept.to(torch.int32))


def _zeros_before_a_token(mask: Tensor) -> Tensor:
    """How many of each row, (B,) int32."""
    return (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)


def _check(mask: Tensor, new: Tensor, past: Past) -> Tensor:
    """``mask`` as bool."""
    batch, length = new.shape[:2]
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
    if mask.device != new.device:
        raise ValueError(f"attention_mask: got device {mask.device}, wanted {new.device}, that of the tokens")
    keys = mask.shape[1]
    if keys < length if isinstance(past.length, Tensor) else keys != past.length + length:
        raise ValueError(
            f"attention_mask: got {keys} columns, wanted one for each of the {length} new tokens, and in front one for "
            f"each in the cache"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def _check_values(mask: Tensor, length: int, past: Past, begun: Tensor) -> None:
    """mask: (B, keys); begun: (B,), whether the mask goes on where a sequence had tokens."""
    first = _zeros_before_a_token(mask)
    behind_last = mask.shape[1] - _zeros_before_a_token(mask.flip(1))
    holes = (mask.sum(1) < behind_last - first) | (begun & mask.any(1) & (first > 0))
    misfits = torch.zeros_like(holes)
    if mask.shape[1] > length:
        misfits = misfits | (past.length + length != mask.shape[1])
    if torch.compiler.is_compiling():  # where no number can be told
        torch._assert_async(~misfits.any(), f"attention_mask: {_MISFIT}")
        torch._assert_async(~holes.any(), f"attention_mask: got a hole, {_HOLE}")
    elif bool(misfits.any()):
        raise ValueError(f"attention_mask: got {mask.shape[1]} columns with {past.length} in the cache, {_MISFIT}")
    elif bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise ValueError(f"attention_mask: got a hole in row {row}, {mask[row].int().tolist()}, {_HOLE}")
