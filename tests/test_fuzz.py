"""Random calls: some hundreds, what the fuzzer says of calls that are wrong, and the faults that it has found."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from flashlla.backends.chunked import Chunked
from flashlla.problem import Forward, Gradients
from tests.fuzz import Call, Fault, check
from tests.fuzz.__main__ import main
from tests.fuzz.calls import COMPILED, INTERPRETED, USUAL, Sizes, draw, pasted
from tests.fuzz.campaign import Campaign, Series, one_by_one, row
from tests.fuzz.processes import side_by_side
from tests.fuzz.shrink import shrink
from tests.support import kernels
from tests.support.cases import Case
from tests.support.decoding import Decoding

IN_PYTORCH = ("chunked", "naive")
PLAIN = Case("fuzz_plain", batch=2, heads=4, key_heads=2, length=9, dim=4, window=5)


# What campaigns have found, each as small as it could be made.
FOUND: dict[str, Call] = {
    "terms added to a sum of another size": Call(
        Case(
            name="fuzz_11_3077",
            batch=2,
            heads=3,
            length=23,
            dim=1,
            data="correlated",
            ridge_lambda=44.0,
            layout="sliced",
            key_heads=1,
            value_dim=2,
        ),
        torch.float32,
        "chunked",
    ),
    "one key with nearly all the weight": Call(
        Case(
            name="fuzz_11_4253",
            heads=4,
            length=31,
            dim=1,
            data="offset",
            ridge="per_head_and_token",
            delta_eps=1.0,
            key_heads=2,
            keys=80,
            packed=(18, 13),
            packed_keys=(20, 60),
        ),
        torch.float32,
        "chunked",
    ),
    "many rows for each key": Call(
        Case(
            name="fuzz_11_9740",
            batch=2,
            heads=6,
            length=30,
            dim=3,
            ridge_lambda=12.0,
            ridge="per_head",
            delta_eps=0.001,
            expanded_grad=True,
            key_heads=2,
            value_dim=1,
            causal=False,
        ),
        torch.float32,
        "chunked",
        {"solver": "direct"},
    ),
    "a gradient that is the same for all": Call(
        Case("fuzz_12_5651", length=77, expanded_grad=True, causal=False, seqstarts=(76,)), torch.float32, "chunked"
    ),
    "an output beyond float16": Call(
        Case("fuzz_12_982", length=2, dim=1, ridge_lambda=0.0035, scale=-0.00028, sizes=(1000.0, 1.0, 100.0, 0.01)),
        torch.float16,
        "chunked",
    ),
}


FOUND_IN_KERNELS: dict[str, Call] = {
    "a ridge beyond 2^60 beside keys as large": Call(
        Case("fuzz_large_keys", length=2, dim=1, sizes=(1.0, 1e10, 1.0, 1.0), scale=1e-10, ridge_lambda=1.3e20),
        torch.float32,
        "triton",
    ),
    "large keys, a ridge a head": Call(
        Case("big", length=17, dim=3, sizes=(1.0, 1e13, 1.0, 1.0), scale=1e-13, ridge_lambda=1.3e24, ridge="per_head"),
        torch.float32,
        "triton_pcg",
        {"solver": "pcg_gram"},
    ),
    "a rounded first guess, magnified by a weak ridge": Call(
        Case(
            "fuzz_21_38",
            length=128,
            dim=8,
            data="offset",
            ridge_lambda=0.027,
            ridge="scalar",
            delta_eps=0.0,
            layout="thd",
            key_heads=1,
            causal=False,
            packed=(99,),
        ),
        torch.float32,
        "triton_pcg",
    ),
    "the same of queries far from keys": Call(
        Case("fuzz_21_169", length=50, dim=8, ridge_lambda=0.049, ridge="scalar", scale=5.2, layout="transposed"),
        torch.float32,
        "triton",
    ),
    "one key with nearly all the weight, and a large logit": Call(
        Case("fuzz_21_231", length=2, dim=24, data="offset", ridge_lambda=54.0, scale=2.4), torch.float32, "triton_pcg"
    ),
}


# And of 16-bit inputs, whose (3.1) kernels take as the difference of two halves (docs/math.md, section 6).
FOUND_IN_KERNELS |= {
    "halves that tell nothing of their difference": Call(
        Case("fuzz_13_797", batch=2, length=2, dim=1, data="offset", ridge_lambda=9.4), torch.float16, "triton_pcg"
    ),
    "the same, of packed views": Call(
        Case("fuzz_13_1605", batch=2, dim=1, data="offset", ridge_lambda=3.8, layout="packed", window=2),
        torch.bfloat16,
        "triton",
        {"solver": "pcg_gram"},
    ),
    "halves that are rounded before they are subtracted": Call(
        Case("fuzz_13_794", heads=2, dim=8, scale=2.7, delta_eps=1.0, key_heads=1, keys=3, value_dim=1, seqstarts=(0,)),
        torch.float16,
        "triton",
    ),
    "the same, of large logits": Call(
        Case(
            "fuzz_21_7",
            batch=2,
            heads=2,
            length=15,
            dim=64,
            data="power_law",
            ridge_lambda=48.0,
            scale=2.5,
            delta_eps=0.0,
            causal=False,
            seqlens=(9, 10),
        ),
        torch.bfloat16,
        "triton",
    ),
}


# And what fused kernels compute anew: weights from lse, in each pass; some that float16 has no digits for.
FOUND_IN_KERNELS |= {
    "systems of weights that come from a rounded lse": Call(
        Case(
            "fuzz_31_291",
            length=61,
            data="power_law",
            ridge_lambda=0.057,
            ridge="scalar",
            scale=74000.0,
            delta_eps=0.0,
            sizes=(0.0001, 1.0, 1.0, 1.0),
            layout="bsd",
        ),
        torch.float32,
        "triton_pcg",
    ),
    "a weight too small beside the bound of its row": Call(
        Case("fuzz_44_1765", heads=2, scale=-5.3, keys=4, packed=(4,), packed_keys=(2,)), torch.bfloat16, "triton_pcg"
    ),
    "weights too small for float16": Call(
        Case(
            "fuzz_31_1055",
            length=5,
            data="offset",
            ridge_lambda=80.0,
            scale=0.53,
            keys=47,
            packed=(0, 1),
            packed_keys=(19, 5),
        ),
        torch.bfloat16,
        "triton",
    ),
    "logits rounded otherwise in another pass": Call(
        Case("fuzz_31_234", heads=2, length=1, scale=43.0, sizes=(0.1, 1.0, 0.01, 1.0), keys=49),
        torch.float32,
        "triton",
    ),
    "a product and its transpose": Call(Case("fuzz_13_653", length=7, dim=5, scale=1e4), torch.float32, "triton"),
    "the same, of a lone key": Call(Case("fuzz_13_406", length=13, seqstarts=(12,)), torch.float32, "triton_pcg"),
    # The budget was wrong of it: one query of 257 has two keys at large logits, its neighbours one each.
    "a query unlike its neighbours": Call(
        Case("fuzz_43_6100", length=257, dim=64, ridge_lambda=27.0, scale=6.5), torch.float32, "triton_pcg"
    ),
}


def recorded() -> Iterator[Any]:
    """What is wrong in the records of campaigns, and has no name above: calls by number of each."""
    named = {call.case.name for call in (*FOUND.values(), *FOUND_IN_KERNELS.values())}
    for path in sorted(record.RESULTS.glob("fuzz_*.json")):
        kept = json.loads(path.read_text())
        for fault in kept["faults"]:
            if f"fuzz_{kept['seed']}_{fault['number']}" not in named:
                yield pytest.param(read(fault["call"]), id=f"{path.stem}-{fault['number']}")


def read(program: str) -> Call:
    """The call of what `pasted` wrote."""
    scope: dict[str, Any] = {}
    *imports, line = program.splitlines()
    exec("\n".join(imports), scope)
    call: Call = eval(line.removeprefix("check(").removesuffix(")"), scope)
    return call


@pytest.mark.quick
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_right(name: str) -> None:
    assert check(FOUND[name]) == ("loose" if "beyond float16" in name else "right")


@kernels.interpreted
@pytest.mark.parametrize("name", FOUND_IN_KERNELS)
def test_what_was_found_in_kernels_is_right(name: str) -> None:
    assert check(dataclasses.replace(FOUND_IN_KERNELS[name], twice=False)) == "right"


# Of 16-bit inputs: gradients without a digit (2e-7 and less of what cancels in them), logits of 4e5, a ridge of 0.003
# beside 128 numbers of one key.
NOT_CARRIED = ("fuzz_21_280", "fuzz_31_812", "fuzz_41_2221", "fuzz_41_4308")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=kernels.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("call", list(recorded()))
def test_what_is_wrong_in_a_record_is_right_now(call: Call, device: str) -> None:
    assert check(call, device) in ("right", "loose" if call.case.name in NOT_CARRIED else "right")


def run(first: int, many: int, backends: tuple[str, ...], sizes: Sizes = USUAL) -> Campaign:
    campaign = Campaign()
    campaign.add(one_by_one(Series(0, backends, sizes=sizes), range(first, first + many)))
    assert not campaign.faults, campaign.faults[0]["call"]
    return campaign


@pytest.mark.parametrize("first", [0, 60, 120, 180])
def test_random_calls(first: int) -> None:
    campaign = run(first, 60, IN_PYTORCH)
    assert sum(n for (_, verdict), n in campaign.found.items() if verdict == "right") > 30


@kernels.interpreted
def test_random_calls_of_kernels() -> None:
    run(0, 12, ("triton", "triton_pcg"), sizes=INTERPRETED)


@pytest.mark.quick
def test_the_same_number_is_the_same_call() -> None:
    for number in range(50):
        assert pasted(draw(1, number, IN_PYTORCH)) == pasted(draw(1, number, IN_PYTORCH))
    assert len({pasted(draw(1, number, IN_PYTORCH)) for number in range(50)}) == 50


@pytest.mark.quick
def test_calls_of_one_kind_follow_one_another() -> None:
    """They differ, in nothing that kernels are compiled for."""
    kinds = set()
    for first in range(0, 40 * COMPILED.turns, COMPILED.turns):
        calls = [draw(4, first + turn, ("triton", "naive"), COMPILED) for turn in range(COMPILED.turns)]
        of = {(c.backend, c.dtype, str(c.options), c.bshd, c.flipped, type(c.case), c.case.layout) for c in calls}
        of_case = {(c.case.dim, c.case.value_dim, c.case.ridge, c.case.window is None) for c in calls}
        assert (len(of), len(of_case)) == (1, 1)
        assert len({pasted(call) for call in calls}) == COMPILED.turns
        kinds |= of
    assert len(kinds) > 25


@kernels.interpreted
def test_calls_of_one_kind_take_the_same_kernels() -> None:
    from flashlla.backends.triton import runtime

    sizes = INTERPRETED._replace(dims=(16,), alike=True, turns=3)
    series, before = Series(1, ("triton",), sizes=sizes), set(runtime.compiled)
    news = []
    for judged in one_by_one(series, range(3, 6)):
        assert judged.verdict in ("right", "loose", "refused", "unconverged")
        news.append(len(runtime.compiled.keys() - before))
        before |= runtime.compiled.keys()
    assert news[0] > 0, news
    assert news[1:] == [0, 0], news


@pytest.mark.quick
def test_what_is_printed_is_the_call() -> None:
    seen = 0
    for number in range(40):
        call = draw(2, number, IN_PYTORCH)
        made = read(pasted(call))
        if call.wrong is None and not call.planted:  # NaN equals nothing, nor does a tensor
            assert made == call
            seen += 1
    assert seen > 20


def spoil(monkeypatch: pytest.MonkeyPatch, forward: Any = None, backward: Any = None) -> None:
    """The chunked backend gives what these make of its results."""
    right_forward, right_backward = Chunked.forward_plain, Chunked.backward_plain
    if forward:
        monkeypatch.setattr(Chunked, "forward_plain", lambda *given: forward(given, right_forward(*given)))
    if backward:
        monkeypatch.setattr(Chunked, "backward_plain", lambda *given: backward(given, right_backward(*given)))


def a_little_off(_: Any, found: Forward) -> Forward:
    return found._replace(o=found.o * (1 + 1e-4))


def without_ridge(_: Any, found: Gradients) -> Gradients:
    return found._replace(ridge_lambda=found.ridge_lambda * 1.01)


def with_noise(_: Any, found: Forward) -> Forward:
    return found._replace(o=found.o + 1e-3 * torch.rand(()))


def last_head_first(_: Any, found: Forward) -> Forward:
    return found._replace(o=found.o.flip(1))


def refused(_: Any, found: Forward) -> Forward:
    raise RuntimeError("size mismatch")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "spoilt"),
    [
        ("over budget", {"forward": a_little_off}),
        ("over budget", {"forward": last_head_first}),
        ("over budget", {"backward": without_ridge}),
        ("not the same again", {"forward": with_noise}),
        ("raised", {"forward": refused}),
    ],
)
def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, kind: str, spoilt: dict[str, Any]) -> None:
    call = Call(dataclasses.replace(PLAIN, ridge="per_head"), torch.float32, "chunked")
    assert check(call) == "right"
    spoil(monkeypatch, **spoilt)
    with pytest.raises(Fault, match=f"^{kind}"):
        check(call)


@pytest.mark.parametrize("place", [0.0, pytest.param(0.4, marks=pytest.mark.quick), 1.0])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad_o"])
def test_nan_that_goes_astray_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, place: float) -> None:
    call = Call(PLAIN, torch.float32, "chunked", planted=((name, place, float("nan")),))
    assert check(call) == "right"
    everywhere = lambda _, found: Gradients(*(t * t.sum() for t in found))
    spoil(monkeypatch, backward=everywhere)
    with pytest.raises(Fault):
        check(call)


@pytest.mark.quick
def test_what_should_be_refused_and_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Fault, match="taken: window=3 was not refused"):
        check(Call(PLAIN, torch.float32, "chunked", wrong=("window", 3)))
    assert check(Call(PLAIN, torch.float32, "chunked", wrong=("window", 0))) == "refused"


@pytest.mark.quick
def test_the_smallest_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fault that needs a window and three queries, little else is left."""

    def fails(call: Call) -> bool:
        return call.case.window is not None and call.case.length >= 3

    case = dataclasses.replace(PLAIN, seqlens=(9, 4), ridge="per_token", scale=0.3, layout="transposed")
    call = Call(case, torch.float32, "chunked", {"solver": "cg"}, flipped=True, lengths="int64")
    smallest = shrink(call, fails)
    assert smallest.case == Case("fuzz_plain", length=3, dim=1, window=1)
    assert (smallest.options, smallest.flipped, smallest.lengths) == ({}, False, "int32")
    decoding = Call(
        Decoding("", lengths=(40, 17, 3), page=16, room=64, heads=6, key_heads=2, new=3), torch.float32, "naive"
    )
    smallest = shrink(decoding, lambda call: max(call.case.lengths) > 5)
    assert smallest.case == Decoding("", lengths=(6,), room=6, heads=1, key_heads=1, dim=1, value_dim=1)


class Deadly(Series):
    """Number 2 ends the process that makes the call."""

    def draw(self, number: int) -> Call:
        if number == 2 and multiprocessing.parent_process():
            os._exit(7)
        return super().draw(number)


def test_processes_give_what_one_gives() -> None:
    series, alone, together = Series(3, IN_PYTORCH), Campaign(), Campaign()
    alone.add(one_by_one(series, range(20)))
    together.add(side_by_side(2, series, range(20), seconds=math.inf))
    assert together.table() == alone.table()
    assert not together.faults
    assert not list(side_by_side(2, series, range(20), seconds=-1))


@pytest.mark.parametrize("turns", [1, 4])
def test_a_call_that_its_process_does_not_outlive_is_told(turns: int) -> None:
    """And the others are judged all the same."""
    campaign = Campaign()
    series = Deadly(3, IN_PYTORCH, sizes=USUAL._replace(turns=turns))
    campaign.add(side_by_side(1, series, range(6), seconds=math.inf))
    (fault,) = campaign.faults
    assert (campaign.calls, fault["number"], fault["seen"]) == (6, "2", "died: its process ended with 7")


def test_a_campaign_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--calls", "6", "--seed", "5", "--backend", "chunked", "--json", str(tmp_path / "calls.json")]
    assert main(arguments) == 0
    kept = json.loads((tmp_path / "calls.json").read_text())
    assert (kept["seed"], kept["calls"], kept["faults"]) == (5, 6, [])
    assert sum(kept["verdicts"]["chunked"].values()) == 6
    assert {"date", "device", "torch", "python"} <= kept.keys()
    spoil(monkeypatch, forward=a_little_off)
    assert main([*arguments, "--calls", "12"]) == 1
    assert "check(Call(case=" in capsys.readouterr().out


@pytest.mark.quick
def test_the_page_tells_of_every_campaign() -> None:
    page = (record.RESULTS.parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(record.RESULTS.glob("fuzz_*.json"))}
    assert kept
    for name, campaign in kept.items():
        assert row(campaign, name) in page, row(campaign, name)
