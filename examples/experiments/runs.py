"""What every experiment shares: runs kept in a file as they end, a bar, means over seeds."""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import flashlla
from benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = TypeVar("T")
Run = dict[str, Any]
Plot = Callable[[dict[str, Run], Path], None]
# Of mixers, in all plots: colours and what points of seeds look like.
MARKS = {
    "softmax": ("C1", "s"),
    "LLA": ("C0", "o"),
    "ridge regression": ("C2", "D"),
    "delta rule": ("C3", "^"),
    "gated delta rule": ("C4", "v"),
}


class Runs:
    """Runs by name, in a JSON file written whole after each; those already there are not made again.

    Several processes may add to one file.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.all: dict[str, Run] = {}
        self.read()

    def read(self) -> None:
        """What there is by now, of other processes too."""
        if self.path.exists():
            self.all = json.loads(self.path.read_text())["runs"]

    def add(self, name: str, run: Run) -> None:
        command = shlex.join(["python", "-m", _module(), *sys.argv[1:]])
        of = {**circumstances(self.device), "fla": _fla(), "sources": sources(), "command": command}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.read()
            self.all[name] = {**run, "of": of}
            partial = self.path.with_name(f"{self.path.name}.partial")
            runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self.all.items()))
            partial.write_text(f'{{"runs": {{\n{runs}\n}}}}\n')
            partial.replace(self.path)


def _fla() -> str | None:
    try:
        return importlib.metadata.version("flash-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def sources() -> str:
    """A digest of the package's sources: records of one digest are of the same kernels."""
    folder = Path(flashlla.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def parser_of(module: str, doc: str | None, mixers: Sequence[str] = ()) -> argparse.ArgumentParser:
    """What all experiments are told by, those that compare ``mixers`` by which of them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    name = Path(module).stem
    parser.set_defaults(name=name)
    parser.add_argument("--quick", action="store_true", help="a small form: under a minute on a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, help=f"default: results/{name}[_quick].json beside this file")
    parser.add_argument("--plot", type=Path, help="draw it here, as PNG")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no run begins")
    if mixers:
        parser.add_argument("--mixers", nargs="+", choices=mixers, default=list(mixers))
    return parser


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def progress(items: Iterable[T], **settings: Any) -> Iterator[T]:
    """A bar, where there is a terminal and tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    bar: Iterator[T] = tqdm(items, disable=None, leave=False, **settings)
    return bar


def spread(values: list[float]) -> str:
    """Mean and standard deviation, 0.889 ± 0.004 (3); of one value itself alone: a trial."""
    if len(values) == 1:
        return f"{values[0]:.4f} (1)"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} ({len(values)})"


def within(seconds: float, items: Iterable[T]) -> Iterator[T]:
    """Items until so many seconds have passed."""
    begin = time.monotonic()
    for item in progress(list(items), desc="runs", unit="run"):
        if time.monotonic() - begin > seconds:
            print(f"no time for {item}", flush=True)
        else:
            yield item


def chosen(rates: Sequence[float], seeds: list[int], choice: Tensor, reported: Tensor) -> Run:
    """Of losses (seeds x rates,): for each seed which model is the best by ``choice``, and what is reported of it."""
    by_seed = choice.nan_to_num(nan=torch.inf).view(len(seeds), -1)
    best = by_seed.argmin(1).cpu()  # (seeds,)
    members = (best + torch.arange(len(seeds)) * len(rates)).tolist()
    return {
        "seeds": seeds,
        "rates": list(rates),
        "choice": [round(loss, 6) for loss in choice.tolist()],
        "all": [round(loss, 6) for loss in reported.tolist()],
        "members": members,
        "chosen": [rates[i] for i in best],
        "reported": [round(reported[i].item(), 6) for i in members],
    }


def table_of(runs: dict[str, Run]) -> str:
    """Markdown: what is reported of each run, over its seeds."""
    rows = ["| run | steps | reported | learning rates |", "|---|---|---|---|"]
    for name, run in runs.items():
        chosen = ", ".join(f"{rate:g}" for rate in run["chosen"])
        rows.append(f"| {name} | {run['steps']} | {spread(run['reported'])} | {chosen} |")
    return "\n".join(rows)


def study(
    options: argparse.Namespace,
    wanted: Mapping[str, Callable[[], Run]],
    plot: Plot,
    table: Callable[[dict[str, Run]], str] = table_of,
) -> dict[str, Run]:
    """Make those of ``wanted`` that are not there, in the order given; their table, and the plot asked for."""
    if options.quick:
        torch.set_num_threads(1)  # on small tensors threads wait for one another
    runs = Runs(options.results or RESULTS / f"{options.name}{'_quick' * options.quick}.json", DEVICE)
    for name in within(options.within, wanted):
        runs.read()
        if name not in runs.all:
            runs.add(name, wanted[name]())
            print(table({name: runs.all[name]}).splitlines()[-1], flush=True)
    runs.read()
    print(table(runs.all))
    if options.plot is not None:
        plot(runs.all, options.plot)
    return runs.all


@dataclass(frozen=True)
class Panel:
    """Of each mixer the points of each seed, (xs, ys); of the axes, those in ``log`` by powers."""

    title: str
    y: str
    log: str
    lines: dict[str, list[tuple[list[float], list[float]]]]


def dotted(axes: Any, mixer: str, lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Any:
    """The mean of ``lines``, which have the same xs, and their points."""
    colour, marker = MARKS[mixer]
    for xs, ys in lines:
        axes.plot(xs, ys, marker, color=colour, markersize=4, fillstyle="none")
    (line,) = axes.plot(lines[0][0], torch.tensor([ys for _, ys in lines]).mean(0), color=colour, label=mixer)
    return line


def draw_curves(panels: Sequence[Panel], path: Path, x: str) -> None:
    """Panels side by side: a colour for each mixer, a line through the means of seeds, a point for each seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(2 + 4.2 * len(panels), 3.8), layout="constrained")
    legend: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for mixer in sorted(panel.lines, key=list(MARKS).index):
            legend[mixer] = dotted(axes, mixer, panel.lines[mixer])
        if "x" in panel.log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set(major_locator=FixedLocator(sorted({x for line in axes.lines for x in line.get_xdata()})))
            axes.xaxis.set(minor_locator=NullLocator(), major_formatter=ScalarFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "y" in panel.log:
            axes.set_yscale("log")
        else:  # a part of all
            axes.set_ylim(-0.04, 1.04)
        axes.set(title=panel.title, xlabel=x, ylabel=panel.y)
        axes.grid(alpha=0.3)
    handles = [legend[mixer] for mixer in MARKS if mixer in legend]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
