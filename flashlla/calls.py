"""What else takes a call: to ask which backend runs it, and the published package's own name for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashlla import dispatch
from flashlla.api import lla_attention, lla_attention_varlen, lla_decode, named_arguments, signature_of
from flashlla.autograd import forward, without_gradient
from flashlla.hints import keywords_of, refuse_unknown, with_hints
from flashlla.problem import describe
from flashlla.validation import Call, prepare, prepare_decode, prepare_varlen

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import AnyOptions

# What checks the arguments of each function.
_PREPARE: dict[Callable[..., Any], Callable[..., Call]] = {
    lla_attention: prepare,
    lla_attention_varlen: prepare_varlen,
    lla_decode: prepare_decode,
}
# Arguments that make no difference to what is computed.
_RESULTS = ("return_info", "out")


def prepared(
    op: Callable[..., Any] | None,
    caller: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Unpack[AnyOptions],
) -> Call:
    """The call ``op(q, k, v, **options)``, of lla_attention where that is None, for ``caller``; not its results."""
    op = lla_attention if op is None else op
    if op not in _PREPARE:
        wanted = ", ".join(f"flashlla.{known.__name__}" for known in _PREPARE)
        raise ValueError(f"op: got {op!r}, wanted one of {wanted}")
    defaults = _defaults(op)
    tensors = dict(zip(defaults, (q, k, v)))
    if unknown := options.keys() - (defaults.keys() - tensors.keys()):
        refuse_unknown(caller.__qualname__, unknown, lambda: [*keywords_of(caller), *list(defaults)[3:]])
    given = {**defaults, **tensors, **options}
    for name, value in given.items():
        if value is inspect.Parameter.empty:
            raise TypeError(f"{caller.__qualname__}() lacks the keyword argument {name!r} of {op.__name__}")
    return _PREPARE[op](**given)


@functools.cache
def _defaults(op: Callable[..., Any]) -> dict[str, Any]:
    """Of the arguments of ``op``, but those of results; `inspect.Parameter.empty` where one has to be given."""
    parameters = signature_of(op).parameters
    return {name: parameters[name].default for name in named_arguments(op) if name not in _RESULTS}


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    op: Callable[..., Any] | None = None,
    **options: Unpack[AnyOptions],
) -> dispatch.Explanation:
    """Which backend a call would run on, and every backend's reason. Runs nothing.

    Args:
        q, k, v: as for ``op``; the caches of :func:`lla_decode`.
        op: :func:`lla_attention_varlen` or :func:`lla_decode`. Default None: :func:`lla_attention`.
        options: its other arguments by keyword, but ``return_info`` and ``out``.

    Returns:
        A :class:`flashlla.dispatch.Explanation`; ``print`` it. Where the call would be refused, its ``backend`` is
        None instead of an error.

    Raises:
        TypeError, ValueError: as ``op``, but for numbers in tensors, which are not looked at.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 8).unbind(0)
        >>> print(flashlla.explain(q, k, v, backend="naive").backend)
        naive
        >>> q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)
        >>> lengths = torch.tensor([9])
        >>> print(flashlla.explain(q, k, v, op=flashlla.lla_decode, seqlens_k=lengths, backend="chunked").backend)
        chunked
    """
    arguments = prepared(op, explain, q, k, v, **options).arguments
    return dispatch.explain(describe(arguments), arguments.settings.backend)


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
    @with_hints()
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
        call = prepared(
            lla_attention,
            LLAFunction.apply,
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
        )
        found = forward(call.arguments)
        omega = without_gradient(found.report.omega, found.o)
        return call.restore(found.o), call.restore(omega).unsqueeze(-1)
