"""Test-time regression: attention as an estimator of a function from the examples so far, with nothing trained.

    python -m examples.experiments.test_time_regression --quick    under a minute on a CPU
    python -m examples.experiments.test_time_regression            on a GPU; an hour or so on a CPU

Keys lie on the unit sphere in D dimensions, values are a function of the key, and noise. At each token the estimator
foretells the next token's value from its key and all pairs before it. Errors are mean squares of the distance to the
function without noise, in variances of the function. Four functions:

    segments    in each quarter of the sequence keys come from a region of their own, with a linear map of its own
    piecewise   keys come from all over the sphere, in any order; a ReLU network: piecewise linear and continuous
    smooth      the same keys; waves
    jumps       the same keys; each of four regions has a linear map of its own, and the function jumps between them

Softmax attention, ridge regression and Local Linear Attention are each given the scale and the ridge that are best on
other draws than those of which errors are reported, for each function, dimension and length anew.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.experiments.mixers import ridge_regression, softmax_attention
from examples.experiments.runs import DEVICE, MARKS, Run, dotted, parser_of, study
from flashlla import lla_attention

FUNCTIONS = ("segments", "piecewise", "smooth", "jumps")
REGIONS = 4
NOISE = 0.1  # standard deviation, of a function with variance 1
SCALES = tuple(2.0**i for i in range(-1, 11))
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # in a variance of keys along one axis, 1 / D
COUNTS = (1e-2, 1e-1, 1.0, 10.0)  # ridges of ridge regression, which sums over keys: worth so many of them
Setting = dict[str, float]
Estimator = Callable[[Tensor, Tensor, Tensor, Setting], Tensor]


def draw(function: str, draws: int, length: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (draws, 1, S + 1, D), values with noise and without (draws, 1, S + 1, D)."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    tokens = length + 1
    centres = F.normalize(normal(draws, REGIONS, dim), dim=-1)
    keys = F.normalize(normal(draws, tokens, dim), dim=-1)
    if function == "smooth":
        frequencies, phases = normal(draws, dim, dim), 2 * math.pi * torch.rand(draws, 1, dim, generator=generator)
        values = torch.sin(2 * keys @ frequencies + phases)
    elif function == "piecewise":
        values = (keys @ normal(draws, dim, 4 * dim)).relu() @ normal(draws, 4 * dim, dim)
    else:
        if function == "segments":
            region = (torch.arange(tokens) * REGIONS // tokens).expand(draws, tokens)
            centre = centres.gather(1, region[..., None].expand(-1, -1, dim))
            keys = F.normalize(centre + 0.5 * keys, dim=-1)
        else:
            region = (keys @ centres.mT).argmax(-1)  # (draws, tokens)
        each = torch.einsum("btd,bred->btre", keys, normal(draws, REGIONS, dim, dim))  # (draws, tokens, REGIONS, D)
        values = each.gather(2, region[..., None, None].expand(-1, -1, 1, dim)).squeeze(2)
    values = values / values.std(dim=(1, 2), keepdim=True)
    noisy = values + NOISE * normal(draws, tokens, dim)
    each_head = lambda t: t.float().unsqueeze(1).to(DEVICE)
    return each_head(keys), each_head(noisy), each_head(values)


def _softmax(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    return softmax_attention(q, k, v, setting["scale"])


def _ridge(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    constant = lambda t: F.pad(t, (0, 1), value=1.0)  # an intercept
    return ridge_regression(constant(q), constant(k), v, setting["count"] / k.shape[-1])


def _lla(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    ridge = setting["ridge"] / k.shape[-1]
    o: Tensor = lla_attention(q, k, v, qk_scale=setting["scale"], ridge_lambda=ridge, solver="direct")
    return o


ESTIMATORS: dict[str, tuple[Estimator, list[Setting]]] = {
    "softmax": (_softmax, [{"scale": scale} for scale in SCALES]),
    "ridge regression": (_ridge, [{"count": count} for count in COUNTS]),
    "LLA": (_lla, [{"scale": scale, "ridge": ridge} for scale, ridge in product(SCALES, RIDGES)]),
}


def errors(estimator: Estimator, setting: Setting, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(draws, S): of what is foretold at each token for the next."""
    keys, values, truth = drawn
    o = estimator(keys[:, :, 1:], keys[:, :, :-1], values[:, :, :-1], setting)
    return (o - truth[:, :, 1:]).square().mean((1, 3))


def spans(length: int, function: str) -> dict[str, Tensor]:
    """Tokens that settings are chosen for and errors are means over, by their last: (0, 16], (16, 32], (32, 64], ...

    For segments: the second half of each.
    """
    token = torch.arange(length)
    if function == "segments":
        return {str(length): token * 2 * REGIONS // length % 2 == 1}
    ends = [16 * 2**i for i in range(20) if 16 * 2**i <= length]
    return {str(end): (token >= (end // 2 if end > 16 else 0)) & (token < end) for end in ends}


def run(function: str, dim: int, length: int, draws: int, seed: int) -> Run:
    """Errors of each estimator at its best settings: by length, or in 64 parts of the sequence for segments."""
    generator = torch.Generator().manual_seed(seed)
    chosen_on, reported = (draw(function, draws, length, dim, generator) for _ in range(2))
    found: Run = {"function": function, "dim": dim, "length": length, "draws": draws, "seed": seed, "noise": NOISE}
    for name, (estimator, settings) in ESTIMATORS.items():
        tried = torch.stack([errors(estimator, setting, chosen_on).mean(0) for setting in settings])  # (settings, S)
        best = {end: int(tried[:, span].mean(1).argmin()) for end, span in spans(length, function).items()}
        of = {i: errors(estimator, settings[i], reported).mean(0) for i in set(best.values())}
        found[name] = {
            end: {"error": of[best[end]][span].mean().item(), **settings[best[end]]}
            for end, span in spans(length, function).items()
        }
        if function == "segments":
            (error,) = of.values()
            found[name]["along"] = [round(part.mean().item(), 6) for part in error.chunk(64)]
    return found


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.quick:
        options.dims, options.length, options.seeds = [4, 8], 512, [0]
    wanted = {
        f"{function} dim={dim} length={options.length} seed={seed}": partial(
            run, function, dim, options.length, options.draws, seed
        )
        for seed, dim, function in product(options.seeds, options.dims, FUNCTIONS)
    }
    return study(options, wanted, plot, table)


def groups(runs: dict[str, Run]) -> dict[tuple[str, int], list[Run]]:
    """Runs that differ in their seed alone, by function and dimension."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in runs.values():
        found.setdefault((run["function"], run["dim"]), []).append(run)
    return dict(sorted(found.items(), key=lambda item: (FUNCTIONS.index(item[0][0]), item[0][1])))


def mean_error(some: list[Run], name: str, end: str) -> float:
    return float(statistics.mean(run[name][end]["error"] for run in some))


def by_halves(some: list[Run], name: str) -> Tensor:
    """Of segments: the mean error of their first and second halves, (REGIONS, 2)."""
    return torch.tensor([run[name]["along"] for run in some]).mean(0).view(REGIONS, 2, -1).mean(2)


def losing(some: list[Run]) -> list[tuple[float, float]]:
    """Where LLA is not the best: halves of segments, or lengths and those around them, from where to where."""
    others = [name for name in ESTIMATORS if name != "LLA"]
    function, length = some[0]["function"], some[0]["length"]
    if function == "segments":
        worse = by_halves(some, "LLA") >= torch.stack([by_halves(some, name) for name in others]).amin(0)
        half = length / (2 * REGIONS)
        return [(half * i, half * (i + 1)) for i in worse.flatten().nonzero().flatten().tolist()]
    ends = spans(length, function)
    lost = [end for end in ends if mean_error(some, "LLA", end) >= min(mean_error(some, n, end) for n in others)]
    return [(int(end) / 2**0.5, int(end) * 2**0.5) for end in lost]


def table(runs: dict[str, Run]) -> str:
    """Markdown: means over seeds and, in brackets, the smallest and the largest."""
    rows = [f"| function | D | tokens | {' | '.join(ESTIMATORS)} | softmax / LLA |", "|---|---|---|---|---|---|---|"]
    for (function, dim), some in groups(runs).items():
        length = some[0]["length"]
        for end in sorted({min(128, length), length}) if function != "segments" else [length]:
            cells = []
            for name in ESTIMATORS:
                of = [run[name][str(end)]["error"] for run in some]
                cells.append(f"{statistics.mean(of):.2g} ({min(of):.2g} to {max(of):.2g})")
            ratio = mean_error(some, "softmax", str(end)) / mean_error(some, "LLA", str(end))
            rows.append(f"| {function} | {dim} | {end} | {' | '.join(cells)} | {ratio:.1f} |")
    return "\n".join(rows)


def plot(runs: dict[str, Run], path: Path) -> None:
    """A row for each function: error along the sequence or against its length, by dimension, and against dimension."""
    from matplotlib.figure import Figure

    dims = sorted({run["dim"] for run in runs.values()})
    figure = Figure(figsize=(4.7 + 3.2 * len(dims), 8.5), layout="constrained")
    panels = figure.subplots(len(FUNCTIONS), len(dims) + 1, squeeze=False, sharey="row")
    legend: dict[str, Any] = {}
    by_dimension: dict[str, list[list[Run]]] = {}
    for (function, dim), some in groups(runs).items():
        by_dimension.setdefault(function, []).append(some)
        axes = panels[FUNCTIONS.index(function)][dims.index(dim)]
        length = some[0]["length"]
        ends = list(spans(length, function))
        for name in ESTIMATORS:
            if function == "segments":
                along = torch.tensor([run[name]["along"] for run in some]).mean(0)
                x = (torch.arange(len(along)) + 0.5) * length / len(along)
                (legend[name],) = axes.plot(x, along, color=MARKS[name][0], label=name)
            else:
                dotted(axes, name, [(list(map(int, ends)), [run[name][end]["error"] for end in ends]) for run in some])
                axes.set_xscale("log", base=2)
        for begin, end in losing(some):
            axes.axvspan(begin, end, color="0.9", zorder=0)
        axes.set(title=f"{function}, D = {dim}", xlabel="token" if function == "segments" else "length")
    for function, by_dim in by_dimension.items():
        axes = panels[FUNCTIONS.index(function)][-1]
        length = by_dim[0][0]["length"]
        for name in ESTIMATORS:
            each_dim = [[run[name][str(length)]["error"] for run in some] for some in by_dim]
            dotted(axes, name, [(dims, of_seed) for of_seed in zip(*each_dim)])
        axes.set_xscale("log", base=2)
        axes.set(title=f"{function}, {length} tokens", xlabel="D")
    for axes in panels.flat:
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("error, in variances")
    figure.legend(handles=list(legend.values()), loc="outside right upper", frameon=False)
    grey = "grey: where LLA is not the best (of segments, in the mean over half of one)"
    figure.text(0.5, 0.0, grey, ha="center", va="top")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
