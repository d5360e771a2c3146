"""Moments of a share of a cache, by every backend, and their merge: those of the whole, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flashlla import lla_decode
from flashlla.backends.base import Backend
from flashlla.backends.moments import merged
from flashlla.problem import Inputs, Moments, Problem
from tests.support.decoding import Decoding
from tests.support.helpers import BACKENDS, DEVICES, normal, problem_of, refusal, table

CASES = (
    Decoding("plain", quick=True),
    Decoding("nothing", lengths=(0, 7), quick=True),
    Decoding("starts", lengths=(40, 17, 9), starts=(5, 0, 9)),
    Decoding("shared", heads=6, key_heads=2),
    Decoding("narrow", dim=60, value_dim=5),
    Decoding("wide", dim=128, value_dim=128, heads=1, key_heads=1, lengths=(40,)),
    Decoding("long", lengths=(300, 111), room=300, heads=1, key_heads=1),
    Decoding("pages", page=16, room=64, quick=True),
    Decoding("scale", scale=-0.7),
)
# In the Frobenius norm; operands of 16 bits are rounded once.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-3}


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Moments:
    """Of one query of (D,) and all of its keys."""
    s = scale * k @ q
    p = s.softmax(0)
    mean = p @ torch.cat([k, v], -1)
    about = torch.cat([k, v], -1) - mean
    second = (about * p[:, None]).mT @ about[:, : k.shape[-1]]
    mean[: k.shape[-1]] -= q
    return Moments(s.amax(), (s - s.amax()).exp().sum(), mean, second)


def paged(case: Decoding, t: Tensor) -> Tensor:
    return t if case.page is None else t.unflatten(2, (-1, case.page)).transpose(1, 2).flatten(0, 1).flip(0)


def taken(case: Decoding, backend: Backend, dtype: torch.dtype, device: str) -> bool:
    q = torch.zeros(1, 2, 1, 16, dtype=dtype, device=device)
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    return refusal(backend, q, q, q, op=lla_decode, seqlens_k=lengths) is None


def problem_on(case: Decoding, backend: Backend, dtype: torch.dtype, device: str) -> tuple[Problem, Inputs]:
    q, k, v, keywords = case.make(dtype)
    if case.page is not None:
        pages = torch.arange(k.shape[0] * case.room // case.page, dtype=torch.int32)
        keywords["block_table"] = pages.flip(0).unflatten(0, (k.shape[0], -1))
    on = lambda t: t.to(device) if isinstance(t, Tensor) else t
    keywords = {name: on(t) for name, t in keywords.items()}
    return problem_of(
        on(q), on(paged(case, k)), on(paged(case, v)), lla_decode, **keywords, qk_scale=case.scale, backend=backend.name
    )


every_backend = table(
    "case backend dtype device",
    CASES,
    BACKENDS,
    LIMITS,
    DEVICES,
    when=taken,
    quick=lambda case, _, dtype, __: case.quick and dtype == torch.float32,
)


@every_backend
def test_moments_are_those_of_the_keys_in_use(
    case: Decoding, backend: Backend, dtype: torch.dtype, device: str
) -> None:
    q, k, v, _ = case.make(dtype)
    problem, inputs = problem_on(case, backend, dtype, device)
    found = Moments(*(t.double().cpu() for t in backend.moments(problem, inputs)))
    for b, (start, stop) in enumerate(case.spans):
        for h in range(case.heads):
            own = Moments(*(t[b, h] for t in found))
            if stop <= start:
                assert own.omega == 0
                assert own.m == -torch.inf
                assert not own.mean.any()
                assert not own.second.any()
                continue
            kv_head = h * case.key_heads // case.heads
            keys = (t[b, kv_head, start:stop].double() for t in (k, v))
            want = exact(q[b, h, 0].double(), *keys, problem.scale)
            for name, got, right in zip(Moments._fields, own, want):
                assert (got - right).norm() <= LIMITS[dtype] * max(1.0, right.norm()), name


@every_backend
def test_what_moments_are_solved_to_is_the_output(
    case: Decoding, backend: Backend, dtype: torch.dtype, device: str
) -> None:
    problem, inputs = problem_on(case, backend, dtype, device)
    o = backend.solved(problem, backend.moments(problem, inputs), inputs.ridge_lambda.squeeze(2))  # (B, Hq, Dv)
    q, k, v, keywords = case.make(torch.float64)
    rounded = lambda t: t.to(dtype).double()
    want = lla_decode(rounded(q), rounded(k), rounded(v), **keywords, qk_scale=case.scale, backend="naive")
    assert o.dtype == dtype
    assert (o.double().cpu() - want.squeeze(2)).norm() <= 4 * LIMITS[dtype] * max(1.0, float(want.norm()))


@pytest.mark.quick
def test_pieces_are_merged_to_the_whole() -> None:
    """Of any sizes, one of them empty, about means that lie far apart."""
    q, k, v = normal(6), normal(40, 6, seed=1), normal(40, 5, seed=2)
    k[20:] += 3
    edges = (0, 1, 20, 38, 40)
    pieces = [exact(q, k[a:b], v[a:b], 0.4) for a, b in itertools.pairwise(edges)]
    nothing = Moments(*(torch.zeros_like(t) for t in pieces[0]))
    pieces.insert(2, nothing._replace(m=torch.tensor(-torch.inf).double()))
    found, want = merged(Moments(*map(torch.stack, zip(*pieces)))), exact(q, k, v, 0.4)
    for got, right in zip(found, want):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    none = merged(Moments(*(torch.stack([t, t]) for t in pieces[2])))
    assert none.omega == 0
    assert none.m == -torch.inf
    assert not none.second.any()
