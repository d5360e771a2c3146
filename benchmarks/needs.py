"""What a command needs of the machine."""

from __future__ import annotations

import importlib.util

import torch


class Missing(Exception):
    """What is not there and what to try, in one sentence."""


def cuda() -> None:
    if not torch.cuda.is_available():
        raise Missing(
            "it needs an NVIDIA GPU, and torch finds none; try `python -m benchmarks run --device cpu`, which takes "
            "any machine, or `nvidia-smi` to see whether the driver does"
        )


def triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise Missing("it needs Triton, which is not installed; try `pip install triton` (Linux only)")
