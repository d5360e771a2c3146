"""Hints at what to write instead of an argument that is not there."""

from __future__ import annotations

import pytest
import torch

import flashlla
from flashlla import hints
from flashlla.calls import named_arguments
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
