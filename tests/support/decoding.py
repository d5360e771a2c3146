"""The table of decoding cases, the caches that they are called with, and what each should give."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlla import lla_attention, lla_decode
from flashlla.backends.naive import Naive
from tests.support.budget import as_kernels_do, spreads
from tests.support.helpers import normal, problem_of
from tests.support.rounding import Rounding, disturbed

NAN = float("nan")


@dataclass(frozen=True)
class Decoding:
    """One call; keys beyond a sequence's length, or before its first of ``starts``, hold NaN. quick: stands for its
    feature where time is short."""

    name: str
    lengths: tuple[int, ...] = (40, 17)
    starts: tuple[int, ...] | None = None
    new: int = 1
    heads: int = 2
    key_heads: int = 2
    room: int = 63
    dim: int = 16
    value_dim: int = 16
    window: int | None = None
    page: int | None = None
    layout: str = "bhsd"
    ridge: str = "number"
    ridge_lambda: float = 0.3
    scale: float | None = None
    seed: int = 0
    quick: bool = False

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k and v, (B, H, S, D), and the keywords that hold tensors."""
        batch = len(self.lengths)
        q = normal(batch, self.heads, self.new, self.dim, seed=self.seed + 1, dtype=dtype)
        k = normal(batch, self.key_heads, self.room, self.dim, seed=self.seed + 2, dtype=dtype)
        v = normal(batch, self.key_heads, self.room, self.value_dim, seed=self.seed + 3, dtype=dtype)
        for sequence, (start, length) in enumerate(self.spans):
            for t in (k, v):
                t[sequence, :, :start] = t[sequence, :, length:] = NAN
        shapes = {"per_head": (self.heads, 1), "per_token": (1, self.new), "full": (batch, self.heads, self.new)}
        ridge: Any = self.ridge_lambda
        if self.ridge != "number":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            ridge = ridge * 3 ** normal(*shapes[self.ridge], seed=self.seed + 4, dtype=wide).clamp(-1, 1)
        keywords = {"ridge_lambda": ridge, "seqlens_k": torch.tensor(self.lengths, dtype=torch.int32)}
        if self.starts is not None:
            keywords["seqstarts_k"] = torch.tensor(self.starts, dtype=torch.int32)
        return q, k, v, keywords

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each sequence's keys begin and end."""
        return list(zip(self.starts or (0,) * len(self.lengths), self.lengths, strict=True))

    def options(self) -> dict[str, Any]:
        return {"window": self.window, "qk_scale": self.scale, "layout": self.layout}


CASES = (
    Decoding("plain", quick=True),
    Decoding("one_key", lengths=(1, 2)),
    Decoding("many_new", lengths=(63, 16), heads=1, key_heads=1, new=16, quick=True),
    Decoding("fewer_keys_than_new", lengths=(3, 0, 9), new=5, quick=True),
    Decoding("nothing_yet", lengths=(0, 0), new=2, quick=True),
    Decoding("full_cache", lengths=(63, 63), new=3),
    Decoding("long", lengths=(300, 111), room=300, heads=1, key_heads=1, new=2),
    Decoding("heads_shared_3", heads=6, key_heads=2, new=3, quick=True),
    Decoding("heads_shared_8", heads=8, key_heads=1, new=1),
    Decoding("dim_60", dim=60, value_dim=60, new=2),
    Decoding("dim_100", dim=100, value_dim=100, lengths=(111,), room=111),
    Decoding("values_narrow", value_dim=5, new=2, quick=True),
    Decoding("values_wide", dim=8, value_dim=60, new=2),
    Decoding("starts", lengths=(40, 17, 9), starts=(5, 0, 9), heads=4, key_heads=2, new=3, quick=True),
    Decoding("starts_of_new", lengths=(40, 17), starts=(39, 20), new=3),
    Decoding("starts_long", lengths=(300, 111), starts=(133, 0), room=300, heads=1, key_heads=1),
    Decoding("starts_window", lengths=(40, 17), starts=(36, 2), window=7, new=3),
    Decoding("starts_pages", lengths=(40, 17, 60), starts=(21, 0, 16), page=16, room=64, new=2),
    Decoding("prompt", lengths=(63, 40, 9), heads=4, key_heads=2, new=40, quick=True),
    Decoding("prompt_starts", lengths=(63, 40, 9), starts=(5, 40, 2), new=40, quick=True),
    Decoding("prompt_window", lengths=(63, 40), starts=(40, 3), window=9, new=17, value_dim=5),
    Decoding("prompt_pages", lengths=(60, 33), starts=(17, 0), page=16, room=64, new=20, layout="bshd", ridge="full"),
    Decoding("window", window=7, new=3, lengths=(40, 5), quick=True),
    Decoding("window_1", window=1, new=2),
    Decoding("window_of_old", window=20, new=2, lengths=(63, 60)),
    Decoding("window_wider", window=1000, new=2),
    Decoding("bshd", layout="bshd", heads=4, key_heads=2, new=3, value_dim=8, quick=True),
    Decoding("ridge_per_head", ridge="per_head", new=2),
    Decoding("ridge_per_token", ridge="per_token", new=3),
    Decoding("ridge_full", ridge="full", heads=4, key_heads=2, new=2, quick=True),
    Decoding("ridge_weak", ridge_lambda=0.01, new=2),
    Decoding("scale", scale=-0.7, new=2),
    Decoding("pages_16", page=16, room=64, new=3, quick=True),
    Decoding("pages_48", page=48, room=144, lengths=(100, 48, 0), new=2),
    Decoding("pages_window", page=16, room=128, lengths=(100, 60), window=20, new=2),
    Decoding(
        "pages_bshd",
        page=16,
        room=64,
        layout="bshd",
        heads=4,
        key_heads=2,
        value_dim=12,
        ridge="full",
        new=2,
        quick=True,
    ),
)


def paged(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in an order of their own, some of nobody among them, and the table that finds them."""
    batch, heads, room, _ = k.shape
    each = room // size
    order = torch.randperm(batch * each + 3, generator=torch.Generator().manual_seed(0))
    table = order[: batch * each].reshape(batch, each).int()
    pages = []
    for t in (k, v):
        made = t.new_full((len(order), heads, size, t.shape[-1]), NAN)
        made[table.long()] = t.unflatten(2, (each, size)).transpose(1, 2)
        pages.append(made)
    return pages[0], pages[1], table


def expected(case: Decoding, dtype: torch.dtype) -> Tensor:
    """(B, Hq, N, Dv) in float64: the last rows of a full forward pass of each sequence, from inputs of ``dtype``."""
    q, k, v, keywords = case.make(dtype)
    found = []
    for b, (start, length) in enumerate(case.spans):
        ridge = keywords["ridge_lambda"]
        if isinstance(ridge, Tensor):
            ridge = ridge.double().expand(len(case.lengths), case.heads, case.new)[b : b + 1]
        keys, values = (t[b : b + 1, :, start:length].double() for t in (k, v))
        # Earlier queries before the new ones: their rows are computed and left.
        before = max(0, length - start - case.new)
        queries = torch.cat([normal(1, case.heads, before, case.dim, seed=9), q[b : b + 1].double()], 2)
        if isinstance(ridge, Tensor):
            ridge = torch.cat([torch.ones(1, case.heads, before, dtype=torch.float64), ridge], 2)
        o = lla_attention(
            queries,
            keys,
            values,
            ridge_lambda=ridge,
            qk_scale=case.scale,
            window=case.window,
            solver="direct",
            backend="naive",
        )
        found.append(o[:, :, before:])
    return torch.cat(found)


def arguments(case: Decoding, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
    """q, k_cache and v_cache as they are passed, and the keywords."""
    q, k, v, keywords = case.make(dtype)
    if case.page is not None:
        k, v, keywords["block_table"] = paged(k, v, case.page)
    if case.layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    keywords = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in keywords.items()}
    return [t.to(device) for t in (q, k, v)], {**keywords, **case.options()}


@functools.cache
def spread(case: Decoding, draws: int = 3, fused: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the error budget knows of the output's rows, from so many draws: tests/support/budget.py. fused: for the
    training kernels, which take many new queries, of operands of that dtype."""
    q, k, v, keywords = case.make(torch.float64)
    k, v = (t.nan_to_num().repeat_interleave(case.heads // case.key_heads, 1) for t in (k, v))
    ridge = torch.as_tensor(keywords["ridge_lambda"], dtype=torch.float64).expand(q.shape[:-1])

    def run(rounding: Rounding, draws: int) -> list[list[Tensor]]:
        many = [t.repeat(1, draws, *(1,) * (t.dim() - 2)) for t in (q, k, v, ridge)]
        options: dict[str, Any] = {**keywords, "ridge_lambda": many[3], "window": case.window, "qk_scale": case.scale}
        problem, inputs = problem_of(many[0], many[1], many[2], lla_decode, **options)
        o = disturbed(lambda: Naive().forward(problem, inputs).o, rounding, many)
        return [[one] for one in o.split(case.heads, 1)]

    exact = [expected(case, torch.float64)]
    found = {kind: of[0] for kind, of in spreads(run, exact, draws).items()}
    if fused is not None:
        with as_kernels_do(fused):
            # But for operands: z is rounded once, for its products with keys and with their mean.
            found |= {kind: of[0] for kind, of in spreads(run, exact, draws).items() if kind != "operand"}
    return found
