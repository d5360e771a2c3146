"""What callers may have meant by an argument that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn

# What attention elsewhere calls its arguments, and what is to be done here.
_ELSEWHERE = {
    "is_causal": "causal=, True here by default",
    "scale": "qk_scale=",
    "softmax_scale": "qk_scale=",
    "sm_scale": "qk_scale=",
    "window_size": "window=left + 1",
    "attn_mask": "causal=, window= or seqlens_k=; there are no other masks",
    "dropout_p": "without it: there is no dropout",
    "enable_gqa": "without it: k and v may have fewer heads",
    "cu_seqlens": "flashlla.lla_attention_varlen",
    "block_table": "flashlla.lla_decode",
}
# The same, where it is another thing for one caller.
_FOR: dict[str, dict[str, str]] = {
    "lla_decode": {"tolerance": "without it: decoding is exact; or solver=flashlla.CG(tolerance=...)"},
}


def refuse_unknown(caller: str, names: Iterable[str], known: Iterable[str]) -> NoReturn:
    """The error for arguments ``names`` of ``caller``, which takes the ``known`` ones."""
    name, known = min(names), list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = {**_ELSEWHERE, **_FOR.get(caller, {})}.get(name, f"{close[0]}=" if close else f"one of {', '.join(known)}")
    raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}; try {hint}")
