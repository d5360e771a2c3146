"""Solvers for the small ridge systems, and the names they go by."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from threading import Lock

import torch

from flashlla.covariance import Systems
from flashlla.hints import with_hints
from flashlla.solvers.base import Solution, Solver, Spelling
from flashlla.solvers.cg import CG
from flashlla.solvers.direct import Direct
from flashlla.solvers.pcg import PCG
from flashlla.solvers.preconditioners import Gram, Jacobi, Preconditioner

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

# The solvers of this package, at their defaults: a line for each name.
_OWN: tuple[Solver, ...] = (
    CG(),
    PCG(),
    PCG(preconditioner="gram"),
    Direct(),
)
_OWN_CLASSES = tuple(type(solver) for solver in _OWN)
# Names of those that iterate, to a tolerance.
ITERATIVE = tuple(own.name for solver in _OWN if isinstance(solver, CG) and (own := solver.spelled()))
# All that go by a name; and the names of objects that came without one.
_named: dict[str, Solver] = {own.name: solver for solver in _OWN if (own := solver.spelled())}
_unnamed: dict[Solver, str] = {}
_kept = frozenset(_named)  # the operators spell this package's solvers so
_lock = Lock()


@with_hints()
def register_solver(name: str, solver: Solver, *, overwrite: bool = False) -> None:
    """Make ``solver`` known as ``solver=name``.

    An object works as ``solver=`` without it; a name is what ``torch.compile(fullgraph=True)`` can carry for a solver
    of your own. Either way it is kept as long as the process runs: make one and use it again.

    Args:
        name: what it is to be called.
        solver: the object.
        overwrite: take the place of the solver that has the name, if there is one: of all calls from here on, those of
            functions that are compiled among them, and of the backward passes of earlier ones. A solver of this package
            is not replaced. Default False: a name that is taken is an error.

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
        if not name or name in (_kept if overwrite else _named) or name in _unnamed.values():
            hint = "" if overwrite else "; overwrite=True replaces a solver of yours"
            raise ValueError(f"name: got {name!r}, wanted a new name (taken: {', '.join(_named)}){hint}")
        _named[name] = solver


def spelling(solver: Solver) -> Spelling | None:
    """The name and numbers of a solver of this package; None for any other, a subclass of one of these too."""
    return solver.spelled() if type(solver) in _OWN_CLASSES else None


def to_spelling(solver: str | Solver) -> Spelling:
    """``solver`` as a name and numbers; the inverse of :func:`from_spelling`. Names are looked up there, not here."""
    if isinstance(solver, str):
        return Spelling(solver, [])
    if (own := spelling(solver)) is not None:
        return own
    if torch.compiler.is_compiling():
        kind = type(solver).__name__
        raise TypeError(
            f"solver: got a {kind} object inside torch.compile, wanted a name; try flashlla.register_solver('mine', "
            f"{kind}(...)) outside, once, and solver='mine'"
        )
    return Spelling(_name_object(solver), [])


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
            _named[name] = solver
        return _unnamed[solver]


def from_spelling(name: str, numbers: Sequence[float]) -> Solver:
    """The solver that goes by ``name``, with ``numbers`` instead of its own if there are any."""
    try:
        solver = _named[name]
    except KeyError:
        known = [n for n in _named if n not in _unnamed.values()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"solver: got {name!r}{hint}, wanted one of {', '.join(known)} or a Solver object") from None
    return _with_numbers(solver, tuple(numbers)) if numbers else solver


@functools.lru_cache(maxsize=256)
def _with_numbers(solver: Solver, numbers: tuple[float, ...]) -> Solver:
    return solver.with_numbers(*numbers)
