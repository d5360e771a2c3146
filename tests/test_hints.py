"""Hints at what to write instead of an argument that is not there."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashlla
import flashlla.distributed
from flashlla import hints
from flashlla.calls import named_arguments
from flashlla.integrations import fla
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick
CALLS = (flashlla.lla_attention, flashlla.lla_attention_varlen, flashlla.lla_decode)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_hint_names_arguments_that_are_there(call):
    known = named_arguments(call)
    for name, hint in {**hints.CALLS, **hints._FOR.get(call.__name__, {})}.items():
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


@pytest.mark.parametrize(
    ("make", "name", "hint"),
    [
        (flashlla.CG, "tol", "tolerance="),
        (flashlla.CG, "maxiter", "max_iters="),
        (flashlla.CG, "preconditioner", "flashlla.PCG"),
        (flashlla.PCG, "precond", "preconditioner="),
        (flashlla.PCG, "cg_rtol", "rtol="),
        (flashlla.Direct, "tolerance", "without it"),
        (flashlla.set_backend, "backend_name", "name="),
        (flashlla.warmup, "dims", "one of head_dim, .*, window"),
        (flashlla.warmup, "softmax_scale", "qk_scale="),
        (flashlla.warmup, "widow", "window="),
        (flashlla.distributed.lla_attention_cp, "gruop", "group="),
        (flashlla.distributed.shard_sequence, "dims", "dim="),
        (flashlla.nn.param_groups, "learning_rate", "lr="),
    ],
)
def test_solvers_and_functions_name_what_was_meant(make, name, hint):
    given = (qkv(1, 9, 4), {"group": None}) if make is flashlla.distributed.lla_attention_cp else ((), {})
    with pytest.raises(TypeError, match=rf"{make.__name__}\(\) got .* keyword argument '{name}'; try {hint}"):
        make(*given[0], **given[1], **{name: 1})


def public() -> dict[str, Callable[..., Any]]:
    """Functions that the reference lists, and classes that callers make with arguments: not records of results, nor
    base classes, nor errors."""
    pages = sorted((Path(flashlla.__file__).parents[1] / "docs" / "api").glob("*.md"))
    names = [name for page in pages for name in re.findall(r"^::: flashlla\.(\S+)", page.read_text("utf-8"), re.M)]
    found = {name: pkgutil.resolve_name(f"flashlla.{name}") for name in names if "transformers" not in name}
    for name in ("problem.resolution", *(name for name, what in found.items() if isinstance(what, type))):
        if name not in MADE:
            del found[name]
    return found


MADE = ("CG", "ConvergenceCounter", "Direct", "PCG", "integrations.fla.LocalLinearAttention", "nn.LLACache")
MADE += ("nn.LocalLinearAttention", "nn.Ridge", "set_backend", "solvers.Gram", "solvers.Jacobi")


@pytest.mark.parametrize("name", public())
def test_all_that_callers_make_or_call_names_what_was_meant(name):
    wanted = inspect.signature(function := public()[name]).parameters.values()
    missing = [p for p in wanted if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    first = [None for p in missing if p.kind is not p.KEYWORD_ONLY]
    named = {p.name: None for p in missing if p.kind is p.KEYWORD_ONLY}
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'zzz'; try "):
        function(*first, **named, zzz=1)


def test_a_layer_that_is_checked_has_its_signature():
    assert list(inspect.signature(flashlla.nn.LocalLinearAttention).parameters)[:2] == ["hidden_size", "num_heads"]
    assert "options" in inspect.signature(fla.LocalLinearAttention).parameters
    LAYERS["fla"](hidden_size=32, num_heads=4, tolerance=1e-3, window_size=4)
