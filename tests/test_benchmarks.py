"""The benchmark anyone can run: its data, its float64 rows, its counts, what it writes and what it compares."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from benchmarks import cpu, data, distributed, exact, keys, model, plots, record, report, run, timing
from benchmarks.__main__ import COMMANDS, main, parse
from tests.support import cases
from tests.support.helpers import normal

SMALL = ["run", "--device", "cpu", "--shapes", "1x2x40x8", "1x2x72x8", "--ridges", "1"]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is made once and said to take 2 ms."""

    def milliseconds(call: Callable[[], Any], device: str = "cpu") -> float:
        call()
        return 2.0

    monkeypatch.setattr(timing, "milliseconds", milliseconds)


def of_size(*shape: int, kind: str = "iid", **options: Any) -> list[Tensor]:
    return data.make(shape, kind, dtype=torch.float64, device="cpu", **options)


@pytest.mark.quick
@pytest.mark.parametrize("kind", data.KINDS)
def test_exact_rows_are_those_of_the_naive_backend(kind: str):
    tensors = of_size(2, 3, 70, 8, kind=kind)
    q, k, v = (t.requires_grad_() for t in tensors[:3])
    o = flashlla.lla_attention(q, k, v, ridge_lambda=0.3, backend="naive")
    (dq,) = torch.autograd.grad(o, q, tensors[3])
    sample = exact.sample(tensors, 0.3)
    assert sample.heads.tolist() == [0, 2, 5]
    assert sample.rows[:8].tolist() == list(range(8))
    assert sample.rows[-1] == 69
    assert all(error < 1e-9 for error in sample.errors(o=o, dq=dq).values())
    for wrong in (o * 1.001, o.roll(1, dims=2)):
        assert sample.errors(o=wrong)["o"] > 0.99e-3
    assert sample.errors(dq=dq * 1.001)["dq"] > 0.99e-3


@pytest.mark.parametrize("kind", data.TRAINED)
def test_exact_rows_of_trained_keys_and_of_windows(kind: str):
    shape = (1, 7, 90, 64)
    tensors, ridge = of_size(*shape, kind=kind), data.learned_ridge(shape, kind, "cpu")
    for window in (None, 20):
        q, k, v = (t.requires_grad_() for t in tensors[:3])
        o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge, window=window, backend="naive")
        (dq,) = torch.autograd.grad(o, q, tensors[3])
        sample = exact.sample(tensors, ridge, window=window)
        assert sample.heads.tolist() == [0, 3, 6]
        assert all(error < 1e-6 for error in sample.errors(o=o, dq=dq).values())
        assert sample.errors(o=o.roll(1, dims=1))["o"] > 0.1


@pytest.mark.parametrize("name", data.TRAINED)
def test_kept_keys(name: str):
    """A shallow, a middle and a deep layer's, small, and such as have been trained."""
    path = keys.FOLDER / f"{name}.pt"
    found = keys.kept(name)
    assert path.stat().st_size < 3e6
    assert found.q.dtype == found.v.dtype == torch.float16
    assert found.q.shape == (3, 2, 1024, 64)
    assert found.layers == sorted(set(found.layers))
    assert ('"qk_norm": true' in found.recipe) == (name == "trained_qknorm")
    facts = keys.facts(found, layer=1, head=1)
    assert 0.1 < facts["ridge"] < 10
    assert 1 < facts["effective keys"] < 300
    assert 4 < facts["iterations"] < 10


def test_trained_keys_are_tiled_cut_and_refused():
    found = keys.kept("trained")
    q, k, v, ridge = found.tiled((4, 3, 50, 64), torch.float64, "cpu")
    assert q.shape == k.shape == v.shape == (4, 3, 50, 64)
    assert ridge.shape == (4, 3, 1)
    for head, where in ((0, (0, 0)), (5, (2, 1)), (7, (0, 1)), (11, (2, 1))):  # six heads, again and again
        assert torch.equal(q.flatten(0, 1)[head], found.q[where][:50].double())
        assert torch.equal(ridge.flatten(0, 1)[head], found.ridge[where])
    with pytest.raises(ValueError, match=r"end at 1024 tokens, and 1025 are asked for; try --data iid"):
        found.tiled((1, 1, 1025, 64), torch.float32, "cpu")
    with pytest.raises(ValueError, match="have head dim 64, and 32 is asked for"):
        found.tiled((1, 1, 8, 32), torch.float32, "cpu")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's file: one layer, three heads, a ridge of each token."""
    q, k, v = (normal(1, 3, 30, 8, seed=seed).half() for seed in range(3))
    ridge = torch.linspace(1, 2, 90).view(1, 3, 30)
    made = keys.Keys(q, k, v, ridge, layers=[4], scale=8**-0.5, recipe="drawn")
    made.write(tmp_path / "mine.pt")
    return tmp_path / "mine.pt"


@pytest.mark.usefixtures("instant")
def test_keys_of_ones_own(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    record_path = tmp_path / "run.json"
    swept = [
        "run",
        "--device",
        "cpu",
        "--from",
        str(own),
        "--shapes",
        "1x4x20x8",
        "--backends",
        "chunked",
        "--no-plots",
    ]
    assert main([*swept, "--tolerances", "1e-6", "1e-1", "--json", str(record_path)]) == 0
    lines = json.loads(record_path.read_text())["lines"]
    assert [(line["data"], line["ridge"], line["tolerance"]) for line in lines[::2]] == [
        ("mine", "learned", 1e-6), ("mine", "learned", 1e-1),
    ]  # fmt: skip
    assert lines[0]["error"] < 1e-4 < lines[2]["error"]
    assert "| mine " in record_path.with_suffix(".md").read_text()

    monkeypatch.setattr(keys, "FOLDER", tmp_path / "kept")
    assert main(["keys", str(own), "--heads", "0", "2", "--keep", "mine"]) == 0
    assert capsys.readouterr().out.count("layer 4 head") == 2
    kept = keys.kept("mine")
    assert torch.equal(kept.ridge[0, 1], keys.kept(str(own)).ridge[0, 2])
    assert kept.recipe == "drawn; heads [0, 2]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v": torch.zeros(1, 3, 30, 7)}, r"v is \(1, 3, 30, 7\), where q is \(1, 3, 30, 8\)"),
        ({"ridge": torch.ones(1, 3)}, r"ridge is \(1, 3\)"),
        ({"scale": 1.0}, r"scale is 1.0, wanted 1 / sqrt\(D\)"),
        ({"lam": 1.0}, "lam.*keys --help"),
    ],
)
def test_files_that_hold_no_keys(own: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture):
    torch.save({**torch.load(own), **change}, own)
    with pytest.raises(ValueError, match=words):
        keys.Keys.read(own)
    assert main(["keys", str(own.with_name("none.pt"))]) == 2
    assert "there are no keys in" in capsys.readouterr().err


@pytest.mark.usefixtures("instant")
def test_windows_are_compared_with_plain_attention_a_pair():
    options = parse([*SMALL, "--backends", "chunked"])
    case = run.Case((1, 2, 40, 8), ridges=(1.0,), window=5)
    for line in run.sweep([case], options):
        assert "failed" not in line
        assert line["window"] == 5
        assert line["error"] < 1e-5
        assert line["causal_ms"] == pytest.approx(2.0 * (5 * 40 - 10) / (40 * 41 / 2))  # ms, of any call
        assert line["ratio"] == pytest.approx(2.0 / line["causal_ms"])
        assert "sdpa_ms" not in line


def test_a_step_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    solved = []
    attention = flashlla.lla_attention

    def spy(*tensors: Tensor, **options: Any) -> Any:
        solved.append(options["tolerance"])
        return attention(*tensors, **options)

    monkeypatch.setattr("flashlla.nn.attention.lla_attention", spy)
    monkeypatch.setattr(model, "TEXT", 20_000)
    sizes = ["--layers", "2", "--width", "32", "--heads", "2", "--length", "24", "--batch", "2", "--device", "cpu"]
    few = ["--warm", "2", "--rounds", "2", "--steps", "1", "--modes", "eager", "--tolerances", "1e-2", "1e-1"]
    path = tmp_path / "model.json"
    assert main(["model", *sizes, *few, "--json", str(path)]) == 0
    made = json.loads(path.read_text())
    assert [(row["attention"], row["tolerance"]) for row in made["rows"]] == [
        ("softmax", None),
        ("lla", 0.01),
        ("lla", 0.1),
    ]
    softmax, *ours = made["rows"]
    for row in ours:
        assert row["ratio"] == pytest.approx(row["ms"] / softmax["ms"])
        assert row["added_ms"] == pytest.approx((row["ms"] - softmax["ms"]) / 2)
    assert Counter(solved) == {0.01: 2 * (2 + 3 + 2), 0.1: 2 * (3 + 2)}  # two layers; warmed, compiled, measured
    assert all(model.row(row) in path.with_suffix(".md").read_text() for row in made["rows"])
    assert model.HEADING in capsys.readouterr().out


def test_a_sample_of_one_token():
    tensors = of_size(1, 1, 1, 4)
    sample = exact.sample(tensors, 1.0)
    assert sample.errors(o=tensors[2], dq=torch.zeros_like(tensors[0])) == {"o": 0.0, "dq": 0.0}
    assert sample.errors(dq=tensors[0])["dq"] == math.inf


def test_the_blocked_sequence_is_the_recurrence():
    steps = normal(2, 45, 3)
    x = steps[:, 0]
    for t, made in enumerate(data.autoregressive(steps).unbind(1)):
        if t:
            x = 0.95 * x + math.sqrt(1 - 0.95**2) * steps[:, t]
        torch.testing.assert_close(made, x, rtol=1e-12, atol=1e-12)


def autocorrelation(x: Tensor, lag: int) -> float:
    x = x - x.mean()
    return float((x[..., lag:, :] * x[..., : x.shape[-2] - lag, :]).mean() / x.square().mean())


def test_the_kinds_are_those_of_the_tests():
    assert {*data.KINDS, "offset"} == set(cases.DATA)


@pytest.mark.parametrize("kind", data.KINDS)
def test_values_and_gradients_are_normal(kind: str):
    _, _, v, grad_o = of_size(2, 4, 1000, 16, kind=kind)
    for t in (v, grad_o):
        assert abs(t.mean()) < 0.02
        assert abs(t.std() - 1) < 0.02
        assert abs(autocorrelation(t, 1)) < 0.02
    assert abs((v * grad_o).mean()) < 0.02


@pytest.mark.parametrize(("kind", "length_of_q"), [("iid", 1), ("sharp", 3)])
def test_normal_kinds(kind: str, length_of_q: float):
    q, k, *_ = of_size(2, 4, 1000, 16, kind=kind)
    assert abs(q.std() / length_of_q - 1) < 0.02
    assert abs(k.std() - 1) < 0.02
    assert abs((q * k).mean()) < 0.05
    assert abs(autocorrelation(k, 1)) < 0.02


def test_correlated():
    q, k, *_ = of_size(2, 4, 4000, 16, kind="correlated")
    for t in (q, k):
        assert abs(autocorrelation(t, 1) - 0.95) < 0.01
        assert abs(autocorrelation(t, 10) - 0.95**10) < 0.05
        assert abs(t.square().mean() - 1) < 0.25  # the matrices are random, too
    x, y = q.flatten(0, 2), k.flatten(0, 2)  # of one sequence: k is linear in q
    assert exact.relative(x @ torch.linalg.lstsq(x, y).solution, y) < 1e-3


def test_power_law():
    q, k, *_ = of_size(2, 4, 4000, 16, kind="power_law")
    for t in (q, k):
        rows = t.flatten(0, 2)
        deviations = torch.linalg.eigvalsh(rows.T.cov()).flip(0).sqrt()
        wanted = 1 / torch.arange(1, 17, dtype=torch.float64)
        torch.testing.assert_close(deviations / deviations[0], wanted, rtol=0.05, atol=0)
        assert abs(deviations.square().mean() - 1) < 0.05
    means = [t.flatten(0, 2).mean(0) for t in (q, k)]
    assert exact.relative(means[0], means[1]) < 0.05
    assert means[0].norm() > 1


def test_seeds_offsets_and_dtypes():
    first, again, other = (of_size(1, 2, 30, 8, seed=seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    away = [a - b for a, b in zip(of_size(1, 2, 30, 8, offset=30.0), first)]
    assert not away[2].any()
    assert not away[3].any()
    for moved in away[:2]:
        torch.testing.assert_close(moved.norm(dim=-1), torch.full((1, 2, 30), 30.0, dtype=torch.float64))
        assert moved.flatten(0, 2).std(0).max() < 1e-5
    assert {t.dtype for t in data.make((1, 1, 4, 4), device="cpu")} == {torch.bfloat16}


@pytest.mark.quick
def test_counts_of_products():
    case, pairs = run.Case((2, 3, 10, 4)), 6 * 55
    count = lambda backend, which, t: run.tflops(backend, which, t, case, 1e-9) / (2 * 4 * pairs)
    assert case.pairs == pairs
    assert run.Case((2, 3, 10, 4), window=3).pairs == 6 * (1 + 2 + 8 * 3)
    assert count("sdpa", "forward", 0) == pytest.approx(2)
    assert count("sdpa", "both", 0) == pytest.approx(2 + 5)
    assert count("triton", "forward", 1.5) == pytest.approx(3 + 3 * 1.5 + 3)
    assert count("triton_pcg", "backward", 1.5) == pytest.approx(3 + 3 * 1.5 + 5 + 8)
    assert count("triton", "both", 1.5) == pytest.approx(22 + 6 * 1.5)
    assert count("chunked", "both", 1.5) == pytest.approx(4 + 10 + 4 * 1.5)
    assert run.tflops("naive", "forward", 0, case, 1.0) is None
    assert run.tflops("chunked", "forward", 0, case, 1.0) is None  # a direct solver


def test_the_usual_table_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run.Subject, "measure", lambda *_: {"ms": 1.0})
    options = parse(["run", "--device", "cuda"])
    lines = list(run.sweep(run.chosen(options), options))
    assert {line["backend"] for line in lines} == {"triton"}
    assert {line["dtype"] for line in lines} == {"bfloat16"}
    passes = lambda *shape: [line["pass"] for line in lines if line["shape"] == list(shape)]
    assert [(line["data"], line["ridge"], line["tolerance"]) for line in lines[:7:3]] == [
        ("trained_qknorm", "learned", None), ("trained_qknorm", "learned", 1e-2), ("trained_qknorm", "learned", 1e-1),
    ]  # fmt: skip
    assert {line["window"] for line in lines if line["shape"][:3] == [2, 32, 4096]} == {512}
    assert passes(4, 16, 1024, 64) == ["forward", "backward", "both"] * 3
    assert passes(1, 8, 65536, 64) == ["forward"] * 3
    assert passes(4, 16, 4096, 64) == ["forward", "backward"] * (3 + 2 + 2 + 2)


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "run.json"
    swept = [*SMALL, "--passes", "forward", "backward", "both", "--backends", "chunked", "naive"]
    assert main([*swept, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"date", "device", "torch", "python", "command"} <= set(result)
    assert result["matrix_tflops"] > 0
    assert len(result["lines"]) == 2 * 2 * 3
    for line in result["lines"]:
        assert "failed" not in line
        assert line["ms"] > 0
        assert line["ratio"] == pytest.approx(line["ms"] / line["sdpa_ms"])
        assert line["error"] < 1e-5
        assert line["converged"] == 1
        assert (line["iterations"] > 0) == (line["backend"] == "chunked") == ("of_matmul" in line)
    table = path.with_suffix(".md").read_text()
    printed = capsys.readouterr().out
    for line in result["lines"]:
        assert report.row(line) in table
        assert report.row(line) in printed
    for plot in ("run_time.png", "run_error.png"):
        assert (path.parent / plot).read_bytes().startswith(b"\x89PNG")
        assert f"({plot})" in table


@pytest.mark.usefixtures("instant")
def test_a_line_that_fails_says_why_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    attention = flashlla.lla_attention

    def short_of_memory(q: Tensor, *others: Any, **options: Any) -> Any:
        if q.requires_grad and q.shape[2] == 40 and options["backend"] == "naive":
            raise RuntimeError("out of\nmemory | here")
        return attention(q, *others, **options)

    monkeypatch.setattr(flashlla, "lla_attention", short_of_memory)
    path = tmp_path / "run.json"
    backends = ["--backends", "triton", "naive", "--passes", "forward", "backward", "both"]
    assert main([*SMALL, *backends, "--no-plots", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["lines"]
    assert len(lines) == 2 * 2 * 3
    failed = {(x["backend"], x["pass"], x["shape"][2]): x["failed"] for x in lines if "failed" in x}
    assert all("RuntimeError: out of memory | here" in failed["naive", which, 40] for which in ("backward", "both"))
    assert all(
        reason.startswith("UnsupportedError: it") for (backend, *_), reason in failed.items() if backend == "triton"
    )
    assert {key for key in failed if key[0] == "naive"} == {("naive", which, 40) for which in ("backward", "both")}
    table = path.with_suffix(".md").read_text()
    assert "out of memory / here" in table
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("instant")
def test_a_result_that_is_not_finite_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exact.Sample, "errors", lambda self, **results: dict.fromkeys(results, math.nan))
    options = parse([*SMALL, "--backends", "chunked"])
    assert {line.get("failed") for line in run.sweep(run.chosen(options), options)} == {
        "ArithmeticError: the result is not finite"
    }


@pytest.mark.usefixtures("instant")
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def two_lines(cases: Any, options: Namespace) -> Any:
        for count, line in enumerate(sweep(cases, options)):
            if count == 2:
                raise KeyboardInterrupt
            yield line

    sweep = run.sweep
    monkeypatch.setattr(run, "sweep", two_lines)
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--json", str(path)])
    lines = json.loads(path.read_text())["lines"]
    assert len(lines) == 2
    assert all(report.row(line) in path.with_suffix(".md").read_text() for line in lines)


@pytest.mark.usefixtures("instant")
def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "run.json"
    assert main([*SMALL, "--json", str(path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["lines"]) == 2 * 2 * 2


@pytest.mark.usefixtures("instant")
def test_comparison_with_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    again = [*SMALL, "--no-plots"]
    assert main([*again, "--json", str(old)]) == 0
    assert main([*again, "--json", str(new), "--compare", str(old)]) == 0
    assert "8 lines in common, 0 slower" in capsys.readouterr().out

    record = json.loads(old.read_text())
    record["lines"][3]["ratio"] /= 1.06  # the naive backend's backward pass at 40 tokens was faster
    record["lines"][5]["ratio"] /= 1.04
    record["device"] = "another"
    old.write_text(json.dumps(record))
    assert main([*again, "--json", str(new), "--compare", str(old)]) == 1
    printed = capsys.readouterr().out
    assert "slower: 1x2x40x8 float32 iid 1 backward naive default: 0.94 to 1.00 x SDPA (+6%)" in printed
    assert "8 lines in common, 1 slower" in printed
    assert "devices differ" in printed

    assert main([*again, "--ridges", "2", "--json", str(new), "--compare", str(old)]) == 1
    assert "0 lines in common" in capsys.readouterr().out


def test_comparison_counts_what_fails_now():
    line = {"shape": [1, 1, 8, 4], "dtype": "float32", "data": "iid", "ridge": 1.0, "pass": "forward"}
    line |= {"backend": "naive", "solver": "default"}
    ran, failed = {**line, "ratio": 2.0}, {**line, "failed": "it broke"}
    said, fine = report.compare({"device": "x", "lines": [ran]}, {"device": "x", "lines": [failed]})
    assert not fine
    assert "it broke" in said[0]
    once, again = ({"device": "x", "lines": [{**ran, "graph_ratio": ratio}]} for ratio in (4.0, 5.0))
    said, fine = report.compare(once, again)
    assert not fine
    assert said[0] == "slower from a graph: 1x1x8x4 float32 iid 1 forward naive default: 4.00 to 5.00 x SDPA (+25%)"
    assert report.compare(again, once)[1]
    assert report.compare({"device": "x", "lines": [ran]}, {"device": "x", "lines": [ran]})[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "4x16x64"],
        ["--shapes", "4x16x64xD"],
        ["--data", "unheard_of"],
        ["--compare", "no/such/file.json"],
        ["--compare", str(report.__file__)],
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str]):
    with pytest.raises(SystemExit) as exit:
        parse(["run", *arguments])
    assert exit.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: python -m benchmarks {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [["gpu"], ["decode"], ["first"], ["sanitize"], ["run", "--device", "cuda"], ["model", "--device", "cuda"]],
)
def test_without_a_gpu_it_says_so(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"python -m benchmarks {command[0]}: it needs an NVIDIA GPU")
    assert said.err.count("\n") == 1


def test_several_gpus_want_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["distributed", "--device", "cpu"]) == 2
    assert "try `torchrun --nproc-per-node 2 -m benchmarks distributed`" in capsys.readouterr().err


def test_a_group_of_one_is_as_exact_as_the_call_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    small = ["--lengths", "64", "--heads", "2", "--dim", "8", "--cached", "96", "--device", "cpu"]
    kept, kinds = tmp_path / "kept.json", ["accuracy", "speed", "turns", "decode", "balance"]
    assert main(["distributed", *small, "--json", str(kept), "--only", *kinds]) == 0
    figures = json.loads(kept.read_text())
    assert [line["what"] for line in figures["accuracy"]] == ["all_gather", "all_to_all", "window", "packed"]
    for line in figures["accuracy"]:
        for what in ("o", "dq", "dk", "dv", "dridge"):
            assert line[what]["across"] < 1.5 * line[what]["alone"] < 1e-4
    assert figures["speed"][0]["step_s"] > figures["speed"][0]["forward_s"] > 0
    (turns,) = figures["turns"]
    assert turns["rounds"] == distributed.ROUNDS["turns"]
    assert all(turns[f"{how}{what}_s"] > 0 for how in ("", "row_") for what in ("forward", "step"))
    assert figures["decode"][0]["us"] > 0
    assert figures["decode"][0]["host_us"] > 0
    for line in figures["balance"]:
        for ranks, most in line["head_tail"].items():
            assert 1 <= most < line["contiguous"][ranks]


def test_efficiency_is_beside_one_gpu_at_the_same_length():
    one = {"gpus": 1, "length": 64, "forward_s": 8.0, "step_s": 24.0, "row_step_s": 20.0, "graph_step_s": 16.0}
    two = {"gpus": 2, "length": 64, "forward_s": 5.0, "step_s": 12.0, "all_to_all_step_s": 10.0}
    two |= {"row_step_s": 12.5, "graph_step_s": 16.0, "all_to_all_graph_step_s": 10.0}
    _, found, longer = distributed.with_efficiencies([one, two, {**two, "length": 128}])
    assert (found["forward_efficiency"], found["step_efficiency"]) == (0.8, 1.0)
    assert found["all_to_all_step_efficiency"] == 1.2
    assert (found["row_step_efficiency"], found["graph_step_efficiency"]) == (0.8, 0.5)
    assert found["all_to_all_graph_step_efficiency"] == 0.8
    assert "step_efficiency" not in longer
    assert distributed.with_efficiencies([{"gpus": 1, "us": 8.0}, {"gpus": 4, "us": 2.5}])[1]["efficiency"] == 0.8


def test_of_rounds_in_turn_the_median_counts():
    rounds = [{"gpus": gpus, "length": 64, "step_s": gpus * s} for s in (3.0, 1.0, 2.0) for gpus in (1, 2)]
    assert distributed.medians(rounds) == [
        {"gpus": 1, "length": 64, "step_s": 2.0, "rounds": 3},
        {"gpus": 2, "length": 64, "step_s": 4.0, "rounds": 3},
    ]


@pytest.mark.usefixtures("instant")
def test_files_are_written_only_where_asked_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    monkeypatch.setattr(record, "RESULTS", results)
    monkeypatch.chdir(tmp_path)
    forward = [*SMALL, "--passes", "forward", "--no-plots"]
    assert main(forward) == 0
    assert "wrote no file" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    named = {
        ("--name", "mine"): results / "mine",
        ("--out", "elsewhere", "--name", "mine"): elsewhere / "mine",
        ("--json", "elsewhere/other.json"): elsewhere / "other",
    }
    for where, path in named.items():
        assert main([*forward, *where]) == 0
        printed = capsys.readouterr().out
        for suffix in (".json", ".md"):
            assert path.with_suffix(suffix).is_file()
            assert f"{path.name}{suffix}\n" in printed
    assert main([*forward, "--out", "dated"]) == 0
    assert sorted(file.suffix for file in (tmp_path / "dated").iterdir()) == [".json", ".md"]


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("run_*.json")), ids=lambda path: path.stem)
def test_recorded_runs_can_be_compared_with(path: Path):
    old = parse(["run", "--compare", str(path)]).compare
    said, fine = report.compare(old, old)
    assert fine
    assert said == [f"{len(old['lines'])} lines in common, 0 slower (by more than 5%) or failing"]


def test_only_what_has_several_lengths_is_a_line():
    def line(shape: tuple[int, ...], ridge: float, ms: float) -> report.Line:
        rest = {"pass": "forward", "backend": "chunked", "solver": "default", "data": "iid", "ridge": ridge}
        return {"shape": list(shape), "ms": ms, **rest}

    long, short, again = line((1, 2, 80, 8), 1.0, 6.0), line((1, 1, 40, 8), 1.0, 2.0), line((2, 4, 40, 8), 1.0, 32.0)
    others = [line((1, 1, 40, 8), 2.0, 2.0), line((1, 1, 80, 16), 1.0, 2.0)]
    assert plots.over_length([long, *others, short, again]) == [[long, short, again]]
    assert plots.by_length([long, short, again], "ms") == ([40, 80], [3.0, 3.0])


def test_peak_memory_is_that_of_the_process_itself():
    ballast = torch.ones(75 * 2**20)  # 315 MB
    assert cpu.apart("peak_mb()") < cpu.peak_mb() - 200
    assert ballast.all()
