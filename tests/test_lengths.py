"""Lengths, first keys and pages may lie anyhow in memory: what they say counts, not what lies behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashlla import lla_attention, lla_decode
from flashlla.backends.base import Backend
from tests.support.helpers import every_backend, normal, skip_if_refused

# (sequences,) int32, strided, from a contiguous one.
STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda t: torch.stack([t, t * 0 + 1], -1)[..., 0],
    "every_second": lambda t: torch.stack([t, t * 0 + 1], -1).flatten(-2)[..., ::2],
}


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i in range(3)]


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
@every_backend
def test_lengths_of_a_batch(backend: Backend, strided: Callable[[Tensor], Tensor]) -> None:
    q, k, v = given = tensors(3, 1, 9, 8)
    found = []
    for lengths in (torch.tensor([9, 4, 6], dtype=torch.int32), torch.tensor([9, 4, 6], dtype=torch.int32)):
        seqlens_k = lengths if not found else strided(lengths)
        assert seqlens_k.is_contiguous() == (not found)
        seqstarts_k = lengths // 2 if not found else strided(lengths // 2)
        keywords = {"seqlens_k": seqlens_k, "seqstarts_k": seqstarts_k, "causal": False}
        skip_if_refused(backend, q, k, v, **keywords)
        o = lla_attention(q, k, v, **keywords, backend=backend.name)
        found.append([o, *torch.autograd.grad(o.square().sum(), given)])
    for wanted, got in zip(*found, strict=True):
        assert torch.equal(wanted, got)


@every_backend
def test_one_length_for_all(backend: Backend) -> None:
    q, k, v = tensors(3, 1, 9, 8)
    one = torch.tensor([4], dtype=torch.int32)
    skip_if_refused(backend, q, k, v, seqlens_k=one.expand(3))
    expanded, own = (lla_attention(q, k, v, seqlens_k=s, backend=backend.name) for s in (one.expand(3), one.repeat(3)))
    assert torch.equal(expanded, own)


@every_backend
def test_lengths_under_vmap(backend: Backend) -> None:
    q, k, v = (t.detach() for t in tensors(2, 3, 1, 9, 8))
    lengths = torch.tensor([[9, 4, 6], [2, 9, 5]], dtype=torch.int32)
    call = lambda q, k, v, s: lla_attention(q, k, v, seqlens_k=s, causal=False, backend=backend.name)
    skip_if_refused(backend, q[0], k[0], v[0], seqlens_k=lengths[0], causal=False)
    wanted = torch.stack([call(*rows) for rows in zip(q, k, v, lengths)])
    torch.testing.assert_close(torch.vmap(call)(q, k, v, lengths), wanted)
    turned = lengths.T.contiguous()
    torch.testing.assert_close(torch.vmap(call, in_dims=(0, 0, 0, 1))(q, k, v, turned), wanted)
    shared = torch.vmap(call, in_dims=(0, 0, 0, None))(q, k, v, lengths[0])
    torch.testing.assert_close(shared, torch.stack([call(*rows, lengths[0]) for rows in zip(q, k, v)]))


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
@every_backend
def test_lengths_and_pages_of_a_cache(backend: Backend, strided: Callable[[Tensor], Tensor]) -> None:
    q = normal(2, 2, 1, 8, dtype=torch.float32)
    k, v = (normal(4, 1, 16, 8, seed=i, dtype=torch.float32) for i in (1, 2))  # four pages of 16 keys
    lengths, table = torch.tensor([20, 31], dtype=torch.int32), torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    skip_if_refused(backend, q, k, v, op=lla_decode, seqlens_k=lengths, block_table=table)
    starts = lengths // 3
    wanted = lla_decode(q, k, v, lengths, seqstarts_k=starts, block_table=table, backend=backend.name)
    tables = {"seqstarts_k": strided(starts), "block_table": strided(table)}
    got = lla_decode(q, k, v, strided(lengths), **tables, backend=backend.name)
    assert torch.equal(got, wanted)
