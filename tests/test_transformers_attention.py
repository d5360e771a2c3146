"""transformers' models with this attention: full passes, caches, padding, packing, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BloomConfig,
    CompileConfig,
    DynamicCache,
    FalconConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
    StaticCache,
)
from transformers.masking_utils import (
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
)

from flashlla import notices
from flashlla.integrations.transformers import register, set_ridge
from flashlla.integrations.transformers.attention import _is_the_first, attend
from flashlla.nn import LLACache
from tests.support.budget import Excess, allowance
from tests.support.decoding import Decoding, expected, spread
from tests.support.models import CACHE, FAMILIES, TINY, gradients, left_padded, make, piecewise, tokens

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=50),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def same_gradients(model: torch.nn.Module, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    assert any("ridge" in name for name in got)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        close(got[name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.quick
@torch.no_grad()
def test_token_by_token_is_the_full_pass(family: str, kind: str):
    model, x = make(family), tokens()
    full = model(x, use_cache=False).logits
    close(piecewise(model, x, [6] + [1] * 6, CACHES[kind](model)), full)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_left_padding_changes_nothing(family: str, kind: str):
    model, (x, mask, positions) = make(family), left_padded()
    full = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(full[:1, 4:], model(x[:1, 4:], use_cache=False).logits)
    close(full[1:], model(x[1:], use_cache=False).logits)
    stepped = piecewise(model, x, [6] + [1] * 6, CACHES[kind](model), mask, positions)
    close(stepped[mask.bool()], full[mask.bool()])


@pytest.mark.parametrize("ridge", ["token", 2.0])
@torch.no_grad()
def test_other_ridges_step_and_pad_too(ridge: Any):
    model, (x, mask, positions) = make(ridge=ridge), left_padded()
    full = model(x, attention_mask=mask, position_ids=positions).logits
    close(full[:1, 4:], model(x[:1, 4:]).logits)
    stepped = piecewise(model, x, [6] + [1] * 6, DynamicCache(), mask, positions)
    close(stepped[mask.bool()], full[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_many_new_tokens_against_a_cache(family: str, kind: str):
    """More than are solved directly, among them; some begin before the first token."""
    model, (x, mask, positions) = make(family), left_padded(padding=10, length=44)
    full = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    pieces = piecewise(model, x, [7, 20, 3, 14], CACHES[kind](model), mask, positions)
    close(pieces[mask.bool()], full[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_large_ridge_is_their_softmax_attention(family: str):
    """Scales, windows, masks: transformers' own, by a code that shares nothing with this one."""
    model, (x, mask, positions) = make(family, ridge=1e8), left_padded()
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    calls = [({"attention_mask": mask, "position_ids": positions}, mask.bool()), ({"position_ids": packed}, mask >= 0)]
    logits = [model(x, use_cache=False, **options).logits[kept] for options, kept in calls]
    generated = model.generate(x, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("eager")
    for got, (options, kept) in zip(logits, calls):
        close(got, model(x, use_cache=False, **options).logits[kept], 5e-5)
    assert torch.equal(model.generate(x, attention_mask=mask, **GREEDY), generated)


@torch.no_grad()
def test_a_window_is_what_the_mask_says():
    """Not every model tells its layers; in others the config may have a number of which nothing is made."""
    torch.manual_seed(0)
    sizes = {**TINY, "num_local_experts": 4, "attn_implementation": "lla"}
    model, x = set_ridge(PhimoeForCausalLM(PhimoeConfig(**sizes, sliding_window=5)), 1e8).eval(), tokens()
    logits = model(x, use_cache=False).logits
    model.set_attn_implementation("eager")
    close(logits, model(x, use_cache=False).logits, 5e-5)
    model.config.sliding_window = None
    assert (logits - model(x, use_cache=False).logits).abs().max() > 0.1
    assert torch.equal(make(sliding_window=5)(x).logits, make()(x).logits)
    q = torch.randn(1, 4, 12, 8)
    run = lambda mask, **options: attend(torch.nn.Identity(), q, q, q, mask, ridge_lambda=1.0, **options)[0]
    starts = torch.zeros(1, 2, 1, 1, dtype=torch.int32)
    assert (run(starts, sliding_window=5) - run(None)).abs().max() > 0.1
    assert torch.equal(run(None, sliding_window=5), run(None))


@torch.no_grad()
def test_right_padding_without_a_cache():
    model, x = make(), tokens()
    mask = torch.ones_like(x)
    mask[0, 7:] = 0
    padded = model(x, attention_mask=mask).logits
    close(padded[:1, :7], model(x[:1, :7]).logits)
    close(padded[1:], model(x[1:]).logits)


@pytest.mark.quick
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ridge", ["head", "token"])
def test_padded_training_has_the_gradients_of_unpadded(side: str, ridge: str):
    model, x = make(ridge=ridge).train(), tokens()
    hidden = slice(None, 4) if side == "left" else slice(8, None)
    kept = slice(4, None) if side == "left" else slice(None, 8)
    mask = torch.ones_like(x)
    mask[0, hidden] = 0
    labels = x.where((mask.cumsum(1) > 1) & (mask == 1), -100)  # nothing foretells a first token
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"num_items_in_batch": 18}
    model(x, attention_mask=mask, position_ids=positions, labels=labels, **options).loss.backward()
    padded = gradients(model)
    for row in (x[:1, kept], x[1:]):
        model(row, labels=row, **options).loss.backward()
    same_gradients(model, padded, gradients(model))


@pytest.mark.parametrize(("family", "ridge"), [*((family, "head") for family in FAMILIES), ("llama", "token")])
def test_packed_documents_do_not_see_each_other(family: str, ridge: str):
    model, x = make(family, ridge), tokens()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    packed = model(x, position_ids=positions, use_cache=False).logits
    for row, edges in enumerate([[0, 5, 12], [0, 1, 3, 12]]):
        for begin, end in itertools.pairwise(edges):
            close(packed[row : row + 1, begin:end], model(x[row : row + 1, begin:end], use_cache=False).logits)


@pytest.mark.parametrize("ridge", ["head", "token"])
@pytest.mark.parametrize("told", [True, False])
def test_packed_training_has_the_gradients_of_single_documents(ridge: str, told: bool):
    model, x = make(ridge=ridge).train(), tokens(1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 7, "max_length_k": 7} if told else {}
    labels = x.clone()
    labels[0, 5] = -100
    options = {"use_cache": False, "num_items_in_batch": 10}
    model(x, position_ids=positions, labels=labels, **lengths, **options).loss.backward()
    packed = gradients(model)
    for begin, end in ((0, 5), (5, 12)):
        model(x[:, begin:end], labels=x[:, begin:end], **options).loss.backward()
    same_gradients(model, packed, gradients(model))


@pytest.mark.parametrize("told", [True, False])
def test_documents_beside_a_cache_that_is_filled(told: bool):
    """Of which transformers does not tell attention: refused, but not if the user tells it."""
    model, x = make(), tokens(1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    if told:
        logits = model(x, position_ids=positions, cu_seq_lens_q=edges, cu_seq_lens_k=edges, use_cache=True).logits
        close(logits[:, 5:], model(x[:, 5:]).logits)
    else:
        with pytest.raises(ValueError, match=r"position_ids: got several documents .* try use_cache=False"):
            model(x, position_ids=positions, use_cache=True)


def test_documents_are_looked_for_once_a_pass_elsewhere_and_in_compiled_code():
    layer: Any = torch.nn.Identity()
    for kinds, first in (
        (None, 0),
        (["full_attention"] * 3, 0),
        (["linear_attention", "conv", "sliding_attention"], 2),
    ):
        layer.config = SimpleNamespace(layer_types=kinds)
        for index in range(3):
            layer.layer_idx = index
            assert _is_the_first(layer) == (index == first)
    q = torch.randn(1, 4, 4, 8)
    run = lambda position_ids: attend(torch.nn.Identity(), q, q, q, None, ridge_lambda=1.0, position_ids=position_ids)[
        0
    ]
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(compiled(torch.arange(4)[None]), run(torch.arange(4)[None]))
    with pytest.raises(RuntimeError, match="position_ids: got several documents"):
        compiled(torch.tensor([[0, 1, 0, 1]]))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    model, x = make(ridge="token").train(), tokens()
    model(x, labels=x, use_cache=False).loss.backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(x, labels=x, use_cache=False).loss.backward()
    same_gradients(model, gradients(model), wanted)


def test_gradients_go_through_a_prefix():
    model, x = make(), tokens()
    model(x, use_cache=False).logits[:, 5:].square().sum().backward()
    full = gradients(model)
    piecewise(model, x, [5, 7], DynamicCache())[:, 5:].square().sum().backward()
    same_gradients(model, gradients(model), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str):
    model, (x, mask, _) = make(family), left_padded()
    greedy = model.generate(x, attention_mask=mask, **GREEDY)
    assert torch.equal(greedy[0, 4:], model.generate(x[:1, 4:], **GREEDY)[0])
    assert torch.equal(greedy[1:], model.generate(x[1:], **GREEDY))
    assert len(set(greedy[1, 12:].tolist())) > 1
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(x, attention_mask=mask, **options, **GREEDY), greedy)
    # Beam search reorders the cache.
    beams = model.generate(x, attention_mask=mask, num_beams=3, **GREEDY)
    assert torch.equal(beams[0, 4:], model.generate(x[:1, 4:], num_beams=3, **GREEDY)[0])
    # Assisted decoding crops it, and looks at several tokens at once.
    assert torch.equal(model.generate(x[1:], prompt_lookup_num_tokens=3, **GREEDY), greedy[1:])


@pytest.mark.parametrize(("family", "graphs"), [("llama", 1), ("gemma3", 2)])
def test_compiled_generation_compiles_once(family: str, graphs: int):
    """With a static cache transformers compiles each step after the prompt; layers with a window are of two kinds,
    before it is full and after."""
    model, (x, mask, _) = make(family), left_padded(length=6, padding=2)
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    compiled = model.generate(x, cache_implementation="static", compile_config=compile_config, **options)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert torch.equal(compiled, model.generate(x, **options))


def test_compiled_training():
    model, x = make().train(), tokens()
    loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    eager = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(x, attention_mask=torch.ones_like(x), labels=x, use_cache=False).loss
    got.backward()
    close(got, loss)
    same_gradients(model, gradients(model), eager)
    with pytest.raises(Exception, match=r"documents may be packed by position_ids.*attention_mask=torch.ones_like"):
        compiled(x, labels=x, use_cache=False)


def test_compiled_packing_breaks_the_graph_and_is_right():
    config = make(ridge=None).config
    q = torch.randn(1, 4, 12, 8)

    def run(position_ids: Tensor) -> Tensor:
        asked = {"inputs_embeds": torch.zeros(1, 12, 32), "attention_mask": None, CACHE: None}
        mask = create_causal_mask(config, position_ids=position_ids, **asked)
        return attend(torch.nn.Identity(), q, q, q, mask, ridge_lambda=1.0)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager")
    for position_ids in (torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]), torch.arange(12)[None]):
        close(compiled(position_ids), run(position_ids))


def test_encoders_are_not_causal():
    register()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
        attn_implementation="lla",
    )
    model, x = set_ridge(BertModel(config)).eval(), tokens()
    other = x.clone()
    other[:, -1] = x[:, 0]
    assert (model(x).last_hidden_state - model(other).last_hidden_state)[:, 0].abs().max() > 1e-3
    mask = torch.ones_like(x)
    mask[0, 7:] = mask[1, :3] = 0
    padded = model(x, attention_mask=mask, position_ids=torch.arange(12)[None]).last_hidden_state
    close(padded[:1, :7], model(x[:1, :7]).last_hidden_state)
    close(padded[1:, 3:], model(x[1:, 3:], position_ids=torch.arange(3, 12)[None]).last_hidden_state)


def test_a_mask_knows_whether_it_is_causal_and_without_one_the_layer_does():
    q = torch.randn(2, 4, 6, 8)
    run = lambda mask, **options: attend(torch.nn.Identity(), q, q, q, mask, ridge_lambda=1.0, **options)[0]
    starts = torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    every = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    close(run(starts, is_causal=False), run(None))
    close(run(every), run(None, is_causal=False))
    assert (run(every) - run(None)).abs().max() > 0.1


def test_a_decoder_can_be_told_not_to_be_causal():
    model, x = make(), tokens()
    model.config.is_causal = False
    other = x.clone()
    other[:, -1] = x[:, 0]
    assert (model(x, use_cache=False).logits - model(other, use_cache=False).logits)[:, 0].abs().max() > 1e-3
    mask = torch.ones_like(x)
    mask[0, 7:] = 0
    close(model(x, attention_mask=mask, use_cache=False).logits[:1, :7], model(x[:1, :7], use_cache=False).logits)


def test_cross_attention():
    register()
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        attn_implementation="lla",
    )
    model, x = set_ridge(BartForConditionalGeneration(config)).eval(), tokens()
    assert sum("lla_ridge" in name for name, _ in model.named_parameters()) == 6
    mask = torch.ones_like(x)
    mask[0, 7:] = 0
    logits = model(input_ids=x, attention_mask=mask, decoder_input_ids=x[:, :5]).logits
    close(logits[:1], model(input_ids=x[:1, :7], decoder_input_ids=x[:1, :5]).logits)
    options: dict[str, Any] = {**GREEDY, "eos_token_id": None}
    generated = model.generate(x, attention_mask=mask, **options)
    assert torch.equal(generated[:1], model.generate(x[:1, :7], **options))
    assert torch.equal(generated, model.generate(x, attention_mask=mask, use_cache=False, **options))


def test_half_precision_and_autocast():
    model, x = make("qwen3"), tokens()
    logits = model(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, labels=x)
    autocast.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.model.layers[0].self_attn.lla_ridge.raw.dtype == torch.float32
    for got in (autocast.logits, half(x).logits):
        assert got.dtype == torch.bfloat16
        assert (got - logits).norm() < 0.05 * logits.norm()


def test_the_tolerance_acts_in_training_alone():
    register("lla_rough", tolerance=0.9)
    model, x = make(), tokens()
    exact = model(x).logits
    model.set_attn_implementation("lla_rough")
    assert torch.equal(model(x).logits, exact)
    assert (model.train()(x).logits - exact).abs().max() > 1e-4


def test_no_ridge_is_told_once():
    notices.forget()
    model, x = make(ridge=None), tokens()
    with pytest.warns(UserWarning, match=r"ridge_lambda is 10.0 in every layer; set_ridge\(model\)"):
        logits = model(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    close(set_ridge(model, 10.0)(x).logits, logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "flash_lla",
            {},
            "name: got 'flash_lla', wanted one without 'flash', which transformers takes for FlashAttention",
        ),
        ("paged|lla", {}, r"without '\|'"),
        ("", {}, "name: got ''"),
        ("sdpa", {}, "name: got 'sdpa', which another attention has; try 'lla'"),
        ("eager", {}, "name: got 'eager', which another attention has"),
        ("lla", {"tolerance": 1.0}, "tolerance: got 1.0, wanted a number from 0 to below 1"),
    ],
)
def test_names_and_numbers_that_register_refuses(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        register(name, **options)


def test_a_name_is_a_string_and_a_tolerance_a_number():
    with pytest.raises(TypeError, match="name: got int, wanted a string"):
        register(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tolerance: got str, wanted a number"):
        register("lla", tolerance="rough")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tolerance: got NoneType, wanted a number"):
        register("lla", tolerance=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1, wanted 0: .* attention_dropout=0.0"),
        ({"softcap": 30.0}, "softcap: got logits of softmax attention that are capped"),
        ({"s_aux": torch.zeros(4)}, "s_aux: got attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "position_bias: got a bias for each pair"),
        ({"output_attentions": True}, "output_attentions: got weights"),
        ({"block_table": torch.zeros(1, 1)}, "block_table: got continuous batching's pages"),
        ({"read_index": [0]}, "read_index: got continuous batching's pages"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, r"attention_mask: got torch.float32 of shape \(1, 1, 3, 3\)"),
        ({"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "masks of queries and keys cannot be taken"),
        ({"attention_mask": torch.ones(1, 3, dtype=torch.int32)}, "wanted a 2-D mask of padding, from which"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q: got a batch of 2, wanted 1"),
        (
            {"attention_mask": torch.tensor([[[[True, False, True]]]])},
            "attention_mask: got padding between tokens in sequence 0",
        ),
    ],
)
def test_arguments_that_the_attention_refuses(argument: dict[str, Any], message: str):
    q = torch.randn(2 if "cu_seq_lens_q" in argument else 1, 4, 3, 8)
    with pytest.raises(ValueError, match=message):
        attend(torch.nn.Identity(), q, q, q, **{"attention_mask": None, "ridge_lambda": 1.0, **argument})


def test_arguments_that_ask_for_nothing_are_taken():
    q = torch.randn(1, 4, 3, 8)
    nothing = {"softcap": None, "s_aux": None, "output_attentions": False, "num_items_in_batch": 3, "dropout": 0.0}
    o, weights = attend(torch.nn.Identity(), q, q, q, None, ridge_lambda=1.0, **nothing)
    assert o.shape == (1, 3, 4, 8)
    assert weights is None


@pytest.mark.parametrize(
    ("create", "options", "config", "message"),
    [
        (create_causal_mask, {"or_mask_function": lambda b, h, q, k: k >= 0}, {}, "got an or_mask_function"),
        (create_causal_mask, {"and_mask_function": lambda b, h, q, k: k >= 0}, {}, "and_mask_function"),
        (
            create_causal_mask,
            {"block_sequence_ids": torch.tensor([[-1, 0, 0, -1, -1, -1]])},
            {},
            "got tokens that see later ones",
        ),
        (create_chunked_causal_mask, {}, {"attention_chunk_size": 3}, r"got chunks of 3 tokens .* and 6 keys"),
        (
            create_bidirectional_sliding_window_mask,
            {},
            {"sliding_window": 3},
            "a window of 3 tokens to both sides and 6 keys",
        ),
        (
            create_causal_mask,
            {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1]])},
            {},
            "padding between tokens in sequence 0, .* padding_side='left'",
        ),
    ],
)
def test_masks_that_are_refused(create: Any, options: dict[str, Any], config: dict[str, Any], message: str):
    settings = make(ridge=None).config
    for name, value in config.items():
        setattr(settings, name, value)
    asked = {"inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": None, CACHE: None, **options}
    if create is not create_bidirectional_sliding_window_mask:
        asked["position_ids"] = torch.arange(6)[None]
    with pytest.raises(ValueError, match=message):
        create(settings, **asked)


def test_chunks_and_windows_that_hold_everything_change_nothing():
    config = make(ridge=None).config
    config.attention_chunk_size = config.sliding_window = 6
    asked = {"inputs_embeds": torch.zeros(1, 6, 32), "attention_mask": None, CACHE: None}
    assert create_chunked_causal_mask(config, position_ids=torch.arange(6)[None], **asked) is None
    assert create_bidirectional_sliding_window_mask(config, **asked) is None


def test_models_with_an_attention_of_their_own_are_refused():
    register()
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="got 'lla' for BloomModel, whose attention cannot be exchanged"):
        AutoModelForCausalLM.from_config(config, attn_implementation="lla")
    AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    falcon = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(KeyError, match="lla"):  # as docs/models.md says: before anything of ours is asked
        AutoModelForCausalLM.from_config(falcon, attn_implementation="lla")


def test_models_refuse_in_words():
    model, x = make(), tokens()
    with pytest.raises(ValueError, match="output_attentions: got weights"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="masks of queries and keys cannot be taken"):
        model(x, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(ValueError, match=r"dropout: got 0.1, wanted 0"):
        make(attention_dropout=0.1).train()(x)
    cache, mask = DynamicCache(), torch.ones_like(x)
    mask[0, 7:] = 0
    model(x, attention_mask=mask, **{CACHE: cache})
    more = torch.nn.functional.pad(mask, (0, 1), value=1)
    with pytest.raises(ValueError, match="attention_mask: got padding between tokens in sequence 0"):
        model(x[:, :1], attention_mask=more, **{CACHE: cache})
    with pytest.raises(ValueError, match="attention_mask: got 1 columns, wanted 13"):
        model(x[:, :1], attention_mask=more[:, -1:], **{CACHE: cache})
    with pytest.raises(ValueError, match=r"lla\W* is not supported"):
        model.generate_batch([[1, 2, 3]])  # continuous batching


def test_the_packages_cache_is_refused():
    model, x = make(), tokens()
    for run in (model, functools.partial(model.generate, max_new_tokens=2)):
        with pytest.raises(TypeError, match=r"past_key_values: got an LLACache.*try DynamicCache\(\)"):
            run(x, **{CACHE: LLACache()})


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_on_a_gpu(family: str):
    """In float32 as on the CPU; in bfloat16 the attention function against itself, without the rounding of weights."""
    model, (x, mask, positions) = make(family).cuda(), (t.cuda() for t in left_padded(padding=10, length=44))
    full = model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for make_cache in CACHES.values():
        pieces = piecewise(model, x, [7, 20, 3, *[1] * 14], make_cache(model), mask, positions)
        close(pieces[mask.bool()], full[mask.bool()], 1e-4)
    # Compiled by transformers, into CUDA graphs.
    compiled = model.generate(x, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(compiled, model.generate(x, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prompts_and_tokens_agree_in_bfloat16(device: str):
    """With float64: each row within the error budget; and many, whose errors are independent, within the largest error
    of one rounding together: of that their roundings are 0.42, and the rest 0.41 at most by the same budget."""
    case = Decoding("prompts", (200, 200), (60, 0), new=200, room=200, dim=64, value_dim=64, ridge_lambda=1.0)
    q, k, v = (t.to(device) for t in case.make(torch.bfloat16)[:3])
    exact, layer = expected(case, torch.bfloat16), torch.nn.Identity().eval()
    allowed = allowance(exact, spread(case), torch.bfloat16, iterative=True)
    for begin, end in ((0, 200), (0, 130), (130, 190), *((i, i + 1) for i in range(190, 200))):
        ranges = torch.tensor([[[[first, end]]] for first in case.starts], dtype=torch.int32, device=device)
        o = attend(layer, q[:, :, begin:end], k, v, ranges, ridge_lambda=1.0)[0].transpose(1, 2).cpu()
        rows = exact[:, :, begin:end]
        assert (excess := Excess.of(o, rows, allowed[:, :, begin:end])).ratio <= 1, f"{begin} to {end}: {excess}"
        assert (o - rows).norm() < torch.finfo(torch.bfloat16).eps / 2 * rows.norm()
