"""Which keys each query may see, in the form that the operator takes: told once a forward pass, used by every layer.

Transformers makes a mask with the function that is registered under the attention's name, and hands to the layers what
it returns, as long as that is 4-D. `keys_in_sight` returns one of

- None: nothing is padded; causal layers see keys up to the query's own, aligned at the last key, others see all keys;
- int32 (B, 1, 1, 1): the first key of each sequence; causal, aligned at the last key;
- int32 (B, 1, 1, 2): the first key of each sequence and the end of those in use, at which the queries end too: a cache
  with room for more;
- int32 (B, 1, N, 2): where each of up to N documents packed into one row begins and ends; causal within each;
- bool (B, 1, 1, Sk): the keys that every query sees; not causal.

Those of int32 are (B, 2, ...), the same twice, where a window cuts keys off: what a layer passes on does not tell it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashlla.values import looked_at


def keys_in_sight(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask function: arguments as transformers passes them, results as above.

    Raises:
        ValueError: a mask that is not of these kinds.
    """
    bidirectional = allow_is_bidirectional_skip is not None  # only the functions for such masks say whether
    if use_vmap:
        raise ValueError(
            "attention mask: got an or_mask_function or and_mask_function, wanted a mask of padding and causality; use "
            "another attn_implementation for this model"
        )
    shorter = local_size is not None and kv_length + kv_offset > local_size
    if shorter and local_size == getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"attention mask: got chunks of {local_size} tokens (attention_chunk_size) and {kv_length + kv_offset} "
            f"keys, wanted no more than one; use another attn_implementation for this model"
        )
    if bidirectional and shorter:
        raise ValueError(
            f"attention mask: got a window of {local_size} tokens to both sides and {kv_length} keys, wanted no more; "
            f"use another attn_implementation for this model"
        )
    visible = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]  # (B, <= Sk)
    if bidirectional:
        if visible is not None:
            return torch.nn.functional.pad(visible, (0, kv_length - visible.shape[1]))[:, None, None]
        every = torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)
        return None if allow_is_bidirectional_skip else every
    ranges = None
    if not allow_is_causal_skip and q_length > 1 and mask_function is not None:
        # Something beside padding and causality may be in the mask: what, its function knows.
        ranges = _documents(*_neighbours(mask_function, batch_size, q_length, q_offset, device))
    windowed = local_size is not None and kv_length > local_size
    if ranges is None:
        end = q_offset + q_length - kv_offset
        if visible is not None:
            _check_padding(visible, end)
        # A cache that a compiled step goes on with keeps one form of mask, though its keys may just end with its room.
        at_the_end = isinstance(end, int) and end == kv_length and (allow_is_causal_skip or q_length > 1)
        if visible is None and at_the_end and not windowed:
            return None
        none = torch.zeros(batch_size, dtype=torch.int32, device=device)
        first = none if visible is None else _missing(visible)  # (B,)
        ends = end.to(torch.int32).expand(batch_size) if isinstance(end, Tensor) else torch.full_like(first, end)
        ranges = torch.stack([first] if at_the_end else [first, ends], dim=-1)[:, None, None]  # (B, 1, 1, 1 or 2)
    return ranges.expand(-1, 2, -1, -1) if windowed else ranges


def _check_padding(visible: Tensor, end: int | Tensor) -> None:
    if isinstance(end, int) and visible.shape[1] < end:
        raise ValueError(
            f"attention_mask: got {visible.shape[1]} columns, wanted {end}, those of the tokens in the cache and of "
            f"the new ones"
        )
    _check_holes(visible)


def _check_holes(visible: Tensor) -> None:
    """Refuse keys in sight that are not next to each other, where numbers are looked at."""
    if torch.compiler.is_compiling() or not looked_at(visible.device):
        return
    begins = visible.clone()
    begins[:, 1:] &= ~visible[:, :-1]
    holes = begins.sum(-1) > 1
    if holes.any():
        raise ValueError(
            f"attention_mask: got padding between tokens in sequence {int(holes.nonzero()[0])}, wanted it in front of "
            f"them (or behind, without a cache); try padding_side='left' of the tokenizer"
        )


def bounds(mask: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The first key and the end of those in sight, (B,) int32 each, of a mask (B or 1, 1, 1, Sk) for all queries."""
    visible = mask[:, 0, 0].expand(batch_size, -1)  # (B, Sk)
    _check_holes(visible)
    return _missing(visible), visible.shape[1] - _missing(visible.flip(-1))


def _missing(visible: Tensor) -> Tensor:
    """How many False are in front of the first True; (B,) int32."""
    return (visible.cumsum(-1) == 0).sum(-1, dtype=torch.int32)


def edges(ranges: Tensor, length: int) -> Tensor:
    """cu_seqlens, (B N + 1,), of rows of ``length`` tokens one behind the other, with the documents (B, 1, N, 2)."""
    rows = torch.arange(len(ranges), dtype=torch.int32, device=ranges.device)[:, None] * length
    return torch.nn.functional.pad((ranges[:, 0, :, 1] + rows).flatten(), (1, 0))


def _neighbours(
    mask_function: Callable[..., Tensor],
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """(B, q_length - 1) each: whether each query but the first sees the key before, each but the last the key after."""
    at = torch.arange(q_length, device=device) + q_offset
    batch = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    before = mask_function(batch, head, at[None, 1:], at[None, :-1])
    after = mask_function(batch, head, at[None, :-1], at[None, 1:])
    return before.expand(batch_size, -1), after.expand(batch_size, -1)


_disable = torch.compiler.disable(
    reason="documents may be packed by position_ids, and how many there are is a number on the device; pass "
    "attention_mask=torch.ones_like(input_ids), and of packed documents cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
    "max_length_k"
)


@_disable
def _documents(before: Tensor, after: Tensor) -> Tensor | None:
    """As `_table`, of what `_neighbours` found."""
    if after.any():
        raise ValueError(
            "attention mask: got tokens that see later ones (blocks of an image, say), wanted a causal mask; use "
            "another attn_implementation for this model"
        )
    return _table(~before)


@_disable
def packed(position_ids: Tensor) -> Tensor | None:
    """The documents that (B, S) positions tell of, by not going on where one begins; None if every row is one."""
    return _table(position_ids.diff(dim=-1) != 1)


def _table(begins: Tensor) -> Tensor | None:
    """(B, 1, N, 2) of where documents begin and end, (S, S) for those a row lacks; None if every row is one.

    begins: (B, S - 1), whether one does at the second token, the third, and so on.
    """
    begins = torch.nn.functional.pad(begins, (1, 0), value=True)  # (B, S)
    number = begins.cumsum(-1) - 1  # (B, S): which document each token is in
    count = int(number.max()) + 1
    if count == 1:
        return None
    length = begins.shape[1]
    rows, places = begins.nonzero(as_tuple=True)
    first = torch.full((len(begins), count), length, dtype=torch.int32, device=begins.device)
    first[rows, number[rows, places]] = places.to(torch.int32)
    end = torch.nn.functional.pad(first[:, 1:], (0, 1), value=length)
    return torch.stack([first, end], dim=-1)[:, None]
