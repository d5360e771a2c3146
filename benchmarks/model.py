"""A training step of a byte-level language model with Local Linear Attention, beside softmax attention's.

    python -m benchmarks model                     # minutes: torch.compile is in it
    python -m benchmarks model --name NAME         # and keep it: benchmarks/results/NAME.json and NAME.md

The model is that of examples/experiments: LocalLinearAttention's layers or softmax attention's, all else alike, under
autocast to bfloat16 on a GPU. A step is forward, backward, clipping and AdamW, on batches that lie on the device. A
model with LLA is trained for --warm steps on the sources of Python's standard library first, and all arms with LLA are
timed from its weights on: their keys are a trained model's. Eager, and with every block compiled in torch.compile's
default mode.

Milliseconds are medians over rounds; each round times a few steps of every arm, one arm after the other. "x softmax"
compares with softmax attention in the same mode, "added a layer" is the difference of the two a layer.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import needs, record
from examples.experiments import corpus
from examples.experiments.gpt import GPT, Attention, Size, loss_of
from flashlla.nn import param_groups

# The layer's own tolerance, and one that trains as well (docs/solvers.md); 1e-3 is what lla_attention solves to by
# default.
TOLERANCES = (1e-3, 1e-2, 1e-1)
RATE = 1e-3
BATCHES = 8
TEXT = 8_000_000  # bytes

Step = Callable[[], Any]


class Arm:
    """A model, and how its steps are made."""

    def __init__(self, model: GPT, batches: list[tuple[Tensor, Tensor]], compiled: bool) -> None:
        self.model, self.batches = model, itertools.cycle(batches)
        self.how: dict[str, Any] = {"apply": torch.compile(_apply, dynamic=False)} if compiled else {}
        groups = param_groups(model, lr=RATE, weight_decay=0.1)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)

    def step(self) -> Tensor:
        loss = loss_of(self.model, *next(self.batches), **self.how)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _apply(block: nn.Module, x: Tensor) -> Any:
    return block(x)


def batches_of(size: Size, device: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Bytes (B, S), and those that follow each."""
    text = corpus.read([Path(sysconfig.get_path("stdlib"))], most=TEXT).train
    starts = torch.randint(
        len(text) - size.length, (BATCHES, size.batch, 1), generator=torch.Generator().manual_seed(seed)
    )
    windows = text[starts + torch.arange(size.length + 1)].long().to(device)
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def milliseconds(step: Step, steps: int, device: str) -> float:
    """Of one of ``steps``, one after the other."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) * 1e3 / steps
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / steps


def measure(options: argparse.Namespace, size: Size) -> dict[str, Any]:
    """The rows of the table, and what the models did."""
    device = options.device
    batches = batches_of(size, device)
    make = lambda kind: GPT(size, Attention(kind)).to(device)
    torch.manual_seed(0)
    trained = make("lla")
    warming = Arm(trained, batches, compiled=False)
    losses = [warming.step().item() for _ in range(options.warm)]
    arms: dict[tuple[str, float | None, str], Arm] = {}
    for mode in options.modes:
        arms["softmax", None, mode] = Arm(make("softmax"), batches, mode == "compiled")
        for tolerance in options.tolerances:
            model = copy.deepcopy(trained)
            for layer in model.lla_layers:
                layer.tolerance = tolerance
            arms["lla", tolerance, mode] = Arm(model, batches, mode == "compiled")
    first: dict[Any, float] = {}
    for key, arm in arms.items():
        start = time.perf_counter()
        for _ in range(3):
            arm.step().item()
        first[key] = time.perf_counter() - start
        print(f"{key}: the first three steps took {first[key]:.1f} s", flush=True)
    times: dict[Any, list[float]] = {key: [] for key in arms}
    for _ in range(options.rounds):
        for key, arm in arms.items():
            times[key].append(milliseconds(arm.step, options.steps, device))
    rows = []
    for (kind, tolerance, mode), some in times.items():
        ms, softmax = statistics.median(some), statistics.median(times["softmax", None, mode])
        row = {"attention": kind, "tolerance": tolerance, "mode": mode, "ms": ms, "least_ms": min(some)}
        row |= {"most_ms": max(some), "first_s": first[kind, tolerance, mode]}
        if kind == "lla":
            row |= {"ratio": ms / softmax, "added_ms": (ms - softmax) / size.layers}
        rows.append(row)
    return {"rows": rows, "losses": [losses[0], losses[-1]] if losses else []}


HEADING = """\
| attention | tolerance | mode | ms a step | x softmax | added a layer, ms |
|---|---|---|---|---|---|"""


def row(line: dict[str, Any]) -> str:
    tolerance = "" if line["tolerance"] is None else f"{line['tolerance']:g}"
    ratio, added = (f"{line[key]:.2f}" if key in line else "" for key in ("ratio", "added_ms"))
    return f"| {line['attention']} | {tolerance} | {line['mode']} | {line['ms']:.1f} | {ratio} | {added} |"


def markdown(figures: dict[str, Any]) -> str:
    size = figures["size"]
    text = f"# {figures['device']}, {figures['date']}\n\n`{figures['command']}`; torch {figures['torch']}, triton "
    text += f"{figures['triton']}, flashlla {figures['flashlla']}. {size['layers']} layers, width {size['width']}, "
    text += f"{size['heads']} heads, {size['batch']} x {size['length']} bytes a step; medians of {figures['rounds']} "
    text += f"rounds of {figures['steps']} steps.\n\n{HEADING}\n"
    return text + "".join(f"{row(line)}\n" for line in figures["rows"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("the model")
    for name, default in (("layers", 6), ("width", 512), ("heads", 8), ("length", 1024), ("batch", 32)):
        what.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    what.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES, help="of LLA; default: 1e-3 1e-2 1e-1")
    what.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    what.add_argument("--warm", type=int, default=100, help="steps of training before; default: %(default)s")
    what.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    what.add_argument("--steps", type=int, default=4, help="steps of an arm in a round; default: %(default)s")
    what.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    if options.device == "cuda":
        needs.cuda()
    size = Size(options.layers, options.width, options.heads, options.length, options.batch)
    kept = record.Record(options, options.device)
    kept.figures |= {"size": vars(size), "rounds": options.rounds, "steps": options.steps, "warm": options.warm}
    kept.figures |= measure(options, size)
    print(HEADING, *map(row, kept.figures["rows"]), sep="\n")
    kept.write()
    kept.write_text(".md", markdown(kept.figures))
    kept.end()
    return 0
