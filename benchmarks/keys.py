"""Keys of trained models: what a file of them holds, and a part of it kept as benchmark data.

    python -m benchmarks keys FILE                               # of each head: ridge, effective keys, iterations
    python -m benchmarks keys FILE --heads 0 1 --keep trained    # two of each layer: benchmarks/heads/trained.pt
    python -m benchmarks run --from FILE                         # the usual passes on your own keys

A file is what torch.save makes of {"recipe": str, how they were made, "q", "k", "v": (layers, heads, S, D) float16,
"ridge": (layers, heads, 1) or (layers, heads, S) float32, "layers": [int], which of the model's, "scale": float}; as
`python -m examples.experiments.language_model --keys` writes it. `trained` are keys of a model without qk-norm,
`trained_qknorm` of one with it.

Effective keys are the exponential of the entropy of a query's weights, the condition that of its matrix A with the
ridge: medians over 16 queries of the last half. Iterations are the mean over all queries, to the default tolerance.
"""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashlla
from benchmarks.needs import Missing

FOLDER = Path(__file__).parent / "heads"


@dataclass(frozen=True)
class Keys:
    """Heads of a model, one sequence."""

    q: Tensor  # (layers, heads, S, D)
    k: Tensor
    v: Tensor
    ridge: Tensor  # (layers, heads, 1 or S)
    layers: list[int]
    scale: float
    recipe: str

    @classmethod
    def read(cls, path: Path) -> Keys:
        try:
            found = cls(**torch.load(path, map_location="cpu"))
        except FileNotFoundError as error:
            raise Missing(f"there are no keys in {path}; try --data iid") from error
        except TypeError as error:
            raise ValueError(
                f"{path}: {error}; wanted a file as `python -m benchmarks keys --help` describes"
            ) from error
        *some, length, dim = found.q.shape
        shapes: dict[str, list[tuple[int, ...]]] = {
            "k": [found.q.shape], "v": [found.q.shape], "ridge": [(*some, 1), (*some, length)],
        }  # fmt: skip
        for name, wanted in shapes.items():
            if (got := getattr(found, name).shape) not in wanted:
                raise ValueError(f"{path}: {name} is {tuple(got)}, where q is {tuple(found.q.shape)}")
        if not math.isclose(found.scale, dim**-0.5, rel_tol=1e-6):
            raise ValueError(f"{path}: scale is {found.scale}, wanted 1 / sqrt(D), which is what benchmarks run with")
        return found

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name) for name in self.__dataclass_fields__}, path)

    def of_heads(self, heads: list[int]) -> Keys:
        """Those of each layer, by themselves."""
        parts = {name: getattr(self, name)[:, heads].clone() for name in ("q", "k", "v", "ridge")}
        return Keys(**parts, layers=self.layers, scale=self.scale, recipe=f"{self.recipe}; heads {heads}")

    def tiled(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v of ``shape`` (B, H, S, D) and ridges (B, H, 1 or S): heads one after the other, again and again, of
        the first S tokens."""
        batch, heads, length, dim = shape
        *_, longest, width = self.q.shape
        if length > longest:
            raise ValueError(f"trained keys end at {longest} tokens, and {length} are asked for; try --data iid")
        if dim != width:
            raise ValueError(f"trained keys have head dim {width}, and {dim} is asked for; try --data iid")

        def tiled(t: Tensor) -> Tensor:
            rows = t.flatten(0, 1)
            many: Tensor = rows[torch.arange(batch * heads) % len(rows)].unflatten(0, (batch, heads))
            return many.to(device)

        q, k, v = (tiled(t[:, :, :length]).to(dtype) for t in (self.q, self.k, self.v))
        return q, k, v, tiled(self.ridge[..., :length])


@functools.cache
def kept(name: str) -> Keys:
    """What is kept by this ``name`` in benchmarks/heads, or in the file of that path."""
    return Keys.read(Path(name) if name.endswith(".pt") else FOLDER / f"{name}.pt")


def facts(keys: Keys, layer: int, head: int) -> dict[str, float]:
    """Of one head, in float64 on the CPU."""
    q, k, v, ridge = (t[layer, head].double() for t in (keys.q, keys.k, keys.v, keys.ridge))
    length, dim = q.shape
    ridge = ridge.expand(length)
    rows = torch.linspace(length // 2, length - 1, 16).long()
    effective, condition = [], []
    for i in rows.tolist():
        p = (keys.scale * k[: i + 1] @ q[i]).softmax(0)
        centred = k[: i + 1] - p @ k[: i + 1]
        values = torch.linalg.eigvalsh((centred * p[:, None]).T @ centred + ridge[i] * torch.eye(dim, dtype=p.dtype))
        effective.append(torch.special.entr(p).sum().exp())
        condition.append(values[-1] / values[0])
    found = [t[None, None].float() for t in (q, k, v)]
    _, info = flashlla.lla_attention(*found, ridge_lambda=ridge[None, None].float(), return_info=True, tolerance=2e-3)
    return {
        "ridge": ridge.mean().item(),
        "effective keys": torch.stack(effective).median().item(),
        "condition": torch.stack(condition).median().item(),
        "iterations": info.iterations.double().mean().item(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--heads", type=int, nargs="+", help="of each layer; default: all")
    parser.add_argument("--keep", metavar="NAME", help="keep them as benchmarks/heads/NAME.pt")


def main(options: argparse.Namespace) -> int:
    keys = Keys.read(options.file)
    print(keys.recipe)
    for layer, number in enumerate(keys.layers):
        for head in options.heads or range(keys.q.shape[1]):
            words: list[Any] = [f"{name} {x:.3g}" for name, x in facts(keys, layer, head).items()]
            print(f"layer {number} head {head}:", *words, sep="  ", flush=True)
    if options.keep:
        path = FOLDER / f"{options.keep}.pt"
        (keys.of_heads(options.heads) if options.heads else keys).write(path)
        print(f"wrote {path}")
    return 0
