"""Local Linear Attention as an attention implementation of transformers' models."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flashlla.api import lla_attention, lla_attention_varlen, lla_decode
from flashlla.hints import with_hints
from flashlla.integrations.transformers.masks import bounds, edges, keys_in_sight
from flashlla.integrations.transformers.registry import registered
from flashlla.integrations.transformers.ridge import restore_when_loaded
from flashlla.nn.solving import solving
from flashlla.notices import warn_once
from flashlla.values import looked_at

# What changes softmax attention's weights in ways that this attention has no like of.
_REFUSED = {
    "softcap": "logits of softmax attention that are capped",
    "s_aux": "attention sinks",
    "position_bias": "a bias for each pair of positions",
    "output_attentions": "weights, which this attention does not have",
    "block_table": "continuous batching's pages",
    "read_index": "continuous batching's pages",
}


@with_hints()
def register(name: str = "lla", *, tolerance: float = 1e-2) -> None:
    """Make Local Linear Attention an attention implementation of transformers, by ``name``.

    Any model that takes ``attn_implementation`` (at ``from_pretrained``, ``from_config`` or
    ``model.set_attn_implementation``) then runs with it: training, generation with dynamic, static and sliding caches,
    padding on the left, documents packed by ``position_ids``, sliding windows, grouped query heads, cross-attention.
    A ridge to learn is given by :func:`set_ridge`; without it the operator's default, 10.0, is used. In ``eval()``
    systems are solved to the dtype's resolution, so that full passes and passes through a cache agree.

    Args:
        name: what ``attn_implementation`` is to be. Transformers takes any name with "flash" in it for FlashAttention.
            Default "lla".
        tolerance: relative residual to which systems are solved while the model is in training mode, from 0, which is
            the dtype's resolution there too, to below 1. Default 1e-2.

    Raises:
        TypeError, ValueError: ``name`` is not a string, contains "flash" or "|", or is another attention's; the
            ``tolerance`` is not from 0 to below 1.

    A model that runs with it refuses, by a ValueError that names them: dropout of attention weights while training,
    capped logits, attention sinks, position biases, ``output_attentions``, 4-D masks of the user's, tokens that see
    later ones in a causal model, chunks and windows to both sides that are shorter than the sequence, and, where
    numbers are looked at (on the CPU, and elsewhere where the environment variable FLASHLLA_CHECK is 1), padding
    between tokens. Documents packed by ``position_ids`` want ``use_cache=False``, as transformers' own attentions do.
    Models of transformers whose attention cannot be exchanged, as Bloom's, are refused when built; Falcon and others
    that keep a table of attentions answer ``KeyError`` themselves. Continuous batching (``generate_batch``) takes only
    transformers' own attentions, and where FlashAttention is installed it changes the model to that with no more than a
    line in the log: pass ``auto_switch_to_flash=False`` to be told by an error.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashlla.integrations.transformers import register, set_ridge
        >>> register()
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...     num_key_value_heads=2, attn_implementation="lla",
        ... )
        >>> model = set_ridge(LlamaForCausalLM(config))
        >>> tokens = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
        >>> padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        >>> model(tokens, attention_mask=padded, labels=tokens.where(padded.cumsum(1) > 1, -100)).loss.backward()
        >>> model.eval().generate(tokens, attention_mask=padded, max_new_tokens=3, pad_token_id=0).shape
        torch.Size([2, 8])
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, wanted a string, as 'lla'")
    if "flash" in name or "|" in name or not name:
        raise ValueError(
            f"name: got {name!r}, wanted one without 'flash', which transformers takes for FlashAttention, and without "
            f"'|'; try 'lla'"
        )
    solving(None, tolerance, tolerance, head_dim=1)  # refuses what is none
    taken = {"eager", *AttentionInterface().keys(), *AttentionMaskInterface().keys()}
    if name in taken - registered:
        raise ValueError(f"name: got {name!r}, which another attention has; try 'lla'")
    AttentionInterface.register(name, functools.partial(attend, tolerance=tolerance))
    AttentionMaskInterface.register(name, keys_in_sight)
    registered.add(name)
    restore_when_loaded()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tolerance: float = 1e-2,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    ridge_lambda: float | Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: arguments as transformers' layers pass them.

    query: (B, H, S, D); key: (B, Hkv, Sk, D); value: (B, Hkv, Sk, Dv); attention_mask: as masks.py has it, from there
    or made by the user; ridge_lambda: what a layer's hook adds (ridge.py). Returns o, (B, S, H, Dv), and no weights.
    """
    _refuse(dropout, others)
    batch, q_length, k_length, head_dim = query.shape[0], query.shape[2], key.shape[2], query.shape[3]
    _check_mask(attention_mask, batch, k_length)
    ranges = attention_mask if attention_mask is not None and attention_mask.dtype == torch.int32 else None
    causal = ranges is not None  # a mask knows; where there is none, the layer does
    if attention_mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    query, key, value = (t.transpose(1, 2) for t in _autocast(query, key, value))  # (B, S, H, D)
    options: dict[str, Any] = {"qk_scale": scaling, "window": _window(module, sliding_window, ranges)}
    if ridge_lambda is None:
        _say_that_it_is_the_default()
    else:
        options["ridge_lambda"] = ridge_lambda
    to = solving(None, tolerance, tolerance, head_dim)
    settings = to.training if module.training else to.exact

    if ranges is not None and ranges.shape[2] > 1 and cu_seq_lens_q is None:
        cu_seq_lens_q = cu_seq_lens_k = edges(ranges, q_length)
    elif cu_seq_lens_q is not None and batch != 1:
        raise ValueError(f"cu_seq_lens_q: got a batch of {batch}, wanted 1, with the documents packed into one row")
    o: Tensor
    if cu_seq_lens_q is not None:
        if isinstance(ridge_lambda, Tensor) and ridge_lambda.dim() == 3:  # (B, H, S)
            options["ridge_lambda"] = ridge_lambda.transpose(0, 1).flatten(1)
        o = lla_attention_varlen(
            query.flatten(0, 1),  # (B S, H, D)
            key.flatten(0, 1),
            value.flatten(0, 1),
            cu_seqlens_q=cu_seq_lens_q,
            cu_seqlens_k=cu_seq_lens_k,
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
            causal=causal,
            **options,
            **settings,
        )
        return o.unflatten(0, (batch, q_length)), None

    options |= {"layout": "bshd", "seqstarts_k": None if ranges is None else ranges[:, 0, 0, 0]}
    lengths = None  # of what is decoded
    if ranges is not None and ranges.shape[3] == 2:  # there is room for more behind the keys in use
        lengths = ranges[:, 0, 0, 1]
    elif causal and q_length < k_length and not _wants_gradient(query, key, value, ridge_lambda):
        lengths = torch.full((batch,), k_length, dtype=torch.int32, device=key.device)
    if lengths is not None:
        return lla_decode(query, key, value, lengths, **options), None

    if attention_mask is None and causal and q_length == k_length:
        _check_positions(module, position_ids)
    if attention_mask is not None and not causal:
        options["seqstarts_k"], options["seqlens_k"] = bounds(attention_mask, batch)
    o = lla_attention(query, key, value, causal=causal, **options, **settings)
    return o, None


def _refuse(dropout: float, others: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout: got {dropout}, wanted 0: this attention has no weights to drop; try attention_dropout=0.0 in "
            f"the model's config"
        )
    for name, what in _REFUSED.items():
        if others.get(name) is not None and others[name] is not False:
            raise ValueError(f"{name}: got {what}, wanted none; use another attn_implementation for this model")


def _check_mask(attention_mask: Tensor | None, batch: int, k_length: int) -> None:
    if attention_mask is None:
        return
    shape = tuple(attention_mask.shape)
    ranges = attention_mask.dtype == torch.int32 and len(shape) == 4 and shape[0] == batch and {*shape[1::2]} <= {1, 2}
    alike = attention_mask.dtype == torch.bool and shape in ((batch, 1, 1, k_length), (1, 1, 1, k_length))
    if not (ranges or alike):
        raise ValueError(
            f"attention_mask: got {attention_mask.dtype} of shape {shape}, wanted a 2-D mask of padding, from which "
            f"this attention's own is made as the model begins; masks of queries and keys cannot be taken"
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Of one dtype where autocast is on, which knows torch's own attention but not this one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _window(module: nn.Module, sliding_window: int | None, ranges: Tensor | None) -> int | None:
    """The layer's window, where the mask says that it has one: some models say so without, some do not with one."""
    if ranges is None or ranges.shape[1] == 1:
        return None
    if sliding_window is None:
        config: Any = module.config
        sliding_window = config.sliding_window
    return sliding_window


def _wants_gradient(*tensors: float | Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _check_positions(module: nn.Module, position_ids: Tensor | None) -> None:
    """Refuse documents of which the mask was not told, as where a cache is being filled beside them."""
    if position_ids is None or position_ids.dim() != 2:
        return
    message = (
        "position_ids: got several documents in a row, of which transformers tells attention only where no cache is "
        "made; try use_cache=False"
    )
    go_on = position_ids.diff(dim=-1) > 0
    if torch.compiler.is_compiling():
        torch._assert_async(go_on.all(), message)
    # To look at it waits for the device: once a pass, elsewhere than on the CPU.
    elif (_is_the_first(module) or looked_at(position_ids.device)) and not go_on.all():
        raise ValueError(message)


def _is_the_first(module: nn.Module) -> bool:
    """Whether no layer before this one attends."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ["full_attention"]
    attends = [kind in ("full_attention", "sliding_attention") for kind in kinds]
    return getattr(module, "layer_idx", None) in (None, attends.index(True) if True in attends else 0)


def _say_that_it_is_the_default() -> None:
    if not torch.compiler.is_compiling():
        warn_once(
            "transformers: the default ridge",
            "no ridge was set for this model, so ridge_lambda is 10.0 in every layer; set_ridge(model) makes it a "
            "parameter of each head, set_ridge(model, ridge=10.0) says that it is meant",
            UserWarning,
        )
