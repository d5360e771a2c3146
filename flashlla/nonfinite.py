"""NaN and inf stay where they belong: in the rows that see them.

A matrix product spreads a NaN to rows whose weight for it is zero. The PyTorch backends therefore compute on inputs
with such values replaced, and put the NaN back where it is due. Nothing is copied where all is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashlla.problem import Forward, Gradients, Inputs, Problem, Residuals, accumulator, largest_key


@dataclass(frozen=True)
class Poison:
    """Which queries' outputs are NaN, and which keys' gradients are."""

    queries: Tensor  # (B, Hq, Sq) bool
    keys: Tensor  # (B, Hkv, Sk) bool

    def forward(self, result: Forward) -> Forward:
        """``result`` with NaN in all that the poisoned queries own."""
        report = result.report
        spoil = lambda t: t.masked_fill_(self.queries if t.dim() == 3 else self.queries.unsqueeze(-1), float("nan"))
        converged = report.converged & ~self.queries
        return Forward(
            o=spoil(result.o),
            residuals=Residuals(*map(spoil, result.residuals)),
            report=report._replace(omega=spoil(report.omega), residual=spoil(report.residual), converged=converged),
        )

    def backward(self, gradients: Gradients) -> Gradients:
        """``gradients`` with NaN for the poisoned queries and for every key that one of them sees."""
        nan = float("nan")
        return Gradients(
            q=gradients.q.masked_fill_(self.queries.unsqueeze(-1), nan),
            k=gradients.k.masked_fill_(self.keys.unsqueeze(-1), nan),
            v=gradients.v.masked_fill_(self.keys.unsqueeze(-1), nan),
            ridge_lambda=gradients.ridge_lambda.masked_fill_(self.queries, nan),
        )


def isolate(
    problem: Problem, inputs: Inputs, grad_o: Tensor | None = None
) -> tuple[Inputs, Tensor | None, Poison | None]:
    """``inputs`` and ``grad_o`` with nothing but finite numbers, and where NaN belongs (None: nowhere)."""
    q, k, v, ridge = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda
    largest = largest_key(accumulator(problem.dtype), problem.head_dim)
    finite_k = k.isfinite() & (k.abs() <= largest)  # in float16 the second alone takes infinity for no larger
    finite_q, finite_v, finite_ridge = q.isfinite(), v.isfinite(), ridge.isfinite()
    finite_g = torch.ones_like(finite_q[..., :1]) if grad_o is None else grad_o.isfinite()
    if all(bool(f.all()) for f in (finite_q, finite_k, finite_v, finite_ridge, finite_g)):
        return inputs, grad_o, None
    bad_key = ~(finite_k.all(-1) & finite_v.all(-1))  # (B, Hkv, Sk)
    # packed: tokens may be of no sequence
    start, stop = (t.clamp(max=problem.k_len) for t in problem.key_spans(inputs))
    shape = (*bad_key.shape[:-1], problem.q_len)
    start, stop = start.expand(shape), torch.maximum(start, stop).expand(shape)  # (B, Hkv, Sq)
    # Bad keys in a query's span: a running count, read off at its ends.
    count = torch.nn.functional.pad(bad_key.cumsum(-1), (1, 0))  # (B, Hkv, Sk + 1)
    seen = count.gather(-1, stop) > count.gather(-1, start)
    by_query_head = lambda t: t.repeat_interleave(problem.group, 1)  # (B, Hq, Sq)
    # One that sees no key has an output of 0, whatever it is: padding need not be finite.
    bad_query = ~(finite_q.all(-1) & finite_ridge & finite_g.all(-1)) & by_query_head(start < stop)
    queries = bad_query | by_query_head(seen)
    # A key's gradient is due NaN where a poisoned query sees it: spans that have begun and not ended there.
    poisoned = queries.unflatten(1, (-1, problem.group)).any(2).long()  # (B, Hkv, Sq)
    begun = torch.zeros_like(count).scatter_add_(-1, start, poisoned).scatter_add_(-1, stop, -poisoned).cumsum(-1)
    clean = lambda t, finite: torch.where(finite, t, 0)
    cleaned = inputs._replace(
        q=clean(q, finite_q),
        k=clean(k, finite_k),
        v=clean(v, finite_v),
        ridge_lambda=torch.where(finite_ridge, ridge, 1),
    )
    return cleaned, None if grad_o is None else clean(grad_o, finite_g), Poison(queries, begun[..., :-1] > 0)
