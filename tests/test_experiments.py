"""examples/experiments: their short forms run and show what is robust of their claims; mixers are what they say.

What the documentation says of the full ones: test_experiments_docs.py.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.experiments import (
    associative_recall,
    corpus,
    ensemble,
    in_context_regression,
    language_model,
    mixers,
    state_tracking,
    test_time_regression,
    tolerance,
    training,
)
from examples.experiments import runs as experiment_runs
from examples.experiments.corpus import Corpus, Windows
from examples.experiments.gpt import GPT, Attention, Size, heads_of, keys_of
from examples.experiments.runs import Runs, parser_of, sources, study
from examples.experiments.training import Arm, Setting, train
from flashlla import lla_attention

TINY = Size(layers=2, width=32, heads=2, length=32, batch=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On small tensors threads wait for one another; scripts set that, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text() -> Corpus:
    generator = torch.Generator().manual_seed(0)
    train, choice, reported = torch.randint(97, 105, (3, 4000), dtype=torch.uint8, generator=generator)
    return Corpus(train, choice, reported, {"sha256": "of no files", "bytes": [4000] * 3})


def kept_in(folder: Path) -> list[str]:
    """Where runs go, and the plot, if matplotlib is there."""
    plot = ["--plot", str(folder / "plot.png")] * (importlib.util.find_spec("matplotlib") is not None)
    return ["--results", str(folder / "runs.json"), *plot]


# What is robust of the claims


def test_test_time_regression(tmp_path: Path) -> None:
    runs = test_time_regression.main(["--quick", *kept_in(tmp_path)])
    of = {run["function"]: run for run in runs.values() if run["dim"] == 4}
    wider = {run["function"]: run for run in runs.values() if run["dim"] == 8}
    error = lambda function, name, of=of: of[function][name]["512"]["error"]
    assert error("piecewise", "LLA") < 0.5 * error("piecewise", "softmax")
    assert error("smooth", "LLA") < 0.7 * error("smooth", "softmax")
    assert all(error(function, "LLA") < error(function, "softmax") for function in of)
    assert all(error(function, "LLA", wider) < error(function, "softmax", wider) for function in wider)
    # How much better grows with the dimension.
    ratio = lambda of: error("segments", "softmax", of) / error("segments", "LLA", of)
    assert ratio(wider) > 4 * ratio(of)
    # Along the four segments, in halves: LLA's error falls in each; ridge regression is the best in the first alone.
    halves = {name: torch.tensor(of["segments"][name]["along"]).view(4, 2, -1).mean(2) for name in ("LLA", "softmax")}
    ridge = torch.tensor(of["segments"]["ridge regression"]["along"]).view(4, 2, -1).mean(2)
    assert (halves["LLA"][:, 1] < 0.5 * halves["LLA"][:, 0]).all()
    assert ridge[0, 1] < halves["LLA"][0, 1] < halves["softmax"][0, 1]
    assert (halves["LLA"][1:, 1] < 0.5 * ridge[1:, 1]).all()


def test_in_context_regression(tmp_path: Path) -> None:
    runs = in_context_regression.main(["--quick", *kept_in(tmp_path)])
    assert runs["linear, LLA"]["reported"][0] < 0.7 * runs["linear, softmax"]["reported"][0]
    assert runs["network, LLA"]["reported"][0] < 0.9 * runs["network, softmax"]["reported"][0]


def test_associative_recall(tmp_path: Path) -> None:
    runs = associative_recall.main(["--quick", *kept_in(tmp_path)])
    wrong = {(run["task"], run["mixer"]): run["reported"][0] for run in runs.values()}
    assert wrong["numbers", "LLA"] < min(0.1, wrong["numbers", "softmax"])  # at first: 1
    assert max(wrong["words", "LLA"], wrong["words", "softmax"]) < 0.8  # of 8 values: chance is 0.875


def test_state_tracking(tmp_path: Path) -> None:
    runs = state_tracking.main(["--quick", *kept_in(tmp_path)])
    assert all(run["reported"][0] < 0.95 for run in runs.values())  # who knows the parity alone: 0.983


def test_language_model(tmp_path: Path) -> None:
    paths = [
        *kept_in(tmp_path),
        "--keys",
        str(tmp_path / "keys"),
        "--text",
        str(Path(training.__file__).parents[2] / "flashlla"),
    ]
    runs = language_model.main(["--quick", *paths])
    assert all(run["reported"] < 3.3 for run in runs.values())  # 5.55 at first
    again = language_model.main(["--quick", *paths])  # made once
    assert again == runs == json.loads((tmp_path / "runs.json").read_text())["runs"]
    kept = torch.load(tmp_path / "keys" / "lla_60.pt")
    assert kept["q"].shape == kept["k"].shape == kept["v"].shape == (3, 2, 128, 64)
    assert kept["ridge"].shape == (3, 2, 1)

    found = tolerance.main([str(tmp_path / "keys" / "lla_60.pt"), "--results", str(tmp_path / "tolerance.json")])
    loose, tight = found["lla_60 0.1"], found["lla_60 0.001"]
    assert loose["iterations"] < tight["iterations"]
    assert loose["error"] > tight["error"]
    assert 0.9 < loose["cosines"]["q"] < tight["cosines"]["q"]


def test_the_table_of_tolerances_has_the_gradient_of_every_input() -> None:
    generator = torch.Generator().manual_seed(0)
    *inputs, cotangent = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(4))
    inputs.append(torch.tensor([[[0.1], [1.0]]]))
    o, exact, _ = tolerance.gradients([t.double() for t in inputs], cotangent.double(), solver="direct")
    run = tolerance.compare(inputs, cotangent, 1e-1, (o, exact))
    _, (*_, dlambda), _ = tolerance.gradients(inputs, cotangent, tolerance=1e-1)
    assert run["errors"]["ridge"] == pytest.approx(((dlambda - exact[-1]).norm() / exact[-1].norm()).item(), rel=1e-3)
    assert run["errors"]["ridge"] > 1e-3

    columns, _, row = ([cell.strip() for cell in line.split("|")] for line in tolerance.table({"a": run}).splitlines())
    told = dict(zip(columns, row, strict=True))
    assert told["of dq, dk, dv, dlambda"] == ", ".join(f"{run['errors'][x]:.1e}" for x in ("q", "k", "v", "ridge"))
    cosines = ", ".join(f"{run['cosines'][x]:.6f}" for x in ("q", "k", "v", "ridge"))
    assert told["cosine of dq, dk, dv, dlambda"] == cosines


# Runs


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, other = (Runs(tmp_path / "runs.json", "cpu") for _ in range(2))
    one.add("a", {"reported": [1.0]})
    other.add("b", {"reported": [2.0]})
    one.read()
    assert {name: run["reported"] for name, run in one.all.items()} == {"a": [1.0], "b": [2.0]}
    assert one.all["a"]["of"]["sources"] == sources() != ""


def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_runs, "RESULTS", tmp_path)
    made: list[str] = []

    def run(name: str, interrupted: bool) -> dict[str, Any]:
        if interrupted:
            raise KeyboardInterrupt
        made.append(name)
        return {"steps": 1, "reported": [0.5], "chosen": [1e-3]}

    def go_on(interrupted: str | None) -> dict[str, Any]:
        options = parser_of("folder/an_experiment.py", None).parse_args(["--quick"])
        wanted = {name: partial(run, name, name == interrupted) for name in "abc"}
        return study(options, wanted, lambda runs, path: None)

    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        go_on("b")
    assert torch.get_num_threads() == 1  # two wait for one another: minutes instead of seconds
    assert list(json.loads((tmp_path / "an_experiment_quick.json").read_text())["runs"]) == ["a"]
    assert list(go_on(None)) == made == ["a", "b", "c"]
    assert not (tmp_path / "an_experiment.json").exists()


def test_runs_on_another_text_are_no_match(tmp_path: Path) -> None:
    Runs(tmp_path / "runs.json", "cpu").add("lla lr=0.001 seed=0", {"corpus": "another"})
    with pytest.raises(SystemExit, match="on another text"):
        language_model.main(["--quick", "--text", str(Path(corpus.__file__).parent), *kept_in(tmp_path)])


def copying(enough: float = 0.0) -> ensemble.Task:
    """The token itself is to be told, of four."""
    return ensemble.Task(
        lambda sequences, generator: (torch.randint(4, (sequences, 6), generator=generator, device=generator.device),),
        losses=lambda model, tokens: ensemble.cross_entropies(model(tokens), tokens),
        errors=lambda model, tokens: (model(tokens).argmax(-1) != tokens).float().mean(1),
        enough=enough,
    )


def four_models() -> torch.nn.Sequential:
    torch.manual_seed(0)
    block = ensemble.Block(4, 8, 2, "LLA", mlp=False)
    return torch.nn.Sequential(ensemble.Embedding(4, 4, 8), block, ensemble.Norm(4, 8), ensemble.Linear(4, 8, 4))


def test_models_of_a_seed_begin_alike_and_the_best_rate_is_reported() -> None:
    run = ensemble.learn(four_models(), copying(), [0, 1], [1e-5, 3e-2], batch=16, steps=49)
    step, first = run["curve"][0]
    assert step == 1  # losses of the first weights, on the same sequences
    assert first[0] == first[1]
    assert first[2] == first[3] != first[0]
    assert run["chosen"] == [3e-2, 3e-2]
    assert run["members"] == [1, 3]
    assert run["reported"] == [run["all"][1], run["all"][3]] == [0.0, 0.0]
    assert run["all"][0] > 0.3
    assert run["steps"] == 49


def test_training_ends_where_it_is_enough() -> None:
    run = ensemble.learn(four_models(), copying(enough=0.1), [0, 1], [1e-5, 3e-2], batch=16, steps=1000)
    assert run["steps"] < 500
    assert run["of_steps"] == 1000
    assert max(run["reported"]) <= 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ensemble.MIXERS)
def test_steps_of_a_graph_are_steps(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def curve() -> Any:
        torch.manual_seed(0)
        block = ensemble.Block(4, 32, 2, mixer, mlp=False)
        model = torch.nn.Sequential(ensemble.Embedding(4, 4, 32), block, ensemble.Linear(4, 32, 4)).cuda()
        run = ensemble.learn(model, copying(), [0, 1], [1e-3, 1e-2], batch=16, steps=20)
        return torch.tensor([losses for _, losses in run["curve"]])

    graphs = curve()
    monkeypatch.setattr(ensemble, "captured", lambda step, generators: step)
    torch.testing.assert_close(graphs, curve(), atol=2e-3, rtol=0)
    assert graphs[-1, 1] < graphs[0, 1]


@pytest.mark.gpu
def test_the_delta_rule_of_flash_linear_attention_is_the_formula() -> None:
    pytest.importorskip("fla")
    t = drawn("q", "k", "v", "beta")
    t["k"], t["beta"] = torch.nn.functional.normalize(t["k"], dim=-1), t["beta"].sigmoid()
    exact = mixers.delta_rule(**t)
    o = mixers.delta_rule(**{name: x.float().cuda() for name, x in t.items()})
    torch.testing.assert_close(o.cpu().double(), exact, atol=1e-4, rtol=1e-4)


# A language model's run


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["softmax", "lla"])
def test_a_language_models_steps_of_a_graph_are_steps(kind: str, optimizer: str, text: Corpus) -> None:
    on_gpu = text.to("cuda")
    eager, graph = (
        train(Arm(kind, optimizer=optimizer, lr=1e-2, steps=16), 0, on_gpu, Setting(TINY, "cuda", graphs=graphs))[0]
        for graphs in (False, True)
    )
    torch.testing.assert_close(torch.tensor(graph["loss"]), torch.tensor(eager["loss"]), atol=2e-2, rtol=0)
    assert graph["loss"][-1] < graph["loss"][0] - 0.5


def test_muon_moves_what_torchs_moves() -> None:
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.randn(24, 8)) for _ in range(2))
    theirs.data.copy_(mine.data)
    settings: dict[str, Any] = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    one, other = training.Muon([mine], lr=0.0, **settings), torch.optim.Muon([theirs], lr=0.0, **settings)
    rates = [1e-2, 3e-2, 3e-3]
    for rate in rates:
        mine.grad = torch.randn(24, 8)
        theirs.grad = mine.grad.clone()
        one.param_groups[0]["lr"], other.param_groups[0]["lr"] = torch.tensor(rate), rate
        before = mine.detach().clone()
        one.step()
        other.step()
        assert (mine - before).norm() > 0.1 * rate * before.norm()
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
        assert one.param_groups[0]["lr"].item() == pytest.approx(rate)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    optimizer: str, where: str, tmp_path: Path, text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU from graphs, where sums of gradients are not the same twice."""
    arm, text, graphs = Arm(optimizer=optimizer, lr=1e-2, steps=16), text.to(where), where == "cuda"
    whole, _ = train(arm, 0, text, Setting(TINY, where, graphs=graphs))
    setting = Setting(TINY, where, graphs=graphs, checkpoints=tmp_path, long=1)

    def interrupted(steps: range, **_: Any) -> Iterator[int]:
        yield from steps[:9]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(arm, 0, text, setting)
    resumed, _ = train(arm, 0, text, setting)
    near = {"atol": 3e-2 if graphs else 0.0, "rtol": 0.0}
    for name in ("loss", "choice", "reported", "ridges", "curve"):
        a, b = (torch.tensor(run[name]) for run in (resumed, whole))
        if name == "curve":  # steps, seconds, loss
            a, b = a[:, [0, 2]], b[:, [0, 2]]
        torch.testing.assert_close(a, b, **near)
    assert whole["reported"] < 3.0  # 5.55 at first; of eight bytes, alike: 2.08


def test_arms_begin_with_the_same_weights_and_see_the_same_batches(text: Corpus) -> None:
    models = []
    for kind in ("lla", "softmax"):
        torch.manual_seed(3)
        models.append(dict(GPT(TINY, Attention(kind)).named_parameters()))
    lla, softmax = models
    assert set(lla) - set(softmax) == {f"blocks.{i}.attention.ridge.raw" for i in range(2)}
    assert all(torch.equal(lla[name], softmax[name]) for name in softmax)
    short, long = (Windows(text.train, length=32, batch=2, steps=steps, seed=5) for steps in (20, 100))
    assert all(torch.equal(short[step][0], long[step][0]) for step in range(20))


def test_no_part_of_the_text_comes_twice_before_all_have_come() -> None:
    text = torch.arange(4000) % 251
    windows = Windows(torch.arange(4000), length=32, batch=4, steps=31, seed=0)
    assert windows.epochs < 1.01
    seen = torch.cat([windows[step][0].flatten() for step in range(30)])
    assert len(seen.unique()) == len(seen)
    bytes_, next_ = Windows(text, length=32, batch=4, steps=1, seed=0)[0]
    assert torch.equal((bytes_ + 1) % 251, next_)


def test_as_many_steps_as_take_the_seconds(text: Corpus) -> None:
    run, _ = train(Arm(lr=1e-2, steps=10**9, seconds=0.5), 0, text, Setting(TINY, "cpu"))
    assert run["steps"] == round(500 / run["measured_ms"]) == run["curve"][-1][0]


def test_rates_are_searched_until_the_best_has_one_on_either_side() -> None:
    found: dict[float, float] = {}
    while (lr := language_model.next_rate(found)) is not None:
        found[lr] = abs(lr - 3.9e-3)
    assert sorted(found) == [1e-3, 2e-3, 4e-3, 8e-3]


def test_an_arm_of_equal_time_takes_the_time_of_lla() -> None:
    def run(arm: Arm, choice: float, step_ms: float) -> Any:
        return {"arm": {**vars(arm)}, "seed": 0, "choice": choice, "step_ms": step_ms}

    lla, softmax = Arm(lr=1e-3), Arm("softmax", lr=2e-3)
    slower, disturbed = replace(lla, lr=4e-3), replace(softmax, steps=5000)
    kept = [(lla, 1.0, 80.0), (slower, 2.0, 180.0), (disturbed, 0.5, 60.0)]
    runs = {f"{arm.name()} seed=0": run(arm, *told) for arm, *told in kept}
    equal = Arm("softmax", as_lla=True)
    assert language_model.resolve(equal, runs) is None  # no rate was chosen for 500 steps
    runs[f"{softmax.name()} seed=0"] = run(softmax, 1.0, 40.0)
    assert language_model.resolve(equal, runs) == replace(equal, lr=2e-3, steps=1000)
    assert language_model.resolve(replace(equal, steps=5000), runs) == replace(equal, lr=2e-3, steps=10000)
    assert language_model.resolve(Arm("softmax", qk_norm=False), runs) is None


def test_a_study_from_an_empty_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates first, then seeds at the best, then softmax attention for as long; and again: nothing more."""
    made: list[str] = []

    def train(arm: Arm, seed: int, read: Corpus, setting: Setting) -> tuple[dict[str, Any], None]:
        assert arm.lr is not None
        made.append(f"{arm.name()} seed={seed}")
        loss = abs(arm.lr - (1e-3 if arm.qk_norm else 4e-3))
        told = {"arm": vars(arm), "seed": seed, "choice": loss, "reported": loss, "steps": arm.steps, "seconds": 1.0}
        return {**told, "step_ms": 30.0 if arm.kind == "lla" else 20.0, "corpus": read.facts["sha256"][:16]}, None

    monkeypatch.setattr(language_model, "train", train)
    where = ["--results", str(tmp_path / "own.json"), "--text", str(Path(corpus.__file__).parent)]
    runs = language_model.main(["--small", "--study", "main", "time", "--seeds", "0", "1", *where])
    tried = {kind: [0.0005, 0.001, 0.002] for kind in ("lla", "softmax")}
    tried |= {f"{kind} qk_norm=False": [0.001, 0.002, 0.004, 0.008] for kind in tried}
    assert {f"{arm} lr={lr:g} seed=0" for arm, rates in tried.items() for lr in rates} < set(runs)
    best = {f"{arm} lr={0.004 if 'False' in arm else 0.001:g} seed={seed}" for arm in tried for seed in (0, 1)}
    as_long = {name.replace(" lr", " as_lla=True lr") for name in best if name.startswith("softmax")}
    assert {name for name in runs if name.endswith("seed=1")} == {name for name in best | as_long if "seed=1" in name}
    assert as_long < set(runs)
    assert {runs[name]["steps"] for name in as_long} == {750}
    assert len(made) == len(set(made)) == len(runs) == 14 + 4 + 4
    language_model.main(["--small", "--study", "main", "time", "--seeds", "0", "1", *where])
    assert len(made) == len(runs)


def test_times_of_a_busy_machine_are_not_told() -> None:
    run = {"arm": vars(Arm(lr=1e-3)), "reported": 1.0, "choice": 2.0, "steps": 500, "step_ms": 40.0, "seconds": 20.0}
    runs = {"lla lr=0.001 seed=0": run, "lla lr=0.001 seed=1": {**run, "step_ms": 10.0, "note": "others"}}
    assert language_model.table(runs).endswith("| 500 | 40.0 | 20.0 |")
    assert language_model.step_ms(Arm(lr=1e-3, steps=7), runs) == 40.0
    del runs["lla lr=0.001 seed=0"]
    assert language_model.table(runs).endswith("| 500 |  |  |")


@pytest.mark.parametrize("qk_norm", [True, False])
def test_keys_are_what_attention_gets(qk_norm: bool) -> None:
    model = GPT(TINY, Attention(qk_norm=qk_norm)).eval()
    attention, x = model.blocks[1].attention, torch.randn(1, 32, 32)
    q, k, v = heads_of(attention, x)
    o = lla_attention(q, k, v, ridge_lambda=attention.ridge(), tolerance=0.0)
    torch.testing.assert_close(attention.o_proj(o.transpose(1, 2).flatten(2)), attention(x)[0])
    kept = keys_of(model, torch.randint(256, (1, 32)), [0, 1])
    assert kept["k"].shape == (2, 2, 32, 16)
    torch.testing.assert_close(kept["ridge"], torch.ones(2, 2, 1))
    assert kept["scale"] == 0.25


def test_the_corpus_is_split_by_package_without_duplicates(tmp_path: Path) -> None:
    line = lambda package, i: f"the_name_of_{package}_{i} = {i}\n"
    for number in range(200):
        folder = tmp_path / "site" / f"package{number}"
        folder.mkdir(parents=True)
        (folder / "own.py").write_text("".join(line(number, i) for i in range(20)))
        (folder / "copied.py").write_text("".join(line("all", i) for i in range(20)))
    (tmp_path / "site" / "package0" / "tests").mkdir()
    (tmp_path / "site" / "package0" / "tests" / "left_out.py").write_text("left_out = True\n" * 10)
    read = corpus.read([tmp_path / "site"], cache=tmp_path / "cache" / "corpus.bin")
    parts = [bytes(part.tolist()).decode() for part in (read.train, read.choice, read.reported)]
    assert sum(part.count("the_name_of_all_3 =") for part in parts) == 1
    assert not any("left_out" in part for part in parts)
    own = [{line.split("_")[3] for line in part.splitlines()} - {"all"} for part in parts]
    assert sum(map(len, own)) == len(set.union(*own)) >= 198  # a held-out package may have gone with what it copied
    assert all(3 <= len(part) <= 6 for part in own[1:])
    again = corpus.read([tmp_path / "elsewhere"], cache=tmp_path / "cache" / "corpus.bin")
    assert torch.equal(again.reported, read.reported)


# Mixers and tasks against what their docstrings say


def drawn(*names: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"beta": (2, 3, 20), "log_decay": (2, 3, 20)}
    return {name: torch.randn(shapes.get(name, (2, 3, 20, 5)), dtype=torch.float64) for name in names}


def test_ridge_regression_is_the_formula() -> None:
    t = drawn("q", "k", "v")
    ridge = torch.tensor([[0.1], [1.0], [10.0]], dtype=torch.float64)  # (H, 1)
    o = mixers.ridge_regression(**t, ridge=ridge)
    for head, i in ((0, 3), (1, 7), (2, 19)):
        k, v = t["k"][1, head, : i + 1], t["v"][1, head, : i + 1]
        weights = torch.linalg.solve(k.T @ k + ridge[head] * torch.eye(5, dtype=torch.float64), k.T @ v)
        torch.testing.assert_close(o[1, head, i], t["q"][1, head, i] @ weights)


@pytest.mark.parametrize("gated", [False, True])
def test_the_delta_rule_is_the_recurrence(gated: bool) -> None:
    t = drawn("q", "k", "v", "beta", "log_decay")
    t["k"] = torch.nn.functional.normalize(t["k"], dim=-1)
    t["beta"] = t["beta"].sigmoid()
    decay = -t.pop("log_decay").exp()
    o = mixers.delta_rule(**t, log_decay=decay if gated else None)
    state = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    for i in range(20):
        q, k, v, beta = (t[name][:, :, i].unsqueeze(-1) for name in ("q", "k", "v", "beta"))
        a = decay[:, :, i, None, None].exp() if gated else 1.0
        beta = beta.unsqueeze(-1)
        state = a * state @ (torch.eye(5, dtype=torch.float64) - beta * k @ k.mT) + beta * v @ k.mT
        torch.testing.assert_close(o[:, :, i], (state @ q).squeeze(-1))


@pytest.mark.parametrize("mixer", ensemble.MIXERS)
def test_models_of_an_ensemble_are_causal_and_do_not_see_one_another(mixer: str) -> None:
    torch.manual_seed(0)
    block = ensemble.Block(3, 8, 2, mixer, mlp=True)
    x = torch.randn(3, 2, 10, 8)
    other = x.clone()
    other[1] += 1  # another model's
    other[0, :, 6:] += 1  # later tokens
    before, after = block(x), block(other)
    torch.testing.assert_close(after[2], before[2])
    torch.testing.assert_close(after[0, :, :6], before[0, :, :6])
    assert not torch.allclose(after[1], before[1])


def test_the_ensembles_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    model = ensemble.Linear(2, 4, 3)
    single = torch.nn.Parameter(model.weight[1].detach().clone())
    mine = ensemble.AdamW(model, torch.tensor([0.5, 1e-2]))
    theirs = torch.optim.AdamW([single], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        x = torch.randn(2, 6, 4)
        (model(x) * (step + 1)).square().sum().backward()
        ((x[1] @ single) * (step + 1)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_([single], 1.0)
        theirs.step()
        theirs.zero_grad()
        mine.step(1.0)
    torch.testing.assert_close(model.weight[1], single)


def test_words_ask_for_what_stood_beside_each_key() -> None:
    task = associative_recall.Recall("words", pairs=16, length=128, width=8)
    tokens, where, values = associative_recall.words(task, 50, torch.Generator().manual_seed(0))
    keys = tokens[:, :32].view(50, 16, 2)
    assert ((keys[..., 0] >= 1) & (keys[..., 0] < 4096)).all()
    assert (values >= 4096).all()
    assert torch.equal(keys[..., 1], values)
    assert torch.equal(tokens.gather(1, where), keys[..., 0])
    assert all(len(row.unique()) == 16 for row in where)
    assert where.min() >= 32
    assert where.max() < 128
    assert (where - 32).float().mean() < 44  # near ones more often than far ones, whose mean is 48


def test_permutations_are_followed_up_to_the_first_that_is_wrong() -> None:
    along = [[0.0, 0.1, 0.2, 0.0], [0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.1]]
    assert state_tracking.followed({"along": along, "members": [0, 2]}) == [2, 4]


def test_states_are_products_of_permutations() -> None:
    tokens, states = state_tracking.draw("permutations", 6, 4, torch.Generator().manual_seed(0))
    for row, told in zip(tokens.tolist(), states.tolist()):
        things = tuple(range(5))
        for token, state in zip(row, told):
            things = tuple(state_tracking.GROUP[token][i] for i in things)
            assert state_tracking.GROUP[state] == things
    assert len(state_tracking.SWAPS) == 10
