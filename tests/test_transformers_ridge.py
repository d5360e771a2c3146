"""set_ridge: which layers get a ridge, how it learns, and that it is there again where a model is loaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, LlamaForCausalLM

from flashlla import notices
from flashlla.integrations.transformers import register, set_ridge
from flashlla.nn import Ridge, param_groups
from tests.support.models import FAMILIES, gradients, make, tokens

KINDS = ["head", "token", 2.0]


def ridges(model: Any) -> list[Ridge]:
    return [module for module in model.modules() if isinstance(module, Ridge)]


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_one_and_it_learns(family: str, kind: Any):
    model, x = make(family, kind), tokens()
    assert [ridge.kind for ridge in ridges(model)] == [kind] * 2
    model.train()(x, labels=x).loss.backward()
    learned = {name: gradient for name, gradient in gradients(model).items() if "ridge" in name}
    assert len(learned) == {"head": 2, "token": 4, 2.0: 0}[kind]
    assert all(gradient.abs().max() > 0 for gradient in learned.values())


def test_an_optimiser_is_given_them_apart():
    model = make(ridge="token")
    groups = {group["name"]: group for group in param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert len(groups["ridges"]["params"]) == 4
    assert groups["ridges"]["weight_decay"] == 0.0


def test_the_floor_holds():
    model, x = make(), tokens()
    for ridge in ridges(model):
        torch.nn.init.constant_(ridge.raw, -1e4)
        assert ridge().min() >= 1e-2
    assert model(x).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(family: str, kind: Any, tied: bool, tmp_path: Path):
    """In several files, which together hold each parameter once."""
    model, x = make(family, kind, tie_word_embeddings=tied), tokens()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert AutoConfig.from_pretrained(tmp_path).lla_ridge == {"ridge": kind, "init": 1.0, "minimum": 1e-2}
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lla", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_they_stay_in_float32(tmp_path: Path):
    model, x = make(), tokens()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lla", dtype=torch.bfloat16)
    for ridge, original in zip(ridges(half), ridges(model)):
        assert ridge.raw.dtype == torch.float32
        assert torch.equal(ridge.raw, original.raw)
    logits = half(x).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - model(x).logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("kind", ["head", "token"])
def test_those_that_a_checkpoint_lacks_begin_anew(kind: Any):
    model = make(ridge=kind)
    weights = {name: weight for name, weight in model.state_dict().items() if "ridge" not in name}
    loaded, told = LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=weights, output_loading_info=True
    )
    assert len(told["missing_keys"]) == {"head": 2, "token": 4}[kind]
    for ridge in ridges(loaded):
        torch.testing.assert_close(ridge(torch.randn(1, 3, 32)).flatten(), torch.ones(4 if kind == "head" else 12))


def test_models_without_a_note_are_as_they_were(tmp_path: Path):
    make(ridge=None).save_pretrained(tmp_path)
    assert not ridges(LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="lla"))


def test_a_model_with_ridges_that_runs_with_another_attention_says_so(tmp_path: Path):
    model, x = make(), tokens()
    model.save_pretrained(tmp_path)
    notices.forget()
    with pytest.warns(UserWarning, match="attn_implementation='eager', which has no use for them"):
        softmax = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert len(ridges(softmax)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (softmax(x).logits - model(x).logits).abs().max() > 1e-2
        softmax.set_attn_implementation("lla")
        assert torch.equal(softmax(x).logits, model(x).logits)


def test_they_are_where_their_layers_are():
    model = set_ridge(make(ridge=None).to("meta"), "token")
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_ridge_can_be_set_again_and_copied():
    model, x = make(), tokens()
    set_ridge(model, 3.0)
    assert model.config.lla_ridge["ridge"] == 3.0
    assert torch.equal(model(x).logits, make(ridge=3.0)(x).logits)
    set_ridge(model, "head", init=0.5, minimum=0.1)
    assert all(torch.allclose(ridge(), torch.tensor(0.5)) for ridge in ridges(model))
    assert torch.equal(copy.deepcopy(model)(x).logits, model(x).logits)


def test_of_a_model_that_is_part_of_another(tmp_path: Path):
    """The note is in the config of the part whose layers they are."""
    register()
    model = make("gemma3")
    model.model.save_pretrained(tmp_path)
    loaded = Gemma3ForCausalLM.from_pretrained(tmp_path, attn_implementation="lla")
    for ridge, original in zip(ridges(loaded), ridges(model), strict=True):
        assert torch.equal(ridge.raw, original.raw)


def test_refusals():
    model = make(ridge=None)
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"model: got LlamaForCausalLM without a layer .*set_attn_implementation\('lla'\)"
    ):
        set_ridge(model)
    model.set_attn_implementation("lla")
    with pytest.raises(ValueError, match="ridge: got 'heads', wanted 'head', 'token' or a number"):
        set_ridge(model, "heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wanted 0 <= ridge_min < ridge_init"):
        set_ridge(model, init=1e-3)
    assert not ridges(model)
    assert not hasattr(model.config, "lla_ridge")

    class Closed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.is_causal, self.weight = model.config, True, torch.nn.Parameter(torch.ones(1))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    with pytest.raises(ValueError, match=r"model: got Closed, whose forward takes no \*\*kwargs"):
        set_ridge(Closed())
