"""Time and memory of the chunked backend on a CPU, recorded: `python -m benchmarks.cpu_figures`.

Each measurement runs in a process of its own, so that its peak memory is its own: the process's peak less its peak
once torch was imported. Times are medians, beside the rate that one large float32 matrix product reaches there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch

from benchmarks.record import record
from benchmarks.timing import matrix_tflops, milliseconds, prepared

# The published naive reference, on two cores at about 180 GFLOP/s, (1, 1024, 64), ridge 0.1.
PUBLISHED = {"forward_s": 0.84, "backward_s": 0.41, "peak_mb": 873, "gflops": 180}
RUNS = [(s, ridge) for s in (1024, 2048, 4096, 8192) for ridge in (10.0, 0.1)]


def peak_mb() -> float:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib * 1024 / 1e6


def measure(length: int, ridge_lambda: float) -> dict[str, float]:
    """Forward and backward of (1, length, 64) in float32."""
    base = peak_mb()
    import flashlla

    torch.manual_seed(0)
    tensors = [torch.randn(1, length, 64) for _ in range(4)]  # q, k, v, grad_o
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
    """Forward of (1, 1024, 64) in float32 from the definition, dense over pairs and dimensions: the naive way."""
    base = peak_mb()
    from tests.support.oracle import attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1024, 64) for _ in range(3))
    visible = torch.ones(1024, 1024).tril().bool()
    with torch.no_grad():
        forward = milliseconds(lambda: attention(q, k, v, torch.tensor(0.1), 0.125, 1e-12, visible), "cpu")
    return {"forward_s": forward / 1e3, "forward_peak_mb": peak_mb() - base}


def run(call: str) -> Any:
    """``call`` in a process of its own."""
    code = f"import json; from benchmarks.cpu_figures import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cpu", help="benchmarks/results/NAME.json is written (default: cpu)")
    name = parser.parse_args().name
    definition = run("measure_definition()")
    print(f"from the definition: {definition}")
    figures = []
    for length, ridge in RUNS:
        figures.append(run(f"measure({length}, {ridge})"))
        print("  ".join(f"{name} {value:.4g}" for name, value in figures[-1].items()), flush=True)
    first = next(f for f in figures if (f["length"], f["ridge_lambda"]) == (1024, 0.1))
    for name, other in (
        ("the definition, this run", definition["forward_s"]),
        ("published, 0.84 s", PUBLISHED["forward_s"]),
    ):
        print(f"forward at 1024, ridge 0.1: {other / first['forward_s']:.1f} x faster than {name}")
    print(f"memory: {first['forward_peak_mb']:.0f} MB, published {PUBLISHED['peak_mb']} MB")
    print(record(name, {"chunked": figures, "definition": definition, "published": PUBLISHED}))


if __name__ == "__main__":
    main()
