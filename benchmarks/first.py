"""What the first call in a process takes: seconds of fresh processes, with Triton's cache empty and full.

    python -m benchmarks first                  # a minute
    python -m benchmarks first --name NAME      # and keep it

"forward" and "backward" are those of the first call, until their results are there, backward of a loss, as in
training: torch imports sympy, for a second or more, where gradients are given to it. "one by one" is a process that
compiles a kernel when it is launched and not before, "full cache" one that finds all of them on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import needs, record

SHAPE = (4, 16, 4096, 64)


def first_call(shape: tuple[int, int, int, int], one_by_one: bool) -> dict[str, Any]:
    """Of this process."""
    from flashlla import lla_attention

    q, k, v, grad_o = torch.randn(4, *shape, device="cuda").to(torch.bfloat16).unbind(0)
    torch.cuda.synchronize()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    from triton import knobs

    from flashlla.backends.triton import plan

    compiled: list[tuple[str, float]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append((src.fn.__name__, times.total / 1e6))

    knobs.compilation.listener = listen
    if one_by_one:
        plan.Plan.compile = lambda self: None  # type: ignore[method-assign]
    begin = time.perf_counter()
    o = lla_attention(*leaves, ridge_lambda=1.0)
    torch.cuda.synchronize()
    forward = time.perf_counter()
    (o * grad_o).sum().backward()
    torch.cuda.synchronize()
    backward = time.perf_counter()
    digits = [t.double().abs().sum().item() for t in (o, *(leaf.grad for leaf in leaves)) if t is not None]
    return {
        "forward_s": forward - begin, "backward_s": backward - forward, "first_s": backward - begin,
        "compiled": compiled, "sums": digits,
    }  # fmt: skip


def apart(call: str, cache: str) -> Any:
    """``call`` in a process of its own."""
    code = f"import json; from benchmarks.first import *; print(json.dumps({call}))"
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=root, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    needs.triton()
    kept = record.Record(options, "cuda")
    lines: list[dict[str, Any]] = []
    kept.figures["first"] = lines
    with tempfile.TemporaryDirectory() as full, tempfile.TemporaryDirectory() as other:
        for what, cache in (("empty cache", full), ("full cache", full), ("one by one", other)):
            line = {"shape": SHAPE, "what": what, **apart(f"first_call({SHAPE}, {what == 'one by one'})", cache)}
            lines.append(line)
            words = [f"{name} {x:.2f}" for name, x in line.items() if isinstance(x, float)]
            spent = sum(t for _, t in line["compiled"])
            print(what, *words, f"{len(line['compiled'])} kernels, {spent:.1f} s of compiling", flush=True)
            kept.write()
    kept.end()
    return 0
