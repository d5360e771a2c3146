"""The table of cases: what the operator is tested on, by name.

A case has no dtype and no device: ``case.make(dtype, device)`` gives its numbers, rounded to a dtype, and
``case.arrange(leaves)`` the views of them that ``case.op``, the function of the package, is called with. To add a case,
add a line to ``CASES``. A new argument of the function becomes a field; it goes into ``Case.keywords`` and, where it
changes shapes or which keys a query sees, into ``Case.shapes`` and ``Case.visible``, which the oracle follows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import flashlla

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How the caller's tensors lie in memory: ``pack`` makes them from (B, H, S, D), ``view`` is what is passed on.

    lacking: which of the dimensions (B, H) the caller's tensors, the result and the ridge are without.
    turned: whether tokens come before heads, in all but the ridge.
    """

    pack: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
    view: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]
    lacking: int | None = None
    turned: bool = False

    def wide(self, t: Tensor) -> Tensor:
        """(B, H, S, ...) of q, k, v, a result or what belongs to one, as the caller has it."""
        t = t.transpose(0, 1) if self.turned else t
        return t if self.lacking is None else t.unsqueeze(self.lacking)

    def narrow(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`wide`."""
        t = t if self.lacking is None else t.squeeze(self.lacking)
        return t.transpose(0, 1) if self.turned else t

    def ridge_rows(self, rows: Shape) -> Shape:
        """What a ridge broadcasts to, of (B, H, S)."""
        return tuple(n for i, n in enumerate(rows) if i != self.lacking)

    def wide_ridge(self, ridge: Tensor, rows: Shape) -> Tensor:
        """(B, H, S) of a ridge."""
        ridge = ridge.expand(self.ridge_rows(rows))
        return ridge if self.lacking is None else ridge.unsqueeze(self.lacking)


def _separate(
    pack: Callable[[Tensor], Tensor], view: Callable[[Tensor], Tensor], lacking: int | None = None, turned: bool = False
) -> Layout:
    """q, k and v each a tensor of its own, all treated alike."""
    return Layout(
        lambda q, k, v: {"q": pack(q), "k": pack(k), "v": pack(v)},
        lambda leaves: (view(leaves["q"]), view(leaves["k"]), view(leaves["v"])),
        lacking,
        turned,
    )


def _scatter(t: Tensor) -> Tensor:
    """``t`` at every second place of a tensor that holds NaN elsewhere: whoever reads there shows it."""
    b, h, s, d = t.shape
    wide = t.new_full((b, h, 2 * s + 1, 2 * d + 1), float("nan"))
    wide[:, :, 1::2, 1::2] = t
    return wide


def _three(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(0)
    return q, k, v


LAYOUTS = {
    "bhsd": _separate(lambda t: t, lambda t: t),
    "bsd": _separate(lambda t: t.squeeze(1), lambda t: t, lacking=1),
    "transposed": _separate(lambda t: t.transpose(1, 2).contiguous(), lambda t: t.transpose(1, 2)),
    "bsd_transposed": _separate(lambda t: t[:, 0].mT.contiguous(), lambda t: t.mT, lacking=1),
    "thd": _separate(lambda t: t.squeeze(0).transpose(0, 1).contiguous(), lambda t: t, lacking=0, turned=True),
    "sliced": _separate(_scatter, lambda t: t[:, :, 1::2, 1::2]),
    "packed": Layout(
        lambda q, k, v: {"qkv": torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).contiguous()},
        lambda leaves: _three(leaves["qkv"].permute(2, 0, 3, 1, 4)),  # (B, S, 3, H, D) -> three (B, H, S, D)
    ),
    "shared_keys": Layout(  # heads share keys and values: a stride of zero
        lambda q, k, v: {"q": q, "k": k[:, :1].contiguous(), "v": v[:, :1].contiguous()},
        lambda leaves: (
            leaves["q"],
            leaves["k"].expand(leaves["q"].shape),
            leaves["v"].expand(leaves["q"].shape),
        ),
    ),
    "shared_queries": Layout(  # sequences share queries
        lambda q, k, v: {"q": q[:1].contiguous(), "k": k, "v": v},
        lambda leaves: (leaves["q"].expand(leaves["k"].shape), leaves["k"], leaves["v"]),
    ),
}


def _iid(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal(shape), rng.standard_normal(shape)


def _offset(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Normal, about a common point at a distance of 30."""
    q, k = _iid(rng, shape)
    point = rng.standard_normal(shape[-1])
    point *= 30 / np.linalg.norm(point)
    return q + point, k + point


def _correlated(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """AR(1) in time, coefficient 0.95 and unit variance, mixed to q and k by two random matrices."""
    steps = rng.standard_normal(shape)
    x = np.empty(shape)
    x[..., 0, :] = steps[..., 0, :]
    for t in range(1, shape[-2]):
        x[..., t, :] = 0.95 * x[..., t - 1, :] + np.sqrt(1 - 0.95**2) * steps[..., t, :]
    mix = rng.standard_normal((2, shape[-1], shape[-1])) / np.sqrt(shape[-1])
    return x @ mix[0], x @ mix[1]


def _power_law(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations that fall as 1 / index in a random basis, about a common point."""
    q, k = _iid(rng, shape)
    d = shape[-1]
    basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
    spread = 1 / np.arange(1, d + 1)
    spread *= np.sqrt(d) / np.linalg.norm(spread)
    point = rng.standard_normal(d)
    return (q * spread) @ basis + point, (k * spread) @ basis + point


def _sharp(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Normal, with queries three times as long: few keys hold nearly all of the weight."""
    q, k = _iid(rng, shape)
    return 3 * q, k


DATA = {"iid": _iid, "offset": _offset, "correlated": _correlated, "power_law": _power_law, "sharp": _sharp}

# Shapes of a ridge given as a tensor, from (B, H, S); None: a number.
RIDGES: dict[str, Callable[[int, int, int], Shape] | None] = {
    "number": None,
    "scalar": lambda b, h, s: (),
    "per_head": lambda b, h, s: (h, 1),
    "per_token": lambda b, h, s: (1, s),
    "per_sequence_and_token": lambda b, h, s: (b, 1, s),
    "per_head_and_token": lambda b, h, s: (b, h, s),
}


@dataclass(frozen=True)
class Case:
    """One call of the operator, but for dtype and device.

    ridge_lambda: the number, or the middle of the numbers (from a third of it to three times it) of a tensor.
    sizes: what q, k, v and grad_o are multiplied by.
    small: fit for backends that run slowly, such as kernels in an interpreter.
    key_heads, keys, value_dim: of k and v, where they are not those of q.
    causal, window: as in ``lla_attention``. seqlens, seqstarts: of seqlens_k and seqstarts_k; keys beyond or before
    hold NaN, and queries before the first key as well, where none of them sees one.
    packed, packed_keys: lengths of packed sequences, of keys where they are others; tokens behind them hold NaN.
    scarce: float32 has no digits to spare: keys far from the origin; weights so sharp that the adjoint's right-hand
    side is a difference of large sums; probes so long that what k_mean is off by shows in z.k_mean.
    quick: the one that stands for its feature where time is short.
    """

    name: str
    batch: int = 1
    heads: int = 1
    length: int = 17
    dim: int = 16
    data: str = "iid"
    ridge_lambda: float = 1.0
    ridge: str = "number"
    scale: float | None = None
    delta_eps: float = 1e-12
    sizes: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    layout: str = "bhsd"
    expanded_grad: bool = False
    key_heads: int | None = None
    keys: int | None = None
    value_dim: int | None = None
    causal: bool = True
    window: int | None = None
    seqlens: tuple[int, ...] | None = None
    seqstarts: tuple[int, ...] | None = None
    packed: tuple[int, ...] | None = None
    packed_keys: tuple[int, ...] | None = None
    scarce: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        assert LAYOUTS[self.layout].lacking != 1 or self.heads == 1, f"{self.name}: {self.layout} has no heads"
        for lengths, total in zip(self.sequences, (self.length, self.keys or self.length)):
            assert sum(lengths) <= total, f"{self.name}: sequences of {lengths} in {total} tokens"

    @property
    def op(self) -> Callable[..., Any]:
        """The function that the case calls."""
        return flashlla.lla_attention if self.packed is None else flashlla.lla_attention_varlen

    @property
    def sequences(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of packed sequences, in queries and in keys."""
        queries = self.packed or ()
        return queries, self.packed_keys or queries

    @property
    def small(self) -> bool:
        return self.batch * self.heads * self.length * (self.keys or self.length) * self.dim <= 2**19

    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """Of q, k and v, with heads."""
        kv = (self.batch, self.key_heads or self.heads, self.keys or self.length)
        return (self.batch, self.heads, self.length, self.dim), (*kv, self.dim), (*kv, self.value_dim or self.dim)

    def visible(self) -> Tensor:
        """(queries, keys) or (B, 1, queries, keys), True where the query sees the key."""
        (_, _, queries, _), (_, _, keys, _), _ = self.shapes()
        if self.packed is not None:
            seen = torch.zeros(queries, keys, dtype=torch.bool)
            q_edges, k_edges = map(_edges, self.sequences)
            for (i, i_end), (j, j_end) in zip(pairwise(q_edges), pairwise(k_edges)):
                seen[i:i_end, j:j_end] = self._seen(i_end - i, j_end - j)
            return seen
        seen = self._seen(queries, keys)
        if self.seqlens is not None:
            seen = seen & (torch.arange(keys) < torch.tensor(self.seqlens)[:, None, None, None])
        if self.seqstarts is not None:
            seen = seen & (torch.arange(keys) >= torch.tensor(self.seqstarts)[:, None, None, None])
        return seen

    def _seen(self, queries: int, keys: int) -> Tensor:
        """The same for one sequence."""
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if self.causal:
            seen = seen.tril(keys - queries)
        if self.window is not None:
            seen = seen.triu(keys - queries - self.window + 1)
        return seen

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The caller's tensors, none requiring a gradient: leaves of q, k, v; "ridge_lambda" unless it is a number,
        in float32 at least; and "grad_o" of the operator's output. Always the same for the same case."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        q_shape, k_shape, v_shape = self.shapes()
        largest = tuple(map(max, q_shape, k_shape))
        q, k = DATA[self.data](rng, largest)
        q, k = q[:, : q_shape[1], : q_shape[2]], k[:, : k_shape[1], : k_shape[2]]
        v, grad_o = rng.standard_normal(v_shape), rng.standard_normal((*q_shape[:-1], v_shape[-1]))
        q, k, v, grad_o = (t * size for t, size in zip((q, k, v, grad_o), self.sizes))
        for sequence, length in enumerate(self.seqlens or ()):
            k[sequence, :, length:] = v[sequence, :, length:] = np.nan
        for sequence, start in enumerate(self.seqstarts or ()):
            k[sequence, :, :start] = v[sequence, :, :start] = np.nan
            if self.causal:
                q[sequence, :, : max(0, start - k.shape[2] + q.shape[2])] = np.nan
        if self.packed is not None:
            in_q, in_k = map(sum, self.sequences)
            q[:, :, in_q:] = k[:, :, in_k:] = v[:, :, in_k:] = np.nan
        leaves = LAYOUTS[self.layout].pack(*(torch.from_numpy(t).to(device, dtype) for t in (q, k, v)))
        shape_of = RIDGES[self.ridge]
        if shape_of is not None:
            shape = shape_of(self.batch, self.heads, self.length)
            if len(shape) == 3:
                shape = LAYOUTS[self.layout].ridge_rows(shape)
            ridge = self.ridge_lambda * 3.0 ** rng.uniform(-1, 1, shape)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            leaves["ridge_lambda"] = torch.from_numpy(np.asarray(ridge)).to(device, wide)
        grad = LAYOUTS[self.layout].narrow(torch.from_numpy(grad_o).to(device, dtype))
        leaves["grad_o"] = grad[..., :1, :1].expand(grad.shape) if self.expanded_grad else grad
        return leaves

    def arrange(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the operator is called with them: views of ``leaves``."""
        return LAYOUTS[self.layout].view(leaves)

    def keywords(self, leaves: Mapping[str, Tensor]) -> dict[str, Any]:
        """The other arguments of the function, but the solver and the backend."""
        ridge = leaves.get("ridge_lambda", self.ridge_lambda)
        found = {"ridge_lambda": ridge, "qk_scale": self.scale, "delta_eps": self.delta_eps}
        if self.seqlens is not None:
            found["seqlens_k"] = torch.tensor(self.seqlens, dtype=torch.int32, device=leaves["grad_o"].device)
        if self.seqstarts is not None:
            found["seqstarts_k"] = torch.tensor(self.seqstarts, dtype=torch.int32, device=leaves["grad_o"].device)
        if not self.causal or self.window is not None:
            found |= {"causal": self.causal, "window": self.window}
        if self.packed is not None:
            q_lengths, k_lengths = self.sequences
            cu = lambda lengths: torch.tensor(_edges(lengths), dtype=torch.int32, device=leaves["grad_o"].device)
            if self.packed_keys is None:
                found |= {"cu_seqlens": cu(q_lengths), "max_seqlen": max(q_lengths)}
            else:
                found |= {"cu_seqlens_q": cu(q_lengths), "cu_seqlens_k": cu(k_lengths)}
                found |= {"max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths)}
        return found


def _edges(lengths: tuple[int, ...]) -> list[int]:
    """Where each of the packed sequences begins, and the end."""
    return list(accumulate(lengths, initial=0))


CASES = (
    # lengths
    Case("one_token", length=1, dim=8, quick=True),
    Case("one_token_weak", batch=2, heads=3, length=1, dim=16, ridge_lambda=0.1, ridge="per_head_and_token"),
    Case("two_tokens", length=2, dim=4, ridge_lambda=0.1),
    Case("length_7", batch=2, heads=2, length=7, dim=16, ridge_lambda=0.1),
    Case("length_17", batch=2, length=17, dim=8, layout="bsd", quick=True),
    Case("length_63", heads=2, length=63, dim=16, ridge_lambda=0.1),
    Case("length_64", length=64, dim=64, ridge_lambda=10.0, layout="bsd"),
    Case("length_111", length=111, dim=16, ridge_lambda=10.0),
    Case("length_129", heads=2, length=129, dim=16, ridge_lambda=0.1),
    Case("length_300", heads=2, length=300, dim=16, ridge_lambda=1.0, ridge="per_head_and_token"),
    Case("length_193_wide", length=193, dim=64, ridge_lambda=0.1),
    # head dims
    Case("dim_1", heads=2, length=63, dim=1, ridge_lambda=0.1),
    Case("dim_3", batch=2, length=33, dim=3, ridge_lambda=0.1, layout="bsd", quick=True),
    Case("dim_60", length=111, dim=60),
    Case("dim_64", heads=2, length=63, dim=64, ridge_lambda=0.1),
    Case("dim_100", length=63, dim=100),
    # data
    Case("offset", length=64, dim=16, data="offset", scarce=True, quick=True),
    Case("offset_wide", length=111, dim=64, data="offset"),
    Case("correlated", heads=2, length=129, dim=16, data="correlated", ridge_lambda=0.1),
    Case("power_law", length=111, dim=16, data="power_law", ridge_lambda=0.1),
    Case("sharp", length=63, dim=16, data="sharp", ridge_lambda=0.1, scarce=True, quick=True),
    # ridge
    Case("ridge_scalar", length=17, dim=8, ridge="scalar"),
    Case("ridge_per_head", batch=2, heads=3, length=17, dim=8, ridge="per_head", quick=True),
    Case("ridge_per_token", heads=2, length=50, dim=16, ridge="per_token"),
    Case("ridge_per_token_flat", batch=2, length=50, dim=16, ridge="per_sequence_and_token", layout="bsd"),
    Case("ridge_per_sequence", batch=2, heads=2, length=17, dim=8, ridge="per_sequence_and_token", quick=True),
    Case("ridge_strong", length=63, dim=16, ridge_lambda=1e4, ridge="per_head_and_token"),
    Case("ridge_largest", length=17, dim=8, ridge_lambda=3e38),
    Case("ridge_weak", length=63, dim=8, ridge_lambda=1e-3, scarce=True),
    # scale and guard
    Case("scale_tiny", length=63, dim=8, scale=1e-9, ridge_lambda=0.1),
    Case("scale_large", length=33, dim=8, scale=1.5, scarce=True),
    Case("scale_negative", length=33, dim=8, scale=-0.3, quick=True),
    Case("guard", batch=2, length=33, dim=8, delta_eps=1e-3, ridge_lambda=0.1, layout="bsd"),
    Case("guard_large", heads=2, length=17, dim=8, delta_eps=1.0, quick=True),
    # layouts
    Case("transposed", batch=2, heads=3, length=17, dim=16, layout="transposed", quick=True),
    Case("transposed_flat", batch=2, length=17, dim=16, layout="bsd_transposed"),
    Case("sliced", batch=2, heads=2, length=17, dim=8, layout="sliced", quick=True),
    Case("packed", batch=2, heads=3, length=17, dim=16, layout="packed", quick=True),
    Case("shared_keys", batch=2, heads=3, length=17, dim=8, layout="shared_keys", quick=True),
    Case("shared_queries", batch=3, heads=2, length=17, dim=8, layout="shared_queries"),
    Case("expanded_grad", batch=2, heads=2, length=17, dim=8, expanded_grad=True, quick=True),
    # which keys are seen
    Case("all_keys", heads=2, length=33, dim=16, causal=False, ridge_lambda=0.1, quick=True),
    Case("all_keys_long", length=300, dim=8, causal=False),
    Case("more_keys", heads=2, length=17, keys=63, dim=8, ridge_lambda=0.1, quick=True),
    Case("fewer_keys", batch=2, length=63, keys=17, dim=8, ridge_lambda=0.1),
    Case("one_key_beyond_a_block", heads=3, key_heads=1, length=100, keys=1, dim=2),  # whole blocks see no key
    Case("one_query", batch=2, heads=2, length=1, keys=63, dim=16),
    Case("one_key", length=17, keys=1, dim=8),
    Case("all_of_more_keys", length=17, keys=40, dim=8, causal=False),
    Case("window_1", length=17, dim=8, window=1),
    Case("window_7", heads=2, length=63, dim=16, window=7, ridge_lambda=0.1, quick=True),
    Case("window_64", length=300, dim=8, window=64),
    Case("window_wider", length=17, dim=8, window=100),
    Case("window_more_keys", length=33, keys=63, dim=8, window=20),
    Case("window_fewer_keys", length=63, keys=17, dim=8, window=5),
    Case("padded", batch=3, heads=2, length=33, dim=8, seqlens=(33, 17, 0), ridge_lambda=0.1, quick=True),
    Case("padded_window", batch=2, length=63, dim=8, seqlens=(40, 63), window=9),
    Case("padded_all_keys", batch=2, length=17, keys=33, dim=8, seqlens=(20, 1), causal=False),
    Case("starts", batch=3, heads=2, length=33, dim=8, seqstarts=(5, 0, 33), ridge_lambda=0.1, quick=True),
    Case("starts_heads", batch=2, heads=6, key_heads=2, length=63, dim=16, seqstarts=(40, 1), layout="transposed"),
    Case("starts_window", batch=2, length=63, dim=8, seqstarts=(40, 3), window=9),
    Case("starts_all_keys", batch=2, length=17, keys=33, dim=8, seqstarts=(20, 1), causal=False),
    Case(
        "starts_ends", batch=4, length=33, keys=63, dim=8, seqstarts=(20, 40, 1, 9), seqlens=(63, 60, 33, 9), quick=True
    ),
    Case("starts_offset", batch=2, length=64, dim=16, data="offset", seqstarts=(13, 40), scarce=True),
    # heads and dims
    Case("heads_shared_3", batch=2, heads=6, key_heads=2, length=33, dim=8, ridge_lambda=0.1, quick=True),
    Case("heads_shared_8", heads=8, key_heads=1, length=63, dim=16, ridge="per_head_and_token"),
    Case("values_narrow", heads=2, length=33, dim=16, value_dim=5, quick=True),
    Case("values_wide", length=63, dim=8, value_dim=60, layout="transposed"),
    Case(
        "everything",
        batch=2,
        heads=6,
        key_heads=2,
        length=111,
        keys=130,
        dim=12,
        value_dim=20,
        window=60,
        seqlens=(130, 90),
        ridge_lambda=0.1,
        ridge="per_head_and_token",
        layout="transposed",
    ),
    # packed sequences
    Case("varlen", heads=2, length=111, dim=16, packed=(63, 1, 0, 47), ridge_lambda=0.1),
    Case("varlen_thd", heads=2, length=63, dim=8, packed=(17, 1, 0, 33), layout="thd", quick=True),  # and a tail of 12
    Case("varlen_one", length=17, dim=8, packed=(17,), layout="thd"),
    Case("varlen_tokens", heads=3, length=7, dim=8, packed=(1,) * 7, ridge="per_head_and_token"),
    Case("varlen_all_keys", heads=2, length=63, dim=16, packed=(20, 43), causal=False, ridge_lambda=0.1),
    Case("varlen_window", length=63, dim=8, packed=(5, 40, 18), window=7, layout="thd", quick=True),
    Case("varlen_keys", heads=2, length=40, keys=63, dim=8, packed=(1, 30, 0, 9), packed_keys=(17, 20, 5, 21)),
    Case(
        "varlen_no_keys", length=33, keys=20, dim=8, packed=(9, 20, 4), packed_keys=(0, 12, 8), causal=False, quick=True
    ),
    Case("varlen_ridge_head", heads=3, length=33, dim=8, packed=(16, 17), ridge="per_head", layout="thd"),
    Case("varlen_heads_3", heads=6, key_heads=2, length=63, dim=60, packed=(20, 43), layout="thd"),
    Case("varlen_heads_8", heads=8, key_heads=1, length=63, dim=16, packed=(1, 62), ridge="per_head_and_token"),
    Case("varlen_values", heads=2, length=33, dim=16, value_dim=5, packed=(13, 20), layout="thd"),
    Case("varlen_wide", length=63, dim=100, packed=(50, 10)),
    Case("varlen_long", length=300, dim=16, packed=(150, 3, 147), ridge="per_token"),
    Case(
        "varlen_everything",
        heads=6,
        key_heads=2,
        length=111,
        keys=140,
        dim=12,
        value_dim=20,
        packed=(1, 60, 0, 40),
        packed_keys=(3, 66, 10, 50),
        window=30,
        ridge_lambda=0.1,
        ridge="per_head_and_token",
        layout="thd",
    ),
    Case("window_huge", length=33, keys=20, dim=8, window=2**31 - 1, ridge_lambda=0.1),
    Case("window_all_tiles", length=200, dim=8, window=150),
    # odd sizes, small
    Case("length_300_narrow", length=300, dim=5, ridge_lambda=0.1),
    Case("dim_60_short", length=63, dim=60),
    Case("fewer_keys_than_dims", heads=2, length=7, dim=64, ridge_lambda=0.1),
    Case("length_70", heads=2, length=70, dim=3, ridge_lambda=10.0, ridge="per_token"),
    Case("length_100", heads=2, length=100, dim=24, ridge="per_token"),
    Case("length_65", heads=2, length=65, dim=16, ridge_lambda=0.2, ridge="per_token"),
    Case("dim_40", heads=2, length=63, dim=40, ridge_lambda=10.0, ridge="per_token"),
)

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"
