"""How exactly a layer solves, when, and by which solver."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flashlla.nn.checks import check_numbers
from flashlla.solvers import CG, PCG, Direct, Solver, from_spelling

# Names that say nothing of a tolerance.
_WITHOUT_TOLERANCE = ("cg", "pcg", "pcg_gram")


class Solving(NamedTuple):
    """What a layer's calls say of the solver, by keyword."""

    training: dict[str, Any]  # to a layer's tolerance
    exact: dict[str, Any]  # to what the dtype resolves
    decoding: Solver | str | None  # the same for new tokens against a cache; None: as decoding does by itself


def solving(solver: str | Solver | None, tolerance: float, default: float, head_dim: int) -> Solving:
    """``tolerance`` is a layer's, its ``default`` where the caller said nothing of it."""
    check_numbers(tolerance=tolerance)
    # In exact arithmetic conjugate gradients end after head_dim steps; rounding may take them some more.
    most = max(64, 4 * head_dim)
    loose, tight = CG(tolerance=tolerance, max_iters=most), CG(tolerance=0.0, max_iters=most)
    if solver is None:
        to = lambda cg: {"tolerance": cg.tolerance, "cg_max_iters": cg.max_iters}
        return Solving(to(loose), to(tight), None)
    found = from_spelling(solver, []) if isinstance(solver, str) else solver
    if not isinstance(found, Solver):
        raise TypeError(f"solver: got {type(solver).__name__}, wanted a name, a flashlla.Solver object or None")
    if solver not in _WITHOUT_TOLERANCE and tolerance != default:
        raise ValueError(
            f"tolerance: got {tolerance} together with solver={solver!r}, wanted one of the two: the solver has a "
            f"tolerance of its own, or needs none"
        )
    if type(found) in (CG, PCG):
        exact = _reaching(found, tight)
        training = _reaching(found, loose) if solver in _WITHOUT_TOLERANCE else solver
        return Solving({"solver": training}, {"solver": exact}, None)
    return Solving({"solver": solver}, {"solver": solver}, None if type(found) is Direct else solver)


def _reaching(solver: Solver, other: CG) -> Solver:
    """``solver`` with the tolerance of the ``other``, and no fewer iterations than either."""
    assert isinstance(solver, CG)
    most = max(solver.max_iters, other.max_iters)
    return dataclasses.replace(solver, rtol=CG.rtol, tolerance=other.tolerance, max_iters=most)
