"""Calls drawn at random, on 2 and on 4 processes: what one process gives, gradients too."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashlla import lla_attention, lla_attention_varlen
from flashlla.distributed import (
    lla_attention_cp,
    lla_attention_varlen_cp,
    shard_sequence,
    sum_gradients,
    unshard_sequence,
)
from tests.support.helpers import cu, normal
from tests.support.processes import outcomes

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

CHECKED, SEEDS_OF_ONE = 12, 8
EXACT = 1e-11  # of gradients, which solve twice; outputs of this suite are held to 1e-12 elsewhere


def drawn(seed: int) -> None:
    """One call: heads shared or not, windows, lengths, documents, empty sequences, every form of a ridge."""
    pick, size, group = random.Random(seed), dist.get_world_size(), dist.group.WORLD
    order, method = pick.choice(["head_tail", "contiguous"]), pick.choice(["all_gather", "all_to_all"])
    packed, bshd = pick.random() < 0.4, pick.random() < 0.4
    length = pick.choice([0, 1, 2, 3, 7]) * size * (2 if order == "head_tail" else 1)
    kv_heads = pick.choice([1, 2]) * size if method == "all_to_all" else pick.choice([1, 2, 3])
    heads, dim, v_dim = kv_heads * pick.choice([1, 2]), pick.choice([1, 4, 6]), pick.choice([3, 4])
    batch = 1 if packed else pick.choice([0, 1, 2, 3])
    causal = pick.random() < 0.8
    keywords: dict[str, Any] = {"causal": causal, "solver": "direct", "qk_scale": pick.choice([None, -0.3, 0.7])}
    keywords["window"] = pick.choice([None, 1, 3, max(1, length // 3), length + 7]) if causal else None
    q, k, v = (
        normal(batch, n, length, d, seed=seed + i)
        for i, (n, d) in enumerate(((heads, dim), (kv_heads, dim), (kv_heads, v_dim)))
    )
    forms: list[tuple[Tensor, int | None]] = [  # and its dimension of the tokens
        (torch.tensor(0.5, dtype=torch.float64), None),
        (normal(heads, 1, seed=seed).exp(), None),
        (normal(heads, length, seed=seed).exp(), 1),
    ]
    one, across, tokens = lla_attention, lla_attention_cp, 2
    if packed:
        one, across, tokens = lla_attention_varlen, lla_attention_varlen_cp, 0
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        edges = sorted(pick.randint(0, length) for _ in range(pick.choice([1, 3, 6])))
        keywords["cu_seqlens"] = cu(0, *edges)
    else:
        forms.append((normal(batch, heads, length, seed=seed).exp(), 2))
        if pick.random() < 0.4:
            stops = [pick.randint(0, length) for _ in range(batch)]
            keywords["seqlens_k"] = torch.tensor(stops, dtype=torch.int32)
            keywords["seqstarts_k"] = torch.tensor([pick.randint(0, stop) for stop in stops], dtype=torch.int32)
        if bshd:
            q, k, v, tokens = *(t.transpose(1, 2) for t in (q, k, v)), 1
            keywords["layout"] = "bshd"
    ridge, of_tokens = pick.choice(forms)
    at_once = {"key_heads_at_once": pick.choice([None, 1, 2])} if method == "all_gather" else {}
    how: dict[str, Any] = {"group": group, "order": order, "method": method, **at_once}
    dims = tokens, tokens, tokens, of_tokens
    shard = lambda t, dim: t if dim is None else shard_sequence(t, group=group, order=order, dim=dim)
    whole = functools.partial(unshard_sequence, group=group, order=order)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, ridge)]
    own = [shard(t, dim).clone().requires_grad_() for t, dim in zip((q, k, v, ridge), dims)]
    o = one(*leaves[:3], ridge_lambda=leaves[3], **keywords)
    o_own = across(*own[:3], ridge_lambda=own[3], **keywords, **how)
    grad_o = normal(*o.shape, seed=seed + 9)
    o.backward(grad_o)
    o_own.backward(shard(grad_o, tokens))
    if of_tokens is None:
        sum_gradients(own[3], group=group)
    found = [whole(o_own.detach(), dim=tokens)]
    found += [t.grad if dim is None else whole(t.grad, dim=dim) for t, dim in zip(own, dims)]
    for got, want in zip(found, [o.detach(), *(t.grad for t in leaves)]):
        assert got.shape == want.shape
        assert float((got - want).norm()) <= EXACT * max(float(want.norm()), 1e-3), (how, keywords)


def several(first: int) -> None:
    for seed in range(first, first + SEEDS_OF_ONE):
        drawn(seed)


CHECKS: dict[str, Callable[[], None]] = {
    f"from_{first}": functools.partial(several, first) for first in range(0, CHECKED * SEEDS_OF_ONE, SEEDS_OF_ONE)
}


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together(size: int, tmp_path: Path) -> None:
    found = outcomes(size, tmp_path, CHECKS)
    assert {name: told for name, told in found.items() if any(told)} == {}
