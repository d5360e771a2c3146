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
    Residuals,
    keyless_forward,
    sequence_bounds,
    zero_gradients,
)


def forward(one: Callable[[Problem, Inputs], Forward], problem: Problem, inputs: Inputs) -> Forward:
    """The sequences' results side by side, ``one`` making that of a sequence. Tokens of no sequence have zeros."""
    found = keyless_forward(inputs.q, inputs.v)
    for sequence in _sequences(problem, inputs):
        with sequence.named():
            part = one(sequence.problem, sequence.inputs)
        found.o[:, :, sequence.queries] = part.o
        for whole, piece in zip((*found.residuals, *found.report), (*part.residuals, *part.report), strict=True):
            whole[:, :, sequence.queries] = piece
    return found


def backward(
    one: Callable[[Problem, Inputs, Residuals, Tensor], Gradients],
    problem: Problem,
    inputs: Inputs,
    residuals: Residuals,
    grad_o: Tensor,
) -> Gradients:
    """The same for gradients."""
    found = zero_gradients(inputs, problem.unrounded)
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
            views = inputs._replace(
                q=inputs.q[:, :, queries],
                k=inputs.k[:, :, keys],
                v=inputs.v[:, :, keys],
                ridge_lambda=inputs.ridge_lambda[:, :, queries],
                cu_seqlens_q=None,
                cu_seqlens_k=None,
            )
            yield _Sequence(number, queries, keys, alone, views)
