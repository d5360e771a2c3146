"""What a looser tolerance costs and buys, on the keys of a trained model.

    python -m examples.experiments.tolerance benchmarks/heads/trained_qknorm.pt                    times on a GPU
    python -m examples.experiments.language_model --lr 2e-3 --keys keys --results own.json         a model, and its keys
    python -m examples.experiments.tolerance keys/lla.pt --results own_tolerance.json              the table of them

Output and gradients at each tolerance beside those of a direct solve in float64, for a cotangent drawn from the normal
distribution. A loose solve in the backward pass does not give the gradient of the loose forward pass; what it gives is
told by its relative error and by its cosine with the exact gradient. Operands are in bfloat16, as in training; the
exact ones are of the same rounded numbers. Times are of 192 heads, the keys over and over, from CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from examples.experiments.runs import RESULTS, Run, Runs, progress
from flashlla import lla_attention

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
NAMES = ("q", "k", "v", "ridge")


def gradients(inputs: list[Tensor], cotangent: Tensor, **settings: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Output, gradients of q, k, v and the ridge, and the report."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    *qkv, ridge = inputs
    o, info = lla_attention(*qkv, ridge_lambda=ridge, return_info=True, **settings)
    return o.detach(), list(torch.autograd.grad(o, inputs, cotangent.to(o.dtype))), info


def compare(inputs: list[Tensor], cotangent: Tensor, tolerance: float, exact: tuple[Tensor, list[Tensor]]) -> Run:
    o, grads, info = gradients(inputs, cotangent, tolerance=tolerance, cg_max_iters=256)
    error = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    cosine = lambda a, b: torch.cosine_similarity(a.double().flatten(), b.flatten(), dim=0).item()
    return {
        "tolerance": tolerance,
        "backend": info.backend,
        "iterations": round(info.iterations.float().mean().item(), 2),
        "most_iterations": int(info.iterations.max()),
        "error": error(o, exact[0]),
        "errors": {name: error(a, b) for name, a, b in zip(NAMES, grads, exact[1])},
        "cosines": {name: cosine(a, b) for name, a, b in zip(NAMES, grads, exact[1])},
    }


def times(inputs: list[Tensor], cotangent: Tensor, tolerance: float) -> dict[str, float]:
    """Milliseconds of a forward and of a backward pass, from CUDA graphs."""
    *qkv, ridge = inputs
    attend = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=ridge, tolerance=tolerance, cg_max_iters=256)
    passes = {which: timing.graphed(which, attend, [*qkv, cotangent]) for which in ("forward", "backward")}
    return {f"{which}_ms": round(timing.milliseconds(call.graph.replay), 3) for which, call in passes.items()}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "tolerance.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = torch.load(options.keys)
    inputs = [kept[name].to(device, torch.bfloat16) for name in "qkv"] + [kept["ridge"].to(device)]
    cotangent = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    wide = [t.double() for t in inputs]
    o, grads, _ = gradients(wide, cotangent.double(), backend="chunked", solver="direct")
    copies = -(-192 // (inputs[0].shape[0] * inputs[0].shape[1]))
    many = [t.repeat(copies, 1, 1, 1) if t.dim() == 4 else t.repeat(copies, 1, 1) for t in [*inputs, cotangent]]
    arm = json.JSONDecoder().raw_decode(kept["recipe"])[0]["arm"]
    runs = Runs(options.results, device)
    for tolerance in progress(TOLERANCES):
        if (name := f"{options.keys.stem} {tolerance:g}") in runs.all:
            continue
        run = compare(inputs, cotangent, tolerance, (o, grads))
        if device == "cuda":
            run |= times(many[:-1], many[-1], tolerance)
        runs.add(name, {**run, "of_model": arm})
    print(table(runs.all))
    return runs.all


def table(runs: dict[str, Run]) -> str:
    rows = [
        "| keys, tolerance | iterations | error of o | of dq, dk, dv, dlambda | cosine of dq, dk, dv, dlambda | "
        "forward, backward, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in sorted(runs.items(), key=lambda item: (item[0].split()[0], -item[1]["tolerance"])):
        errors = ", ".join(f"{run['errors'][x]:.1e}" for x in NAMES)
        cosines = ", ".join(f"{run['cosines'][x]:.6f}" for x in NAMES)
        ms = f"{run['forward_ms']:.2f}, {run['backward_ms']:.2f}" if "forward_ms" in run else ""
        rows.append(f"| {name} | {run['iterations']:.1f} | {run['error']:.1e} | {errors} | {cosines} | {ms} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
