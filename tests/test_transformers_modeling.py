"""LLAForCausalLM: trains, saves, loads and generates as transformers' own models do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from flashlla.integrations.transformers import LLAConfig, LLAForCausalLM, LLAModel
from flashlla.nn import LLACache
from tests.support.models import CACHE, TINY, gradients, left_padded, piecewise, scatter, tokens

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5, "ridge": "token", "num_key_value_heads": 4},
    "fixed": {"ridge": 2.0, "qk_norm": False, "qkv_bias": True, "rope_theta": None, "tie_word_embeddings": False},
}
CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=50),
    "own": lambda config: LLACache(),
    "own, of a fixed size": lambda config: LLACache(50),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def model_of(variant: str = "plain", **options: Any) -> LLAForCausalLM:
    torch.manual_seed(0)
    model = LLAForCausalLM(LLAConfig(**{**TINY, "tolerance": 0.0, **VARIANTS[variant], **options}))
    scatter(model)
    return model.eval()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * max(1.0, gradient.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_pieces_are_the_full_pass(variant: str, kind: str):
    model, (x, mask, positions) = model_of(variant), left_padded(padding=6, length=30)
    full = model(x, attention_mask=mask, use_cache=False).logits
    close(full, model(x, attention_mask=mask, position_ids=positions, use_cache=False).logits)
    close(full[:1, 6:], model(x[:1, 6:], use_cache=False).logits)
    close(full[1:], model(x[1:], use_cache=False).logits)
    for sizes in ([10] + [1] * 20, [4, 20, 6]):
        stepped = piecewise(model, x, sizes, CACHES[kind](model.config), mask)
        close(stepped[mask.bool()], full[mask.bool()])


@pytest.mark.quick
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(variant: str):
    model, x = model_of(variant).train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_changes_nothing():
    model, x = model_of("window").train(), tokens()
    model(x, labels=x).loss.backward()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing
    model(x, labels=x).loss.backward()
    same_gradients(gradients(model), wanted)


def test_compiled_training():
    model, x = model_of("window").train(), tokens()
    loss = model(x, labels=x).loss
    loss.backward()
    wanted = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x, labels=x).loss
    compiled.backward()
    close(compiled, loss)
    same_gradients(gradients(model), wanted)


def test_left_padded_training():
    model, (x, mask, _) = model_of("window").train(), left_padded()
    labels = x.where(mask.cumsum(1) > 1, -100)  # as README.md has it
    model(x, attention_mask=mask, labels=labels, num_items_in_batch=18).loss.backward()
    padded = gradients(model)
    for row in (x[:1, 4:], x[1:]):
        model(row, labels=row, num_items_in_batch=18).loss.backward()
    same_gradients(padded, gradients(model))


@pytest.mark.parametrize("told", [True, False])
def test_packed_documents_do_not_see_each_other(told: bool):
    model, x = model_of("window"), tokens()
    if told:
        x = x[:1]
        edges = torch.tensor([0, 5, 12], dtype=torch.int32)
        packing = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 7, "max_length_k": 7}
    else:
        row = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
        packing = {"position_ids": torch.tensor([row, [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]])}
    outputs = model(x, output_hidden_states=True, **packing)
    assert [state.shape for state in outputs.hidden_states] == [(len(x), 12, 32)] * 3
    close(outputs.logits[:1], torch.cat([model(x[:1, :5]).logits, model(x[:1, 5:]).logits], 1))
    if not told:
        pieces = [model(x[1:, begin:end]).logits for begin, end in ((0, 5), (5, 6), (6, 12))]
        close(outputs.logits[1:], torch.cat(pieces, 1))


def test_packed_documents_beside_a_mask_are_refused():
    model, positions = model_of(), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match="attention_mask: got one together with position_ids of several documents"):
        model(tokens(), attention_mask=torch.ones(2, 12, dtype=torch.long), position_ids=positions)
    padding = torch.arange(12).expand(2, 12) >= 5  # whose positions say nothing
    assert model(tokens(), attention_mask=padding, position_ids=positions).logits.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation(variant: str):
    model, (x, mask, _) = model_of(variant), left_padded()
    greedy = model.generate(x, attention_mask=mask, **GREEDY)
    assert torch.equal(greedy[0, 4:], model.generate(x[:1, 4:], **GREEDY)[0])
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(x, attention_mask=mask, **options, **GREEDY), greedy)
    beams = model.generate(x, attention_mask=mask, num_beams=3, **GREEDY)
    assert torch.equal(beams[0, 4:], model.generate(x[:1, 4:], num_beams=3, **GREEDY)[0])
    assert torch.equal(model.generate(x[1:], prompt_lookup_num_tokens=3, **GREEDY), greedy[1:])
    torch.manual_seed(0)
    assert model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=True).shape == (2, 15)


@pytest.mark.parametrize("max_len", [None, 40], ids=["grows", "fixed"])
def test_generation_through_the_packages_cache(max_len: int | None):
    model, (x, mask, _) = model_of("window"), left_padded()
    greedy, past = model.generate(x, attention_mask=mask, **GREEDY), LLACache(max_len)
    half = model.generate(x, attention_mask=mask, **GREEDY | {CACHE: past, "max_new_tokens": 3})
    assert past.get_seq_length() == 14
    more = {CACHE: past, "max_new_tokens": GREEDY["max_new_tokens"] - 3}
    whole = model.generate(half, attention_mask=F.pad(mask, (0, 3), value=1), **GREEDY | more)
    assert torch.equal(whole, greedy)
    beams = {"attention_mask": mask, "num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(x, **beams, **{CACHE: LLACache(max_len)}), model.generate(x, **beams))
    with pytest.raises(ValueError, match="got an LLACache in assisted generation, wanted a DynamicCache"):
        model.generate(x[1:], prompt_lookup_num_tokens=3, **GREEDY, **{CACHE: LLACache(max_len)})


def test_compiled_generation_does_not_compile_every_step():
    model, (x, mask, _) = model_of(), left_padded(length=6, padding=2)
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    torch._dynamo.reset()
    counters.clear()
    compiled = model.generate(x, cache_implementation="static", compile_config=compile_config, **options)
    # The mask grows: the second step finds that its length changes, and the rest go by what that compiled.
    assert counters["stats"]["unique_graphs"] <= 2
    assert torch.equal(compiled, model.generate(x, **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded(variant: str, tmp_path: Path):
    model, x = model_of(variant), tokens()
    model.save_pretrained(tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, LLAForCausalLM)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    close(loaded(x).logits, model(x).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in half.named_parameters() if "ridge" in name} <= {torch.float32}
    assert half(x).logits.dtype == torch.bfloat16
    stack = AutoModel.from_pretrained(tmp_path)
    assert isinstance(stack, LLAModel)
    close(stack(x).last_hidden_state, model.model(x).last_hidden_state)


def test_from_a_config():
    config = LLAConfig(**{**TINY, "head_dim": None, "num_key_value_heads": None, "intermediate_size": None})
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (8, 4, 128)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, LLAForCausalLM)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 0.15 < model.lm_head.weight.std() < 0.25
    torch.testing.assert_close(model.model.layers[0].attention.ridge(), torch.ones(4, 1))


def test_what_is_given_and_kept():
    model, x = model_of(), tokens()
    outputs = model(x)
    assert isinstance(outputs[CACHE], DynamicCache)
    assert model(x, use_cache=False).get(CACHE) is None
    assert model.train()(x).get(CACHE) is None
    model.eval()
    close(model(x, logits_to_keep=2).logits, outputs.logits[:, -2:])
    close(model(x, logits_to_keep=torch.tensor([0, 3])).logits, outputs.logits[:, [0, 3]])
    close(model(inputs_embeds=model.get_input_embeddings()(x)).logits, outputs.logits)
    assert isinstance(model(x, return_dict=False), tuple)
    with pytest.raises(ValueError, match="input_ids, inputs_embeds: wanted one of the two"):
        model()
    with pytest.raises(ValueError, match="output_attentions"):
        model(x, output_attentions=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        model(x, attention_masks=x)
