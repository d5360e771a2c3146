"""Time and memory of the chunked backend on a CPU.

Each measurement runs in a process of its own, so that its peak memory is its own: the process's peak less its peak
once torch was imported. Times are medians, beside the rate that one large float32 matrix product reaches there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.data import make
from benchmarks.timing import matrix_tflops, milliseconds, prepared

# The published naive reference, on two cores at about 180 GFLOP/s, (1, 1024, 64), ridge 0.1.
PUBLISHED = {"forward_s": 0.84, "backward_s": 0.41, "peak_mb": 873, "gflops": 180}
LENGTHS = (1024, 2048, 4096, 8192)
RIDGES = (10.0, 0.1)


def peak_mb() -> float:
    """Of this process. Linux's getrusage would count what the process that started it had taken by then."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: bytes


def inputs(length: int) -> list[torch.Tensor]:
    """q, k, v and grad_o."""
    return make((1, 1, length, 64), dtype=torch.float32, device="cpu")


def measure(length: int, ridge_lambda: float) -> dict[str, float]:
    """Forward and backward of one head, float32."""
    base = peak_mb()
    import flashlla

    tensors = inputs(length)
    options: dict[str, Any] = {"ridge_lambda": ridge_lambda, "backend": "chunked"}
    attend = lambda q, k, v: flashlla.lla_attention(q, k, v, **options)
    forward = milliseconds(prepared("forward", attend, tensors), "cpu") / 1e3
    forward_mb = peak_mb() - base
    backward = milliseconds(prepared("backward", attend, tensors), "cpu") / 1e3
    both_mb = peak_mb() - base
    _, info = flashlla.lla_attention(*tensors[:3], return_info=True, **options)
    return {
        "length": length,
        "ridge_lambda": ridge_lambda,
        "forward_s": forward,
        "backward_s": backward,
        "forward_peak_mb": forward_mb,
        "both_peak_mb": both_mb,
        "mean_iterations": info.iterations.float().mean().item(),
        "gflops": matrix_tflops(torch.float32, "cpu") * 1e3,
    }


def measure_definition() -> dict[str, float]:
    """Forward of one head of 1024 tokens in float32, straight from the definition: dense over pairs and dimensions."""
    base = peak_mb()
    from tests.support.oracle import attention

    q, k, v, _ = inputs(1024)
    visible = torch.ones(1024, 1024).tril().bool()
    with torch.no_grad():
        forward = milliseconds(lambda: attention(q, k, v, torch.tensor(0.1), 0.125, 1e-12, visible), "cpu")
    return {"forward_s": forward / 1e3, "forward_peak_mb": peak_mb() - base}


def apart(call: str) -> Any:
    """``call`` in a process of its own."""
    code = f"import json; from benchmarks.cpu import *; print(json.dumps({call}))"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    return json.loads(done.stdout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="default: 1024 to 8192, in minutes")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    kept = record.Record(options, "cpu")
    definition = apart("measure_definition()")
    print(f"from the definition: {definition}")
    measured: list[dict[str, float]] = []
    kept.figures["figures"] = {"chunked": measured, "definition": definition, "published": PUBLISHED}
    for length in options.lengths:
        for ridge in RIDGES:
            line = apart(f"measure({length}, {ridge})")
            measured.append(line)
            print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
            kept.write()
            if (length, ridge) == (1024, 0.1):
                for name, other in (("the definition, this run", definition), ("published, 0.84 s", PUBLISHED)):
                    print(f"forward: {other['forward_s'] / line['forward_s']:.1f} x faster than {name}")
                print(f"memory: {line['forward_peak_mb']:.0f} MB, published {PUBLISHED['peak_mb']} MB")
    kept.end()
    return 0
