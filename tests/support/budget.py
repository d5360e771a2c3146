"""Tolerances from an error budget: what rounding must cost, not what happens to pass.

The naive backend runs in float64 with every intermediate disturbed by as much as rounding it to a precision disturbs
it (tests/support/rounding.py), some times over; the spread of the results, row by row, is the error that a plain
evaluation in that precision makes. A backend may err by ``ALLOWANCE`` times as much, plus the rounding of its result.

Two precisions matter: that of accumulated sums and elementwise work (float32 for everything but float64), and that
of the operands of matrix products, which for 16-bit inputs may be rounded to fp16 (11 bits), not to bf16: the inputs
fit (their own rounding is not an error), and fewer bits for weights and directions cost what nobody needs to pay.
An iterative solver may also stop at its tolerance: its solutions are disturbed by random residuals of that size.
The three are small and independent: each is measured once a case, scaled, and added in squares.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flashlla.backends import naive
from flashlla.backends.dense import about_mean
from flashlla.covariance import dot
from flashlla.problem import Inputs, KeySpans, Problem, resolution
from tests.support.cases import LAYOUTS, Case
from tests.support.helpers import problem_of
from tests.support.oracle import Reference, reference
from tests.support.rounding import EXACT, Rounding, disturbed

# An error is a random number, and the budget knows its standard deviation, not its size: none of some thousand rows
# should exceed this number of standard deviations.
ALLOWANCE = 6.0
_DRAWS = 3
# From so many draws a row's own spread is known to a fifth; from fewer it is averaged with its neighbours'.
_ENOUGH = 16
_KINDS = ("operand", "sum", "residual")

OPERAND = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-11}
# The spacing of float16's smallest numbers, 2^-24, beside what operands are scaled to, 2^15.
_LEAST = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2.0**-40, torch.bfloat16: 2.0**-40}
_SUM = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24}
_RESULT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

# What t of (3.1) is beside its two halves where they tell nothing of it: in `moments_kernel`.
_ROUNDING = 1e-6

# Disturbances are made this large and the results scaled: to first order they are proportional, and float64 must
# resolve them.
_DISTURBANCE = 2.0**-30


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
    norm: Tensor = t.norm(dim=-1)
    return norm


def _smooth(spread: Tensor) -> Tensor:
    """Root mean square over five neighbouring rows."""
    if spread.dim() == 0 or spread.shape[-1] == 1:
        return spread
    rows = spread.square().reshape(1, -1, spread.shape[-1])
    return torch.nn.functional.avg_pool1d(rows, 5, 1, 2, count_include_pad=False).reshape(spread.shape).sqrt()


@functools.cache
def budget(case: Case, dtype: torch.dtype, iterative: bool, truncates: bool = False) -> Budget:
    """The budget of a case's own numbers.

    iterative: for a solver that stops at a tolerance. truncates: where results are cut to bfloat16, not rounded, as
    Triton's interpreter does.
    """
    exact = reference_of(case, dtype)
    (mine,) = evaluations(case, case.make(dtype), EXACT)
    known = {**_spreads(case), "oracle": apart(mine, [exact.o, *exact.gradients.values()])}
    return _budget(exact, known, dtype, iterative, truncates)


def budget_of(
    case: Case,
    leaves: Mapping[str, Tensor],
    dtype: torch.dtype,
    iterative: bool,
    truncates: bool = False,
    tolerance: float = 0.0,
    units: Mapping[str, float] | None = None,
    tops: Mapping[str, float] | None = None,
    draws: int = _DRAWS,
    fused: bool = False,
) -> Budget:
    """The budget of other numbers, ``leaves``, in the shape of ``case``; ``tolerance``, and ``units`` and ``tops``
    by the name of a result, as in :func:`allowance`; from so many ``draws`` of each disturbance. Without any it is what
    every call is allowed, however well its numbers bear rounding. fused: for the fused kernels."""
    exact = reference(case, leaves)
    with as_kernels_do(dtype) if fused else contextlib.nullcontext():
        spread = spreads_of(case, leaves, exact, draws)
    return _budget(exact, spread, dtype, iterative, truncates, tolerance, units, tops)


@contextlib.contextmanager
def as_kernels_do(dtype: torch.dtype) -> Iterator[None]:
    """The naive backend computes as the fused kernels do; those of 16-bit operands take keys as they come, and all
    weights from lse. docs/math.md, section 6."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(naive, "error", _of_one_sum))
        stack.enter_context(mock.patch.object(naive, "of_keys", functools.partial(_made_anew, naive.of_keys)))
        half = dtype.itemsize == 2
        stack.enter_context(mock.patch.object(naive, "whole", functools.partial(_from_lse, naive.whole, half)))
        if half:
            stack.enter_context(mock.patch.object(KeySpans, "first_of", lambda _, k: torch.zeros_like(k[:, :, :1])))
            stack.enter_context(mock.patch.object(naive, "moment", _of_halves))
        yield


def _of_halves(p: Tensor, g: Tensor, g_mean: Tensor, k: Tensor, k_mean: Tensor) -> Tensor:
    """t of (3.1) as the difference of its two halves; what is shorter than their rounding is zero."""
    halves = (p * g).sum(-1, keepdim=True).abs() * k_mean.norm(dim=-1, keepdim=True)
    exact = about_mean(p * (g - g_mean), k, k_mean)
    return torch.where(exact.norm(dim=-1, keepdim=True) < _ROUNDING * halves, 0, about_mean(p * g, k, k_mean))


def _of_one_sum(
    do: Tensor, v: Tensor, g: Tensor, g_mean: Tensor, y: Tensor, k: Tensor, k_mean: Tensor
) -> Tensor:  # fmt: skip
    """e of (3.2) as one sum, made anew in every pass: the products with y are added to those with do."""
    e = (do @ v.mT).where(g != 0, 0)  # where a value is hidden g is 0
    of_each = y @ k.mT / k.shape[-1]
    for _ in range(k.shape[-1]):
        e = e - of_each
    return e - (g_mean - dot(y, k_mean))


def _from_lse(whole: Callable[..., Any], everywhere: bool, problem: Problem, inputs: Inputs) -> Any:
    """The systems' weights, or all, from lse, which is rounded: they sum to 1 but for that. And omega's largest term is
    1 but for what a fused multiply-add finds of its logit beside the rounded one."""
    given, found = whole(problem, inputs)
    lse = lambda: found.m + found.omega.log()
    near_one = lambda: (lse() - lse()).where(found.omega > 0, 0).exp()
    p = found.p * near_one()
    systems = replace(found.systems, p=p)
    return given, found._replace(systems=systems, p=p if everywhere else found.p, omega=found.omega * near_one())


def _made_anew(of_keys: Callable[..., Any], problem: Problem, p: Tensor, q: Tensor, k: Tensor, *rest: Tensor) -> Any:
    """The weights from logits that are rounded otherwise than those that lse was made of."""
    apart = q @ k.mT - q @ k.mT
    return of_keys(problem, p * (problem.scale * apart).where(p > 0, 0).exp(), q, k, *rest)


def _budget(
    exact: Reference,
    spreads: Mapping[str, list[Tensor]],
    dtype: torch.dtype,
    iterative: bool,
    truncates: bool,
    tolerance: float = 0.0,
    units: Mapping[str, float] | None = None,
    tops: Mapping[str, float] | None = None,
) -> Budget:
    units, tops = units or {}, tops or {}
    allowed = [
        allowance(
            result,
            {kind: of[i] for kind, of in spreads.items()},
            dtype,
            iterative,
            truncates,
            tolerance,
            units.get(name, 1.0),
            tops.get(name, 0.0),
        )
        for i, (name, result) in enumerate({"o": exact.o, **exact.gradients}.items())
    ]
    return Budget(exact, allowed[0], dict(zip(exact.gradients, allowed[1:], strict=True)))


def allowance(
    result: Tensor,
    spread: Mapping[str, Tensor],
    dtype: torch.dtype,
    iterative: bool,
    truncates: bool = False,
    tolerance: float = 0.0,
    unit: float = 1.0,
    top: float = 0.0,
) -> Tensor:
    """The error allowed to each row of ``result``, exact, from its ``spread`` under each kind of disturbance.

    tolerance: the relative residual at which an iterative solver stops, where the dtype resolves smaller ones.
    unit: the size of what cancels in a result that is exactly zero. top: where float16 operands are scaled by a bound
    of their row that is larger, the size of a result made of it; docs/math.md, section 6, the smallest weights.
    """
    residual = max(resolution(dtype), tolerance) if iterative else 0.0
    sizes = {"operand": OPERAND[dtype], "sum": _SUM[dtype], "residual": residual}
    error = torch.stack([(size * spread[kind]).square() for kind, size in sizes.items()]).sum(0).sqrt()
    size = row_norm(result)
    error = error + _SUM[dtype] * size.square().mean().sqrt()  # for rows whose own size vanishes
    # For results that are exactly zero: a rounding of a rounding, or what float16 cannot tell from 0.
    error = error + max(4 * _SUM[dtype] ** 2 * unit, _LEAST[dtype] * max(unit, top))
    result_rounding = _RESULT[dtype] * (2 if truncates and dtype == torch.bfloat16 else 1)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # numbers below are told apart no more
    columns = result.shape[-1] if result.dim() else 1
    own = result_rounding * size + least * float(columns**0.5)
    return ALLOWANCE * error + spread["oracle"] + own


@functools.cache
def reference_of(case: Case, dtype: torch.dtype) -> Reference:
    """The exact result of a case, its inputs rounded to ``dtype``."""
    return reference(case, case.make(dtype))


@functools.cache
def _spreads(case: Case) -> dict[str, list[Tensor]]:
    return spreads_of(case, case.make(torch.float64), reference_of(case, torch.float64))


def spreads_of(
    case: Case, leaves: Mapping[str, Tensor], exact: Reference, draws: int = _DRAWS
) -> dict[str, list[Tensor]]:
    """For the output and each gradient, row by row, the error that a unit of each kind of disturbance makes; and how
    far the two references are apart."""
    results = [exact.o, *exact.gradients.values()]
    return spreads(lambda rounding, draws: evaluations(case, leaves, rounding, draws), results, draws)


def spreads(
    run: Callable[[Rounding, int], list[list[Tensor]]], exact: list[Tensor], draws: int = _DRAWS
) -> dict[str, list[Tensor]]:
    """The same of any evaluation: ``run`` gives its results some times over, disturbed each time anew."""
    if draws == 0:
        return {kind: [torch.zeros_like(row_norm(result)) for result in exact] for kind in (*_KINDS, "oracle")}
    (base,) = run(EXACT, 1)
    found = {}
    for kind in _KINDS:
        drawn = run(replace(EXACT, **{kind: _DISTURBANCE}), draws)
        squares = [torch.stack([row_norm(draw[i] - base[i]).square() for draw in drawn]) for i in range(len(base))]
        own = [s.mean(0).sqrt() / _DISTURBANCE for s in squares]
        found[kind] = own if draws >= _ENOUGH else [_smooth(spread) for spread in own]
    found["oracle"] = apart(base, exact)
    return found


def apart(found: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
    """How far the two references, both in float64, are apart at most: what the exact one may itself be off by."""
    return [row_norm(mine - its).amax() for mine, its in zip(found, exact, strict=True)]


def evaluations(case: Case, leaves: Mapping[str, Tensor], rounding: Rounding, draws: int = 1) -> list[list[Tensor]]:
    """The output, then the gradient of every leaf in the order of ``leaves``, as the naive backend gives them under
    ``rounding``, so many times: of as many times the heads."""
    exact = {name: t.detach().cpu().double().requires_grad_(name != "grad_o") for name, t in leaves.items()}
    layout = LAYOUTS[case.layout]
    views = case.arrange(exact)
    four = [layout.wide(t.detach()) for t in (*views, exact["grad_o"])]
    q, k, v, grad_o = (torch.where(t.isnan(), 0, t) for t in four)  # NaN beyond seqlens, or of no sequence
    group, heads = q.shape[1] // k.shape[1], q.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    ridge = exact.get("ridge_lambda", torch.tensor(case.ridge_lambda, dtype=torch.float64))
    ridge = layout.wide_ridge(ridge, q.shape[:-1])
    q, k, v, grad_o, each = (t.repeat(1, draws, *(1,) * (t.dim() - 2)) for t in (q, k, v, grad_o, ridge.detach()))
    problem, inputs = problem_of(q, k, v, case.op, **{**case.keywords(exact), "ridge_lambda": each})

    def step() -> tuple[Tensor, ...]:
        result = naive.Naive().forward(problem, inputs)
        return result.o, *naive.Naive().backward(problem, inputs, result.residuals, grad_o)

    found = []
    for o, dq, dk, dv, dridge in zip(*(t.split(heads, 1) for t in disturbed(step, rounding, (q, k, v, each, grad_o)))):
        dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
        targets, values = [*views], [layout.narrow(t) for t in (dq, dk, dv)]
        if ridge.requires_grad:
            targets, values = [*targets, ridge], [*values, dridge]
        wanted = [t for t in exact.values() if t.requires_grad]
        found.append([layout.narrow(o), *torch.autograd.grad(targets, wanted, values, retain_graph=True)])
    return found
