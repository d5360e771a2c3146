"""What users call to compute: signatures and what they promise."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from flashlla import dispatch
from flashlla.autograd import WithoutGradient, describe, forward_op
from flashlla.solvers import Solver
from flashlla.validation import prepare


class LLAInfo(NamedTuple):
    """How each query's system was solved; shapes are those of ``q`` without its last dimension.

    ``iterations``: int32, 0 for direct solves. ``residual``: \\|A z - d\\| / \\|d\\|, float32 (float64 for float64
    inputs). ``converged``: bool, whether the solver's tolerance was reached. ``omega``: sum of the softmax weights
    relative to the largest, ``sum_j exp(s q.k_j - max_j s q.k_j)``. ``backend``: the name of the backend that ran.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    omega: Tensor
    choice: Tensor  # which backend ran, as a number: inside torch.compile a tensor can be returned, a name cannot

    @property
    def backend(self) -> str:
        return dispatch.backend_numbered(int(self.choice)).name


@overload
def lla_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def lla_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[True], **options: Any
) -> tuple[Tensor, LLAInfo]: ...
def lla_attention(  # type: ignore[misc]  # the overloads say only what return_info changes
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
    solver: str | Solver | None = None,
    backend: str | None = None,
    return_info: bool = False,
    causal: bool = True,
    window: int | None = None,
    seqlens_k: Tensor | None = None,
    layout: str = "bhsd",
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
        ridge_lambda: a number above 0, or a tensor that broadcasts to (B, Hq, Sq), or (B, Sq). A tensor is
            differentiated; it is kept in float32 at least. Units: those of k squared. Default 10.0.
        qk_scale: s, a number. Default None: 1 / sqrt(D).
        delta_eps: added to the denominator omega / (1 + d.z) of the output, d = k_mean - q and z the probe; held
            constant in gradients. Default 1e-12.
        cg_atol, cg_rtol, cg_max_iters: the tolerances of conjugate gradients, as in :class:`flashlla.CG`.
            Defaults 1e-12, 1e-12, 32.
        cg_use_preconditioner: use the Jacobi preconditioner. Default False.
        solver: "cg", "pcg", "direct", a registered name, or a :class:`flashlla.Solver` object, instead of the
            ``cg_*`` arguments. Default None: conjugate gradients, in the form that the backend does best.
        backend: demand a backend by name, or "auto". Default None: as :class:`flashlla.set_backend` says.
        return_info: also return an :class:`LLAInfo`. Default False.
        causal: query i sees keys up to i + Sk - Sq: aligned at the end (bottom right), the last query at the last key.
            Default True; False: all keys.
        window: sees only the latest so many of those, its own included. Default None: all.
        seqlens_k: (B,) int32 on the device of k, how many keys each sequence has: keys at or beyond it are invisible,
            whatever they hold. The causal diagonal stays where the tensors' lengths put it. Default None: all.
        layout: "bhsd", or "bshd" for tensors (B, S, H, D), outputs and info likewise; nothing is copied. ridge_lambda
            stays (B, Hq, Sq). Default "bhsd".

    Returns:
        o, with the shape and dtype of q but for the last dimension, which is that of v; or (o, info).

    Raises:
        TypeError: an argument has the wrong type, dtypes differ, or a dtype is not supported.
        ValueError: shapes, devices or numbers do not fit; ``solver`` together with a ``cg_*`` argument that is not at
            its default; a name that is not known; on the CPU, a ridge tensor with numbers not above 0.
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
    call = prepare(
        q,
        k,
        v,
        ridge_lambda,
        qk_scale,
        delta_eps,
        cg_atol,
        cg_rtol,
        cg_max_iters,
        cg_use_preconditioner,
        solver,
        backend,
        causal=causal,
        window=window,
        seqlens_k=seqlens_k,
        layout=layout,
    )
    o, *_, omega, iterations, residual, converged, choice = forward_op(*call.arguments, backend)
    if not return_info:
        return call.restore(o)
    iterations, residual, converged, omega = (
        call.restore(t.detach()) for t in (iterations, residual, converged, omega)
    )
    return call.restore(o), LLAInfo(iterations, residual, converged, omega, choice)


class LLAFunction:
    """The published package's ``LLAFunction``, with its call and its results.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 8).unbind(0)
        >>> ridge = torch.tensor(10.0)
        >>> o, omega = flashlla.LLAFunction.apply(q, k, v, ridge, None, 1e-12, 1e-12, 1e-12, 32, False)
        >>> o.shape, omega.shape
        (torch.Size([1, 20, 8]), torch.Size([1, 20, 1]))
    """

    @staticmethod
    def apply(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ridge_lambda: float | Tensor,
        qk_scale: float | None = None,
        delta_eps: float = 1e-12,
        cg_atol: float = 1e-12,
        cg_rtol: float = 1e-12,
        cg_max_iters: int = 32,
        cg_use_preconditioner: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``(o, omega)``: the output, and the sum of the softmax weights, (B, S, 1) in float32 at least.

        Arguments, errors and gradients as in :func:`lla_attention`. A gradient of omega is refused with
        NotImplementedError, not dropped; under torch.compile omega is detached.
        """
        call = prepare(
            q, k, v, ridge_lambda, qk_scale, delta_eps, cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner, None
        )
        o, _, _, _, _, omega, *_ = forward_op(*call.arguments, None)
        omega = omega.detach() if torch.compiler.is_compiling() else WithoutGradient.apply(omega)
        return call.restore(o), call.restore(omega).unsqueeze(-1)


def explain(
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
    solver: str | Solver | None = None,
    backend: str | None = None,
    causal: bool = True,
    window: int | None = None,
    seqlens_k: Tensor | None = None,
    layout: str = "bhsd",
) -> dispatch.Explanation:
    """Which backend :func:`lla_attention` would run with these arguments, and every backend's reason. Runs nothing.

    Arguments and errors are those of :func:`lla_attention`; where it would be refused, ``backend`` of the result is
    None instead of an error.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 8).unbind(0)
        >>> print(flashlla.explain(q, k, v, backend="naive").backend)
        naive
    """
    call = prepare(
        q,
        k,
        v,
        ridge_lambda,
        qk_scale,
        delta_eps,
        cg_atol,
        cg_rtol,
        cg_max_iters,
        cg_use_preconditioner,
        solver,
        backend,
        causal=causal,
        window=window,
        seqlens_k=seqlens_k,
        layout=layout,
    )
    return dispatch.explain(describe(call.inputs, *call.settings), backend)
