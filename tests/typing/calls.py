"""Right calls, and wrong ones with the error that mypy is to give on their line. Not run: read by mypy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flashlla

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import assert_type


def right(q: Tensor, cu_seqlens: Tensor, flag: bool) -> None:
    assert_type(flashlla.lla_attention(q, q, q), "Tensor")
    assert_type(flashlla.lla_attention(q, q, q, ridge_lambda=1.0, window=7, layout="bshd"), "Tensor")
    assert_type(flashlla.lla_attention(q, q, q, return_info=True), "tuple[Tensor, flashlla.LLAInfo]")
    either = flashlla.lla_attention(q, q, q, tolerance=1e-2, solver=flashlla.CG(tolerance=1e-3), return_info=flag)
    assert_type(either, "Tensor | tuple[Tensor, flashlla.LLAInfo]")
    assert_type(flashlla.lla_attention_varlen(q, q, q, cu_seqlens=cu_seqlens, max_seqlen=8), "Tensor")
    assert_type(flashlla.lla_attention_varlen(q, q, q, return_info=True)[1].backend, str)
    assert_type(flashlla.lla_decode(q, q, q, cu_seqlens, ridge_lambda=q, out=q), "Tensor")
    assert_type(
        flashlla.lla_decode(q, q, q, cu_seqlens, seqstarts_k=cu_seqlens, return_info=True),
        "tuple[Tensor, flashlla.LLAInfo]",
    )
    assert_type(flashlla.explain(q, q, q, window=7).backend, "str | None")
    assert_type(flashlla.verify(q, q, q, rows=3, ridge_lambda=0.1).backend, str)


def wrong(q: Tensor, lengths: list[int]) -> None:
    flashlla.lla_attention(q, q, q, ridge_lamda=1.0)  # error: call-overload
    flashlla.lla_attention(q, q, q, window="7")  # error: call-overload
    flashlla.lla_attention(q, q, q, seqlens_k=lengths)  # error: call-overload
    flashlla.lla_attention(q, q, q, return_info=1)  # error: call-overload
    flashlla.lla_attention(q, q, q, cu_seqlens=q)  # error: call-overload
    flashlla.lla_attention(q, q)  # error: call-overload
    flashlla.lla_attention_varlen(q, q, q, seqlens_k=q)  # error: call-overload
    flashlla.lla_attention_varlen(q, q, q, solver=3)  # error: call-overload
    flashlla.lla_decode(q, q, q, q, causal=True)  # error: call-overload
    flashlla.lla_decode(q, q, q, q, out="o")  # error: call-overload
    flashlla.explain(q, q, q, ridge_lamda=1.0)  # error: call-arg
    flashlla.verify(q, q, q, window=7.0)  # error: arg-type
