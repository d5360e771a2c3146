"""Forecast the yearly sunspot number one year ahead by attention alone: nothing is trained.

The series (1700 to 2008) is standardised by the mean and standard deviation of its first 100 values. Token x_t is the
window of the last 8 values, of norm sqrt(8) or so. To forecast what follows the newest window, x_{t+1}, attention looks
up what followed earlier ones: query x_{t+1}, keys x_1 .. x_t, values the year after each. Softmax attention averages
those years, ridge regression fits one plane to them all, LLA fits the plane that is best near the query.

Prints the mean squared errors once 100 forecasts have been made, and saves a plot. Needs the `examples` extra.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from statsmodels.datasets import sunspots
from torch.nn.functional import scaled_dot_product_attention

import flashlla

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 8
WARM_UP = 100  # values that standardise the series, and forecasts that are not counted
INK, BLUE, ORANGE, GREEN = "#222222", "#1f6fb4", "#e07b39", "#3a8f5c"


def load(unit_norm: bool) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, float, float]:
    """Years, standardised values, their windows (n, WINDOW), and what undoes the standardisation."""
    data = sunspots.load_pandas().data
    values = torch.tensor(data["SUNACTIVITY"].to_numpy(), dtype=torch.float64)
    mean, deviation = values[:WARM_UP].mean(), values[:WARM_UP].std()  # of a sample: n - 1
    series = (values - mean) / deviation
    x = series.unfold(0, WINDOW, 1)
    if unit_norm:
        x = x * WINDOW**0.5 / x.norm(dim=-1, keepdim=True)
    return data["YEAR"].to_numpy().astype(int), series, x, mean.item(), deviation.item()


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def ridge_regression(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ridge: float) -> torch.Tensor:
    """An ordinary ridge regression with intercept, fitted anew for every forecast."""
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        keys, values = k[0, : t + 1], v[0, : t + 1]
        centred = keys - keys.mean(0)
        covariance = centred.T @ centred / (t + 1) + ridge * torch.eye(WINDOW, dtype=q.dtype)
        slope = torch.linalg.solve(covariance, centred.T @ values / (t + 1))
        out[0, t] = values.mean(0) + (q[0, t] - keys.mean(0)) @ slope
    return out


def lla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, ridge: float) -> torch.Tensor:
    return flashlla.lla_attention(q, k, v, qk_scale=scale, ridge_lambda=ridge, solver="direct")


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the plot goes")
    parser.add_argument("--unit-norm", action="store_true", help=f"scale every window to norm sqrt({WINDOW})")
    options = parser.parse_args()
    # The README's picture, unless it would be another one.
    output = options.output or (Path("sunspots_unit_norm.png") if options.unit_norm else root / "docs" / "sunspots.png")

    torch.set_num_threads(1)  # faster here: the systems are 8 by 8
    years, series, x, mean, deviation = load(options.unit_norm)
    q, k = x[None, 1:-1], x[None, :-2]  # (1, 300, 8)
    after = series[WINDOW:-1]  # the value after each key
    v = after[None, :, None].expand_as(k)
    truth, truth_years = series[WINDOW + 1 :], years[WINDOW + 1 :]

    def forecast(o: torch.Tensor) -> torch.Tensor:
        return o[0, :, 0]

    def error(o: torch.Tensor) -> float:
        return (forecast(o) - truth)[WARM_UP:].square().mean().item()

    softmax, ridge, local = softmax_attention(q, k, v, 0.5), ridge_regression(q, k, v, 0.01), lla(q, k, v, 0.2, 0.01)
    scales = np.geomspace(0.02, 10, 40)
    softmax_sweep = [error(softmax_attention(q, k, v, s)) for s in scales]
    local_sweep = [error(lla(q, k, v, s, 0.01)) for s in scales]

    first, last = truth_years[WARM_UP], truth_years[-1]
    print(f"Yearly sunspot number, one step ahead, no training: mean squared error, {first} to {last}")
    print(f"{'':<26}{'scale':>7}{'ridge':>7}{'error':>8}   the same as a limit of LLA")
    for name, scale, lam, o, limit, how in (
        ("softmax attention", "0.5", "", softmax, lla(q, k, v, 0.5, 1e8), "ridge 1e8"),
        ("ridge regression", "", "0.01", ridge, lla(q, k, v, 1e-6, 0.01), "scale 1e-6"),
        ("Local Linear Attention", "0.2", "0.01", local, None, ""),
    ):
        line = f"{name:<26}{scale:>7}{lam:>7}{error(o):>8.3f}"
        print(line if limit is None else f"{line}   {error(limit):.3f}, {how}")
    best = [f"{name} {min(sweep):.3f}" for name, sweep in (("softmax attention", softmax_sweep), ("LLA", local_sweep))]
    print(f"At the scale that turns out best for each: {', '.join(best)}")

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(2.1, 1), layout="constrained")
    shown = truth_years >= 1900

    def draw(values: torch.Tensor, **style: Any) -> None:
        left.plot(truth_years[shown], values[torch.from_numpy(shown)] * deviation + mean, **style)

    draw(truth, color=INK, marker="o", markersize=2.5, linewidth=0.8, label="observed")
    draw(forecast(softmax), color=ORANGE, linewidth=1.4, label="softmax attention, a year ahead")
    draw(forecast(local), color=BLUE, linewidth=1.8, label="Local Linear Attention, a year ahead")
    left.set(xlabel="year", ylabel="sunspot number", xlim=(1899, 2009), ylim=(-12, 235))
    left.legend(loc="upper left", ncols=3, frameon=False, fontsize=9, columnspacing=1.2, handlelength=1.6)
    left.set_title("One-step-ahead forecasts, nothing trained", loc="left", fontweight="bold", fontsize=11)

    right.set(xscale="log", xlabel="scale of q·k", ylim=(0, 1), xlim=(0.02, 10))
    right.plot(scales, softmax_sweep, color=ORANGE)
    right.axhline(error(ridge), color=GREEN, linestyle="--")
    right.plot(scales, local_sweep, color=BLUE)
    right.plot([0.5], [error(softmax)], "o", color=ORANGE)
    right.plot([0.2], [error(local)], "o", color=BLUE)
    right.set_xticks([0.02, 0.1, 0.5, 2, 10], ["0.02", "0.1", "0.5", "2", "10"], minor=False)
    right.minorticks_off()
    label: dict[str, Any] = {"fontsize": 9, "va": "center"}
    right.annotate(f"softmax attention  {error(softmax):.3f}", (0.026, error(softmax) - 0.05), color=ORANGE, **label)
    right.annotate(f"ridge regression  {error(ridge):.3f}", (0.026, error(ridge) + 0.04), color=GREEN, **label)
    right.annotate(f"LLA  {error(local):.3f}", (0.026, error(local) - 0.06), color=BLUE, **label)
    right.set_title(f"Mean squared error, {first} to {last}", loc="left", fontweight="bold", fontsize=11)

    figure.savefig(output, dpi=110, metadata={"Software": None})
    path = output.resolve()
    print(f"Plot: {path.relative_to(root) if path.is_relative_to(root) else path}")


if __name__ == "__main__":
    main()
