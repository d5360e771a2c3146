"""How exactly a layer solves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import flashlla
from flashlla import CG, PCG, Direct
from flashlla.nn.solving import solving

pytestmark = pytest.mark.quick


def told(solver, tolerance=1e-2):
    return solving(solver, tolerance, 1e-2, 32)


def test_without_a_solver_the_backend_chooses_it():
    found = told(None, 1e-3)
    assert found.training == {"tolerance": 1e-3, "cg_max_iters": 128}
    assert found.exact == {"tolerance": 0.0, "cg_max_iters": 128}
    assert found.decoding is None


@pytest.mark.parametrize(("name", "kind"), [("cg", CG()), ("pcg", PCG()), ("pcg_gram", PCG(preconditioner="gram"))])
def test_a_name_goes_to_the_tolerance(name: str, kind: CG):
    found = told(name, 0.1)
    preconditioner = {"preconditioner": kind.preconditioner} if isinstance(kind, PCG) else {}
    assert found.training == {"solver": type(kind)(tolerance=0.1, max_iters=128, **preconditioner)}
    assert found.exact == {"solver": type(kind)(rtol=0.0, max_iters=128, **preconditioner)}
    assert found.decoding is None


def test_an_object_has_its_own_and_is_exact_where_it_must_be():
    solver = PCG(rtol=1e-5, max_iters=1000, preconditioner="gram")
    found = told(solver)
    assert found.training == {"solver": solver}
    assert found.exact == {"solver": PCG(rtol=0.0, max_iters=1000, preconditioner="gram")}
    assert found.decoding is None


@pytest.mark.parametrize("solver", ["direct", Direct()])
def test_direct_is_exact(solver):
    assert told(solver) == ({"solver": solver}, {"solver": solver}, None)


def test_a_solver_of_ones_own_is_used_as_it_is():
    @dataclass(frozen=True)
    class Mine(CG):
        pass

    flashlla.register_solver("mine", Mine())
    for solver in (Mine(), "mine"):
        assert told(solver) == ({"solver": solver}, {"solver": solver}, solver)


@pytest.mark.parametrize(
    ("solver", "tolerance", "error", "words"),
    [
        (None, 1.0, ValueError, "tolerance: got 1.0, wanted a number from 0 to below 1"),
        (None, "a", TypeError, "tolerance: got str"),
        (None, None, TypeError, "tolerance: got NoneType, wanted a number"),
        (CG(), 0.1, ValueError, "tolerance: got 0.1 together with solver=CG"),
        ("direct", 0.1, ValueError, "tolerance: got 0.1 together with solver='direct'"),
        ("cgs", 1e-2, ValueError, "solver: got 'cgs' .did you mean 'cg'"),
        (3, 1e-2, TypeError, "solver: got int, wanted a name"),
        (CG, 1e-2, TypeError, "solver: got "),
    ],
)
def test_misfits_are_refused(solver, tolerance, error, words):
    with pytest.raises(error, match=words):
        told(solver, tolerance)
