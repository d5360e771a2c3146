"""Triton's interpreter, a few times faster."""

from __future__ import annotations

import os


def hasten() -> None:
    """Let a device function be called without patching ``triton.language`` anew.

    The interpreter patches it when a kernel starts and again at every call of a device function inside it, which takes
    most of its time. Once for each module that device functions come from is enough.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patched: set[int] = set()

    def call(self: interpreter.InterpretedFunction, *arguments: object, **keywords: object) -> object:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call
