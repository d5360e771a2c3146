"""Warnings that are given once a reason, not once a call."""

from __future__ import annotations

import sys
import warnings
from threading import Lock

_given: set[str] = set()
_lock = Lock()


class FallbackWarning(UserWarning):
    """A preferred backend could not run a call, and another one did."""


class ConvergenceWarning(UserWarning):
    """A solver stopped before it reached its tolerance."""


def warn_once(reason: str, message: str, category: type[Warning]) -> None:
    """Warn with ``message`` unless ``reason`` has been given in this process."""
    with _lock:
        if reason in _given:
            return
        _given.add(reason)
    warnings.warn(f"flashlla: {message}", category, stacklevel=_caller())


def _caller() -> int:
    """The stack level, seen from `warn_once`, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("flashlla", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def forget() -> None:
    """Give every warning again, as in a new process; for tests."""
    with _lock:
        _given.clear()
