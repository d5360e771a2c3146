"""What a backend is: it knows attention, and says which calls it cannot take and why."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashlla.nonfinite import isolate
from flashlla.problem import Forward, Gradients, Inputs, Problem, Report, Residuals, accumulator, keyless_forward
from flashlla.solvers.base import warn_unconverged


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
        """Why this backend cannot take ``problem``, in words a user can act on; None where it can."""

    @abstractmethod
    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        """The output, what backward needs, and how the solve went."""

    @abstractmethod
    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        """The gradients of ``sum(o * grad_o)``, by (3.1) to (3.6)."""

    def forward_checked(self, problem: Problem, inputs: Inputs) -> Forward:
        """:meth:`forward`, and an error that names this backend where what it returns is not what was asked for."""
        found, q = self.forward(problem, inputs), inputs.q
        where = f"backend {self.name!r}: what forward returns"
        _check_record(where, found, Forward)
        _check_record(f"{where}, .residuals", found.residuals, Residuals)
        _check_record(f"{where}, .report", found.report, Report)
        rows, wide = q.shape[:-1], accumulator(q.dtype)
        _check_tensor(f"{where}, .o", found.o, (*rows, problem.v_dim), q.dtype, q.device)
        for name, t in found.residuals._asdict().items():
            shape = q.shape if name in ("probe", "k_mean") else rows
            _check_tensor(f"{where}, .residuals.{name}", t, shape, wide, q.device)
        for name, t in found.report._asdict().items():
            dtype = {"iterations": torch.int32, "converged": torch.bool}.get(name, wide)
            _check_tensor(f"{where}, .report.{name}", t, rows, dtype, q.device)
        return found

    def backward_checked(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        """The same of :meth:`backward`."""
        found = self.backward(problem, inputs, residuals, grad_o)
        where = f"backend {self.name!r}: what backward returns"
        _check_record(where, found, Gradients)
        for name, t in found._asdict().items():
            like = getattr(inputs, name)
            _check_tensor(f"{where}, .{name}", t, like.shape, like.dtype, inputs.q.device)
        return found

    def decode_checked(self, problem: Problem, inputs: Inputs, out: Tensor, report: Report | None) -> None:
        """The same of :meth:`decode`."""
        if (found := self.decode(problem, inputs, out, report)) is not out:
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


def _check_record(name: str, found: Any, kind: type[Any]) -> None:
    """Whether ``found``, which messages call ``name``, is a record of that kind."""
    if not isinstance(found, kind):
        wanted = f"a flashlla.problem.{kind.__name__} of {', '.join(kind._fields)}"
        raise TypeError(f"{name}: got {type(found).__name__}, wanted {wanted}")


def _check_tensor(name: str, found: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Whether it is such a tensor."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: got {type(found).__name__}, wanted a torch.Tensor")
    if found.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(found.shape)}, wanted {tuple(shape)}")
    if found.dtype != dtype:
        raise TypeError(f"{name}: got dtype {found.dtype}, wanted {dtype}")
    if found.device != device:
        raise ValueError(f"{name}: got device {found.device}, wanted {device}, the device of q")


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
