"""What does not fit, on 2 and on 4 processes: an error on all of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashlla.distributed import (
    lla_attention_cp,
    lla_attention_varlen_cp,
    lla_decode_cp,
    shard_positions,
    shard_sequence,
    sum_gradients,
    unshard_sequence,
)
from flashlla.distributed.groups import COMPARED
from tests.support.helpers import cu, normal
from tests.support.processes import Checks, outcomes, world

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

ORDERS = ("head_tail", "contiguous")
CHECKS = Checks()
check = CHECKS.add


@check()
def numbers_that_do_not_divide_are_named() -> None:
    size = dist.get_world_size()
    divisor = 2 * size
    with pytest.raises(
        ValueError, match=rf"x: got 47 tokens, wanted a multiple of {divisor}, 2 x {size} ranks.*try 1 more"
    ):
        shard_sequence(torch.zeros(47), group=world(), dim=0)
    with pytest.raises(ValueError, match=rf"wanted a multiple of {size}, {size} ranks"):
        shard_positions(47, group=world(), order="contiguous")
    odd = normal(1, 2, 5, 4)
    with pytest.raises(ValueError, match=rf"q: got 5 tokens on rank {dist.get_rank()}, wanted an even number"):
        lla_attention_cp(odd, odd, odd, group=world())
    q, k = normal(1, 4, 4, 4), normal(1, 1, 4, 4)
    with pytest.raises(
        ValueError, match=rf"'all_to_all' with 1 heads of k on {size} ranks, wanted a multiple of {size}"
    ):
        lla_attention_cp(q, k, k, group=world(), method="all_to_all")


@check()
def ranks_that_disagree_all_say_so() -> None:
    group = dist.new_group()  # whose calls are counted from here on
    mine = dist.get_rank() == 1
    q = normal(1, 2, 4, 4)
    more = normal(1, 2, 6, 4)
    if mine:
        os.environ["FLASHLLA_CHECK"] = "1"
    with pytest.raises(ValueError, match="FLASHLLA_CHECK: False on rank 0, True on rank 1"):
        lla_attention_cp(q, q, q, group=group)
    os.environ.pop("FLASHLLA_CHECK", None)
    attend, row = functools.partial(lla_attention_cp, q, q, q), normal(4, 2, 4)
    decode = functools.partial(lla_decode_cp, q[:, :, :1], q, q, torch.tensor([3]))
    for call, own, words in (
        (attend, {"ridge_lambda": torch.ones(2, 1, requires_grad=mine)}, "wanting gradients"),
        (attend, {"window": 3 if mine else 4}, "window: 4 on rank 0, 3 on rank 1"),
        (attend, {"backend": "naive" if mine else "chunked"}, "backend: 'chunked' on rank 0, 'naive' on rank 1"),
        (attend, {"seqlens_k": torch.tensor([8 - mine])}, r"seqlens_k: \[8\] on rank 0, \[7\] on rank 1"),
        (attend, {"seqstarts_k": torch.tensor([int(mine)])}, r"seqstarts_k: \[0\] on rank 0, \[1\] on rank 1"),
        (
            functools.partial(lla_attention_varlen_cp, row, row, row, max_seqlen=8),
            {"cu_seqlens": cu(0, 2 + mine, 8)},
            r"cu_seqlens: \[0, 2, 8\] on rank 0, \[0, 3, 8\] on rank 1",
        ),
        (decode, {"window": 3 if mine else 4}, "window: 4 on rank 0, 3 on rank 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call(group=group, **own)
    wrong = more if mine else q
    with pytest.raises(ValueError, match=r"q: .*\(1, 2, 4, 4\).* on rank 0, .*\(1, 2, 6, 4\).* on rank 1"):
        lla_attention_cp(wrong, wrong, wrong, group=group)
    group = dist.new_group()
    for _ in range(COMPARED - 1):
        lla_attention_cp(q, q, q, group=group)
    with pytest.raises(ValueError, match="causal: False on rank 0, True on rank 1"):
        lla_attention_cp(q, q, q, group=group, causal=mine)  # the tenth call
    lla_attention_cp(q, q, q, group=group, causal=mine)  # nobody looks any more
    os.environ["FLASHLLA_CHECK"] = "1"
    try:
        with pytest.raises(ValueError, match="causal"):
            lla_attention_cp(q, q, q, group=group, causal=mine)
    finally:
        del os.environ["FLASHLLA_CHECK"]


@check()
def what_is_summed_is_compared() -> None:
    group = dist.new_group()
    mine = dist.get_rank() == 1

    def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        t = torch.zeros(shape, dtype=dtype, requires_grad=True)
        t.grad = torch.ones_like(t)
        return t

    a, b = parameter(2, 3), parameter(6)
    for own, words in (
        ([b, a] if mine else [a, b], r"gradient 0: .*\(2, 3\).* on rank 0, .*\(6,\).* on rank 1"),
        ([a, parameter(6, dtype=torch.float64 if mine else torch.float32)], r"gradient 1: .*float32.* on rank 0"),
        ([a] if mine else [a, b], "gradients: 2 on rank 0, 1 on rank 1"),
        ([b, torch.zeros(1)] if mine else [torch.zeros(1)], "gradients: 0 on rank 0, 1 on rank 1"),
    ):
        with pytest.raises(ValueError, match=words):
            sum_gradients(own, group=group)
    assert all(bool((t.grad == 1).all()) for t in (a, b))
    sum_gradients([], group=group)
    sum_gradients([a, b], group=group)
    assert all(bool((t.grad == dist.get_world_size()).all()) for t in (a, b))


@check()
def what_is_put_together_is_compared() -> None:
    group = dist.new_group()
    mine = dist.get_rank() == 1
    for x, keywords, words in (
        (torch.zeros(4, 6 if mine else 4), {"dim": 0}, r"x: .*\(4, 4\).* on rank 0, .*\(4, 6\).* on rank 1"),
        (torch.zeros(4, 4, dtype=torch.float64 if mine else torch.float32), {"dim": 0}, "x: .*float32.* on rank 0"),
        (torch.zeros(4, 4), {"dim": int(mine)}, "dim: 0 on rank 0, 1 on rank 1"),
        (torch.zeros(4, 4), {"dim": 0, "order": ORDERS[mine]}, "order: 'head_tail' on rank 0, 'contiguous' on rank 1"),
    ):
        with pytest.raises(ValueError, match=words):
            unshard_sequence(x, group=group, **keywords)
    assert unshard_sequence(torch.zeros(4, 4), group=group, dim=-1 if mine else 1).shape == (
        4,
        4 * dist.get_world_size(),
    )


@check()
def wrong_lengths_are_refused() -> None:
    q = normal(1, 2, 4, 4)
    whole = 4 * dist.get_world_size()
    with pytest.raises(ValueError, match=rf"seqlens_k: got {whole + 1} at sequence 0, wanted 0 to {whole}"):
        lla_attention_cp(q, q, q, group=world(), seqlens_k=torch.tensor([whole + 1]))
    with pytest.raises(ValueError, match=rf"cu_seqlens: got {whole + 1} last, wanted at most {whole}"):
        lla_attention_varlen_cp(q, q, q, group=world(), cu_seqlens=cu(0, whole + 1), max_seqlen=99)
    with pytest.raises(ValueError, match="cu_seqlens_q: got one, wanted None"):
        lla_attention_varlen_cp(q, q, q, group=world(), cu_seqlens_q=cu(0, 4), cu_seqlens_k=cu(0, 4))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together(size: int, tmp_path: Path) -> None:
    found = outcomes(size, tmp_path, CHECKS)
    assert {name: told for name, told in found.items() if any(told)} == {}
