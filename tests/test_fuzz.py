"""Random calls: some hundreds, what the fuzzer says of calls that are wrong, and the faults that it has found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashlla.backends.chunked import Chunked
from flashlla.problem import Forward, Gradients
from tests.fuzz import Call, Fault, check
from tests.fuzz.__main__ import main
from tests.fuzz.calls import draw, pasted
from tests.fuzz.campaign import Campaign
from tests.fuzz.shrink import shrink
from tests.support import kernels
from tests.support.cases import Case
from tests.support.decoding import Decoding

IN_PYTORCH = ("chunked", "naive")
PLAIN = Case("fuzz_plain", batch=2, heads=4, key_heads=2, length=9, dim=4, window=5)


def run(first: int, many: int, backends: tuple[str, ...], small: bool = False) -> Campaign:
    campaign = Campaign()
    campaign.run(0, range(first, first + many), backends, "cpu", small, say=False)
    assert not campaign.faults, campaign.faults[0]["call"]
    return campaign


@pytest.mark.parametrize("first", [0, 60, 120, 180])
def test_random_calls(first: int) -> None:
    campaign = run(first, 60, IN_PYTORCH)
    assert sum(n for (_, verdict), n in campaign.found.items() if verdict == "right") > 30


@kernels.interpreted
def test_random_calls_of_kernels() -> None:
    run(0, 12, ("triton", "triton_pcg"), small=True)


@pytest.mark.quick
def test_the_same_number_is_the_same_call() -> None:
    for number in range(50):
        assert pasted(draw(1, number, IN_PYTORCH, False)) == pasted(draw(1, number, IN_PYTORCH, False))
    assert len({pasted(draw(1, number, IN_PYTORCH, False)) for number in range(50)}) == 50


@pytest.mark.quick
def test_what_is_printed_is_the_call() -> None:
    seen = 0
    for number in range(40):
        call = draw(2, number, IN_PYTORCH, False)
        scope: dict[str, Any] = {}
        *imports, line = pasted(call).splitlines()
        exec("\n".join(imports), scope)
        made = eval(line.removeprefix("check(").removesuffix(")"), scope)
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


@pytest.mark.quick
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
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


@pytest.mark.quick
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
