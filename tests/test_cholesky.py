"""Cholesky's factor against NumPy in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.support.interpreter import hasten

triton = pytest.importorskip("triton")
hasten()

import triton.language as tl  # noqa: E402 (after hasten)

from flashlla.backends.triton.cholesky import PANEL, factored_panel, panel_of, product  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.quick,
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="neither a GPU nor the interpreter"),
]
P = 16
# What `product` leaves out, of two numbers with 11 bits in their upper halves.
UNIT = 2.0**-22
DIMS = (16, 32, 64)
# The second is the one that CUDA makes, of which TF32 alone would make -0.
NANS = [float(np.array(bits, np.int32).view(np.float32)) for bits in (0x7FC00000, 0x7FFFFFFF)]


@triton.jit
def factor_kernel(
    a, d, y_ptr, inverses, least, R: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr, WARPS: tl.constexpr
):
    """L over G in a (R, D), y = L^-1 d, and L^-T of each square on the diagonal, inverses (D / P, P, P)."""
    W: tl.constexpr = WARPS
    row = tl.arange(0, W)[:, None] * (BLOCK_R // W) + tl.arange(0, BLOCK_R // W)[None, :]  # (W, M)
    panel = tl.arange(0, PANEL)
    copies = tl.zeros([W, 1, 1], tl.int32)
    square = copies + panel[None, :, None] * PANEL + panel[None, None, :]  # (W, P, P)
    rows, own = panel_of(a, row, 0, R, D)
    tl.debug_barrier()
    for p in tl.range(0, D, PANEL):
        own_row = tl.zeros([W, 1], tl.int32) + (p + panel)[None, :]  # (W, P)
        b = tl.load(d + own_row)
        rows, b, inverse, later = factored_panel(rows, own, b, p, a, y_ptr, row, least, R, D)
        tl.store(y_ptr + own_row, tl.sum(inverse * b[:, :, None], 1))
        tl.store(inverses + p * PANEL + square, inverse)
        rows, own = later
        tl.debug_barrier()


@triton.jit
def product_kernel(a, b, total, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(total + square, product(tl.load(a + square), tl.load(b + square), tl.load(total + square)))


@dataclass
class Factor:
    """What the kernel makes of A, F and d, in float64."""

    lower: np.ndarray  # (D, D)
    further: np.ndarray  # (R - D, D)
    y: np.ndarray  # (D,)


def factor(a: np.ndarray, f: np.ndarray, d: np.ndarray, least: float, warps: int = 2) -> Factor:
    dim, rows = a.shape[1], len(a) + len(f)
    matrix, rhs = (torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in (np.concatenate([a, f]), d))
    y, inverses = torch.full_like(rhs, float("nan")), rhs.new_full((dim // P, P, P), float("nan"))
    block = max(triton.next_power_of_2(rows), P * warps)
    factor_kernel[(1,)](matrix, rhs, y, inverses, least, rows, block, dim, warps, num_warps=warps)
    found, turned = matrix.double().cpu().numpy(), inverses.double().cpu().numpy()
    lower = np.tril(found[:dim])
    for i, inverse in enumerate(turned):
        at = slice(i * P, (i + 1) * P)
        lower[at, at] = np.linalg.inv(inverse).T if np.isfinite(inverse).all() else np.nan
    return Factor(lower, found[dim:], y.double().cpu().numpy())


def system(dim: int, condition: float, further: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """A (D, D) of that condition number, F and d, all of them numbers of float32; and A's smallest eigenvalue."""
    random = np.random.default_rng(dim)
    basis, _ = np.linalg.qr(random.normal(size=(dim, dim)))
    a = (basis * np.geomspace(1, 1 / condition, dim)) @ basis.T
    f, d = random.normal(size=(further or dim, dim)), random.normal(size=dim)
    a, f, d = (x.astype(np.float32).astype(np.float64) for x in ((a + a.T) / 2, f, d))
    return a, f, d, float(np.linalg.eigvalsh(a)[0])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def rounding(dim: int) -> float:
    """Of sums of D + P products, whose errors are independent."""
    return UNIT * (dim + P) ** 0.5


@pytest.mark.parametrize("dim", DIMS)
def test_product(dim: int) -> None:
    random = np.random.default_rng(dim)
    a, b, total = (random.normal(size=(dim, dim)).astype(np.float32) for _ in range(3))
    out = torch.tensor(total, device=DEVICE)
    product_kernel[(1,)](torch.tensor(a, device=DEVICE), torch.tensor(b, device=DEVICE), out, dim)
    assert relative(out.double().cpu().numpy(), total.astype(np.float64) + a.astype(np.float64) @ b) <= rounding(dim)


@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize("dim", DIMS)
def test_against_numpy(dim: int, warps: int) -> None:
    """L moves with A by no more than A's condition number times as much; so do G and y."""
    a, f, d, least = system(dim, 10.0)
    got, lower = factor(a, f, d, least, warps), np.linalg.cholesky(a)
    allowed = rounding(dim) * np.linalg.cond(a)
    assert relative(got.lower, lower) <= allowed
    assert relative(got.further, np.linalg.solve(lower, f.T).T) <= allowed
    assert relative(got.y, np.linalg.solve(lower, d)) <= allowed


@pytest.mark.parametrize("dim", DIMS)
def test_rows_that_are_no_power_of_two(dim: int) -> None:
    a, f, d, least = system(dim, 10.0, further=dim // 2 + 3)
    got, lower = factor(a, f, d, least), np.linalg.cholesky(a)
    assert relative(got.further, np.linalg.solve(lower, f.T).T) <= rounding(dim) * np.linalg.cond(a)


@pytest.mark.parametrize("condition", [1e3, 1e5])
@pytest.mark.parametrize("dim", DIMS)
def test_an_ill_conditioned_matrix(dim: int, condition: float) -> None:
    """The products give A, F and d back. A panel is times the inverse of its square L_p, and has the rounding times
    the condition number of L_p; in all of A there are more digits to lose."""
    a, f, d, least = system(dim, condition)
    got, lower = factor(a, f, d, least), np.linalg.cholesky(a)
    squares = [lower[i : i + P, i : i + P] for i in range(0, dim, P)]
    allowed = rounding(dim) * max(np.linalg.cond(square) for square in squares)
    for x, rows in ((got.lower, a), (got.further, f), (got.y, d)):
        assert np.linalg.norm(x @ got.lower.T - rows) <= allowed * np.linalg.norm(np.abs(x) @ np.abs(got.lower.T))


@pytest.mark.parametrize("dim", DIMS)
def test_a_matrix_that_float32_makes_indefinite(dim: int) -> None:
    """No pivot falls below the one that is named: L^-T has no larger numbers in a row than one over its root."""
    a, f, d, _ = system(dim, 1e12)
    assert np.linalg.eigvalsh(a)[0] < 0
    got = factor(a, f, d, 1e-6)
    for x in (got.lower, got.further, got.y):
        assert np.isfinite(x).all()
    assert np.diag(got.lower).min() >= 1e-3 * (1 - 16 * UNIT)


@pytest.mark.parametrize("nan", NANS)
def test_a_nan_in_a_further_row_stays_there(nan: float) -> None:
    a, f, d, least = system(32, 10.0)
    clean = factor(a, f, d, least)
    f[5, 3] = nan
    got = factor(a, f, d, least)
    assert np.isnan(got.further[5]).all()
    others = np.arange(len(f)) != 5
    assert np.array_equal(got.further[others], clean.further[others])
    assert np.array_equal(got.lower, clean.lower)
    assert np.array_equal(got.y, clean.y)


@pytest.mark.parametrize("nan", NANS)
def test_a_nan_in_the_matrix_reaches_all_that_follows(nan: float) -> None:
    """Row 20 of the factor, with it column 20 of all further rows, and what is made of that."""
    a, f, d, least = system(32, 10.0)
    clean = factor(a, f, d, least)
    a[20, 3] = a[3, 20] = nan
    got = factor(a, f, d, least)
    assert np.isnan(got.further[:, 20:]).all()
    assert np.isnan(got.y[20:]).all()
    assert np.array_equal(got.further[:, :P], clean.further[:, :P])
    assert np.array_equal(got.y[:P], clean.y[:P])
