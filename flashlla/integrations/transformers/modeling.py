"""A language model of :class:`flashlla.nn.LocalLinearAttention`, small and plain, for transformers' tools."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    GradientCheckpointingLayer,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flashlla.hints import with_hints
from flashlla.integrations.transformers.configuration import LLAConfig
from flashlla.integrations.transformers.masks import edges, packed
from flashlla.nn import LocalLinearAttention, Ridge
from flashlla.values import looked_at

# What outputs call the cache: "cache" since transformers 5.20 or so, "past_key_values" before.
_CACHE = next(
    field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values")
)


class LLAMLP(nn.Module):
    """SwiGLU. Source: Shazeer, "GLU variants improve Transformer", 2020."""

    def __init__(self, config: LLAConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None  # the config has filled it in
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        o: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return o


class LLALayer(GradientCheckpointingLayer):
    """Attention, then the MLP, each added to what it is given, normalised before."""

    def __init__(self, config: LLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LocalLinearAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            rope_theta=config.rope_theta,
            window=config.window,
            ridge=config.ridge,
            ridge_init=config.ridge_init,
            ridge_min=config.ridge_min,
            tolerance=config.tolerance,
            layer_idx=layer_idx,
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LLAMLP(config)

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        hidden_states = hidden_states + self.attention(self.input_norm(hidden_states), **options)[0]
        o: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return o


class LLAPreTrainedModel(PreTrainedModel):
    config: LLAConfig
    config_class = LLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LLALayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Ridge):
            module.reset_parameters()
        else:
            super()._init_weights(module)


@with_hints()
class LLAModel(LLAPreTrainedModel):
    """A stack of layers of Local Linear Attention: tokens in, hidden states out.

    Example:
        >>> import torch
        >>> from flashlla.integrations.transformers import LLAConfig, LLAModel
        >>> config = LLAConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> LLAModel(config)(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: LLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LLALayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: (B, S); or inputs_embeds: (B, S, hidden_size).
            attention_mask: (B, keys), 1 for tokens, 0 for padding, on the left, or, without a cache, on the right.
            position_ids: (B, S) or (1, S). Documents are packed in a row by positions that begin anew, without a mask.
            cache, past_key_values: a cache of transformers or a :class:`flashlla.nn.LLACache`, by the name that the
                version of transformers has.
            use_cache: make one. Default None: as the config says, in eval mode alone.
            output_hidden_states: also give what goes into each layer, and what comes out of the last. Default False.
            cu_seq_lens_q, max_length_q: of documents packed into one row, as
                ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` gives them; ``cu_seq_lens_k`` and
                ``max_length_k`` are the same.
            others: what :class:`flashlla.nn.LocalLinearAttention` takes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: wanted one of the two")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache

        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is None and attention_mask is None and position_ids is not None and length > 1:
            documents = packed(position_ids.expand(batch, -1))
            if documents is not None:
                cu_seqlens = edges(documents, length)
                hidden_states, position_ids = (
                    hidden_states.flatten(0, 1)[None],
                    position_ids.expand(batch, -1).flatten(),
                )
        if attention_mask is not None and position_ids is not None and cache is None:
            _check_documents(attention_mask, position_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cu_seqlens is None and use_cache and cache is None:
            cache = DynamicCache()

        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_length_q,
                **others,
            )
            states.append(hidden_states)
        states = [state.view(batch, length, -1) for state in states]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(states[-1]),
            hidden_states=tuple(states) if output_hidden_states else None,
            **{_CACHE: cache},
        )


def _check_documents(attention_mask: Tensor, position_ids: Tensor) -> None:
    """Refuse documents beside a mask, (B, S), by which they would see each other."""
    fits = attention_mask.dim() == 2 and attention_mask.shape[1] == position_ids.shape[-1]  # else the layers refuse it
    if not fits or torch.compiler.is_compiling() or not looked_at(attention_mask.device):
        return
    tokens = attention_mask != 0
    if ((position_ids.diff(dim=-1) <= 0) & tokens[:, 1:] & tokens[:, :-1]).any():
        raise ValueError(
            "attention_mask: got one together with position_ids of several documents in a row, wanted None: the "
            "positions tell documents apart; try it without"
        )


@with_hints()
class LLAForCausalLM(LLAPreTrainedModel, GenerationMixin):
    """:class:`LLAModel` with logits and a loss: trains from scratch, saves, loads and generates as any of transformers.

    Importing it registers it: ``AutoModelForCausalLM.from_config(LLAConfig())``, ``from_pretrained``. For training,
    :func:`flashlla.nn.param_groups` gives ridges what an optimiser is to do with them.

    Example:
        >>> import torch
        >>> from flashlla.integrations.transformers import LLAConfig, LLAForCausalLM
        >>> config = LLAConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model, tokens = LLAForCausalLM(config), torch.tensor([[5, 6, 7, 8]])
        >>> model(tokens, labels=tokens).loss.backward()
        >>> model.eval().generate(tokens, max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LLAConfig) -> None:
        super().__init__(config)
        self.model = LLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, (B, S, vocab_size), and with ``labels`` the loss.

        Args:
            labels: (B, S) tokens, each to be foretold by those before it; -100: not counted. Default None.
            logits_to_keep: of the last so many tokens, or of those with these numbers. Default 0: all.
            num_items_in_batch: what the sum of losses is divided by. Default None: the tokens counted.
            others: and the other arguments, as for :class:`LLAModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{_CACHE: outputs.get(_CACHE)}
        )

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
        """The mask of padding as it is, for caches of a fixed size too: the layers want no other."""
        return attention_mask


AutoConfig.register("lla", LLAConfig, exist_ok=True)
AutoModel.register(LLAConfig, LLAModel, exist_ok=True)
AutoModelForCausalLM.register(LLAConfig, LLAForCausalLM, exist_ok=True)
