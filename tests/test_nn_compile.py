"""The layer under torch.compile, whole graphs, and torch.export; through caches without a graph for each token."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flashlla.nn import LLACache
from tests.support.caches import CACHES
from tests.support.helpers import cu
from tests.test_nn_attention import LAYERS, LEFT, RIGHT, assert_same, hidden, make

HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("gqa", {}),
    "padding": ("window", {"attention_mask": LEFT, "output_attentions": False}),
    "packing": ("token", {"cu_seqlens": cu(0, 5, 12), "max_seqlen": 7}),
    "pcg": ("bare", {"attention_mask": RIGHT.bool()}),
    "positions": ("direct", {"position_ids": torch.arange(12) * 2}),
}
# By operators as they are, too: those of the compiler hide what they take for granted of layouts, and take long.
RUNS = [(kind, "aot_eager") for kind in CALLS]
RUNS += [(kind, "inductor") for kind in ("padding", "packing") if HAS_COMPILER]


@pytest.mark.parametrize(("kind", "backend"), RUNS)
def test_values_and_gradients(kind: str, backend: str):
    which, keywords = CALLS[kind]
    layer = make(which).train()
    if LAYERS[which].get("solver") != "direct":
        layer.tolerance = 0.0  # else rounding decides where a row stops
    x = hidden(1 if kind == "packing" else 2, 12).requires_grad_()
    leaves = [x, *layer.parameters()]
    loss = lambda layer: layer(x, **keywords)[0].square().sum()
    compiled, eager = loss(torch.compile(layer, fullgraph=True, backend=backend)), loss(layer)
    assert_same(compiled, eager)
    for found, expected in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
        # Sums cancel: against float64 both are off by up to 1.1e-6 of the largest entry, whatever an entry's own size.
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache", ["lla", "lla_fixed", "dynamic", "static"])
def test_tokens_through_a_cache(cache: str, masked: bool):
    """The prompt as it is, tokens compiled: those with memory of a fixed size once, others once more for any size."""
    layer, x = make("gqa"), hidden(2, 24)
    mask = torch.cat((LEFT, torch.ones_like(LEFT)), 1) if masked else None
    tell = lambda last: (
        {}
        if mask is None or (cache.startswith("lla") and last > 12)
        else {"attention_mask": mask[:, :last].contiguous()}
    )
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=frames)
    past = CACHES[cache](None)
    with torch.no_grad():
        expected = layer(x, attention_mask=mask)[0]
        found = [layer(x[:, :12], past_key_values=past, **tell(12))[0]]
        found += [compiled(x[:, i : i + 1], past_key_values=past, **tell(i + 1))[0] for i in range(12, 24)]
    assert_same(torch.cat(found, 1), expected)
    growing = cache in ("lla", "dynamic") or (masked and cache == "static")  # its mask has a column for each token
    assert frames.frame_count == (2 if growing else 1)


@pytest.mark.parametrize("kind", ["gqa", "token"])
def test_under_autocast(kind: str):
    layer, x = make(kind).train(), hidden(2, 12)
    leaves = list(layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [call(x)[0] for call in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer)]
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    found, expected = (torch.autograd.grad(o.float().square().sum(), leaves) for o in outputs)
    for a, b in zip(found, expected):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_hole_in_a_mask_is_found():
    compiled = torch.compile(make(), fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[True, False, True]])
    with pytest.raises(RuntimeError, match="attention_mask: got a hole, wanted padding"):
        compiled(hidden(1, 3), attention_mask=mask)


@pytest.mark.parametrize("kind", ["gqa", "token"])
def test_export(kind: str):
    """With any length, and padding."""
    layer = make(kind)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"hidden_states": {1: length}, "attention_mask": {1: length}}
    given = {"hidden_states": hidden(2, 12), "attention_mask": LEFT}
    exported = torch.export.export(layer, (), given, dynamic_shapes=shapes).module()
    for x, mask in ((hidden(2, 12), LEFT), (hidden(2, 30), torch.arange(30) >= torch.tensor([[0], [4]]))):
        o = exported(hidden_states=x, attention_mask=mask.long())[0]
        assert_same(o, layer(x, attention_mask=mask)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_tokens_through_a_fixed_cache_on_a_gpu(mode: str):
    """CUDA graphs of torch.compile write to the cache where it lies."""
    layer, x = make("gqa", dtype=torch.bfloat16).cuda(), hidden(2, 200, dtype=torch.bfloat16).cuda()
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    past = LLACache(max_len=256)
    with torch.no_grad():
        expected = layer(x)[0]
        found = [layer(x[:, :150], past_key_values=past)[0]]
        found += [compiled(x[:, i : i + 1], past_key_values=past)[0].clone() for i in range(150, 200)]
    assert_close_in_bfloat16(torch.cat(found, 1), expected)


@pytest.mark.gpu
def test_a_captured_step_is_replayed():
    """A graph made by hand: a step for each replay, lengths and all."""
    layer, x = make("gqa", dtype=torch.bfloat16).cuda(), hidden(2, 40, dtype=torch.bfloat16).cuda()
    past = LLACache(max_len=64)
    token = torch.zeros_like(x[:, :1])
    with torch.no_grad():
        expected = layer(x)[0]
        for _ in range(3):  # kernels compile, memory is made
            layer(token, past_key_values=past)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = layer(token, past_key_values=past)[0]
        past.reset()
        found = [layer(x[:, :20], past_key_values=past)[0]]
        for i in range(20, 40):
            token.copy_(x[:, i : i + 1])
            graph.replay()
            found.append(o.clone())
    assert past.get_seq_length() == 40
    assert_close_in_bfloat16(torch.cat(found, 1), expected)


def assert_close_in_bfloat16(a: Tensor, b: Tensor) -> None:
    error = ((a.double() - b.double()).norm() / b.double().norm()).item()
    assert error < 2e-3, f"relative error {error:.1e}"
