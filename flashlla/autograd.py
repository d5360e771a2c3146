"""The operators, and their derivative: with library.py all that knows torch.autograd and torch.library.

The operators are opaque to torch.compile; ``forward``, ``backward`` and ``decode`` are three of them as functions that
torch.func transforms too. The choice of a backend is made inside the operator, at run time and in the caller's
context. It is no output: all of these are on the inputs' device, so that CUDA graphs hold whole steps. To the backward
operator, which may run on another thread, it goes as a name; a traced forward pass, which has not run, hands on the
caller's demand instead. ``which`` returns the choice as a number on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flashlla import convergence, dispatch
from flashlla.backends.base import Backend, Kept, warn_if_stopped_early
from flashlla.checks import autocast_dtype
from flashlla.library import Operator, recorded
from flashlla.problem import (
    Arguments,
    Forward,
    Gradients,
    Inputs,
    Problem,
    Report,
    Residuals,
    Settings,
    describe,
    empty_forward,
    empty_gradients,
    empty_output,
    empty_report,
    fill_keyless,
    keyless_forward,
    zero_gradients,
)
from flashlla.records import Row
from flashlla.values import check_values, looked_at


class AdjointArguments(NamedTuple):
    """What the backward operator takes; the backend of its settings is that of the forward pass, or the demand."""

    grad_o: Tensor
    inputs: Inputs
    residuals: Residuals
    settings: Settings
    unrounded: bool  # dk and dv in the accumulator's dtype, for who adds them to others


class OutArguments(NamedTuple):
    """A call whose result is written to ``out``, (B, Hq, Sq, Dv)."""

    inputs: Inputs
    settings: Settings
    out: Tensor


class Choice(NamedTuple):
    """Which backend forward runs on: its number, on the CPU. A tensor torch.compile can return, a name it cannot."""

    number: Tensor


class Decoded(NamedTuple):
    o: Tensor  # (B, Hq, Sq, Dv)


class DecodedInfo(NamedTuple):
    o: Tensor  # (B, Hq, Sq, Dv)
    report: Report


class NoOutputs(NamedTuple):
    pass


class _Saved(NamedTuple):
    """Tensors that a forward pass keeps for its backward pass."""

    inputs: Inputs
    residuals: Residuals


_SAVED = Row(_Saved)
# Kinds of calls that are kept.
KINDS = 512
_AS_IT_IS: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class _LastBackend(threading.local):
    """The name of the backend that the last call of this thread ran on; None if it was traced."""

    name: str | None = None


_last_backend = _LastBackend()


# Forward and backward.


class _Known(NamedTuple):
    """What calls of a kind come to, where the backend keeps something of them."""

    problem: Problem
    name: str  # of the backend
    kept: Kept


_NOTHING: list[_Known | None] = [None]
_NO_LENGTHS = (None,) * 5


@functools.lru_cache(maxsize=KINDS)
def _cell(*key: Any) -> list[_Known | None]:
    """Where what is known of ``key`` is: empty until a call of its kind has run; None where nothing is kept."""
    return []


def _kind(operator: str, arguments: Arguments) -> list[_Known | None]:
    """The cell of a call without lengths whose numbers nobody looks at, by all that its way depends on."""
    inputs, settings = arguments
    q, k, v, ridge = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda
    lengths = inputs.seqlens_k, inputs.seqstarts_k, inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.block_table
    if lengths != _NO_LENGTHS or looked_at(q.device):
        return _NOTHING
    return _cell(
        operator, q.shape, q.stride(), q.dtype, q.device, q.data_ptr() % 16, k.shape, k.stride(), k.data_ptr() % 16,
        v.shape, v.stride(), v.data_ptr() % 16, ridge.stride(), ridge.data_ptr() % 16,
        *settings._replace(solver_numbers=tuple(settings.solver_numbers)), *dispatch.standing(settings.backend),
    )  # fmt: skip


def _keep(cell: list[_Known | None], problem: Problem, chosen: Backend, inputs: Inputs) -> None:
    if not cell:
        kept = None if problem.empty else chosen.kept(problem, inputs)
        cell.append(None if kept is None else _Known(problem, chosen.name, kept))


def _run_forward(arguments: Arguments) -> Forward:
    cell = _kind("forward", arguments)
    if cell and (known := cell[0]) is not None:
        name = known.name
        with no_autocast(known.problem):
            outputs = known.kept.reported(arguments.inputs)
    else:
        problem, inputs = describe(arguments), arguments.inputs.with_dense_lengths()
        check_values(problem, inputs)
        chosen = dispatch.choose(problem, arguments.settings.backend)
        name = chosen.name
        if problem.empty:
            outputs = keyless_forward(inputs.q, inputs.v)
        else:
            with no_autocast(problem):
                outputs = _no_capture(chosen, problem).forward_checked(problem, inputs)
            warn_if_stopped_early(problem, inputs, outputs.report)
        _keep(cell, problem, chosen, inputs)
    for counter in convergence.active:
        counter.add(outputs.report.converged)
    _last_backend.name = name  # not before: what it calls may be a forward pass, too
    return outputs


def _trace_forward(arguments: Arguments) -> Forward:
    _last_backend.name = None
    return empty_forward(arguments.inputs.q, arguments.inputs.v)


def _run_backward(arguments: AdjointArguments) -> Gradients:
    inputs, settings = arguments.inputs, arguments.settings
    cell = _kind("backward", Arguments(inputs, settings)) if not arguments.unrounded else _NOTHING
    if cell and (known := cell[0]) is not None:
        with no_autocast(known.problem):
            tensors = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda, *arguments.residuals
            return Gradients(*known.kept.backward(tensors, arguments.grad_o))
    inputs = inputs.with_dense_lengths()
    problem = describe(Arguments(inputs, settings))
    if arguments.unrounded:
        problem = dataclasses.replace(problem, unrounded=True)
    if problem.empty:
        return zero_gradients(inputs, arguments.unrounded)
    if settings.backend in (None, dispatch.AUTO):
        chosen = dispatch.choose(problem, settings.backend)
    else:
        chosen = dispatch.backend_named(settings.backend)
    _keep(cell, problem, chosen, inputs)
    with no_autocast(problem):
        return _no_capture(chosen, problem).backward_checked(problem, inputs, arguments.residuals, arguments.grad_o)


def _trace_backward(arguments: AdjointArguments) -> Gradients:
    return empty_gradients(arguments.inputs, arguments.unrounded)


def _save(ctx: Any, arguments: Arguments, outputs: Forward) -> None:
    ctx.save_for_backward(*_SAVED.flat(_Saved(arguments.inputs, outputs.residuals)))
    ctx.settings = _settings_of(arguments)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_o: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and ridge_lambda, the first of a call's arguments."""
    if grad_o is None:
        return ()
    saved = _SAVED.record(ctx.saved_tensors)
    return backward(AdjointArguments(grad_o, saved.inputs, saved.residuals, ctx.settings, unrounded=False))


# Which backend.


def _run_which(arguments: Arguments) -> Choice:
    return _choice(dispatch.choose(describe(arguments), arguments.settings.backend))


def _choice(backend: Backend) -> Choice:
    return Choice(torch.tensor(dispatch.number_of(backend), device="cpu"))


def _trace_which(arguments: Arguments) -> Choice:
    return Choice(torch.empty((), dtype=torch.int64, device="cpu"))


# Decoding.


def _run_decode(arguments: Arguments) -> Decoded:
    o = empty_output(arguments.inputs.q, arguments.inputs.v)
    _write_decoded(arguments, o)
    return Decoded(o)


def _run_decode_info(arguments: Arguments) -> DecodedInfo:
    q, v = arguments.inputs.q, arguments.inputs.v
    found = DecodedInfo(empty_output(q, v), empty_report(q))
    _write_decoded(arguments, found.o, found.report)
    return found


def _run_decode_out(arguments: OutArguments) -> NoOutputs:
    _write_decoded(Arguments(arguments.inputs, arguments.settings), arguments.out)
    torch.autograd.graph.increment_version(arguments.out)  # who saved it for a backward pass shall notice
    return NoOutputs()


def _write_decoded(arguments: Arguments, out: Tensor, report: Report | None = None) -> None:
    problem, inputs = describe(arguments), arguments.inputs.with_dense_lengths()
    check_values(problem, inputs)
    chosen = dispatch.choose(problem, arguments.settings.backend)
    if problem.empty:
        out.zero_()
        if report is not None:
            fill_keyless(report)
    else:
        with no_autocast(problem):
            _no_capture(chosen, problem).decode_checked(problem, inputs, out, report)
    _last_backend.name = chosen.name


def _trace_decode(arguments: Arguments) -> Decoded:
    return Decoded(empty_output(arguments.inputs.q, arguments.inputs.v))


def _trace_decode_info(arguments: Arguments) -> DecodedInfo:
    _last_backend.name = None
    return DecodedInfo(empty_output(arguments.inputs.q, arguments.inputs.v), empty_report(arguments.inputs.q))


def _trace_decode_out(arguments: OutArguments) -> NoOutputs:
    return NoOutputs()


# Inside the operators.


def no_autocast(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    """Inside an operator the dtypes are the backend's affair: autocast has done its part on the inputs."""
    device = problem.device.type
    return _AS_IT_IS if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _no_capture(chosen: Backend, problem: Problem) -> Backend:
    """``chosen``, unless a CUDA graph is being captured that cannot hold what it does."""
    if chosen.waits and problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"flashlla: the backend {chosen.name!r} waits for the device, which a CUDA graph cannot hold. Try a call "
            f"that the Triton backends take (flashlla.explain says why they do not), or no CUDA graph: torch.compile "
            f"without mode='reduce-overhead' or 'max-autotune'."
        )
    return chosen


# What is not differentiable.


def _refuse_second(ctx: Any, *_: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "flashlla: lla_attention has a first derivative only; this asked for the derivative of its gradient "
        "(create_graph=True, torch.autograd.functional.hessian, a gradient penalty). Try finite differences of the "
        "gradient, or detach it."
    )


def _refuse_decode(ctx: Any, grad_o: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "flashlla: lla_decode has no gradient, and a loss was made of its output; try torch.no_grad() around it, or "
        "lla_attention, which has one"
    )


def _refuse_forward_mode(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "flashlla: lla_attention has no forward-mode derivative (torch.func.jvp, jacfwd and hessian, forward_ad); "
        "try torch.func.grad, torch.autograd.grad or backward()"
    )


def without_gradient(omega: Tensor, o: Tensor) -> Tensor:
    """omega, made with ``o``; a gradient that arrives at it is refused, or, where a graph is traced, dropped."""
    traced = torch.compiler.is_compiling() or recorded()
    found: Tensor = omega.detach() if traced else _WithoutGradient.apply(omega, o)
    return found


class _WithoutGradient(torch.autograd.Function):
    """The identity on omega."""

    generate_vmap_rule = True

    @staticmethod
    def forward(omega: Tensor, o: Tensor) -> Tensor:
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


# torch.vmap: its dimension becomes part of the batch.


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """(B, ...) with a dimension of ``size`` at ``dim``, or (None) without, as (size B, ...)."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _fold_inputs(inputs: Inputs, dims: Any, size: int) -> Inputs:
    if inputs.cu_seqlens_q is not None:
        raise NotImplementedError(
            "flashlla: torch.vmap over lla_attention_varlen is not supported; pack the sequences of all calls into one"
        )
    return Inputs(*(_fold(t, dim, size) for t, dim in zip(inputs, dims)))  # type: ignore[arg-type]


def _unfold(t: Tensor, size: int) -> Tensor:
    rows: Tensor = t.unflatten(0, (size, t.shape[0] // size))
    return rows


def _batch_forward(size: int, dims: Any, arguments: Arguments) -> Forward:
    inputs = _fold_inputs(arguments.inputs, dims.inputs, size)
    outputs = forward(arguments._replace(inputs=inputs))
    unfold = lambda record: type(record)(*(_unfold(t, size) for t in record))
    return Forward(o=_unfold(outputs.o, size), residuals=unfold(outputs.residuals), report=unfold(outputs.report))


def _batch_which(size: int, dims: Any, arguments: Arguments) -> Choice:
    return WHICH(arguments._replace(inputs=_fold_inputs(arguments.inputs, dims.inputs, size)))


def _batch_backward(size: int, dims: Any, arguments: AdjointArguments) -> Gradients:
    residuals = (_fold(t, dim, size) for t, dim in zip(arguments.residuals, dims.residuals))
    folded = arguments._replace(
        grad_o=_fold(arguments.grad_o, dims.grad_o, size),  # type: ignore[arg-type]
        inputs=_fold_inputs(arguments.inputs, dims.inputs, size),
        residuals=Residuals(*residuals),  # type: ignore[arg-type]
    )
    return Gradients(*(_unfold(t, size) for t in backward(folded)))


def _refuse_to_batch(size: int, dims: Any, arguments: Any) -> NoReturn:
    raise NotImplementedError(
        "flashlla: torch.vmap over lla_decode is not supported; make the dimension part of the batch, as by "
        "q.flatten(0, 1)"
    )


# The operators. torch.ops is opaque to an editor: what runs is named here.
BACKWARD = Operator(
    "backward", AdjointArguments, Gradients, run=_run_backward, fake=_trace_backward, batch=_batch_backward
)
FORWARD = Operator(
    "forward", Arguments, Forward, run=_run_forward, fake=_trace_forward, batch=_batch_forward, calls=(BACKWARD,)
)
WHICH = Operator("which", Arguments, Choice, run=_run_which, fake=_trace_which, batch=_batch_which, batched=False)
DECODE = Operator("decode", Arguments, Decoded, run=_run_decode, fake=_trace_decode, batch=_refuse_to_batch)
DECODE_INFO = Operator(
    "decode_info", Arguments, DecodedInfo, run=_run_decode_info, fake=_trace_decode_info, batch=_refuse_to_batch
)
DECODE_OUT = Operator(
    "decode_out",
    OutArguments,
    NoOutputs,
    run=_run_decode_out,
    fake=_trace_decode_out,
    batch=_refuse_to_batch,
    writes="out",
)
FORWARD.differentiate(_differentiate, of=1, save=_save, forward_mode=_refuse_forward_mode)
BACKWARD.differentiate(_refuse_second, of=len(Gradients._fields), forward_mode=_refuse_forward_mode)
for _decoding in (DECODE, DECODE_INFO):
    _decoding.differentiate(_refuse_decode, of=1, forward_mode=_refuse_forward_mode)


def forward(arguments: Arguments) -> Forward:
    """The forward pass; differentiable."""
    return FORWARD.differentiable(arguments)


def backward(arguments: AdjointArguments) -> Gradients:
    """The gradients of ``sum(o * grad_o)``."""
    return BACKWARD.differentiable(arguments)


def which(arguments: Arguments) -> Tensor:
    """The number of the backend that has just run ``arguments``."""
    if torch.compiler.is_compiling() or _last_backend.name is None:
        return WHICH(arguments).number
    return _choice(dispatch.backend_named(_last_backend.name)).number


def ran_on(name: str | None) -> None:
    """Say that the backend of this ``name`` has run the last call of this thread."""
    _last_backend.name = name


def ran(arguments: Arguments) -> Arguments:
    """``arguments``, which have just run, for their backward pass: they name the backend, if it is known."""
    return arguments._replace(settings=_settings_of(arguments))


def _settings_of(arguments: Arguments) -> Settings:
    settings, name = arguments.settings, _last_backend.name
    return settings if name in (None, settings.backend) else settings._replace(backend=name)


def decode(arguments: Arguments) -> Tensor:
    """The output of new tokens against a cache; without a gradient, which it refuses."""
    return DECODE.differentiable(arguments).o


def decode_info(arguments: Arguments) -> DecodedInfo:
    """The same, and how the solve went."""
    return DECODE_INFO.differentiable(arguments)


def decode_out(arguments: Arguments, out: Tensor) -> None:
    """The same, written to ``out``."""
    inputs = arguments.inputs
    tensors = (inputs.q, inputs.k, inputs.v, inputs.ridge_lambda, out)
    tangent = lambda t: torch.autograd.forward_ad.unpack_dual(t).tangent
    if not torch.compiler.is_compiling() and any(tangent(t) is not None for t in tensors):
        _refuse_forward_mode()
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise NotImplementedError(
            "out: lla_decode has no gradient, and an argument requires one; try torch.no_grad() around it, or detach()"
        )
    DECODE_OUT(OutArguments(*arguments, out))
