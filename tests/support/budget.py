"""Tolerances from an error budget: what rounding must cost, not what happens to pass.

The equations of docs/math.md are evaluated in float64 with every intermediate disturbed by as much as rounding it to
a precision disturbs it, some times over; the spread of the results, row by row, is the error that a plain evaluation
in that precision makes. A backend may err by ``ALLOWANCE`` times as much, plus the rounding of its result.

Two precisions matter: that of accumulated sums and elementwise work (float32 for everything but float64), and that
of the operands of matrix products, which for 16-bit inputs may be rounded to fp16 (11 bits), not to bf16: the inputs
fit (their own rounding is not an error), and fewer bits for weights and directions cost what nobody needs to pay.
An iterative solver may also stop at its tolerance: its solutions are disturbed by random residuals of that size.
The three are small and independent: each is measured once a case, scaled, and added in squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashlla.problem import resolution
from tests.support.cases import BY_NAME, LAYOUTS, Case
from tests.support.oracle import Reference, reference

# An error is a random number, and the budget knows its standard deviation, not its size: none of some thousand rows
# should exceed this number of standard deviations.
ALLOWANCE = 6.0
_DRAWS = 3

OPERAND = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
_SUM = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24}
_RESULT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# Disturbances are made this large and the results scaled: to first order they are proportional, and float64 must
# resolve them.
_DISTURBANCE = 2.0**-30


@dataclass(frozen=True)
class Rounding:
    """Sizes of the disturbances: unit roundoffs, and the relative residual of the solver.

    only: of which operands, by their name in the equations; None for all of ``_OPERANDS``. "logits", "zk" (the
    products z.k) and "system" (the matrices A) are disturbed only where named.
    """

    operand: float = 0.0
    sum: float = 0.0
    residual: float = 0.0
    only: frozenset[str] | None = None


EXACT = Rounding()
_OPERANDS = frozenset({"p", "z", "pa", "do", "pg", "y", "dl", "pe"})


class _Noise:
    def __init__(self, rounding: Rounding, seed: int) -> None:
        self.rounding = rounding
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype).mul_(2).sub_(1)

    def operand(self, name: str, t: Tensor) -> Tensor:
        """``t`` as an operand of a matrix product."""
        if name not in (_OPERANDS if self.rounding.only is None else self.rounding.only):
            return t
        return t + t * self._uniform(t).mul_(self.rounding.operand) if self.rounding.operand else t

    def sum(self, t: Tensor) -> Tensor:
        """``t`` as the result of elementwise work in the accumulator's precision."""
        return t + t * self._uniform(t).mul_(self.rounding.sum) if self.rounding.sum else t

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, its terms rounded and added one after the other, every partial sum rounded."""
        exact = a @ b
        if self.rounding.sum:
            # Terms in no particular order: after m of n, the partial sum is m / n of the whole, and a bridge between.
            n, squares = a.shape[-1], a.square() @ b.square()
            spread = squares.add_(exact.square().add_(squares.clone(), alpha=0.5), alpha=n / 3).sqrt_()
            exact = exact + spread.mul_(self._uniform(exact)).mul_(self.rounding.sum)
        return exact

    def solve(self, a: Tensor, b: Tensor) -> Tensor:
        """A direct solver leaves a residual of about sqrt(D) roundings of |A| |x|, an iterative one of its tolerance:
        a multiple of one vector for all queries, as neighbours stop in much the same place, and keys add them up."""
        x = torch.linalg.solve(a, b)
        residual = torch.zeros_like(b)
        if self.rounding.sum:
            size = self.rounding.sum * a.norm(dim=(-2, -1)) * x.norm(dim=-1)
            residual += size.unsqueeze(-1) * torch.randn(b.shape, generator=self.generator, dtype=b.dtype)
        if self.rounding.residual:
            direction = torch.randn((*b.shape[:-2], 1, b.shape[-1]), generator=self.generator, dtype=b.dtype)
            size = self.rounding.residual * b.norm(dim=-1, keepdim=True)
            residual += size * torch.nn.functional.normalize(direction, dim=-1)
        return x + torch.linalg.solve(a, residual)


def evaluate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    grad_o: Tensor,
    scale: float,
    delta_eps: float,
    visible: Tensor,
    rounding: Rounding,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """``(o, dq, dk, dv, dridge)`` of (B, H, S, D) float64 tensors, disturbed as ``rounding`` says."""
    hidden = ~visible.expand(*q.shape[:-1], k.shape[-2]).any(-1, keepdim=True)  # (B, H, Sq, 1), queries without a key
    visible = visible | (hidden & (torch.arange(k.shape[-2]) == 0))  # a stand-in sees the first
    shown = lambda t: t.masked_fill(hidden, 0)
    n = _Noise(rounding, seed)
    mm, op, acc = n.matmul, n.operand, n.sum
    # Keys and queries about a point among them: keys far from the origin are no excuse.
    about = (q.mean(-2, keepdim=True) + k.mean(-2, keepdim=True)) / 2
    here, k = acc(q - about), acc(k - about)
    logits = op("logits", scale * mm(q, k.mT)).masked_fill(~visible, -torch.inf)
    w = (logits - logits.amax(-1, keepdim=True)).exp()
    omega = acc(w.sum(-1, keepdim=True))
    p = acc(w / omega)
    k_mean = acc(mm(op("p", p), k))
    d = acc(k_mean - here)
    centred = acc(k.unsqueeze(-3) - k_mean.unsqueeze(-2))  # (B, H, Sq, Sk, D)
    c = mm((centred * op("p", p).unsqueeze(-1)).mT, centred)
    system = op("system", c + ridge[..., None, None] * torch.eye(q.shape[-1], dtype=q.dtype))
    z = n.solve(system, d)
    a = acc(op("zk", mm(op("z", z), k.mT)) - acc((z * k_mean).sum(-1, keepdim=True)))
    pa = acc(p * (1 - a))
    guard = 1 / (1 + delta_eps * (1 + (d * z).sum(-1, keepdim=True)) / omega)
    o = shown(acc(mm(op("pa", pa), v) * guard))

    do = op("do", acc(shown(grad_o) * guard))
    g = mm(do, v.mT)
    g = acc(g - acc((p * g).sum(-1, keepdim=True)))
    pg = op("pg", acc(p * g))
    t = acc(mm(pg, k) - k_mean * pg.sum(-1, keepdim=True))
    y = n.solve(system, t)
    e = acc(g - acc(mm(op("y", y), k.mT) - acc((y * k_mean).sum(-1, keepdim=True))))
    dridge = acc((z * y).sum(-1))
    dl = acc(acc(pa * e) + p * (ridge * dridge).unsqueeze(-1))
    dl_op = op("dl", dl)
    dq = acc(scale * (mm(dl_op, k) - k_mean * dl_op.sum(-1, keepdim=True)) + y)
    dk = acc(scale * mm(dl_op.mT, q) - mm(op("pe", acc(p * e)).mT, op("z", z)) - mm(op("pa", pa).mT, op("y", y)))
    dv = acc(mm(op("pa", pa).mT, do))
    return o, dq, dk, dv, dridge


@dataclass(frozen=True)
class Budget:
    """The exact result of a case in a dtype, and the error allowed to each row of it."""

    reference: Reference
    o: Tensor  # (..., S): allowed |error| of each row
    gradients: Mapping[str, Tensor]

    def worst(self, o: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Excess]:
        """For the output and each gradient, the row that is worst against its allowance."""
        found = {"o": Excess.of(o, self.reference.o, self.o)}
        for name, gradient in self.reference.gradients.items():
            found[name] = Excess.of(gradients[name], gradient, self.gradients[name])
        return found


@dataclass(frozen=True)
class Excess:
    ratio: float  # error over allowance at the worst row: at most 1 is right
    row: tuple[int, ...]
    error: float
    allowed: float

    @classmethod
    def of(cls, got: Tensor, exact: Tensor, allowed: Tensor) -> Excess:
        assert got.shape == exact.shape, f"shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
        error = row_norm(got.detach().cpu().double() - exact)
        ratio = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=math.inf)
        worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        return cls(float(ratio[worst]), worst, float(error[worst]), float(allowed[worst]))

    def __str__(self) -> str:
        return f"row {self.row}: error {self.error:.2e}, allowed {self.allowed:.2e} ({self.ratio:.2f} of it)"


def row_norm(t: Tensor) -> Tensor:
    """Norm over the last dimension; a tensor of numbers (of ridges) is rows of one."""
    return t.norm(dim=-1)


def _smooth(spread: Tensor) -> Tensor:
    """Root mean square over five neighbouring rows: few draws make a single row's spread too uncertain."""
    if spread.dim() == 0 or spread.shape[-1] == 1:
        return spread
    rows = spread.square().reshape(1, -1, spread.shape[-1])
    return torch.nn.functional.avg_pool1d(rows, 5, 1, 2, count_include_pad=False).reshape(spread.shape).sqrt()


@functools.cache
def budget(name: str, dtype: torch.dtype, iterative: bool, truncates: bool = False) -> Budget:
    """The budget of the case of that name.

    iterative: for a solver that stops at a tolerance. truncates: where results are cut to bfloat16, not rounded, as
    Triton's interpreter does.
    """
    exact = reference_of(name, dtype)
    spreads = _spreads(name)
    allowed = [
        allowance(result, {kind: of[i] for kind, of in spreads.items()}, dtype, iterative, truncates)
        for i, result in enumerate([exact.o, *exact.gradients.values()])
    ]
    return Budget(exact, allowed[0], dict(zip(exact.gradients, allowed[1:], strict=True)))


def allowance(
    result: Tensor, spread: Mapping[str, Tensor], dtype: torch.dtype, iterative: bool, truncates: bool = False
) -> Tensor:
    """The error allowed to each row of ``result``, exact, from its ``spread`` under each kind of disturbance."""
    sizes = {"operand": OPERAND[dtype], "sum": _SUM[dtype], "residual": resolution(dtype) if iterative else 0.0}
    error = sum((size * spread[kind]).square() for kind, size in sizes.items()).sqrt()
    size = row_norm(result)
    error = error + _SUM[dtype] * size.square().mean().sqrt()  # for rows whose own size vanishes
    error = error + 4 * _SUM[dtype] ** 2  # for results that are exactly zero: a rounding of a rounding
    error = error + spread["oracle"]
    result_rounding = _RESULT[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)
    return ALLOWANCE * error + result_rounding * size


@functools.cache
def reference_of(name: str, dtype: torch.dtype) -> Reference:
    """The exact result of the case of that name, its inputs rounded to ``dtype``."""
    case = BY_NAME[name]
    return reference(case, case.make(dtype))


@functools.cache
def _spreads(name: str) -> dict[str, list[Tensor]]:
    case, exact = BY_NAME[name], reference_of(name, torch.float64)
    leaves = case.make(torch.float64)
    run = lambda rounding, seed: disturbed(case, leaves, rounding, seed)
    return spreads_of(run, [exact.o, *exact.gradients.values()])


def spreads_of(run: Callable[[Rounding, int], list[Tensor]], exact: list[Tensor]) -> dict[str, list[Tensor]]:
    """Row by row, the error a unit of each kind of disturbance makes in each result of ``run``; and how far its
    undisturbed results and the ``exact`` ones, both in float64, are apart at most."""
    base = run(EXACT, 0)
    found = {}
    for kind in ("operand", "sum", "residual"):
        rounding = Rounding(**{kind: _DISTURBANCE})
        draws = [run(rounding, seed) for seed in range(_DRAWS)]
        squares = [sum(row_norm(draw[i] - base[i]).square() for draw in draws) for i in range(len(base))]
        found[kind] = [_smooth((s / _DRAWS).sqrt()) / _DISTURBANCE for s in squares]
    found["oracle"] = [row_norm(mine - its).amax() for mine, its in zip(base, exact, strict=True)]
    return found


def disturbed(case: Case, leaves: Mapping[str, Tensor], rounding: Rounding, seed: int = 0) -> list[Tensor]:
    """The output, then the gradient of every leaf in the order of ``leaves``, of one disturbed evaluation."""
    exact = {name: t.double().requires_grad_(name != "grad_o") for name, t in leaves.items()}
    layout = LAYOUTS[case.layout]
    views = case.arrange(exact)
    four = [layout.wide(t.detach()) for t in (*views, exact["grad_o"])]
    four[:3] = [torch.where(t.isnan(), 0, t) for t in four[:3]]  # beyond seqlens, or of no sequence
    group = four[0].shape[1] // four[1].shape[1]
    four[1:3] = [t.repeat_interleave(group, 1) for t in four[1:3]]
    ridge = exact.get("ridge_lambda", torch.tensor(case.ridge_lambda, dtype=torch.float64))
    ridge = layout.wide_ridge(ridge, four[0].shape[:-1])
    scale = 1 / math.sqrt(four[0].shape[-1]) if case.scale is None else case.scale
    found = evaluate(*four[:3], ridge.detach(), four[3], scale, case.delta_eps, case.visible(), rounding, seed)
    o, dq, dk, dv, dridge = found
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
    targets, values = [*views], [layout.narrow(t) for t in (dq, dk, dv)]
    if ridge.requires_grad:
        targets, values = [*targets, ridge], [*values, dridge]
    names = [name for name in exact if name != "grad_o"]
    return [layout.narrow(o), *torch.autograd.grad(targets, [exact[name] for name in names], values)]
