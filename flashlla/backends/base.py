"""What a backend is: it knows attention, and says which calls it cannot take and why."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flashlla.backends.moments import moments, solved
from flashlla.nonfinite import isolate
from flashlla.problem import (
    Forward,
    Gradients,
    Inputs,
    Moments,
    Problem,
    Report,
    Residuals,
    accumulator,
    keyless_forward,
)
from flashlla.solvers.base import warn_unconverged

_HERE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it ``device`` is the current one: not every operator of torch sees to that (torch.ldexp does not)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


class Kept(ABC):
    """What a backend keeps of a call, to run those that are like it: of the same Problem, with tensors of the same
    shapes, strides and dtypes, at multiples of 16 bytes."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, ridge_lambda: Tensor) -> Sequence[Tensor]:
        """The output and the residuals, one after the other, as :meth:`Backend.forward_checked` has them; no report."""

    @abstractmethod
    def reported(self, inputs: Inputs) -> Forward:
        """All that :meth:`Backend.forward_checked` has."""

    @abstractmethod
    def backward(self, saved: Sequence[Tensor], grad_o: Tensor) -> Sequence[Tensor]:
        """The gradients of q, k, v and ridge_lambda, as :meth:`Backend.backward_checked` has them. ``saved``: what
        forward was given, then the residuals. These may lie in memory as they did not before."""


class Backend(ABC):
    """One way to compute the operator, forward and backward.

    ``flashlla.register_backend`` makes an instance known under its ``name``. A backend that says it supports a
    problem supports both directions, and leaves and takes the same :class:`~flashlla.problem.Residuals` as any other,
    so that one backend can run the backward pass of another's forward pass; of a decoding problem, one whose
    ``mask.at_lengths`` is set, it supports :meth:`decode`. Nothing here is called with empty tensors. ``waits`` says
    that it reads numbers that lie on the device: while a CUDA graph is captured, which cannot hold that, it is refused.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    waits: ClassVar[bool] = False

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all; None where it can."""
        return None

    def emulated(self) -> bool:
        """Whether it runs here in an emulator only, for tests; such a backend runs when asked for, never unasked."""
        return False

    @abstractmethod
    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot take ``problem``, all of it, in words a user can act on; None where it can. Asked
        also where it is unavailable."""

    @abstractmethod
    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        """The output, what backward needs, and how the solve went."""

    @abstractmethod
    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        """The gradients of ``sum(o * grad_o)``, by (3.1) to (3.6)."""

    def kept(self, problem: Problem, inputs: Inputs) -> Kept | None:
        """For calls that are like this one, of q, k, v and ridge_lambda alone; None: there is no shorter way."""
        return None

    def forward_checked(self, problem: Problem, inputs: Inputs) -> Forward:
        """:meth:`forward`, all but o dense, and an error that names this backend where what it returns is not what was
        asked for."""
        q = inputs.q
        with on(q.device):
            found = self.forward(problem, inputs)
        check = _Check(f"backend {self.name!r}: what forward returns", q.device)
        check.record("", found, Forward)
        check.record(".residuals", found.residuals, Residuals)
        check.record(".report", found.report, Report)
        rows, vectors, wide = q.shape[:-1], q.shape, accumulator(q.dtype)
        residuals, report = found.residuals, found.report
        check.tensor(".o", found.o, (*rows, problem.v_dim), q.dtype)
        check.tensor(".residuals.lse", residuals.lse, rows, wide)
        check.tensor(".residuals.guard", residuals.guard, rows, wide)
        check.tensor(".residuals.probe", residuals.probe, vectors, wide)
        check.tensor(".residuals.k_mean", residuals.k_mean, vectors, wide)
        check.tensor(".report.omega", report.omega, rows, wide)
        check.tensor(".report.iterations", report.iterations, rows, torch.int32)
        check.tensor(".report.residual", report.residual, rows, wide)
        check.tensor(".report.converged", report.converged, rows, torch.bool)
        dense = lambda record: type(record)(*(t.contiguous() for t in record))
        return found._replace(residuals=dense(residuals), report=dense(report))

    def backward_checked(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        """The same of :meth:`backward`, dlambda dense."""
        with on(inputs.q.device):
            found = self.backward(problem, inputs, residuals, grad_o)
        check = _Check(f"backend {self.name!r}: what backward returns", inputs.q.device)
        check.record("", found, Gradients)
        of_keys = problem.key_gradients
        check.tensor(".q", found.q, inputs.q.shape, problem.dtype)
        check.tensor(".k", found.k, inputs.k.shape, of_keys)
        check.tensor(".v", found.v, inputs.v.shape, of_keys)
        check.tensor(".ridge_lambda", found.ridge_lambda, inputs.ridge_lambda.shape, inputs.ridge_lambda.dtype)
        return found._replace(ridge_lambda=found.ridge_lambda.contiguous())

    def decode_checked(self, problem: Problem, inputs: Inputs, out: Tensor, report: Report | None) -> None:
        """The same of :meth:`decode`."""
        with on(inputs.q.device):
            found = self.decode(problem, inputs, out, report)
        if found is not out:
            what = type(found).__name__ if not isinstance(found, Tensor) else "another tensor"
            raise TypeError(f"backend {self.name!r}: decode returned {what}, wanted out, with the result written to it")

    def decode(self, problem: Problem, inputs: Inputs, out: Tensor, report: Report | None = None) -> Tensor:
        """The output of new tokens against a cache, written to ``out``, (B, Hq, N, Dv), which is returned; how the
        solve went is written to ``report``, if it is asked for.

        Here by :meth:`forward`, on a cache gathered from its pages.
        """
        problem, inputs = plain_cache(problem, inputs)
        if problem.empty:
            outputs = keyless_forward(inputs.q, inputs.v)
        else:
            outputs = self.forward_checked(problem, inputs)
            warn_if_stopped_early(problem, inputs, outputs.report)
        if report is not None:
            for told, found in zip(report, outputs.report, strict=True):
                told.copy_(found)
        return out.copy_(outputs.o)

    def moments(self, problem: Problem, inputs: Inputs) -> Moments:
        """The moments of a decoding call with one new query a sequence, for who merges those of several caches.

        Here in PyTorch, on a cache gathered from its pages.
        """
        return moments(*plain_cache(problem, inputs))

    def solved(self, problem: Problem, found: Moments, ridge_lambda: Tensor) -> Tensor:
        """The output (..., Dv) of new queries (...) whose moments, of all keys, and ridges are these; NaN where a
        system is not positive definite.

        Here in PyTorch.
        """
        return solved(problem, found, ridge_lambda)


class _Check(NamedTuple):
    """Checks on what a backend returns, which messages call ``where``."""

    where: str
    device: torch.device  # of q

    def record(self, name: str, found: Any, kind: type[Any]) -> None:
        """Whether it is a record of that kind."""
        if not isinstance(found, kind):
            wanted = f"a flashlla.problem.{kind.__name__} of {', '.join(kind._fields)}"
            raise TypeError(f"{self._called(name)}: got {type(found).__name__}, wanted {wanted}")

    def tensor(self, name: str, found: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Whether it is such a tensor."""
        if not isinstance(found, Tensor):
            raise TypeError(f"{self._called(name)}: got {type(found).__name__}, wanted a torch.Tensor")
        if found.shape != shape:
            raise ValueError(f"{self._called(name)}: got shape {tuple(found.shape)}, wanted {tuple(shape)}")
        if found.dtype != dtype:
            raise TypeError(f"{self._called(name)}: got dtype {found.dtype}, wanted {dtype}")
        if found.device != self.device:
            raise ValueError(f"{self._called(name)}: got device {found.device}, wanted {self.device}, the device of q")

    def _called(self, name: str) -> str:
        return f"{self.where}, {name}" if name else self.where


def plain_cache(problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs]:
    """A decoding call on caches without pages, (B, Hkv, L, D); on the CPU without what no new token sees."""
    assert inputs.seqlens_k is not None
    k, v, table = inputs.k, inputs.v, inputs.block_table
    seqlens_k, seqstarts_k = inputs.seqlens_k, inputs.seqstarts_k
    first, last = 0, problem.k_len
    if problem.device.type == "cpu" and not problem.empty:  # elsewhere to read the lengths would wait for the device
        seqlens_k = seqlens_k.clamp(0, problem.k_len)
        last = int(seqlens_k.max())
        if problem.mask.window is not None:
            first = max(0, int(seqlens_k.min()) - problem.q_len + 1 - problem.mask.window)
        if seqstarts_k is not None:
            first = min(last, max(first, int(seqstarts_k.min())))
    gathered_from = 0  # the place of the first key that k and v hold
    if table is not None:
        size = k.shape[2]
        table = table[:, first // size : -(-last // size)].long().clamp(0, k.shape[0] - 1)
        k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k, v))  # of (B, pages, Hkv, page size, D)
        gathered_from = first // size * size
    seen = slice(first - gathered_from, last - gathered_from)
    problem = dataclasses.replace(problem, k_len=last - first, page_size=None)
    return problem, inputs._replace(
        k=k[:, :, seen],
        v=v[:, :, seen],
        seqlens_k=seqlens_k - first,
        seqstarts_k=None if seqstarts_k is None else seqstarts_k - first,
        block_table=None,
    )


def warn_if_stopped_early(problem: Problem, inputs: Inputs, report: Report) -> None:
    """Warn where a solver stopped early, on the CPU: elsewhere to look would wait for the device."""
    if problem.device.type != "cpu" or not (early := ~report.converged).any():
        return
    _, _, poison = isolate(problem, inputs)
    if poison is not None:  # NaN where the inputs are not finite says itself what it comes from
        early &= ~poison.queries
    warn_unconverged(problem.solver, report.residual[early], early.numel())
