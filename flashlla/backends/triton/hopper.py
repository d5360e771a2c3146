"""Where kernels in Gluon for Hopper run, and in words where not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from flashlla.backends.triton import configs
from flashlla.backends.triton.runtime import Kernel
from flashlla.problem import Problem

# Gluon moves from version to version: those that the kernels were compiled with.
TRITON = ("3.6", "3.7")
# Where the kernel of a pass is.
MODULES = {"forward": "forward_hopper", "solve": "solve_hopper", "dq": "dq_hopper", "dk": "dk_hopper"}


def allowed() -> bool:
    """Whether it lets those run that are faster than the plain ones wherever they can, as decoding's."""
    return os.environ.get("FLASHLLA_HOPPER") != "0"


@functools.cache
def without_gluon() -> str | None:
    """Why they cannot be compiled; None where they can."""
    import triton

    if triton.__version__.startswith(tuple(f"{version}." for version in TRITON)) and (
        importlib.util.find_spec("triton.experimental.gluon") is not None
    ):
        return None
    return f"it is written for Gluon of Triton {' and '.join(TRITON)}, and this is {triton.__version__}"


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel in Gluon runs on tensors of ``dtype``; None where one may."""
    if device.type == "cpu":
        return "Gluon has no interpreter"
    major, minor = configs.capability(device)
    if (major, minor) != (9, 0):
        return f"it is made of Hopper's instructions (compute capability 9.0), and {device} has {major}.{minor}"
    if (reason := without_gluon()) is not None:
        return reason
    if dtype == torch.float32:
        return "its operands are of 16 bits, and these of 32"
    return None


def config(name: str, problem: Problem) -> configs.HopperConfig | None:
    """That of pass ``name``, where a kernel in Gluon has it."""
    if unsupported(problem.device, problem.dtype) is not None or problem.head_dim != problem.v_dim:
        return None
    return configs.HOPPER.get(problem.head_dim, {}).get(name)


@functools.cache
def kernel(name: str) -> Kernel:
    """That of pass ``name``; not imported before, for it takes Gluon."""
    found: Kernel = getattr(
        importlib.import_module(f"flashlla.backends.triton.{MODULES[name]}"), f"{name}_hopper_kernel"
    )
    return found
