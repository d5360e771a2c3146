"""The soak: what it calls a leak, and that it finds none in a few seconds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import record
from tests import soak

pytestmark = pytest.mark.quick


def looks(**leak: float) -> list[dict[str, float]]:
    """Eight looks at memory that grows by so much from one to the next."""
    return [
        {"host": 500.0, "allocated": 0.0, "reserved": 60.0, "kernels": 90.0, **{n: x * i for n, x in leak.items()}}
        for i in range(8)
    ]


def test_what_is_a_leak() -> None:
    assert soak.leaks(soak.growth(looks())) == []
    assert soak.leaks(soak.growth(looks(host=20.0))) == ["host"]
    assert soak.leaks(soak.growth(looks(allocated=0.01))) == ["allocated"]
    assert soak.leaks(soak.growth(looks(reserved=200.0))) == ["reserved"]
    assert soak.leaks(soak.growth(looks(host=20.0, kernels=40.0))) == []  # what is compiled takes room


def test_a_short_soak() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    soak.soak("cpu", 1, 3, told.append)
    assert {seed for seed, _ in told} == {3}
    assert len(told) >= 2  # however slow the machine is
    assert told[-1][1]["problems"] > 0


@pytest.mark.slow
def test_what_was_seen_is_kept_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that is cut short has what there is so far."""
    path, kept = tmp_path / "soak.json", []
    write = record.Record.write

    def note(self: record.Record) -> None:
        write(self)
        kept.append(json.loads(path.read_text())["processes"])

    monkeypatch.setattr(record.Record, "write", note)
    assert soak.main(["--device", "cpu", "--seconds", "1", "--processes", "1", "--json", str(path)]) in (0, 1)
    assert len(kept) >= 2
    for processes, following in itertools.pairwise(kept):
        assert following[0]["looks"][: len(processes[0]["looks"])] == processes[0]["looks"]
    assert kept[-1][0]["seconds"] >= 1
    assert kept[-1][0]["calls"] >= kept[0][0]["calls"]


def fails(*_: object) -> None:
    raise RuntimeError("as it is to")


@pytest.mark.slow
def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(soak, "soak", fails)
    assert soak.main(["--device", "cpu", "--seconds", "1", "--processes", "2"]) == 1
    assert "what process 0 raised is above" in capsys.readouterr().out
