"""q, k, v and grad_o: of trained models (benchmarks/keys.py), or random, of the kinds of tests/support/cases.py.

Random ones are made on the device, whole tensors at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.keys import kept

COEFFICIENT = 0.95  # of the AR(1) sequence


class Normal(Protocol):
    """Standard normal numbers of a shape."""

    def __call__(self, *shape: int) -> Tensor: ...


Kind = Callable[[Tensor, Tensor, Normal], tuple[Tensor, Tensor]]  # of normal q and k, and more numbers if it needs any


def autoregressive(steps: Tensor) -> Tensor:
    """AR(1) along the tokens, x_t = c x_{t-1} + sqrt(1 - c^2) steps_t, of unit variance from the first on.

    x is the sum of (c L)^n (sqrt(1 - c^2) steps) over n >= 0, L a shift by one token, and that sum is the product
    (1 + c L)(1 + c^2 L^2)(1 + c^4 L^4)...: one factor at a time, there is no loop over tokens.
    """
    x = steps * math.sqrt(1 - COEFFICIENT**2)
    x[..., 0, :] = steps[..., 0, :]
    shift = 1
    while shift < x.shape[-2]:
        x[..., shift:, :] = x[..., shift:, :] + COEFFICIENT**shift * x[..., :-shift, :]
        shift *= 2
    return x


def _iid(q: Tensor, k: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    return q, k


def _correlated(q: Tensor, k: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    """One AR(1) sequence mixed to q and k by two matrices of variance 1 / D."""
    x, dim = autoregressive(q), q.shape[-1]
    mix = normal(2, dim, dim) / math.sqrt(dim)
    return x @ mix[0], x @ mix[1]


def _power_law(q: Tensor, k: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    """Standard deviations that fall as 1 / index in a random basis, variance 1 on average, about a common point."""
    dim = q.shape[-1]
    basis, _ = torch.linalg.qr(normal(dim, dim))
    spread = 1 / torch.arange(1, dim + 1, device=q.device)
    spread *= math.sqrt(dim) / spread.norm()
    point = normal(dim)
    return (q * spread) @ basis + point, (k * spread) @ basis + point


def _sharp(q: Tensor, k: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    """Queries three times as long: few keys hold nearly all of the weight."""
    return 3 * q, k


KINDS: dict[str, Kind] = {"iid": _iid, "correlated": _correlated, "power_law": _power_law, "sharp": _sharp}


# Of models that were trained, without qk-norm and with it; they bring their ridges. A path to a file is a kind, too.
TRAINED = ("trained", "trained_qknorm")


def is_trained(data: str) -> bool:
    return data in TRAINED or data.endswith(".pt")


def make(
    shape: tuple[int, ...],
    data: str = "iid",
    offset: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and grad_o, each of ``shape`` (B, H, S, D); q and k moved together by a vector of length ``offset``."""
    generator = torch.Generator(device).manual_seed(seed)
    normal: Normal = lambda *shape: torch.randn(shape, generator=generator, device=device)
    q, k, v, grad_o = (normal(*shape) for _ in range(4))
    if is_trained(data):
        q, k, v, _ = kept(data).tiled(shape, torch.float32, device)
    else:
        q, k = KINDS[data](q, k, normal)
    point = normal(shape[-1])
    point *= offset / point.norm()
    return [t.to(dtype) for t in (q + point, k + point, v, grad_o)]


def learned_ridge(shape: tuple[int, ...], data: str, device: str = "cuda") -> Tensor:
    """(B, H, 1) or (B, H, S), float32: what a trained model has for its keys."""
    *_, ridge = kept(data).tiled(shape, torch.float32, device)
    return ridge
