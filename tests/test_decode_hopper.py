"""Decoding's moments in Gluon: on a GPU, what the definition gives, wherever the kernel's way differs from the plain
one's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.support.interpreter import hasten

pytest.importorskip("triton")
hasten()

from flashlla.backends.triton import decode, hopper  # noqa: E402 (after hasten)
from tests.test_decode_kernels import LIMITS, Call, error, make, not_finite_reaches_those_who_see_it  # noqa: E402

BF16, LIMIT = torch.bfloat16, LIMITS[torch.bfloat16]


@pytest.fixture(autouse=True)
def streamed(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[list[bool]]:
    """Whether each plan is with this kernel; in the end, that all were."""
    if not torch.cuda.is_available() or (reason := hopper.unsupported(torch.device("cuda", 0), BF16)):
        pytest.skip("needs a GPU" if not torch.cuda.is_available() else str(reason))
    monkeypatch.delenv("FLASHLLA_HOPPER", raising=False)
    taken: list[bool] = []
    streams = decode._streams
    monkeypatch.setattr(decode, "_streams", lambda *given: (taken.append(streams(*given)), taken[-1])[1])
    yield taken
    assert taken
    assert all(taken)


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 300, 1000])
def test_against_the_definition(capacity: int, dim: int, dtype: torch.dtype) -> None:
    for pieces in (1, 3, None):
        call = make(2, 2, 2, 1, capacity, dim, dim, dtype, lengths=[capacity, 1 + capacity // 2])
        assert error(call.run(pieces), call.exact()) <= LIMITS[dtype] * (2 if capacity < dim else 1)


@pytest.mark.parametrize("page", [0, 16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths_windows_and_pages(dim: int, window: int | None, page: int) -> None:
    """Sequences of every length, NaN in all that no query sees, pages in any order, several new tokens."""
    call = make(4, 1, 2, 2, 768, dim, dim, torch.float16, lengths=[0, 1, 77, 768], window=window)
    got, want = call.run(3 if window is None else 1, page), call.exact()
    assert error(got, want) <= LIMITS[torch.float16] * 2
    assert (got[0] == 0).all()
    assert (got[1, :, 0] == 0).all()


@pytest.mark.parametrize("spoil", [float("inf"), 3e38])
def test_what_no_query_sees_does_not_matter(spoil: float) -> None:
    call = make(2, 2, 1, 1, 190, 64, 64, BF16, lengths=[40, 190], window=90)
    assert torch.equal(call.run(2, spoil=spoil), call.run(2, spoil=0.0))


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_far_from_the_origin(dim: int) -> None:
    call = make(1, 2, 1, 1, 450, dim, dim, BF16, offset=30.0)
    assert error(call.run(2), call.exact()) <= LIMIT * 1.5


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("logit", [4.0, 9.0, 40.0, 700.0])
@pytest.mark.parametrize("place", [70, 700])
def test_a_weight_that_comes_late(place: int, logit: float, dim: int) -> None:
    """Where it is looked whether sums must fade, and between two such looks."""
    call = make(1, 2, 1, 1, 1300, dim, dim, BF16)
    q = call.q[:, :, 0]
    call.k[:, :, place] = q * (logit / call.factor / q.float().square().sum(-1, True)).to(BF16)
    assert error(call.run(1), call.exact()) <= LIMIT * 3


@pytest.mark.parametrize("which", ["first", "last"])
def test_one_key_far_from_all_others(which: str) -> None:
    call = make(1, 1, 1, 1, 270, 64, 64, BF16)
    call.k[:, :, 0 if which == "first" else -1] *= 20
    call.v[:, :, 0 if which == "first" else -1] *= 20
    assert error(call.run(2), call.exact()) <= LIMIT * 3


@pytest.mark.parametrize("where", [0, 5, 269])
@pytest.mark.parametrize("size", [2.0**20, 2.0**-20])
def test_sizes_that_float16_does_not_hold(size: float, where: int) -> None:
    call = make(1, 2, 1, 1, 270, 64, 64, BF16)
    want = call.exact()
    scaled = Call(
        call.q * size, call.k * size, (call.v.float() * 1e30).bfloat16(), call.lengths, call.ridge * size**2,
        scale=0.125 / size**2,
    )  # fmt: skip
    assert error(scaled.run(2).double() / 1e30, want) <= LIMIT + 2e-3  # 1e30 is no power of two
    call.v[:, :, where] *= 1e30
    assert error(call.run(2), call.exact()) <= LIMIT * 1.5
    call.k[:, 0, where] = 0
    call.v[:, 0, where] = 0
    assert error(call.run(2)[:, :1], call.exact()[:, :1]) <= LIMIT * 1.5


@pytest.mark.parametrize("which", ["q", "k", "v", "ridge"])
def test_numbers_that_are_not_finite_reach_those_who_see_them(which: str) -> None:
    not_finite_reaches_those_who_see_it(which, 140, 64, BF16)


def test_the_same_bits_every_time() -> None:
    call = make(32, 4, 1, 1, 500, 128, 128, BF16)
    first = call.run()
    assert all(torch.equal(call.run(), first) for _ in range(20))


def test_it_leaves_rows_that_no_copy_takes_to_the_plain_kernel(streamed: list[bool]) -> None:
    call = make(1, 2, 1, 1, 300, 64, 64, BF16)
    apart = lambda t: torch.cat([t[..., :1], t], -1)[..., 1:]  # rows of 65 numbers
    changed = dataclasses.replace(call, k=apart(call.k), v=apart(call.v))
    out = torch.empty_like(call.q)
    assert error(changed.decoded(changed.k, changed.v, None, out), call.exact()) <= LIMIT
    assert streamed == [False]
    streamed.clear()
    call.run()
