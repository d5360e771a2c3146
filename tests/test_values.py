"""Checks on the numbers that tensors hold, where they are asked for."""

from __future__ import annotations

import functools

import pytest
import torch

from flashlla import lla_attention_varlen, lla_decode
from flashlla.values import check_values, looked_at
from tests.support.helpers import cu, problem_of, qkv

pytestmark = pytest.mark.quick


def test_where_numbers_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    assert looked_at(torch.device("cpu"))
    assert not looked_at(torch.device("meta"))
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    assert looked_at(torch.device("meta"))


def test_lla_attention(monkeypatch):
    """On a device of which no number can be read at all."""
    q, k, v = (t.to("meta") for t in qkv(2, 9, 4))
    call = problem_of(q, k, v, ridge_lambda=1.0, seqlens_k=torch.ones(2, dtype=torch.int32, device="meta"))
    check_values(*call)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        check_values(*call)


def test_lla_attention_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of which no number can be read at all."""
    q, k, v = (torch.zeros(30, 2, 8, device="meta") for _ in range(3))
    prepare = functools.partial(
        problem_of, q, k, v, lla_attention_varlen, cu_seqlens=cu(0, 9, 9, 10, 27, device="meta")
    )
    with pytest.raises(RuntimeError, match="meta"):
        prepare()
    call = prepare(max_seqlen=17)
    check_values(*call)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        check_values(*call)


def test_lla_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of which no number can be read at all."""
    on = lambda *shape, dtype=torch.float32: torch.zeros(shape, device="meta", dtype=dtype)
    tensors = on(2, 2, 1, 8), on(5, 2, 16, 8), on(5, 2, 16, 8)
    tables = {"seqlens_k": on(2, dtype=torch.int32), "block_table": on(2, 3, dtype=torch.int32)}
    call = problem_of(*tensors, op=lla_decode, **tables)
    check_values(*call)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        check_values(*call)
