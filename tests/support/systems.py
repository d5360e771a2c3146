"""Small systems made without the package, and what they are by NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashlla.covariance import Systems
from flashlla.problem import resolution
from tests.support.helpers import normal

D, M, N = 12, 9, 40


def systems_of(dtype: torch.dtype = torch.float64, ridge: float = 0.1, seed: int = 0) -> tuple[Systems, Tensor]:
    """Two heads' systems and a right-hand side, made without the package; keys of very different sizes by direction."""
    k = normal(2, N, D, seed=seed) * torch.linspace(0.2, 3, D, dtype=torch.float64) + 1
    p = (normal(2, M, D, seed=seed + 1) @ k.mT * D**-0.5).softmax(-1)
    ridges = ridge * normal(2, M, seed=seed + 2).mul(0.3).exp()
    b = normal(2, M, D, seed=seed + 3)
    k, p, ridges, b = (t.to(dtype) for t in (k, p, ridges, b))
    return Systems(k, p, p @ k, ridges, resolution(dtype)), b


def matrices(systems: Systems) -> np.ndarray:
    """The A_i, by NumPy from the definition."""
    k, p, mean, ridge = (t.double().numpy() for t in (systems.k, systems.p, systems.k_mean, systems.ridge))
    centred = k[:, None] - mean[:, :, None]  # (2, M, N, D)
    a: np.ndarray = np.einsum("hij,hijd,hije->hide", p, centred, centred) + ridge[..., None, None] * np.eye(k.shape[-1])
    return a


def each_row() -> list[tuple[int, int]]:
    return [(h, i) for h in range(2) for i in range(M)]
