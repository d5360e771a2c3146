"""What benchmarks/run.py makes of its lines: a table, plots, and a comparison with an earlier run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
KEY = ("shape", "dtype", "data", "ridge", "pass", "backend", "solver")  # what makes two lines the same measurement
MARGIN = 0.05  # how much slower a line must be to count

LEGEND = """\
- **shape**: batch x heads x tokens x head dim. **x SDPA**: time beside torch's causal `scaled_dot_product_attention`
  of the same shape and dtype in the same run.
- **iterations**, **converged**: mean over all queries of the forward solve, and the share that reached its tolerance.
- **error**: relative, in the Frobenius norm, to float64 in sampled rows: of the output (forward), of dq (backward), the
  larger of the two (both, graph).
- **TFLOP/s**: products of visible pairs as `benchmarks/run.py` counts them; **of matmul**: beside a large matrix
  product of the same dtype in the same run."""


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def name(line: Line) -> str:
    return " ".join(shape_name(line[k]) if k == "shape" else f"{line[k]:g}" if k == "ridge" else line[k] for k in KEY)


def _cell(key: str, form: str) -> Callable[[Line], str]:
    """What a line has under ``key``; nothing where it has none."""
    return lambda line: "" if line.get(key) is None else format(line[key], form)


COLUMNS: dict[str, tuple[int, Callable[[Line], str]]] = {  # of the table: heading, width and content
    "shape": (14, lambda line: shape_name(line["shape"])),
    "data": (10, _cell("data", "")),
    "lambda": (6, _cell("ridge", "g")),
    "pass": (8, _cell("pass", "")),
    "backend": (10, _cell("backend", "")),
    "solver": (7, _cell("solver", "")),
    "ms": (9, _cell("ms", ".3f")),
    "SDPA, ms": (9, _cell("sdpa_ms", ".3f")),
    "x SDPA": (7, _cell("ratio", ".2f")),
    "iterations": (10, _cell("iterations", ".1f")),
    "converged": (9, _cell("converged", ".4f")),
    "error": (7, _cell("error", ".1e")),
    "TFLOP/s": (7, _cell("tflops", ".3g")),
    "of matmul": (9, _cell("of_matmul", ".0%")),
    "SDPA, TFLOP/s": (13, _cell("sdpa_tflops", ".3g")),
    "failed": (6, lambda line: line.get("failed", "").replace("|", "/")),
}


def heading() -> str:
    widths = [width for width, _ in COLUMNS.values()]
    return f"{_row(list(COLUMNS))}\n|{'|'.join('-' * (width + 2) for width in widths)}|"


def row(line: Line) -> str:
    return _row([content(line) for _, content in COLUMNS.values()])


def _row(cells: list[str]) -> str:
    padded = [cell.ljust(width) for cell, (width, _) in zip(cells, COLUMNS.values(), strict=True)]
    return f"| {' | '.join(padded)} |"


def markdown(result: dict[str, Any], plots: Sequence[Path] = ()) -> str:
    versions = ", ".join(f"{p} {result[p]}" for p in ("flashlla", "torch", "triton", "python") if result[p])
    text = f"# {result['device']}, {result['dtype']}, {result['date']}\n\n`{result['command']}`; {versions}; "
    text += f"threads: {result['threads']}. A large matrix product reaches {result['matrix_tflops']:.4g} TFLOP/s.\n\n"
    text += f"{LEGEND}\n\n{heading()}\n"
    text += "".join(f"{row(line)}\n" for line in result["lines"])
    return text + "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """What to say of two runs, and whether the new one is no slower than the old one."""
    said = []
    if old["device"] != new["device"]:
        said.append(f"the devices differ: {old['device']} before, {new['device']} now")
    identity = lambda line: tuple(map(str, (line[k] for k in KEY)))
    before = {identity(line): line for line in old["lines"] if "failed" not in line}
    common = [(before[identity(line)], line) for line in new["lines"] if identity(line) in before]
    slower = 0
    for then, now in common:
        if "failed" in now:
            said.append(f"fails now: {name(now)}: {now['failed']}")
        elif now["ratio"] > (1 + MARGIN) * then["ratio"]:
            change = now["ratio"] / then["ratio"] - 1
            said.append(f"slower: {name(now)}: {then['ratio']:.2f} to {now['ratio']:.2f} x SDPA (+{change:.0%})")
        else:
            continue
        slower += 1
    said.append(f"{len(common)} lines in common, {slower} slower (by more than {MARGIN:.0%}) or failing")
    return said, bool(common) and slower == 0


def plot(lines: list[Line], path: Path) -> list[Path]:
    """Draw beside ``path`` what there is to draw; the files."""
    lines = [line for line in lines if "failed" not in line]
    lengths: dict[str, set[int]] = {}
    for line in lines:
        lengths.setdefault(line["pass"], set()).add(line["shape"][2])
    drawn = []
    if several := [line for line in lines if len(lengths[line["pass"]]) > 1]:
        drawn.append(_plot_times(several, path.with_name(f"{path.stem}_time.png")))
    if lines:
        drawn.append(_plot_errors(lines, path.with_name(f"{path.stem}_error.png")))
    return drawn


def _labels(lines: list[Line], keys: Sequence[str]) -> list[str]:
    """Of each line the backend, and what else is not the same in all."""
    parts: dict[str, Callable[[Line], str]] = {
        "backend": lambda line: line["backend"],
        "solver": lambda line: line["solver"],
        "dim": lambda line: f"D {line['shape'][3]}",
        "data": lambda line: line["data"],
        "ridge": lambda line: f"lambda {line['ridge']:g}",
    }
    varied = [parts[k] for k in keys if k == "backend" or len({parts[k](line) for line in lines}) > 1]
    return [", ".join(part(line) for part in varied) for line in lines]


def _panels(lines: list[Line], draw: Callable[[Any, list[Line]], None], path: Path) -> Path:
    """One for each pass, with logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    passes = list(dict.fromkeys(line["pass"] for line in lines))
    figure = Figure(figsize=(6.5 * len(passes), 5), layout="constrained")
    for axes, which in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes):
        axes.set(title=which, xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))  # 20, not 2 x 10^1
        axes.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
        draw(axes, [line for line in lines if line["pass"] == which])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path, dpi=120)
    return path


def _plot_times(lines: list[Line], path: Path) -> Path:
    """Time against length, divided by batch x heads so that runs of different ones stand on one line."""

    def draw(axes: Any, lines: list[Line]) -> None:
        curves: dict[str, dict[int, list[float]]] = {}  # SDPA is timed for each kind of data
        for line, label in zip(lines, _labels(lines, ("backend", "solver", "dim", "data", "ridge"))):
            batch, heads, length, dim = line["shape"]
            for curve, ms in ((label, line["ms"]), (f"SDPA, D {dim}", line["sdpa_ms"])):
                curves.setdefault(curve, {}).setdefault(length, []).append(ms / (batch * heads))
        for label, points in sorted(curves.items()):
            middle = [(n, statistics.median(points[n])) for n in sorted(points)]
            axes.plot(*zip(*middle), "k.--" if label.startswith("SDPA") else "o-", label=label)
        lengths = sorted({line["shape"][2] for line in lines})
        axes.set_xticks(lengths, list(map(str, lengths)))
        axes.minorticks_off()
        axes.set(xlabel="tokens", ylabel="milliseconds a head")

    return _panels(lines, draw, path)


def _plot_errors(lines: list[Line], path: Path) -> Path:
    """Error against time beside SDPA, which shapes have in common; each point with its ridge."""

    def draw(axes: Any, lines: list[Line]) -> None:
        labels = _labels(lines, ("backend", "solver", "dim", "data"))
        for label in dict.fromkeys(labels):
            some = [line for line, other in zip(lines, labels) if other == label]
            axes.plot([line["ratio"] for line in some], [line["error"] for line in some], "o", label=label)
        for line in lines:
            axes.annotate(f" {line['ridge']:g}", (line["ratio"], line["error"]), fontsize="x-small")
        axes.set(xlabel="time beside SDPA (numbers: lambda)", ylabel="relative error to float64")

    return _panels(lines, draw, path)
