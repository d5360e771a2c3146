"""State tracking: where five things are after a row of permutations, at every step.

    python -m examples.experiments.state_tracking --quick
    python -m examples.experiments.state_tracking                            on a GPU

A token is a permutation of five: any of the 120, or a swap, one of 10. The model foretells the product of all so far,
one of 120. Four layers of width 64 with two heads each, an MLP, learned positions. No such attention is expected to
learn all of it: what a few layers compute is parallel, and permutations of five do not commute. Reported: the part of
wrong answers in the second half of the sequence. Chance is 119 of 120; of swaps every model can know the parity, which
leaves 59 of 60.
"""

from __future__ import annotations

import functools
from functools import partial
from itertools import permutations, product
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.experiments.ensemble import Block, Embedding, Linear, Norm, Task, cross_entropies, learn
from examples.experiments.runs import DEVICE, Panel, Run, draw_curves, parser_of, spread, study

MIXERS = ("softmax", "LLA", "gated delta rule")
GROUP = list(permutations(range(5)))
SWAPS = [i for i, p in enumerate(GROUP) if sum(a != b for a, b in enumerate(p)) == 2]
# PRODUCT[a, b]: first a, then b.
PRODUCT = torch.tensor([[GROUP.index(tuple(b[i] for i in a)) for b in GROUP] for a in GROUP])
KINDS = {"swaps": torch.tensor(SWAPS), "permutations": torch.arange(len(GROUP))}
WIDTH, HEADS, LAYERS = 64, 2, 4
RATES = {"swaps": (1e-3, 3e-3, 1e-2), "permutations": (1e-3, 3e-3)}


@functools.cache
def tables(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What tokens are drawn of, and products: copied once, for a CUDA graph can hold no copy to the device."""
    return KINDS[kind].to(device), PRODUCT.to(device)


def draw(kind: str, length: int, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and the product of all so far, (N, S) each."""
    among, products = tables(kind, generator.device)
    tokens = among[torch.randint(len(among), (sequences, length), generator=generator, device=generator.device)]
    states = [tokens[:, 0]]
    for token in tokens[:, 1:].unbind(1):
        states.append(products[states[-1], token])
    return tokens, torch.stack(states, 1)


def run(kind: str, mixer: str, seeds: list[int], length: int, batch: int, steps: int) -> Run:
    models = len(seeds) * len(RATES[kind])
    torch.manual_seed(seeds[0])
    blocks = [Block(models, WIDTH, HEADS, mixer, mlp=True) for _ in range(LAYERS)]
    enter, leave = Embedding(models, len(GROUP), WIDTH, length), Linear(models, WIDTH, len(GROUP))
    model = nn.Sequential(enter, *blocks, Norm(models, WIDTH), leave)
    task = Task(
        partial(draw, kind, length),
        losses=lambda model, tokens, states: cross_entropies(model(tokens), states),
        errors=lambda model, tokens, states: (model(tokens).argmax(-1) != states).float().mean(1),
        first=length // 2,
        enough=0.01,
    )
    learned = learn(model.to(DEVICE), task, seeds, RATES[kind], batch, steps)
    return {"kind": kind, "mixer": mixer, "length": length, **learned}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__, MIXERS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16], help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kinds, options.mixers, options.seeds, options.steps = ["swaps"], MIXERS[:2], [0], 100
        options.lengths, options.batch = [4], 64
    wanted = {
        f"{length} {kind}, {options.steps} steps, {mixer}": partial(
            run, kind, mixer, options.seeds, length, options.batch, options.steps
        )
        for kind, length, mixer in product(options.kinds, options.lengths, options.mixers)
    }
    return study(options, wanted, plot, table)


def followed(run: Run) -> list[int]:
    """Of each seed's model, how many permutations it follows: before the first that it gets wrong in over a tenth."""
    along = [run["along"][i] for i in run["members"]]
    return [next((n for n, wrong in enumerate(one) if wrong > 0.1), len(one)) for one in along]


def table(runs: dict[str, Run]) -> str:
    """Markdown: what is reported, and how many permutations are followed, of each seed."""
    rows = ["| run | wrong in the second half | permutations followed |", "|---|---|---|"]
    for name, run in runs.items():
        rows.append(f"| {name} | {spread(run['reported'])} | {', '.join(map(str, followed(run)))} |")
    return "\n".join(rows)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Wrong answers after so many permutations."""
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for run in sorted(runs.values(), key=lambda run: (run["kind"] != "swaps", run["length"], run["of_steps"])):
        after = [float(i + 1) for i in range(run["length"])]
        lines = [(after, run["along"][i]) for i in run["members"]]
        panels.setdefault(f"{run['length']} {run['kind']}, {run['of_steps']} steps", {})[run["mixer"]] = lines
    draw_curves([Panel(title, "wrong answers", "", lines) for title, lines in panels.items()], path, x="permutations")


if __name__ == "__main__":
    main()
