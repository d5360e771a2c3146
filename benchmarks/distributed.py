"""Sequences and caches over the GPUs of one host, under torchrun: time, memory, communication, errors.

    torchrun --nproc-per-node 2 -m benchmarks distributed --name NAME

Beside each figure is that of one of these GPUs alone, measured in the same run while the others wait. Efficiency is the
time of one GPU, divided by the number of GPUs times their time. Times are those of the slowest rank.
"""

# ruff: noqa: B023 (what is timed runs before the loop goes on)
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import needs, record
from benchmarks.data import make
from benchmarks.exact import relative
from flashlla import CG, lla_attention, lla_attention_varlen, lla_decode
from flashlla.distributed import (
    lla_attention_cp,
    lla_attention_varlen_cp,
    lla_decode_cp,
    shard_sequence,
    sum_gradients,
    unshard_sequence,
)
from flashlla.nn import LocalLinearAttention

RIDGE = 1.0
EXACT = CG(atol=0.0, rtol=1e-24, max_iters=2000)
ALONE_UP_TO = 131072  # tokens that one GPU is timed on
FOR_FOUR = 524288  # tokens that want four GPUs at least
LEARNING_STEPS = 20


class World:
    """The ranks, and the device of this one."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.group: Any = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def say(self, *words: Any) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def most(self, number: float) -> float:
        """The largest of all ranks'."""
        return max(self.every(number))

    def every(self, number: float) -> list[float]:
        found = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(number, dtype=torch.float64, device=self.device))
        return [float(x) for x in found]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], alone: bool = False, most: float = 1.5, calls: int = 5) -> float:
        """Of one call on all ranks: the median of up to ``calls``, fewer if they take longer than ``most``, of the
        slowest rank. ``alone``: of one on the first rank, for which the others wait."""
        times: list[float] = []
        if not alone or self.rank == 0:
            call()
            self.wait()
            while len(times) < calls:
                if not alone:
                    dist.barrier()
                self.wait()
                start = time.perf_counter()
                call()
                self.wait()
                times.append(time.perf_counter() - start)
                spent = sum(times) if alone else self.most(sum(times))
                if spent > most:
                    break
        return self.most(statistics.median(times) if times else 0.0)

    def peak(self, call: Callable[[], Any]) -> float:
        """GiB that ``call`` allocates at most, beside what there is before, on the rank where that is most."""
        if self.device != "cuda":
            return 0.0
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return self.most((torch.cuda.max_memory_allocated() - before) / 2**30)


def stepper(attend: Callable[..., Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""
    *leaves, grad_o = tensors
    leaves = [t.detach().requires_grad_() for t in leaves]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad_o)


def accuracy(world: World, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Errors of o and of the gradients, relative to float64; and how far they are from one GPU's."""
    heads, length, dim = min(4, options.heads), 2048, options.dim
    tensors = make((1, heads, length, dim), dtype=options.dtype, device=world.device)
    ridge = torch.full((1, heads, length), RIDGE, device=world.device)
    edges = torch.tensor([0, 300, 300, 1500, length], dtype=torch.int32, device=world.device)
    packed: dict[str, Any] = {"cu_seqlens": edges, "max_seqlen": 1200}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "all_gather": (lla_attention, lla_attention_cp, {}),
        "all_to_all": (lla_attention, lla_attention_cp, {"method": "all_to_all"}),
        "window": (lla_attention, lla_attention_cp, {"window": 300}),
        "packed": (lla_attention_varlen, lla_attention_varlen_cp, packed),
    }
    lines = []
    for name, (one, across, keywords) in cases.items():
        whole = {key: value for key, value in keywords.items() if key != "method"}
        results = {}
        for which, dtype, call in (
            ("float64", torch.float64, lambda q, k, v, lam: one(q, k, v, ridge_lambda=lam, solver=EXACT, **whole)),
            ("alone", options.dtype, lambda q, k, v, lam: one(q, k, v, ridge_lambda=lam, **whole)),
        ):
            given = [t.to(dtype).requires_grad_() for t in tensors[:3]] + [ridge.clone().requires_grad_()]
            o = call(*given)
            results[which] = [o.detach(), *torch.autograd.grad(o, given, tensors[3].to(dtype))]
        shard = lambda t, dim: shard_sequence(t, group=world.group, dim=dim).detach()
        own = [shard(t, 2).requires_grad_() for t in (*tensors[:3], ridge)]
        o = across(*own[:3], ridge_lambda=own[3], group=world.group, **keywords)
        found = [o.detach(), *torch.autograd.grad(o, own, shard(tensors[3], 2))]
        results["across"] = [unshard_sequence(t, group=world.group, dim=2) for t in found]
        line: dict[str, Any] = {"what": name}
        for i, what in enumerate(("o", "dq", "dk", "dv", "dridge")):
            line[what] = {which: relative(results[which][i], results["float64"][i]) for which in ("alone", "across")}
            line[what]["apart"] = relative(results["across"][i], results["alone"][i].double())
        lines.append(line)
        told = "  ".join(
            f"{what} {e['alone']:.1e} {e['across']:.1e} ({e['apart']:.1e})"
            for what, e in line.items()
            if what != "what"
        )
        world.say(f"accuracy {name:<11} one GPU's error, that of {world.size}, (apart): {told}")
    return lines


def speed(world: World, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and step of (1, heads, S, dim), head-tail, keys gathered."""
    lines = []
    attend = lambda q, k, v: lla_attention_cp(q, k, v, ridge_lambda=RIDGE, group=world.group)
    alone = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=RIDGE)
    for length in options.lengths:
        if length >= FOR_FOUR and world.size < 4:
            world.say(f"speed {length}: left out, it wants 4 GPUs")
            continue
        shape = (1, options.heads, length // world.size, options.dim)
        own = make(shape, dtype=options.dtype, device=world.device, seed=world.rank)
        line: dict[str, Any] = {"length": length, "heads": options.heads, "dim": options.dim, "gpus": world.size}
        step = stepper(attend, own)
        line["forward_s"] = world.seconds(lambda: attend(*own[:3]))
        line["step_s"] = world.seconds(step)
        line["peak_gib"] = world.peak(step)
        if world.device == "cuda":
            line |= communication(world, step)
        swapped = lambda q, k, v: lla_attention_cp(q, k, v, ridge_lambda=RIDGE, group=world.group, method="all_to_all")
        step = stepper(swapped, own)
        line["all_to_all_step_s"] = world.seconds(step)
        line["all_to_all_peak_gib"] = world.peak(step)
        own.clear()
        del step
        if length <= ALONE_UP_TO:
            whole: list[Tensor] = []
            one_step: Callable[[], Any] = lambda: None
            if world.rank == 0:
                whole = make((1, options.heads, length, options.dim), dtype=options.dtype, device=world.device)
                one_step = stepper(alone, whole)
            line["alone_forward_s"] = world.seconds(lambda: alone(*whole[:3]), alone=True)
            line["alone_step_s"] = world.seconds(one_step, alone=True)
            line["alone_peak_gib"] = world.peak(one_step)
            for which in ("forward", "step"):
                line[f"{which}_efficiency"] = line[f"alone_{which}_s"] / (world.size * line[f"{which}_s"])
            whole.clear()
            del one_step
        lines.append(line)
        world.say("speed", {name: round(x, 4) if isinstance(x, float) else x for name, x in line.items()})
    return lines


def communication(world: World, step: Callable[[], Any]) -> dict[str, Any]:
    """Of one step, by torch's profiler: seconds that NCCL's kernels take, that nothing else runs meanwhile, and that
    other kernels take, as a mean over ranks; and the latter's largest, divided by their mean."""
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    carrying, computing = _union(spans[True]), _union(spans[False])
    total = lambda of: sum(stop - start for start, stop in of) * 1e-6
    both = total(carrying) + total(computing) - total(_union(carrying + computing))
    mean = lambda number: sum(world.every(number)) / world.size
    compute = world.every(total(computing))
    return {
        "nccl_s": mean(total(carrying)),
        "nccl_exposed_s": mean(total(carrying) - both),
        "compute_s": sum(compute) / world.size,
        "imbalance": max(compute) * world.size / max(sum(compute), 1e-9),
    }


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that do not overlap."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def decode(world: World, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One new token against a cache of (1, heads, L, dim), a share on each GPU, beside one GPU with all of it."""
    length = options.cached
    shape = (1, options.heads, length, options.dim)
    share = (*shape[:2], length // world.size, shape[3])
    q, *_ = make((*shape[:2], 1, shape[3]), dtype=options.dtype, device=world.device)
    *_, k, v = make(share, dtype=options.dtype, device=world.device, seed=world.rank)
    full = lambda n: torch.full((1,), n, dtype=torch.int32, device=world.device)
    lengths = full(share[2])
    across = lambda: lla_decode_cp(q, k, v, lengths, group=world.group, ridge_lambda=RIDGE)
    for _ in range(12):  # ranks compare what they ask for, at first
        across()
    line: dict[str, Any] = {"cached": length, "heads": options.heads, "dim": options.dim, "gpus": world.size}
    line["us"] = 1e6 * world.seconds(lambda: [across() for _ in range(10)], calls=9) / 10
    gathered = [unshard_sequence(t, group=world.group, order="contiguous", dim=2) for t in (k, v)]
    alone = lambda: lla_decode(q, gathered[0], gathered[1], full(length), ridge_lambda=RIDGE)
    line["apart"] = relative(across(), alone().double())
    line["alone_us"] = 1e6 * world.seconds(lambda: [alone() for _ in range(10)], alone=True, calls=9) / 10
    world.say("decode", line)
    return [line]


def training(world: World, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Losses of examples/tiny_gpt.py's model, its sequences over all GPUs, and on one."""
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
                dist.all_reduce(loss := loss.detach())
            optimiser.step()
            found.append(loss.item())
        return found

    across, alone = losses(world.group), losses(None)
    line = {"steps": LEARNING_STEPS, "across": across, "alone": alone}
    line["apart"] = max(abs(a - b) for a, b in zip(across, alone))
    world.say(
        f"training: loss {alone[0]:.4f} to {alone[-1]:.4f} on one, {across[0]:.4f} to {across[-1]:.4f} on "
        f"{world.size}; at most {line['apart']:.1e} apart"
    )
    return [line]


KINDS = {"accuracy": accuracy, "speed": speed, "decode": decode, "training": training}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072, FOR_FOUR], help="of sequences")
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
    options.dtype = torch.float32
    if options.device == "cuda":
        needs.cuda()
        needs.triton()
        options.dtype = torch.bfloat16
    world = World(options.device)
    kept = record.Record(options, options.device)
    kept.figures["gpus"] = world.size
    world.say(kept.figures)
    for kind in options.only:
        kept.figures[kind] = KINDS[kind](world, options)
        if world.rank == 0:
            kept.write()
    if world.rank == 0:
        kept.end()
    dist.destroy_process_group()
    return 0
