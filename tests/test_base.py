"""What a backend of the user's is told where it returns the wrong thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashlla
from flashlla.backends.chunked import Chunked
from flashlla.problem import Forward, Gradients
from tests.support.helpers import qkv

pytestmark = pytest.mark.quick


class Wrong(Chunked):
    """The chunked backend, but for what ``changes`` make of its results by the name of the method."""

    name = "wrong"

    def __init__(self, **changes: Callable[[Any], Any]) -> None:
        self.changes = changes

    def forward(self, problem, inputs):
        return self.changes.get("forward", lambda found: found)(super().forward(problem, inputs))

    def backward(self, problem, inputs, residuals, grad_o):
        return self.changes.get("backward", lambda found: found)(super().backward(problem, inputs, residuals, grad_o))

    def decode(self, problem, inputs, out, report=None):
        return self.changes.get("decode", lambda found: found)(super().decode(problem, inputs, out, report))


def narrower(found: Forward) -> Forward:
    return found._replace(residuals=found.residuals._replace(probe=found.residuals.probe[..., :1]))


def doubled(found: Forward) -> Forward:
    return found._replace(report=found.report._replace(iterations=found.report.iterations.long()))


def elsewhere(found: Gradients) -> Gradients:
    return found._replace(k=found.k.to("meta"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"forward": lambda found: None},
            TypeError,
            ["forward returns", "got NoneType", "Forward of o, resid"],
        ),
        ({"forward": lambda found: found.o}, TypeError, ["forward returns", "got Tensor", "flashlla.problem.Forward"]),
        ({"forward": lambda found: found._replace(o=None)}, TypeError, [".o:", "got NoneType", "torch.Tensor"]),
        (
            {"forward": lambda found: found._replace(report=None)},
            TypeError,
            [".report:", "Report of omega, iter"],
        ),
        ({"forward": narrower}, ValueError, [".residuals.probe:", "(1, 1, 9, 1)", "(1, 1, 9, 4)"]),
        ({"forward": doubled}, TypeError, [".report.iterations:", "int64", "torch.int32"]),
        ({"backward": lambda found: None}, TypeError, ["backward returns", "got NoneType", "Gradients of q, k, v"]),
        ({"backward": lambda found: found._replace(v=found.v.double())}, TypeError, [".v:", "float64", "float32"]),
        ({"backward": lambda found: found._replace(q=found.q[0])}, ValueError, [".q:", "(1, 9, 4)", "(1, 1, 9, 4)"]),
        ({"backward": elsewhere}, ValueError, [".k:", "meta", "cpu"]),
    ],
    ids=lambda x: None,
)
def test_a_backend_is_told_what_was_wanted(change, error, words):
    flashlla.register_backend(Wrong(**change))
    q, k, v = (t.requires_grad_() for t in qkv(1, 9, 4))
    with pytest.raises(error) as caught:
        flashlla.lla_attention(q, k, v, backend="wrong").sum().backward()
    for word in ["backend 'wrong'", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("change", [lambda found: None, lambda found: found.clone()])
def test_a_backend_decodes_to_out(change):
    flashlla.register_backend(Wrong(decode=change))
    cache = torch.randn(2, 1, 1, 9, 4)
    with pytest.raises(TypeError, match=r"backend 'wrong': decode returned .*, wanted out"):
        flashlla.lla_decode(torch.randn(1, 1, 1, 4), *cache, torch.tensor([5]), backend="wrong")


def test_a_backend_that_returns_what_was_wanted_is_told_nothing():
    flashlla.register_backend(Wrong())
    q, k, v = (t.requires_grad_() for t in qkv(1, 9, 4))
    o = flashlla.lla_attention(q, k, v, backend="wrong")
    assert torch.equal(o, flashlla.lla_attention(q, k, v, backend="chunked"))
    o.sum().backward()
