"""State tracking: where five things are after a row of permutations, at every step.

    python -m examples.experiments.state_tracking --quick --results FILE
    python -m examples.experiments.state_tracking                            on a GPU

A token is a permutation of five: any of the 120, or a swap, one of 10. The model foretells the product of all so far,
one of 120. Four layers of width 64 with two heads each, an MLP, learned positions. No such attention is expected to
learn all of it: what a few layers compute is parallel, and permutations of five do not commute. Reported: the part of
wrong answers in the second half of the sequence. Chance is 119 of 120; of swaps every model can know the parity, which
leaves 59 of 60.
"""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments.ensemble import Block, Embedding, Linear, Norm, alike, fit
from examples.experiments.runs import Run, Runs, chosen, draw_curves, parser_of, table_of, within

MIXERS = ("softmax", "LLA", "gated delta rule")
GROUP = list(permutations(range(5)))
SWAPS = [i for i, p in enumerate(GROUP) if sum(a != b for a, b in enumerate(p)) == 2]
# PRODUCT[a, b]: first a, then b.
PRODUCT = torch.tensor([[GROUP.index(tuple(b[i] for i in a)) for b in GROUP] for a in GROUP])
KINDS = {"swaps": torch.tensor(SWAPS), "permutations": torch.arange(len(GROUP))}
WIDTH, HEADS, LAYERS = 64, 2, 4
RATES = (1e-3, 3e-3)


def draw(kind: str, sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and the product of all so far, (N, S) each."""
    device = generator.device
    among, products = KINDS[kind].to(device), PRODUCT.to(device)
    tokens = among[torch.randint(len(among), (sequences, length), generator=generator, device=device)]
    states = [tokens[:, 0]]
    for token in tokens[:, 1:].unbind(1):
        states.append(products[states[-1], token])
    return tokens, torch.stack(states, 1)


def run(kind: str, mixer: str, seeds: list[int], length: int, batch: int, steps: int, device: str) -> Run:
    models, rates = len(seeds) * len(RATES), len(RATES)
    torch.manual_seed(seeds[0])
    blocks = [Block(models, WIDTH, HEADS, mixer, mlp=True) for _ in range(LAYERS)]
    enter, leave = Embedding(models, len(GROUP), WIDTH, length), Linear(models, WIDTH, len(GROUP))
    model = alike(nn.Sequential(enter, *blocks, Norm(models, WIDTH), leave), rates).to(device)
    generators = [torch.Generator(device).manual_seed(1 + seed) for seed in seeds]

    def answers(sequences: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """(E, N, S, 120) and (E, N, S)"""
        drawn = [draw(kind, sequences, length, generator) for generator in generators]
        tokens, states = (torch.stack(parts).repeat_interleave(rates, 0) for parts in zip(*drawn))
        return model(tokens), states

    def loss(_: int) -> Tensor:
        said, states = answers(batch, generators)
        return F.cross_entropy(said.flatten(0, 2), states.flatten(), reduction="none").view(models, -1).mean(1)

    @torch.no_grad()
    def wrong(first: int) -> Tensor:
        """(E, S)"""
        said, states = answers(512, [torch.Generator(device).manual_seed(first + seed) for seed in seeds])
        return (said.argmax(-1) != states).float().mean(1)

    each = torch.tensor(RATES, device=device).repeat(len(seeds))
    curve = fit(loss, model, each, steps, f"{kind}, {mixer}")
    choice, reported = wrong(1000), wrong(2000)
    return {
        "kind": kind,
        "mixer": mixer,
        "length": length,
        "batch": batch,
        "steps": steps,
        **chosen(RATES, seeds, choice[:, length // 2 :].mean(1), reported[:, length // 2 :].mean(1)),
        "along": [[round(e, 4) for e in one] for one in reported.tolist()],
        "curve": curve,
    }


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.kinds, options.mixers, options.seeds, options.steps = ["swaps"], MIXERS[:2], [0], 100
        options.length, options.batch = 4, 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = Runs(options.results, device)
    for kind, mixer in within(options.within, product(options.kinds, options.mixers)):
        name = f"{kind}, {mixer}"
        if name not in runs.all:
            runs.add(name, run(kind, mixer, options.seeds, options.length, options.batch, options.steps, device))
            print(table_of({name: runs.all[name]}).splitlines()[-1], flush=True)
    print(table_of(runs.all))
    if options.plot is not None:
        plot(runs.all, options.plot)
    return runs.all


def plot(runs: dict[str, Run], path: Path) -> None:
    """Wrong answers after so many permutations."""
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for run in runs.values():
        after = [float(i + 1) for i in range(run["length"])]
        lines = [(after, run["along"][i]) for i in run["members"]]
        panels.setdefault(run["kind"], {})[run["mixer"]] = lines
    draw_curves(panels, path, x="permutations", y="wrong answers", log=False)


if __name__ == "__main__":
    main()
