"""The backward kernels: gradients of any size."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels import check, interpreted, make, step

pytestmark = pytest.mark.quick


@interpreted
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_gradients_of_any_size_are_as_exact(size: float) -> None:
    tensors = make((1, 1, 33, 8), torch.float32)
    tensors[3] = tensors[3] * size
    check(step(tensors, 0.1, backend="triton"), tensors, 0.1)
