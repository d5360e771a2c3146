"""LocalLinearAttention: all ways to the same token agree, and what cannot be done is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla.nn import LocalLinearAttention
from tests.support.caches import CACHES, every_cache
from tests.support.helpers import normal

HIDDEN, HEADS = 32, 4
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "window": {"num_kv_heads": 2, "window": 7},
    "token": {"ridge": "token", "ridge_init": 0.3},
    "number": {"ridge": 0.5, "rope_theta": None, "qkv_bias": True, "head_dim": 5},
    "bare": {"qk_norm": False, "rope_theta": 100.0, "head_dim": 12, "solver": "pcg"},
    "direct": {"solver": "direct", "num_kv_heads": 1},
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str = "plain", **keywords: Any) -> LocalLinearAttention:
    """In eval mode; weights of the same seed, ridges and norms anything."""
    torch.manual_seed(0)
    layer = LocalLinearAttention(HIDDEN, HEADS, **{"layer_idx": 0, **LAYERS[kind], **keywords}).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name or "ridge" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return layer


def hidden(batch: int = 2, length: int = 40, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(batch, length, HIDDEN, seed=seed, dtype=dtype)


def run(layer: LocalLinearAttention, x: Tensor, cache: Any, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """The outputs of x in pieces; masks have a column for each token so far."""
    outputs, last = [], 0
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            last += piece.shape[1]
            told = None if mask is None else mask[:, :last]
            o, weights, returned = layer(piece, attention_mask=told, past_key_values=cache)
            assert weights is None
            assert returned is cache
            outputs.append(o)
    return torch.cat(outputs, 1)


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_cache
@every_layer
def test_a_cache_changes_nothing(kind: str, cache: str):
    """The whole at once, a prompt in pieces and then token by token."""
    layer, x = make(kind), hidden()
    full = layer(x)[0].detach()
    assert_same(run(layer, x, CACHES[cache](layer.window), [20, 3, 9, *[1] * 8]), full)


@every_cache
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_padding_on_the_left_changes_nothing(kind: str, cache: str):
    layer, x = make(kind), hidden(3)
    lengths = [40, 33, 15]
    mask = torch.stack([torch.arange(40) >= 40 - n for n in lengths])
    with torch.no_grad():
        alone = [layer(x[i : i + 1, 40 - n :])[0][0] for i, n in enumerate(lengths)]
        padded = layer(x.masked_fill(~mask[..., None], float("nan")), attention_mask=mask.long())[0]
        pieces = run(
            layer, x.masked_fill(~mask[..., None], float("nan")), CACHES[cache](layer.window), [20, 4, *[1] * 16], mask
        )
    for i, n in enumerate(lengths):
        for found in (padded, pieces):
            assert_same(found[i, 40 - n :], alone[i])
            assert not found[i, : 40 - n].any()
