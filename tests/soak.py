"""``python -m tests.soak --seconds 530 --processes 2``: calls of random shapes, one after the other, on a GPU (or CPU).

Memory of host and device is looked at all the while: in the second half of the time nothing of it may grow, when all
kernels are compiled and caches are full. The status is 1 where something does, or where a call gives NaN.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import os
import queue
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashlla
from benchmarks import record

# Seconds between two looks.
_APART = 5
# MiB that may come and go: of the host, whose allocator keeps what it was given back; of the device, whose allocator
# rounds up.
_SLACK = {"host": 16.0, "allocated": 0.0, "reserved": 256.0}
# And what a kernel may take of the host's, of those that are compiled meanwhile: there are as many as kinds of calls.
_KERNEL = 0.5
# Tokens of one call, at most.
_TOKENS = 4096


def call(rng: random.Random, device: str) -> None:
    """Forward and backward, or decoding, of shapes that never were before; of a model's few kinds."""
    dim, dtype = rng.choice([(64, torch.bfloat16), (32, torch.float32)])
    most = _TOKENS if device == "cuda" else 64
    length = rng.randint(1, most // 4)
    batch = rng.randint(1, max(1, min(4, most // length)))
    make = lambda *shape: torch.randn(shape, device=device, dtype=dtype)
    kind = rng.choice(["attention", "attention", "lengths", "packed", "decode"])
    if kind == "decode":
        q, k, v = make(batch, 4, rng.randint(1, 4), dim), make(batch, 2, length, dim), make(batch, 2, length, dim)
        lengths = torch.tensor([rng.randint(0, length) for _ in range(batch)], dtype=torch.int32, device=device)
        with torch.no_grad():
            check(flashlla.lla_decode(q, k, v, lengths))
        return
    if kind == "packed":
        q, k, v = (make(length, heads, dim).requires_grad_() for heads in (4, 2, 2))
        edges = sorted(rng.randint(0, length) for _ in range(rng.randint(0, 6)))
        cu_seqlens = torch.tensor([0, *edges, length], dtype=torch.int32, device=device)
        o = flashlla.lla_attention_varlen(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=length)
    else:
        q, k, v = (make(batch, heads, length, dim).requires_grad_() for heads in (4, 2, 2))
        more: dict[str, Any] = {"window": rng.randint(1, length)} if rng.random() < 0.3 else {}
        if kind == "lengths":
            ends = [rng.randint(0, length) for _ in range(batch)]
            more["seqlens_k"] = torch.tensor(ends, dtype=torch.int32, device=device)
        ridge = torch.full((4, 1), rng.uniform(0.5, 20), device=device, requires_grad=True)
        o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge, **more)
    check(o, *torch.autograd.grad(o.sum(), (q, k, v)))


def check(*tensors: Tensor) -> None:
    assert all(bool(t.isfinite().all()) for t in tensors), "a result is not finite"


def memory(device: str) -> dict[str, float]:
    """MiB in use, once all that is of no use is given up."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * os.sysconf("SC_PAGE_SIZE") / 2**20}
    if device == "cuda":
        torch.cuda.synchronize()
        found |= {"allocated": torch.cuda.memory_allocated() / 2**20, "reserved": torch.cuda.memory_reserved() / 2**20}
    return found


def caches() -> dict[str, int]:
    """What the package keeps from call to call; of kernels there are as many as kinds of calls."""
    from flashlla import again, problem

    kept = {"problems": [problem._describe], "kinds": [again._cell]}
    if plan := sys.modules.get("flashlla.backends.triton.plan"):
        kept["plans"] = plan._makers
    found = {}
    for name, caches in kept.items():
        infos = [cache.cache_info() for cache in caches]
        assert all(info.currsize <= info.maxsize for info in infos), f"{name} are kept without bound"
        found[name] = sum(info.currsize for info in infos)
    if runtime := sys.modules.get("flashlla.backends.triton.runtime"):
        found["kernels"] = len(runtime.compiled)
    return found


def soak(device: str, seconds: float, seed: int, tell: Callable[[tuple[int, dict[str, float]]], None]) -> None:
    """Calls for so long, and now and then to ``tell`` of ``seed`` what memory is like."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, begun, calls, told = random.Random(seed), time.monotonic(), 0, -math.inf
    while (now := time.monotonic() - begun) < seconds:
        call(rng, device)
        calls += 1
        if now > told + _APART:
            told = now
            tell((seed, {"second": round(now, 1), "calls": calls, **memory(device), **caches()}))
    tell((seed, {"second": round(now, 1), "calls": calls, **memory(device), **caches()}))


def growth(looks: list[dict[str, float]]) -> dict[str, float]:
    """MiB by which the last quarter of the time has more than the one before it: the most of each. And kernels."""
    quarter = max(1, len(looks) // 4)
    before, after = looks[-2 * quarter : -quarter], looks[-quarter:]
    top = lambda part, name: max((look[name] for look in part), default=0.0)
    names = [name for name in (*_SLACK, "kernels") if name in looks[-1]]
    return {name: round(top(after, name) - top(before, name), 2) for name in names}


def leaks(grown: dict[str, float]) -> list[str]:
    """Of which memory there is more than may come and go."""
    more = {"host": _KERNEL * grown.get("kernels", 0)}
    return [name for name, most in _SLACK.items() if grown.get(name, 0) > most + more.get(name, 0)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.command = "soak"
    kept = record.Record(options, options.device)
    looks: list[list[dict[str, float]]] = [[] for _ in range(options.processes)]
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    of = lambda seed: (options.device, options.seconds, seed, told.put)
    running = [context.Process(target=soak, args=of(seed), daemon=True) for seed in range(options.processes)]
    for process in running:
        process.start()
    while any(process.is_alive() for process in running) or not told.empty():
        with contextlib.suppress(queue.Empty):
            seed, look = told.get(timeout=1)
            looks[seed].append(look)
            print(f"process {seed}: {look}", flush=True)
            kept.figures["processes"] = [summed(seed, seen) for seed, seen in enumerate(looks) if seen]
            kept.write()  # what there is so far
    if died := [seed for seed, process in enumerate(running) if process.exitcode]:
        print(f"what process {died[0]} raised is above")
        return 1
    found = kept.figures["processes"]
    for one in found:
        print({name: value for name, value in one.items() if name != "looks"})
    kept.end()
    return int(any(leaks(one["growth"]) for one in found))


def summed(seed: int, looks: list[dict[str, float]]) -> dict[str, Any]:
    """What is kept of a process."""
    last = looks[-1]
    return {
        "seed": seed,
        "seconds": round(last["second"]),
        "calls": last["calls"],
        "growth": growth(looks),
        "looks": looks,
    }


if __name__ == "__main__":
    sys.exit(main())
