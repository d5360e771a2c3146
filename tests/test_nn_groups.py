"""param_groups: every parameter that learns stands in one group, the right one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashlla.nn import LocalLinearAttention, param_groups

pytestmark = pytest.mark.quick


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10, bias=False)
        self.attention = LocalLinearAttention(16, 2, ridge="token", qkv_bias=True)
        self.embedding = nn.Embedding(10, 16)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Linear(16, 16)
        self.special = nn.Parameter(torch.zeros(3, 3))
        self.special._no_weight_decay = True  # type: ignore[attr-defined]
        self.frozen = nn.Linear(16, 16).requires_grad_(False)


def test_every_parameter_has_its_group():
    model = Model()
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {g["name"]: sorted(names[p] for p in g["params"]) for g in param_groups(model, 0.1, 0.5)}
    assert groups == {
        "weights": [*(f"attention.{name}_proj.weight" for name in "koqv"), "mlp.weight"],
        "no_decay": [
            *(f"attention.{name}" for name in ("k_norm.weight", "k_proj.bias", "q_norm.weight", "q_proj.bias")),
            "attention.v_proj.bias",
            "head.weight",
            "mlp.bias",
            "norm.bias",
            "norm.weight",
            "special",
        ],
        "ridges": ["attention.ridge.raw", "attention.ridge.weight"],
    }


def test_rates_and_decay():
    rates = lambda **keywords: {
        g["name"]: (g["lr"], g["weight_decay"]) for g in param_groups(Model(), 0.1, 0.5, **keywords)
    }
    assert rates() == {"weights": (0.1, 0.5), "no_decay": (0.1, 0.0), "ridges": (1.0, 0.0)}
    assert rates(ridge_lr=0.2)["ridges"] == (0.2, 0.0)


def test_an_optimiser_takes_them():
    model = Model()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.5))
    before = model.attention.ridge.raw.detach().clone()
    model.attention(torch.randn(1, 8, 16))[0].square().sum().backward()
    optimizer.step()
    assert (model.attention.ridge.raw - before).abs().min() > 0.5  # Adam's first step is its rate


def test_no_group_is_empty():
    assert [g["name"] for g in param_groups(nn.Linear(3, 3, bias=False), 0.1, 0.5)] == ["weights"]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "ridge_lr"])
def test_rates_are_checked(name: str):
    with pytest.raises(ValueError, match=f"{name}: got -1, wanted a number of at least 0"):
        param_groups(Model(), **{"lr": 0.1, "weight_decay": 0.5, name: -1})  # type: ignore[arg-type]


def test_a_model_that_does_not_learn():
    with pytest.raises(ValueError, match="model: got one in which no parameter learns"):
        param_groups(nn.ReLU(), 0.1, 0.5)
