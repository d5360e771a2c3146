"""The operator pair, and its derivative: the only place that knows torch.autograd and torch.library.

Both operators are opaque to torch.compile. The choice of a backend is made inside the forward operator, at run time
and in the caller's context; it travels to the backward operator, which may run on another thread, as a number on the
CPU among the saved tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashlla import dispatch, solvers
from flashlla.nonfinite import isolate
from flashlla.problem import (
    Inputs,
    Mask,
    Problem,
    Report,
    Residuals,
    accumulator,
    empty_output,
)
from flashlla.solvers.base import warn_unconverged

# Everything about a call that is not a tensor, in the order both operators take it.
_SETTINGS = (
    "bool causal, SymInt? window, SymInt longest_q, SymInt longest_k, float scale, float delta_eps, str solver, "
    "float[] solver_settings, bool solver_demanded"
)
# The tensors that say which keys a query sees.
_LENGTHS = "Tensor? seqlens_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"


def describe(
    inputs: Inputs,
    causal: bool,
    window: int | None,
    longest_q: int,
    longest_k: int,
    scale: float,
    delta_eps: float,
    solver: str,
    settings: Sequence[float],
    demanded: bool,
    decoding: bool = False,
) -> Problem:
    """The Problem of one call."""
    q, k, v = inputs[:3]
    cu_seqlens, pages = inputs.cu_seqlens_q, inputs.block_table
    return Problem(
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2] if pages is None else k.shape[2] * pages.shape[1],
        head_dim=q.shape[3],
        v_dim=v.shape[3],
        dtype=q.dtype,
        device=q.device,
        scale=scale,
        delta_eps=delta_eps,
        solver=solvers.decode(solver, settings),
        solver_demanded=demanded,
        mask=Mask(
            causal,
            window,
            padded=inputs.seqlens_k is not None,
            at_lengths=decoding,
            packed=cu_seqlens is not None,
        ),
        sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        longest_q=longest_q,
        longest_k=longest_k,
        page_size=None if pages is None else k.shape[2],
    )


def _no_autocast(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    """Inside an operator the dtypes are the backend's affair: autocast has done its part on the inputs."""
    device = problem.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _allocate(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Uninitialised outputs of the forward operator: o, residuals, report, choice."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    row = lambda dtype: q.new_empty(rows, dtype=dtype)
    full = lambda: q.new_empty(q.shape, dtype=dtype)
    return [
        empty_output(q, v), row(dtype), row(dtype), full(), full(),
        row(dtype), row(torch.int32), row(dtype), row(torch.bool),
        torch.empty((), dtype=torch.int64, device="cpu"),
    ]  # fmt: skip


def _forward(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k, *settings_and_backend):  # type: ignore[no-untyped-def]
    *settings, backend = settings_and_backend
    inputs = Inputs(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    problem = describe(inputs, *settings)
    chosen = dispatch.choose(problem, backend)
    choice = torch.tensor(dispatch.serial(chosen))
    if problem.empty:
        return (*(t.zero_() for t in _allocate(q, k, v)[:-1]), choice)
    if q.device.type == "cpu":  # elsewhere looking at the numbers would wait for the device
        _check_ridge(ridge_lambda)
    with _no_autocast(problem):
        o, residuals, report = chosen.forward(problem, inputs)
    if q.device.type == "cpu":
        _warn_if_stopped_early(problem, inputs, report)
    return (o, *(t.contiguous() for t in (*residuals, *report)), choice)  # laid out as the fake says


def _forward_fake(q, k, v, *_):  # type: ignore[no-untyped-def]
    return tuple(_allocate(q, k, v))


def _backward(grad_o, q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k, *rest):  # type: ignore[no-untyped-def]
    lse, guard, probe, k_mean, choice, *settings = rest
    inputs = Inputs(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    problem = describe(inputs, *settings)
    if problem.empty:
        return tuple(t.zero_() for t in _allocate_gradients(q, k, v, ridge_lambda))
    chosen = dispatch.backend_numbered(int(choice))
    with _no_autocast(problem):
        dq, dk, dv, dridge = chosen.backward(problem, inputs, Residuals(lse, guard, probe, k_mean), grad_o)
    return dq, dk, dv, dridge.contiguous()


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor, ridge_lambda: Tensor) -> list[Tensor]:
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), ridge_lambda.new_empty(ridge_lambda.shape)]


def _backward_fake(grad_o, q, k, v, ridge_lambda, *_):  # type: ignore[no-untyped-def]
    return tuple(_allocate_gradients(q, k, v, ridge_lambda))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (*settings, _) = inputs[:7], inputs[7:]
    _, lse, guard, probe, k_mean, *_, choice = output
    ctx.save_for_backward(*tensors, lse, guard, probe, k_mean, choice)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_o: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_o is None:
        return (None,) * 17
    return (*backward_op(grad_o, *ctx.saved_tensors, *ctx.settings), *(None,) * 13)


def _refuse(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "flashlla: lla_attention has a first derivative only; this asked for the derivative of its gradient "
        "(create_graph=True, torch.autograd.functional.hessian, a gradient penalty). Try finite differences of the "
        "gradient, or detach it."
    )


class WithoutGradient(torch.autograd.Function):
    """The identity on omega; a gradient that arrives at it is refused, not dropped."""

    @staticmethod
    def forward(ctx: Any, omega: Tensor) -> Tensor:
        return omega.view_as(omega)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "flashlla: omega has no gradient, and a loss was made of it; try omega.detach(), or torch.logsumexp of the "
            "logits themselves"
        )


def _check_ridge(ridge_lambda: Tensor) -> None:
    if (bad := ridge_lambda <= 0).any():
        batch, head, query = bad.nonzero()[0].tolist()
        number = ridge_lambda[batch, head, query].item()
        raise ValueError(f"ridge_lambda: got {number} at batch {batch}, head {head}, query {query}, wanted above 0")


def _warn_if_stopped_early(problem: Problem, inputs: Inputs, report: Report) -> None:
    early = ~report.converged
    if not early.any():
        return
    poison = isolate(problem, inputs)[2]
    if poison is not None:  # NaN where the inputs are not finite says itself what it comes from
        early &= ~poison.queries
    warn_unconverged(problem.solver, report.residual[early], early.numel())


# Defined with Library rather than custom_op, which imports the whole compiler (seconds) at an operator's first call.
_library = torch.library.Library("flashlla", "DEF")


def _define(name: str, arguments: str, outputs: int, kernel: Any, fake: Any) -> Any:
    schema = f"{name}({arguments}) -> ({', '.join(['Tensor'] * outputs)})"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashlla::{name}", fake, lib=_library)
    return getattr(torch.ops.flashlla, name).default


forward_op = _define(
    "forward",
    f"Tensor q, Tensor k, Tensor v, Tensor ridge_lambda, {_LENGTHS}, {_SETTINGS}, str? backend",
    10,
    _forward,
    _forward_fake,
)
backward_op = _define(
    "backward",
    f"Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor ridge_lambda, {_LENGTHS}, Tensor lse, Tensor guard, "
    f"Tensor probe, Tensor k_mean, Tensor choice, {_SETTINGS}",
    4,
    _backward,
    _backward_fake,
)
torch.library.register_autograd("flashlla::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("flashlla::backward", _refuse, lib=_library)
