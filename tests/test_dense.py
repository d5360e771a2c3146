"""What the PyTorch backends share: blocks of heads, queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla.backends import chunked, dense
from flashlla.covariance import Systems
from tests.support.cases import CASES, Case
from tests.support.helpers import normal, problem_of

pytestmark = pytest.mark.quick

MASKED = [case for case in CASES if case.packed is None and case.small]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in MASKED])
def test_a_block_hides_what_its_queries_do_not_see(case: Case) -> None:
    leaves = case.make(torch.float32)
    problem, inputs = problem_of(*case.arrange(leaves), **case.keywords(leaves))
    seen = case.visible().expand(problem.batch, problem.q_heads, -1, -1)
    seen = seen.unflatten(1, (problem.kv_heads, problem.group)).flatten(0, 1)  # (H, group, Sq, Sk)
    for heads, queries, keys in (
        (range(seen.shape[0]), range(problem.q_len), range(problem.k_len)),
        (range(seen.shape[0] // 2, seen.shape[0]), range(problem.q_len // 3, problem.q_len), range(problem.k_len)),
    ):
        block = dense.Block(heads, queries, keys)
        hidden = block.hidden(problem, problem.key_spans(inputs))
        hidden = torch.zeros((), dtype=torch.bool) if hidden is None else hidden
        rows = block.rows_of(seen)
        assert torch.equal(hidden.expand(rows.shape), ~rows)


def test_rows_that_are_put_back_are_where_they_came_from() -> None:
    t = normal(3, 2, 7, 4)  # (H, group, Sq, D)
    block = dense.Block(range(1, 3), range(2, 6), range(7))
    rows = block.rows_of(t)
    assert torch.equal(rows, torch.stack([t[1, :, 2:6].reshape(8, 4), t[2, :, 2:6].reshape(8, 4)]))
    other = torch.zeros_like(t)
    block.put_rows(other, rows)
    assert torch.equal(other[1:, :, 2:6], t[1:, :, 2:6])
    assert other.count_nonzero() == rows.count_nonzero()


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_system_goes_by_its_query_and_query_head(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two query heads share a key head, and the chunked backend takes one key head and two queries at a time."""
    matrices = Systems.dense

    def spoilt(systems: Systems) -> Tensor:
        return matrices(systems).masked_fill_((systems.ridge == 0.5)[..., None, None], 0)

    monkeypatch.setattr(Systems, "dense", spoilt)
    monkeypatch.setattr(chunked, "BLOCK_M", 4)
    monkeypatch.setitem(chunked._BLOCK_WEIGHTS, "cpu", 1)
    q, k, v = (normal(2, heads, 5, 3, seed=heads) for heads in (6, 3, 3))
    ridge = torch.ones(2, 6, 5, dtype=torch.float64)
    ridge[1, 3, 4] = 0.5
    with pytest.raises(torch.linalg.LinAlgError, match=r"query 4 of sequence and head \(1, 3\)"):
        flashlla.lla_attention(q, k, v, ridge_lambda=ridge, solver="direct", backend=backend)
