"""Rotary positions: turned as complex numbers are, by angles that only differences of positions tell apart."""

from __future__ import annotations

import pytest
import torch

from flashlla.nn.rotary import Rotation
from tests.support.helpers import normal

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("head_dim", [2, 8, 64])
@pytest.mark.parametrize("batched", [False, True])
def test_it_turns_complex_numbers(head_dim: int, batched: bool):
    t = normal(2, 5, 3, head_dim)
    positions = torch.tensor([[0, 1, 2, 7, 1000], [5, 4, 3, 2, 1]]) if batched else torch.arange(5)
    pairs = torch.complex(*t.chunk(2, -1))  # (B, S, H, D / 2)
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    turned = pairs * torch.exp(1j * positions[..., None, None] * frequencies)
    expected = torch.cat((turned.real, turned.imag), -1)
    found = Rotation.at(positions, head_dim, 10000.0, t.dtype)(t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_products_tell_differences():
    q, k = normal(2, 1, 1, 1, 16).unbind(0)
    product = lambda i, j: (
        Rotation.at(torch.tensor([i]), 16, 100.0, q.dtype)(q) * Rotation.at(torch.tensor([j]), 16, 100.0, q.dtype)(k)
    ).sum()
    torch.testing.assert_close(product(7, 3), product(104, 100))
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_are_float32_at_least(dtype: torch.dtype):
    turn = Rotation.at(torch.tensor([1001]), 8, 10000.0, dtype)
    t = normal(1, 1, 1, 8, dtype=dtype)
    assert turn(t).dtype == torch.float32
    exact = Rotation.at(torch.tensor([1001]), 8, 10000.0, torch.float64)(t.double())
    torch.testing.assert_close(turn(t).double(), exact, rtol=0, atol=3e-4)
