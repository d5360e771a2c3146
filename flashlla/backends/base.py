"""What a backend is: it knows attention, and says which calls it cannot take and why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flashlla.problem import Forward, Gradients, Inputs, Problem, Residuals


class Backend(ABC):
    """One way to compute the operator, forward and backward.

    ``flashlla.register_backend`` makes an instance known under its ``name``. A backend that says it supports a
    problem supports both directions, and leaves and takes the same :class:`~flashlla.problem.Residuals` as any other,
    so that one backend can run the backward pass of another's forward pass. Nothing here is called with empty
    tensors.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""

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
