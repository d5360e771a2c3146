"""The layer by the argument names of flash-linear-attention (fla), so that it fits where fla's own layers stand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashlla import hints, nn

__all__ = ["LocalLinearAttention"]

_HINTS = {name: hint for name, hint in hints.LAYER.items() if name not in ("window_size", "max_position_embeddings")}


class LocalLinearAttention(nn.LocalLinearAttention):
    """:class:`flashlla.nn.LocalLinearAttention` with the arguments of ``fla.layers.Attention``.

    It stands in a model of fla's for any of its layers: ``block.attn = LocalLinearAttention(..., layer_idx=i)``. The
    forward call, masks (B, keys), ``cu_seqlens`` and fla's caches (``past_key_values.update(attn_state=...)``) are as
    there; fla itself is not imported.

    Args:
        hidden_size: last dimension of the input and the output.
        num_heads: query heads; the head dimension is ``hidden_size // num_heads``.
        num_kv_heads: heads of keys and values, which divide ``num_heads``. Default None: as many.
        qkv_bias: whether the three projections have a bias.
        qk_norm: whether queries and keys are normalised. Default True, fla's is False: the ridge's unit is that of keys
            squared, so that it means something else in every layer where keys are not.
        window_size: keys that a query sees, its own among them. Default None: all.
        rope_theta: the base of the rotary positions' wavelengths; None: no positions.
        max_position_embeddings: kept, for the configurations that have it; any length is taken.
        layer_idx: which of the model's layers this is, for the cache.
        options: the rest of what the layer takes, by name: ``ridge``, ``ridge_init``, ``ridge_min``, ``tolerance``,
            ``solver``, ``backend``, ``device``, ``dtype`` and so on.

    Source: the layers of flash-linear-attention 0.6.

    Example:
        >>> import torch
        >>> from flashlla.integrations.fla import LocalLinearAttention
        >>> layer = LocalLinearAttention(hidden_size=32, num_heads=4, window_size=8, layer_idx=0)
        >>> o, attentions, past_key_values = layer(torch.randn(2, 10, 32))
        >>> o.shape
        torch.Size([2, 10, 32])
    """

    @hints.with_hints({**_HINTS, "window": "window_size="}, beside=hints.keywords_of(nn.LocalLinearAttention.__init__))
    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = True,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            window=window_size,
            rope_theta=rope_theta,
            layer_idx=layer_idx,
            **options,
        )
        self.window_size, self.max_position_embeddings = window_size, max_position_embeddings

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_seqlen: int | None = None,
        *,
        cache: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None, Any]:
        """As the layer's own, but for two arguments.

        Args:
            hidden_states, attention_mask, past_key_values, use_cache, position_ids, max_seqlen, others: as there.
            cu_seqlens: as there; beats ``attention_mask``, as in fla.
            cache: beats ``past_key_values``. By this name, newer versions of transformers give the cache to fla 0.6
                when they generate, and fla makes an empty one beside it.

        Raises:
            ValueError: ``cu_seqlens`` together with a cache, which fla's models make in eval mode unless they are told
                ``use_cache=False``; and as the layer's own.
        """
        past_key_values = past_key_values if cache is None else cache
        if cu_seqlens is not None:
            attention_mask = None
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values: got a cache together with cu_seqlens, wanted None: packed sequences go into no "
                    "cache; try use_cache=False"
                )
        return super().forward(
            hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens, position_ids, max_seqlen, **others
        )
