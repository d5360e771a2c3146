"""A byte-level language model with softmax attention and with Local Linear Attention, on sources of Python packages.

    python -m examples.experiments.language_model --quick                      a small one: under a minute on a CPU
    python -m examples.experiments.language_model --study main time --seeds 0 1 2       on a GPU
    python -m examples.experiments.language_model --kind softmax --lr 1e-3 --seconds 30

A study is a few arms, which differ in one thing; without --study the flags are an arm. Learning rates are tried in
steps of 2, with seed 0, until the best has a worse one on either side, by the loss on other packages than those that
losses are reported of. Batches and first weights of a seed are the same for all arms. Each schedule decays to its arm's
own end. Losses are in nats a byte.

Runs are kept in --results as they end, and those that are there are not made again; a long one goes on from its
checkpoint. --keys keeps queries, keys, values and ridges of one sequence, of the best run of each kind and number of
steps: lla.pt, lla_no_qk_norm.pt, lla_5000.pt.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from examples.experiments import corpus as text
from examples.experiments.corpus import Corpus
from examples.experiments.gpt import GPT, Size, keys_of
from examples.experiments.runs import RESULTS, Run, Runs, progress, spread
from examples.experiments.training import Arm, Setting, train

FULL = Size(layers=6, width=512, heads=8, length=1024, batch=32)
SMALL = Size(layers=2, width=128, heads=2, length=128, batch=8)
BOTH = [Arm(kind, qk_norm) for qk_norm in (True, False) for kind in ("lla", "softmax")]
STUDIES = {
    "main": BOTH,
    "time": [replace(arm, as_lla=True) for arm in BOTH if arm.kind == "softmax"],
    "tolerance": [Arm(tolerance=tolerance) for tolerance in (1e-1, 3e-2, 1e-2, 1e-3)],
    "ridge": [Arm(ridge_init=init) for init in (0.1, 1.0, 10.0)] + [Arm(ridge="token")],
    "hybrid": [Arm(every=3)],
    "window": [Arm(kind, window=256) for kind in ("lla", "softmax")],
    "muon": [Arm(kind, optimizer="muon") for kind in ("lla", "softmax")],
    "long": [Arm(kind, steps=5000) for kind in ("lla", "softmax")],
    "long_time": [Arm("softmax", steps=5000, as_lla=True)],
}
DRAWN = ("main", "time")
SEARCHES = ("main", "muon")  # in these, learning rates are searched first, by seed 0


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = options.quick or options.small
    if small:
        torch.set_num_threads(1)  # on small tensors threads wait for one another
    size = SMALL if small else FULL
    compiled, graphs = (asked and device == "cuda" for asked in (options.compile, options.graphs))
    setting = Setting(size, device, compiled, graphs, options.checkpoints)
    runs = Runs(options.results, device)
    begin, speed = time.monotonic(), dict[str, float]()  # seconds a step, all told
    read = text.read(options.text, options.cache, most=2_000_000 if options.quick else None)
    print(f"{device}: {[f'{part:,}' for part in read.facts['bytes']]} bytes to train on, to choose by, to report of")
    if any(run["corpus"] != read.facts["sha256"][:16] for run in runs.all.values()):
        raise SystemExit(f"{options.results} holds runs on another text, which are no match; give another --results")
    read = read.to(device)
    best: dict[str, float] = {}  # of the files of keys
    for seed, arm in progress(wanted(options, runs), desc="runs", unit="run"):
        runs.read()
        if (resolved := resolve(arm, runs.all)) is None:
            print(
                f"{arm.kind}: wants --lr, or runs of --study main; --as-lla those of both for so many steps", flush=True
            )
            continue
        name = f"{replace(resolved, steps=arm.steps).name()} seed={seed}"
        if name in runs.all:
            continue
        began = time.monotonic()
        if began - begin + max(resolved.seconds or 0.0, resolved.steps * speed.get(arm.kind, 0.0)) > options.within:
            print(f"no time for {name}", flush=True)
            continue
        run, model = train(resolved, seed, read, setting)
        lasted = time.monotonic() - began
        speed[arm.kind] = lasted / run["steps"]
        runs.add(name, {**run, "note": options.note} if options.note else run)
        keep_keys(options.keys, model, read, run, best)
        figures = f"{run['reported']:.4f} ({run['choice']:.4f}), {run['steps']} steps of {run['step_ms']:.1f} ms"
        print(f"{name}: {figures}; the run took {lasted:.0f} s", flush=True)
    print(table(runs.all))
    if options.plot is not None:
        draw(runs.all, options.plot, [arm for study in options.study or DRAWN for arm in STUDIES[study]])
    return runs.all


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--quick", action="store_true", help="the same, trained for under a minute")
    parser.add_argument("--study", nargs="+", choices=STUDIES)
    parser.add_argument("--only", choices=["lla", "softmax"], help="the arms of this kind of a study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--note", help="what else the machine did: times of these runs are not told")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds after which no run begins")
    parser.add_argument("--results", type=Path, help="default: results/language_model[_small].json beside this file")
    parser.add_argument("--plot", type=Path, help="draw loss against steps and time, of the studies given, as PNG")
    parser.add_argument("--keys", type=Path, metavar="DIR", help="keep keys of LLA's runs here")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    parser.add_argument(
        "--text", type=Path, nargs="+", metavar="DIR", help="folders of packages; default: this Python's"
    )
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the text here")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on a GPU, blocks")
    parser.add_argument("--graphs", action="store_true", help="on a GPU, steps from a CUDA graph")
    an_arm = parser.add_argument_group("an arm")
    an_arm.add_argument("--kind", choices=["lla", "softmax"], default=Arm.kind)
    an_arm.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=Arm.qk_norm)
    an_arm.add_argument("--window", type=int)
    an_arm.add_argument("--every", type=int, default=Arm.every, help="LLA in the last of so many layers")
    number = lambda ridge: ridge if ridge in ("head", "token") else float(ridge)
    an_arm.add_argument("--ridge", type=number, default=Arm.ridge, help="head, token, or a number")
    an_arm.add_argument("--ridge-init", type=float, default=Arm.ridge_init)
    an_arm.add_argument("--tolerance", type=float, default=Arm.tolerance)
    an_arm.add_argument("--optimizer", choices=["adamw", "muon"], default=Arm.optimizer)
    an_arm.add_argument("--lr", type=float)
    an_arm.add_argument("--steps", type=int, default=Arm.steps)
    an_arm.add_argument("--seconds", type=float)
    an_arm.add_argument("--as-lla", action="store_true", help="as long as LLA's runs of this arm took")
    options = parser.parse_args(arguments)
    if options.results is None:
        size = "_quick" if options.quick else "_small" if options.small else ""
        options.results = RESULTS / f"language_model{size}.json"
    return options


def wanted(options: argparse.Namespace, runs: Runs) -> Iterator[tuple[int, Arm]]:
    """Seeds and arms, a seed of all studies before the next; of a search each after the one before has run."""
    if not options.study:
        quick = [Arm(kind, lr=3e-3, steps=60) for kind in ("lla", "softmax")]
        one = [Arm(**{field.name: getattr(options, field.name) for field in fields(Arm)})]
        yield from product(options.seeds, quick if options.quick else one)
    for seed, study in product(options.seeds, options.study or []):
        arms = [arm for arm in STUDIES[study] if options.only in (None, arm.kind)]
        for arm in arms if study in SEARCHES else []:
            tried = None
            while (lr := next_rate(rates(arm, runs.all))) not in (None, tried):  # it is not run where time is up
                tried = lr
                yield 0, replace(arm, lr=lr)
        yield from ((seed, arm) for arm in arms)


def next_rate(losses: dict[float, float]) -> float | None:
    """Rates in steps of 2, from 1e-3 on, until the best has one on either side; None then."""
    if not losses:
        return 1e-3
    best = min(losses, key=lambda lr: losses[lr])
    return next((lr for lr in (2 * best, best / 2) if lr not in losses), None)


def resolve(arm: Arm, runs: dict[str, Run]) -> Arm | None:
    """With the best learning rate of those tried, and as many steps as LLA's time allows; None where runs are wanting.

    The time is reckoned from the medians of recorded steps, of softmax attention and of LLA, so that it does not hang
    on what else the machine does. What a step takes does not hang on how many there are: of runs of any number that
    of the fastest counts.
    """
    if arm.lr is None:
        losses = rates(arm, runs)
        if not losses:
            return None
        arm = replace(arm, lr=min(losses, key=lambda lr: losses[lr]))
    if not arm.as_lla:
        return arm
    lla = resolve(replace(arm, kind="lla", lr=None, as_lla=False), runs)
    own_ms, lla_ms = (step_ms(alike, runs) for alike in (replace(arm, as_lla=False), lla))
    return replace(arm, steps=round(arm.steps * lla_ms / own_ms)) if own_ms and lla_ms else None


def step_ms(arm: Arm | None, runs: dict[str, Run]) -> float | None:
    """Of the fastest run of this arm, of any number of steps."""
    usual = lambda settings: {**settings, "steps": None, "seconds": None}
    wanted = usual(asdict(arm)) if arm else None
    alone = (run for run in runs.values() if "note" not in run)
    return min((run["step_ms"] for run in alone if usual(run["arm"]) == wanted), default=None)


def rates(arm: Arm, runs: dict[str, Run]) -> dict[float, float]:
    """Learning rates and their losses on the set that is not reported, of the usual arm of this kind, seed 0."""
    usual = asdict(Arm(arm.kind, arm.qk_norm, optimizer=arm.optimizer))
    tried = [run for run in runs.values() if {**run["arm"], "lr": None} == usual and run["seed"] == 0]
    return {run["arm"]["lr"]: run["choice"] if math.isfinite(run["choice"]) else math.inf for run in tried}


def keep_keys(folder: Path | None, model: GPT, read: Corpus, run: Run, best: dict[str, float]) -> None:
    """Of the first, the middle and the last layer, in one file for each kind: of its best run."""
    arm = run["arm"]
    steps = [str(arm["steps"])] * (arm["steps"] != Arm.steps)
    name = "_".join([arm["kind"]] + ["no_qk_norm"] * (not arm["qk_norm"]) + steps)
    if folder is None or arm["kind"] != "lla" or arm["every"] > 1 or run["choice"] >= best.get(name, float("inf")):
        return
    best[name] = run["choice"]
    last = len(model.blocks) - 1
    sequence = read.choice[: run["length"]].long()[None]
    recipe = {name: value for name, value in run.items() if name not in ("curve", "loss")}
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    torch.save({**keys_of(model, sequence, [0, last // 2, last]), "recipe": json.dumps(recipe)}, folder / f"{name}.pt")


def by_arm(runs: dict[str, Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for name, run in sorted(runs.items()):
        found.setdefault(name.rpartition(" seed=")[0], []).append(run)
    return found


def table(runs: dict[str, Run]) -> str:
    """Markdown: a row for each arm, means over its seeds; times of those that had the machine to themselves."""
    rows = ["| arm | loss | on the set to choose by | steps | ms a step | seconds |", "|---|---|---|---|---|---|"]
    for name, some in by_arm(runs).items():
        loss, choice = (spread([run[key] for run in some]) for key in ("reported", "choice"))
        steps = statistics.mean(run["steps"] for run in some)
        alone = [run for run in some if "note" not in run]
        ms, seconds = (
            f"{statistics.mean(run[x] for run in alone):.1f}" if alone else "" for x in ("step_ms", "seconds")
        )
        rows.append(f"| {name} | {loss} | {choice} | {steps:.0f} | {ms} | {seconds} |")
    return "\n".join(rows)


def draw(runs: dict[str, Run], path: Path, arms: Sequence[Arm]) -> None:
    """Loss against steps and against the seconds they take, of arms at their best rates; a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    legend: dict[str, Any] = {}
    colours: dict[Any, str] = {}
    kept = by_arm(runs)
    for arm in arms:
        if (resolved := resolve(arm, runs)) is None or not (
            some := kept.get(replace(resolved, steps=arm.steps).name())
        ):
            continue
        colour = colours.setdefault((arm.kind, arm.as_lla, arm.steps), f"C{len(colours)}")
        label = f"{'LLA' if arm.kind == 'lla' else 'softmax'}, {some[0]['steps']} steps"
        label += " (LLA's time)" * arm.as_lla
        label += ", no qk-norm" * (not arm.qk_norm) + ", Muon" * (arm.optimizer == "muon")
        for run in some:
            steps, _, losses = zip(*run["curve"])
            own_ms = step_ms(replace(resolved, as_lla=False), runs) or math.nan
            for axes, x in zip(panels, (steps, [step * own_ms / 1e3 for step in steps])):
                style = {"color": colour, "linestyle": "-" if arm.qk_norm else ":", "linewidth": 1.2}
                (legend[label],) = axes.plot(x, losses, label=label, **style)
                axes.plot(x[-1], losses[-1], "o", color=colour, markersize=4)
    panels[0].set(xlabel="steps", ylabel="validation loss, nats a byte")
    panels[1].set(xlabel="seconds of training")
    for axes in panels:
        axes.grid(alpha=0.3)
    if legend:  # where curves part
        lowest = min(min(line.get_ydata()) for line in panels[0].lines)
        panels[0].set_ylim(lowest - 0.02, 1.6 * lowest)
    figure.legend(handles=list(legend.values()), loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
