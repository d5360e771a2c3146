"""Tiny random models of transformers that run with this attention, and ways to run them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flashlla.integrations.transformers import register, set_ridge

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Grouped heads in all; normalised queries and keys; a window in every layer; in every other one.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,  # else each token is followed by itself
        },
    ),
}
# The name of the cache among a model's arguments, which changed.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def make(family: str = "llama", ridge: Any = "head", **options: Any) -> Any:
    """A model in eval mode, its ridges not all the same; solved exactly in training too, so that runs are alike."""
    register(tolerance=0.0)
    torch.manual_seed(0)
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**{**TINY, **own, "attn_implementation": "lla", **options}))
    if ridge is not None:
        set_ridge(model, ridge)
        scatter(model)
    return model.eval()


def scatter(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ridge" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.05)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def left_padded(padding: int = 4, batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a mask that hides the first of the first row, and positions that are counted from what it leaves."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return tokens(batch, length) * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)


def piecewise(
    model: Any, x: Tensor, sizes: list[int], cache: Any, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits of pieces of ``sizes`` tokens, each against the cache of those before."""
    logits, begin = [], 0
    for size in sizes:
        end = begin + size
        options = {} if positions is None else {"position_ids": positions[:, begin:end]}
        logits.append(
            model(
                x[:, begin:end],
                attention_mask=None if mask is None else mask[:, :end],
                use_cache=True,
                **{CACHE: cache},
                **options,
            ).logits
        )
        begin = end
    return torch.cat(logits, 1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those of the last backward pass, taken away."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
