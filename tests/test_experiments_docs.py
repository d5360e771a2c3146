"""What the documentation says of examples/experiments is what their records hold."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import torch

from examples.experiments import (
    language_model,
    state_tracking,
    test_time_regression,
    tolerance,
)
from examples.experiments.runs import RESULTS, Run, table_of
from examples.experiments.training import Arm

RECORDS = {
    "language_model": language_model.table,
    "tolerance": tolerance.table,
    "test_time_regression": test_time_regression.table,
    "in_context_regression": table_of,
    "associative_recall": table_of,
    "state_tracking": state_tracking.table,
}
MIXERS = ("LLA", "softmax")
OTHERS = ("softmax", "delta rule", "gated delta rule")


def test_rows_of_the_pages_are_those_of_the_records() -> None:
    rows: set[str] = set()
    for name, table in RECORDS.items():
        if (record := RESULTS / f"{name}.json").exists():
            rows.update(table(json.loads(record.read_text())["runs"]).splitlines())
    docs = Path(__file__).parents[1] / "docs"
    tolerances = (docs / "solvers.md").read_text().split("## What the tolerance buys")[1].split("\n## ")[0]
    told = [line for page in ((docs / "experiments.md").read_text(), tolerances) for line in page.splitlines()]
    told = [line for line in told if line.startswith("|")]
    assert len(told) > 20
    assert [line for line in told if line not in rows] == []


def in_time_of(steps: int) -> float:
    """As many steps of softmax attention take the time of so many of LLA's."""
    runs = json.loads((RESULTS / "language_model.json").read_text())["runs"]
    softmax, lla = (language_model.step_ms(Arm(kind, lr=2e-3), runs) for kind in ("softmax", "lla"))
    assert softmax is not None
    assert lla is not None
    return steps * lla / softmax


def best_of_muon(runs: dict[str, list[Run]], kind: str) -> str:
    """The arm whose loss on the set to choose by is the least, of those with three seeds."""
    arms = [arm for arm in runs if arm.startswith(f"{kind} optimizer=muon lr=") and len(runs[arm]) == 3]
    return min(arms, key=lambda arm: statistics.mean(run["choice"] for run in runs[arm]))


def test_figures_of_the_readme_are_those_of_the_record() -> None:
    runs = language_model.by_arm(json.loads((RESULTS / "language_model.json").read_text())["runs"])
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())

    def loss(arm: str) -> str:
        losses = [run["reported"] for run in runs[arm]]
        seeds = {1: " (one seed)", 2: " (two seeds)", 3: ""}[len(losses)]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        return f"{statistics.mean(losses):.3f}{spread}{seeds}"

    ms = lambda arm: f"{statistics.mean(run['step_ms'] for run in runs[arm] if 'note' not in run):.1f}"
    softmax, lla, longer = "softmax lr=0.002", "lla lr=0.002", "softmax as_lla=True lr=0.002"
    steps = f"{runs[longer][0]['steps']} steps" + f", {len(runs[longer])} seeds" * (len(runs[longer]) != 3)
    muon = [loss(best_of_muon(runs, kind)) for kind in ("softmax", "lla")]
    bare = [loss(f"{kind} qk_norm=False lr=0.001").split()[0] for kind in ("softmax", "lla")]
    long = [loss(f"{kind} steps=5000 lr=0.002") for kind in ("softmax", "lla")]
    equal = "softmax steps=5000 as_lla=True lr=0.002"
    told = [
        f"| softmax | {loss(softmax)} | {ms(softmax)} | {loss(longer)} ({steps}) |",
        f"| LLA | {loss(lla)} | {ms(lla)} | {loss(lla)} |",
        f"Without normalisation softmax attention is at {bare[0]} after 500 steps, LLA at {bare[1]}, and softmax "
        f"attention in LLA's time at {loss('softmax qk_norm=False as_lla=True lr=0.001').split()[0]}.",
        "With Muon in place of AdamW they are at {} and {} after 500 steps".format(*muon),
        "After 5000 steps softmax attention is at {} and LLA at {}".format(*long),
        f"In the time of LLA's 5000 steps softmax attention makes {runs[equal][0]['steps']} and is at {loss(equal)}",
        f"{ms(softmax)} ms with softmax attention and {ms(lla)} at the layer's default",
    ]
    assert [phrase for phrase in told if phrase not in readme] == []


def test_figures_of_the_readme_of_small_models_are_those_of_the_records() -> None:
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    recall, track = (
        json.loads((RESULTS / f"{name}.json").read_text())["runs"] for name in ("associative_recall", "state_tracking")
    )
    words = lambda pairs, mixer: recall[f"words, {pairs} pairs, {16 * pairs} tokens, width 32, {mixer}"]
    wrong = lambda mixer, steps=5000: "{:.2f} ± {:.2f}".format(
        *(of(track[f"16 swaps, {steps} steps, {mixer}"]["reported"]) for of in (statistics.mean, statistics.stdev))
    )
    told = [
        f"16 pairs of words after {words(16, 'LLA')['steps']} steps with LLA, after {words(16, 'softmax')['steps']} "
        f"with softmax attention, in all of three seeds; 4 pairs after {words(4, 'LLA')['steps']} with LLA, and "
        f"with softmax attention in none of the three after {words(4, 'softmax')['steps']}",
        f"wrong in {wrong('LLA')} after 5000 steps with LLA, in {wrong('softmax')} with softmax attention, in "
        f"{wrong('gated delta rule')} with the gated delta rule; softmax attention in {wrong('softmax', 15000)} after "
        "15000 steps, which took it longer than LLA's 5000",
        f"the {words(16, 'LLA')['steps']} steps took {words(16, 'LLA')['seconds']:.0f}, the "
        f"{words(16, 'softmax')['steps']} took {words(16, 'softmax')['seconds']:.0f}",
    ]
    assert [phrase for phrase in told if phrase not in readme] == []
    assert track["16 swaps, 15000 steps, softmax"]["seconds"] > track["16 swaps, 5000 steps, LLA"]["seconds"]


def test_figures_told_of_the_language_model_are_those_of_the_record() -> None:
    runs = language_model.by_arm(json.loads((RESULTS / "language_model.json").read_text())["runs"])
    page = " ".join((Path(__file__).parents[1] / "docs" / "experiments.md").read_text().split())
    loss = lambda arm: statistics.mean(run["reported"] for run in runs[arm])
    ridges = lambda arm: [r for run in runs[arm] for layer in run["ridges"] for r in layer]
    lla, softmax, bare = "lla lr=0.002", "softmax lr=0.002", "qk_norm=False lr=0.001"
    narrow, large, loose = "window=256 lr=0.002", "lla ridge_init=10.0 lr=0.002", "lla tolerance=0.1 lr=0.002"
    ms = lambda arm, usual=lla: "{:.1f} ms for {:.1f}".format(
        *(statistics.mean(run["step_ms"] for run in runs[name] if "note" not in run) for name in (arm, usual))
    )
    muon = lambda kind: best_of_muon(runs, kind)
    equal = lambda arm: loss(arm) - loss(arm.replace("lla", "softmax").replace(" lr", " as_lla=True lr"))
    gains = sorted(a["reported"] - b["reported"] for a, b in zip(runs[lla], runs[large]))
    apart = sorted(a["reported"] - b["reported"] for a, b in zip(runs[softmax], runs[lla]))
    some = sorted(run["unconverged"][0] for name in (lla, f"lla {bare}") for run in runs[name])
    long, as_long, longer = (
        {run["seed"]: run for run in runs[f"{arm} lr=0.002"]}
        for arm in ("lla steps=5000", "softmax steps=5000", "softmax steps=5000 as_lla=True")
    )
    leads, lags = (
        [sign * (other[seed]["reported"] - long[seed]["reported"]) for seed in other]
        for sign, other in ((1, as_long), (-1, longer))
    )
    solves = sorted(run["unconverged"] for run in long.values())
    apart_of = lambda setting: [
        a["reported"] - b["reported"] for a, b in zip(runs[f"lla {setting} lr=0.002"], runs[lla])
    ]
    token = apart_of("ridge=token")
    once_more = json.loads((RESULTS / "language_model_again.json").read_text())["runs"]
    again = {
        arm: [runs[arm][0]["reported"], *(run["reported"] for name, run in once_more.items() if name.startswith(arm))]
        for arm in (lla, softmax)
    }
    assert len({run["of"]["sources"] for run in once_more.values()}) == 1
    told = [
        f"by {loss(softmax) - loss(lla):.3f} with normalised queries and keys, "
        f"by {loss(f'softmax {bare}') - loss(f'lla {bare}'):.3f} without",
        f"At equal time softmax attention is ahead by {equal(lla):.3f} (without normalised queries and keys "
        f"by {equal(f'lla {bare}'):.3f}",
        f"it makes {in_time_of(1):.1f} times as many",
        f"a step takes {in_time_of(1):.1f} times as long",
        f"Of {runs[lla][0]['unconverged'][1] // 10**6} million solves of a run {some[0]} to {some[-1]} did not",
        f"Learned ridges went from 1 to between {min(ridges(lla)):.1f} and {max(ridges(lla)):.1f}",
        f"LLA is at {loss('lla steps=5000 lr=0.002'):.3f} and softmax attention at "
        f"{loss('softmax steps=5000 lr=0.002'):.3f}, ahead by {leads[0]:.3f} and {leads[1]:.3f} in two seeds and "
        f"behind by {-leads[2]:.3f} in the third, where it was ahead by {apart[0]:.3f} to {apart[-1]:.3f} after 500",
        f"gains nothing over softmax attention: {loss('lla every=3 lr=0.002'):.3f} for {loss(softmax):.3f}",
        f"A window of 256 makes LLA worse by {loss(f'lla {narrow}') - loss(lla):.3f} and softmax attention by "
        f"{loss(f'softmax {narrow}') - loss(softmax):.3f}, and leaves LLA ahead by "
        f"{loss(f'softmax {narrow}') - loss(f'lla {narrow}'):.3f}, in two of three seeds",
        f"better than the usual one in every seed, by {loss(lla) - loss(large):.3f} ({gains[0]:.3f} to "
        f"{gains[-1]:.3f}), hardly more than a run made again may move; a step takes {ms(large)}",
        f"1e-1 in training changes nothing: {loss(loose):.3f} for {loss(lla):.3f}. A step takes {ms(loose)}",
        f"{loss(softmax) - loss(muon('softmax')):.2f} over AdamW with softmax attention. With it LLA is ahead by "
        f"{loss(muon('softmax')) - loss(muon('lla')):.3f}, in two of three seeds, each at its best rate, where "
        f"with AdamW it is by {loss(softmax) - loss(lla):.3f} and in all. A step takes "
        f"{ms(muon('lla'), muon('softmax'))}, so that in a second softmax attention learns more",
        f"which makes {longer[1]['steps']} steps of it, is ahead by {statistics.mean(lags):.3f} ({min(lags):.3f} to "
        f"{max(lags):.3f}); in the time of 500 steps it was by {equal(lla):.3f}",
        f"One that begins at 0.1 makes LLA worse in every seed, by {statistics.mean(apart_of('ridge_init=0.1')):.3f}, "
        f"worse than softmax attention, and slower ({ms('lla ridge_init=0.1 lr=0.002')})",
        f"With a ridge of each token's own LLA is worse, too, by {statistics.mean(token):.3f} ({min(token):.3f} to "
        f"{max(token):.3f}), and slower ({ms('lla ridge=token lr=0.002')}), but ahead of softmax "
        "attention in every seed",
        "made twice more by a later version with the same kernels (`language_model_again.json`, runs of two files "
        "brought together), ended between {:.4f} and {:.4f} with LLA and between {:.4f} and {:.4f} with softmax "
        "attention".format(*(of(again[arm]) for arm in (lla, softmax) for of in (min, max))),
        "Neither do 3e-2 and 1e-3, by {:.4f} at most in a seed".format(
            max(abs(gap) for tolerance in ("0.03", "0.001") for gap in apart_of(f"tolerance={tolerance}"))
        ),
        f"Of {solves[0][1] // 10**6} million solves of a run {solves[0][0]} to {solves[-1][0]} did not reach",
        "went to between {:.1f} and {:.1f}:".format(*(of(ridges("lla steps=5000 lr=0.002")) for of in (min, max))),
    ]
    assert [phrase for phrase in told if phrase not in page] == []
    assert (len(leads), len(lags)) == (3, 3)
    assert abs(longer[1]["steps"] - in_time_of(5000)) < 0.01 * in_time_of(5000)
    ahead = lambda better, worse: sum(a["reported"] < b["reported"] for a, b in zip(runs[better], runs[worse]))
    small, own = "lla ridge_init=0.1 lr=0.002", "lla ridge=token lr=0.002"
    bares = (f"lla {bare}", f"softmax {bare}")
    in_all = [(lla, softmax), bares, (large, lla), (lla, own), (own, softmax), (softmax, small), (lla, small)]
    assert [pair for pair in in_all if ahead(*pair) != 3] == []
    in_two = [(f"lla {narrow}", f"softmax {narrow}"), (muon("lla"), muon("softmax"))]
    assert [pair for pair in in_two if ahead(*pair) != 2] == []


def test_figures_told_of_tolerances_are_those_of_the_record() -> None:
    read = lambda name: " ".join((Path(__file__).parents[1] / "docs" / name).read_text().split())
    runs = json.loads((RESULTS / "tolerance.json").read_text())["runs"]
    keys = ("trained_qknorm", "lla_5000", "lla_no_qk_norm")
    assert {name.split()[0] for name in runs} == {*keys}

    def less(loose: str, tight: str) -> str:
        """The time that the two passes save, for each set of keys."""
        both = lambda name: runs[name]["forward_ms"] + runs[name]["backward_ms"]
        saved = [f"{100 * (1 - both(f'{name} {loose}') / both(f'{name} {tight}')):.0f}" for name in keys]
        return "take {}, {} and {} % less time".format(*saved)

    def off(tolerance: str, *names: str) -> str:
        errors = [100 * runs[f"{key} {tolerance}"]["errors"][name] for key in keys for name in names]
        return f"{min(errors):.1f} to {max(errors):.1f} %"

    def gradients(tolerance: str) -> str:
        return f"of q, k and v are off by {off(tolerance, *'qkv')}, that of the ridge by {off(tolerance, 'ridge')}"

    def cosine(tolerance: str) -> str:
        least = min(runs[f"{key} {tolerance}"]["cosines"]["ridge"] for key in keys)
        return f"with a cosine of {math.floor(1e4 * least) / 1e4:.4f} or more"

    worst = lambda name: max(keys, key=lambda key: runs[f"{key} 0.1"]["errors"][name])
    assert worst("ridge") == "trained_qknorm"
    for name in "qk":
        assert min(keys, key=lambda key: runs[f"{key} 0.1"]["errors"][name]) == "trained_qknorm"
    models = json.loads((RESULTS / "language_model.json").read_text())["runs"]
    ms = [models[f"lla {arm}"]["step_ms"] for arm in ("tolerance=0.1 lr=0.002 seed=1", "lr=0.002 seed=0")]
    settings = ["", "tolerance=0.1 ", "tolerance=0.03 ", "tolerance=0.001 "]
    of_seed = lambda seed: [
        models[name]["reported"] for s in settings if (name := f"lla {s}lr=0.002 seed={seed}") in models
    ]
    apart = max(max(of_seed(seed)) - min(of_seed(seed)) for seed in range(3))
    model = {tolerance: runs[f"trained_qknorm {tolerance}"]["errors"] for tolerance in ("0.1", "0.01")}
    assert [max(errors, key=errors.__getitem__) for errors in model.values()] == ["ridge", "ridge"]
    most = lambda tolerance, names: off(tolerance, *names).split(" to ")[1]
    told = [
        "of trained_qknorm, lla_5000 and lla_no_qk_norm, in this order",
        f"{gradients('0.01')}, {cosine('0.01')}. The two passes {less('0.01', '0.001')} than at 1e-3",
        f"{gradients('0.03')}, {cosine('0.03')}. The two passes {less('0.03', '0.01')} than at 1e-2",
        f"{gradients('0.1')}, {cosine('0.1')}. The two passes {less('0.1', '0.01')} than at 1e-2",
        f"they are off by {most('0.003', 'qkv')} at most at 3e-3. That of the ridge goes from {off('0.003', 'ridge')} "
        f"to {off('0.001', 'ridge')}",
        f"the ridge's gradient, the worst for such a model, is off by {100 * model['0.1']['ridge']:.1f} % "
        f"(trained_qknorm); at 1e-2 it is off by {100 * model['0.01']['ridge']:.1f} %, and by "
        f"{most('0.01', ['ridge'])} at most on the other keys",
        f"Within a seed these differ by {apart:.4f} at most",
        f"a model's step takes {100 * (1 - ms[0] / ms[1]):.0f} % less time at 1e-1",
    ]
    assert [phrase for phrase in told if phrase not in read("solvers.md")] == []
    assert gradients("0.01") in read("models.md")
    short = f"at 1e-2, those of q, k and v by {off('0.01', *'qkv')}, that of the ridge by {off('0.01', 'ridge')}"
    assert short in read("numerics.md")


def test_figures_told_of_recall_are_those_of_the_record() -> None:
    runs = json.loads((RESULTS / "associative_recall.json").read_text())["runs"]
    page = " ".join((Path(__file__).parents[1] / "docs" / "experiments.md").read_text().split())
    of = lambda pairs, width, mixer: runs[
        f"words, {pairs} pairs, {min(16 * pairs, 512)} tokens, width {width}, {mixer}"
    ]
    learned = lambda pairs, width, mixer: sum(wrong < 0.05 for wrong in of(pairs, width, mixer)["reported"])
    softmax = of(4, 32, "softmax")
    steps = [of(pairs, 32, "LLA")["steps"] for pairs in (4, 8, 16)]
    told = [
        "with LLA all seeds have learned to look up 4, 8 and 16 pairs after {}, {} and {} steps".format(*steps),
        f"none has learned 4 after {softmax['steps']}, where it is wrong in {statistics.mean(softmax['reported']):.2f}",
        f"all have learned 16 after {of(16, 32, 'softmax')['steps']}. 64 pairs it has not begun to learn after "
        f"{of(64, 32, 'softmax')['steps']}",
        "its {} steps for 16 pairs took {:.0f} s, softmax attention's {} took {:.0f}; its {} for 4 pairs took {:.0f} "
        "s, in which softmax attention's whole {} end ({:.0f} s)".format(
            *(
                of(pairs, 32, mixer)[value]
                for pairs in (16, 4)
                for mixer in ("LLA", "softmax")
                for value in ("steps", "seconds")
            )
        ),
    ]
    assert [phrase for phrase in told if phrase not in page] == []
    assert [learned(pairs, 32, "LLA") for pairs in (4, 8, 16)] == [3, 3, 3]
    assert [learned(pairs, 32, "softmax") for pairs in (4, 8, 16)] == [0, 2, 3]
    assert min(of(64, 32, "softmax")["reported"]) > 0.99
    assert [learned(pairs, 16, "softmax") for pairs in (4, 8, 16, 64)] == [0, 0, 0, 0]
    one, other, none = of(64, 32, "LLA")["reported"]
    assert one < 0.05
    assert f"one is wrong in {other:.2f}, and one has not begun" in page
    assert none > 0.99
    assert [learned(pairs, 16, "LLA") for pairs in (4, 8, 16, 64)] == [2, 0, 1, 0]
    assert [learned(pairs, 32, "delta rule") for pairs in (4, 8, 16, 64)] == [1, 0, 0, 0]
    assert [learned(pairs, 16, "delta rule") for pairs in (4, 8, 16, 64)] == [0, 0, 0, 0]
    mean = lambda pairs, mixer: statistics.mean(
        runs[f"numbers, {pairs} pairs, {2 * pairs} tokens, width 64, {mixer}"]["reported"]
    )
    for pairs in (16, 64, 256):
        assert max(mean(pairs, "LLA"), mean(pairs, "softmax")) < 0.001 < 0.4 < mean(pairs, "delta rule")
        errors = (runs[f"numbers, {pairs} pairs, {2 * pairs} tokens, width 64, {m}"]["reported"] for m in MIXERS)
        assert [a < b for a, b in zip(*errors)] == [True, True, True]
        assert 0.6 < mean(pairs, "LLA") / mean(pairs, "softmax") < 0.7


def test_figures_told_of_regression_at_test_time_are_those_of_the_record() -> None:
    groups = test_time_regression.groups(json.loads((RESULTS / "test_time_regression.json").read_text())["runs"])
    page = " ".join((Path(__file__).parents[1] / "docs" / "experiments.md").read_text().split())
    halves = lambda name, dim: test_time_regression.by_halves(groups["segments", dim], name)
    falls = lambda name: torch.stack([halves(name, dim)[:, 0] / halves(name, dim)[:, 1] for dim in (8, 16)])
    lla, softmax = falls("LLA"), falls("softmax")
    told = [
        f"in 8 and 16 dimensions by {lla.min():.0f} to {lla.max():.0f} times from its first half to its second",
        f"falls less there, by {softmax.min():.1f} to {softmax.max():.1f} times",
    ]
    assert [phrase for phrase in told if phrase not in page] == []
    for dim in (2, 4, 8, 16):
        ridge, own = halves("ridge regression", dim), halves("LLA", dim)
        assert (own[:, 1] < own[:, 0]).all()
        assert (ridge[1:] > own[1:]).all()
        assert (ridge[0] < own[0]).all() == (dim == 4)
    error = lambda function, name: test_time_regression.mean_error(groups[function, 4], name, "2048")
    for function in ("piecewise", "smooth"):  # in the README: a third or a quarter
        assert 1 / 4.2 < error(function, "LLA") / error(function, "softmax") < 1 / 2.8
    # Where LLA does not win.
    lost = {of: [round(end / 2**0.5) for _, end in test_time_regression.losing(some)] for of, some in groups.items()}
    up_to = {of: max(ends, default=0) for of, ends in lost.items() if of[0] != "segments"}
    wide = {("smooth", 8): 32, ("smooth", 16): 128, ("piecewise", 16): 32, ("jumps", 16): 32, ("jumps", 2): 128}
    assert up_to == {of: wide.get(of, 0 if of == ("smooth", 2) else 16) for of in up_to}
    assert lost["jumps", 2] == [16, 128]


def test_figures_told_of_regression_in_context_are_those_of_the_record() -> None:
    runs = json.loads((RESULTS / "in_context_regression.json").read_text())["runs"]
    reported = lambda function, mixer: statistics.mean(runs[f"{function}, {mixer}"]["reported"])
    ridge, lla, *others = (reported("linear", mixer) for mixer in ("ridge regression", "LLA", *OTHERS))
    assert ridge < lla < 1.1 * ridge < min(others)
    after = lambda mixer, begin, end: statistics.mean(
        statistics.mean(runs[f"network, {mixer}"]["along"][i][begin:end]) for i in runs[f"network, {mixer}"]["members"]
    )
    for end in (8, 16, 32, 64, 128):
        assert after("LLA", end // 2, end) < min(after(m, end // 2, end) for m in ("ridge regression", *OTHERS))
    assert reported("network", "softmax") < min(reported("network", m) for m in ("ridge regression", *OTHERS[1:]))


def test_figures_told_of_swaps_are_those_of_the_record() -> None:
    runs = json.loads((RESULTS / "state_tracking.json").read_text())["runs"]
    of = lambda kind, mixer, steps=5000: runs[f"16 {kind}, {steps} steps, {mixer}"]["reported"]
    best, *others = sorted(of("swaps", "LLA"))
    assert (round(best, 2), min(others) > 0.27) == (0.01, True)
    assert max(of("swaps", "gated delta rule")) < 0.12
    assert min(of("swaps", "softmax")) > 0.7
    assert 0.3 < min(of("swaps", "softmax", 15000)) < max(of("swaps", "softmax", 15000)) < min(of("swaps", "softmax"))
    assert min(min(of("permutations", mixer)) for mixer in state_tracking.MIXERS) > 0.98
    page = " ".join((Path(__file__).parents[1] / "docs" / "experiments.md").read_text().split())
    seconds = [runs[f"16 swaps, {run}"]["seconds"] for run in ("15000 steps, softmax", "5000 steps, LLA")]
    assert "in three times as many, which took it longer ({:.0f} s for LLA's {:.0f};".format(*seconds) in page
