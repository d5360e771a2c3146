"""torch.func.vmap over a leading dimension is the calls one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_attention
from flashlla.backends.base import Backend
from tests.helpers import BACKENDS, interpreted, normal, skip_if_refused

N, B, H, S, D = 3, 2, 2, 11, 4


def leaves(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """q, k, v and the ridge, each with a dimension of N in front unless ``shapes`` says otherwise."""
    defaults = {"q": (N, B, H, S, D), "k": (N, B, H, S, D), "v": (N, B, H, S, D), "ridge_lambda": (N, B, H, S)}
    made = {n: normal(*s, seed=i, dtype=torch.float32) for i, (n, s) in enumerate({**defaults, **shapes}.items())}
    made["ridge_lambda"] = made["ridge_lambda"].exp()
    return {name: t.requires_grad_() for name, t in made.items()}


# Where the dimension is (None: shared by all), and the shapes that differ.
ARRANGEMENTS = {
    "all": ((0, 0, 0, 0), {}),
    "queries": ((0, None, None, None), {"k": (B, H, S, D), "v": (B, H, S, D), "ridge_lambda": (B, H, S)}),
    "keys": ((None, 0, 0, None), {"q": (B, H, S, D), "ridge_lambda": ()}),
    "ridge": ((None, None, None, 0), {"q": (S, D), "k": (S, D), "v": (S, D), "ridge_lambda": (N,)}),
    "not_in_front": ((2, 1, 0, 1), {"q": (B, S, N, D), "k": (B, N, S, D), "v": (N, B, S, D), "ridge_lambda": (S, N)}),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_one_call_after_another(backend: Backend, arrangement: str) -> None:
    in_dims, shapes = ARRANGEMENTS[arrangement]
    if interpreted(backend) and arrangement not in ("queries", "not_in_front"):
        pytest.skip("too many for the interpreter")

    def attention(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Tensor:
        if arrangement == "ridge":
            q, k, v = q[None], k[None], v[None]
        return lla_attention(q, k, v, ridge_lambda=ridge, backend=backend.name)

    given = list(leaves(**shapes).values())
    one = [t if dim is None else t.select(dim, 0) for t, dim in zip(given, in_dims)]
    q, k, v = (t[None] if arrangement == "ridge" else t for t in one[:3])
    skip_if_refused(backend, q, k, v, ridge_lambda=one[3])
    mapped = torch.vmap(attention, in_dims)(*given)
    apart = torch.stack(
        [attention(*(t if dim is None else t.select(dim, i) for t, dim in zip(given, in_dims))) for i in range(N)]
    )
    torch.testing.assert_close(mapped, apart)
    grad_o = normal(*apart.shape, seed=9, dtype=torch.float32)
    for name, a, b in zip(
        ("q", "k", "v", "ridge"), torch.autograd.grad(mapped, given, grad_o), torch.autograd.grad(apart, given, grad_o)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_options_info_and_nesting() -> None:
    shapes = ((2, N, B, S, D), (2, N, B, 7, D), (2, N, B, 7, 3))
    q, k, v = (normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes))
    lengths = torch.tensor([[7, 3], [0, 5], [1, 2]])
    call = lambda q, k, v, lengths: lla_attention(q, k, v, seqlens_k=lengths, window=5, return_info=True)
    o, info = torch.vmap(torch.vmap(call), (0, 0, 0, None))(q, k, v, lengths)
    assert o.shape == (2, N, B, S, 3)
    assert info.backend in flashlla.available_backends()
    for i in range(2):
        for j in range(N):
            alone, told = call(q[i, j], k[i, j], v[i, j], lengths[j])
            torch.testing.assert_close(o[i, j], alone)
            assert torch.equal(info.converged[i, j], told.converged)


def test_many_gradients_at_once() -> None:
    """torch.autograd's own vmap over backward passes: Jacobians."""
    q, k, v = (normal(1, 4, 3, seed=i).requires_grad_() for i in range(3))
    f = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=0.5, solver="direct")
    fast, slow = (torch.autograd.functional.jacobian(f, (q, k, v), vectorize=fast) for fast in (True, False))
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b)


def test_empty() -> None:
    q = torch.zeros(N, 0, 5, 4)
    assert torch.vmap(lla_attention)(q, q, q).shape == (N, 0, 5, 4)
