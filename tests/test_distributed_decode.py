"""A cache in shares on 2 and on 4 processes: what one process gives."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashlla import lla_decode
from flashlla.distributed import decode, lla_decode_cp
from flashlla.distributed.groups import ranks_of
from flashlla.problem import Moments
from tests.support.helpers import normal
from tests.support.processes import Checks, close, outcomes, world

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

CHECKS = Checks()
check = CHECKS.add


# A cache in shares: of (sequence, rank) how many keys; for 2 ranks the first two columns hold all of them.
SHARES = {
    "even": ((12, 12, 12, 12), (4, 4, 4, 4)),
    "empty": ((0, 25, 15, 0), (0, 1, 0, 1)),
    "first": ((40, 0, 0, 0), (3, 0, 0, 0)),
    "none": ((0, 7, 0, 33), (0, 0, 0, 0)),
}


def decoding(shares: tuple[tuple[int, ...], ...], new: int, window: int | None) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = torch.tensor(shares).unflatten(1, (size, -1)).sum(-1)  # (B, ranks)
    room = int(counts.sum(1).max())
    q = normal(2, 4, new, 6)
    k, v = normal(2, 2, room, 6, seed=1), normal(2, 2, room, 5, seed=2)
    ridge = normal(2, 4, new, seed=3).exp()
    o = lla_decode(q, k, v, counts.sum(1).int(), ridge_lambda=ridge, window=window)
    own_room = int(counts[:, rank].max()) + rank  # a window may be longer
    own_k, own_v = (torch.full((2, 2, own_room, t.shape[-1]), float("nan"), dtype=t.dtype) for t in (k, v))
    for b in range(2):
        first, n = int(counts[b, :rank].sum()), int(counts[b, rank])
        own_k[b, :, :n], own_v[b, :, :n] = k[b, :, first : first + n], v[b, :, first : first + n]
    lengths = counts[:, rank].int()
    across = functools.partial(lla_decode_cp, group=world(), ridge_lambda=ridge, window=window)
    close(across(q, own_k, own_v, lengths), o)
    turned = across(*(t.transpose(1, 2) for t in (q, own_k, own_v)), lengths, layout="bshd")
    close(turned.transpose(1, 2), o)


for (_name, _shares), _new, _window in itertools.product(SHARES.items(), (1, 3, 20), (None, 5, 25)):
    check(_shares, _new, _window, name=f"decoding_{_name}-{_new}-{_window}")(decoding)


@check()
def decoding_far_from_the_origin() -> None:
    """In float32, keys a thousand from the origin: sums of squares about it would have no digit of their variance."""
    rank, size = dist.get_rank(), dist.get_world_size()
    q, k, v = normal(2, 4, 1, 6), normal(2, 2, 12 * size, 6, seed=1), normal(2, 2, 12 * size, 5, seed=2)
    q = q / 100
    k += 1000
    o = lla_decode(q, k, v, torch.full((2,), 12 * size))
    own = [t[:, :, 12 * rank : 12 * (rank + 1)].float() for t in (k, v)]
    got = lla_decode_cp(q.float(), *own, torch.full((2,), 12), group=world())
    close(got.double(), o, 5e-3)


@check()
def shares_are_added_up_about_the_mean_of_all() -> None:
    """No rank has that before it knows the others' means, so these travel first. About a centre that is agreed on
    without them, as the origin, each digit that it is off by is one that the sum of squares loses."""
    rank = dist.get_rank()
    both = normal(120, 7, seed=3) + 1000  # keys of width 4 and values of 3, under equal weights
    both[50:] += normal(7, seed=4)  # shares have other means
    own = both[(0, 50, 120, 120)[rank] : (50, 120, 120, 120)[rank]]  # and may have no keys
    about = own - own.mean(0) if len(own) else own
    single = lambda t: t.float()[None, None, None]  # (B, Hq, N, ...)
    told = Moments(
        m=single(own.new_tensor(0.0 if len(own) else float("-inf"))),
        omega=single(own.new_tensor(float(len(own)))),
        mean=single(own.mean(0) if len(own) else own.new_zeros(7)),
        second=single(about.T @ about[:, :4] / max(1, len(own))),
    )
    found = decode._merged(told, ranks_of(world()))
    exact = (both - both.mean(0)).T @ (both - both.mean(0))[:, :4] / len(both)
    rounding = 1000 * torch.finfo(torch.float32).eps  # of the shares' means
    close(found.second[0, 0, 0].double(), exact, 4 * rounding)
    assert float(found.omega) == len(both)
    raw = own.float().T @ own.float()[:, :4]
    dist.all_reduce(raw, group=world())
    mean = found.mean[0, 0, 0]
    centred = raw / len(both) - torch.outer(mean, mean[:4])
    assert (centred - exact).norm() > 100 * rounding * exact.norm()


@check()
def decoding_with_pages_and_starts() -> None:
    """Of two pages a sequence on each rank, in any order, and a first key that is not the share's first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    k, v = normal(2, 2, 32 * size, 6, seed=1), normal(2, 2, 32 * size, 5, seed=2)
    q, own = normal(2, 4, 1, 6), slice(32 * rank, 32 * (rank + 1))
    pages = [t[:, :, own].unflatten(2, (2, 16)).transpose(1, 2).flatten(0, 1).flip(0) for t in (k, v)]
    table = torch.tensor([[3, 2], [1, 0]], dtype=torch.int32)
    starts = torch.tensor([5, 0] if rank == 0 else [0, 0], dtype=torch.int32)
    full = torch.full((2,), 32, dtype=torch.int32)
    o = lla_decode(q, k, v, size * full, seqstarts_k=torch.tensor([5, 0]))
    close(lla_decode_cp(q, *pages, full, group=world(), block_table=table, seqstarts_k=starts), o)


@check()
def decoding_has_no_gradient() -> None:
    q, k = normal(1, 2, 1, 4).requires_grad_(), normal(1, 2, 8, 4)
    lengths = torch.tensor([8])
    with pytest.raises(NotImplementedError, match="no gradient"):
        lla_decode_cp(q, k, k, lengths, group=world())
    with pytest.raises(ValueError, match="solver: got 'cg'"):
        lla_decode_cp(q.detach(), k, k, lengths, group=world(), solver="cg")


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together(size: int, tmp_path: Path) -> None:
    found = outcomes(size, tmp_path, CHECKS)
    assert {name: told for name, told in found.items() if any(told)} == {}
