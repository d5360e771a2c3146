"""Small models, many at once: one for each seed and learning rate, along the first dimension of every parameter.

What trains one model of a few thousand parameters spends its time on launching kernels; this trains all of them in the
same time. No model sees another: losses are added, each has a learning rate and a clipped gradient of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.experiments.mixers import delta_rule, ridge_regression, softmax_attention
from examples.experiments.runs import Run, chosen, progress
from examples.experiments.training import captured, rate
from flashlla import lla_attention
from flashlla.nn.groups import RIDGE_RATE

MIXERS = ("softmax", "LLA", "delta rule", "gated delta rule", "ridge regression")
JUDGED = 64  # sequences of a batch that is judged by


class Linear(nn.Module):
    """x (E, ..., in) to (E, ..., out), by a matrix for each of E models."""

    def __init__(self, models: int, width_in: int, width_out: int) -> None:
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(models, width_in, width_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (x.flatten(1, -2) @ self.weight).unflatten(1, x.shape[1:-1])
        return y


class Norm(nn.Module):
    """RMSNorm of the last dimension of x (E, ..., width), with weights for each of E models."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(models, width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(len(x), *[1] * (x.dim() - 2), -1)
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * weight


class Attention(nn.Module):
    """x (E, B, S, width), causal, without positions; queries and keys normalised, whatever the mixer."""

    def __init__(self, models: int, width: int, heads: int, mixer: str) -> None:
        super().__init__()
        self.models, self.heads, self.mixer = models, heads, mixer
        self.qkv, self.out = Linear(models, width, 3 * width), Linear(models, width, width)
        if mixer in ("softmax", "LLA"):
            self.q_norm, self.k_norm = (Norm(models, width // heads) for _ in range(2))
        if mixer in ("LLA", "ridge regression"):
            self.ridge = nn.Parameter(torch.full((models, heads), math.log(math.expm1(1.0))))  # 1 at first
        if "delta rule" in mixer:
            self.gates = Linear(models, width, 2 * heads)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(3, 0).transpose(3, 4)  # (E, B, H, S, D) each
        if self.mixer in ("softmax", "LLA"):
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (E B, H, S, D)
        if self.mixer == "softmax":
            o = softmax_attention(q, k, v)
        elif self.mixer == "LLA":
            o = lla_attention(q, k, v, ridge_lambda=self._ridge(batch), tolerance=1e-2)
        elif self.mixer == "ridge regression":
            o = ridge_regression(q, k, v, self._ridge(batch))
        else:
            beta, decay = self.gates(x).unflatten(-1, (2, -1)).permute(3, 0, 1, 4, 2).flatten(1, 2)  # (E B, H, S) each
            # Decays begin at 0.98 a token.
            o = delta_rule(q, k, v, beta.sigmoid(), F.logsigmoid(decay + 4) if "gated" in self.mixer else None)
        y: Tensor = self.out(o.unflatten(0, (self.models, batch)).transpose(2, 3).flatten(3))
        return y

    def _ridge(self, batch: int) -> Tensor:
        """(E B, H, 1)"""
        return (F.softplus(self.ridge) + 1e-2).repeat_interleave(batch, 0).unsqueeze(-1)


class Block(nn.Module):
    def __init__(self, models: int, width: int, heads: int, mixer: str, mlp: bool) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(models, width), Attention(models, width, heads, mixer)
        self.mlp = None
        if mlp:
            wide = Linear(models, width, 4 * width), Linear(models, 4 * width, width)
            self.mlp = nn.Sequential(Norm(models, width), wide[0], nn.GELU(), wide[1])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x if self.mlp is None else x + self.mlp(x)


class Embedding(nn.Module):
    """Tokens (E, B, S) to (E, B, S, width), and learned positions where ``length`` is given."""

    def __init__(self, models: int, tokens: int, width: int, length: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(models, tokens, width) * 0.02)
        self.positions = None if length is None else nn.Parameter(torch.randn(models, 1, length, width) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        models = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1)
        x = self.tokens[models, tokens]
        return x if self.positions is None else x + self.positions[:, :, : tokens.shape[2]]


def cross_entropies(logits: Tensor, right: Tensor) -> Tensor:
    """The mean of each model (E,), of logits (E, ..., classes) and what is right (E, ...)."""
    losses = F.cross_entropy(logits.flatten(0, -2), right.flatten(), reduction="none")
    return losses.view(len(logits), -1).mean(1)


class AdamW:
    """AdamW with a learning rate for each model, ridges ten times as fast; gradients of each clipped to norm 1.

    Source: Loshchilov and Hutter, 2019.
    """

    def __init__(self, model: nn.Module, rates: Tensor, decay: float = 0.1) -> None:
        self.named = list(model.named_parameters())
        self.rates, self.decay, self.steps = rates, decay, torch.zeros((), device=rates.device)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for _, p in self.named]

    @torch.no_grad()
    def step(self, factor: Tensor | float) -> None:
        self.steps += 1
        grads = [p.grad for _, p in self.named if p.grad is not None]
        assert len(grads) == len(self.named), "a parameter has no gradient"
        norms = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()  # (E,)
        clip = (1 / norms).clamp(max=1)
        for (name, p), grad, (first, second) in zip(self.named, grads, self.moments):
            each = lambda t, p=p: t.view(-1, *[1] * (p.dim() - 1))
            grad = grad * each(clip)
            first.lerp_(grad, 0.1)
            second.lerp_(grad.square(), 0.05)
            update = first / (1 - 0.9**self.steps) / ((second / (1 - 0.95**self.steps)).sqrt() + 1e-8)
            lr = each(factor * self.rates * (RIDGE_RATE if name.endswith("ridge") else 1.0))
            if name.endswith("weight") and p.dim() == 3:  # matrices
                p.mul_(1 - lr * self.decay)
            p.sub_(lr * update)
            p.grad = None


@torch.no_grad()
def alike(model: nn.Module, rates: int) -> None:
    """The same first weights for the ``rates`` learning rates of a seed, which lie one behind the other."""
    for parameter in model.parameters():
        parameter.copy_(parameter[::rates].repeat_interleave(rates, 0))


@dataclass(frozen=True)
class Task:
    """What the models of an ensemble learn, and what of them is judged."""

    draw: Callable[[int, torch.Generator], tuple[Tensor, ...]]  # so many sequences, (N, ...) each
    losses: Callable[..., Tensor]  # of the model and what was drawn, (E, N, ...) each: (E,)
    errors: Callable[..., Tensor]  # likewise: (E, S), along the tokens
    first: int = 0  # of the tokens of which the mean is reported
    enough: float = 0.0  # such an error ends training, if one model of each seed has come to it


def learn(model: nn.Module, task: Task, seeds: list[int], rates: Sequence[float], batch: int, steps: int) -> Run:
    """Models for each seed and, one behind the other, each learning rate: trained, and judged by other sequences.

    Of the rates of a seed the best is chosen on a set of sequences, and reported of on another.
    """
    device = next(model.parameters()).device
    of_seeds = lambda first: [torch.Generator(device).manual_seed(first + seed) for seed in seeds]
    alike(model, len(rates))

    def drawn(sequences: int, generators: list[torch.Generator]) -> list[Tensor]:
        """(E, N, ...), alike for the rates of a seed."""
        parts = zip(*[task.draw(sequences, generator) for generator in generators])
        return [torch.stack(part).repeat_interleave(len(rates), 0) for part in parts]

    @torch.no_grad()
    def judged(first: int, batches: int) -> Tensor:
        """(E, S)"""
        generators = of_seeds(first)
        return torch.stack([task.errors(model, *drawn(JUDGED, generators)) for _ in range(batches)]).mean(0)

    def enough() -> bool:
        by_seed = judged(3000, 2)[:, task.first :].mean(1).view(len(seeds), -1)
        return bool((by_seed.amin(1) <= task.enough).all())

    generators = of_seeds(1)
    loss = lambda: task.losses(model, *drawn(batch, generators))
    each = torch.tensor(rates, device=device).repeat(len(seeds))
    began = time.monotonic()
    curve = fit(loss, model, each, steps, generators, enough if task.enough else lambda: False)
    seconds = time.monotonic() - began
    choice, reported = judged(1000, 8), judged(2000, 8)
    return {
        "batch": batch,
        "steps": curve[-1][0],
        "of_steps": steps,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()) // len(each),
        **chosen(rates, seeds, choice[:, task.first :].mean(1), reported[:, task.first :].mean(1)),
        "along": [[round(e, 5) for e in one] for one in reported.tolist()],
        "curve": curve,
    }


def fit(
    loss: Callable[[], Tensor],
    model: nn.Module,
    rates: Tensor,
    steps: int,
    generators: Sequence[torch.Generator],
    enough: Callable[[], bool],
) -> list[Any]:
    """Train by ``loss()``, (E,), with ``rates`` (E,) that grow for a tenth of the steps and fall to a tenth.

    ``generators`` are those that ``loss`` draws by. Ends early if there is ``enough``, which is asked about fifty times
    on the way. Returns steps and losses, (E,), as often.
    """
    optimizer, curve, every = AdamW(model, rates), [], max(1, steps // 50)
    factor = torch.zeros((), device=rates.device)

    def step() -> Tensor:
        losses = loss()
        losses.sum().backward()
        optimizer.step(factor)
        return losses.detach()

    take = captured(step, generators) if rates.device.type == "cuda" else step
    for done in progress(range(1, steps + 1), desc="steps", unit="step"):
        factor.fill_(rate(done / steps, 0.1))
        losses = take()
        if done % every == 0:
            curve.append([done, [round(one, 5) for one in losses.tolist()]])
            if enough():
                break
    return curve
