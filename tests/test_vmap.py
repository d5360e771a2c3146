"""torch.func's transforms: vmap over a leading dimension is the calls one by one, and grad gives what backward does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_attention
from flashlla.backends.base import Backend
from tests.support.helpers import BACKENDS, interpreted, normal, skip_if_refused, table

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


@table(
    "backend arrangement",
    BACKENDS,
    ARRANGEMENTS,
    when=lambda backend, arrangement: not interpreted(backend) or arrangement in ("queries", "not_in_front"),
)
def test_vmap_is_one_call_after_another(backend: Backend, arrangement: str) -> None:
    in_dims, shapes = ARRANGEMENTS[arrangement]

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


@pytest.mark.quick
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


@pytest.mark.quick
def test_many_gradients_at_once() -> None:
    """torch.autograd's own vmap over backward passes: Jacobians."""
    q, k, v = (normal(1, 4, 3, seed=i).requires_grad_() for i in range(3))
    f = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=0.5, solver="direct")
    fast, slow = (torch.autograd.functional.jacobian(f, (q, k, v), vectorize=fast) for fast in (True, False))
    for a, b in zip(fast, slow):
        torch.testing.assert_close(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients_of_torch_func(backend: str) -> None:
    q, k, v, ridge = leaves().values()
    f = lambda *given: lla_attention(*given[:3], ridge_lambda=given[3], backend=backend).sin().sum()
    wanted = torch.autograd.grad(sum(map(f, q, k, v, ridge)), (q, k, v, ridge))
    given, wrt = [t.detach() for t in (q, k, v, ridge)], (0, 1, 2, 3)
    per_sample = torch.vmap(torch.func.grad(f, wrt))(*given)
    of_the_sum = torch.func.grad(lambda *given: torch.vmap(f)(*given).sum(), wrt)(*given)
    rows = torch.func.jacrev(torch.vmap(f), wrt)(*given)
    for a, b, c, want in zip(per_sample, of_the_sum, rows, wanted):
        for got in (a, b, c.sum(0)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_torch_func_of_the_other_calls() -> None:
    q, k, v, _ = (t[0].flatten(0, 1).detach() for t in leaves().values())  # (B, S, D)
    o, wanted = torch.func.vjp(lambda q: lla_attention(q, k, v, ridge_lambda=1.0), q)
    _, got = torch.func.vjp(lambda q: flashlla.LLAFunction.apply(q, k, v, 1.0)[0], q)
    assert torch.equal(got(o)[0], wanted(o)[0])
    packed = lambda q: flashlla.lla_attention_varlen(q[None], k[None], v[None], ridge_lambda=1.0, cu_seqlens=edges)[0]
    edges = torch.tensor([0, S])
    _, got = torch.func.vjp(packed, q)  # the batch as heads
    torch.testing.assert_close(got(o)[0], wanted(o)[0])
    omega = torch.vmap(lambda q: flashlla.LLAFunction.apply(q, k, v, 1.0)[1])(torch.stack([q, q]))
    assert torch.equal(omega[0], omega[1])
    with pytest.raises(NotImplementedError, match="omega has no gradient"):
        torch.func.grad(lambda q: flashlla.LLAFunction.apply(q, k, v, 1.0)[1].sum())(q)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda q: torch.func.grad(lambda q: lla_attention(q, q, q).sum())(q).sum(), "first derivative only"),
        (lambda q: flashlla.lla_decode(q, q, q, torch.tensor([5])).sum(), "lla_decode has no gradient"),
    ],
)
def test_gradients_that_there_are_not(f: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        torch.func.grad(f)(normal(1, 2, 5, 4))


def test_empty() -> None:
    q = torch.zeros(N, 0, 5, 4)
    assert torch.vmap(lla_attention)(q, q, q).shape == (N, 0, 5, 4)
