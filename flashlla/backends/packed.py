"""Packed sequences for backends that know sequences of one length only: one after the other, on views.

Each gets what it would get alone, and nothing crosses from one to the next. Where they begin is read as numbers, which
waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flashlla.backends.base import Backend
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

B = TypeVar("B", bound=Backend)


class _Sequence(NamedTuple):
    number: int
    rows: slice  # of q, in its third dimension
    keys: slice  # of k and v
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
    q, k, v, ridge = inputs[:4]
    own_mask = dataclasses.replace(problem.mask, packed=False)
    q_edges = sequence_bounds(inputs.cu_seqlens_q, problem.q_len, problem.max_seqlen_q)
    k_edges = sequence_bounds(inputs.cu_seqlens_k, problem.k_len, problem.max_seqlen_k)
    for number, edges in enumerate(torch.stack([*q_edges, *k_edges], 1).tolist()):
        q_first, q_last, k_first, k_last = edges
        rows, keys = slice(q_first, q_last), slice(k_first, k_last)
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
            views = Inputs(q[:, :, rows], k[:, :, keys], v[:, :, keys], ridge[:, :, rows])
            yield _Sequence(number, rows, keys, alone, views)


def forward(unpacked: Callable[[B, Problem, Inputs], Forward]) -> Callable[[B, Problem, Inputs], Forward]:
    """The ``forward`` of a backend, made to take packed sequences as well. Tokens of no sequence have zeros."""

    @functools.wraps(unpacked)
    def run(self: B, problem: Problem, inputs: Inputs) -> Forward:
        if not problem.mask.packed:
            return unpacked(self, problem, inputs)
        dtype, q = accumulator(problem.dtype), inputs.q
        per_query = lambda dtype: q.new_zeros(q.shape[:-1], dtype=dtype)
        o = empty_output(q, inputs.v).zero_()
        residuals = Residuals(
            per_query(dtype), per_query(dtype), q.new_zeros(q.shape, dtype=dtype), q.new_zeros(q.shape, dtype=dtype)
        )
        report = Report(per_query(dtype), per_query(torch.int32), per_query(dtype), ~per_query(torch.bool))
        for sequence in _sequences(problem, inputs):
            with sequence.named():
                part = unpacked(self, sequence.problem, sequence.inputs)
            for whole, piece in zip((o, *residuals, *report), (part.o, *part.residuals, *part.report)):
                whole[:, :, sequence.rows] = piece
        return Forward(o, residuals, report)

    return run


def backward(
    unpacked: Callable[[B, Problem, Inputs, Residuals, Tensor], Gradients],
) -> Callable[[B, Problem, Inputs, Residuals, Tensor], Gradients]:
    """The same for ``backward``."""

    @functools.wraps(unpacked)
    def run(self: B, problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor) -> Gradients:
        if not problem.mask.packed:
            return unpacked(self, problem, inputs, residuals, grad_o)
        q, k, v, ridge = inputs[:4]
        found = Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), ridge.new_zeros(ridge.shape))
        for sequence in _sequences(problem, inputs):
            rows, keys = sequence.rows, sequence.keys
            own = Residuals(*(t[:, :, rows] for t in residuals))
            with sequence.named():
                part = unpacked(self, sequence.problem, sequence.inputs, own, grad_o[:, :, rows])
            for whole, piece, place in zip(found, part, (rows, keys, keys, rows)):
                whole[:, :, place] = piece
        return found

    return run
