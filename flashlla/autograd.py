"""The operators, and their derivative: the only place that knows torch.autograd and torch.library.

The operators are opaque to torch.compile; ``forward``, ``backward`` and ``decode`` are three of them as functions that
torch.func transforms too. The choice of a backend is made inside the operator, at run time and in the caller's
context. It is no output: all of these are on the inputs' device, so that CUDA graphs hold whole steps. To the backward
operator, which may run on another thread, it goes as a name; of a forward pass that was traced and did not run, the
demand goes instead. Who asks ``which`` it was is told by a number on the CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashlla import dispatch, solvers
from flashlla.backends.base import Backend, warn_if_stopped_early
from flashlla.problem import (
    Inputs,
    Mask,
    Problem,
    Residuals,
    accumulator,
    empty_output,
)
from flashlla.values import check_values

# Everything about a call that is not a tensor, in the order all operators take it.
_SETTINGS = (
    "bool causal, SymInt? window, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float delta_eps, str solver, "
    "float[] solver_settings, bool solver_demanded"
)
# The tensors that say which keys a query sees.
_LENGTHS = "Tensor? seqlens_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"


def describe(
    inputs: Inputs,
    causal: bool,
    window: int | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    delta_eps: float,
    solver: str,
    settings: Sequence[float],
    demanded: bool,
    *,
    decoding: bool = False,
) -> Problem:
    """The Problem of one call."""
    q, k, v = inputs[:3]
    cu_seqlens, pages = inputs.cu_seqlens_q, inputs.block_table
    k_len = k.shape[2] if pages is None else k.shape[2] * pages.shape[1]
    if window is not None:  # no larger than makes a difference, so that sums with it do not overflow
        window = min(window, max(1, k_len))
    return Problem(
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k_len,
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
        max_seqlen_q=min(max_seqlen_q, q.shape[2]),
        max_seqlen_k=min(max_seqlen_k, k_len),
        page_size=None if pages is None else k.shape[2],
    )


def _no_autocast(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    """Inside an operator the dtypes are the backend's affair: autocast has done its part on the inputs."""
    device = problem.device.type
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class _Ran(threading.local):
    """The name of the backend that the last forward pass of this thread ran on, for `_save`; None if it was traced."""

    name: str | None = None


_ran = _Ran()


def _no_capture(chosen: Backend, problem: Problem) -> Backend:
    """``chosen``, unless a CUDA graph is being captured that cannot hold what it does."""
    if chosen.waits and problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"flashlla: the backend {chosen.name!r} waits for the device, which a CUDA graph cannot hold. Try a call "
            f"that the Triton backends take (flashlla.explain says why they do not), or no CUDA graph: torch.compile "
            f"without mode='reduce-overhead' or 'max-autotune'."
        )
    return chosen


def _allocate(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Uninitialised outputs of the forward operator: o, residuals, report."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    row = lambda dtype: q.new_empty(rows, dtype=dtype)
    full = lambda: q.new_empty(q.shape, dtype=dtype)
    return [
        empty_output(q, v), row(dtype), row(dtype), full(), full(),
        row(dtype), row(torch.int32), row(dtype), row(torch.bool),
    ]  # fmt: skip


def _forward(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k, *settings_and_backend):  # type: ignore[no-untyped-def]
    *settings, backend = settings_and_backend
    inputs = Inputs(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    problem = describe(inputs, *settings)
    check_values(problem, inputs)
    chosen = dispatch.choose(problem, backend)
    _ran.name = chosen.name
    if problem.empty:
        *found, converged = _allocate(q, k, v)
        return (*(t.zero_() for t in found), converged.fill_(True))
    with _no_autocast(problem):
        o, residuals, report = _no_capture(chosen, problem).forward(problem, inputs)
    warn_if_stopped_early(problem, inputs, report)
    return (o, *(t.contiguous() for t in (*residuals, *report)))  # laid out as the fake says


def _forward_fake(q, k, v, *_):  # type: ignore[no-untyped-def]
    _ran.name = None
    return tuple(_allocate(q, k, v))


def _which(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k, *settings_and_backend):  # type: ignore[no-untyped-def]
    *settings, backend = settings_and_backend
    problem = describe(Inputs(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k), *settings)
    return torch.tensor(dispatch.serial(dispatch.choose(problem, backend)))


def _backward(grad_o, q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k, *rest):  # type: ignore[no-untyped-def]
    lse, guard, probe, k_mean, *settings, ran_or_demand = rest
    inputs = Inputs(q, k, v, ridge_lambda, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    problem = describe(inputs, *settings)
    if problem.empty:
        return tuple(t.zero_() for t in _allocate_gradients(q, k, v, ridge_lambda))
    if ran_or_demand in (None, dispatch.AUTO):
        chosen = dispatch.choose(problem, ran_or_demand)
    else:
        chosen = dispatch.backend_named(ran_or_demand)
    with _no_autocast(problem):
        dq, dk, dv, dridge = _no_capture(chosen, problem).backward(
            problem, inputs, Residuals(lse, guard, probe, k_mean), grad_o
        )
    return dq, dk, dv, dridge.contiguous()


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor, ridge_lambda: Tensor) -> list[Tensor]:
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), ridge_lambda.new_empty(ridge_lambda.shape)]


def _backward_fake(grad_o, q, k, v, ridge_lambda, *_):  # type: ignore[no-untyped-def]
    return tuple(_allocate_gradients(q, k, v, ridge_lambda))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, guard, probe, k_mean, *_ = output
    ctx.save_for_backward(*inputs[:7], lse, guard, probe, k_mean)
    *settings, demand = inputs[7:]
    ctx.settings = (*settings, demand if _ran.name is None else _ran.name)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_o: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_o is None:
        return (None,) * 17
    return (*backward(grad_o, *ctx.saved_tensors, *ctx.settings), *(None,) * 13)


def _refuse(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "flashlla: lla_attention has a first derivative only; this asked for the derivative of its gradient "
        "(create_graph=True, torch.autograd.functional.hessian, a gradient penalty). Try finite differences of the "
        "gradient, or detach it."
    )


class WithoutGradient(torch.autograd.Function):
    """The identity on omega; a gradient that arrives at it is refused, not dropped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(omega: Tensor) -> Tensor:
        return omega.view_as(omega)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            "flashlla: omega has no gradient, and a loss was made of it; try omega.detach(), or torch.logsumexp of the "
            "logits themselves"
        )


def _write_decode(q, k, v, ridge_lambda, seqlens_k, block_table, *settings_backend_and_out):  # type: ignore[no-untyped-def]
    *settings, backend, out = settings_backend_and_out
    inputs = Inputs(q, k, v, ridge_lambda, seqlens_k, block_table=block_table)
    problem = describe(inputs, *settings, decoding=True)
    check_values(problem, inputs)
    chosen = dispatch.choose(problem, backend)
    if problem.empty:
        out.zero_()
        return
    with _no_autocast(problem):
        _no_capture(chosen, problem).decode(problem, inputs, out)


def _decode_out(*arguments):  # type: ignore[no-untyped-def]
    _write_decode(*arguments)
    torch.autograd.graph.increment_version(arguments[-1])  # who saved it for a backward pass shall notice


def _decode(q, k, v, *rest):  # type: ignore[no-untyped-def]
    out = empty_output(q, v)
    _write_decode(q, k, v, *rest, out)
    return out


def _decode_fake(q, k, v, *_):  # type: ignore[no-untyped-def]
    return empty_output(q, v)


def _refuse_decode(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "flashlla: lla_decode has no gradient, and a loss was made of its output; try torch.no_grad() around it, or "
        "lla_attention, which has one"
    )


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, ...) with a dimension of ``size`` at ``dim``, or (None) without, as (size B, ...)."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _unfold(t: Tensor, size: int) -> Tensor:
    rows: Tensor = t.unflatten(0, (size, t.shape[0] // size))
    return rows


def _forward_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    """The dimension becomes part of the batch."""
    _refuse_vmap_of_packed(arguments[5])
    folded = [_fold(t, dim, info.batch_size) for t, dim in zip(arguments[:7], in_dims)]
    found = forward(*folded, *arguments[7:])
    return tuple(_unfold(t, info.batch_size) for t in found), (0,) * len(found)


def _which_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    folded = [_fold(t, dim, info.batch_size) for t, dim in zip(arguments[:7], in_dims)]
    return which_op(*folded, *arguments[7:]), None


def _backward_vmap(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
    _refuse_vmap_of_packed(arguments[6])
    folded = [_fold(t, dim, info.batch_size) for t, dim in zip(arguments[:11], in_dims)]
    found = backward(*folded, *arguments[11:])
    return tuple(_unfold(t, info.batch_size) for t in found), (0,) * len(found)


def _refuse_vmap_of_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError(
            "flashlla: torch.vmap over lla_attention_varlen is not supported; pack the sequences of all calls into one"
        )


def _decode_vmap(info, in_dims, *_):  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        "flashlla: torch.vmap over lla_decode is not supported; make the dimension part of the batch, as by "
        "q.flatten(0, 1)"
    )


# Defined with Library rather than custom_op, which imports the whole compiler (seconds) at an operator's first call.
_library = torch.library.Library("flashlla", "DEF")


def _define(name: str, arguments: str, outputs: int, kernel: Any, fake: Any, vmap: Any) -> Any:
    schema = f"{name}({arguments}) -> ({', '.join(['Tensor'] * outputs)})"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashlla::{name}", fake, lib=_library)
    torch.library.register_vmap(f"flashlla::{name}", vmap, lib=_library)
    return getattr(torch.ops.flashlla, name).default


_CALL = f"Tensor q, Tensor k, Tensor v, Tensor ridge_lambda, {_LENGTHS}, {_SETTINGS}, str? backend"
forward_op = _define(
    "forward",
    _CALL,
    9,
    _forward,
    _forward_fake,
    _forward_vmap,
)
# Which backend forward runs on: its number, on the CPU. A tensor torch.compile can return, a name it cannot.
which_op = _define(
    "which",
    _CALL,
    1,
    _which,
    lambda *_: torch.empty((), dtype=torch.int64, device="cpu"),
    _which_vmap,
)
backward_op = _define(
    "backward",
    f"Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor ridge_lambda, {_LENGTHS}, Tensor lse, Tensor guard, "
    f"Tensor probe, Tensor k_mean, {_SETTINGS}, str? ran_or_demand",
    4,
    _backward,
    _backward_fake,
    _backward_vmap,
)
_CACHE = f"Tensor q, Tensor k, Tensor v, Tensor ridge_lambda, Tensor seqlens_k, Tensor? block_table, {_SETTINGS}"
decode_op = _define("decode", f"{_CACHE}, str? backend", 1, _decode, _decode_fake, _decode_vmap)
decode_out_op = _define(
    "decode_out", f"{_CACHE}, str? backend, Tensor(a!) out", 0, _decode_out, lambda *_: None, _decode_vmap
)


def refuse_forward_mode(*_: Any) -> None:
    raise NotImplementedError(
        "flashlla: lla_attention has no forward-mode derivative (torch.func.jvp, jacfwd and hessian, forward_ad); "
        "try torch.func.grad, torch.autograd.grad or backward()"
    )


def _differentiable(op: Any, derivative: Any, vmap: Any, save: Any = lambda ctx, inputs, output: None) -> Any:
    """``op`` with its derivative, in both forms it is asked for: torch.compile takes what is registered with the
    operator, torch.func's transforms only a Function around it."""
    torch.library.register_autograd(op.name(), derivative, setup_context=save, lib=_library)
    rules = {"setup_context": save, "backward": derivative, "jvp": refuse_forward_mode, "vmap": vmap}
    rules["forward"] = lambda *arguments: op(*arguments)
    members = {name: staticmethod(rule) for name, rule in rules.items()}
    function: Any = type(op.name().replace("::", "_"), (torch.autograd.Function,), members)
    return lambda *arguments: op(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)


forward = _differentiable(forward_op, _differentiate, _forward_vmap, _save)
backward = _differentiable(backward_op, _refuse, _backward_vmap)
decode = _differentiable(decode_op, _refuse_decode, _decode_vmap)
