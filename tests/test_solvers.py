"""Solvers on systems of their own, against SciPy; the stopping rule; solvers of the user's; solvers that stop early."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, Direct, Preconditioner, Solution, Solver
from flashlla.backends.triton import Triton, TritonPCG
from flashlla.covariance import Systems
from flashlla.problem import resolution
from flashlla.solvers import Gram, from_spelling, spelling, to_spelling
from tests.support.cases import DATA
from tests.support.helpers import make_indefinite, normal, problem_of
from tests.support.systems import D, M, each_row, matrices, systems_of

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "solver", [CG(atol=0, rtol=1e-28, max_iters=200), PCG(atol=0, rtol=1e-28, max_iters=200), Direct()]
)
def test_against_scipy_cho_solve(solver: Solver) -> None:
    systems, b = systems_of()
    a, solution = matrices(systems), solver.solve(systems, b)
    assert solution.converged.all()
    for row in each_row():
        exact = scipy.linalg.cho_solve(scipy.linalg.cho_factor(a[row]), b[row].numpy())
        np.testing.assert_allclose(solution.x[row].numpy(), exact, rtol=1e-10, atol=1e-10)
        residual = np.linalg.norm(a[row] @ solution.x[row].numpy() - b[row].numpy()) / np.linalg.norm(b[row].numpy())
        assert residual < 1e-12
        assert float(solution.residual[row]) < 1e-12


@pytest.mark.parametrize("preconditioned", [False, True], ids=["cg", "pcg"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_iterates_as_scipy_cg(preconditioned: bool, tolerance: float) -> None:
    """The same recurrence with the same rule takes the same steps: row by row, count and solution."""
    # So strong a ridge that CG is done before rounding has made directions lose their conjugacy.
    systems, b = systems_of(ridge=1.0)
    solver = (PCG if preconditioned else CG)(atol=0, rtol=tolerance**2, max_iters=200)
    a, solution = matrices(systems), solver.solve(systems, b)
    for row in each_row():
        steps: list[Any] = []
        jacobi = np.diag(1 / np.diag(a[row])) if preconditioned else None
        x, failed = scipy.sparse.linalg.cg(
            a[row], b[row].numpy(), rtol=tolerance, atol=0, maxiter=200, M=jacobi, callback=steps.append
        )
        assert not failed
        assert abs(int(solution.iterations[row]) - len(steps)) <= 1
        if int(solution.iterations[row]) == len(steps):
            # Rounding makes the two drift apart; another step would be off by some times the tolerance.
            assert np.linalg.norm(solution.x[row].numpy() - x) <= (0.1 * tolerance + 1e-8) * np.linalg.norm(x)
        residual = np.linalg.norm(a[row] @ solution.x[row].numpy() - b[row].numpy()) / np.linalg.norm(b[row].numpy())
        assert residual <= tolerance * 1.0001
        assert float(solution.residual[row]) == pytest.approx(residual, rel=1e-3)


@pytest.mark.parametrize("different", [1, 2, 3, D])
def test_iteration_counts(different: int) -> None:
    """As many as A has different eigenvalues. By construction: keys and their negatives along D axes of any direction,
    of few lengths, have a covariance with these axes and the squared lengths; one iteration less leaves 3e-10 at
    least, as many leave the rounding of float64, and the tolerance lies far from both."""
    lengths = torch.linspace(1, 2, different, dtype=torch.float64).repeat_interleave(D // different)
    axes, _ = torch.linalg.qr(normal(D, D))
    k = lengths[:, None] * axes
    k = torch.cat([k, -k]).expand(2, 2 * D, D)
    p = torch.full((2, M, 2 * D), 1 / (2 * D), dtype=torch.float64)
    systems = Systems(k, p, p @ k, torch.full((2, M), 0.1, dtype=torch.float64), resolution(torch.float64))
    b = normal(2, M, D, seed=3)
    assert (CG(atol=0, rtol=1e-24, max_iters=200).solve(systems, b).iterations == different).all()
    assert (Direct().solve(systems, b).iterations == 0).all()


def test_a_ridge_beside_which_keys_vanish_takes_one_iteration() -> None:
    systems, b = systems_of(ridge=1e9)
    assert (CG().solve(systems, b).iterations == 1).all()


def test_atol_is_a_floor_under_the_right_hand_side() -> None:
    systems, b = systems_of()
    size2 = b.square().sum(-1)
    # |r|^2 <= max(atol, |b|^2) rtol: with atol = 4 max |b|^2 and rtol = 1/4 nothing has to be done.
    done = CG(atol=float(4 * size2.max()), rtol=0.25).solve(systems, b)
    assert done.converged.all()
    assert (done.iterations == 0).all()
    assert (done.x == 0).all()
    assert (done.residual == 1).all()
    # An atol under |b|^2 changes nothing.
    small, none = (CG(atol=atol, rtol=1e-8).solve(systems, b) for atol in (float(size2.min()) / 2, 0.0))
    assert torch.equal(small.x, none.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tolerance_below_the_resolution_is_raised(dtype: torch.dtype) -> None:
    systems, b = systems_of(dtype)
    raised, asked = (CG(atol=0, rtol=r, max_iters=300).solve(systems, b) for r in (0.0, resolution(dtype) ** 2))
    assert torch.equal(raised.x, asked.x)
    assert torch.equal(raised.iterations, asked.iterations)
    assert raised.converged.all()
    looser = CG(atol=0, rtol=100 * resolution(dtype) ** 2, max_iters=300).solve(systems, b)
    assert looser.iterations.sum() < asked.iterations.sum()


def test_a_tolerance_is_the_root_of_rtol() -> None:
    for kind in (CG, PCG):
        solver = kind(tolerance=1e-2, max_iters=50)
        assert solver == kind(rtol=1e-4, max_iters=50)
        assert hash(solver) == hash(kind(rtol=1e-4, max_iters=50))
        assert repr(solver) == repr(kind(rtol=1e-4, max_iters=50))
        assert (solver.tolerance, solver.rtol) == (1e-2, 1e-4)
        assert dataclasses.replace(solver, max_iters=9) == kind(rtol=1e-4, max_iters=9)
        assert from_spelling(*to_spelling(solver)) == solver
        with pytest.raises(ValueError, match=r"rtol: got 1e-08 together with tolerance=0\.01"):
            kind(rtol=1e-8, tolerance=1e-2)
    with pytest.raises(ValueError, match=r"tolerance: got 1\.5, wanted a number from 0 to below 1"):
        CG(tolerance=1.5)
    with pytest.raises(TypeError, match="tolerance: got str"):
        PCG(tolerance="1e-2")  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [None, "cg", "pcg", "pcg_gram"])
def test_a_call_takes_a_tolerance_and_its_gradient_too(solver: str | None) -> None:
    """As of the object that says the same; in both directions: one iteration more shows in the numbers."""
    leaves = [normal(1, 60, 16, seed=i, dtype=torch.float32).requires_grad_() for i in range(3)]
    name = solver or "cg"
    same = from_spelling(name, [CG.atol, 1e-4, CG.max_iters])
    found = []
    for options in ({"tolerance": 1e-2, "solver": solver}, {"solver": same}, {"solver": solver}):
        o, info = flashlla.lla_attention(*leaves, ridge_lambda=0.1, backend="chunked", return_info=True, **options)
        found.append([o, info.residual, *torch.autograd.grad(o.square().sum(), leaves)])
    assert (found[0][1] <= 1e-2).all()
    assert (found[0][1] > 1e-3).any()
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2]))


def test_a_call_of_packed_sequences_takes_a_tolerance() -> None:
    q, k, v = (normal(60, 2, 16, seed=i, dtype=torch.float32) for i in range(3))
    call = lambda **options: flashlla.lla_attention_varlen(
        q, k, v, cu_seqlens=torch.tensor([0, 20, 60]), ridge_lambda=0.1, backend="chunked", **options
    )
    assert torch.equal(call(tolerance=1e-2), call(cg_rtol=1e-4))
    assert not torch.equal(call(tolerance=1e-2), call())


def test_a_tolerance_below_the_resolution_of_the_inputs_is_raised() -> None:
    q, k, v = (normal(1, 60, 16, seed=i, dtype=torch.bfloat16) for i in range(3))
    call = lambda tolerance: flashlla.lla_attention(q, k, v, ridge_lambda=0.1, tolerance=tolerance, backend="chunked")
    assert torch.equal(call(0.0), call(1e-3))
    assert not torch.equal(call(1e-2), call(1e-3))


@pytest.mark.parametrize(("dtype", "reached"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)])
def test_resolution_is_the_inputs_dtypes(dtype: torch.dtype, reached: float) -> None:
    """The systems of 16-bit inputs are float32, but iterate only to what 16 bits can use."""
    q, k, v = (normal(1, 60, 16, seed=i, dtype=dtype) for i in range(3))
    options = {"ridge_lambda": 0.1, "backend": "chunked", "cg_max_iters": 300, "return_info": True}
    (o, info), (same, _) = (flashlla.lla_attention(q, k, v, cg_rtol=r, **options) for r in (1e-30, reached**2))
    assert torch.equal(o, same)
    assert info.converged.all()
    # In float32 the residual itself, computed afresh, is rounded: by some 1e-7 times the condition number.
    assert (info.residual <= (1e-5 if dtype == torch.float32 else reached)).all()
    _, looser = flashlla.lla_attention(q, k, v, cg_rtol=1e3 * reached**2, **options)
    assert looser.iterations.sum() < info.iterations.sum()


@pytest.mark.parametrize("solver", [CG(max_iters=2), PCG(max_iters=2)])
def test_early_stop_says_so(solver: Solver) -> None:
    # In float64: a residual computed afresh is then that of the recurrence, far below the tolerance or above it.
    q, k, v = (normal(1, 60, 16, seed=i) for i in range(3))
    with pytest.warns(flashlla.ConvergenceWarning, match="direct") as given:
        o, info = flashlla.lla_attention(q, k, v, ridge_lambda=0.01, solver=solver, backend="chunked", return_info=True)
    assert len(given) == 1
    assert not info.converged.all()
    assert info.converged[0, 0]  # one key: the system is lambda I
    assert o.isfinite().all()
    assert (info.residual[~info.converged] > 1e-6).all()
    assert (info.residual[info.converged] <= 1e-6).all()
    assert (info.iterations <= 2).all()


def test_direct_names_the_row_that_is_not_positive_definite(monkeypatch: pytest.MonkeyPatch) -> None:
    make_indefinite(monkeypatch, ridge=0.5)
    q, k, v = (normal(2, 1, 3, 2, seed=i, dtype=torch.float32) for i in range(3))
    ridge = torch.ones(2, 1, 3)
    ridge[1, 0, 1] = 0.5
    with pytest.raises(torch.linalg.LinAlgError, match=r"query 1\b.*\(1,") as error:
        flashlla.lla_attention(q, k, v, ridge_lambda=ridge, solver="direct", backend="chunked")
    for word in ("float32", "ridge_lambda", "float64"):
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["cg", "pcg", "direct"])
def test_gradients_do_not_depend_on_the_size_of_grad_o(solver: str, dtype: torch.dtype) -> None:
    """Neither an absolute tolerance nor the range of squares must decide how exact a gradient is: powers of two, from
    1e-24 to 1e24, whose products are exact."""
    leaves = [normal(2, 30, 8, seed=i, dtype=dtype) for i in range(3)]
    ridge = torch.full((30,), 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad_o = normal(2, 30, 8, seed=3, dtype=dtype)

    def gradients(size: float) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (*leaves, ridge)]
        o = flashlla.lla_attention(*given[:3], ridge_lambda=given[3], solver=solver, backend="chunked")
        o.backward(grad_o * size)
        return [t.grad / size for t in given]

    whole = gradients(1.0)
    for power in (-80, -40, 80):
        for scaled, wanted in zip(gradients(2.0**power), whole, strict=True):
            torch.testing.assert_close(scaled, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [CG(max_iters=200), PCG(max_iters=200), Direct()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_row_does_not_stop_the_others(solver: Solver, value: float) -> None:
    systems, b = systems_of(torch.float32)
    clean = solver.solve(systems, b)
    bad = b.clone()
    bad[1, 3, 2] = value
    solution = solver.solve(systems, bad)
    others = torch.ones(2, M, dtype=torch.bool)
    others[1, 3] = False
    assert not solution.converged[1, 3]
    assert solution.converged[others].all()
    torch.testing.assert_close(solution.x[others], clean.x[others], rtol=1e-4, atol=1e-5)


def test_direct_answers_a_bad_matrix_with_nan() -> None:
    systems, b = systems_of(torch.float32)
    clean = Direct().solve(systems, b)
    systems.ridge[0, 2] = float("nan")
    solution = Direct().solve(systems, b)
    assert solution.x[0, 2].isnan().all()
    torch.testing.assert_close(solution.x[1], clean.x[1])
    torch.testing.assert_close(solution.x[0, 3:], clean.x[0, 3:])


@pytest.mark.parametrize("solver", [CG(), PCG(), Direct()])
def test_zero_right_hand_side(solver: Solver) -> None:
    systems, b = systems_of()
    solution = solver.solve(systems, torch.zeros_like(b))
    assert (solution.x == 0).all()
    assert (solution.residual == 0).all()
    assert solution.converged.all()
    assert (solver.solve_scale_free(systems, torch.zeros_like(b)).x == 0).all()


@dataclass(frozen=True)
class Exact(Preconditioner):
    """The inverse itself."""

    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        inverse = torch.linalg.inv(systems.dense())
        return lambda r: (inverse @ r.unsqueeze(-1)).squeeze(-1)


def test_preconditioner_of_ones_own() -> None:
    systems, b = systems_of()
    plain = CG(rtol=1e-20, max_iters=200).solve(systems, b)
    exact = PCG(rtol=1e-20, max_iters=200, preconditioner=Exact()).solve(systems, b)
    assert (exact.iterations <= 2).all()
    assert plain.iterations.min() > 5
    torch.testing.assert_close(exact.x, plain.x, rtol=1e-8, atol=1e-8)
    q, k, v = (normal(1, 30, 8, seed=i) for i in range(3))
    o, info = flashlla.lla_attention(
        q, k, v, ridge_lambda=0.1, solver=PCG(rtol=1e-20, preconditioner=Exact()), backend="chunked", return_info=True
    )
    assert (info.iterations <= 2).all()
    torch.testing.assert_close(o, flashlla.lla_attention(q, k, v, ridge_lambda=0.1, solver="direct"))


def test_jacobi_is_right_at_once_where_a_is_diagonal() -> None:
    """Keys along the axes about the mean: A is diagonal, and Jacobi its inverse."""
    k = torch.cat([torch.diag(torch.arange(1.0, 5.0)), -torch.diag(torch.arange(1.0, 5.0))]).double()
    systems = Systems(k, torch.full((1, 8), 0.125).double(), torch.zeros(1, 4).double(), torch.ones(1).double(), 1e-15)
    b = torch.ones(1, 4, dtype=torch.float64)
    assert PCG(rtol=1e-24).solve(systems, b).iterations.tolist() == [1]
    assert CG(rtol=1e-24).solve(systems, b).iterations.tolist() == [4]


@pytest.mark.parametrize("data", ["correlated", "iid", "power_law", "sharp"])
def test_gram_takes_fewer_iterations_where_it_helps_and_none_more_elsewhere(data: str) -> None:
    rng = np.random.default_rng(0)
    q, k = (torch.from_numpy(t).float() for t in DATA[data](rng, (1, 1, 1024, 32)))
    v = normal(1, 1, 1024, 32, dtype=torch.float32)
    call = lambda solver: flashlla.lla_attention(
        q, k, v, ridge_lambda=0.1, solver=solver, backend="chunked", return_info=True
    )
    (plain, info), (o, with_gram) = call(CG(max_iters=500)), call(PCG(max_iters=500, preconditioner="gram"))
    assert with_gram.converged.all()
    torch.testing.assert_close(o, plain, rtol=1e-4, atol=1e-4)
    before, after = (i.iterations[..., 256:].float().mean() for i in (info, with_gram))  # no key is seen by all before
    assert after < 0.6 * before if data == "correlated" else torch.equal(info.iterations, with_gram.iterations)


def test_gram_is_right_at_once_where_all_weights_are_alike() -> None:
    """With a scale of nearly 0, and without a mask: A is G + lambda I."""
    q, k, v = (normal(1, 1, 50, 6, seed=i) for i in range(3))
    k *= torch.arange(1.0, 7.0)
    solver = PCG(rtol=1e-16, preconditioner=Gram())
    _, info = flashlla.lla_attention(q, k, v, qk_scale=1e-12, solver=solver, causal=False, return_info=True)
    assert (info.iterations == 1).all()


# A solver of the user's, in ten lines.
@dataclass(frozen=True)
class Richardson(Solver):
    steps: int = 3000

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        step = 1 / systems.diagonal().sum(-1, keepdim=True)
        x = torch.zeros_like(b)
        for _ in range(self.steps):
            x = x + step * (b - systems.matvec(x))
        return Solution.check(systems, b, x, iterations=self.steps, tolerance=1e-8)


def test_solver_of_ones_own() -> None:
    leaves = [normal(1, 2, 9, 3, seed=i) for i in range(3)]

    def run(solver: str | Solver) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in leaves]
        o, info = flashlla.lla_attention(*given, ridge_lambda=1.0, solver=solver, return_info=True)
        assert info.converged.all()
        assert info.backend == "chunked"
        assert (info.iterations == (0 if solver == "direct" else 3000)).all()
        return [o, *torch.autograd.grad(o.square().sum(), given)]

    exact = run("direct")
    for got, wanted in zip(run(Richardson()), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)
    flashlla.register_solver("richardson", Richardson())
    for got, wanted in zip(run("richardson"), exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7)
    with pytest.warns(flashlla.ConvergenceWarning, match="Richardson"):
        flashlla.lla_attention(*leaves, ridge_lambda=1.0, solver=Richardson(steps=3))


def test_names_are_the_objects_at_their_defaults() -> None:
    q, k, v = (normal(1, 40, 8, seed=i, dtype=torch.float32) for i in range(3))
    gram = PCG(preconditioner="gram")
    for name, solver in (("cg", CG()), ("pcg", PCG()), ("pcg_gram", gram), ("direct", Direct())):
        named, given = (flashlla.lla_attention(q, k, v, solver=s, backend="chunked") for s in (name, solver))
        assert torch.equal(named, given)
    asked = flashlla.lla_attention(q, k, v, cg_use_preconditioner=True, cg_rtol=1e-4, backend="chunked")
    assert torch.equal(asked, flashlla.lla_attention(q, k, v, solver=PCG(rtol=1e-4), backend="chunked"))


OWN = {
    "cg": CG(1e-3, 0.0, 7),
    "pcg": PCG(1e-3, 0.0, 7),
    "pcg_gram": PCG(1e-3, 0.0, 7, "gram"),
    "direct": Direct(),
}


@pytest.mark.parametrize("name", OWN)
def test_a_solver_of_the_package_is_carried_as_a_name_and_numbers(name: str) -> None:
    own = to_spelling(OWN[name])
    assert own.name == name
    assert all(type(number) is float for number in own.numbers)
    assert from_spelling(*own) == OWN[name]
    assert repr(from_spelling(*own)) == repr(OWN[name])
    assert to_spelling(from_spelling(name, [])) == to_spelling(
        type(OWN[name])() if name != "pcg_gram" else PCG(preconditioner="gram")
    )


def test_a_preconditioner_object_goes_by_its_name() -> None:
    assert to_spelling(PCG(preconditioner=Gram())) == to_spelling(PCG(preconditioner="gram"))


@dataclass(frozen=True)
class HalvedCG(CG):
    """A solver of the user's made of the package's: it has another solution."""

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        solution = super().solve(systems, b)
        return solution._replace(x=solution.x / 2)


@dataclass(frozen=True)
class HalvedGram(Gram):
    pass


@pytest.mark.parametrize("solver", [HalvedCG(max_iters=9), PCG(preconditioner=HalvedGram())])
def test_a_subclass_is_another_solver_and_carried_as_an_object(solver: Solver) -> None:
    assert spelling(solver) is None
    assert from_spelling(*to_spelling(solver)) is solver
    problem, _ = problem_of(*(normal(1, 9, 4, seed=i, dtype=torch.float32) for i in range(3)), solver=solver)
    assert problem.solver is solver
    for kernels in (Triton(), TritonPCG()):
        assert kernels.preconditioner(problem) is None  # they fuse what they know


@dataclass(frozen=True)
class Misled(Preconditioner):
    """``what`` it does in place of something useful."""

    what: Any

    def prepare(self, systems: Systems) -> Callable[[Tensor], Tensor]:
        return self.what


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (None, TypeError, "Misled.prepare returned NoneType, wanted a function"),
        (lambda r: None, TypeError, "a function that returns NoneType, wanted a torch.Tensor"),
        (lambda r: r[..., :1], ValueError, r"of shape \(1, 30, 1\), wanted torch.float64 of shape \(1, 30, 8\)"),
        (lambda r: r.float(), ValueError, "returns torch.float32 of shape .*, wanted torch.float64"),
    ],
)
def test_a_preconditioner_is_told_what_was_wanted(what: Any, error: type, words: str) -> None:
    q, k, v = (normal(1, 30, 8, seed=i) for i in range(3))
    with pytest.raises(error, match=words):
        flashlla.lla_attention(q, k, v, solver=PCG(preconditioner=Misled(what)), backend="chunked")


@dataclass(frozen=True)
class Mistaken(Direct):
    """Returns what ``change`` makes of a solution."""

    change: Any = None

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        found: Solution = self.change(super().solve(systems, b))
        return found


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: None, TypeError, r"NoneType, wanted a flashlla.Solution; try Solution.check\("),
        (lambda s: s._replace(x=s.x[..., :1]), ValueError, r"x of torch.float64 and shape \(1, 30, 1\), wanted"),
        (lambda s: s._replace(x=s.x.float()), ValueError, r"x of torch.float32 and .*, wanted torch.float64 and \(1,"),
        (lambda s: s._replace(iterations=5), TypeError, "int as iterations, wanted a torch.Tensor"),
        (lambda s: s._replace(iterations=s.iterations.long()), ValueError, "iterations of torch.int64 .* torch.int32"),
        (lambda s: s._replace(residual=s.residual.sum(-1)), ValueError, r"residual of .* \(1,\), wanted .* \(1, 30\)"),
        (lambda s: s._replace(converged=s.residual), ValueError, "converged of torch.float64 .* wanted torch.bool"),
    ],
)
def test_a_solver_is_told_what_was_wanted(change: Any, error: type, words: str) -> None:
    q, k, v = (normal(1, 30, 8, seed=i) for i in range(3))
    with pytest.raises(error, match=f"solver: Mistaken.solve returned {words}"):
        flashlla.lla_attention(q, k, v, solver=Mistaken(change), backend="chunked")


def test_a_name_can_be_given_to_another_solver() -> None:
    """Of all calls from then on, whatever is cached."""
    q, k, v = (normal(1, 30, 8, seed=i, dtype=torch.float32) for i in range(3))
    call = lambda solver: flashlla.lla_attention(q, k, v, ridge_lambda=0.1, solver=solver, backend="chunked")
    flashlla.register_solver("mine", CG(tolerance=0.5))
    assert torch.equal(call("mine"), call(CG(tolerance=0.5)))
    with pytest.raises(ValueError, match=r"'mine', wanted a new name .*; overwrite=True replaces a solver of yours"):
        flashlla.register_solver("mine", CG())
    flashlla.register_solver("mine", Direct(), overwrite=True)
    assert torch.equal(call("mine"), call("direct"))
    assert not torch.equal(call("mine"), call(CG(tolerance=0.5)))
    flashlla.register_solver("other", CG(), overwrite=True)
    assert torch.equal(call("other"), call("cg"))
    with pytest.raises(ValueError, match="got 'cg', wanted a new name"):
        flashlla.register_solver("cg", Direct(), overwrite=True)
