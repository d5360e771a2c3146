"""Types of the keyword arguments of the calls, for type checkers; a test holds them to the signatures in api.py."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from flashlla.solvers import Solver


class SettingOptions(TypedDict, total=False):
    """What a call says beside its tensors: it becomes the :class:`flashlla.problem.Settings`."""

    qk_scale: float | None
    delta_eps: float
    cg_atol: float
    cg_rtol: float
    cg_max_iters: int
    cg_use_preconditioner: bool
    tolerance: float | None
    solver: str | Solver | None
    backend: str | None
    causal: bool
    window: int | None


class AttentionOptions(SettingOptions, total=False):
    """Keyword arguments of :func:`flashlla.lla_attention`, but ``return_info``."""

    ridge_lambda: float | Tensor
    seqlens_k: Tensor | None
    seqstarts_k: Tensor | None
    layout: str


class VarlenOptions(SettingOptions, total=False):
    """Keyword arguments of :func:`flashlla.lla_attention_varlen`, but ``return_info``."""

    ridge_lambda: float | Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


class DecodeOptions(TypedDict, total=False):
    """Keyword arguments of :func:`flashlla.lla_decode`, but ``return_info`` and ``out``."""

    ridge_lambda: float | Tensor
    qk_scale: float | None
    delta_eps: float
    window: int | None
    seqstarts_k: Tensor | None
    block_table: Tensor | None
    solver: str | Solver | None
    backend: str | None
    layout: str


class AnyOptions(AttentionOptions, VarlenOptions, total=False):
    """Keyword arguments of any of the three calls."""

    block_table: Tensor | None
