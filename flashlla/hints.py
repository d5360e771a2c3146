"""What callers may have meant by an argument that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch

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
_ELSEWHERE = {
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


def refuse_unknown(caller: str, names: Iterable[str], known: Callable[[], list[str]]) -> NoReturn:
    """The error for arguments ``names`` of ``caller``, which takes those that ``known`` tells; it is asked last, since
    torch.compile traces neither it nor a search."""
    hints = {**_ELSEWHERE, **_FOR.get(caller, {})}
    name = sorted(names, key=lambda name: (name not in hints, name))[0]
    hint = hints.get(name)
    if hint is None:
        hint = "help(flashlla)" if torch.compiler.is_compiling() else _search(name, known())
    raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}; try {hint}")


def _search(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{close[0]}=" if close else f"one of {', '.join(known)}"
