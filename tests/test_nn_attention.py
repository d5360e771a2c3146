"""LocalLinearAttention: all ways to the same token agree, and what cannot be done is refused by name."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashlla
from flashlla.nn import LLACache, LocalLinearAttention
from tests.support.caches import CACHES, every_cache
from tests.support.helpers import cu, normal

HIDDEN, HEADS = 32, 4
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "window": {"num_kv_heads": 2, "window": 7},
    "token": {"ridge": "token", "ridge_init": 0.3},
    "number": {"ridge": 0.5, "rope_theta": None, "qkv_bias": True, "head_dim": 5},
    "bare": {"qk_norm": False, "rope_theta": 100.0, "head_dim": 12, "solver": "pcg"},
    "direct": {"solver": "direct", "num_kv_heads": 1},
}
LEFT = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
RIGHT = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
BOTH = torch.tensor([[0] + [1] * 11, [0] * 5 + [1] * 4 + [0] * 3])
every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind: str = "plain", **keywords: Any) -> LocalLinearAttention:
    """In eval mode; weights of the same seed, ridges and norms anything."""
    torch.manual_seed(0)
    layer = LocalLinearAttention(HIDDEN, HEADS, **{"layer_idx": 0, **LAYERS[kind], **keywords}).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name or "ridge" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return layer


def hidden(batch: int = 2, length: int = 40, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(batch, length, HIDDEN, seed=seed, dtype=dtype)


def run(layer: LocalLinearAttention, x: Tensor, cache: Any, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """The outputs of x in pieces; masks have a column for each token so far."""
    outputs, last = [], 0
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            last += piece.shape[1]
            told = None if mask is None else mask[:, :last]
            o, weights, returned = layer(piece, attention_mask=told, past_key_values=cache)
            assert weights is None
            assert returned is cache
            outputs.append(o)
    return torch.cat(outputs, 1)


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_cache
@every_layer
def test_a_cache_changes_nothing(kind: str, cache: str):
    """The whole at once, a prompt in pieces and then token by token."""
    layer, x = make(kind), hidden()
    full = layer(x)[0].detach()
    assert_same(run(layer, x, CACHES[cache](layer.window), [20, 3, 9, *[1] * 8]), full)


@every_cache
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_padding_on_the_left_changes_nothing(kind: str, cache: str):
    layer, x = make(kind), hidden(3)
    lengths = [40, 33, 15]
    mask = torch.stack([torch.arange(40) >= 40 - n for n in lengths])
    with torch.no_grad():
        alone = [layer(x[i : i + 1, 40 - n :])[0][0] for i, n in enumerate(lengths)]
        padded = layer(x.masked_fill(~mask[..., None], float("nan")), attention_mask=mask.long())[0]
        pieces = run(
            layer, x.masked_fill(~mask[..., None], float("nan")), CACHES[cache](layer.window), [20, 4, *[1] * 16], mask
        )
    for i, n in enumerate(lengths):
        for found in (padded, pieces):
            assert_same(found[i, 40 - n :], alone[i])
            assert not found[i, : 40 - n].any()


@pytest.mark.parametrize("cache", ["lla", "lla_fixed"])
def test_a_prompt_padded_on_the_right_goes_on_where_it_ended(cache: str):
    """With a cache that knows where: later tokens need no mask, or one of their own."""
    layer, x = make("gqa"), hidden(2, 14)
    prompt, new = x[:, :12], x[:, 12:]
    past = CACHES[cache](None)
    with torch.no_grad():
        expected = [layer(torch.cat((prompt[i, :n], new[i]))[None])[0][0, n:] for i, n in enumerate((12, 9))]
        layer(prompt, attention_mask=RIGHT, past_key_values=past)
        first = layer(new[:, :1], past_key_values=past)[0]
        second = layer(new[:, 1:], attention_mask=torch.ones(2, 1).bool(), past_key_values=past)[0]
    assert_same(torch.cat((first, second), 1), torch.stack(expected))


@pytest.mark.parametrize("seed", range(20))
def test_any_history_is_that_of_each_sequence_alone(seed: int):
    """Calls of any length with padding anywhere, beams that change places, drafts that are taken back."""
    rng = random.Random(seed)
    kind, batch = rng.choice(["gqa", "window", "token"]), rng.randint(1, 3)
    layer, cache = make(kind, dtype=torch.float64), LLACache(rng.choice([None, 8 * 18]))
    skipped = [0] * batch  # slots before each sequence's first token
    seen = [hidden(1, 0, dtype=torch.float64)[0]] * batch  # its tokens

    def call(new: int) -> None:
        x, rows = hidden(batch, new, rng.randrange(1000), torch.float64), []
        for tokens in seen:
            first = 0 if len(tokens) or rng.random() < 0.5 else rng.randint(0, new)
            last = new if rng.random() < 0.5 else rng.randint(first, new)
            rows.append([first <= i < last for i in range(new)])
        mask = torch.tensor(rows)
        spoilt = x.masked_fill(~mask[..., None], float("nan"))
        told = None if mask.all() and rng.random() < 0.7 else mask
        o = layer(spoilt, attention_mask=told, past_key_values=cache)[0]
        assert not o[~mask].any()
        for b, tokens in enumerate(seen):
            if not len(tokens):
                skipped[b] += rows[b].index(True) if any(rows[b]) else new
            seen[b] = torch.cat((tokens, x[b, mask[b]]))
            if mask[b].any():
                assert_same(o[b, mask[b]], layer(seen[b][None])[0][0, -int(mask[b].sum()) :], 1e-10)

    def reorder() -> None:
        order = [rng.randrange(batch) for _ in range(batch)]
        cache.reorder(torch.tensor(order))
        skipped[:], seen[:] = [skipped[i] for i in order], [seen[i] for i in order]

    def crop() -> None:
        length = rng.randint(0, cache.get_seq_length())
        cache.crop(length)
        seen[:] = [tokens[: max(length - first, 0)] for first, tokens in zip(skipped, seen)]
        skipped[:] = [min(first, length) for first in skipped]

    with torch.no_grad():
        call(rng.choice([1, 5, 18]))
        for _ in range(7):
            rng.choice([lambda: call(1), lambda: call(2), lambda: call(18), reorder, crop])()


@pytest.mark.quick
@pytest.mark.parametrize("mask", [LEFT, RIGHT, BOTH], ids=["left", "right", "both"])
@pytest.mark.parametrize("kind", ["plain", "window", "token"])
def test_padding_spreads_neither_values_nor_gradients(kind: str, mask: Tensor):
    """Tokens in it are NaN, and so is what comes back to them."""
    layer = make(kind, dtype=torch.float64).train()
    x, grad_o = (hidden(2, 12, seed, torch.float64) for seed in (1, 2))
    tokens = mask.bool()

    spoilt = x.masked_fill(~tokens[..., None], float("nan")).requires_grad_()
    o = layer(spoilt, attention_mask=mask)[0]
    assert not o[~tokens].any()
    o.backward(grad_o.masked_fill(~tokens[..., None], float("nan")))
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()

    for i in range(2):
        alone = x[i, tokens[i]][None].requires_grad_()
        o_alone = layer(alone)[0]
        o_alone.backward(grad_o[i, tokens[i]][None])
        assert_same(o[i, tokens[i]], o_alone[0], 1e-12)
        assert_same(spoilt.grad[i, tokens[i]], alone.grad[0], 1e-12)
        assert not spoilt.grad[i, ~tokens[i]].any()
    for name, parameter in layer.named_parameters():
        assert_same(found[name], parameter.grad, 1e-12)
        assert found[name].any(), name


def test_a_row_of_padding_alone():
    layer, x = make(), hidden(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    o = layer(x, attention_mask=mask)[0]
    assert_same(o[:1], layer(x[:1])[0])
    assert not o[1].any()
    past = LLACache()
    assert torch.equal(run(layer, x, past, [2, 4], mask)[1], o[1])
    assert_same(layer(x, past_key_values=past)[0][1:], layer(x[1:])[0])  # its first tokens


def test_no_tokens():
    layer, past = make(), LLACache()
    assert layer(hidden(2, 0))[0].shape == (2, 0, HIDDEN)
    assert layer(hidden(0, 3))[0].shape == (0, 3, HIDDEN)
    assert layer(hidden(2, 0), attention_mask=torch.ones(2, 0).bool(), past_key_values=past)[0].shape == (2, 0, HIDDEN)
    assert past.get_seq_length() == 0


@pytest.mark.parametrize("max_seqlen", [None, 20])
@every_layer
def test_packed_sequences_are_alone(kind: str, max_seqlen: int | None):
    layer, x = make(kind, dtype=torch.float64), hidden(1, 40, dtype=torch.float64)
    grad_o = hidden(1, 40, 2, torch.float64)
    edges = [0, 15, 15, 35, 36]
    o = layer(x, cu_seqlens=cu(*edges), max_seqlen=max_seqlen)[0]
    o.backward(grad_o)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    for first, last in itertools.pairwise(edges):
        if last > first:
            alone = layer(x[:, first:last])[0]
            alone.backward(grad_o[:, first:last])
            assert_same(o[:, first:last], alone, 1e-11)
    assert not o[:, 36:].any()
    for name, parameter in layer.named_parameters():
        assert_same(found[name], parameter.grad, 1e-11)


@pytest.mark.parametrize("cache", ["dynamic", "sliding", "fla"])
@pytest.mark.parametrize("kind", ["plain", "window"])
def test_gradients_go_through_caches_that_keep_a_history(kind: str, cache: str):
    """As where a model is trained with a prefix in the cache."""
    layer, x = make(kind, dtype=torch.float64), hidden(2, 20, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    past = CACHES[cache](layer.window)
    o = torch.cat([layer(piece, past_key_values=past)[0] for piece in x.split(7, 1)], 1)
    for found, exact in zip(torch.autograd.grad(o.square().sum(), list(layer.parameters())), expected):
        assert_same(found, exact, 1e-10)


def test_a_ridge_learns_alone_with_a_prefix_in_the_cache():
    layer, x = make(dtype=torch.float64).requires_grad_(False), hidden(2, 20, dtype=torch.float64)
    raw = layer.ridge.raw.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x)[0][:, 12:].square().sum(), raw)
    past = CACHES["dynamic"](None)
    layer(x[:, :12], past_key_values=past)
    (found,) = torch.autograd.grad(layer(x[:, 12:], past_key_values=past)[0].square().sum(), raw)
    assert_same(found, expected, 1e-10)


def test_its_own_cache_keeps_none():
    layer, x, past = make(), hidden(2, 5), LLACache()
    layer(x, past_key_values=past)
    o = layer(x, past_key_values=past)[0]
    with pytest.raises(NotImplementedError, match=r"past_key_values: .* as an LLACache; wanted no cache in training"):
        o.sum().backward()
    with torch.no_grad():
        assert layer(x, past_key_values=past)[0].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("ridge", ["head", "token"])
def test_gradients_reach_every_ridge(ridge: str):
    """From the first step on, each number of it."""
    layer = LocalLinearAttention(HIDDEN, HEADS, 2, ridge=ridge)
    layer(hidden())[0].square().sum().backward()
    reached = {name: parameter.grad.ne(0).all().item() for name, parameter in layer.ridge.named_parameters()}
    assert reached == ({"raw": True} if ridge == "head" else {"raw": True, "weight": True})


@pytest.mark.quick
def test_it_is_the_definition():
    """Against the operator's reference, with everything else written out."""
    layer, x = make("gqa", dtype=torch.float64, rope_theta=None), hidden(2, 10, dtype=torch.float64)
    heads = lambda name, n: (x @ layer.get_parameter(f"{name}.weight").T).view(2, 10, n, 8).transpose(1, 2)
    unit = lambda t, name: t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.get_parameter(f"{name}.weight")
    q, k, v = unit(heads("q_proj", HEADS), "q_norm"), unit(heads("k_proj", 2), "k_norm"), heads("v_proj", 2)
    ridge = torch.nn.functional.softplus(layer.ridge.raw) + 0.01
    o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge[:, None], backend="naive", solver="direct")
    assert_same(layer(x)[0], o.transpose(1, 2).reshape(2, 10, HIDDEN) @ layer.o_proj.weight.T, 1e-10)


def test_positions_matter_and_only_their_differences():
    layer, x = make(), hidden(2, 12)
    positions = torch.arange(12)
    o = layer(x)[0]
    assert_same(layer(x, position_ids=positions)[0], o)
    assert_same(layer(x, position_ids=(positions + 100).expand(2, 12))[0], o)
    assert (layer(x, position_ids=2 * positions)[0] - o).abs().max() > 1e-3
    given = (LEFT.cumsum(1) - 1).clamp(min=0)  # what generation in Hugging Face gives
    assert_same(layer(x, attention_mask=LEFT, position_ids=given)[0], layer(x, attention_mask=LEFT)[0])


def test_training_solves_to_the_tolerance_and_nothing_else_does():
    x = hidden(2, 30)
    exact = make(ridge_init=0.05)(x)[0]
    for tolerance in (0.5, 1e-3):
        layer = make(ridge_init=0.05, tolerance=tolerance)
        assert torch.equal(layer(x)[0], exact)
        layer.train()
        assert_same(run(layer, x, LLACache(), [30]), exact)
        error = (layer(x)[0] - exact).norm() / exact.norm()
        assert 1e-2 < error < 0.5 if tolerance == 0.5 else 1e-6 < error < 1e-3
        layer.tolerance = 0.0
        assert_same(layer(x)[0], exact)
        with pytest.raises(ValueError, match="tolerance: got 2"):
            layer.tolerance = 2


def test_a_solver_brings_its_tolerance():
    """Where the layer's is not at its default, one of the two is too much."""
    assert make(solver=flashlla.CG()).tolerance == 1e-2
    with pytest.raises(ValueError, match=r"tolerance: got 0\.1 together with solver=CG"):
        make(solver=flashlla.CG(), tolerance=0.1)


def test_use_cache_makes_one_for_all_layers():
    first, second = make(layer_idx=0), make(layer_idx=1)
    x = hidden(2, 5)
    o, _, cache = first(x, use_cache=True)
    assert isinstance(cache, LLACache)
    assert second(o, past_key_values=cache, use_cache=True)[2] is cache
    assert len(cache) == 2
    assert first(x)[2] is None


@pytest.mark.parametrize("kind", ["plain", "token", "number"])
def test_weights_are_saved_and_loaded(kind: str):
    layer, x = make(kind), hidden()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LocalLinearAttention(HIDDEN, HEADS, **LAYERS[kind]).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["gqa", "token", "number", "bare"])
def test_it_is_made_on_meta(kind: str):
    """Its shapes are known there; to_empty and reset_parameters give what a new one has."""
    with torch.device("meta"):
        layer = LocalLinearAttention(HIDDEN, HEADS, **LAYERS[kind])
    assert layer(hidden().to("meta"))[0].shape == (2, 40, HIDDEN)
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = LocalLinearAttention(HIDDEN, HEADS, **LAYERS[kind])
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, fresh.get_parameter(name)), name
    if kind == "token":
        assert_same(layer.ridge(hidden()), torch.full((2, HEADS, 40), 0.3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool):
    layer, x = make("token").train(), hidden().requires_grad_()
    expected = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    checkpoint(lambda t: layer(t)[0], x, use_reentrant=reentrant).square().sum().backward()
    for leaf, exact in zip([x, *layer.parameters()], expected):
        assert torch.equal(leaf.grad, exact)


@pytest.mark.parametrize("kind", ["plain", "token", "bare"])
def test_autocast(kind: str, recwarn: pytest.WarningsRecorder):
    """Projections and attention in bfloat16, norms, positions and ridges in float32; the same through a cache."""
    layer, x = make(kind).train(), hidden()
    expected = layer(x)[0]
    cache = LLACache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = layer(x)[0]
        with torch.no_grad():
            cached = layer(x, past_key_values=cache)[0]
    o.float().square().sum().backward()
    assert o.dtype == cached.dtype == cache.update(*(torch.zeros(2, 1, HEADS, layer.head_dim).bfloat16(),) * 2).k.dtype
    assert (o - expected).norm() < 0.02 * expected.norm()
    assert (cached - expected).norm() < 0.02 * expected.norm()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in layer.parameters())
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def test_bfloat16_keeps_the_ridge():
    layer = make("token").to(torch.bfloat16)
    assert {p.dtype for p in layer.ridge.parameters()} == {torch.float32}
    x = hidden(dtype=torch.bfloat16)
    full = layer(x)[0]
    assert full.dtype == torch.bfloat16
    pieces = run(layer, x, LLACache(), [20, *[1] * 20])
    assert (pieces - full).norm() < 4e-3 * full.norm()


# Of how a layer is called.
HARMLESS = {"output_attentions": False, "is_causal": True, "dropout": 0.0, "cache_position": torch.arange(5)}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_says_nothing_is_ignored(name: str):
    layer, x = make(), hidden(2, 5)
    assert torch.equal(layer(x, **{name: HARMLESS[name]})[0], layer(x)[0])


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "output_attentions": (True, ValueError, "output_attentions: got True, wanted False; try without it"),
    "is_causal": (False, ValueError, "is_causal: got False, wanted True"),
    "dropout": (0.1, ValueError, "dropout: got 0.1, wanted 0.0"),
    "position_embeddings": ((0, 0), TypeError, "'position_embeddings'; try position_ids="),
    "past_key_value": (None, TypeError, "'past_key_value'; try past_key_values="),
    "cu_seq_lens_q": (None, TypeError, "'cu_seq_lens_q'; try cu_seqlens="),
    "sinks": (None, TypeError, "unexpected keyword argument 'sinks'"),
    "attention_mask": (torch.ones(2, 1, 5, 5).bool(), ValueError, r"attention_mask: got shape \(2, 1, 5, 5\)"),
    "position_ids": (torch.arange(4), ValueError, r"position_ids: got shape \(4,\), wanted \(2, 5\)"),
    "past_key_values": ([], TypeError, r"past_key_values: got list, wanted .* try LLACache\(\)"),
    "cu_seqlens": (cu(0, 5), ValueError, "hidden_states: got 2 rows together with cu_seqlens, wanted 1"),
    "max_seqlen": (5, ValueError, "max_seqlen: got 5 without cu_seqlens"),
    "hidden_states": (torch.zeros(5, HIDDEN), ValueError, r"got shape \(5, 32\), wanted .*unsqueeze\(0\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(name: str):
    value, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        make()(**{"hidden_states": hidden(2, 5), name: value})


def test_packed_sequences_are_told_by_a_tensor():
    with pytest.raises(TypeError, match=r"cu_seqlens: got list, wanted a tensor of \(sequences \+ 1,\) int32"):
        make()(hidden(1, 5), cu_seqlens=[0, 5])
    with pytest.raises(ValueError, match=r"cu_seqlens: got shape \(1, 2\), wanted \(sequences \+ 1,\)"):
        make()(hidden(1), cu_seqlens=torch.tensor([[0, 40]]))


@pytest.mark.parametrize("name", ["attention_mask", "past_key_values"])
def test_packed_sequences_go_alone(name: str):
    value = {"attention_mask": torch.ones(1, 5).bool(), "past_key_values": LLACache()}[name]
    with pytest.raises(ValueError, match=f"{name}: got one together with cu_seqlens"):
        make()(hidden(1, 5), cu_seqlens=cu(0, 5), **{name: value})


@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_of_another_batch_is_refused(masked: bool):
    layer, x, past = make(), hidden(3, 5), LLACache()
    layer(x, past_key_values=past)
    mask = torch.ones(2, 5, dtype=torch.bool) if masked else None
    with pytest.raises(ValueError, match=r"got a cache of 3 sequences with a batch of 2.*new LLACache"):
        layer(x[:2], attention_mask=mask, past_key_values=past)


def test_a_cache_wants_the_layers_number():
    with pytest.raises(ValueError, match="layer_idx: got None"):
        make(layer_idx=None)(hidden(), use_cache=True)


def test_three_tensors_are_told_what_the_layer_takes():
    """As torch's attention layers take."""
    x = hidden()
    with pytest.raises(TypeError, match=r"past_key_values: got Tensor, .*try layer\(x\) for layer\(x, x, x\)"):
        make(layer_idx=None)(x, x, x)


def test_a_cache_that_slides_wants_the_window():
    for window in (None, 9):
        cache = CACHES["sliding"](7)
        layer = make("gqa", window=window)
        layer(hidden(2, 10), past_key_values=cache)
        with pytest.raises(ValueError, match=f"got the latest 7 of 11 keys from DynamicCache.*window={window}"):
            layer(hidden(2, 1), past_key_values=cache)


MISMADE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "num_heads": ({"num_heads": 5}, ValueError, "hidden_size: got 32, wanted a multiple of num_heads 5; or try head_d"),
    "num_kv_heads": ({"num_kv_heads": 3}, ValueError, "num_kv_heads: got 3, wanted a number that divides num_heads 4"),
    "head_dim": ({"head_dim": 5}, ValueError, "head_dim: got 5, wanted an even number where rope_theta"),
    "rope_theta": ({"rope_theta": 0.0}, ValueError, "rope_theta: got 0.0, wanted a number above 0, or None"),
    "rope_theta_word": ({"rope_theta": "a"}, TypeError, "rope_theta: got str, wanted a number"),
    "rope_theta_endless": ({"rope_theta": math.inf}, ValueError, "rope_theta: got inf, wanted a number above 0"),
    "rope_theta_beyond_floats": ({"rope_theta": 10**400}, ValueError, "rope_theta: got 1000"),
    "window": ({"window": 0}, ValueError, "window: got 0, wanted a whole number of at least 1"),
    "window_pair": ({"window": (3, 0)}, TypeError, "window: got tuple, wanted a whole number"),
    "ridge": ({"ridge": "heads"}, ValueError, "ridge: got 'heads'"),
    "ridge_init": ({"ridge_init": 1e-3}, ValueError, "ridge_init: got 0.001 with ridge_min 0.01"),
    "ridge_init_none": ({"ridge_init": None}, TypeError, "ridge_init: got NoneType, wanted a number"),
    "tolerance": ({"tolerance": -1}, ValueError, "tolerance: got -1"),
    "tolerance_none": ({"tolerance": None}, TypeError, "tolerance: got NoneType, wanted a number"),
    "solver": ({"solver": "qr"}, ValueError, "solver: got 'qr'"),
    "context_parallel": (
        {"context_parallel": "ring"},
        TypeError,
        "context_parallel: got str, wanted a ProcessGroup",
    ),
}


@pytest.mark.parametrize("name", MISMADE)
def test_what_cannot_be_made_is_refused(name: str):
    keywords, error, words = MISMADE[name]
    with pytest.raises(error, match=words):
        LocalLinearAttention(**{"hidden_size": HIDDEN, "num_heads": HEADS, **keywords})


def test_what_it_shows():
    text = repr(make("gqa"))
    assert "32, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=10000.0, window=None, layer_idx=0" in text
    assert "(ridge): Ridge('head', num_heads=4, init=1.0, minimum=0.01)" in text


@pytest.mark.gpu
@every_cache
@pytest.mark.parametrize("kind", ["gqa", "window", "token"])
def test_on_a_gpu_in_bfloat16(kind: str, cache: str):
    """A prompt that is padded on the left, in pieces, then tokens: as each sequence alone, and at once."""
    layer, x = make(kind, dtype=torch.bfloat16).cuda(), hidden(3, 60, dtype=torch.bfloat16).cuda()
    lengths = [60, 47, 21]
    mask = torch.stack([torch.arange(60) >= 60 - n for n in lengths]).cuda()
    spoilt = x.masked_fill(~mask[..., None], float("nan"))
    with torch.no_grad():
        alone = [layer(x[i : i + 1, 60 - n :])[0][0] for i, n in enumerate(lengths)]
        padded = layer(spoilt, attention_mask=mask)[0]
    pieces = run(layer, spoilt, CACHES[cache](layer.window), [30, 17, 5, *[1] * 8], mask)
    for found in (padded, pieces):
        for i, n in enumerate(lengths):
            error = (found[i, 60 - n :].double() - alone[i].double()).norm() / alone[i].double().norm()
            assert error < 2e-3, f"relative error {error:.1e} of sequence {i}"
            assert not found[i, : 60 - n].any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gqa", "window", "token"])
def test_gradients_on_a_gpu(kind: str):
    """In float32, against the same on the CPU in float64."""
    layer = make(kind, dtype=torch.float64).train()
    layer.tolerance = 0.0
    x, mask = hidden(2, 12, dtype=torch.float64), LEFT
    loss = lambda layer, x, mask: layer(x, attention_mask=mask)[0].square().sum()
    expected = torch.autograd.grad(loss(layer, x, mask), list(layer.parameters()))
    layer = layer.float().cuda()
    found = torch.autograd.grad(loss(layer, x.float().cuda(), mask.cuda()), list(layer.parameters()))
    for (name, _), a, b in zip(layer.named_parameters(), found, expected):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < 1e-3, f"relative error {error:.1e} of {name}"
