"""The plans of calls that are alike, found without a look at what they are for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flashlla.backends.base import Kept
from flashlla.backends.triton.launch import Around, plan_backward, plan_forward, run_forward
from flashlla.backends.triton.plan import Layout, Plan, layouts, planned
from flashlla.problem import Forward, Inputs, Problem
from flashlla.records import Row

_FORWARD = Row(Forward)
# Lengths and pages, which these calls do not have.
_NOTHING = (None,) * (len(Inputs._fields) - 4)


class KeptPlans(Kept):
    def __init__(self, problem: Problem, inputs: Inputs, preconditioner: str) -> None:
        self.problem, self.preconditioner, self.given = problem, preconditioner, layouts(inputs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ridge_lambda: Tensor) -> list[Tensor]:
        return self._run((q, k, v, ridge_lambda, *_NOTHING), False)

    def reported(self, inputs: Inputs) -> Forward:
        return _FORWARD.record(self._run(inputs, True))

    def _run(self, row: Sequence[Tensor | None], reported: bool) -> list[Tensor]:
        around = Around.now(self.problem.device)
        return run_forward(_forward(self, around, reported), self.problem, self.preconditioner, around, row)

    def backward(self, saved: Sequence[Tensor], grad_o: Tensor) -> list[Tensor]:
        tensors = (*saved[:4], *_NOTHING, *saved[4:], grad_o)
        return _backward(self, Around.now(self.problem.device), layouts(tensors)).run(tensors)


@planned
def _forward(kept: KeptPlans, around: Around, reported: bool) -> Plan:
    return plan_forward(kept.problem, kept.preconditioner, around, kept.given, reported)


@planned
def _backward(kept: KeptPlans, around: Around, given: tuple[Layout | None, ...]) -> Plan:
    return plan_backward(kept.problem, kept.preconditioner, around, given)
