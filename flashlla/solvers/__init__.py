"""Solvers for the small ridge systems, and the names they go by."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from threading import Lock

import torch

from flashlla.covariance import Systems
from flashlla.solvers.base import Solution, Solver
from flashlla.solvers.cg import CG, PCG, Gram, Jacobi, Preconditioner
from flashlla.solvers.direct import Direct

__all__ = [
    "CG",
    "PCG",
    "Direct",
    "Gram",
    "Jacobi",
    "Preconditioner",
    "Solution",
    "Solver",
    "Systems",
    "register_solver",
]

# Operators of torch.library take numbers and strings, no Python objects: a solver crosses that border as a name and a
# list of numbers, and `decode` makes it again on the other side.
_makers: dict[str, Callable[..., Solver]] = {
    "cg": lambda atol=1e-12, rtol=1e-12, max_iters=32: CG(atol, rtol, int(max_iters)),
    "pcg": lambda atol=1e-12, rtol=1e-12, max_iters=32: PCG(atol, rtol, int(max_iters)),
    "pcg_gram": lambda atol=1e-12, rtol=1e-12, max_iters=32: PCG(atol, rtol, int(max_iters), "gram"),
    "direct": Direct,
}
_unnamed: dict[Solver, str] = {}
_lock = Lock()


def register_solver(name: str, solver: Solver) -> None:
    """Make ``solver`` known as ``solver=name``.

    An object works as ``solver=`` without it; a name is what ``torch.compile(fullgraph=True)`` can carry for a solver
    of your own. Either way it is kept as long as the process runs: make one and use it again.

    Raises:
        ValueError: the name is empty or taken.
        TypeError: ``solver`` is not a :class:`Solver`.

    Example:
        >>> import flashlla
        >>> flashlla.register_solver("patient_cg", flashlla.CG(max_iters=500))
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: got {type(solver).__name__}, wanted a flashlla.Solver object")
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, wanted a string")
    with _lock:
        if not name or name in _makers:
            raise ValueError(f"name: got {name!r}, wanted a new name (taken: {', '.join(_makers)})")
        _makers[name] = lambda: solver


def encode(solver: str | Solver) -> tuple[str, list[float]]:
    """``solver`` as a name and numbers; the inverse of :func:`decode`. Names are looked up there, not here."""
    if isinstance(solver, str):
        return solver, []
    if type(solver) is CG:
        return "cg", [solver.atol, solver.rtol, float(solver.max_iters)]
    if type(solver) is PCG and type(solver.preconditioner_object) in (Jacobi, Gram):
        name = "pcg" if type(solver.preconditioner_object) is Jacobi else "pcg_gram"
        return name, [solver.atol, solver.rtol, float(solver.max_iters)]
    if type(solver) is Direct:
        return "direct", []
    if torch.compiler.is_compiling():
        kind = type(solver).__name__
        raise TypeError(
            f"solver: got a {kind} object inside torch.compile, wanted a name; try flashlla.register_solver('mine', "
            f"{kind}(...)) outside, once, and solver='mine'"
        )
    return _name_object(solver), []


def _name_object(solver: Solver) -> str:
    try:
        hash(solver)
    except TypeError as error:
        raise TypeError(
            f"solver: got a {type(solver).__name__}, which is not hashable, wanted one that is; "
            f"try @dataclass(frozen=True) on the class and tuples for lists"
        ) from error
    with _lock:
        if solver not in _unnamed:
            name = f"{type(solver).__name__} object {len(_unnamed)}"
            _unnamed[solver] = name
            _makers[name] = lambda: solver
        return _unnamed[solver]


def decode(name: str, settings: Sequence[float]) -> Solver:
    """The solver that goes by ``name``."""
    try:
        maker = _makers[name]
    except KeyError:
        known = [n for n in _makers if n not in _unnamed.values()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"solver: got {name!r}{hint}, wanted one of {', '.join(known)} or a Solver object") from None
    return maker(*settings)
