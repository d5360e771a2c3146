"""The Triton backend on one GPU: each pass, masks and shared heads, accuracy, memory.

    python -m benchmarks gpu --only speed surface --name NAME

Accuracy is the relative error, in the Frobenius norm, to float64 on the same rounded inputs.
"""

# ruff: noqa: B023 (what is timed runs before the loop goes on)
from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks import launches, needs, record
from benchmarks.data import make
from benchmarks.exact import relative
from benchmarks.timing import milliseconds, prepared, sdpa
from flashlla import CG, lla_attention, lla_attention_varlen

EXACT = CG(atol=0.0, rtol=1e-24, max_iters=2000)
BOTH = ("cast", "gram", "solve", "solve_gram")  # passes that forward and backward have
SPEED = [(4, 16, 4096, 64, "iid"), (4, 8, 4096, 128, "iid"), (4, 16, 4096, 64, "correlated"), (4, 16, 1024, 64, "iid")]


def step(tensors: list[Tensor], ridge: float, **options: Any) -> dict[str, Tensor]:
    """Output and gradients."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lam = torch.full(q.shape[:3], ridge, dtype=wide, device=q.device).requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=lam, **options)
    grads = torch.autograd.grad(o, (q, k, v, lam), tensors[3].to(o.dtype))
    return dict(zip(("o", "dq", "dk", "dv", "dridge"), (o.detach(), *grads)))


def exact(tensors: list[Tensor], ridge: float) -> dict[str, Tensor]:
    return step([t.double() for t in tensors], ridge, backend="chunked", solver=EXACT)


def errors(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    first, later = (lambda t: t[:, :, :128]), (lambda t: t[:, :, 128:])
    return {
        "o_first_128": relative(first(got["o"]), first(want["o"])),
        "o_later": relative(later(got["o"]), later(want["o"])),
        **{name: relative(got[name], want[name]) for name in want},
        "rounding": {name: relative(want[name].to(dtype), want[name]) for name in want},
    }


def passes(tensors: list[Tensor], ridge: float) -> dict[str, float]:
    """Milliseconds of each pass."""
    with launches.recorded() as found:
        step(tensors, ridge, backend="triton")
    total: dict[str, float] = {}
    for launch in found:
        name = launch.name
        backward = not {"output", "forward"}.isdisjoint(total)  # forward's last
        label = f"{name} again" if backward and name in BOTH else name
        total[label] = total.get(label, 0.0) + milliseconds(lambda: launches.repeat(launch))
    return total


def speed() -> list[dict[str, Any]]:
    lines = []
    for batch, heads, length, dim, data in SPEED:
        tensors = make((batch, heads, length, dim), data)
        yardstick = {which: milliseconds(prepared(which, sdpa, tensors)) for which in ("forward", "backward")}
        for ridge in (10.0, 1.0, 0.1):
            attend = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=ridge)
            _, info = lla_attention(*tensors[:3], ridge_lambda=ridge, return_info=True)
            line: dict[str, Any] = {
                "batch_heads": batch * heads, "length": length, "dim": dim, "data": data, "ridge": ridge,
                "backend": info.backend, "iterations": info.iterations.float().mean().item(),
                "converged": info.converged.float().mean().item(),
                "forward_ms": milliseconds(prepared("forward", attend, tensors)),
                "backward_ms": milliseconds(prepared("backward", attend, tensors)),
                "sdpa_forward_ms": yardstick["forward"], "sdpa_backward_ms": yardstick["backward"],
                "passes_ms": passes(tensors, ridge),
            }  # fmt: skip
            line["forward_ratio"] = line["forward_ms"] / yardstick["forward"]
            line["backward_ratio"] = line["backward_ms"] / yardstick["backward"]
            lines.append(line)
            print(
                f"speed {batch * heads:>3} {length:>5} {dim:>4} {data:<11} lambda {ridge:<5}"
                f" forward {line['forward_ms']:.3f} ms {line['forward_ratio']:.2f}x"
                f"  backward {line['backward_ms']:.3f} ms {line['backward_ratio']:.2f}x"
                f"  iterations {line['iterations']:.1f}  converged {line['converged']:.4f}  "
                + " ".join(f"{n} {t:.3f}" for n, t in line["passes_ms"].items()),
                flush=True,
            )
    return lines


def show(kind: str, line: dict[str, Any]) -> dict[str, Any]:
    numbers = " ".join(f"{n} {e:.1e}" for n, e in line.items() if isinstance(e, float) and n != "ridge")
    rounding = " ".join(f"{n} {e:.1e}" for n, e in line["rounding"].items())
    labels = {n: x for n, x in line.items() if n == "ridge" or not isinstance(x, (float, dict))}
    print(kind, labels, numbers, "| rounding", rounding, flush=True)
    return line


def accuracy() -> list[dict[str, Any]]:
    lines = []
    for dim in (64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            tensors = make((2, 2, 4096, dim), dtype=dtype)
            for ridge in (0.1, 1.0, 10.0):
                want = exact(tensors, ridge)
                for backend in ("triton", "triton_pcg"):
                    line = {"dim": dim, "dtype": str(dtype), "ridge": ridge, "backend": backend}
                    lines.append(show("accuracy", line | errors(step(tensors, ridge, backend=backend), want, dtype)))
    return lines


def offset() -> list[dict[str, Any]]:
    lines = []
    for away in (0.0, 30.0):
        tensors = make((2, 4, 1024, 64), offset=away)
        line = {"offset": str(away), "dim": 64, "ridge": 1.0}
        lines.append(
            show("offset", line | errors(step(tensors, 1.0, backend="triton"), exact(tensors, 1.0), torch.bfloat16))
        )
    return lines


def single() -> list[dict[str, Any]]:
    lines = []
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for dim in (64, 128):
            tensors = make((1, 4, 1024, dim), dtype=torch.float32)
            for ridge in (0.1, 10.0):
                got, want = step(tensors, ridge, backend="triton"), exact(tensors, ridge)
                line = {"precision": precision, "dim": dim, "ridge": ridge}
                lines.append(show("float32", line | errors(got, want, torch.float32)))
    torch.set_float32_matmul_precision(before)
    return lines


def memory() -> list[dict[str, Any]]:
    lines = []
    for batch, heads, length, dim in ((4, 16, 4096, 64), (4, 16, 8192, 64), (4, 8, 4096, 128)):
        tensors = make((batch, heads, length, dim))
        q, k, v = (t.requires_grad_() for t in tensors[:3])
        unit = q.numel() * q.element_size()
        lla_attention(q, k, v).backward(tensors[3])
        q.grad = k.grad = v.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = lla_attention(q, k, v)
        kept = torch.cuda.memory_allocated() - before - unit
        o.backward(tensors[3])
        peak = torch.cuda.max_memory_allocated() - before - 4 * unit  # o, dq, dk, dv
        line = {"batch_heads": batch * heads, "length": length, "dim": dim, "kept": kept / unit, "peak": peak / unit}
        print("memory, in sizes of q:", line, flush=True)
        lines.append(line)
        del o, q, k, v, tensors
    return lines


def surface() -> list[dict[str, Any]]:
    """Masks and shared heads beside plain causal attention of the same heads and head dim: time a visible pair."""
    lines = []
    for dim in (64, 128):
        batch, heads, length = 2, 32, 4096
        q, k, v, grad = make((batch, heads, length, dim))
        causal = batch * heads * length * (length + 1) / 2
        lengths = [3000, 1800, 4096, 1000, 2600, 3888]  # 16384 tokens
        edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        row = lambda t: t.transpose(1, 2).reshape(1, -1, heads // 2, dim).transpose(1, 2)  # packed: (1, 16, 16384, D)
        window = 512
        calls = {
            "causal": (lambda *x: lla_attention(*x, ridge_lambda=1.0), (q, k, v), causal),
            "8 key heads": (lambda *x: lla_attention(*x, ridge_lambda=1.0), (q, k[:, ::4], v[:, ::4]), causal),
            f"window {window}": (
                lambda *x: lla_attention(*x, ridge_lambda=1.0, window=window),
                (q, k, v),
                batch * heads * (length * window - window * (window - 1) / 2),
            ),
            "packed": (
                lambda *x: lla_attention_varlen(*x, ridge_lambda=1.0, cu_seqlens=edges, max_seqlen=4096),
                tuple(map(row, (q, k, v))),
                heads // 2 * sum(n * (n + 1) / 2 for n in lengths),
            ),
        }
        base: dict[str, float] = {}
        for name, (call, tensors, pairs) in calls.items():
            tensors = (*tensors, row(grad) if name == "packed" else grad)
            times = {which: milliseconds(prepared(which, call, tensors)) for which in ("forward", "backward")}
            base = base or {n: t / pairs for n, t in times.items()}
            line: dict[str, Any] = {"dim": dim, "what": name}
            line |= {f"{n}_ms": t for n, t in times.items()}
            line |= {f"{n}_a_pair": t / pairs / base[n] for n, t in times.items()}
            lines.append(line)
            print(
                f"surface D={dim:<4}{name:<12} forward {times['forward']:.3f} ms {line['forward_a_pair']:.2f} a pair"
                f"  backward {times['backward']:.3f} ms {line['backward_a_pair']:.2f} a pair",
                flush=True,
            )
    return lines


KINDS = {
    "speed": speed,
    "surface": surface,
    "accuracy": accuracy,
    "offset": offset,
    "single": single,
    "memory": memory,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all of them")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    needs.triton()
    kept = record.Record(options, "cuda")
    print(kept.figures)
    for kind in options.only:
        kept.figures[kind] = KINDS[kind]()
        kept.write()
    kept.end()
    return 0
