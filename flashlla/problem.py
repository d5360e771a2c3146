"""What one call asks for, and the shapes of what backends take and give.

Letters used in every shape comment of the package:

    B batch    Hq query heads    Hkv key and value heads    Sq queries    Sk keys    D head dim    Dv value dim
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashlla import solvers
from flashlla.solvers.base import Solver

# The smallest relative residual |A x - b| / |b| worth iterating for when keys and queries come in this dtype: below
# it the rounding of the operands, not the solver, decides the error of the output (docs/math.md, section 6).
_RESOLUTION = {
    torch.float64: 1e-15,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
SUPPORTED_DTYPES = tuple(_RESOLUTION)
# So many new tokens of a sequence, or fewer, are decoded by kernels of their own.
FEW_NEW = 16


def resolution(dtype: torch.dtype) -> float:
    """Smallest relative residual that operands of ``dtype`` can make use of."""
    return _RESOLUTION[dtype]


def largest_key(dtype: torch.dtype, head_dim: int) -> float:
    """Keys beyond this count as infinite: their products with queries may overflow in sums of ``dtype``."""
    return float(torch.finfo(dtype).max ** 0.5 / (4 * head_dim))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class KeySpans(NamedTuple):
    """Which keys each query sees: those from ``start`` to before ``stop``; empty where stop <= start."""

    start: Tensor  # (Sq,), or (B, 1, Sq) where sequences have lengths of their own
    stop: Tensor  # the same

    def first_of(self, k: Tensor) -> Tensor:
        """The first of the keys k, (B, H, Sk, D), that a query sees: (B, H, 1, D)."""
        first = self.start[..., :1, None].clamp(max=k.shape[2] - 1).expand(*k.shape[:2], 1, k.shape[-1])
        return k.gather(2, first)


class Inputs(NamedTuple):
    """The tensors of one call, four-dimensional views with any strides.

    Packed: B = 1, and Sq and Sk are total lengths. Pages: k and v are (pages, Hkv, page size, D).
    """

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D)
    v: Tensor  # (B, Hkv, Sk, Dv)
    ridge_lambda: Tensor  # (B, Hq, Sq), accumulator dtype, often expanded from fewer numbers
    seqlens_k: Tensor | None = None  # (B,) int32, one past each sequence's last key; None: all
    seqstarts_k: Tensor | None = None  # (B,) int32, each sequence's first key; None: 0
    cu_seqlens_q: Tensor | None = None  # (sequences + 1,) int32, where each packed sequence begins, and the end
    cu_seqlens_k: Tensor | None = None  # the same for keys
    block_table: Tensor | None = None  # (B, pages) int32, which page holds a sequence's keys; None: no pages

    def with_dense_lengths(self) -> Inputs:
        """Kernels read lengths and pages one after the other; a column of a table, or torch.vmap, sets them apart."""
        lengths = self.seqlens_k, self.seqstarts_k, self.cu_seqlens_q, self.cu_seqlens_k, self.block_table
        if all(t is None or t.is_contiguous() for t in lengths):
            return self
        dense = lambda t: t if t is None else t.contiguous()
        return self._replace(
            seqlens_k=dense(self.seqlens_k),
            seqstarts_k=dense(self.seqstarts_k),
            cu_seqlens_q=dense(self.cu_seqlens_q),
            cu_seqlens_k=dense(self.cu_seqlens_k),
            block_table=dense(self.block_table),
        )


class Settings(NamedTuple):
    """What a call says beside its tensors."""

    causal: bool
    window: int | None
    at_lengths: bool  # decoding: the last query's place is the last key in use, not the tensor's last
    max_seqlen_q: int  # packed; else 0
    max_seqlen_k: int
    scale: float
    delta_eps: float
    solver: str  # a name; see flashlla.solvers
    solver_numbers: tuple[float, ...]
    solver_demanded: bool
    backend: str | None  # the caller's demand; None: what is preferred


class Arguments(NamedTuple):
    """A call, as the operators take it."""

    inputs: Inputs
    settings: Settings


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Under every mask they are contiguous.

    causal: no key beyond the query's own place, the last query's being the last key. window: only the last ``window``
    of those. padded: sequences have keys from ``Inputs.seqstarts_k`` to before ``Inputs.seqlens_k`` only, one of which
    may be None; where the causal diagonal lies does not depend on them, but for at_lengths (decoding): there the last
    query's place is the last key of ``seqlens_k``. packed: all sequences lie in one row, one behind the other, and
    ``Inputs.cu_seqlens_q`` and ``cu_seqlens_k`` tell where each begins; a query sees keys of its own sequence.
    """

    causal: bool = True
    window: int | None = None
    padded: bool = False
    at_lengths: bool = False
    packed: bool = False

    def span(self, queries: range, q_len: int, k_len: int) -> range:
        """The keys that some of ``queries`` may see, whatever the sequences' lengths."""
        if self.at_lengths:
            return range(k_len)
        diagonal = k_len - q_len
        stop = min(k_len, max(0, queries.stop + diagonal)) if self.causal else k_len
        start = 0 if self.window is None else min(stop, max(0, queries.start + 1 + diagonal - self.window))
        return range(start, stop)

    def hides_within(self, queries: range, keys: range, q_len: int, k_len: int) -> bool:
        """Whether some of ``queries`` may not see some of ``keys``, which are their span."""
        diagonal = k_len - q_len
        late = self.causal and queries.start + 1 + diagonal < keys.stop
        early = self.window is not None and queries.stop + diagonal - self.window > keys.start
        return self.padded or late or early


@dataclass(frozen=True)
class Problem:
    """Frozen, hashable description of one call: everything a backend needs to say yes or no, and no tensor.

    batch, q_len and k_len are those of the tensors; of packed ones 1 and the total lengths. With pages, k_len is what a
    row of the block table holds. ``solver_demanded`` is False where the caller named no solver: ``solver`` then carries
    the tolerances, and a backend may use them with the solver it does best. ``unrounded``, which the backward pass
    alone looks at: dk and dv are parts of sums, and are rounded to the dtype of k by whoever adds them up.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    delta_eps: float
    solver: Solver
    solver_demanded: bool = True
    mask: Mask = Mask()
    sequences: int = 0  # packed: how many, and what none of them is longer than
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    page_size: int | None = None  # decoding: k and v are pages of so many keys
    unrounded: bool = False  # dk and dv are wanted in the accumulator's dtype

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q_heads // max(1, self.kv_heads)

    @property
    def key_gradients(self) -> torch.dtype:
        """The dtype of dk and dv."""
        return accumulator(self.dtype) if self.unrounded else self.dtype

    @property
    def empty(self) -> bool:
        """Nothing to compute: no queries, or no keys for them to see."""
        sizes = (self.batch, self.q_heads, self.q_len, self.k_len)
        packed = (self.sequences, self.max_seqlen_q, self.max_seqlen_k) if self.mask.packed else ()
        return 0 in sizes or 0 in packed

    @property
    def few_new(self) -> bool:
        """Decoding so few tokens that sums over the cache and a direct solve are faster than the training kernels."""
        return self.mask.at_lengths and self.q_len <= FEW_NEW

    def key_spans(self, inputs: Inputs) -> KeySpans:
        """The keys that every query sees, by their places in k."""
        mask, device = self.mask, inputs.q.device
        i = torch.arange(self.q_len, device=device)
        first: Tensor | int = 0
        last: Tensor | int = self.k_len
        if mask.packed:
            q_first, q_last = sequence_bounds(inputs.cu_seqlens_q, self.q_len, self.max_seqlen_q)
            k_first, k_last = sequence_bounds(inputs.cu_seqlens_k, self.k_len, self.max_seqlen_k)
            inside = (i >= q_first[:, None]) & (i < q_last[:, None])  # (sequences, Sq)
            sequence = inside.int().argmax(0)
            first = k_first[sequence]
            last = torch.where(inside.any(0), k_last[sequence], first)  # a row of no sequence sees nothing
            own = i + 1 - q_last[sequence] + k_last[sequence]  # one past the query's own key
        else:
            in_place = lambda t: t.long().clamp(0, self.k_len)[:, None, None]  # (B, 1, 1)
            if inputs.seqstarts_k is not None:
                first = in_place(inputs.seqstarts_k)
            if inputs.seqlens_k is not None:
                last = in_place(inputs.seqlens_k)
            own = i + 1 - self.q_len + (last if mask.at_lengths else self.k_len)
        start = torch.zeros_like(i) + first if mask.window is None else (own - mask.window).clamp(min=first)
        stop = own.clamp(min=first) if mask.causal else torch.full_like(own, self.k_len)
        return KeySpans(start, torch.minimum(stop, torch.as_tensor(last, device=device)))


class _Shapes(NamedTuple):
    """What a Problem says of a call's tensors."""

    q: torch.Size
    k: torch.Size
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    padded: bool
    sequences: int | None
    pages: int | None


def describe(arguments: Arguments) -> Problem:
    """The Problem of a call; one object for all calls that are alike, as those of a training loop are."""
    inputs, settings = arguments
    q, k, v = inputs.q, inputs.k, inputs.v
    shapes = _Shapes(
        q.shape,
        k.shape,
        v.shape[-1],
        q.dtype,
        q.device,
        inputs.seqlens_k is not None or inputs.seqstarts_k is not None,
        None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1,
        None if inputs.block_table is None else inputs.block_table.shape[1],
    )
    if type(settings.solver_numbers) is not tuple:  # a list, inside an operator, is no key
        settings = settings._replace(solver_numbers=tuple(settings.solver_numbers))
    # What solver these numbers mean, a registry may say anew.
    return _describe(shapes, settings, solvers.from_spelling(settings.solver, settings.solver_numbers))


@functools.lru_cache(maxsize=1024)
def _describe(shapes: _Shapes, settings: Settings, solver: Solver) -> Problem:
    q, k, pages = shapes.q, shapes.k, shapes.pages
    k_len = k[2] if pages is None else k[2] * pages
    return Problem(
        batch=q[0],
        q_heads=q[1],
        kv_heads=k[1],
        q_len=q[2],
        k_len=k_len,
        head_dim=q[3],
        v_dim=shapes.v_dim,
        dtype=shapes.dtype,
        device=shapes.device,
        scale=settings.scale,
        delta_eps=settings.delta_eps,
        solver=solver,
        solver_demanded=settings.solver_demanded,
        mask=Mask(
            causal=settings.causal,
            # No larger than makes a difference, so that sums with it do not overflow.
            window=None if settings.window is None else min(settings.window, max(1, k_len)),
            padded=shapes.padded,
            at_lengths=settings.at_lengths,
            packed=shapes.sequences is not None,
        ),
        sequences=shapes.sequences or 0,
        max_seqlen_q=min(settings.max_seqlen_q, q[2]),
        max_seqlen_k=min(settings.max_seqlen_k, k_len),
        page_size=None if pages is None else k[2],
    )


def sequence_bounds(cu_seqlens: Tensor | None, total: int, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Where each sequence of a packed row begins and ends, (sequences,), whatever the numbers: never outside the row,
    never more than ``max_seqlen`` long."""
    assert cu_seqlens is not None
    edges = cu_seqlens.long().clamp(0, total)
    first = edges[:-1]
    return first, torch.minimum(torch.maximum(edges[1:], first), first + max_seqlen)


class Residuals(NamedTuple):
    """What forward leaves for backward, in one layout for all backends and in the accumulator dtype."""

    lse: Tensor  # (B, Hq, Sq)     m + log(omega), natural logarithm
    guard: Tensor  # (B, Hq, Sq)   1 / (1 + delta_eps (1 + d.z) / omega), the factor delta_eps puts on o and grad_o
    probe: Tensor  # (B, Hq, Sq, D)   z of (2.1)
    k_mean: Tensor  # (B, Hq, Sq, D)  sum_j p_j k_j


class Report(NamedTuple):
    """What ``return_info`` shows, one number a query."""

    omega: Tensor  # (B, Hq, Sq)   sum_j exp(s q.k_j - m), accumulator dtype
    iterations: Tensor  # (B, Hq, Sq) int32; 0 for direct solves
    residual: Tensor  # (B, Hq, Sq)   |A z - d| / |d|, accumulator dtype
    converged: Tensor  # (B, Hq, Sq) bool


class Moments(NamedTuple):
    """What one new query of each head needs to know of a cache, or of a share of one, in the accumulator's dtype; zeros
    where it sees no key."""

    m: Tensor  # (B, Hq)                   the largest logit; -inf where it sees no key
    omega: Tensor  # (B, Hq)               sum_j exp(s q.k_j - m)
    mean: Tensor  # (B, Hq, D + Dv)        k_mean - q, then v_mean
    second: (
        Tensor  # (B, Hq, D + Dv, D)   sum_j p_j (. - its mean) (k_j - k_mean)^T of keys, C, then of values, Cov(v, k)
    )


class Forward(NamedTuple):
    """The outputs of a forward pass."""

    o: Tensor  # (B, Hq, Sq, Dv), the inputs' dtype
    residuals: Residuals
    report: Report


class Gradients(NamedTuple):
    """The outputs of a backward pass."""

    q: Tensor  # as q
    k: Tensor  # as k; in the accumulator's dtype where the problem says ``unrounded``
    v: Tensor  # the same
    ridge_lambda: Tensor  # (B, Hq, Sq), accumulator dtype


def empty_forward(q: Tensor, v: Tensor) -> Forward:
    """Uninitialised outputs of a forward pass."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    row = lambda: q.new_empty(rows, dtype=dtype)
    vector = lambda: q.new_empty(q.shape, dtype=dtype)
    return Forward(
        empty_output(q, v),
        Residuals(lse=row(), guard=row(), probe=vector(), k_mean=vector()),
        empty_report(q),
    )


def empty_report(q: Tensor) -> Report:
    """Uninitialised."""
    row = lambda dtype: q.new_empty(q.shape[:-1], dtype=dtype)
    dtype = accumulator(q.dtype)
    return Report(omega=row(dtype), iterations=row(torch.int32), residual=row(dtype), converged=row(torch.bool))


def keyless_forward(q: Tensor, v: Tensor) -> Forward:
    """Outputs of queries that see no key."""
    outputs = empty_forward(q, v)
    for t in (outputs.o, *outputs.residuals):
        t.zero_()
    fill_keyless(outputs.report)
    return outputs


def fill_keyless(report: Report) -> None:
    """Of queries that see no key: there was nothing to solve."""
    for t in report:
        t.zero_()
    report.converged.fill_(True)


def empty_gradients(inputs: Inputs, unrounded: bool) -> Gradients:
    """Uninitialised outputs of a backward pass."""
    dtype = accumulator(inputs.k.dtype) if unrounded else inputs.k.dtype
    return Gradients(
        q=torch.empty_like(inputs.q),
        k=torch.empty_like(inputs.k, dtype=dtype),
        v=torch.empty_like(inputs.v, dtype=dtype),
        ridge_lambda=inputs.ridge_lambda.new_empty(inputs.ridge_lambda.shape),  # dense where the ridge is expanded
    )


def zero_gradients(inputs: Inputs, unrounded: bool) -> Gradients:
    """Gradients where no query sees a key."""
    return Gradients(*(t.zero_() for t in empty_gradients(inputs, unrounded)))


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Uninitialised (B, Hq, Sq, Dv) laid out in memory as ``q`` is, so that a transposed q gives a transposed o."""
    if q.shape[-1] == v.shape[-1]:
        return torch.empty_like(q)
    return q.new_empty_strided((*q.shape[:-1], v.shape[-1]), _dense_strides(q, v.shape[-1]))


def _dense_strides(q: Tensor, last: int) -> list[int]:
    """Strides of a dense tensor of q's shape, but for ``last`` columns, whose dimensions lie in memory as q's do."""
    steps = q.stride()
    order = sorted(range(3), key=lambda i: (-steps[i], i))
    strides, size = [0, 0, 0, 1], last
    for i in reversed(order):
        strides[i] = size
        size *= q.shape[i]
    return strides
