"""In-context regression: two trained layers learn a function anew in each sequence, from the examples so far.

    python -m examples.experiments.in_context_regression --quick
    python -m examples.experiments.in_context_regression                            on a GPU

A token brings the next point x_t, on the unit sphere in 8 dimensions, and the last example, (x_{t-1}, y_{t-1}); the
model foretells y_t. Functions are linear, or networks of 32 rectified units, new in each sequence; examples have noise.
Two layers of width 32 with two heads each, without an MLP and without positions. Errors are mean squares of the
distance to the function without noise, in its variances. Of each mixer and seed the learning rate is chosen on other
sequences than those of which errors are reported.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments.ensemble import MIXERS, Block, Linear, Norm, Task, learn
from examples.experiments.runs import DEVICE, Panel, Run, draw_curves, parser_of, study

FUNCTIONS = ("linear", "network")
POINT, HIDDEN, NOISE = 8, 32, 0.1
WIDTH, HEADS, LAYERS = 32, 2, 2
RATES = (3e-3, 1e-2, 3e-2)


def draw(function: str, length: int, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def run(function: str, mixer: str, seeds: list[int], length: int, batch: int, steps: int) -> Run:
    models = len(seeds) * len(RATES)
    torch.manual_seed(seeds[0])
    blocks = [Block(models, WIDTH, HEADS, mixer, mlp=False) for _ in range(LAYERS)]
    model = nn.Sequential(Linear(models, 2 * POINT + 1, WIDTH), *blocks, Norm(models, WIDTH), Linear(models, WIDTH, 1))
    squares = lambda model, tokens, y: (model(tokens).squeeze(-1) - y).square()  # (E, N, S)
    task = Task(
        partial(draw, function, length),
        losses=lambda *drawn: squares(*drawn).mean((1, 2)),
        errors=lambda *drawn: squares(*drawn).mean(1),
    )
    learned = learn(model.to(DEVICE), task, seeds, RATES, batch, steps)
    return {"function": function, "mixer": mixer, "length": length, **learned}


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    parser = parser_of(__file__, __doc__, MIXERS)
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.steps, options.length, options.batch = [0], 100, 32, 32
        options.mixers = ["softmax", "LLA"]
    how = (options.seeds, options.length, options.batch, options.steps)
    pairs = product(options.functions, options.mixers)
    wanted = {f"{function}, {mixer}": partial(run, function, mixer, *how) for function, mixer in pairs}
    return study(options, wanted, plot)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Error against the number of examples seen, of the chosen rate of each seed."""
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]] = {}
    for run in runs.values():
        along = torch.tensor(run["along"])[run["members"]]  # (seeds, S)
        ends = [2**i for i in range(1, 20) if 2**i <= run["length"]]
        means = torch.stack([along[:, end // 2 : end].mean(1) for end in ends], 1)
        lines = [([float(end) for end in ends], one) for one in means.tolist()]
        panels.setdefault(run["function"], {})[run["mixer"]] = lines
    drawn = [Panel(function, "error, in variances", "xy", lines) for function, lines in panels.items()]
    draw_curves(drawn, path, x="examples")


if __name__ == "__main__":
    main()
