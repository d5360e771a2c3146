"""Caches of every library, for layers that are to take them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla.nn import LLACache


class FLAProtocol:
    """The calls of fla's cache, 0.6: states by name, (B, T, H D), the latest ``window_size`` if there is one."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []
        self.lengths: list[int] = []

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.layers[layer_idx]

    def update(
        self,
        recurrent_state: Any = None,
        attn_state: tuple[Tensor, ...] | None = None,
        conv_state: Any = None,
        ffn_state: Any = None,
        layer_idx: int = 0,
        offset: int | None = 1,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        assert attn_state is not None
        window = (cache_kwargs or {}).get("window_size")
        if layer_idx == len(self.layers):
            self.layers.append({})
            self.lengths.append(0)
        state = self.layers[layer_idx]
        if "attn_state" in state:
            attn_state = tuple(torch.cat(pair, 1) for pair in zip(state["attn_state"], attn_state))
        if window is not None:
            attn_state = tuple(t[:, -window:] for t in attn_state)
        state["attn_state"] = attn_state
        self.lengths[layer_idx] += offset or 0
        return state

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self.lengths[layer_idx or 0] if (layer_idx or 0) < len(self.lengths) else 0


def _hugging_face(kind: str, window: int | None) -> Any:
    transformers = pytest.importorskip("transformers")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    if window is None:
        config = transformers.LlamaConfig(**layers)
    else:
        config = transformers.MistralConfig(**layers, sliding_window=window)
    return {
        "dynamic": lambda: transformers.DynamicCache(),
        "sliding": lambda: transformers.DynamicCache(config=config),
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=64),
    }[kind]()


# By name: a new cache with room for 64 tokens at least, for a layer with such a window.
CACHES: dict[str, Callable[[int | None], Any]] = {
    "lla": lambda window: LLACache(),
    "lla_fixed": lambda window: LLACache(max_len=64),
    "dynamic": lambda window: _hugging_face("dynamic", None),
    "static": lambda window: _hugging_face("static", None),
    "sliding": lambda window: _hugging_face("sliding", window),
    "sliding_static": lambda window: _hugging_face("static", window),
    "fla": lambda window: FLAProtocol(),
}
every_cache = pytest.mark.parametrize("cache", CACHES)
