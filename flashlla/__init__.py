"""Local Linear Attention (Zuo et al., ICLR 2026): exact, differentiable, on any machine.

The public names are those listed here; README.md shows them at work.
"""

from flashlla import ops
from flashlla.api import LLAFunction, LLAInfo, explain, lla_attention
from flashlla.autograd import ConvergenceWarning
from flashlla.backends.base import Backend
from flashlla.crosscheck import verify
from flashlla.dispatch import (
    FallbackWarning,
    UnsupportedError,
    available_backends,
    get_backend,
    register_backend,
    set_backend,
)
from flashlla.solvers import CG, PCG, Direct, Preconditioner, Solution, Solver, register_solver

__version__ = "0.2.0"

__all__ = [
    "CG",
    "PCG",
    "Backend",
    "ConvergenceWarning",
    "Direct",
    "FallbackWarning",
    "LLAFunction",
    "LLAInfo",
    "Preconditioner",
    "Solution",
    "Solver",
    "UnsupportedError",
    "available_backends",
    "explain",
    "get_backend",
    "lla_attention",
    "ops",
    "register_backend",
    "register_solver",
    "set_backend",
    "verify",
]
