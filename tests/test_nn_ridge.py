"""Ridge: what it gives, that it is learned, that it keeps its digits and its mark."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import flashlla
from flashlla.nn import Ridge
from tests.support.helpers import normal

pytestmark = pytest.mark.quick

HEADS, HIDDEN = 3, 6


def learned(kind: str = "token", **keywords: object) -> Ridge:
    return Ridge(kind, HEADS, HIDDEN, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("init", [0.011, 0.5, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("kind", "shape"), [("head", (HEADS, 1)), ("token", (2, HEADS, 5))])
def test_it_begins_where_it_is_told(kind: str, shape: tuple[int, ...], init: float):
    ridge = learned(kind, init=init)(normal(2, 5, HIDDEN, dtype=torch.bfloat16))
    assert ridge.dtype == torch.float32
    torch.testing.assert_close(ridge, torch.full(shape, init), rtol=1e-5, atol=0)


def test_a_number_is_itself():
    ridge = Ridge(3.5, HEADS)
    assert ridge(normal(2, 5, HIDDEN)) == 3.5
    assert not list(ridge.parameters())


def test_softplus_and_minimum():
    ridge = learned("token", minimum=0.25)
    hidden_states = normal(2, 5, HIDDEN, dtype=torch.float32)
    with torch.no_grad():
        ridge.weight.copy_(normal(HEADS, HIDDEN, seed=1))
        ridge.raw.copy_(normal(HEADS, seed=2))
    raw = hidden_states.double() @ ridge.weight.double().T + ridge.raw.double()  # (B, S, H)
    expected = 0.25 + (1 + raw.exp()).log().transpose(1, 2)
    torch.testing.assert_close(ridge(hidden_states).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_an_optimiser_that_wants_none_is_held_by_the_minimum(kind: str):
    ridge = learned(kind, minimum=0.05)
    hidden_states = normal(2, 5, HIDDEN, dtype=torch.float32)
    optimizer = torch.optim.SGD(ridge.parameters(), lr=100.0)
    for _ in range(50):
        optimizer.zero_grad()
        ridge(hidden_states).sum().backward()
        optimizer.step()
    torch.testing.assert_close(ridge(hidden_states).min(), torch.tensor(0.05), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["head", "token"])
def test_gradients_through_the_operator(kind: str):
    """Of the operator's ridge, by differences, in float64."""
    ridge = learned(kind, dtype=torch.float64)
    q, k, v = normal(3, 1, HEADS, 6, 4).unbind(0)
    hidden_states = normal(1, 6, HIDDEN, seed=1).requires_grad_()

    def call(hidden_states, *parameters):
        value = torch.func.functional_call(ridge, dict(zip(names, parameters)), (hidden_states,))
        return flashlla.lla_attention(q, k, v, ridge_lambda=value, solver="direct")

    names, parameters = zip(*ridge.named_parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * normal(*parameter.shape, seed=2))
    torch.autograd.gradcheck(call, (hidden_states, *parameters))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "float": lambda m: m.float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_it_keeps_its_digits_and_its_mark(cast: str):
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), learned())
    with torch.no_grad():
        model[1].raw.fill_(math.pi)
    model = CASTS[cast](model)
    for parameter in model[1].parameters():
        assert parameter.dtype == torch.float32
        assert parameter._no_weight_decay
    assert torch.equal(model[1].raw, torch.full((HEADS,), math.pi))


def test_it_may_be_wider():
    ridge = learned().double()
    assert ridge(normal(1, 2, HIDDEN)).dtype == torch.float64
    assert learned(dtype=torch.float64).raw.dtype == torch.float64
    assert ridge.bfloat16().raw.dtype == torch.float32
    assert learned(dtype=torch.bfloat16).raw.dtype == torch.float32


def test_it_is_float32_under_autocast():
    ridge, hidden_states = learned(), normal(2, 5, HIDDEN, dtype=torch.float32)
    with torch.no_grad():
        ridge.weight.copy_(normal(HEADS, HIDDEN, seed=1))
    expected = ridge(hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ridge(hidden_states), expected)


def test_parameters_in_bfloat16_move_it_little():
    """As FSDP2's mixed precision has them for a pass: raw rounded to 8 bits."""
    ridge = learned("head", init=1.0)
    for raw in torch.linspace(-6, 6, 200):
        with torch.no_grad():
            exact, rounded = (
                torch.func.functional_call(ridge, {"raw": t.expand(HEADS)}) for t in (raw, raw.bfloat16())
            )
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)


def test_meta():
    ridge = learned(device="meta")
    assert ridge(torch.empty(2, 5, HIDDEN, device="meta")).shape == (2, HEADS, 5)
    ridge.to_empty(device="cpu")
    ridge.reset_parameters()
    assert all(parameter._no_weight_decay for parameter in ridge.parameters())
    torch.testing.assert_close(ridge(normal(2, 5, HIDDEN)), torch.ones(2, HEADS, 5))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "heads"}, "ridge: got 'heads', wanted 'head', 'token' or a number"),
        ({"kind": True}, "ridge: got True"),
        ({"kind": -1.0}, "ridge: got -1.0, wanted a finite number above 0"),
        ({"kind": 10**400}, "ridge: got 1000.*, wanted a finite number above 0"),
        ({"init": 10**400}, "ridge_init: got 1000.* with ridge_min 0.01"),
        ({"init": 0.01}, "ridge_init: got 0.01 with ridge_min 0.01, wanted .*; try ridge_init=0.02"),
        ({"minimum": -0.1}, "ridge_init: got 1.0 with ridge_min -0.1"),
        ({"kind": "token", "hidden_size": None}, "hidden_size: got None"),
        ({"kind": "token", "hidden_size": 0}, "hidden_size: got 0, wanted a whole number of at least 1"),
        ({"num_heads": 0}, "num_heads: got 0, wanted a whole number of at least 1"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        Ridge(**{"kind": "head", "num_heads": HEADS, "hidden_size": HIDDEN, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"init": None}, "ridge_init: got NoneType, wanted a number"),
        ({"minimum": "a"}, r"ridge_min: got str, wanted a number; try float\(ridge_min\)"),
        ({"num_heads": 4.0}, "num_heads: got float, wanted a whole number"),
    ],
)
def test_numbers_are_numbers(arguments, words):
    with pytest.raises(TypeError, match=words):
        Ridge(**{"kind": "head", "num_heads": HEADS, **arguments})


def test_a_ridge_of_tokens_wants_them():
    with pytest.raises(TypeError, match="hidden_states: got None"):
        learned()()
