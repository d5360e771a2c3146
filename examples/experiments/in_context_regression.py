"""In-context regression: two trained layers learn a function anew in each sequence, from the examples so far.

    python -m examples.experiments.in_context_regression --quick --results FILE
    python -m examples.experiments.in_context_regression                            on a GPU

A token brings the next point x_t, on the unit sphere in 8 dimensions, and the last example, (x_{t-1}, y_{t-1}); the
model foretells y_t. Functions are linear, or networks of 32 rectified units, new in each sequence; examples have noise.
Two layers of width 32 with two heads each, without an MLP and without positions. Errors are mean squares of the
distance to the function without noise, in its variances. Of each mixer and seed the learning rate is chosen on other
sequences than those of which errors are reported.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments.ensemble import MIXERS, Block, Linear, Norm, alike, fit
from examples.experiments.runs import Run, Runs, chosen, draw_curves, parser_of, table_of, within

FUNCTIONS = ("linear", "network")
POINT, HIDDEN, NOISE = 8, 32, 0.1
WIDTH, HEADS, LAYERS = 32, 2, 2
RATES = (3e-3, 1e-2, 3e-2)


def draw(function: str, sequences: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (N, S, 17) and the function's values (N, S)."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=generator.device)
    x = F.normalize(normal(sequences, length, POINT), dim=-1)
    if function == "linear":
        y = (x @ normal(sequences, POINT, 1)).squeeze(-1)
    else:
        units = (x @ normal(sequences, POINT, HIDDEN)).relu()
        y = (units @ normal(sequences, HIDDEN, 1)).squeeze(-1) / (HIDDEN / 2) ** 0.5
    example = torch.cat([x, (y + NOISE * normal(sequences, length)).unsqueeze(-1)], -1)[:, :-1]
    return torch.cat([x, F.pad(example, (0, 0, 1, 0))], -1), y


def run(function: str, mixer: str, seeds: list[int], length: int, batch: int, steps: int, device: str) -> Run:
    models, rates = len(seeds) * len(RATES), len(RATES)
    torch.manual_seed(seeds[0])
    blocks = [Block(models, WIDTH, HEADS, mixer, mlp=False) for _ in range(LAYERS)]
    model = nn.Sequential(Linear(models, 2 * POINT + 1, WIDTH), *blocks, Norm(models, WIDTH), Linear(models, WIDTH, 1))
    model = alike(model, rates).to(device)
    generators = [torch.Generator(device).manual_seed(1 + seed) for seed in seeds]

    def errors(sequences: int, generators: list[torch.Generator]) -> Tensor:
        """(E, N, S)"""
        drawn = [draw(function, sequences, length, generator) for generator in generators]
        tokens, y = (torch.stack(parts).repeat_interleave(rates, 0) for parts in zip(*drawn))
        said: Tensor = model(tokens)
        return (said.squeeze(-1) - y).square()

    each = torch.tensor(RATES, device=device).repeat(len(seeds))
    curve = fit(lambda _: errors(batch, generators).mean((1, 2)), model, each, steps, f"{function}, {mixer}")
    with torch.no_grad():
        fresh = lambda first: [torch.Generator(device).manual_seed(first + seed) for seed in seeds]
        choice, reported = (errors(256, fresh(first)).mean(1) for first in (1000, 2000))  # (E, S)
    return {
        "function": function,
        "mixer": mixer,
        "length": length,
        "batch": batch,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()) // models,
        **chosen(RATES, seeds, choice.mean(1), reported.mean(1)),
        "along": [[round(e, 5) for e in one] for one in reported.tolist()],  # by model, by token
        "curve": curve,
    }


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.length, options.batch = [0], 150, 32, 32
        options.functions, options.mixers = ["linear"], ["softmax", "LLA"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = Runs(options.results, device)
    for function, mixer in within(options.within, product(options.functions, options.mixers)):
        name = f"{function}, {mixer}"
        if name not in runs.all:
            runs.add(name, run(function, mixer, options.seeds, options.length, options.batch, options.steps, device))
            print(name, table_of({name: runs.all[name]}).splitlines()[-1], flush=True)
    print(table_of(runs.all))
    if options.plot is not None:
        plot(runs.all, options.plot)
    return runs.all


def plot(runs: dict[str, Run], path: Path) -> None:
    """Error against the number of examples seen, of the chosen rate, a line for each seed."""
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for run in runs.values():
        along = torch.tensor(run["along"])[run["members"]]  # (seeds, S)
        ends = [2**i for i in range(1, 20) if 2**i <= run["length"]]
        means = torch.stack([along[:, end // 2 : end].mean(1) for end in ends], 1)
        lines = [([float(end) for end in ends], one) for one in means.tolist()]
        panels.setdefault(run["function"], {})[run["mixer"]] = lines
    draw_curves(panels, path, x="examples", y="error, in variances", log=True)


if __name__ == "__main__":
    main()
