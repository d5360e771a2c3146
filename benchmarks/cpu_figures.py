"""Time and memory of the chunked backend on a CPU, recorded: `python -m benchmarks.cpu_figures`.

Each measurement runs in a process of its own, so that its peak memory is its own: the process's peak less its peak
once torch was imported. Times are medians, beside the rate that one large float32 matrix product reaches there.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import record

# The published naive reference, on two cores at about 180 GFLOP/s, (1, 1024, 64), ridge 0.1.
PUBLISHED = {"forward_s": 0.84, "backward_s": 0.41, "peak_mb": 873, "gflops": 180}
RUNS = [(s, ridge) for s in (1024, 2048, 4096, 8192) for ridge in (10.0, 0.1)]


def peak_mb() -> float:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib * 1024 / 1e6


def median_time(f: Callable[[], Any], rounds: int) -> float:
    f()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(length: int, ridge_lambda: float) -> dict[str, float]:
    """Forward and backward of (1, length, 64) in float32."""
    base = peak_mb()
    import flashlla

    torch.manual_seed(0)
    q, k, v, grad_o = (torch.randn(1, length, 64) for _ in range(4))
    rounds = 7 if length <= 2048 else 3
    options: dict[str, Any] = {"ridge_lambda": ridge_lambda, "backend": "chunked"}
    forward = median_time(lambda: flashlla.lla_attention(q, k, v, **options), rounds)
    forward_mb = peak_mb() - base
    o, info = flashlla.lla_attention(*(t.requires_grad_() for t in (q, k, v)), return_info=True, **options)
    backward = median_time(lambda: torch.autograd.grad(o, (q, k, v), grad_o, retain_graph=True), rounds)
    both_mb = peak_mb() - base
    a, b = torch.randn(2, 1024, 1024).unbind(0)
    return {
        "length": length,
        "ridge_lambda": ridge_lambda,
        "forward_s": forward,
        "backward_s": backward,
        "forward_peak_mb": forward_mb,
        "both_peak_mb": both_mb,
        "mean_iterations": info.iterations.float().mean().item(),
        "gflops": 2 * 1024**3 / median_time(lambda: a @ b, 20) / 1e9,
    }


def measure_definition() -> dict[str, float]:
    """Forward of (1, 1024, 64) in float32 from the definition, dense over pairs and dimensions: the naive way."""
    base = peak_mb()
    from tests.oracle import attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1024, 64) for _ in range(3))
    visible = torch.ones(1024, 1024).tril().bool()
    with torch.no_grad():
        forward = median_time(lambda: attention(q, k, v, torch.tensor(0.1), 0.125, 1e-12, visible), 5)
    return {"forward_s": forward, "forward_peak_mb": peak_mb() - base}


def run(call: str) -> Any:
    """``call`` in a process of its own."""
    code = f"import json; from benchmarks.cpu_figures import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
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
    print(record("cpu", {"chunked": figures, "definition": definition, "published": PUBLISHED}))


if __name__ == "__main__":
    main()
