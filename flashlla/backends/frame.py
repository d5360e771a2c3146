"""What surrounds a backend that knows sequences of one length and finite numbers only."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from flashlla.backends import packed
from flashlla.backends.base import Backend
from flashlla.nonfinite import isolate
from flashlla.problem import Forward, Gradients, Inputs, Problem, Residuals


class Framed(Backend):
    """A backend that has :meth:`forward_plain` and :meth:`backward_plain`; packed sequences, NaN and inf are taken care
    of here, by reading numbers that lie on the device."""

    waits = True

    @abstractmethod
    def forward_plain(self, problem: Problem, inputs: Inputs) -> Forward:
        """:meth:`forward` of finite numbers, in sequences that are not packed."""

    @abstractmethod
    def backward_plain(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        """:meth:`backward` of the same."""

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        if problem.mask.packed:
            return packed.forward(self._forward, problem, inputs)
        return self._forward(problem, inputs)

    def backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        if problem.mask.packed:
            return packed.backward(self._backward, problem, inputs, residuals, grad_o)
        return self._backward(problem, inputs, residuals, grad_o)

    def _forward(self, problem: Problem, inputs: Inputs) -> Forward:
        """Of one sequence length, whatever the numbers."""
        finite, _, poison = isolate(problem, inputs)
        found = self.forward_plain(problem, finite)
        return found if poison is None else poison.forward(found)

    def _backward(self, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        finite, finite_grad_o, poison = isolate(problem, inputs, grad_o)
        assert finite_grad_o is not None
        if poison is None:
            return self.backward_plain(problem, finite, residuals, finite_grad_o)
        residuals = Residuals(*(t.nan_to_num() for t in residuals))
        return poison.backward(self.backward_plain(problem, finite, residuals, finite_grad_o))
