"""Sequences and caches on a group of one process: the calls themselves, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist

from flashlla import lla_attention, lla_decode
from flashlla.distributed import (
    collectives,
    context,
    decode,
    lla_attention_cp,
    lla_decode_cp,
    shard_positions,
    shard_sequence,
    sum_gradients,
)
from flashlla.distributed.context import heads_at_once
from flashlla.distributed.groups import COMPARED, Ranks
from flashlla.distributed.keys import Neighbours, bringing, parts_of
from flashlla.distributed.sharding import Shards
from flashlla.nn import LocalLinearAttention
from flashlla.problem import Inputs
from tests.support.helpers import normal, qkv
from tests.support.processes import python

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

LENGTH = 48
NOT_IN_IT: Any = dist.GroupMember.NON_GROUP_MEMBER  # what torch.distributed.new_group gives whom it leaves out


@pytest.mark.quick
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
def test_shards_make_up_the_sequence(order: Any, size: int) -> None:
    shards = Shards(LENGTH // size, size, order)
    places = [place for rank in range(size) for chunk in shards.chunks(rank) for place in chunk]
    assert sorted(places) == list(range(LENGTH))
    by_rank = torch.tensor(places)
    assert torch.equal(shards.in_sequence(by_rank), torch.arange(LENGTH))
    assert torch.equal(shards.by_rank(torch.arange(LENGTH)), by_rank)
    if order == "head_tail":  # causal queries see as many keys on each rank
        assert len({sum(place + 1 for chunk in shards.chunks(rank) for place in chunk) for rank in range(size)}) == 1


@pytest.mark.quick
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("order", ["head_tail", "contiguous"])
@pytest.mark.parametrize("window", [1, 3, 6, 20])
def test_of_a_window_the_neighbours_halo_travels_alone(order: Any, size: int, window: int) -> None:
    shards = Shards(LENGTH // size, size, order)
    of_ranks = [
        bringing(Ranks(cast("Any", None), rank, size), shards, parts_of(rank, shards, True, window), window)
        for rank in range(size)
    ]
    assert all(isinstance(keys, Neighbours) for keys in of_ranks)
    for rank, keys in enumerate(of_ranks):
        assert [other.sends[rank] for other in of_ranks] == keys.receives
        assert sum(keys.receives) == sum(min(window - 1, chunk.start) for chunk in shards.chunks(rank))
        if window <= shards.chunk:
            before = {(chunk.start // shards.chunk) - 1 for chunk in shards.chunks(rank)}
            owners = {r for r in range(size) for chunk in shards.chunks(r) if chunk.start // shards.chunk in before}
            assert {r for r, rows in enumerate(keys.receives) if rows} <= owners


@pytest.mark.quick
def test_what_comes_next_is_on_its_way_before() -> None:
    made: list[str] = []
    for item, coming in collectives.ahead([1, 2, 3], lambda item: made.append(f"{item} begun") or item):
        made.append(f"{coming} used")
        assert coming == item
    assert made == ["1 begun", "2 begun", "1 used", "3 begun", "2 used", "3 used"]


@pytest.mark.quick
def test_heads_are_gathered_as_far_as_they_fit() -> None:
    def heads(tokens: int, size: int, kv_heads: int = 16) -> int:
        q, k = (torch.empty(1, n, tokens // size, 128, dtype=torch.bfloat16, device="meta") for n in (16, kv_heads))
        return heads_at_once(Inputs(q, k, k, q[..., 0]), Shards(tokens // size, size, "head_tail"))

    assert heads(32768, 2) == heads(32768, 4) == 8  # of 16 MiB each
    assert heads(131072, 4) == 4
    assert heads(8192, 2, kv_heads=4) == 2
    assert heads(4096, 4) == 16  # with 8 of them a GPU is not busy
    assert heads(10 * 2**20, 1024) == 1  # of 5 GiB


def test_without_process_groups() -> None:
    q = normal(1, 2, 4, 4)
    with pytest.raises(TypeError, match=r"group: got NoneType, wanted a ProcessGroup .*init_process_group"):
        lla_attention_cp(q, q, q, group=None)


@pytest.fixture
def alone() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_ends_where_it_is_destroyed() -> None:
    """In a process of its own: what of torch's might keep a group is loaded once in a process."""
    script = """
        import gc, weakref
        import torch
        import torch.distributed as dist
        from flashlla.distributed import lla_attention_cp, sum_gradients
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        q = torch.randn(1, 2, 4, 4, requires_grad=True)
        lla_attention_cp(q, q, q, group=dist.group.WORLD).sum().backward()
        sum_gradients(q, group=dist.group.WORLD)
        group = weakref.ref(dist.group.WORLD)
        dist.destroy_process_group()
        gc.collect()
        assert group() is None, "the group lives"
    """
    python(script)


@pytest.mark.quick
def test_one_rank_is_the_call_itself(alone: dist.ProcessGroup) -> None:
    q, k, v = qkv(2, 8, LENGTH, 6, dtype=torch.float64)
    torch.testing.assert_close(lla_attention_cp(q, k, v, group=alone), lla_attention(q, k, v))
    lengths = torch.tensor([LENGTH, 3])
    torch.testing.assert_close(
        lla_decode_cp(q[:, :, :2], k, v, lengths, group=alone), lla_decode(q[:, :, :2], k, v, lengths)
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"order": "zigzag"}, "order: got 'zigzag', wanted 'head_tail' or 'contiguous'"),
        ({"method": "ring"}, "method: got 'ring', wanted one of 'all_gather', 'all_to_all'"),
        ({"key_heads_at_once": 0}, "key_heads_at_once: got 0, wanted at least 1"),
    ],
)
def test_what_is_not_known_is_refused(keywords: dict[str, Any], words: str, alone: dist.ProcessGroup) -> None:
    tensors = qkv(1, 2, LENGTH, 4)
    with pytest.raises(ValueError, match=words):
        lla_attention_cp(*tensors, group=alone, **keywords)
    with pytest.raises(ValueError, match="k: got 4 tokens, wanted 48, those of q"):
        lla_attention_cp(tensors[0], tensors[1][:, :, :4], tensors[2][:, :, :4], group=alone)
    with pytest.raises(TypeError, match="scale"):
        lla_attention_cp(*tensors, group=alone, scale=1.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, g: shard_sequence(x, group=g, dim="s"), TypeError, "dim: got str, wanted a whole number"),  # type: ignore[arg-type]
        (lambda x, g: shard_sequence(x, group=g, dim=True), TypeError, "dim: got bool, wanted a whole number"),
        (lambda x, g: shard_sequence(x, group=g, dim=4), ValueError, "dim: got 4, wanted a dimension of x"),
        (lambda x, g: shard_positions(8.0, group=g), TypeError, "length: got float, wanted a whole number"),  # type: ignore[arg-type]
        (lambda x, g: shard_positions(-8, group=g), ValueError, "length: got -8, wanted 0 tokens or more"),
        (lambda x, g: sum_gradients(3, group=g), TypeError, "parameters: got int, wanted a tensor or several"),  # type: ignore[arg-type]
        (lambda x, g: sum_gradients([x, None], group=g), TypeError, "parameters: got NoneType, wanted a tensor"),  # type: ignore[list-item]
        (lambda x, g: shard_sequence(x, group=NOT_IN_IT, dim=0), ValueError, "group: this process is not in it"),
        (lambda x, g: shard_sequence(x, group=2, dim=0), TypeError, "group: got int, wanted a ProcessGroup"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_named(
    call: Callable[..., Any], error: type[Exception], words: str, alone: dist.ProcessGroup
) -> None:
    with pytest.raises(error, match=words):
        call(normal(1, 2, LENGTH, 4), alone)


@pytest.mark.quick
@pytest.mark.parametrize(("new", "window", "gathers"), [(1, None, 1), (1, 9, 2), (4, None, 2)])
def test_decoding_sums_once_and_gathers_statistics_once(
    new: int, window: int | None, gathers: int, alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And lengths, where other ranks' matter."""
    made: list[str] = []

    def counted(name: str, call: Any) -> Any:
        return lambda *args, **keywords: (made.append(name), call(*args, **keywords))[1]

    monkeypatch.setattr(decode, "gather", counted("gather", decode.gather))
    monkeypatch.setattr(dist, "all_reduce", counted("all_reduce", dist.all_reduce))
    q, k, v = qkv(2, 4, LENGTH, 6, dtype=torch.float64)
    lla_decode_cp(q[:, :, :new], k, v, torch.tensor([LENGTH, 9]), group=alone, window=window)
    assert sorted(made) == ["all_reduce", *["gather"] * gathers]


def test_the_part_that_sees_most_keys_comes_first(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each part's backward pass has the settings that the part ran with."""
    ran, seen = [], []
    forward, backward = context.forward, context.backward

    def noted(arguments: Any) -> Any:
        ran.append(arguments.inputs.k.shape[2])
        return forward(arguments)

    def checked(arguments: Any) -> Any:
        seen.append((arguments.inputs.k.shape[2], arguments.settings.backend))
        return backward(arguments._replace(settings=arguments.settings._replace(backend="chunked")))

    as_told = lambda arguments: arguments._replace(
        settings=arguments.settings._replace(backend=f"of {arguments.inputs.k.shape[2]}")
    )
    monkeypatch.setattr(context, "forward", noted)
    monkeypatch.setattr(context, "backward", checked)
    monkeypatch.setattr(context, "ran", as_told)
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, LENGTH, 4, dtype=torch.float64))
    o = lla_attention_cp(q, k, v, group=alone, key_heads_at_once=1)
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert ran == [LENGTH, LENGTH // 2] * 2
    assert seen == [(n, f"of {n}") for n in ran]
    torch.testing.assert_close(gradients, torch.autograd.grad(lla_attention(q, k, v).sum(), (q, k, v)))


class Streams:
    """What torch.cuda has of streams, and which of them is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits, self.entered = "caller's", [], []
        monkeypatch.setattr(collectives, "_streams", lambda device: [self.Stream(self, "a"), self.Stream(self, "b")])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.Stream(self, "caller's"))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    class Stream(NamedTuple):
        of: Any
        name: str

        def wait_stream(self, other: Any) -> None:
            self.of.waits.append((self.name, other.name))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream.name
        self.entered.append(stream.name)
        try:
            yield
        finally:
            self.now = before


def test_lanes_begin_and_end_with_the_callers_stream(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    ends = [("a", "caller's"), ("b", "caller's"), ("caller's", "a"), ("caller's", "b")]
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, LENGTH, 4, dtype=torch.float64))
    o = lla_attention_cp(q, k, v, group=alone, key_heads_at_once=1)
    assert streams.waits == ends
    assert {"a", "b"} == set(streams.entered)
    streams.waits.clear()
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert streams.waits == ends
    torch.testing.assert_close(gradients, torch.autograd.grad(lla_attention(q, k, v).sum(), (q, k, v)))
    streams.entered.clear()
    lla_attention_cp(q, k, v, group=alone, key_heads_at_once=4)
    assert not streams.entered  # of one piece

    def fails(arguments: Any) -> Any:
        assert streams.now in ("a", "b")
        raise RuntimeError("as asked")

    monkeypatch.setattr(context, "forward", fails)
    with pytest.raises(RuntimeError, match="as asked") as raised:
        lla_attention_cp(q, k, v, group=alone, key_heads_at_once=1)
    assert streams.now == "caller's"
    del raised


@pytest.mark.gpu
def test_heads_in_lanes_are_those_of_one_call() -> None:
    """Two streams of a GPU, each with some of the heads: as exact as one call, and the same in every run."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors = [t.cuda() for t in qkv(1, 4, 2048, 64, dtype=torch.float64)]
        grad_o = normal(1, 4, 2048, 64, seed=9).cuda()

        def found(call: Any, dtype: torch.dtype, **keywords: Any) -> list[torch.Tensor]:
            given = [t.to(dtype).requires_grad_() for t in tensors]
            o = call(*given, ridge_lambda=1.0, **keywords)
            return [o.detach(), *torch.autograd.grad(o, given, grad_o.to(dtype))]

        exact = found(lla_attention, torch.float64, solver="direct")
        alone = found(lla_attention, torch.bfloat16)
        runs = [found(lla_attention_cp, torch.bfloat16, group=dist.group.WORLD, key_heads_at_once=1) for _ in range(3)]
    finally:
        dist.destroy_process_group()
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
        for got, one, want in zip(run, alone, exact):
            assert (got - want).norm() < 1.5 * (one - want).norm()


@pytest.mark.gpu
def test_from_cuda_graphs() -> None:
    """Captured after the calls that ranks compare, and replayed with other queries: a sequence's heads in two streams,
    and a new token with one more key."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        q, k, v = (t.cuda() for t in qkv(1, 4, 256, 64, dtype=torch.bfloat16))
        new, lengths = q[:, :, :1].contiguous(), torch.tensor([200], dtype=torch.int32, device="cuda")
        calls = {
            "attention": lambda: lla_attention_cp(q, k, v, group=group, ridge_lambda=1.0, key_heads_at_once=1),
            "decode": lambda: lla_decode_cp(new, k, v, lengths, group=group, ridge_lambda=1.0),
        }
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(COMPARED + 1):
                [call() for call in calls.values()]
        torch.cuda.current_stream().wait_stream(stream)
        graphs = {name: torch.cuda.CUDAGraph() for name in calls}
        found = {}
        for name, call in calls.items():
            with torch.cuda.graph(graphs[name], stream=stream):
                found[name] = call()
        q.copy_(normal(1, 4, 256, 64, seed=8))
        new.copy_(normal(1, 4, 1, 64, seed=9))
        lengths += 1
        for name, call in calls.items():
            graphs[name].replay()
            assert torch.equal(found[name], call())
        del graphs
    finally:
        dist.destroy_process_group()
    of_all = [t.double() for t in (q, k, v)]
    for got, exact in (
        (found["attention"], lla_attention(*of_all, ridge_lambda=1.0)),
        (found["decode"], lla_decode(new.double(), *of_all[1:], lengths, ridge_lambda=1.0)),
    ):
        assert (got - exact).norm() < 1e-2 * exact.norm()


def test_a_compiled_model_may_call_it(alone: dist.ProcessGroup) -> None:
    q = normal(1, 2, 8, 4)
    compiled = torch.compile(lambda q: lla_attention_cp(q * 2, q, q, group=alone) + 1, backend="eager")
    torch.testing.assert_close(compiled(q), lla_attention(q * 2, q, q) + 1)


def test_a_layer_is_copied_with_its_group(alone: dist.ProcessGroup) -> None:
    layer = LocalLinearAttention(16, 2, context_parallel=alone)
    x = torch.randn(1, 8, 16)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
