"""Caches of other libraries, known by what they can do; none is imported."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from flashlla.nn.cache import Keys, LLACache
from flashlla.nn.padding import Padding, Past


class Cache(Protocol):
    """What a layer asks of a cache."""

    def past(self) -> Past:
        """What it holds of this layer before a call."""
        ...

    def append(self, k: Tensor, v: Tensor, past: Past, padding: Padding | None) -> Keys:
        """Take new tokens, k and v of (B, S, Hkv, D), and give all that is to be seen. ``past`` is from before."""
        ...


def open_cache(cache: Any, layer_idx: int | None, window: int | None) -> Cache:
    """``cache``, for one layer."""
    update = getattr(type(cache), "update", None)
    if not isinstance(cache, LLACache) and (update is None or not hasattr(cache, "get_seq_length")):
        instead = "LLACache()"
        if isinstance(cache, Tensor):
            instead = "layer(x) for layer(x, x, x), as queries, keys and values come from the same hidden states"
        raise TypeError(
            f"past_key_values: got {type(cache).__name__}, wanted a flashlla.nn.LLACache, a cache of Hugging Face "
            f"(DynamicCache, StaticCache) or of fla; try {instead}"
        )
    if layer_idx is None:
        raise ValueError("layer_idx: got None, wanted this layer's number, by which a cache knows it; try 0")
    if isinstance(cache, LLACache):
        return _Own(cache, layer_idx)
    assert update is not None
    kind = _FLA if "attn_state" in inspect.signature(update).parameters else _HuggingFace
    return kind(cache, layer_idx, window)


class _Own:
    def __init__(self, cache: LLACache, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx

    def past(self) -> Past:
        return self.cache.past(self.layer_idx)

    def append(self, k: Tensor, v: Tensor, past: Past, padding: Padding | None) -> Keys:
        return self.cache.append(k, v, self.layer_idx, padding)


class _Foreign:
    def __init__(self, cache: Any, layer_idx: int, window: int | None) -> None:
        self.cache, self.layer_idx, self.window = cache, layer_idx, window

    def past(self) -> Past:
        length = self.cache.get_seq_length(self.layer_idx)
        # A static cache may give the tensor that it counts with.
        return Past(length.clone() if isinstance(length, Tensor) else length)

    def append(self, k: Tensor, v: Tensor, past: Past, padding: Padding | None) -> Keys:
        new = k.shape[1]
        k, v = self.update(k, v, past)
        seqstarts = None if padding is None else padding.seqstarts
        total, room = past.length + new, k.shape[1]
        if isinstance(total, Tensor) or total < room:  # a static cache: the rest is not in use
            seqlens = torch.zeros(k.shape[0], dtype=torch.int32, device=k.device) + total
            return Keys(k, v, seqlens.to(torch.int32), seqstarts)
        if (dropped := total - room) > 0:  # a sliding one
            if self.window is None or room < self.window + new - 1:
                raise ValueError(
                    f"past_key_values: got the latest {room} of {total} keys from {type(self.cache).__name__}, wanted "
                    f"all that the layer sees, with window={self.window}; try a cache that does not slide, or the "
                    f"window that it has"
                )
            seqstarts = None if seqstarts is None else (seqstarts - dropped).clamp(min=0)
        return Keys(k, v, None, seqstarts)

    def update(self, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _HuggingFace(_Foreign):
    """transformers 5: ``update(k, v, layer_idx)`` of (B, Hkv, S, D), and all that it has back."""

    def update(self, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        return k.transpose(1, 2), v.transpose(1, 2)


class _FLA(_Foreign):
    """fla: ``update(attn_state=(k, v), ...)`` of (B, S, Hkv D), and a dictionary back."""

    def update(self, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        new = (k.flatten(2), v.flatten(2))
        # With a window, what it gives back has no more than the last query sees.
        before = tuple(self.cache[self.layer_idx]["attn_state"]) if self.window is not None and past.length else None
        seen = self.cache.update(
            attn_state=new,
            layer_idx=self.layer_idx,
            offset=k.shape[1],
            cache_kwargs={"window_size": self.window},
        )["attn_state"]
        if before is not None:
            seen = tuple(torch.cat(pair, 1) for pair in zip(before, new))
        elif self.window is not None:
            seen = new
        seen_k, seen_v = seen
        return seen_k.unflatten(2, k.shape[2:]), seen_v.unflatten(2, v.shape[2:])
