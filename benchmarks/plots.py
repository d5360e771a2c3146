"""What `run` draws of its lines: time against length, and error against time. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import Line, ridge_name

K = TypeVar("K", bound=Hashable)
MARKERS = "os^Dvp*X"


def draw(lines: Sequence[Line], path: Path) -> list[Path]:
    """Draw beside ``path`` what there is to draw; the files."""
    lines = [line for line in lines if "failed" not in line and line["window"] is None]
    drawn = []
    if series := over_length(lines):
        drawn.append(_times(series, path.with_name(f"{path.stem}_time.png")))
    if lines:
        drawn.append(_errors(lines, path.with_name(f"{path.stem}_error.png")))
    return drawn


def grouped(lines: Sequence[Line], key: Callable[[Line], K]) -> dict[K, list[Line]]:
    found: dict[K, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return found


def over_length(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines that differ in their length alone, or in batch and heads besides: those of two lengths and more."""
    named = ("pass", "backend", "solver", "data", "ridge", "tolerance")
    what = lambda line: (line["shape"][3], *map(line.get, named))
    return [some for some in grouped(lines, what).values() if len({line["shape"][2] for line in some}) > 1]


def by_length(lines: Sequence[Line], key: str) -> tuple[list[int], list[float]]:
    """Lengths, and milliseconds a head (batch and heads differ between lengths): the median where there are several."""
    found = grouped(lines, lambda line: line["shape"][2])
    per_head = lambda line: line[key] / (line["shape"][0] * line["shape"][1])
    return sorted(found), [statistics.median(map(per_head, found[length])) for length in sorted(found)]


def naming(lines: Sequence[Line], parts: dict[str, Callable[[Line], str]]) -> Callable[[Line], str]:
    """The name of a line: those of its ``parts`` that are not the same in all ``lines``."""
    varied = [part for part in parts.values() if len(set(map(part, lines))) > 1]
    return lambda line: ", ".join(filter(None, (part(line) for part in varied)))


BACKEND: dict[str, Callable[[Line], str]] = {
    "backend": lambda line: line["backend"],
    "solver": lambda line: line["solver"],
}
TOLERANCE: dict[str, Callable[[Line], str]] = {
    "tolerance": lambda line: "" if line.get("tolerance") is None else f"tolerance {line['tolerance']:g}"
}
DATA: dict[str, Callable[[Line], str]] = {"data": lambda line: line["data"]}
DIM: dict[str, Callable[[Line], str]] = {"dim": lambda line: f"D = {line['shape'][3]}"}


def _by_ridge(line: Line) -> tuple[bool, Any]:
    """The order of numbers, then of what has one of its own."""
    return isinstance(line["ridge"], str), line["ridge"]


def _plain(axis: Any) -> None:
    """Numbers as 0.02 and 20, not 2 x 10^-2."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _saved(figure: Any, legend: dict[str, Any], path: Path) -> Path:
    figure.legend(handles=list(legend.values()), loc="outside right upper", frameon=False)
    figure.get_layout_engine().set(wspace=0.05)
    figure.savefig(path, dpi=120)
    return path


def _times(series: list[list[Line]], path: Path) -> Path:
    """A panel for each head dim and pass; a line for each ridge, and softmax attention's."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = [line for some in series for line in some]
    dims, passes = sorted({line["shape"][3] for line in lines}), list(dict.fromkeys(line["pass"] for line in lines))
    ridges = list(dict.fromkeys(line["ridge"] for line in sorted(lines, key=_by_ridge, reverse=True)))
    shade = dict(zip(ridges, colormaps["viridis_r"]([(i + 1) / (len(ridges) + 0.5) for i in range(len(ridges))])))
    name = naming(lines, {**BACKEND, **DATA, **TOLERANCE})
    mark = dict(zip(dict.fromkeys(map(name, lines)), MARKERS * len(lines)))
    lengths = sorted({line["shape"][2] for line in lines})

    figure = Figure(figsize=(1.5 + 4.2 * len(passes), 1 + 3.4 * len(dims)), layout="constrained")
    panels = figure.subplots(len(dims), len(passes), squeeze=False, sharex=True, sharey=True)
    legend: dict[str, Any] = {}
    for dim, row in zip(dims, panels):
        for which, axes in zip(passes, row):
            here = [some for some in series if (some[0]["shape"][3], some[0]["pass"]) == (dim, which)]
            axes.set(title=f"{which}, D = {dim}", xscale="log", yscale="log")
            for some in sorted(here, key=lambda some: ridges.index(some[0]["ridge"])):
                first = some[0]
                label = ", ".join(filter(None, ["LLA", name(first), f"lambda = {ridge_name(first)}"]))
                (legend[label],) = axes.plot(
                    *by_length(some, "ms"), color=shade[first["ridge"]], marker=mark[name(first)], label=label
                )
            if here:
                (legend["softmax (SDPA)"],) = axes.plot(
                    *by_length([line for some in here for line in some], "sdpa_ms"), "k.--", label="softmax (SDPA)"
                )
            axes.set_xticks(lengths, list(map(str, lengths)))
            axes.minorticks_off()
            _plain(axes.yaxis)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    for axes in panels[:, 0]:
        axes.set_ylabel("milliseconds a head")
    return _saved(figure, legend, path)


def _errors(lines: list[Line], path: Path) -> Path:
    """Of the length that most lines have: error against time beside SDPA, a line through the ridges of one kind."""
    from matplotlib.figure import Figure

    length = statistics.mode(line["shape"][2] for line in lines)
    lines = [line for line in lines if line["shape"][2] == length]
    passes = grouped(lines, lambda line: line["pass"])
    name = naming(lines, {**BACKEND, **DIM, **DATA, **TOLERANCE})
    colour = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(map(name, lines)))}

    figure = Figure(figsize=(1.5 + 4.8 * len(passes), 4.2), layout="constrained")
    legend: dict[str, Any] = {}
    for axes, (which, here) in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes.items()):
        axes.set(title=f"{which}, {length} tokens", xscale="log", yscale="log")
        for label, some in grouped(here, name).items():
            some = sorted(some, key=_by_ridge)
            points = [line["ratio"] for line in some], [line["error"] for line in some]
            (legend[label],) = axes.plot(*points, "o-", color=colour[label], label=label or "LLA")
            for line, x, y in zip(some, *points):
                axes.annotate(ridge_name(line), (x, y), (4, 4), textcoords="offset points", fontsize="small")
        axes.set(xlabel="times as long as SDPA (at each point: lambda)", ylabel="relative error to float64")
        axes.margins(0.1)
        _plain(axes.xaxis)
        axes.grid(alpha=0.3)
    return _saved(figure, legend, path)
