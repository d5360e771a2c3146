"""warmup: it makes the calls that it says, and says in words where there is nothing to compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashlla
from flashlla import warming
from flashlla.__main__ import main
from tests.support.interpreter import hasten
from tests.support.kernels import interpreted
from tests.support.replay import LAUNCHES, compiles

hasten()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernels are compiled, to what does nothing, on the CPU."""
    pytest.importorskip("triton")
    compiles(monkeypatch, computes=False)
    monkeypatch.setattr(warming, "_nothing_to_compile", lambda: None)


SMALL: dict[str, Any] = {"head_dim": 16, "shapes": [(1, 2, 40)], "device": "cpu"}


@interpreted
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore::flashlla.ConvergenceWarning")  # of kernels that do nothing
def test_what_is_warmed_up_is_not_compiled_again(capsys: pytest.CaptureFixture[str]) -> None:
    made = flashlla.warmup(**SMALL)
    assert made.kernels == LAUNCHES["compiled"] > 10
    assert made.reason is None
    assert f"{made.kernels} kernels in" in capsys.readouterr().err
    assert flashlla.warmup(**SMALL, verbose=False).kernels == 0
    assert not capsys.readouterr().err

    q, k, v = (torch.randn(3, 2, 50, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for ridge in (1.0, torch.ones(2, 1)):
        flashlla.lla_attention(q, k, v, ridge_lambda=ridge, backend="triton").sum().backward()
    flashlla.lla_decode(*(t.detach() for t in (q[:, :, :1], k, v)), torch.tensor([9, 40, 50], dtype=torch.int32))
    assert LAUNCHES["compiled"] == made.kernels


@interpreted
@pytest.mark.usefixtures("compiler")
def test_no_more_is_compiled_than_is_asked_for() -> None:
    kernels = {what: flashlla.warmup(**SMALL, what=[what], verbose=False).kernels for what in warming.WHAT}
    assert all(kernels.values())
    assert flashlla.warmup(**SMALL, what=warming.WHAT, verbose=False).kernels == 0
    assert flashlla.warmup(**SMALL, what=["forward"], window=16, verbose=False).kernels > 0


@interpreted
@pytest.mark.usefixtures("compiler")
def test_lines_where_tqdm_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warming, "_tqdm", lambda: None)
    flashlla.warmup(**SMALL, what=["forward"])
    said = capsys.readouterr().err.splitlines()
    for ridge in ("one ridge", "a ridge a head"):
        assert any(line.endswith(f"forward, 1 x 2 x 40 x 16, bfloat16, {ridge}") for line in said)


@pytest.mark.quick
def test_without_a_compiler_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    made = flashlla.warmup()
    assert made.kernels == 0
    assert "TRITON_INTERPRET=1 is set" in str(made.reason) or "no CUDA device" in str(made.reason)
    assert f"nothing is compiled: {made.reason}" in capsys.readouterr().err
    assert main(["warmup", "--head-dim", "64", "128"]) == 0
    assert capsys.readouterr().err.count("nothing is compiled") == 1


@pytest.mark.quick
def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[dict[str, Any]] = []

    def note(head_dim: int, dtype: torch.dtype, **rest: Any) -> warming.Warmup:
        calls.append({"head_dim": head_dim, "dtype": dtype, **rest})
        return warming.Warmup(1, 1.0)

    monkeypatch.setattr(flashlla, "warmup", note)
    assert main(["warmup", "--head-dim", "64", "128", "--what", "decode", "--shapes", "2x3x5", "--window", "7"]) == 0
    rest = {"what": ["decode"], "shapes": [(2, 3, 5)], "kv_heads": None, "causal": True, "window": 7}
    assert calls == [{"head_dim": dim, "dtype": torch.bfloat16, **rest} for dim in (64, 128)]
    for wrong, words in (("--what=forwards", "invalid choice"), ("--shapes=2x3", "wanted batch x heads x tokens")):
        with pytest.raises(SystemExit):
            main(["warmup", wrong])
        assert words in capsys.readouterr().err


@pytest.mark.quick
def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="what: got 'backwards', wanted some of 'forward', 'backward', 'decode'"):
        flashlla.warmup(what=["backwards"])
