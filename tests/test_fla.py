"""The layer for flash-linear-attention: its arguments, its cache; with the library itself where it is installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashlla.integrations.fla import LocalLinearAttention

HIDDEN, HEADS = 32, 2
TOLERANCE = 1e-5


class Protocol:
    """What fla's layers ask of a cache, and nothing else: keys and values (B, T, H D), the last ``window`` of them."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.seen: list[int] = []

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.states[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen[layer_idx] if layer_idx < len(self.seen) else 0

    def update(
        self,
        attn_state: tuple[Tensor, Tensor] | None = None,
        layer_idx: int = 0,
        offset: int = 1,
        cache_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        assert attn_state is not None
        assert not others
        if layer_idx == len(self.states):
            self.states.append({"attn_state": tuple(t[:, :0] for t in attn_state)})
            self.seen.append(0)
        keys, values = (torch.cat(pair, dim=1) for pair in zip(self.states[layer_idx]["attn_state"], attn_state))
        window = (cache_kwargs or {}).get("window_size") or keys.shape[1]
        self.states[layer_idx]["attn_state"] = (keys[:, -window:], values[:, -window:])
        self.seen[layer_idx] += offset
        return self.states[layer_idx]


def fla_cache(name: str) -> Callable[[], Any]:
    def make() -> Any:
        pytest.importorskip("triton")
        return getattr(pytest.importorskip("fla.models.cache_utils"), name)()

    return make


CACHES = {"protocol": Protocol, "fla": fla_cache("Cache"), "legacy": fla_cache("LegacyFLACache")}
caches = pytest.mark.parametrize("new_cache", CACHES.values(), ids=CACHES)
shapes = pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"window_size": 4}, {"qkv_bias": True, "rope_theta": None}], ids=str
)


def layer_of(**options: Any) -> LocalLinearAttention:
    torch.manual_seed(0)
    return LocalLinearAttention(HIDDEN, HEADS, layer_idx=0, **options).eval()


@shapes
def test_packed_rows_are_as_if_alone(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    x = torch.randn(2, 9, HIDDEN)
    cu_seqlens = torch.tensor([0, 9, 18], dtype=torch.int32)
    fixed, none, no_cache = layer(x)
    packed, _, _ = layer(x.reshape(1, 18, HIDDEN), cu_seqlens=cu_seqlens)
    assert none is None
    assert no_cache is None
    torch.testing.assert_close(packed, fixed.reshape(1, 18, HIDDEN), rtol=TOLERANCE, atol=TOLERANCE)


def test_cu_seqlens_beat_the_mask_and_take_no_cache() -> None:
    layer, x = layer_of(), torch.randn(1, 9, HIDDEN)
    packing = {"cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}
    mask = torch.tensor([[0] * 3 + [1] * 6])
    assert torch.equal(layer(x, attention_mask=mask, **packing)[0], layer(x, **packing)[0])
    with pytest.raises(ValueError, match="use_cache=False"):
        layer(x, past_key_values=Protocol(), **packing)


@caches
@shapes
@pytest.mark.parametrize("prompt", [1, 7], ids=["short", "longer_than_the_window"])
def test_left_padded_prefill_then_token_by_token(
    new_cache: Callable[[], Any], options: dict[str, Any], prompt: int
) -> None:
    layer, cache = layer_of(**options), new_cache()
    total = 12
    x, mask = torch.randn(3, total, HIDDEN), torch.ones(3, total, dtype=torch.long)
    padding = [0, min(3, prompt - 1), prompt - 1]
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    with torch.no_grad():
        o, none, same = layer(x[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache, use_cache=True)
        outputs = [o]
        for end in range(prompt + 1, total + 1):
            seen = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            outputs.append(layer(x[:, end - 1 : end], output_attentions=False, **seen)[0])
        cached = torch.cat(outputs, dim=1)
        for row, pad in enumerate(padding):
            alone, _, _ = layer(x[row : row + 1, pad:])
            torch.testing.assert_close(cached[row : row + 1, pad:], alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert none is None
    assert same is cache
    assert cache.get_seq_length(0) == total


@caches
@shapes
def test_pieces_of_a_prompt_one_after_the_other(new_cache: Callable[[], Any], options: dict[str, Any]) -> None:
    layer, cache = layer_of(**options), new_cache()
    x = torch.randn(2, 24, HIDDEN)
    with torch.no_grad():
        pieces = [layer(piece, past_key_values=cache)[0] for piece in x.split([6, 1, 17], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x)[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_the_cache_is_given_what_fla_gives_it() -> None:
    """Keys and values of (B, T, H D), the number of new tokens, the window."""
    calls: list[dict[str, Any]] = []

    class Recording(Protocol):
        def update(self, attn_state: tuple[Tensor, Tensor] | None = None, **others: Any) -> dict[str, Any]:
            calls.append({"attn_state": attn_state, **others})
            return super().update(attn_state, **others)

    layer_of(num_kv_heads=1, window_size=4)(torch.randn(2, 6, HIDDEN), past_key_values=Recording())
    (call,) = calls
    assert [t.shape for t in call.pop("attn_state")] == [(2, 6, HIDDEN // HEADS)] * 2
    assert call == {"layer_idx": 0, "offset": 6, "cache_kwargs": {"window_size": 4}}


def test_the_cache_by_its_other_name_beats_an_empty_one() -> None:
    """As fla's models hand both on, where transformers calls it ``cache``."""
    layer, x, cache, empty = layer_of(), torch.randn(1, 9, HIDDEN), Protocol(), Protocol()
    with torch.no_grad():
        layer(x[:, :8], past_key_values=cache)
        o, _, same = layer(x[:, 8:], past_key_values=empty, cache=cache)
        torch.testing.assert_close(o, layer(x)[0][:, 8:], rtol=TOLERANCE, atol=TOLERANCE)
    assert same is cache
    assert empty.get_seq_length() == 0


def test_arguments_are_those_of_fla() -> None:
    pytest.importorskip("triton")
    theirs = inspect.signature(pytest.importorskip("fla.layers.attn").Attention).parameters.values()
    ours = inspect.signature(LocalLinearAttention).parameters
    # By default keys are normalised, which gives the ridge its unit.
    differ = {p.name for p in theirs if ours[p.name].default != p.default}
    assert differ == {"qk_norm"}
    assert [p.name for p in theirs] == list(ours)[: len(theirs)]


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # fla's, of transformers' new name
def test_in_a_model_of_fla() -> None:
    """Generation from a batch padded on the left is that from each prompt alone."""
    pytest.importorskip("triton")
    models = pytest.importorskip("fla.models.parallax")
    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_hidden_layers": 2, "vocab_size": 64}
    plain = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False}  # no kernels but ours

    class MLP(nn.Linear):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = models.ParallaxForCausalLM(models.ParallaxConfig(**sizes, **plain, pad_token_id=0))
    for i, block in enumerate(model.model.layers):
        block.attn, block.mlp = LocalLinearAttention(HIDDEN, HEADS, layer_idx=i), MLP(HIDDEN, HIDDEN)
    model.eval()
    prompts = [torch.randint(1, 64, (1, n)) for n in (9, 4)]
    padded = torch.cat([nn.functional.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    generated = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
    for prompt, row in zip(prompts, generated):
        (alone,) = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert row[-8:].tolist() == alone[-8:].tolist()
