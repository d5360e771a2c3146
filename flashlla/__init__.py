"""Local Linear Attention (Zuo et al., ICLR 2026): exact, differentiable, on any machine.

The public names are those listed here; README.md shows them at work.
"""

from typing import Any

from flashlla import flops, nn, ops
from flashlla.api import LLAInfo, lla_attention, lla_attention_varlen, lla_decode, take_dtensors
from flashlla.backends.base import Backend
from flashlla.calls import LLAFunction, explain
from flashlla.convergence import ConvergenceCounter
from flashlla.crosscheck import verify
from flashlla.dispatch import (
    UnsupportedError,
    available_backends,
    get_backend,
    register_backend,
    set_backend,
)
from flashlla.notices import ConvergenceWarning, FallbackWarning
from flashlla.solvers import CG, PCG, Direct, Preconditioner, Solution, Solver, register_solver
from flashlla.version import __version__
from flashlla.warming import warmup

__all__ = [
    "CG",
    "PCG",
    "Backend",
    "ConvergenceCounter",
    "ConvergenceWarning",
    "Direct",
    "FallbackWarning",
    "LLAFunction",
    "LLAInfo",
    "Preconditioner",
    "Solution",
    "Solver",
    "UnsupportedError",
    "__version__",
    "available_backends",
    "explain",
    "get_backend",
    "lla_attention",
    "lla_attention_varlen",
    "lla_decode",
    "nn",
    "ops",
    "register_backend",
    "register_solver",
    "set_backend",
    "verify",
    "warmup",
]

flops.register()


@take_dtensors
def _on_dtensors(*tensors: Any, **options: Any) -> Any:
    from flashlla.distributed import dtensor  # not before there are any: it takes torch a while to import

    return dtensor.attention(*tensors, **options)
