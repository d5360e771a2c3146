"""The published package's module of reference functions."""

from flashlla.ops import naive

__all__ = ["naive"]
