"""Hints at what to write instead of an argument that is not there."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import flashlla
from flashlla import hints
from flashlla.calls import named_arguments
from flashlla.integrations import fla
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick
CALLS = (flashlla.lla_attention, flashlla.lla_attention_varlen, flashlla.lla_decode)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_hint_names_arguments_that_are_there(call):
    known = named_arguments(call)
    for name, hint in {**hints._ELSEWHERE, **hints._FOR.get(call.__name__, {})}.items():
        if name not in known and hint.endswith("=") and " " not in hint:
            elsewhere = {argument for other in CALLS for argument in named_arguments(other)}
            assert hint.removesuffix("=") in elsewhere, (name, hint)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_layers_name_of_the_ridge_is_known(call):
    with pytest.raises(TypeError, match="'ridge'; try ridge_lambda="):
        hints.refuse_unknown(call.__name__, ["ridge"], lambda: named_arguments(call))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", ["attention_mask", "temperature"])
def test_a_hint_reaches_who_compiles(name, fullgraph):
    torch._dynamo.reset()
    call = torch.compile(
        lambda q, k, v: flashlla.lla_attention(q, k, v, **{name: None}), fullgraph=fullgraph, backend="eager"
    )
    with pytest.raises((TypeError, torch._dynamo.exc.Unsupported)) as caught:
        call(*qkv(1, 9, 4))
    assert f"lla_attention() got an unexpected keyword argument '{name}'; try " in str(caught.value).replace("\\", "")


LAYERS = {"nn": flashlla.nn.LocalLinearAttention, "fla": fla.LocalLinearAttention}


@pytest.mark.parametrize(
    ("of", "name", "hint"),
    [
        ("nn", "num_key_value_heads", "num_kv_heads="),
        ("nn", "ridge_intt", "ridge_init="),
        ("nn", "dropout", "without it: there is no dropout"),
        ("nn", "sliding_window", "window="),
        ("nn", "zzz", "one of hidden_size, num_heads, .*, dtype"),
        ("fla", "window", "window_size="),
        ("fla", "tolerence", "tolerance="),
        ("fla", "d_model", "hidden_size="),
    ],
)
def test_a_layer_names_what_was_meant(of, name, hint):
    with pytest.raises(
        TypeError, match=rf"LocalLinearAttention\(\) got an unexpected keyword argument '{name}'; try {hint}"
    ):
        LAYERS[of](hidden_size=32, num_heads=4, **{name: 1})


def test_hints_of_a_layer_name_arguments_that_are_there():
    known = hints.keywords_of(flashlla.nn.LocalLinearAttention.__init__)
    assert not set(known) & set(hints.LAYER)
    for hint in hints.LAYER.values():
        for name in re.findall(r"(\w+)=", hint):
            assert name in known


@pytest.mark.parametrize(
    ("make", "name", "hint"),
    [
        (flashlla.nn.Ridge, "ridge_init", "init="),
        (flashlla.nn.Ridge, "minimun", "minimum="),
        (flashlla.nn.LLACache, "max_cache_len", "max_len="),
        (flashlla.nn.LLACache, "maxlen", "max_len="),
        (flashlla.nn.LocalLinearAttention(32, 4), "attention_msk", "attention_mask="),
    ],
)
def test_so_do_its_parts(make, name, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; try {hint}"):
        make(**({"hidden_states": torch.zeros(1, 2, 32)} if isinstance(make, torch.nn.Module) else {}), **{name: 1})


def test_a_layer_that_is_checked_has_its_signature():
    assert list(inspect.signature(flashlla.nn.LocalLinearAttention).parameters)[:2] == ["hidden_size", "num_heads"]
    assert "options" in inspect.signature(fla.LocalLinearAttention).parameters
    LAYERS["fla"](hidden_size=32, num_heads=4, tolerance=1e-3, window_size=4)
