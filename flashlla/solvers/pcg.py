"""Preconditioned conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashlla.covariance import Systems
from flashlla.hints import SOLVER, with_hints
from flashlla.solvers.base import Solution, Spelling
from flashlla.solvers.cg import CG, conjugate_gradients
from flashlla.solvers.preconditioners import NAMED, Preconditioner

_WANTED = f"{' or '.join(map(repr, NAMED))}, or a Preconditioner object"


@with_hints(SOLVER)
@dataclass(frozen=True)
class PCG(CG):
    """Conjugate gradients with a preconditioner; the stopping rule is that of :class:`CG`.

    Args:
        atol, rtol, max_iters, tolerance: as in :class:`CG`.
        preconditioner: "jacobi" (the default), "gram" (:class:`Gram`) or a :class:`Preconditioner` object.

    Raises:
        ValueError: as :class:`CG`, or the preconditioner's name is not known.
        TypeError: the preconditioner is neither a name nor a :class:`Preconditioner`.

    Source: docs/math.md, section 4.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 20, 4).unbind(0)
        >>> o = flashlla.lla_attention(q, k, v, solver=flashlla.PCG(max_iters=64))
    """

    preconditioner: str | Preconditioner = "jacobi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.preconditioner, str):
            if self.preconditioner not in NAMED:
                raise ValueError(f"preconditioner: got {self.preconditioner!r}, wanted {_WANTED}")
        elif not isinstance(self.preconditioner, Preconditioner):
            raise TypeError(f"preconditioner: got {type(self.preconditioner).__name__}, wanted {_WANTED}")

    @property
    def preconditioner_object(self) -> Preconditioner:
        """The preconditioner, whatever name it goes by."""
        return NAMED[self.preconditioner] if isinstance(self.preconditioner, str) else self.preconditioner

    def spelled(self) -> Spelling | None:
        for name, named in NAMED.items():
            if named == self.preconditioner_object:
                return Spelling("pcg" if name == "jacobi" else f"pcg_{name}", self._numbers())
        return None

    def with_numbers(self, *numbers: float) -> PCG:
        atol, rtol, max_iters = numbers
        return PCG(atol, rtol, int(max_iters), self.preconditioner)

    def described(self) -> str:
        return repr(self)  # which preconditioner it has decides who can run it

    def solve(self, systems: Systems, b: Tensor) -> Solution:
        apply = self.preconditioner_object.prepare_checked(systems)
        return conjugate_gradients(systems, b, self.atol, self.rtol, self.max_iters, apply)
