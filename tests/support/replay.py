"""Compiled kernels without a GPU: they take addresses, as Triton's do, and run in its interpreter."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest
import torch

LAUNCHES = Counter[str]()


class Binary:
    """Of a kernel that was launched with such ``arguments``."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any], computes: bool) -> None:
        self.kernel, self.arguments, self.settings, self.computes = kernel, arguments, settings, computes

    def run(self, x: int, y: int, z: int, stream: int, function: None, metadata: None, *rest: Any) -> None:
        LAUNCHES["by address"] += 1
        launch_metadata, enter, leave, *given = rest
        assert launch_metadata is enter is leave is None
        given = given[: len(self.arguments)]
        if self.computes:
            self.kernel[x, y, z](*map(_tensors, self.arguments, given), **self.settings)


def _tensors(like: Any, given: Any) -> Any:
    """``given`` with tensors for addresses, where ``like`` has buffers."""
    if hasattr(like, "data_ptr"):
        memory = (ctypes.c_char * like.dtype.itemsize).from_address(given)
        return torch.frombuffer(memory, dtype=like.dtype)
    if isinstance(like, tuple):
        assert len(like) == len(given)
        return type(like)(*map(_tensors, like, given))
    assert like is None or type(like) is type(given)
    return given


def compiles(monkeypatch: pytest.MonkeyPatch, computes: bool = True) -> None:
    """Let the interpreter's kernels be compiled to such; unless ``computes``, to what does nothing."""
    from flashlla.backends.triton import plan, runtime

    def compile(kernel: Any, device: torch.device, arguments: Any, settings: dict[str, Any]) -> runtime.Compiled:
        LAUNCHES["compiled"] += 1
        binary = Binary(kernel, arguments, settings, computes)
        parameters = tuple(settings[parameter] for parameter in kernel.arg_names[len(arguments) :])
        return runtime.Compiled(binary, binary.run, (None,) * 5, parameters, kernel)

    LAUNCHES.clear()
    plan.forget()
    monkeypatch.setattr(runtime, "_compile", compile)
    monkeypatch.setattr(runtime, "compiled", {})
    monkeypatch.setattr(runtime, "stream", lambda device: 0)
