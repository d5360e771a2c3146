"""One run of a language model: an arm, a seed, a number of steps or of seconds."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.experiments.corpus import Corpus, Windows, evenly
from examples.experiments.gpt import GPT, Attention, Size, loss_of
from examples.experiments.runs import Run, progress
from flashlla import ConvergenceCounter
from flashlla.nn import LocalLinearAttention, param_groups

WARM, TIMED = 5, 10  # steps by which a step's time is measured before a run
EAGER = 3  # steps before one is captured
POINTS, APART = 8, 250  # of the loss curve, at least, and how many steps they lie apart, at most
CURVE_BATCHES, LAST_BATCHES = 4, 16  # that a validation loss is the mean of, on the way and at the end


@dataclass(frozen=True)
class Arm(Attention):
    """What is compared: an attention, and how it is trained."""

    optimizer: str = "adamw"  # or "muon", for matrices; what is none goes by AdamW
    lr: float | None = None  # None: the best of those tried
    steps: int = 500
    seconds: float | None = None  # as many steps as take so long
    as_lla: bool = False  # the seconds that LLA's runs took, of the arm that is else the same

    def name(self) -> str:
        """The settings that are not usual."""
        unusual = [f for f in fields(self) if f.name not in ("kind", "lr") and getattr(self, f.name) != f.default]
        settings = [f"{f.name}={getattr(self, f.name)}" for f in unusual]
        return " ".join([self.kind, *settings, f"lr={self.lr:g}"])


@dataclass(frozen=True)
class Setting:
    """Where arms run: alike for all that are compared."""

    size: Size
    device: str
    compiled: bool = False
    graphs: bool = False  # steps from a CUDA graph, which does not wait for a busy host
    checkpoints: Path | None = None  # long runs save here at each validation, and go on from there
    long: int = 1000  # steps


class Clock:
    """Milliseconds of steps; on a GPU by events, for which nothing waits before they are read."""

    def __init__(self, device: str) -> None:
        self._cuda, self._marks = device == "cuda", list[tuple[Any, Any]]()

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any) -> None:
        self._marks.append((begin, self.mark()))

    def read(self) -> list[float]:
        """Of the steps since the last time."""
        marks, self._marks = self._marks, []
        if not self._cuda:
            return [1e3 * (end - begin) for begin, end in marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]


class Learner:
    """A model with its optimisers, new from a seed: the same weights for all arms."""

    def __init__(self, arm: Arm, seed: int, setting: Setting) -> None:
        torch.manual_seed(seed)
        self.model = GPT(setting.size, arm).to(setting.device)
        self.optimizers = _optimizers(self.model, arm, setting.device)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._how: dict[str, Any] = {"apply": _compiled_block()} if setting.compiled else {}
        self._batch: tuple[Tensor, ...] = ()
        self._take = captured(self._step, ()) if setting.graphs else self._step
        for group in self._groups() if setting.graphs else []:
            group["capturable"], group["lr"] = True, torch.tensor(group["lr"], device=setting.device)

    def step(self, batch: tuple[Tensor, Tensor], progress: float, warmup: float) -> Tensor:
        """One step of training, at ``progress`` from 0 to 1; the loss."""
        factor = rate(progress, warmup)
        for optimizer, rates in zip(self.optimizers, self._rates):
            for group, lr in zip(optimizer.param_groups, rates):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(factor * lr)
                else:
                    group["lr"] = factor * lr
        if not self._batch:
            self._batch = tuple(t.clone() for t in batch)
        for mine, new in zip(self._batch, batch):
            mine.copy_(new)
        return self._take().clone()

    def _step(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = loss_of(self.model, *self._batch, **self._how)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        self.model.eval()
        losses = [loss_of(self.model, *batch) for batch in batches]
        self.model.train()
        return torch.stack(losses).mean().item()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        mine = [{**group, "params": None} for group in self._groups()]  # of a graph: rates are tensors on the device
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for group, settings in zip(self._groups(), mine):
            group.update({**settings, "params": group["params"]})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


class Muon(torch.optim.Muon):
    """torch's, with rates that may be tensors, as a CUDA graph needs: what a step moves is proportional to its rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        before = [[p.clone() for p in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 1.0
        loss = super().step(closure)
        for group, lr, old in zip(self.param_groups, rates, before):
            group["lr"] = lr
            for p, was in zip(group["params"], old):
                p.copy_(torch.lerp(was, p, lr))
        return loss


def captured(step: Callable[[], Tensor], generators: Sequence[torch.Generator]) -> Callable[[], Tensor]:
    """``step``, after a few times from a CUDA graph: what it launches then waits for no host.

    ``generators`` are those that it draws by. What it returns is overwritten by the next step.
    """
    stream, taken, graph = torch.cuda.Stream(), 0, torch.cuda.CUDAGraph()
    losses = torch.empty(0)
    for generator in generators:
        graph.register_generator_state(generator)

    def take() -> Tensor:
        nonlocal taken, losses
        taken += 1
        if taken > EAGER:
            graph.replay()
            return losses
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            told = step()
        torch.cuda.current_stream().wait_stream(stream)
        if taken == EAGER:
            with torch.cuda.graph(graph, stream=stream):
                losses = step()
        return told

    return take


def rate(progress: float, warmup: float) -> float:
    """The learning rate in its largest: linear warm-up, then half a cosine down to a tenth."""
    if progress < warmup:
        return progress / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


def train(arm: Arm, seed: int, corpus: Corpus, setting: Setting) -> tuple[Run, GPT]:
    """What the run gave, for its record, and the model."""
    assert arm.lr is not None
    size, device = setting.size, setting.device
    measured = measure(arm, seed, corpus, setting)
    steps = arm.steps if arm.seconds is None else max(1, round(1e3 * arm.seconds / measured))
    checkpoint, saved = None, None
    if setting.checkpoints is not None:
        checkpoint = setting.checkpoints / f"{arm.name()} seed={seed}.pt".replace(" ", "_")
        if checkpoint.exists():
            saved = torch.load(checkpoint, map_location="cpu")
            steps = saved["steps"]  # as they were measured then
    batches = Windows(corpus.train, size.length, size.batch, steps, seed)
    on_the_way = evenly(corpus.reported, size.length, size.batch, CURVE_BATCHES)
    points = max(POINTS, steps // APART)
    validated = {math.ceil(steps * (i + 1) / points) for i in range(points)}
    warmup = min(200, max(1, steps // 10)) / steps

    learner, clock = Learner(arm, seed, setting), Clock(device)
    losses: list[float] = []
    times: list[float] = []  # milliseconds of each step
    curve: list[tuple[int, float, float]] = []  # steps, seconds of training, loss
    unconverged = [0, 0]  # queries, and of how many
    if saved is not None:
        learner.load(saved)
        losses, times, curve, unconverged = (saved[name] for name in ("losses", "times", "curve", "unconverged"))

    new: list[Tensor] = []
    batch = batches[min(len(losses), steps - 1)]
    with ConvergenceCounter() as counter:
        for step in progress(range(len(losses), steps), desc=f"{arm.name()} seed={seed}", unit="step"):
            begin = clock.mark()
            new.append(learner.step(batch, (step + 1) / steps, warmup))
            clock.add(begin)
            batch = batches[min(step + 1, steps - 1)]  # outside of what is timed
            if step + 1 in validated:
                times += clock.read()
                losses += torch.stack(new).tolist()
                new = []
                unconverged = [a + b for a, b in zip(unconverged, counter.read())]
                if not math.isfinite(losses[-1]):
                    break
                curve.append((step + 1, sum(times) / 1e3, learner.validate(on_the_way)))
                counter.read()  # those of validation
                if checkpoint is not None and steps >= setting.long:
                    told = {"losses": losses, "times": times, "curve": curve, "unconverged": unconverged}
                    _save(checkpoint, {**learner.state(), **told, "steps": steps})
    last = {
        name: learner.validate(evenly(text, size.length, size.batch, LAST_BATCHES))
        for name, text in (("choice", corpus.choice), ("reported", corpus.reported))
    }
    span = max(1, steps // 50)
    return (
        {
            "arm": asdict(arm),
            "seed": seed,
            **asdict(size),
            "compiled": setting.compiled,
            "graphs": setting.graphs,
            "parameters": sum(p.numel() for p in learner.model.parameters()),
            "steps": steps,
            "seen": round(batches.epochs, 3),  # how often, of the text
            **{name: round(loss, 5) for name, loss in last.items()},
            "seconds": round(sum(times) / 1e3, 2),
            "step_ms": round(statistics.median(times), 2),
            "measured_ms": round(measured, 2),
            "curve": [[step, round(seconds, 2), round(loss, 5)] for step, seconds, loss in curve],
            "loss": [round(statistics.mean(losses[i : i + span]), 4) for i in range(0, len(losses), span)],
            "unconverged": unconverged,
            "ridges": [_ridges(layer) for layer in learner.model.lla_layers],
            "corpus": corpus.facts["sha256"][:16],
        },
        learner.model,
    )


def measure(arm: Arm, seed: int, corpus: Corpus, setting: Setting) -> float:
    """Milliseconds of a step, the median, by a model that is thrown away; compiles what is to be compiled."""
    learner, clock = Learner(arm, seed, setting), Clock(setting.device)
    batches = Windows(corpus.train, setting.size.length, setting.size.batch, WARM + TIMED, seed)
    for step in range(WARM + TIMED):
        batch, begin = batches[step], clock.mark()
        learner.step(batch, 0.0, 0.1)
        clock.add(begin)
    return statistics.median(clock.read()[WARM:])


def _optimizers(model: GPT, arm: Arm, device: str) -> list[torch.optim.Optimizer]:
    assert arm.lr is not None
    groups = param_groups(model, lr=arm.lr, weight_decay=0.1)
    found: list[torch.optim.Optimizer] = []
    if arm.optimizer == "muon":
        matrices = {p for p in model.blocks.parameters() if p.dim() == 2} & {
            p for group in groups if group["name"] == "weights" for p in group["params"]
        }
        # Updates of the size of AdamW's, so that rates mean about the same.
        settings: dict[str, Any] = {"lr": arm.lr, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
        found.append(Muon([p for p in model.parameters() if p in matrices], **settings))
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in matrices]
        groups = [group for group in groups if group["params"]]
    found.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device == "cuda"))
    return found


def _compiled_block() -> Callable[[nn.Module, Tensor], Tensor]:
    """One compiled function for all blocks and runs of a process: arms of one kind share what was compiled."""
    global _block
    if _block is None:
        torch._dynamo.config.recompile_limit = 64  # one for each kind of block
        _block = torch.compile(_run_block, dynamic=False)
    return _block  # type: ignore[no-any-return]


def _run_block(block: nn.Module, x: Tensor) -> Any:
    return block(x)


_block: Any = None


def _save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


@torch.no_grad()
def _ridges(layer: LocalLinearAttention) -> list[float]:
    """Of each head; where each token has its own, those of a token of zeros."""
    ridge = layer.ridge(torch.zeros(1, 1, layer.hidden_size, device=layer.q_proj.weight.device))
    return [round(r, 3) for r in torch.as_tensor(ridge).flatten().tolist()]
