"""What `run` makes of its lines: a table, and a comparison with an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# What makes two lines the same measurement. Runs of before there were tolerances and windows say nothing of them.
KEY = ("shape", "dtype", "data", "ridge", "tolerance", "window", "pass", "backend", "solver")
MARGIN = 0.05  # how much slower a line must be to count

LEGEND = """\
- **shape**: batch x heads x tokens x head dim. **tolerance**: of the solver; empty: the default.
- **ms**, **graph, ms**: of eager calls, and replayed from CUDA graphs. **x SDPA**: time beside torch's causal
  `scaled_dot_product_attention` of the same shape and dtype in the same run; with a window, beside plain causal Local
  Linear Attention, a visible pair of query and key.
- **iterations**, **converged**: mean over all queries of the forward solve, and the share that reached its tolerance.
- **error**: relative, in the Frobenius norm, to float64 in sampled rows: of the output (forward), of dq (backward), the
  larger of the two (both).
- **TFLOP/s**: products of visible pairs as `python -m benchmarks run --help` counts them; **of matmul**: beside a large
  matrix product of the same dtype in the same run."""


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def ridge_name(line: Line) -> str:
    """A number, or that trained keys have their own."""
    return line["ridge"] if isinstance(line["ridge"], str) else f"{line['ridge']:g}"


def name(line: Line) -> str:
    said = {"shape": shape_name(line["shape"]), "ridge": ridge_name(line)}
    for key in ("tolerance", "window"):
        said[key] = "" if line.get(key) is None else f"{key} {line[key]:g}"
    return " ".join(filter(None, (said.get(key, line.get(key)) for key in KEY)))


def _cell(key: str, form: str) -> Callable[[Line], str]:
    """What a line has under ``key``; nothing where it has none."""
    return lambda line: "" if line.get(key) is None else format(line[key], form)


COLUMNS: dict[str, tuple[int, Callable[[Line], str]]] = {  # of the table: heading, width and content
    "shape": (14, lambda line: shape_name(line["shape"])),
    "data": (14, _cell("data", "")),
    "lambda": (7, ridge_name),
    "tolerance": (9, _cell("tolerance", "g")),
    "window": (6, _cell("window", "")),
    "pass": (8, _cell("pass", "")),
    "backend": (10, _cell("backend", "")),
    "solver": (7, _cell("solver", "")),
    "ms": (9, _cell("ms", ".3f")),
    "x SDPA": (7, _cell("ratio", ".2f")),
    "graph, ms": (9, _cell("graph_ms", ".3f")),
    "graph, x SDPA": (13, _cell("graph_ratio", ".2f")),
    "iterations": (10, _cell("iterations", ".1f")),
    "converged": (9, _cell("converged", ".4f")),
    "error": (7, _cell("error", ".1e")),
    "TFLOP/s": (7, _cell("tflops", ".3g")),
    "of matmul": (9, _cell("of_matmul", ".0%")),
    "SDPA, ms": (8, _cell("sdpa_ms", ".3f")),
    "SDPA, graph, ms": (15, _cell("graph_sdpa_ms", ".3f")),
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
    identity = lambda line: tuple(map(str, map(line.get, KEY)))
    before = {identity(line): line for line in old["lines"] if "failed" not in line}
    common = [(before[identity(line)], line) for line in new["lines"] if identity(line) in before]
    slower = 0
    for then, now in common:
        if "failed" in now:
            said.append(f"fails now: {name(now)}: {now['failed']}")
            slower += 1
            continue
        for ratio, how in (("ratio", ""), ("graph_ratio", " from a graph")):
            if ratio in then and ratio in now and now[ratio] > (1 + MARGIN) * then[ratio]:
                change = now[ratio] / then[ratio] - 1
                said.append(f"slower{how}: {name(now)}: {then[ratio]:.2f} to {now[ratio]:.2f} x SDPA (+{change:.0%})")
                slower += 1
    said.append(f"{len(common)} lines in common, {slower} slower (by more than {MARGIN:.0%}) or failing")
    return said, bool(common) and slower == 0
