"""compute-sanitizer over small steps, forward and backward: bad memory accesses, then races in shared memory.

Needs a GPU and NVIDIA's compute-sanitizer. Exits with 1 where a tool finds something.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import needs

TOOLS = ("memcheck", "racecheck")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))


def steps() -> None:
    """What the tools watch."""
    from flashlla import lla_attention

    for dtype in (torch.bfloat16, torch.float32):
        for length, dim in ((100, 64), (65, 40)):
            q, k, v, grad_o = torch.randn(4, 1, 2, length, dim, device="cuda").to(dtype).unbind(0)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            torch.autograd.grad(lla_attention(*leaves, ridge_lambda=1.0, backend="triton"), leaves, grad_o)
    torch.cuda.synchronize()
    print("ran")


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    if shutil.which("compute-sanitizer") is None:
        raise needs.Missing("it needs NVIDIA's compute-sanitizer on the PATH; try /usr/local/cuda/bin, or install CUDA")
    program = [sys.executable, "-c", "from benchmarks.sanitize import steps; steps()"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in options.tools:
        print(f"== {tool}", flush=True)
        watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--kernel-name", "kns=_kernel"]
        if subprocess.run([*watch, *program], env=environment, cwd=Path(__file__).parent.parent).returncode:
            return 1
    return 0
