"""What users call to compute: signatures and what they promise."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, overload

from torch import Tensor

from flashlla import again, dispatch
from flashlla.autograd import decode, decode_info, decode_out, forward, which
from flashlla.hints import refuse_unknown
from flashlla.problem import Report
from flashlla.solvers import Solver
from flashlla.validation import Call, check_out, prepare, prepare_decode, prepare_varlen

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import AttentionOptions, DecodeOptions, VarlenOptions


class LLAInfo(NamedTuple):
    """How each query's system was solved; shapes are those of ``q`` without its last dimension.

    ``iterations``: int32, 0 for direct solves. ``residual``: \\|A z - d\\| / \\|d\\|, float32 (float64 for float64
    inputs); where the Triton kernels end with a step that no product with A checks, an estimate of it (docs/math.md,
    (4.7)). ``converged``: bool, whether the solver reached its tolerance by its own account; where rounding keeps the
    true residual above it, as with small ridges in float32, the ``residual`` of the PyTorch backends shows it, and
    above 1e-3, or twice a tolerance that is larger, they call nothing converged. ``omega``: sum of the softmax weights
    relative to the largest, ``sum_j exp(s q.k_j - max_j s q.k_j)``, without a gradient. ``backend``: the name of the
    backend that ran; the tuple itself holds its number, ``choice``.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    omega: Tensor
    choice: Tensor  # which backend ran, as a number: inside torch.compile a tensor can be returned, a name cannot

    @property
    def backend(self) -> str:
        return dispatch.backend_numbered(int(self.choice.flatten()[0])).name  # one for each under vmap, all the same


@functools.cache
def signature_of(op: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(op)


def named_arguments(op: Callable[..., Any]) -> list[str]:
    """Names of the arguments that ``op`` takes."""
    return [p.name for p in signature_of(op).parameters.values() if p.kind is not p.VAR_KEYWORD]


@overload
def lla_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[False] = False, **options: Unpack[AttentionOptions]
) -> Tensor: ...
@overload
def lla_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, LLAInfo]: ...
@overload
def lla_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: bool, **options: Unpack[AttentionOptions]
) -> Tensor | tuple[Tensor, LLAInfo]: ...
def lla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float = 1e-12,
    cg_rtol: float = 1e-12,
    cg_max_iters: int = 32,
    cg_use_preconditioner: bool = False,
    tolerance: float | None = None,
    solver: str | Solver | None = None,
    backend: str | None = None,
    return_info: bool = False,
    causal: bool = True,
    window: int | None = None,
    seqlens_k: Tensor | None = None,
    seqstarts_k: Tensor | None = None,
    layout: str = "bhsd",
    **others: Any,
) -> Tensor | tuple[Tensor, LLAInfo]:
    """Local Linear Attention.

    At every query i a ridge regression, weighted by softmax, is fitted to the keys and values that it sees, and its
    value at the query is returned: the intercept b of

        min over b, W of  sum_j w_ij |v_j - b - W (k_j - q_i)|^2 + ridge_lambda_i omega_i |W|_F^2,

    with w_ij = exp(s q_i.k_j - max_j s q_i.k_j) and omega_i = sum_j w_ij. A large ridge gives softmax attention; a
    small scale gives linear ridge regression. A query that sees no key has an output of 0, and gradients of 0.

    Args:
        q: (B, Hq, Sq, D), or (B, Sq, D); bfloat16, float16, float32 or float64, as k and v; any strides. 16-bit inputs
            accumulate in float32.
        k: (B, Hkv, Sk, D), or (B, Sk, D). Hq is a multiple of Hkv: query heads in groups share keys and values.
        v: (B, Hkv, Sk, Dv), or (B, Sk, Dv).
        ridge_lambda: a number above 0, or a tensor that broadcasts to (B, Hq, Sq), or (B, Sq): (Hq, 1) is one a head,
            (1, Sq) one a token, and of (Hq,) or (Sq,) nobody knows which. A tensor is differentiated; it is kept in
            float32 at least. Units: those of k squared. Default 10.0.
        qk_scale: s, a number. Default None: 1 / sqrt(D).
        delta_eps: added to the denominator omega / (1 + d.z) of the output, d = k_mean - q and z the probe; held
            constant in gradients. Default 1e-12.
        cg_atol, cg_rtol, cg_max_iters: the tolerances of conjugate gradients, as in :class:`flashlla.CG`.
            Defaults 1e-12, 1e-12, 32.
        cg_use_preconditioner: use the Jacobi preconditioner. Default False.
        tolerance: how long the residual of a solve may be beside its right-hand side, from 0 to below 1: the square
            root of ``cg_rtol``, and instead of it. Larger is faster; gradients are solved to the same. What is below
            the dtype's resolution (1e-3 for 16-bit inputs, 1e-6 for float32) is raised to it. Also with ``solver`` by
            one of the names "cg", "pcg" and "pcg_gram". Default None: as ``cg_rtol`` says.
        solver: "cg", "pcg", "direct", a registered name, or a :class:`flashlla.Solver` object, instead of the
            ``cg_*`` arguments. Default None: conjugate gradients, in the form that the backend does best.
        backend: demand a backend by name, or "auto". Default None: as :class:`flashlla.set_backend` says.
        return_info: also return an :class:`LLAInfo`. Default False.
        causal: query i sees keys up to i + Sk - Sq: aligned at the end (bottom right), the last query at the last key.
            Default True; False: all keys.
        window: sees only the latest so many of those, its own included. Default None: all.
        seqlens_k: (B,) int32 on the device of k, how many keys each sequence has: keys at or beyond it are invisible,
            whatever they hold. The causal diagonal stays where the tensors' lengths put it. Default None: all.
        seqstarts_k: (B,) int32 on the device of k, the first key of each sequence: keys before it are invisible,
            whatever they hold, as those of a batch that is padded on the left. The diagonal stays. Default None: 0.
        layout: "bhsd", or "bshd" for tensors (B, S, H, D), outputs and info likewise; nothing is copied. ridge_lambda
            stays (B, Hq, Sq). Default "bhsd".

    Returns:
        o, with the shape and dtype of q but for the last dimension, which is that of v; or (o, info).

    Raises:
        TypeError: an argument has the wrong type, dtypes differ, or a dtype is not supported.
        ValueError: shapes, devices or numbers do not fit; ``solver`` together with a ``cg_*`` argument that is not at
            its default; ``tolerance`` with ``cg_rtol``, or with a solver that has its own; a name that is not known. On
            the CPU, and elsewhere where the environment variable FLASHLLA_CHECK is 1: numbers in ``ridge_lambda`` that
            are not above 0, or in ``seqlens_k`` or ``seqstarts_k`` that are not 0 to Sk; unchecked, the latter are
            taken as the nearest of these.
        flashlla.UnsupportedError: the demanded backend cannot run the call.
        torch.linalg.LinAlgError: a direct solve met a matrix that is not positive definite in its precision.
        NotImplementedError: a second derivative was asked for.

    Warns:
        flashlla.ConvergenceWarning: a solver stopped early (CPU; elsewhere ``return_info`` tells without a wait).
        flashlla.FallbackWarning: a preferred backend could not run the call.

    Source: Zuo et al., "Local Linear Attention", ICLR 2026; the centred form of docs/math.md, (2.1) to (2.3), and its
    gradients, (3.1) to (3.6).

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 2, 4, 100, 32, requires_grad=True).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, ridge_lambda=1.0)
        >>> o.shape
        torch.Size([2, 4, 100, 32])
        >>> o.sum().backward()
    """
    if others:
        refuse_unknown("lla_attention", others, lambda: named_arguments(lla_attention))
    options: AttentionOptions = {
        "ridge_lambda": ridge_lambda,
        "qk_scale": qk_scale,
        "delta_eps": delta_eps,
        "cg_atol": cg_atol,
        "cg_rtol": cg_rtol,
        "cg_max_iters": cg_max_iters,
        "cg_use_preconditioner": cg_use_preconditioner,
        "tolerance": tolerance,
        "solver": solver,
        "backend": backend,
        "causal": causal,
        "window": window,
        "seqlens_k": seqlens_k,
        "seqstarts_k": seqstarts_k,
        "layout": layout,
    }
    if return_info is False and (o := again.attend(q, k, v, options)) is not None:
        return o
    if _on_dtensors is not None and "DTensor" in (type(q).__name__, type(k).__name__, type(v).__name__):
        return _on_dtensors(q, k, v, return_info=return_info, **options)  # type: ignore[no-any-return]
    return _attend(prepare(q, k, v, **options), return_info)


_on_dtensors: Callable[..., Any] | None = None


def take_dtensors(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Calls of :func:`lla_attention` with DTensors go to ``attention``, which knows process groups."""
    global _on_dtensors
    _on_dtensors = attention
    return attention


def _attend(call: Call, return_info: bool) -> Tensor | tuple[Tensor, LLAInfo]:
    _check_return_info(return_info)
    found = forward(call.arguments)
    o = call.restore(found.o)
    return (o, info_of(call, found.report)) if return_info else o


def _check_return_info(return_info: bool) -> None:
    if not isinstance(return_info, bool):
        raise TypeError(f"return_info: got {type(return_info).__name__}, wanted True or False; try bool(return_info)")


def info_of(call: Call, report: Report) -> LLAInfo:
    """Of the call that has just run."""
    shown = lambda t: call.restore(t.detach())
    return LLAInfo(
        iterations=shown(report.iterations),
        residual=shown(report.residual),
        converged=shown(report.converged),
        omega=shown(report.omega),
        choice=which(call.arguments),
    )


@overload
def lla_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[False] = False, **options: Unpack[VarlenOptions]
) -> Tensor: ...
@overload
def lla_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[True], **options: Unpack[VarlenOptions]
) -> tuple[Tensor, LLAInfo]: ...
@overload
def lla_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: bool, **options: Unpack[VarlenOptions]
) -> Tensor | tuple[Tensor, LLAInfo]: ...
def lla_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float = 1e-12,
    cg_rtol: float = 1e-12,
    cg_max_iters: int = 32,
    cg_use_preconditioner: bool = False,
    tolerance: float | None = None,
    solver: str | Solver | None = None,
    backend: str | None = None,
    return_info: bool = False,
    causal: bool = True,
    window: int | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, LLAInfo]:
    """Local Linear Attention of sequences packed into one row, one behind the other.

    Each sequence gets what :func:`lla_attention` gives it alone, of any length, 0 and 1 among them: one of queries
    without keys has an output of 0. Tokens behind the last sequence belong to none: zeros for them, in gradients too,
    whatever they hold.

    Args:
        q: (T, Hq, D), or (1, Hq, T, D); dtypes and strides as for :func:`lla_attention`.
        k: (Tk, Hkv, D), or (1, Hkv, Tk, D).
        v: (Tk, Hkv, Dv), or (1, Hkv, Tk, Dv).
        cu_seqlens: (sequences + 1,) int32 on the device of q: where each sequence begins, from 0, and where the last
            one ends; for queries and keys alike.
        cu_seqlens_q, cu_seqlens_k: the same, where sequences have other numbers of keys than of queries.
        max_seqlen: at least the length of the longest sequence. Default None: found from ``cu_seqlens``, which waits
            for the device, and inside torch.compile(fullgraph=True) not every release of torch allows.
        max_seqlen_q, max_seqlen_k: the same for queries and for keys. Default None: ``max_seqlen``.
        ridge_lambda: a number, or a tensor that broadcasts to (Hq, T), for (1, Hq, T, D) to (1, Hq, T). Default 10.0.
        causal, window: as for :func:`lla_attention`, aligned at the last key of each sequence. Defaults True, None.
        qk_scale, delta_eps, cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner: as for :func:`lla_attention`.
        tolerance, solver, backend, return_info: as for :func:`lla_attention`.

    Given ``max_seqlen``, the fused kernels do not wait for the device; the PyTorch backends do, for ``cu_seqlens``.
    The numbers there are checked on the CPU, and elsewhere where the environment variable FLASHLLA_CHECK is 1.
    Unchecked, they reach no further than the tensors do, a sequence longer than ``max_seqlen`` is cut to its first so
    many tokens, and one that ends before it begins has none.

    Returns:
        o, with the shape and dtype of q but for the last dimension, which is that of v; or (o, info).

    Raises:
        TypeError, ValueError, flashlla.UnsupportedError, NotImplementedError: as :func:`lla_attention`.
        ValueError: ``cu_seqlens`` is missing, or given together with one of the others; the two tell of different
            numbers of sequences; where checked, numbers that do not begin with 0, that fall, that leave the tensors
            or that tell of a sequence longer than ``max_seqlen``.

    Warns:
        flashlla.ConvergenceWarning, flashlla.FallbackWarning: as :func:`lla_attention`.

    Source: Zuo et al., "Local Linear Attention", ICLR 2026; packed as flash_attn_varlen_func of FlashAttention packs.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 100, 4, 32).unbind(0)  # sequences of 30, 0 and 70 tokens
        >>> cu_seqlens = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
        >>> o = flashlla.lla_attention_varlen(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=70, ridge_lambda=1.0)
        >>> o.shape
        torch.Size([100, 4, 32])
        >>> first = [t[None, :30] for t in (q, k, v)]
        >>> torch.allclose(o[:30], flashlla.lla_attention(*first, ridge_lambda=1.0, layout="bshd")[0], atol=1e-5)
        True
    """
    if others:
        refuse_unknown("lla_attention_varlen", others, lambda: named_arguments(lla_attention_varlen))
    call = prepare_varlen(
        q,
        k,
        v,
        ridge_lambda=ridge_lambda,
        qk_scale=qk_scale,
        delta_eps=delta_eps,
        cg_atol=cg_atol,
        cg_rtol=cg_rtol,
        cg_max_iters=cg_max_iters,
        cg_use_preconditioner=cg_use_preconditioner,
        tolerance=tolerance,
        solver=solver,
        backend=backend,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        window=window,
    )
    return _attend(call, return_info)


@overload
def lla_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    return_info: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, LLAInfo]: ...
@overload
def lla_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    return_info: Literal[False] = False,
    out: Tensor | None = None,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...
@overload
def lla_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    return_info: bool,
    out: Tensor | None = None,
    **options: Unpack[DecodeOptions],
) -> Tensor | tuple[Tensor, LLAInfo]: ...
def lla_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    window: int | None = None,
    seqstarts_k: Tensor | None = None,
    block_table: Tensor | None = None,
    solver: str | Solver | None = None,
    backend: str | None = None,
    return_info: bool = False,
    out: Tensor | None = None,
    layout: str = "bhsd",
    **others: NoReturn,
) -> Tensor | tuple[Tensor, LLAInfo]:
    """Local Linear Attention of new tokens against a cache: inference, without gradients.

    What :func:`lla_attention` gives for the last N queries of each sequence, with caches that have room for more. The
    keys and values of the new tokens are in the cache already, the last N of the ``seqlens_k`` in use: new token i
    sees keys up to seqlens_k - N + i. Slots beyond the length are not looked at and may hold anything, NaN too.

    Args:
        q: (B, Hq, N, D), N any number of new tokens; dtypes and strides as for :func:`lla_attention`.
        k_cache: (B, Hkv, L, D); with ``block_table`` pages, (pages, Hkv, page size, D), the page size a multiple of 16.
            Hq is a multiple of Hkv.
        v_cache: (B, Hkv, L, Dv), or (pages, Hkv, page size, Dv).
        seqlens_k: (B,) int32 on the device of q: the keys in use, the new ones counted. Numbers not from 0 to L are
            refused on the CPU, and elsewhere where the environment variable FLASHLLA_CHECK is 1; unchecked they are
            taken as the nearest of these. A new token before the first key has an output of 0.
        ridge_lambda: a number, or a tensor that broadcasts to (B, Hq, N). Default 10.0.
        qk_scale, delta_eps: as for :func:`lla_attention`. Defaults 1 / sqrt(D), 1e-12.
        window: a new token sees only the latest so many keys, its own included. Default None: all.
        seqstarts_k: (B,) int32 on the device of q, the first key of each sequence: those before it, as of a prompt that
            is padded on the left, are not looked at either; checked as ``seqlens_k`` is. Default None: 0.
        block_table: (B, pages a sequence) int32 on the device of q: the page that holds each sequence's keys 0 to
            page size - 1, the page of the next, and so on; checked as ``seqlens_k`` is, and unchecked taken as the
            nearest page there is. Fill places not in use with 0. Default None: no pages.
        solver: as for :func:`lla_attention`. Default None: exact, by Cholesky; or as closely as the dtype can tell, by
            conjugate gradients, where the Triton backends have 16-bit inputs (Cholesky takes what converges slowly),
            or more than 16 new tokens, as where a prompt is read, for which they gather the pages.
        backend: as for :func:`lla_attention`.
        return_info: also return an :class:`LLAInfo`, of shape (B, Hq, N). Up to 16 new tokens the fused kernels tell
            a bound on the residual (docs/math.md, (4.8)), and no iterations of what Cholesky solved. Default False.
        out: written and returned, any strides; shape, dtype and device of the result, and no memory of the other
            arguments; not together with ``return_info``. Default None: a new tensor.
        layout: "bhsd", or "bshd" for tensors (B, N, H, D), (B, L, H, D) and (pages, page size, H, D); nothing is
            copied. ridge_lambda stays (B, Hq, N). Default "bhsd".

    On the fused kernels, with ``out``, a call can be captured in a CUDA graph, and replayed with other numbers in
    ``seqlens_k`` and ``block_table``.

    Returns:
        o, with the shape and dtype of q but for the last dimension, which is that of v_cache; or (o, info).

    Raises:
        TypeError, ValueError, flashlla.UnsupportedError: as :func:`lla_attention`, or an argument above does not fit.
        NotImplementedError: a gradient of the result was asked for; or, with ``out`` and gradients enabled, an
            argument requires one.
        torch.linalg.LinAlgError: a system is not positive definite in the accumulator's precision (PyTorch backends).

    Warns:
        flashlla.ConvergenceWarning, flashlla.FallbackWarning: as :func:`lla_attention`.

    Source: Zuo et al., "Local Linear Attention", ICLR 2026; docs/math.md, (2.1) to (2.3).

    Example:
        >>> import torch, flashlla
        >>> k_cache, v_cache = torch.randn(2, 2, 2, 128, 32).unbind(0)  # (B, Hkv, L, D), room for 128 keys
        >>> seqlens_k = torch.tensor([100, 37], dtype=torch.int32)
        >>> q = torch.randn(2, 8, 1, 32)  # one new token a sequence, its key at 99 and at 36
        >>> o = flashlla.lla_decode(q, k_cache, v_cache, seqlens_k, ridge_lambda=1.0)
        >>> o.shape
        torch.Size([2, 8, 1, 32])
        >>> full = flashlla.lla_attention(q[1:], k_cache[1:, :, :37], v_cache[1:, :, :37], ridge_lambda=1.0)
        >>> torch.allclose(o[1:], full, atol=1e-4)
        True
    """
    if others:
        refuse_unknown("lla_decode", others, lambda: named_arguments(lla_decode))
    call = prepare_decode(
        q,
        k_cache,
        v_cache,
        seqlens_k,
        ridge_lambda=ridge_lambda,
        qk_scale=qk_scale,
        delta_eps=delta_eps,
        solver=solver,
        backend=backend,
        window=window,
        seqstarts_k=seqstarts_k,
        block_table=block_table,
        layout=layout,
    )
    _check_return_info(return_info)
    if return_info:
        if out is not None:
            raise ValueError("out: got it together with return_info=True, wanted one of the two; try out.copy_(o)")
        found = decode_info(call.arguments)
        return call.restore(found.o), info_of(call, found.report)
    if out is None:
        return call.restore(decode(call.arguments))
    decode_out(call.arguments, check_out(out, call))
    return out
