"""Time, iterations and error of Local Linear Attention beside torch's softmax attention.

    python -m benchmarks run                  # the usual table of this machine's kind: GPU (minutes) or CPU
    python -m benchmarks run --quick          # under a minute
    python -m benchmarks run --name NAME      # and keep it: benchmarks/results/NAME.json, NAME.md and plots
    python -m benchmarks run --shapes 2x8x2048x64 --ridges 1 0.1 --data iid correlated --backends triton chunked
    python -m benchmarks run --compare benchmarks/results/BEFORE.json      # exits with 1 if anything got slower

Prints a table line by line; what is kept is kept after every line, so that an interrupted run loses nothing. Plots need
matplotlib.

Times are medians (benchmarks/timing.py); "both" is a training step, forward and backward, and "graph" the same replayed
from a CUDA graph. Errors are those of sampled rows to float64 (benchmarks/exact.py).

TFLOP/s count the matrix products of visible pairs of query and key, 2 D operations a pair and product, and nothing
else, with T the mean number of iterations (docs/math.md, section 4). Fused kernels compute the weights anew in every
sweep: 3 (the sums of softmax, and the first guess) + 3 T + 3 (the output) forward, 3 + 3 T + 5 (dq) + 8 (dk, dv)
backward. The chunked backend keeps them: 2 + 2 T + 2 and 10 + 2 T. Softmax attention: 2 and 5. T of the backward pass,
which nothing reports, is taken to be that of the forward pass. The naive backend and direct solvers form matrices
instead: they have no such count, and no rate here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import flashlla
from benchmarks import needs, plots, record, report, timing
from benchmarks.data import KINDS, make
from benchmarks.exact import Sample, sample
from flashlla import dispatch
from flashlla.flops import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, ITERATION_PRODUCTS

Shape = tuple[int, int, int, int]
T = TypeVar("T")
RIDGES = (10.0, 1.0, 0.1)
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True)
class Case:
    """Lines of one shape (B, H, S, D) and kind of data. passes: None for those usual at its length."""

    shape: Shape
    data: str = "iid"
    ridges: tuple[float, ...] = RIDGES
    passes: tuple[str, ...] | None = None


TABLES = {
    "cuda": (
        Case((4, 16, 4096, 64)),
        Case((4, 16, 4096, 64), "correlated", (1.0, 0.1)),
        Case((4, 16, 4096, 64), "power_law", (1.0, 0.1)),
        Case((4, 16, 4096, 64), "sharp", (1.0, 0.1)),
        Case((4, 16, 1024, 64)),
        Case((1, 8, 16384, 64)),
        Case((1, 8, 65536, 64), passes=("forward",)),
        *(Case((*heads, length, 128)) for heads, length in (((4, 8), 1024), ((4, 8), 4096), ((1, 8), 16384))),
    ),
    "cpu": (
        *(Case((1, 1, length, 64), ridges=(10.0, 0.1)) for length in (256, 512, 1024, 2048, 4096)),
        *(Case((1, 1, 2048, 64), data, (10.0, 0.1)) for data in ("correlated", "power_law", "sharp")),
    ),
}
QUICK = {
    "cuda": (
        Case((4, 16, 4096, 64), ridges=(10.0, 0.1)),
        Case((4, 16, 1024, 64), ridges=(10.0,), passes=("forward", "backward")),
        Case((1, 8, 16384, 64), ridges=(10.0, 0.1)),
    ),
    "cpu": tuple(Case((1, 1, length, 64), ridges=(1.0,)) for length in (256, 512, 2048)),
}
USUAL_SHAPE: dict[str, Shape] = {"cuda": (4, 16, 4096, 64), "cpu": (1, 1, 1024, 64)}

# Matrix products of a pass, and further ones of each iteration.
FUSED = {
    "forward": (sum(FORWARD_PRODUCTS), ITERATION_PRODUCTS),
    "backward": (sum(BACKWARD_PRODUCTS), ITERATION_PRODUCTS),
}
PRODUCTS = {
    "sdpa": {"forward": (2, 0), "backward": (5, 0)},
    "triton": FUSED,
    "triton_pcg": FUSED,
    "chunked": {"forward": (2 + 2, 2), "backward": (10, 2)},
}


def usual_passes(length: int, device: str) -> tuple[str, ...]:
    """Short steps are bound by what the host takes to launch them: there a CUDA graph shows the rest."""
    return ("forward", "backward", "graph") if device == "cuda" and length <= 1024 else ("forward", "backward")


def usual_backends(length: int, device: str) -> tuple[str, ...]:
    """The naive backend grows with the square of the length."""
    return ("triton",) if device == "cuda" else ("chunked", "naive") if length <= 1024 else ("chunked",)


def tflops(backend: str, which: str, iterations: float, shape: Sequence[int], ms: float) -> float | None:
    """As counted above; None where that says nothing."""
    if backend not in PRODUCTS or (backend != "sdpa" and iterations == 0):
        return None
    batch, heads, length, dim = shape
    passes = (which,) if which in PRODUCTS[backend] else ("forward", "backward")
    products = sum(fixed + each * iterations for fixed, each in (PRODUCTS[backend][p] for p in passes))
    pairs = batch * heads * length * (length + 1) / 2
    return products * 2 * dim * pairs / ms / 1e9


class Subject:
    """Tensors of one shape and kind of data, and what is found once for all lines that share it."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._found: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, find: Callable[[], T]) -> T:
        if key not in self._found:
            self._found[key] = find()
        found: T = self._found[key]
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """q, k, v and grad_o."""
        return self._once("tensors", lambda: make(self.case.shape, self.case.data, 0.0, self.dtype, self.device))

    def sdpa_ms(self, which: str) -> float:
        return self._once(("sdpa", which), lambda: self._ms(which, timing.sdpa))

    def _ms(self, which: str, attend: timing.Attend) -> float:
        return timing.milliseconds(timing.prepared(which, attend, self.tensors), self.device)

    def _sample(self, ridge: float) -> Sample:
        return self._once(("sample", ridge), lambda: sample(self.tensors, ridge))

    def _forward(self, ridge: float, options: dict[str, Any]) -> dict[str, float]:
        """Of the solve, and the error of o."""
        o, info = flashlla.lla_attention(*self.tensors[:3], ridge_lambda=ridge, return_info=True, **options)
        return {
            "iterations": info.iterations.double().mean().item(),
            "converged": info.converged.double().mean().item(),
            **self._sample(ridge).errors(o=o),
        }

    def _backward(self, ridge: float, options: dict[str, Any]) -> dict[str, float]:
        """The error of dq."""
        q, k, v = (t.detach().requires_grad_() for t in self.tensors[:3])
        o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge, **options)
        dq, *_ = torch.autograd.grad(o, (q, k, v), self.tensors[3])
        return self._sample(ridge).errors(dq=dq)

    def measure(self, ridge: float, which: str, backend: str, solver: str) -> report.Line:
        """The figures of a line; raises what keeps them from being had."""
        options: dict[str, Any] = {"backend": backend, "solver": None if solver == "default" else solver}
        told = flashlla.explain(*self.tensors[:3], **options)
        if told.backend is None:
            raise flashlla.UnsupportedError(told.reasons[backend])
        if dispatch.backend_named(backend).emulated():
            raise flashlla.UnsupportedError("it runs in an emulator here, whose times say nothing")
        found = self._once((ridge, backend, solver, "forward"), lambda: self._forward(ridge, options))
        errors = [found["o"]] if which != "backward" else []
        if which != "forward":
            errors += self._once((ridge, backend, solver, "backward"), lambda: self._backward(ridge, options)).values()
        if not all(map(math.isfinite, errors)):
            raise ArithmeticError("the result is not finite")
        ms = self._ms(which, lambda q, k, v: flashlla.lla_attention(q, k, v, ridge_lambda=ridge, **options))
        sdpa_ms = self.sdpa_ms(which)
        return {
            "ms": ms,
            "sdpa_ms": sdpa_ms,
            "ratio": ms / sdpa_ms,
            "iterations": found["iterations"],
            "converged": found["converged"],
            "error": max(errors),
            "tflops": tflops(backend, which, found["iterations"], self.case.shape, ms),
            "sdpa_tflops": tflops("sdpa", which, 0, self.case.shape, sdpa_ms),
        }


def sweep(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[report.Line]:
    """A line for each case, ridge, backend, solver and pass, as it is measured; of one that fails, why."""
    dtype = dtype_name(options)
    for case in cases:
        length, device = case.shape[2], options.device
        subject = Subject(case, getattr(torch, dtype), device)
        for ridge, backend, solver, which in itertools.product(
            case.ridges,
            options.backends or usual_backends(length, device),
            options.solvers,
            options.passes or case.passes or usual_passes(length, device),
        ):
            line: report.Line = {"shape": list(case.shape), "dtype": dtype, "data": case.data, "ridge": ridge}
            line |= {"pass": which, "backend": backend, "solver": solver}
            try:
                line |= subject.measure(ridge, which, backend, solver)
            except Exception as error:  # whatever it is, the sweep goes on
                line["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if device == "cuda":
                torch.cuda.empty_cache()
            yield line


def dtype_name(options: argparse.Namespace) -> str:
    return options.dtype or DTYPES[options.device]


def chosen(options: argparse.Namespace) -> Sequence[Case]:
    if options.shapes or options.data or options.ridges:
        return [
            Case(shape, data, tuple(options.ridges or RIDGES))
            for shape in options.shapes or [USUAL_SHAPE[options.device]]
            for data in options.data or ["iid"]
        ]
    return (QUICK if options.quick else TABLES)[options.device]


def shape(text: str) -> Shape:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted batch x heads x tokens x head dim, as 4x16x4096x64")
    return sizes


def earlier(text: str) -> dict[str, Any]:
    """What an earlier run kept: read now, not after minutes, and before its file may be overwritten."""
    try:
        found: dict[str, Any] = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    if "lines" not in found:
        raise argparse.ArgumentTypeError(f"{text} holds no lines; wanted a file that `python -m benchmarks run` wrote")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group(
        "what is swept", "given any of the first three, the product of them instead of the usual table"
    )
    what.add_argument("--shapes", nargs="+", type=shape, metavar="BxHxSxD", help="default then: one of the table's")
    what.add_argument("--data", nargs="+", choices=KINDS, help="default then: iid")
    what.add_argument("--ridges", nargs="+", type=float, metavar="LAMBDA", help="default then: 10 1 0.1")
    what.add_argument("--passes", nargs="+", choices=timing.PASSES, help="default: forward backward, graph if short")
    names = [backend.name for backend in dispatch.all_backends()]
    what.add_argument("--backends", nargs="+", choices=names, help="default: triton on a GPU, else chunked and naive")
    what.add_argument("--solvers", nargs="+", default=["default"], help="default: what the backend does best")
    dtypes = ("bfloat16", "float16", "float32", "float64")
    what.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    what.add_argument("--device", choices=DTYPES, default="cuda" if torch.cuda.is_available() else "cpu")
    what.add_argument("--quick", action="store_true", help="a table of under a minute")
    record.add_arguments(parser)
    parser.add_argument("--no-plots", action="store_true", help="keep none")
    parser.add_argument(
        "--compare", type=earlier, metavar="OLD.json", help="say what got slower since; exit with 1 if any"
    )


def main(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        needs.cuda()
    kept = record.Record(options, options.device)
    dtype = dtype_name(options)
    lines: list[report.Line] = []
    matrix_tflops = timing.matrix_tflops(getattr(torch, dtype), options.device)
    kept.figures |= {"dtype": dtype, "matrix_tflops": matrix_tflops, "lines": lines}
    print(f"{kept.figures['device']}, {dtype}; a large matrix product: {matrix_tflops:.4g} TFLOP/s")
    print(report.heading(), flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flashlla.ConvergenceWarning)  # the table has a column for that
        for line in sweep(chosen(options), options):
            if line.get("tflops"):
                line["of_matmul"] = line["tflops"] / matrix_tflops
            print(report.row(line), flush=True)
            lines.append(line)
            kept.write()
            kept.write_text(".md", report.markdown(kept.figures))
    if kept.path and not options.no_plots:
        try:
            drawn = plots.draw(lines, kept.path)
            kept.name(drawn)
            kept.write_text(".md", report.markdown(kept.figures, drawn))
        except ImportError:
            print("no plots: they need matplotlib (pip install matplotlib)")
    fine = True
    if options.compare:
        said, fine = report.compare(options.compare, kept.figures)
        print("\n".join(said))
    kept.end()
    return 0 if fine else 1
