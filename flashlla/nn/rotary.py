"""Rotary position embedding: pairs of coordinates, half a head apart, turned by angles that grow with the position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """By how much each position turns each pair; (..., S, 1, D / 2), for all heads alike."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
        """positions: (S,) or (B, S), whole numbers; computed in float32 at least.

        Source: Su et al., "RoFormer", 2021; in the order that GPT-NeoX and Llama use.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device) / head_dim  # (D / 2,)
        angles = positions.to(dtype)[..., None, None] * theta**-exponents
        return cls(angles.cos(), angles.sin())

    def __call__(self, t: Tensor) -> Tensor:
        """t: (B, S, H, D); returned in the dtype of the angles."""
        first, second = t.to(self.cos.dtype).chunk(2, -1)
        return torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), -1)
