"""Warnings that are given once a reason, not once a call."""

from __future__ import annotations

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
    warnings.warn(f"flashlla: {message}", category, stacklevel=3)


def forget() -> None:
    """Give every warning again, as in a new process; for tests."""
    with _lock:
        _given.clear()
