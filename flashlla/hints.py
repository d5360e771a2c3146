"""What callers may have meant by an argument that is not there."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast

import torch

T = TypeVar("T", bound=Callable[..., Any])
NONE: Mapping[str, str] = MappingProxyType({})

_SCALE = "qk_scale="
_MASK = "causal=, window=, and seqstarts_k= and seqlens_k= for padding; there are no other masks"
_PADDING = "seqstarts_k=, of what is padded on the left, or seqlens_k=, on the right"
_BIAS = "without it: nothing is added to the logits"
_CAP = "without it: logits have no cap"
_DROPOUT = "without it: there is no dropout"
_SINKS = "without it: there are no sinks; the first keys may be tokens of their own"
_LSE = "return_info=True, whose omega sums the weights"
_VARLEN = "flashlla.lla_attention_varlen, which has cu_seqlens= and max_seqlen="
# What attention elsewhere calls its arguments, and what to try here.
CALLS = {
    "is_causal": "causal=, True here by default",
    **dict.fromkeys(("scale", "softmax_scale", "sm_scale", "scaling"), _SCALE),
    **dict.fromkeys(("ridge", "ridge_init", "lam", "lambda_", "reg"), "ridge_lambda="),
    **dict.fromkeys(
        ("window_size", "sliding_window", "local_window_size"), "window=left + 1, the query's own key counted"
    ),
    **dict.fromkeys(("attn_mask", "attention_mask", "mask", "block_mask", "mask_mod"), _MASK),
    **dict.fromkeys(("key_padding_mask", "padding_mask"), _PADDING),
    **dict.fromkeys(("attn_bias", "bias", "score_mod", "alibi_slopes", "position_bias"), _BIAS),
    **dict.fromkeys(("softcap", "logit_cap", "logits_soft_cap"), _CAP),
    **dict.fromkeys(("dropout_p", "dropout", "attention_dropout", "p_dropout"), _DROPOUT),
    **dict.fromkeys(("sinks", "s_aux", "attention_sink"), _SINKS),
    **dict.fromkeys(("return_attn_probs", "return_lse", "return_softmax_lse", "need_weights"), _LSE),
    **dict.fromkeys(("deterministic",), "without it: every sum has one order, call after call"),
    **dict.fromkeys(("enable_gqa",), "without it: k and v may have fewer heads"),
    **dict.fromkeys(("cache_seqlens", "seqused_k", "kv_lens", "key_lengths"), "seqlens_k="),
    **dict.fromkeys(("cache_leftpad", "leftpad_k"), "seqstarts_k="),
    **dict.fromkeys(
        ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"), _VARLEN
    ),
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seqlen_q", "cu_seq_lens"), "flashlla.lla_attention_varlen with cu_seqlens_q="
    ),
    **dict.fromkeys(("cu_seq_lens_k", "cu_seqlen_k"), "flashlla.lla_attention_varlen with cu_seqlens_k="),
    **dict.fromkeys(("max_length_q",), "flashlla.lla_attention_varlen with max_seqlen_q="),
    **dict.fromkeys(("max_length_k",), "flashlla.lla_attention_varlen with max_seqlen_k="),
    "cache_batch_idx": "k_cache[cache_batch_idx] and v_cache[cache_batch_idx]",
    "page_table": "flashlla.lla_decode with block_table=",
    "block_table": "flashlla.lla_decode, which has it",
    "out": "flashlla.lla_decode, which has it",
}
_EXACT = "without it: the solve is as exact as the dtype can tell; or solver=flashlla.CG(tolerance=...)"
# The same, where it is another thing for one caller.
_FOR: dict[str, dict[str, str]] = {
    "lla_decode": {
        **dict.fromkeys(("tolerance", "cg_atol", "cg_rtol", "cg_max_iters", "cg_use_preconditioner"), _EXACT),
        **dict.fromkeys(("causal", "is_causal"), "without it: new tokens see the keys up to their own"),
        **dict.fromkeys(("k", "v"), "writing new keys and values into the caches first; seqlens_k counts them"),
        "page_table": "block_table=",
    },
    "lla_attention_varlen": {
        "cu_seq_lens_q": "cu_seqlens_q=",
        "cu_seq_lens_k": "cu_seqlens_k=",
        "max_length_q": "max_seqlen_q=",
        "max_length_k": "max_seqlen_k=",
        "layout": "without it: q, k and v are (T, H, D), or (1, H, T, D)",
        **dict.fromkeys(("seqlens_k", "seqused_k"), "cu_seqlens_k=, by which sequences have their own numbers of keys"),
        **dict.fromkeys(("seqstarts_k", "cache_leftpad"), "without it: packed sequences have no padding"),
    },
}


# What layers elsewhere call what they are made with, and what to try here.
LAYER = {
    **dict.fromkeys(("embed_dim", "d_model", "n_embd", "model_dim", "dim", "input_dim"), "hidden_size="),
    **dict.fromkeys(("num_attention_heads", "num_q_heads", "n_heads", "n_head", "nhead", "heads"), "num_heads="),
    **dict.fromkeys(("num_key_value_heads", "num_query_groups", "n_kv_heads", "kv_heads"), "num_kv_heads="),
    **dict.fromkeys(("dim_head", "kv_channels", "d_head"), "head_dim="),
    **dict.fromkeys(("bias", "attention_bias", "use_bias", "qkv_proj_bias"), "qkv_bias="),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "norm_eps", "norm_type"), "qk_norm=, True or False"),
    **dict.fromkeys(("rope_base", "rotary_base", "rotary_emb_base", "base"), "rope_theta="),
    **dict.fromkeys(("window_size", "sliding_window"), "window="),
    **dict.fromkeys(("ridge_lambda", "lam", "reg"), "ridge=, a number, or ridge_init=, where it is learned"),
    **dict.fromkeys(("layer_number", "layer_id"), "layer_idx="),
    **dict.fromkeys(("process_group", "cp_group", "group"), "context_parallel="),
    **dict.fromkeys(("cg_rtol", "cg_atol", "rtol", "tol"), "tolerance="),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "block_size"), "without it: sequences have any length"),
    **dict.fromkeys(("dropout_p", "dropout", "attention_dropout", "attn_dropout"), _DROPOUT),
    **dict.fromkeys(("causal", "is_causal"), "without it: the layer is causal"),
    "batch_first": "without it: hidden states are (B, S, hidden_size)",
    **dict.fromkeys(("scale", "softmax_scale", "scaling", "qk_scale"), "without it: it is 1 / sqrt(head_dim)"),
}

# The same of solvers.
SOLVER = {
    **dict.fromkeys(("tol", "eps", "reltol", "relative_tolerance"), "tolerance=, the relative residual itself"),
    **dict.fromkeys(("abstol", "absolute_tolerance"), "atol="),
    **dict.fromkeys(
        ("max_iter", "maxiter", "niter", "iterations", "num_iterations", "steps", "max_steps"), "max_iters="
    ),
    "x0": "without it: solves begin at 0",
}


def refuse_unknown(
    caller: str, names: Iterable[str], known: Callable[[], list[str]], hints: Mapping[str, str] | None = None
) -> NoReturn:
    """The error for arguments ``names`` of ``caller``, which takes those that ``known`` tells; it is asked last, since
    torch.compile traces neither it nor a search. ``hints``: what to try; None: those of the calls."""
    hints = {**CALLS, **_FOR.get(caller, {})} if hints is None else hints
    name = sorted(names, key=lambda name: (name not in hints, name))[0]
    hint = hints.get(name)
    if hint is None:
        hint = "help(flashlla)" if torch.compiler.is_compiling() else _search(name, known())
    raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}; try {hint}")


def _search(name: str, known: list[str]) -> str:
    if not known:
        return "without it: nothing can be said by name"
    likely = known if len(known) == 1 else difflib.get_close_matches(name, known, n=1)
    return f"{likely[0]}=" if likely else f"one of {', '.join(known)}"


def with_hints(hints: Mapping[str, str] = NONE, beside: Iterable[str] = ()) -> Callable[[T], T]:
    """Decorates a function, an ``__init__``, or a class for its ``__init__``: arguments that it does not have are
    refused with one of ``hints``, or with the nearest that it has. ``beside``: names that it hands on."""

    def decorate(function: T) -> T:
        if isinstance(function, type):
            function.__init__ = decorate(function.__init__)  # type: ignore[misc]
            return function
        known = [name for name in dict.fromkeys((*keywords_of(function), *beside)) if name not in hints]

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            if unknown := [name for name in keywords if name not in known]:
                of_class = function.__name__ == "__init__"
                caller = type(arguments[0]).__name__ if of_class else function.__qualname__
                refuse_unknown(caller, unknown, lambda: known, hints)
            return function(*arguments, **keywords)

        return cast("T", checked)

    return decorate


def keywords_of(function: Callable[..., object]) -> list[str]:
    """What it takes by name."""
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [name for name in named if name != "self"]
