"""Time, iterations and error of Local Linear Attention beside torch's softmax attention.

    python -m benchmarks run                  # the usual table of this machine's kind: GPU (minutes) or CPU
    python -m benchmarks run --quick          # under a minute
    python -m benchmarks run --name NAME      # and keep it: benchmarks/results/NAME.json, NAME.md and plots
    python -m benchmarks run --shapes 2x8x2048x64 --ridges 1 0.1 --data iid correlated --backends triton chunked
    python -m benchmarks run --from model.pt --tolerances 1e-3 1e-1        # keys of your own model
    python -m benchmarks run --compare benchmarks/results/BEFORE.json      # exits with 1 if anything got slower

Prints a table line by line; what is kept is kept after every line, so that an interrupted run loses nothing. Plots need
matplotlib.

Times are medians (benchmarks/timing.py), of eager calls and, on a GPU, of the same replayed from CUDA graphs, which
leave out what the host takes; "both" is a training step, forward and backward. With a window, what they are compared
with is not softmax attention but plain causal Local Linear Attention, a visible pair of query and key. Keys are those
of trained models with their learned ridges (`python -m benchmarks keys --help`), or random. Errors are those of sampled
rows to float64 (benchmarks/exact.py).

TFLOP/s count the matrix products of visible pairs of query and key, 2 D operations a pair and product, and nothing
else, with T the mean number of iterations (docs/math.md, section 4). Fused kernels compute the weights anew in every
sweep: 3 (the sums of softmax, and the first guess) + 3 T + 3 (the output) forward, 3 + 3 T + 5 (dq) + 8 (dk, dv)
backward. The chunked backend keeps them: 2 + 2 T + 2 and 10 + 2 T. Softmax attention: 2 and 5. T of the backward pass,
which nothing reports, is taken to be that of the forward pass. The naive backend and direct solvers form matrices
instead: they have no such count, and no rate here.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from benchmarks.data import KINDS, TRAINED, is_trained, learned_ridge, make
from benchmarks.exact import Sample, sample
from flashlla import dispatch
from flashlla.flops import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, ITERATION_PRODUCTS

Shape = tuple[int, int, int, int]
T = TypeVar("T")
RIDGES: tuple[float | str, ...] = (10.0, 1.0, 0.1)
LEARNED = "learned"  # the ridges that trained keys bring
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True)
class Case:
    """Lines of one shape (B, H, S, D) and kind of data. passes: None for those usual at its length. tolerances: None
    for the default."""

    shape: Shape
    data: str = "iid"
    ridges: tuple[float | str, ...] = RIDGES
    passes: tuple[str, ...] | None = None
    tolerances: tuple[float | None, ...] = (None,)
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Of queries and keys, visible."""
        batch, heads, length, _ = self.shape
        seen = min(length, self.window or length)
        return batch * heads * (length * seen - seen * (seen - 1) // 2)


def _trained(shape: Shape, tolerances: tuple[float | None, ...] = (None, 1e-1), data: str = TRAINED[1]) -> Case:
    return Case(shape, data, (LEARNED,), tolerances=tolerances)


TABLES = {
    "cuda": (
        # What is wanted first, for a run that is cut off (docs/performance.md).
        _trained((24, 8, 1024, 64), (None, 1e-2, 1e-1)),
        _trained((24, 8, 512, 64)),
        Case((24, 8, 256, 64), ridges=(1.0,)),
        Case((24, 8, 512, 128), ridges=(1.0,)),
        Case((4, 16, 4096, 64)),
        Case((4, 8, 4096, 128)),
        *(Case((2, 32, 4096, dim), ridges=(1.0,), window=512) for dim in (64, 128)),
        Case((4, 16, 1024, 64)),
        Case((4, 8, 1024, 128)),
        *(Case((4, 16, 4096, 64), data, (1.0, 0.1)) for data in ("correlated", "sharp", "power_law")),
        *(Case((1, 8, 16384, dim)) for dim in (64, 128)),
        Case((1, 8, 65536, 64), passes=("forward",)),
        _trained((24, 8, 1024, 64), data=TRAINED[0]),
    ),
    "cpu": (
        *(_trained((1, 2, length, 64)) for length in (256, 1024)),
        *(Case((1, 1, length, 64), ridges=(10.0, 0.1)) for length in (256, 512, 1024, 2048, 4096)),
        *(Case((1, 1, 2048, 64), data, (10.0, 0.1)) for data in ("correlated", "power_law", "sharp")),
    ),
}
QUICK = {
    "cuda": (
        _trained((24, 8, 1024, 64)),
        Case((4, 16, 4096, 64), ridges=(10.0, 0.1)),
        Case((4, 16, 1024, 64), ridges=(10.0,), passes=("forward", "backward")),
        Case((1, 8, 16384, 64), ridges=(10.0, 0.1)),
    ),
    "cpu": (
        _trained((1, 1, 512, 64), (None,)),
        *(Case((1, 1, length, 64), ridges=(1.0,)) for length in (256, 512, 2048)),
    ),
}
USUAL_SHAPE: dict[str, Shape] = {"cuda": (4, 16, 4096, 64), "cpu": (1, 1, 1024, 64)}
TRAINED_SHAPE: dict[str, Shape] = {"cuda": (24, 8, 1024, 64), "cpu": (1, 2, 1024, 64)}

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
    """Short steps may be bound by what the host takes to launch them, and its part in them is less than in either."""
    return timing.PASSES if device == "cuda" and length <= 1024 else ("forward", "backward")


def usual_backends(length: int, device: str) -> tuple[str, ...]:
    """The naive backend grows with the square of the length."""
    return ("triton",) if device == "cuda" else ("chunked", "naive") if length <= 1024 else ("chunked",)


def tflops(backend: str, which: str, iterations: float, case: Case, ms: float) -> float | None:
    """As counted above; None where that says nothing."""
    if backend not in PRODUCTS or (backend != "sdpa" and iterations == 0):
        return None
    passes = (which,) if which in PRODUCTS[backend] else ("forward", "backward")
    products = sum(fixed + each * iterations for fixed, each in (PRODUCTS[backend][p] for p in passes))
    return products * 2 * case.shape[-1] * case.pairs / ms / 1e9


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

    def ridge(self, ridge: float | str) -> float | Tensor:
        """What ``ridge`` stands for."""
        if isinstance(ridge, str):
            return self._once("ridge", lambda: learned_ridge(self.case.shape, self.case.data, self.device))
        return ridge

    def times(self, what: Hashable, which: str, attend: timing.Attend, graphs: bool) -> dict[str, float]:
        """Milliseconds of ``what``, eager and from a graph."""
        ms = lambda call: timing.milliseconds(call, self.device)
        made = (which, attend, self.tensors)
        found = {"ms": self._once((what, which), lambda: ms(timing.prepared(*made)))}
        if graphs:
            found["graph_ms"] = self._once((what, which, "graph"), lambda: ms(timing.graphed(*made)))
        return found

    def _sample(self, ridge: float | str) -> Sample:
        make = lambda: sample(self.tensors, self.ridge(ridge), window=self.case.window)
        return self._once(("sample", ridge), make)

    def _forward(self, ridge: float | str, attend: Callable[..., Any]) -> dict[str, float]:
        """Of the solve, and the error of o."""
        o, info = attend(*self.tensors[:3], return_info=True)
        return {
            "iterations": info.iterations.double().mean().item(),
            "converged": info.converged.double().mean().item(),
            **self._sample(ridge).errors(o=o),
        }

    def _backward(self, ridge: float | str, attend: timing.Attend) -> dict[str, float]:
        """The error of dq."""
        q, k, v = (t.detach().requires_grad_() for t in self.tensors[:3])
        dq, *_ = torch.autograd.grad(attend(q, k, v), (q, k, v), self.tensors[3])
        return self._sample(ridge).errors(dq=dq)

    def measure(
        self, ridge: float | str, tolerance: float | None, which: str, backend: str, solver: str, graphs: bool
    ) -> report.Line:
        """The figures of a line; raises what keeps them from being had."""
        case = self.case
        options: dict[str, Any] = {"backend": backend, "solver": None if solver == "default" else solver}
        options |= {"tolerance": tolerance, "window": case.window}
        told = flashlla.explain(*self.tensors[:3], **options)
        if told.backend is None:
            raise flashlla.UnsupportedError(told.reasons[backend])
        if dispatch.backend_named(backend).emulated():
            raise flashlla.UnsupportedError("it runs in an emulator here, whose times say nothing")
        graphs = graphs and self.device == "cuda" and not dispatch.backend_named(backend).waits
        options["ridge_lambda"] = self.ridge(ridge)
        attend = lambda *tensors, **more: flashlla.lla_attention(*tensors, **{**options, **more})
        what = ridge, tolerance, backend, solver
        found = self._once((what, "solve"), lambda: self._forward(ridge, attend))
        errors = [found["o"]] if which != "backward" else []
        if which != "forward":
            errors += self._once((what, "adjoint"), lambda: self._backward(ridge, attend)).values()
        if not all(map(math.isfinite, errors)):
            raise ArithmeticError("the result is not finite")
        line: report.Line = self.times(what, which, attend, graphs)
        if case.window is None:
            name, beside = "sdpa", self.times("sdpa", which, timing.sdpa, graphs)
        else:  # what plain causal attention takes for as many pairs
            plain = lambda *tensors: attend(*tensors, window=None)
            part = case.pairs / dataclasses.replace(case, window=None).pairs
            times = self.times((what, "causal"), which, plain, graphs)
            name, beside = "causal", {key: part * ms for key, ms in times.items()}
        for key, ms in beside.items():
            line |= {key.replace("ms", f"{name}_ms"): ms, key.replace("ms", "ratio"): line[key] / ms}
        best = "graph_ms" if "graph_ms" in line else "ms"
        line["tflops"] = tflops(backend, which, found["iterations"], case, line[best])
        if case.window is None:
            line["sdpa_tflops"] = tflops("sdpa", which, 0, case, beside[best])
        return line | {"iterations": found["iterations"], "converged": found["converged"], "error": max(errors)}


def sweep(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[report.Line]:
    """A line for each case, ridge, tolerance, backend, solver and pass, as it is measured; of one that fails, why."""
    dtype = dtype_name(options)
    for case in cases:
        length, device = case.shape[2], options.device
        subject = Subject(case, getattr(torch, dtype), device)
        for ridge, tolerance, backend, solver, which in itertools.product(
            case.ridges,
            options.tolerances or case.tolerances,
            options.backends or usual_backends(length, device),
            options.solvers,
            options.passes or case.passes or usual_passes(length, device),
        ):
            line: report.Line = {"shape": list(case.shape), "dtype": dtype, "data": Path(case.data).stem}
            line |= {"ridge": ridge, "tolerance": tolerance, "window": case.window}
            line |= {"pass": which, "backend": backend, "solver": solver}
            try:
                line |= subject.measure(ridge, tolerance, which, backend, solver, options.graphs)
            except Exception as error:  # whatever it is, the sweep goes on
                line["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if device == "cuda":
                torch.cuda.empty_cache()
            yield line


def dtype_name(options: argparse.Namespace) -> str:
    return options.dtype or DTYPES[options.device]


def chosen(options: argparse.Namespace) -> Sequence[Case]:
    if not (options.shapes or options.data or options.ridges or options.own):
        return (QUICK if options.quick else TABLES)[options.device]
    found = []
    for data in [*(options.data or []), *options.own] or ["iid"]:
        shapes = options.shapes or [TRAINED_SHAPE[options.device] if is_trained(data) else USUAL_SHAPE[options.device]]
        usual = (LEARNED,) if is_trained(data) else RIDGES
        found += [Case(shape, data, tuple(options.ridges or usual)) for shape in shapes]
    return found


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
        "what is swept", "given any of the first four, the product of them instead of the usual table"
    )
    what.add_argument("--shapes", nargs="+", type=shape, metavar="BxHxSxD", help="default then: one of the table's")
    what.add_argument("--data", nargs="+", choices=[*TRAINED, *KINDS], help="default then: iid")
    what.add_argument(
        "--from", dest="own", nargs="+", default=[], metavar="FILE.pt", help="keys of your own model: see `keys --help`"
    )
    what.add_argument(
        "--ridges", nargs="+", type=float, metavar="LAMBDA", help="default then: 10 1 0.1, of trained keys their own"
    )
    what.add_argument(
        "--tolerances", nargs="+", type=float, metavar="RESIDUAL", help="of the solver; default: the operator's"
    )
    what.add_argument("--passes", nargs="+", choices=timing.PASSES, help="default: forward backward, both if short")
    what.add_argument("--no-graphs", dest="graphs", action="store_false", help="eager calls alone")
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
