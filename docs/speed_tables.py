"""The tables of README.md, docs/performance.md and docs/distributed.md that hold recorded figures: ``python
docs/speed_tables.py`` writes them anew, from the records in benchmarks/results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "distributed.md")
BLOCK = re.compile(r"(<!-- table (\S+), written by docs/speed_tables\.py -->\n).*?(<!-- end -->\n)", re.DOTALL)
KEYS = {"trained_qknorm": "trained, with qk-norm", "trained": "trained", "power_law": "power law with an offset"}
KEYS["sharp"] = "sharp softmax"
# Of the kernels published with the paper, beside the same yardstick on an H200: forward and backward.
PUBLISHED = {64: "61x, 32x", 128: "71x, 48x"}
# Of the README: batch x heads, tokens, head dim, data, ridge.
SHOWN = [
    (192, 1024, 64, "trained_qknorm", "learned"), (192, 512, 64, "trained_qknorm", "learned"),
    (64, 1024, 64, "iid", 10), (64, 4096, 64, "iid", 10), (64, 4096, 64, "iid", 1), (64, 4096, 64, "iid", 0.1),
    (64, 4096, 64, "correlated", 0.1), (64, 4096, 64, "sharp", 0.1), (32, 4096, 128, "iid", 10),
    (32, 4096, 128, "iid", 0.1), (8, 65536, 64, "iid", 10),
]  # fmt: skip

# What was wanted of a call beside softmax attention, of forward and backward: batch x heads, tokens, head dim, data,
# ridge, tolerance.
WANTED_CALLS: dict[tuple[Any, ...], tuple[str, ...]] = {
    (192, 1024, 64, "trained_qknorm", "learned", None): ("11x", "5x"),
    (192, 1024, 64, "trained_qknorm", "learned", 0.1): ("7x", "4x"),
    (192, 512, 64, "trained_qknorm", "learned", None): ("8x",),
    (192, 256, 64, "iid", 1, None): ("5.5x",),
    (192, 512, 128, "iid", 1, None): ("18x",),
    (64, 4096, 64, "iid", 10, None): ("4.8x", "4x"),
    (64, 4096, 64, "iid", 0.1, None): ("9.5x", "5.5x"),
    (32, 4096, 128, "iid", 10, None): ("7x", "4.8x"),
    (32, 4096, 128, "iid", 0.1, None): ("15x", "8x"),
}
# By head dim, of a visible pair with a window beside one without.
WANTED_WINDOWS = {64: ("1.4", "1.4"), 128: ("1.6", "1.5")}
# Of forward passes: sweeps over the keys, of as many iterations as the slowest query of a tile takes; microseconds of
# one product and of all products at the rate of a large one; ratio of the plain kernels.
FLOORS: dict[tuple[Any, ...], tuple[str, str, int, str]] = {
    (192, 1024, 64, "trained_qknorm", "learned", None): ("8.5", "16.3", 496, "15.6x"),
    (192, 1024, 64, "trained_qknorm", "learned", 0.1): ("4.2", "16.3", 286, "10.2x"),
    (192, 512, 64, "trained_qknorm", "learned", None): ("8.6", "4.1", 125, "14.6x"),
    (192, 256, 64, "iid", 1, None): ("8.7", "1.0", 32, "13.4x"),
    (192, 512, 128, "iid", 1, None): ("9.6", "8.2", 275, "42.8x"),
    (64, 4096, 64, "iid", 10, None): ("1.2", "87", 838, "5.6x"),
    (64, 4096, 64, "iid", 0.1, None): ("5.4", "87", 1925, "11.2x"),
    (32, 4096, 128, "iid", 10, None): ("1.6", "87", 944, "8.8x"),
    (32, 4096, 128, "iid", 0.1, None): ("7.2", "87", 2411, "19.4x"),
}
# Microseconds that decoding was to take: sequences, keys, head dim.
WANTED = {(1, 512, 128): "35", (1, 4096, 128): "45", (1, 16384, 128): "75"}
WANTED |= {(32, 512, 128): "90", (32, 4096, 128): "350", (32, 16384, 128): "1200"}

# Of the timeline: the how-manieth time that the record has it.
EVENTS = {
    ("sends", 1): "the first gather is begun",
    ("sends", 2): "the second is",
    ("in order", 1): "keys of the first heads are there and in order",
    ("part begins", 1): "their first part begins",
    ("part ends", 1): "it has ended",
    ("in order", 2): "keys of the other heads are there and in order",
    ("part ends", 2): "the first heads' second part has ended",
    ("part ends", 4): "the other heads' second part has",
    ("ends", 1): "all has",
}

Line = dict[str, Any]


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def kept(name: str) -> dict[str, Any]:
    """The same; nothing where there is no such record."""
    try:
        return record(name)
    except FileNotFoundError:
        return {}


def table(headings: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Markdown, without columns that are empty; nothing where there are no rows."""
    cells = list(rows)
    used = [i for i in range(len(headings)) if any(row[i] for row in cells)]
    lines = [[row[i] for i in used] for row in (headings, ["---"] * len(headings), *cells)] if cells else []
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}x"


def span(some: Sequence[float]) -> str:
    """From the least to the most."""
    return " to ".join(dict.fromkeys((f"{min(some):.2f}", f"{max(some):.2f}")))


def calls(window: bool = False) -> dict[tuple[Any, ...], dict[str, Line]]:
    """Lines of `run` by (batch x heads, tokens, head dim, data, ridge, tolerance), and by pass."""
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in record("run_h100")["lines"]:
        if "failed" not in line and (line.get("window") is not None) == window:
            batch, heads, length, dim = line["shape"]
            key = batch * heads, length, dim, line["data"], line["ridge"], line.get("tolerance")
            found.setdefault(key, {})[line["pass"]] = line
    return found


def named(key: tuple[Any, ...]) -> list[str]:
    """Cells of a row: sizes, keys, ridge, tolerance."""
    pairs, length, dim, data, ridge, tolerance = key
    ridge = ridge if isinstance(ridge, str) else f"{ridge:g}"
    return [f"{pairs}, {length}, {dim}", KEYS.get(data, data), ridge, "" if tolerance is None else f"{tolerance:g}"]


def speed() -> str:
    """All calls: kernels' time from CUDA graphs, and in brackets that of eager calls, beside softmax attention's."""

    def beside(line: Line | None) -> str:
        if line is None:
            return ""
        graph, eager = line.get("graph_ratio"), times(line["ratio"])
        return eager if graph is None else f"{times(graph)} ({eager})"

    def rows() -> Iterator[list[str]]:
        for key, passes in calls().items():
            of = {which: beside(passes.get(which)) for which in ("forward", "backward", "both")}
            solved = passes["forward"]
            yield [
                *named(key),
                *of.values(),
                f"{solved['iterations']:.1f}",
                f"{solved['error']:.1e}".replace("e-0", "e-"),
            ]

    headings = ["batch x heads, S, D", "keys", "lambda", "tolerance", "forward", "backward", "step", "iterations"]
    return table([*headings, "error of o"], rows())


def cost() -> str:
    """The same of a few calls, kernels alone."""

    def rows() -> Iterator[list[str]]:
        ratio = lambda line: "" if line is None else times(line.get("graph_ratio", line["ratio"]))
        for key, passes in calls().items():
            if key[:-1] in SHOWN:
                known = PUBLISHED[key[2]] if key[1] == 4096 and key[3:5] in (("iid", 10), ("iid", 0.1)) else ""
                yield [*named(key), *(ratio(passes.get(which)) for which in ("forward", "backward")), known]

    return table(["batch x heads, tokens, D", "keys", "ridge", "tolerance", "forward", "backward", "published"], rows())


def floors() -> str:
    """What forward passes would take of softmax attention's time were products all they did, and what they take."""

    def rows() -> Iterator[list[str]]:
        for key, (sweeps, product, floor, plain) in FLOORS.items():
            if (line := calls().get(key, {}).get("forward")) is None or "graph_ratio" not in line:
                continue
            softmax = line["graph_sdpa_ms"] * 1e3
            ratios = times(floor / softmax), WANTED_CALLS[key][0], plain, times(line["graph_ratio"])
            yield [
                *named(key),
                sweeps,
                product,
                str(floor),
                f"{softmax:.0f}",
                *ratios,
                f"{floor / line['graph_ms'] / 10:.0f} %",
            ]

    headings = ["batch x heads, S, D", "keys", "lambda", "tolerance", "sweeps", "a product, us", "floor, us"]
    return table([*headings, "softmax, us", "floor", "wanted", "plain kernels", "now", "floor of now"], rows())


def windows() -> str:
    """Time a visible pair beside plain causal attention."""

    def rows() -> Iterator[list[str]]:
        for key, passes in calls(window=True).items():
            size = f"{key[0]}, {key[1]}, {key[2]}"
            ratio = (
                f"{passes[which].get('graph_ratio', passes[which]['ratio']):.2f}" for which in ("forward", "backward")
            )
            yield [size, str(passes["forward"]["window"]), *named(key)[2:3], *ratio]

    return table(["batch x heads, S, D", "window", "lambda", "forward", "backward"], rows())


def model() -> str:
    """A training step of the byte-level model."""

    def rows() -> Iterator[list[str]]:
        for line in record("model_h100")["rows"]:
            tolerance = "" if line["tolerance"] is None else f"{line['tolerance']:g}"
            ratio, added = (f"{line[key]:.2f}" if key in line else "" for key in ("ratio", "added_ms"))
            name = {"softmax": "softmax", "lla": "LLA"}[line["attention"]]
            yield [name, tolerance, line["mode"], f"{line['ms']:.1f}", ratio and f"{ratio}x", added]

    return table(["attention", "tolerance", "mode", "ms a step", "beside softmax", "added a layer, ms"], rows())


def first() -> str:
    """Seconds of the first forward and backward pass in a process."""

    def rows() -> Iterator[list[str]]:
        found: dict[str, dict[str, Line]] = {}
        for line in record("first_h100")["first"]:
            batch, heads, length, dim = line["shape"]
            found.setdefault(f"{batch * heads}, {length}, {dim}", {})[line["what"]] = line
        for size, by in found.items():
            kernels = str(len(by["empty cache"]["compiled"]))
            order = "one by one", "empty cache", "full cache"
            seconds = (f"{by[what]['first_s']:.1f}" if what in by else "" for what in order)
            yield [size, kernels, *seconds]

    return table(["batch x heads, S, D", "kernels", "one by one", "side by side", "from disk"], rows())


def host() -> str:
    """Microseconds of calls, from one to the next, of the host."""
    median = lambda line, key: f"{line[key]['median']:.0f}" if key in line else ""

    def rows() -> Iterator[list[str]]:
        found = record("host_h100")
        for line in found["host"]:
            size = f"{line['batch_heads']}, {line['length']}, {line['dim']}"
            keys = "forward_us", "step_us", "compiled_us", "new_length_us", "sdpa_forward_us", "sdpa_step_us"
            yield [size, *(median(line, key) for key in (*keys, "sdpa_compiled_us"))]
        for line in found["decoding"]:
            size = f"decode, {line['batch']} x 8, {line['room']}, {line['dim']}"
            yield [size, median(line, "decode_us"), "", "", "", median(line, "sdpa_us"), "", ""]

    headings = ["forward", "step", "compiled step", "step at a new length", "softmax: forward", "step", "compiled step"]
    return table(["batch x heads, S, D", *headings], rows())


def decode() -> str:
    """Decoding: calls, and each kernel by itself."""

    def rows() -> Iterator[list[str]]:
        for line in record("decode_h100")["speed"]:
            us, size = line["us"], (line["batch"], line["length"], line["dim"])
            beside = (f"{us / line[key]:.2f}" for key in ("sdpa_us", "ideal_us"))
            kernels = ", ".join(f"{t:.0f}" for t in line["kernels_us"].values())
            error = f"{line['error']:.1e}".replace("e-0", "e-")
            yield [", ".join(map(str, size)), f"{us:.0f}", WANTED.get(size, ""), *beside, kernels, error]

    headings = ["B, L, D", "microseconds", "wanted", "beside SDPA", "beside reading the cache once"]
    return table([*headings, "moments, solve", "error"], rows())


def wanted() -> str:
    """What was wanted, and what the records have."""

    def of_calls() -> Iterator[Sequence[str]]:
        of = lambda line: line.get("graph_ratio", line["ratio"])
        for key, figures in WANTED_CALLS.items():
            if (passes := calls().get(key)) is not None:
                found = [times(of(passes[which])) for which, _ in zip(("forward", "backward"), figures)]
                size, data, ridge, tolerance = named(key)
                what = f"{size}, {data}, lambda {ridge}" + (f", tolerance {tolerance}" if tolerance else "")
                yield f"{what}: {'forward, backward' if len(figures) > 1 else 'forward'}", ", ".join(figures), found
        for key, passes in calls(window=True).items():
            found = [f"{of(passes[which]):.2f}" for which in ("forward", "backward")]
            yield f"{key[0]}, {key[1]}, {key[2]}, window 512, a pair", ", ".join(WANTED_WINDOWS[key[2]]), found

    def of_others() -> Iterator[Sequence[str]]:
        of_host = kept("host_h100")
        kinds = {
            "forward": ("forward, eager", "0.2"),
            "step": ("step, eager", "0.6"),
            "compiled": ("compiled step", "0.6"),
        }
        for name, (kind, most) in kinds.items():
            if lines := [line[f"{name}_us"] for line in of_host.get("host", []) if f"{name}_us" in line]:
                added = of_host["parts"]["addition_us"]["median"]
                what = f"milliseconds of the host, {kind} (an addition: {added:.1f} us)"
                some, least = (span([line[which] / 1e3 for line in lines]) for which in ("median", "least"))
                yield what, most, [f"{some}, at the least {least}"]
        of_model = {(line["mode"], line["tolerance"]): line for line in kept("model_h100").get("rows", [])}
        if line := of_model.get(("eager", 0.1)):
            yield "a model's step beside softmax's, eager, tolerance 0.1", "1.35x", [f"{line['ratio']:.2f}x"]
        if line := of_model.get(("compiled", 0.01)):
            what = "milliseconds that a layer adds to it, compiled, tolerance 0.01"
            yield what, "2", [f"{line['added_ms']:.2f}"]
        for line in kept("decode_h100").get("speed", []):
            size = line["batch"], line["length"], line["dim"]
            if size in WANTED:
                yield f"decode {', '.join(map(str, size))}, microseconds", WANTED[size], [f"{line['us']:.0f}"]
        for line in kept("first_h100").get("first", []):
            if line["what"] == "empty cache":
                yield "seconds of the first forward and backward, empty cache", "12", [f"{line['first_s']:.1f}"]

    rows = ((what, figures, ", ".join(found)) for some in (of_calls, of_others) for what, figures, found in some())
    return table(["what", "wanted", "measured"], rows)


def surface() -> str:
    """Masks and shared heads: time a visible pair beside plain causal attention, forward and backward."""

    def rows() -> Iterator[list[str]]:
        found: dict[str, dict[int, str]] = {}
        for line in record("gpu_h100").get("surface", []):
            pair = f"{line['forward_a_pair']:.2f}, {line['backward_a_pair']:.2f}"
            found.setdefault(line["what"], {})[line["dim"]] = pair
        for what, by_dim in found.items():
            if what != "causal":
                yield [what, *(by_dim.get(dim, "") for dim in (64, 128))]

    return table(["", "D = 64", "D = 128"], rows())


def accuracy() -> str:
    """Relative errors: of o in the first 128 rows and in later ones, and of the gradients."""
    short = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}

    def rows() -> Iterator[list[str]]:
        found = kept("gpu_h100")
        lines: dict[str, list[Line]] = {}
        for line in found.get("accuracy", []):
            if line["backend"] == "triton":
                lines.setdefault(f"4096, {line['dim']}, {short[line['dtype']]}", []).append(line)
        for line in found.get("offset", []):
            lines.setdefault(f"1024, {line['dim']}, bf16, keys offset by {float(line['offset']):.0f}", []).append(line)
        for line in found.get("single", []):
            lines.setdefault(f'1024, {line["dim"]}, float32, "{line["precision"]}"', []).append(line)
        for what, some in lines.items():
            for line in some:
                names = "o_first_128", "o_later", "dq", "dk", "dv", "dridge"
                yield [what, f"{line['ridge']:g}", *(f"{line[name]:.1e}".replace("e-0", "e-") for name in names)]

    return table(["S, D, dtype", "lambda", "o, rows < 128", "later rows", "dq", "dk", "dv", "dlambda"], rows())


def memory() -> str:
    """What a step holds, in sizes of q, beyond q, k, v and o."""

    def rows() -> Iterator[list[str]]:
        for line in kept("gpu_h100").get("memory", []):
            size = f"{line['batch_heads']}, {line['length']}, {line['dim']}"
            yield [size, *(f"{line[name]:.2f}" for name in ("kept", "peak"))]

    return table(["batch x heads, S, D", "kept for backward", "at the peak, beyond gradients"], rows())


def passes() -> str:
    """Microseconds of each pass of a step."""
    lines = record("gpu_h100").get("speed", [])
    names = list(dict.fromkeys(name for line in lines for name in line["passes_ms"]))

    def rows() -> Iterator[list[str]]:
        for line in lines:
            size = f"{line['batch_heads']}, {line['length']}, {line['dim']}, {line['data']}, lambda {line['ridge']:g}"
            times_of = line["passes_ms"]
            yield [size, *(f"{times_of[name] * 1e3:.0f}" if name in times_of else "" for name in names)]

    return table(["", *names], rows())


def distributed() -> str:
    """Forward passes and steps of one sequence over several GPUs: seconds, efficiencies and GiB at the peak."""
    of_method = {
        "forward": ("forward_s", "{:.4f}"), "efficiency": ("forward_efficiency", "{:.0%}"),
        "step": ("step_s", "{:.4f}"), "of the step": ("step_efficiency", "{:.0%}"), "GiB": ("peak_gib", "{:.1f}"),
        "NCCL": ("nccl_s", "{:.4f}"), "exposed": ("nccl_exposed_s", "{:.4f}"), "imbalance": ("imbalance", "{:.3f}"),
    }  # fmt: skip

    def rows() -> Iterator[list[str]]:
        lines = [line for name in ("distributed_h100", "distributed_long_h100") for line in record(name)["speed"]]
        for line in sorted(lines, key=lambda line: (line["length"], line["gpus"])):
            for prefix, method in {"": "all_gather" if line["gpus"] > 1 else "", "all_to_all_": "all_to_all"}.items():
                if f"{prefix}step_s" in line:
                    cells = ((line.get(prefix + name), form) for name, form in of_method.values())
                    told = ("" if x is None else form.format(x) for x, form in cells)
                    yield [str(line["length"]), str(line["gpus"]), method, *told]

    return table(["S", "GPUs", "method", *of_method], rows())


def distributed_turns() -> str:
    """Efficiencies of several GPUs at the fewest tokens, of rounds in turn, by how calls are made: milliseconds."""
    hows = {"": "by itself", "row_": "in a row", "graph_": "from a graph"}
    names = [(f"{how}{what}", f"{what} {told}") for how, told in hows.items() for what in ("forward", "step")]

    def rows() -> Iterator[list[str]]:
        for line in record("distributed_h100").get("turns", ()):
            for prefix, method in {"": "all_gather" if line["gpus"] > 1 else "", "all_to_all_": "all_to_all"}.items():
                if f"{prefix}step_s" in line:
                    cells = [str(line["gpus"]), method]
                    for name, _ in names:
                        efficiency = line.get(f"{prefix}{name}_efficiency")
                        beside = "" if efficiency is None else f", {efficiency:.1%}"
                        cells.append(f"{1e3 * line[f'{prefix}{name}_s']:.1f}{beside}")
                    yield cells

    return table(["GPUs", "method", *(told for _, told in names)], rows())


def distributed_ways() -> str:
    """All_gather in other ways: medians, milliseconds."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in record("distributed_ways_h100")["lines"]:
        what = ("one GPU",) * (line["gpus"] == 1) or (
            line["keys"], *(", ".join(map(str, line[name])) for name in ("heads", "priorities")), line["nccl"],
            {"head": "first", "tail": "second"}[line["first"]],
        )  # fmt: skip
        found.setdefault(what, []).append(line)

    def rows() -> Iterator[list[str]]:
        for what, lines in found.items():
            times = (statistics.median(line[f"{name}_s"] for line in lines) for name in names)
            yield [*what, *[""] * (5 - len(what)), str(len(lines)), *(f"{1e3 * x:.1f}" for x in times)]

    names = {"forward": "forward", "step": "step", "graph_forward": "graph: forward", "graph_step": "graph: step"}
    how = "keys", "heads at a time", "streams' priorities", "NCCL's stream", "chunk that comes first", "measured"
    return table([*how, *names.values()], rows())


def distributed_two() -> str:
    """Lone calls by all_gather on two GPUs, and some on four, in other ways: milliseconds, and efficiencies beside the
    mean of the cards."""
    kept = record("distributed_two_h100")

    def mean(gpus: int, what: str, way: str) -> float | None:
        """Of the pairs of cards; of one GPU of the cards. Copy engines had rounds of their own."""
        what = {"forward": "peers", "step": "peers step"}.get(what, what) if way.startswith("peer") else what
        of = [line for line in kept["lines"] if (line["gpus"], line["what"], line["way"]) == (gpus, what, way)]
        found = [x for line in of for x in (line["by_rank_ms"] if way == "one" else [line["ms"]])]
        return statistics.fmean(found) if found else None

    def rows() -> Iterator[list[str]]:
        for way, told in kept["ways"].items():
            cells = []
            for gpus, what in ((2, "forward"), (2, "step"), (2, "graph"), (4, "forward"), (4, "step")):
                took, one = mean(gpus, what, way), mean(gpus, what, "one")
                efficiency = f", {one / gpus / took:.1%}" if one and took and way != "one" else ""
                cells.append(f"{took:.1f}{efficiency}" if took else "")
            yield [told, *cells]

    names = "2 GPUs: forward", "step", "forward from a graph", "4 GPUs: forward", "step"
    return table(["keys, and heads at a time", *names], rows())


def distributed_timeline() -> str:
    """When a lone call's host and devices are where: milliseconds from its begin, by card."""
    lines = record("distributed_two_h100")["timeline"]

    def rows() -> Iterator[list[str]]:
        seen: dict[str, int] = {}
        there = {(tuple(line["cards"]), line["way"]): line["rows"] for line in lines}
        for i, row in enumerate(there[(0, 1), "main"]):
            seen[row["at"]] = nth = seen.get(row["at"], 0) + 1
            if (told := EVENTS.get((row["at"], nth))) is not None:
                cells = (x for cards in ((0, 1), (2, 3)) for x in _of_ranks(there[cards, "main"][i]))
                yield [told, *cells]

    cards = [f"card {card}: {what}" for card in range(4) for what in ("host", "device")]
    return table(["", *cards], rows())


def _of_ranks(row: Line) -> list[str]:
    return [f"{x:.2f}" for both in zip(row["host_ms"], row["device_ms"]) for x in both]


def distributed_groups() -> str:
    """All_gather with other numbers of heads at a time and of streams: milliseconds and GiB."""

    def rows() -> Iterator[list[str]]:
        for line in sorted(
            record("distributed_groups_h100")["lines"], key=lambda line: (line["length"], line["streams"])
        ):
            counts = (str(line[name]) for name in ("length", "streams", "key_heads_at_once"))
            yield [*counts, *(f"{1e3 * line[name]:.1f}" for name in ("forward_s", "step_s")), f"{line['peak_gib']:.1f}"]

    return table(["S", "streams", "key heads at a time", "forward", "step", "GiB"], rows())


def distributed_parts() -> str:
    """What calls by all_gather consist of on most GPUs, beside the same share of one GPU's: milliseconds."""
    columns: dict[str, dict[str, float]] = {}
    for which in ("forward", "step"):
        of_gpus = {line["gpus"]: line for line in record("distributed_h100")["parts"] if line["pass"] == which}
        gpus = max(of_gpus)
        one, several = of_gpus[1], of_gpus[gpus]
        columns[f"{which}: 1/{gpus} of one GPU's"] = {name: x / gpus for name, x in one["mean_s"].items()}
        columns[f"{which}: mean of {gpus}"] = several["mean_s"]
        columns[f"{which}: slowest"] = several["most_s"]
    names = sorted(several["mean_s"].keys() - {"elapsed", "none"}, key=lambda name: -several["mean_s"][name])

    def rows() -> Iterator[list[str]]:
        for name in [*names, "none", "elapsed"]:
            cells = (times.get(name, 0.0) for times in columns.values())
            yield [{"none": "none runs", "elapsed": "all"}.get(name, name), *(f"{1e3 * x:.2f}" for x in cells)]

    return table(["kernel", *columns], rows())


def distributed_decode() -> str:
    """A new token against a cache that lies on several GPUs: microseconds."""
    graphs = {line["gpus"]: line for line in record("distributed_h100")["decode_graph"]}

    def rows() -> Iterator[list[str]]:
        for line in record("distributed_h100")["decode"]:
            graph = graphs[line["gpus"]]
            times = line["us"], line["host_us"], graph["us"], line["pass_us"], line["other_us"]
            efficiency = f"{graph['efficiency']:.0%}" if "efficiency" in graph else ""
            yield [str(line["gpus"]), *(f"{x:.0f}" for x in times), efficiency]

    names = "a token", "of the host", "from a CUDA graph", "the pass over the cache", "other kernels, but NCCL's"
    return table(["GPUs", *names, "efficiency, from the graph"], rows())


def distributed_balance() -> str:
    """The most that a rank computes beside the mean, by iterations."""

    def rows() -> Iterator[list[str]]:
        for line in record("distributed_h100")["balance"]:
            keys = f"{KEYS.get(line['data'], line['data'])}, D = {line['dim']}, {line['tokens']} tokens"
            most = (f"{x:.3f}" for order in ("head_tail", "contiguous") for x in line[order].values())
            yield [keys, line["ridge"], f"{line['iterations']:.1f}", *most]

    ranks = [f"{order}, {n}" for order in ("head-tail", "contiguous") for n in (2, 4, 8)]
    return table(["keys", "ridge", "iterations", *ranks], rows())


TABLES: dict[str, Callable[[], str]] = {
    "host": host,
    "decode": decode,
    "speed": speed,
    "cost": cost,
    "floors": floors,
    "windows": windows,
    "model": model,
    "first": first,
    "wanted": wanted,
    "surface": surface,
    "accuracy": accuracy,
    "memory": memory,
    "passes": passes,
    "distributed": distributed,
    "distributed_turns": distributed_turns,
    "distributed_ways": distributed_ways,
    "distributed_two": distributed_two,
    "distributed_timeline": distributed_timeline,
    "distributed_groups": distributed_groups,
    "distributed_parts": distributed_parts,
    "distributed_decode": distributed_decode,
    "distributed_balance": distributed_balance,
}


def recorded() -> list[str]:
    """Names of the tables for which there are records."""

    def made(name: str) -> str:
        try:
            return TABLES[name]()
        except FileNotFoundError:
            return ""

    return [name for name in TABLES if made(name)]


def written(page: str) -> str:
    """``page`` with each table in its place."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
