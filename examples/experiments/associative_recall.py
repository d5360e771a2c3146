"""Associative recall: the value that stood beside a key, of many pairs in one sequence.

    python -m examples.experiments.associative_recall --quick
    python -m examples.experiments.associative_recall                            on a GPU

words    MQAR as zoology defines it: a vocabulary of 8192, a half of it keys, the other values; pairs first, then each
         key once more among random tokens, near ones more often (power 0.01), where its value is foretold. Two layers,
         one head, no MLP, no convolution, learned positions. Reported: the part of answers that are wrong. Sequences
         are new at each step.
numbers  the continuous variant: keys are random directions in 16 dimensions, values random numbers in 16; then each
         key comes once more, with noise, and its value is foretold. One layer, one head. Reported: the mean square of
         the error, in variances of the values. Keys that differ by less than the noise leave some to every mixer.

Of each mixer and seed the learning rate is chosen on other sequences than those that are reported.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments.ensemble import Block, Embedding, Linear, Norm, Task, cross_entropies, learn
from examples.experiments.runs import DEVICE, Panel, Run, draw_curves, parser_of, study

MIXERS = ("softmax", "LLA", "delta rule")
VOCABULARY, POWER = 8192, 0.01
EPOCH = 100_000  # sequences, as zoology's sets have
POINT, NOISE = 16, 0.1  # the noise of a query: norm, beside the key's 1
RATES = {"words": (3e-3, 1e-2), "numbers": (3e-3, 1e-2, 3e-2)}


@dataclass(frozen=True)
class Recall:
    kind: str
    pairs: int
    length: int
    width: int
    vocabulary: int = VOCABULARY

    def name(self) -> str:
        name = f"{self.kind}, {self.pairs} pairs, {self.length} tokens, width {self.width}"
        return name + f", vocabulary {self.vocabulary}" * (self.vocabulary != VOCABULARY and self.kind == "words")


TASKS = [
    *(Recall("numbers", pairs, 2 * pairs, 64) for pairs in (16, 64, 256)),
    *(Recall("words", pairs, length, width) for width in (32, 16) for length, pairs in ((64, 4), (128, 8), (256, 16))),
    *(Recall("words", 64, 512, width) for width in (32, 16)),
]


def words(task: Recall, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, S), where to answer (N, pairs), with what (N, pairs)."""
    device = generator.device
    uniform = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    half = task.vocabulary // 2
    keys = 1 + uniform(sequences, half - 1).topk(task.pairs).indices  # without repetition
    values = half + uniform(sequences, half).topk(task.pairs).indices
    space = (task.length - 2 * task.pairs) // 2
    # Without repetition, by weights: the largest of log weight + Gumbel noise.
    weights = (POWER - 1) * torch.arange(1, space + 1, device=device).log()
    gaps = (weights - (-uniform(sequences, space).log()).log()).topk(task.pairs).indices
    where = 2 * task.pairs + 2 * gaps
    tokens = torch.randint(task.vocabulary, (sequences, task.length), generator=generator, device=device)
    tokens[:, : 2 * task.pairs] = torch.stack([keys, values], -1).flatten(1)
    return tokens.scatter(1, where, keys), where, values


def numbers(task: Recall, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N, S, 33), where to answer (N, pairs), with what (N, pairs, 16). The last coordinate tells queries."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=generator.device)
    keys, values = F.normalize(normal(sequences, task.pairs, POINT), dim=-1), normal(sequences, task.pairs, POINT)
    asked = keys + NOISE * POINT**-0.5 * normal(sequences, task.pairs, POINT)
    pairs = F.pad(torch.cat([keys, values], -1), (0, 1))
    queries = F.pad(F.pad(asked, (0, POINT)), (0, 1), value=1.0)
    where = torch.arange(task.pairs, 2 * task.pairs, device=generator.device).expand(sequences, -1)
    return torch.cat([pairs, queries], 1), where, values


def run(task: Recall, mixer: str, seeds: list[int], batch: int, steps: int) -> Run:
    rates = RATES[task.kind]
    models, width = len(seeds) * len(rates), task.width
    torch.manual_seed(seeds[0])
    if task.kind == "words":
        enter: nn.Module = Embedding(models, task.vocabulary, width, task.length)
        layers, leave = 2, Linear(models, width, task.vocabulary)
    else:
        enter, layers, leave = Linear(models, 2 * POINT + 1, width), 1, Linear(models, width, POINT)
    blocks = [Block(models, width, 1, mixer, mlp=False) for _ in range(layers)]
    model = nn.Sequential(enter, *blocks, Norm(models, width), leave)

    def answers(model: nn.Sequential, tokens: Tensor, where: Tensor) -> Tensor:
        """What the models say where they are asked, (E, N, pairs, ...)."""
        x = model[:-1](tokens)
        said: Tensor = model[-1](x.gather(2, where.unsqueeze(-1).expand(-1, -1, -1, width)))
        return said

    squares = lambda model, tokens, where, right: (answers(model, tokens, where) - right).square().mean(-1)
    if task.kind == "words":
        learned = Task(
            partial(words, task),
            losses=lambda model, tokens, where, right: cross_entropies(answers(model, tokens, where), right),
            errors=lambda model, tokens, where, right: (
                (answers(model, tokens, where).argmax(-1) != right).float().mean(1)
            ),
            enough=0.01,
        )
    else:
        learned = Task(
            partial(numbers, task),
            losses=lambda *drawn: squares(*drawn).mean((1, 2)),
            errors=lambda *drawn: squares(*drawn).mean(1),
        )
    facts = {"task": task.kind, "mixer": mixer, **{name: of for name, of in asdict(task).items() if name != "kind"}}
    return {**facts, **learn(model.to(DEVICE), learned, seeds, rates, batch, steps)}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__, MIXERS)
    parser.add_argument("--kinds", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--sequences", type=int, default=8 * EPOCH, help="to train on at most; default: %(default)s")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--pairs", type=int, nargs="+", help="tasks of so many; default: all")
    parser.add_argument("--batch", type=int, default=256, help="sequences, but not more than --tokens")
    parser.add_argument("--tokens", type=int, default=32768, help="in a batch, at most")
    parser.add_argument("--most", type=int, default=512, help="longest sequences")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="of words; default: %(default)s")
    options = parser.parse_args(arguments)
    tasks = [replace(task, vocabulary=options.vocabulary) for task in TASKS if task.kind in options.kinds]
    tasks = [task for task in tasks if task.length <= options.most and task.width in options.widths]
    tasks = [task for task in tasks if options.pairs is None or task.pairs in options.pairs]
    if options.quick:
        tasks = [Recall("numbers", 16, 32, 32), Recall("words", 4, 16, 32, vocabulary=16)]
        options.mixers, options.seeds, options.sequences, options.batch = MIXERS[:2], [0], 120 * 64, 64
    wanted = {}
    for task, mixer in product(tasks, options.mixers):
        batch = min(options.batch, options.tokens // task.length)
        wanted[f"{task.name()}, {mixer}"] = partial(run, task, mixer, options.seeds, batch, options.sequences // batch)
    return study(options, wanted, plot)


def plot(runs: dict[str, Run], path: Path) -> None:
    """What is wrong against the number of pairs."""
    panels: dict[tuple[str, int], dict[str, list[tuple[list[float], list[float]]]]] = {}
    for run in sorted(runs.values(), key=lambda run: (run["task"] == "numbers", -run["width"], run["pairs"])):
        lines = panels.setdefault((run["task"], run["width"]), {}).setdefault(run["mixer"], [])
        for i, wrong in enumerate(run["reported"]):
            if i == len(lines):
                lines.append(([], []))
            lines[i][0].append(run["pairs"])
            lines[i][1].append(wrong)
    how = {"words": ("wrong answers", "x"), "numbers": ("mean square of the error, in variances", "xy")}
    drawn = [Panel(f"{task}, width {width}", *how[task], lines) for (task, width), lines in panels.items()]
    draw_curves(drawn, path, x="pairs")


if __name__ == "__main__":
    main()
