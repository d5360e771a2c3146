"""What README.md and docs/distributed.md say in words of several GPUs is what the records hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"all_gather": "", "all_to_all": "all_to_all_"}


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


RECORD = record("distributed_h100")


def words(page: str) -> str:
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


PAGE, README = words("docs/distributed.md"), words("README.md")


def on(gpus: int, lines: list[dict[str, Any]], **which: Any) -> dict[str, Any]:
    (line,) = (line for line in lines if line["gpus"] == gpus and which.items() <= line.items())
    return line


def test_several_gpus_are_so_many_times_as_fast() -> None:
    one = on(1, RECORD["turns"])
    times = {
        (gpus, method): one["step_s"] / on(gpus, RECORD["turns"])[f"{prefix}step_s"]
        for gpus in (2, 4)
        for method, prefix in METHODS.items()
    }
    gathered, exchanged = ([f"{times[gpus, method]:.1f}" for gpus in (2, 4)] for method in METHODS)
    told = (
        "{} times as fast on two H100s as on one and {} times on four by `all_gather`, {} and {} times by `all_to_all`"
    )
    assert told.format(*gathered, *exchanged) in README


def test_efficiencies_that_were_wanted() -> None:
    """All are reached but one, which the page tells."""
    missed = set()
    for gpus, wanted in ((2, 0.9), (4, 0.85)):
        line = on(gpus, RECORD["turns"])
        for name, efficiency in line.items():
            if name.endswith("_efficiency") and efficiency < wanted:
                missed.add((gpus, name))
        longer = on(gpus, RECORD["speed"], length=131072)
        assert min(longer[f"{p}{n}_efficiency"] for p in METHODS.values() for n in ("forward", "step")) >= wanted
    assert missed == {(2, "forward_efficiency")}
    assert f"on two takes {100 * on(2, RECORD['turns'])['forward_efficiency']:.0f} %" in PAGE
    assert f"and {100 * on(2, RECORD['speed'], length=32768)['forward_efficiency']:.0f} in the table above" in PAGE


def test_where_a_lone_call_goes() -> None:
    kept = record("distributed_two_h100")
    lines = {(tuple(line["cards"]), line["what"], line["way"]): line for line in kept["lines"]}
    pairs = [(0, 1), (2, 3)]
    mean = lambda way: sum(lines[pair, "forward", way]["ms"] for pair in pairs) / len(pairs)
    cards = [ms for pair in pairs for ms in lines[pair, "forward", "one"]["by_rank_ms"]]
    one = sum(cards) / len(cards)
    share = lambda way: one / 2 / mean(way)
    assert f"{mean('main'):.1f} ms forward, {share('main'):.1%} beside".replace("%", " %") in PAGE
    assert f"from {min(cards):.1f} to {max(cards):.1f} ms, whichever card it is" in PAGE
    assert f"keys there already it is {mean('here'):.1f} ms, {share('here'):.0%}".replace("%", " %") in PAGE
    assert f"takes {mean('its heads'):.1f} ms, {share('its heads'):.0%}".replace("%", " %") in PAGE
    begun = [
        host
        for run in kept["timeline"]
        if run["way"] == "main"
        for host in next(row["host_ms"] for row in run["rows"] if row["at"] == "part begins")
    ]
    assert f"the host has begun the first part, {min(begun):.1f} to {max(begun):.1f} ms" in PAGE
    since = {(line["what"], line["way"]): line for line in kept["since"]["lines"]}
    forward, step = ({way: since[what, way] for way in ("before", "now", "late")} for what in ("forward", "step"))
    assert f"after {forward['now']['host_ms']:.2f} ms for {forward['before']['host_ms']:.2f}" in PAGE
    assert f"took {forward['now']['ms']:.1f} ms for {forward['before']['ms']:.1f}" in PAGE
    assert f"{step['now']['ms']:.1f} for {step['before']['ms']:.1f}" in PAGE
    for how, line in (("less", forward["now"]), ("more", step["now"])):
        difference, error = abs(line["more_than_before_ms"]), line["standard_error_ms"]
        assert f"{how} by {difference:.2f} ± {error:.2f}" in PAGE
    assert f"{forward['late']['host_ms']:.2f} ms, {forward['late']['ms']:.1f} and {step['late']['ms']:.1f}" in PAGE
    again = {"largest_kernel", "cast_kernel", "gram_sums_kernel", "gram_kernel"}
    for part in kept["second_parts"]:
        spent = sum(ms for kernel, ms in part["ms"].items() if kernel in again)
        assert abs(spent - (0.4, 0.8)[part["rank"]]) < 0.05
    assert "0.4 ms of a forward pass on the slower rank of two, 0.8 on the other" in PAGE
    for pair in pairs:
        first, second = lines[pair, "forward", "here"]["by_rank_ms"]
        assert abs(first - second - 1.1) < 0.1


def test_errors_on_two_and_on_four_are_those_of_one() -> None:
    given = ("o", "dq", "dk", "dv", "dridge")
    names = {"dridge": "dlambda"}
    for gpus in (2, 4):
        line = on(gpus, RECORD["accuracy"], what="all_gather")
        assert ", ".join(f"{names.get(x, x)} {1e3 * line[x]['across']:.1f}e-3" for x in given) in PAGE
        for what in ("all_gather", "all_to_all", "window", "packed"):
            for errors in (on(gpus, RECORD["accuracy"], what=what)[x] for x in given):
                assert abs(errors["across"] / errors["alone"] - 1) < 0.05
                assert errors["apart"] <= (0 if what == "all_to_all" else 2.65e-3)


def test_losses_of_tiny_gpt() -> None:
    two, four = (on(gpus, RECORD["training"]) for gpus in (2, 4))
    assert {f"{loss:.4f}" for line in (two, four) for loss in (line["across"][0], line["alone"][0])} == {"5.4837"}
    told = f"{two['alone'][0]:.4f} to {two['across'][-1]:.4f} on two, {four['across'][-1]:.4f} on four"
    assert told in PAGE
    assert f"at most {two['apart']:.1e} apart on two, {four['apart']:.1e} on four".replace("e-0", "e-") in PAGE


def test_of_524288_tokens() -> None:
    lines = record("distributed_long_h100")["speed"]
    one, four = on(1, lines), on(4, lines)
    assert f"{one['forward_s']:.1f} s forward, {one['step_s']:.1f} a step, {one['peak_gib']:.1f} GiB" in PAGE
    for method, prefix in METHODS.items():
        efficiencies = (one[name] / (4 * four[prefix + name]) for name in ("forward_s", "step_s"))
        assert "{:.0%} and {:.0%} by `{}`".format(*efficiencies, method).replace("%", " %") in PAGE


def test_what_is_planned_on_paper_is_from_the_step_measured() -> None:
    step = on(4, RECORD["speed"], length=131072)
    assert f"{4 * step['step_s'] / 131072**2:.2e} S^2 / W seconds".replace("e-10", "e-10") in PAGE
