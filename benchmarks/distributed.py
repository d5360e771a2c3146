"""Sequences and caches over the GPUs of one host, under torchrun: time, memory, communication, balance, errors.

    torchrun --nproc-per-node 4 -m benchmarks distributed --name NAME

Everything is measured on one GPU, on two, and so on up to all of them, in one run, while the others wait. Efficiency is
the time of one GPU, divided by the number of GPUs times their time. Times are those of the slowest rank.
"""

# ruff: noqa: B023 (what is timed runs before the loop goes on)
from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import keys as trained
from benchmarks import needs, record
from benchmarks.data import TRAINED, learned_ridge, make
from benchmarks.exact import relative
from benchmarks.timing import captured, graphed, prepared
from benchmarks.world import World
from flashlla import lla_attention, lla_attention_varlen, lla_decode
from flashlla.distributed import (
    collectives,
    lla_attention_cp,
    lla_attention_varlen_cp,
    lla_decode_cp,
    shard_sequence,
    sum_gradients,
    unshard_sequence,
)
from flashlla.distributed.groups import Ranks
from flashlla.distributed.sharding import Order, Shards
from flashlla.nn import LocalLinearAttention

RIDGE = 1.0
SHORT = 32768  # tokens; what is compiled for so many serves longer sequences
LONG = 131072  # tokens; of more, a call takes so long that it is timed once, after one of SHORT tokens
ACCURATE = 2048  # tokens whose errors are looked at
LEARNING_STEPS = 20
HOW = ("", "row_", "graph_")  # calls: each by itself, ROW of them, from a CUDA graph
ROW = 4  # calls one after the other, as the layers of a model make them: the host is ahead of the device
DECODED = 10  # calls of decoding, one after the other
BALANCED_OVER = (2, 4, 8)  # ranks
TILE = 64  # queries that go on until the last of them has converged

Line = dict[str, Any]


def stepper(attend: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""
    *leaves, grad_o = tensors
    leaves = [t.detach().requires_grad_() for t in leaves]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad_o)


class Case(NamedTuple):
    """A call by one GPU, and by several."""

    one: Callable[..., Any]
    across: Callable[..., Any]
    keywords: dict[str, Any]  # of both
    how: dict[str, Any]  # of several


def accuracy_cases(world: World) -> dict[str, Case]:
    edges = torch.tensor([0, 300, 300, 1500, ACCURATE], dtype=torch.int32, device=world.device)
    packed: dict[str, Any] = {"cu_seqlens": edges, "max_seqlen": 1200}
    few = {"key_heads_at_once": 1}
    return {
        "all_gather": Case(lla_attention, lla_attention_cp, {}, few),
        "all_to_all": Case(lla_attention, lla_attention_cp, {}, {"method": "all_to_all"}),
        "window": Case(lla_attention, lla_attention_cp, {"window": 300}, few),
        "packed": Case(lla_attention_varlen, lla_attention_varlen_cp, packed, few),
    }


def accuracy(world: World, options: argparse.Namespace) -> list[Line]:
    """Errors of o and of the gradients, relative to float64; and how far they are from one GPU's."""
    if world.size == 1 < dist.get_world_size():
        return []
    heads = min(4, options.heads)
    tensors = make((1, heads, ACCURATE, options.dim), dtype=options.dtype, device=world.device)
    ridge = torch.full((1, heads, ACCURATE), RIDGE, device=world.device)
    lines = []
    for name, case in accuracy_cases(world).items():
        shard = lambda t: shard_sequence(t, group=world.group, dim=2).detach()
        own = [shard(t).requires_grad_() for t in (*tensors[:3], ridge)]
        o = case.across(*own[:3], ridge_lambda=own[3], group=world.group, **case.keywords, **case.how)
        found = [o.detach(), *torch.autograd.grad(o, own, shard(tensors[3]))]
        across = [unshard_sequence(t, group=world.group, dim=2) for t in found]
        if world.rank == 0:
            lines.append(_accuracy_of(world, name, case, (*tensors[:3], ridge), tensors[3], across))
    return lines


def _accuracy_of(
    world: World, name: str, case: Case, given: Sequence[Tensor], grad_o: Tensor, across: Sequence[Tensor]
) -> Line:
    results = {}
    for which, dtype, how in (("float64", torch.float64, {"solver": "direct"}), ("alone", given[0].dtype, {})):
        leaves = [t.to(dtype).requires_grad_() for t in given[:3]] + [given[3].clone().requires_grad_()]
        o = case.one(*leaves[:3], ridge_lambda=leaves[3], **how, **case.keywords)
        results[which] = [o.detach(), *torch.autograd.grad(o, leaves, grad_o.to(dtype))]
    line: Line = {"gpus": world.size, "what": name}
    for what, exact, alone, found in zip(("o", "dq", "dk", "dv", "dridge"), *results.values(), across):
        errors = {"alone": relative(alone, exact), "across": relative(found, exact)}
        line[what] = {**errors, "apart": relative(found, alone.double())}
    errors_of = {what: e for what, e in line.items() if isinstance(e, dict)}
    told = "  ".join(f"{what} {e['alone']:.1e} {e['across']:.1e} ({e['apart']:.1e})" for what, e in errors_of.items())
    world.say(f"accuracy {name:<11} one GPU's error, that of {world.size}, (apart): {told}")
    return line


def speed(world: World, options: argparse.Namespace) -> list[Line]:
    """Forward and step of (1, heads, S, dim): on one GPU, or on several, head-tail, by both methods."""
    lines = []
    for length in options.lengths:
        lines.append(_speed_of(world, options, length))
        world.say("speed", _told(lines[-1]))
    return lines


def _speed_of(world: World, options: argparse.Namespace, length: int) -> Line:
    line, long = _of_length(world, options, length), length > LONG
    own = _shard(world, options, length)
    for way, attend in _ways(world).items():
        if long:
            stepper(attend, _shard(world, options, SHORT))()
        step = stepper(attend, own)
        line[f"{way}forward_s"] = world.cost(lambda: attend(*own[:3]), warm=not long).seconds
        line[f"{way}step_s"], line[f"{way}peak_gib"] = world.cost(step, warm=not long)
        if world.device == "cuda" and world.size > 1 and (not long or not way):
            line |= {f"{way}{name}": x for name, x in communication(world, step).items()}
    return line


def _of_length(world: World, options: argparse.Namespace, length: int) -> Line:
    return {"length": length, "heads": options.heads, "dim": options.dim, "gpus": world.size}


def _shard(world: World, options: argparse.Namespace, length: int) -> list[Tensor]:
    """This rank's q, k, v and grad_o of ``length`` tokens."""
    shape = 1, options.heads, length // world.size, options.dim
    return make(shape, dtype=options.dtype, device=world.device, seed=world.rank)


def _ways(world: World) -> dict[str, Callable[..., Any]]:
    """How they are attended to, by what names begin with: on one GPU, or on several by each method."""
    if world.size == 1:
        return {"": functools.partial(lla_attention, ridge_lambda=RIDGE)}
    across = functools.partial(lla_attention_cp, ridge_lambda=RIDGE, group=world.group)
    return {"": across, "all_to_all_": functools.partial(across, method="all_to_all")}


def turns(world: World, options: argparse.Namespace) -> list[Line]:
    """Forward and step of the fewest tokens, each call by itself, in a row, and from a CUDA graph: in several rounds,
    one GPU and several in turn, for a GPU's clock falls as it warms up."""
    line = _of_length(world, options, min(options.lengths))
    own, cost = _shard(world, options, line["length"]), functools.partial(world.cost, calls=4, most=0.5)
    for way, attend in _ways(world).items():
        for which, name in {"forward": "forward", "both": "step"}.items():
            call = prepared(which, attend, own)
            line[f"{way}{name}_s"] = cost(call).seconds
            line[f"{way}row_{name}_s"] = cost(lambda: [call() for _ in range(ROW)]).seconds / ROW
            if world.device == "cuda":
                line[f"{way}graph_{name}_s"] = cost(graphed(which, attend, own).graph.replay).seconds
    world.say("turns", _told(line))
    return [line]


def _told(line: Line) -> Line:
    return {name: round(x, 4) if isinstance(x, float) else x for name, x in line.items()}


class Span(NamedTuple):
    """When a kernel ran on this rank's GPU, in seconds."""

    start: float
    stop: float
    kernel: str  # of this package by its name, of NCCL by what it carries, of torch "copies"


def spans(world: World, call: Callable[[], Any]) -> list[Span]:
    """Of ``call``, which all ranks begin at once, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        if world.size > 1:
            world.every(0.0)  # to begin the profiler takes ranks different times
        world.wait()
        call()
        world.wait()
    found = [
        Span(event.time_range.start * 1e-6, event.time_range.end * 1e-6, _kernel(event.name))
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    ]
    found.sort()
    begun = next((span.stop for span in found if _is_nccl(span)), 0.0)  # world.every
    return [span for span in found if span.start >= begun]


def _kernel(name: str) -> str:
    if "nccl" in name.lower():
        carries = ("AllGather", "ReduceScatter", "AllReduce", "SendRecv")
        return f"NCCL {next((what for what in carries if what in name), 'others')}"
    return name if name.endswith("_kernel") else "copies"


def _is_nccl(span: Span) -> bool:
    return span.kernel.startswith("NCCL")


def communication(world: World, step: Callable[[], Any]) -> Line:
    """Of one step: seconds that NCCL's kernels take, that nothing else runs meanwhile, and that other kernels take, as
    a mean over ranks; and the latter's largest, divided by their mean. NCCL's wait for the slowest rank."""
    found = spans(world, step)
    nccl, other = ([span for span in found if _is_nccl(span) == which] for which in (True, False))
    exposed = _busy(found) - _busy(other)
    mean = lambda number: sum(world.every(number)) / world.size
    compute = world.every(_busy(other))
    return {
        "nccl_s": mean(_busy(nccl)),
        "nccl_exposed_s": mean(exposed),
        "compute_s": sum(compute) / world.size,
        "imbalance": max(compute) * world.size / max(sum(compute), 1e-9),
    }


def _total(spans: Sequence[Span]) -> float:
    return sum(span.stop - span.start for span in spans)


def _busy(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them, in order of their starts, is on its way."""
    busy, until = 0.0, float("-inf")
    for span in spans:
        busy += max(0.0, span.stop - max(span.start, until))
        until = max(until, span.stop)
    return busy


def parts(world: World, options: argparse.Namespace) -> list[Line]:
    """What a forward pass and a step of SHORT tokens consist of, by all_gather, and on one GPU without: seconds of each
    kernel; of those from the first one's start to the last one's end how many there are, and in how many none runs."""
    if world.device != "cuda":
        return []
    tensors, attend = _shard(world, options, SHORT), _ways(world)[""]
    line = {"gpus": world.size, "length": SHORT}
    calls = {"forward": lambda: attend(*tensors[:3]), "step": stepper(attend, tensors)}
    return [{**line, "pass": which, **_parts(world, call)} for which, call in calls.items()]


def _parts(world: World, call: Callable[[], Any]) -> Line:
    call()
    found = spans(world, call)
    elapsed = max(span.stop for span in found) - found[0].start
    own = {kernel: _total([span for span in found if span.kernel == kernel]) for kernel in {s.kernel for s in found}}
    own |= {"none": elapsed - _busy(found), "elapsed": elapsed}
    everyones: list[dict[str, float]] = [{} for _ in range(world.size)]
    dist.all_gather_object(everyones, own, group=world.group)
    line: Line = {"mean_s": {}, "most_s": {}}
    for name in sorted({name for each in everyones for name in each}):
        took = [each.get(name, 0.0) for each in everyones]
        line["mean_s"][name], line["most_s"][name] = sum(took) / world.size, max(took)
        world.say(f"parts of {world.size}: {name:<28} {1e3 * sum(took) / world.size:8.3f} {1e3 * max(took):8.3f} ms")
    return line


def bandwidth(world: World, options: argparse.Namespace) -> list[Line]:
    """What a rank receives in a second, in GB, of the keys and values of SHORT tokens, and of their gradients, while
    nothing else runs."""
    if world.size == 1:
        return []
    ranks, columns = Ranks(world.group, world.rank, world.size), (options.heads, 2 * options.dim)
    own = torch.zeros(SHORT // world.size, *columns, dtype=options.dtype, device=world.device)
    sums = torch.zeros(SHORT, *columns, device=world.device)
    line: Line = {"gpus": world.size}
    for name, carry, bytes_of_all in (
        ("gather", lambda: collectives.gather(own, ranks), own.nbytes * world.size),
        ("reduce_scatter", lambda: collectives.reduce_scatter(sums, ranks), sums.nbytes),
    ):
        seconds = world.cost(lambda: carry().wait(), calls=20).seconds
        line[f"{name}_gb_s"] = 1e-9 * bytes_of_all * (1 - 1 / world.size) / seconds
    world.say("bandwidth", _told(line))
    return [line]


class Decoding(NamedTuple):
    """One new token against a cache of (1, heads, L, dim), on one GPU, or a share on each of several."""

    q: Tensor  # the same on all ranks
    k: Tensor  # this rank's share of the cache
    v: Tensor
    alone: Callable[[Tensor, Tensor, Tensor], Tensor]  # of a whole cache
    call: Callable[[], Tensor]

    def many(self) -> None:
        for _ in range(DECODED):
            self.call()


def decoding(world: World, options: argparse.Namespace) -> Decoding:
    shape = (1, options.heads, options.cached, options.dim)
    share = (*shape[:2], options.cached // world.size, shape[3])
    generator = torch.Generator(world.device)
    normal = lambda seed, *shape: torch.randn(
        shape, generator=generator.manual_seed(seed), dtype=options.dtype, device=world.device
    )
    q = normal(0, *shape[:2], 1, shape[3])
    k, v = normal(1 + 2 * world.rank, *share), normal(2 + 2 * world.rank, *share)
    whole, own = (torch.full((1,), n, dtype=torch.int32, device=world.device) for n in (options.cached, share[2]))
    alone = lambda q, k, v: lla_decode(q, k, v, whole, ridge_lambda=RIDGE)
    across = lambda: lla_decode_cp(q, k, v, own, group=world.group, ridge_lambda=RIDGE)
    return Decoding(q, k, v, alone, across if world.size > 1 else lambda: alone(q, k, v))


def _of_decoding(world: World, options: argparse.Namespace) -> Line:
    return {"cached": options.cached, "heads": options.heads, "dim": options.dim, "gpus": world.size}


def decode(world: World, options: argparse.Namespace) -> list[Line]:
    """Microseconds of a token on each number of GPUs, and its kernels'; errors to float64."""
    q, k, v, alone, call = decoded = decoding(world, options)
    line = _of_decoding(world, options)
    line["us"] = 1e6 * world.cost(decoded.many, calls=9).seconds / DECODED
    line["host_us"] = 1e6 * world.begun(decoded.many) / DECODED
    if world.device == "cuda":
        line |= kernels(world, decoded.many, DECODED)
    if world.size > 1:
        whole = [unshard_sequence(t, group=world.group, order="contiguous", dim=2) for t in (k, v)]
        of_head = lambda h: (t[:, h : h + 1].double() for t in (q, *whole))
        exact = torch.cat([alone(*of_head(h)) for h in range(q.shape[1])], 1)
        line["error"], line["alone_error"] = relative(call(), exact), relative(alone(q, *whole), exact)
    world.say("decode", _told(line))
    return [line]


def decode_graph(world: World, options: argparse.Namespace) -> list[Line]:
    """Microseconds of a token, replayed from a CUDA graph, which the host takes no time to launch."""
    if world.device != "cuda":
        return []
    line, decoded = _of_decoding(world, options), decoding(world, options)  # which a replay reads
    graph = captured(decoded.many)
    line["us"] = 1e6 * world.cost(graph.replay, calls=9).seconds / DECODED
    world.say("decode_graph", _told(line))
    return [line]


def kernels(world: World, call: Callable[[], Any], calls: int) -> Line:
    """Of one of the ``calls`` that ``call`` makes: how many kernels it takes, and microseconds of the pass over the
    cache, on the rank where that takes longest, of NCCL's kernels, on the rank that waits least, and of all others."""
    found = spans(world, call)
    kinds = (_is_nccl, lambda span: "decode_moments" in span.kernel)
    nccl, cache = ([span for span in found if of(span)] for of in kinds)
    us = lambda of: world.every(1e6 * _total(of) / calls)
    other = us([span for span in found if span not in nccl and span not in cache])
    return {"pass_us": max(us(cache)), "nccl_us": min(us(nccl)), "other_us": max(other), "kernels": len(found) / calls}


def training(world: World, options: argparse.Namespace) -> list[Line]:
    """Losses of examples/tiny_gpt.py's model, its sequences over all GPUs, and on one."""
    if world.size == 1 < dist.get_world_size():
        return []
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import tiny_gpt  # type: ignore[import-not-found]

    size = tiny_gpt.QUICK if options.device == "cpu" else tiny_gpt.FULL
    text, _ = tiny_gpt.read_text()

    def losses(group: Any) -> list[float]:
        torch.manual_seed(0)
        model = tiny_gpt.GPT(size, "lla").to(world.device)
        if group is not None:
            for block in model.blocks:
                layer = LocalLinearAttention(size.width, size.heads, context_parallel=group, device=world.device)
                layer.load_state_dict(block.attention.state_dict())
                block.attention = layer
        optimiser = torch.optim.AdamW(model.parameters(), lr=size.lr)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(LEARNING_STEPS):
            starts = torch.randint(len(text) - size.length - 1, (8,), generator=generator)
            tokens, targets = tiny_gpt.windows(text, starts, size.length, world.device)
            if group is not None:
                tokens, targets = (shard_sequence(t, group=group, dim=1) for t in (tokens, targets))
            with torch.autocast(world.device, dtype=torch.bfloat16, enabled=world.device == "cuda"):
                logits = model(tokens)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            if group is not None:
                loss = loss / world.size  # of all ranks' tokens the mean is the sum of these
            optimiser.zero_grad()
            loss.backward()
            if group is not None:
                sum_gradients(model.parameters(), group=group)
                dist.all_reduce(loss := loss.detach(), group=group)
            optimiser.step()
            found.append(loss.item())
        return found

    across, alone = losses(world.group), losses(None)
    line: Line = {"gpus": world.size, "steps": LEARNING_STEPS, "across": across, "alone": alone}
    line["apart"] = max(abs(a - b) for a, b in zip(across, alone))
    world.say(
        f"training: loss {alone[0]:.4f} to {alone[-1]:.4f} on one, {across[0]:.4f} to {across[-1]:.4f} on "
        f"{world.size}; at most {line['apart']:.1e} apart"
    )
    return [line]


def balance(world: World, options: argparse.Namespace) -> list[Line]:
    """How evenly a forward pass is shared, by the iterations of each query: the most that one of several ranks
    computes, divided by the mean. A tile of queries does 5 + 3 T products with the keys that it sees."""
    if world.size > 1:
        return []
    lines = []
    least = 2 * TILE * max(BALANCED_OVER)
    kinds = {name: trained.kept(name).q.shape for name in TRAINED}
    for data in ("iid", *TRAINED):
        heads, length, dim = options.heads, max(least, min(options.lengths)), options.dim
        ridges: dict[str, Any] = {"1": RIDGE, "0.1": 0.1}
        if data in kinds:
            layers, of_layer, length, dim = kinds[data]
            heads = layers * of_layer
            ridges = {"learned": learned_ridge((1, heads, length, dim), data, world.device), "0.1": 0.1}
        q, k, v, _ = make((1, heads, length, dim), data, dtype=options.dtype, device=world.device)
        for ridge, ridge_lambda in ridges.items():
            _, info = lla_attention(q, k, v, ridge_lambda=ridge_lambda, return_info=True)
            until = info.iterations.unflatten(2, (-1, TILE)).amax(-1).double()  # (1, H, tiles)
            work = ((5 + 3 * until) * torch.arange(1, until.shape[-1] + 1, device=until.device)).sum((0, 1))
            line: Line = {"data": data, "tokens": length, "heads": heads, "dim": dim, "ridge": ridge}
            line["iterations"] = info.iterations.double().mean().item()
            for order in ("head_tail", "contiguous"):
                line[order] = {str(ranks): _most_by_mean(work, ranks, order) for ranks in BALANCED_OVER}
            lines.append(line)
            world.say("balance", line)
    return lines


def _most_by_mean(work: Tensor, ranks: int, order: Order) -> float:
    """Of the ``work`` of tiles, shared in this ``order``."""
    shards = Shards(len(work) // ranks, ranks, order)
    each = [sum(float(work[chunk.start : chunk.stop].sum()) for chunk in shards.chunks(rank)) for rank in range(ranks)]
    return max(each) * ranks / sum(each)


KINDS = {
    "accuracy": accuracy,
    "speed": speed,
    "bandwidth": bandwidth,
    "decode": decode,
    "training": training,
    "balance": balance,
    "parts": parts,
    "decode_graph": decode_graph,
    "turns": turns,
}
ROUNDS = {"turns": 3}  # of a kind, if there is more than one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of them; default: 1, 2, 4 and so on, and all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[SHORT, LONG, 4 * LONG], help="of sequences")
    parser.add_argument("--cached", type=int, default=2**20, help="tokens of the cache; default: 2**20")
    parser.add_argument("--heads", type=int, default=16, help="default: 16")
    parser.add_argument("--dim", type=int, default=128, help="default: 128")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    if "RANK" not in os.environ:
        raise needs.Missing(
            "it runs on several processes at once; try `torchrun --nproc-per-node 2 -m benchmarks distributed`, or "
            "--nproc-per-node with the number of GPUs"
        )
    options.dtype, backend = torch.float32, "gloo"
    if options.device == "cuda":
        needs.cuda()
        needs.triton()
        options.dtype, backend = torch.bfloat16, "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    worlds = [World(options.device, size) for size in options.gpus or _sizes(dist.get_world_size())]
    first = dist.get_rank() == 0
    kept = record.Record(options, options.device)
    worlds[0].say(kept.figures)
    for world in worlds:
        if world.mine:
            world.settle()
    begun = time.perf_counter()
    for kind in options.only:
        lines: list[Line] = []
        for world in worlds * ROUNDS.get(kind, 1):
            if world.mine:
                lines += KINDS[kind](world, options)
            dist.barrier()
            kept.figures[kind] = with_efficiencies(medians(lines) if kind in ROUNDS else lines)
            if first:
                kept.write()
            worlds[0].say(f"{kind} of {world.size}: {time.perf_counter() - begun:.1f} s since the start")
    if first:
        kept.end()
    dist.destroy_process_group()
    return 0


def _sizes(everyone: int) -> list[int]:
    """1, 2, 4 and so on, and all."""
    return sorted({everyone, *(2**n for n in range(everyone.bit_length()))})


def medians(lines: list[Line]) -> list[Line]:
    """Of the rounds on each number of GPUs."""
    rounds = [[line for line in lines if line["gpus"] == gpus] for gpus in {line["gpus"]: None for line in lines}]
    return [
        {name: statistics.median(line[name] for line in of) for name in of[0]} | {"rounds": len(of)} for of in rounds
    ]


def with_efficiencies(lines: list[Line]) -> list[Line]:
    """Of what several GPUs take beside one, which is in the lines, too, where that was measured."""
    one = {line.get("length"): line for line in lines if line.get("gpus") == 1}
    for line in lines:
        alone = one.get(line.get("length"), {})
        if line.get("gpus", 1) > 1:
            for took in {"us", *(f"{how}{what}_s" for how in HOW for what in ("forward", "step"))} & alone.keys():
                for way in {"", "all_to_all_"} if f"all_to_all_{took}" in line else {""}:
                    name = f"{way}{took.rpartition('_')[0]}_efficiency".lstrip("_")
                    line[name] = alone[took] / (line["gpus"] * line[f"{way}{took}"])
    return lines
