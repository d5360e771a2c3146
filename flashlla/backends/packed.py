"""Packed sequences for backends that know sequences of one length only: one after the other, on views.

Each gets what it would get alone, and nothing crosses from one to the next. Where they begin is read as numbers, which
waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla.problem import (
    Forward,
    Gradients,
    Inputs,
    Problem,
    Report,
    Residuals,
    accumulator,
    empty_output,
    sequence_bounds,
)


def forward(one: Callable[[Problem, Inputs], Forward], problem: Problem, inputs: Inputs) -> Forward:
    """The sequences' results side by side, ``one`` making that of a sequence. Tokens of no sequence have zeros."""
    dtype, q = accumulator(problem.dtype), inputs.q
    number = lambda dtype=dtype: q.new_zeros(q.shape[:-1], dtype=dtype)  # one a query
    vector = lambda: q.new_zeros(q.shape, dtype=dtype)
    o = empty_output(q, inputs.v).zero_()
    residuals = Residuals(number(), number(), vector(), vector())
    report = Report(number(), number(torch.int32), number(), ~number(torch.bool))
    for sequence in _sequences(problem, inputs):
        with sequence.named():
            part = one(sequence.problem, sequence.inputs)
        for whole, piece in zip((o, *residuals, *report), (part.o, *part.residuals, *part.report), strict=True):
            whole[:, :, sequence.queries] = piece
    return Forward(o, residuals, report)


def backward(
    one: Callable[[Problem, Inputs, Residuals, Tensor], Gradients],
    problem: Problem,
    inputs: Inputs,
    residuals: Residuals,
    grad_o: Tensor,
) -> Gradients:
    """The same for gradients."""
    q, k, v, ridge = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda
    found = Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), ridge.new_zeros(ridge.shape))
    for sequence in _sequences(problem, inputs):
        queries, keys = sequence.queries, sequence.keys
        own = Residuals(*(t[:, :, queries] for t in residuals))
        with sequence.named():
            part = one(sequence.problem, sequence.inputs, own, grad_o[:, :, queries])
        found.q[:, :, queries] = part.q
        found.k[:, :, keys] = part.k
        found.v[:, :, keys] = part.v
        found.ridge_lambda[:, :, queries] = part.ridge_lambda
    return found


class _Sequence(NamedTuple):
    number: int
    queries: slice
    keys: slice
    problem: Problem
    inputs: Inputs

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Messages about a system count queries in the sequence: they need its number."""
        try:
            yield
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise type(error)(f"packed sequence {self.number}: {error}") from error


def _sequences(problem: Problem, inputs: Inputs) -> Iterator[_Sequence]:
    """Those with something to compute, each as a call of its own."""
    q, k, v, ridge = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda
    own_mask = dataclasses.replace(problem.mask, packed=False)
    q_edges = sequence_bounds(inputs.cu_seqlens_q, problem.q_len, problem.max_seqlen_q)
    k_edges = sequence_bounds(inputs.cu_seqlens_k, problem.k_len, problem.max_seqlen_k)
    for number, edges in enumerate(torch.stack([*q_edges, *k_edges], 1).tolist()):
        q_first, q_last, k_first, k_last = edges
        queries, keys = slice(q_first, q_last), slice(k_first, k_last)
        alone = dataclasses.replace(
            problem,
            q_len=q_last - q_first,
            k_len=k_last - k_first,
            mask=own_mask,
            sequences=0,
            max_seqlen_q=0,
            max_seqlen_k=0,
        )
        if not alone.empty:
            views = Inputs(q[:, :, queries], k[:, :, keys], v[:, :, keys], ridge[:, :, queries])
            yield _Sequence(number, queries, keys, alone, views)
