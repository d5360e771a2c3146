"""What torch's FLOP counter says of the operators, against numbers counted by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import flashlla
from flashlla.flops import ASSUMED_ITERATIONS
from tests.support.helpers import normal

pytestmark = pytest.mark.quick
D, V = 8, 4


def tensors(heads: int = 2, key_heads: int = 2, q_len: int = 5, k_len: int = 5) -> list[torch.Tensor]:
    shapes = ((3, heads, q_len, D), (3, key_heads, k_len, D), (3, key_heads, k_len, V))
    return [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]


def counted(run: Any) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts().get("Global", {})
    return {
        str(packet).removeprefix("flashlla."): flops for packet, flops in found.items() if "flashlla" in str(packet)
    }


@pytest.mark.parametrize(
    ("shape", "options", "pairs"),
    [
        ({}, {}, 6 * 15),
        ({}, {"causal": False}, 6 * 25),
        ({"k_len": 7}, {}, 6 * (3 + 4 + 5 + 6 + 7)),
        ({"k_len": 3}, {}, 6 * (1 + 2 + 3)),
        ({}, {"window": 2}, 6 * (1 + 2 + 2 + 2 + 2)),
        ({"k_len": 7}, {"window": 4}, 6 * (3 + 4 + 4 + 4 + 4)),
        ({"k_len": 3}, {"window": 2}, 6 * (1 + 2 + 2)),
        ({"heads": 4, "key_heads": 2}, {}, 12 * 15),
        ({}, {"seqlens_k": torch.tensor([5, 2, 0])}, 2 * (15 + (1 + 2 + 2 + 2 + 2) + 0)),
        ({}, {"seqstarts_k": torch.tensor([0, 3, 5])}, 2 * (15 + (1 + 2) + 0)),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else None,
)
def test_a_step(shape: dict[str, int], options: dict[str, Any], pairs: int) -> None:
    """5 products of D and 1 of Dv forward, 12 and 4 backward, and 3 of D an iteration: two operations a pair each."""
    q, k, v = (t.requires_grad_() for t in tensors(**shape))
    found = {}

    def step() -> None:
        o, info = flashlla.lla_attention(q, k, v, return_info=True, backend="chunked", **options)
        found["iterations"] = info.iterations.double().mean().item()
        o.sum().backward()

    flops = counted(step)
    assert flops["forward"] == pytest.approx(2 * pairs * (D * (5 + 3 * found["iterations"]) + V), abs=1)
    assert flops["backward"] == 2 * pairs * (D * (12 + 3 * ASSUMED_ITERATIONS) + 4 * V)


def test_a_direct_solve() -> None:
    """D^2 a pair for the matrices, D^3 / 3 + 2 D^2 a query for factors and solutions."""
    q, k, v = tensors()
    flops = counted(lambda: flashlla.lla_attention(q, k, v, solver="direct"))
    assert flops["forward"] == 2 * 90 * (D * 5 + V) + 2 * 90 * D * D + 30 * (170 + 2 * D * D)


def test_packed() -> None:
    q, k, v = (torch.randn(9, 2, n) for n in (D, D, V))
    call = lambda: flashlla.lla_attention_varlen(
        q, k, v, cu_seqlens=torch.tensor([0, 2, 2, 8]), max_seqlen=6, solver="direct"
    )
    pairs = 2 * (3 + 21)
    assert counted(call)["forward"] == 2 * pairs * (D * 5 + V) + 2 * pairs * D * D + 18 * (170 + 2 * D * D)


@pytest.mark.parametrize("how", ["decode", "decode_info", "decode_out"])
def test_decoding(how: str) -> None:
    q, k, v = tensors(heads=4, q_len=2, k_len=9)
    options = {"decode_info": {"return_info": True}, "decode_out": {"out": torch.empty(3, 4, 2, V)}}.get(how, {})
    flops = counted(lambda: flashlla.lla_decode(q, k, v, torch.tensor([9, 4, 2]), **options))
    pairs = 4 * ((8 + 9) + (3 + 4) + (1 + 2))
    assert flops[how] == 2 * pairs * (D * 5 + V) + 2 * pairs * D * D + 24 * (170 + 2 * D * D)


def test_tensors_that_are_not_there() -> None:
    """No numbers, so the iterations are assumed, and all lengths in use."""
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 5, D), torch.empty(3, 2, 5, D), torch.empty(3, 2, 5, V)
        lengths = torch.empty(3, dtype=torch.int32)
        flops = counted(lambda: flashlla.lla_attention(q, k, v, seqlens_k=lengths))
    assert flops["forward"] == 2 * 90 * (D * (5 + 3 * ASSUMED_ITERATIONS) + V)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["flashlla", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    """And the package does not import the counter, which takes longer than itself."""
    code = (
        f"import {first}, torch, sys, flashlla; early = 'torch.utils.flop_counter' in sys.modules; "
        "from torch.utils.flop_counter import FlopCounterMode; c = FlopCounterMode(display=False); c.__enter__(); "
        "flashlla.lla_attention(*torch.randn(3, 1, 4, 4), backend='chunked'); c.__exit__(None, None, None); "
        f"assert c.get_total_flops() > 0; assert early == ({first!r} != 'flashlla')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
