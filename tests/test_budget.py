"""The yardsticks themselves: the oracle against the other form, the budget against plain evaluations, the poison."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.support import cases
from tests.support.budget import budget, budget_of, evaluations, reference_of, row_norm, spreads
from tests.support.cases import BY_NAME, CASES, Case
from tests.support.poison import poisoned
from tests.support.rounding import EXACT, Rounding

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_two_forms_agree(case: Case) -> None:
    """The definition under automatic differentiation, and the centred form with its gradients, as docs/math.md and the
    naive backend have them."""
    exact = reference_of(case, torch.float64)
    (centred,) = evaluations(case, case.make(torch.float64), EXACT)
    for mine, its in zip(centred, [exact.o, *exact.gradients.values()], strict=True):
        apart = row_norm(mine - its).max()
        assert apart <= 1e-10 * max(1.0, float(row_norm(its).max())), f"{apart:.1e} apart"


def test_budget_is_no_blank_cheque() -> None:
    """Where the problem is well conditioned, what is allowed is a small multiple of the precision."""
    for dtype, size in ((torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        allowed = budget(BY_NAME["length_64"], dtype, iterative=True)
        assert float(allowed.o.norm() / allowed.reference.o.norm()) < size
        for name, gradient in allowed.reference.gradients.items():
            assert float(allowed.gradients[name].norm() / gradient.norm()) < size


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spared"), [("length_64", True), ("keys_far", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_are_allowed_what_they_compute_anew(dtype: torch.dtype, name: str, spared: bool) -> None:
    """Little, where logits are small and keys about the origin; both far off, what docs/math.md derives."""
    case = BY_NAME["length_64"]
    case = case if spared else dataclasses.replace(case, name=name, data="offset", scale=2.0)
    plain, fused = (budget_of(case, case.make(dtype), dtype, True, draws=8, fused=fused) for fused in (False, True))
    ratios = [float(fused.gradients[name].norm() / plain.gradients[name].norm()) for name in plain.gradients]
    assert all(ratio < 1.5 for ratio in ratios) == spared, ratios
    assert min(ratios) > 0.5


def test_a_row_unlike_its_neighbours_is_measured_by_itself() -> None:
    """By draws that are enough to know it; by few it is averaged with them."""
    sizes = torch.ones(1, 9, 1, dtype=torch.float64)
    sizes[0, 4] = 10.0
    signs = torch.Generator().manual_seed(0)

    def run(rounding: Rounding, draws: int) -> list[list[Tensor]]:
        size = rounding.operand + rounding.sum + rounding.residual
        return [[size * sizes * torch.randn(sizes.shape, generator=signs, dtype=sizes.dtype)] for _ in range(draws)]

    few, many = (spreads(run, [sizes], draws)["sum"][0][0] for draws in (3, 512))
    assert few[3] > 2
    assert ((many / sizes[0, :, 0] - 1).abs() < 0.2).all()


@pytest.mark.parametrize("error", [0.01, float("nan"), float("inf")])
def test_budget_sees_one_bad_row(error: float) -> None:
    allowed = budget(BY_NAME["length_64"], torch.float32, iterative=True)
    gradients = {name: t.clone() for name, t in allowed.reference.gradients.items()}
    assert all(excess.ratio == 0 for excess in allowed.worst(allowed.reference.o, gradients).values())
    gradients["k"][0, -1] *= 1 + error  # the smallest row: one query sees it
    assert allowed.worst(allowed.reference.o, gradients)["k"].ratio > 1


def test_poison_covers_allocators() -> None:
    with poisoned():
        like = torch.zeros(3)
        for t in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
            assert t.isnan().all()
        assert (torch.empty(3, dtype=torch.int32) > 10**6).all()
        assert torch.empty(3, dtype=torch.bool).all()
    assert torch.empty.__module__ != "tests.support.poison"


def test_table() -> None:
    """Every layout, kind of data and kind of ridge has a case; making one twice gives the same numbers."""
    for kinds, used in (
        (cases.LAYOUTS, {case.layout for case in CASES}),
        (cases.DATA, {case.data for case in CASES}),
        (cases.RIDGES, {case.ridge for case in CASES}),
    ):
        assert set(kinds) == used
    once, again = (BY_NAME["packed"].make(torch.float32) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    scattered = BY_NAME["sliced"].make(torch.float32)["q"]
    assert scattered.isnan().any()
    assert all(not t.is_contiguous() for t in BY_NAME["sliced"].arrange(BY_NAME["sliced"].make(torch.float32)))
