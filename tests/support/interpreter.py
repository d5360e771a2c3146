"""Triton's interpreter, a few times faster, and its products as GPUs make them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def hasten() -> None:
    """Let a device function be called without patching ``triton.language`` anew.

    The interpreter patches it when a kernel starts and again at every call of a device function inside it, which takes
    most of its time. Once for each module that device functions come from is enough.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    _read_by_item(interpreter)
    _mask_by_truth(interpreter)
    _add_in_order(interpreter)
    patched: set[int] = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **keywords: object) -> object:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


def _read_by_item(interpreter: Any) -> None:
    """Triton 3.6 reads a number by ``int(array)`` of an array of one element, which NumPy refuses from 2.4 on."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _mask_by_truth(interpreter: Any) -> None:
    """Triton 3.9 makes numbers of masks that a truth of Python's is part of, and then refuses them."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    true = lambda mask: interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
    builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, true(mask), *rest)
    builder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, true(mask), *rest)


def _add_in_order(interpreter: Any) -> None:
    """Products of float32 are sums of fused multiply-adds, one term after the other: the same bits in a product as in
    its transpose, which BLAS does not promise, and kernels that compute weights anew in another pass count on."""
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def in_order(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype != np.float32:
            return dot(self, a, b, d, *rest)
        rows, columns, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for i in range(rows.shape[-1]):
            total = (rows[..., :, i, None] * columns[..., None, i, :] + total).astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    builder.create_dot = in_order
