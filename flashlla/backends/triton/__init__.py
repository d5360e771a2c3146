"""Fused Triton kernels, forward and backward: what ``lla_attention`` runs on a GPU.

This module imports neither Triton nor a kernel until one runs. With TRITON_INTERPRET=1 set before that, Triton's
interpreter runs the kernels on CPU tensors: slow, for tests.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from typing import ClassVar

import torch
from torch import Tensor

from flashlla.backends.base import Backend, Kept
from flashlla.backends.triton import configs
from flashlla.problem import Forward, Gradients, Inputs, Moments, Problem, Report, Residuals
from flashlla.solvers import CG, spelling

# More keys than this, and the default solver has it: fewer are over before it pays.
GRAM_LEAST_KEYS = 1024


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None  # AMD's answer to the same question


class Triton(Backend):
    name = "triton"
    summary = "fused Triton kernels, conjugate gradients; memory linear in length"

    _fuses = "the solvers CG and PCG(preconditioner='jacobi' or 'gram')"
    # Of the solvers by these names.
    _preconditioners: ClassVar[dict[str, str]] = {"cg": "none", "pcg": "jacobi", "pcg_gram": "gram"}

    def unavailable(self) -> str | None:
        missing = []
        if not _has_gpu() and not interpreted():
            missing.append(
                "there is no CUDA device (TRITON_INTERPRET=1: the kernels run on the CPU, slowly, for tests)"
            )
        if not _has_triton():
            missing.append("Triton is not installed (torch brings it where it is built for CUDA)")
        return "; ".join(missing) or None

    def emulated(self) -> bool:
        return interpreted()

    def unsupported(self, problem: Problem) -> str | None:
        reasons = (self._device(problem), self._solver(problem), self._tensors(problem))
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def _device(self, problem: Problem) -> str | None:
        if problem.device.type == "cpu":
            told = interpreted() or not _has_gpu()  # `unavailable` says the same of all tensors
            return None if told else "its kernels run on CUDA tensors, and these are on the CPU"
        if problem.device.type != "cuda":
            return f"its kernels run on CUDA tensors, and these are on {problem.device}"
        if interpreted():
            return "TRITON_INTERPRET=1 is set: the kernels run on CPU tensors"
        major, minor = configs.capability(problem.device)
        if major < 8:
            return f"it needs compute capability 8.0, and {problem.device} has {major}.{minor}"
        return None

    def _tensors(self, problem: Problem) -> str | None:
        if problem.dtype == torch.float64:
            return "its kernels take bfloat16, float16 and float32, not float64"
        widest = max(problem.head_dim, problem.v_dim)
        if widest > 256:
            return f"it takes head dims up to 256, and this one is {widest}"
        if problem.device.type == "cuda":
            return configs.too_large(widest, problem.dtype, configs.capability(problem.device))
        return None

    def _solver(self, problem: Problem) -> str | None:
        if problem.few_new:
            if problem.solver_demanded and _name(problem) != "direct":
                return f"it decodes with a direct solve, not with {problem.solver.described()}"
            return None
        preconditioner = self.preconditioner(problem)
        if preconditioner is None:
            return f"it fuses {self._fuses}, not {problem.solver.described()}"
        if preconditioner == "gram":
            return _without_gram(problem)
        return None

    def preconditioner(self, problem: Problem) -> str | None:
        """What the solve kernel calls the preconditioner of this problem; None where it has no such solver."""
        return self._preconditioners.get(_name(problem)) if problem.solver_demanded else self._best(problem)

    def _best(self, problem: Problem) -> str:
        """The preconditioner where the caller leaves the choice."""
        long = problem.dtype != torch.float32 and problem.k_len > GRAM_LEAST_KEYS
        return "gram" if long and _without_gram(problem) is None else "none"

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        from flashlla.backends.triton import launch

        return launch.forward(problem, inputs, self.preconditioner(problem) or "none")

    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        from flashlla.backends.triton import launch

        return launch.backward(problem, inputs, residuals, grad_o, self.preconditioner(problem) or "none")

    def kept(self, problem: Problem, inputs: Inputs) -> Kept | None:
        from flashlla.backends.triton.kept import KeptPlans

        return KeptPlans(problem, inputs, self.preconditioner(problem) or "none")

    # A plan allocates what it was made for, on its own device, and runs there: nothing is left to look at.

    def forward_checked(self, problem: Problem, inputs: Inputs) -> Forward:
        return self.forward(problem, inputs)

    def backward_checked(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        return self.backward(problem, inputs, residuals, grad_o)

    def decode(self, problem: Problem, inputs: Inputs, out: Tensor, report: Report | None = None) -> Tensor:
        if not problem.few_new:
            return super().decode(_without_direct(problem), inputs, out, report)
        from flashlla.backends.triton.decode import decode

        return decode(problem, inputs, out, report)

    def moments(self, problem: Problem, inputs: Inputs) -> Moments:
        from flashlla.backends.triton.moments import moments

        return moments(problem, inputs)

    def solved(self, problem: Problem, found: Moments, ridge_lambda: Tensor) -> Tensor:
        from flashlla.backends.triton.moments import solved

        return solved(problem, found, ridge_lambda)


class TritonPCG(Triton):
    name = "triton_pcg"
    summary = "the same kernels, preconditioned conjugate gradients (Jacobi, or gram)"

    _fuses = "the solver PCG(preconditioner='jacobi' or 'gram')"
    _preconditioners: ClassVar[dict[str, str]] = {"pcg": "jacobi", "pcg_gram": "gram"}

    def _best(self, problem: Problem) -> str:
        return "jacobi"


def _without_direct(problem: Problem) -> Problem:
    """``problem``, whose caller has named no solver, solved as well as its dtype can tell."""
    if problem.solver_demanded:
        return problem
    solver = CG(tolerance=0.0, max_iters=max(CG.max_iters, 2 * problem.head_dim))
    return dataclasses.replace(problem, solver=solver)


def _without_gram(problem: Problem) -> str | None:
    """Why the preconditioner "gram" is not made for this problem; None where it is."""
    if problem.mask.packed:
        return "its preconditioner 'gram' is not made for packed sequences"
    capability = configs.capability(problem.device)
    if _has_triton() and not configs.gram_compiles(capability):
        return "Triton 3.6 does not compile its preconditioner 'gram' for compute capability 10"
    widest = max(problem.head_dim, problem.v_dim)
    most = configs.gram_widest(problem.dtype, capability)
    if widest > most:
        return f"its preconditioner 'gram' takes head dims up to {most}, and this one is {widest}"
    return None


def _name(problem: Problem) -> str:
    """Of the problem's solver; "" where it is none of this package."""
    own = spelling(problem.solver)
    return own.name if own else ""
